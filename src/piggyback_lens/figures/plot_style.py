"""What all figures share: colours, fonts, literal text, ranges."""

import html
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from piggyback_lens.errors import LensError
from piggyback_lens.showing import shown_in_notebooks

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
INK, GREY, PALE, MISSING = "#222222", "#666666", "#E6E6E6", "#BDBDBD"
SERIES_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("solid", "dash", "dashdot", "longdash", "dot", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
FONT = "Inter, Helvetica, Arial, 'DejaVu Sans', sans-serif"

# What plotly would read as markup, beside HTML tags and entities: $...$ is LaTeX where MathJax is loaded,
# %{...} a placeholder in what stands under the cursor.
_LITERAL = {"$": "&#36;", "%{": "%&#123;", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def plot_text(text: object, *, limit: int | None = None) -> str:
    """``text`` as plotly shows it literally; line ends and tabs become visible, ``limit`` cuts with "…".

    A text of nothing but spaces becomes as many "·".
    """
    shown = str(text)
    if shown and not shown.strip(" "):
        shown = "·" * len(shown)
    if limit is not None and len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    shown = html.escape(shown, quote=False)
    for character, replacement in _LITERAL.items():
        shown = shown.replace(character, replacement)
    return shown


def apply_style(figure: "go.Figure", title: str, subtitle: str, *, height: int, room: int = 0) -> None:
    """House style with a literal title; ``room`` px more stay free between subtitle and panels."""
    shown_in_notebooks()
    heading = wrapped(title, 85)
    top = 52 + 22 * heading.count("<br>") + (28 if subtitle else 0) + room  # px above the panels
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 14, "color": INK},
        title={
            "text": heading,
            "x": 0.01,
            "xanchor": "left",
            "y": 1,
            "pad": {"t": 14 + 14 * heading.count("<br>")},
            "yanchor": "top",
            "yref": "container",
            "font": {"size": 18},
            "subtitle": {"text": subtitle, "font": {"size": 13, "color": GREY}},
        },
        height=height,
        margin={"l": 20, "r": 30, "t": top, "b": 60},
        # Without plotly's button that uploads the figure, and without selecting, which does nothing here.
        modebar={"remove": ["sendChartToCloud", "select2d", "lasso2d"]},
        hoverlabel={"font": {"family": FONT, "size": 13}, "align": "left"},
    )
    # How much of the margin the heading takes: the report writes it above the figure instead.
    figure.update_layout(meta={"heading": top - room + 17 * subtitle.count("<br>")})
    axis = {"automargin": True, "tickfont": {"size": 13}, "title_font": {"size": 14}, "gridcolor": PALE}
    figure.update_xaxes(**axis, zeroline=False, showline=True, linecolor=GREY, ticks="outside")
    figure.update_yaxes(**axis, zeroline=False)


def check_frame(frame: "pd.DataFrame", columns: Sequence[str]) -> None:
    """Refuse a frame without rows or without one of the columns."""
    missing = [name for name in columns if name not in frame]
    if missing:
        raise LensError(f"the figure needs the columns {', '.join(columns)}; the frame lacks {', '.join(missing)}")
    if frame.empty:
        raise LensError("there is nothing to draw: the frame has no rows")


def wrapped(text: str, width: int) -> str:
    """Literal text in lines of at most ``width`` characters."""
    lines = textwrap.wrap(text, width, break_on_hyphens=False)  # 3e-07 is one word
    return "<br>".join(map(plot_text, lines))


def axis_title(label: str, unit: str) -> str:
    """The label with its unit, unless the label says it already."""
    if unit.startswith("rate ") and "rate" in label:
        unit = unit.removeprefix("rate ")
    return plot_text(label if unit in label else f"{label} ({unit})")


def n_text(frame: "pd.DataFrame") -> str:
    """``n = 40``, or the range of the column n."""
    low, high = int(frame["n"].min()), int(frame["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def whole_steps(values: Sequence[float] | npt.NDArray[np.float64], most: int = 12) -> dict[str, object]:
    """The settings of an axis of whole numbers, steps or layers: its ticks are whole, and it ends where they end."""
    low, high = float(np.min(values)), float(np.max(values))
    rough = max(1.0, (high - low) / most)
    scale = 10 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough)
    room = 0.02 * (high - low) or 0.5
    return {"tick0": 0, "dtick": step, "tickformat": "d", "range": [low - room, high + room]}


def set_apart(values: Sequence[float], fixed: Sequence[bool], gap: float) -> list[float]:
    """Values moved as little as it takes (least squares) to be at least `gap` apart, in their order.

    The `fixed` ones stay where they are, as long as they are apart themselves.
    """
    from scipy.optimize import isotonic_regression

    order = sorted(range(len(values)), key=lambda at: values[at])
    steps = gap * np.arange(len(order))
    weights = [1e6 if fixed[at] else 1.0 for at in order]
    placed = isotonic_regression(np.asarray(values)[order] - steps, weights=weights).x + steps
    moved = dict(zip(order, placed.tolist(), strict=True))
    return [moved[at] for at in range(len(values))]


def padded_range(values: npt.NDArray[np.float64], unit: str) -> list[float]:
    """The range of both panels: a rate's whole scale, otherwise from zero where nothing is negative."""
    if unit.startswith("rate"):
        return [-0.04, 1.04]
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [0.0, 1.0]
    low, high = min(0.0, float(finite.min())), max(0.0, float(finite.max()))
    room = 0.04 * ((high - low) or 1.0)
    return [low - room, high + room]
