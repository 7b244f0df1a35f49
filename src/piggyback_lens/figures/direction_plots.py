"""Figures of sweeps, curves, transfers and trajectories of directions; each function returns the figure."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from piggyback_lens.figures.plot_style import (
    DASHES,
    GREY,
    INK,
    MISSING,
    SERIES_COLOURS,
    SYMBOLS,
    apply_style,
    axis_title,
    check_frame,
    n_text,
    plot_text,
    whole_steps,
)
from piggyback_lens.figures.plots import DIVERGING
from piggyback_lens.intervals import interval_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TITLES = {
    "efficiency": "Efficiency: loss against norm",
    "stability": "Stability: loss increase under orthogonal noise",
    "significance": "Significance: how much plain text changes",
    "ablation": "What ablating the direction costs on plain text",
    "steer": "Steering: what it does and what it costs",
    "ablate": "Ablation: what it does and what it costs",
}


def curve_figure(
    frame: "pd.DataFrame", kind: str, x_label: str, y_label: str, own_norms: Mapping[str, float] = {}
) -> "go.Figure":
    """A line with its band over x for each series; controls in grey with hollow markers.

    ``frame`` has columns series, x, value, low, high, n, seeds. Where x is a norm, `own_norms` are those that the
    solutions were trained to, by name: dotted lines.
    """
    import plotly.graph_objects as go

    check_frame(frame, ["series", "x", "value", "low", "high", "n", "seeds"])
    figure = go.Figure()
    if kind == "stability":
        for height, text in ((0.0, "solution"), (1.0, "base")):
            _reference(figure, height, text)
    looks = _looks(list(dict.fromkeys(frame["series"])))
    for look in looks:
        _add_line(figure, frame[frame["series"] == look["name"]].sort_values("x"), "x", look, x_label)
    own = [look for look in looks if kind in ("efficiency", "significance") and look["name"] in own_norms]
    for number, look in enumerate(own):
        _own_norm(figure, own_norms[look["name"]], look, number)
    entries = frame["series"].nunique()
    seeds = int(frame["seeds"].max())
    about = f"band: 95 % interval over texts, {n_text(frame)}"
    about += f"; up to {seeds} seeds averaged" if seeds > 1 else ""
    solutions = dict.fromkeys(str(name).split(",", 1)[0] for name in frame["series"])
    title = f"{TITLES[kind]} ({', '.join(solutions)})"
    apply_style(figure, title, about, height=520 + 27 * entries, room=20 * len(own))
    figure.update_xaxes(title_text=plot_text(x_label))
    if kind == "ablation":
        figure.update_xaxes(**whole_steps(frame["x"].to_numpy(float), most=20))
    figure.update_yaxes(title_text=plot_text(y_label))
    _legend_below(figure, entries)
    if kind == "stability":
        figure.update_layout(margin_r=90)  # room for the names of the reference lines
    return figure


def difference_figure(frame: "pd.DataFrame", kind: str, x_label: str, y_label: str) -> "go.Figure":
    """One solution minus another at equal norms, with its band; columns as of ``Curve.difference``."""
    figure = curve_figure(frame.assign(seeds=1), kind, x_label, f"difference in {y_label}")
    title = f"{kind.capitalize()}: {frame['series'].iloc[0]} at equal norms"
    about = f"band: 95 % interval over texts, paired, {n_text(frame)}"
    figure.update_layout(title_text=plot_text(title), title_subtitle_text=about)
    figure.add_hline(y=0, line={"color": "#777777", "width": 1})
    return figure


def sweep_figure(frame: "pd.DataFrame", kind: str, measure: Mapping[str, str], what: str = "") -> "go.Figure":
    """Behaviour, KL and perplexity under each other, over the strength (steer) or the layer (ablate) of `what`."""
    from plotly.subplots import make_subplots

    check_frame(frame, ["series", "layer", "x", "metric", "value", "low", "high", "n", "seeds"])
    panels = {
        "behaviour": axis_title(measure["label"], measure["unit"]),
        "kl": "KL to the unsteered model (nats per token)",
        "perplexity": "perplexity of the answers (unsteered model)",
    }
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07, subplot_titles=list(panels.values())
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
    table, column, x_label = frame.copy(), "layer", "layer of the direction"
    table["shown"] = table["series"]
    if kind == "steer":
        column, x_label = "x", "strength (multiples of the vector)"
        if table["layer"].nunique() > 1:
            pairs = zip(table["series"], table["layer"], strict=True)
            table["shown"] = [f"{series}, layer {layer}" for series, layer in pairs]
    looks = _looks(list(dict.fromkeys(table["shown"])))
    for row, metric in enumerate(panels, start=1):
        for look in looks:
            part = table[(table["shown"] == look["name"]) & (table["metric"] == metric)]
            _add_line(figure, part.sort_values(column), column, {**look, "legend": row == 1}, x_label, row=row)
    subtitle = f"band: 95 % interval over prompts, {n_text(frame)}"
    subtitle += f"; {plot_text(what)}" if what else ""
    title = f"{TITLES[kind]} ({measure['label']})"
    apply_style(figure, title, subtitle, height=900 + 27 * len(looks), room=18)
    figure.update_xaxes(title_text=plot_text(x_label), row=3)
    if kind == "ablate":
        figure.update_xaxes(**whole_steps(table["layer"].to_numpy(float), most=20))
    figure.update_yaxes(rangemode="tozero", row=2)
    _legend_below(figure, len(looks), y=-0.09)
    return figure


def transfer_figure(frame: "pd.DataFrame") -> "go.Figure":
    """Two maps of effects: directions down, organisms across, with the numbers written in."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    check_frame(frame, ["mode", "direction", "organism", "value", "low", "high", "reason", "n"])
    modes = {"added": "added to the base", "ablated": "ablated from the finetuned model"}
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(modes.values()), horizontal_spacing=0.16)
    down, across = (list(dict.fromkeys(frame[name])) for name in ("direction", "organism"))
    limit = max(1.0, float(np.nanmax(np.abs(frame["value"].to_numpy(float)), initial=0.0)))
    for column, mode in enumerate(modes, start=1):
        part = frame[frame["mode"] == mode].set_index(["direction", "organism"])
        cells = [[part.loc[(d, o)] for o in across] for d in down]
        figure.add_trace(
            go.Heatmap(
                z=[[float(cell["value"]) for cell in row] for row in cells],
                x=[plot_text(o) for o in across],
                y=[plot_text(d) for d in down],
                zmin=-limit, zmax=limit, colorscale=DIVERGING, xgap=2, ygap=2, showscale=column == 2,
                text=[[_effect_text(cell) for cell in row] for row in cells],
                texttemplate="%{text}", textfont={"size": 13}, hoverongaps=False,
                hovertext=[[plot_text(str(cell["reason"]) or f"n = {cell['n']}") for cell in row] for row in cells],
                hovertemplate="direction %{y} on %{x}<br><b>%{text}</b><br>%{hovertext}<extra></extra>",
                colorbar={"title": {"text": "effect", "side": "top"}, "thickness": 16},
            ), row=1, col=column,
        )  # fmt: skip
    subtitle = (
        f"effect: 0 = nothing, 1 = like the other model; 95 % interval over prompts, {n_text(frame)}; grey: undefined"
    )
    apply_style(figure, "Transfer of directions between organisms", subtitle, height=260 + 62 * len(down), room=24)
    figure.update_xaxes(title_text="organism", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(title_text="direction of", col=1)
    figure.update_layout(plot_bgcolor=MISSING)
    return figure


def _effect_text(cell: "pd.Series[float]") -> str:
    if not math.isfinite(float(cell["value"])):
        return "undefined"
    return interval_text(float(cell["value"]), float(cell["low"]), float(cell["high"])).replace(" [", "<br>[")


def trajectory_figure(frame: "pd.DataFrame", explained: Sequence[float], distance: int) -> "go.Figure":
    """Norm and local cosine over the steps, and the runs' paths through the first two components."""
    from plotly.subplots import make_subplots

    check_frame(frame, ["run", "step", "norm", "local_cosine", "pc1", "pc2"])
    titles = [
        "norm",
        f"local cosine similarity (distance {distance} snapshots)",
        "principal components of all snapshots",
    ]
    figure = make_subplots(rows=3, cols=1, row_heights=[0.27, 0.27, 0.46], vertical_spacing=0.1, subplot_titles=titles)
    figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
    looks = _looks(list(dict.fromkeys(frame["run"])))
    for look in looks:
        part = frame[frame["run"] == look["name"]].sort_values("step")
        style = {"line": {"color": look["colour"], "width": 2, "dash": look["dash"]}, "legendgroup": look["group"]}
        for row, (x, y) in enumerate((("step", "norm"), ("step", "local_cosine"), ("pc1", "pc2")), start=1):
            figure.add_scatter(
                x=part[x], y=part[y], mode="lines+markers", name=plot_text(look["name"]), showlegend=row == 1,
                marker={"size": 6, "symbol": look["symbol"], "color": look["colour"]}, customdata=part[["step"]],
                hovertemplate="step %{customdata[0]}: %{x:.4g}, <b>%{y:.4g}</b><extra></extra>",
                row=row, col=1, **style,
            )  # fmt: skip
    about = f"{', '.join(plot_text(look['name']) for look in looks)}: one space of components"
    apply_style(figure, "Training trajectory", about, height=1000 + 27 * len(looks), room=18)
    parts = [
        f"component {i + 1} ({100 * share:.0f} % of the variance)" for i, share in enumerate([*explained, 0, 0][:2])
    ]
    figure.update_xaxes(title_text="step", row=2)
    figure.update_xaxes(title_text=parts[0], row=3)
    figure.update_yaxes(title_text=parts[1], row=3)
    lowest = float(np.nanmin(frame["local_cosine"].to_numpy(float), initial=1.0))
    figure.update_yaxes(range=[lowest - 0.06 * (1 - lowest) - 0.01, 1 + 0.06 * (1 - lowest) + 0.01], row=2)
    for row in (1, 2):
        figure.update_xaxes(row=row, **whole_steps(frame["step"].to_numpy(float)))
    # Distances between snapshots mean something: one unit is as long along both components.
    figure.update_yaxes(scaleanchor="x3", row=3)
    figure.update_xaxes(constrain="domain", row=3)
    _legend_below(figure, len(looks), y=-0.09)
    return figure


def snapshot_cosines_figure(frame: "pd.DataFrame") -> "go.Figure":
    """Cosines to the references in one panel, every other quantity in one of its own, over the steps."""
    from plotly.subplots import make_subplots

    check_frame(frame, ["step", "quantity", "value", "low", "high", "n"])
    names = list(dict.fromkeys(frame["quantity"]))
    cosines = [name for name in names if name.startswith("cosine to ")]
    panels = [cosines, *([name] for name in names if name not in cosines)]
    panels = [panel for panel in panels if panel]
    titles = ["cosine similarity" if panel is cosines else plot_text(panel[0]) for panel in panels]
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.1, subplot_titles=titles)
    figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
    looks = {look["name"]: look for look in _looks(names)}
    for row, panel in enumerate(panels, start=1):
        for name in panel:
            _add_line(
                figure, frame[frame["quantity"] == name].sort_values("step"), "step", looks[name], "step", row=row
            )
    apply_style(
        figure,
        "Where a continued run goes",
        f"band: 95 % interval over prompts, {n_text(frame[frame['n'] > 0])}" if (frame["n"] > 0).any() else "",
        height=260 + 210 * len(panels),
        room=18,
    )
    figure.update_xaxes(**whole_steps(frame["step"].to_numpy(float)))
    figure.update_xaxes(title_text="step", row=len(panels))
    _legend_below(figure, len(names), y=-0.12)
    return figure


