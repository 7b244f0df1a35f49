"""Teacher-forced measures: how probable given responses are, under interventions and from prefix caches.

All are exact functions of the model, cheap (one pass, no generation), and read the logits only where a
response token is predicted.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.conversations.batch import check_prompts
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import AnyIntervention, Intervention, Record, as_parts
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.interventions.prefix import PrefixCache, similar_batches, starting_prefix
from piggyback_lens.interventions.running import applied_to_passes
from piggyback_lens.maths import kl_per_token, token_log_probs
from piggyback_lens.models.backends import HookedModel, device_of, dtype_of, n_positions_of, shape_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.models.states import KVState, new_state, state_from_keys_values
from piggyback_lens.progress import shows, track
from piggyback_lens.words import Side


@shows("scoring")
def response_log_probs(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    *,
    interventions: AnyIntervention = None,
    prefix_cache: PrefixCache | Sequence[PrefixCache] | None = None,
    batch_size: int = 16,
    record: Record | None = None,
    progress: bool | str = True,
) -> list[Float[Tensor, " token"]]:
    """log p, in nats, of every response token of every prompt.

    Args:
        model: either backend.
        prompts: with a response (`prompt.with_response`, `generation.completed()`).
        interventions: act as their span and phase say; response tokens are the generation phase.
        prefix_cache: keys and values for the prefix: one for all prompts, or one for each.
        batch_size: rows per pass.
        record: collects receipts and cached activations.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: a prompt without a response, or what `generate` raises.

    Example:
        >>> scores = response_log_probs(model, conversations)
        >>> [len(row) == len(c.ids) - c.n_prompt for row, c in zip(scores, conversations)]
        [True, True, True, True]
    """
    logits = _response_logits(model, prompts, interventions, prefix_cache, batch_size, record)
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for row, values in logits:
        targets = torch.tensor(_response(prompts[row]), device=values.device)
        found[row] = token_log_probs(values[None].float(), targets[None])[0].cpu()
    return found


@shows("scoring")
def nll(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    *,
    interventions: AnyIntervention = None,
    prefix_cache: PrefixCache | Sequence[PrefixCache] | None = None,
    batch_size: int = 16,
    progress: bool | str = True,
) -> Float[Tensor, " prompt"]:
    """Mean negative log-likelihood of each prompt's response, in nats per token. Arguments as `response_log_probs`."""
    scores = response_log_probs(
        model, prompts, interventions=interventions, prefix_cache=prefix_cache, batch_size=batch_size
    )
    return -torch.stack([values.mean() for values in scores])


@shows("contrast")
def contrast(
    model: HookedModel,
    towards: Sequence[RenderedPrompt],
    against: Sequence[RenderedPrompt],
    *,
    interventions: AnyIntervention = None,
    prefix_cache: PrefixCache | None = None,
    batch_size: int = 16,
    progress: bool | str = True,
) -> Float[Tensor, " prompt"]:
    """log p of `towards` minus log p of `against`, each as a mean over its response tokens, in nats per token.

    With `towards` the finetuned model's own answers and `against` the base's, it is high on the finetuned
    model and low on the base, and a patch moves it from one to the other. Both lists are in prompt order;
    interventions whose donors have one row per prompt do not apply here.

    Raises:
        LensError: lists of different lengths.
    """
    if len(towards) != len(against):
        raise LensError(f"{len(towards)} responses against {len(against)}: give one of each per prompt")
    both = nll(
        model,
        [*towards, *against],
        interventions=interventions,
        prefix_cache=prefix_cache,
        batch_size=batch_size,
    )
    return both[len(towards) :] - both[: len(towards)]


@shows("KL to base")
def kl_to_base(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    *,
    side: Side = "finetuned",
    interventions: AnyIntervention = None,
    prefix_cache: PrefixCache | None = None,
    batch_size: int = 8,
    progress: bool | str = True,
) -> list[Float[Tensor, " token"]]:
    """KL(base || x) at every response token, in nats, where x is one side under interventions or a prefix cache."""
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    with pair.using("base") as base, pair.using(side) as model:
        reference = _response_logits(base, prompts, None, None, batch_size)
        moved = _response_logits(model, prompts, interventions, prefix_cache, batch_size)
        for (row, expected), (_, values) in zip(reference, moved, strict=True):  # in the same batches
            found[row] = kl_per_token(expected[None].to(values.device), values[None])[0].cpu()
    return found


