"""TReFT in people's own pipelines: a mixin for `transformers.Trainer` and `trl.SFTTrainer`.

    trainer = TReFTTrainer(model=model, args=args, train_dataset=data, data_collator=collator,
                           treft=TReFTSettings(prompt=chat.empty_query(), weight=10.0))
    trainer.train()

The penalty is that of `objectives.TReFT`. Whatever the Trainer does to compute its loss stays as it is
(labels, collators, label smoothing, fused heads, packing, activation checkpointing, gradient accumulation);
the penalty comes from a pass of its own over the prefix alone: one row of some thirty tokens, without
activation checkpointing, through whatever wraps the model. Other spans take a pass over the batch's prompts.

Works with PEFT and full finetuning, bf16, DDP and FSDP. Before the first step the base's keys and values are
computed (a PEFT adapter is switched off; for full finetuning the weights are still the base's) and from then
on kept in every checkpoint, from which a resumed run takes them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import check_supervised
from piggyback_lens.finetuning.hf_rows import IGNORED, check_prefixes, prompt_rows
from piggyback_lens.finetuning.objectives import ReferenceName, TReFT, Weighted
from piggyback_lens.finetuning.references import (
    SPANS,
    SpanName,
    base_forward,
    kv_reference,
    prefix_batch,
    prefix_drift,
    span_drift,
)
from piggyback_lens.finetuning.steps import StepOutput, forward_step
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.models.views import evaluating, without_replicas
from piggyback_lens.settings import check_field

REFERENCE_FOLDER = "treft_reference"
"""Folder inside each checkpoint with the base's keys and values."""


@dataclass(frozen=True, eq=False)
class TReFTSettings:
    """The regulariser of a trainer; the same terms as `TReFT` and `Weighted`.

    Attributes:
        prompt: any prompt of the data's template settings, e.g. `chat.empty_query()`. Its prefix is what every
            row has to begin with; its postfix is the reference of span "postfix".
        weight: λ, in nats per token for one unit of drift. The paper advises 1 to 30 with learning rates of
            1e-5 or 5e-6.
        span: prefix, postfix, query, or all (the whole prompt).
        reference: "template" (prefix and postfix), or "own" for each row's own base run at every step.
        start: first optimiser step (from 0) in which it counts.
        stop: first optimiser step in which it counts no longer; None = to the end.
        threshold: no penalty for a drift below it.
        base: the base for "own", on the trainer's device; None for the model without its PEFT adapter.
    """

    prompt: RenderedPrompt
    weight: float = 10.0
    span: SpanName = "prefix"
    reference: ReferenceName = "template"
    start: int = 0
    stop: int | None = None
    threshold: float = 0.0
    base: nn.Module | None = None

    def __post_init__(self) -> None:
        names = get_args(ReferenceName)
        check_field(self, "span", self.span in SPANS, f"one of {', '.join(SPANS)}")
        check_field(self, "reference", self.reference in names, f"one of {', '.join(names)}")
        _ = self.schedule
        if self.reference == "template" and self.span not in ("prefix", "postfix"):
            raise LensError(f"the template has no {self.span} of its own; use reference='own' for span {self.span!r}")
        self.prompt.span("prefix")

    @property
    def schedule(self) -> Weighted:
        """The penalty with its weight, its threshold and the steps in which it counts."""
        return Weighted(TReFT(self.span), self.weight, self.start, self.stop, self.threshold)


