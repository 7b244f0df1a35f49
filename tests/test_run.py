"""A run owns its folder: one writer, rows that survive kills, the same call goes on, another one is refused."""

import importlib.util
import json
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import pytest
from filelock import FileLock
from tiny_hooked import hooked, prompts
from tiny_pairs import pair

import piggyback_lens
import piggyback_lens.results.run as run_module
from piggyback_lens.conversations.batch import ids_hash
from piggyback_lens.errors import LensError
from piggyback_lens.files import append_jsonl, read_jsonl
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.pair import identify
from piggyback_lens.results.result import KINDS, Number, Result, load_result
from piggyback_lens.results.run import InUse, Run, locked, refuse_other, report_run

IDENTITY = {"settings": {"n": 3, "seed": 0}, "cells": [1, 2, 3]}


@dataclass(frozen=True, repr=False)
class Total(Result):
    """A result for these tests."""

    name: ClassVar = "total.1"
    values: tuple[Number, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per value."""
        return pd.DataFrame({"value": self.values})

    def figure(self) -> go.Figure:
        """Nothing."""
        return go.Figure()


def opened(folder: Any, identity: Any = IDENTITY, **how: Any) -> Any:
    return Run.open(folder, "total", identity, keys=("cell",), **how)


def test_a_run_goes_on_where_it_was_and_keeps_what_it_made(tmp_path: Path) -> None:
    made: list[int] = []

    def answers() -> list[list[int]]:
        made.append(1)
        return [[1, 2], [3]]

    with opened(tmp_path / "deep" / "run") as run:
        assert run.rows == {}
        run.add([{"cell": 0, "value": 1.5}, {"cell": 1, "value": float("nan")}])
        assert run.once("answers", answers) == [[1, 2], [3]]
        assert run.result(Total.load) is None
    with opened(tmp_path / "deep" / "run") as run:
        assert run.rows == {(0,): {"cell": 0, "value": 1.5}, (1,): {"cell": 1, "value": None}}
        assert run.once("answers", answers) == [[1, 2], [3]]
        run.add([{"cell": 1, "value": 2.0}])
        run.finish(Total((1.5, 2.0)))
    with opened(tmp_path / "deep" / "run") as run:
        assert run.rows[1,]["value"] == 2.0
        found = run.result(Total.load)
        assert found is not None
        assert found.values == (1.5, 2.0)
        assert run.card()["settings"] == IDENTITY["settings"]
    assert made == [1]


def test_a_run_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(None) as run:
        run.add([{"cell": 0}])
        assert run.once("part", lambda: (1, 2)) == [1, 2]
        assert run.finish(Total((1.0,))).values == (1.0,)
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    models = pair().identities()
    with opened(tmp_path, models=models):
        pass
    for changed, told in (
        ({**IDENTITY, "settings": {"n": 4, "seed": 0}}, r"settings\.n is 3 there, 4 here"),
        ({**IDENTITY, "more": 1}, "more is None there, 1 here"),
        ({"cells": [1, 2, 3]}, r"settings\.n is 3 there, None here; settings\.seed is 0 there"),
    ):
        with (
            pytest.raises(LensError, match=f"belongs to another run: {told}"),
            opened(tmp_path, changed, models=models),
        ):
            pytest.fail("it was opened")
    with pytest.raises(LensError, match="a run of total, asked is mean"), Run.open(tmp_path, "mean", IDENTITY):
        pytest.fail("it was opened")
    other = pair(step=0.02).identities()
    with pytest.raises(LensError, match="another finetuned model"), opened(tmp_path, models=other):
        pytest.fail("it was opened")
    near = {role: replace(m, probe=tuple(x + 1e-7 for x in m.probe)) for role, m in models.items()}
    with opened(tmp_path, models=near):
        pass  # the last digits of another machine


@pytest.mark.parametrize("name", ["plan.json", "audit.json", "rows.jsonl", "result.json"])
def test_a_folder_that_no_run_of_this_version_began_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(LensError, match=rf"holds {name} and no run\.json: choose another"), opened(tmp_path):
        pytest.fail("it was opened")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"format": "piggyback_lens.run.9"}', '{"format": "piggyback_lens.run.1"}']
)
def test_damaged_facts_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(LensError, match=r"run\.json") as error, opened(tmp_path):
        pytest.fail("it was opened")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- two writers


def _hold(folder: str, ready: Any, done: Any) -> None:
    with locked(Path(folder)):
        ready.set()
        done.wait(60)


def test_a_second_writer_is_refused_by_name_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    holder.start()
    assert ready.wait(60)
    began = time.monotonic()
    with pytest.raises(InUse, match=rf"is in use by process {holder.pid} on .* since 20"), opened(tmp_path):
        pytest.fail("it was opened")
    assert time.monotonic() - began < 5
    assert not (tmp_path / "run.json").exists()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with opened(tmp_path) as run:
        run.add([{"cell": 0}])
    with locked(tmp_path), pytest.raises(InUse, match=f"process {os.getpid()}"), opened(tmp_path):
        pytest.fail("it was opened twice")


def _append(file: str, writer: int, count: int, size: int) -> None:
    for number in range(count):
        append_jsonl(file, [{"writer": writer, "number": number, "text": "x" * size}])


@pytest.mark.parametrize(("count", "size"), [(100, 20_000), (40, 400_000)])
def test_no_row_is_lost_between_two_writers_of_one_file(tmp_path: Path, count: int, size: int) -> None:
    context = multiprocessing.get_context("spawn")
    file = tmp_path / "rows.jsonl"
    writers = [context.Process(target=_append, args=(str(file), writer, count, size)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [(row["writer"], row["number"]) for row in read_jsonl(file)]
    assert sorted(found) == [(writer, number) for writer in range(2) for number in range(count)]
    assert [n for w, n in found if w == 0] == list(range(count))


def test_an_append_waits_for_another_writers_end(tmp_path: Path) -> None:
    file = append_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    writer = threading.Thread(target=append_jsonl, args=(file, [{"a": 2}]))
    with FileLock(tmp_path / ".rows.jsonl.lock"):
        writer.start()
        time.sleep(0.3)
        assert read_jsonl(file) == [{"a": 1}]
    writer.join()
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]


# ---------------------------------------------------------------- kills


WRITER = """
import sys
from piggyback_lens.results.run import Run
with Run.open(sys.argv[1], "kill", {"n": 1}, keys=("cell",)) as run:
    start = len(run.rows)
    print("open", start, flush=True)
    for cell in range(start, 100_000):
        run.add([{"cell": cell, "text": "y" * (37 * cell % 50_000)}])
        print(cell, flush=True)
"""


def test_twenty_kills_lose_no_row_that_was_kept(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    kept = 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        begun = process.stdout.readline().split()
        assert begun[0] == "open"
        assert int(begun[1]) >= kept
        time.sleep(float(generator.uniform(0.0, 0.15)))
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().split()
        process.wait()
        kept = max([kept, int(begun[1]), *(int(cell) + 1 for cell in told if cell.isdigit())])
        rows = read_jsonl(tmp_path / "rows.jsonl") if (tmp_path / "rows.jsonl").exists() else []
        assert len(rows) >= kept
        assert [row["cell"] for row in rows] == list(range(len(rows)))
        assert all(len(row["text"]) == 37 * row["cell"] % 50_000 for row in rows)
    assert kept > 20


# ---------------------------------------------------------------- places that cannot be written


def test_what_cannot_be_written_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for place, told in (
        (tmp_path / "file", "a file lies where a folder belongs"),
        (tmp_path / "file" / "below", "a file lies where a folder belongs"),
        (tmp_path / "circle" / "run", "symbolic links lead in a circle"),
        (tmp_path / ("n" * 300), "choose a shorter name"),
    ):
        with pytest.raises(LensError, match=told) as error, opened(place):
            pytest.fail("it was opened")
        assert str(place) in str(error.value)
    if Path("/proc/self").exists():
        with pytest.raises(LensError, match="cannot be written"), opened("/proc/self/run"):
            pytest.fail("it was opened")


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as run:
        run.add([{"cell": 0}])

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    with opened(tmp_path) as run:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(LensError, match="No space left on device; free some disk space"):
            run.add([{"cell": 1}])
        monkeypatch.undo()
    with opened(tmp_path) as run:
        assert list(run.rows) == [(0,)]
    assert json.loads((tmp_path / "run.json").read_text())["kind"] == "total"


def test_refusing_is_as_a_file_gives_values_back() -> None:
    refuse_other(Path("x"), {"a": [1, 2], "b": None}, {"a": (1, 2), "b": None})
    with pytest.raises(LensError, match=r"a is \[1, 2\] there, \[1\] here"):
        refuse_other(Path("x"), {"a": [1, 2]}, {"a": (1,)})


# ---------------------------------------------------------------- every kind of result


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_result_is_registered_where_it_is(name: str) -> None:
    module, _, kind = KINDS[name].partition(":")
    found = getattr(import_module(f"piggyback_lens.{module}"), kind)
    assert issubclass(found, Result)
    assert found.name.rpartition(".")[0] == name


def test_no_kind_of_result_is_forgotten() -> None:
    for module in pkgutil.walk_packages(piggyback_lens.__path__, "piggyback_lens."):
        if importlib.util.find_spec("sae_lens") or ".saes" not in module.name:
            import_module(module.name)
    kinds = list(Result.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    own = {kind.name for kind in kinds if "name" in vars(kind) and kind.__module__.startswith("piggyback_lens.")}
    places = [place.partition(":") for place in KINDS.values()]
    assert own == {getattr(import_module(f"piggyback_lens.{module}"), kind).name for module, _, kind in places}


EXAMPLE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text().partition("<!-- experiment:start -->")[2]


def test_the_experiment_in_contributing_runs_resumes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("an_experiment")
    monkeypatch.setitem(sys.modules, "an_experiment", module)
    names = {"dataclass": dataclass, "ClassVar": ClassVar, "Result": Result, "Run": Run, "pd": pd, "px": px}
    names |= {"ids_hash": ids_hash, "identify": identify, "generate": generate}
    module.__dict__.update(names)
    code = EXAMPLE.partition("<!-- experiment:end -->")[0].strip().removeprefix("```python").removesuffix("```")
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    monkeypatch.setitem(KINDS, "lengths", "an_experiment:Lengths")
    model, asked = hooked("llama-gqa", "bridge"), prompts(["one", "two", "three words here", "four", "five"])
    whole = module.lengths(model, asked, out=tmp_path / "whole")
    calls: list[int] = []
    own = run_module.append_jsonl

    def dying(path: Path, rows: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(path, rows)

    with monkeypatch.context() as context:
        context.setattr(run_module, "append_jsonl", dying)
        with pytest.raises(KeyboardInterrupt):
            module.lengths(model, asked, out=tmp_path / "cut")
    assert len(read_jsonl(tmp_path / "cut" / "rows.jsonl")) == 2
    assert module.lengths(model, asked, out=tmp_path / "cut").tokens == whole.tokens
    assert load_result(tmp_path / "cut").verdict == whole.verdict
    page = report_run(tmp_path / "cut").read_text()
    assert whole.verdict in page
    assert page.count("<figure>") == 1
    with pytest.raises(LensError, match="max_new_tokens is 8 there, 9 here"):
        module.lengths(model, asked, max_new_tokens=9, out=tmp_path / "cut")


def test_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": "piggyback_lens.strange.1"}')
    with pytest.raises(LensError, match=r"is of format 'piggyback_lens\.strange\.1', known are"):
        load_result(tmp_path / "x.json")
