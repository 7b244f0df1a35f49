"""Make hooked models of transformers models: TransformerBridge, and HookedTransformer where there is one.

`HookedTransformer.from_pretrained` knows a fixed list of hub names; here any model of a supported layout is
converted, whatever its name, without a connection, and with its weights unprocessed.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.fused import read_fused_weights_live
from piggyback_lens.models.packing import LONGEST
from piggyback_lens.models.sources import multimodal_kind
from piggyback_lens.models.states import CACHE_NAMES
from piggyback_lens.models.views import (
    computing_device,
    gradients_kept,
    inner_model,
    is_offloaded,
    is_peft_model,
    keep_vectors_in_memory,
    merged_copy,
    structural_copy,
    text_part,
    watch,
)


def boot_bridge(hf_model: Any, tokenizer: Any, name: str) -> HookedModel:
    """A bridge around a structural copy of a transformers or PEFT model: it shares the weights, and nothing else.

    The bridge is in evaluation mode. The model may be trained while the bridge is in use.

    Raises:
        LensError: an architecture that TransformerLens cannot wrap.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise LensError(
            f"transformer-lens could not be imported ({error}): pip install 'transformer-lens>=3.9,<5'"
        ) from error
    with gradients_kept(hf_model):
        inner = text_part(inner_model(structural_copy(hf_model))).eval()
        _refuse_multimodal(inner)
        parameter = next(inner.parameters())
        if is_offloaded(inner):
            keep_vectors_in_memory(inner)
            inner.hf_device_map = None  # TransformerLens refuses such maps, since it read weights past their modules
        inner.config.architectures = [type(inner).__name__]  # what is here, whatever a checkpoint said
        if inner.config._attn_implementation not in LONGEST:  # TransformerLens adds a mask to scores, flash has none
            inner.config._attn_implementation = "eager"
        try:
            bridge = TransformerBridge.boot_transformers(
                "local",  # names that TransformerLens knows make it print notices
                hf_model=inner,
                tokenizer=_stand_in_tokenizer(),
                device=str(computing_device(inner)),
                dtype=parameter.dtype,
            )
            bridge.cfg.model_name = name
            bridge.eval()
            read_fused_weights_live(bridge)
        except Exception as error:  # TransformerLens raises many types on layouts that it does not know
            raise LensError(
                f"TransformerBridge cannot wrap {type(inner).__name__} ({_first_line(error)}): "
                "use an architecture that TransformerLens supports"
            ) from error
    _hear_new_cache_name(bridge)
    if tokenizer is not None:
        bridge._tokenizer = tokenizer  # the public setter would rebuild it with a BOS, from the hub
    watch(bridge, hf_model, shares=True)
    return bridge  # type: ignore[no-any-return]


def _refuse_multimodal(model: Any) -> None:
    """TransformerLens would install packages for the processors of such a model.

    Raises:
        LensError: the model reads images or sound.
    """
    if kind := multimodal_kind(model.config):
        raise LensError(
            f"{type(model).__name__} is a multimodal model ({kind}), expected a text model (or Gemma 3, whose text "
            "model is used): give its language model alone"
        )


def _hear_new_cache_name(bridge: Any) -> None:
    """Let TransformerLens' attention see the KV cache, which transformers 5.24 and newer call `cache`."""
    new, old = CACHE_NAMES

    def rename(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get(old) is None and new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return args, kwargs

    for block in bridge.blocks:
        if hasattr(block, "attn"):
            block.attn.register_forward_pre_hook(rename, with_kwargs=True)


def _stand_in_tokenizer() -> Any:
    """A tokenizer to boot with: TransformerLens rebuilds the one it gets with a BOS in front, from the hub."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="a")


def build_hooked(hf_model: Any, tokenizer: Any, name: str) -> HookedModel:
    """Copy a transformers or PEFT model into a HookedTransformer, weights unprocessed (no folding, no centring).

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
    devices = {x.device for x in hf_model.parameters()}
    if len(devices) > 1:
        raise LensError(
            f"the weights are on {len(devices)} devices ({', '.join(sorted(map(str, devices)))}), and a "
            "HookedTransformer is on one: use backend='bridge'"
        )
    source = text_part(merged_copy(hf_model) if is_peft_model(hf_model) else structural_copy(hf_model))
    _refuse_multimodal(source)
    _refuse_wrong_layouts(source.config)
    parameter = next(source.parameters())
    try:
        cfg, state = _hooked_config_and_weights(source, parameter.dtype, str(parameter.device))
        cfg.tokenizer_name = None
        model = HookedTransformer(cfg, tokenizer=None, move_to_device=True)
        model.load_and_process_state_dict(
            state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
            refactor_factored_attn_matrices=False,
        )  # fmt: skip
    except Exception as error:  # TransformerLens raises many types on layouts that it does not know
        raise LensError(
            f"HookedTransformer does not support {type(source).__name__} ({_first_line(error)}): use backend='bridge'"
        ) from error
    torch.nn.Module.to(model, parameter.dtype)  # HookedTransformer's own .to prints
    model.tokenizer = tokenizer
    model.eval()
    watch(model, hf_model, shares=False)
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
        cfg = loading.get_pretrained_model_config(
            folder, device=device, dtype=dtype, n_ctx=n_ctx, default_prepend_bos=False
        )
        state = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
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
