"""Many variants of a batch in one pass: what they share below a layer is computed once, and forked there.

An intervention whose lowest layer is l leaves everything beneath untouched, so its row need not exist there.
A pass starts with the rows that differ from the first layer on; at the input of every layer the rows born
there are appended as copies of their parents. A sweep over all layers then costs half of one pass per layer,
and reads the weights once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from piggyback_lens.models.backends import HookedModel, blocks_of


@dataclass(frozen=True)
class Lineage:
    """The rows of a growing pass.

    Attributes:
        born: the layer at whose input each row appears, ascending; 0 for the rows a pass starts with.
        parents: the earlier row that each row copies (itself for those born at 0).
    """

    born: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        assert list(self.born) == sorted(self.born)
        assert all(parent < row for row, parent in enumerate(self.parents) if self.born[row])

    def alive(self, layer: int) -> int:
        """How many rows a layer has."""
        return sum(born <= layer for born in self.born)

    @classmethod
    def of(cls, roots: int, firsts: Sequence[int], parents: Sequence[int]) -> "tuple[Lineage, list[int]]":
        """Order rows by their layer: `roots` rows present from the start, then variants of them.

        Args:
            roots: how many rows are never changed.
            firsts: the first changed layer of each variant.
            parents: the root that each variant copies.

        Returns:
            The lineage, and for each row of it its number in the order roots, variants as given.
        """
        born = [0] * roots + list(firsts)
        copied = [*range(roots), *parents]
        order = sorted(range(len(born)), key=lambda row: born[row])  # stable: roots come first
        lineage = cls(
            tuple(born[row] for row in order),
            tuple(copied[row] if born[row] else place for place, row in enumerate(order)),
        )
        return lineage, order


@contextmanager
def forking(model: HookedModel, lineage: Lineage) -> Iterator[None]:
    """While inside, a pass over the rows born at layer 0 grows to all rows of the lineage.

    Keys and values that the pass starts from need `lineage.alive(layer)` rows at each layer. Hooks of
    TransformerLens see the rows alive at their layer. Differentiable.
    """
    blocks = blocks_of(model)
    handles = []
    for layer in range(min(set(lineage.born) - {0}, default=len(blocks)), len(blocks)):
        hook = _grow(lineage, layer)
        handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _grow(lineage: Lineage, layer: int) -> Any:
    """What a block gets: the residual stream with the rows born here, and masks and rotary tables to match."""
    begin, alive = lineage.alive(0), lineage.alive(layer)
    ancestors: list[int] = []
    for row, (born, parent) in enumerate(zip(lineage.born[:alive], lineage.parents, strict=False)):
        ancestors.append(ancestors[parent] if born else row)
    copied = [*range(lineage.alive(layer - 1)), *lineage.parents[lineage.alive(layer - 1) : alive]]

    @cache
    def index(of_residual: bool, device: torch.device) -> Tensor:
        return torch.tensor(copied if of_residual else ancestors, device=device)

    def matched(value: Any) -> Any:
        # Every block gets the tables of the rows that the pass began with; what all rows share has 1 row.
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == begin:
            return value[index(False, value.device)]
        return tuple(map(matched, value)) if isinstance(value, tuple) else value

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        residual, *others = args
        grown = residual[index(True, residual.device)] if alive > len(residual) else residual
        return (grown, *map(matched, others)), {name: matched(value) for name, value in kwargs.items()}

    return hook
