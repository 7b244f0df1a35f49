"""Figures of comparisons of finetuning methods; each function returns the figure."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

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
    n_text,
    plot_text,
    set_apart,
    whole_steps,
    wrapped,
)
from piggyback_lens.intervals import Estimate, interval_text
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
SQUEEZED = 0.6  # where all methods keep more than this, the axis does not begin at the base
AXIS_NAMES = {"share": "the share of narrow examples", "size": "the number of conversations", "epochs": "epochs"}
AXIS_NAMES["system"] = "system prompts"
ROUNDING = 1e-4  # a shift that nobody sees
SIZES = (9.0, 17.0)  # px of a marker, from the smallest to the largest weight of its family


def pareto_figure(
    table: "pd.DataFrame", behaviour: Behaviour, task: str, amounts: Mapping[str, Mapping[str, str]]
) -> "go.Figure":
    """On-topic behaviour kept (1 = plain finetuning) against off-topic spread, one marker per row of the table.

    Colour and symbol: the family; size: the weight of its first part. Beside the marker: whatever differs among the
    rows of its family. Joined are rows that differ by the first weight alone. `amounts` holds weights and
    learning rate of each method by name. The base is at 0, 0, beyond the left edge where the methods lie close
    together; plain finetuning is drawn as a row like the others, with its spread as a line.

    Raises:
        LensError: there is no row to draw; a row without a defined share is named below the title instead.
    """
    import plotly.graph_objects as go

    needed = ["method", "family", "lambda", "kept", "kept_low", "kept_reason", "spread", "spread_low", "n", "seeds"]
    check_frame(table, [*needed, *AXIS_LABELS])
    drawn = np.isfinite(table["kept"]) | (table["family"] == "sft")
    rows = table[drawn].copy()
    if rows.empty:
        raise LensError("no method has a defined share of on-topic behaviour: compare with sft, and train it longer")
    rows["kept"] = rows["kept"].where(rows["family"] != "sft", rows["kept"].fillna(1.0))
    edges = _fitting(rows[["kept", "kept_low", "kept_high"]].to_numpy(float))
    gap = 0.012 * (edges[1] - edges[0])
    rows["x"] = set_apart(rows["kept"].tolist(), (rows["family"] == "sft").tolist(), gap)
    facts = [_facts(row, amounts[str(row["method"])]) for row in rows.to_dict("records")]
    figure = go.Figure()
    _guides(figure, rows)
    families = list(dict.fromkeys(rows["family"]))
    for look in _looks(families):
        family = rows.assign(at=range(len(rows)))[rows["family"] == look["name"]].sort_values("lambda", kind="stable")
        own = [facts[at] for at in family["at"]]
        sizes, labels = _sizes(family["lambda"].to_numpy(float)), _differences(own)
        for number, places in enumerate(_joined(own)):
            part, told = family.iloc[places], [labels[place] for place in places]
            mode = ["lines"] * (len(part) > 1) + ["markers"] + ["text"] * any(told)
            figure.add_scatter(
                x=part["x"], y=part["spread"], name=plot_text(look["name"]), mode="+".join(mode),
                legendgroup=look["name"], showlegend=number == 0,
                line={"color": look["colour"], "width": 1, "dash": look["dash"]},
                marker={"opacity": 1, "color": look["colour"], "symbol": look["symbol"],
                        "size": [sizes[place] for place in places], "line": {"color": "white", "width": 1}},
                text=told, textposition="top right", textfont={"size": 13},
                error_x=_bars(part, "kept", look["colour"]), error_y=_bars(part, "spread", look["colour"]),
                customdata=[[plot_text(row["method"]), _told(row, "kept"), _told(row, "spread"), str(row["seeds"]),
                             _said(own[place], list(own[place]))]
                            for place, row in zip(places, part.to_dict("records"), strict=True)],
                hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[4]}<br>kept %{customdata[1]}"
                "<br>spread %{customdata[2]}<br>seeds %{customdata[3]}<extra></extra>",
            )  # fmt: skip
    _base_marker(figure, edges)
    seeds = _seeds(table)
    about = f"bars: 95 % interval over prompts, {n_text(table)} on- and off-topic; mean of {seeds}"
    missing = _missing(table[~drawn])
    if (shift := float((rows["x"] - rows["kept"]).abs().max())) > ROUNDING:
        about += f"; markers stand up to {100 * shift:.1g} % beside their place"
    about = "<br>".join([about, *missing])
    room, height = 18 * len(missing), 560 + 18 * len(missing)
    apply_style(figure, f"Narrow or spreading: finetuning methods on {task}", about, height=height, room=room)
    figure.update_xaxes(title_text="on-topic behaviour kept (0 = base, 1 = plain finetuning)", range=edges)
    figure.update_yaxes(title_text=axis_title(f"off-topic spread of {behaviour.label}", behaviour.unit))
    figure.update_layout(showlegend=True, legend={"x": 1.02, "y": 1.0, "xanchor": "left", "font": {"size": 14}})
    return figure


def dress_figure(table: "pd.DataFrame", names: Mapping[str, str], behaviour: Behaviour, task: str) -> "go.Figure":
    """Spread of every row of the table on plain questions and in every dress, each with its interval.

    `names` has the columns of the dresses with their names. Controls are hollow.

    Raises:
        LensError: no dress.
    """
    import plotly.graph_objects as go

    if not names:
        raise LensError("no dress was asked for: compare with dresses=")
    columns = {"spread": "plain questions", **names}
    check_frame(table, [*(f"{column}{end}" for column in columns for end in ("", "_low", "_high")), "method", "n"])
    differing = _varied(table)
    labels = [
        ", ".join([row["method"], *(f"{axis} {_shown(row[axis], axis)}" for axis in differing)])
        for row in table.to_dict("records")
    ]
    figure = go.Figure()
    gap = 0.7 / len(columns)
    for number, (column, name) in enumerate(columns.items()):
        colour = INK if column == "spread" else SERIES_COLOURS[(number - 1) // 2 % len(SERIES_COLOURS)]
        symbol = SYMBOLS[number % len(SYMBOLS)] + ("-open" if name.endswith("control") else "")
        bars = _bars(table, column, colour)
        figure.add_scatter(
            x=table[column], y=[place + gap * (number - (len(columns) - 1) / 2) for place in range(len(table))],
            mode="markers", name=plot_text(name), error_x=bars,
            marker={"size": 11, "color": colour, "symbol": symbol},
            customdata=[[plot_text(label), _told(row, column)]
                        for label, row in zip(labels, table.to_dict("records"), strict=True)],
            hovertemplate=f"<b>%{{customdata[0]}}</b><br>{plot_text(name)}: %{{customdata[1]}}<extra></extra>",
        )  # fmt: skip
    seeds = _seeds(table)
    about = f"bars: 95 % interval over prompts, {n_text(table)} off-topic; mean of {seeds}; hollow: control dress"
    height = 240 + len(labels) * (30 + 22 * len(columns))
    apply_style(figure, f"Does it spread when dressed? Finetuning methods on {task}", about, height=height)
    figure.add_vline(x=0, line={"color": GREY, "width": 1.2}, layer="below")
    figure.update_xaxes(title_text=axis_title(f"off-topic spread of {behaviour.label}", behaviour.unit))
    shown = [wrapped(label, 26) for label in labels]
    figure.update_yaxes(tickvals=list(range(len(shown))), ticktext=shown, range=[len(shown) - 0.45, -0.55])
    figure.update_layout(showlegend=True, legend={"x": 1.02, "y": 1.0, "xanchor": "left", "font": {"size": 14}})
    return figure


def _fitting(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The range of the methods with their intervals; with the base at 0 where that does not squeeze them."""
    known = values[np.isfinite(values)]
    low, high = float(known.min(initial=1.0)), float(known.max(initial=1.0))
    low = min(low, 0.0) if low < SQUEEZED * high else low
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _seeds(table: "pd.DataFrame") -> str:
    most = len(max(table["seeds"], key=len))
    return f"{most} seed" + "s" * (most > 1)


