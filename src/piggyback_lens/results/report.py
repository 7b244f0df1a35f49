"""Report: one self-contained HTML file for one run: verdict, numbers, figures, generations, prompt, run card.

The file works offline. Its content security policy forbids every request, so that opening a report never tells anyone
about it. Text of models and users is escaped; only the prompt's markup and figures are trusted.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.errors import LensError
from piggyback_lens.files import atomic_write_text
from piggyback_lens.intervals import interval_text, percent

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LONG_TEXT = 420  # characters; longer texts are folded
FOLDED = 240  # characters of a folded text that stay in sight


@dataclass(frozen=True)
class Report:
    """What the report of a result shows.

    Attributes:
        title: of the page.
        verdict: one sentence that follows from the numbers.
        summary: a frame of conditions (topic, condition_label, n, value, low, high, recovery, ...), shown in groups by
            topic; any other frame is shown column by column.
        figures: captions and figures.
        examples: one row for each generation with the columns prompt, condition and response, ended where it is known
            ("length" marks a cut answer), and topic where there is
            more than one. The responses to a prompt stand side by side; a missing one (NaN) is marked.
        notes: what a reader of the numbers should know.
        measure: what the summary's values are, with the unit.
        card: what the result itself says of its settings, beside the run's own facts; may be nested.
    """

    title: str
    verdict: str
    summary: "pd.DataFrame"
    figures: Sequence[tuple[str, "go.Figure"]] = ()
    examples: "pd.DataFrame | None" = None
    notes: Sequence[str] = ()
    measure: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | Path, *, prompt_html: str = "") -> Path:
        """Write the page and return its path. The file is whole or absent.

        Args:
            path: of the file.
            prompt_html: markup of a prompt with coloured spans, inserted as it is.

        Raises:
            LensError: no verdict, examples without their columns, or a file that cannot be written.
        """
        if not self.verdict.strip():
            raise LensError(
                "a report begins with its verdict, and this one is empty; say in one sentence what was found"
            )
        heads, groups = _summary(self.summary, self.measure)
        page = _template().render(
            title=self.title,
            verdict=self.verdict,
            heads=heads,
            groups=groups,
            figures=_figures(self.figures),
            plotly=_plotly_script() if self.figures else "",
            examples=[] if self.examples is None else _examples(self.examples),
            long=LONG_TEXT,
            folded=FOLDED,
            prompt=_trusted(prompt_html),
            notes=list(self.notes),
            card=list(_flat(self.card)),
        )
        return atomic_write_text(path, page)


@lru_cache
def _template() -> Any:
    """Everything that is filled in is escaped, but for what `_trusted` marks."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    room = PackageLoader("piggyback_lens", "results")
    return Environment(loader=room, autoescape=True, undefined=StrictUndefined).get_template("report.html.jinja")


def _trusted(markup: str) -> Any:
    from markupsafe import Markup

    return Markup(markup)


def _plotly_script() -> Any:
    from plotly.offline import get_plotlyjs

    return _trusted(get_plotlyjs())


def _figures(figures: Sequence[tuple[str, "go.Figure"]]) -> list[tuple[str, Any]]:
    """Captions, and figures as markup: plotly escapes what it draws."""
    return [
        (
            caption,
            _trusted(
                figure.to_html(
                    full_html=False,
                    include_plotlyjs=False,
                    include_mathjax=False,
                    div_id=f"figure-{number}",
                    # plotly would offer a button that uploads the figure to its cloud.
                    config={"responsive": True, "displaylogo": False, "showSendToCloud": False},
                )
            ),
        )
        for number, (caption, figure) in enumerate(figures, start=1)
    ]


# --- summary -----------------------------------------------------------------------------------------

CUT = " (cut at the token limit)"
Cell = tuple[str, str]
"""Text, and what kind of cell it is in."""


def _summary(summary: "pd.DataFrame", measure: str) -> tuple[list[Cell], list[tuple[str, list[list[Cell]]]]]:
    """Heads of the table, and its rows in groups."""
    if summary.empty:
        return [], []
    if not {"topic", "condition_label", "n", "value", "low", "high"} <= set(summary.columns):
        rows = [[_cell(value) for value in row] for row in summary.itertuples(index=False)]
        return [(str(name), "") for name in summary.columns], [("", rows)]
    mean = f"{measure}, mean [95 % interval]" if measure else "mean [95 % interval]"
    heads = [("condition", ""), ("n", "number"), (mean, "number"), ("recovery [95 % interval]", "number")]
    groups = []
    for topic in dict.fromkeys(summary["topic"]):
        part = summary[summary["topic"] == topic].to_dict("records")
        groups.append((str(topic), [_condition_row({str(k): v for k, v in row.items()}) for row in part]))
    return [*heads, ("remark", "")], groups


def _condition_row(record: Mapping[str, Any]) -> list[Cell]:
    def number(name: str) -> float:
        value = record.get(name)
        return math.nan if value is None else float(value)

    recovery, low, high = (number(name) for name in ("recovery", "recovery_low", "recovery_high"))
    return [
        _cell(record["condition_label"]),
        _cell(record["n"], "number"),
        _cell(interval_text(number("value"), number("low"), number("high")), "number"),
        _cell(percent(recovery, low, high) if math.isfinite(recovery) else "–", "number"),
        _cell(record.get("reason") or "", "control"),
    ]


def _cell(value: object, kind: str = "") -> Cell:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}", "number"
    return str(value), kind


# --- generations and run card ------------------------------------------------------------------------


def _examples(examples: "pd.DataFrame") -> list[tuple[str | None, str, list[tuple[str, str | None]]]]:
    """Topic, prompt, and condition and response of each answer to it."""
    if examples.empty:
        return []
    missing = [name for name in ("prompt", "condition", "response") if name not in examples]
    if missing:
        raise LensError(f"the examples lack {', '.join(missing)}: a row is the response to a prompt under a condition")
    keys = ["topic", "prompt"] if "topic" in examples else ["prompt"]
    found = []
    for key, part in examples.groupby(keys, sort=False, dropna=False):
        ended = part["ended"] if "ended" in part else [None] * len(part)
        answers = [
            (f"{condition}{CUT}" if end == "length" else str(condition), text if isinstance(text, str) else None)
            for condition, text, end in zip(part["condition"], part["response"], ended, strict=True)
        ]
        found.append((str(key[0]) if len(keys) == 2 else None, str(key[-1]), answers))
    return found


def _flat(card: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as dotted names with readable values."""
    for key, value in card.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, str):
            yield name, value
        else:
            yield name, json.dumps(value, ensure_ascii=False, default=str)
