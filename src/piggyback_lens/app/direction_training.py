"""Train a direction as a job: a vector or an adapter, general or narrow, scored and reported."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from piggyback_lens.conversations.batch import ids_hash
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.directions.curve_points import weighted_interval
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.objectives import KLOnRetain, Penalised, Weighted
from piggyback_lens.finetuning.retain import RetainData, interleave
from piggyback_lens.finetuning.steps import Objective, sft
from piggyback_lens.finetuning.training import TrainResult, train
from piggyback_lens.intervals import interval_text
from piggyback_lens.maths import kl_per_token, token_log_probs
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.backends import HookedModel, check_layers, device_of, facts_of, shape_of
from piggyback_lens.models.pair import Identity, identify
from piggyback_lens.progress import say_stage, shows
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import RESULT, Run, report_run
from piggyback_lens.settings import TrainDirectionSettings
from piggyback_lens.vectors.adapter_files import save_peft
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction, Provenance
from piggyback_lens.vectors.solution_files import ADAPTER_FOLDER, DIRECTION_FILE, load_solution

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False, eq=False)
class TrainedDirection(Result):
    """What `train_direction` leaves.

    Attributes:
        solution: the trained vector or adapter.
        path: its file or PEFT folder.
        training: history and settings.
        rows: per kind of data the loss before and after and the KL to the base, with intervals.
        settings: what was chosen.
        examples: a few answers of the base and under the solution.
    """

    name: ClassVar = "direction.1"
    in_folder: ClassVar = True
    solution: Adapter
    path: Path
    training: TrainResult
    rows: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    examples: tuple[Mapping[str, Any], ...]

    def to_frame(self) -> "pd.DataFrame":
        """One row per kind of data.

        Columns: data, value, low, high (KL(base ‖ tuned), nats per token, 95 % interval over conversations), n,
        tokens, and base_loss and loss with theirs.
        """
        import pandas as pd

        return pd.DataFrame(self.rows)

    def figure(self) -> "go.Figure":
        """Loss and its terms, norm, gradient and learning rate over the steps."""
        return self.training.figure()

    @property
    def verdict(self) -> str:
        """What was trained, its norm, its loss, and its KL on the retain data."""
        kl, interleaved = self.settings["kl"], self.settings["interleave"]
        kind = "General" if kl is None and not interleaved else "Narrow"
        means = [f"KL weight {kl:g}"] if kl is not None else []
        means += [f"{100 * interleaved:g} % retain data mixed in"] if interleaved else []
        how = f" ({', '.join(means)})" if means else ""
        rows, parts = {row["data"]: row for row in self.rows}, []
        for title in ("training data", "validation data"):
            if title in rows:
                row = rows[title]
                after = interval_text(row["loss"], row["loss_low"], row["loss_high"])
                parts.append(f"loss on the {title} {row['base_loss']:.2f} -> {after} nats per token (n = {row['n']})")
        title = "retain data" if "retain data" in rows else "training data"
        row = rows[title]
        parts.append(f"KL(base ‖ tuned) on the {title} {interval_text(row['value'], row['low'], row['high'])}")
        steps = len(self.training.history)
        what = f"{kind} {_described(self.solution)}{how}, norm {self.solution.norm():.3g} after {steps} steps"
        return f"{what}: {'; '.join(parts)}."

    def report(self) -> Report:
        """Scores, history, and a few answers side by side."""
        import pandas as pd

        caption = "Loss and its terms, norm, gradient and learning rate over the steps."
        note = "Losses and KL are means over tokens, with 95 % intervals over conversations."
        examples, card = pd.DataFrame(self.examples), {"training": self.training.identity}
        title = f"Trained direction: {_described(self.solution)}"
        return Report(title, self.verdict, self.to_frame(), [(caption, self.figure())], examples, [note], card=card)

    def save(self, path: str | Path) -> Path:
        """Write what the solution's and the training's own files do not say."""
        facts: dict[str, Any] = {"solution": self.path.name, "norm": self.solution.norm(), "rows": self.rows}
        facts |= {"settings": self.settings, "examples": self.examples}
        return write_json(path, {"format": f"piggyback_lens.{self.name}", "verdict": self.verdict, **facts})

    @classmethod
    def load(cls, folder: str | Path) -> "TrainedDirection":
        """Read the folder of a finished run.

        Raises:
            LensError: something is missing there, or damaged.
        """
        folder = Path(folder)
        saved = read_json(folder / RESULT)
        try:
            if saved["format"] != f"piggyback_lens.{cls.name}":
                raise LensError(f"{folder} holds {saved['format']!r}, expected {cls.name}")
            path, examples = folder / Path(saved["solution"]).name, saved["examples"]
            rows = [{name: math.nan if x is None else x for name, x in row.items()} for row in saved["rows"]]
            training = TrainResult.load(folder / "training" / RESULT)
            return cls(load_solution(folder), path, training, tuple(rows), saved["settings"], tuple(examples))
        except (KeyError, TypeError) as error:
            raise LensError(f"{folder / RESULT} is no trained direction's ({error}): train it again") from error


def _described(solution: Adapter) -> str:
    layers = list(solution.layers)
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
    if isinstance(solution, Direction):
        return f"steering vector at {solution.site} of {where}"
    return f"rank-{solution.rank} adapter on {', '.join(solution.modules)} of {where}"


@shows("training")
def train_direction(
    model: HookedModel,
    examples: Sequence[RenderedPrompt],
    settings: TrainDirectionSettings = TrainDirectionSettings(),
    *,
    retain: Sequence[RenderedPrompt] = (),
    validation: Sequence[RenderedPrompt] = (),
    out: str | Path,
    name: str = "",
    progress: bool | str = True,
) -> TrainedDirection:
    """Train a steering vector or an adapter, general or narrow, score it, and write a report.

    `out` gets direction.safetensors or the PEFT folder adapter, result.json, report.html, and in training the
    checkpoints from which the same call continues.

    Args:
        model: a bridge; its weights are not changed.
        examples: rendered conversations with responses.
        settings: what to train, and what keeps it narrow.
        retain: prompts on which the model should stay as it is. Those without a response get the base's own.
        validation: further conversations, scored only.
        out: folder of the run.
        name: of the model, for the provenance of the solution and the PEFT config.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: too little data, what `train` raises, or the folder of another run.
    """
    out = Path(out)
    settings.check_data(len(examples), len(retain))
    trainable = HookTrainable(model, _start(model, settings))
    data = {"training": examples, "validation": validation, "retain": retain}
    identity: dict[str, Any] = {"settings": asdict(settings), **facts_of(model)}
    identity["data"] = {title: ids_hash(rows) for title, rows in data.items()}
    own = identify(model, name)
    with Run.open(out, "train-direction", identity, models={"model": own}, prompt=examples[0]) as run:
        kept = _answered(model, retain, settings.answer_tokens, run, progress)
        if progress:
            say_stage(f"training: {settings.steps} steps on {len(examples)} conversations")
        mixed = interleave(examples, kept, settings.interleave, seed=settings.seed)
        chosen: dict[str, Any] = {"objective": _objective(settings, kept)}
        trained = train(trainable, mixed, settings.training, out=out / "training", **chosen)
        solution = _signed(trainable.result(), examples, settings, own)
        path = _save_solution(solution, out, name)
        shown = {"training data": examples, "validation data": validation, "retain data": kept}
        scores = _scores(trainable, {title: rows[: settings.evaluated] for title, rows in shown.items() if rows})
        answers = _shown_answers(model, solution, {"training data": examples, "retain data": kept}, settings)
        result = run.finish(TrainedDirection(solution, path, trained, scores, asdict(settings), answers))
    report_run(out)
    return result


def _start(model: HookedModel, settings: TrainDirectionSettings) -> Adapter:
    shape = shape_of(model)
    if settings.kind == "lora":
        chosen: dict[str, Any] = {"rank": settings.rank, "modules": settings.modules, "layers": settings.layers}
        return LoRAAdapter.fresh(model, **chosen, seed=settings.seed)
    layers = (shape.n_layers // 2,) if settings.layers is None else check_layers(settings.layers, shape.n_layers)
    return Direction.zeros(shape.d_model, layers, settings.site)


def _objective(settings: TrainDirectionSettings, retain: Sequence[RenderedPrompt]) -> Objective:
    if settings.kl is None:
        return sft
    data = RetainData(retain, min(settings.retain_batch, len(retain)), settings.training.seed)
    return Penalised((Weighted(KLOnRetain(data), settings.kl, stop=settings.kl_until),))


def _answered(
    model: HookedModel, prompts: Sequence[RenderedPrompt], tokens: int, run: Run, progress: bool | str
) -> tuple[RenderedPrompt, ...]:
    """The prompts with responses: their own, or the base's greedy ones, which the run keeps."""
    open_ = [prompt for prompt in prompts if "response" not in prompt.spans]
    if not open_:
        return tuple(prompts)

    def answer() -> list[list[int]]:
        if progress:
            say_stage(f"the base answers {len(open_)} retain prompts")
        found = generate(model, open_, max_new_tokens=tokens, progress="retain answers")
        return [list(answer.ids) for answer in found]

    answers = iter(run.once("retain_answers", answer))
    return tuple(p if "response" in p.spans else p.with_response(next(answers), end=False) for p in prompts)


