"""Running a model under interventions: hooks that are always removed, and a record that proves what happened."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from piggyback_lens.conversations.chat import PromptBatch
from piggyback_lens.interventions.hooks import (
    AnyIntervention,
    Intervention,
    Record,
    adapter_hooks,
    as_parts,
    hook_pairs,
)
from piggyback_lens.interventions.kinds import cache
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.models.backends import HookedModel, hook_points
from piggyback_lens.models.network import NOTHING, forward
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
    be acted on.
    """
    handles: list[tuple[Any, Any]] = []
    inputs: list[Any] = []
    points: Any = None
    try:
        for batch, parts, record in variants:
            beside = [part for part in parts if part.site == "adapter"]
            for module, before in adapter_hooks(beside, model, batch, record):
                inputs.append(module.register_forward_pre_hook(before))
            hooked = [part for part in parts if part.site != "adapter"]
            points = hook_points(model) if hooked and points is None else points
            for name, function in hook_pairs(hooked, model, batch, record, points) if hooked else ():
                point = points[name]
                point.add_hook(function)
                handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for handle in inputs:
            handle.remove()
        for point, handle in handles:
            handle.hook.remove()
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)


def mean_norms(
    model: HookedModel, batch: PromptBatch, *, site: Site = "resid_post", span: str = "all"
) -> dict[int, float]:
    """Mean Euclidean norm of the activations at a site, per layer: the unit of `add(fraction=...)`."""
    with torch.no_grad(), applied(model, batch, cache(site, span=span, device=None)) as record:
        forward(model, batch.ids, batch.attention_mask, read=NOTHING)
    kept = record.activations_of(span)
    return {layer: float(kept.flat(site, layer).float().norm(dim=-1).mean()) for layer in kept.layers}
