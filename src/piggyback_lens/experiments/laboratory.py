"""The cells of a patching experiment: made from donors that are computed once, and anew from their labels alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from piggyback_lens.conversations.batch import as_prompts
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.cells import Parts, require_one_prefix
from piggyback_lens.experiments.results import OTHERS
from piggyback_lens.interventions.donors import IDENTITY, Donors, Series, check_flow, of_tokens
from piggyback_lens.interventions.kinds import cut_attention, patch
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.models.backends import check_layers
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.settings import PatchSettings
from piggyback_lens.words import SITES, Flow, Side, Site

Spans = str | Sequence[str]
Sites = Site | Sequence[Site]
UNPATCHED = "unpatched"


@dataclass(frozen=True)
class Planned:
    """One cell to run: its labels (series, flow, span, sites, layers, ...) and its interventions."""

    labels: Mapping[str, Any]
    parts: Parts


def check_sites(sites: Sites) -> tuple[Site, ...]:
    """One or several sites as a tuple.

    Raises:
        LensError: none at all (a patch that is never made moves nothing), or an unknown one.
    """
    found = as_tuple(sites)
    wrong = [site for site in found if site not in SITES]
    if wrong or not found:
        asked = f"site {wrong[0]!r} is not known" if wrong else "no site to patch"
        raise LensError(f"{asked}: choose one of {', '.join(SITES)}")
    return found


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


class Laboratory:
    """Makes the cells of one experiment from donors that are computed once."""

    def __init__(self, pair: ModelPair, prompts: Sequence[RenderedPrompt], settings: PatchSettings) -> None:
        self.pair, self.prompts, self.settings = pair, as_prompts(prompts), settings
        require_one_prefix(self.prompts)
        if any("response" in prompt.spans for prompt in self.prompts):
            raise LensError("a prompt holds a response already: give prompts without one; the measure brings answers")
        self.donors = Donors(pair, self.prompts, settings.postfix_donor, settings.chat, settings.seed)
        self._roots: dict[Side, PrefixCache] = {}

    def root(self, side: Side) -> PrefixCache:
        """The prefix of a side as it is, on which passes start; computed once."""
        if side not in self._roots:
            with self.pair.using(side) as model:
                self._roots[side] = PrefixCache.compile(model, self.prompts[0])
        return self._roots[side]

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
        spans = ["prompt" if name == "all" else name for name in as_tuple(span)]
        wanted = check_sites(sites)
        if not spans:
            raise LensError("no span to patch: choose prefix, query, postfix, another span of the template, or prompt")
        labels = {
            "series": series,
            "flow": flow,
            "span": " + ".join(spans),
            "sites": "+".join(wanted),
            "layers": list(chosen),
            "heads": None if heads is None else list(heads),
            "tokens": None if tokens is None else list(tokens),
        }
        labels |= names
        return Planned(labels, self.parts(labels))

    def parts(self, labels: Mapping[str, Any]) -> Parts:
        """The interventions of a cell, of which its labels say everything; none for the models as they are."""
        if labels["series"] == UNPATCHED:
            return ()
        flow, sites, layers = labels["flow"], labels["sites"].split("+"), labels["layers"]
        if sites == ["attn_scores"]:
            scale = 1.0 if labels["series"] == IDENTITY else 0.0
            edge = (labels["span"], labels["read_from"])
            return (cut_attention(*edge, scale=scale, layers=layers, heads=labels["heads"]),)
        series: Series = "patched"
        if labels["series"] == OTHERS:
            where, heads = list(labels["other_tokens"].items()), None
        else:
            series, heads = labels["series"], labels["heads"]
            where = [(name, labels["tokens"]) for name in labels["span"].split(" + ")]
        return tuple(
            part
            for name, tokens in where
            for site in sites
            for part in self.part(series, flow, name, site, layers, heads, tokens)
        )

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
        chosen = self.other_tokens(as_tuple(span))
        cell = self.cell(names, "patched", flow, span, sites, layers, None, None)
        lengths = {name: {len(prompt.spans[name]) for prompt in self.prompts} for name in chosen}
        whole = [name for name, tokens in chosen.items() if lengths[name] == {len(tokens)}]
        labels = {**cell.labels, "series": OTHERS, "other_tokens": chosen, "whole_spans": whole}
        return Planned(labels, self.parts(labels))

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