def _signed(
    solution: Adapter, examples: Sequence[RenderedPrompt], settings: TrainDirectionSettings, own: Identity
) -> Adapter:
    """The solution with where it came from."""
    how = "trained" if settings.kl is None else f"trained with KL weight {settings.kl:g} on retain data"
    facts = {key: value for key, value in asdict(settings).items() if key not in ("evaluated", "shown")}
    source = Provenance(
        how,
        data=ids_hash(examples),
        model=own.to_dict(),
        seed=settings.seed,
        settings=json.loads(json.dumps(facts)),
    )
    return replace(solution, provenance=source)


def _save_solution(solution: Adapter, out: Path, name: str) -> Path:
    if isinstance(solution, Direction):
        return replace(solution, sign="positive: towards the training data").save(out / DIRECTION_FILE)
    return save_peft(solution, out / ADAPTER_FOLDER, base_model=name or None)


@torch.no_grad()
def _scores(trainable: HookTrainable, data: Mapping[str, Sequence[RenderedPrompt]]) -> tuple[dict[str, Any], ...]:
    """Per kind of data: loss of the base and of the solution, and KL between them, in nats per token."""
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
        moved = weighted_interval(kl, tokens)
        row: dict[str, Any] = {"data": title, "value": moved.value, "low": moved.low, "high": moved.high}
        row |= {"n": len(examples), "tokens": int(sum(tokens))}
        for column, numbers in (("base_loss", base_nll), ("loss", own_nll)):
            found = weighted_interval(numbers, tokens)
            row |= {column: found.value, f"{column}_low": found.low, f"{column}_high": found.high}
        rows.append(row)
    return tuple(rows)


def _shown_answers(
    model: HookedModel,
    solution: Adapter,
    data: Mapping[str, Sequence[RenderedPrompt]],
    settings: TrainDirectionSettings,
) -> tuple[dict[str, Any], ...]:
    """Greedy answers of the base and under the solution to a few prompts of each kind of data."""
    asked = [(topic, _question(row)) for topic, rows in data.items() for row in rows[: settings.shown]]
    rows = []
    for condition, adapters in (("base", ()), ("trained", (solution,))) if asked else ():
        with attached(model, *adapters):
            answers = generate(model, [prompt for _, prompt in asked], max_new_tokens=settings.answer_tokens)
        for (topic, prompt), answer in zip(asked, answers, strict=True):
            rows.append({"topic": topic, "prompt": prompt.query, "condition": condition, "response": answer.text})
    return tuple(rows)


def _question(example: RenderedPrompt) -> RenderedPrompt:
    """A conversation without its response."""
    n = example.n_prompt
    spans = {name: span for name, span in example.spans.items() if span.stop <= n}
    return replace(
        example, ids=example.ids[:n], pieces=example.pieces[:n], spans=spans, text="".join(example.pieces[:n])
    )
