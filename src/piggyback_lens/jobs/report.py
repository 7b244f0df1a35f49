"""One self-contained HTML file for one run: verdict, numbers, figures, generations, prompt, run card.

The file works offline. Its content security policy forbids every request, so that opening a report never
tells anyone about it. Text of models and users is escaped; only ``prompt_html`` and figures are trusted.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import check_frame
from piggyback_lens.files import atomic_write_text
from piggyback_lens.maths import interval_text, percent

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LONG_TEXT = 420  # characters; longer texts are folded
FOLDED = 240  # characters of a folded text that stay in sight

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
{script}
</head>
<body>
<main>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
{sections}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #222; font: 16px/1.5 Inter, Helvetica, Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 16px; }
h2 { font-size: 20px; margin: 40px 0 12px; padding-bottom: 4px; border-bottom: 1px solid #ddd; }
.verdict { font-size: 18px; margin: 0; padding: 14px 18px; background: #eef5fa;
  border-left: 5px solid #0072B2; white-space: pre-line; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; }
th, td { padding: 6px 14px 6px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; color: #444; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.control { color: #666; }
th[scope="rowgroup"] { padding-top: 18px; color: #222; border-bottom: 2px solid #999; }
figure { margin: 20px 0 32px; }
figure > div { overflow-x: auto; }
figure .plotly-graph-div { min-width: 760px; }
figcaption { color: #555; font-size: 15px; }
article { margin: 0 0 24px; padding: 12px 16px; border: 1px solid #ddd; border-radius: 6px; }
article h3 { font-size: 16px; margin: 0 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.topic { font-weight: 400; color: #555; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 14px; }
.answers h4 { font-size: 14px; margin: 0 0 4px; color: #0072B2; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px; }
.missing { color: #8a4b00; font-style: italic; }
summary { cursor: pointer; }
details[open] .folded { display: none; }
.more { color: #0072B2; font-size: 14px; }
dl { display: grid; grid-template-columns: minmax(140px, max-content) 1fr; gap: 4px 18px;
  font-size: 14px; margin: 0; }
dt { color: #555; overflow-wrap: anywhere; }
dd { margin: 0; font-family: ui-monospace, Consolas, monospace;
  overflow-wrap: anywhere; white-space: pre-wrap; }
"""


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
    sections = [
        ("Summary", _summary(summary, measure)),
        ("Figures", _figures(figures)),
        ("Generations side by side", _examples(examples)),
        ("The prompt, by span", f'<div class="wide">{prompt_html}</div>' if prompt_html else ""),
        ("Notes", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""),
        ("Run card", _card(card)),
    ]
    page = _PAGE.format(
        title=escape(title),
        verdict=escape(verdict),
        style=_STYLE,
        script=_plotly_script() if figures else "",
        sections="\n".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in sections if body),
    )
    return atomic_write_text(path, page)


def _plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def _figures(figures: Sequence[tuple[str, "go.Figure"]]) -> str:
    parts = []
    for number, (caption, figure) in enumerate(figures, start=1):
        drawn = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            include_mathjax=False,
            div_id=f"figure-{number}",
            # plotly would offer a button that uploads the figure to its cloud.
            config={"responsive": True, "displaylogo": False, "showSendToCloud": False},
        )
        parts.append(f"<figure>{drawn}<figcaption>Figure {number}. {escape(caption)}</figcaption></figure>")
    return "\n".join(parts)


# --- summary -----------------------------------------------------------------------------------------


def _summary(summary: "pd.DataFrame", measure: str) -> str:
    if summary.empty:
        return "<p>No condition was measured.</p>"
    if not {"topic", "condition_label", "n", "mean", "low", "high"} <= set(summary.columns):
        rows = [[_cell(value) for value in row] for row in summary.itertuples(index=False)]
        return _table([(str(name), "") for name in summary.columns], [("", rows)])
    mean = f"{measure}, mean [95 % interval]" if measure else "mean [95 % interval]"
    heads = [("condition", ""), ("n", "number"), (mean, "number"), ("recovery [95 % interval]", "number")]
    groups = []
    for topic in dict.fromkeys(summary["topic"]):
        part = summary[summary["topic"] == topic].to_dict("records")
        groups.append((str(topic), [_condition_row({str(k): v for k, v in row.items()}) for row in part]))
    return _table([*heads, ("remark", "")], groups)


def _condition_row(record: Mapping[str, Any]) -> list[str]:
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


def _cell(value: object, kind: str = "") -> str:
    if isinstance(value, float):
        value, kind = ("–" if math.isnan(value) else f"{value:.4g}"), "number"
    return f'<td class="{kind}">{escape(str(value))}</td>'


def _table(heads: Sequence[tuple[str, str]], groups: Iterable[tuple[str, Iterable[Iterable[str]]]]) -> str:
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in heads)
    bodies = ""
    for name, rows in groups:
        above = f'<tr><th colspan="{len(heads)}" scope="rowgroup">{escape(name)}</th></tr>' if name else ""
        bodies += "<tbody>" + above + "".join(f"<tr>{''.join(row)}</tr>" for row in rows) + "</tbody>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>{bodies}</table></div>'


# --- generations -------------------------------------------------------------------------------------


def _examples(examples: "pd.DataFrame") -> str:
    if examples.empty:
        return ""
    check_frame(examples, ["prompt", "condition", "response"])
    keys = ["topic", "prompt"] if "topic" in examples else ["prompt"]
    parts = []
    for key, part in examples.groupby(keys, sort=False, dropna=False):
        topic = f' <span class="topic">({escape(str(key[0]))})</span>' if len(keys) == 2 else ""
        answers = "".join(
            f"<div><h4>{escape(str(condition))}</h4>{_foldable(response)}</div>"
            for condition, response in zip(part["condition"], part["response"], strict=True)
        )
        prompt = escape(str(key[-1]))
        parts.append(f'<article><h3>{prompt}{topic}</h3><div class="answers">{answers}</div></article>')
    return "\n".join(parts)


def _foldable(text: object) -> str:
    if not isinstance(text, str):
        return '<div class="text missing">missing</div>'
    if not text:
        return '<div class="text missing">empty response</div>'
    if len(text) <= LONG_TEXT:
        return f'<div class="text">{escape(text)}</div>'
    start = f'<span class="text folded">{escape(text[:FOLDED])}…</span>'
    more = f'<span class="more">all {len(text)} characters</span>'
    return f'<details><summary>{start} {more}</summary><div class="text">{escape(text)}</div></details>'


# --- run card ----------------------------------------------------------------------------------------


def _card(card: Mapping[str, Any]) -> str:
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _flat(card))
    return f"<dl>{entries}</dl>" if entries else ""


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
