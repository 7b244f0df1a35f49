"""Residual drift: hold the hidden states of the training data to the base's (feature-space L2).

objective = Penalised((Weighted(ResidualDrift(), 1.0),))
train(model, examples, objective=objective)
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.objectives import Reads
from piggyback_lens.finetuning.references import (
    SPANS,
    SpanName,
    base_of,
    model_fingerprint,
    span_range,
    token_grid,
)
from piggyback_lens.finetuning.steps import Step
from piggyback_lens.maths import relative_square
from piggyback_lens.models.backends import check_layers
from piggyback_lens.settings import check_field

ResidualSpan = Literal["conversation", "response"] | SpanName
"""What is held: the whole conversation, its response, or a part of its prompt ("all" is the whole prompt)."""
RESIDUAL_SPANS: tuple[ResidualSpan, ...] = ("conversation", "response", *SPANS)


@dataclass(frozen=True, eq=False)
class ResidualDrift:
    """The drift of the residual stream on the training data: feature-space L2, one of the defences of 2508.06249.

    mean over layers of the mean over the span's tokens of ‖h−h₀‖²/‖h₀‖², no unit, where h is the residual stream after
    a decoder block and h₀ the base's on the same tokens; rows count equally. The literature takes the squared distance
    itself, which the layers with the longest vectors decide, and the first token most of all; ours is relative as
    `TReFT`'s is, so that a weight means the same in every layer.

    It is read from the pass that gives the loss (whose rows are not packed then), takes one base pass of the same rows
    per step, and is zero before training, in every precision.

    Attributes:
        span: the whole conversation (default), its response, or prefix, query, postfix or all of its prompt.
        layers: decoder blocks, from 0; None for every one.
        base: the model for those passes; None for the trained model without its adapter.
    """

    span: ResidualSpan = "conversation"
    layers: tuple[int, ...] | None = None
    base: nn.Module | None = None
    free: bool = False
    plain_keys: bool = False
    residual: bool = True  # what the pass has to keep

    def __post_init__(self) -> None:
        check_field(self, "span", self.span in RESIDUAL_SPANS, f"one of {', '.join(RESIDUAL_SPANS)}")
        chosen = self.layers is None or (len(self.layers) > 0 and len(set(self.layers)) == len(self.layers))
        check_field(self, "layers", chosen, "at least one layer, each once, or None for all")

    @property
    def name(self) -> str:
        """The name of its column in the training history."""
        return f"residual_{self.span}"

    @property
    def reads(self) -> Reads:
        """The prompts, or conversations where the span has tokens of the response."""
        return "prompts" if self.span in SPANS else "conversations"

    def settings(self) -> dict[str, object]:
        """Span and layers, and which base, where it is another model."""
        named = {} if self.base is None else {"base": model_fingerprint(self.base)}
        return {"span": self.span, "layers": None if self.layers is None else list(self.layers), **named}

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The drift of this step's pass.

        Raises:
            LensError: a layer that the model does not have, or a pass that kept no residual stream.
        """
        batch = replace(step.batch, residual=True)
        streams = step.plain.residual
        if streams is None:
            raise LensError("this pass kept no residual stream: give the penalty to train or a Trainer in a Penalised")
        layers = check_layers(self.layers, len(streams))
        spans = [_positions(example, self.span) for example in batch.examples]
        rows, columns, weights = token_grid(spans, batch.ids.device)
        # The same rows in passes of the same shapes, whose logits nobody wants.
        before = base_of(step, replace(batch, supervised=torch.zeros_like(batch.supervised)), self.base).residual
        assert before is not None, "the base's pass was asked for its residual stream"
        drifts = [
            (relative_square(*(side[layer][rows, columns][:, None] for side in (streams, before))) * weights).sum()
            for layer in layers
        ]
        return torch.stack(drifts).mean()


def _positions(example: RenderedPrompt, span: ResidualSpan) -> range:
    if span == "conversation":
        return range(len(example.ids))
    return range(example.n_prompt, len(example.ids)) if span == "response" else span_range(example, span)
