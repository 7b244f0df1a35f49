"""Batched generation under interventions and from prefix caches, the same on both backends.

The prompts' common prefix is computed once and its keys and values are shared by all rows; the rest of
each prompt is one right-padded pass, whatever the number of its samples; finished rows leave the batch.
Interventions are told the absolute position of every token, so a hook acts on the same tokens as in a pass without a
KV cache; where none of them reaches the answer, decoding goes through the model without hooks, and where they act on
the residual stream alone, with hooks on the blocks that they touch.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.conversations.batch import check_prompts
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.conversations.tokens import check_ids
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import AnyIntervention, Intervention, Record, as_parts
from piggyback_lens.interventions.placement import Placement, Row
from piggyback_lens.interventions.prefix import PrefixCache, similar_batches, starting_prefix
from piggyback_lens.interventions.running import acts_on_blocks, applied_to_passes, gate_parts
from piggyback_lens.measuring.sampling import Chooser, Sampling
from piggyback_lens.models.backends import HookedModel, device_of, end_ids_of, facts_of, n_positions_of, shape_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.plain_views import network_of, settled
from piggyback_lens.models.states import KVState, new_state
from piggyback_lens.models.static import StaticDecoding, captures, keep_for_the_next, static_decoding, static_refusal
from piggyback_lens.progress import shows, track


@dataclass(frozen=True)
class Generation:
    """One generated answer, with its ids and how it ended.

    Attributes:
        prompt: what was asked.
        ids: generated token ids, the stop token included if there was one.
        text: the answer, special tokens left out.
        ended: "stop" if a stop token came, "length" if max_new_tokens was reached.
        seed: what the draws of this answer began from; None when greedy.
        sample: its number among the samples of its prompt.
    """

    prompt: RenderedPrompt
    ids: tuple[int, ...]
    text: str
    ended: Literal["stop", "length"]
    seed: int | None = None
    sample: int = 0

    def completed(self) -> RenderedPrompt:
        """The prompt with this answer as its response, for teacher-forced measures."""
        return self.prompt.with_response(self.ids, end=False)


@shows("generating")
def generate(  # noqa: PLR0913
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    *,
    n: int | None = None,
    samples: Sequence[int] | None = None,
    interventions: AnyIntervention = None,
    prefix_cache: PrefixCache | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 16,
    record: Record | None = None,
    progress: bool | str = True,
    on_batch: Callable[[list[int], list[Generation]], None] | None = None,
    share_prefix: bool = True,
    static_cache: bool | None = None,
) -> list[Generation]:
    """Answer every prompt, once or several times.

    Args:
        model: either backend (of a pair: inside `with pair.using(side)`).
        prompts: rendered, without a response.
        n: samples of each prompt, numbered from 0; the prompt itself is computed once for all of them.
        samples: instead of `n`, the number of each prompt's one sample, so that any of them can be drawn again alone;
            default the prompt's own (`ChatFormat.ask`). A prompt that is given again without numbers goes on with the
            next ones, and a warning says so.
        interventions: act on prompt and generated tokens as their span and phase say.
        prefix_cache: keys and values to use for the prefix, instead of computing it.
        max_new_tokens: per answer.
        sampling: greedy if None; `Sampling.of_model(model)` is what the model's generation config says.
        stop_ids: default those of the chat template and of the model's generation config.
        batch_size: rows per batch; neither greedy nor sampled answers depend on it (to float tolerance).
        record: collects receipts and cached activations.
        progress: show a line with the time left; a text is its label.
        on_batch: called with the places in the returned list and the answers of each finished batch, e.g. to write
            them out.
        share_prefix: compute the common prefix once; False runs whole prompts (slower, same numbers).
        static_cache: decode in tensors of fixed size (same numbers), which a GPU replays as a captured graph: rows
            leave the batch when half of them are finished, down to a step of 32 rows. None: on a GPU, where it can be
            done; True: always, or an error that says why not (a HookedTransformer, hooks that act on the answer, short
            attention windows).

    Returns:
        One `Generation` per prompt, in order; with `n`, those of the first prompt first, by number.

    Raises:
        LensError: no prompts, prompts that hold a response or do not fit the model, ids outside the vocabulary, a
            cache that does not fit, several samples of a greedy answer, an intervention that touched nothing.

    Example:
        >>> with pair.using("finetuned") as model:
        ...     answers = generate(model, prompts, max_new_tokens=4)
        >>> [type(answer.text).__name__ for answer in answers]
        ['str', 'str', 'str']
    """
    facts_of(model)  # refuses what is no hooked model before work begins
    prompts = check_prompts(prompts, shape_of(model).d_vocab, n_positions_of(model), more=max_new_tokens)
    if max_new_tokens < 1 or batch_size < 1 or (n is not None and n < 1):
        raise LensError(f"max_new_tokens {max_new_tokens}, batch_size {batch_size}, n {n}: each must be at least 1")
    if any("response" in prompt.spans for prompt in prompts):
        raise LensError("a prompt holds a response already: generate from prompts without one")
    parts, record, settings = as_parts(interventions), record or Record(), sampling or Sampling()
    if prefix_cache is not None:
        prefix_cache.check(model, prompts)
    numbers = _numbered(prompts, n, samples, settings)
    if (n or 1) > 1 and not all(part.action.changes for part in parts):
        raise LensError("activations are kept per prompt, and n samples would overwrite each other: use n=1")
    stops = None if stop_ids is None else check_ids(stop_ids, "stop_ids", shape_of(model).d_vocab)
    asked = [prompt for prompt in prompts for _ in range(n or 1)]
    longest = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    most = (min(batch_size, len(asked)), longest)
    run = _Run(model, parts, record, settings, max_new_tokens, stops, len(prompts), most, static_cache)
    answers: list[Generation | None] = [None] * len(asked)
    first = _first_places(prompts) if all(part.action.changes for part in parts) else range(len(prompts))
    batches = list(similar_batches(asked, batch_size))
    for rows in track(batches, sizes=[len(b) for b in batches]):
        origins = [first[row // (n or 1)] for row in rows]
        chosen = [prompts[origin] for origin in dict.fromkeys(origins)]
        start = starting_prefix(model, chosen, parts, prefix_cache, record, share_prefix)
        done = run.batch(chosen, list(dict.fromkeys(origins)), origins, [numbers[row] for row in rows], start)
        done = [replace(answer, prompt=asked[row]) for row, answer in zip(rows, done, strict=True)]  # not an equal one
        for row, answer in zip(rows, done, strict=True):
            answers[row] = answer
        if on_batch:
            on_batch(rows, done)
    record.check()
    return [answer for answer in answers if answer is not None]


def _first_places(prompts: Sequence[RenderedPrompt]) -> list[int]:
    """For every prompt the place where it stands first: samples of one prompt are computed once."""
    met: dict[Any, int] = {}
    return [met.setdefault((p.ids, tuple(p.spans.values())), place) for place, p in enumerate(prompts)]


def _numbered(
    prompts: Sequence[RenderedPrompt], n: int | None, samples: Sequence[int] | None, settings: Sampling
) -> list[int]:
    """The sample number of every answer."""
    if n is not None and samples is not None:
        raise LensError("n and samples were given: n= numbers the samples of each prompt, samples= says them")
    if samples is not None:
        if len(samples) != len(prompts) or any(type(x) is not int or x < 0 for x in samples):
            raise LensError(f"samples {list(samples)[:5]} for {len(prompts)} prompts: give each its number, 0 or more")
        return list(samples)
    own = [prompt.sample for prompt in prompts]
    if settings.temperature == 0 and max((n or 1) - 1, *own) > 0:
        most = max(n or 1, 1 + max(own))
        raise LensError(f"n {most} at temperature 0 would be one answer {most} times: give Sampling(temperature=1)")
    if any(own) and n is None:
        return own
    if settings.temperature == 0:
        return [0] * len(prompts)
    met: Counter[tuple[int, ...]] = Counter()
    numbers: list[int] = []
    for prompt in prompts:
        start = met[prompt.ids] * (n or 1)
        numbers += range(start, start + (n or 1))
        met[prompt.ids] += 1
    if len(met) < len(prompts):
        warnings.warn(
            f"{len(prompts)} prompts of which {len(met)} differ: equal ones are samples 0, 1, ... in order; "
            "samples= numbers them otherwise",
            stacklevel=3,
        )
    return numbers


@dataclass(frozen=True, eq=False)
class _Run:
    """What all batches share."""

    model: HookedModel
    parts: Sequence[Intervention]
    record: Record
    settings: Sampling
    max_new_tokens: int
    stop_ids: Sequence[int] | None
    total: int
    most: tuple[int, int]  # rows of a batch, and tokens of a row with its answer
    static_cache: bool | None = None
    fixed: list[StaticDecoding] = field(default_factory=list)

    @torch.no_grad()
    def batch(
        self,
        prompts: Sequence[RenderedPrompt],
        origins: Sequence[int],
        wanted: Sequence[int],
        numbers: Sequence[int],
        start: PrefixCache | None,
    ) -> list[Generation]:
        """Answers of one batch.

        Args:
            prompts: those that are computed.
            origins: their places among all prompts.
            wanted: the place of each answer's prompt among all prompts.
            numbers: the sample number of each answer.
            start: keys and values of their prefix.
        """
        model = self.model
        state = new_state(model, len(prompts)) if start is None else start.state(model, len(prompts))
        past = state.length
        batch = batch_prompts(prompts, side="right")
        placement = Placement.of(batch, origins, self.total, ready=past)
        mask = batch.attention_mask[:, past:]
        with applied_to_passes(model, placement, self.parts, self.record):
            last = mask.sum(dim=1, keepdim=True) - 1
            logits = forward(model, batch.ids[:, past:], mask, state=state, read=last)[:, 0]
        state.right_align()
        if list(wanted) != list(origins):
            each = [origins.index(origin) for origin in wanted]
            state.select_rows(torch.tensor(each, device=logits.device))
            placement.select_rows(each)
            logits, prompts = logits[each], [prompts[row] for row in each]
        return self._decoded(prompts, numbers, state, placement, logits)

    def _decoded(
        self,
        prompts: Sequence[RenderedPrompt],
        numbers: Sequence[int],
        state: KVState,
        placement: Placement,
        logits: Float[Tensor, "row vocab"],
    ) -> list[Generation]:
        """The answers that follow on a state, from the logits of their first tokens on."""
        model, device = self.model, logits.device
        more = end_ids_of(model)
        stops = [frozenset(p.answer.stop_ids) | more if self.stop_ids is None else self.stop_ids for p in prompts]
        choose = Chooser([prompt.ids for prompt in prompts], numbers, self.settings, self.max_new_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        rows, ended = list(range(len(prompts))), set[int]()
        with self._hooked(prompts, placement, state) as hooks_act:
            fixed = self._static(state, hooks_act)
            for step in range(self.max_new_tokens):
                chosen = choose(logits, rows, step)
                for row, token in zip(rows, chosen.tolist(), strict=True):
                    if row not in ended:
                        tokens[row].append(token)
                ended.update(row for row in rows if tokens[row][-1] in stops[row])
                if step + 1 == self.max_new_tokens or len(ended) == len(prompts):
                    break
                kept = [i for i, row in enumerate(rows) if row not in ended]
                if fixed is not None:
                    if fixed.keep(kept):
                        rows, chosen = [rows[i] for i in kept], chosen[kept]
                    logits = fixed.step(chosen)
                    continue
                if len(kept) < len(rows):
                    rows = [rows[i] for i in kept]
                    state.select_rows(torch.tensor(kept, device=device))
                    placement.select_rows(kept)
                    chosen = chosen[kept]
                _advance(placement, state)
                one = torch.ones((len(rows), 1), dtype=torch.long, device=device)
                logits = forward(model, chosen[:, None], one, state=state)[:, 0]
        return [
            _finish(prompt, ids, stop, choose.seed_of(row), numbers[row])
            for row, (prompt, ids, stop) in enumerate(zip(prompts, tokens, stops, strict=True))
        ]

    @contextmanager
    def _hooked(self, prompts: Sequence[RenderedPrompt], placement: Placement, state: KVState) -> Iterator[bool]:
        """The hooks that the rest of the passes needs; whether there are any."""
        parts = self.parts
        if state.rotated:  # else keys before the rotary embedding are in the cache, and some hooks act after it
            rows = [Row.of(prompt) for prompt in prompts]
            parts = [part for part in parts if any(row.reaches_generation(part.span, part.phase) for row in rows)]
            placement.decoding = True
        acting = [*parts, *gate_parts(self.model, placement)]
        if self.static_cache and acting:
            raise LensError(
                f"{acting[0]} acts on the answer, and a static cache is decoded without hooks: leave one out"
            )
        hooked = applied_to_passes(self.model, placement, parts, self.record)
        # On blocks they act on those of the settled network; elsewhere they decide which network it is.
        first, second = settled(self.model), hooked
        if not acts_on_blocks(self.model, parts):
            first, second = hooked, settled(self.model)
        with first, second:
            yield bool(acting)

    def _static(self, state: KVState, hooks_act: bool) -> StaticDecoding | None:
        """Tensors of fixed size with the state in them, where decoding goes through such."""
        model = self.model
        wanted = self.static_cache
        if wanted is None:
            wanted = captures(device_of(model)) and not hooks_act and static_refusal(model, self.most[1]) is None
        if not wanted:
            return None
        if not self.fixed or self.fixed[0].network is not network_of(model):
            self.fixed[:] = [static_decoding(model, *self.most)]
        if not self.fixed[0].start(state):
            self.fixed.clear()
            return None
        keep_for_the_next(model, self.fixed[0])
        state.cache.layers.clear()  # its memory: the keys and values are copied
        return self.fixed[0]


def _advance(placement: Placement, state: KVState) -> None:
    """The next pass holds one token per row, at the position after all real ones."""
    past = state.mask.cumsum(dim=1) - 1
    past = past.masked_fill(state.mask == 0, -1)
    new = state.mask.sum(dim=1, keepdim=True)
    placement.move(new, torch.cat([past, new], dim=1))


def _finish(
    prompt: RenderedPrompt, ids: list[int], stops: Collection[int], seed: int | None, sample: int
) -> Generation:
    ended: Literal["stop", "length"] = "stop" if ids[-1] in stops else "length"
    content = ids[:-1] if ended == "stop" else ids
    text: str = prompt.tokenizer.decode(content, skip_special_tokens=True)
    return Generation(prompt, tuple(ids), text, ended, seed, sample)


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
                "sample": g.sample,
            }
            for g in generations
        ]
    )
