"""Passes over a part of the network: ended at a block, or begun at one from activations that are there already."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import blocks_of, config_of, has_modules
from piggyback_lens.models.network import NOTHING, forward
from piggyback_lens.models.states import CACHE_NAMES


class _Reached(Exception):
    """Ends a pass at the block beyond which nothing is wanted."""


@contextmanager
def ended_at(model: Any, layer: int) -> Iterator[list[Float[Tensor, "row pos d_model"]]]:
    """Passes inside end where this block would begin; the list gets what it would have read. No block: no end.

    The block ends with the first such pass.
    """
    blocks = blocks_of(model)
    found: list[Tensor] = []
    if layer == len(blocks):
        yield found
        return

    def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = blocks[layer].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with suppress(_Reached):
            yield found
    finally:
        handle.remove()


@torch.no_grad()
def residual_at(model: Any, ids: Int[Tensor, "row pos"], layer: int) -> tuple[Float[Tensor, "row pos d_model"], bool]:
    """The residual stream that a block (above the first) reads, without running it; and whether blocks give tuples."""
    tuples: list[bool] = []
    handle = blocks_of(model)[layer - 1].register_forward_hook(lambda _m, _a, out: tuples.append(type(out) is tuple))
    try:
        with ended_at(model, layer) as found:
            forward(model, ids, torch.ones_like(ids), read=NOTHING)
    finally:
        handle.remove()
    return found[0].detach(), tuples[0]


def can_begin_late(model: Any) -> bool:
    """Whether `begun_at` works on a model: its blocks have to be modules of transformers."""
    return has_modules(model)


@contextmanager
def begun_at(
    model: Any, layer: int, residuals: Sequence[Float[Tensor, "_ _ d_model"]], *, in_tuple: bool = False
) -> Iterator[None]:
    """Passes inside begin at this block: each of them takes the next of the residual streams.

    Keys and values of the blocks below are placeholders, which only tell a cache how long the pass is, for the masks.

    Args:
        model: a transformers model, or the one inside a bridge.
        layer: the first block that is run.
        residuals: what it reads, pass by pass.
        in_tuple: whether blocks give their output in a tuple (see `residual_at`).

    Raises:
        LensError: a pass that does not have as many tokens as are given.
    """
    blocks, waiting = blocks_of(model), list(residuals)

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not waiting or waiting[0].shape != hidden.shape:
            stored = [tuple(x.shape) for x in waiting]
            raise LensError(f"a pass of {tuple(hidden.shape)} where {stored} is stored: set cache_below=False")
        own = waiting.pop(0).to(hidden.dtype)
        return ((own, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": own})

    handle = blocks[layer].register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    # A bridge wraps each block; others (accelerate) set a forward of their own on it, which has to come back.
    lower = [getattr(block, "_original_component", block) for block in list(blocks)[:layer]]
    before = [vars(block).get("forward") for block in lower]
    try:
        for number, block in enumerate(lower):
            vars(block)["forward"] = _passed_by(model, number, in_tuple)
        yield
    finally:
        handle.remove()
        for block, own in zip(lower, before, strict=True):
            del vars(block)["forward"]
            if own is not None:
                vars(block)["forward"] = own


def _passed_by(model: Any, number: int, in_tuple: bool) -> Any:
    """The forward of a block that is not run."""
    config = config_of(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is None:
            cache = next((value for value in args[1:] if hasattr(value, "get_seq_length")), None)
        if cache is not None:
            nothing = hidden.new_zeros(()).expand(len(hidden), heads, hidden.shape[1], width)
            cache.update(nothing, nothing, number)
        return (hidden,) if in_tuple else hidden

    return forward
