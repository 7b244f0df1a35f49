"""Decoding in tensors of fixed size: each step is the same work in the same places, so a GPU can replay it.

There the first step is captured as a CUDA graph, since launching the kernels of a step from Python takes far longer
than they do. Rows do not leave the batch when they are finished, and no hook may act. Run eagerly (on a CPU, or where
a layer cannot be captured) it gives the numbers of `forward`.
"""

import warnings
import weakref
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import block_devices, config_of, core_of, device_of, has_modules
from piggyback_lens.models.network import as_read
from piggyback_lens.models.packing import shortest_window
from piggyback_lens.models.plain_views import network_of, plain_view
from piggyback_lens.models.states import KVState, cache_argument
from piggyback_lens.models.views import is_offloaded

_KEPT: "weakref.WeakKeyDictionary[Any, StaticDecoding]" = weakref.WeakKeyDictionary()
COLUMNS = 64
"""The size of a cache is a multiple of this, so that batches of similar length share one."""


def static_refusal(model: Any, longest: int) -> str | None:
    """Why a model cannot be decoded in tensors of fixed size now, for rows of up to `longest` tokens; None if it can.

    Args:
        model: a hooked model.
        longest: tokens of a prompt and its answer.
    """
    if not has_modules(model):
        return "a HookedTransformer has no static cache: use backend='bridge', or static_cache=False"
    if plain_view(model) is not None and network_of(model) is core_of(model):
        return "hooks act on the model, and a static cache is decoded without any: use static_cache=False"
    if len(set(block_devices(model))) > 1 or is_offloaded(core_of(model)):
        return "a device map has spread the weights, and no step can be replayed across devices: use static_cache=False"
    if (window := shortest_window(config_of(model))) is not None and window < longest:
        return (
            f"this model's layers look back {window} tokens and the rows have up to {longest}: one mask does not "
            "suit all its layers, use static_cache=False"
        )
    return None


def static_decoding(model: Any, rows: int, longest: int) -> "StaticDecoding":
    """As `StaticDecoding(...)`; one that was captured for this model before is used again where it fits.

    Capturing costs as much as three steps, which matters in loops of short calls. A graph holds the addresses of the
    weights: what was written into them is seen, and where they were replaced it is captured anew.
    """
    kept = _KEPT.get(model)
    if kept is not None and static_refusal(model, longest) is None and kept.serves(model, rows, longest):
        return kept
    _KEPT.pop(model, None)  # its memory first
    made = StaticDecoding(model, rows, longest)
    if made.device.type == "cuda":
        _KEPT[model] = made
    return made


class StaticDecoding:
    """Decoding step by step in a cache of fixed size, for one batch after the other.

    Attributes:
        rows: of the cache; a batch may have fewer.
        size: columns of the cache.
        network: what the passes go through.
        device: where the passes are.
        captured: whether steps are replayed from a CUDA graph.
    """

    def __init__(self, model: Any, rows: int, longest: int) -> None:
        """Make room, without keys and values.

        Args:
            model: a bridge without hooks, or a transformers model.
            rows: the most rows of a batch.
            longest: the most tokens of a row, its answer included.

        Raises:
            LensError: a HookedTransformer, hooks on the model, or an attention window shorter than the rows.
        """
        if (refusal := static_refusal(model, longest)) is not None:
            raise LensError(refusal)
        self.network, self.rows, self.size = network_of(model), rows, -(-longest // COLUMNS) * COLUMNS
        self.device = device = device_of(model)
        self._held = _addresses(self.network)
        self._ids = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._seen = torch.zeros((rows, 1, 1, self.size), dtype=torch.bool, device=device)
        self._positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._cache: Any = None
        self._graph: Any = None
        self._logits: Tensor | None = None
        self._used = 0

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self._graph is not None

    def serves(self, model: Any, rows: int, longest: int) -> bool:
        """Whether it is of this model as it is now, and has room for such a batch but not far too many rows."""
        fits = rows <= self.rows <= 4 * rows and longest <= self.size
        return fits and self.network is network_of(model) and self._held == _addresses(self.network)

    @torch.no_grad()
    def start(self, state: KVState) -> None:
        """Begin a batch: the keys and values of a state, which is right-aligned and is not changed."""
        used, past = state.mask.shape
        assert used <= self.rows, "the batch has more rows than the cache"
        if self._cache is None:
            self._make_room(state)
        for layer, own in zip(self._cache.layers, state.cache.layers, strict=True):
            layer.keys[:used, :, :past], layer.values[:used, :, :past] = own.keys, own.values
            layer.cumulative_length.fill_(past)
        self._seen.zero_()
        self._seen[:used, 0, 0, :past] = state.mask.bool()
        self._positions.zero_()
        self._positions[:used] = state.mask.sum(dim=1, keepdim=True)
        self._column.fill_(past)
        self._used = used

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Logits after one more token in every row; the next step writes into the same tensor."""
        self._ids[: self._used, 0] = ids
        if self._graph is None:
            self._logits = self._pass()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits[: self._used]

    def _pass(self) -> Float[Tensor, "row vocab"]:
        self._seen.index_fill_(3, self._column, True)
        logits: Tensor = self.network(
            input_ids=self._ids,
            attention_mask=as_read(self.network, self._seen),
            position_ids=self._positions,
            **cache_argument(self.network, self._cache),
        ).logits
        self._positions.add_(1)
        self._column.add_(1)
        return logits[:, 0]

    def _make_room(self, state: KVState) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        layers = []
        for own in state.cache.layers:
            layer = StaticLayer(self.size)
            like = [x.new_empty((self.rows, x.shape[1], 1, x.shape[3])) for x in (own.keys, own.values)]
            layer.lazy_initialization(*like)
            layers.append(layer)
        self._cache = Cache(layers=layers)
        if self._ids.device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        """Record one step. What the passes here write is overwritten when a batch begins."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose their kernels and take their memory now
                self._pass()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits = self._pass()
        except RuntimeError as error:
            warnings.warn(f"decoding could not be captured ({error}) and runs step by step", stacklevel=2)
            return
        self._graph, self._logits = graph, logits


def _addresses(network: Any) -> list[int]:
    """Where the weights lie."""
    return [x.data_ptr() for x in (*network.parameters(), *network.buffers())]
