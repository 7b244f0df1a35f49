"""Results → plotly figures. Every function returns the figure; none shows or saves it.

One style: white, Okabe-Ito colours (told apart by colour-blind readers), no text below 13 px at a width of
about 900 px, units on the axes, n and interval in the subtitle and under the cursor. All text that comes
from outside (tokens, labels, titles) is shown literally.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from piggyback_lens.errors import LensError
from piggyback_lens.figures.condition_plot import conditions_figure
from piggyback_lens.figures.layer_curve_plot import layer_curve_figure
from piggyback_lens.figures.plot_style import (
    GREY,
    INK,
    MISSING,
    SERIES_COLOURS,
    apply_style,
    check_frame,
    plot_text,
    whole_steps,
    wrapped,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["conditions_figure", "heatmap_figure", "history_figure", "layer_curve_figure", "plot_text"]

LABEL_LENGTH = 24  # longer token labels are cut on the axis and whole under the cursor


# --- maps --------------------------------------------------------------------------------------------

DIVERGING = ((0.0, "#7F3B08"), (0.25, "#E08214"), (0.5, "#FFFFFF"), (0.75, "#4393C3"), (1.0, "#053061"))
SUBTITLE_WIDTH = 132  # characters that fit at 900 px


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a map: its name, and the labels of its rows or columns (tokens), which may repeat."""

    name: str
    labels: Sequence[object]
    bottom_up: bool = False  # of y: the first row at the bottom

    def places(self) -> list[str]:
        """Every label with the axis' name, ready for plotly."""
        return [f"{plot_text(self.name)} {plot_text(label)}" for label in self.labels]


def heatmap_figure(
    z: npt.ArrayLike,
    x: Axis,
    y: Axis,
    *,
    heading: tuple[str, str],
    quantity: str,
    details: Sequence[Sequence[str]] | None = None,
    cell_text: Sequence[Sequence[str]] | None = None,
    least_limit: float = 0.0,
) -> "go.Figure":
    """A map, ``z[y][x]``: orange below zero, white at zero, blue above, symmetric. Cells which are NaN are grey.

    ``heading`` is title and subtitle, and ``quantity`` names the colours: literal text, like the labels. ``details``
    stand under the cursor instead of the number, ``cell_text`` in the cells, both by row and column and ready for
    plotly (``plot_text``). ``least_limit`` keeps small values pale: the scale reaches at least that far.

    Raises:
        LensError: the labels do not fit the values.
    """
    import plotly.graph_objects as go

    values = np.asarray(z, dtype=np.float32)
    expected = (len(y.labels), len(x.labels))
    if values.shape != expected or not values.size:
        raise LensError(f"the map has shape {values.shape}, its labels say {expected} (rows, columns)")
    finite = values[np.isfinite(values)]
    limit = max(least_limit, float(np.abs(finite).max(initial=0.0))) or 1.0
    across, down = x.places(), y.places()
    names = [[f"{row}<br>{column}" for column in across] for row in down]
    # plotly writes `text` into the cells where a template asks for it; the names then need another place.
    shown = {"text": names} if cell_text is None else {"text": cell_text, "hovertext": names, "texttemplate": "%{text}"}
    place = "%{text}" if cell_text is None else "%{hovertext}"
    unit = plot_text(quantity)
    number = f"<b>%{{z:.3g}}</b> {unit}" if details is None else f"{unit}: <b>%{{customdata}}</b>"
    figure = go.Figure(
        go.Heatmap(
            z=values,
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            xgap=1,
            ygap=1,
            hoverongaps=details is not None,
            customdata=details,
            hovertemplate=f"{place}<br>{number}<extra></extra>",
            textfont={"size": 13},
            colorbar=colour_bar(quantity),
            **shown,
        )
    )
    title, subtitle = heading
    lines = [line for line in (subtitle, "grey: missing" if finite.size < values.size else "") if line]
    apply_heading(figure, title, "; ".join(lines), height=190 + 23 * max(8, min(len(y.labels), 40)))
    _label_axes(figure, x.labels, y.labels)
    figure.update_xaxes(title_text=plot_text(x.name), range=[-0.5, len(x.labels) - 0.5])
    edges = [-0.5, len(y.labels) - 0.5]
    figure.update_yaxes(title_text=plot_text(y.name), range=edges if y.bottom_up else edges[::-1])
    figure.update_layout(plot_bgcolor=MISSING)
    return figure


