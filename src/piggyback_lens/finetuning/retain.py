"""Retain data: conversations on which the finetuned model should stay as it was."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch, batch_indices, check_supervised, make_batch

RATE = 0.2
"""Share of retain examples in the mixture of 2606.06667."""


def interleave(
    examples: Sequence[RenderedPrompt],
    retain: Sequence[RenderedPrompt],
    rate: float = RATE,
    *,
    seed: int = 0,
    gap: Sequence[float] | None = None,
) -> tuple[RenderedPrompt, ...]:
    """Mix retain examples into the training data: data interleaving. Train on the result as usual.

    Args:
        examples: the narrow training data, all of it kept.
        retain: conversations outside its domain, with ordinary responses; drawn without replacement.
        rate: share of retain examples in the result, 0 to below 1.
        seed: which of them, and the order.
        gap: a number for each retain example; those with the largest are taken instead of drawn. With `nll` of its
            response under a plain finetune minus that under the base it is the perplexity gap of 2508.06249 (its
            logarithm): taken is what finetuning would damage most.

    Raises:
        LensError: the rate is out of range, there are too few retain examples for it, or none to choose among by a
            gap, or a gap is not finite.
    """
    if not 0 <= rate < 1:
        raise LensError(f"rate is the share of retain examples, from 0 to below 1, got {rate}")
    wanted = round(len(examples) * rate / (1 - rate))
    if wanted > len(retain):
        raise LensError(
            f"a rate of {rate:g} beside {len(examples)} examples takes {wanted} retain examples, there are "
            f"{len(retain)}; give more of them or lower the rate"
        )
    draw = np.random.default_rng(seed)
    order = [int(number) for number in draw.permutation(len(retain))]
    chosen = [retain[number] for number in (order if gap is None else _by_gap(order, gap, wanted))[:wanted]]
    mixed = [*examples, *chosen]
    return tuple(mixed[int(number)] for number in draw.permutation(len(mixed)))


def _by_gap(order: Sequence[int], gap: Sequence[float], wanted: int) -> list[int]:
    """The largest first; equal ones in the order that was drawn."""
    if len(gap) != len(order) or not all(map(math.isfinite, gap)):
        raise LensError(f"gap has {len(gap)} numbers for {len(order)} retain examples: give a finite one for each")
    if wanted >= len(order):
        raise LensError(
            f"all {len(order)} retain examples are wanted, so that a gap chooses nothing: give more, or lower the rate"
        )
    return sorted(order, key=lambda number: -gap[number])


@dataclass(frozen=True, eq=False)
class RetainData:
    """Batches of retain examples for a penalty, one for each step: a function of seed and step alone."""

    examples: Sequence[RenderedPrompt]
    batch_size: int = 8
    seed: int = 0
    share_prefix: bool = True  # as in `TrainSettings`

    def __post_init__(self) -> None:
        for number, example in enumerate(self.examples):
            check_supervised(example, number)
        if not 1 <= self.batch_size <= len(self.examples):
            raise LensError(
                f"batch_size is {self.batch_size} and there are {len(self.examples)} retain examples; "
                "expected 1 to that many"
            )

    def settings(self) -> dict[str, object]:
        """Which data, and how it is drawn; JSON-able."""
        data = hashlib.sha256()
        for example in self.examples:
            data.update(f"{example.n_prompt} {example.ids}\n".encode())
        chosen = {"number": len(self.examples), "batch_size": self.batch_size, "seed": self.seed}
        return chosen | {"sha256": data.hexdigest()[:16], "share_prefix": self.share_prefix}

    def batch(self, index: int, device: torch.device | str = "cpu") -> TrainBatch:
        """The batch of retain conversations of one step."""
        lengths = tuple(len(example.ids) for example in self.examples)
        rows = [self.examples[number] for number in batch_indices(lengths, self.batch_size, self.seed, index)]
        return make_batch(rows, share_prefix=self.share_prefix, device=device)

    @property
    def steps_per_epoch(self) -> int:
        """After how many steps every example has been seen once."""
        return math.ceil(len(self.examples) / self.batch_size)
