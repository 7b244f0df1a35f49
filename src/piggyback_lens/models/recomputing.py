"""Activation checkpointing around decoder blocks that leaves keys and values for objectives to read.

transformers' own switches the cache off, and with it every objective on keys and values. Here a block keeps its input
and what it put into the cache; the rest is computed again when the gradient arrives (torch.utils.checkpoint).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import blocks_of, has_modules
from piggyback_lens.models.states import empty_cache

Past = tuple[Tensor, Tensor] | None
"""Keys and values of one block before a pass."""


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Passes with gradient inside keep no activations within blocks; what is computed is the same.

    A hook inside a block has to be there for the backward pass too, since it is run again then.

    Raises:
        LensError: a HookedTransformer, whose blocks cache by hooks.
    """
    if not has_modules(model):
        raise LensError(
            f"gradient_checkpointing works on models of transformers, not on a {type(model).__name__}: train the PEFT "
            "model, or set it to False"
        )
    blocks = list(blocks_of(model))
    before = [vars(block).get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            vars(block)["forward"] = _checkpointed(block.forward, number)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del vars(block)["forward"]
            if own is not None:
                vars(block)["forward"] = own


def _checkpointed(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        past = None if cache is None else _kept(cache, number)
        first = True

        def once_more(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if not first and cache is not None:  # the pass's own holds the new tokens already
                own = _cache_with(past, number)
                args = tuple(own if value is cache else value for value in args)
                kwargs = {name: own if value is cache else value for name, value in kwargs.items()}
            first = False
            return forward(*args, **kwargs)

        return checkpoint(once_more, *args, use_reentrant=False, **kwargs)

    return run


def _kept(cache: Any, number: int) -> Past:
    """What a cache of transformers holds for a block."""
    layer = cache.layers[number] if number < len(cache.layers) else None
    return None if layer is None or not layer.is_initialized else (layer.keys, layer.values)


def _cache_with(past: Past, number: int) -> Any:
    """A new cache that holds the same for this block."""
    cache = empty_cache()
    if past is not None:
        cache.update(*past, number)
    return cache
