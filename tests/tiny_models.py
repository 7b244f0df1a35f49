"""Tiny random causal language models, one per layout; weights are large enough that attention matters."""

from typing import Any

import torch

NAMES = ("llama-mha", "llama-gqa", "llama-bias", "qwen2", "qwen3", "gemma3", "mistral", "gpt2")
MORE = (
    "phi3", "gemma2", "olmo2", "qwen3-moe", "mixtral", "gpt-oss", "granite", "smollm3", "gpt-neox", "phi", "stablelm",
    "gemma3-vision",
)  # fmt: skip
"""Layouts that have the exactness tests, and the proof at load, but not every other test."""
NOT_HOOKED = ("llama-bias", "gemma2", "olmo2", "qwen3-moe", "granite", "smollm3", "phi", "stablelm")
"""Layouts that HookedTransformer does not have, or gets wrong."""

WINDOW = 6  # sliding window of gemma3 and mistral, shorter than any chat prefix


def build(name: str, seed: int = 0, vocab: int = 64, attn_implementation: str = "eager", **changes: Any) -> Any:
    """A model of this layout in eval mode. The global random state is left as it was."""
    if name == "gemma3-vision":
        return _gemma3_with_vision(seed, vocab, attn_implementation)
    config_class, model_class, settings = _recipe(name)
    settings = settings | changes
    return perturbed(
        model_class, config_class(vocab_size=vocab, attn_implementation=attn_implementation, **settings), seed
    )


def perturbed(model_class: Any, config: Any, seed: int) -> Any:
    """A model of a configuration, with weights that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        _perturb(model)
    return model


def _gemma3_with_vision(seed: int, vocab: int, attn_implementation: str) -> Any:
    """Gemma 3 as its larger checkpoints are: a text model beside an image tower."""
    import transformers as tf

    config_class, _, settings = _recipe("gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Gemma3Config(
        text_config=config_class(vocab_size=vocab, **settings).to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=vocab - 1,
        boi_token_index=vocab - 3,
        eoi_token_index=vocab - 2,
        attn_implementation=attn_implementation,
    )
    return perturbed(tf.Gemma3ForConditionalGeneration, config, seed)


def _recipe(name: str) -> tuple[Any, Any, dict[str, Any]]:
    import transformers as tf

    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    llama = (tf.LlamaConfig, tf.LlamaForCausalLM)
    recipes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama-mha": (*llama, common | {"num_key_value_heads": 4}),
        "llama-gqa": (*llama, common | {"tie_word_embeddings": True}),
        "llama-bias": (*llama, common | {"attention_bias": True, "mlp_bias": True}),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, common),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, common | {"head_dim": 8}),
        "gemma3": (
            tf.Gemma3TextConfig,
            tf.Gemma3ForCausalLM,
            common
            | {
                "head_dim": 8,
                "num_hidden_layers": 4,
                "sliding_window": WINDOW,
                "layer_types": [
                    "sliding_attention",
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                ],
                "query_pre_attn_scalar": 8,
                "tie_word_embeddings": True,
            },
        ),
        "mistral": (
            tf.MistralConfig,
            tf.MistralForCausalLM,
            common | {"head_dim": 8, "sliding_window": WINDOW},
        ),
        "gpt2": (
            tf.GPT2Config,
            tf.GPT2LMHeadModel,
            {
                "n_embd": 32,
                "n_layer": 3,
                "n_head": 4,
                "n_positions": 256,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
        ),
    }
    small = {name: value for name, value in common.items() if name != "num_key_value_heads"}
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4}
    recipes |= {
        "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, common),
        "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, common | {"head_dim": 8, "sliding_window": WINDOW}),
        "olmo2": (tf.Olmo2Config, tf.Olmo2ForCausalLM, common),
        "qwen3-moe": (
            tf.Qwen3MoeConfig,
            tf.Qwen3MoeForCausalLM,
            common | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        ),
        "mixtral": (tf.MixtralConfig, tf.MixtralForCausalLM, common | experts),
        "gpt-oss": (
            tf.GptOssConfig,
            tf.GptOssForCausalLM,
            common | experts | {"head_dim": 8, "sliding_window": WINDOW},
        ),
        "granite": (tf.GraniteConfig, tf.GraniteForCausalLM, common | {"attention_multiplier": 0.3}),
        "smollm3": (tf.SmolLM3Config, tf.SmolLM3ForCausalLM, common | {"no_rope_layers": [1, 0, 1]}),
        "gpt-neox": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, small),
        "phi": (tf.PhiConfig, tf.PhiForCausalLM, common | {"partial_rotary_factor": 0.5}),
        "stablelm": (tf.StableLmConfig, tf.StableLmForCausalLM, common | {"partial_rotary_factor": 0.5}),
    }
    return recipes[name]


@torch.no_grad()
def _perturb(model: Any) -> None:
    """Replace the near-zero initialisation; biases and norm weights must not be trivial either."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif "emb" in name or "wte" in name or "wpe" in name or "lm_head" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.25)
