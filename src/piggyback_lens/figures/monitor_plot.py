"""The figure of a training monitor: spread, what the prefix carries of it, and the drift of every layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from piggyback_lens.figures.plot_style import BLUE, GREY, VERMILION, apply_style, check_frame, whole_steps

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MOST_TICKS = 20
_PANELS = {
    "spread": ("spread off-topic (nats per token)", BLUE),
    "recovery": ("prefix recovery (1 = the prefix carries all of it)", VERMILION),
}


def monitor_figure(frame: "pd.DataFrame", *, title: str = "training, watched off-topic") -> "go.Figure":
    """Three panels over the steps: spread, prefix recovery (each with its 95 % interval), drift by layer.

    `frame` is that of `Monitor.to_frame()`. Recovery is left out where it is not defined. The colour of the
    drift is its common logarithm, since layers differ by orders of magnitude.
    """
    from plotly.subplots import make_subplots

    layers = [str(name) for name in frame.columns if str(name).startswith("drift_layer_")]
    check_frame(frame, ["step", "n", "spread", "recovery", "drift", *(layers or ["drift_layer_0"])])
    names = [_panel_title(frame, name) for name in _PANELS]
    names.append("drift of the prefix's keys and values by layer (log10)")
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.09, row_heights=[0.3, 0.3, 0.4], subplot_titles=names
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 14})
    steps = frame["step"].to_numpy(float)
    edges = _edges(steps)
    for row, (name, (_, colour)) in enumerate(_PANELS.items(), start=1):
        _add_curve(figure, frame, name, colour=colour, row=row)
    drift = frame[layers].to_numpy(dtype=float).T
    shown = np.log10(np.where(drift > 0, drift, np.nan))
    figure.add_heatmap(
        x=edges,
        y=[int(name.removeprefix("drift_layer_")) for name in layers],
        z=shown,
        customdata=np.stack([drift, np.broadcast_to(steps, drift.shape)], axis=-1),
        colorscale="Viridis",
        colorbar={"title": {"text": "log10", "side": "top"}, "len": 0.36, "y": 0, "yanchor": "bottom"},
        hovertemplate="step %{customdata[1]}, layer %{y}: <b>%{customdata[0]:.3g}</b><extra></extra>",
        row=3,
        col=1,
    )
    n = int(frame["n"].iloc[0])
    apply_style(figure, title, f"teacher-forced, n = {n} off-topic prompts, 95 % intervals", height=760, room=18)
    figure.update_layout(showlegend=False)
    figure.update_yaxes(title_text="layer", row=3, col=1)
    figure.update_xaxes(**whole_steps([*edges, steps[-1]]))
    figure.update_xaxes(title_text="optimiser step", row=3, col=1)
    return figure


def onset_figure(
    frame: "pd.DataFrame", *, title: str, unit: str, bound: float, available: Sequence[int]
) -> "go.Figure":
    """Two panels over the steps: spread with its bound, prefix recovery; each with its 95 % interval.

    `frame` is that of `OnsetResult.to_frame()`; `available` are the steps of all checkpoints, measured or not.
    """
    from plotly.subplots import make_subplots

    own = frame.rename(columns={"value": "spread", "low": "spread_low", "high": "spread_high"})
    check_frame(own, ["step", "n", "spread", "recovery"])
    names = [f"spread off-topic ({unit}), and the bound", _panel_title(own, "recovery")]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.14, subplot_titles=names)
    figure.update_annotations(x=0, xanchor="left", font={"size": 14})
    for row, (name, (_, colour)) in enumerate(_PANELS.items(), start=1):
        _add_curve(figure, own, name, colour=colour, row=row)
    figure.add_hline(y=bound, line={"color": BLUE, "width": 1.5, "dash": "dash"}, row=1, col=1)
    first = own[own["exceeds"]]["step"]
    if len(first):
        figure.add_vline(x=float(first.iloc[0]), line={"color": GREY, "width": 6}, opacity=0.4, layer="below")
    n, seen = int(own["n"].iloc[0]), f"{len(own)} of {len(available)} checkpoints measured"
    apply_style(
        figure, title, f"n = {n} off-topic prompts, 95 % intervals; {seen}; grey: the onset", height=560, room=18
    )
    figure.update_layout(showlegend=False)
    few = len(available) <= MOST_TICKS
    figure.update_xaxes(tickmode="array", tickvals=list(available if few else own["step"]), showticklabels=True)
    every = "checkpoint" if few else "checkpoint that was measured"
    figure.update_xaxes(title_text=f"optimiser step (a tick for each {every})", row=2, col=1)
    return figure


def _panel_title(frame: "pd.DataFrame", name: str) -> str:
    """What is drawn, and at how many of the measurements it is not defined."""
    missing = int((~np.isfinite(frame[name].to_numpy(dtype=float))).sum())
    label = _PANELS[name][0]
    why = "the models do not differ beyond noise" if name == "recovery" else "missing"
    return f"{label}; undefined at {missing} of {len(frame)} measurements: {why}" if missing else label


def _edges(steps: npt.NDArray[np.float64]) -> list[float]:
    """Borders of the columns: halfway between measurements, and where the run ends."""
    if len(steps) == 1:
        return [float(steps[0]) - 0.5, float(steps[0]) + 0.5]
    halves = (steps[1:] + steps[:-1]) / 2
    first = max(0.0, float(steps[0] - (halves[0] - steps[0])))
    return [first, *halves.tolist(), float(steps[-1])]


def _add_curve(figure: "go.Figure", frame: "pd.DataFrame", name: str, *, colour: str, row: int) -> None:
    known = frame[np.isfinite(frame[name].to_numpy(dtype=float))]
    up = (known[f"{name}_high"] - known[name]).clip(lower=0)
    down = (known[name] - known[f"{name}_low"]).clip(lower=0)
    figure.add_scatter(
        x=known["step"],
        y=known[name],
        error_y={"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 1, "width": 3},
        mode="lines+markers",
        marker={"size": 6},
        line={"color": colour, "width": 2},
        hovertemplate=f"step %{{x}}: <b>%{{y:.3g}}</b> {name}<extra></extra>",
        row=row,
        col=1,
    )
    figure.add_hline(y=0, line={"color": GREY, "width": 1, "dash": "dot"}, row=row, col=1)
