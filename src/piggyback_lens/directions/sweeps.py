"""What sweeps over directions return: per point and prompt every measure, with tables, figures and files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from piggyback_lens.intervals import interval_text, is_rate, mean_interval
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Number, Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

METRICS = ("behaviour", "kl", "own_nll")
RANDOM = "random control"
SHOWN = 4
"""Prompts whose answers the report shows."""


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a sweep, with one number per prompt for each measure.

    Attributes:
        series: "steered", "ablated at one layer", "ablated everywhere", or the random control of one of them.
        layer: where the intervention acts, or the vector comes from.
        x: strength, in multiples of the vector; 1 where nothing is scaled.
        fraction: length of what is added as a fraction of the mean activation norm; None where unknown.
        seed: of a random control.
        behaviour: in its unit.
        kl: KL(unsteered || steered) per token of the unsteered answers, in nats.
        own_nll: nats per token of the answer under the unsteered model; its exponential is the perplexity.
    """

    series: str
    layer: int
    x: float
    fraction: float | None
    seed: int | None
    behaviour: tuple[Number, ...]
    kl: tuple[Number, ...]
    own_nll: tuple[Number, ...]


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    """A sweep of strengths or layers.

    Attributes:
        kind: "steer" or "ablate".
        measure: name, label and unit of the behaviour.
        points: one for each setting.
        settings: everything that was chosen, with versions.
        answers: generated texts per point, in the order of `points`; empty if they were not kept.
    """

    name: ClassVar = "sweep.1"
    kind: str
    measure: Mapping[str, str]
    points: tuple[SweepPoint, ...]
    settings: Mapping[str, Any]
    answers: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def to_frame(self) -> "pd.DataFrame":
        """One row per series, layer, strength and metric.

        Columns: series, layer, x, fraction, metric (behaviour, kl, perplexity), value,
        low, high (95 % interval over prompts, seeds averaged within a prompt), n, seeds.
        """
        import pandas as pd

        rows = []
        for key, points in self._groups().items():
            series, layer, x = key
            label = {"series": series, "layer": layer, "x": x, "fraction": points[0].fraction}
            for metric in METRICS:
                table = np.array([getattr(point, metric) for point in points], dtype=float)
                values, unit = table.mean(0), self.measure["unit"] if metric == "behaviour" else ""
                found = mean_interval(values, self.settings.get("questions"), rate=is_rate(unit, values))
                numbers = [found.value, found.low, found.high]
                if metric == "own_nll":
                    numbers = [math.exp(number) for number in numbers]
                shown = "perplexity" if metric == "own_nll" else metric
                values = dict(zip(("value", "low", "high"), numbers, strict=True))
                rows.append(label | {"metric": shown} | values | {"n": found.n, "seeds": len(points)})
        return pd.DataFrame(rows)

    def _groups(self) -> dict[tuple[str, int, float], list[SweepPoint]]:
        """Points that differ in the seed only."""
        groups: dict[tuple[str, int, float], list[SweepPoint]] = {}
        for point in self.points:
            groups.setdefault((point.series, point.layer, point.x), []).append(point)
        return groups

    def figure(self) -> "go.Figure":
        """Behaviour, KL and perplexity side by side, with the random controls."""
        from piggyback_lens.figures.direction_plots import sweep_figure

        figure: go.Figure = sweep_figure(
            self.to_frame(), self.kind, self.measure, str(self.settings.get("direction", ""))
        )
        return figure

    def report(self) -> Report:
        """The sweep with its controls, and answers at every strength of the layer that moves the behaviour most."""
        figures = [("Behaviour, KL to the unsteered model, and perplexity, beside random vectors.", self.figure())]
        title = f"{'Steering' if self.kind == 'steer' else 'Ablation'}: {self.measure['label']}"
        notes = [*self.settings.get("notes", ()), f"Answers are those at layer {self.strongest_layer}."]
        return Report(title, self.verdict, self.to_frame(), figures, self._examples(), notes, card=self.settings)

    def _examples(self) -> "pd.DataFrame":
        """A few prompts x points at one layer, and one random control at the largest strength."""
        import pandas as pd

        here = [i for i, point in enumerate(self.points) if point.layer == self.strongest_layer and self.answers]
        largest = max((abs(self.points[i].x) for i in here), default=0.0)
        rows = []
        for number, prompt in enumerate(self.settings.get("prompts", ())[:SHOWN]):
            for point, texts in ((self.points[i], self.answers[i]) for i in here):
                if point.seed is None or (point.seed == 0 and abs(point.x) == largest):
                    condition = f"{point.series}, strength {point.x:g}"
                    rows.append({"prompt": prompt, "condition": condition, "response": texts[number]})
        return pd.DataFrame(rows)

    @property
    def strongest_layer(self) -> int:
        """Where the behaviour moves most."""
        return int(self._strongest()[0]["layer"])

    @property
    def verdict(self) -> str:
        """The point that moves the behaviour most, with what it costs and what a random vector does there."""
        best, table = self._strongest()
        if self.kind != "steer":
            label = self.measure["label"]
            return f"{best['series']}: {label} {_text(best)} at layer {best['layer']} ({self.measure['unit']})."
        at = (best["layer"], best["x"])
        here = {metric: table[(*at, "steered", metric)] for metric in ("behaviour", "kl", "perplexity")}
        before = {metric: table[(best["layer"], 0.0, "steered", metric)] for metric in ("behaviour", "perplexity")}
        random = table.get((*at, RANDOM, "behaviour"))
        parts = [
            f"Steering moves the {self.measure['label']} most at layer {at[0]}, strength {at[1]:g}: "
            f"{_text(before['behaviour'])} -> {_text(here['behaviour'])} ({self.measure['unit']})"
        ]
        parts += [f"a random vector of that length gives {_text(random)}"] if random else []
        parts.append(f"KL {_text(here['kl'])} nats per token")
        change = f"{before['perplexity']['value']:.3g} -> {here['perplexity']['value']:.3g}"
        return "; ".join([*parts, f"perplexity of the answers {change}"]) + "."

    def _strongest(self) -> tuple[dict[Any, Any], dict[tuple[Any, ...], dict[Any, Any]]]:
        """The row of the largest change of the behaviour, and all rows by place and metric."""
        rows = self.to_frame().to_dict("records")
        table = {(row["layer"], row["x"], row["series"], row["metric"]): row for row in rows}
        own = [row for row in rows if RANDOM not in row["series"] and row["metric"] == "behaviour"]
        still = next((row["value"] for row in own if row["x"] == 0), 0.0)
        moved = [row for row in own if row["x"] != 0] or own
        return max(moved, key=lambda row: abs(row["value"] - still)), table

    def _sizes(self) -> str:
        return f"{self.kind}, {len(self.points)} points, {self.measure['label']}"

    def check(self) -> None:
        """Refuse points that are not of the same prompts, and answers that are not of the points."""
        sizes = {len(getattr(point, metric)) for point in self.points for metric in METRICS}
        if not self.points or len(sizes) != 1 or len(self.answers) not in (0, len(self.points)):
            raise ValueError(f"{len(self.points)} points of {sorted(sizes)} prompts, {len(self.answers)} answers")
        _ = self.measure["name"], self.measure["label"], self.measure["unit"]


def _text(row: Mapping[Any, Any]) -> str:
    return interval_text(row["value"], row["low"], row["high"])
