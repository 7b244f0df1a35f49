"""Running a plan of cells: in chunks, both flows, written as they come and resumed after a kill."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import questions_of
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.engines import ONE_AT_A_TIME, Job, failure, finished
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import measure_facts, own_contrast
from piggyback_lens.experiments.cells import Outcome, Parts, passes_of, run_pass
from piggyback_lens.experiments.laboratory import UNPATCHED, Laboratory, Planned
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.interventions.hooks import layer_ranges
from piggyback_lens.measuring.answers import GeneratedBehaviour, Measure
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import counting
from piggyback_lens.results.run import Run
from piggyback_lens.settings import PatchSettings
from piggyback_lens.words import RECIPIENT, SIDES, Side


def run_plan(
    lab: Laboratory, plan: Sequence[Planned], kind: str, measure: Measure | None, out: str | Path | None = None
) -> PatchResult:
    """Run every cell of a plan, and both models as they are.

    Args:
        lab: the pair, the prompts (without responses, all with the same prefix) and the settings.
        plan: the cells, made by `lab`.
        kind: of the result.
        measure: None for the contrast of the two models' own answers.
        out: folder of the run, which gets each cell as it comes. The same call continues.

    Raises:
        LensError: an empty plan, a folder with another plan, or jobs that an executor has lost, after the others are
            finished and kept.
    """
    pair, prompts, settings = lab.pair, lab.prompts, lab.settings
    if not plan:
        raise LensError("no cell is left to run: widen layers, tokens or spans")
    facts = prompt_facts(pair, prompts) | {"seed": settings.seed, "postfix_donor": settings.postfix_donor}
    identity = {"cells": [dict(cell.labels) for cell in plan], "measure": measure_facts(measure), "settings": facts}
    references = [Planned({"flow": flow, "series": UNPATCHED}, ()) for flow in RECIPIENT]
    everything = [*plan, *references]
    with Run.open(out, kind, identity, models=pair.identities(), keys=("cell",), prompt=prompts[0]) as run:
        measure = measure or own_contrast(run, pair, prompts)
        _run_missing(run, lab, everything, measure)
        done = [run.rows[number,] for number in range(len(everything))]
        cells = [
            {**planned.labels, "touched": row["touched"], "change_norm": row["change_norm"]}
            for planned, row in zip(plan, done, strict=False)
        ]
        *values, finetuned, base = (row["values"] for row in done)
        about = {"name": measure.name, "unit": measure.unit}
        facts |= {"versions": versions()}
        return run.finish(PatchResult(kind, tuple(cells), values, base, finetuned, about, facts))


def _run_missing(run: Run, lab: Laboratory, plan: Sequence[Planned], measure: Measure) -> None:
    """Run the cells that have no row yet, pass by pass: here, or as jobs of the executor."""
    executor, settings = lab.settings.executor, replace(lab.settings, executor=None)
    passes: list[tuple[Side, list[int]]] = []
    for side in SIDES:
        own = [i for i, cell in enumerate(plan) if (i,) not in run.rows and RECIPIENT[cell.labels["flow"]] == side]
        if own:
            with lab.pair.using(side) as model:
                together = passes_of(
                    model,
                    lab.prompts,
                    measure,
                    [plan[i].parts for i in own],
                    budget_gb=settings.budget_gb,
                    cells_per_pass=settings.cells_per_pass,
                )
            passes += [(side, [own[place] for place in group]) for group in together]
    jobs: list[Job] = [(_here, lab, side, measure, [plan[i].parts for i in group]) for side, group in passes]
    if executor is not None:
        shared = (lab.pair, lab.prompts, settings, measure)
        jobs = [(_elsewhere, *shared, side, [plan[i].labels for i in group]) for side, group in passes]
    failed: dict[str, Exception] = {}
    with counting(sum(len(group) for _, group in passes)) as advance:
        for number, outcome in finished(jobs, executor):
            group = passes[number][1]
            if isinstance(outcome, Exception):
                if executor is None:
                    raise outcome
                failed[f"cells {layer_ranges(sorted(group))}"] = outcome
                continue
            run.add([_row(cell, own) for cell, own in zip(group, outcome, strict=True)])
            advance(len(group))
    if failed:
        raise failure(failed, len(jobs), run.folder, "jobs") from next(iter(failed.values()))


def _here(lab: Laboratory, side: Side, measure: Measure, cells: Sequence[Parts]) -> list[Outcome]:
    with lab.pair.using(side) as model:
        root = None if isinstance(measure, GeneratedBehaviour) else lab.root(side)
        return run_pass(model, lab.prompts, measure, cells, budget_gb=lab.settings.budget_gb, root=root)


def _elsewhere(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    settings: PatchSettings,
    measure: Measure,
    side: Side,
    cells: Sequence[Mapping[str, Any]],
) -> list[Outcome]:
    """A pass of cells that are made anew from their labels: donors are large, and their run is cheap."""
    with ONE_AT_A_TIME:
        lab = Laboratory(pair, prompts, settings)
        return _here(lab, side, measure, [lab.parts(labels) for labels in cells])


def prompt_facts(pair: ModelPair, prompts: Sequence[RenderedPrompt]) -> dict[str, Any]:
    """What every patching result says of its models and prompts."""
    built = {"base_spans": list(pair.base_spans)} if pair.base_spans else {}
    return {
        **built,
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


def _row(number: int, outcome: Outcome) -> dict[str, Any]:
    if not bool(torch.isfinite(outcome.values).all()):
        raise LensError(
            f"cell {number} gave {outcome.values.tolist()}: the model does not stay finite under this patch"
        )
    values = [round(value, 9) for value in outcome.values.tolist()]
    return {"cell": number, "values": values, "touched": outcome.touched, "change_norm": outcome.change_norm}
