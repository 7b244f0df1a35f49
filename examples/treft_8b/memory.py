"""What a configuration needs of a GPU's memory, by arithmetic: every shape is that of the model, nothing is loaded.

    python memory.py config.toml [section.key=value ...]

Weights, gradients and averages are counted by parameter. Activations are counted by a pass on torch's meta device,
which has shapes and no numbers: what autograd keeps of one block and of the logits, with attention that keeps what a
fused kernel does. GB are 1e9 bytes. Left out: the CUDA context and fragmentation (1 to 2 GB), and TReFT's own (a prefix
of thirty tokens).
"""

import sys
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.masking_utils import AttentionMaskInterface

from piggyback_lens import LoRASettings, add_lora

sys.path.insert(0, str(Path(__file__).parent))
from train import read_config

SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    ),
    "Qwen/Qwen2.5-14B-Instruct": Qwen2Config(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
        vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Of the bases of the two configurations, as their config.json says."""
NF4 = 0.5 + 4 / 64
"""Bytes of a weight in 4 bit: half a one, and a float32 scale for 64 of them."""
AVERAGES = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_8bit": 2 + 8 / 256, "adamw_8bit": 2 + 8 / 256}
"""Bytes of AdamW's two averages of a number; in 8 bit with a float32 scale for 256 of them."""


class Fused(torch.autograd.Function):
    """Attention of which only what a fused kernel keeps is true: queries, keys, values and what it gives."""

    @staticmethod
    def forward(own, queries, keys, values):
        out = torch.empty_like(queries)
        own.save_for_backward(queries, keys, values, out)
        return out

    @staticmethod
    def backward(own, _):
        raise NotImplementedError


AttentionInterface.register("fused", lambda _, q, k, v, *a, **kw: (Fused.apply(q, k, v).transpose(1, 2), None))
AttentionMaskInterface.register("fused", lambda *a, **kw: None)


def adapted(config, lora, layers):
    """The model with so many layers and its adapter, on the meta device."""
    config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="fused")
        return add_lora(model, lora)


def parameters(model):
    """Numbers in the linear weights of the blocks, in all other weights, and in the adapter."""
    own = {"blocks": 0, "others": 0, "adapter": 0}
    for name, value in model.named_parameters():
        in_block = ".layers." in name and value.ndim == 2
        own["adapter" if "lora_" in name else "blocks" if in_block else "others"] += value.numel()
    return own


def kept(model, rows, tokens):
    """Bytes that autograd keeps of a pass, weights left out."""
    weights = {id(value) for value in model.parameters()}
    found = {}

    def pack(value):
        base = value._base if value._base is not None else value
        if id(base) not in weights:
            found[id(base)] = (base, base.numel() * base.element_size())
        return value

    ids = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        # Under autocast the adapter runs in half precision too. A mask that nobody reads stops a look at the positions.
        mask = torch.ones((rows, 1, 1, tokens), dtype=torch.bool, device="meta")
        model.bfloat16()(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    return sum(size for _, size in found.values())


def table(config):
    """(what, GB) of a configuration."""
    shape, training = SHAPES[config["model"]["base"]], config["training"]
    lora = LoRASettings(**config["lora"])
    rows, tokens = training["per_device_train_batch_size"], config["data"]["max_tokens"]
    one, two = (adapted(shape, lora, layers) for layers in (1, 2))
    first, both = parameters(one), parameters(two)
    numbers = {name: first[name] + (both[name] - first[name]) * (shape.num_hidden_layers - 1) for name in first}
    block = NF4 if config["model"].get("quantization") == "4bit" else 2
    few, more = kept(one, rows, tokens), kept(two, rows, tokens)
    residual = rows * tokens * shape.hidden_size * 2
    if training.get("activation_checkpointing"):
        inside = [
            ("inputs of all blocks, kept", residual * shape.num_hidden_layers),
            ("one block, run again", more - few),
        ]
    else:
        inside = [("all blocks", (more - few) * shape.num_hidden_layers)]
    return [
        (f"weights of the blocks, {numbers['blocks'] / 1e9:.2f} e9", numbers["blocks"] * block),
        (f"other weights, {numbers['others'] / 1e9:.2f} e9, bfloat16", numbers["others"] * 2),
        (f"adapter and its gradient, {numbers['adapter'] / 1e6:.0f} e6, float32", numbers["adapter"] * 8),
        (f"optimiser, {training['optim']}", numbers["adapter"] * AVERAGES[training["optim"]]),
        *inside,
        ("logits and loss, with their gradient", 2 * (few - (more - few))),
    ]


def main(path, *changes):
    config = read_config(path, changes)
    found = table(config)
    rows = f"{config['training']['per_device_train_batch_size']} x {config['data']['max_tokens']}"
    print(f"| {config['model']['base']}, {rows} tokens | GB |\n|---|---:|")
    for what, size in [*found, ("together", sum(size for _, size in found))]:
        print(f"| {what} | {size / 1e9:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
