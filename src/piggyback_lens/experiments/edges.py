"""Who reads the carrier: attention edges, by layer and head, cut in the finetuned model.

An edge is what the tokens of one span read from those of another in one head. A cell's value says how much of the
contrast is restored where that edge is cut. All cells come from the gradient first: with the attention weights A of a
reader, its mass m on the keys that are cut, and the gradient G of the measure, a cut makes the weights A/(1 - m) on the
other keys and 0 on these, and moves the measure by the sum of G times that change, to first order in what follows. The
largest cells are then cut exactly, in the base too: a cut that moves the base as far, either way, damages (both
contrasts go to the middle, where no answer is preferred), and tells nothing of the finetune.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.card import versions
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import measure_facts, own_contrast
from piggyback_lens.experiments.attribution import AttributionResult, unpatched
from piggyback_lens.experiments.experiment import prompt_facts, run_plan
from piggyback_lens.experiments.laboratory import Laboratory, Planned
from piggyback_lens.experiments.patching import head_labels
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.intervals import Estimate, interval_text, recovery
from piggyback_lens.interventions.donors import IDENTITY
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.interventions.prefix import similar_batches
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour, Measure, mean_log_prob
from piggyback_lens.measuring.scoring import predicting_columns
from piggyback_lens.models.backends import HookedModel, attention_weights_name, core_of, device_of
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.models.views import frozen
from piggyback_lens.progress import counting, shows
from piggyback_lens.results.report import Report
from piggyback_lens.results.run import Run
from piggyback_lens.settings import PatchSettings

if TYPE_CHECKING:
    import pandas as pd

Edge = tuple[str, str]
IN_BASE: Final = "same cut in the base"
SERIES = ("patched", IN_BASE)
WHOLE: Final = "all layers"
READERS: tuple[Edge, ...] = (("query", "prefix"), ("postfix", "prefix"), ("response", "prefix"))
ROWS = 8
"""Rows of a pass with gradients."""


@dataclass(frozen=True, repr=False)
class EdgeResult(AttributionResult):
    """Attention edges by gradient, and those that were cut exactly.

    Attributes:
        attributed: every layer x head of every edge; values are finetuned + attribution.
        exact: the cells that were cut, each whole edge at all layers and heads, and the same cuts in the base.
        sampled: which cells of `attributed` the even sample was.
        steps: always None.
    """

    name: ClassVar = "edges.1"

    def to_frame(self) -> "pd.DataFrame":
        """One row per layer, head and edge: value (recovery by gradient), low, high, n, reason, raw, exact, exact_raw.

        `in_base` is what the same cut does to the base, in the same unit and direction: positive where it moves the
        base away from the finetuned model's answers, negative where it moves it towards them. Where it is as far from 0
        as `exact`, the cut is mere damage.
        """
        frame = super().to_frame()
        keys = ["layer", "head", "span", "read_from"]
        if self.exact is None:
            return frame.assign(in_base=float("nan"))
        known = self.exact.to_frame()
        known = known[known["series"] == IN_BASE].assign(in_base=lambda own: -own["value"])
        return frame.merge(known[[*keys, "in_base"]], on=keys, how="left")

    @property
    def whole(self) -> "pd.DataFrame":
        """Every edge cut at all layers and heads: span, read_from, value with its interval, in_base, and `specific`."""
        if self.exact is None:
            raise LensError("no cell was cut exactly: give exact_cells above 0")
        known = self.exact.to_frame()
        known = known[known["mode"] == WHOLE].drop(columns=["layer", "head"])
        base = known[known["series"] == IN_BASE].set_index(["span", "read_from"])["value"]
        own = known[known["series"] == "patched"]
        both = [-base[edge] for edge in zip(own["span"], own["read_from"], strict=True)]
        columns = ["span", "read_from", "value", "low", "high", "n", "reason"]
        moved, in_base = ([self.exact.values[i] for i in known.index[known["series"] == name]] for name in SERIES)
        questions = self.exact.settings.get("questions")
        only = [
            specific(*cut, self.exact.finetuned, self.exact.base, questions) for cut in zip(moved, in_base, strict=True)
        ]
        found = own[columns].assign(
            in_base=both,
            specific=[x.value for x in only],
            specific_low=[x.low for x in only],
            specific_high=[x.high for x in only],
        )
        return found.reset_index(drop=True)

    @property
    def verdict(self) -> str:
        """What the whole edges restore, the strongest single one, and how well the gradient ranks."""
        if self.exact is None:
            return super().verdict
        if self.whole["value"].isna().all():
            return self.exact.verdict
        parts = [
            f"{row['span']} reading {row['read_from']} {interval_text(row['value'], row['low'], row['high'])}"
            f" (in the base {row['in_base']:.2f}, specific "
            f"{interval_text(row['specific'], row['specific_low'], row['specific_high'])})"
            for row in self.whole.to_dict("records")
        ]
        rho = self.rank_correlation
        known = "" if np.isnan(rho) else f" Rank correlation of the gradient with exact cuts: {rho:.2f}."
        return f"Cut at all layers and heads, restored: {', '.join(parts)}. {self.exact.verdict}{known}"

    def report(self) -> Report:
        """The map, the whole edges, and the cells that were cut exactly."""
        shown = super().report()
        if self.exact is None:
            return replace(shown, title="Piggyback map: attention edges")
        frame = self.to_frame().dropna(subset=["exact"])
        order = frame["exact"].abs().sort_values(ascending=False).index
        columns = ["span", "read_from", "layer", "label", "exact", "in_base", "value", "n"]
        return replace(
            shown,
            title="Piggyback map: attention edges",
            summary=frame.loc[order, columns].rename(columns={"value": "by gradient"}).head(12),
        )


def specific(
    cut: Sequence[float],
    in_base: Sequence[float],
    finetuned: Sequence[float],
    base: Sequence[float],
    questions: Sequence[Any] | None = None,
) -> Estimate:
    """What a cut restores in the finetuned model minus how far it moves the base, as a fraction of the contrast.

    Args:
        cut: the measure of the finetuned model under the cut, per prompt.
        in_base: that of the base under the same cut.
        finetuned: the measure of the finetuned model as it is.
        base: that of the base.
        questions: which question each value belongs to.
    """
    shift = np.array(in_base) - np.array(base)
    away = np.sign(shift.mean() * (np.mean(base) - np.mean(finetuned)))
    return recovery(np.array(cut) - away * shift, finetuned, base, questions, rate=False)


@shows("edge map")
def edge_map(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    *,
    edges: Sequence[Edge] = READERS,
    exact_cells: int = 12,
    measure: Measure | None = None,
    settings: PatchSettings = PatchSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> EdgeResult:
    """Layer x head of attention edges: how much of the contrast a cut restores in the finetuned model.

    Every cell comes from the gradient (one forward and backward pass per prompt and answer). Then these are cut
    exactly, by `cut_attention`, in the finetuned model and in the base: the `exact_cells` largest, as many evenly
    spaced ones (for the rank correlation), and each whole edge at all layers and heads.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix.
        edges: (reader, read) pairs of spans; "response" are the tokens of the answer.
        exact_cells: see above; 0 for none.
        measure: an `AnswerContrast`; None for the contrast of the models' own answers (greedy, 24 tokens), which is
            generated first.
        settings: memory, and where passes run.
        out: folder of the run, which gets each cell as it comes; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: no edges, a span that is not there, a reader that would have no key left, or a measure without a
            gradient.

    Example:
        >>> found = edge_map(pair, prompts, edges=[("query", "prefix")], exact_cells=2)
        >>> found.whole["read_from"].tolist()
        ['prefix']
    """
    if isinstance(measure, GeneratedBehaviour):
        raise LensError("a generated behaviour has no gradient: give an AnswerContrast")
    if not edges or exact_cells < 0 or any(isinstance(edge, str) or len(edge) != 2 for edge in edges):
        raise LensError(
            f"edges {list(edges)}, exact_cells {exact_cells}: give (reader, read) pairs of spans, and 0 or more cells"
        )
    wanted = list(dict.fromkeys((read_by, read_from) for read_by, read_from in edges))
    lab, shape = Laboratory(pair, prompts, settings), pair.shape
    names, group = head_labels(shape.n_heads, shape.n_kv_heads, kv=False), shape.n_heads // shape.n_kv_heads
    cells = [
        _labels(edge, [layer], [head]) | {"layer": layer, "head": head, "label": name, "group": head // group}
        for edge in wanted
        for layer in range(shape.n_layers)
        for head, name in enumerate(names)
    ]
    facts = prompt_facts(pair, prompts) | {"method": "attribution"}
    identity = {"edges": [list(edge) for edge in wanted], "exact_cells": exact_cells}
    identity |= {"measure": measure_facts(measure), "settings": facts}
    with Run.open(out, "edges", identity, models=pair.identities(), prompt=prompts[0]) as own:
        if (done := own.result(EdgeResult.load)) is not None:
            return done
        measure = measure or own_contrast(own, pair, prompts)
        here, there, moved = _attributed(pair, prompts, measure, wanted)
        values = [(here + row).tolist() for row in moved.flatten(0, 2)]
        about = {"name": measure.name, "unit": measure.unit}
        facts |= {"versions": versions()}
        found = PatchResult("edges", tuple(cells), values, there.tolist(), here.tolist(), about, facts)
        sampled = sorted({round(i) for i in np.linspace(0, len(cells) - 1, exact_cells)}) if exact_cells else []
        top = np.argsort(-moved.flatten(0, 2).mean(-1).abs().numpy(), kind="stable")[:exact_cells].tolist()
        chosen = [cells[i] for i in sorted({*sampled, *top})]
        plan = _plan(chosen, wanted, lab)
        inside = None if out is None else Path(out) / "exact"
        exact = run_plan(lab, plan, "edges", measure, inside) if plan else None
        return own.finish(EdgeResult(found, exact, tuple(sampled), None))


def _labels(edge: Edge, layers: Sequence[int], heads: Sequence[int] | None) -> dict[str, Any]:
    read_by, read_from = edge
    where = {"span": read_by, "read_from": read_from, "sites": "attn_scores", "layers": list(layers)}
    return {"series": "patched", "flow": "repair", **where, "heads": heads, "tokens": None, "mode": "edge"}


def _plan(cells: Sequence[Mapping[str, Any]], edges: Sequence[Edge], lab: Laboratory) -> list[Planned]:
    """Cells and whole edges in the finetuned model and in the base, and two identity controls."""
    if not cells:
        return []
    every = range(lab.pair.shape.n_layers)
    whole = {"layer": -1, "head": -1, "label": "all heads", "group": -1, "mode": WHOLE}
    own = [*cells, *(_labels(edge, every, None) | whole for edge in edges)]
    in_base = [{**cell, "series": IN_BASE, "flow": "infect"} for cell in own]
    same = [{**cell, "series": IDENTITY} for cell in (own[0], own[-1])]
    return [Planned(labels, lab.parts(labels)) for labels in (*own, *in_base, *same)]


def _attributed(
    pair: ModelPair, prompts: Sequence[RenderedPrompt], measure: AnswerContrast, edges: Sequence[Edge]
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"], Float[Tensor, "edge layer head prompt"]]:
    """The measure of finetuned and base as they are, and what each cut would change of the finetuned's."""
    shape = pair.shape
    total = torch.zeros((len(edges), shape.n_layers, shape.n_heads, len(prompts)))
    with pair.using("base") as model:
        there = unpatched(model, prompts, measure)
    with pair.using("finetuned") as model, counting(len(measure.rows), "gradients") as advance:
        here = unpatched(model, prompts, measure)
        for rows in similar_batches(measure.rows, ROWS):
            batch = batch_prompts([measure.rows[row] for row in rows], side="right")
            placement = Placement.of(batch, [row % len(prompts) for row in rows], len(prompts))
            for layer, (weights, gradient) in enumerate(_weights_and_gradients(model, batch)):
                for number, edge in enumerate(edges):
                    moved = _moved(weights, gradient, placement, edge)
                    for at, row in enumerate(rows):
                        sign = 1.0 if row < len(prompts) else -1.0
                        total[number, layer, :, row % len(prompts)] += sign * moved[at]
            advance(len(rows))
    return here, there, total


