"""Generated rows that survive a kill: written as they come, read back by a rerun of the same experiment."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.files import append_jsonl, read_json, read_jsonl, write_json
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.pair import SIDES, Identity, ModelPair

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Job:
    """One answer to generate: the values of the key columns, the prompt, and further columns of its row."""

    key: tuple[Any, ...]
    prompt: RenderedPrompt
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class RowLog:
    """The rows of one experiment, by key; with a folder, also the lines of a file in it.

    Attributes:
        columns: names of the key columns.
        file: JSON lines; None keeps the rows in memory only.
        rows: what is there.
    """

    columns: tuple[str, ...]
    file: Path | None = None
    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)

    @classmethod
    def open(
        cls, columns: tuple[str, ...], folder: str | Path | None, name: str, identity: Mapping[str, Any]
    ) -> "RowLog":
        """Continue `folder`/`name`.jsonl, or begin it; `name`.json beside it says what the rows belong to.

        Raises:
            LensError: the folder holds rows of another experiment; the message names what differs.
        """
        if folder is None:
            return cls(columns)
        facts, file = Path(folder) / f"{name}.json", Path(folder) / f"{name}.jsonl"
        if facts.exists():
            _refuse_other(facts, read_json(facts), identity)
        elif file.exists():
            raise LensError(f"{file} lies there without {facts.name}: choose another folder, or delete it")
        else:
            write_json(facts, identity)
        found = read_jsonl(file) if file.exists() else []
        try:
            rows = {tuple(row[column] for column in columns): row for row in found}
        except KeyError as error:
            raise LensError(f"a line of {file} has no {error}: delete the folder and run it again") from error
        return cls(columns, file, rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, on disk first."""
        if self.file is not None:
            append_jsonl(self.file, rows)
        self.rows.update({tuple(row[column] for column in self.columns): row for row in rows})


def _refuse_other(file: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    advice = "choose another folder, or delete this one"
    for name, value in asked.items():
        if name == "models":
            continue  # logits of another machine differ in the last digits; the identities are compared below
        if saved.get(name) != json.loads(json.dumps(value)):
            raise LensError(f"{file} belongs to a run with {name} {saved.get(name)!r}, asked is {value!r}: {advice}")
    for side, model in asked["models"].items():
        if not Identity.from_dict(saved["models"][side]).matches(Identity.from_dict(model)):
            raise LensError(f"{file} belongs to a run with another {side} model: {advice}")


def run_identity(pair: ModelPair, behaviour: Behaviour, prompts: Sequence[RenderedPrompt]) -> dict[str, Any]:
    """What rows generated from these prompts depend on, beside the settings of the experiment."""
    return {
        "behaviour": {"name": behaviour.name, "label": behaviour.label, "unit": behaviour.unit},
        "template": sorted({prompt.fingerprint for prompt in prompts}),
        "prompts": ids_hash(prompts),
        "backend": pair.backend,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "names": dict(pair.names),
        "models": {side: pair.identity(side).to_dict() for side in SIDES},
    }


def ids_hash(prompts: Sequence[RenderedPrompt]) -> str:
    """16 hex digits of the sha256 of the prompts' ids, in order."""
    return hashlib.sha256(repr([prompt.ids for prompt in prompts]).encode()).hexdigest()[:16]


def answer_jobs(
    model: HookedModel,
    jobs: Sequence[Job],
    log: RowLog,
    behaviour: Behaviour,
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str | None = None,
) -> None:
    """Generate (greedily) the answers that have no row yet.

    Prompts of the same prefix ids go together and share it. Prefixes of few prompts are pooled: full batches
    save more than a shared prefix does.

    Each row has the key columns, the job's facts, the answer and its value (None where it is missing).

    Args:
        model: inside `with pair.using(side)`.
        jobs: in any order.
        log: gets the rows, batch by batch.
        behaviour: gives the value.
        max_new_tokens: per answer.
        batch_size: rows per batch.
        label: of a progress bar; None shows nothing.
    """
    groups: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        if job.key not in log.rows:
            groups.setdefault(job.prompt.ids[: job.prompt.spans["prefix"].stop], []).append(job)
    shared = [group for group in groups.values() if 2 * len(group) >= batch_size]
    pooled = [job for group in groups.values() if 2 * len(group) < batch_size for job in group]
    runs = [*shared, *([pooled] if pooled else [])]
    for number, group in enumerate(runs, start=1):

        def keep(rows: list[int], answers: list[Generation], group: list[Job] = group) -> None:
            log.add([_row(log.columns, group[i], answer, behaviour) for i, answer in zip(rows, answers, strict=True)])

        generate(
            model,
            [job.prompt for job in group],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=f"{label}, group {number} of {len(runs)}" if label else False,
            on_batch=keep,
        )


def _row(columns: tuple[str, ...], job: Job, answer: Generation, behaviour: Behaviour) -> Row:
    value = behaviour(answer.text)
    return {
        **dict(zip(columns, job.key, strict=True)),
        **job.facts,
        "text": job.prompt.text,
        "response": answer.text,
        "ended": answer.ended,
        "value": None if math.isnan(value) else value,
    }
