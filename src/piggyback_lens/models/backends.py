"""What a model is: plain, bridge or HookedTransformer; its sizes, its sites, and what its hook points are called.

*bridge* is `TransformerBridge` (TransformerLens 3.9 and 4.x): it wraps the transformers model and
shares its weights. *hooked* is `HookedTransformer` (3.9 only): it copies them. *plain* is a transformers or PEFT
model. Everything above this room works with either backend through the small protocol below, and never imports a
TransformerLens class.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.views import computing_device, inner_model
from piggyback_lens.words import SITES, Backend, OwnSite, Site

Kind = Literal["bridge", "hooked", "plain"]
"""Sites whose activation has a head axis: [batch, pos, head, d_head]. k, v and rot_k have the
key/value heads (fewer than the query heads under grouped-query attention)."""

_HOOK_NAMES: dict[Site | OwnSite, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "rot_k": "attn.hook_rot_k",
    "z": "attn.hook_z",
    "mlp_post": "mlp.hook_post",
    "attn_scores": "attn.hook_attn_scores",
}


@runtime_checkable
class HookedModel(Protocol):
    """What the library needs of a hooked model; `HookedTransformer` and `TransformerBridge` have it."""

    cfg: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits of a batch of token ids."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass under `(name, function)` hooks."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass that keeps activations."""

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Context manager that installs hooks."""


@dataclass(frozen=True)
class Shape:
    """The sizes that base, finetuned, caches and donors must share."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    rotary: bool


def backend_of(model: Any) -> Backend:
    """Which backend a hooked model is.

    Raises:
        LensError: the object is neither.
    """
    if hasattr(model, "original_model") and hasattr(model, "run_with_hooks"):
        return "bridge"
    if hasattr(model, "unembed") and hasattr(model, "run_with_hooks"):
        return "hooked"
    if hasattr(model, "using"):
        raise LensError("a pair is two models: with pair.using('finetuned') as model: ... and give model")
    raise LensError(
        f"got {type(model).__name__}, expected a TransformerLens HookedTransformer or TransformerBridge: "
        "wrap a transformers model with piggyback_lens.hook_model(model, tokenizer)"
    )


def facts_of(model: HookedModel) -> dict[str, str]:
    """Backend and dtype of a hooked model, for run cards.

    Raises:
        LensError: as `backend_of`.
    """
    return {"backend": backend_of(model), "dtype": str(dtype_of(model)).removeprefix("torch.")}


def is_hooked_model(model: Any) -> bool:
    """Whether `model` is a HookedTransformer or a TransformerBridge."""
    return hasattr(model, "run_with_hooks") and hasattr(model, "cfg")


def kind_of(model: Any) -> Kind:
    """What a pass of this model goes through; whatever is no hooked model is taken as plain."""
    if not is_hooked_model(model):
        return "plain"
    return "bridge" if hasattr(model, "original_model") else "hooked"


def has_modules(model: Any) -> bool:
    """Whether modules are linear layers of their own (transformers, bridge), not tensors (HookedTransformer)."""
    return kind_of(model) != "hooked"


def core_of(model: Any) -> Any:
    """The transformers or PEFT model inside a bridge; any other model itself."""
    return model.original_model if kind_of(model) == "bridge" else model


