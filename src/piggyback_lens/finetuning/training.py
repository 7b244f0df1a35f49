"""Finetune an adapter on response tokens: one readable loop, the objective passed in.

`train` owns what every objective shares: batches, schedule, optimiser, clipping, history, checkpoints. What
is descended is an `Objective`, a function from a `Step` (model, batch, the batch's forward pass) to a `Loss`.
What is trained is a `Trainable`: by default the LoRA adapter of a PEFT model.

Everything random depends on the seed alone, so a run that was killed and started again ends with the weights
of an uninterrupted one, bit for bit on one machine with one number of threads; on a GPU under
`torch.use_deterministic_algorithms(True)`, since attention's gradient is not summed in one order there otherwise.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from piggyback_lens.conversations.batch import as_prompts
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch, batch_indices, check_supervised, make_batch
from piggyback_lens.finetuning.checkpoints import (
    STOPPED,
    Progress,
    Row,
    load_checkpoint,
    run_identity,
    save_checkpoint,
    write_folder,
)
from piggyback_lens.finetuning.optimisers import learning_rate_at, optimiser_of
from piggyback_lens.finetuning.steps import Objective, Part, Step, check_sharing, plan_for, sft
from piggyback_lens.finetuning.trainables import PeftAdapter, Trainable, seeded
from piggyback_lens.models.backends import n_positions_of, width_of
from piggyback_lens.models.costs import known_costs
from piggyback_lens.models.packing import Costs, assumed, costing, rounds_coarsely
from piggyback_lens.models.recomputing import recomputed
from piggyback_lens.progress import say, shows, track
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import RESULT, locked
from piggyback_lens.settings import TrainSettings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

WIDTHS = 16  # where rounding is coarse, so that few shapes of passes are met (see `TReFT`)
RESERVED = {"step", "steps", "loss", "lr", "grad_norm", "tokens", "norm", "seconds"}  # not for loss terms


@dataclass(frozen=True, repr=False)
class TrainResult(Result):
    """The history of a run and everything that was chosen.

    History rows: step (from 1), loss and its terms (nats per token), lr, grad_norm (before clipping), tokens
    (response tokens in the batch), seconds.
    """

    name: ClassVar = "training.1"
    history: tuple[Row, ...]
    settings: TrainSettings
    identity: Mapping[str, Any]  # settings, adapter, objective, fingerprints of the data and the base
    versions: Mapping[str, str]  # of the packages that decide the numbers
    adapter_dir: Path | None  # the saved adapter, None where `out` was None
    resumed_from: int | None = field(compare=False)  # steps that a checkpoint had already done
    plan: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # seconds of a block, passes by their way, and why training was stopped early, if it was

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file; the adapter's place is relative, so that the folder can be moved."""
        path, place = Path(path), self.adapter_dir
        relative = None if place is None else Path(os.path.relpath(place, path.parent))
        return super(TrainResult, replace(self, adapter_dir=relative)).save(path)

    @classmethod
    def load(cls, path: str | Path) -> "TrainResult":
        """Read what `save` wrote (`train` leaves it in `out/result.json`)."""
        found = super().load(path)
        place = found.adapter_dir
        return found if place is None else replace(found, adapter_dir=Path(path).parent / place)

    @property
    def verdict(self) -> str:
        """First and last loss."""
        if not self.history:
            return "No step was trained."
        first, last = self.history[0], self.history[-1]
        told = f"{len(self.history)} steps: loss {first['loss']:.3f} -> {last['loss']:.3f} nats per token."
        stopped = ", ".join(f"{name} {value:g}" for name, value in self.plan.get(STOPPED, {}).items())
        return f"{told} Stopped: {stopped}." if stopped else told

    def to_frame(self) -> "pd.DataFrame":
        """One row per step."""
        import pandas as pd

        return pd.DataFrame(list(self.history))

    def figure(self) -> "go.Figure":
        """The loss, its terms and the learning rate over the steps."""
        from piggyback_lens.figures.plots import history_figure

        figure: go.Figure = history_figure(self.to_frame())
        return figure


