"""The figure of an experiment: every condition with its interval, beside base and finetuned."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from piggyback_lens.figures.plot_style import (
    BLUE,
    GREY,
    INK,
    VERMILION,
    apply_style,
    axis_title,
    check_frame,
    n_text,
    padded_range,
    plot_text,
    wrapped,
)
from piggyback_lens.intervals import interval_text, percent

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MODEL_COLOURS = {"base": BLUE, "finetuned": VERMILION}
CONTROLS = ("identity", "query_control")
COLUMNS = 2
"""Panels beside each other."""


def conditions_figure(
    summary: "pd.DataFrame", *, label: str, unit: str, title: str, over: str = "prompts"
) -> "go.Figure":
    """Dots with intervals: one row for each condition, one panel for each topic, in the order of the
    frame, two beside each other.

    ``summary`` has one row for each topic and condition, with columns topic, condition (key),
    condition_label, n, value, low, high (in ``unit``), recovery, recovery_low, recovery_high (fractions, NaN
    where undefined) and reason (why something is NaN). The conditions "base" and "finetuned" are the two
    reference lines. Hollow markers are controls: the conditions "identity" and "query_control", and rows
    whose optional column is_control is true. With the optional columns biased and answers it says how many answers
    the token limit keeps down. ``over`` names what the intervals are over. Raises ``LensError`` for a missing column
    or an empty frame.
    """
    from plotly.subplots import make_subplots

    columns = ["topic", "condition", "condition_label", "n", "value", "low", "high"]
    check_frame(summary, [*columns, "recovery", "recovery_low", "recovery_high", "reason"])
    topics = list(dict.fromkeys(summary["topic"]))
    labels = dict(zip(summary["condition"], summary["condition_label"], strict=True))
    rows = {condition: row for row, condition in enumerate(labels)}
    across, down = min(len(topics), COLUMNS), -(-len(topics) // COLUMNS)
    height = 200 + (58 * len(rows) + (130 if down > 1 else 0)) * down
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=150 / height if down > 1 else None,
        subplot_titles=[f"{plot_text(topic)} ({n_text(summary[summary['topic'] == topic])})" for topic in topics],
    )
    figure.update_annotations(yshift=38, font={"size": 15, "color": INK})
    x_range = padded_range(summary[["value", "low", "high"]].to_numpy(dtype=float), unit)
    for number, topic in enumerate(topics):
        panel = _records(summary[summary["topic"] == topic])
        place = {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1}
        _add_references(figure, panel, place, x_range)
        for record in panel:
            _add_condition(figure, record, rows[record["condition"]], place, x_range)
    subtitle = f"dot: mean; bar: 95 % interval over {over}"
    if any(_is_control(record) for record in _records(summary)):
        subtitle += "; hollow: control"
    if "biased" in summary and summary["biased"].sum():
        subtitle += f"; {summary['biased'].sum()} of {summary['answers'].sum()} answers were cut: lower bounds"
    apply_style(figure, title, subtitle, height=height, room=62)
    figure.update_xaxes(range=x_range, title_text=axis_title(label, unit), nticks=7)
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(rows.values()),
        ticktext=[wrapped(text, 28) for text in labels.values()],
        range=[len(rows) - 0.45, -0.55],
        showgrid=True,
    )
    figure.update_layout(showlegend=False)
    return figure


def _add_references(
    figure: "go.Figure", panel: list[dict[str, Any]], place: Mapping[str, Any], x_range: Sequence[float]
) -> None:
    for record in panel:
        condition, mean = record["condition"], float(record["value"])
        if condition not in MODEL_COLOURS or not math.isfinite(mean):
            continue
        colour = MODEL_COLOURS[condition]
        line = {"color": colour, "width": 1.5, "dash": "dot"}
        figure.add_vline(x=mean, line=line, layer="below", exclude_empty_subplots=False, **place)
        # One name above the other: the two lines may stand close together.
        figure.add_annotation(
            x=mean,
            y=1,
            yref="y domain",
            yanchor="bottom",
            yshift=16 if condition == "base" else 0,
            xanchor=_anchor(mean, x_range),
            text=condition,
            font={"color": colour, "size": 13},
            showarrow=False,
            **place,
        )


def _anchor(x: float, x_range: Sequence[float]) -> str:
    """The side of a text that stands at ``x``, so that it grows away from the nearer edge of its panel."""
    place = (x - x_range[0]) / (x_range[1] - x_range[0])
    return "left" if place < 0.36 else "right" if place > 0.64 else "center"


def _add_condition(
    figure: "go.Figure", record: dict[str, Any], row: int, place: Mapping[str, Any], x_range: Sequence[float]
) -> None:
    import plotly.graph_objects as go

    mean = float(record["value"])
    if not math.isfinite(mean):
        text = wrapped(f"missing: {record['reason'] or 'no value'}", 40)
        _add_row_text(figure, x_range[0], row, text, xanchor="left", xshift=6, color=GREY, **place)
        return
    colour = MODEL_COLOURS.get(record["condition"], INK)
    low, high = float(record["low"]), float(record["high"])
    marker = {"size": 11, "color": colour, "line": {"width": 2, "color": colour}}
    if _is_control(record):
        marker["color"] = "white"
    trace = go.Scatter(
        x=[mean],
        y=[row],
        mode="markers",
        marker=marker,
        error_x=(
            {"array": [high - mean], "arrayminus": [mean - low], "color": colour, "thickness": 2, "width": 5}
            if math.isfinite(low) and math.isfinite(high)
            else None
        ),
        hovertemplate=_condition_hover(record) + "<extra></extra>",
    )
    figure.add_trace(trace, **place)
    anchor = _anchor(mean, x_range)
    _add_row_text(figure, mean, row, interval_text(mean, low, high), xanchor=anchor, yshift=17, **place)
    recovered = _recovery_text(record)
    if recovered:
        _add_row_text(figure, mean, row, recovered, xanchor=anchor, yshift=-17, color=GREY, **place)


def _add_row_text(figure: "go.Figure", x: float, y: int, text: str, *, color: str = INK, **place: Any) -> None:
    style = {"font": {"size": 13, "color": color}, "showarrow": False, "bgcolor": "rgba(255,255,255,0.8)"}
    figure.add_annotation(x=x, y=y, text=text, borderpad=0, **style, **place)


def _condition_hover(record: dict[str, Any]) -> str:
    interval = interval_text(float(record["value"]), float(record["low"]), float(record["high"]))
    lines = [f"<b>{plot_text(record['condition_label'])}</b>", f"{interval}, n = {record['n']}"]
    lines += [text for text in (_recovery_text(record),) if text]
    lines += [wrapped(str(reason), 60) for reason in (record["reason"],) if reason]
    return "<br>".join(lines)


def _recovery_text(record: dict[str, Any]) -> str:
    """The recovery in per cent; empty where it is undefined, and for the two models, where it is 1 or 0."""
    value, low, high = (float(record[name]) for name in ("recovery", "recovery_low", "recovery_high"))
    if record["condition"] in ("base", "finetuned") or not math.isfinite(value):
        return ""
    return f"recovery {percent(value, low, high)}"


def _records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _is_control(record: Mapping[str, Any]) -> bool:
    return record["condition"] in CONTROLS or record.get("is_control") in (True, 1)
