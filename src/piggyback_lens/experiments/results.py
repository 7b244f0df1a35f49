"""What a patching experiment found: one row per cell, with controls, intervals, a figure, and a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from piggyback_lens.conversations.token_view import visible
from piggyback_lens.intervals import Estimate, interval_text, is_rate, recovery
from piggyback_lens.interventions.donors import IDENTITY
from piggyback_lens.interventions.hooks import layer_ranges
from piggyback_lens.models.gates import by_construction
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Number, Result
from piggyback_lens.words import DONOR, RECIPIENT, Flow

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RANDOM: Final = "random control"
OTHERS: Final = "other tokens control"
CAPTIONS = {
    "span": "The whole span patched at once.",
    "carrier": "Every span x layer band x site, in both flows, each with its controls.",
    "layer_curve": "One layer at a time.",
    "layer_position": "Every layer x token, one cell at a time.",
    "layer_head": "Every layer x head, one cell at a time.",
    "edges": "Attention edges, cut one head at a time.",
}
SHOWN = 8
"""Cells in the table of a report."""


@dataclass(frozen=True, repr=False)
class PatchResult(Result):
    """A measure under many patches, beside both models as they are.

    Attributes:
        kind: span, layer_curve, layer_position, layer_head, carrier, edges or attribution.
        cells: labels of each cell: series, flow, span, sites, layers, and what the kind adds.
        values: the measure per (cell, prompt).
        base: the measure of the unpatched base per prompt.
        finetuned: the same of the finetuned model.
        measure: name and unit.
        settings: names, n, seed, template fingerprint, versions.
    """

    name: ClassVar = "patch.1"
    kind: str
    cells: tuple[dict[str, Any], ...]
    values: list[list[Number]]
    base: list[Number]
    finetuned: list[Number]
    measure: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def recovery(self, cell: int) -> Estimate:
        """(patched - recipient) / (donor - recipient) of one cell, with its interval over prompts.

        0: nothing moved; 1: all the way to the donor. For a repair the donor is the base.
        """
        recipient, donor = self._ends(self.cells[cell]["flow"])
        columns = (self.values[cell], recipient, donor)
        return recovery(*columns, self.settings.get("questions"), rate=is_rate(self.measure["unit"], *columns))

    def _ends(self, flow: Flow) -> tuple[list[float], list[float]]:
        unpatched = {"base": self.base, "finetuned": self.finetuned}
        return unpatched[RECIPIENT[flow]], unpatched[DONOR[flow]]

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        rows = []
        for i, labels in enumerate(self.cells):
            found = self.recovery(i)
            facts = {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "reason": found.reason}
            held = {"contains": contents(labels)} if labels["series"] == OTHERS else {}
            rows.append({**labels, **held, **facts, "raw": float(np.mean(self.values[i]))})
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """One row per cell: its labels, value (recovery), low, high, n, reason, raw (mean of the measure).

        A control of other tokens says in `contains` which tokens it holds.
        """
        return self._frame.copy()

    @property
    def noise_floor(self) -> float:
        """Largest |recovery| of the identity controls: what numerical noise alone does. NaN if there are none."""
        found = []
        for labels, row in zip(self.cells, self.values, strict=True):
            recipient, donor = self._ends(labels["flow"])
            gap = float(np.mean(donor) - np.mean(recipient))
            if labels["series"] == IDENTITY and gap:
                found.append(abs(float(np.mean(row) - np.mean(recipient)) / gap))
        return max(found, default=float("nan"))

    def top(self, n: int = 10) -> "pd.DataFrame":
        """The patched cells with the largest |recovery|; a curve's "all layers" is its reference, no cell."""
        frame = self.to_frame()
        frame = frame[frame["series"] == "patched"]
        if "mode" in frame:
            frame = frame[frame["mode"] != "all layers"]
        return frame.loc[frame["value"].abs().sort_values(ascending=False).index[:n]]

    def figure(self) -> "go.Figure":
        """The picture of this kind of experiment."""
        from piggyback_lens.figures.result_plots import draw

        return draw(self)

    def report(self) -> Report:
        """The strongest cells, the figure, and how much the identity control moves."""
        figures = [(CAPTIONS.get(self.kind, self.kind), self.figure())]
        if self.kind == "carrier" and self.to_frame()["value"].notna().any():
            from piggyback_lens.figures.result_plots import carrier_plane

            figures.append(("Necessity against sufficiency.", carrier_plane(self)))
        table = self.top(SHOWN)
        columns = ["flow", "span", "sites", "band", "layer", "token", "label", "value", "low", "high", "n"]
        table = table.loc[table["value"].notna(), [name for name in columns if name in table]]
        if "token" in table:
            table = table.assign(token=table["token"].map(visible))
        note = f"Identity controls move the measure by at most {self.noise_floor:.1e} of the gap."
        title = f"Piggyback map: {self.kind.replace('_', ' ')}"
        return Report(title, self.verdict, table, figures, notes=[note], card=self.settings)

    @property
    def verdict(self) -> str:
        """The strongest patched cell; of a carrier map what every whole span does.

        Where the finetune's adapter is off, so that a span is the base's on both sides, it says that, and no number.
        """
        built = by_construction(self.settings.get("base_spans", ()))
        if built and {cell["span"] for cell in self.cells} <= set(self.settings["base_spans"]):
            return built
        return f"{self._strongest()} {built}".strip()

    def _strongest(self) -> str:
        if self.kind == "carrier" and (said := self._whole_spans()):
            return said
        best = self.top(1)
        if best.empty or best["value"].isna().all():
            reason = self.to_frame()["reason"].iloc[0] if len(self.cells) else "there are no cells"
            return f"No recovery is defined here: {reason or 'the two models do not differ on these prompts'}."
        row = best.iloc[0]
        names = [name for name in ("layer", "layers", "token", "label", "band") if name in row]
        written: dict[str, Callable[[Any], str]] = {"layers": layer_ranges, "token": visible}
        shown = {name: written[name](row[name]) if name in written else row[name] for name in names}
        called = {"label": "head"}  # which says its key/value head too
        where = [
            f"{called.get(name, name)} {text}"
            for name, text in shown.items()
            if (name, "layer" in row) != ("layers", True)
        ]
        found = interval_text(row["value"], row["low"], row["high"])
        span = (
            f"{row['span']} {row['sites']}" if "read_from" not in row else f"{row['span']} reading {row['read_from']}"
        )
        place = ", ".join([span, *where])
        return f"Strongest cell of {len(self.cells)}: {row['flow']} at {place}, recovery {found} (n = {row['n']})."

    def _whole_spans(self) -> str:
        frame = self.to_frame()
        whole = frame[(frame["band"] == "all layers") & (frame["series"] == "patched")].dropna(subset=["value"])
        whole = whole[~whole["span"].isin(self.settings.get("base_spans", ()))]
        parts = []
        for flow, verb in (("repair", "restores"), ("infect", "carries over")):
            own = whole[whole["flow"] == flow].sort_values("value", ascending=False)
            texts = [
                f"{row['span']} {row['sites']} {interval_text(row['value'], row['low'], row['high'])}"
                for row in own.to_dict("records")
            ]
            if texts:
                parts.append(f"{flow} {verb}, as a fraction of the contrast: {', '.join(texts)}.")
        return " ".join(parts)

    def _sizes(self) -> str:
        return f"{self.kind}, {len(self.cells)} cells, {len(self.base)} prompts"

    def check(self) -> None:
        """Refuse labels and sizes that do not belong together."""
        sizes = {len(row) for row in (*self.values, self.base, self.finetuned)}
        if not self.cells or len(self.cells) != len(self.values) or len(sizes) != 1:
            raise ValueError(f"{len(self.cells)} cells, {len(self.values)} rows of values, lengths {sorted(sizes)}")
        for cell in self.cells:
            if not {"series", "flow"} <= cell.keys() or cell["flow"] not in RECIPIENT:
                raise ValueError(f"a cell with the labels {cell}"[:200])
            if not all(type(layer) is int for layer in cell.get("layers") or ()):
                raise ValueError(f"layers {cell['layers']}, which are no whole numbers"[:200])
        if not {"name", "unit"} <= self.measure.keys():
            raise ValueError(f"a measure with {sorted(self.measure)}, expected name and unit")


def contents(labels: Mapping[str, Any]) -> str:
    """What a control of other tokens holds: `5 query + all 6 postfix tokens`."""
    whole = labels.get("whole_spans", ())
    counts = {span: len(tokens) for span, tokens in labels["other_tokens"].items()}
    parts = [f"all {count} {span}" if span in whole else f"{count} {span}" for span, count in counts.items()]
    return f"{' + '.join(parts)} tokens"
