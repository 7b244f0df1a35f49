"""Does the cheap attribution agree with the exact patches: cells as dots, with the line where both agree."""

import math
from typing import TYPE_CHECKING

import numpy as np

from piggyback_lens.errors import LensError
from piggyback_lens.figures.map_plots import bar_lengths, known_floor, whole
from piggyback_lens.figures.plot_style import BLUE, GREY, MISSING, ORANGE, check_frame, n_text, plot_text
from piggyback_lens.figures.plots import apply_heading
from piggyback_lens.intervals import interval_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def attribution_check_figure(
    frame: "pd.DataFrame",
    *,
    title: str,
    subtitle: str = "",
    x_title: str = "attribution: estimated recovery (fraction)",
    y_title: str = "patch: exact recovery (fraction)",
    noise_floor: float | None = None,
    rank_correlation: float | None = None,
) -> "go.Figure":
    """Attribution of cells against their exact recovery, with the line where both agree.

    Args:
        frame: columns attribution and exact; optionally n, low and high (of exact), and any of the labels span,
            sites, layer, token, position, head, group, band, which stand under the cursor. Cells where either
            number is missing are not drawn, and counted in the subtitle.
        title: literal text, names model and task.
        subtitle: literal text before what the figure says itself.
        x_title: name and unit of the attribution.
        y_title: name and unit of the exact recovery.
        noise_floor: |exact recovery| up to this is noise, a shaded band.
        rank_correlation: Spearman's, of the result, for the subtitle; NaN is said to be undefined.

    Raises:
        LensError: columns are missing, there are no rows, or none has both numbers.
    """
    import plotly.graph_objects as go

    noise_floor = known_floor(noise_floor)
    check_frame(frame, ["attribution", "exact"])
    estimate, exact = (frame[name].to_numpy(float) for name in ("attribution", "exact"))
    known = np.isfinite(estimate) & np.isfinite(exact)
    if not known.any():
        raise LensError("no row has both attribution and exact recovery; pass check_cells to attribution_map")
    part, estimate, exact = frame[known], estimate[known], exact[known]
    figure = go.Figure()
    edges = [min(0.0, *estimate, *exact), max(0.0, *estimate, *exact)]
    room = 0.06 * ((edges[1] - edges[0]) or 1.0)
    edges = [edges[0] - room, edges[1] + room]
    dash = {"color": GREY, "width": 1.5, "dash": "dash"}
    figure.add_scatter(x=edges, y=edges, mode="lines", line=dash, hoverinfo="skip")
    low, high = (part[name].to_numpy(float) if name in part else np.full(len(part), np.nan) for name in ("low", "high"))
    figure.add_scatter(
        x=estimate,
        y=exact,
        mode="markers",
        marker={"size": 9, "color": BLUE, "opacity": 0.75, "line": {"width": 1, "color": "white"}},
        error_y={
            "array": bar_lengths(high - exact),
            "arrayminus": bar_lengths(exact - low),
            "color": MISSING,
            "thickness": 1.4,
            "width": 0,
        },
        customdata=_cell_names(part),
        text=[interval_text(*numbers) for numbers in zip(exact, low, high, strict=True)],
        hovertemplate="%{customdata}attribution: <b>%{x:.3g}</b><br>exact: <b>%{text}</b><extra></extra>",
    )
    if noise_floor is not None:
        figure.add_hrect(y0=-noise_floor, y1=noise_floor, fillcolor=ORANGE, opacity=0.25, line_width=0, layer="below")
    lines = [subtitle] if subtitle else []
    lines += ["dot: one cell; dashed: attribution = exact"]
    lines += [] if rank_correlation is None else [_rank_correlation(rank_correlation)]
    lines += [f"{n_text(part)} prompts"] if "n" in part else []
    lines += ["bar: 95 % interval over prompts"] if np.isfinite(low).any() else []
    lines += [f"shaded: within the noise floor ±{noise_floor:.2g}"] if noise_floor is not None else []
    lines += [f"{int((~known).sum())} cells without both numbers not drawn"] if not known.all() else []
    apply_heading(figure, title, "; ".join(lines), height=640)
    figure.update_xaxes(title_text=plot_text(x_title), range=edges)
    figure.update_yaxes(title_text=plot_text(y_title), range=edges)
    figure.update_layout(showlegend=False)
    return figure


def _cell_names(part: "pd.DataFrame") -> list[str]:
    """A line for each label a cell has, ready for plotly."""
    names = [name for name in ("span", "sites", "layer", "token", "position", "head", "group", "band") if name in part]
    rows = part[names].itertuples(index=False) if names else [()] * len(part)
    return [
        "".join(
            f"{name} {plot_text(whole(value))}<br>"
            for name, value in zip(names, row, strict=True)
            if not _is_nan(value)
        )
        for row in rows
    ]


def _rank_correlation(rho: float) -> str:
    if np.isnan(rho):
        return "Spearman ρ undefined (it takes three evenly sampled cells)"
    return f"Spearman ρ = {rho:.2f} on the even sample of cells"


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
