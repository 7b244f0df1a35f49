"""One forward pass on either TransformerLens backend; the only module that knows their differences.

*bridge* is `TransformerBridge` (TransformerLens 3.9 and 4.x): it wraps the transformers model and
shares its weights. *hooked* is `HookedTransformer` (3.9 only): it copies them. Everything above this
module works with either through the small protocol below, and never imports a TransformerLens class.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError

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
        raise LensError(f"this model has no hook point {name}: site {site!r} cannot be used on it")
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

    def right_align(self) -> None:
        """Move each row's padding columns from the right end to the left.

        A prefill is padded on the right, so that a sliding window sees true distances; decoding then
        appends at the right, so the padding has to leave from between.
        """
        length = self.length
        shift = length - self.mask.sum(dim=1)
        if not bool(shift.any()):
            return
        source = (torch.arange(length, device=self.mask.device)[None, :] - shift[:, None]) % length
        self.mask = self.mask.gather(1, source)

        def roll(tensor: Tensor, pos_dim: int) -> Tensor:
            index = source.view(len(source), *([1] * (pos_dim - 1)), length, *([1] * (tensor.ndim - pos_dim - 1)))
            return tensor.gather(pos_dim, index.expand_as(tensor))

        self.map(roll)


def new_state(model: HookedModel, batch_size: int) -> KVState:
    """An empty state for `batch_size` rows."""
    backend = backend_of(model)
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
    keys: Float[Tensor, "layer batch kv pos d"],
    values: Float[Tensor, "layer batch kv pos d"],
) -> KVState:
    """A state that holds given keys (after the rotary embedding, positions 0, 1, …) and values."""
    state = new_state(model, keys.shape[1])
    state.mask = torch.ones((keys.shape[1], keys.shape[3]), dtype=torch.long, device=device_of(model))
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


def rotated_keys_values(model: HookedModel, state: KVState) -> tuple[Tensor, Tensor]:
    """Keys after the rotary embedding, and values, of a bridge's state: [layer, batch, kv, pos, d_head]."""
    assert state.backend == "bridge"
    layers = state.cache.layers
    return torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers])


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


# ---------------------------------------------------------------- the forward pass


def forward(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    *,
    state: KVState | None = None,
    read: Int[Tensor, "batch read"] | None = None,
) -> Float[Tensor, "batch read d_vocab"]:
    """Logits of new tokens on top of the keys and values in `state` (which grows by them).

    Args:
        model: either backend.
        ids: new tokens, padded.
        attention_mask: 1 for real new tokens, 0 for padding. A token's position is the number of real
            tokens before it in its row.
        state: keys and values so far; None for a plain pass.
        read: columns of `ids` whose logits are wanted, per row; None for all. The unembedding is
            computed there only, so hooks at the unembedding see just those positions.
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
                past_key_values=None if state is None else state.cache,
                use_cache=state is not None,
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


# ---------------------------------------------------------------- making hooked models


def boot_bridge(hf_model: Any, tokenizer: Any, name: str) -> HookedModel:
    """Wrap a transformers model (also one that holds PEFT layers) as a bridge; weights are shared."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise LensError(
            f"transformer-lens could not be imported ({error}): pip install 'transformer-lens>=3.9,<5'"
        ) from error
    parameter = next(hf_model.parameters())
    training = hf_model.training
    if not hf_model.config.architectures:
        hf_model.config.architectures = [type(hf_model).__name__]  # a model built from a config has none
    try:
        bridge = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=_stand_in_tokenizer(),
            device=str(parameter.device),
            dtype=parameter.dtype,
        )
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise LensError(
            f"TransformerBridge cannot wrap {type(hf_model).__name__} ({_first_line(error)}): "
            "use an architecture that TransformerLens supports"
        ) from error
    hf_model.train(training)
    if tokenizer is not None:
        bridge._tokenizer = tokenizer  # the public setter would rebuild it with a BOS, from the hub
    return bridge  # type: ignore[no-any-return]