def config_of(model: Any) -> Any:
    """The transformers config of a plain model or a bridge, of the text part where there are several; else None."""
    config: Any = getattr(inner_model(core_of(model)), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def generation_config_of(model: Any) -> Any:
    """What a model says of how it is to generate; None for a HookedTransformer."""
    return getattr(inner_model(core_of(model)), "generation_config", None)


def end_ids_of(model: Any) -> frozenset[int]:
    """Tokens at which the model's own generation config ends an answer."""
    ends = getattr(generation_config_of(model), "eos_token_id", None)
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def n_positions_of(model: Any) -> int | None:
    """The most tokens that a model takes in one row, if it says."""
    if kind_of(model) == "hooked":
        return int(model.cfg.n_ctx)
    found = getattr(config_of(model), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def blocks_of(model: Any) -> Any:
    """The decoder blocks of any model, in order.

    Raises:
        LensError: there is no list of blocks as long as the config says.
    """
    if kind_of(model) == "hooked":
        return model.blocks
    wanted = getattr(config_of(model), "num_hidden_layers", None)
    for module in core_of(model).modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return module
    raise LensError(f"{type(model).__name__} has no list of decoder blocks: pass a transformers causal language model")


def n_layers_of(model: Any) -> int:
    """Number of decoder blocks.

    Raises:
        LensError: not a causal language model this library knows.
    """
    return int(model.cfg.n_layers) if is_hooked_model(model) else len(blocks_of(model))


def writes_through(model: Any, site: Site | OwnSite) -> bool:
    """Whether a change at a site has to be written into the tensor: the stream goes on in the one that was read.

    The bridge's hook of resid_mid sits where the MLP's norm reads.
    """
    return site == "resid_mid" and kind_of(model) == "bridge"


def shape_of(model: HookedModel) -> Shape:
    """Sizes of a hooked model.

    Raises:
        LensError: something else.
    """
    backend_of(model)
    cfg = model.cfg
    n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    rotary = str(cfg.positional_embedding_type) == "rotary"
    return Shape(cfg.n_layers, cfg.d_model, cfg.n_heads, n_kv, cfg.d_head, cfg.d_vocab, rotary)


def embeddings_of(model: HookedModel) -> Float[Tensor, "vocab d_model"]:
    """The input embeddings."""
    found: Tensor = model.W_E  # type: ignore[attr-defined]  # both backends have it
    return found


def width_of(model: Any) -> int:
    """Numbers per token of the residual stream."""
    return int(getattr(config_of(model), "hidden_size", None) or _first_parameter(model).shape[-1])


def device_of(model: Any) -> torch.device:
    """Device of the input embeddings, where token ids go."""
    return computing_device(model)


def block_devices(model: Any) -> list[torch.device]:
    """Where each decoder block computes, and has its keys and values; a device map spreads them."""
    return [computing_device(block) for block in blocks_of(model)]


def free_bytes(device: torch.device) -> float:
    """Memory for work on a device: of a GPU what nobody uses, 2 GB elsewhere (more is no faster on a CPU).

    What torch has taken from the driver and does not use now (after an earlier pass, say) is free too.
    """
    if device.type != "cuda":
        return 2e9
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


def device_bytes(device: torch.device) -> float:
    """Memory of a GPU."""
    return float(torch.cuda.mem_get_info(device)[1])


def dtype_of(model: Any) -> torch.dtype:
    """Dtype of the weights."""
    return _first_parameter(model).dtype


def floating_dtype(model: Any) -> torch.dtype:
    """Dtype of the first weights that are numbers; quantised ones are not."""
    found: torch.dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    return found


def _first_parameter(model: Any) -> Tensor:
    parameters: Iterator[Tensor] = model.parameters()
    return next(parameters)


def hook_points(model: Any) -> Mapping[str, Any]:
    """All hook points by name. The bridge gathers them anew at every access, so keep what this returns."""
    points: Mapping[str, Any] = model.hook_dict
    return points


def hook_name(model: HookedModel, site: Site | OwnSite, layer: int, points: Any = None) -> str:
    """TransformerLens name of a site at a layer, checked to exist (in `points`, default the model's hook_dict).

    Raises:
        LensError: unknown site, layer out of range, no such hook point in this model, or scores that are shown when
            attention has used them already.
    """
    if site not in _HOOK_NAMES:
        raise LensError(f"site {site!r} is not known: choose one of {', '.join(SITES)}")
    points = hook_points(model) if points is None else points
    n_layers = model.cfg.n_layers
    if not 0 <= layer < n_layers:
        raise LensError(f"layer {layer} does not exist: this model has layers 0 to {n_layers - 1}")
    name = f"blocks.{layer}.{_HOOK_NAMES[site]}"
    if name not in points:
        why = " (attention and MLP read the same stream, so nothing lies between them)" if site == "resid_mid" else ""
        raise LensError(f"this model has no hook point {name}: site {site!r} cannot be used on it{why}")
    if site == "attn_scores" and _shows_weights_only(model.blocks[layer].attn):  # type: ignore[attr-defined]
        raise LensError(
            f"the attention of this model (layer {layer}) shows its weights after they are normalised only, when they "
            "have been used, so they cannot be cut; patch k, v or z instead"
        )
    return name


def _shows_weights_only(attention: Any) -> bool:
    """TransformerLens' plain bridge lets the wrapped attention run, and forgets what hooks make of its weights."""
    return bool(type(attention).forward.__qualname__ == "AttentionBridge.forward")


def attention_weights_name(model: HookedModel, layer: int) -> str:
    """TransformerLens name of the attention weights, after the softmax, at a layer; errors as `hook_name`."""
    return hook_name(model, "attn_scores", layer).replace("attn_scores", "pattern")


def check_layers(layers: Sequence[int] | int | None, n_layers: int) -> tuple[int, ...]:
    """Layers as a sorted tuple; negative numbers count from the last layer, None means all.

    Raises:
        LensError: a layer that the model does not have, or none at all.
    """
    if layers is None:
        return tuple(range(n_layers))
    asked = (layers,) if isinstance(layers, int) else tuple(layers)
    wrong = [layer for layer in asked if not -n_layers <= layer < n_layers]
    if wrong or not asked:
        what = f"layers {wrong} do not exist" if wrong else "no layer was asked"
        raise LensError(f"{what}: this model has layers 0 to {n_layers - 1}")
    return tuple(sorted({layer % n_layers for layer in asked}))
