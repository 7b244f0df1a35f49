"""One forward pass on either TransformerLens backend; the only module that knows their differences.

*bridge* is `TransformerBridge` (TransformerLens 3.9 and 4.x): it wraps the transformers model and
shares its weights. *hooked* is `HookedTransformer` (3.9 only): it copies them. Everything above this
module works with either through the small protocol below, and never imports a TransformerLens class.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.views import inner_model

Backend = Literal["bridge", "hooked"]
Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "rot_k", "z", "mlp_post"]
SITES: tuple[Site, ...] = get_args(Site)
HEAD_SITES: tuple[Site, ...] = ("q", "k", "v", "rot_k", "z")
"""Sites whose activation has a head axis: [batch, pos, head, d_head]. k, v and rot_k have the
key/value heads (fewer than the query heads under grouped-query attention)."""

_HOOK_NAMES: dict[Site, str] = {
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
    raise LensError(
        f"got {type(model).__name__}, expected a TransformerLens HookedTransformer or TransformerBridge: "
        "wrap a transformers model with piggyback_lens.hook_model(model, tokenizer)"
    )


def is_hooked_model(model: Any) -> bool:
    """Whether `model` is a HookedTransformer or a TransformerBridge."""
    return hasattr(model, "run_with_hooks") and hasattr(model, "cfg")


def shape_of(model: HookedModel) -> Shape:
    """Sizes of a hooked model."""
    cfg = model.cfg
    n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    rotary = str(cfg.positional_embedding_type) == "rotary"
    return Shape(cfg.n_layers, cfg.d_model, cfg.n_heads, n_kv, cfg.d_head, cfg.d_vocab, rotary)


def device_of(model: HookedModel) -> torch.device:
    """Device of the input embeddings, where token ids go."""
    return _first_parameter(model).device


def dtype_of(model: HookedModel) -> torch.dtype:
    """Dtype of the weights."""
    return _first_parameter(model).dtype


def _first_parameter(model: HookedModel) -> Tensor:
    parameters: Iterator[Tensor] = model.parameters()  # type: ignore[attr-defined]
    return next(parameters)


def hook_points(model: Any) -> Mapping[str, Any]:
    """All hook points by name. The bridge gathers them anew at every access, so keep what this returns."""
    points: Mapping[str, Any] = model.hook_dict
    return points


def hook_name(model: HookedModel, site: Site, layer: int, points: Any = None) -> str:
    """TransformerLens name of a site at a layer, checked to exist (in `points`, default the model's hook_dict).

    Raises:
        LensError: unknown site, layer out of range, or no such hook point in this model.
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
    return name


# ---------------------------------------------------------------- keys and values carried along


@dataclass
class KVState:
    """Keys and values of the tokens seen so far, with the mask that says which of them are real.

    The tensors are held in the backend's own cache; `map` lets row selection and rolling be written
    once for both.
    """

    backend: Backend
    cache: Any
    mask: Int[Tensor, "batch past"]

    @property
    def length(self) -> int:
        """Columns seen so far, padding included."""
        return int(self.mask.shape[1])

    def map(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Replace every key and value tensor by `change(tensor, position_dim)`; batch is dim 0."""
        if self.backend == "bridge":
            for layer in self.cache.layers:
                layer.keys, layer.values = change(layer.keys, 2), change(layer.values, 2)
        else:
            for entry in self.cache.entries:
                entry.past_keys, entry.past_values = change(entry.past_keys, 1), change(entry.past_values, 1)
            self.cache.previous_attention_mask = self.mask

    def select_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these rows."""
        self.mask = self.mask[rows]
        self.map(lambda tensor, _: tensor[rows])

    def branched(self, rows: Sequence[Int[Tensor, " _"]], mask: Int[Tensor, "row past"], begin: int) -> "KVState":
        """A new state of chosen rows, layer by layer, with their padding moved to the left as `right_align` does.

        Args:
            rows: which rows of this state each layer of the new one has.
            mask: of all rows of this state.
            begin: how many rows the new state's pass starts with.
        """
        source = _right_aligned(mask)
        aligned = mask.gather(1, source)[rows[-1]][:begin]

        def chosen(tensor: Tensor, pos_dim: int, own: Tensor) -> Tensor:
            return _gathered(tensor[own], source[own], pos_dim)

        if self.backend == "bridge":
            from transformers import DynamicCache

            cache: Any = DynamicCache()
            for number, (layer, own) in enumerate(zip(self.cache.layers, rows, strict=True)):
                cache.update(chosen(layer.keys, 2, own), chosen(layer.values, 2, own), number)
            return KVState(self.backend, cache, aligned)
        entries = [
            replace(e, past_keys=chosen(e.past_keys, 1, own), past_values=chosen(e.past_values, 1, own))
            for e, own in zip(self.cache.entries, rows, strict=True)
        ]
        return KVState(self.backend, replace(self.cache, entries=entries, previous_attention_mask=aligned), aligned)

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
    index = source.view(len(source), *([1] * (pos_dim - 1)), length, *([1] * (tensor.ndim - pos_dim - 1)))
    return tensor.gather(pos_dim, index.expand_as(tensor))


def recurrent_layers(model: HookedModel) -> list[int]:
    """Layers that carry a recurrent state along instead of keys and values (Mamba, gated delta nets)."""
    if backend_of(model) == "hooked":
        return []
    kinds = getattr(model.original_model.config, "layer_types", None) or ["attention"] * model.cfg.n_layers  # type: ignore[attr-defined]
    return [i for i, kind in enumerate(kinds) if "attention" not in kind or "linear" in kind]


def new_state(model: HookedModel, batch_size: int) -> KVState:
    """An empty state for `batch_size` rows.

    Raises:
        LensError: layers that keep no keys and values.
    """
    backend = backend_of(model)
    if recurrent := recurrent_layers(model):
        raise LensError(
            f"{len(recurrent)} of {model.cfg.n_layers} layers hold a recurrent state, e.g. layer {recurrent[0]}: keys "
            "and values are not all that a prefix leaves behind there, so nothing can start from a prefix cache"
        )
    mask = torch.zeros((batch_size, 0), dtype=torch.long, device=device_of(model))
    if backend == "bridge":
        from transformers import DynamicCache

        # Without a config every layer keeps all tokens; sliding windows are still applied by the mask.
        return KVState(backend, DynamicCache(), mask)
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), batch_size)
    return KVState(backend, cache, mask)