@shows("training")
def train(
    model: nn.Module | Trainable,
    examples: Sequence[RenderedPrompt],
    settings: TrainSettings | None = None,
    *,
    objective: Objective = sft,
    out: str | Path | None = None,
    on_step: Callable[[Row], object] | None = None,
    progress: bool | str = True,
) -> TrainResult:
    """Train the adapter of `model` on the response tokens of `examples`.

    By default AdamW, linear warm-up and cosine decay, gradient clipping. The loss of a step is the mean over all its
    response tokens, in however many passes. The base's own dropout stays off; the adapter's is on. With `out`,
    checkpoints go to `out/checkpoint-…` and the finished adapter to `out/adapter`; a folder with a checkpoint
    of the same run is resumed from it, and Ctrl-C between two steps saves one before it is passed on. A step is done
    once `on_step` has returned: a run that ends within goes on from the checkpoint before, and calls it again.

    Args:
        model: a PEFT model (see `add_lora`), the hooked view of one (what `pair.using` gives), or any `Trainable`.
        examples: rendered conversations with a response span.
        settings: the knobs.
        objective: what to descend. To be told apart in checkpoints it is a named function, or an object
            with a `settings()` method.
        out: folder of the run, or None to write nothing.
        on_step: called with the history row after each step, with "steps", how many there are. Where it gives a
            mapping, as a `Monitor` that is to stop at a bound does once it has put earlier weights back, training ends,
            and the result's plan has the mapping. A method check_trained of it, as a `Monitor` has, is called with
            what is trained before the first step.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: unusable examples, the folder of another run, or a loss that is not finite.

    Example:
        >>> trainable = HookTrainable(model, Direction.zeros(32, 1))
        >>> result = train(trainable, conversations, TrainSettings(steps=2, batch_size=2, learning_rate=0.1))
        >>> len(result.history), trainable.result().norm() > 0
        (2, True)
    """
    settings = settings if settings is not None else TrainSettings()
    trainable = model if isinstance(model, Trainable) else PeftAdapter(model)
    if (check := getattr(on_step, "check_trained", None)) is not None:
        check(trainable)
    trainable.begin(examples)
    network = trainable.model
    folder = None if out is None else Path(out)
    run = _prepare(network, examples, settings, objective=objective, trainable=trainable, folder=folder)
    if progress:
        for note in sorted({note for example in examples for note in example.notes}):
            say(note)
    with nullcontext() if run.folder is None else locked(run.folder):
        start = run.resume()
        history = list(start.history if start else ())
        with costing(network, run.costs()):
            if settings.share_prefix and len(history) < settings.steps:
                with _dropout(network, adapter=False), run.passes():
                    for batch in run.to_check(len(history)):
                        check_sharing(trainable.forward, batch)
            if STOPPED not in run.plan:
                with _dropout(network, adapter=True):
                    _loop(run, history, on_step)
        adapter_dir = None if run.folder is None else write_folder(run.folder / "adapter", trainable.save)
        result = TrainResult(
            history=tuple(history),
            settings=settings,
            identity=run.identity,
            versions={name: version(name) for name in ("piggyback-lens", "torch", "transformers", "peft")},
            adapter_dir=adapter_dir,
            resumed_from=len(start.history) if start else None,
            plan=run.plan,
        )
        if run.folder:
            result.save(run.folder / RESULT)
    return result


