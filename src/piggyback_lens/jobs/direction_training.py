"""Train a direction as a job: a vector or an adapter, general or narrow, scored and reported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from piggyback_lens.conversations.batch import ids_hash
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.files import write_json
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.objectives import KLOnRetain, Penalised, Weighted
from piggyback_lens.finetuning.retain import RetainData, interleave
from piggyback_lens.finetuning.steps import Objective, sft
from piggyback_lens.finetuning.training import TrainResult, train
from piggyback_lens.jobs.direction_reports import (
    train_report,
    train_verdict,
)
from piggyback_lens.jobs.direction_settings import (
    TrainDirectionSettings,
)
from piggyback_lens.jobs.job_inputs import ADAPTER_FOLDER, DIRECTION_FILE
from piggyback_lens.jobs.job_runs import run_card
from piggyback_lens.maths import kl_per_token, token_log_probs
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.backends import HookedModel, check_layers, device_of, facts_of, shape_of
from piggyback_lens.models.pair import identify
from piggyback_lens.progress import say
from piggyback_lens.results.run import RESULT, Run
from piggyback_lens.vectors.adapter_files import save_peft
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction, Provenance

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class TrainedDirection:
    """What `train_direction_job` leaves.

    Attributes:
        solution: the trained vector or adapter.
        path: its file or PEFT folder.
        training: history and settings.
        scores: per kind of data the loss before and after and the KL to the base, with intervals.
        verdict: one sentence.
    """

    solution: Adapter
    path: Path
    training: TrainResult
    scores: "pd.DataFrame"
    verdict: str


def train_direction_job(
    model: HookedModel,
    examples: Sequence[RenderedPrompt],
    settings: TrainDirectionSettings,
    *,
    retain: Sequence[RenderedPrompt] = (),
    validation: Sequence[RenderedPrompt] = (),
    out: str | Path,
    name: str = "",
    progress: bool = True,
) -> TrainedDirection:
    """Train a steering vector or an adapter, general or narrow, score it, and write a report.

    `out` gets direction.safetensors or the PEFT folder adapter, result.json, report.html, and in training the
    checkpoints from which the same call continues.

    Args:
        model: a bridge; its weights are not changed.
        examples: rendered conversations with responses.
        settings: what to train.
        retain: prompts on which the model should stay as it is. Those without a response get the base's own.
        validation: further conversations, scored only.
        out: folder.
        name: of the model, for the report and the PEFT config.
        progress: say what is done, and show progress bars.

    Raises:
        LensError: too little data, what `train` raises, or the folder of another run.
    """
    out = Path(out)
    settings.check_data(len(examples), len(retain))
    trainable = HookTrainable(model, _start(model, settings))
    data = {"training": examples, "validation": validation, "retain": retain}
    identity = {"settings": asdict(settings), "data": {title: ids_hash(rows) for title, rows in data.items()}}
    with Run.open(out, "train-direction", identity | facts_of(model), models={"model": identify(model, name)}) as run:
        kept = _answered(model, retain, settings.answer_tokens, run, progress)
        if progress:
            say(f"training: {settings.training.steps} steps on {len(examples)} conversations")
        mixed = interleave(examples, kept, settings.interleave, seed=settings.training.seed)
        chosen: dict[str, Any] = {"objective": _objective(settings, kept), "progress": progress}
        trained = train(trainable, mixed, settings.training, out=out / "training", **chosen)
        solution = _signed(trainable.result(), model, examples, settings, name)
        path = _save_solution(solution, out, name)
        shown = {"training data": examples, "validation data": validation, "retain data": kept}
        scores = _scores(trainable, {title: rows[: settings.evaluated] for title, rows in shown.items() if rows})
        verdict = train_verdict(solution, settings.kl, settings.interleave, trained, scores)
        card = run_card(model, name, examples, asdict(settings)) | {"training": dict(trained.identity)}
        history = [{key: value for key, value in row.items() if key != "seconds"} for row in trained.history]
        results = {"verdict": verdict, "solution": path.name, "norm": solution.norm(), "history": history}
        write_json(out / RESULT, results | {"scores": scores.to_dict("records"), "card": card})
        answers = _shown_answers(model, solution, {"training data": examples, "retain data": kept}, settings)
        train_report(out / "report.html", verdict, trained, scores, answers, examples[0], card)
    return TrainedDirection(solution, path, trained, scores, verdict)


def _start(model: HookedModel, settings: TrainDirectionSettings) -> Adapter:
    shape = shape_of(model)
    if settings.kind == "lora":
        chosen: dict[str, Any] = {"rank": settings.rank, "modules": settings.modules, "layers": settings.layers}
        return LoRAAdapter.fresh(model, **chosen, seed=settings.training.seed)
    layers = (shape.n_layers // 2,) if settings.layers is None else check_layers(settings.layers, shape.n_layers)
    return Direction.zeros(shape.d_model, layers, settings.site)


def _objective(settings: TrainDirectionSettings, retain: Sequence[RenderedPrompt]) -> Objective:
    if settings.kl is None:
        return sft
    data = RetainData(retain, min(settings.retain_batch, len(retain)), settings.training.seed)
    return Penalised((Weighted(KLOnRetain(data), settings.kl, stop=settings.kl_until),))


def _answered(
    model: HookedModel, prompts: Sequence[RenderedPrompt], tokens: int, run: Run, progress: bool
) -> tuple[RenderedPrompt, ...]:
    """The prompts with responses: their own, or the base's greedy ones, which the run keeps."""
    open_ = [prompt for prompt in prompts if "response" not in prompt.spans]
    if not open_:
        return tuple(prompts)

    def answer() -> list[list[int]]:
        if progress:
            say(f"the base answers {len(open_)} retain prompts")
        found = generate(model, open_, max_new_tokens=tokens, progress="retain answers" if progress else False)
        return [list(answer.ids) for answer in found]

    answers = iter(run.once("retain_answers", answer))
    return tuple(p if "response" in p.spans else p.with_response(next(answers), end=False) for p in prompts)


