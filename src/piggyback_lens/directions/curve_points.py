"""What the curves return: raw numbers per point, seed and text; tables with intervals; figures; files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from piggyback_lens.errors import LensError
from piggyback_lens.intervals import Estimate, interval_text, mean_interval, recovery
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Number, Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Kind = Literal["efficiency", "stability", "significance", "ablation"]
Array = npt.NDArray[np.float64]
CONTROL = "random control"
CAPTIONS: Mapping[Kind, str] = {
    "efficiency": "Loss on the conversations against the norm, beside random vectors or adapters of that norm.",
    "stability": "How much of the gain orthogonal noise takes away: 0 = the solution, 1 = the base.",
    "significance": "KL to the base on plain text against the norm, beside random ones of that norm.",
    "ablation": "What taking the direction out of the residual stream costs on plain text.",
}
SAID: Mapping[Kind, str] = {
    "efficiency": "loss at about the own norm",
    "stability": "share of the gain lost at half noise",
    "significance": "KL on plain text at about the own norm",
    "ablation": "largest change of the loss when ablated",
}
SHOWN_MAXIMA = 5
"""Tokens of largest KL per solution in the report."""


@dataclass(frozen=True)
class CurvePoint:
    """One variant of the model.

    Attributes:
        series: name of the solution, or "name, ... control".
        x: norm, noise share or layer, as the curve says.
        fraction: the norm as a fraction of the solution's own; None where that has no meaning.
        seed: of noise or of a random control.
        values: per text: loss or KL, in nats per token.
    """

    series: str
    x: float
    fraction: float | None
    seed: int | None
    values: tuple[Number, ...]


@dataclass(frozen=True, repr=False)
class Curve(Result):
    """A curve over norm, noise or layers.

    Attributes:
        kind: efficiency, stability, significance or ablation.
        x_label: with its unit.
        y_label: with its unit.
        points: one for each series, x and seed.
        base: per text, the loss of the unchanged model.
        own: per solution and text, the loss at its own norm (stability).
        weights: scored tokens per text: numbers are means over tokens, not over texts.
        maxima: the tokens with the largest KL (significance), with what stands before them.
        settings: everything that was chosen, with versions.
    """

    name: ClassVar = "curve.1"
    kind: Kind
    x_label: str
    y_label: str
    points: tuple[CurvePoint, ...]
    base: tuple[Number, ...]
    own: Mapping[str, tuple[Number, ...]]
    weights: tuple[Number, ...]
    settings: Mapping[str, Any]
    maxima: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def series(self) -> tuple[str, ...]:
        """Names, in the order of the points."""
        return tuple(dict.fromkeys(point.series for point in self.points))

    def to_frame(self) -> "pd.DataFrame":
        """One row per series and x.

        Columns: series, x, fraction, value, low, high (95 % interval over texts, seeds averaged within a
        text), n (texts), seeds, seed_sd (standard deviation of the value over the seeds), reason.
        """
        import pandas as pd

        rows = []
        for series in self.series:
            for x in dict.fromkeys(point.x for point in self.points if point.series == series):
                own = self._at(series, x)
                each = [self._estimate(series, np.array(point.values)).value for point in own]
                found = self._estimate(series, np.mean([point.values for point in own], axis=0))
                row = {"series": series, "x": x, "fraction": own[0].fraction, "value": found.value}
                row |= {"low": found.low, "high": found.high, "n": found.n, "seeds": len(own)}
                row |= {"seed_sd": float(np.std(each, ddof=1)) if len(each) > 1 else math.nan}
                rows.append(row | {"reason": found.reason})
        return pd.DataFrame(rows)

    def _at(self, series: str, x: float) -> list[CurvePoint]:
        found = [point for point in self.points if point.series == series and point.x == x]
        if not found:
            known = sorted({point.x for point in self.points if point.series == series})
            raise LensError(f"the curve has no point of {series!r} at {x:g}: its series are {self.series}, x {known}")
        return found

    def _estimate(self, series: str, values: Array) -> Estimate:
        if self.kind != "stability":
            return weighted_interval(values, self.weights)
        weights = np.array(self.weights) / np.mean(self.weights)
        own = np.array(self.own[series.split(",", 1)[0]])
        return recovery(values * weights, own * weights, np.array(self.base) * weights)

    def difference(self, a: str, b: str) -> "pd.DataFrame":
        """Value of `a` minus value of `b` at every x that both have, with the interval of the paired difference.

        Raises:
            LensError: a stability curve (its solutions have scales of their own), or no common x.
        """
        import pandas as pd

        if self.kind == "stability":
            raise LensError("stability is relative to each solution's own gain: compare the two columns instead")
        xs = [{point.x for point in self.points if point.series == name} for name in (a, b)]
        common = sorted(xs[0] & xs[1])
        if not common:
            raise LensError(f"{a!r} and {b!r} have no common x: the curve's series are {', '.join(self.series)}")
        rows = []
        for x in common:
            means = [np.mean([point.values for point in self._at(name, x)], axis=0) for name in (a, b)]
            found = weighted_interval(means[0] - means[1], self.weights)
            rows.append({"x": x, "value": found.value, "low": found.low, "high": found.high, "n": found.n})
        return pd.DataFrame(rows).assign(series=f"{a} minus {b}")

    def figure(self) -> "go.Figure":
        """Lines with interval bands; controls in grey."""
        from piggyback_lens.figures.direction_plots import curve_figure

        norms = self.settings.get("own_norms", {})
        figure: go.Figure = curve_figure(self.to_frame(), self.kind, self.x_label, self.y_label, norms)
        return figure

    @property
    def solutions(self) -> tuple[str, ...]:
        """Names of what was measured, without the controls."""
        return tuple(name for name in self.series if "control" not in name)

    @property
    def verdict(self) -> str:
        """Every solution at its own norm, at half noise, or where ablating it costs most; beside a random one."""
        frame, parts = self.to_frame(), []
        for name in self.solutions:
            own = self._told(frame[frame["series"] == name])
            text = f"{name} {interval_text(own['value'], own['low'], own['high'])}"
            control = frame[(frame["series"] == f"{name}, {CONTROL}") & (frame["x"] == own["x"])]
            parts.append(text + (f" (random {float(control.iloc[0]['value']):.3g})" if len(control) else ""))
        half = f" (ε = {self._half(frame):g})" if self.kind == "stability" else ""
        return f"{SAID[self.kind]}{half}: {', '.join(parts)}."

    def _told(self, own: "pd.DataFrame") -> Any:
        """The row of a solution that the verdict gives."""
        if self.kind == "ablation":
            return own.iloc[int(own["value"].abs().argmax())]
        if self.kind == "stability":
            return own.iloc[int((own["x"] - self._half(own)).abs().argmin())]
        return own.iloc[int((own["fraction"].astype(float) - 1).abs().argmin())]

    def _half(self, frame: "pd.DataFrame") -> float:
        return float(min(frame["x"].unique(), key=lambda x: abs(x - 0.5)))

    def differences(self) -> "pd.DataFrame | None":
        """First minus second solution at equal norms, where there are exactly two of one kind; else None."""
        told = self.settings.get("solutions", {})
        kinds = {str(own["kind"]) for own in told.values()}
        if self.kind not in ("efficiency", "significance") or len(told) != 2 or len(kinds) > 1:
            return None
        return self.difference(*self.solutions)

    def report(self) -> Report:
        """The curve, the difference of two solutions at equal norms, and the tokens of largest KL."""
        frame, gaps = self.to_frame(), self.differences()
        figures = [(CAPTIONS[self.kind], self.figure())]
        if gaps is not None:
            from piggyback_lens.figures.direction_plots import difference_figure

            figures.append(
                (
                    "The difference at equal norms, paired over texts.",
                    difference_figure(gaps, self.kind, self.x_label, self.y_label),
                )
            )
        undefined = frame[frame["reason"] != ""].to_dict("records")
        notes = [f"{row['series']} at {row['x']:g}: {row['reason']}" for row in undefined]
        shown = frame[["series", "x", "value", "low", "high", "n", "seeds", "seed_sd"]]
        title = f"{self.kind.capitalize()} of {', '.join(self.solutions)}"
        return Report(title, self.verdict, shown, figures, notes=[*notes, *self._largest()], card=self.settings)

    def _largest(self) -> list[str]:
        """The tokens of largest KL, one line each."""
        lines, counts = [], dict.fromkeys(self.series, 0)
        for row in self.maxima:
            counts[row["series"]] += 1
            if counts[row["series"]] <= SHOWN_MAXIMA:
                where = f"{row['token']!r} after {row['before']!r}"
                at = f"{row['series']} at norm {row['norm']:.3g}"
                lines.append(f"Largest KL of {at}: {row['kl']:.3g} nats at {where}.")
        return lines

    def _sizes(self) -> str:
        return f"{self.kind}, {len(self.points)} points of {', '.join(self.series)}"

    def check(self) -> None:
        """Refuse points that are not of the same texts."""
        sizes = {len(x) for x in (self.weights, *(point.values for point in self.points), *self.own.values())}
        if len(sizes) > 1:
            raise ValueError(f"points of {sorted(sizes)} texts")


def weighted_interval(values: npt.ArrayLike, weights: Sequence[float]) -> Estimate:
    """The mean over tokens, Σ w·v / Σ w for per-text means v of w tokens each, with an interval over texts.

    The interval is that of the ratio estimator, linearised: the mean of m + (w/w̄)(v − m), which is m.
    """
    v, w = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    mean = float((v * w).sum() / w.sum())
    return mean_interval(mean + w / w.mean() * (v - mean), rate=False)
