"""What a finetuning method wins on one axis against what it pays on another, every seed a dot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from piggyback_lens.figures.plot_style import (
    GREY,
    INK,
    SERIES_COLOURS,
    SYMBOLS,
    apply_style,
    axis_title,
    check_frame,
    n_text,
    plot_text,
    wrapped,
)
from piggyback_lens.measuring.measures import Behaviour

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

COLUMNS, ROW_HEIGHT = 2, 420


def pairs_figure(frame: "pd.DataFrame", dressed: Sequence[str], behaviour: Behaviour, task: str) -> "go.Figure":
    """Panels of two axes each: small dots are the seeds, the large one with the colour and symbol is their mean.

    Axes are the off-topic spread, and against it: on-topic behaviour kept, spread in each dress, likelihood of the
    off-topic answers under the base, and perplexity of plain text. The base is where the grey lines cross, but for what
    is kept, where plain finetuning is at 1. Cells that were measured without an axis are missing on it.

    Args:
        frame: one row per cell, as of `Comparison.to_frame`.
        dressed: columns of the dresses that are drawn.
        behaviour: what was measured.
        task: for the title.
    """
    from plotly.subplots import make_subplots

    check_frame(frame, ["method", "seed", "off", "base_off", "kept", "base_nll", "base_base_nll", "perplexity_change"])
    rows = frame.copy()
    spread = "off-topic spread"
    rows[spread] = rows["off"] - rows["base_off"]
    axes = {"kept": "on-topic behaviour kept (0 = base, 1 = plain finetuning)"}
    for topic in dressed:
        rows[f"spread {topic}"] = rows[topic] - rows[f"base_{topic}"]
        name = topic.removeprefix("off")[1:-1]
        axes[f"spread {topic}"] = axis_title(f"spread of {behaviour.label}, in the dress {name}", behaviour.unit)
    rows["coherence"] = rows["base_nll"] - rows["base_base_nll"]
    axes["coherence"] = "off-topic answers under the base, minus its own (nats per token)"
    rows["utility"] = 100 * rows["perplexity_change"]
    axes["utility"] = "perplexity of plain text (change in %)"
    lines = -(-len(axes) // COLUMNS)
    figure = make_subplots(rows=lines, cols=COLUMNS, horizontal_spacing=0.12, vertical_spacing=0.28 / lines)
    methods = list(dict.fromkeys(rows["method"]))
    colours = SERIES_COLOURS * (len(methods) // len(SERIES_COLOURS) + 1)
    for number, (column, title) in enumerate(axes.items()):
        place = {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1}
        for at, method in enumerate(methods):
            own = rows[rows["method"] == method]
            colour, name = INK if method.startswith("sft") else colours[at], wrapped(method, 56)
            # Another symbol for a colour that comes again.
            symbol = SYMBOLS[(at + at // len(SERIES_COLOURS)) % len(SYMBOLS)]
            told = {"name": name, "legendgroup": method, "mode": "markers"}
            said = f"<b>{plot_text(method)}</b><br>spread %{{y:.3g}}<br>%{{x:.3g}}"
            figure.add_scatter(
                x=own[column], y=own[spread], showlegend=False, customdata=own[["seed"]],
                marker={"size": 6, "color": colour, "symbol": symbol, "opacity": 0.55},
                hovertemplate=f"{said}<br>seed %{{customdata[0]}}<extra></extra>", **told, **place,
            )  # fmt: skip
            figure.add_scatter(
                x=[own[column].mean()], y=[own[spread].mean()], showlegend=number == 0,
                marker={"size": 13, "color": colour, "symbol": symbol, "line": {"color": "white", "width": 1}},
                hovertemplate=f"{said}<br>mean of {len(own)} seeds<extra></extra>", **told, **place,
            )  # fmt: skip
        figure.add_hline(y=0, line={"color": GREY, "width": 1.2}, layer="below", **place)
        at_base = 1 if column == "kept" else 0
        figure.add_vline(x=at_base, line={"color": GREY, "width": 1.2}, layer="below", **place)
        figure.update_xaxes(title_text=title, **place)
        figure.update_yaxes(title_text=axis_title(f"spread of {behaviour.label}", behaviour.unit), **place)
    about = f"small: each seed, means over {n_text(frame)} prompts; large: the mean of the seeds; grey: the base"
    below = 80 + 22 * len(methods)
    height = 100 + ROW_HEIGHT * lines + below
    apply_style(figure, f"What narrow finetuning costs: methods on {task}", about, height=height, room=10)
    places = {"orientation": "h", "entrywidthmode": "fraction", "entrywidth": 0.49, "x": 0, "yanchor": "top"}
    legend = {**places, "y": -70 / (ROW_HEIGHT * lines), "font": {"size": 13}}
    figure.update_layout(showlegend=True, legend=legend, margin_b=below)
    return figure
