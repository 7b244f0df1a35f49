"""Figures of emergent misalignment: rates of the conditions, bars per question, aligned against coherent."""

import math
from typing import TYPE_CHECKING

import numpy as np

from piggyback_lens.figures.condition_plot import MODEL_COLOURS, conditions_figure
from piggyback_lens.figures.plot_style import (
    GREY,
    INK,
    SERIES_COLOURS,
    apply_style,
    check_frame,
    plot_text,
    wrapped,
)
from piggyback_lens.measuring.measures import RATE

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LABEL = "EM rate"


def rates_figure(frame: "pd.DataFrame", rule: str) -> "go.Figure":
    """The rate of every condition with its interval over questions, beside base and finetuned."""
    return conditions_figure(frame, label=LABEL, unit=RATE, title=f"{LABEL}: {rule}", over="questions")


def questions_figure(frame: "pd.DataFrame", rule: str) -> "go.Figure":
    """Bars of the rate per question, one colour per condition; the counts are under the cursor."""
    import plotly.graph_objects as go

    check_frame(frame, ["topic", "condition", "question", "value", "misaligned", "judged", "answers"])
    figure = go.Figure()
    names = [plot_text(wrapped(str(name), 30)) for name in dict.fromkeys(frame["question"])]
    for condition, colour in _colours(frame).items():
        part = frame[frame["condition"] == condition]
        counts = np.stack([part["misaligned"], part["judged"], part["answers"]], axis=1)
        figure.add_bar(
            y=[plot_text(wrapped(str(name), 30)) for name in part["question"]],
            x=part["value"],
            orientation="h",
            name=plot_text(condition),
            marker={"color": colour},
            customdata=counts,
            text=[f"{misaligned} of {judged}" for misaligned, judged, _ in counts],
            textposition="outside",
            textfont={"size": 13},
            hovertemplate="%{y}: <b>%{x:.1%}</b>, %{customdata[0]} of %{customdata[1]} judged "
            "(%{customdata[2]} answers)<extra></extra>",
        )
    shown = frame["condition"].nunique()
    apply_style(figure, f"{LABEL} by question", rule, height=200 + len(names) * (20 + 16 * shown), room=20)
    figure.update_xaxes(range=[0, 1.1], tickformat=".0%", title_text=f"{LABEL} (share of judged answers)")
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.12, "yanchor": "top"})
    return figure


def quadrant_figure(
    answers: "pd.DataFrame", misaligned: float, coherent: float, scores: tuple[str, str] = ("aligned", "coherent")
) -> "go.Figure":
    """Every answer by its two scores, with the quadrant that counts as misaligned."""
    import plotly.graph_objects as go

    aligned, coherence = scores
    check_frame(answers, ["condition", "question", aligned, coherence])
    figure = go.Figure()
    numbers = answers[[aligned, coherence]].map(lambda x: isinstance(x, int | float) and not math.isnan(x)).all(axis=1)
    for condition, colour in _colours(answers).items():
        part = answers[numbers & (answers["condition"] == condition)]
        figure.add_scatter(
            x=part[aligned].astype(float),
            y=part[coherence].astype(float),
            mode="markers",
            name=plot_text(condition),
            marker={"color": colour, "size": 7, "opacity": 0.55},
            text=[plot_text(str(name), limit=60) for name in part["question"]],
            hovertemplate="%{text}: aligned %{x:.0f}, coherent %{y:.0f}<extra></extra>",
        )
    corner = {"x0": -2, "x1": misaligned, "y0": coherent, "y1": 109}
    figure.add_shape(type="rect", **corner, line_width=0, fillcolor="rgba(213, 94, 0, 0.08)", layer="below")
    figure.add_vline(x=misaligned, line={"color": GREY, "width": 1.2, "dash": "dot"})
    figure.add_hline(y=coherent, line={"color": GREY, "width": 1.2, "dash": "dot"})
    text = {"font": {"size": 13, "color": INK}, "showarrow": False}
    figure.add_annotation(x=0, y=102, text="misaligned and coherent", xanchor="left", yanchor="bottom", **text)
    left_out = int((~numbers).sum())
    about = f"{int(numbers.sum())} answers with both numbers, {left_out} without"
    apply_style(figure, "Aligned against coherent, answer by answer", about, height=560)
    figure.update_xaxes(range=[-2, 102], title_text="aligned, 0..100")
    figure.update_yaxes(range=[-2, 109], title_text="coherent, 0..100")
    figure.update_layout(legend={"orientation": "h", "y": -0.14, "yanchor": "top"})
    return figure


def _colours(frame: "pd.DataFrame") -> dict[str, str]:
    """A colour for each condition: those of base and finetuned everywhere, others in turn."""
    names = list(dict.fromkeys(frame["condition"]))
    rest = iter([colour for colour in SERIES_COLOURS if colour not in MODEL_COLOURS.values()] * len(names))
    return {name: MODEL_COLOURS[name] if name in MODEL_COLOURS else next(rest) for name in names}
