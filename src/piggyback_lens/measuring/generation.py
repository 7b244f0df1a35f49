"""Batched generation under interventions and from prefix caches, the same on both backends.

The prompts' common prefix is computed once and its keys and values are shared by all rows; the rest of
each prompt is one right-padded pass; finished rows leave the batch. Interventions are told the absolute
position of every token, so a hook acts on the same tokens as in a pass without a KV cache.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import AnyIntervention, Intervention, as_parts
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.interventions.prefix import PrefixCache, similar_batches, starting_prefix
from piggyback_lens.interventions.running import Record, applied
from piggyback_lens.models.backends import HookedModel, device_of, facts_of, shape_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.states import KVState, new_state
from piggyback_lens.progress import track


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        prompt: what was asked.
        ids: generated token ids, the stop token included if there was one.
        text: the answer, special tokens left out.
        ended: "stop" if a stop token came, "length" if max_new_tokens was reached.
        seed: of this row's samples; None when greedy.
    """

    prompt: RenderedPrompt
    ids: tuple[int, ...]
    text: str
    ended: Literal["stop", "length"]
    seed: int | None = None

    def completed(self) -> RenderedPrompt:
        """The prompt with this answer as its response, for teacher-forced measures."""
        return self.prompt.with_response(self.ids, end=False)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this.
        top_k: at most so many tokens; None for no limit.
        seed: together with the prompt's ids it seeds each row, so batching does not change the samples.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        usable = 0 <= self.temperature < math.inf and 0 < self.top_p <= 1
        if not usable or (self.top_k is not None and self.top_k < 1):
            raise LensError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: expected temperature >= 0, "
                "0 < top_p <= 1 and top_k >= 1 or None"
            )


def generate(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    *,
    interventions: AnyIntervention = None,
    prefix_cache: PrefixCache | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 16,
    record: Record | None = None,
    progress: bool | str = False,
    on_batch: Callable[[list[int], list[Generation]], None] | None = None,
    share_prefix: bool = True,
) -> list[Generation]:
    """Answer every prompt.

    Args:
        model: either backend (of a pair: inside `with pair.using(side)`).
        prompts: rendered, without a response.
        interventions: act on prompt and generated tokens as their span and phase say.
        prefix_cache: keys and values to use for the prefix, instead of computing it.
        max_new_tokens: per answer.
        sampling: greedy if None.
        stop_ids: default those of the chat template.
        batch_size: rows per batch; neither greedy nor sampled answers depend on it (to float tolerance).
        record: collects receipts and cached activations.
        progress: show a progress bar; a string is its label.
        on_batch: called with the prompt indices and the answers of each finished batch, e.g. to write them out.
        share_prefix: compute the common prefix once; False runs whole prompts (slower, same numbers).

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        LensError: no prompts, prompts that hold a response, a cache that does not fit, an intervention
            that touched nothing.
    """
    facts_of(model)  # refuses what is no hooked model before work begins
    prompts = list(prompts)
    if not prompts or max_new_tokens < 1 or batch_size < 1:
        raise LensError(
            f"{len(prompts)} prompts, max_new_tokens {max_new_tokens}, batch_size {batch_size}: each must be at least 1"
        )
    if any("response" in prompt.spans for prompt in prompts):
        raise LensError("a prompt holds a response already: generate from prompts without one")
    parts, record = as_parts(interventions), record or Record()
    if prefix_cache is not None:
        prefix_cache.check(model, prompts)
    settings = sampling or Sampling()
    answers: list[Generation | None] = [None] * len(prompts)
    batches = list(similar_batches(prompts, batch_size))
    for rows in track(batches, "generating" if progress is True else progress or None, sizes=[len(b) for b in batches]):
        chosen = [prompts[row] for row in rows]
        start = starting_prefix(model, chosen, parts, prefix_cache, record, share_prefix)
        place = Placement.of(batch_prompts(chosen, side="right"), rows, len(prompts))
        done = _generate_batch(model, chosen, parts, start, place, record, settings, max_new_tokens, stop_ids)
        for row, answer in zip(rows, done, strict=True):
            answers[row] = answer
        if on_batch:
            on_batch(rows, done)
    record.check()
    return [answer for answer in answers if answer is not None]


