"""Patching experiments between base and finetuned: spans, layer curves, and maps of layers x tokens or heads.

Every experiment takes the pair and the prompts, and returns a `PatchResult` with its controls: the identity
control (each model patched with its own activations: the noise floor) and the random control (activations
moved as far as the donor's, token by token, in random directions). Patches act on prompt tokens only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.experiment import run_plan
from piggyback_lens.experiments.laboratory import Laboratory, Sites, Spans, as_tuple
from piggyback_lens.experiments.results import RANDOM, PatchResult
from piggyback_lens.interventions.donors import IDENTITY, Series
from piggyback_lens.measuring.answers import Measure
from piggyback_lens.models.backends import check_layers
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import shows
from piggyback_lens.settings import PatchSettings
from piggyback_lens.words import HEAD_SITES, Flow

CurveMode = Literal["single", "below", "above", "window"]
CONTROLS: tuple[Series, ...] = (IDENTITY, RANDOM)


@shows("patched span")
def patch_span(  # noqa: PLR0913
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    span: Spans = "prefix",
    sites: Sites = ("k", "v"),
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    flow: Flow = "repair",
    controls: bool = True,
    measure: Measure | None = None,
    settings: PatchSettings = PatchSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> PatchResult:
    """Patch a span (or several together) at some sites, layers, heads and tokens: one number with its controls.

    2606.06667 eq. 1 with the default sites. Keys are patched before the rotary embedding and a key norm.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix.
        span: prefix, query, postfix, think, another sub-span of the template, or prompt (all of them).
        sites: which activations.
        layers: None for all.
        heads: None for all; key/value heads at k and v.
        tokens: indices within the span; None for all of it.
        flow: repair (base to finetuned) or infect.
        controls: run the identity and the random control as well.
        measure: an `AnswerContrast` or `GeneratedBehaviour`; None for the contrast of the models' own answers (greedy,
            24 tokens), which is generated first.
        settings: seed, memory, and where postfix activations come from.
        out: folder of the run, which gets each cell as it comes; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: a span, site, layer, head or token that is not there; prompts with different prefixes.

    Example:
        >>> found = patch_span(pair, prompts, "prefix")
        >>> found.to_frame()["series"].tolist()
        ['patched', 'identity control', 'random control']

    Example:
        >>> curve = layer_curve(pair, prompts, layers=[0, 2], control_layers=1)
        >>> {"layer", "value", "low", "high", "n", "reason"} <= set(curve.to_frame())
        True
    """
    lab = Laboratory(pair, prompts, settings)
    series: tuple[Series, ...] = ("patched", *CONTROLS) if controls else ("patched",)
    plan = [lab.cell({}, s, flow, span, sites, layers, heads, tokens) for s in series]
    return run_plan(lab, plan, "span", measure, out)


@shows("layer curve")
def layer_curve(  # noqa: PLR0913
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    *,
    span: Spans = "prefix",
    sites: Sites = "resid_pre",
    mode: CurveMode = "single",
    window: int = 3,
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    flow: Flow = "repair",
    control_layers: int = 6,
    measure: Measure | None = None,
    settings: PatchSettings = PatchSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> PatchResult:
    """Recovery when one layer is patched, or all up to it, all from it on, or a window around it.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix.
        span: which tokens.
        sites: which activations.
        mode: "single" layer l, "below" (layers <= l), "above" (layers >= l), or "window" (`window` layers around l).
        window: how many layers a window has.
        layers: None for all.
        tokens: indices within the span; None for all of it.
        flow: repair (base to finetuned) or infect.
        control_layers: at so many evenly spaced layers, run the identity and the random control.
        measure: an `AnswerContrast` or `GeneratedBehaviour`; None for the contrast of the models' own answers (greedy,
            24 tokens), which is generated first.
        settings: seed, memory, and where postfix activations come from.
        out: folder of the run, which gets each cell as it comes; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: as `patch_span`; unknown mode.
    """
    if mode not in get_args(CurveMode):
        raise LensError(f"mode {mode!r} is not known: choose one of {', '.join(get_args(CurveMode))}")
    if window < 1:
        raise LensError(f"window {window}: it must be at least 1 layer")
    lab = Laboratory(pair, prompts, settings)
    chosen, last = check_layers(layers, pair.shape.n_layers), pair.shape.n_layers - 1

    def patched_layers(layer: int) -> Sequence[int]:
        start = layer - (window - 1) // 2
        ranges = {
            "single": (layer, layer),
            "below": (0, layer),
            "above": (layer, last),
            "window": (max(0, start), min(last, start + window - 1)),
        }
        low, high = ranges[mode]
        return range(low, high + 1)

    plan = [
        lab.cell({"layer": layer, "mode": mode}, series, flow, span, sites, patched_layers(layer), None, tokens)
        for series, layer in _with_controls(chosen, control_layers)
    ]
    whole = {"layer": -1, "mode": "all layers"}
    if as_tuple(sites) != ("k", "v") and span == "prefix":
        plan.append(lab.cell(whole, "patched", flow, span, ("k", "v"), None, None, tokens))
    return run_plan(lab, plan, "layer_curve", measure, out)


@shows("layer x token map")
def layer_position_map(  # noqa: PLR0913
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    *,
    span: str = "prefix",
    sites: Sites = "resid_pre",
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    only: Sequence[tuple[int, int]] | None = None,
    flow: Flow = "repair",
    control_cells: int = 6,
    measure: Measure | None = None,
    settings: PatchSettings = PatchSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> PatchResult:
    """Every layer x token of a span, patched one cell at a time; axis labels are the tokens themselves.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix.
        span: prefix, postfix or a sub-span of equally many tokens in every prompt.
        sites: which activations (several are patched together).
        layers: None for all.
        tokens: indices within the span; None for all.
        only: run just these (layer, token) cells.
        flow: repair (base to finetuned) or infect.
        control_cells: at so many evenly spaced cells, run the identity and the random control.
        measure: an `AnswerContrast` or `GeneratedBehaviour`; None for the contrast of the models' own answers (greedy,
            24 tokens), which is generated first.
        settings: seed, memory, and where postfix activations come from.
        out: folder of the run, which gets each cell as it comes; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: as `patch_span`; a span whose length differs between prompts.

    Example:
        >>> cells = layer_position_map(pair, prompts, layers=[1], tokens=[0, 1], control_cells=0)
        >>> cells.to_frame()[["layer", "position"]].values.tolist()
        [[1, 0], [1, 1]]
    """
    lab = Laboratory(pair, prompts, settings)
    labels = lab.token_labels(span, tokens)
    plan = []
    cells = _among([(i, token) for i in check_layers(layers, pair.shape.n_layers) for token in labels], only)
    for series, (layer, token) in _with_controls(cells, control_cells):
        names = {"layer": layer, "position": token, "token": labels[token]}
        plan.append(lab.cell(names, series, flow, span, sites, [layer], None, [token]))
    return run_plan(lab, plan, "layer_position", measure, out)


@shows("layer x head map")
def layer_head_map(  # noqa: PLR0913
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    *,
    span: Spans = "prefix",
    sites: Sites = "z",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    only: Sequence[tuple[int, int]] | None = None,
    flow: Flow = "repair",
    control_cells: int = 6,
    measure: Measure | None = None,
    settings: PatchSettings = PatchSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> PatchResult:
    """Every layer x head: query heads at z and q, key/value heads at k and v (fewer under grouped-query attention).

    Labels say which belong together: "4 (kv 1)" is query head 4, which reads key/value head 1; "kv 1 (q 3-5)" is
    a key/value head with its query heads. Arguments and errors as `layer_position_map`; `sites` are either k, v
    and rot_k, or z and q.

    Example:
        >>> carrier = carrier_map(pair, prompts, sites=[("k", "v")], bands=1)
        >>> sorted(carrier.to_frame()["span"].unique())
        ['postfix', 'prefix', 'query']
    """
    lab = Laboratory(pair, prompts, settings)
    chosen = as_tuple(sites)
    kinds = {site in ("k", "v", "rot_k") for site in chosen}
    if not set(chosen) <= set(HEAD_SITES) or len(kinds) != 1:
        raise LensError(f"sites {list(chosen)}: a head map takes k, v, rot_k (key/value heads), or z, q (query heads)")
    labels = head_labels(pair.shape.n_heads, pair.shape.n_kv_heads, kv=kinds == {True})
    wanted = list(range(len(labels))) if heads is None else list(heads)
    if set(wanted) - set(range(len(labels))) or not wanted:
        raise LensError(f"heads {wanted} asked at {'+'.join(chosen)}, which has heads 0 to {len(labels) - 1}")
    group = pair.shape.n_heads // pair.shape.n_kv_heads
    plan = []
    cells = _among([(i, head) for i in check_layers(layers, pair.shape.n_layers) for head in wanted], only)
    for series, (layer, head) in _with_controls(cells, control_cells):
        names = {
            "layer": layer,
            "head": head,
            "label": labels[head],
            "group": head if kinds == {True} else head // group,
        }
        plan.append(lab.cell(names, series, flow, span, chosen, [layer], [head], None))
    return run_plan(lab, plan, "layer_head", measure, out)


@shows("carrier map")
def carrier_map(  # noqa: PLR0913
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    *,
    spans: Sequence[Spans] = ("prefix", "query", "postfix"),
    sites: Sequence[Sites] = (("k", "v"), "resid_pre"),
    bands: int = 3,
    flows: Sequence[Flow] = ("repair", "infect"),
    measure: Measure | None = None,
    settings: PatchSettings = PatchSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> PatchResult:
    """Where the behaviour rides: span x layer band x site, in both flows, every cell with its controls.

    Repair asks whether a cell is necessary (with the base's activations there, is the finetuned model restored?),
    infect whether it is sufficient (do the finetuned model's activations there move the base?). Each cell has an
    identity control, a random control (as far, in random directions), and a control of other tokens: as many as
    the span has, drawn from the rest of the prompt (all of the rest where it has fewer).

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix.
        spans: each a span or several together.
        sites: each a site or several together.
        bands: into how many equal bands of layers; all layers together are added.
        flows: repair, infect, or both.
        measure: an `AnswerContrast` or `GeneratedBehaviour`; None for the contrast of the models' own answers (greedy,
            24 tokens), which is generated first.
        settings: seed, memory, and where postfix activations come from.
        out: folder of the run, which gets each cell as it comes; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: as `patch_span`; more bands than layers.
    """
    lab = Laboratory(pair, prompts, settings)
    n_layers = pair.shape.n_layers
    if not 1 <= bands <= n_layers:
        raise LensError(f"{bands} bands of {n_layers} layers: choose 1 to {n_layers}")
    parts = [part.tolist() for part in np.array_split(np.arange(n_layers), bands)] if bands > 1 else []
    named = {f"{part[0]}-{part[-1]}": part for part in parts} | {"all layers": list(range(n_layers))}
    plan = []
    for flow in flows:
        for own_sites in sites:
            for span in spans:
                for band, layers in named.items():
                    names = {"band": band}
                    for series in ("patched", *CONTROLS):
                        plan.append(lab.cell(names, series, flow, span, own_sites, layers, None, None))
                    plan.append(lab.others(names, flow, span, own_sites, layers))
    return run_plan(lab, plan, "carrier", measure, out)


def head_labels(n_heads: int, n_kv_heads: int, *, kv: bool) -> list[str]:
    """Names of query heads or key/value heads that say, under grouped-query attention, which belong together."""
    group = n_heads // n_kv_heads
    if group == 1:
        return [str(head) for head in range(n_heads)]
    if not kv:
        return [f"{head} (kv {head // group})" for head in range(n_heads)]
    ranges = [(head * group, (head + 1) * group - 1) for head in range(n_kv_heads)]
    return [f"kv {head} (q {low}-{high})" for head, (low, high) in enumerate(ranges)]


def _among(cells: list[tuple[int, int]], only: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """The cells that were asked for."""
    if only is None:
        return cells
    wrong = sorted({*only} - {*cells})
    if wrong or not only:
        raise LensError(f"cell {wrong[:1]} is not in this map: give (layer, token) or (layer, head) pairs that are")
    return [cell for cell in cells if cell in {*only}]


def _with_controls(cells: Sequence[Any], count: int) -> list[tuple[Series, Any]]:
    """All cells patched, and evenly spaced ones with the controls."""
    spaced = sorted({round(i) for i in np.linspace(0, len(cells) - 1, count)}) if count > 0 else []
    return [("patched", cell) for cell in cells] + [(series, cells[i]) for series in CONTROLS for i in spaced]
