"""Prompts of unequal length as padded tensors, with masks and positions made explicit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.errors import LensError

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Padded prompts. Spans stay in unpadded coordinates; `positions` translates.

    Attributes:
        prompts: the rows.
        ids: token ids, `pad_id` at pads.
        attention_mask: 1 at tokens, 0 at pads.
        position_ids: 0, 1, 2 ... along each row's tokens; 0 at pads.
        positions: the unpadded position that each column holds; -1 at pads.
        side: where the pads are.
    """

    prompts: tuple[RenderedPrompt, ...]
    ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    side: Side

    def __len__(self) -> int:
        return len(self.prompts)

    def span_mask(self, name: str) -> Bool[Tensor, "batch pos"]:
        """True where a column holds a token of the named span. Raises LensError as `RenderedPrompt.span`."""
        spans = [prompt.span(name) for prompt in self.prompts]
        start = torch.tensor([[span.start] for span in spans], device=self.positions.device)
        stop = torch.tensor([[span.stop] for span in spans], device=self.positions.device)
        return (self.positions >= start) & (self.positions < stop)


def batch_prompts(
    prompts: Sequence[RenderedPrompt],
    side: Side = "left",
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> PromptBatch:
    """Pad prompts to a common length.

    Raises:
        LensError: no prompts, or an unknown side.
    """
    prompts = tuple(prompts)
    if not prompts:
        raise LensError("got no prompts to batch; pass at least one RenderedPrompt")
    if side not in ("left", "right"):
        raise LensError(f"side={side!r}; expected 'left' or 'right'")
    lengths = torch.tensor([[len(prompt.ids)] for prompt in prompts])
    width = int(lengths.max())
    shift = width - lengths if side == "left" else torch.zeros_like(lengths)
    positions = torch.arange(width)[None, :] - shift
    real = (positions >= 0) & (positions < lengths)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    ids[real] = torch.tensor([token for prompt in prompts for token in prompt.ids], dtype=torch.long)
    return PromptBatch(
        prompts=prompts,
        ids=ids.to(device),
        attention_mask=real.long().to(device),
        position_ids=positions.masked_fill(~real, 0).to(device),
        positions=positions.masked_fill(~real, -1).to(device),
        side=side,
    )
