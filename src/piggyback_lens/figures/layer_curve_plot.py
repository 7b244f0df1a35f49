"""The figure of a layer curve: a line over the layers, controls as points, and reference lines with their names."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from piggyback_lens.figures.plot_style import (
    DASHES,
    GREY,
    ORANGE,
    SERIES_COLOURS,
    SYMBOLS,
    apply_style,
    check_frame,
    n_text,
    plot_text,
    set_apart,
    whole_steps,
    wrapped,
)
from piggyback_lens.intervals import interval_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RECOVERY_LINES = {0.0: "0 = finetuned", 1.0: "1 = base restored"}
PLOT_HEIGHT, LABEL_GAP = 400, 22  # px: of the panel, and from the middle of one name to the next
SQUEEZED = 3  # a reference line that would make the range so many times as large is named, not drawn
BAND = 1.0  # of the range of the means: how far a band may reach beyond it
VISIBLE = 0.005  # of the range: a noise floor below it is said, not drawn


def layer_curve_figure(
    frame: "pd.DataFrame",
    *,
    title: str,
    y_label: str,
    references: Mapping[float, str] = RECOVERY_LINES,
    noise_floor: float | None = None,
    x_label: str = "layer",
    subtitle: str = "",
) -> "go.Figure":
    """A line with its interval band over the layers for each series; a series at some of the layers only is points.

    The vertical range follows the values; a band that is much wider is cut, and the subtitle says so.

    Args:
        frame: columns layer, value, low, high, series, and optionally n. A series whose name contains "control" is a
            control: grey, with hollow markers.
        title: literal text, names model and task.
        y_label: what is drawn, with its unit.
        references: horizontal lines with their names. One that lies far beyond all values is named at the edge.
        noise_floor: what lies between ± this value cannot be told from numerical noise.
        x_label: name of the axis.
        subtitle: literal text after what the figure says itself.
    """
    import plotly.graph_objects as go

    check_frame(frame, ["layer", "value", "low", "high", "series"])
    figure = go.Figure()
    names = list(dict.fromkeys(frame["series"]))
    layers = np.array(sorted(set(frame["layer"])), dtype=float)
    colours = iter(SERIES_COLOURS * (len(names) // len(SERIES_COLOURS) + 1))
    for index, name in enumerate(names):
        is_control = "control" in str(name).lower()
        colour = GREY if is_control else next(colours)
        part = frame[frame["series"] == name].sort_values("layer")
        points = is_control and part["layer"].nunique() < len(layers)
        _add_series(figure, part, plot_text(name), colour=colour, index=index, hollow=is_control, points=points)
    shown, edges, cut = _curve_range(frame, references)
    floor_seen = bool(noise_floor is not None and noise_floor >= VISIBLE * (edges[1] - edges[0]))
    if noise_floor is not None and floor_seen:
        _add_noise_floor(figure, noise_floor)
    room = _name_references(figure, shown, references, edges)
    about = ["line: mean"]
    about += ["band: 95 % interval over prompts"] if np.isfinite(frame["low"].to_numpy(float)).any() else []
    about += ["cut at the edges"] if cut else []
    about += [n_text(frame)] if "n" in frame else []
    if noise_floor is not None and not floor_seen:
        about.append(f"numerical noise ±{noise_floor:.2g}" if noise_floor else "the identity control moves nothing")
    about += [subtitle] if subtitle else []
    lines = wrapped("; ".join(about), 125)
    entries = len(names) + int(floor_seen)
    more = 17 * lines.count("<br>")
    apply_style(figure, title, lines, height=PLOT_HEIGHT + 140 + more + 31 * entries, room=more)
    figure.update_xaxes(title_text=plot_text(x_label), showgrid=False, **whole_steps(layers, most=20))
    figure.update_yaxes(title_text=plot_text(y_label), range=edges)
    # One entry a line below the axis title: their number, and so the room they need, is known.
    legend = {"orientation": "v", "x": 0, "y": -0.17, "yanchor": "top", "font": {"size": 14}}
    figure.update_layout(legend=legend, showlegend=True, margin_r=room, margin_b=80 + 31 * entries)
    return figure


def _name_references(
    figure: "go.Figure", shown: Iterable[float], references: Mapping[float, str], edges: tuple[float, float]
) -> int:
    """Lines at the references that lie within the range, names at the right of all; the px that the names take."""
    inside = set(shown)
    low, high = edges
    gap = LABEL_GAP / PLOT_HEIGHT * (high - low)
    names = {y: text if y in inside else f"{text} {'↑' if y > high else '↓'}" for y, text in references.items()}
    heights = [min(max(y, low + gap / 2), high - gap / 2) for y in names]
    places = set_apart(heights, [False] * len(names), gap) if names else []
    for (y, text), place in zip(names.items(), places, strict=True):
        if y in inside:
            figure.add_hline(y=y, line={"color": GREY, "width": 1.3}, layer="below")
        where = {"x": 1.01, "xref": "paper", "xanchor": "left", "y": place}
        figure.add_annotation(**where, text=plot_text(text), showarrow=False, font={"color": GREY})
    return 40 + round(7.6 * max(map(len, names.values()), default=0))


def _add_noise_floor(figure: "go.Figure", height: float) -> None:
    line = {"color": ORANGE, "width": 1.8, "dash": "dash"}
    for sign in (-1, 1):
        figure.add_hline(y=sign * height, line=line, layer="below")
    name = f"numerical noise floor, ±{height:.2g}"
    figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=name)


def _add_series(
    figure: "go.Figure", part: "pd.DataFrame", name: str, *, colour: str, index: int, hollow: bool, points: bool
) -> None:
    """One series: a line with its band, or points with bars where it was measured at some of the layers only."""
    import plotly.graph_objects as go

    layer, value, low, high = (part[column].to_numpy(float) for column in ("layer", "value", "low", "high"))
    known = np.isfinite(low) & np.isfinite(high)
    for start, stop in [] if points else _runs(known):
        figure.add_scatter(
            x=np.concatenate([layer[start:stop], layer[start:stop][::-1]]),
            y=np.concatenate([high[start:stop], low[start:stop][::-1]]),
            fill="toself",
            mode="lines",
            line={"width": 0},
            fillcolor=colour,
            opacity=0.18,
            hoverinfo="skip",
            showlegend=False,
            legendgroup=str(index),
        )
    bars = {"array": np.where(known, high - value, np.nan), "arrayminus": np.where(known, value - low, np.nan)}
    n = [f", n = {count}" for count in part["n"]] if "n" in part else [""] * len(part)
    text = [f"{interval_text(v, a, b)}{c}" for v, a, b, c in zip(value, low, high, n, strict=True)]
    figure.add_trace(
        go.Scatter(
            x=layer,
            y=value,
            mode="markers" if points else "lines+markers",
            name=f"{name} (points with 95 % interval)" if points else name,
            legendgroup=str(index),
            line={"color": colour, "width": 2.5, "dash": DASHES[index % len(DASHES)]},
            marker={
                "size": 8,
                "symbol": SYMBOLS[index % len(SYMBOLS)],
                "color": "white" if hollow else colour,
                "line": {"width": 1.5, "color": colour},
            },
            error_y={**bars, "color": colour, "thickness": 1.4, "width": 4} if points else None,
            text=text,
            hovertemplate=f"<b>{name}</b><br>layer %{{x}}: %{{text}}<extra></extra>",
        )
    )


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of neighbouring True entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _curve_range(
    frame: "pd.DataFrame", references: Mapping[float, str]
) -> tuple[list[float], tuple[float, float], bool]:
    """The references within the range, the range, and whether an interval reaches beyond it."""
    values = frame["value"].to_numpy(float)
    values = values[np.isfinite(values)]
    inner = [*values.tolist(), *([0.0] if 0.0 in references else [])]
    if not inner:
        return list(references), (min([0.0, *references]), max([1.0, *references])), False
    outer = frame[["low", "high"]].to_numpy(float)
    outer = outer[np.isfinite(outer)]
    bottom, top = _reach(inner, outer)
    shown = []
    for y in sorted(references, key=lambda y: max(bottom - y, y - top, 0.0)):
        low, high = min(bottom, y), max(top, y)
        if high - low <= SQUEEZED * (top - bottom):
            bottom, top = low, high
            shown.append(y)
    room = 0.06 * (top - bottom or 1.0)
    edges = (bottom - room, top + room)
    return shown, edges, bool(((outer < edges[0]) | (outer > edges[1])).any())


def _reach(inner: list[float], outer: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Means, and as much of the intervals as does not squeeze them."""
    bottom, top = min(inner), max(inner)
    span = (top - bottom) or (float(np.ptp(outer)) if len(outer) else 0.0) or 1.0
    ends = np.clip(outer, bottom - BAND * span, top + BAND * span)
    return min([bottom, *ends]), max([top, *ends])
