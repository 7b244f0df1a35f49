"""Attribution patching: the maps of `patching` to first order, from gradients, for the price of a few passes.

For a patch of one cell from the recipient's activation r to the donor's d, the change of a differentiable
measure M is (d - r) . dM/dr to first order: one forward and one backward pass give every layer, token and head
at once. With `steps` the gradient is averaged along the straight line from r to d (integrated gradients), one
layer at a time, which follows the curvature that the first order misses. The result says how well it ranks
cells: a sample is run exactly, and so are the cells that it puts on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.card import versions
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import measure_facts, own_contrast
from piggyback_lens.experiments.cells import evaluate, most_rows, require_one_prefix
from piggyback_lens.experiments.experiment import prompt_facts
from piggyback_lens.experiments.laboratory import check_sites
from piggyback_lens.experiments.patching import head_labels, layer_head_map, layer_position_map
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.interventions.donors import Donors, check_flow
from piggyback_lens.interventions.hooks import Interventions
from piggyback_lens.interventions.kinds import patch
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.interventions.prefix import similar_batches
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour, Measure, mean_log_prob
from piggyback_lens.measuring.scoring import predicting_columns
from piggyback_lens.models.backends import HookedModel, check_layers, core_of, device_of, hook_name
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.models.views import frozen
from piggyback_lens.progress import counting, shows
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import Run
from piggyback_lens.settings import PatchSettings
from piggyback_lens.words import DONOR, HEAD_SITES, RECIPIENT, Flow, Site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

By = Literal["position", "head"]


@dataclass(frozen=True, repr=False)
class AttributionResult(Result):
    """An attribution map, and how far it can be trusted.

    Attributes:
        attributed: the map; its values are recipient + attribution, so that recoveries read as those of a patch.
        exact: the cells that were run exactly: an even sample, and the top ones.
        sampled: which cells of `attributed` the even sample was.
        steps: of integrated gradients; None for the plain gradient.
    """

    name: ClassVar = "attribution.1"
    attributed: PatchResult
    exact: PatchResult | None
    sampled: tuple[int, ...]
    steps: int | None

    def to_frame(self) -> "pd.DataFrame":
        """One row per cell as `PatchResult.to_frame`, with the exact recovery (`exact`) and measure (`exact_raw`)."""
        frame = self.attributed.to_frame()
        if self.exact is None:
            return frame.assign(exact=float("nan"), exact_raw=float("nan"))
        known = self.exact.to_frame()
        keys = [name for name in ("layer", "position", "head", "span", "read_from") if name in frame]
        known = known[known["series"] == "patched"][[*keys, "value", "raw"]]
        known = known.rename(columns={"value": "exact", "raw": "exact_raw"})
        return frame.merge(known, on=keys, how="left")

    @property
    def rank_correlation(self) -> float:
        """Spearman's rho between attributed and exact measure on the even sample of cells (not the top ones)."""
        from scipy.stats import spearmanr

        frame = self.to_frame().iloc[list(self.sampled)]
        if len(frame) < 3 or min(frame["raw"].nunique(), frame["exact_raw"].nunique()) < 2:
            return float("nan")
        return float(spearmanr(frame["raw"], frame["exact_raw"]).statistic)

    def figure(self) -> "go.Figure":
        """The attribution map."""
        return self.attributed.figure()

    @property
    def verdict(self) -> str:
        """The strongest cell, and how well the gradient ranks cells."""
        rho = self.rank_correlation
        known = "no cell was run exactly" if np.isnan(rho) else f"rank correlation with exact patches {rho:.2f}"
        return f"{self.attributed.verdict[:-1]}; {known}."

    def report(self) -> Report:
        """The map, and the cells that were run exactly."""
        shown = self.attributed.report()
        figures = [("By gradient: a first-order estimate of the exact map.", self.figure())]
        if self.exact is not None and self.to_frame()[["value", "exact"]].notna().all(axis=1).any():
            figures.append(("The cells of the attribution map that were run exactly.", self.check_figure()))
        note = f"Spearman rank correlation with exact patches {self.rank_correlation:.2f}."
        return replace(shown, title="Piggyback map: attribution", verdict=self.verdict, figures=figures, notes=[note])

    def _sizes(self) -> str:
        return f"{len(self.attributed.cells)} cells"

    def check(self) -> None:
        """Refuse a damaged map, and samples that are not of it."""
        for part in (self.attributed, self.exact):
            if part is not None:
                part.check()
        if any(not 0 <= number < len(self.attributed.cells) for number in self.sampled):
            raise ValueError(f"sampled {list(self.sampled)[:5]}, the map has {len(self.attributed.cells)} cells")

    def check_figure(self) -> "go.Figure":
        """Attribution against the exact recovery, for the cells that were run."""
        from piggyback_lens.figures.attribution_plot import attribution_check_figure

        if self.exact is None:
            raise LensError("no cell was run exactly: give check_cells or top_cells")
        frame = self.to_frame().dropna(subset=["exact"]).rename(columns={"value": "attribution"})
        title = "Attribution against exact patches"
        return attribution_check_figure(frame, title=title, rank_correlation=self.rank_correlation)


