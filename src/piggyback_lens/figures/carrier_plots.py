"""Which span carries the change: the carrier map as panels, and the plane necessity × sufficiency."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from piggyback_lens.errors import LensError
from piggyback_lens.figures.map_plots import (
    NOT_MEASURED,
    NUMBERS,
    PATCHED,
    Grid,
    bar_lengths,
    check_labels,
    grid,
    keys_in_order,
    known_floor,
    patched_rows,
    zero_notes,
)
from piggyback_lens.figures.plot_style import (
    GREY,
    INK,
    MISSING,
    ORANGE,
    PALE,
    SERIES_COLOURS,
    SYMBOLS,
    n_text,
    plot_text,
    wrapped,
)
from piggyback_lens.figures.plots import DIVERGING, apply_heading, colour_bar
from piggyback_lens.intervals import interval_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LABELS = ("flow", "span", "sites", "band")
MEANING = {"repair": "base → finetuned", "infect": "finetuned → base"}
GAP = 0.5  # rows between the patches and their controls
WIDE = 2  # columns, up to which there is room for intervals in the cells


# --- map ---------------------------------------------------------------------------------------------


def carrier_map_figure(frame: "pd.DataFrame", *, title: str, noise_floor: float | None = None) -> "go.Figure":
    """Recovery by span and band of layers: a panel for each flow (down) and sites (across).

    Controls are rows of their own below a gap, named in grey, on the same scale. Values stand in brackets where their
    interval includes zero, and are ``≈ 0`` within ``noise_floor`` (a fraction).

    Args:
        frame: columns series, flow, span, sites, band, value, low, high, n, reason; every series but
            "patched" is a control. With the optional column contains, a control is named by what it holds.
        title: literal text, names model and task.
        noise_floor: largest recovery that is noise (``PatchResult.noise_floor``).

    Raises:
        LensError: columns are missing, no row is patched, or two rows stand for the same cell.
    """
    from plotly.subplots import make_subplots

    noise_floor = known_floor(noise_floor)
    patched = patched_rows(frame, LABELS)
    check_labels(frame, LABELS)
    flows, sites = keys_in_order(patched["flow"]), keys_in_order(patched["sites"])
    bands = keys_in_order(frame["band"])
    blocks = _blocks(frame)
    figure = make_subplots(
        rows=len(flows),
        cols=len(sites),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.16 / len(flows),
        subplot_titles=[f"<b>{plot_text(d)}</b>, {plot_text(site)}" for d in flows for site in sites],
    )
    figure.update_annotations(font={"size": 14, "color": INK})
    cells: list[Grid] = []
    wide = len(bands) * len(sites) <= WIDE
    for row, flow in enumerate(flows, start=1):
        for column, site in enumerate(sites, start=1):
            panel = frame[(frame["flow"] == flow) & (frame["sites"] == site)]
            for series, (spans, start) in blocks.items():
                part = grid(panel[panel["series"] == series], x="band", y="span", xs=bands, ys=spans)
                texts = part.cell_text(noise_floor, digits=2)
                if wide:
                    texts = _with_intervals(part, texts)
                _add_block(figure, part, texts, (series, start), row, column)
                cells += [part] if series == PATCHED else []
    notes = [f"{flow}: {MEANING[str(flow)]}" for flow in flows if flow in MEANING]
    zeros = zero_notes(cells, noise_floor, brackets=True)
    notes += ["in the cells: 95 % interval over prompts" if wide else "under the cursor: 95 % interval over prompts"]
    notes += [n_text(patched), *(zeros[1:] if wide else zeros)]
    _finish_map(figure, title, frame, blocks, notes, panels=len(flows))
    finite = frame["value"].dropna().abs()
    limit = max([2 * (noise_floor or 0.0), *finite]) or 1.0
    bar = colour_bar("recovery (fraction)")
    figure.update_layout(coloraxis={"colorscale": DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar})
    figure.update_xaxes(
        tickvals=list(range(len(bands))),
        ticktext=[wrapped(str(band), 14) for band in bands],
        range=[-0.5, len(bands) - 0.5],
        showgrid=False,
    )
    for column in range(1, len(sites) + 1):
        figure.update_xaxes(title_text="band of layers", row=len(flows), col=column)
    return figure


def _blocks(frame: "pd.DataFrame") -> dict[str, tuple[tuple[object, ...], float]]:
    """Rows that belong together: for each series its spans and the place of the first; patches on top."""
    blocks: dict[str, tuple[tuple[object, ...], float]] = {}
    place = 0.0
    for series in sorted(keys_in_order(frame["series"]), key=lambda name: name != PATCHED):
        spans = keys_in_order(frame.loc[frame["series"] == series, "span"])
        blocks[str(series)] = (spans, place)
        place += len(spans) + GAP
    return blocks


def _add_block(
    figure: "go.Figure", part: Grid, texts: list[list[str]], block: tuple[str, float], row: int, column: int
) -> None:
    """The cells of one series in one panel, on grey where they were measured without result."""
    series, start = block
    failed = [[NOT_MEASURED not in text for text in line] for line in part.intervals] & ~np.isfinite(part.values)
    common = {"x": list(range(len(part.xs))), "y": [start + i for i in range(len(part.ys))]}
    # Shows in the gaps between the cells, as their borders, and where a cell has no value.
    ground = {"colorscale": [[0, PALE], [1, MISSING]], "zmin": 0, "zmax": 1, "showscale": False, "hoverinfo": "skip"}
    figure.add_heatmap(z=failed.astype(np.int8), **common, **ground, row=row, col=column)
    names = [[f"{plot_text(series)}: {plot_text(y)}, {plot_text(x)}" for x in part.xs] for y in part.ys]
    figure.add_heatmap(
        z=part.values.astype(np.float32),
        xgap=2,
        ygap=2,
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 13},
        hovertext=names,
        customdata=part.intervals,
        hovertemplate="%{hovertext}<br>recovery: <b>%{customdata}</b><extra></extra>",
        hoverongaps=True,
        coloraxis="coloraxis",
        **common,
        row=row,
        col=column,
    )


def _with_intervals(part: Grid, texts: list[list[str]]) -> list[list[str]]:
    """Where cells are wide, the interval stands in them too; not where the number alone says that it is zero."""
    return [
        [text if text in ("≈ 0", "–") else whole.partition(", n =")[0] for text, whole in zip(*row, strict=True)]
        for row in zip(texts, part.intervals, strict=True)
    ]


def _finish_map(
    figure: "go.Figure",
    title: str,
    frame: "pd.DataFrame",
    blocks: Mapping[str, tuple[tuple[object, ...], float]],
    notes: Sequence[str],
    panels: int,
) -> None:
    subtitle = "; ".join(["cell: mean recovery", *notes])
    subtitle += "; grey: no value" if frame.loc[frame["series"] == PATCHED, "value"].isna().any() else ""
    ticks = {
        start + i: plot_text(span) if series == PATCHED else _grey(_control_name(frame, series, span))
        for series, (spans, start) in blocks.items()
        for i, span in enumerate(spans)
    }
    depth = max(ticks) + 1
    apply_heading(figure, title, subtitle, height=int(150 + panels * (60 + 30 * depth)), room=26)
    figure.update_yaxes(
        tickvals=list(ticks), ticktext=list(ticks.values()), range=[depth - 0.5, -0.5], showgrid=False, ticks=""
    )
    figure.update_xaxes(showline=False, ticks="")


def _control_name(frame: "pd.DataFrame", series: str, span: object) -> str:
    """A control with the span that it stands for; one of other tokens by the tokens that it holds."""
    own = frame[(frame["series"] == series) & (frame["span"] == span)]
    held = own["contains"].dropna() if "contains" in own else own["span"].head(0)
    return f"instead of {span}: {held.iloc[0]}" if len(held) else f"{span}, {series}"


def _grey(text: str) -> str:
    return f'<span style="color:{GREY}">{plot_text(text)}</span>'


# --- plane -------------------------------------------------------------------------------------------


def carrier_plane_figure(frame: "pd.DataFrame", *, title: str, noise_floor: float | None = None) -> "go.Figure":
    """Necessary and sufficient: recovery by repair (x) against recovery by infect (y), with intervals.

    A marker for each span (colour), sites (shape) and band (number); controls are hollow and grey. A
    pair without a value in one of the flows is not drawn, and counted in the subtitle.

    Args:
        frame: columns series, flow, span, sites, band, value, low, high, n, reason; every series but
            "patched" is a control.
        title: literal text, names model and task.
        noise_floor: |recovery| up to this (a fraction) is noise: a shaded band around both axes.

    Raises:
        LensError: columns are missing, no row is patched, a flow is missing, or rows repeat.
    """
    import plotly.graph_objects as go

    noise_floor = known_floor(noise_floor)
    pairs, lacking = _pairs(frame)
    patched = frame[frame["series"] == PATCHED]
    spans, sites, bands = (keys_in_order(patched[name]) for name in ("span", "sites", "band"))
    colours = {span: SERIES_COLOURS[i % len(SERIES_COLOURS)] for i, span in enumerate(spans)}
    symbols = {site: SYMBOLS[i % len(SYMBOLS)] for i, site in enumerate(sites)}
    numbers = {band: str(i) if len(bands) > 1 else "" for i, band in enumerate(bands, start=1)}
    figure = go.Figure()
    controls = [series for series in keys_in_order(pairs["series"]) if series != PATCHED]
    for series in (*controls, PATCHED):  # in this order no control covers a patch
        for (span, site), part in pairs[pairs["series"] == series].groupby(["span", "sites"], sort=False):
            symbol = symbols.get(site, "star")
            if series == PATCHED:
                marker, texts = _filled(colours[span], symbol), [numbers[band] for band in part["band"]]
                marker |= {"size": 19 if len(bands) > 1 else 13}
                _add_points(figure, part, marker, colours[span], texts)
            else:
                _add_points(figure, part, _hollow(controls.index(series), symbol), MISSING)
    _add_legend(figure, colours, symbols, numbers, controls)
    subtitle = "marker: mean; bars: 95 % intervals over prompts; " + n_text(patched)
    if noise_floor is not None:
        subtitle += f"; shaded: within the noise floor ±{noise_floor:.2g}"
    if lacking:
        subtitle += f"; {lacking} without a value in one flow, not drawn"
    apply_heading(figure, title, subtitle, height=700)
    _finish_plane(figure, pairs, noise_floor or 0.0)
    return figure


def _pairs(frame: "pd.DataFrame") -> tuple["pd.DataFrame", int]:
    """Both flows of each place side by side (suffixes _repair, _infect), and how many lack one."""
    patched_rows(frame, LABELS)
    check_labels(frame, LABELS)
    keys = ["series", "span", "sites", "band", *(["contains"] if "contains" in frame else [])]
    halves = []
    for flow in ("repair", "infect"):
        part = frame.loc[frame["flow"] == flow, [*keys, *NUMBERS]]
        if not (part["series"] == PATCHED).any():
            given = ", ".join(map(str, frame["flow"].unique()))
            raise LensError(
                f"the plane needs both flows, the frame has {given}; run carrier_map with "
                f"flow={flow!r} too and concatenate the frames"
            )
        twice = part.duplicated(keys)
        if twice.any():
            at = ", ".join(f"{name} {part.loc[twice, name].iloc[0]}" for name in keys)
            raise LensError(f"several rows stand for {flow}, {at}; keep one of them before drawing")
        halves.append(part)
    pairs = halves[0].merge(halves[1], on=keys, suffixes=("_repair", "_infect"))  # in the order of repair
    alone = len(halves[0]) + len(halves[1]) - 2 * len(pairs)
    known = pairs["value_repair"].notna() & pairs["value_infect"].notna()
    return pairs[known], alone + int((~known).sum())


def _filled(colour: str, symbol: str) -> dict[str, object]:
    return {"symbol": symbol, "size": 13, "color": _tint(colour), "line": {"width": 2, "color": colour}}


def _hollow(index: int, symbol: str) -> dict[str, object]:
    """The marker of the ``index``-th control: empty, or with a dot."""
    shape = f"{symbol}-open" + ("-dot" if index % 2 else "")
    return {"symbol": shape, "size": 11, "color": GREY, "line": {"width": 1.5, "color": GREY}}


def _add_points(
    figure: "go.Figure", part: "pd.DataFrame", marker: Mapping[str, object], bar: str, texts: Sequence[str] = ()
) -> None:
    bars, hover = {}, [list[str]() for _ in range(len(part))]
    for axis, flow in (("x", "repair"), ("y", "infect")):
        value, low, high = (part[f"{name}_{flow}"].to_numpy(float) for name in ("value", "low", "high"))
        bars[f"error_{axis}"] = {
            "array": bar_lengths(high - value),
            "arrayminus": bar_lengths(value - low),
            "color": bar,
            "thickness": 1.4,
            "width": 3,
        }
        for lines, *numbers, n in zip(hover, value, low, high, part[f"n_{flow}"], strict=True):
            lines.append(f"{flow}: {interval_text(*numbers)}, n = {int(n)}")
    columns = ["series", "span", "sites", "band", *(["contains"] if "contains" in part else [])]
    names = part[columns].fillna("").itertuples(index=False)
    figure.add_scatter(
        x=part["value_repair"].to_numpy(float),
        y=part["value_infect"].to_numpy(float),
        mode="markers+text" if any(texts) else "markers",
        marker=marker,
        text=list(texts),
        textfont={"size": 13, "color": INK},
        customdata=[
            f"<b>{', '.join(plot_text(name) for name in row if name)}</b><br>{'<br>'.join(lines)}"
            for row, lines in zip(names, hover, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
        **bars,
    )


def _tint(colour: str) -> str:
    """The colour mixed with white, light enough for dark text on it."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(0.4 * part + 0.6 * 255):02X}" for part in parts)


