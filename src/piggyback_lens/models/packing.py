"""How a batch of rows that share a prefix goes through the model: packed into one row, prefix first, or as it is.

Packed: the prefix once, then the rest of every row, one behind the other, without padding. A mask keeps the rows apart
and lets each of them look at the prefix; positions count from the start of every row. Attention is causal, so the
prefix sees no row, and the numbers are those of rows that are run alone.

The way is chosen by what it costs: launching a pass, its tokens, and the pairs of tokens that look at each other. On a
GPU no pass is shorter than launching its kernels from Python, so a second one may cost more than the tokens that it
saves; on a CPU weights are read however few the tokens are. `train` measures the costs once (see `costs`) and keeps to
them in a run that is resumed, since the way decides the last bits; elsewhere they are assumed.
"""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from piggyback_lens.conversations.batch import Batch
from piggyback_lens.models.backends import config_of, core_of, device_of, floating_dtype, has_modules, width_of
from piggyback_lens.models.plain_views import attention_of
from piggyback_lens.models.views import inner_model

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings that cut attention short; rows that are longer are not packed, as one mask then does not suit all layers."""
ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that read other tokens by attention alone: convolutions and recurrences would mix the rows."""
ATTENTION_COST = 1.2
"""What a multiplication of masked attention costs in those of a linear layer, where nothing was measured."""
LAUNCH_S, FLOPS = 2.5e-3, 3e14
"""Of a GPU, likewise: seconds to launch one block with adapters, and operations per second (an H200, 8B, bfloat16)."""
MULTIPLE = 64
"""Where rounding is coarse a packed row is filled up to a multiple of this: passes of one shape round alike."""
LONGEST = {"sdpa": 4096, "eager": 512}
"""Tokens of a packed row, by kind of attention: the mask, and with eager the scores, grow with their square."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one decoder block, forwards and backwards."""

    launch: float  # whatever it computes
    token: float
    pair: float  # of tokens, one of which looks at the other

    def of(self, tokens: int, seen: int) -> float:
        """A pass of so many tokens, each of which looks at so many."""
        return max(self.launch, tokens * (self.token + seen * self.pair))


_USED: "weakref.WeakKeyDictionary[Any, Costs]" = weakref.WeakKeyDictionary()


@contextmanager
def costing(model: Any, costs: Costs) -> Iterator[None]:
    """Inside, ways through this model are chosen by these costs."""
    core = core_of(model)
    before = _USED.get(core)
    _USED[core] = costs
    try:
        yield
    finally:
        del _USED[core]
        if before is not None:
            _USED[core] = before


def costs_of(model: Any) -> Costs:
    """The costs by which ways through a model are chosen now: `costing`'s, else assumed ones."""
    return _USED.get(core_of(model)) or assumed(device_of(model), width_of(model))


def assumed(device: torch.device, d_model: int) -> Costs:
    """Costs without a measurement. A block has 12 d² weights, and 2 d multiplications for a pair of tokens."""
    token = 24 * d_model**2 / FLOPS
    pair = token * ATTENTION_COST / (6 * d_model)
    return Costs(0.0 if device.type == "cpu" else LAUNCH_S, token, pair)


@dataclass(frozen=True, eq=False)
class Packing:
    """Which token of which row lies where in the packed row: `n_prefix` of row 0, then those of every row."""

    rows: Int[Tensor, " token"]  # -1 where nothing is
    columns: Int[Tensor, " token"]
    places: Int[Tensor, "row pos"]  # of every token in the packed row; the prefix is everybody's, padding is at 0
    n_prefix: int
    prefix_alone: bool = False  # its keys and values are given

    @classmethod
    def place(cls, attention_mask: Int[Tensor, "row pos"], n_prefix: int, multiple: int = 1) -> "Packing":
        """The packing of right-padded rows whose first `n_prefix` tokens are the same.

        What fills up to a multiple is in no row (-1): nobody looks at it.
        """
        once = attention_mask != 0
        once[1:, :n_prefix] = False
        rows, columns = once.nonzero(as_tuple=True)
        places = torch.zeros_like(attention_mask)
        places[rows, columns] = torch.arange(len(rows), device=rows.device)
        places[:, :n_prefix] = places[0, :n_prefix].clone()
        fill = -len(rows) % multiple
        return cls(functional.pad(rows, (0, fill), value=-1), functional.pad(columns, (0, fill)), places, n_prefix)

    def mask(self) -> Bool[Tensor, "1 1 token token"]:
        """True where a token (third axis) looks at another."""
        same = self.rows[:, None] == self.rows
        seen = same | ((self.columns < self.n_prefix) & (self.rows == 0))
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


@dataclass(frozen=True, eq=False)
class Plan:
    """The passes of a batch: `alone` tokens once before the others, and the rows packed, or as they are."""

    packing: Packing | None = None
    alone: int = 0

    @property
    def name(self) -> str:
        """In words, for the run card."""
        rest = "whole rows" if self.packing is None else "packed"
        return f"prefix apart, {rest}" if self.alone else rest


def plan_of(model: Any, batch: Batch, n_prefix: int, *, packs: bool = True) -> Plan:
    """The cheapest way for right-padded rows that share `n_prefix` tokens.

    Packing needs a model that takes a mask and positions as they are given (not flash attention, not ALiBi), rows
    within every attention window, and no more tokens than `LONGEST`.

    Args:
        model: hooked, transformers or PEFT.
        batch: the rows.
        n_prefix: tokens that all of them share.
        packs: False where something needs the rows apart.
    """
    n_rows, width = batch.ids.shape
    rest, costs = width - n_prefix, costs_of(model)
    ways = [(costs.of(n_rows * width, width), n_rows * width, Plan())]
    if n_prefix and n_rows > 1:
        first = costs.of(n_prefix, n_prefix)
        ways.append((first + costs.of(n_rows * rest, width), n_prefix + n_rows * rest, Plan(alone=n_prefix)))
    if packs and takes_masks(model, width):
        tokens = int(batch.attention_mask.sum()) - (n_rows - 1) * n_prefix
        if tokens <= LONGEST[str(attention_of(model))]:
            multiple = MULTIPLE if rounds_coarsely(model, batch.ids.device) else 1
            packing = Packing.place(batch.attention_mask, n_prefix, multiple)
            ways.append((costs.of(tokens, tokens), tokens, Plan(packing)))
    return min(ways, key=lambda way: way[:2])[2]


def shortest_window(config: Any) -> int | None:
    """How far back a model's attention looks where that is limited; None where it never is."""
    windows = [getattr(config, name, None) for name in WINDOWS]
    return min((window for window in windows if isinstance(window, int)), default=None)


def rounds_coarsely(model: Any, device: torch.device) -> bool:
    """Whether passes of another shape may differ visibly: accelerators may take TF32 or autocast in float32 too."""
    half = torch.finfo(floating_dtype(model)).bits < 32
    return half or device.type != "cpu" or torch.is_autocast_enabled(device.type)


def takes_masks(model: Any, width: int) -> bool:
    """Whether rows of a width may be packed: the model takes a mask and positions as they are given."""
    text = config_of(model)
    if not has_modules(model) or attention_of(model) not in LONGEST:
        return False
    types = getattr(text, "layer_types", None) or getattr(text, "block_types", None) or ()
    if getattr(text, "alibi", False) or not ATTENTION_TYPES.issuperset(types):
        return False
    if getattr(text, "window_size", None) is not None:  # GPT-Neo's windows count places in the packed row
        return False
    if (window := shortest_window(text)) is not None and window < width:
        return False
    return "position_ids" in inspect.signature(inner_model(core_of(model)).forward).parameters
