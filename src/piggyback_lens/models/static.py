"""Decoding in tensors of fixed size: each step is the same work in the same places, for compiled or captured code.

Rows do not leave the batch when they are finished, and no hook may act. Run eagerly it gives the numbers of `forward`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import config_of, core_of, has_modules
from piggyback_lens.models.network import as_read
from piggyback_lens.models.packing import shortest_window
from piggyback_lens.models.plain_views import network_of, plain_view
from piggyback_lens.models.states import KVState, cache_argument


class StaticDecoding:
    """The rest of a generation from a state, step by step.

    Attributes:
        size: columns of the cache: those of the state, and one for each step.
    """

    def __init__(self, model: Any, state: KVState, steps: int) -> None:
        """Copy a state into tensors of fixed size.

        Args:
            model: a bridge without hooks, or a transformers model.
            state: right-aligned; it is not changed.
            steps: how many tokens may follow.

        Raises:
            LensError: a HookedTransformer, hooks on the model, or an attention window shorter than the rows.
        """
        from transformers.cache_utils import Cache, StaticLayer

        if not has_modules(model):
            raise LensError("a HookedTransformer has no static cache: use backend='bridge', or static_cache=False")
        self.network = network_of(model)
        if plain_view(model) is not None and self.network is core_of(model):
            raise LensError("hooks act on the model, and a static cache is decoded without any: use static_cache=False")
        rows, past = state.mask.shape
        self.size = past + steps
        if (window := shortest_window(config_of(model))) is not None and window < self.size:
            raise LensError(
                f"this model's layers look back {window} tokens and the rows have up to {self.size}: one mask does not "
                "suit all its layers, use static_cache=False"
            )
        layers = []
        for own in state.cache.layers:
            layer = StaticLayer(self.size)
            layer.lazy_initialization(own.keys, own.values)
            layer.update(own.keys, own.values)
            layers.append(layer)
        self._cache = Cache(layers=layers)
        self._seen = torch.zeros((rows, 1, 1, self.size), dtype=torch.bool, device=state.mask.device)
        self._seen[:, 0, 0, :past] = state.mask.bool()
        self._positions = state.mask.sum(dim=1, keepdim=True)
        self._column = torch.tensor([past], device=state.mask.device)

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Logits after one more token in every row."""
        self._seen.index_fill_(3, self._column, True)
        logits: Tensor = self.network(
            input_ids=ids[:, None],
            attention_mask=as_read(self.network, self._seen),
            position_ids=self._positions,
            **cache_argument(self.network, self._cache),
        ).logits
        self._positions.add_(1)
        self._column.add_(1)
        return logits[:, 0]
