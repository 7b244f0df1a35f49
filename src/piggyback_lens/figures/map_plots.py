"""Maps of recovery: layer × token, layer × head. Frames (``PatchResult.to_frame()``) → plotly figures.

Every function takes the rows of the experiment with the columns series, value, low, high, n, reason and its
labels, and returns the figure. Recovery is a fraction: 0 = nothing moved, 1 = all the way to the donor.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import GREY, INK, check_frame, n_text, plot_text, wrapped
from piggyback_lens.figures.plots import Axis, heatmap_figure
from piggyback_lens.intervals import interval_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PATCHED = "patched"
CONTROL = "random control"
NUMBERS = ("value", "low", "high", "n", "reason")
NOT_MEASURED = "not measured"


# --- frames to grids ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows of a frame as a map: ``values[y][x]`` (recovery, NaN where missing) with what is known of each.

    Attributes:
        xs: keys of the columns; numbers in rising order, everything else as first seen.
        ys: keys of the rows, likewise.
        values: recovery of every cell.
        intervals: value with interval and n as text, or why there is none; ready for plotly.
        zero: whether the interval includes zero.
    """

    xs: tuple[object, ...]
    ys: tuple[object, ...]
    values: npt.NDArray[np.float64]
    intervals: tuple[tuple[str, ...], ...]
    zero: npt.NDArray[np.bool_]

    def within(self, noise_floor: float) -> npt.NDArray[np.bool_]:
        """Which cells have a value that numerical noise alone gives too."""
        return np.abs(self.values) <= noise_floor  # False where NaN

    def unsure(self, noise_floor: float | None) -> npt.NDArray[np.bool_]:
        """Which cells differ from numerical noise, but have an interval that includes zero."""
        known = self.zero & np.isfinite(self.values)
        return known if noise_floor is None else known & ~self.within(noise_floor)

    def cell_text(self, noise_floor: float | None, digits: int | None = None) -> list[list[str]]:
        """Values with two decimals (three in a map of small ones), marked as `value_text` says."""
        if digits is None:
            digits = 2 if np.abs(self.values[np.isfinite(self.values)]).max(initial=0.0) >= 0.2 else 3
        return [
            [value_text(value, noise_floor, digits, unsure=bool(zero)) for value, zero in zip(*row, strict=True)]
            for row in zip(self.values, self.zero, strict=True)
        ]


def value_text(value: float, noise_floor: float | None, digits: int, *, unsure: bool = False) -> str:
    """``0.91``; ``(0.01)`` where the interval includes zero; ``≈ 0`` within numerical noise; "–" for none."""
    if not math.isfinite(value):
        return "–"
    if noise_floor is not None and abs(value) <= noise_floor:
        return "≈ 0"
    shown = f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
    return f"({shown})" if unsure else shown


def keys_in_order(values: Iterable[object]) -> tuple[object, ...]:
    """The different values: numbers in rising order, everything else in the order of the frame."""
    keys = [whole(key) for key in dict.fromkeys(values)]
    if all(isinstance(key, Real) for key in keys):
        return tuple(sorted(keys, key=lambda key: float(str(key))))
    return tuple(keys)


def whole(key: object) -> object:
    """3 for 3.0: a column of layers is made of floats where other rows of the frame have no layer."""
    return int(key) if isinstance(key, float) and key.is_integer() else key


def grid(part: "pd.DataFrame", *, x: str, y: str, xs: Sequence[object] = (), ys: Sequence[object] = ()) -> Grid:
    """The rows of ``part`` by the columns ``x`` and ``y``; ``xs`` and ``ys`` fix the keys and their order.

    Raises:
        LensError: two rows for the same cell.
    """
    xs = tuple(xs) or keys_in_order(part[x])
    ys = tuple(ys) or keys_in_order(part[y])
    values = np.full((len(ys), len(xs)), math.nan)
    zero = np.zeros(values.shape, dtype=bool)
    intervals = [[f"missing: {NOT_MEASURED}"] * len(xs) for _ in ys]
    column, row = ({key: i for i, key in enumerate(keys)} for keys in (xs, ys))
    seen: set[tuple[object, object]] = set()
    for across, down, value, low, high, n, reason in part[[x, y, *NUMBERS]].itertuples(index=False):
        if (across, down) in seen:
            raise LensError(
                f"several rows stand for {x} {across!r}, {y} {down!r}; keep one of what differs "
                "(series, flow, span or sites) before drawing"
            )
        seen.add((across, down))
        at = row[down], column[across]
        values[at], zero[at] = float(value), float(low) <= 0.0 <= float(high)
        intervals[at[0]][at[1]] = _interval(float(value), float(low), float(high), n, reason)
    return Grid(xs, ys, values, tuple(map(tuple, intervals)), zero)


