"""Run: what owns an output folder while an experiment writes into it, and says whether it may be continued.

    with Run.open(out, "layer_curve", {"cells": ..., "n": 40}, models=pair.identities(), keys=("cell",)) as run:
        for row in missing(run.rows):
            run.add([row])                       # on the disk when this returns
        return run.finish(result)                # result.json, and what the run took

A folder holds run.json (what the run is), rows.jsonl (what it has so far), parts that were computed once and
result.json. The same call continues where a killed one stopped; another experiment is refused before anything is
computed, and so is a second process.
"""

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from piggyback_lens.card import machine, peak_memory, versions
from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.conversations.token_view import TokenView
from piggyback_lens.errors import LensError
from piggyback_lens.files import append_jsonl, ensure_folder, read_json, read_jsonl, write_json
from piggyback_lens.models.pair import Identity
from piggyback_lens.results.report import Part
from piggyback_lens.results.result import Result, load_result

FORMAT = "piggyback_lens.run.1"
FACTS, ROWS, RESULT = "run.json", "rows.jsonl", "result.json"
OLDER = ("plan.json", "audit.json", "perturb.json", "stress.json", "grid.json", "answers.json")
"""What folders of 0.1.0 have in place of run.json."""

Row = dict[str, Any]
Key = tuple[Any, ...]
Made = TypeVar("Made")
Found = TypeVar("Found", bound=Result)


class InUse(LensError):
    """Another process has the folder."""


@dataclass(eq=False)
class Run:
    """One experiment in its folder, or in memory where it has none.

    Attributes:
        kind: of experiment.
        identity: what makes two runs the same, JSON-able.
        models: the models that run, by role, told apart by their logits.
        keys: names of the columns that tell rows apart.
        folder: None keeps everything in memory.
        prompt: one of those that are given, for the report.
        rows: what is there, by key.
    """

    kind: str
    identity: Mapping[str, Any]
    models: Mapping[str, Identity]
    keys: tuple[str, ...] = ()
    folder: Path | None = None
    prompt: RenderedPrompt | None = None
    rows: dict[Key, Row] = field(default_factory=dict)
    _notes: dict[str, list[Row]] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _before: float = 0.0

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: str | Path | None,
        kind: str,
        identity: Mapping[str, Any],
        *,
        models: Mapping[str, Identity] | None = None,
        keys: Sequence[str] = (),
        prompt: RenderedPrompt | None = None,
    ) -> Iterator["Run"]:
        """Begin the folder or continue it, and keep it until the block ends.

        Args:
            folder: made where it is missing; None writes nothing.
            kind: of experiment.
            identity: everything that decides the numbers, but for the models.
            models: by role. Their logits on other machines differ in the last digits, and are compared as such.
            keys: names of the columns that tell rows apart.
            prompt: one of those that are given, whose spans the report shows.

        Raises:
            LensError: another process writes there, it holds another run, or it cannot be written.
        """
        where = None if folder is None else Path(folder)
        run = cls(kind, _plain(identity), dict(models or {}), tuple(keys), where, prompt)
        if run.folder is None:
            yield run
            return
        with locked(run.folder):
            run._continue(run.folder)
            try:
                yield run
            finally:
                with suppress(LensError):  # a full disk has been told by then
                    run._write_facts(run.folder)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows; those of a key that is there replace it. On the disk first."""
        if self.folder is not None:
            append_jsonl(self.folder / ROWS, rows)
        self.rows.update((self._key(row), row) for row in rows)

    def note(self, name: str, rows: Sequence[Row]) -> None:
        """Append to `name`.jsonl: what comes beside the rows, in its own form."""
        if self.folder is not None:
            append_jsonl(self.folder / f"{name}.jsonl", rows)
        else:
            self.noted(name).extend(_plain(rows))

    def noted(self, name: str) -> list[Row]:
        """What was appended to `name`.jsonl, by earlier calls too."""
        if self.folder is None:
            return self._notes.setdefault(name, [])
        file = self.folder / f"{name}.jsonl"
        return read_jsonl(file) if file.exists() else []

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """A JSON-able part that is computed once and kept in `name`.json; what is read back is what JSON made of it."""
        if self.folder is None:
            made: Made = _plain(make())
            return made
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_json(file, make())
        kept: Made = read_json(file)
        return kept

    def result(self, load: Callable[[Path], Made]) -> Made | None:
        """What an earlier call of the same run has finished with; None where it has not."""
        if self.folder is None or not (self.folder / RESULT).exists():
            return None
        return load(self.folder / RESULT)

    def finish(self, result: Found) -> Found:
        """Write the result."""
        if self.folder is not None:
            result.save(self.folder / RESULT)
        return result

    def card(self) -> dict[str, Any]:
        """Everything that somebody needs to judge or repeat the result."""
        return {"kind": self.kind, **self.identity, **self._facts()}

    def _facts(self) -> dict[str, Any]:
        return {
            "models": {role: model.to_dict() for role, model in self.models.items()},
            "versions": versions(),
            "machine": machine(),
            "seconds": round(self.seconds, 1),
            **peak_memory(),
        }

    @property
    def seconds(self) -> float:
        """What the run has taken so far; of a call that was killed only what it had finished."""
        return self._before + time.monotonic() - self._began

    def _key(self, row: Row) -> Key:
        return tuple(row[name] for name in self.keys)

    def _continue(self, folder: Path) -> None:
        file = folder / FACTS
        if not file.exists():
            strange = [name for name in (*OLDER, ROWS, RESULT) if (folder / name).exists()]
            if strange:
                raise LensError(
                    f"{folder} holds {strange[0]} and no {FACTS}: choose another folder (results of 0.1.0 are read by "
                    "piggyback-lens convert, its unfinished runs are not continued)"
                )
            self._write_facts(folder)
            return
        saved = read_json(file)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT or not isinstance(saved.get("identity"), dict):
            raise LensError(f"{file} says nothing of a run that this version knows: choose another folder")
        if saved["kind"] != self.kind:
            raise LensError(f"{folder} holds a run of {saved['kind']}, asked is {self.kind}: choose another folder")
        self._refuse_other_date(folder, saved.get("date"))
        refuse_other(folder, saved["identity"], self.identity)
        self._refuse_other_models(folder, saved["models"])
        self._before = float(saved.get("seconds", 0.0))
        found = read_jsonl(folder / ROWS) if (folder / ROWS).exists() else []
        try:
            self.rows = {self._key(row): row for row in found}
        except (KeyError, TypeError) as error:
            raise LensError(f"a line of {folder / ROWS} has no {error}: delete the folder and run it again") from error

    @property
    def _date(self) -> str | None:
        """The day that the chat template writes, where it reads the clock."""
        return None if self.prompt is None else self.prompt.answer.template.date

    def _refuse_other_date(self, folder: Path, saved: str | None) -> None:
        if saved is not None and self._date is not None and saved != self._date:
            raise LensError(
                f"the prompts of {folder} have the date {saved}, these have {self._date}: continue with "
                f"ChatFormat(tokenizer, date={saved!r}), --date {saved} on the command line"
            )

    def _refuse_other_models(self, folder: Path, saved: Mapping[str, Any]) -> None:
        for role, model in self.models.items():
            if role not in saved or not Identity.from_dict(saved[role]).matches(model):
                raise LensError(
                    f"{folder} belongs to a run with another {role} model: choose another folder, or delete this one"
                )

    def _write_facts(self, folder: Path) -> None:
        shown = {} if self.prompt is None else {"prompt": self.prompt.show().to_dict()}
        facts = {"format": FORMAT, "kind": self.kind, "identity": self.identity}
        facts |= {} if self._date is None else {"date": self._date}
        write_json(folder / FACTS, facts | self._facts() | shown)


def begun_on(folder: Path) -> str | None:
    """The day that the prompts of a folder's run have, for one that continues it; None where they have none."""
    try:
        date = read_json(folder / FACTS).get("date")
    except (LensError, OSError, AttributeError):
        return None
    return date if isinstance(date, str) else None