def _signed(
    solution: Adapter,
    model: HookedModel,
    examples: Sequence[RenderedPrompt],
    settings: TrainDirectionSettings,
    name: str,
) -> Adapter:
    """The solution with where it came from."""
    how = "trained" if settings.kl is None else f"trained with KL weight {settings.kl:g} on retain data"
    facts = {key: value for key, value in asdict(settings).items() if key not in ("evaluated", "shown")}
    source = Provenance(
        how,
        data=ids_hash(examples),
        model=identify(model, name).to_dict(),
        seed=settings.training.seed,
        settings=json.loads(json.dumps(facts)),
    )
    return replace(solution, provenance=source)


def _save_solution(solution: Adapter, out: Path, name: str) -> Path:
    if isinstance(solution, Direction):
        return replace(solution, sign="positive: towards the training data").save(out / DIRECTION_FILE)
    return save_peft(solution, out / ADAPTER_FOLDER, base_model=name or None)


@torch.no_grad()
def _scores(trainable: HookTrainable, data: Mapping[str, Sequence[RenderedPrompt]]) -> "pd.DataFrame":
    """Per kind of data: loss of the base and of the solution, and KL between them, in nats per token."""
    import pandas as pd

    from piggyback_lens.directions.curve_points import weighted_interval

    rows = []
    for title, examples in data.items():
        parts: list[Tensor] = []
        for at in range(0, len(examples), 8):
            batch = make_batch(examples[at : at + 8], device=device_of(trainable.model))
            tuned, base = trainable.forward(batch), trainable.base_forward(batch)
            nll = [-token_log_probs(side.logits[None], side.targets[None])[0] for side in (base, tuned)]
            values = torch.stack([*nll, kl_per_token(base.logits[None], tuned.logits[None])[0]]).double().cpu()
            counts = torch.bincount(tuned.rows.cpu()).double()
            sums = torch.zeros(3, len(counts), dtype=torch.float64).index_add(1, tuned.rows.cpu(), values)
            parts.append(torch.cat([sums / counts, counts[None]]))
        base_nll, own_nll, kl, tokens = torch.cat(parts, dim=1).tolist()
        row: dict[str, Any] = {"data": title, "n": len(examples), "tokens": int(sum(tokens))}
        for column, numbers in (("base_loss", base_nll), ("loss", own_nll), ("kl", kl)):
            found = weighted_interval(numbers, tokens)
            row |= {column: found.value, f"{column}_low": found.low, f"{column}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _shown_answers(
    model: HookedModel,
    solution: Adapter,
    data: Mapping[str, Sequence[RenderedPrompt]],
    settings: TrainDirectionSettings,
) -> "pd.DataFrame":
    """Greedy answers of the base and under the solution to a few prompts of each kind of data."""
    import pandas as pd

    asked = [(topic, _question(row)) for topic, rows in data.items() for row in rows[: settings.shown]]
    rows = []
    for condition, adapters in (("base", ()), ("trained", (solution,))) if asked else ():
        with attached(model, *adapters):
            answers = generate(model, [prompt for _, prompt in asked], max_new_tokens=settings.answer_tokens)
        for (topic, prompt), answer in zip(asked, answers, strict=True):
            rows.append({"topic": topic, "prompt": prompt.query, "condition": condition, "response": answer.text})
    return pd.DataFrame(rows)


def _question(example: RenderedPrompt) -> RenderedPrompt:
    """A conversation without its response."""
    n = example.n_prompt
    spans = {name: span for name, span in example.spans.items() if span.stop <= n}
    return replace(
        example, ids=example.ids[:n], pieces=example.pieces[:n], spans=spans, text="".join(example.pieces[:n])
    )
