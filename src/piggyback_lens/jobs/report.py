"""One self-contained HTML file for one run: verdict, numbers, figures, generations, prompt, run card.

The file works offline. Its content security policy forbids every request, so that opening a report never
tells anyone about it. Text of models and users is escaped; only ``prompt_html`` and figures are trusted.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import check_frame
from piggyback_lens.files import atomic_write_text, read_json
from piggyback_lens.maths import interval_text, percent
from piggyback_lens.results.result import load_result
from piggyback_lens.results.run import FACTS

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LONG_TEXT = 420  # characters; longer texts are folded
FOLDED = 240  # characters of a folded text that stay in sight


def write_report(
    path: str | Path,
    *,
    title: str,
    verdict: str,
    summary: "pd.DataFrame",
    figures: Sequence[tuple[str, "go.Figure"]],
    examples: "pd.DataFrame",
    prompt_html: str | None,
    card: Mapping[str, Any],
    notes: Sequence[str],
    measure: str = "",
) -> Path:
    """Write the report and return its path. The file is whole or absent.

    ``summary``: the frame of ``conditions_figure``, or any other frame (then shown column by column);
    ``measure`` says in its head what was measured, with the unit.
    ``figures``: (caption, figure). ``examples``: one row for each generation with columns prompt, condition
    and response, optionally topic; the responses to one prompt stand side by side, a missing one (NaN) is
    marked. ``prompt_html``: markup of a prompt with coloured spans, inserted as it is. ``card``: settings,
    seeds, versions and hashes; may be nested.

    Raises ``LensError`` when a column is missing or the file cannot be written.
    """
    if not verdict.strip():
        raise LensError("a report begins with its verdict, and this one is empty; say in one sentence what was found")
    heads, groups = _summary(summary, measure)
    page = _template().render(
        title=title,
        verdict=verdict,
        heads=heads,
        groups=groups,
        figures=_figures(figures),
        plotly=_plotly_script() if figures else "",
        examples=_examples(examples),
        long=LONG_TEXT,
        folded=FOLDED,
        prompt=_trusted(prompt_html or ""),
        notes=list(notes),
        card=list(_flat(card)),
    )
    return atomic_write_text(path, page)


def report_run(folder: str | Path) -> Path:
    """`report.html` in the folder of a finished run of any kind: verdict, table, figure, run card.

    Raises:
        LensError: no finished run, or a result of a kind that this version does not know.
    """
    folder = Path(folder)
    result, facts = load_result(folder), read_json(folder / FACTS)
    card = {name: facts[name] for name in ("kind", "identity", "versions", "seconds") if name in facts}
    return write_report(
        folder / "report.html",
        title=f"Piggyback lens: {card['kind']}",
        verdict=result.verdict or repr(result),
        summary=result.to_frame(),
        figures=[(result.verdict or repr(result), result.figure())],
        examples=_no_examples(),
        prompt_html=None,
        card=card,
        notes=[],
    )


def _no_examples() -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame()


@lru_cache
def _template() -> Any:
    """Everything that is filled in is escaped, but for what `_trusted` marks."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    room = PackageLoader("piggyback_lens", "jobs")
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

Cell = tuple[str, str]
"""Text, and what kind of cell it is in."""


def _summary(summary: "pd.DataFrame", measure: str) -> tuple[list[Cell], list[tuple[str, list[list[Cell]]]]]:
    """Heads of the table, and its rows in groups."""
    if summary.empty:
        return [], []
    if not {"topic", "condition_label", "n", "mean", "low", "high"} <= set(summary.columns):
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
        _cell(interval_text(number("mean"), number("low"), number("high")), "number"),
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
    check_frame(examples, ["prompt", "condition", "response"])
    keys = ["topic", "prompt"] if "topic" in examples else ["prompt"]
    found = []
    for key, part in examples.groupby(keys, sort=False, dropna=False):
        answers = [
            (str(condition), response if isinstance(response, str) else None)
            for condition, response in zip(part["condition"], part["response"], strict=True)
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
