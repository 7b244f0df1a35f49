"""Patching experiments between base and finetuned: spans, layer curves, and maps of layers x tokens or heads.

Every experiment takes the pair and the prompts, and returns a `PatchResult` with its controls: the identity
control (each model patched with its own activations: the noise floor) and the random control (activations
moved as far as the donor's, token by token, in random directions). Patches act on prompt tokens only.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from piggyback_lens.conversations.batch import as_prompts
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.cells import Parts, require_one_prefix
from piggyback_lens.experiments.experiment import Planned, run_plan
from piggyback_lens.experiments.results import OTHERS, RANDOM, PatchResult
from piggyback_lens.interventions.donors import IDENTITY, Donors, Series, check_flow, of_tokens
from piggyback_lens.interventions.kinds import patch
from piggyback_lens.measuring.answers import Measure
from piggyback_lens.models.backends import check_layers
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import shows
from piggyback_lens.settings import PatchSettings
from piggyback_lens.words import HEAD_SITES, SITES, Flow, Site

Spans = str | Sequence[str]
Sites = Site | Sequence[Site]
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
    lab = _Laboratory(pair, prompts, settings)
    series: tuple[Series, ...] = ("patched", *CONTROLS) if controls else ("patched",)
    plan = [lab.cell({}, s, flow, span, sites, layers, heads, tokens) for s in series]
    return lab.run_plan(plan, "span", measure, out)


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
    lab = _Laboratory(pair, prompts, settings)
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
    if _tuple(sites) != ("k", "v") and span == "prefix":
        plan.append(lab.cell(whole, "patched", flow, span, ("k", "v"), None, None, tokens))
    return lab.run_plan(plan, "layer_curve", measure, out)


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
    lab = _Laboratory(pair, prompts, settings)
    labels = lab.token_labels(span, tokens)
    plan = []
    cells = _among([(i, token) for i in check_layers(layers, pair.shape.n_layers) for token in labels], only)
    for series, (layer, token) in _with_controls(cells, control_cells):
        names = {"layer": layer, "position": token, "token": labels[token]}
        plan.append(lab.cell(names, series, flow, span, sites, [layer], None, [token]))
    return lab.run_plan(plan, "layer_position", measure, out)


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
    lab = _Laboratory(pair, prompts, settings)
    chosen = _tuple(sites)
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
    return lab.run_plan(plan, "layer_head", measure, out)


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
    lab = _Laboratory(pair, prompts, settings)
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
    return lab.run_plan(plan, "carrier", measure, out)


def head_labels(n_heads: int, n_kv_heads: int, *, kv: bool) -> list[str]:
    """Names of query heads or key/value heads that say, under grouped-query attention, which belong together."""
    group = n_heads // n_kv_heads
    if group == 1:
        return [str(head) for head in range(n_heads)]
    if not kv:
        return [f"{head} (kv {head // group})" for head in range(n_heads)]
    ranges = [(head * group, (head + 1) * group - 1) for head in range(n_kv_heads)]
    return [f"kv {head} (q {low}-{high})" for head, (low, high) in enumerate(ranges)]


def check_sites(sites: Sites) -> tuple[Site, ...]:
    """One or several sites as a tuple.

    Raises:
        LensError: none at all (a patch that is never made moves nothing), or an unknown one.
    """
    found = _tuple(sites)
    wrong = [site for site in found if site not in SITES]
    if wrong or not found:
        asked = f"site {wrong[0]!r} is not known" if wrong else "no site to patch"
        raise LensError(f"{asked}: choose one of {', '.join(SITES)}")
    return found


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


def _tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


class _Laboratory:
    """Makes the cells of one experiment from donors that are computed once."""

    def __init__(self, pair: ModelPair, prompts: Sequence[RenderedPrompt], settings: PatchSettings) -> None:
        self.pair, self.prompts, self.settings = pair, as_prompts(prompts), settings
        require_one_prefix(self.prompts)
        if any("response" in prompt.spans for prompt in self.prompts):
            raise LensError("a prompt holds a response already: give prompts without one; the measure brings answers")
        self.donors = Donors(pair, self.prompts, settings.postfix_donor, settings.chat, settings.seed)

    def cell(
        self,
        names: dict[str, Any],
        series: Series,
        flow: Flow,
        span: Spans,
        sites: Sites,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
        tokens: Sequence[int] | None,
    ) -> Planned:
        """One cell with its labels."""
        check_flow(flow)
        chosen = check_layers(layers, self.pair.shape.n_layers)
        spans = ["prompt" if name == "all" else name for name in _tuple(span)]
        wanted = check_sites(sites)
        if not spans:
            raise LensError("no span to patch: choose prefix, query, postfix, another span of the template, or prompt")
        parts = [
            part
            for name in spans
            for site in wanted
            for part in self.part(series, flow, name, site, chosen, heads, tokens)
        ]
        labels = {
            "series": series,
            "flow": flow,
            "span": " + ".join(spans),
            "sites": "+".join(wanted),
            "layers": list(chosen),
            "heads": None if heads is None else list(heads),
            "tokens": None if tokens is None else list(tokens),
        }
        return Planned(labels | names, tuple(parts))

    def part(
        self,
        series: Series,
        flow: Flow,
        span: str,
        site: Site,
        layers: Sequence[int],
        heads: Sequence[int] | None,
        tokens: Sequence[int] | None,
    ) -> Parts:
        """Patch of one span at one site."""
        self.prompts[0].span(span) if span != "prompt" else None
        donor = self.donors.of(series, flow, span, site)
        if tokens is not None:
            donor = of_tokens(donor, tokens)
        return patch(donor, sites=site, layers=layers, heads=heads).parts

    def others(self, names: dict[str, Any], flow: Flow, span: Spans, sites: Sites, layers: Sequence[int]) -> Planned:
        """The donor's activations at other tokens than a span's, as many as it has."""
        chosen = self.other_tokens(_tuple(span))
        cell = self.cell(names, "patched", flow, span, sites, layers, None, None)
        parts = [
            part
            for name, tokens in chosen.items()
            for site in _tuple(sites)
            for part in self.part("patched", flow, name, site, check_layers(layers, 10**6), None, tokens)
        ]
        lengths = {name: {len(prompt.spans[name]) for prompt in self.prompts} for name in chosen}
        whole = [name for name, tokens in chosen.items() if lengths[name] == {len(tokens)}]
        labels = {**cell.labels, "series": OTHERS, "other_tokens": chosen, "whole_spans": whole}
        return replace(cell, labels=labels, parts=tuple(parts))

    def other_tokens(self, spans: Sequence[str]) -> dict[str, list[int]]:
        """Tokens outside spans that every prompt has, evenly drawn: span name to indices in it."""
        main = ("prefix", "query", "postfix")
        spans = [part for name in spans for part in (main if name in ("prompt", "all") else (name,))]
        sizes = {name: min(len(p.spans[name]) for p in self.prompts) for name in main}
        patched = {
            (name, position - prompt.spans[name].start)
            for prompt in self.prompts
            for span in spans
            for position in prompt.span(span).positions
            for name in main
            if position in prompt.spans[name].positions
        }
        outside = [(name, i) for name in main for i in range(sizes[name]) if (name, i) not in patched]
        wanted = round(float(np.mean([sum(len(p.span(name)) for name in spans) for p in self.prompts])))
        if not outside:
            raise LensError(f"spans {', '.join(spans)} leave no other token of the prompt for the control")
        generator = np.random.default_rng(self.settings.seed)
        drawn = generator.permutation(len(outside))[:wanted]
        found: dict[str, list[int]] = {}
        for i in sorted(drawn.tolist()):
            found.setdefault(outside[i][0], []).append(outside[i][1])
        return found

    def token_labels(self, span: str, tokens: Sequence[int] | None) -> dict[int, str]:
        """Index within a span to the token's text.

        Raises:
            LensError: the span's length differs between prompts.
        """
        lengths = {len(prompt.span(span)) for prompt in self.prompts}
        if len(lengths) > 1:
            raise LensError(f"span {span!r} has {min(lengths)} to {max(lengths)} tokens: a map needs equally many")
        pieces = [self.prompts[0].pieces[i] for i in self.prompts[0].span(span).positions]
        wanted = range(len(pieces)) if tokens is None else tokens
        wrong = [token for token in wanted if not 0 <= token < len(pieces)]
        if wrong or not len(wanted):
            raise LensError(f"token {wrong[:1]} of span {span!r}: choose from 0 to {len(pieces) - 1}")
        return {token: pieces[token] for token in wanted}

    def run_plan(
        self,
        plan: Sequence[Planned],
        kind: str,
        measure: Measure | None,
        out: str | Path | None,
    ) -> PatchResult:
        """Run the cells."""
        return run_plan(self.pair, self.prompts, plan, kind, measure, self.settings, out=out)
