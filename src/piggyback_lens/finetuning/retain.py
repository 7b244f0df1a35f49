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
    examples: Sequence[RenderedPrompt], retain: Sequence[RenderedPrompt], rate: float = RATE, *, seed: int = 0
) -> tuple[RenderedPrompt, ...]:
    """Mix retain examples into the training data: data interleaving. Train on the result as usual.

    Args:
        examples: the narrow training data, all of it kept.
        retain: conversations outside its domain, with ordinary responses; drawn without replacement.
        rate: share of retain examples in the result, 0 to below 1.
        seed: which of them, and the order.

    Raises:
        LensError: the rate is out of range, or there are too few retain examples for it.
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
    chosen = [retain[int(number)] for number in draw.permutation(len(retain))[:wanted]]
    mixed = [*examples, *chosen]
    return tuple(mixed[int(number)] for number in draw.permutation(len(mixed)))


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
