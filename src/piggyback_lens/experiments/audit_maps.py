"""What carries the contrast of an audit's answers: the layer curve, the carrier map and the layer x token map.

The audit counts a behaviour in free answers; these are teacher-forced, on the first of its off-topic prompts and the
answers that both models gave to them.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.attribution import AttributionResult, attribution_map
from piggyback_lens.experiments.patching import carrier_map, layer_curve
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.intervals import Estimate, percent
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import say
from piggyback_lens.results.report import Part
from piggyback_lens.results.run import RESULT
from piggyback_lens.settings import AuditSettings, PatchSettings

if TYPE_CHECKING:
    import pandas as pd

CURVE, CARRIER, POSITIONS = "layer_curve", "carrier", "attribution"
"""Their folders within the audit's."""
LABELS = {CURVE: "layer curve", CARRIER: "carrier map", POSITIONS: "layer x token map"}
CHECKED_CELLS, TOP_CELLS = 6, 2
"""Cells of the layer x token map that are run exactly: evenly spaced ones, and the largest."""
CAPTIONS = {
    CARRIER: "Keys and values of a whole span of the other model, patched in at some of the layers or at all of them. "
    "Below a gap the controls: in place of the span as many other tokens, and as far in random directions.",
    CURVE: "The prefix's residual stream of the other model, patched in at one layer at a time.",
    POSITIONS: "Every layer x token of the prefix, by gradient: a first-order estimate of what patching that cell "
    "alone recovers.",
    "check": "Cells of that map that were patched exactly as well: how far the estimate can be trusted.",
}
SPANS = {"prefix": "prefix", "postfix": "postfix", "query": "query_control"}
"""Spans of the carrier map, and the conditions of the audit that patch the same."""
_ENDS = ("value", "low", "high")
TWO_MEASURES = (
    "The audit counts a behaviour in answers that the models write freely. There, once the first words are the "
    "base's, the rest follows: a patch that restores part of what decides them can restore most of the behaviour. "
    "This is what users see.",
    "The maps are teacher-forced: the contrast of two fixed answers, log p(the finetuned model's) - log p(the base's) "
    "as means over their tokens, each token scored after the ones before it. It moves in proportion and needs fewer "
    "prompts, but it weighs every token alike, and a changed first word does not change what follows.",
)


@runtime_checkable
class Mapped(Protocol):
    """What is read here of an audit's result."""

    @property
    def behaviour(self) -> Behaviour: ...  # noqa: D102
    @property
    def curve(self) -> PatchResult | None: ...  # noqa: D102
    @property
    def carrier(self) -> PatchResult | None: ...  # noqa: D102
    @property
    def positions(self) -> AttributionResult | None: ...  # noqa: D102
    def recovery(self, condition: str) -> Estimate: ...  # noqa: D102


@dataclass
class AnswerMaps:
    """The experiments on the contrast of answers that are there.

    Attributes:
        pair: base and finetuned.
        prompts: without responses, all with the same prefix.
        measure: the contrast of both models' answers to them.
        settings: of the audit.
        folder: of the audit's run; each experiment has one of its own in it. None writes nothing.
        progress: say what is done.
        executor: runs their passes; None for this process.
        left_out: experiments that this model does not allow, with the reason.
    """

    pair: ModelPair
    prompts: list[RenderedPrompt]
    measure: AnswerContrast
    settings: AuditSettings
    folder: Path | None
    progress: bool
    executor: Executor | None = None
    left_out: list[str] = field(default_factory=list)

    def curve(self) -> PatchResult:
        """One layer of the prefix at a time."""
        return layer_curve(self.pair, self.prompts, control_layers=self.settings.control_layers, **self._told(CURVE))

    def maps(self) -> dict[str, Any]:
        """The carrier map and the layer x token map, as the audit's result names them.

        One that this model does not allow is named in `left_out`: the audit does not rest on it.
        """
        checks: dict[str, Any] = {"check_cells": CHECKED_CELLS, "top_cells": TOP_CELLS}
        made: dict[str, Callable[[], Any]] = {
            "carrier": lambda: carrier_map(
                self.pair, self.prompts, sites=[("k", "v")], bands=self.settings.map_bands, **self._told(CARRIER)
            ),
            "positions": lambda: attribution_map(self.pair, self.prompts, **checks, **self._told(POSITIONS)),
        }
        found = {}
        for name, make in made.items():
            try:
                found[name] = make()
            except (LensError, torch.OutOfMemoryError) as error:
                left_out = LABELS[CARRIER if name == "carrier" else POSITIONS]
                self.left_out.append(f"The {left_out} was left out: {str(error).splitlines()[0][:300]}")
        return found

    def _told(self, folder: str) -> dict[str, Any]:
        label = LABELS[folder]
        if self.progress:
            say(f"{label} on {len(self.prompts)} off-topic prompts")
        return {
            "measure": self.measure,
            "settings": PatchSettings(seed=self.settings.seed, executor=self.executor),
            "out": None if self.folder is None else self.folder / folder,
            "progress": label,
        }


