"""Running sums of activations over a span, row by row: what means over any amount of data are made of."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.conversations.batch import as_prompts
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.kinds import cache
from piggyback_lens.interventions.running import applied
from piggyback_lens.models.backends import HookedModel, check_layers, shape_of
from piggyback_lens.models.network import NOTHING, forward
from piggyback_lens.settings import ReadSettings
from piggyback_lens.words import Site, Weighting

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Reading:
    """What is read of each row."""

    site: Site
    layers: tuple[int, ...]
    span: str
    first: int | None  # only the first so many tokens of the span
    last: int | None  # only the last so many
    weighting: Weighting

    @classmethod
    def of(cls, model: HookedModel, read: ReadSettings) -> "Reading":
        """The settings on a model.

        Raises:
            LensError: a layer the model does not have.
        """
        layers = check_layers(read.layers, shape_of(model).n_layers)
        return cls(read.site, layers, read.span, read.first, read.last, read.weighting)


class Sums:
    """Weighted sums of rows, over all and over the halves of random splits."""

    def __init__(self, n_splits: int, seed: int) -> None:
        if n_splits < 1:
            raise LensError(f"n_splits={n_splits}: at least one split is needed for the split-half cosine")
        self.draws = [random.Random(1_000_003 * seed + split) for split in range(n_splits)]
        self.first_halves = [0] * n_splits  # which half the even row of the present two went to
        self.sums: Tensor | None = None  # [split, half, layer, d]
        self.weights = torch.zeros(n_splits, 2, dtype=torch.float64)
        self.rows = self.tokens = 0

    def add(self, rows: Iterable[tuple[Tensor, int]], weighting: Weighting) -> None:
        """Add rows, each a sum over its tokens with their number."""
        for total, n in rows:
            value, weight = (total, float(n)) if weighting == "token" else (total / n, 1.0)
            if self.sums is None:
                self.sums = torch.zeros(len(self.draws), 2, *total.shape, dtype=torch.float64)
            for split, draw in enumerate(self.draws):
                if self.rows % 2 == 0:  # of every two rows one goes to each half
                    self.first_halves[split] = draw.randrange(2)
                half = self.first_halves[split] if self.rows % 2 == 0 else 1 - self.first_halves[split]
                self.sums[split, half] += value
                self.weights[split, half] += weight
            self.rows += 1
            self.tokens += n

    def require_two(self, side: str) -> None:
        """Refuse fewer than two rows, of which no halves can be made."""
        if self.rows < 2:
            raise LensError(f"{self.rows} rows {side}: at least 2 are needed on each side")

    def means(self) -> Float[Tensor, "layer d"]:
        """The mean over everything."""
        assert self.sums is not None
        total: Tensor = self.sums[0].sum(0) / self.weights[0].sum()
        return total

    def half_means(self) -> Float[Tensor, "split half layer d"]:
        """The means of both halves of every split."""
        assert self.sums is not None
        return self.sums / self.weights[:, :, None, None]


def row_sums(
    model: HookedModel, prompts: Sequence[RenderedPrompt], where: Reading
) -> Iterator[tuple[Float[Tensor, "layer d"], int]]:
    """Per row the sum over its span's tokens, in float64, and their number."""
    batch = batch_prompts(as_prompts(prompts), side="right")
    keep = cache(where.site, layers=where.layers, span=where.span, device=None)
    with torch.no_grad(), applied(model, batch, keep) as record:
        forward(model, batch.ids, batch.attention_mask, read=NOTHING)
    kept = record.activations_of(where.span)
    lengths = torch.tensor(kept.lengths)
    ends = lengths.clamp(max=where.first) if where.first is not None else lengths
    starts = (lengths - where.last).clamp(min=0) if where.last is not None else torch.zeros_like(lengths)

    def summed(activation: Tensor) -> Tensor:
        """Over the tokens that are read: [row, d]."""
        places = torch.arange(activation.shape[1])
        read = (places >= starts[:, None]) & (places < ends[:, None])
        return (activation.double().cpu() * read.view(*read.shape, *[1] * (activation.ndim - 2))).sum(1)

    sums = torch.stack([summed(kept[where.site, layer]) for layer in where.layers], dim=1)
    for row, n in enumerate((ends - starts).tolist()):
        yield sums[row], n


def batches(rows: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of `size` rows, read as they are asked for."""
    if size < 1:
        raise LensError(f"batch_size {size}: it must be at least 1")
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch


def hash_rows(digest: Any, side: str, prompts: Sequence[RenderedPrompt]) -> None:
    """Feed token ids and border of every row into a digest."""
    for prompt in prompts:
        digest.update(f"{side} {prompt.n_prompt} {prompt.ids}\n".encode())
