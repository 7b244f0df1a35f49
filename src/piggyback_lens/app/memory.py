"""What a model takes of memory, from its config alone: weights, keys and values, a pass of a map, training an adapter.

The model is built on the meta device, where tensors have sizes and no numbers, so its parameters and what a training
step keeps for its backward pass are counted, not estimated by layout. What allocators, kernels and libraries take
beside is not in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piggyback_lens.app.options import Work
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.cells import row_bytes
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.models.backends import Shape, blocks_of, free_bytes
from piggyback_lens.models.network import forward, output_embeddings
from piggyback_lens.settings import LoRASettings

BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes of a weight of a block's matrix. bitsandbytes' 4 bits have one float32 scale for every 64 weights beside them;
what it leaves alone (embeddings, norms, the head) stays in bfloat16."""
TRAINED = 16
"""Bytes of a trained number: float32 weight and gradient, and two moments of Adam."""
ANSWER = 24
"""Answer tokens of a map's rows, as of the models' own answers."""


@dataclass(frozen=True)
class Sizes:
    """What a config says.

    Attributes:
        parameters: of the model; tied ones count once.
        matrices: of them, those in matrices of the decoder blocks, which a quantisation makes smaller.
        adapter: numbers of the LoRA adapter.
        shape: sizes of the activations.
        kept: bytes of a float32 training step that wait for its backward pass; None where the model cannot be run so.
    """

    parameters: int
    matrices: int
    adapter: int
    shape: Shape
    kept: int | None

    @classmethod
    def of(cls, config: Any, work: Work) -> "Sizes":
        """Build the model without memory.

        Raises:
            LensError: no causal language model of transformers.
        """
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:
            raise LensError(f"no model can be built from this config ({error})") from error
        parameters = sum(weight.numel() for weight in model.parameters())
        matrices = sum(weight.numel() for weight in blocks_of(model).parameters() if weight.ndim > 1)
        shape = _shape(config.get_text_config(), int(output_embeddings(model).weight.shape[0]))
        with torch.device("meta"):
            adapted = add_lora(model, LoRASettings(rank=work.rank))
        trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        return cls(parameters, matrices, trained, shape, _kept(adapted, work.batch_size, work.row_tokens))

    def weights(self, kind: str) -> float:
        """Bytes of the weights, by dtype or quantisation."""
        rest = BYTES["bfloat16"] if kind in ("8bit", "4bit") else BYTES[kind]
        return self.matrices * BYTES[kind] + (self.parameters - self.matrices) * rest

    @property
    def per_token(self) -> int:
        """Numbers of the keys and values of one token."""
        return 2 * self.shape.n_layers * self.shape.n_kv_heads * self.shape.d_head


def _shape(text: Any, vocab: int) -> Shape:
    heads = text.num_attention_heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(text.num_hidden_layers, text.hidden_size, heads, kv, width, vocab, rotary=True)


def _kept(model: nn.Module, rows: int, tokens: int) -> int | None:
    """Bytes that a step keeps for its backward pass: every tensor once, without the weights."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    found: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage.nbytes(), tensor  # held, so that no other gets its place
        return tensor

    ids = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
    seen = torch.ones((1, 1, tokens, tokens), dtype=torch.bool, device="meta")  # a plain one would be looked into
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = forward(model, ids, torch.ones_like(ids), seen=seen)
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    except Exception:  # layouts that look at numbers on the way
        return None
    return sum(size for size, _ in found.values())


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device now: of a GPU, else of the machine."""
    if device.type == "cuda":
        return free_bytes(device)
    lines = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    available = [line.split()[1] for line in lines.splitlines() if line.startswith("MemAvailable")]
    return 1024.0 * int(available[0]) if available else float("nan")


def plan(sizes: Sizes, work: Work, free: float, copies: int) -> Iterator[tuple[str, str]]:
    """What fits, by dtype: name and arithmetic of each line.

    Args:
        sizes: of the model.
        work: what is to be done.
        free: bytes of the device.
        copies: of the weights: 2 for a pair of whole models.
    """
    shape, rows, tokens = sizes.shape, work.batch_size, work.row_tokens
    layers = f"2 x {shape.n_layers} layers x {shape.n_kv_heads} heads x {shape.d_head}"
    yield "parameters", f"{sizes.parameters:,}, of which {sizes.matrices:,} in matrices of blocks"
    yield "keys and values", f"{layers} = {sizes.per_token:,} numbers a token"
    for kind, size in BYTES.items():
        weights, item = copies * sizes.weights(kind), 4 if kind == "float32" else 2
        twice = "" if copies == 1 else f"{copies} x "
        told = f"{sizes.parameters:,} x {item} B"
        if kind in ("8bit", "4bit"):
            rest = sizes.parameters - sizes.matrices
            told = f"({sizes.matrices:,} x {size:g} B + {rest:,} x 2 B)"
        yield f"{kind} weights", f"{twice}{told} = {_gb(weights)}{_fits(weights, free)}"
        cache = rows * tokens * sizes.per_token * item
        told = f"+ {rows} rows x {tokens} tokens x {sizes.per_token:,} x {item} B = {_gb(cache)} keys and values"
        yield "  answers", f"{told}: {_gb(weights + cache)}{_fits(weights + cache, free)}"
        one = row_bytes(shape, item, tokens, min(ANSWER, tokens))
        fitting = max(0, int((free - weights) / one))
        needed = "" if fitting > 1 else " (it needs 2)"
        yield "  a map", f"+ {_gb(one)} a row of {tokens} tokens: {fitting:,} rows of a pass fit{needed}"
        yield "  training", _training(sizes, work, sizes.weights(kind), item, free)


def _training(sizes: Sizes, work: Work, weights: float, item: int, free: float) -> str:
    """Adam on an adapter above frozen weights."""
    adapter, batch = TRAINED * sizes.adapter, work.batch_size * work.row_tokens
    told = f"+ rank {work.rank}: {sizes.adapter:,} x {TRAINED} B = {_gb(adapter)}"
    if sizes.kept is None:
        return f"{told} + activations (this layout cannot be counted)"
    # The gradient of the logits comes on top when the loss is gone through backwards.
    logits = batch * sizes.shape.d_vocab * 4
    kept = sizes.kept * item / 4 + logits
    # Recomputed block by block: the input of each, and all of one.
    again = batch * sizes.shape.d_model * item * sizes.shape.n_layers + sizes.kept * item / 4 / sizes.shape.n_layers
    again += 2 * logits
    whole, less = weights + adapter + kept, weights + adapter + again
    return (
        f"{told} + activations of {batch:,} tokens {_gb(kept)}: {_gb(whole)}{_fits(whole, free)}; with checkpointing "
        f"{_gb(again)}: {_gb(less)}{_fits(less, free)}"
    )


def _gb(size: int | float) -> str:
    return f"{size / 1e9:.3g} GB"


def _fits(size: int | float, free: float) -> str:
    return ", fits" if size <= free else ", does not fit"
