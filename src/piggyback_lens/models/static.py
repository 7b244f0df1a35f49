"""Decoding in tensors of fixed size: each step is the same work in the same places, so a GPU can replay it.

There a step is captured as a CUDA graph, since launching its kernels from Python takes far longer than they do. It is
captured for halves of the batch too, and when so many answers are finished, the others go on in the half. No hook may
act. Run eagerly, as on a CPU, it gives the numbers of `forward`.
"""

import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import (
    HookedModel,
    block_devices,
    config_of,
    core_of,
    device_bytes,
    device_of,
    dtype_of,
    has_modules,
    shape_of,
)
from piggyback_lens.models.network import as_read
from piggyback_lens.models.packing import LONGEST, shortest_window
from piggyback_lens.models.plain_views import attention_of, network_of, plain_view
from piggyback_lens.models.states import KVState, cache_argument
from piggyback_lens.models.views import is_offloaded

_KEPT: "weakref.WeakKeyDictionary[Any, StaticDecoding]" = weakref.WeakKeyDictionary()
_REFUSED: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Networks of which a step could not be captured."""
COLUMNS = 64
"""The size of a cache is a multiple of this, so that batches of similar length share one."""
FEWEST = 32
"""Rows below which a step is no faster: it reads all weights."""
KEPT_PART = 0.05
"""A cache is kept for the next call where it takes no more of the device's memory than this."""


def static_refusal(model: Any, longest: int) -> str | None:
    """Why a model cannot be decoded in tensors of fixed size now, for rows of up to `longest` tokens; None if it can.

    Args:
        model: a hooked model.
        longest: tokens of a prompt and its answer.
    """
    return next(_refusals(model, longest), None)


def _refusals(model: Any, longest: int) -> Iterator[str]:
    if not has_modules(model):
        yield "a HookedTransformer has no static cache: use backend='bridge', or static_cache=False"
    elif plain_view(model) is None:
        yield (
            "this bridge was booted elsewhere, and a captured step would not run hooks that come later: use hook_model "
            "or ModelPair.load, or static_cache=False"
        )
    elif (network := network_of(model)) is core_of(model):
        yield "hooks act on the model, and a static cache is decoded without any: use static_cache=False"
    elif network in _REFUSED:
        yield "a step of this model could not be captured: use static_cache=False"
    config = config_of(model)
    if len(set(block_devices(model))) > 1 or is_offloaded(core_of(model)):
        yield "a device map has spread the weights, and no step can be replayed across devices: use static_cache=False"
    if torch.is_autocast_enabled(device_of(model).type):
        yield "under autocast keys and values differ in dtype, and a step keeps no casts: use static_cache=False"
    if (attention := attention_of(model)) not in LONGEST:
        yield f"{attention} attention does not take this mask: use static_cache=False"
    if (window := shortest_window(config)) is not None and window < longest:
        yield (
            f"this model's layers look back {window} tokens and the rows have up to {longest}: one mask does not "
            "suit all its layers, use static_cache=False"
        )


def static_decoding(model: Any, rows: int, longest: int) -> "StaticDecoding":
    """As `StaticDecoding(...)`; one that was captured for this model before is used again where it fits.

    Capturing costs as much as three steps, which matters in loops of short calls. A graph holds the addresses of the
    weights: what was written into them is seen, and where they were replaced it is captured anew.
    """
    kept = _KEPT.get(model)
    if kept is not None and static_refusal(model, longest) is None and kept.serves(model, rows, longest):
        return kept
    _KEPT.pop(model, None)  # its memory first
    return StaticDecoding(model, rows, longest)


def keep_for_the_next(model: Any, decoding: "StaticDecoding") -> None:
    """Let `static_decoding` use it again, where it was captured and takes little of the device's memory."""
    if decoding.captured and decoding.n_bytes <= KEPT_PART * device_bytes(decoding.device):
        _KEPT[model] = decoding


