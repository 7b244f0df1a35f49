"""What a patching experiment found: one row per cell, with controls, intervals, a figure, and a file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.interventions.donors import DONOR, IDENTITY, RECIPIENT, Direction
from piggyback_lens.maths import Estimate, recovery

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RANDOM: Final = "random control"
OTHERS: Final = "other tokens control"


@dataclass(frozen=True)
class PatchResult:
    """A measure under many patches, beside both models as they are.

    Attributes:
        kind: span, layer_curve, layer_position, layer_head, carrier or attribution.
        cells: labels of each cell: series, direction, span, sites, layers, and what the kind adds.
        values: the measure per (cell, prompt).
        base: the measure of the unpatched base per prompt.
        finetuned: the same of the finetuned model.
        measure: name and unit.
        settings: names, n, seed, template fingerprint, versions.
    """

    kind: str
    cells: tuple[dict[str, Any], ...]
    values: list[list[float]]
    base: list[float]
    finetuned: list[float]
    measure: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def recovery(self, cell: int) -> Estimate:
        """(patched - recipient) / (donor - recipient) of one cell, with its interval over prompts.

        0: nothing moved; 1: all the way to the donor. For a repair the donor is the base.
        """
        recipient, donor = self._ends(self.cells[cell]["direction"])
        return recovery(self.values[cell], recipient, donor, seed=self.settings.get("seed", 0))

    def _ends(self, direction: Direction) -> tuple[list[float], list[float]]:
        unpatched = {"base": self.base, "finetuned": self.finetuned}
        return unpatched[RECIPIENT[direction]], unpatched[DONOR[direction]]

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        rows = []
        for i, labels in enumerate(self.cells):
            found = self.recovery(i)
            facts = {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "reason": found.reason}
            rows.append({**labels, **facts, "raw": float(np.mean(self.values[i]))})
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """One row per cell: its labels, value (recovery), low, high, n, reason, raw (mean of the measure)."""
        return self._frame.copy()

    @property
    def noise_floor(self) -> float:
        """Largest |recovery| of the identity controls: what numerical noise alone does. NaN if there are none."""
        found = []
        for labels, row in zip(self.cells, self.values, strict=True):
            recipient, donor = self._ends(labels["direction"])
            gap = float(np.mean(donor) - np.mean(recipient))
            if labels["series"] == IDENTITY and gap:
                found.append(abs(float(np.mean(row) - np.mean(recipient)) / gap))
        return max(found, default=float("nan"))

    def top(self, n: int = 10) -> "pd.DataFrame":
        """The patched cells with the largest |recovery|."""
        frame = self.to_frame()
        frame = frame[frame["series"] == "patched"]
        return frame.loc[frame["value"].abs().sort_values(ascending=False).index[:n]]

    def figure(self) -> "go.Figure":
        """The picture of this kind of experiment."""
        from piggyback_lens.figures.result_plots import draw

        return draw(self)

    def save(self, path: str | Path) -> Path:
        """Write as JSON."""
        return write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "PatchResult":
        """Read what `save` wrote.

        Raises:
            LensError: the file is missing, or no patching result.
        """
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, data: Any, path: str | Path) -> "PatchResult":
        """What `dataclasses.asdict` gave, read from `path`.

        Raises:
            LensError: it is no whole patching result.
        """
        try:
            numbers = {name: _numbers(data[name]) for name in ("base", "finetuned")}
            found = cls(
                **{**data, **numbers, "cells": tuple(data["cells"]), "values": [*map(_numbers, data["values"])]}
            )
            labelled = all({"series", "direction"} <= cell.keys() for cell in found.cells)
            named = {"name", "unit"} <= found.measure.keys() and isinstance(found.settings, Mapping)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise LensError(f"{path} is no patching result ({error}): run the experiment again") from error
        sizes = {len(row) for row in (*found.values, found.base, found.finetuned)}
        if len(found.cells) != len(found.values) or len(sizes) != 1 or not labelled or not named:
            raise LensError(f"{path} is no whole patching result: run the experiment again")
        return found


def _numbers(values: list[float | None]) -> list[float]:
    """JSON has null for a missing number."""
    return [float("nan") if value is None else float(value) for value in values]