def _loop(run: "_Run", history: list[Row], on_step: Callable[[Row], object] | None) -> None:
    """Train from where `history` ends, appending one row per step."""
    between_steps = True  # False while weights, optimiser, history and what `on_step` has seen may disagree
    try:
        for index in track(range(len(history), run.settings.steps)):
            began = time.perf_counter()
            rate = learning_rate_at(run.settings, index)
            with seeded(run.settings.seed * 1_000_003 + index, run.device):
                summed, tokens = _set_gradient(run, index)
            norm = _clip(run, index)
            between_steps = False
            _descend(run.optimiser, rate)
            row = {"step": index + 1, **summed, "lr": rate, "grad_norm": norm, "tokens": tokens}
            row |= run.trainable.logged()
            history.append(row | {"seconds": time.perf_counter() - began})
            said = None if on_step is None else on_step(history[-1] | {"steps": run.settings.steps})
            if isinstance(said, Mapping):
                run.plan[STOPPED] = dict(said)
            between_steps = True
            if STOPPED in run.plan:
                break
            if (index + 1) % run.settings.checkpoint_every == 0:
                run.save(history)
        run.save(history)
    except KeyboardInterrupt:
        if between_steps:
            run.save(history)
        raise
    finally:
        run.optimiser.zero_grad()


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same from step to step."""

    model: nn.Module
    examples: Sequence[RenderedPrompt]
    lengths: tuple[int, ...]
    settings: TrainSettings
    objective: Objective
    trainable: Trainable
    parameters: Mapping[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    identity: Mapping[str, object]
    folder: Path | None
    plan: dict[str, Any] = field(default_factory=dict)  # for the run card: costs, and passes by their way

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Precision and memory of the passes inside."""
        with ExitStack() as stack:
            if self.settings.bf16:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.settings.gradient_checkpointing:
                stack.enter_context(recomputed(self.model))
            yield

    def batches(self, index: int) -> list[TrainBatch]:
        """The batches of step `index`, one for each pass: the conversations of one large batch, cut."""
        size, coarse = self.settings.batch_size, rounds_coarsely(self.model, self.device) or self.settings.bf16
        rows = [
            self.examples[n] for n in batch_indices(self.lengths, _per_step(self.settings), self.settings.seed, index)
        ]
        return [
            make_batch(
                rows[start : start + size],
                share_prefix=self.settings.share_prefix,
                device=self.device,
                plain_keys=bool(getattr(self.objective, "plain_keys", False)),
                residual=bool(getattr(self.objective, "residual", False)),
                multiple=WIDTHS if coarse else 1,
            )
            for start in range(0, len(rows), size)
        ]

    def to_check(self, start: int) -> Iterator[TrainBatch]:
        """The batch of step `start`, and if that is not packed the next one that is."""
        for index in range(start, min(start + 50, self.settings.steps)):
            batch = self.batches(index)[0]
            packed = plan_for(self.model, batch).packing is not None
            if packed or index == start:
                yield batch
            if packed:
                return

    def step(self, batch: TrainBatch, index: int, part: Part) -> Step:
        """The forward pass of a batch, with what an objective may ask for."""
        own = self.trainable
        output = own.forward(batch)
        passes = self.plan.setdefault("passes", {})
        passes[output.way] = passes.get(output.way, 0) + 1
        return Step(
            self.model,
            batch,
            output,
            index,
            own.plain_forward,
            steered=own.steered,
            base=own.base_forward,
            part=part,
        )

    def save(self, history: Sequence[Row]) -> None:
        """Write a checkpoint, if there is a folder."""
        if self.folder is not None:
            progress = Progress(tuple(history), self.plan)
            save_checkpoint(self.folder, progress, self.parameters, self.optimiser, self.identity)

    def resume(self) -> Progress | None:
        """Restore the folder's checkpoint. A fresh run finds its costs, and writes step 0, where reruns start."""
        found = None
        if self.folder is not None:
            found = load_checkpoint(self.folder, self.parameters, self.optimiser, self.identity)
        if found is not None:
            self.plan.update(found.plan)
            return found
        if self.folder is not None and (self.folder / "adapter").exists():
            raise LensError(f"{self.folder} holds an adapter but no checkpoint; train into another folder")
        if self.settings.share_prefix:
            with self.passes():
                self.plan["costs"] = asdict(known_costs(self.model))
        self.save(())
        return None

    def costs(self) -> Costs:
        """What ways through the model are chosen by; runs of 0.1.0 have measured none."""
        found = self.plan.get("costs")
        return Costs(**found) if found else assumed(self.device, width_of(self.model))