def load_maps(folder: Path) -> dict[str, Any]:
    """The curve and the maps in an audit's folder, as its result names them."""
    files = {"curve": folder / CURVE / RESULT, "carrier": folder / CARRIER / RESULT}
    found: dict[str, Any] = {name: PatchResult.load(file) for name, file in files.items() if file.is_file()}
    if (folder / POSITIONS / RESULT).is_file():
        found["positions"] = AttributionResult.load(folder / POSITIONS / RESULT)
    return {"curve": None, **found}


def audit_parts(result: Mapped) -> list[Part]:
    """The sections of an audit's report on where the change is carried."""
    figures = []
    if result.carrier is not None:
        figures.append((CAPTIONS[CARRIER], result.carrier.figure()))
    if result.curve is not None:
        figures.append((CAPTIONS[CURVE], result.curve.figure()))
    if result.positions is not None:
        own = result.positions.report().figures
        figures += [(CAPTIONS[kind], figure) for kind, (_, figure) in zip((POSITIONS, "check"), own, strict=False)]
    if not figures:
        return []
    maps = (result.carrier, result.curve, result.positions)
    said = [each.verdict for each in maps if each is not None]
    parts = [Part("Where it is carried", said, figures=figures)]
    if result.carrier is not None:
        table = two_measures(result)
        parts.insert(0, Part("Two measures", [*TWO_MEASURES, compared(result)], table))
    return parts


def two_measures(result: Mapped) -> "pd.DataFrame":
    """Recovery when the base's keys and values of a span are put in: of the counted behaviour, and of the contrast."""
    import pandas as pd

    rows = []
    for span, condition in SPANS.items():
        free, forced = result.recovery(condition), _forced(result, span)
        rows.append(
            {
                "base's K/V of the": span,
                f"{result.behaviour.label}, free answers (n = {free.n})": _percent(free.value, free.low, free.high),
                f"teacher-forced contrast (n = {int(forced['n'])})": _percent(*(forced[e] for e in _ENDS)),
            }
        )
    return pd.DataFrame(rows)


def forced_text(result: Mapped) -> str:
    """What the base's keys and values of each span restore of the contrast, in per cent."""
    found = {span: _forced(result, span) for span in SPANS}
    return ", ".join(f"{span} {_percent(*(row[end] for end in _ENDS))}" for span, row in found.items())


def compared(result: Mapped) -> str:
    """Whether both measures put prefix and postfix in the same order, and where the order may be chance."""
    spans = ("prefix", "postfix")
    free = {span: (own.value, own.low, own.high) for span, own in ((s, result.recovery(s)) for s in spans)}
    forced = {span: tuple(float(_forced(result, span)[end]) for end in _ENDS) for span in spans}
    if any(math.isnan(ends[0]) for ends in (*free.values(), *forced.values())):
        return "One of them is not defined here, so that they cannot be compared."
    first, second = (max(spans, key=lambda span: order[span][0]) for order in (free, forced))
    said = f"Here both put the {first} first."
    if first != second:
        said = (
            f"Here they disagree: in free answers the {first} restores more, teacher-forced the {second}. The first "
            "says what a user would see, the second where more of the difference in next-token predictions sits."
        )
    unsure = [name for name, order in (("in free answers", free), ("teacher-forced", forced)) if _overlap(order)]
    chance = f" {' and '.join(unsure).capitalize()} the two intervals overlap: that order may be chance."
    return said + (chance if unsure else "")


def _overlap(order: Mapping[str, tuple[float, ...]]) -> bool:
    (_, low, high), (_, other_low, other_high) = order.values()
    return not (low > other_high or other_low > high)


def _forced(result: Mapped, span: str) -> Any:
    assert result.carrier is not None
    frame = result.carrier.to_frame()
    whole = (frame["band"] == "all layers") & (frame["series"] == "patched") & (frame["flow"] == "repair")
    return frame[whole & (frame["span"] == span)].iloc[0]


def _percent(value: float, low: float, high: float) -> str:
    return percent(float(value), float(low), float(high))
