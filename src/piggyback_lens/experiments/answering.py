"""Answers that an experiment needs: those that its run does not have yet are generated, batch by batch."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from piggyback_lens.conversations.batch import ids_hash, questions_of
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.measuring.answers import AnswerContrast, Measure
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import counting
from piggyback_lens.reading.rows import file_rows
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


def answers_made_elsewhere(
    files: Sequence[str | Path], prompts: Mapping[str, Sequence[RenderedPrompt]], conditions: Collection[str]
) -> dict[tuple[str, str, int], Row]:
    """Answers of files, by condition, topic and place of the prompt, each checked against what is asked.

    A row has condition, question (its id), sample (0 if it says none), response, and prompt or topic where the id alone
    does not tell them; ended is "stop" or "length".

    Raises:
        LensError: a row of another question, text, sample or condition, of two prompts, or that is there twice.
    """
    places: dict[tuple[str, int], list[tuple[str, int, str]]] = {}
    for topic, own in prompts.items():
        for index, (prompt, question) in enumerate(zip(own, questions_of(own), strict=True)):
            places.setdefault((question, prompt.sample), []).append((topic, index, prompt.query))
    found: dict[tuple[str, str, int], Row] = {}
    for file in files:
        for where, row in file_rows(Path(file)):
            if not isinstance(row, Mapping) or not isinstance(row.get("response"), str) or "question" not in row:
                raise LensError(f"{where} is no answer: expected an object with condition, question and response")
            if row.get("condition") not in conditions:
                raise LensError(f"{where}: condition {row.get('condition')!r}; expected one of {', '.join(conditions)}")
            asked = (str(row["question"]), int(row.get("sample") or 0))
            fit = [
                (topic, index)
                for topic, index, text in places.get(asked, ())
                if row.get("topic", topic) == topic and row.get("prompt", text) == text
            ]
            if len(fit) != 1:
                what = "none of the questions" if not fit else f"{len(fit)} prompts; add prompt or topic"
                raise LensError(f"{where}: question {asked[0]!r}, sample {asked[1]} is {what}")
            if (row["condition"], *fit[0]) in found:
                raise LensError(f"{where}: question {asked[0]!r}, sample {asked[1]} is there twice")
            found[row["condition"], *fit[0]] = {"response": row["response"], "ended": row.get("ended", "stop")}
    return found


def given_answer(prompt: RenderedPrompt, row: Row) -> Generation:
    """An answer that was made elsewhere, as if it had been generated here."""
    ended: Literal["stop", "length"] = "length" if row["ended"] == "length" else "stop"
    whole = prompt.with_response(row["response"], end=ended == "stop")
    return Generation(prompt, whole.ids[prompt.n_prompt :], row["response"], ended, None, prompt.sample)


def own_contrast(run: Run, pair: ModelPair, prompts: Sequence[RenderedPrompt], *, tokens: int = 24) -> AnswerContrast:
    """The contrast of the two models' own greedy answers, which the run keeps."""

    def answer() -> dict[str, list[list[int]]]:
        measure = AnswerContrast.of(pair, prompts, max_new_tokens=tokens, progress="own answers")
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
    label: str,
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
        label: of these answers on the line of progress.
    """
    groups: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        if job.key not in run.rows:
            groups.setdefault(job.prompt.ids[: job.prompt.spans["prefix"].stop], []).append(job)
    shared = [group for group in groups.values() if 2 * len(group) >= settings.batch_size]
    pooled = [job for group in groups.values() if 2 * len(group) < settings.batch_size for job in group]
    together = [*shared, *([pooled] if pooled else [])]
    with counting(sum(map(len, together)), label) as advance:
        for group in together:

            def keep(rows: list[int], answers: list[Generation], group: list[Job] = group) -> None:
                run.add([_row(run.keys, group[i], answer, behaviour) for i, answer in zip(rows, answers, strict=True)])
                advance(len(rows))

            generate(
                model,
                [job.prompt for job in group],
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                sampling=settings.sampling,
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
