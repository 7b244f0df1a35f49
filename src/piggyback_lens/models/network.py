"""The forward pass: the only caller of the network, whether plain (transformers, PEFT), bridge or HookedTransformer.

Everything that the library computes with a model comes through `forward` (logits) or `forward_keeping` (logits, and
the keys and values of the pass). Both move what they are given to the model's device, run the unembedding only where
logits are read, and let the model attend to keys and values that are there already.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import HookedModel, config_of, core_of, device_of, floating_dtype, kind_of, shape_of
from piggyback_lens.models.gates import require_tokens_told
from piggyback_lens.models.plain_views import network_of
from piggyback_lens.models.states import KVState, cache_argument, new_state, state_from_keys_values

Columns = Int[Tensor, "rows read"]
Places = tuple[Int[Tensor, " token"], Int[Tensor, " token"]]
Past = tuple[Sequence[Float[Tensor, "_ kv past d"]], Sequence[Float[Tensor, "_ kv past d"]]]
"""Keys (after the rotary embedding) and values, layer by layer."""
NOTHING: Places = (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
"""Read no logits: a pass that is run for what it leaves behind."""


def forward(
    model: Any,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    *,
    state: KVState | None = None,
    read: Columns | Places | None = None,
    positions: Int[Tensor, "batch pos"] | None = None,
    seen: Bool[Tensor, "1 1 pos total"] | None = None,
) -> Float[Tensor, "rows read d_vocab"]:
    """Logits of new tokens on top of the keys and values in `state` (which grows by them).

    Args:
        model: a hooked model of either backend, a transformers model or a PEFT model.
        ids: new tokens, padded.
        attention_mask: 1 for real new tokens, 0 for padding. A token's position is the number of real
            tokens before it in its row.
        state: keys and values so far; None for a plain pass.
        read: whose logits are wanted: columns of `ids` for each row, or (rows, columns) of single tokens, which
            come as one row; None for all. The unembedding is computed there only, so hooks at the unembedding see
            just those. A pass that forks (see `forking`) ends with more rows than `ids` has, and reads those.
        positions: where they are not what the mask says (rows packed into one); not on a HookedTransformer.
        seen: which tokens each new one looks at, likewise.

    Raises:
        LensError: a model that does not compute its logits with its output embeddings, once; one whose adapter is off
            at some tokens (see `gates`), in a pass that does not know its tokens.
    """
    require_tokens_told(model)
    device = device_of(model)
    ids, attention_mask = ids.to(device), attention_mask.to(device)
    past = attention_mask[:, :0] if state is None else state.mask
    full_mask = torch.cat([past, attention_mask], dim=1)
    kind = kind_of(model)
    network = network_of(model) if kind == "bridge" else model
    with nullcontext() if read is None else _reading(network, _places(read, device)):
        if kind == "hooked":
            # HookedTransformer derives the positions from the mask, and appends it to its cache's.
            assert positions is None, "a HookedTransformer takes the positions of its mask"
            assert seen is None, "a HookedTransformer looks at all that stands before"
            logits: Tensor = model(
                ids,
                attention_mask=attention_mask,
                past_kv_cache=None if state is None else state.cache,
                return_type="logits",
            )
        else:
            if positions is None:
                positions = (full_mask.cumsum(dim=1) - 1).clamp(min=0)[:, past.shape[1] :]
            logits = network(
                input_ids=ids,
                attention_mask=full_mask if seen is None else as_read(network, seen),
                position_ids=positions,
                **cache_argument(network, None if state is None else state.cache),
            ).logits
    if state is not None:
        state.mask = full_mask
    return logits


def forward_keeping(
    model: Any,
    ids: Int[Tensor, "batch pos"],
    past: Past | None = None,
    *,
    read: Columns | Places,
    positions: Int[Tensor, "batch pos"] | None = None,
    seen: Bool[Tensor, "1 1 pos total"] | None = None,
) -> tuple[Float[Tensor, "rows read d_vocab"], list[Tensor], list[Tensor]]:
    """Logits, and keys and values [row, kv_head, past + pos, d_head] of every layer, all with gradient.

    Padding has to be on the right, where no real token looks. It is not masked: a row of the mask without any key
    (padding beyond a sliding window) can make NaN.

    Args:
        model: as in `forward`. Hooks that are installed act on the pass.
        ids: new tokens.
        past: keys and values of what stands before them, in every row. Layers may have more rows than `ids` (see
            `forking`).
        read: as in `forward`.
        positions: as in `forward`.
        seen: as in `forward`.

    Raises:
        LensError: as `forward`, or the model keeps no keys and values now.
    """
    if kind_of(model) == "hooked":
        return _hooked_keeping(model, ids, past, read)
    state = new_state(model, len(ids)) if past is None else state_from_keys_values(model, *past)
    logits = forward(model, ids, torch.ones_like(ids), state=state, read=read, positions=positions, seen=seen)
    layers = state.cache.layers
    if not layers:
        raise LensError(
            f"{type(model).__name__} kept no keys and values of its pass, as activation checkpointing in training mode "
            "does not: use model.eval(), or switch it off"
        )
    return logits, [layer.keys for layer in layers], [layer.values for layer in layers]


def _hooked_keeping(
    model: Any, ids: Int[Tensor, "batch pos"], past: Past | None, read: Columns | Places
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """HookedTransformer caches keys before the rotary embedding; hooks see what its attention uses."""
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    sides = ("hook_rot_k" if shape_of(model).rotary else "hook_k", "hook_v")
    layers = range(shape_of(model).n_layers)
    names = [[f"blocks.{layer}.attn.{side}" for layer in layers] for side in sides]
    state = None if past is None else state_from_keys_values(model, *past)
    with model.hooks(fwd_hooks=[(name, keep) for side in names for name in side]):  # after those already installed
        logits = forward(model, ids, torch.ones_like(ids), state=state, read=read)
    found: list[list[Tensor]] = []
    for side, own in enumerate(names):
        # A hook sees the new tokens, or all of them; what came before is known.
        new = [rearrange(kept[name][:, -ids.shape[1] :], "row pos kv d -> row kv pos d") for name in own]
        found.append(new if past is None else [torch.cat(x, dim=2) for x in zip(past[side], new, strict=True)])
    return logits, found[0], found[1]


def as_read(network: Any, seen: Bool[Tensor, "_ 1 pos total"]) -> Tensor:
    """A mask as this model's attention wants it: boolean for sdpa, added to the scores for eager."""
    if config_of(network)._attn_implementation == "sdpa":
        return seen
    dtype = floating_dtype(network)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _places(read: Columns | Places, device: torch.device) -> tuple[Int[Tensor, "*rows"], Int[Tensor, "*read"]]:
    """(rows, columns), as they index together."""
    if isinstance(read, tuple):
        return read[0].to(device), read[1].to(device)
    return torch.arange(len(read), device=device)[:, None], read.to(device)


