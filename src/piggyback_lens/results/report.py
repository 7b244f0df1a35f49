"""Report: one self-contained HTML file for one run: verdict, numbers, figures, generations, prompt, run card.

It has contents, folds what few readers need, explains its words, follows the reader's light or dark theme, and can be
read on a narrow screen.

The file works offline. Its content security policy forbids every request, so that opening a report never tells anyone
about it. Text of models and users is escaped; only the prompt's markup and figures are trusted.
"""

import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.errors import LensError
from piggyback_lens.files import atomic_write_text
from piggyback_lens.intervals import interval_text, percent
from piggyback_lens.results.definitions import explained

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LONG_TEXT = 420  # characters; longer texts are folded
FOLDED = 240  # characters of a folded text that stay in sight
OPENED = 4  # prompts whose answers are in sight at once
LONG_LIST = 12  # entries; longer lists of a run card are shortened
UNSHOWN = ("probe",)  # of a run card: raw logits, by which a continued run knows its models


@dataclass(frozen=True)
class Part:
    """A section of a report, beside its summary and first figures.

    Attributes:
        heading: of the section.
        texts: paragraphs above the table.
        table: shown column by column.
        figures: captions and figures.
        folded: whether the reader has to open it.
    """

    heading: str
    texts: Sequence[str] = ()
    table: "pd.DataFrame | None" = None
    figures: Sequence[tuple[str, "go.Figure"]] = ()
    folded: bool = False


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
            ("length" marks a cut answer), value (what was measured on it), and topic where there is
            more than one. The responses to a prompt stand side by side; a missing one (NaN) is marked.
        notes: what a reader of the numbers should know.
        measure: what the summary's values are, with the unit.
        card: what the result itself says of its settings, beside the run's own facts; may be nested.
        parts: further sections, below the figures.
    """

    title: str
    verdict: str
    summary: "pd.DataFrame"
    figures: Sequence[tuple[str, "go.Figure"]] = ()
    examples: "pd.DataFrame | None" = None
    notes: Sequence[str] = ()
    measure: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Part] = ()

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
        drawn = _figures([*self.figures, *(figure for part in self.parts for figure in part.figures)])
        has_figures = bool(drawn)
        figures, rest = drawn[: len(self.figures)], iter(drawn[len(self.figures) :])
        parts = [_part(number, part, rest) for number, part in enumerate(self.parts, start=1)]
        examples = [] if self.examples is None else _examples(self.examples)
        card = list(_flat(self.card))
        optional = {
            "summary": ("Summary", groups or not parts),
            "figures": ("Figures", figures),
            **{part["anchor"]: (part["heading"], True) for part in parts},
            "generations": ("Generations side by side", examples),
            "prompt": ("The prompt, by span", prompt_html),
            "notes": ("Notes", self.notes),
            "card": ("Run card", card),
        }
        contents = [(anchor, heading) for anchor, (heading, there) in optional.items() if there]
        words = explained(self._text(heads, groups))
        page = _template().render(
            title=self.title,
            verdict=self.verdict,
            measure=self.measure,
            contents=[*([("words", "What the words mean")] if words else []), *contents],
            words=words,
            heads=heads,
            groups=groups,
            figures=figures,
            parts=parts,
            has_figures=has_figures,
            plotly=_plotly_script() if has_figures else "",
            examples=examples,
            opened=OPENED,
            long=LONG_TEXT,
            folded=FOLDED,
            prompt=_trusted(prompt_html),
            notes=list(self.notes),
            card=card,
        )
        return atomic_write_text(path, page)

    def _text(self, heads: "list[Cell]", groups: "Groups") -> str:
        """What the page says in its own words: not what models answered."""
        cells = [text for _, rows in groups for row in rows for text, _ in row]
        captions = [caption for caption, _ in self.figures]
        for part in self.parts:
            captions += [part.heading, *part.texts, *(caption for caption, _ in part.figures)]
        return " ".join([self.verdict, *(name for name, _ in heads), *cells, *captions, *self.notes])


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


def _figures(figures: Sequence[tuple[str, "go.Figure"]]) -> list[dict[str, Any]]:
    """Number, caption, heading and markup of each figure: plotly escapes what it draws."""
    drawn = []
    for number, (caption, figure) in enumerate(figures, start=1):
        heading, bare = _without_heading(figure)
        markup = bare.to_html(
            full_html=False,
            include_plotlyjs=False,
            include_mathjax=False,
            div_id=f"figure-{number}",
            # plotly would offer a button that uploads the figure to its cloud.
            config={"responsive": True, "displaylogo": False, "showSendToCloud": False},
        )
        drawn.append({"number": number, "caption": caption, "markup": _trusted(markup), **heading})
    return drawn


def _without_heading(figure: "go.Figure") -> tuple[dict[str, str], "go.Figure"]:
    """Title and subtitle as text, for the page to break into lines of its own width, and the figure without them."""
    import plotly.graph_objects as go

    title, meta = figure.layout.title, figure.layout.meta
    heading = {"title": _plain(title.text), "about": _plain(title.subtitle.text)}
    if not isinstance(meta, dict) or "heading" not in meta:
        return {"title": "", "about": ""}, figure
    bare = go.Figure(figure)
    top = max(12, int(figure.layout.margin.t) - int(meta["heading"]) + 12)
    height = int(figure.layout.height) - int(figure.layout.margin.t) + top
    bare.update_layout(title=None, margin_t=top, height=height)
    return heading, bare


def _plain(markup: str | None) -> str:
    """What plotly would show of a text that `plot_text` made."""
    return html.unescape((markup or "").replace("<br>", " "))


# --- summary -----------------------------------------------------------------------------------------

Cell = tuple[str, str]
"""Text, and what kind of cell it is in."""
Groups = list[tuple[str, list[list[Cell]]]]
"""Rows of a table, under the name of their group."""


def _part(number: int, part: Part, figures: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """A section for the template; it takes its figures from those that are left."""
    heads, groups = ([], []) if part.table is None else _summary(part.table, "")
    own = [next(figures) for _ in part.figures]
    about = {"anchor": f"part-{number}", "heading": part.heading, "texts": list(part.texts), "folded": part.folded}
    return about | {"heads": heads, "groups": groups, "figures": own}


def _summary(summary: "pd.DataFrame", measure: str) -> tuple[list[Cell], Groups]:
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
    if not any(row[-1][0] for _, rows in groups for row in rows):
        return heads, [(topic, [row[:-1] for row in rows]) for topic, rows in groups]
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


def _examples(examples: "pd.DataFrame") -> list[tuple[str | None, str, list[dict[str, Any]]]]:
    """Topic, prompt, and each answer to it: condition, response, what was measured, and whether it was cut."""
    if examples.empty:
        return []
    missing = [name for name in ("prompt", "condition", "response") if name not in examples]
    if missing:
        raise LensError(f"the examples lack {', '.join(missing)}: a row is the response to a prompt under a condition")
    keys = ["topic", "prompt"] if "topic" in examples else ["prompt"]
    found = []
    for key, part in examples.groupby(keys, sort=False, dropna=False):
        answers = [
            {
                "condition": str(row["condition"]),
                "response": row["response"] if isinstance(row["response"], str) else None,
                "value": _measured(row.get("value")),
                "cut": row.get("ended") == "length",
            }
            for row in part.to_dict("records")
        ]
        found.append((str(key[0]) if len(keys) == 2 else None, str(key[-1]), answers))
    return found


def _measured(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) and math.isfinite(value) else ""


def _flat(card: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as dotted names with readable values; without raw logits, and long lists by their beginning."""
    for key, value in card.items():
        name = f"{above}{key}"
        if key in UNSHOWN:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple) and len(value) > LONG_LIST:
            begun = json.dumps(list(value[:3]), ensure_ascii=False, default=str)
            yield name, f"{begun[:-1]}, … ({len(value)} in all)"
        elif isinstance(value, str):
            yield name, value
        else:
            yield name, json.dumps(value, ensure_ascii=False, default=str)
