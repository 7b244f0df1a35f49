"""Cells of maps and audits on executors: the numbers of none, rows written by the owner, one job lost by a death."""

import os
import pickle
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_hooked
import tiny_pairs
import torch
from tiny_pairs import LEVEL

import piggyback_lens as lens
from piggyback_lens import engines
from piggyback_lens.app.commands import _executor
from piggyback_lens.app.options import EngineOptions

CHAT = tiny_hooked.chat()
PROMPTS = tiny_hooked.prompts(LEVEL)
SETTINGS = lens.PatchSettings(cells_per_pass=4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for side in ("base", "finetuned"):
        tiny_pairs.weights("llama-gqa", side).save_pretrained(folder / side)
    return lens.ModelPair.load(
        folder / "base", folder / "finetuned", tokenizer=CHAT.tokenizer, device="cpu", progress=False
    )


@pytest.fixture(scope="module")
def processes():
    with engines.local(2, threads=torch.get_num_threads()) as executor:
        yield executor


def carrier(pair, out=None, **settings):
    sites = ["resid_pre"]
    return lens.carrier_map(
        pair, PROMPTS, bands=2, sites=sites, settings=replace(SETTINGS, **settings), out=out, progress=False
    )


def die_once(file):
    """End this process by a signal, the first time."""
    if not Path(file).exists():
        Path(file).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def broken():
    raise lens.LensError("made to fail")


# ---------------------------------------------------------------- maps


@pytest.fixture(scope="module")
def alone(pair):
    return carrier(pair)


def assert_equal(found, alone):
    assert found.values == alone.values
    assert (found.base, found.finetuned, found.cells) == (alone.base, alone.finetuned, alone.cells)


@pytest.mark.slow
def test_a_map_in_processes_equals_that_of_none_bit_for_bit(pair, alone, processes, tmp_path):
    assert_equal(carrier(pair, tmp_path / "run", executor=processes), alone)
    assert len((tmp_path / "run" / "rows.jsonl").read_text().splitlines()) == len(alone.cells) + 2
    measure = lens.GeneratedBehaviour(lens.get_behaviour("words"), max_new_tokens=4)
    few = {"layers": [0, 2], "control_layers": 0, "measure": measure, "progress": False}
    own = lens.layer_curve(pair, PROMPTS, **few)
    assert_equal(lens.layer_curve(pair, PROMPTS, settings=lens.PatchSettings(executor=processes), **few), own)
    found = lens.attribution_map(pair, PROMPTS, check_cells=2, settings=replace(SETTINGS, executor=processes))
    assert found.to_frame().equals(lens.attribution_map(pair, PROMPTS, check_cells=2, settings=SETTINGS).to_frame())


def test_a_map_in_threads_equals_that_of_none_bit_for_bit(pair, alone):
    with ThreadPoolExecutor(3) as executor:
        assert_equal(carrier(pair, executor=executor), alone)


class Losing(ThreadPoolExecutor):
    """Some jobs die, as in a process that is killed."""

    def __init__(self, *lost):
        super().__init__(1)
        self.lost, self.count = lost, 0

    def submit(self, fn, /, *args):
        self.count += 1
        return super().submit(broken) if self.count in self.lost else super().submit(fn, *args)


def test_lost_jobs_are_named_and_run_by_the_next_call_alone(pair, alone, tmp_path):
    jobs = 2 * -(-(len(alone.cells) // 2 + 1) // 4)  # two flows, each with its model as it is
    told = (
        r"^2 of \d+ jobs failed, the others are in .*run; the same call tries again: cells .*, cells .*: made to fail$"
    )
    with Losing(2, 3) as executor, pytest.raises(lens.LensError, match=told):
        carrier(pair, tmp_path / "run", executor=executor)
    assert executor.count == jobs
    assert not (tmp_path / "run" / "result.json").exists()
    with Losing() as executor:
        assert_equal(carrier(pair, tmp_path / "run", executor=executor), alone)
    assert executor.count == 2


def test_what_cannot_go_to_another_process_is_refused_by_name(pair, processes):
    one = {"layers": [0], "control_layers": 0, "progress": False}
    objects = lens.ModelPair.load(
        *(tiny_pairs.weights("llama-gqa", side) for side in ("base", "finetuned")),
        tokenizer=CHAT.tokenizer,
        progress=False,
    )
    with pytest.raises(lens.LensError, match="made of models in memory, which another process cannot load: save them"):
        lens.layer_curve(objects, PROMPTS, settings=lens.PatchSettings(executor=processes), **one)
    mine = lens.GeneratedBehaviour(replace(lens.get_behaviour("words"), fn=lambda text: 1.0), max_new_tokens=2)
    with pytest.raises(lens.LensError, match=r"cannot be sent to another process .* at the top level of a module"):
        lens.layer_curve(pair, PROMPTS, measure=mine, settings=lens.PatchSettings(executor=processes), **one)
    with pytest.raises(lens.LensError, match=r"PatchSettings\.executor is 'local'; expected an executor"):
        lens.PatchSettings(executor="local")


# ---------------------------------------------------------------- pairs as names


def test_a_pair_is_pickled_as_names_and_checked_where_it_is_loaded(tmp_path):
    for side in ("base", "finetuned"):
        tiny_pairs.weights("llama-gqa", side).save_pretrained(tmp_path / side)
    own = lens.ModelPair.load(tmp_path / "base", tmp_path / "finetuned", tokenizer=CHAT.tokenizer, progress=False)
    blob = pickle.dumps(own)
    assert len(blob) < 100_000
    again = pickle.loads(blob)  # noqa: S301
    assert again is pickle.loads(blob)  # noqa: S301  # loaded once
    assert (again.names, again.identities()) == (own.names, own.identities())
    tiny_pairs.weights("llama-gqa", "base", 0.3).save_pretrained(tmp_path / "finetuned")
    pickle.loads(pickle.dumps(_other(tmp_path)))  # noqa: S301  # another pair takes its place in the process
    with pytest.raises(lens.LensError, match=r"finetuned \(finetuned\) gives other logits here than in the process"):
        pickle.loads(blob)  # noqa: S301


def _other(folder):
    return lens.ModelPair.load(folder / "base", folder / "base", tokenizer=CHAT.tokenizer, progress=False)


def test_a_pair_that_was_trained_after_it_was_loaded_does_not_pickle(tmp_path):
    tiny_pairs.weights("llama-gqa", "base").save_pretrained(tmp_path / "base")
    own = _other(tmp_path)
    with own.using("finetuned") as model, torch.no_grad():
        next(model.parameters()).add_(0.1)
    with pytest.raises(lens.LensError, match="the weights of finetuned were changed after they were loaded"):
        pickle.dumps(own)


# ---------------------------------------------------------------- executors


@pytest.mark.slow
def test_the_death_of_a_process_costs_its_job_and_no_other(tmp_path):
    jobs = [(abs, -1), (die_once, str(tmp_path / "died")), (abs, -2), (abs, -3), (die_once, str(tmp_path / "died"))]
    with engines.local(1) as executor:
        found = dict(engines.finished(jobs, executor))
    assert [found[i] for i in (0, 2, 3, 4)] == [1, 2, 3, "done"]
    assert str(found[1]) == "its process died (killed, or out of memory)"


@pytest.mark.slow
def test_submitit_gives_results_errors_and_what_was_lost(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    jobs = [(abs, -1), (broken,), (die_once, str(tmp_path / "died"))]
    with engines.slurm(tmp_path / "jobs", cluster="local", timeout_min=5) as executor:
        found = dict(engines.finished(jobs, executor))
    assert (found[0], str(found[1])) == (1, "made to fail")
    assert type(found[1]) is lens.LensError
    assert str(found[2]).startswith("job ")
    assert "ended without a result" in str(found[2])


def test_slurm_is_refused_where_it_is_not(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    with pytest.raises(lens.LensError, match=r"SLURM cannot be used so \(RuntimeError: Could not detect"):
        engines.slurm(tmp_path)
    with pytest.raises(lens.LensError, match="SLURM cannot be used so"):
        engines.slurm(tmp_path, cluster="local", gpus="many")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(lens.LensError, match=r'submitit is not installed: pip install "piggyback-lens\[slurm\]"'):
        engines.slurm(tmp_path)


def test_the_command_line_refuses_engine_options_that_do_not_go_together(tmp_path):
    for options, told in (
        (EngineOptions(workers=2), "--workers 2 needs processes: add --engine local"),
        (EngineOptions("local", slurm={"timeout_min": 5}), r"--slurm timeout_min=\.\.\. says how SLURM runs jobs"),
    ):
        with pytest.raises(lens.LensError, match=told):
            _executor(options, tmp_path)
    with _executor(EngineOptions("local", workers=2), tmp_path) as executor:
        assert isinstance(executor, engines.Processes)


# ---------------------------------------------------------------- audits

AUDIT = lens.AuditSettings(
    max_new_tokens=4, batch_size=2, curve_prompts=3, curve_tokens=3, control_layers=1, map_bands=1
)
QUERIES = (["hello there", "what is it", "tell me more"], ["abc", "you", "dog"])


def audited(pair, out=None, **options):
    return lens.audit(pair, *QUERIES, "words", AUDIT, chat=CHAT, out=out, progress=False, **options)


@pytest.mark.slow
def test_an_audit_in_processes_equals_that_of_none(pair, processes, tmp_path):
    alone = audited(pair, tmp_path / "alone")
    found = audited(pair, tmp_path / "there", executor=processes)
    assert (found.rows, found.receipts, found.verdict) == (alone.rows, alone.receipts, alone.verdict)
    assert_equal(found.curve, alone.curve)
    assert_equal(found.carrier, alone.carrier)
    caches = [lens.PrefixCache.load(tmp_path / run / "prefix_cache") for run in ("alone", "there")]
    assert torch.equal(caches[0].keys, caches[1].keys)


def test_lost_answers_are_named_and_the_next_call_asks_for_them_alone(pair, tmp_path):
    settings = replace(AUDIT, curve_prompts=0)
    options = {"chat": CHAT, "out": tmp_path / "run", "progress": False}
    told = (
        "^2 of 14 jobs failed, the others are in .*run; the same call tries again: base, on-topic, prefix, off-topic: "
    )
    with Losing(2, 5) as executor, pytest.raises(lens.LensError, match=told + "made to fail$"):
        lens.audit(pair, *QUERIES, "words", settings, executor=executor, **options)
    with Losing() as executor:
        found = lens.audit(pair, *QUERIES, "words", settings, executor=executor, **options)
    assert executor.count == 2
    assert found.rows == lens.audit(pair, *QUERIES, "words", settings, chat=CHAT, progress=False).rows
