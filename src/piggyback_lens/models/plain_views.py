"""The plain view of a hooked model: passes on which no hook acts go through it, since hook points cost time.

A bridge that the library made has beside it a structural copy of its owner's model, around the same weights, which
was never rewired. A pass may go through that copy only where the hooked tree carries nothing beyond what booting put
there: no hook of TransformerLens or torch, no replaced module, weight or `forward`, no other mode. A HookedTransformer
has its weights for itself, and a bridge that the user built has no plain view: both run as they are.

Loops of short passes (decoding) go through weights with the adapter merged in, where those are float32 and cost no
more than `MERGED_GB`: a LoRA on all linear layers makes every step half as expensive again. In half precision a merge
rounds the weights, and answers would change.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from piggyback_lens.models.backends import config_of, core_of, kind_of
from piggyback_lens.models.versions import Version, version_of
from piggyback_lens.models.views import (
    is_offloaded,
    is_peft_model,
    merged_bytes,
    merged_copy,
    require_current,
)

_PLAIN: "weakref.WeakKeyDictionary[Any, tuple[Any, list[_Part]]]" = weakref.WeakKeyDictionary()
_MERGED: "weakref.WeakKeyDictionary[Any, tuple[Version, Any]]" = weakref.WeakKeyDictionary()
MERGED_GB = 1.0
"""Memory for one side's merged weights; 0 decodes through the adapter's own layers."""
_SETTLED: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HELD = ("_parameters", "_modules", "_buffers")


class _Part:
    """One module of the hooked tree, as booting and proving left it. It is asked before every pass, so it is quick."""

    __slots__ = ("forward", "held", "here", "hooks", "training")

    def __init__(self, module: nn.Module) -> None:
        self.here = vars(module)  # not the module: what is kept here must not keep the view alive
        self.held = [list(map(id, self.here[name].values())) for name in _HELD]
        self.hooks = [self.here[name].copy() for name in _HOOKS]
        self.forward, self.training = self.here.get("forward"), module.training

    def untouched(self) -> bool:
        here = self.here
        return (
            [here[name] for name in _HOOKS] == self.hooks
            and here["training"] is self.training
            and here.get("forward") is self.forward
            and [list(map(id, here[name].values())) for name in _HELD] == self.held
        )


def remember_plain(view: Any, plain: Any) -> None:
    """From now on, passes of the hooked view on which nothing acts go through `plain`, which computes the same."""
    modules = {id(part): part for root in (view, core_of(view)) for part in root.modules()}
    _PLAIN[view] = plain, [_Part(part) for part in modules.values()]


def plain_view(view: Any) -> Any:
    """The plain model beside a hooked one (in evaluation mode, around the same weights), or None."""
    found = _PLAIN.get(view)
    return None if found is None else found[0]


def network_of(view: Any) -> Any:
    """What a pass of a bridge goes through now: its plain view where no hook acts, else the wrapped model itself."""
    if view in _SETTLED:
        return _SETTLED[view]
    found = _PLAIN.get(view)
    if found is None or not all(part.untouched() for part in found[1]):
        return core_of(view)
    require_current(view)
    return found[0]


def attention_of(model: Any) -> str | None:
    """Which of transformers' attentions passes go through now; a bridge has one that shows its scores to hooks."""
    network = network_of(model) if kind_of(model) == "bridge" else model
    found: str | None = getattr(config_of(network), "_attn_implementation", None)
    return found


def _merged(view: Any, plain: Any) -> Any:
    """The plain view with its adapter merged, as the weights are now; the plain view itself where that does not pay."""
    exact = is_peft_model(plain) and all(x.dtype == torch.float32 for x in plain.parameters())
    if not exact or is_offloaded(plain) or merged_bytes(plain) > MERGED_GB * 1e9:
        return plain
    version = version_of(plain)
    if _MERGED.get(view, (None, None))[0] != version:
        _MERGED.pop(view, None)  # its memory first
        _MERGED[view] = version, _checked(merged_copy(plain), plain)
    return _MERGED[view][1]


@torch.no_grad()
def _checked(merged: Any, plain: Any) -> Any:
    """What was merged, if it computes the same; else the plain model."""
    device = next(plain.parameters()).device
    ids = (torch.arange(12, device=device) * 9973 + 11)[None] % plain.get_input_embeddings().weight.shape[0]
    expected, found = (model(input_ids=ids, use_cache=False).logits for model in (plain, merged))
    return merged if bool((found - expected).norm() <= 1e-5 * expected.norm()) else plain


@contextmanager
def settled(view: Any) -> Iterator[None]:
    """What passes of this model go through is looked at once, here: nothing may be hooked or unhooked inside.

    For loops of short passes, such as decoding.
    """
    if view in _SETTLED or view not in _PLAIN:
        yield
        return
    network = network_of(view)
    _SETTLED[view] = _merged(view, network) if network is plain_view(view) else network
    try:
        yield
    finally:
        del _SETTLED[view]