def _response(prompt: RenderedPrompt) -> tuple[int, ...]:
    return prompt.ids[prompt.n_prompt :]


def _response_logits(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    interventions: AnyIntervention,
    prefix_cache: PrefixCache | Sequence[PrefixCache] | None,
    batch_size: int,
    record: Record | None = None,
) -> Iterator[tuple[int, Float[Tensor, "token vocab"]]]:
    """Per prompt (with its index) the logits that predict its response tokens, batch by batch: they are large."""
    prompts = check_prompts(prompts, shape_of(model).d_vocab, n_positions_of(model))
    if any("response" not in prompt.spans for prompt in prompts):
        raise LensError("every prompt needs a response to be scored: use prompt.with_response(...)")
    if batch_size < 1:
        raise LensError(f"batch_size {batch_size}: it must be at least 1")
    parts, record = as_parts(interventions), record or Record()
    caches = [prefix_cache] if isinstance(prefix_cache, PrefixCache) else list(prefix_cache or ())
    if len(caches) not in (0, 1, len(prompts)):
        raise LensError(f"{len(caches)} prefix caches for {len(prompts)} prompts: give one, or one for each")
    for cache, prompt in zip(caches, prompts, strict=False):
        cache.check(model, prompts if len(caches) == 1 else [prompt])
    batches = list(similar_batches(prompts, batch_size))
    for rows in track(batches, sizes=[len(rows) for rows in batches]):
        chosen = [prompts[row] for row in rows]
        own = [caches[row if len(caches) > 1 else 0] for row in rows] if caches else []
        state = _state(model, chosen, own, parts, record)
        yield from _batch_logits(model, chosen, rows, len(prompts), state, parts, record)
    record.check()


@torch.no_grad()
def _state(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    caches: Sequence[PrefixCache],
    parts: Sequence[Intervention],
    record: Record,
) -> KVState:
    """Where a batch starts: from its rows' prefix caches, or from the prefix that it shares."""
    if len({id(cache) for cache in caches}) <= 1:
        start = starting_prefix(model, prompts, parts, caches[0] if caches else None, record, share=True)
        return new_state(model, len(prompts)) if start is None else start.state(model, len(prompts))
    cut = [starting_prefix(model, prompts, parts, cache, record, share=True) for cache in caches]
    keys, values = (torch.stack([getattr(c, name) for c in cut if c], dim=1) for name in ("keys", "values"))
    device, dtype = device_of(model), dtype_of(model)
    return state_from_keys_values(model, keys.to(device, dtype), values.to(device, dtype))


@torch.no_grad()
def _batch_logits(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    rows: Sequence[int],
    total: int,
    state: KVState,
    parts: Sequence[Intervention],
    record: Record,
) -> list[tuple[int, Float[Tensor, "token vocab"]]]:
    past, device = state.length, device_of(model)
    batch = batch_prompts(prompts, side="right")
    placement = Placement.of(batch, rows, total, ready=past)
    read, counts = predicting_columns(prompts, past)
    ids, mask = batch.ids[:, past:].to(device), batch.attention_mask[:, past:].to(device)
    with applied_to_passes(model, placement, parts, record):
        logits = forward(model, ids, mask, state=state, read=read.to(device))
    return [(row, values[:count]) for row, values, count in zip(rows, logits, counts, strict=True)]


def predicting_columns(prompts: Sequence[RenderedPrompt], past: int) -> tuple[Int[Tensor, "batch read"], list[int]]:
    """Columns whose logits predict response tokens; short rows repeat their last one."""
    counts = [len(_response(prompt)) for prompt in prompts]
    steps = torch.arange(max(counts))
    columns = [
        torch.minimum(steps, torch.tensor(n - 1)) + p.n_prompt - 1 - past for p, n in zip(prompts, counts, strict=True)
    ]
    return torch.stack(columns), counts