def _interval(value: float, low: float, high: float, n: float | int, reason: object) -> str:
    if math.isfinite(value):
        return f"{interval_text(value, low, high)}, n = {int(n)}"
    return missing_text(reason)


def missing_text(reason: object) -> str:
    """Why a cell has no value, in lines short enough for the cursor."""
    why = reason if isinstance(reason, str) and reason else "no value"
    return wrapped(f"missing: {why[:200]}", 60)


def patched_rows(frame: "pd.DataFrame", columns: Sequence[str]) -> "pd.DataFrame":
    """The rows of the patched series.

    Raises:
        LensError: a column is missing or has gaps, or no row is of that series.
    """
    check_frame(frame, ["series", *columns, *NUMBERS])
    part = frame[frame["series"] == PATCHED]
    if part.empty:
        raise LensError(f"no row has series {PATCHED!r}, only {', '.join(map(str, frame['series'].unique()))}")
    check_labels(part, columns)
    return part


def check_labels(part: "pd.DataFrame", columns: Sequence[str]) -> None:
    """Refuse rows without one of their labels: they have no place in the figure."""
    for name in columns:
        if part[name].isna().any():
            count = int(part[name].isna().sum())
            raise LensError(f"column {name!r} is empty in {count} of {len(part)} rows; draw a map by columns they have")


def _labels(part: "pd.DataFrame", key: str, text: str | None, keys: Sequence[object]) -> list[object]:
    """What stands on the axis for each key: the key itself, or the one value of the column ``text``."""
    if text is None:
        return list(keys)
    labels: dict[object, object] = {}
    for name, label in part[[key, text]].itertuples(index=False):
        if labels.setdefault(name, label) != label:
            raise LensError(
                f"{key} {name!r} has several values of {text!r} ({labels[name]!r} and {label!r}); "
                f"draw it without labels from {text!r}, or give every {key} one"
            )
    return [labels[name] for name in keys]


# --- maps --------------------------------------------------------------------------------------------