def apply_heading(figure: "go.Figure", title: str, subtitle: str, *, height: int, room: int = 0) -> None:
    """``apply_style`` with a literal subtitle, in as many lines as it takes at a width of 900 px."""
    lines = wrapped(subtitle, SUBTITLE_WIDTH)
    more = 17 * lines.count("<br>")
    apply_style(figure, title, lines, height=height + more, room=room + more)


def colour_bar(title: str) -> dict[str, object]:
    """The settings of the bar beside a map."""
    heading = {"text": wrapped(title, 16), "side": "top"}
    return {"title": heading, "thickness": 16, "tickfont": {"size": 13}}


def _label_axes(figure: "go.Figure", x_labels: Sequence[object], y_labels: Sequence[object]) -> None:
    """Labels at the rows and columns, thinned where there are many; upright along x where they are too long."""
    room = 760 / 8 / len(x_labels)  # characters for each column at 900 px
    vertical = max(len(str(label)) for label in x_labels) > room
    for axis, labels, most in ((figure.update_xaxes, x_labels, 44), (figure.update_yaxes, y_labels, 40)):
        every = math.ceil(len(labels) / most)
        axis(
            tickmode="array",
            tickvals=list(range(0, len(labels), every)),
            ticktext=[plot_text(label, limit=LABEL_LENGTH) for label in labels[::every]],
            showgrid=False,
            zeroline=False,
        )
    figure.update_xaxes(tickangle=-90 if vertical else 0)


# --- training ----------------------------------------------------------------------------------------


def history_figure(frame: "pd.DataFrame", *, title: str = "training history") -> "go.Figure":
    """One panel for each quantity over the steps: the loss, its terms (nats per token; drift of keys and values:
    relative), gradient norm, rate.

    ``frame`` has a column step and any of loss, terms of the loss, grad_norm, lr; the columns tokens and
    seconds are bookkeeping and not drawn.
    """
    from plotly.subplots import make_subplots

    check_frame(frame, ["step"])
    last = ("norm", "grad_norm", "lr")
    numeric = [str(name) for name in frame.select_dtypes("number").columns]
    drawn = [name for name in numeric if name not in ("step", "tokens", "seconds", *last)]
    drawn += [name for name in last if name in numeric]
    # The loss of plain finetuning has one term, which is the loss.
    same = [name for name in drawn if name not in ("loss", *last) and "loss" in drawn and _equal(frame, name, "loss")]
    drawn = [name for name in drawn if name not in same]
    if not drawn:
        raise LensError(f"a training history needs a column to draw beside step, such as loss; got {list(frame)}")
    names = {"lr": "learning rate", "grad_norm": "gradient norm before clipping", "norm": "norm of the solution"}
    figure = make_subplots(
        rows=len(drawn),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.16 / len(drawn),
        subplot_titles=[
            plot_text(names.get(name, f"{name} ({'relative' if name.startswith('drift') else 'nats per token'})"))
            for name in drawn
        ],
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
    for row, name in enumerate(drawn, start=1):
        figure.add_scatter(
            x=frame["step"],
            y=frame[name],
            mode="lines+markers" if len(frame) <= 60 else "lines",
            marker={"size": 5},
            line={
                "color": GREY if name in last else SERIES_COLOURS[(row - 1) % len(SERIES_COLOURS)],
                "width": 2,
            },
            hovertemplate=f"step %{{x}}: <b>%{{y:.4g}}</b> {plot_text(name)}<extra></extra>",
            row=row,
            col=1,
        )
    about = "; ".join([f"{len(frame)} steps", *(f"{plot_text(name)} is the whole loss" for name in same)])
    apply_style(figure, title, about, height=150 + 170 * len(drawn), room=18)
    figure.update_layout(showlegend=False)
    figure.update_yaxes(nticks=5, exponentformat="power")
    figure.update_xaxes(**whole_steps(frame["step"].to_numpy(float)))
    figure.update_xaxes(title_text="step", row=len(drawn), col=1)
    return figure


def _equal(frame: "pd.DataFrame", one: str, other: str) -> bool:
    return bool(np.allclose(frame[one].to_numpy(float), frame[other].to_numpy(float), rtol=1e-5, equal_nan=True))
