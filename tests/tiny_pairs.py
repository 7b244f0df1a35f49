"""Pairs of tiny models (a base and a finetune of it), with prompts and answers, for tests of experiments."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import tiny_chat
import tiny_models
import torch
from tiny_hooked import chat, prompts

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.models.booting import boot_bridge, build_hooked
from piggyback_lens.models.pair import ModelPair

THREE = ("one", "two words", "a longer question?")
LEVEL = ("abc", "you", "dog")  # equally long
ANSWERS = (("yes", "never mind"), ("a word, no", "ok"), ("fine", "i see it"), ("no", "go on"), ("x", "what?"))


def weights(name: str, side: str, step: float = 0.08, blocks_only: bool = False) -> Any:
    """The transformers model of one side: the finetuned one has its parameters moved by `step` times noise.

    All of them, or with `blocks_only` the matrices within the blocks, as an adapter does.
    """
    model = tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)
    if side == "finetuned":
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                inside = parameter.ndim == 2 and ("layers" in key or ".h." in key)
                if blocks_only and not inside:
                    continue
                parameter.add_(torch.randn(parameter.shape, generator=generator) * step)
    return model


@cache
def pair(name: str = "llama-gqa", backend: str = "bridge", step: float = 0.08, blocks_only: bool = False) -> ModelPair:
    make = boot_bridge if backend == "bridge" else build_hooked
    base, tuned = (
        make(weights(name, side, step, blocks_only), chat().tokenizer, name) for side in ("base", "finetuned")
    )
    return ModelPair(base, tuned, tokenizer=chat().tokenizer, names=("tiny", f"tiny-{step}"))


def finetuned_blocks(name: str, backend: str) -> ModelPair:
    """A pair whose embeddings, norms and unembedding are equal."""
    return pair(name, backend, blocks_only=True)


def mirrored(of: ModelPair) -> ModelPair:
    """The pair with its sides exchanged."""
    with of.using("base") as base, of.using("finetuned") as tuned:
        return ModelPair(tuned, base, tokenizer=of.tokenizer, names=(of.names["finetuned"], of.names["base"]))


def contrast(some: Sequence[RenderedPrompt] | None = None, *, short: bool = False) -> AnswerContrast:
    """Made-up answers of different lengths to some prompts, one of them a single token; all if they are `short`."""
    some = prompts(THREE) if some is None else some

    def answered(i: int, side: int) -> RenderedPrompt:
        text = ANSWERS[i][side]
        single = short or (i, side) == (len(some) - 1, 1)
        return some[i].with_response(text[:1], end=False) if single else some[i].with_response(text)

    towards, against = (tuple(answered(i, side) for i in range(len(some))) for side in (0, 1))
    return AnswerContrast(towards, against)