def _add_legend(
    figure: "go.Figure",
    colours: Mapping[object, str],
    symbols: Mapping[object, str],
    numbers: Mapping[object, str],
    controls: Sequence[object],
) -> None:
    """Entries without data, grouped by what they explain."""

    entries = [("span", str(span), _filled(colour, "circle")) for span, colour in colours.items()]
    entries += [("sites", str(site), _filled(INK, symbol)) for site, symbol in symbols.items()]
    entries += [("controls", str(series), _hollow(i, "circle")) for i, series in enumerate(controls)]
    entries += [("band", f"{number}: {band}", {"color": "rgba(0,0,0,0)"}) for band, number in numbers.items() if number]
    for group, name, marker in entries:
        heading = {"text": "band of layers" if group == "band" else group, "font": {"size": 14}}
        common = {"x": [None], "y": [None], "mode": "markers", "legendgroup": group, "legendgrouptitle": heading}
        figure.add_scatter(marker=marker, name=plot_text(name), **common)


def _finish_plane(figure: "go.Figure", pairs: "pd.DataFrame", noise_floor: float) -> None:
    for name, axis, place in (("x", figure.update_xaxes, 0), ("y", figure.update_yaxes, 1)):
        flow = ("repair", "infect")[place]
        low, high = _range(pairs, flow, noise_floor)
        room = (0.0, 0.09 * (high - low))[place]  # strips above and below for the words in the corners
        axis(range=[low - room, high + room], zeroline=False)
        line = {"color": GREY, "width": 1}
        add = figure.add_vline if name == "x" else figure.add_hline
        band = figure.add_vrect if name == "x" else figure.add_hrect
        for at, dash in ((0, "solid"), (1, "dot")):
            add(**{name: at}, line={**line, "dash": dash}, layer="below")
        if noise_floor:
            edges = {f"{name}0": -noise_floor, f"{name}1": noise_floor}
            band(**edges, fillcolor=ORANGE, opacity=0.25, line_width=0, layer="below")
    words = (
        ("sufficient, not necessary", 0, 1),
        ("necessary and sufficient", 1, 1),
        ("neither", 0, 0),
        ("necessary, not sufficient", 1, 0),
    )
    for text, x, y in words:
        corner = {"xref": "x domain", "yref": "y domain", "xanchor": ("left", "right")[x]}
        corner |= {"yanchor": ("bottom", "top")[y]}
        figure.add_annotation(
            x=x,
            y=y,
            xshift=(6, -6)[x],
            yshift=(5, -5)[y],
            text=f"<i>{text}</i>",
            showarrow=False,
            font={"size": 14, "color": GREY},
            **corner,
        )
    figure.update_xaxes(title_text="necessary? recovery by repair (fraction): base's activation → finetuned")
    figure.update_yaxes(title_text="sufficient? recovery by infect (fraction): finetuned's activation → base")
    figure.update_layout(legend={"x": 1.02, "y": 1, "xanchor": "left", "font": {"size": 13}, "tracegroupgap": 14})


def _range(pairs: "pd.DataFrame", flow: str, noise_floor: float) -> tuple[float, float]:
    """Values, 0 and 1, and as much of the intervals as does not squeeze them."""
    inner = np.append(pairs[f"value_{flow}"].to_numpy(float), [0.0, 1.0, -noise_floor])
    low, high = float(inner.min()), float(inner.max())
    outer: npt.NDArray[np.float64] = pairs[[f"low_{flow}", f"high_{flow}"]].to_numpy(float)
    outer = np.clip(outer[np.isfinite(outer)], low - 0.3 * (high - low), high + 0.3 * (high - low))
    low, high = min(low, *outer, low), max(high, *outer, high)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
