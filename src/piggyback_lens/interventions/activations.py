"""Activations kept from a run, by site, layer and span: what patches and directions are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.words import Site


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of one span of a batch.

    Attributes:
        span: name of the span they were kept from.
        tokens: indices within the span, or None for the whole span.
        values: per (site, layer) a tensor [row, token, ...feature]; rows with fewer tokens are padded
            with zeros at the right.
        lengths: tokens per row.
    """

    span: str
    tokens: tuple[int, ...] | None
    values: Mapping[tuple[Site, int], Float[Tensor, "row token *feature"]]
    lengths: tuple[int, ...]

    def __getitem__(self, key: tuple[Site, int]) -> Float[Tensor, "row token *feature"]:
        """The tensor of a (site, layer).

        Raises:
            LensError: it was not kept.
        """
        if key not in self.values:
            raise LensError(f"{key[0]} of layer {key[1]} was not kept: there are {self.sites} of layers {self.layers}")
        return self.values[key]

    def __repr__(self) -> str:
        """Short: what is held, not the tensors."""
        return f"Activations({', '.join(self.sites)} of {self.span}, layers {self.layers}, {len(self.lengths)} rows)"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that are held, in the order in which they were first seen."""
        return tuple(dict.fromkeys(site for site, _ in self.values))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are held, in ascending order."""
        return tuple(sorted({layer for _, layer in self.values}))

    @property
    def nbytes(self) -> int:
        """Memory held by the tensors, in bytes."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    def flat(self, site: Site, layer: int) -> Float[Tensor, "n *feature"]:
        """All real tokens of all rows, padding left out."""
        value = self[site, layer]
        return torch.cat([value[row, :length] for row, length in enumerate(self.lengths)])

    def mean(self, site: Site, layer: int) -> Float[Tensor, "*feature"]:
        """Mean over all real tokens of all rows."""
        return self.flat(site, layer).float().mean(dim=0)

    def row(self, index: int) -> "Activations":
        """One row, as a batch of one (a donor of one row is used for every row of the recipient)."""
        length = self.lengths[index]
        kept = {key: value[index : index + 1, :length] for key, value in self.values.items()}
        return replace(self, values=kept, lengths=(length,))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Activations":
        """On another device or in another dtype."""
        moved = {key: value.to(device=device, dtype=dtype) for key, value in self.values.items()}
        return replace(self, values=moved)


def assemble(
    span: str,
    tokens: tuple[int, ...] | None,
    chunks: Mapping[tuple[Site, int], Sequence[tuple[Tensor, Tensor, Tensor]]],
    n_rows: int,
) -> Activations:
    """Activations from the (rows, slots, values) chunks that successive passes left.

    Raises:
        LensError: a token of the span was in none of the passes; zeros must not stand for it.
    """
    lengths = [0] * n_rows
    for parts in chunks.values():
        for rows, slots, _ in parts:
            for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
                lengths[row] = max(lengths[row], slot + 1)
    values: dict[tuple[Site, int], Tensor] = {}
    for key, parts in chunks.items():
        first = parts[0][2]
        value = first.new_zeros((n_rows, max(lengths), *first.shape[1:]))
        seen = torch.zeros((n_rows, max(lengths)), dtype=torch.bool)
        for rows, slots, kept in parts:
            value = value.index_put((rows.to(kept.device), slots.to(kept.device)), kept)
            seen[rows.cpu(), slots.cpu()] = True
        _require_whole(seen, lengths, span, key)
        values[key] = value
    return Activations(span, tokens, values, tuple(lengths))


def _require_whole(seen: Bool[Tensor, "row token"], lengths: Sequence[int], span: str, key: tuple[Site, int]) -> None:
    for row, length in enumerate(lengths):
        missing = (~seen[row, :length]).nonzero().flatten().tolist()
        if missing:
            raise LensError(
                f"token {missing[0]} of span {span!r} in row {row} was not in the passes that kept {key[0]} of layer "
                f"{key[1]}: keep a span that is run whole (span='response' for generated tokens)"
            )
