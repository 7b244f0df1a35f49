"""Keys before the rotary embedding, kept from the forward passes of any model.

A model's cache holds keys after the rotary embedding, where the same key at two positions is two vectors.
Comparing tokens at different positions (the postfix of two queries) needs them before it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import blocks_of, core_of, has_modules, shape_of


@dataclass(frozen=True, eq=False)
class PlainKeys:
    """Per layer what the key projection gave in each pass, and what the key norm made of it, if there is one."""

    passes: tuple[list[Float[Tensor, "row pos width"]], ...]
    normed: tuple[list[Float[Tensor, "row pos width"]], ...]

    def joined(
        self, cached: Sequence[Float[Tensor, "row kv_head pos head_dim"]]
    ) -> tuple[Float[Tensor, "row pos width"], ...]:
        """The keys per layer, passes one after the other; a pass of one row (a shared prefix) is every row's.

        `cached` are the keys of the model's cache, which are the plain ones where there is no rotary embedding.

        Raises:
            LensError: these keys are not the cached ones up to a rotation.
        """
        if not self.passes:
            return tuple(rearrange(key, "row kv pos d -> row pos (kv d)") for key in cached)
        n_rows = cached[0].shape[0]
        if len(self.passes) != len(cached):
            raise _unreadable(f"{len(self.passes)} key projections for {len(cached)} layers")
        keys = []
        for passes, normed, after in zip(self.passes, self.normed, cached, strict=True):
            keys.append(torch.cat([one.expand(n_rows, -1, -1) for one in normed or passes], dim=1))
            _check_rotation(keys[-1], after)
        return tuple(keys)


@contextmanager
def keep_plain_keys(model: Any) -> Iterator[PlainKeys]:
    """Keep the keys of every pass inside the block, with gradient.

    Raises:
        LensError: the model has a rotary embedding but no key projection of its own (fused projections).
    """
    sources = _projections(model)
    kept = PlainKeys(tuple([] for _ in sources), tuple([] for _ in sources))
    with ExitStack() as hooks:
        for (module, norm), passes, normed in zip(sources, kept.passes, kept.normed, strict=True):

            def keep(_module: nn.Module, _args: object, output: Tensor, into: list[Tensor] = passes) -> None:
                into.append(output if output.ndim == 3 else rearrange(output, "row pos kv d -> row pos (kv d)"))

            def keep_normed(
                _module: nn.Module,
                args: tuple[Tensor, ...],
                output: Tensor,
                before: list[Tensor] = passes,
                into: list[Tensor] = normed,
            ) -> None:
                into.append(_by_token(args[0], output, n_pos=before[-1].shape[1]))

            hooks.callback(module.register_forward_hook(keep).remove)
            # Its output is kept, since it cannot be called again: FSDP frees its weight after the pass.
            if norm is not None:
                hooks.callback(norm.register_forward_hook(keep_normed).remove)
        yield kept


def _projections(model: Any) -> list[tuple[nn.Module, nn.Module | None]]:
    """Per layer the key projection and its norm; nothing where there is no rotary embedding to be before."""
    if not has_modules(model):
        attention = [block.attn for block in blocks_of(model)] if shape_of(model).rotary else []
        return [(part.hook_k, getattr(part, "k_norm", None)) for part in attention]
    parts = [dict(module.named_children()) for module in core_of(model).modules()]
    if found := [(children["k_proj"], children.get("k_norm")) for children in parts if "k_proj" in children]:
        return found
    if any("rotary" in type(module).__name__.lower() for module in core_of(model).modules()):
        raise _unreadable(f"{type(model).__name__} has no module called k_proj")
    return []


def _by_token(given: Tensor, normed: Tensor, n_pos: int) -> Float[Tensor, "row pos width"]:
    """What a key norm gave, heads joined. It sees all heads as one axis, or a head axis behind or before the tokens.

    Where there are as many heads as tokens, the strides of its input say which: it is a view of the projection.
    """
    if normed.ndim == 3:
        return normed
    behind, before = (normed.shape[axis] == n_pos for axis in (1, 2))
    if not behind and not before:
        raise _unreadable(f"the key norm gave a tensor of shape {tuple(normed.shape)} for {n_pos} tokens")
    if behind and before:
        behind = given.stride(1) >= given.stride(2)
    return rearrange(normed, "row pos kv d -> row pos (kv d)" if behind else "row kv pos d -> row pos (kv d)")


@torch.no_grad()
def _check_rotation(key: Float[Tensor, "row pos width"], cached: Float[Tensor, "row kv_head pos head_dim"]) -> None:
    """A rotation keeps norms; embeddings that also scale (YaRN) do so by one number."""
    ratio = cached.float().square().sum((1, 3)).sqrt() / key.float().norm(dim=-1)
    low, high = float(ratio.min()), float(ratio.max())
    if not high <= low * (1.02 if key.dtype in (torch.float32, torch.float64) else 1.1):
        raise _unreadable(f"the cached keys are {low:.3g} to {high:.3g} times as long as the projected ones")


def _unreadable(why: str) -> LensError:
    return LensError(f'the keys cannot be read before the rotary embedding: {why}; use reference="own"')
