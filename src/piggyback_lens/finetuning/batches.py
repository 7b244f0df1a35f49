"""Batches of conversations: right-padded rows, what of them is supervised, and the prefix they share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from piggyback_lens.conversations.batch import Batch, common_prefix_length, padded
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError


@dataclass(frozen=True, eq=False)
class TrainBatch(Batch):
    """Right-padded rows of prompt + response, and what of them is supervised and shared."""

    examples: tuple[RenderedPrompt, ...]
    supervised: Bool[Tensor, "row pos"]  # True at response tokens, the turn end included
    prefix_length: int  # leading tokens that are prefix in every row, and the same ids
    share_prefix: bool  # compute those tokens once instead of once per row
    plain_keys: bool = False  # keep the keys before the rotary embedding too
    residual: bool = False  # keep the residual stream after every block too

    @property
    def n_supervised(self) -> int:
        """Number of response tokens, the denominator of the loss."""
        return int(self.supervised.sum())


def make_batch(
    examples: Sequence[RenderedPrompt],
    *,
    share_prefix: bool = True,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    plain_keys: bool = False,
    residual: bool = False,
    multiple: int = 1,
) -> TrainBatch:
    """Right-pad examples into one batch, to a width that is a multiple of a number.

    Raises:
        LensError: no examples, or an example without response tokens.
    """
    if not examples:
        raise LensError("got an empty batch; pass at least one example with a response")
    for row, example in enumerate(examples):
        check_supervised(example, row)
    rows = padded([example.ids for example in examples], pad_id=pad_id, multiple=multiple)
    after = rows.positions >= torch.tensor([[example.n_prompt] for example in examples])
    return TrainBatch(
        examples=tuple(examples),
        ids=rows.ids.to(device),
        attention_mask=rows.attention_mask.to(device),
        supervised=after.to(device),
        prefix_length=common_prefix_length(examples),
        share_prefix=share_prefix,
        plain_keys=plain_keys,
        residual=residual,
    )


def batch_indices(lengths: tuple[int, ...], batch_size: int, seed: int, index: int) -> tuple[int, ...]:
    """The examples of step `index`: a function of the arguments alone, each example once per epoch.

    Every epoch is shuffled anew. Within windows of eight batches, examples of similar length go together
    (lengths are jittered by a quarter, else small data would give the same batches in every epoch). Where
    batch_size does not divide the number of examples, one batch of each epoch is smaller.
    """
    epoch, position = divmod(index, math.ceil(len(lengths) / batch_size))
    return _epoch_batches(lengths, batch_size, seed, epoch)[position]


@lru_cache(maxsize=4)
def _epoch_batches(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
    generator = np.random.default_rng([seed, epoch])
    order = [int(number) for number in generator.permutation(len(lengths))]
    jittered = np.asarray(lengths) * generator.uniform(0.8, 1.25, len(lengths))
    batches: list[tuple[int, ...]] = []
    for at in range(0, len(order), 8 * batch_size):
        window = sorted(order[at : at + 8 * batch_size], key=lambda number: float(jittered[number]))
        batches += [tuple(window[at : at + batch_size]) for at in range(0, len(window), batch_size)]
    return tuple(batches[int(place)] for place in generator.permutation(len(batches)))


def check_supervised(example: RenderedPrompt, number: int) -> None:
    """Refuse an example that the loss could not see."""
    if len(example.ids) <= example.n_prompt:
        raise LensError(
            f"example {number} has no response tokens ({len(example.ids)} tokens, all prompt); render it "
            "with response=... or use .with_response(...)"
        )
    if example.n_prompt < 1:
        raise LensError(f"example {number} has no prompt token before its response; nothing predicts its start")


def unsupervised(ids: Sequence[Sequence[int]], device: torch.device | str) -> TrainBatch:
    """Rows of tokens of which nothing is supervised or shared: a pass that is run for its keys and values."""
    rows = padded(ids)
    return TrainBatch(
        ids=rows.ids.to(device),
        attention_mask=rows.attention_mask.to(device),
        examples=(),
        supervised=torch.zeros_like(rows.ids, dtype=torch.bool).to(device),
        prefix_length=0,
        share_prefix=False,
    )