def recovery_map_figure(  # noqa: PLR0913
    frame: "pd.DataFrame",
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    x_text: str | None = None,
    y_text: str | None = None,
    noise_floor: float | None = None,
    colorbar_title: str = "recovery (fraction)",
    text: bool = False,
) -> "go.Figure":
    """One map of the recovery of the series "patched"; rows with numbers (layers) rise from the bottom.

    A dot marks a cell whose interval includes zero, a cross one that numerical noise alone gives too. Where the random
    control ran, a square within the cell has its colour on the same scale.

    Args:
        frame: columns series, value, low, high, n, reason, and those named by ``x``, ``y`` and the texts.
        x: column of keys along x: numbers in rising order, anything else as first seen.
        y: column of keys along y, likewise; text reads from the top down.
        title: literal text, names model and task.
        subtitle: literal text before what the figure says itself (interval, n, noise floor).
        x_title: name of the axis (the column that is written along it if None).
        y_title: likewise.
        x_text: column of the labels to write for the keys, which may repeat: x="position", x_text="token".
        y_text: the same for ``y``.
        noise_floor: what |value| up to which (a fraction) is numerical noise; None or NaN: not known.
        colorbar_title: what the colour says, with its unit.
        text: write the values into the cells: in brackets where the interval includes zero, ``≈ 0`` within
            numerical noise.

    Raises:
        LensError: columns are missing, no row is patched, or two rows stand for the same cell.
    """
    noise_floor = known_floor(noise_floor)
    texts = [name for name in (x_text, y_text) if name is not None]
    part = patched_rows(frame, [x, y, *texts])
    cells = grid(part, x=x, y=y)
    details = cells.intervals
    if x_text is not None:  # the same token may stand at several places
        details = tuple(
            tuple(f"{cell}<br>{plot_text(x)} {plot_text(key)}" for cell, key in zip(row, cells.xs, strict=True))
            for row in details
        )
    lines = [subtitle] if subtitle else []
    lines += [f"colour: mean; under the cursor: 95 % interval over prompts; {n_text(part)}"]
    lines += zero_notes([cells], noise_floor, brackets=text)
    control = _control_cells(frame, x, y, cells)
    largest = float(np.nanmax(np.abs(control.values), initial=0.0)) if control is not None else 0.0
    if control is not None:
        count = int(np.isfinite(control.values).sum())
        lines.append(f"squares: random control, same colours, at {count} cells (largest {largest:.2g})")
    figure = heatmap_figure(
        cells.values,
        Axis((x_text or x) if x_title is None else x_title, _labels(part, x, x_text, cells.xs)),
        Axis(
            (y_text or y) if y_title is None else y_title,
            _labels(part, y, y_text, cells.ys),
            bottom_up=all(isinstance(key, Real) for key in cells.ys),
        ),
        heading=(title, "; ".join(lines)),
        quantity=colorbar_title,
        details=details,
        cell_text=cells.cell_text(noise_floor) if text else None,
        # A map of noise stays pale instead of blowing it up to full colour.
        least_limit=max(2 * (noise_floor or 0.0), largest),
    )
    if not text:
        _mark(figure, cells.unsure(noise_floor), "the interval includes 0", "circle", 3)
    if noise_floor is not None and not text:
        _mark(figure, cells.within(noise_floor), "within numerical noise", "x-thin", 6)
    if control is not None:
        _draw_control(figure, control)
    return figure


def _control_cells(frame: "pd.DataFrame", x: str, y: str, cells: Grid) -> Grid | None:
    """The random control where it ran, on the grid of the patched cells."""
    part = frame[frame["series"] == CONTROL].dropna(subset=[x, y])
    return grid(part, x=x, y=y, xs=cells.xs, ys=cells.ys) if len(part) else None


