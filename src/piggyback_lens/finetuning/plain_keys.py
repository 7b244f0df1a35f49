"""Keys before the rotary embedding, kept from the forward passes of a Hugging Face model.

A model's cache holds keys after the rotary embedding, where the same key at two positions is two vectors.
Comparing tokens at different positions (the postfix of two queries) needs them before it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.errors import LensError


@dataclass(frozen=True, eq=False)
class PlainKeys:
    """What the key projections of a model gave: per layer one tensor for each pass, and the key norm if any."""

    passes: tuple[list[Float[Tensor, "row pos width"]], ...]
    norms: tuple[nn.Module | None, ...]

    def joined(
        self, cached: Sequence[Float[Tensor, "row kv_head pos head_dim"]]
    ) -> tuple[Float[Tensor, "row pos width"], ...]:
        """The keys per layer, passes one after the other; a pass of one row (a shared prefix) is every row's.

        `cached` are the keys of the model's cache, which are the plain ones where there is no rotary embedding.

        Raises:
            LensError: these keys are not the cached ones up to a rotation.
        """
        if not self.passes:
            return tuple(key.transpose(1, 2).flatten(2) for key in cached)
        n_rows = cached[0].shape[0]
        if len(self.passes) != len(cached):
            raise _unreadable(f"{len(self.passes)} key projections for {len(cached)} layers")
        keys = []
        for passes, norm, after in zip(self.passes, self.norms, cached, strict=True):
            key = torch.cat([one.expand(n_rows, -1, -1) for one in passes], dim=1)
            keys.append(key if norm is None else _normed(key, norm))
            _check_rotation(keys[-1], after)
        return tuple(keys)


@contextmanager
def keep_plain_keys(model: nn.Module) -> Iterator[PlainKeys]:
    """Keep the keys of every pass inside the block, with gradient.

    Raises:
        LensError: the model has a rotary embedding but no key projection of its own (fused projections).
    """
    sources = _projections(model)
    kept = PlainKeys(tuple([] for _ in sources), tuple(norm for _, norm in sources))
    with ExitStack() as hooks:
        for (module, _), passes in zip(sources, kept.passes, strict=True):

            def keep(_module: nn.Module, _args: object, output: Tensor, into: list[Tensor] = passes) -> None:
                into.append(output)

            hooks.callback(module.register_forward_hook(keep).remove)
        yield kept


def _projections(model: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """Per layer the key projection and its norm; nothing where there is no rotary embedding to be before."""
    parts = [dict(module.named_children()) for module in model.modules()]
    if found := [(children["k_proj"], children.get("k_norm")) for children in parts if "k_proj" in children]:
        return found
    if any("rotary" in type(module).__name__.lower() for module in model.modules()):
        raise _unreadable(f"{type(model).__name__} has no module called k_proj")
    return []


def _normed(key: Float[Tensor, "row pos width"], norm: nn.Module) -> Float[Tensor, "row pos width"]:
    """The key norm over what its weight spans: a head, all heads, or each head with its own weight."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise _unreadable(f"the key norm {type(norm).__name__} has no weight that says what it spans")
    normed: Tensor = norm(key.reshape(*key.shape[:2], -1, *weight.shape))
    return normed.flatten(2)


@torch.no_grad()
def _check_rotation(key: Float[Tensor, "row pos width"], cached: Float[Tensor, "row kv_head pos head_dim"]) -> None:
    """A rotation keeps norms; embeddings that also scale (YaRN) do so by one number."""
    ratio = cached.float().square().sum((1, 3)).sqrt() / key.float().norm(dim=-1)
    low, high = float(ratio.min()), float(ratio.max())
    if not high <= low * (1.02 if key.dtype in (torch.float32, torch.float64) else 1.1):
        raise _unreadable(f"the cached keys are {low:.3g} to {high:.3g} times as long as the projected ones")


def _unreadable(why: str) -> LensError:
    return LensError(f'the keys cannot be read before the rotary embedding: {why}; use reference="own"')