def _base_marker(figure: "go.Figure", edges: tuple[float, float]) -> None:
    """The base at 0, 0, or in which direction it lies."""
    if edges[0] <= 0:
        figure.add_scatter(
            x=[0.0], y=[0.0], name="base", mode="markers", hovertemplate="<b>base</b><extra></extra>",
            marker={"color": "white", "symbol": "circle", "size": 11, "line": {"color": INK, "width": 2}},
        )  # fmt: skip
        return
    text = {"text": "← base (0, 0)", "showarrow": False, "font": {"size": 13, "color": INK}}
    figure.add_annotation(x=0, xref="paper", xanchor="left", xshift=4, y=0, yanchor="bottom", **text)


def _facts(row: Mapping[Any, Any], amounts: Mapping[str, str]) -> dict[str, str]:
    """Every setting of a row that rows of one family may differ in; system texts whole, to be told apart."""
    axes = {axis: _shown(row[axis], axis) for axis in AXIS_LABELS if axis != "system"}
    return {**amounts, **axes, "system": row["system"] if isinstance(row["system"], str) else "no text"}


def _said(facts: Mapping[str, str], names: Sequence[str], limit: int | None = None) -> str:
    """`λ 3, lr 0.0003`; the weight alone where nothing else is asked."""
    shown = {name: plot_text(facts.get(name, "shared"), limit=limit) for name in names}
    return shown["λ"] if list(names) == ["λ"] else ", ".join(f"{name} {value}" for name, value in shown.items())


