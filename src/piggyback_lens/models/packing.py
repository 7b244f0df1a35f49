"""One pass without padding: the prefix once, then the rest of every row, one behind the other.

A mask keeps the rows apart and lets each of them look at the prefix; positions count from the start of every
row. Attention is causal, so the prefix sees no row, and the numbers are those of rows that are run alone.

Below float32, and on other devices than the CPU, the prefix has a pass of its own, as its reference has in
`TReFT`: rounding depends on how many tokens run together, and in bfloat16 it would be a drift of 1e-4 in a model
that is not trained yet (SmolLM2-135M).
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from piggyback_lens.conversations.batch import Batch
from piggyback_lens.models.backends import config_of, core_of, floating_dtype, has_modules
from piggyback_lens.models.views import inner_model

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings that cut attention short; rows that are longer are not packed, as one mask then does not suit all layers."""
ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that read other tokens by attention alone: convolutions and recurrences would mix the rows."""
ATTENTION_COST = 1.2
"""What a multiplication of masked attention costs in those of a linear layer: measured 0.7 to 1.5 on two cores."""
LONGEST = {"sdpa": 4096, "eager": 512}
"""Tokens of a packed row, by kind of attention: the mask, and with eager the scores, grow with their square."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Which token of which row lies where in the packed row: `n_prefix` of row 0, then those of every row."""

    rows: Int[Tensor, " token"]
    columns: Int[Tensor, " token"]
    places: Int[Tensor, "row pos"]  # of every token in the packed row; the prefix is everybody's, padding is at 0
    n_prefix: int
    prefix_alone: bool = False  # in a pass before that of the rest

    @classmethod
    def place(cls, attention_mask: Int[Tensor, "row pos"], n_prefix: int, prefix_alone: bool = False) -> "Packing":
        """The packing of right-padded rows whose first `n_prefix` tokens are the same."""
        once = attention_mask != 0
        once[1:, :n_prefix] = False
        rows, columns = once.nonzero(as_tuple=True)
        places = torch.zeros_like(attention_mask)
        places[rows, columns] = torch.arange(len(rows), device=rows.device)
        places[:, :n_prefix] = places[0, :n_prefix].clone()
        return cls(rows, columns, places, n_prefix, prefix_alone and n_prefix > 0)

    def mask(self) -> Bool[Tensor, "1 1 token token"]:
        """True where a token (third axis) looks at another."""
        same = self.rows[:, None] == self.rows
        seen = same | (self.columns < self.n_prefix)
        return (seen & (self.columns <= self.columns[:, None]))[None, None]

    def pack(self, values: Tensor) -> list[Tensor]:
        """[row, pos, ...] -> [1, token, ...] of each pass."""
        packed = values[self.rows, self.columns][None]
        return [packed[:, : self.n_prefix], packed[:, self.n_prefix :]] if self.prefix_alone else [packed]

    def unpack(self, packed: Float[Tensor, "1 kv_head token head_dim"]) -> Float[Tensor, "row kv_head pos head_dim"]:
        """The tokens back in their rows; padding repeats the first token."""
        n_rows = len(self.places)
        found = packed[0][:, self.places.flatten()]  # its gradient is deterministic on CUDA, index_select's is not
        return rearrange(found, "kv (row pos) d -> row kv pos d", row=n_rows)


@dataclass(frozen=True, eq=False)
class UnpackedLayers(Sequence[Tensor]):
    """Keys or values of a packed pass, layer by layer in their rows, made when they are asked for."""

    packing: Packing
    layers: tuple[Float[Tensor, "1 kv_head token head_dim"], ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.packing.unpack, self.layers)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return UnpackedLayers(self.packing, self.layers[index])
        return self.packing.unpack(self.layers[index])


def packing_of(model: Any, batch: Batch, n_prefix: int) -> Packing | None:
    """How right-padded rows that share `n_prefix` tokens are packed; None where they cannot be, or would be slower.

    It needs a model that takes a mask and positions as they are given (not flash attention, not ALiBi), rows within
    every attention window, and no more tokens than `LONGEST`. It pays where padding and shared tokens cost more than
    attention across rows.
    """
    if not _takes_masks(model, batch.ids.shape[1]):
        return None
    n_rows, width = batch.ids.shape
    rest = width - n_prefix
    tokens = int(batch.attention_mask.sum()) - (n_rows - 1) * n_prefix
    d_model = int(config_of(model).hidden_size)
    packed = tokens + ATTENTION_COST * tokens**2 / (6 * d_model)  # a block: 12 d² weights, 2 d per pair of tokens
    padded = n_prefix + n_rows * rest * (1 + ATTENTION_COST * width / (6 * d_model))
    if packed >= padded or tokens > LONGEST[config_of(model)._attn_implementation]:
        return None
    return Packing.place(batch.attention_mask, n_prefix, _rounds_coarsely(model, batch.ids.device))


def shortest_window(config: Any) -> int | None:
    """How far back a model's attention looks where that is limited; None where it never is."""
    windows = [getattr(config, name, None) for name in WINDOWS]
    return min((window for window in windows if isinstance(window, int)), default=None)


def _rounds_coarsely(model: Any, device: torch.device) -> bool:
    """Whether it may: an accelerator may turn to TF32 or autocast behind float32 weights."""
    half = torch.finfo(floating_dtype(model)).bits < 32
    return half or device.type != "cpu" or torch.is_autocast_enabled(device.type)


def _takes_masks(model: Any, width: int) -> bool:
    text = config_of(model)
    if not has_modules(model) or getattr(text, "_attn_implementation", None) not in LONGEST:
        return False
    types = getattr(text, "layer_types", None) or getattr(text, "block_types", None) or ()
    if getattr(text, "alibi", False) or not ATTENTION_TYPES.issuperset(types):
        return False
    if getattr(text, "window_size", None) is not None:  # GPT-Neo's windows count places in the packed row
        return False
    if (window := shortest_window(text)) is not None and window < width:
        return False
    return "position_ids" in inspect.signature(inner_model(core_of(model)).forward).parameters
