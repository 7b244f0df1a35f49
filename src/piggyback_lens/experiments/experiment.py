"""Running a plan of cells: in chunks, both directions, written as they come and resumed after a kill."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piggyback_lens.card import versions
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.cells import Outcome, Parts, evaluate, require_one_prefix
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.files import append_jsonl, read_json, read_jsonl, write_json
from piggyback_lens.interventions.donors import RECIPIENT
from piggyback_lens.measuring.answers import AnswerContrast, Measure
from piggyback_lens.models.pair import Identity, ModelPair, Side
from piggyback_lens.progress import counting

SIDES: tuple[Side, Side] = ("base", "finetuned")


@dataclass(frozen=True)
class Planned:
    """One cell to run: its labels (series, direction, span, sites, layers, ...) and its interventions."""

    labels: Mapping[str, Any]
    parts: Parts


def run_plan(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    plan: Sequence[Planned],
    *,
    kind: str,
    measure: Measure | None,
    settings: Mapping[str, Any],
    budget_gb: float | None = None,
    out: str | Path | None = None,
    progress: bool | str = False,
) -> PatchResult:
    """Run every cell of a plan, and both models as they are.

    Args:
        pair: base and finetuned.
        prompts: without responses, all with the same prefix.
        plan: the cells.
        kind: of the result.
        measure: None for the contrast of the two models' own answers.
        settings: what goes into the result's settings, beside names, n, template and versions.
        budget_gb: memory for one pass beside the weights, in GB; None for 1, on a GPU for half of what is free.
        out: folder: plan.json, cells.jsonl (each cell as it comes) and result.json. The same call continues.
        progress: show a bar with the time left; a string is its label.

    Raises:
        LensError: an empty plan, prompts with different prefixes, or a folder with another plan.
    """
    length = require_one_prefix(prompts)
    if not plan:
        raise LensError("no cell is left to run: widen layers, tokens or spans")
    measure = measure or AnswerContrast.of(pair, prompts)
    facts = {
        "names": dict(pair.names),
        "n": len(prompts),
        "prompts": [prompt.query for prompt in prompts],
        "fingerprint": prompts[0].fingerprint,
        "prefix_tokens": length,
        "backend": pair.backend,
        **settings,
    }
    identity = {
        "kind": kind,
        "cells": [dict(cell.labels) for cell in plan],
        "measure": measure.to_dict(),
        "settings": facts,
    }
    done = _open(Path(out), identity, pair) if out is not None else {}
    references = [Planned({"direction": d, "series": "unpatched"}, ()) for d in ("repair", "infect")]
    everything = [*plan, *references]
    missing = [number for number in range(len(everything)) if number not in done]
    label = kind.replace("_", " ") if progress is True else progress or None
    with counting(len(missing), label) as advance:
        for side in SIDES:
            own = [number for number in missing if RECIPIENT[everything[number].labels["direction"]] == side]
            for chunk in _run_side(pair, side, prompts, measure, [everything[i].parts for i in own], budget_gb):
                rows = [_row(own[place], outcome) for place, outcome in chunk]
                if out is not None:
                    append_jsonl(Path(out) / "cells.jsonl", rows)
                done.update({row["cell"]: row for row in rows})
                advance(len(rows))
    cells = [
        {**planned.labels, "touched": done[i]["touched"], "change_norm": done[i]["change_norm"]}
        for i, planned in enumerate(plan)
    ]
    finetuned, base = (done[len(plan) + i]["values"] for i in range(2))
    result = PatchResult(
        kind,
        tuple(cells),
        [done[i]["values"] for i in range(len(plan))],
        base,
        finetuned,
        {"name": measure.name, "unit": measure.unit},
        facts | {"versions": versions()},
    )
    if out is not None:
        result.save(Path(out) / "result.json")
    return result


def _run_side(
    pair: ModelPair,
    side: Side,
    prompts: Sequence[RenderedPrompt],
    measure: Measure,
    cells: Sequence[Parts],
    budget_gb: float | None,
) -> Iterator[list[tuple[int, Outcome]]]:
    if cells:
        with pair.using(side) as model:
            yield from evaluate(model, prompts, measure, cells, budget_gb=budget_gb)


def _row(number: int, outcome: Outcome) -> dict[str, Any]:
    if not bool(torch.isfinite(outcome.values).all()):
        raise LensError(
            f"cell {number} gave {outcome.values.tolist()}: the model does not stay finite under this patch"
        )
    values = [round(value, 9) for value in outcome.values.tolist()]
    return {"cell": number, "values": values, "touched": outcome.touched, "change_norm": outcome.change_norm}


def _open(folder: Path, identity: Mapping[str, Any], pair: ModelPair) -> dict[int, dict[str, Any]]:
    """Cells that an earlier run of the same plan left; a new folder is begun."""
    file = folder / "plan.json"
    if not file.exists():
        models = {side: pair.identity(side).to_dict() for side in SIDES}
        write_json(file, {**identity, "models": models})
        return {}
    saved = read_json(file)
    for name, value in identity.items():
        if saved.get(name) != value:
            differing = _difference(saved.get(name), value)
            raise LensError(f"{folder} holds an experiment with another {name}{differing}: choose another folder")
    for side in SIDES:
        if not Identity.from_dict(saved["models"][side]).matches(pair.identity(side)):
            raise LensError(f"{folder} holds an experiment on another {side} model: choose another folder")
    rows = folder / "cells.jsonl"
    return {row["cell"]: row for row in read_jsonl(rows)} if rows.exists() else {}


def _difference(saved: Any, asked: Any) -> str:
    """Which entry differs, where both are mappings."""
    if not isinstance(saved, Mapping) or not isinstance(asked, Mapping):
        return ""
    name = next(name for name in [*asked, *saved] if saved.get(name) != asked.get(name))
    return f" ({name} {str(saved.get(name))[:60]!r}, asked is {str(asked.get(name))[:60]!r})"
