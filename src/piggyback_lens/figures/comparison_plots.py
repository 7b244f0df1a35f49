"""Figures of comparisons of finetuning methods; each function returns the figure."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import (
    DASHES,
    GREY,
    INK,
    SERIES_COLOURS,
    SYMBOLS,
    apply_style,
    axis_title,
    check_frame,
    interval_text,
    n_text,
    plot_text,
)
from piggyback_lens.maths import Estimate
from piggyback_lens.measuring.measures import Behaviour

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

AXIS_LABELS = {
    "share": "share of narrow examples in the training data (%)",
    "size": "training conversations",
    "epochs": "epochs",
    "system": "system prompt of training and measurement",
}
SIZES = (9.0, 17.0)  # px of a marker, from the smallest to the largest weight of its family


def pareto_figure(table: "pd.DataFrame", behaviour: Behaviour, task: str) -> "go.Figure":
    """On-topic behaviour kept (1 = plain finetuning) against off-topic spread, one marker per row of the table.

    Colour and symbol: the family; size: the weight, which is also written beside the marker. The base is at 0, 0;
    plain finetuning is drawn as a row like the others, with its spread as a line.
    """
    import plotly.graph_objects as go

    check_frame(table, ["method", "family", "lambda", "kept", "kept_low", "spread", "spread_low", "n", "seeds"])
    rows = table[np.isfinite(table["kept"]) | (table["family"] == "sft")].copy()
    if rows.empty:
        raise LensError("no method has a defined share of on-topic behaviour: compare with sft, and train it longer")
    figure = go.Figure()
    _guides(figure, rows)
    families = list(dict.fromkeys(rows["family"]))
    for look in _looks(families):
        part = rows[rows["family"] == look["name"]].sort_values("lambda")
        x = part["kept"].where(part["family"] != "sft", part["kept"].fillna(1.0)).to_numpy(float)
        figure.add_scatter(
            x=x, y=part["spread"], name=plot_text(look["name"]), mode="lines+markers+text" if len(part) > 1 else
            "markers", line={"color": look["colour"], "width": 1, "dash": look["dash"]},
            marker={"opacity": 1, "color": look["colour"], "symbol": look["symbol"],
                    "size": _sizes(part["lambda"].to_numpy(float)), "line": {"color": "white", "width": 1}},
            text=[f"{value:g}" for value in part["lambda"]], textposition="top right", textfont={"size": 13},
            error_x=_bars(part, "kept", look["colour"]), error_y=_bars(part, "spread", look["colour"]),
            customdata=[[plot_text(row["method"]), _told(row, "kept"), _told(row, "spread"), str(row["seeds"])]
                        for row in part.to_dict("records")],
            hovertemplate="<b>%{customdata[0]}</b><br>kept %{customdata[1]}<br>spread %{customdata[2]}"
            "<br>seeds %{customdata[3]}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[0.0], y=[0.0], name="base", mode="markers", hovertemplate="<b>base</b><extra></extra>",
        marker={"color": "white", "symbol": "circle", "size": 11, "line": {"color": INK, "width": 2}},
    )  # fmt: skip
    seeds = len(max(table["seeds"], key=len))
    about = f"bars: 95 % bootstrap interval over prompts, {n_text(table)} on- and off-topic; mean of {seeds} seeds"
    apply_style(figure, f"Narrow or spreading: finetuning methods on {task}", about, height=560 + 27 * len(families))
    figure.update_xaxes(title_text="on-topic behaviour kept (0 = base, 1 = plain finetuning)")
    figure.update_yaxes(title_text=axis_title(f"off-topic spread of {behaviour.label}", behaviour.unit))
    _legend_below(figure, len(families) + 1)
    return figure


def _guides(figure: "go.Figure", rows: "pd.DataFrame") -> None:
    """No spread, and the spread of plain finetuning."""
    figure.add_hline(y=0, line={"color": GREY, "width": 1.2}, layer="below")
    sft = rows[rows["family"] == "sft"]
    if len(sft) == 1:
        figure.add_hline(y=float(sft["spread"].iloc[0]), line={"color": GREY, "width": 1, "dash": "dot"}, layer="below")


def update_figure(frame: "pd.DataFrame", task: str) -> "go.Figure":
    """Cosine of each method's weight update with plain finetuning's over the layers, bars over seeds."""
    import plotly.graph_objects as go

    check_frame(frame, ["method", "layer", "value", "low", "high", "n"])
    figure = go.Figure()
    looks = _looks(list(dict.fromkeys(frame["method"])))
    for look in looks:
        _line(figure, frame[frame["method"] == look["name"]].sort_values("layer"), "layer", look, {})
    about = f"cosine of s·BA over all modules of a layer, same seed; bars: lowest and highest of {n_text(frame)} cells"
    apply_style(figure, f"Weight updates against plain finetuning on {task}", about, height=540 + 27 * len(looks))
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="cosine with plain finetuning", range=[min(-0.05, float(frame["low"].min())), 1.05])
    _legend_below(figure, len(looks))
    return figure


def axis_figure(
    table: "pd.DataFrame", axis: str, behaviour: Behaviour, bases: Mapping[Any, Mapping[str, Estimate]]
) -> "go.Figure":
    """Behaviour on- and off-topic over one axis of the grid, a line per method; the base as a grey line.

    Rows that differ in another varied axis too are lines of their own.
    """
    from plotly.subplots import make_subplots

    rows = table.copy()
    others = [a for a in AXIS_LABELS if a != axis and rows[a].astype(str).nunique() > 1]
    rows["line"] = [
        ", ".join([row["method"], *(f"{a} {_shown(row[a], a)}" for a in others)]) for row in rows.to_dict("records")
    ]
    rows["x"] = [_shown(value, axis) if axis == "system" else _axis_number(value, axis) for value in rows[axis]]
    if axis != "system":
        rows = rows.sort_values("x")
    panels = {"on": "on-topic", "off": "off-topic"}
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1, subplot_titles=list(panels.values())
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
    looks = _looks(list(dict.fromkeys(rows["line"])))
    for number, topic in enumerate(panels, start=1):
        place = {"row": number, "col": 1}
        if len(bases) == 1:
            height, known = next(iter(bases.values()))[topic].value, rows["x"].dropna()
            figure.add_scatter(
                x=[known.min(), known.max()], y=[height, height], mode="lines", name="base", legendgroup="base",
                line={"color": GREY, "width": 1.4, "dash": "dot"}, showlegend=number == 1,
                hovertemplate="<b>base</b> %{y:.3g}<extra></extra>", **place,
            )  # fmt: skip
        else:
            shown = [_shown(system, "system") for system in bases]
            figure.add_scatter(
                x=shown, y=[base[topic].value for base in bases.values()], mode="markers", name="base",
                marker={"color": "white", "size": 10, "line": {"color": INK, "width": 2}}, showlegend=number == 1,
                legendgroup="base", hovertemplate="<b>base</b> %{y:.3g}<extra></extra>", **place,
            )  # fmt: skip
        for look in looks:
            names = {topic: "value", f"{topic}_low": "low", f"{topic}_high": "high"}
            part = rows[rows["line"] == look["name"]].drop(columns="line").rename(columns=names)
            _line(figure, part, "x", {**look, "legend": number == 1}, place)
    drawn = "grey line" if len(bases) == 1 else "rings"
    about = f"95 % bootstrap interval over prompts, {n_text(table)}; base: {drawn}"
    apply_style(figure, f"Behaviour over {axis}", about, height=760 + 27 * len(looks), room=18)
    figure.update_xaxes(title_text=AXIS_LABELS[axis], row=2)
    figure.update_yaxes(title_text=axis_title(behaviour.label, behaviour.unit))
    _legend_below(figure, len(looks) + 1, y=-0.12)
    return figure


def _axis_number(value: Any, axis: str) -> float:
    """None (all of the data, the plan's steps) is beyond every number, and not drawn as one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    return 100 * float(value) if axis == "share" else float(value)


def _shown(value: Any, axis: str) -> str:
    if axis == "system":
        return "no system text" if value is None else plot_text(value, limit=30)
    return "all" if value is None else f"{value:g}"


def _looks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Colour, dash and symbol of each series; plain finetuning is dark, its other seeds are grey."""
    colours = iter(SERIES_COLOURS * (len(names) // len(SERIES_COLOURS) + 1))
    plain = {name: GREY if "another seed" in name else INK for name in names if name.startswith("sft")}
    return [
        {"name": name, "colour": plain.get(name) or next(colours), "dash": DASHES[i % len(DASHES)],
         "symbol": SYMBOLS[i % len(SYMBOLS)]}
        for i, name in enumerate(names)
    ]  # fmt: skip


def _sizes(weights: Any) -> list[float]:
    """By rank, so that 1 and 30 are told apart as well as 10 and 30."""
    low, high = SIZES
    if len(weights) == 1:
        return [13.0]
    ranks = np.argsort(np.argsort(weights, kind="stable"))
    return [float(low + (high - low) * rank / (len(weights) - 1)) for rank in ranks]


def _bars(part: "pd.DataFrame", name: str, colour: str) -> dict[str, Any]:
    value, low, high = (part[key].to_numpy(float) for key in (name, f"{name}_low", f"{name}_high"))
    ends = {"array": np.nan_to_num(high - value), "arrayminus": np.nan_to_num(value - low)}
    return {"type": "data", "symmetric": False, **ends, "color": colour, "thickness": 1.2, "width": 4}


def _told(row: Mapping[Any, Any], name: str) -> str:
    return interval_text(float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"]))


def _line(
    figure: "go.Figure", part: "pd.DataFrame", column: str, look: Mapping[str, Any], where: Mapping[str, int]
) -> None:
    """One series with its interval as bars."""
    bars = {"symmetric": False, "color": look["colour"], "thickness": 1.0, "width": 3}
    value, low, high = (part[key].to_numpy(float) for key in ("value", "low", "high"))
    ends = {"array": np.nan_to_num(high - value), "arrayminus": np.nan_to_num(value - low)}
    name = plot_text(look["name"])
    figure.add_scatter(
        x=part[column], y=value, mode="lines+markers", name=name, legendgroup=name,
        showlegend=look.get("legend", True), error_y={"type": "data", **ends, **bars},
        line={"color": look["colour"], "width": 2.2, "dash": look["dash"]},
        marker={"size": 8, "symbol": look["symbol"], "color": look["colour"]},
        text=[interval_text(*row) for row in zip(value, low, high, strict=True)],
        hovertemplate=f"<b>{name}</b><br>%{{x}}: %{{text}}<extra></extra>", **where,
    )  # fmt: skip


def _legend_below(figure: "go.Figure", entries: int, y: float = -0.17) -> None:
    legend = {"orientation": "v", "x": 0, "y": y, "yanchor": "top", "font": {"size": 14}}
    figure.update_layout(legend=legend, showlegend=True, margin_b=80 + 27 * entries)