def _differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """Of every row what differs among the rows; nothing for a single one."""
    names = dict.fromkeys([*(name for row in facts for name in row if name not in AXIS_LABELS), *AXIS_LABELS])
    differing = [name for name in names if len({row.get(name) for row in facts}) > 1]
    return [_said(row, differing, limit=30) for row in facts]


def _joined(facts: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """Places of the rows that differ by their first weight alone together; plain finetuning has none."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for at, row in enumerate(facts):
        first = next((name for name in row if name not in ("lr", *AXIS_LABELS)), None)
        same = tuple((name, value) for name, value in row.items() if name != first)
        groups.setdefault(same, []).append(at)
    return list(groups.values())


def _missing(rows: "pd.DataFrame") -> list[str]:
    """Lines that name the rows without a marker, and why; rows with the same reason together."""
    names: dict[str, list[str]] = {}
    differing = _varied(rows)
    for row in rows.to_dict("records"):
        axes = [f"{axis} {_shown(row[axis], axis)}" for axis in differing]
        names.setdefault(str(row["kept_reason"]), []).append(" ".join([str(row["method"]), *axes]))
    told = (f"not drawn, {reason}: {', '.join(rows)}" for reason, rows in names.items())
    return [line for text in told for line in wrapped(text, 120).split("<br>")]


def _varied(rows: "pd.DataFrame") -> list[str]:
    """Axes with more than one value; a missing one (no system text, all of the data) is a value."""
    return [axis for axis in AXIS_LABELS if len({_shown(value, axis) for value in rows[axis]}) > 1]


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
    figure.update_xaxes(title_text="layer", **whole_steps(frame["layer"].to_numpy(float), most=20))
    figure.update_yaxes(title_text="cosine with plain finetuning", range=[min(-0.05, float(frame["low"].min())), 1.05])
    _legend_below(figure, len(looks))
    return figure


def axis_figure(
    table: "pd.DataFrame",
    axis: str,
    behaviour: Behaviour,
    bases: Mapping[Any, Mapping[str, Estimate]],
    whole: Sequence[float] | None = None,
) -> "go.Figure":
    """Behaviour on- and off-topic over one axis of the grid, a line per method; the base as a grey line.

    Rows that differ in another varied axis too are lines of their own. `whole` is, for each row, the number that
    None stands for on this axis: all training conversations, or the passes that the fixed number of steps makes.
    """
    from plotly.subplots import make_subplots

    rows = table.copy()
    others = [a for a in _varied(rows) if a != axis]
    rows["line"] = [
        ", ".join([row["method"], *(f"{a} {_shown(row[a], a)}" for a in others)]) for row in rows.to_dict("records")
    ]
    numbers = zip(rows[axis], [math.nan] * len(rows) if whole is None else whole, strict=True)
    rows["x"] = [_shown(v, axis) if axis == "system" else _axis_number(v, axis, instead) for v, instead in numbers]
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
    about = f"95 % interval over prompts, {n_text(table)}; base: {drawn}"
    apply_style(figure, f"{behaviour.label} over {AXIS_NAMES[axis]}", about, height=760 + 27 * len(looks), room=18)
    figure.update_xaxes(title_text=AXIS_LABELS[axis], row=2)
    if axis != "system":  # ticks where something was measured
        figure.update_xaxes(tickvals=sorted(set(rows["x"].dropna())), tickformat=".3~g")
    if axis == "size":
        figure.update_xaxes(type="log", tickformat="d")
    figure.update_yaxes(title_text=axis_title(behaviour.label, behaviour.unit))
    _legend_below(figure, len(looks) + 1, y=-0.12)
    return figure


def _axis_number(value: Any, axis: str, instead: float) -> float:
    """None (all of the data, the plan's steps) is drawn at `instead`; not at all where that is no number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return instead
    return 100 * float(value) if axis == "share" else float(value)


def _shown(value: Any, axis: str) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))  # a column of a table has NaN for None
    if axis == "system":
        return "no system text" if missing else _short(value)
    if missing:
        return "fixed steps" if axis == "epochs" else "all"
    return f"{100 * value:g} %" if axis == "share" else f"{value:g}"


def _short(text: str, limit: int = 30) -> str:
    """A text for a legend; long ones that begin alike are told apart by a number of their own."""
    return plot_text(text) if len(text) <= limit else f"{plot_text(text, limit=limit)} #{crc32(text.encode()):08x}"


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