def _draw_control(figure: "go.Figure", control: Grid) -> None:
    """Squares in the cells, on the scale of the map."""
    rows, columns = np.nonzero(np.isfinite(control.values))
    places = list(zip(rows.tolist(), columns.tolist(), strict=True))
    scale = figure.data[0]
    figure.add_scatter(
        x=columns.astype(np.int16),
        y=rows.astype(np.int16),
        mode="markers",
        marker={
            "symbol": "square",
            "size": max(6, min(12, 500 // len(control.xs))),
            "color": [float(control.values[place]) for place in places],
            "colorscale": scale.colorscale,
            "cmin": scale.zmin,
            "cmax": scale.zmax,
            "line": {"width": 1.5, "color": INK},
        },
        customdata=[control.intervals[row][column] for row, column in places],
        name=CONTROL,
        hovertemplate=f"<b>{CONTROL}</b>: %{{customdata}}<extra></extra>",
        showlegend=False,
    )


def known_floor(noise_floor: float | None) -> float | None:
    """The noise floor, or None where an experiment has none (NaN: it ran without identity controls)."""
    return noise_floor if noise_floor is not None and math.isfinite(noise_floor) else None


def bar_lengths(lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Lengths of error bars: none where an end is not known or endless, none below zero."""
    return np.where(np.isfinite(lengths), np.maximum(lengths, 0.0), np.nan)


def zero_notes(grids: Sequence[Grid], noise_floor: float | None, *, brackets: bool) -> list[str]:
    """How many cells cannot be told from zero, by their interval or by numerical noise, and how they are marked."""
    total = sum(int(np.isfinite(cells.values).sum()) for cells in grids)
    unsure = sum(int(cells.unsure(noise_floor).sum()) for cells in grids)
    mark = "in brackets" if brackets else "dot"
    notes = [f"{mark}: the interval includes 0 ({unsure} of {total} cells, each by itself)"]
    if noise_floor is not None:
        inside = sum(int(cells.within(noise_floor).sum()) for cells in grids)
        mark = "≈ 0" if brackets else "×"
        notes.append(f"{mark}: within numerical noise ±{noise_floor:.2g} ({inside} cells)")
    return notes


def _mark(figure: "go.Figure", cells: npt.NDArray[np.bool_], name: str, symbol: str, size: int) -> None:
    """Small grey marks in the middle of cells."""
    rows, columns = np.nonzero(cells)
    figure.add_scatter(
        x=columns.astype(np.int16),
        y=rows.astype(np.int16),
        mode="markers",
        marker={"symbol": symbol, "size": size, "color": GREY, "line": {"width": symbol == "x-thin", "color": GREY}},
        name=name,
        hoverinfo="skip",
        showlegend=False,
    )


def head_map_figure(
    frame: "pd.DataFrame",
    *,
    title: str,
    subtitle: str = "",
    x: str = "head",
    x_title: str = "head",
    labels: Mapping[object, str] | None = None,
    noise_floor: float | None = None,
    text: bool = False,
) -> "go.Figure":
    """Layer × head. Where query heads share a key-value group, lines separate the groups.

    Args:
        frame: columns series, layer, head (or ``x``), value, low, high, n, reason; optionally group, the name of
            the head's key-value group ("kv 1 (q 3-5)", or a number). A group for each head is its label.
        title: literal text, names model and task.
        subtitle: as in ``recovery_map_figure``.
        x: column of the heads.
        x_title: name of the axis.
        labels: what to write for each head, instead of the head or its group.
        noise_floor: as in ``recovery_map_figure``.
        text: as in ``recovery_map_figure``.

    Raises:
        LensError: as ``recovery_map_figure``, or ``labels`` lacks a head.
    """
    part = patched_rows(frame, ["layer", x])
    heads = keys_in_order(part[x])
    groups = _groups(part, x, heads)
    shared = len(set(groups)) < len(groups)
    if labels is None:
        labels = dict(zip(heads, groups, strict=True)) if groups and not shared else {head: str(head) for head in heads}
    lacking = [str(head) for head in heads if head not in labels]
    if lacking:
        raise LensError(f"labels lacks head {', '.join(lacking)}; give every head of the column {x!r} a label")
    if shared:
        lines = "lines: between " + ("key-value groups" if groups[0].startswith("kv") else "the groups above")
        subtitle = f"{subtitle}; {lines}" if subtitle else lines
    shown = frame[frame["series"].isin([PATCHED, CONTROL]) & frame[x].notna()]
    figure = recovery_map_figure(
        shown.assign(label=[labels[whole(head)] for head in shown[x]]),
        x=x,
        x_text="label",
        y="layer",
        title=title,
        subtitle=subtitle,
        x_title=x_title,
        noise_floor=noise_floor,
        text=text,
    )
    if shared:
        _draw_groups(figure, groups)
    return figure


def _groups(part: "pd.DataFrame", x: str, heads: Sequence[object]) -> list[str]:
    """The group of each head, empty without such a column."""
    if "group" not in part:
        return []
    named = (f"kv {group}" if isinstance(group, Real) else str(group) for group in _labels(part, x, "group", heads))
    return list(named)


def _draw_groups(figure: "go.Figure", groups: Sequence[str]) -> None:
    """Lines between neighbours of different groups and, where there is room, the names above."""
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    for start in starts[1:]:
        figure.add_vline(x=start - 0.5, line={"color": INK, "width": 2})
    for start, stop in zip(starts, [*starts[1:], len(groups)], strict=True):
        room = (stop - start) * 700 / len(groups) / 7.5  # characters, at 900 px
        if len(groups[start]) <= room:
            figure.add_annotation(
                x=(start + stop - 1) / 2,
                y=1,
                yref="y domain",
                yanchor="bottom",
                text=plot_text(groups[start]),
                showarrow=False,
                font={"size": 13, "color": INK},
            )
    figure.update_layout(margin_t=figure.layout.margin.t + 22)
