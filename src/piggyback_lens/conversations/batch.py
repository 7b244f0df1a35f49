"""Prompts of unequal length as padded tensors, with masks and positions made explicit."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.errors import LensError

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded rows of token ids, with what a pass needs to know of them.

    Attributes:
        ids: token ids, some id at pads.
        attention_mask: 1 at tokens, 0 at pads.
    """

    ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]

    @cached_property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """The unpadded position that each column holds; -1 at pads."""
        return (self.attention_mask.cumsum(dim=1) - 1).masked_fill(self.attention_mask == 0, -1)

    @cached_property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """0, 1, 2 ... along each row's tokens; 0 at pads."""
        return self.positions.clamp(min=0)


@dataclass(frozen=True, eq=False)
class PromptBatch(Batch):
    """Padded prompts. Spans stay in unpadded coordinates; `positions` translates.

    Attributes:
        prompts: the rows.
        side: where the pads are.
    """

    prompts: tuple[RenderedPrompt, ...]
    side: PaddingSide

    def __len__(self) -> int:
        return len(self.prompts)

    def span_mask(self, name: str) -> Bool[Tensor, "batch pos"]:
        """True where a column holds a token of the named span. Raises LensError as `RenderedPrompt.span`."""
        spans = [prompt.span(name) for prompt in self.prompts]
        start = torch.tensor([[span.start] for span in spans], device=self.positions.device)
        stop = torch.tensor([[span.stop] for span in spans], device=self.positions.device)
        return (self.positions >= start) & (self.positions < stop)


def batch_prompts(
    prompts: Sequence[RenderedPrompt],
    side: PaddingSide = "left",
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> PromptBatch:
    """Pad prompts to a common length, with their masks.

    Raises:
        LensError: no prompts, or an unknown side.
    """
    prompts = tuple(prompts)
    if not prompts:
        raise LensError("got no prompts to batch; pass at least one RenderedPrompt")
    if side not in ("left", "right"):
        raise LensError(f"side={side!r}; expected 'left' or 'right'")
    rows = padded([prompt.ids for prompt in prompts], side, pad_id)
    return PromptBatch(rows.ids.to(device), rows.attention_mask.to(device), prompts, side)


def as_prompts(prompts: Sequence[RenderedPrompt]) -> list[RenderedPrompt]:
    """The prompts as a list, of which each is rendered.

    Raises:
        LensError: none, one that stands alone, or text; it says what to write instead.
    """
    if isinstance(prompts, (RenderedPrompt, str)) or not isinstance(prompts, Iterable):
        raise LensError(
            f"got {type(prompts).__name__} where a list of rendered prompts belongs: render with "
            "ChatFormat(tokenizer).render(query) and give [prompt]"
        )
    checked = list(prompts)
    if not checked:
        raise LensError("got no prompts; pass at least one RenderedPrompt")
    for number, prompt in enumerate(checked):
        if not isinstance(prompt, RenderedPrompt):
            raise LensError(
                f"prompt {number} is {type(prompt).__name__}, expected a rendered prompt: "
                "ChatFormat(tokenizer).render(query)"
            )
    return checked


def repeated(prompts: Iterable[RenderedPrompt], samples: int) -> list[RenderedPrompt]:
    """Every prompt once for each answer that is wanted, numbered.

    Args:
        prompts: rendered; those that are numbered already stay as they are.
        samples: answers to each; 0 for as many as its question asks for.
    """
    given = list(prompts)
    if any(prompt.sample for prompt in given):
        return given
    asked = [(p.question.samples or 1) if samples == 0 and p.question else max(samples, 1) for p in given]
    return [
        dataclasses.replace(prompt, sample=number)
        for prompt, count in zip(given, asked, strict=True)
        for number in range(count)
    ]


def questions_of(prompts: Iterable[RenderedPrompt]) -> list[str]:
    """The question of every prompt, as statistics take them: its id; equal prompts without one are one question."""
    met: dict[tuple[int, ...], str] = {}
    return [
        met.setdefault(prompt.ids, f"prompt {len(met) + 1}") if prompt.question is None else prompt.question.id
        for prompt in prompts
    ]


def check_prompts(
    prompts: Sequence[RenderedPrompt], d_vocab: int, n_positions: int | None, *, more: int = 0
) -> list[RenderedPrompt]:
    """Refuse what is no list of prompts, or what a model cannot run.

    Args:
        prompts: what was given.
        d_vocab: number of ids that the model knows.
        n_positions: tokens that it takes in a row, if it says.
        more: tokens that will follow.

    Raises:
        LensError: it says what to write instead.
    """
    checked = as_prompts(prompts)
    for number, prompt in enumerate(checked):
        if max(prompt.ids) >= d_vocab:
            raise LensError(
                f"prompt {number} holds token {max(prompt.ids)} and the model knows 0 to {d_vocab - 1}: render it with "
                "the model's own tokenizer"
            )
        if n_positions is not None and len(prompt.ids) + more > n_positions:
            wanted = f"{len(prompt.ids)} tokens" + (f" and an answer of {more}" if more else "")
            raise LensError(f"prompt {number} has {wanted}, and the model takes {n_positions}: shorten one of them")
    return checked


def ids_hash(prompts: Sequence[RenderedPrompt]) -> str:
    """16 hex digits of the sha256 of the prompts' ids, in order."""
    return hashlib.sha256(repr([prompt.ids for prompt in prompts]).encode()).hexdigest()[:16]


def common_prefix_length(prompts: Sequence[RenderedPrompt]) -> int:
    """Number of leading tokens that are prefix in every prompt and the same in all of them.

    A template whose prefix border lies inside a token gives some prompts a shorter prefix, and conversations
    of several turns count their history as prefix; a batch shares what is common. The last prompt token
    is never shared, since it predicts the response.
    """
    stops = [prompt.spans["prefix"].stop if "prefix" in prompt.spans else 0 for prompt in prompts]
    limit = min(min(stop, prompt.n_prompt - 1) for stop, prompt in zip(stops, prompts, strict=True))
    first = prompts[0].ids
    for position in range(limit):
        if any(prompt.ids[position] != first[position] for prompt in prompts):
            return position
    return limit


def padded(rows: Sequence[Sequence[int]], side: PaddingSide = "right", pad_id: int = 0, multiple: int = 1) -> Batch:
    """Rows of token ids, padded to a common length, which is a multiple of a number."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        columns = slice(width - len(tokens), None) if side == "left" else slice(0, len(tokens))
        ids[row, columns], mask[row, columns] = torch.tensor(tokens, dtype=torch.long), 1
    return Batch(ids, mask)