def _weights_and_gradients(
    model: HookedModel, batch: Any
) -> list[tuple[Float[Tensor, "row head query key"], Float[Tensor, "row head query key"]]]:
    """Attention weights of every layer, and the gradient of each row's mean log p at them."""
    device, kept = device_of(model), list[Tensor]()

    def keep(weights: Tensor, hook: Any = None) -> Tensor:
        kept.append(weights if weights.requires_grad else weights.detach().requires_grad_())
        return kept[-1]

    names = [(attention_weights_name(model, layer), keep) for layer in range(model.cfg.n_layers)]
    read, counts = predicting_columns(batch.prompts, 0)
    hooked = model.hooks(fwd_hooks=names)
    with torch.enable_grad(), frozen(core_of(model)), applied(model, batch, ()), hooked:
        logits = forward(model, batch.ids, batch.attention_mask, read=read.to(device))
        scores = [mean_log_prob(p, x[:n]) for p, x, n in zip(batch.prompts, logits, counts, strict=True)]
        found = torch.autograd.grad(torch.stack(scores).sum(), kept)
    return [(weights.detach(), gradient) for weights, gradient in zip(kept, found, strict=True)]


def _moved(
    weights: Float[Tensor, "row head query key"],
    gradient: Float[Tensor, "row head query key"],
    placement: Placement,
    edge: Edge,
) -> Float[Tensor, "row head"]:
    """What cutting an edge in each head moves each row's score by, to first order behind the weights."""
    for span in edge:
        placement.check(span, None, None)
    readers = placement.cells(edge[0], None, "both", None, weights.shape[2])
    cells = placement.edges(readers, edge[1], None, (edge[0],)).to(weights.device)
    assert cells.read is not None
    own, slope = (x[cells.rows, :, cells.columns].float() for x in (weights, gradient))
    read = cells.read[:, None]
    mass = (own * read).sum(-1, keepdim=True)
    change = torch.where(read, -own, own * mass / (1 - mass).clamp(min=1e-6))
    each = (change * slope).sum(-1)
    return torch.zeros(weights.shape[:2], device=each.device).index_add_(0, cells.rows, each).cpu()
