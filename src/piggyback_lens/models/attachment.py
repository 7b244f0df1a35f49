"""Where adapters act: module inputs and outputs of transformers models, bridges and HookedTransformers.

An `Edit` gets a module's input and output and returns the new output, for all tokens of a pass. On a
transformers model and on a bridge (which wraps one) the modules are its linear layers, so an edit there does
what PEFT does. A HookedTransformer has no such modules: their inputs and outputs are read at the hook points
around them. Edits are ordinary torch hooks; they act before any intervention that is installed later.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import (
    HookedModel,
    blocks_of,
    check_layers,
    core_of,
    has_modules,
    hook_name,
    hook_points,
    is_hooked_model,
    n_layers_of,
    writes_through,
)
from piggyback_lens.models.peft_adapters import beyond_lora, plain_key
from piggyback_lens.models.views import adapter_layers
from piggyback_lens.words import MODULES, Module, Site, module_name

Edit = Callable[[Tensor, Tensor], Tensor]
SiteEdit = Callable[[Tensor], Tensor]


def linear_of(model: Any, layer: int, module: Module) -> nn.Module:
    """The linear layer of a module; PEFT's wrapper, where there is one.

    Raises:
        LensError: this architecture has no such linear layer (GPT-2 fuses q, k and v, for example).
    """
    block = blocks_of(model)[layer]
    for name, found in block.named_modules():
        if name.rsplit(".", 1)[-1] == f"{module}_proj":
            inner: nn.Module = getattr(found, "_original_component", found)
            return inner
    raise LensError(
        f"{type(core_of(model)).__name__} has no {module}_proj in its blocks: use PEFT for this architecture "
        "(add_lora, attach_adapter), which names its modules as they are"
    )


def adapter_inputs(model: Any, layer: int) -> list[nn.Module]:
    """The A matrices of a model's LoRA adapter in one layer: where they read zero, the adapter adds exactly zero.

    Args:
        model: what `require_switchable` lets through.
        layer: from 0.
    """
    inside: Any = adapter_layers(blocks_of(model)[layer])
    return [own.lora_A[name] for own in inside.values() for name in own.active_adapters if name in own.lora_A]


def require_switchable(model: Any) -> None:
    """Refuse a model that has no adapter which can be off at some tokens: s·BA inside the decoder blocks, no more.

    Its configuration is what is judged: biases and weights that were written to leave no trace in its layers.

    Args:
        model: transformers or PEFT model, or a bridge around one.

    Raises:
        LensError: no LoRA adapter that stands apart from the weights, or one that also changes what is no s·BA.
    """
    if not has_modules(model):
        raise LensError(
            "a HookedTransformer has its adapter merged into the weights: use backend='bridge', where it stands apart"
        )
    core = core_of(model)
    layers: dict[str, Any] = adapter_layers(core)
    if not layers:
        raise LensError(f"{type(core).__name__} has no adapter that could be off: is it the finetuned side?")
    active = {name for found in layers.values() for name in found.active_adapters}
    for name, config in getattr(core, "peft_config", {}).items():
        if name in active and (special := beyond_lora(config.to_dict(), allow=_SAME_FUNCTION)):
            raise LensError(f"adapter {name!r} has {special}: {_PLAIN_ONLY}")
    inside = {id(found) for block in blocks_of(model) for found in adapter_layers(block).values()}
    for key, found in layers.items():
        name = plain_key(key)
        if not hasattr(found, "lora_A"):
            raise LensError(f"the adapter of {name} is {type(found).__name__}: {_PLAIN_ONLY}")
        if found.merged_adapters:
            raise LensError(f"the adapter of {name} is merged into the weights: {_PLAIN_ONLY}")
        if id(found) not in inside:
            raise LensError(f"the adapter of {name} lies outside the decoder blocks: {_PLAIN_ONLY}")


_PLAIN_ONLY = "only a plain LoRA on linear layers of the decoder blocks can be off by token"
_SAME_FUNCTION = ("fan_in_fan_out", "rank_pattern", "alpha_pattern")  # sizes, and how the weights lie in memory


def module_sizes(model: Any, layer: int, module: Module) -> tuple[int, int]:
    """(out, in) of a module.

    Raises:
        LensError: the model has no such module.
    """
    if has_modules(model):
        linear: Any = linear_of(model, layer, module)
        return int(linear.out_features), int(linear.in_features)
    cfg = model.cfg
    heads = (cfg.n_key_value_heads or cfg.n_heads) if module in ("k", "v") else cfg.n_heads
    inner = cfg.d_mlp if module in ("gate", "up", "down") else heads * cfg.d_head
    return (cfg.d_model, inner) if module in ("o", "down") else (inner, cfg.d_model)


@contextmanager
def edited_modules(model: Any, edits: Mapping[tuple[int, Module], Edit]) -> Iterator[None]:
    """Change the outputs of linear modules, by (layer, module), while the block runs; removed also on errors.

    Raises:
        LensError: a layer or module that the model does not have.
    """
    check_layers([layer for layer, _ in edits], n_layers_of(model))
    with ExitStack() as stack:
        for (layer, module), edit in edits.items():
            if has_modules(model):
                _edit_linear(stack, linear_of(model, layer, module), edit)
            else:
                _edit_hooked(stack, blocks_of(model)[layer], module, edit)
        yield


def _edit_linear(stack: ExitStack, linear: nn.Module, edit: Edit) -> None:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return edit(args[0], output)

    stack.callback(linear.register_forward_hook(hook).remove)


def _edit_hooked(stack: ExitStack, block: Any, module: Module, edit: Edit) -> None:
    """The same on a HookedTransformer block, whose weights are tensors."""
    owner = block.attn if module in ("q", "k", "v", "o") else block.mlp
    seen: dict[str, Tensor] = {}
    late: list[Any] = []

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if module in ("o", "down"):
            # Registered now, so that it reads what earlier interventions at this hook point have left.
            point = owner.hook_z if module == "o" else owner.hook_post
            late.append(point.register_forward_hook(lambda _m, _a, output: seen.update(input=output)))
        else:
            names = {"q": "query_input", "k": "key_input", "v": "value_input"}
            seen["input"] = args[0] if args else kwargs[names.get(module, "x")]

    def change(_: nn.Module, _args: Any, output: Tensor) -> Tensor:
        while late:
            late.pop().remove()
        inputs = seen.pop("input")
        if module == "o":
            inputs = rearrange(inputs, "... head d -> ... (head d)")
        flat = rearrange(output, "... head d -> ... (head d)") if module in ("q", "k", "v") else output
        return edit(inputs, flat).view_as(output)

    points = {"q": "hook_q", "k": "hook_k", "v": "hook_v", "gate": "hook_pre"}
    points["up"] = "hook_pre_linear" if hasattr(owner, "hook_pre_linear") else "hook_pre"
    if module == "gate" and not hasattr(owner, "hook_pre_linear"):
        raise LensError("this model's MLP has no gate: choose up or down")
    target = getattr(owner, points[module]) if module in points else owner
    stack.callback(owner.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(target.register_forward_hook(change, prepend=True).remove)
    stack.callback(lambda: [handle.remove() for handle in late])


@contextmanager
def edited_sites(model: Any, edits: Mapping[tuple[int, Site], SiteEdit]) -> Iterator[None]:
    """Change activations at residual-width sites, by (layer, site), while the block runs.

    Raises:
        LensError: a layer or site that the model does not have; a plain transformers model has `resid_pre`
            and `resid_post` only.
    """
    check_layers([layer for layer, _ in edits], n_layers_of(model))
    points = hook_points(model) if is_hooked_model(model) else {}
    with ExitStack() as stack:
        for (layer, site), edit in edits.items():
            if is_hooked_model(model):
                point = points[hook_name(model, site, layer, points)]
                change = _written if writes_through(model, site) else _returned
                hook = point.register_forward_hook(partial(change, edit), prepend=True)
            else:
                hook = _edit_block(blocks_of(model)[layer], site, edit)
            stack.callback(hook.remove)
        yield


def _returned(edit: SiteEdit, _: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return edit(output)


def _written(edit: SiteEdit, _: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.copy_(edit(output))


def _edit_block(block: nn.Module, site: Site, edit: SiteEdit) -> Any:
    """A hook on a decoder block of a plain transformers model."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    def after(_: nn.Module, _args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    if site == "resid_pre":
        return block.register_forward_pre_hook(before, with_kwargs=True)
    if site == "resid_post":
        return block.register_forward_hook(after)
    raise LensError(f"a plain transformers model has the sites resid_pre and resid_post, not {site}: use hook_model")


