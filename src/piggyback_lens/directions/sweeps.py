"""What sweeps over directions return: per point and prompt every measure, with tables, figures and files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from piggyback_lens.files import read_result, write_result
from piggyback_lens.maths import mean_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

METRICS = ("behaviour", "kl", "own_nll")
RANDOM = "random control"


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
    behaviour: tuple[float, ...]
    kl: tuple[float, ...]
    own_nll: tuple[float, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep of strengths or layers.

    Attributes:
        kind: "steer" or "ablate".
        measure: name, label and unit of the behaviour.
        points: one for each setting.
        settings: everything that was chosen, with versions.
        answers: generated texts per point, in the order of `points`; empty if they were not kept.
    """

    kind: str
    measure: Mapping[str, str]
    points: tuple[SweepPoint, ...]
    settings: Mapping[str, Any]
    answers: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def to_frame(self) -> "pd.DataFrame":
        """One row per series, layer, strength and metric.

        Columns: series, layer, x, fraction, metric (behaviour, kl, perplexity), value,
        low, high (95 % bootstrap over prompts, seeds averaged within a prompt), n, seeds.
        """
        import pandas as pd

        rows = []
        for key, points in self._groups().items():
            series, layer, x = key
            label = {"series": series, "layer": layer, "x": x, "fraction": points[0].fraction}
            for metric in METRICS:
                table = np.array([getattr(point, metric) for point in points], dtype=float)
                found = mean_interval(table.mean(0))
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

        figure: go.Figure = sweep_figure(self.to_frame(), self.kind, self.measure)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file."""
        return write_result(path, self, "piggyback_lens.sweep.1")

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read what `save` wrote.

        Raises:
            LensError: no file, or another kind of file.
        """
        data = read_result(path, "piggyback_lens.sweep.1", "a sweep")
        points = tuple(SweepPoint(**_point_fields(point)) for point in data["points"])
        answers = tuple(tuple(texts) for texts in data["answers"])
        return cls(data["kind"], data["measure"], points, data["settings"], answers)


def _point_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """A point's fields as its class wants them: lists as tuples, null among numbers as NaN."""
    return {
        name: tuple(math.nan if x is None else float(x) for x in value) if isinstance(value, Sequence | list)
        and not isinstance(value, str) else value
        for name, value in data.items()
    }  # fmt: skip
