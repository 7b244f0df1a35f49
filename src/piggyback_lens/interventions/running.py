"""Running a model under interventions: hooks, receipts that prove what happened, and what was kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from piggyback_lens.conversations.chat import PromptBatch
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.activations import Activations, assemble
from piggyback_lens.interventions.hooks import AnyIntervention, HookPair, Intervention, as_parts, cache, layer_ranges
from piggyback_lens.interventions.placement import OPEN, Cells, Placement
from piggyback_lens.maths import project_out, set_projection
from piggyback_lens.models.backends import (
    HookedModel,
    Site,
    check_layers,
    hook_name,
    hook_points,
    shape_of,
    writes_through,
)
from piggyback_lens.models.network import NOTHING, forward


@dataclass
class Receipt:
    """Proof that an intervention happened: hook calls, cells touched, size of the change."""

    part: Intervention
    n_rows: int
    calls: int = 0
    cells: int = 0
    layers: set[int] = field(default_factory=set)
    squared_change: Tensor | None = None
    chunks: dict[tuple[Site, int], list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def change_norm(self) -> float:
        """Frobenius norm of everything that was changed."""
        return 0.0 if self.squared_change is None else float(self.squared_change.sqrt())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able row: cells are (row, token) pairs summed over layers."""
        return {
            "intervention": repr(self.part),
            "calls": self.calls,
            "cells": self.cells,
            "layers": len(self.layers),
            "change_norm": self.change_norm,
        }