@contextmanager
def _reading(model: Any, places: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Let only the read positions reach the unembedding; what the model does to logits still happens.

    The vocabulary is the widest matrix of a small model.
    """
    calls: list[None] = []
    head = output_embeddings(model)
    if head is None:
        raise LensError(f"{type(model).__name__} has no output embeddings: pass a causal language model")
    handle = head.register_forward_pre_hook(partial(_gathered, places, calls))
    try:
        yield
    finally:
        handle.remove()
    if len(calls) != 1:
        raise LensError(
            f"{type(model).__name__} called its output embeddings {len(calls)} times in one pass, expected 1: this "
            "architecture is not supported"
        )


def _gathered(places: tuple[Tensor, Tensor], calls: list[None], _: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the output embeddings get: the hidden states of the read positions."""
    calls.append(None)
    hidden, *rest = args
    found = hidden[tuple(x.to(hidden.device) for x in places)]
    return (found[None] if found.ndim == 2 else found, *rest)


def output_embeddings(model: Any) -> Any:
    """The module that turns the last hidden state into logits; None if there is none."""
    if kind_of(model) == "hooked":
        return model.unembed
    network = core_of(model)
    return network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None


def unembedded(model: Any, hidden: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_vocab"]:
    """Logits of hidden states as the output embeddings read them, after the final norm."""
    logits: Tensor = output_embeddings(model)(hidden)
    return logits


def final_norm(model: HookedModel, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
    """The final norm of a hooked model."""
    normed: Tensor = model.ln_final(residual)  # type: ignore[attr-defined]
    return normed


@contextmanager
def keeping_last_hidden(model: Any) -> Iterator[list[Float[Tensor, "row token d_model"]]]:
    """The list gets what the output embeddings read in every pass inside: with `read`, at those places only."""
    found: list[Tensor] = []
    handle = output_embeddings(model).register_forward_hook(lambda _m, args, _o: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()
