"""One set of weights, several module trees: structural copies of a model, and whether its owner has changed since.

A hooked view is made of a copy of the module tree that shares every parameter and buffer with the owner's model,
so weights that are trained through one are seen by the other, and the owner's object is never rewired. What the
owner does to the *tree* (another active adapter, a merge, another dtype, new embeddings) the copy does not see;
`require_current` finds that before a pass.
"""

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from piggyback_lens.errors import LensError
from piggyback_lens.models.gates import require_tokens_told
from piggyback_lens.models.versions import Version, version_of


def structural_copy(module: Any, *, own: Callable[[str], bool] = lambda _: False) -> Any:
    """New modules around the same parameters and buffers; costs no memory for weights.

    Args:
        module: a transformers or PEFT model, in any state; it is left as it is.
        own: parameters, by name, that the copy gets for itself.
    """
    shared: dict[int, Any] = {id(x): x for x in module.buffers()}
    shared |= {id(x): x for name, x in module.named_parameters() if not own(name)}
    for part in module.modules():
        # Offloaded weights, quantisers and what quantised layers know of their weights are shared as well.
        held = [vars(part).get(name) for name in ("hf_quantizer", "quant_state", "state")]
        held.append(getattr(vars(part).get("_hf_hook"), "weights_map", None))
        shared |= {id(x): x for x in held if x is not None}
    made = copy.deepcopy(module, shared)
    for part in made.modules():
        # bitsandbytes lays 4-bit weights out anew for a CPU's pass, and spoils them when they are read for saving.
        if "support_avx512bf16_for_cpu" in vars(part):
            part.support_avx512bf16_for_cpu = False
    return made


def is_peft_model(model: Any) -> bool:
    """Whether `model` is PEFT's wrapper around a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_booted(model: Any) -> bool:
    """Whether TransformerLens has rewired this very model (or a part of it) into a bridge."""
    return any(name.endswith("_original_component") for name, _ in model.named_modules())


def inner_model(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper (with its adapter layers), any other model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def text_part(model: Any) -> Any:
    """The text model inside a multimodal Gemma 3, around the same modules; any other model itself."""
    if type(model).__name__ != "Gemma3ForConditionalGeneration":
        return model
    from transformers import Gemma3ForCausalLM

    config = model.config.get_text_config()
    config._attn_implementation = model.model.language_model.config._attn_implementation
    with torch.device("meta"):
        text = Gemma3ForCausalLM(config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.generation_config = model.generation_config
    text.name_or_path = model.name_or_path
    return text.train(model.training)


def adapter_layers(model: Any) -> dict[str, nn.Module]:
    """PEFT's layers in a module tree, by name: those that change what a module computes, and those that replace it."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds)}


def adapter_parameters(layer: Any) -> Iterator[nn.Parameter]:
    """What a layer of PEFT adds to the module that it was put on."""
    for name in layer.adapter_layer_names:
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            yield from found.parameters()


def without_adapters(peft_model: Any) -> Any:
    """A structural copy of a PEFT model with every adapter layer replaced by the module that it was put on.

    Raises:
        LensError: an adapter is merged into the weights, so that the module beneath is no longer the base's.
    """
    plain = inner_model(structural_copy(peft_model))
    for name, layer in adapter_layers(plain).items():
        if merged := list(getattr(layer, "merged_adapters", ())):
            raise LensError(
                f"adapter {', '.join(merged)} is merged into the weights of {name}, so the base is not "
                "there to compare with: call unmerge_adapter() first"
            )
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            parent._modules[name] = _beneath(child)
    return plain


def merged_copy(peft_model: Any) -> Any:
    """A copy with the adapters merged into weights of its own; all other weights are shared."""
    with gradients_kept(peft_model):
        return structural_copy(peft_model, own=_is_adapted).merge_and_unload().eval()


def merged_bytes(peft_model: Any) -> int:
    """Memory of the weights that `merged_copy` has for itself."""
    adapted = {id(x): x for name, x in peft_model.named_parameters() if _is_adapted(name)}
    return sum(x.numel() * x.element_size() for x in adapted.values())


def _is_adapted(name: str) -> bool:
    return "base_layer" in name or "original_module" in name


