"""Running a plan of cells: in chunks, both flows, written as they come and resumed after a kill."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import questions_of
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import measure_facts, own_contrast
from piggyback_lens.experiments.cells import Outcome, Parts, evaluate, require_one_prefix
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.measuring.answers import Measure
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import counting
from piggyback_lens.results.run import Run
from piggyback_lens.settings import PatchSettings
from piggyback_lens.words import RECIPIENT, SIDES, Side


@dataclass(frozen=True)
class Planned:
    """One cell to run: its labels (series, flow, span, sites, layers, ...) and its interventions."""

    labels: Mapping[str, Any]
    parts: Parts


def run_plan(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    plan: Sequence[Planned],
    kind: str,
    measure: Measure | None,
    settings: PatchSettings,
    *,
    out: str | Path | None = None,
) -> PatchResult:
    """Run every cell of a plan, and both models as they are.

    Args:
        pair: base and finetuned.
        prompts: without responses, all with the same prefix.
        plan: the cells.
        kind: of the result.
        measure: None for the contrast of the two models' own answers.
        settings: seed, memory, and where postfix activations come from.
        out: folder of the run, which gets each cell as it comes. The same call continues.

    Raises:
        LensError: an empty plan, prompts with different prefixes, or a folder with another plan.
    """
    require_one_prefix(prompts)
    if not plan:
        raise LensError("no cell is left to run: widen layers, tokens or spans")
    facts = prompt_facts(pair, prompts) | {"seed": settings.seed, "postfix_donor": settings.postfix_donor}
    identity = {"cells": [dict(cell.labels) for cell in plan], "measure": measure_facts(measure), "settings": facts}
    references = [Planned({"flow": d, "series": "unpatched"}, ()) for d in ("repair", "infect")]
    everything = [*plan, *references]
    with Run.open(out, kind, identity, models=pair.identities(), keys=("cell",), prompt=prompts[0]) as run:
        measure = measure or own_contrast(run, pair, prompts)
        missing = [number for number in range(len(everything)) if (number,) not in run.rows]
        with counting(len(missing)) as advance:
            for side in SIDES:
                own = [number for number in missing if RECIPIENT[everything[number].labels["flow"]] == side]
                for chunk in _run_side(
                    pair, side, prompts, measure, [everything[i].parts for i in own], settings.budget_gb
                ):
                    run.add([_row(own[place], outcome) for place, outcome in chunk])
                    advance(len(chunk))
        done = [run.rows[number,] for number in range(len(everything))]
        cells = [
            {**planned.labels, "touched": row["touched"], "change_norm": row["change_norm"]}
            for planned, row in zip(plan, done, strict=False)
        ]
        *values, finetuned, base = (row["values"] for row in done)
        about = {"name": measure.name, "unit": measure.unit}
        facts |= {"versions": versions()}
        return run.finish(PatchResult(kind, tuple(cells), values, base, finetuned, about, facts))


def prompt_facts(pair: ModelPair, prompts: Sequence[RenderedPrompt]) -> dict[str, Any]:
    """What every patching result says of its models and prompts."""
    return {
        "names": dict(pair.names),
        "n": len(prompts),
        "prompts": [prompt.query for prompt in prompts],
        "questions": questions_of(prompts),
        "notes": sorted({note for prompt in prompts for note in prompt.notes}),
        "fingerprint": prompts[0].fingerprint,
        "prefix_tokens": len(prompts[0].span("prefix")),
        "backend": pair.backend,
        "dtype": str(pair.dtype).removeprefix("torch."),
    }


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