def state_from_keys_values(
    model: HookedModel,
    keys: Sequence[Float[Tensor, "_ kv pos d"]] | Float[Tensor, "layer batch kv pos d"],
    values: Sequence[Float[Tensor, "_ kv pos d"]] | Float[Tensor, "layer batch kv pos d"],
) -> KVState:
    """A state that holds given keys (after the rotary embedding, positions 0, 1, …) and values, layer by layer.

    The batch is the first layer's; later ones may have more rows (see `forking`).
    """
    batch, _, past, _ = keys[0].shape
    state = new_state(model, batch)
    state.mask = torch.ones((batch, past), dtype=torch.long, device=device_of(model))
    if state.backend == "bridge":
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            state.cache.update(k, v, layer)
        return state
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        entry = state.cache.entries[layer]
        entry.past_keys = _undo_rotary(model, layer, k.transpose(1, 2))
        entry.past_values = v.transpose(1, 2)
    state.cache.previous_attention_mask = state.mask
    return state


def rotated_keys_values(model: HookedModel, state: KVState) -> tuple[list[Tensor], list[Tensor]]:
    """Keys after the rotary embedding, and values, of a bridge's state: [batch, kv, pos, d_head] per layer."""
    assert state.backend == "bridge"
    layers = state.cache.layers
    return [x.keys for x in layers], [x.values for x in layers]


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


# ---------------------------------------------------------------- the forward pass


def forward(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    *,
    state: KVState | None = None,
    read: Int[Tensor, "rows read"] | None = None,
) -> Float[Tensor, "rows read d_vocab"]:
    """Logits of new tokens on top of the keys and values in `state` (which grows by them).

    Args:
        model: either backend.
        ids: new tokens, padded.
        attention_mask: 1 for real new tokens, 0 for padding. A token's position is the number of real
            tokens before it in its row.
        state: keys and values so far; None for a plain pass.
        read: columns of `ids` whose logits are wanted, per row; None for all. The unembedding is
            computed there only, so hooks at the unembedding see just those positions. A pass that forks (see
            `forking`) ends with more rows than `ids` has, and reads those.
    """
    past = attention_mask[:, :0] if state is None else state.mask
    full_mask = torch.cat([past, attention_mask], dim=1)
    position_ids = (full_mask.cumsum(dim=1) - 1).clamp(min=0)[:, past.shape[1] :]
    with _reading(model, read):
        if backend_of(model) == "bridge":
            output = model.original_model(  # type: ignore[attr-defined]
                input_ids=ids,
                attention_mask=full_mask,
                position_ids=position_ids,
                **cache_argument(model.original_model, None if state is None else state.cache),  # type: ignore[attr-defined]
            )
            logits = output.logits
        else:
            # HookedTransformer derives the same positions from the mask, and appends it to its cache's.
            logits = model(
                ids,
                attention_mask=attention_mask,
                past_kv_cache=None if state is None else state.cache,
                return_type="logits",
            )
    if state is not None:
        state.mask = full_mask
    return logits  # type: ignore[no-any-return]


@contextmanager
def _reading(model: Any, read: Tensor | None) -> Iterator[None]:
    """Let only the read positions reach the unembedding; what the model does to logits still happens."""
    if read is None:
        yield
        return
    unembed = model.original_model.get_output_embeddings() if hasattr(model, "original_model") else model.unembed

    def gather(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        index = read.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *args[1:])

    handle = unembed.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


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
        raise LensError(
            f"layers {list(asked)} asked, {wrong or 'none'} of them usable: this model has 0 to {n_layers - 1}"
        )
    return tuple(sorted({layer % n_layers for layer in asked}))
