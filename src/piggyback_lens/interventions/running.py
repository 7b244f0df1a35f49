"""Running a model under interventions: hooks that are always removed, and a record that proves what happened."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from piggyback_lens.conversations.chat import PromptBatch
from piggyback_lens.interventions.hooks import (
    AnyIntervention,
    Intervention,
    Interventions,
    Record,
    adapter_hooks,
    as_parts,
    hook_pairs,
    placed_hooks,
)
from piggyback_lens.interventions.kinds import cache
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.models.attachment import edited_sites
from piggyback_lens.models.backends import HookedModel, core_of, hook_points
from piggyback_lens.models.gates import gate_of, tokens_told
from piggyback_lens.models.network import NOTHING, forward
from piggyback_lens.models.plain_views import network_of, plain_view
from piggyback_lens.words import Site


@contextmanager
def applied(
    model: HookedModel,
    batch: PromptBatch | Placement,
    interventions: AnyIntervention,
    *,
    record: Record | None = None,
    must_touch: bool = True,
) -> Iterator[Record]:
    """Run the model under interventions: installs their hooks, and removes exactly those, also on errors.

    Args:
        model: either backend. Hooks that were there before stay.
        batch: the batch that will go through the model.
        interventions: one, several, or none.
        record: continue this record.
        must_touch: refuse, on leaving, interventions that touched nothing.

    Yields:
        The record; it is complete when the block ends.

    Raises:
        LensError: what does not fit this model and batch, or touched nothing.

    Example:
        >>> batch = batch_prompts(prompts)
        >>> with pair.using("base") as model, applied(model, batch, cache("resid_post", layers=1)) as record:
        ...     _ = model(batch.ids, attention_mask=batch.attention_mask)
        >>> record.activations.sites
        ('resid_post',)
    """
    kept = record or Record()
    with applied_each(model, [(batch, as_parts(interventions), kept)]):
        yield kept
    if must_touch:
        kept.check()


@contextmanager
def applied_each(
    model: Any, variants: Sequence[tuple[PromptBatch | Placement, Sequence[Intervention], Record]]
) -> Iterator[None]:
    """As `applied`, for rows of one pass under different interventions, each with its own record.

    `Placement.only` says which rows a variant has. A plain transformers model has no hook points: only its adapter can
    be acted on. The adapter of a gated model (see `models.gates`) is off at its tokens in all rows, which the first
    variant's placement says.
    """
    handles: list[tuple[Any, Any]] = []
    inputs: list[Any] = []
    points: Any = None
    try:
        for batch, parts, record in [*_gates(model, variants), *variants]:
            beside = [part for part in parts if part.site == "adapter"]
            for module, before in adapter_hooks(beside, model, batch, record):
                inputs.append(module.register_forward_pre_hook(before))
            hooked = [part for part in parts if part.site != "adapter"]
            points = hook_points(model) if hooked and points is None else points
            for name, function in hook_pairs(hooked, model, batch, record, points) if hooked else ():
                point = points[name]
                point.add_hook(function)
                handles.append((point, point.fwd_hooks[-1]))
        with tokens_told(model) if variants else nullcontext():
            yield
    finally:
        for handle in inputs:
            handle.remove()
        for point, handle in handles:
            handle.hook.remove()
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)


BLOCK_SITES = ("resid_pre", "resid_post")
"""Sites that are inputs and outputs of a decoder block, on a bridge and on the transformers model beside it."""


def acts_on_blocks(model: Any, parts: Sequence[Intervention]) -> bool:
    """Whether interventions can act on the blocks of a bridge's plain view: passes go through no hook points then."""
    beside = plain_view(model) is not None and network_of(model) is not core_of(model)
    return beside and bool(parts) and all(part.site in BLOCK_SITES for part in parts) and not gate_of(model)


@contextmanager
def applied_to_passes(
    model: HookedModel, placement: Placement, parts: Sequence[Intervention], record: Record
) -> Iterator[None]:
    """As `applied`, for passes by `forward` alone: a call of the model itself may not see it.

    What acts on the residual stream alone is put on the blocks that it touches, and all others run as if nothing acted.
    """
    if not acts_on_blocks(model, parts):
        with applied(model, placement, parts, record=record, must_touch=False):
            yield
        return
    edits: dict[tuple[int, Site], list[Any]] = {}
    for part, layer, hook in placed_hooks(parts, model, placement, record):
        edits.setdefault((layer, part.site), []).append(hook)  # type: ignore[arg-type]
    with edited_sites(network_of(model), {place: partial(_through, hooks) for place, hooks in edits.items()}):
        yield


def _through(hooks: Sequence[Any], activation: Tensor) -> Tensor:
    """An activation after several hooks, of which each may leave it."""
    for hook in hooks:
        changed = hook(activation)
        activation = activation if changed is None else changed
    return activation


def _gates(model: Any, variants: Sequence[tuple[PromptBatch | Placement, Any, Any]]) -> list[tuple[Any, ...]]:
    """The variant in which the adapter of a gated model is off in all rows; none for other models."""
    if not variants or not gate_of(model):
        return []
    placement = Placement.of(variants[0][0])
    whole = placement if placement.members is None else placement.only(range(len(placement.rows)))
    return [(whole, gate_parts(model, whole), Record())]


def gate_parts(model: Any, placement: Placement) -> list[Intervention]:
    """What switches the adapter of a gated model off in the passes of this placement; of rows that have such tokens."""
    found = []
    for part in Interventions.from_dict({"parts": list(gate_of(model))}).parts:
        having = [
            origin
            for origin, row in zip(placement.origins, placement.rows, strict=True)
            if operator.lt(*row.spans.get(part.span, (0, 0)))
            and (not placement.decoding or row.reaches_generation(part.span, part.phase))
        ]
        if having:
            found.append(replace(part, rows=tuple(sorted(set(having)))))
    return found


def mean_norms(
    model: HookedModel, batch: PromptBatch, *, site: Site = "resid_post", span: str = "all"
) -> dict[int, float]:
    """Mean Euclidean norm of the activations at a site, per layer: the unit of `add(fraction=...)`."""
    with torch.no_grad(), applied(model, batch, cache(site, span=span, device=None)) as record:
        forward(model, batch.ids, batch.attention_mask, read=NOTHING)
    kept = record.activations_of(span)
    return {layer: float(kept.flat(site, layer).float().norm(dim=-1).mean()) for layer in kept.layers}
