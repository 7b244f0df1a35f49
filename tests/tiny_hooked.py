"""Hooked tiny models, built once per test run, and passes through them written without the library's hooks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import tiny_chat
import tiny_models
import torch

from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.interventions.running import applied
from piggyback_lens.models.booting import boot_bridge, build_hooked
from piggyback_lens.models.network import forward

BACKENDS = ("bridge", "hooked") if int(version("transformer-lens").split(".")[0]) < 4 else ("bridge",)
"""Those that the installed TransformerLens has."""
needs_hooked = pytest.mark.skipif("hooked" not in BACKENDS, reason="transformer-lens 4 has no HookedTransformer")
CASES = [
    (name, backend)
    for name in tiny_models.NAMES
    for backend in BACKENDS
    if (name, backend) != ("llama-bias", "hooked")  # refused: HookedTransformer drops the biases
]
FEW = [(name, backend) for name in ("llama-gqa", "gemma3", "gpt2") for backend in BACKENDS]
QUERIES = ["one", "two words here", "a much longer question than the others, so rows differ"]


@cache
def hooked(name: str, backend: str, seed: int = 0) -> Any:
    """A hooked tiny model; the same seed gives the same weights on both backends."""
    make = boot_bridge if backend == "bridge" else build_hooked
    return make(tiny_models.build(name, seed, vocab=tiny_chat.VOCAB), chat().tokenizer, name)


@cache
def chat() -> ChatFormat:
    return tiny_chat.tiny_format()


def prompts(queries: Sequence[str] = QUERIES) -> list[RenderedPrompt]:
    return [chat().render(query) for query in queries]


def columns(batch: Any, row: int, span: str) -> list[int]:
    """Columns of a span in a padded batch, counted by hand."""
    prompt = batch.prompts[row]
    padding = batch.ids.shape[1] - len(prompt.ids) if batch.side == "left" else 0
    ranges = {name: (s.start, s.stop) for name, s in prompt.spans.items()}
    ranges |= {"all": (0, len(prompt.ids)), "prompt": (0, prompt.n_prompt)}
    start, stop = ranges[span]
    return list(range(start + padding, stop + padding))


@torch.no_grad()
def logits_of(model: Any, batch: Any, interventions: Any = None, fwd_hooks: Sequence[Any] = ()) -> Any:
    """Logits under interventions, under plain TransformerLens hooks, or both; and the record."""
    with model.hooks(fwd_hooks=list(fwd_hooks)), applied(model, batch, interventions) as record:
        logits = forward(model, batch.ids, batch.attention_mask)
    return logits, record


def real(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """The logits of the tokens, padding left out."""
    return torch.cat([row[mask.bool()] for row, mask in zip(logits, batch.attention_mask, strict=True)])


def hook_count(model: Any) -> int:
    """Hook functions on all hook points, by TransformerLens' count and by torch's."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return sum(len(p.fwd_hooks) + len(p.bwd_hooks) + len(p._forward_hooks) + len(p._backward_hooks) for p in points)


@contextmanager
def no_hook_left(model: Any) -> Iterator[None]:
    before = hook_count(model)
    yield
    assert hook_count(model) == before