class TReFTMixin:
    """Adds the regulariser to a Trainer's loss: `class Mine(TReFTMixin, MyTrainer)`, with `treft=` when made.

    Logs, beside the Trainer's loss (which includes the penalty), `treft`, the part of it that the penalty is,
    and `drift_<span>`, the drift itself, both as means since the last log over this process's rows.
    Evaluation is left alone. With weight 0 nothing runs and training is the Trainer's own, bit for bit.
    """

    # of the Trainer
    args: Any
    state: Any
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, treft: TReFTSettings, **kwargs: Any) -> None:
        self.treft = treft
        self._reference: PrefixCache | None = None
        self._resumed: str | None = None
        self._measured: list[tuple[int, Tensor, Tensor]] = []
        super().__init__(*args, **kwargs)
        if getattr(self.args, "packing_strategy", None) == "wrapped" and getattr(self.args, "packing", False):
            raise LensError(
                'packing_strategy="wrapped" cuts conversations in two, whose second part has no prefix: use "bfd", or '
                "packing=False"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a resumed run takes the base's keys and values from its checkpoint."""
        resumed = resume_from_checkpoint
        self._resumed = get_last_checkpoint(self.args.output_dir) if resumed is True else resumed or None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss, plus the weighted penalty while training."""
        trained = model.training and self.treft.weight > 0
        if trained:
            reference = self._kept_reference(model)  # before anything is trained
            # What finds the rows, kept from trainers that take their labels out of the inputs.
            rows = {name: inputs[name] for name in _ROW_KEYS if name in inputs}
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not trained or not self.treft.schedule.weight_at(self.state.global_step):
            return found
        drift = self._drift(model, rows, reference)
        penalty = self.treft.schedule.loss(drift)
        if self._scaled_for_accumulation(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
            share = 1.0
        else:
            share = 1 / self.current_gradient_accumulation_steps
        self._measured.append((self.state.global_step, drift.detach(), penalty.detach() * share))
        loss, *outputs = found if return_outputs else (found,)
        loss = loss + penalty.to(loss.device, loss.dtype)
        return (loss, *outputs) if return_outputs else loss

    def _scaled_for_accumulation(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer takes the loss of a micro-batch as its share of the step, and divides no more."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        counted = bool(getattr(self, "model_accepts_loss_kwargs", False)) and num_items_in_batch is not None
        return counted or getattr(self, "compute_loss_func", None) is not None

    def _drift(self, model: nn.Module, rows: dict[str, Any], reference: PrefixCache | None) -> Float[Tensor, ""]:
        """The drift of the span, from a pass of its own; no unit."""
        settings, inner = self.treft, without_replicas(model)
        device = rows["input_ids"].device if "input_ids" in rows else torch.device("cpu")
        with evaluating(inner), _nothing_recomputed(inner):
            if settings.span == "prefix" and reference is not None:
                check_prefixes(rows, settings.prompt)
                output = forward_step(inner, prefix_batch(reference.ids, device))
                return _with_every_output(prefix_drift(output, reference.to(device)).mean(), output)
            found = prompt_rows(rows, settings.prompt, settings.span)
            batch = found.batch(device, plain_keys=reference is not None)
            base = reference.to(device) if reference is not None else base_forward(inner, batch, settings.base)
            output = forward_step(inner, batch)
            return _with_every_output(span_drift(output, found.spans, base).mean(), output)

    def _kept_reference(self, model: nn.Module) -> PrefixCache | None:
        """The base's keys and values: kept, read from the checkpoint, or computed before the first step."""
        settings = self.treft
        if settings.reference == "own" or self._reference is not None:
            return self._reference
        if self._resumed is not None:
            folder = Path(self._resumed) / REFERENCE_FOLDER
            self._reference = _of_this_run(PrefixCache.load(folder), settings, folder)
        elif self.state.global_step > 0:
            raise LensError("training has begun without the base's keys and values; start with train()")
        else:
            inner = without_replicas(model)
            with _nothing_recomputed(inner):
                assert settings.span in ("prefix", "postfix")
                self._reference = kv_reference(inner, settings.prompt, settings.span)
        return self._reference

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self._reference is not None and self.args.should_save:
            run = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
            self._reference.save(run / f"checkpoint-{self.state.global_step}" / REFERENCE_FOLDER)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with `treft` and `drift_<span>` beside the training loss."""
        if "loss" in logs and self._measured:
            steps = len({step for step, _, _ in self._measured})
            drift = torch.stack([drift for _, drift, _ in self._measured]).mean()
            penalty = torch.stack([penalty for _, _, penalty in self._measured]).sum() / steps
            logs = logs | {"treft": float(penalty), f"drift_{self.treft.span}": float(drift)}
            self._measured.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


_ROW_KEYS = ("input_ids", "attention_mask", "position_ids", "labels")


class TReFTTrainer(TReFTMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with TReFT; takes `treft=TReFTSettings(...)` beside the Trainer's arguments."""


def _of_this_run(reference: PrefixCache, settings: TReFTSettings, folder: Path) -> PrefixCache:
    """The reference of a checkpoint, if it is that of these settings: postfix keys are kept before the rotary
    embedding and prefix keys after it, so one in place of the other trains without an error.
    """
    where = settings.prompt.span(settings.span)
    wanted = settings.prompt.ids[where.start : where.stop]
    if (reference.span, reference.ids) != (settings.span, wanted):
        there, here = (settings.prompt.tokenizer.decode(list(ids)) for ids in (reference.ids, wanted))
        raise LensError(
            f"{folder} holds the base's {reference.span} {there!r}, and treft asks for the {settings.span} {here!r}; "
            "resume with the span and prompt that the run began with, or train into another folder"
        )
    return reference


def training_rows(examples: Sequence[RenderedPrompt]) -> list[dict[str, list[int]]]:
    """Rendered conversations as rows of a dataset: input_ids, attention_mask, labels of the response only.

    Pad them with `transformers.DataCollatorForSeq2Seq(tokenizer)`, or any collator that pads labels by -100.

    Raises:
        LensError: an example without a response, by its number.
    """
    for number, example in enumerate(examples):
        check_supervised(example, number)
    return [
        {
            "input_ids": list(example.ids),
            "attention_mask": [1] * len(example.ids),
            "labels": [IGNORED] * example.n_prompt + list(example.ids[example.n_prompt :]),
        }
        for example in examples
    ]


@contextmanager
def _nothing_recomputed(model: nn.Module) -> Iterator[None]:
    """Without the checkpoint wrappers of FSDP, whose recomputation would write to the cache a second time.

    The models' own activation checkpointing is off in evaluation mode.
    """
    wrappers: list[Any] = [module for module in model.modules() if hasattr(module, "_checkpoint_wrapped_module")]
    functions = [wrapper.checkpoint_fn for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.checkpoint_fn = _call
        yield
    finally:
        for wrapper, function in zip(wrappers, functions, strict=True):
            wrapper.checkpoint_fn = function


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _with_every_output(drift: Float[Tensor, ""], output: StepOutput) -> Float[Tensor, ""]:
    """The drift, tied to the end of the pass as well (by a sum over no logits, zero).

    FSDP gathers a block's weights when a gradient reaches what the block returned, and keys and values are
    not returned.
    """
    return drift + output.logits.sum().to(drift.dtype)


if TYPE_CHECKING:
    TReFTSFTTrainer: Any


def __getattr__(name: str) -> Any:
    """`TReFTSFTTrainer`, made when it is first asked for, since trl is optional."""
    if name != "TReFTSFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        trainer = import_module("trl").SFTTrainer
    except ImportError as error:
        raise LensError("TReFTSFTTrainer needs trl: run  pip install 'piggyback-lens[trl]'") from error
    text = "`trl.SFTTrainer` with TReFT; takes `treft=TReFTSettings(...)` beside the SFTTrainer's arguments."
    made = type(name, (TReFTMixin, trainer), {"__doc__": text, "__module__": __name__})
    globals()[name] = made
    return made
