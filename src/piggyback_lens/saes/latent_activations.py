"""Activations at one site, text by text, without first tokens and other attention sinks: what SAEs are made for.

Attention sinks (massive activations) outweigh all other tokens in any sum of squares, and SAEs are not trained
on them: the first token of every text is left out, and any that is far longer than the others.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from piggyback_lens.conversations.batch import padded
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.kinds import cache
from piggyback_lens.interventions.placement import OPEN, Placement, Row
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring.variants import Text
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.network import NOTHING, forward
from piggyback_lens.models.partial import ended_at
from piggyback_lens.progress import counting
from piggyback_lens.words import Site

if TYPE_CHECKING:
    pass

TokenSource = Text | RenderedPrompt | Sequence[int]
"""A text to read activations of: a window of plain text, a conversation, or bare token ids."""

OUTLIER = 10.0
"""Tokens whose activation is longer than this many times the median of their text are left out."""


def site_activations(
    model: HookedModel,
    texts: Sequence[TokenSource],
    *,
    site: Site,
    layer: int,
    span: str = "all",
    batch_size: int = 8,
    outliers: bool = False,
) -> Iterator[Float[Tensor, "token d"]]:
    """The activations of one text after the other, in float32 on the model's device, without its first token.

    Layers above `layer` are not run.

    Args:
        model: either backend.
        texts: windows of plain text, conversations or token ids.
        site: where to read.
        layer: at which layer.
        span: which tokens of conversations; plain texts and ids have "all" only.
        batch_size: texts per pass; does not change the result.
        outliers: keep tokens that are more than `OUTLIER` times as long as the median of the text's.

    Raises:
        LensError: no texts, or one without a token of the span beside its first.
    """
    if not texts or batch_size < 1:
        raise LensError(f"{len(texts)} texts, batch_size {batch_size}: each must be at least 1")
    rows = [_tokens(text) for text in texts]
    keep = cache(site, layers=layer, span=span, device=None, dtype=torch.float32)
    with counting(len(rows), "activations") as advance:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            batch = padded([own for own, _ in chosen])
            placement = Placement.in_rows([row for _, row in chosen], batch)
            with torch.no_grad(), applied(model, placement, keep) as record, ended_at(model, layer + 1):
                forward(model, batch.ids, batch.attention_mask, read=NOTHING)
            kept = record.activations_of(span)
            for number, length in enumerate(kept.lengths):
                if length == 0:
                    raise LensError(
                        f"text {start + number} has no token in span {span!r} beside its first: leave it out"
                    )
                found = kept[site, layer][number, :length]
                yield found if outliers else found[usual(found)]
            advance(len(chosen))


def usual(activations: Float[Tensor, "token d"]) -> Bool[Tensor, " token"]:
    """Which tokens are not longer than `OUTLIER` times the median; at least half of them."""
    norms = activations.norm(dim=1)
    kept: Tensor = norms <= OUTLIER * norms.median()
    return kept


def _tokens(text: TokenSource) -> tuple[tuple[int, ...], Row]:
    """Token ids, and the spans to read, which begin after the first token."""
    if isinstance(text, Text):
        ids, prompt = text.ids, text.prompt
    elif isinstance(text, RenderedPrompt):
        ids, prompt = text.ids, text
    else:
        ids, prompt = tuple(int(i) for i in text), None
    row = Row({"all": (0, OPEN)}, 1) if prompt is None else Row.of(prompt)
    return ids, Row({name: (max(1, start), stop) for name, (start, stop) in row.spans.items()}, row.n_prompt)
