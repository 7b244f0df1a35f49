"""Have the weights of a model changed since? Told by what they hold: not every write raises a tensor's own count.

Fused optimisers (the default of transformers' Trainer), `.data` and `vector_to_parameters` do not raise it.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Version = tuple[int, ...]
WHOLE = 1024
"""Tensors of at most so many values are read whole."""
SAMPLED = 64
"""So many values are read of a larger one. A training step changes nearly all, an edit of a few rows may miss them."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def version_of(owner: Any) -> Version:
    """Another one after every change inside a model's tensors: their own counts of writes, and of what they hold."""
    counts, read = 0, defaultdict(list)
    for tensor in _tensors(owner):
        counts += 0 if tensor.is_inference() else tensor._version
        if not tensor.is_meta and tensor.numel():
            bits = _read(_local(tensor.detach()))
            read[bits.device, bits.dtype].append(bits)
    return counts, *(_digest(torch.cat(found)) for found in read.values())


def _tensors(owner: Any) -> Iterator[Tensor]:
    yield from owner.parameters()
    yield from owner.buffers()


def _local(tensor: Tensor) -> Tensor:
    """A plain tensor: of a sharded one what is here, of a quantised one its storage."""
    shard = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard.as_subclass(Tensor)


def _read(tensor: Tensor) -> Int[Tensor, " n"]:
    """Its bits as whole numbers, so that NaN is equal to itself; of a large tensor some, spread over all of it."""
    size = tensor.numel()
    if size <= WHOLE:
        values = tensor.reshape(-1)
    elif tensor.is_contiguous():
        values = tensor.view(-1)[:: size // SAMPLED | 1].contiguous()  # an odd step, so that columns change
    else:
        values = torch.take(tensor, torch.arange(0, size, size // SAMPLED | 1, device=tensor.device))
    return values.view(_INTEGERS[values.element_size()])


def _digest(bits: Int[Tensor, " n"]) -> int:
    """In wrapping whole numbers; each value is multiplied with its place, so that order counts."""
    return int((torch.arange(1, 2 * len(bits), 2, device=bits.device) * bits).sum())