def _stand_in_tokenizer() -> Any:
    """A tokenizer to boot with: TransformerLens rebuilds the one it gets with a BOS in front, from the hub."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="a")


def build_hooked(hf_model: Any, tokenizer: Any, name: str) -> HookedModel:
    """Copy a transformers model into a HookedTransformer, weights unprocessed (no folding, no centring).

    Raises:
        LensError: TransformerLens 4 (which has no HookedTransformer), or a layout on which it is wrong.
    """
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise LensError(
            "backend 'hooked' needs HookedTransformer, which transformer-lens 4 removed: use backend='bridge' "
            "or pip install 'transformer-lens>=3.9,<4'"
        ) from error
    _refuse_wrong_layouts(hf_model.config)
    parameter = next(hf_model.parameters())
    cfg, state = _hooked_config_and_weights(hf_model, parameter.dtype, str(parameter.device))
    cfg.tokenizer_name = None
    model = HookedTransformer(cfg, tokenizer=None, move_to_device=True)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )  # fmt: skip
    torch.nn.Module.to(model, parameter.dtype)  # HookedTransformer's own .to prints
    model.tokenizer = tokenizer
    model.eval()
    return model  # type: ignore[no-any-return]


def _refuse_wrong_layouts(config: Any) -> None:
    """Layouts on which HookedTransformer 3.9 gives wrong numbers without an error."""
    if config.model_type == "llama":
        for field in ("attention_bias", "mlp_bias"):
            if getattr(config, field, False):
                raise LensError(
                    f"backend 'hooked' drops the biases of a Llama model with {field}=True: use backend='bridge'"
                )
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            raise LensError(
                f"backend 'hooked' cannot hold a Llama model with head_dim {config.head_dim} x "
                f"{config.num_attention_heads} heads != hidden size {config.hidden_size}: use backend='bridge'"
            )


MAX_HOOKED_CONTEXT = 4096
"""HookedTransformer allocates a mask of n_ctx x n_ctx; prompts here are far shorter."""


def _hooked_config_and_weights(hf_model: Any, dtype: torch.dtype, device: str) -> tuple[Any, dict[str, Tensor]]:
    from transformer_lens import loading_from_pretrained as loading

    config = hf_model.config
    if config.model_type == "gemma3_text":
        from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

        cfg = _gemma3_config(config, dtype, device)
        return cfg, convert_gemma_weights(hf_model, cfg)
    config = type(config).from_dict(config.to_dict())
    config.architectures = [type(hf_model).__name__]
    if config.model_type == "gpt2":
        config.n_ctx = config.n_positions  # transformers 5 dropped the field that the converter reads
    # The converter dispatches on the folder's name, which must not contain a model family.
    root = next((d for d in (tempfile.gettempdir(), "/tmp") if not {"llama", "gemma"} & _families(d)), "/")
    with tempfile.TemporaryDirectory(prefix="hfcfg-", dir=root) as folder:
        config.save_pretrained(folder)
        n_ctx = min(int(config.max_position_embeddings), MAX_HOOKED_CONTEXT)
        try:
            cfg = loading.get_pretrained_model_config(
                folder, device=device, dtype=dtype, n_ctx=n_ctx, default_prepend_bos=False
            )
            state = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
        except (NotImplementedError, KeyError, AttributeError, ValueError, TypeError) as error:
            raise LensError(
                f"HookedTransformer does not support {type(hf_model).__name__} ({_first_line(error)}): "
                "use backend='bridge'"
            ) from error
    cfg.model_name = getattr(hf_model, "name_or_path", "") or config.model_type
    cfg.d_vocab = int(hf_model.get_output_embeddings().weight.shape[0])
    return cfg, state


def _families(path: str) -> set[str]:
    return {family for family in ("llama", "gemma") if family in str(Path(path).resolve()).lower()}


def _gemma3_config(config: Any, dtype: torch.dtype, device: str) -> Any:
    from transformer_lens import HookedTransformerConfig

    rope = config.rope_parameters
    return HookedTransformerConfig(
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=min(config.max_position_embeddings, MAX_HOOKED_CONTEXT),
        eps=config.rms_norm_eps,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_activation,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=rope["full_attention"]["rope_theta"],
        rotary_base_local=rope["sliding_attention"]["rope_theta"],
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        use_qk_norm=True,
        window_size=config.sliding_window,
        use_local_attn=True,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        original_architecture="Gemma3ForCausalLM",
        default_prepend_bos=False,
        init_weights=False,
        dtype=dtype,
        device=device,
        model_name="gemma3",
    )


def share_equal_parameters(model: Any, like: Any) -> int:
    """Let `model` use the parameters of `like` that it equals (embeddings, say); returns the bytes saved."""
    saved = 0
    theirs = dict(like.named_parameters())
    for name, parameter in list(model.named_parameters()):
        other = theirs.get(name)
        if other is not None and other.shape == parameter.shape and torch.equal(other, parameter):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, other)
            saved += parameter.numel() * parameter.element_size()
    return saved


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