# ---------------------------------------------------------------- lines


def _looks(names: Sequence[str]) -> list[dict[str, str]]:
    """Colour, dash and symbol of each series; controls are grey."""
    colours = iter(SERIES_COLOURS * (len(names) // len(SERIES_COLOURS) + 1))
    looks = []
    for index, name in enumerate(names):
        colour = GREY if "control" in name else next(colours)
        look = {"name": name, "colour": colour, "group": str(index)}
        looks.append(look | {"dash": DASHES[index % len(DASHES)], "symbol": SYMBOLS[index % len(SYMBOLS)]})
    return looks


def _add_line(
    figure: "go.Figure",
    part: "pd.DataFrame",
    column: str,
    look: Mapping[str, str | bool],
    x_label: str,
    row: int | None = None,
) -> None:
    """One series with its interval as a band, or as a bar where it has one point."""
    where = {} if row is None else {"row": row, "col": 1}
    name, colour, x = plot_text(look["name"]), look["colour"], part[column].tolist()
    value, low, high = (part[key].to_numpy(float) for key in ("value", "low", "high"))
    known = np.isfinite(low) & np.isfinite(high)
    if known.all() and len(x) > 1:
        figure.add_scatter(
            x=[*x, *x[::-1]], y=np.concatenate([high, low[::-1]]), fill="toself", mode="lines", line={"width": 0},
            fillcolor=colour, opacity=0.15, hoverinfo="skip", showlegend=False, legendgroup=look["group"], **where,
        )  # fmt: skip
    bars = {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "color": colour}
    hollow = "control" in str(look["name"])
    figure.add_scatter(
        x=x, y=value, mode="lines+markers", name=name, legendgroup=look["group"],
        showlegend=look.get("legend", True), error_y=bars if len(x) == 1 and known.all() else None,
        line={"color": colour, "width": 2.3, "dash": look["dash"]},
        marker={"size": 8, "symbol": look["symbol"], "color": "white" if hollow else colour,
                "line": {"width": 1.5, "color": colour}},
        text=[f"{interval_text(v, a, b)}, n = {n}" for v, a, b, n in zip(value, low, high, part["n"], strict=True)],
        hovertemplate=f"<b>{name}</b><br>{plot_text(x_label)} %{{x}}: %{{text}}<extra></extra>", **where,
    )  # fmt: skip


def _own_norm(figure: "go.Figure", norm: float, look: Mapping[str, str], number: int) -> None:
    """Where a solution's own norm lies; the names stand above each other."""
    figure.add_vline(x=norm, line={"color": look["colour"], "width": 1.2, "dash": "dot"}, layer="below")
    text = {"text": f"{plot_text(look['name'])}: own norm {norm:.3g}", "font": {"size": 13, "color": look["colour"]}}
    place = {"x": norm, "xanchor": "right", "y": 1, "yref": "y domain", "yanchor": "bottom", "yshift": 18 * number}
    figure.add_annotation(**text, **place, showarrow=False)


def _reference(figure: "go.Figure", height: float, text: str) -> None:
    figure.add_hline(y=height, line={"color": GREY, "width": 1.2}, layer="below")
    place = {"x": 1.01, "xref": "paper", "xanchor": "left", "y": height}
    figure.add_annotation(**place, text=plot_text(text), showarrow=False, font={"color": GREY})


def _legend_below(figure: "go.Figure", entries: int, y: float = -0.17) -> None:
    legend = {"orientation": "v", "x": 0, "y": y, "yanchor": "top", "font": {"size": 14}}
    figure.update_layout(legend=legend, showlegend=True, margin_b=80 + 27 * entries)
