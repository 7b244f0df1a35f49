"""Answers that an experiment needs: those that its run does not have yet are generated, batch by batch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from piggyback_lens.conversations.batch import ids_hash
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.measuring.answers import AnswerContrast, Measure
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.results.run import Row, Run
from piggyback_lens.settings import AnswerSettings


@dataclass(frozen=True, eq=False)
class Job:
    """One answer to generate: the values of the key columns, the prompt, and further columns of its row."""

    key: tuple[Any, ...]
    prompt: RenderedPrompt
    facts: Mapping[str, Any] = field(default_factory=dict)


def behaviour_facts(pair: ModelPair, behaviour: Behaviour, prompts: Sequence[RenderedPrompt]) -> dict[str, Any]:
    """What rows generated from these prompts depend on, beside the models and the settings of the experiment."""
    return {
        "behaviour": {"name": behaviour.name, "label": behaviour.label, "unit": behaviour.unit},
        "template": sorted({prompt.fingerprint for prompt in prompts}),
        "prompts": ids_hash(prompts),
        "backend": pair.backend,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "names": dict(pair.names),
    }


def own_contrast(run: Run, pair: ModelPair, prompts: Sequence[RenderedPrompt], *, tokens: int = 24) -> AnswerContrast:
    """The contrast of the two models' own greedy answers, which the run keeps."""

    def answer() -> dict[str, list[list[int]]]:
        measure = AnswerContrast.of(pair, prompts, max_new_tokens=tokens)
        sides = {"finetuned": measure.towards, "base": measure.against}
        return {side: [list(row.ids[row.n_prompt :]) for row in rows] for side, rows in sides.items()}

    kept = run.once("answers", answer)
    both = (
        [prompt.with_response(ids, end=False) for prompt, ids in zip(prompts, kept[side], strict=True)]
        for side in ("finetuned", "base")
    )
    return AnswerContrast(*both)


def measure_facts(measure: Measure | None, *, tokens: int = 24) -> dict[str, Any]:
    """What identifies a measure; None is `own_contrast`."""
    return {"name": "own answers", "tokens": tokens} if measure is None else measure.to_dict()


def answer_jobs(
    model: HookedModel,
    jobs: Sequence[Job],
    run: Run,
    behaviour: Behaviour,
    settings: AnswerSettings,
    label: str | None = None,
) -> None:
    """Generate the answers that have no row yet.

    Prompts of the same prefix ids go together and share it. Prefixes of few prompts are pooled: full batches
    save more than a shared prefix does.

    Each row has the key columns, the job's facts, the answer and its value (None where it is missing).

    Args:
        model: inside `with pair.using(side)`.
        jobs: in any order.
        run: gets the rows, batch by batch.
        behaviour: gives the value.
        settings: how answers are generated.
        label: of a progress bar; None shows nothing.
    """
    groups: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        if job.key not in run.rows:
            groups.setdefault(job.prompt.ids[: job.prompt.spans["prefix"].stop], []).append(job)
    shared = [group for group in groups.values() if 2 * len(group) >= settings.batch_size]
    pooled = [job for group in groups.values() if 2 * len(group) < settings.batch_size for job in group]
    together = [*shared, *([pooled] if pooled else [])]
    for number, group in enumerate(together, start=1):

        def keep(rows: list[int], answers: list[Generation], group: list[Job] = group) -> None:
            run.add([_row(run.keys, group[i], answer, behaviour) for i, answer in zip(rows, answers, strict=True)])

        generate(
            model,
            [job.prompt for job in group],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            sampling=settings.sampling,
            progress=f"{label}, group {number} of {len(together)}" if label else False,
            on_batch=keep,
        )


def _row(columns: tuple[str, ...], job: Job, answer: Generation, behaviour: Behaviour) -> Row:
    value = behaviour(answer.text)
    return {
        **dict(zip(columns, job.key, strict=True)),
        **job.facts,
        "sample": job.prompt.sample,
        "text": job.prompt.text,
        "response": answer.text,
        "ended": answer.ended,
        "value": None if math.isnan(value) else value,
    }
