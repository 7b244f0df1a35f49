"""Objectives that keep a finetune narrow: penalties on top of supervised finetuning, weighted and scheduled.

    keep = TReFT.on(model, examples[0])                      # the base's prefix, computed once
    objective = Penalised((Weighted(keep, 30.0),))           # L_SFT + 30 · drift
    train(model, examples, objective=objective)

A `Penalty` reads one number off a step; `Weighted` says how much of it counts and when; `Penalised` adds
them to the task's loss. Data interleaving is `retain.interleave`, preventive steering `preventive`.

Units: losses and KL are in nats per response token, the drift of keys and values has none, and a weight is
what multiplies that number. The code of the narrow-misalignment paper (2602.07852) divides its KL by
tokens × vocabulary: divide its weight by the vocabulary size to get ours (1e6 with 151,936 tokens is 6.6).
The code of 2606.06667 takes "keys and values" as projections of the residual stream before the input layer
norm; ours are the real ones, as its equation says, so weights for the two are not convertible. It subtracts
its drift threshold after weighting: divide theirs by the weight to get ours.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.finetuning.kept_base import KeptBase
from piggyback_lens.finetuning.references import (
    SPANS,
    SpanName,
    base_of,
    kv_reference,
    model_fingerprint,
    prefix_drift,
    reference_settings,
    span_drift,
    span_range,
)
from piggyback_lens.finetuning.retain import RetainData
from piggyback_lens.finetuning.steps import Loss, Objective, Part, Step, sft
from piggyback_lens.interventions.prefix import PrefixCache, TemplateSpan
from piggyback_lens.maths import kl_per_token
from piggyback_lens.models.packing import rounds_coarsely
from piggyback_lens.models.views import has_adapter
from piggyback_lens.settings import check_field

ROUNDING = 1e-10
"""The drift of a layer below which float32 does not tell it from none: (1e-5)², where its last bit is 1.2e-7."""
ReferenceName = Literal["template", "own"]
"""Where a span's base keys and values come from: one example of the template, or each example's own base run."""


Reads = Literal["nothing", "prefix", "prompts", "responses", "conversations"]
"""What of a batch a penalty reads: nothing, or only the prefix that all rows share, so that it is one number whatever
the rows are; its prompts, where rows count equally; its responses, where tokens do; or whole conversations, where rows
do."""


@runtime_checkable
class Penalty(Protocol):
    """One number of a step that training should keep small."""

    @property
    def name(self) -> str:
        """The name of its column in the training history."""
        ...

    @property
    def free(self) -> bool:
        """Whether it is read from the pass that gives the loss, at no further pass."""
        ...

    @property
    def plain_keys(self) -> bool:
        """Whether that pass has to keep its keys before the rotary embedding."""
        ...

    @property
    def reads(self) -> Reads:
        """What of a batch it reads, which says how the numbers of a batch's parts add up, and what pass it needs."""
        ...

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The number, with gradient."""
        ...

    def settings(self) -> Mapping[str, object]:
        """What was chosen about it, as JSON can hold it; part of the identity of a run."""
        ...


# --- keys and values -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TReFT:
    """Token-regularised finetuning, the drift of a span's keys and values (2606.06667 eq. 2 and 3).

    mean over layers of [mean over the span's tokens of ‖k−k₀‖²/‖k₀‖² + the same for v], no unit, where k
    and v are the model's own keys and values and k₀, v₀ the base's; rows count equally. Norms run over all
    key-value heads together. Keys are compared after the rotary embedding (and a key norm, where there is
    one); at equal positions that rotates difference and k₀ alike, so the ratio is the one before it. Only a
    postfix against the template's is compared before it, since there the positions differ.

    With the template's prefix as reference it is read from the pass that gives the loss, costs no further
    pass, and is zero before training, in every precision. What a pass computes depends on its shape in the last bits.
    In float32 on a CPU that is 1e-12 of drift, and what a layer has below 1e-10 is zero. In half precision and on
    accelerators it is up to 2e-3, so like is compared with like: the reference is computed once for each shape that is
    met, which takes the base: an adapter that can be switched off, or `base`; without one rounding stays. Any span with
    reference "own" is zero before training too; it takes one base pass of the same rows per step. The template's
    postfix is not: a row's postfix depends on its query, and this penalty holds it to that of one example.

    Attributes:
        span: prefix, query, postfix, or all (the whole prompt; never the response).
        reference: the base's `PrefixCache` of a prefix or postfix (`TReFT.on` computes it); "template" for one that a
            `PenaltyTrainer` computes where training begins; or None for each example's own base run.
        base: the model for those runs; None for the trained model without its PEFT adapter.
    """

    span: SpanName = "prefix"
    reference: PrefixCache | Literal["template"] | None = None
    base: nn.Module | None = None
    alike: dict[tuple[int, ...], PrefixCache] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_field(self, "span", self.span in SPANS, f"one of {', '.join(SPANS)}")
        if isinstance(self.reference, str):
            check_field(self, "reference", self.reference == "template", '"template", a PrefixCache or None')
            _check_template(self.span)
        elif self.reference is not None and self.reference.span != self.span:
            raise LensError(
                f"span is {self.span!r} and the reference that of a {self.reference.span}; make it with "
                f"kv_reference(..., {self.span!r}), or leave it out for each example's own base run"
            )

    @classmethod
    def on(
        cls,
        model: nn.Module,
        example: RenderedPrompt,
        span: SpanName = "prefix",
        *,
        reference: ReferenceName = "template",
        base: nn.Module | None = None,
    ) -> "TReFT":
        """The penalty with its reference, computed here once where that is the template's.

        Args:
            model: the model to train, before training; an adapter is switched off for the pass.
            example: any prompt of the template settings; its own postfix is the reference for "postfix".
            span: prefix (default), postfix, query or all.
            reference: "template" for `example`'s span (prefix and postfix only), "own" for each example's
                own base run at every step.
            base: another base model.

        Raises:
            LensError: a query asked from the template, or what reading the base raises.
        """
        if reference not in ("template", "own"):
            raise LensError(f"reference is {reference!r}; expected 'template' or 'own'")
        if reference == "own":
            return cls(span, None, base)
        return cls(span, kv_reference(model, example, _check_template(span), base), base)

    @property
    def name(self) -> str:
        """The name of its column in the training history."""
        return f"drift_{self.span}"

    @property
    def free(self) -> bool:
        """Whether the reference is there already."""
        return self.reference is not None

    @property
    def plain_keys(self) -> bool:
        """Whether keys at different positions are compared."""
        return self.reference is not None and self.span == "postfix"

    @property
    def reads(self) -> Reads:
        """The prefix alone where the template's is the reference; of other spans every row."""
        return "prefix" if self.reference is not None and self.span == "prefix" else "prompts"

    def settings(self) -> dict[str, object]:
        """Span and reference, and which base, where it is another model."""
        known = self.reference
        reference = reference_settings(known) if isinstance(known, PrefixCache) else known or "own"
        return {"span": self.span, "reference": reference, **_named_base(self.base)}

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The drift of this step's pass.

        Raises:
            LensError: an example whose span has other tokens than the reference; says which one.
        """
        examples, reference = step.batch.examples, self.reference
        if isinstance(reference, str):
            raise LensError(
                "this TReFT has no reference yet, which only a PenaltyTrainer computes: write TReFT.on(model, example)"
            )
        if not step.plain.keys:
            raise LensError(
                "this pass computes only the layers that are trained and those above them, without keys and values "
                "of the rest: make it HookTrainable(..., cache_below=False) for a penalty on them"
            )
        if self.span == "prefix" and reference is not None:
            for number, example in enumerate(examples):
                _check_prefix(example, number, reference.ids)
            if step.batch.prefix_length < 1:
                raise LensError("the rows of this batch share no prefix token; use reference='own'")
            if rounds_coarsely(step.model, step.batch.ids.device):
                return prefix_drift(step.plain, self._rounded_alike(step, reference)).mean()
            drifts = prefix_drift(step.plain, reference.to(step.batch.ids.device))
            return functional.threshold(drifts, ROUNDING, 0.0).mean()
        spans = [span_range(example, self.span) for example in examples]
        if reference is None:
            return span_drift(step.plain, spans, base_of(step, _unread(step.batch), self.base)).mean()
        for number, (example, span) in enumerate(zip(examples, spans, strict=True)):
            _check_ids(example.ids[span.start : span.stop], number, reference)
        return span_drift(step.plain, spans, reference.to(step.batch.ids.device)).mean()

    def _rounded_alike(self, step: Step, reference: PrefixCache) -> PrefixCache:
        """The reference as a pass of this step's shape computes it."""
        device, shape = step.batch.ids.device, step.plain.prefix_pass
        has_base = self.base is not None or step.base is not None or has_adapter(step.model)
        autocast = torch.is_autocast_enabled(device.type)
        if shape is None or not has_base or (shape == (1, len(reference.ids)) and not autocast):
            return reference.to(device)
        key = (*shape, step.batch.prefix_length, int(autocast))
        if key not in self.alike:
            base = base_of(step, step.batch, self.base)
            keys, values = (torch.stack([x.clone() for x in side]) for side in (base.prefix_keys, base.prefix_values))
            self.alike[key] = replace(reference, ids=reference.ids[: keys.shape[2]], keys=keys, values=values)
        return self.alike[key]


def _check_template(span: SpanName) -> TemplateSpan:
    if span not in ("prefix", "postfix"):
        raise LensError(f"the template has no {span} of its own; use each example's: TReFT({span!r})")
    return span


def _named_base(base: nn.Module | None) -> dict[str, object]:
    return {} if base is None else {"base": model_fingerprint(base)}


def _unread(batch: TrainBatch) -> TrainBatch:
    """The same rows, in passes of the same shapes, whose logits nobody wants."""
    return replace(batch, supervised=torch.zeros_like(batch.supervised))


def _check_prefix(example: RenderedPrompt, number: int, ids: tuple[int, ...]) -> None:
    """A row may have a shorter prefix (a token across its border) or a longer one (history), not another."""
    n = min(len(ids), example.span("prefix").stop)
    if example.ids[:n] != ids[:n]:
        at = next(i for i in range(n) if example.ids[i] != ids[i])
        raise LensError(
            f"example {number} of the batch (query {example.query[:40]!r}) has another prefix than the reference, "
            f"from token {at} ({example.pieces[at]!r}): render all examples with the same template settings, or "
            "use reference='own'"
        )


def _check_ids(ids: tuple[int, ...], number: int, reference: PrefixCache) -> None:
    if ids != reference.ids:
        raise LensError(
            f"the {reference.span} of example {number} of the batch has {len(ids)} tokens that are not the "
            f"reference's {len(reference.ids)}: use the same template settings, or reference='own'"
        )


# --- divergence from the base ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KLOnTrain:
    """KL(base ‖ tuned) at the response tokens of the training batch, nats per token, mean over its tokens.

    The base's predictions cost one pass without gradient for each example, and are kept.
    A `PenaltyTrainer` runs the base anew for every batch, as its data may be many.
    """

    base: nn.Module | None = None  # None: the trained model without its adapter
    name: str = "kl_train"
    free: bool = False
    plain_keys: bool = False
    reads: Reads = "responses"
    kept: KeptBase = field(default_factory=KeptBase, repr=False)

    def settings(self) -> dict[str, object]:
        """Which base, where it is another model."""
        return _named_base(self.base)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The divergence of this step's pass."""
        batch = replace(step.batch, plain_keys=False)
        base = self.kept.logits(step, batch, self.base) if step.keeps else base_of(step, batch, self.base).logits
        return kl_per_token(base[None], step.plain.logits[None]).mean()


@dataclass(frozen=True, eq=False)
class KLOnRetain:
    """KL(base ‖ tuned) at the response tokens of a batch of retain data, nats per token, mean over its tokens.

    Costs a pass with gradient per step, on `retain.batch_size` rows, and one base pass for each example, whose
    predictions are kept. The responses only say where to compare: the base's own answers are
    the natural ones.
    """

    retain: RetainData
    base: nn.Module | None = None  # None: the trained model without its adapter
    name: str = "kl_retain"
    free: bool = False
    plain_keys: bool = False
    reads: Reads = "nothing"
    kept: KeptBase = field(default_factory=KeptBase, repr=False)

    def settings(self) -> dict[str, object]:
        """Which retain data, and which base, where it is another model."""
        return {"retain": self.retain.settings(), **_named_base(self.base)}

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The divergence on the retain batch of this step."""
        batch = self.retain.batch(step.index, step.batch.ids.device)
        base = self.kept.logits(step, batch, self.base)
        return kl_per_token(base[None], step.run(batch).logits[None]).mean()


# --- weights, schedules, sums ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weighted:
    """How much of a penalty counts, and in which steps: weight · max(0, penalty − threshold)."""

    penalty: Penalty
    weight: float  # λ, in nats per token for one unit of the penalty
    start: int = 0  # the first step (from 0) in which it counts
    stop: int | None = None  # the first step in which it counts no longer; None = to the end
    threshold: float = 0.0  # no penalty below it, in the unit of the penalty; of each pass, where a step has several

    def __post_init__(self) -> None:
        check_field(self, "weight", 0 <= self.weight < math.inf, "a number of at least 0")
        check_field(self, "start", self.start >= 0, "a step from 0")
        check_field(self, "stop", self.stop is None or self.stop > self.start, "None or a step after start")
        check_field(self, "threshold", 0 <= self.threshold < math.inf, "a number of at least 0")

    def weight_at(self, index: int) -> float:
        """The weight in step `index` (from 0)."""
        active = index >= self.start and (self.stop is None or index < self.stop)
        return self.weight if active else 0.0

    def loss(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What is added to the loss while it counts."""
        return self.weight * ((value - self.threshold).clamp(min=0) if self.threshold else value)

    def settings(self) -> dict[str, object]:
        """Penalty, weight, schedule and threshold."""
        own = {"weight": self.weight, "start": self.start, "stop": self.stop, "threshold": self.threshold}
        return {"penalty": type(self.penalty).__name__, **self.penalty.settings(), **own}


@dataclass(frozen=True, eq=False)
class Penalised:
    """A task's loss plus weighted penalties: an `Objective` for `train`.

    The history gets one column per penalty with the number itself, before threshold and weight. In steps
    where a penalty does not count (weight 0, outside its schedule) one that is free is still measured, and
    nothing is added to the loss: weight 0 gives the task's training bit for bit.

    Example:
        >>> objective = Penalised((Weighted(KLOnRetain(RetainData(conversations, batch_size=2)), 16.0),))
        >>> trainable = HookTrainable(model, Direction.zeros(32, 1))
        >>> result = train(trainable, conversations, TrainSettings(steps=1, batch_size=2), objective=objective)
        >>> "kl_retain" in result.history[0]
        True
    """

    parts: tuple[Weighted, ...]
    task: Objective = sft

    def __post_init__(self) -> None:
        asked: Any = self.parts
        given = tuple(asked) if isinstance(asked, Iterable) else (asked,)
        for part in given:
            if not isinstance(part, Weighted):
                kind = type(part).__name__
                raise LensError(f"{kind} has no weight here: write Penalised((Weighted({kind}(...), 30.0),))")
        object.__setattr__(self, "parts", given)
        names = [part.penalty.name for part in self.parts]
        if len(set(names)) < len(names):
            raise LensError(f"two penalties have the same name in {names}; combine different ones")

    @property
    def plain_keys(self) -> bool:
        """Whether the pass has to keep its keys before the rotary embedding."""
        return any(part.penalty.plain_keys for part in self.parts)

    @property
    def residual(self) -> bool:
        """Whether the pass has to keep its residual stream: for penalties with an attribute `residual` that says so."""
        return any(part.weight > 0 and getattr(part.penalty, "residual", False) for part in self.parts)

    def settings(self) -> dict[str, object]:
        """Everything that was chosen, JSON-able."""
        task = getattr(self.task, "__qualname__", type(self.task).__qualname__)
        return {"task": task, "penalties": [part.settings() for part in self.parts]}

    def __call__(self, step: Step) -> Loss:
        """The loss of a step, its task's terms and every penalty that was measured."""
        loss = self.task(step)
        total, terms = loss.total, dict(loss.terms)
        for part in self.parts:
            counts, scale = part.weight_at(step.index) > 0, _scale(step.part, part.penalty.reads)
            if not scale or (not counts and (step.steered or not part.penalty.free)):
                continue
            with torch.set_grad_enabled(counts and torch.is_grad_enabled()):
                value = part.penalty(step)
            terms[part.penalty.name] = float(value.detach()) * scale
            if counts:
                total = total + part.loss(value) * scale
        return Loss(total, terms)


def _scale(part: Part, reads: Reads) -> float:
    """How a penalty of one pass counts beside its loss, so that all passes of a step give that of one batch.

    A loss counts by its tokens. What reads no row of the batch is computed in the first pass alone.
    """
    if reads == "nothing":
        return 1 / part.tokens if part.first else 0.0
    return 1.0 if reads == "responses" else part.rows / part.tokens
