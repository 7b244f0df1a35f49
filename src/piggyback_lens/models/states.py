"""Keys and values that a pass starts from and leaves behind, in the caches of transformers and of TransformerLens."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import block_devices, config_of, device_of, has_modules, n_layers_of
from piggyback_lens.models.views import inner_model


@dataclass
class KVState:
    """Keys and values of the tokens seen so far, with the mask that says which of them are real.

    The tensors are held in a cache of transformers, or of TransformerLens for a HookedTransformer; `map` lets row
    selection and rolling be written once for both.
    """

    cache: Any
    mask: Int[Tensor, "batch past"]

    @property
    def rotated(self) -> bool:
        """Whether it is a cache of transformers, with keys after the rotary embedding."""
        return hasattr(self.cache, "layers")

    @property
    def length(self) -> int:
        """Columns seen so far, padding included."""
        return int(self.mask.shape[1])

    def map(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Replace every key and value tensor by `change(tensor, position_dim)`; batch is dim 0."""
        if self.rotated:
            for layer in self.cache.layers:
                layer.keys, layer.values = change(layer.keys, 2), change(layer.values, 2)
        else:
            for entry in self.cache.entries:
                entry.past_keys, entry.past_values = change(entry.past_keys, 1), change(entry.past_values, 1)
            self.cache.previous_attention_mask = self.mask

    def select_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these rows."""
        self.mask = self.mask[rows]
        self.map(lambda tensor, _: tensor[rows.to(tensor.device)])

    def branched(self, rows: Sequence[Int[Tensor, " _"]], mask: Int[Tensor, "row past"], begin: int) -> "KVState":
        """A new state of chosen rows, layer by layer, with their padding moved to the left as `right_align` does.

        Args:
            rows: which rows of this state each layer of the new one has.
            mask: of all rows of this state.
            begin: how many rows the new state's pass starts with.
        """
        source = _right_aligned(mask)
        aligned = mask.gather(1, source)[rows[-1].to(mask.device)][:begin]

        def chosen(tensor: Tensor, pos_dim: int, own: Tensor) -> Tensor:
            return _gathered(tensor[own.to(tensor.device)], source[own.to(source.device)], pos_dim)

        if self.rotated:
            layers = list(zip(self.cache.layers, rows, strict=True))
            keys = [chosen(layer.keys, 2, own) for layer, own in layers]
            return KVState(filled_cache(keys, [chosen(layer.values, 2, own) for layer, own in layers]), aligned)
        entries = [
            replace(e, past_keys=chosen(e.past_keys, 1, own), past_values=chosen(e.past_values, 1, own))
            for e, own in zip(self.cache.entries, rows, strict=True)
        ]
        return KVState(replace(self.cache, entries=entries, previous_attention_mask=aligned), aligned)

    def right_align(self) -> None:
        """Move each row's padding columns from the right end to the left.

        A prefill is padded on the right, so that a sliding window sees true distances; decoding then
        appends at the right, so the padding has to leave from between.
        """
        if bool((self.mask[:, -1:] == 1).all()):
            return
        source = _right_aligned(self.mask)
        self.mask = self.mask.gather(1, source)
        self.map(lambda tensor, pos_dim: _gathered(tensor, source, pos_dim))


def _right_aligned(mask: Int[Tensor, "batch past"]) -> Int[Tensor, "batch past"]:
    """For every column after the alignment, the column it comes from."""
    length = mask.shape[1]
    shift = length - mask.sum(dim=1)
    return (torch.arange(length, device=mask.device)[None, :] - shift[:, None]) % length


def _gathered(tensor: Tensor, source: Int[Tensor, "batch past"], pos_dim: int) -> Tensor:
    length = source.shape[1]
    index = source.to(tensor.device).view(
        len(source), *([1] * (pos_dim - 1)), length, *([1] * (tensor.ndim - pos_dim - 1))
    )
    return tensor.gather(pos_dim, index.expand_as(tensor))


def recurrent_layers(model: Any) -> list[int]:
    """Layers that carry a recurrent state along instead of keys and values (Mamba, gated delta nets)."""
    kinds = getattr(config_of(model), "layer_types", None) or ()
    return [i for i, kind in enumerate(kinds) if "attention" not in kind or "linear" in kind]


def new_state(model: Any, batch_size: int) -> KVState:
    """An empty state for `batch_size` rows.

    Raises:
        LensError: layers that keep no keys and values.
    """
    if recurrent := recurrent_layers(model):
        raise LensError(
            f"{len(recurrent)} of {n_layers_of(model)} layers hold a recurrent state, e.g. layer {recurrent[0]}: keys "
            "and values are not all that a prefix leaves behind there, so nothing can start from a prefix cache"
        )
    mask = torch.zeros((batch_size, 0), dtype=torch.long, device=device_of(model))
    if has_modules(model):
        return KVState(empty_cache(), mask)
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), batch_size)
    return KVState(cache, mask)


def empty_cache() -> Any:
    """A cache of transformers in which every layer keeps all tokens; sliding windows are still applied by the mask."""
    from transformers import DynamicCache

    return DynamicCache()  # without a config: sliding layers would drop the prefix


def filled_cache(keys: Sequence[Float[Tensor, "_ kv pos d"]], values: Sequence[Float[Tensor, "_ kv pos d"]]) -> Any:
    """A cache of transformers that holds given keys (after the rotary embedding) and values, layer by layer."""
    cache = empty_cache()
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        cache.update(*pair, layer)
    return cache


def state_from_keys_values(
    model: Any,
    keys: Sequence[Float[Tensor, "_ kv pos d"]] | Float[Tensor, "layer batch kv pos d"],
    values: Sequence[Float[Tensor, "_ kv pos d"]] | Float[Tensor, "layer batch kv pos d"],
) -> KVState:
    """A state that holds given keys (after the rotary embedding, positions 0, 1, …) and values, layer by layer.

    The batch is the first layer's; later ones may have more rows (see `forking`).
    """
    batch, _, past, _ = keys[0].shape
    state = new_state(model, batch)
    state.mask = torch.ones((batch, past), dtype=torch.long, device=device_of(model))
    if has_modules(model):
        places = block_devices(model)
        state.cache = filled_cache(*([x.to(at) for x, at in zip(side, places, strict=True)] for side in (keys, values)))
        return state
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        entry = state.cache.entries[layer]
        entry.past_keys = _undo_rotary(model, layer, rearrange(k, "row kv pos d -> row pos kv d"))
        entry.past_values = rearrange(v, "row kv pos d -> row pos kv d")
    state.cache.previous_attention_mask = state.mask
    return state


def _undo_rotary(model: Any, layer: int, keys: Float[Tensor, "b p h d"]) -> Float[Tensor, "b p h d"]:
    """HookedTransformer caches keys before the rotary embedding; a rotation is undone by its transpose."""
    attention = model.blocks[layer].attn
    if attention.cfg.positional_embedding_type != "rotary":
        return keys
    dims, positions = attention.cfg.rotary_dim, keys.shape[1]
    cos = attention.rotary_cos[None, :positions, None, :]
    sin = attention.rotary_sin[None, :positions, None, :]
    rotated, rest = keys[..., :dims], keys[..., dims:]
    turned = rotated * cos - attention.rotate_every_two(rotated) * sin
    return torch.cat([turned / (cos**2 + sin**2), rest], dim=-1).to(keys.dtype)


CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a KV cache in the calls of models and layers: since 5.24, and before."""


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Keyword arguments that hand a KV cache (or none) to a transformers or PEFT model, whatever its version."""
    name = _known_cache_name(type(inner_model(model)).forward)
    return {name: cache, "use_cache": cache is not None}


def generate_cache_name() -> str:
    """What the installed transformers calls the cache that is given to `model.generate`."""
    from transformers import GenerationMixin

    return _known_cache_name(GenerationMixin.prepare_inputs_for_generation)


@lru_cache
def _known_cache_name(function: Callable[..., Any]) -> str:
    known = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])