@shows("attribution map")
def attribution_map(  # noqa: PLR0913
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    *,
    by: By = "position",
    span: str = "prefix",
    sites: Site | Sequence[Site] = "resid_pre",
    layers: Sequence[int] | None = None,
    flow: Flow = "repair",
    steps: int | None = None,
    check_cells: int = 24,
    top_cells: int = 8,
    measure: Measure | None = None,
    settings: PatchSettings = PatchSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> AttributionResult:
    """The layer x position or layer x head map by gradient.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix.
        by: "position" (as `layer_position_map`) or "head" (as `layer_head_map`).
        span: which tokens.
        sites: which activations; several are attributed together.
        layers: None for all.
        flow: repair (base to finetuned) or infect.
        steps: None for the gradient at the recipient; m for integrated gradients in m midpoint steps.
        check_cells: so many evenly spaced cells are run exactly, for the rank correlation; 0 for none.
        top_cells: so many of the largest are run exactly as well.
        measure: None for the contrast of the models' own answers (greedy, 24 tokens), which is generated first.
        settings: seed, memory, and where postfix activations come from.
        out: folder of the run; the cells that are run exactly have a folder of their own in it.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: as the exact maps; a measure that is not differentiable; steps below 1; several sites other than
            q, k and v, which lie side by side.

    Example:
        >>> found = attribution_map(pair, prompts, layers=[0, 1], check_cells=3, top_cells=0)
        >>> -1 <= found.rank_correlation <= 1
        True
    """
    if by not in get_args(By):
        raise LensError(f"by {by!r} is not known: choose 'position' or 'head'")
    if steps is not None and steps < 1:
        raise LensError(f"steps {steps}: integrated gradients take at least 1, None is the plain gradient")
    if isinstance(measure, GeneratedBehaviour):
        raise LensError("a generated behaviour has no gradient: give an AnswerContrast")
    check_flow(flow)
    require_one_prefix(prompts)
    wanted = check_sites(sites)
    chosen = check_layers(layers, pair.shape.n_layers)
    labels = _labels(pair, prompts, by, span, wanted)
    if len(wanted) > 1 and not set(wanted) <= {"q", "k", "v"}:
        raise LensError(
            f"sites {list(wanted)} lie behind one another, and gradients would count twice: take one, or k, v"
        )
    common = {"series": "patched", "flow": flow, "span": span, "sites": "+".join(wanted)}
    cells = [{**common, "layers": [layer], "layer": layer, **label} for layer in chosen for label in labels]
    facts = prompt_facts(pair, prompts) | {"seed": settings.seed, "postfix_donor": settings.postfix_donor}
    facts |= {"steps": steps, "method": "attribution"}
    checked = {"cells": cells, "check_cells": check_cells, "top_cells": top_cells}
    identity = {**checked, "measure": measure_facts(measure), "settings": facts}
    with Run.open(out, "attribution", identity, models=pair.identities(), prompt=prompts[0]) as own:
        if (done := own.result(AttributionResult.load)) is not None:
            return done
        measure = measure or own_contrast(own, pair, prompts)
        asked = _Asked(by, span, wanted, chosen, flow, steps)
        here, there, moved = _attributed(pair, prompts, measure, asked, len(labels), settings)
        values = [(here + moved[i, j]).tolist() for i in range(len(chosen)) for j in range(len(labels))]
        sides = {RECIPIENT[flow]: here.tolist(), DONOR[flow]: there.tolist()}
        about = {"name": measure.name, "unit": measure.unit}
        facts |= {"versions": versions()}
        found = PatchResult(f"layer_{by}", tuple(cells), values, sides["base"], sides["finetuned"], about, facts)
        sampled = sorted({round(i) for i in np.linspace(0, len(cells) - 1, check_cells)}) if check_cells > 0 else []
        size = np.abs(np.array(values).mean(1) - here.mean().item())
        top = np.argsort(-size)[: max(0, top_cells)].tolist()
        inside = None if out is None else Path(out) / "exact"
        options: dict[str, Any] = {"measure": measure, "settings": settings, "out": inside, "progress": "exact cells"}
        exact = _exact(pair, prompts, cells, {*sampled, *top}, asked, options)
        return own.finish(AttributionResult(found, exact, tuple(sampled), steps))


@dataclass(frozen=True)
class _Asked:
    """What is attributed."""

    by: By
    span: str
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    flow: Flow
    steps: int | None


def _attributed(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    measure: AnswerContrast,
    asked: _Asked,
    n_labels: int,
    settings: PatchSettings,
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"], Float[Tensor, "layer cell prompt"]]:
    """The measure of recipient and donor as they are, and what each cell would change of the recipient's."""
    layers, flow, steps, sites = asked.layers, asked.flow, asked.steps, asked.sites
    donors = Donors(pair, list(prompts), settings.postfix_donor, settings.chat, settings.seed)
    with pair.using(DONOR[flow]) as model:
        there = unpatched(model, prompts, measure)
    groups = [layers] if steps is None else [(layer,) for layer in layers]
    # Donors of both sides come first: the sides of an adapter pair share one model.
    ends = {site: [donors.of(s, flow, asked.span, site) for s in ("identity control", "patched")] for site in sites}
    passes = [(group, step) for group in groups for step in range(steps or 1)]
    with pair.using(RECIPIENT[flow]) as model, counting(len(passes) * len(measure.rows), "gradients") as advance:
        here = unpatched(model, prompts, measure)
        total = torch.zeros((len(layers), n_labels, len(prompts)), device=device_of(model))
        together = most_rows(model, measure, settings.budget_gb, gradient=True)
        for group, step in passes:
            moved = _moved(ends, group, None if steps is None else (step + 0.5) / steps)
            for rows in similar_batches(measure.rows, together):
                gradients = _gradients(model, prompts, measure, rows, sites, group, asked.span, moved)
                _add(total, gradients, ends, layers, rows, len(prompts), asked.by)
                advance(len(rows))
    return here, there, (total / (steps or 1)).cpu()


def _labels(
    pair: ModelPair, prompts: Sequence[RenderedPrompt], by: By, span: str, sites: Sequence[Site]
) -> list[dict[str, Any]]:
    if by == "position":
        if len({len(prompt.span(span)) for prompt in prompts}) > 1:
            raise LensError(f"span {span!r} differs in length between prompts: a map needs equally many tokens")
        pieces = [prompts[0].pieces[i] for i in prompts[0].span(span).positions]
        return [{"position": i, "token": piece, "tokens": [i], "heads": None} for i, piece in enumerate(pieces)]
    kinds = {site in ("k", "v", "rot_k") for site in sites}
    if not set(sites) <= set(HEAD_SITES) or len(kinds) != 1:
        raise LensError(f"sites {list(sites)}: a head map takes k, v, rot_k (key/value heads), or z, q (query heads)")
    names = head_labels(pair.shape.n_heads, pair.shape.n_kv_heads, kv=kinds == {True})
    group = 1 if kinds == {True} else pair.shape.n_heads // pair.shape.n_kv_heads
    return [
        {"head": i, "label": name, "group": i // group, "heads": [i], "tokens": None} for i, name in enumerate(names)
    ]


def unpatched(
    model: HookedModel, prompts: Sequence[RenderedPrompt], measure: AnswerContrast
) -> Float[Tensor, " prompt"]:
    """The measure of a model as it is."""
    return next(iter(evaluate(model, prompts, measure, [()])))[0][1].values


def _moved(ends: Any, layers: Sequence[int], fraction: float | None) -> Interventions | None:
    """The patch that puts the recipient's activations a fraction of the way to the donor's."""
    if fraction is None:
        return None
    parts = Interventions(())
    for site, (own, donor) in ends.items():
        between = {
            (site, layer): own[site, layer] + fraction * (donor[site, layer] - own[site, layer]) for layer in layers
        }
        parts += patch(replace(own, values=between))
    return parts


def _gradients(
    model: HookedModel,
    prompts: Sequence[RenderedPrompt],
    measure: AnswerContrast,
    rows: Sequence[int],
    sites: Sequence[Site],
    layers: Sequence[int],
    span: str,
    moved: Interventions | None,
) -> dict[tuple[Site, int], Float[Tensor, "row token *feature"]]:
    """Gradient of each row's mean log p at a span, padded to its longest row with zeros."""
    device = device_of(model)
    batch = batch_prompts([measure.rows[row] for row in rows], side="right", device=device)
    placement = Placement.of(batch, [row % len(prompts) for row in rows], len(prompts))
    kept: dict[tuple[Site, int], Tensor] = {}

    def keeping(key: tuple[Site, int]) -> Any:
        def keep(activation: Tensor, hook: Any = None) -> Tensor:
            # Not a copy: the stream may go on in the tensor that was read.
            kept[key] = activation if activation.requires_grad else activation.requires_grad_()
            return kept[key]

        return keep

    names = [(hook_name(model, site, layer), keeping((site, layer))) for layer in layers for site in sites]
    read, counts = predicting_columns(batch.prompts, 0)
    hooked = model.hooks(fwd_hooks=names)
    with torch.enable_grad(), frozen(core_of(model)), applied(model, placement, moved), hooked:
        logits = forward(model, batch.ids, batch.attention_mask, read=read.to(device))
        scores = [mean_log_prob(p, x[:n]) for p, x, n in zip(batch.prompts, logits, counts, strict=True)]
        found = torch.autograd.grad(torch.stack(scores).sum(), list(kept.values()))
    picked = {}
    for key, gradient in zip(kept, found, strict=True):
        cells = placement.cells(span, None, "prompt", None, gradient.shape[1])
        width = int(cells.slots.max()) + 1
        cells = cells.to(gradient.device)
        whole = gradient.new_zeros((len(rows), width, *gradient.shape[2:]))
        whole[cells.rows, cells.slots] = gradient[cells.rows, cells.columns]
        picked[key] = whole
    return picked


def _add(
    total: Float[Tensor, "layer cell prompt"],
    gradients: dict[tuple[Site, int], Tensor],
    ends: Any,
    layers: Sequence[int],
    rows: Sequence[int],
    n: int,
    by: By,
) -> None:
    """(donor - recipient) . gradient, summed over what a cell holds, into each row's prompt, with the row's sign."""
    for (site, layer), gradient in gradients.items():
        own, donor = (end[site, layer].to(gradient.device) for end in ends[site])
        width = gradient.shape[1]
        prompt = torch.tensor([row % n for row in rows], device=own.device)
        source = prompt if len(own) > 1 else torch.zeros_like(prompt)
        gap = (donor - own)[source][:, :width]
        product = (gap.float() * gradient.float()).flatten(2) if by == "position" else gap.float() * gradient.float()
        attributed = product.sum(-1) if by == "position" else product.sum((1, 3))
        sign = torch.tensor([1.0 if row < n else -1.0 for row in rows], device=own.device)
        signed = (attributed * sign[:, None]).T.contiguous()
        total[layers.index(layer)].index_add_(1, prompt.to(total.device), signed.to(total.device))


def _exact(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    cells: Sequence[dict[str, Any]],
    wanted: set[int],
    asked: _Asked,
    options: dict[str, Any],
) -> PatchResult | None:
    """Some cells of the map by patching."""
    if not wanted:
        return None
    keys = [(cells[i]["layer"], cells[i]["position" if asked.by == "position" else "head"]) for i in sorted(wanted)]
    make = layer_position_map if asked.by == "position" else layer_head_map
    return make(pair, prompts, span=asked.span, sites=asked.sites, only=keys, flow=asked.flow, **options)