@torch.no_grad()
def _generate_batch(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    parts: Sequence[Intervention],
    start: PrefixCache | None,
    placement: Placement,
    record: Record,
    settings: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None,
) -> list[Generation]:
    state = new_state(model, len(prompts)) if start is None else start.state(model, len(prompts))
    past = state.length
    device = device_of(model)
    batch = batch_prompts(prompts, side="right")
    ids, mask = batch.ids[:, past:].to(device), batch.attention_mask[:, past:].to(device)
    placement.ready = past
    placement.move(batch.positions[:, past:], batch.positions)
    stops = [frozenset(prompt.answer.stop_ids if stop_ids is None else stop_ids) for prompt in prompts]
    choose = _Chooser(prompts, settings, shape_of(model).d_vocab)
    tokens: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    with applied(model, placement, parts, record=record, must_touch=False):
        last = mask.sum(dim=1, keepdim=True) - 1
        logits = forward(model, ids, mask, state=state, read=last)[:, 0]
        state.right_align()
        while True:
            chosen = choose(logits, rows)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                tokens[row].append(token)
            kept = [i for i, row in enumerate(rows) if tokens[row][-1] not in stops[row]]
            if len(tokens[rows[0]]) >= max_new_tokens or not kept:
                break
            if len(kept) < len(rows):
                rows = [rows[i] for i in kept]
                state.select_rows(torch.tensor(kept, device=device))
                placement.select_rows(kept)
                chosen = chosen[kept]
            step = torch.ones((len(rows), 1), dtype=torch.long, device=device)
            _advance(placement, state)
            logits = forward(model, chosen[:, None].to(device), step, state=state)[:, 0]
    return [
        _finish(prompt, ids, stop, choose.seed_of(row))
        for row, (prompt, ids, stop) in enumerate(zip(prompts, tokens, stops, strict=True))
    ]


def _advance(placement: Placement, state: KVState) -> None:
    """The next pass holds one token per row, at the position after all real ones."""
    past = state.mask.cumsum(dim=1) - 1
    past = past.masked_fill(state.mask == 0, -1)
    new = state.mask.sum(dim=1, keepdim=True)
    placement.move(new, torch.cat([past, new], dim=1))


def _finish(prompt: RenderedPrompt, ids: list[int], stops: frozenset[int], seed: int | None) -> Generation:
    ended: Literal["stop", "length"] = "stop" if ids[-1] in stops else "length"
    content = ids[:-1] if ended == "stop" else ids
    text: str = prompt.tokenizer.decode(content, skip_special_tokens=True)
    return Generation(prompt, tuple(ids), text, ended, seed)


class _Chooser:
    """Picks the next token of each row; sampled rows have generators of their own."""

    def __init__(self, prompts: Sequence[RenderedPrompt], settings: Sampling, d_vocab: int) -> None:
        self.settings, self.d_vocab = settings, d_vocab
        self.seeds = [_row_seed(prompt, settings.seed) for prompt in prompts] if settings.temperature else []
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def seed_of(self, row: int) -> int | None:
        return self.seeds[row] if self.seeds else None

    def __call__(self, logits: Float[Tensor, "batch vocab"], rows: Sequence[int]) -> Int[Tensor, " batch"]:
        if not self.generators:
            return logits.argmax(dim=-1)
        probabilities = _distribution(logits.float().cpu(), self.settings)
        drawn = [torch.multinomial(probabilities[i], 1, generator=self.generators[row]) for i, row in enumerate(rows)]
        return torch.cat(drawn).to(logits.device)


def _distribution(logits: Float[Tensor, "batch vocab"], settings: Sampling) -> Float[Tensor, "batch vocab"]:
    logits = logits / settings.temperature
    if settings.top_k is not None:
        floor = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        dropped = ordered.cumsum(dim=-1) - ordered >= settings.top_p
        probabilities = probabilities.masked_fill(dropped.gather(1, order.argsort(dim=-1)), 0.0)
    normalised: Tensor = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return normalised


def _row_seed(prompt: RenderedPrompt, seed: int) -> int:
    """Seed of one row: from the prompt's ids, so that neither batch nor order matters."""
    digest = hashlib.sha256(f"{seed}:{prompt.ids}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def to_frame(generations: Sequence[Generation]) -> Any:
    """One row per answer: query, response, tokens, how it ended."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "query": g.prompt.query,
                "response": g.text,
                "tokens": len(g.ids),
                "ended": g.ended,
                "seed": g.seed,
            }
            for g in generations
        ]
    )