def _prepare(
    model: nn.Module,
    examples: Sequence[RenderedPrompt],
    settings: TrainSettings,
    *,
    objective: Objective,
    trainable: Trainable,
    folder: Path | None,
) -> _Run:
    _check_examples(model, examples, settings)
    parameters = trainable.parameters()
    if not parameters:
        raise LensError("no parameter requires gradient; load the adapter with is_trainable=True")
    if settings.gradient_checkpointing and not trainable.recomputes:
        raise LensError(
            f"a {type(trainable).__name__} acts by hooks, which are gone when activation checkpointing runs a block "
            "again: set gradient_checkpointing=False"
        )
    return _Run(
        model=model,
        examples=examples,
        lengths=tuple(len(example.ids) for example in examples),
        settings=settings,
        objective=objective,
        trainable=trainable,
        parameters=parameters,
        optimiser=optimiser_of(settings, list(parameters.values())),
        identity=run_identity(model, examples, settings.identity(), objective=objective, trainable=trainable),
        folder=folder,
    )


def _per_step(settings: TrainSettings) -> int:
    """Conversations per optimiser step."""
    return settings.batch_size * settings.gradient_accumulation_steps


def _check_examples(model: nn.Module, examples: Sequence[RenderedPrompt], settings: TrainSettings) -> None:
    longest = n_positions_of(model) or math.inf
    for number, example in enumerate(as_prompts(examples)):
        check_supervised(example, number)
        if len(example.ids) > longest:
            raise LensError(f"example {number} has {len(example.ids)} tokens, this model takes {longest}; shorten it")
    if len(examples) < _per_step(settings):
        passes = settings.gradient_accumulation_steps
        more = f", gradient_accumulation_steps {passes}" if passes > 1 else ""
        raise LensError(f"batch_size is {settings.batch_size}{more} and there are {len(examples)} examples; lower it")


def _set_gradient(run: _Run, index: int) -> tuple[Row, int]:
    """Put the gradient of a step's loss into the parameters, pass by pass; return loss, terms and response tokens."""
    for parameter in run.parameters.values():
        parameter.grad = None
    batches = run.batches(index)
    tokens, rows = (sum(each) for each in ([x.n_supervised for x in batches], [len(x.ids) for x in batches]))
    summed: Row = {"loss": 0.0}
    for number, batch in enumerate(batches):
        part = Part(batch.n_supervised / tokens, len(batch.ids) / rows, number == 0)
        with run.passes():
            loss = run.objective(run.step(batch, index, part))
        if taken := sorted(RESERVED & loss.terms.keys()):
            raise LensError(f"the objective calls a loss term {taken[0]!r}, a column of the history; rename it")
        value = float(loss.total.detach())
        if not math.isfinite(value):
            raise LensError(
                f"the loss of {_where(run, index)} is {value}; lower learning_rate, warm up longer, or check the data"
            )
        (loss.total * part.tokens).backward()  # type: ignore[no-untyped-call]
        for name, term in {"loss": value, **loss.terms}.items():
            summed[name] = summed.get(name, 0.0) + term * part.tokens
    return summed, tokens


def _clip(run: _Run, index: int) -> float:
    """Clip the gradient; return its length before."""
    longest = math.inf if run.settings.max_grad_norm is None else run.settings.max_grad_norm
    norm = float(torch.nn.utils.clip_grad_norm_(list(run.parameters.values()), longest))
    if not math.isfinite(norm):
        raise LensError(f"the gradient of {_where(run, index)} is not finite; lower learning_rate or warm up longer")
    return norm


def _where(run: _Run, index: int) -> str:
    return f"step {index + 1} (learning rate {learning_rate_at(run.settings, index):.3g})"


def _descend(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()


@contextmanager
def _dropout(model: nn.Module, *, adapter: bool) -> Iterator[None]:
    """The base's dropout off, the adapter's as asked; the modules' own modes come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for module, _ in modes:
            if isinstance(inner := getattr(module, "lora_dropout", None), nn.Module):
                inner.train(adapter)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