def report_run(folder: str | Path, *, parts: Sequence[Part] = ()) -> Path:
    """Write report.html into the folder of a finished run of any kind: what its result shows, a prompt, the run card.

    Args:
        folder: of the run.
        parts: further sections.

    Raises:
        LensError: no finished run, or a result of a kind that this version does not know.
    """
    folder = Path(folder)
    shown = load_result(folder).report()
    facts = read_json(folder / FACTS) if (folder / FACTS).exists() else {}
    prompt = TokenView.from_dict(facts["prompt"])._repr_html_() if "prompt" in facts else ""
    own = {name: value for name, value in facts.items() if name not in ("format", "prompt", "identity")}
    card = own | facts.get("identity", {}) | dict(shown.card)
    shown = replace(shown, parts=[*shown.parts, *parts], card=card)
    return shown.write(folder / "report.html", prompt_html=prompt)


def refuse_other(where: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to continue a run that is another than the one asked for.

    Raises:
        LensError: it names what differs, with both values.
    """
    old, new = _flat(saved), _flat(_plain(asked))
    different = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if different:
        told = "; ".join(
            f"{name} is {_short(old.get(name))} there, {_short(new.get(name))} here" for name in different[:3]
        )
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise LensError(
            f"{where} belongs to another run: {told}{more}; choose another folder, or delete this one to start again"
        )


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Any) -> Any:
    """As a file gives it back."""
    return json.loads(json.dumps(value))


# ---------------------------------------------------------------- one writer


@contextmanager
def locked(folder: Path, *, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Keep a folder for this process. The lock of a process that died is free.

    Args:
        folder: made where it is missing.
        name: of the lock file; a second one locks a part of what a folder is used for.
        wait: until it is free, instead of refusing.

    Raises:
        InUse: another process has it (it is named).
        LensError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    ensure_folder(folder)
    owner = folder / f"{name}.owner.json"
    lock = FileLock(folder / name, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise InUse(f"{folder} is in use by {_told(owner)}; wait for it, or choose another folder") from None
    try:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        facts = {"process": os.getpid(), "host": socket.gethostname(), "command": command}
        write_json(owner, facts | {"since": datetime.now(UTC).isoformat(timespec="seconds")})
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _told(owner: Path) -> str:
    try:
        facts = read_json(owner)
        return f"process {facts['process']} on {facts['host']} since {facts['since']} ({facts['command']})"
    except (LensError, KeyError, TypeError):
        return "another process"
