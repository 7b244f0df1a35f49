"""Adapters of every kind on tiny models: what PEFT computes with them is the oracle."""

from collections.abc import Callable
from typing import Any

import peft
import tiny_models
import torch

VOCAB = 38
Lora = peft.LoraConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

KINDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "LoRA, attention": ("llama-gqa", lambda: Lora(r=2, target_modules=["q_proj", "v_proj"])),
    "LoRA, all linear": ("llama-gqa", lambda: Lora(r=2, target_modules="all-linear")),
    "LoRA, regular expression": ("llama-gqa", lambda: Lora(r=2, target_modules=r".*layers\.[12]\.mlp\.down_proj")),
    "LoRA, some layers": ("llama-gqa", lambda: Lora(r=2, target_modules=LINEAR, layers_to_transform=[1])),
    "LoRA, rank and alpha patterns": (
        "llama-gqa",
        lambda: Lora(r=2, target_modules=LINEAR, rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 16}),
    ),
    "LoRA with bias=all": ("llama-bias", lambda: Lora(r=2, target_modules=LINEAR, bias="all")),
    "LoRA with bias=lora_only": ("llama-bias", lambda: Lora(r=2, target_modules=["q_proj"], bias="lora_only")),
    "LoRA with bias=all, qwen2": ("qwen2", lambda: Lora(r=2, target_modules=LINEAR, bias="all")),
    "LoRA with bias=all, gpt2": (
        "gpt2",
        lambda: Lora(r=2, target_modules=["c_attn", "c_proj"], bias="all", fan_in_fan_out=True),
    ),
    "rsLoRA": ("llama-gqa", lambda: Lora(r=4, target_modules=LINEAR, use_rslora=True)),
    "DoRA": ("llama-gqa", lambda: Lora(r=2, target_modules=LINEAR, use_dora=True)),
    "LoRA on the embeddings": ("llama-mha", lambda: Lora(r=2, target_modules=["q_proj", "embed_tokens"])),
    "LoRA on an untied head": ("llama-mha", lambda: Lora(r=2, target_modules=["q_proj", "lm_head"])),
    "LoRA, embeddings saved whole": (
        "llama-mha",
        lambda: Lora(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "LoRA, tied embeddings saved whole": (
        "llama-gqa",
        lambda: Lora(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "LoRA, a norm saved whole": (
        "llama-gqa",
        lambda: Lora(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    ),
    "LoRA with trained tokens": (
        "llama-mha",
        lambda: Lora(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4, 5]),
    ),
    "LoRA with trained tokens, tied": (
        "llama-gqa",
        lambda: Lora(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4, 5]),
    ),
    "LoRA on fused q, k, v (gpt2)": ("gpt2", lambda: Lora(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
    "LoRA on fused q, k, v (phi3)": ("phi3", lambda: Lora(r=2, target_modules=["qkv_proj"])),
    "LoRA on fused gate and up (phi3)": ("phi3", lambda: Lora(r=2, target_modules=["gate_up_proj"])),
    "LoRA on fused q, k, v (gpt-neox)": ("gpt-neox", lambda: Lora(r=2, target_modules=["query_key_value"])),
    "IA3": (
        "llama-gqa",
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "LoHa": ("llama-gqa", lambda: peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"])),
    "LoKr": ("llama-gqa", lambda: peft.LoKrConfig(r=2, target_modules=["q_proj", "v_proj"])),
    "OFT": ("llama-gqa", lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"])),
    "VeRA": ("llama-mha", lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"])),
    "LayerNorm tuning": ("llama-gqa", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "trained tokens alone": ("llama-mha", lambda: peft.TrainableTokensConfig(token_indices=[3, 4, 5])),
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PREFIX_TUNING: it puts learnt tokens in front of every prompt",
    ),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PROMPT_TUNING: it puts learnt tokens in front of every prompt",
    ),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "P_TUNING: it puts learnt tokens in front of every prompt",
    ),
    "activated LoRA": (
        lambda: Lora(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[4, 5]),
        r"is an activated LoRA \(alora_invocation_tokens \[4, 5\]\)",
    ),
}


def put_on(model: Any, config: Any, seed: int = 3) -> Any:
    """A PEFT model whose trainable parameters are all moved by noise, so that the adapter does something everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws its first weights from the global generator
        wrapped = peft.get_peft_model(model, config).eval()
    move(wrapped, seed)
    return wrapped


@torch.no_grad()
def move(wrapped: Any, seed: int = 3, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def build(kind: str) -> tuple[Any, Any]:
    """A base without adapter, and the same base under an adapter of this kind."""
    layout, config = KINDS[kind]
    return tiny_models.build(layout, 0, vocab=VOCAB), put_on(tiny_models.build(layout, 0, vocab=VOCAB), config())