@dataclass
class Record:
    """Receipts and kept activations of the interventions of one run."""

    receipts: list[Receipt] = field(default_factory=list)

    def open(self, parts: Sequence[Intervention], n_rows: int) -> list[Receipt]:
        """A receipt for each part; those that are already there, if their hooks are made again."""
        free, opened = list(self.receipts), []
        for part in parts:
            receipt = next((receipt for receipt in free if receipt.part is part), None)
            if receipt is None:
                receipt = Receipt(part, n_rows)
                self.receipts.append(receipt)
            else:
                free.remove(receipt)
            receipt.n_rows = max(receipt.n_rows, n_rows)
            opened.append(receipt)
        return opened

    def check(self) -> None:
        """Refuse a run in which an intervention touched nothing.

        Raises:
            LensError: it names the intervention.
        """
        for receipt in self.receipts:
            if receipt.cells == 0:
                raise LensError(
                    f"{receipt.part} touched nothing ({receipt.calls} hook calls): no token of its span and phase "
                    "was in the passes that were run"
                )

    @property
    def activations(self) -> Activations:
        """What the `cache` interventions kept, all of one span.

        Raises:
            LensError: nothing was kept, or from different spans (then use `activations_of`).
        """
        kept = [receipt for receipt in self.receipts if receipt.chunks]
        if not kept or len({(r.part.span, r.part.tokens) for r in kept}) > 1:
            raise LensError(f"expected activations of one span, there are {len(kept)} kept: use activations_of(span)")
        return self.activations_of(kept[0].part.span)

    def activations_of(self, span: str) -> Activations:
        """What was kept of one span.

        Raises:
            LensError: nothing was kept, or of different tokens, or of a part of the span only.
        """
        kept = [receipt for receipt in self.receipts if receipt.chunks and receipt.part.span == span]
        if not kept:
            raise LensError(f"nothing was kept of span {span!r}: add cache(..., span={span!r}) and run the model")
        if len({receipt.part.tokens for receipt in kept}) > 1:
            raise LensError(f"different tokens of span {span!r} were kept: use a record for each")
        chunks: dict[tuple[Site, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for receipt in kept:
            for key, parts in receipt.chunks.items():
                chunks.setdefault(key, []).extend(parts)
        return assemble(span, kept[0].part.tokens, chunks, kept[0].n_rows)

    def to_frame(self) -> Any:
        """One row per intervention."""
        import pandas as pd

        return pd.DataFrame([receipt.to_dict() for receipt in self.receipts])

    def __str__(self) -> str:
        return "\n".join(
            f"{r.part}: {r.cells} cells in {len(r.layers)} layers, {r.calls} calls, change {r.change_norm:.4g}"
            for r in self.receipts
        )


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
    """
    kept = record or Record()
    with applied_each(model, [(batch, as_parts(interventions), kept)]):
        yield kept
    if must_touch:
        kept.check()


@contextmanager
def applied_each(
    model: HookedModel, variants: Sequence[tuple[PromptBatch | Placement, Sequence[Intervention], Record]]
) -> Iterator[None]:
    """As `applied`, for rows of one pass under different interventions, each with its own record.

    `Placement.only` says which rows a variant has.
    """
    handles: list[tuple[Any, Any]] = []
    points = hook_points(model) if any(parts for _, parts, _ in variants) else {}
    try:
        for batch, parts, record in variants:
            for name, function in hook_pairs(parts, model, batch, record, points):
                point = points[name]
                point.add_hook(function)
                handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
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


def hook_pairs(
    parts: Sequence[Intervention],
    model: HookedModel,
    batch: PromptBatch | Placement,
    record: Record | None = None,
    points: Any = None,
) -> list[HookPair]:
    """`(name, function)` pairs of several interventions, in order; see `Interventions.fwd_hooks`."""
    placement, record = Placement.of(batch), record or Record()
    pairs: list[HookPair] = []
    points = hook_points(model) if parts and points is None else points
    for part, receipt in zip(parts, record.open(parts, placement.total), strict=True):
        layers = check_layers(part.layers, shape_of(model).n_layers)
        _check(part, model, placement, layers)
        for layer in layers:
            hook = _hook(part, layer, placement, receipt, writes_through(model, part.site))
            pairs.append((hook_name(model, part.site, layer, points), hook))
    return pairs


def _check(part: Intervention, model: HookedModel, placement: Placement, layers: tuple[int, ...]) -> None:
    """Refuse what does not fit, before anything runs."""
    placement.check(part.span, part.tokens, part.rows)
    shape = shape_of(model)
    if part.heads is not None:
        count = shape.n_kv_heads if part.site in ("k", "v", "rot_k") else shape.n_heads
        wrong = [head for head in part.heads if not 0 <= head < count]
        if wrong or not part.heads:
            raise LensError(f"heads {list(part.heads)} asked at {part.site}, which has heads 0 to {count - 1}")
    if part.kind in ("patch", "fill", "resample"):
        missing = [layer for layer in layers if str(layer) not in part.tensors]
        if missing:
            raise LensError(f"{part} has no donor activations for layers {layer_ranges(missing)}")
    if part.kind == "patch":
        _check_donor(part, placement)


def _check_donor(part: Intervention, placement: Placement) -> None:
    lengths = part.tensors["lengths"].tolist()
    if len(lengths) not in (1, placement.total):
        raise LensError(f"the donor has {len(lengths)} rows, the run {placement.total}: keep it from the same prompts")
    for row in placement.chosen(part.rows):
        origin = placement.origins[row]
        donor, own = lengths[origin if len(lengths) > 1 else 0], placement.length(row, part.span, part.tokens)
        if donor != own and own < OPEN:  # open-ended spans are checked token by token, as they come
            raise LensError(
                f"span {part.span!r} has {donor} tokens in the donor and {own} in row {origin}: a patch needs equally "
                "many (compare_templates shows where the prompts differ)"
            )


def _hook(
    part: Intervention, layer: int, placement: Placement, receipt: Receipt, in_place: bool = False
) -> Callable[..., Tensor | None]:
    heads = None if part.heads is None else torch.tensor(part.heads)

    def hook(activation: Tensor, hook: Any = None) -> Tensor | None:
        receipt.calls += 1
        cells = placement.cells(part.span, part.tokens, part.phase, part.rows, activation.shape[1])
        if not len(cells):
            return None
        cells = cells.to(activation.device)
        receipt.cells += len(cells)
        receipt.layers.add(layer)
        old = activation[cells.rows, cells.columns]
        if part.kind == "cache":
            _keep(part, layer, cells, old, receipt)
            return None
        chosen = old if heads is None else old[:, heads.to(old.device)]
        new = _new_value(part, layer, chosen, cells, heads).to(activation.dtype)
        if heads is not None:
            new = old.index_copy(1, heads.to(old.device), new)
        change = (new.detach() - old.detach()).float().pow(2).sum()
        receipt.squared_change = change if receipt.squared_change is None else receipt.squared_change + change
        put = activation.index_put_ if in_place else activation.index_put
        return put((cells.rows, cells.columns), new)

    return hook


def _keep(part: Intervention, layer: int, cells: Cells, value: Tensor, receipt: Receipt) -> None:
    if part.options["detach"]:
        name = part.options["dtype"]
        value = value.detach().to(part.options["device"], dtype=getattr(torch, name) if name else None)
    receipt.chunks.setdefault((part.site, layer), []).append((cells.origins, cells.slots, value))


def _new_value(part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
    """What the touched cells [cell, ...feature] become."""
    if part.kind == "zero":
        return torch.zeros_like(old)
    if part.kind == "add":
        strength = part.options.get("strengths", {}).get(str(layer), part.options.get("strength"))
        steered: Tensor = old + strength * _fit(part, part.tensors["vector"], old).to(old.dtype)
        return steered
    if part.kind == "ablate":
        return project_out(old, _fit(part, part.tensors["unit"], old))
    if part.kind == "clamp":
        return set_projection(old, _fit(part, part.tensors["unit"], old), part.options["value"])
    donor = part.tensors[str(layer)].to(old.device)
    if part.kind == "fill":
        donor = donor.expand(len(cells), *donor.shape)
    elif part.kind == "resample":
        donor = donor[_drawn(part.options["seed"], cells, len(donor)).to(old.device)]
    else:
        _check_covered(part, cells)
        donor = donor[cells.origins if len(donor) > 1 else torch.zeros_like(cells.origins), cells.slots]
    if heads is not None:
        donor = donor[:, heads.to(old.device)]
    if donor.shape != old.shape:
        raise LensError(f"{part} gives {tuple(donor.shape[1:])} per token, the model has {tuple(old.shape[1:])}")
    return donor


def _drawn(seed: int, cells: Cells, count: int) -> Int[Tensor, " cell"]:
    """One of `count` for each cell, from seed, row and token alone, so that batches and phases do not matter."""
    origins, slots = cells.origins.tolist(), cells.slots.tolist()
    width = max(slots) + 1
    uniform = {origin: np.random.default_rng([seed, origin]).random(width) for origin in set(origins)}
    return torch.tensor([int(uniform[o][slot] * count) for o, slot in zip(origins, slots, strict=True)])


def _check_covered(part: Intervention, cells: Cells) -> None:
    """An open-ended span may reach tokens that the donor never had."""
    lengths = part.tensors["lengths"].to(cells.slots.device)
    own = lengths[cells.origins] if len(lengths) > 1 else lengths.expand(len(cells))
    if bool((cells.slots >= own).any()):
        at = int((cells.slots >= own).nonzero()[0])
        raise LensError(
            f"{part} reaches token {int(cells.slots[at])} of its span in row {int(cells.origins[at])}, where the donor "
            f"has {int(own[at])}: patch a closed span such as 'prompt', or keep the donor from the same tokens"
        )


def _fit(part: Intervention, vector: Tensor, old: Tensor) -> Tensor:
    if vector.shape[-1] != old.shape[-1]:
        raise LensError(f"{part} has a vector of length {vector.shape[-1]}, the activation has {old.shape[-1]}")
    return vector.to(old.device)