def static_sizes(rows: int) -> list[int]:
    """How many rows the steps of a batch may have: halves, down to where fewer are no faster."""
    sizes = [rows]
    while sizes[-1] // 2 >= FEWEST:
        sizes.append(sizes[-1] // 2)
    return sizes


def captures(device: torch.device) -> bool:
    """Whether steps can be captured on a device."""
    return device.type == "cuda"


@dataclass
class _Step:
    """A step of so many rows: its part of the cache, and what was captured."""

    cache: Any
    graph: Any = None
    logits: Tensor | None = None


class StaticDecoding:
    """Decoding step by step in a cache of fixed size, for one batch after the other.

    Attributes:
        sizes: rows of a step, halving: a batch takes the smallest that has room for it.
        columns: of the cache.
        network: what the passes go through.
        device: where the passes are.
        n_bytes: of the keys and values.
    """

    @torch.inference_mode(False)  # what is made in that mode cannot be written into outside it
    def __init__(self, model: HookedModel, rows: int, longest: int) -> None:
        """Make room, without keys and values.

        Args:
            model: a bridge without hooks.
            rows: the most rows of a batch.
            longest: the most tokens of a row, its answer included.

        Raises:
            LensError: a HookedTransformer, hooks on the model, or an attention window shorter than the rows.
        """
        if (refusal := static_refusal(model, longest)) is not None:
            raise LensError(refusal)
        self.network, self.columns = network_of(model), -(-longest // COLUMNS) * COLUMNS
        self.sizes = static_sizes(rows)
        self.device = device = device_of(model)
        shape = shape_of(model)
        per_token = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * dtype_of(model).itemsize
        self.n_bytes = rows * self.columns * per_token
        self._held = _addresses(self.network)
        self._ids = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._seen = torch.zeros((rows, 1, 1, self.columns), dtype=torch.bool, device=device)
        self._positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._steps: dict[int, _Step] = {}
        self._used, self._size, self._past = 0, rows, 0

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from CUDA graphs."""
        return bool(self._steps) and all(step.graph is not None for step in self._steps.values())

    def serves(self, model: HookedModel, rows: int, longest: int) -> bool:
        """Whether it is of this model as it is now, and has room for such a batch but not far too many rows."""
        fits = rows <= self.sizes[0] and self.fitting(rows) <= 4 * rows and longest <= self.columns
        return fits and self.network is network_of(model) and self._held == _addresses(self.network)

    def fitting(self, rows: int) -> int:
        """Rows of the step that so many of a batch would go through."""
        return min(size for size in self.sizes if size >= rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def start(self, state: KVState) -> bool:
        """Begin a batch: the keys and values of a state, which is right-aligned and is not changed.

        False where a step should have been captured and could not be.
        """
        used, past = state.mask.shape
        assert used <= self.sizes[0], "the batch has more rows than the cache"
        if not self._steps and not self._make_room(state):
            return False
        self._used, self._size, self._past = used, self.fitting(used), past
        for layer, own in zip(self._steps[self.sizes[0]].cache.layers, state.cache.layers, strict=True):
            for kept, new in ((layer.keys, own.keys), (layer.values, own.values)):
                kept.zero_()  # what an earlier batch left is masked, but 0 times NaN is NaN
                kept[:used, :, :past] = new
            layer.cumulative_length.fill_(past)
        self._seen.zero_()
        self._seen[:used, 0, 0, :past] = state.mask.bool()
        self._positions.zero_()
        self._positions[:used] = state.mask.sum(dim=1, keepdim=True)
        self._column.fill_(past)
        return True

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> bool:
        """Go on with some of the rows only, where so few go through a smaller step; whether they did."""
        if self.fitting(len(rows)) == self._size:
            return False
        kept, n = torch.tensor(rows, device=self.device), len(rows)
        for layer in self._steps[self.sizes[0]].cache.layers:
            for side in (layer.keys, layer.values):
                side[:n, :, : self._past] = side[kept, :, : self._past]
        self._seen[:n], self._positions[:n] = self._seen[kept], self._positions[kept]
        self._used, self._size = n, self.fitting(n)
        return True

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Logits after one more token in every row; the next step writes into the same tensor."""
        self._ids[: self._used, 0] = ids
        step = self._steps[self._size]
        if step.graph is None:
            step.logits = self._pass(self._size)
        else:
            step.graph.replay()
        self._past += 1
        assert step.logits is not None
        return step.logits[: self._used]

    def _pass(self, rows: int) -> Float[Tensor, "row vocab"]:
        self._seen.index_fill_(3, self._column, True)
        logits: Tensor = self.network(
            input_ids=self._ids[:rows],
            attention_mask=as_read(self.network, self._seen[:rows]),
            position_ids=self._positions[:rows],
            **cache_argument(self.network, self._steps[rows].cache),
        ).logits
        self._positions.add_(1)
        self._column.add_(1)
        return logits[:, 0]

    def _make_room(self, state: KVState) -> bool:
        """The cache for the most rows; a smaller step works in its first rows. Whether steps can run now."""
        from transformers.cache_utils import Cache, StaticLayer

        layers = []
        for own in state.cache.layers:
            layer = StaticLayer(self.columns)
            like = [x.new_empty((self.sizes[0], x.shape[1], 1, x.shape[3])) for x in (own.keys, own.values)]
            layer.lazy_initialization(*like)
            layers.append(layer)
        for size in self.sizes:
            self._steps[size] = _Step(Cache(layers=[_first_rows(layer, size) for layer in layers]))
        if not captures(self.device):
            return True
        try:
            with torch.cuda.device(self.device):
                self._capture()
        except RuntimeError as error:
            warnings.warn(f"decoding could not be captured ({error}) and runs step by step", stacklevel=2)
            _REFUSED.add(self.network)
            self._steps.clear()
            return False
        return True

    def _capture(self) -> None:
        """Record a step of every size. What the passes here write is overwritten when a batch begins."""
        side, pool = torch.cuda.Stream(), None  # type: ignore[no-untyped-call]
        for size, step in self._steps.items():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries choose their kernels and take their memory now
                    self._pass(size)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side):
                step.logits = self._pass(size)
            step.graph = graph
            pool = graph.pool()  # they are never replayed at once


def _first_rows(layer: Any, rows: int) -> Any:
    """A layer of a cache that works in the first rows of another, and counts with it."""
    found = copy.copy(layer)
    found.keys, found.values, found.batch_size = layer.keys[:rows], layer.values[:rows], rows
    return found


def _addresses(network: Any) -> list[int]:
    """Where the weights lie."""
    return [x.data_ptr() for x in (*network.parameters(), *network.buffers())]