@contextmanager
def changed_weight(model: Any, layer: int, module: Module, delta: Tensor) -> Iterator[None]:
    """Add delta [out, in] to a module's weight while the block runs; the old weight returns bit for bit.

    Raises:
        LensError: no such module, or another shape.
    """
    weight = _weight_of(model, layer, module)
    change = delta.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    change = _as_stored(model, weight, module, change)
    if change.shape != weight.shape:
        raise LensError(
            f"{module} of layer {layer} has weights {tuple(weight.shape)}, the adapter {tuple(delta.shape)}"
        )
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(kept.to(change.dtype) + change)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def linear_weights(
    model: Any, layers: Sequence[int], modules: Sequence[Module] | None = None
) -> dict[tuple[int, Module], Float[Tensor, "out in"]]:
    """The weights of linear modules by (layer, module); with `modules` None, of all that the model has.

    Raises:
        LensError: a HookedTransformer, an adapter in the way, or a module that is not there.
    """
    if not has_modules(model) or adapter_layers(core_of(model)):
        raise LensError(
            f"{type(model).__name__} has no plain linear weights: give a transformers model without adapter"
        )
    found: dict[tuple[int, Module], Tensor] = {}
    for layer in layers:
        names = {name.rsplit(".", 1)[-1] for name, _ in blocks_of(model)[layer].named_modules()}
        there = [module for module in MODULES if f"{module}_proj" in names]
        for module in there if modules is None else map(module_name, modules):
            linear: Any = linear_of(model, layer, module)
            found[layer, module] = linear.weight
    return found