def _beneath(module: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


# ---------------------------------------------------------------- for the length of a block


@contextmanager
def gradients_kept(*models: Any) -> Iterator[None]:
    """Whatever happens inside, every parameter requires a gradient afterwards exactly if it did before."""
    before = [(x, x.requires_grad) for model in models for x in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module takes part in graphs that are built inside."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def has_adapter(model: Any) -> bool:
    """Whether there is an adapter to switch off: of a PEFT model, or one added by `model.add_adapter`."""
    return hasattr(model, "disable_adapter") or bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model without its adapter; a model that has none stays as it is. What was trained stays trained."""
    # PEFT gives every weight of the active adapter a gradient when it switches it on again.
    trained = {name: value.requires_grad for name, value in model.named_parameters()} if has_adapter(model) else {}
    try:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else _added_adapters_off(model):
            yield
    finally:
        for name, value in model.named_parameters() if trained else ():
            if value.requires_grad != trained[name]:
                value.requires_grad_(trained[name])


@contextmanager
def _added_adapters_off(model: Any) -> Iterator[None]:
    """Without what `model.add_adapter` put in; layers that are off already stay off."""
    found: list[Any] = list(adapter_layers(model).values()) if has_adapter(model) else []
    layers = [layer for layer in found if not layer.disable_adapters]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def without_replicas(model: Any) -> nn.Module:
    """The module inside DDP or DataParallel, which hold it whole; what shards weights has to stay."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model  # type: ignore[no-any-return]


def is_sharded(model: Any) -> bool:
    """Whether each process holds a part of the weights only, as FSDP2 and tensor parallelism do."""
    return any(hasattr(value, "full_tensor") for value in model.parameters())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode (no dropout, no activation checkpointing); every module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------- has the owner changed?

_WATCHES: "weakref.WeakKeyDictionary[Any, Watch]" = weakref.WeakKeyDictionary()


class Watch:
    """What an owner's module tree computes with: its tensors, its modules, its active adapters.

    Attributes:
        shares: whether the view has the owner's tensors, so that changes inside them are seen by it.
    """

    def __init__(self, owner: Any, *, shares: bool) -> None:
        self.shares = shares
        self._owner = weakref.ref(owner)
        self._parts = [_Part(name, part) for name, part in owner.named_modules() if not _offloaded(part)]
        self._adapters = [(name, weakref.ref(x), _adapter_state(x)) for name, x in adapter_layers(owner).items()]
        self._version = version_of(owner)

    def version(self) -> Version:
        """Another one after every change inside the owner's tensors, as an optimiser's step makes."""
        owner = self._owner()
        return self._version if owner is None else version_of(owner)

    def change(self) -> str:
        """What is no longer as it was, in words; empty if nothing, or if the owner is gone."""
        owner = self._owner()
        if owner is None:
            return ""
        for part in self._parts:
            if found := part.change():
                return found
        for name, layer, state in self._adapters:
            own = layer()
            if own is not None and (now := _adapter_state(own)) != state:
                return f"adapters at {name}: {now}, when it was hooked {state}"
        if not self.shares and version_of(owner) != self._version:
            return "values of its weights, which this backend has copied"
        return ""


class _Part:
    """One module of the owner: which modules and tensors it holds."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, weakref.ref(module)
        # Lists of adapters may grow: what is not active changes nothing.
        growing = isinstance(module, (nn.ModuleDict, nn.ParameterDict))
        self.children = (
            [] if growing else [(key, weakref.ref(x)) for key, x in module._modules.items() if x is not None]
        )
        named = [*module._parameters.items(), *module._buffers.items()]
        # Quantised weights are laid out anew by their first pass, within the same parameter.
        self.tensors = [
            (key, weakref.ref(x), x.data_ptr() if type(x) in (Tensor, nn.Parameter) else None)
            for key, x in named
            if x is not None
        ]

    def change(self) -> str:
        module = self.module()
        if module is None:
            return f"{self.name} is gone"
        for key, child in self.children:
            if module._modules.get(key) is not child():
                return f"{self.name}.{key}".strip(".") + " is another module"
        for key, known, pointer in self.tensors:
            tensor = (module._parameters if key in module._parameters else module._buffers).get(key)
            moved = pointer is not None and tensor is not None and tensor.data_ptr() != pointer
            if tensor is None or tensor is not known() or moved:
                return f"{self.name}.{key} is another tensor"
        return ""


def watch(view: Any, owner: Any, *, shares: bool) -> None:
    """From now on, a pass of the view is refused once its owner has changed in a way that the view does not see."""
    known = weakref.ref(view)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        cached = any(kwargs.get(name) is not None for name in ("past_key_values", "past_kv_cache"))
        decoding = cached and isinstance(ids, Tensor) and ids.shape[-1] == 1  # follows a pass that was checked
        if not decoding and (own := known()) is not None:
            require_current(own)
            require_tokens_told(own)

    if view not in _WATCHES:
        getattr(view, "original_model", view).register_forward_pre_hook(check, with_kwargs=True)
    _WATCHES[view] = Watch(owner, shares=shares)


def require_current(view: Any) -> None:
    """Refuse a hooked view whose owner has changed.

    Raises:
        LensError: it says what changed.
    """
    found = _WATCHES.get(view)
    if found is not None and (change := found.change()):
        raise LensError(
            f"the model was changed after it was hooked ({change}): make the pair or the hooked model anew from it"
        )


def weights_version(view: Any) -> Version:
    """Another one after every change inside the weights of the view's owner; that of a model that the user built."""
    found = _WATCHES.get(view)
    return version_of(view) if found is None else found.version()


# ---------------------------------------------------------------- where the weights are


def computing_device(module: nn.Module) -> torch.device:
    """Where a module's first weights are, or are put for a pass where accelerate keeps them elsewhere."""
    found = next(module.parameters()).device
    if found.type != "meta":
        return found
    hooks = (getattr(vars(part).get("_hf_hook"), "execution_device", None) for part in module.modules())
    return next((torch.device(device) for device in hooks if device is not None), found)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are on the disk, or on the CPU beside a model on GPUs, and come for each pass."""
    return any(map(_offloaded, model.modules()))


def absent_weights(model: nn.Module) -> list[str]:
    """Weights that are in no memory, and that nobody puts there for a pass."""
    parts = ((name, part) for name, part in model.named_modules() if not _offloaded(part))
    return [
        f"{name}.{key}" for name, part in parts for key, x in part._parameters.items() if x is not None and x.is_meta
    ]


@contextmanager
def offloaded_left_alone(model: nn.Module) -> Iterator[None]:
    """Offloaded weights look inside as if they were where they compute, so that PEFT puts its own weights there.

    It would place the whole model anew otherwise, which it cannot do here, and make an adapter without memory.
    """
    held = [(part, dict(part._parameters)) for part in model.modules() if _offloaded(part)]
    spread = vars(model).pop("hf_device_map", None) if held else None
    for part, weights in held:
        for key, weight in weights.items():
            if weight is not None:
                like = torch.zeros((), dtype=weight.dtype, device=computing_device(part)).expand(weight.shape)
                part._parameters[key] = nn.Parameter(like, requires_grad=False)
    try:
        yield
    finally:
        for part, weights in held:
            part._parameters.update(weights)
        if spread is not None:
            vars(model)["hf_device_map"] = spread


def keep_vectors_in_memory(model: nn.Module) -> None:
    """Load offloaded weights of norms for good: TransformerLens reads them without a call of their module."""
    for part in model.modules():
        if _offloaded(part) and all(weight.ndim < 2 for weight in part._parameters.values() if weight is not None):
            from accelerate.hooks import remove_hook_from_module

            vars(part)["_hf_hook"].pre_forward(part)
            remove_hook_from_module(part)


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate puts this module's weights in place for each pass, as new tensors."""
    return bool(getattr(vars(module).get("_hf_hook"), "offload", False))


def _adapter_state(layer: Any) -> str:
    """Which adapters act in a layer, how strongly, and which were merged."""
    scaling = getattr(layer, "scaling", {})
    active = ", ".join(
        f"{name} (times {scaling[name]:g})" if name in scaling else name for name in layer.active_adapters
    )
    merged = ", ".join(getattr(layer, "merged_adapters", ()))
    return f"{active or 'none'} active, {merged or 'none'} merged"
