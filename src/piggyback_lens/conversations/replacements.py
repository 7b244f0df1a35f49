"""What a token of a prompt is replaced by: near neighbours among the embeddings, or any token of the vocabulary."""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.conversations.prompt_edits import added_ids
from piggyback_lens.errors import LensError

Choices = Mapping[int, Sequence[int]] | Sequence[int]
"""For each token id the ids to draw from, or one sequence of ids for all."""


def candidate_ids(tokenizer: Any, d_vocab: int, special: bool = False) -> tuple[int, ...]:
    """Ids that may replace a token: the tokenizer's tokens that have an embedding.

    Rows of the embedding without a token (padding) never count. Special and added tokens only with `special`.
    """
    fixed: Set[int] = frozenset() if special else added_ids(tokenizer)
    return tuple(sorted(i for i in set(tokenizer.get_vocab().values()) - fixed if i < d_vocab))


def nearest_neighbours(
    embeddings: Float[Tensor, "vocab d_model"],
    ids: Sequence[int],
    candidates: Sequence[int],
    top: int = 5,
    chunk: int = 8192,
) -> dict[int, tuple[int, ...]]:
    """For each id, the `top` candidates whose embeddings have the largest dot product with its own, nearest first.

    The id itself is left out. Dot products are taken in float32 on the embeddings' device, `chunk` rows of the
    vocabulary at a time, so nothing larger than ids x chunk and chunk x d_model is made.

    Raises:
        LensError: fewer than `top` candidates beside the token itself.
    """
    if top < 1 or len(candidates) <= top:
        raise LensError(
            f"top {top} neighbours asked of {len(candidates)} candidate tokens; it takes at least 1 and more"
        )
    device, wanted = embeddings.device, torch.tensor(sorted(set(ids)), dtype=torch.long)
    own = wanted.to(device)[:, None]
    allowed = torch.zeros(len(embeddings), dtype=torch.bool, device=device)
    allowed[torch.tensor(candidates, device=device)] = True
    queries = embeddings[own[:, 0]].detach().float()
    values = torch.empty((len(wanted), 0), device=device)
    found = torch.empty((len(wanted), 0), dtype=torch.long, device=device)
    for start in range(0, len(embeddings), chunk):
        rows = torch.arange(start, min(start + chunk, len(embeddings)), device=device)
        scores = queries @ embeddings[rows].detach().float().T
        scores = scores.masked_fill(~allowed[rows] | (rows == own), -math.inf)
        values = torch.cat([values, scores], dim=1)
        found = torch.cat([found, rows.expand(len(wanted), -1)], dim=1)
        values, order = values.topk(min(top, values.shape[1]), dim=1)
        found = found.gather(1, order)
    return {token: tuple(row) for token, row in zip(wanted.tolist(), found.tolist(), strict=True)}


def draw_replacements(
    prompt: RenderedPrompt,
    span: str,
    choices: Choices,
    *,
    n_tokens: int = 10,
    trial: int = 0,
    seed: int = 0,
    protected: Set[int] = frozenset(),
) -> dict[int, int]:
    """Which tokens of a span are replaced in one trial, and by what: index within the span to new token id.

    All tokens are replaced where the span has no more than `n_tokens`. The places depend on seed, span, trial
    and the span's ids (for the query: the prompt's ids), never on what they are replaced by: neighbours and
    random tokens go to the same places, and prompts that share a prefix share its perturbation.

    Args:
        prompt: its span is read.
        span: any named span.
        choices: for each token id its neighbours, or one sequence of ids for all (the token itself, if it is
            among them, is drawn anew).
        n_tokens: how many.
        trial: number of the trial.
        seed: of all trials.
        protected: token ids that are left as they are.

    Raises:
        LensError: unknown or empty span, or one in which every token is protected.
    """
    home = prompt.span(span)
    ids = prompt.ids[home.start : home.stop]
    open_places = [i for i, token in enumerate(ids) if token not in protected]
    if not open_places:
        raise LensError(f"all {len(ids)} tokens of the span {span!r} are special: pass keep_special=False")
    key = (seed, span, trial, prompt.ids if span == "query" else ids)
    places = sorted(_generator(*key).sample(open_places, min(n_tokens, len(open_places))))
    draw = _generator(*key, "neighbours" if isinstance(choices, Mapping) else "random")
    return {i: _draw(draw, ids[i], choices[ids[i]] if isinstance(choices, Mapping) else choices) for i in places}


def _generator(*parts: Any) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big"))


def _draw(draw: random.Random, old: int, choices: Sequence[int]) -> int:
    while (new := draw.choice(choices)) == old:
        pass
    return new