def other_differences(one: Any, other: Any, known: Mapping[tuple[int, Module], Tensor]) -> list[str]:
    """What differs between two models beside the weights of `known` (of the first): tensors by name, and settings.

    A tensor that only one of them has differs, such as a bias, or an output layer that the other ties to its embedding.
    """
    left_out = {id(weight) for weight in known.values()}
    own, theirs = (_named(model) for model in (one, other))
    skipped = {name for name, value in own.items() if id(value) in left_out}
    names = [name for name in dict.fromkeys([*own, *theirs]) if name not in skipped]
    found = [name for name in names if not _same(own.get(name), theirs.get(name))]
    a, b = (_function_settings(core_of(model)) for model in (one, other))
    return found + [f"config.{name}" for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]


def _named(model: Any) -> dict[str, Tensor]:
    core: Any = core_of(model)
    return dict(core.named_parameters(remove_duplicate=False)) | dict(core.named_buffers(remove_duplicate=False))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.cpu(), other.cpu())


_NOT_THE_FUNCTION = (
    "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "max_position_embeddings", "pad_token_id",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Of a config; whether embeddings are tied is seen in the tensors."""


def _function_settings(model: Any) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    return {name: value for name, value in fields.items() if name[0] != "_" and name not in _NOT_THE_FUNCTION}


def _weight_of(model: HookedModel | nn.Module, layer: int, module: Module) -> Tensor:
    check_layers([layer], n_layers_of(model))
    if has_modules(model):
        linear: Any = linear_of(model, layer, module)
        found: Tensor = getattr(linear, "base_layer", linear).weight
        return found
    block: Any = blocks_of(model)[layer]
    grouped = hasattr(block.attn, "_W_K")
    names = {"q": "W_Q", "k": "_W_K" if grouped else "W_K", "v": "_W_V" if grouped else "W_V", "o": "W_O"}
    mlp = {"gate": "W_gate", "up": "W_in", "down": "W_out"}
    owner, name = (block.attn, names[module]) if module in names else (block.mlp, mlp[module])
    if not hasattr(owner, name):
        raise LensError(f"this model has no {module}: its weights have no {name}")
    stored: Tensor = getattr(owner, name)
    return stored


def _as_stored(model: Any, weight: Tensor, module: Module, delta: Tensor) -> Tensor:
    """[out, in] in the layout of this model's weight."""
    if has_modules(model) or delta.numel() != weight.numel():
        return delta
    if module in ("q", "k", "v"):  # [head, d_model, d_head]
        return rearrange(delta, "(head d) d_model -> head d_model d", head=weight.shape[0])
    if module == "o":  # [head, d_head, d_model]
        return rearrange(delta, "d_model (head d) -> head d d_model", head=weight.shape[0])
    return delta.T
