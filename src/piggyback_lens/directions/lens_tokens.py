"""What a direction says in tokens: its image under the final norm and the unembedding."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import HookedModel, device_of, dtype_of
from piggyback_lens.models.network import final_norm, unembedded
from piggyback_lens.vectors.direction import Direction


@dataclass(frozen=True)
class LensToken:
    """One token of a direction's logit lens; `score` is in logits per unit of final-norm output."""

    layer: int
    side: str  # "positive" or "negative"
    rank: int  # 0 = strongest
    token: str
    id: int
    score: float


def token_scores(model: HookedModel, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
    """W_U · (norm(v) − norm(0)): the logit lens (nostalgebraist 2020) without the biases.

    The final norm is the model's own, so its gain (and its centring, for a LayerNorm) counts; it also sets
    the length, so only the orientation of v matters.
    """
    inputs = vectors.to(device_of(model), dtype_of(model))[None]
    with torch.no_grad():
        hidden = final_norm(model, inputs) - final_norm(model, torch.zeros_like(inputs))
        scores = unembedded(model, hidden) - unembedded(model, torch.zeros_like(hidden))
    return scores[0].float().cpu()


def logit_lens(model: HookedModel, direction: Direction, tokenizer: Any, *, top: int = 10) -> tuple[LensToken, ...]:
    """The tokens that a direction writes most, on both sides, per layer.

    Args:
        model: either backend.
        direction: at a residual site, `attn_out` or `mlp_out`.
        tokenizer: turns ids into text.
        top: tokens per side.

    Raises:
        LensError: a direction of another width, or `top` below 1.
    """
    direction.check(model)
    if direction.site == "mlp_post" or top < 1:
        raise LensError(f"site {direction.site}, top {top}: the logit lens reads residual-width sites, top from 1")
    scores = token_scores(model, direction.vectors)
    found: list[LensToken] = []
    for layer, row in zip(direction.layers, scores, strict=True):
        for side, sign in (("positive", 1), ("negative", -1)):
            ids = (sign * row).topk(min(top, row.numel())).indices.tolist()
            found += [
                LensToken(layer, side, rank, tokenizer.decode([i]), i, float(row[i])) for rank, i in enumerate(ids)
            ]
    return tuple(found)
