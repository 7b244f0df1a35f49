"""Behaviour under changes of the prompt: dot plots of perturbed spans and of stress variants."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import (
    BLUE,
    GREY,
    INK,
    PALE,
    VERMILION,
    axis_title,
    check_frame,
    n_text,
    padded_range,
    plot_text,
    wrapped,
)
from piggyback_lens.figures.plots import apply_heading
from piggyback_lens.intervals import interval_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

NUMBERS = ("value", "low", "high", "n")
REFERENCES = {"base": BLUE, "unperturbed": VERMILION}  # kinds which are lines, in all panels
REFERENCE_NAMES = {"base": "base", "unperturbed": "finetuned"}
MODELS = {"base": (BLUE, "circle", -0.2), "finetuned": (VERMILION, "diamond", 0.2)}  # colour, shape, place in a row
CONTROL_WORDS = ("random", "control", "identity")
ROW = 46  # px


@dataclass(frozen=True, slots=True)
class _Rows:
    """Places of the rows, and what stands on the axis: a bold line for each group, its members below."""

    places: Mapping[tuple[str, str], float]
    ticks: Mapping[float, str]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> "_Rows":
        """Rows of the different (group, name) in their order; the empty group has no line of its own."""
        groups: dict[str, list[str]] = {}
        for group, name in dict.fromkeys(pairs):
            groups.setdefault(group, []).append(name)
        places: dict[tuple[str, str], float] = {}
        ticks: dict[float, str] = {}
        at = 0.0
        for group, names in groups.items():
            if group and names != [group]:
                ticks[at] = f"<b>{wrapped(group, 30)}</b>"
                at += 0.8
            for name in names:
                places[group, name], ticks[at] = at, wrapped(name, 30)
                at += 1
        return cls(places, ticks)

    @property
    def bottom(self) -> float:
        return max(self.ticks) + 0.6


def perturbation_figure(frame: "pd.DataFrame", *, label: str, unit: str, title: str) -> "go.Figure":
    """The finetuned model's behaviour with one span perturbed: a row for each span and kind, a panel per topic.

    The kinds "base" and "unperturbed" (finetuned) are reference lines and rows on top, whatever their span;
    kinds with "random" or "control" in their name are hollow.

    Args:
        frame: columns topic, span, kind, value, low, high (in ``unit``), n; optionally reason (why NaN).
        label: what is measured, such as "words per answer".
        unit: its unit; "rate 0..1" draws the whole scale.
        title: literal text, names model and task.

    Raises:
        LensError: columns are missing, there are no rows, or two rows stand for the same dot.
    """
    check_frame(frame, ["topic", "span", "kind", *NUMBERS])
    records = [_named(record) for record in _records(frame)]
    # The references stand once, on top, in the order base, finetuned.
    first = [("", _reference_row(kind)) for kind in REFERENCES if any(r["kind"] == kind for r in records)]
    rows = _Rows.of([*first, *((r["group"], r["name"]) for r in records)])
    figure, panels, x_range = _panels(frame, unit)
    drawn: set[tuple[str, str, str]] = set()
    for record in records:
        column, kind = panels[record["topic"]], record["kind"]
        key = (str(record["topic"]), record["group"], record["name"])
        if key in drawn and kind in REFERENCES:
            continue  # the same reference beside every span
        if key in drawn:
            raise LensError(f"several rows stand for topic {key[0]!r}, span {key[1]!r}, kind {kind!r}; keep one")
        drawn.add(key)
        colour = REFERENCES.get(kind, INK)
        if kind in REFERENCES and math.isfinite(record["value"]):
            _add_line(figure, float(record["value"]), colour, column)
        hollow = any(word in kind for word in CONTROL_WORDS)
        marker = {"size": 11, "color": "white" if hollow else colour, "line": {"width": 2, "color": colour}}
        _add_dot(figure, record, rows.places[record["group"], record["name"]], column, x_range, marker, shift=-16.0)
    subtitle = "dot: mean; bar: 95 % interval over prompts; dotted: base and unperturbed finetuned"
    subtitle += "; hollow: control" if any(w in r["kind"] for r in records for w in CONTROL_WORDS) else ""
    _finish(figure, title, f"{subtitle}; {n_text(frame)}", rows, axis_title(label, unit), x_range)
    return figure


def _named(record: dict[str, Any]) -> dict[str, Any]:
    kind = str(record["kind"])
    reference = kind in REFERENCES
    place = {"group": "", "name": _reference_row(kind)} if reference else {"group": str(record["span"]), "name": kind}
    return {**record, **place, "kind": kind}


def _reference_row(kind: str) -> str:
    return REFERENCE_NAMES[kind] if kind == "base" else f"{REFERENCE_NAMES[kind]}, {kind}"


def stress_figure(frame: "pd.DataFrame", *, label: str, unit: str, title: str) -> "go.Figure":
    """Behaviour of base and finetuned under variants of the prompt: a row each, grouped by family.

    Args:
        frame: columns family, variant, model ("base" or "finetuned"), value, low, high (in ``unit``), n; optionally
            topic (a panel each) and reason (why NaN).
        label: what is measured, such as "words per answer".
        unit: its unit; "rate 0..1" draws the whole scale.
        title: literal text, names model and task.

    Raises:
        LensError: columns are missing, there are no rows, a model has another name, or two rows stand for the
            same dot.
    """
    check_frame(frame, ["family", "variant", "model", *NUMBERS])
    unknown = sorted({str(model) for model in frame["model"]} - set(MODELS))
    if unknown:
        raise LensError(f"column model holds {', '.join(unknown)}; expected base and finetuned")
    keys = [*(["topic"] if "topic" in frame else []), "family", "variant", "model"]
    twice = frame.duplicated(keys)
    if twice.any():
        at = ", ".join(f"{name} {frame.loc[twice, name].iloc[0]}" for name in keys)
        raise LensError(f"several rows stand for {at}; keep one")
    rows = _Rows.of((str(r["family"]), str(r["variant"])) for r in _records(frame))
    figure, panels, x_range = _panels(frame, unit)
    for record in _records(frame):
        colour, symbol, offset = MODELS[record["model"]]
        marker = {"size": 11, "color": colour, "symbol": symbol}
        record["group"], record["name"] = f"{record['family']}, {record['variant']}", record["model"]
        place = rows.places[str(record["family"]), str(record["variant"])] + offset
        column = panels[record.get("topic", "")]
        _add_dot(figure, record, place, column, x_range, marker, shift=math.copysign(15, offset))
    for model, (colour, symbol, _) in MODELS.items():
        figure.add_scatter(
            x=[None], y=[None], mode="markers", marker={"size": 11, "color": colour, "symbol": symbol}, name=model
        )
    figure.data[-1].showlegend = figure.data[-2].showlegend = True
    subtitle = f"marker: mean; bar: 95 % interval over prompts; {n_text(frame)}"
    _finish(figure, title, subtitle, rows, axis_title(label, unit), x_range, row=ROW + 32, room=28)
    above = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "orientation": "h"}
    figure.update_layout(legend={**above, "font": {"size": 14}}, showlegend=True)
    return figure


# --- what both share ---------------------------------------------------------------------------------


def _records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _panels(frame: "pd.DataFrame", unit: str) -> tuple["go.Figure", dict[object, int], list[float]]:
    """Empty panels side by side, the column of each topic, and their common range."""
    from plotly.subplots import make_subplots

    topics: list[object] = list(dict.fromkeys(frame["topic"])) if "topic" in frame else [""]
    figure = make_subplots(
        rows=1,
        cols=len(topics),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[plot_text(topic) for topic in topics] if any(topics) else None,
    )
    figure.update_annotations(font={"size": 15, "color": INK})
    x_range = padded_range(frame[["value", "low", "high"]].to_numpy(dtype=float), unit)
    return figure, {topic: column for column, topic in enumerate(topics, start=1)}, x_range


def _add_line(figure: "go.Figure", x: float, colour: str, column: int) -> None:
    line = {"color": colour, "width": 1.5, "dash": "dot"}
    figure.add_vline(x=x, line=line, layer="below", row=1, col=column, exclude_empty_subplots=False)


def _add_dot(
    figure: "go.Figure",
    record: Mapping[str, Any],
    place: float,
    column: int,
    x_range: Sequence[float],
    marker: Mapping[str, object],
    *,
    shift: float,
) -> None:
    """One mean with its interval, and the numbers ``shift`` px below it; or why there is none."""
    mean, low, high = (float(record[name]) for name in ("value", "low", "high"))
    written = {"showarrow": False, "bgcolor": "rgba(255,255,255,0.8)", "borderpad": 0, "row": 1, "col": column}
    if not math.isfinite(mean):
        reason = record.get("reason")
        why = reason if isinstance(reason, str) and reason else "no value"
        text, style = wrapped(f"missing: {why}", 40), {"xanchor": "left", "font": {"size": 13, "color": GREY}}
        figure.add_annotation(x=x_range[0], xshift=6, y=place, text=text, **style, **written)
        return
    text = interval_text(mean, low, high)
    known = math.isfinite(low) and math.isfinite(high)
    bar = {"array": [max(high - mean, 0.0)], "arrayminus": [max(mean - low, 0.0)], "thickness": 2, "width": 4}
    figure.add_scatter(
        x=[mean],
        y=[place],
        mode="markers",
        marker=marker,
        error_x={**bar, "color": _edge(marker)} if known else None,
        hovertemplate=f"<b>{_hover_name(record)}</b><br>{text}, n = {record['n']}<extra></extra>",
        showlegend=False,
        row=1,
        col=column,
    )
    share = (mean - x_range[0]) / (x_range[1] - x_range[0])
    anchor = "left" if share < 0.36 else "right" if share > 0.64 else "center"
    style = {"xanchor": anchor, "font": {"size": 13, "color": INK}}
    figure.add_annotation(x=mean, y=place, yshift=-shift, text=text, **style, **written)


def _edge(marker: Mapping[str, Any]) -> object:
    return marker["line"]["color"] if "line" in marker else marker["color"]


def _hover_name(record: Mapping[str, Any]) -> str:
    return ", ".join(plot_text(part) for part in (record["group"], record["name"]) if part)


def _finish(
    figure: "go.Figure",
    title: str,
    subtitle: str,
    rows: _Rows,
    x_title: str,
    x_range: Sequence[float],
    *,
    row: int = ROW,
    room: int = 10,
) -> None:
    titled = bool(figure.layout.annotations) and any(note.yref == "paper" for note in figure.layout.annotations)
    apply_heading(figure, title, subtitle, height=int(170 + row * (rows.bottom + 0.6)), room=room + 22 * titled)
    figure.update_xaxes(range=x_range, title_text=x_title, nticks=7)
    figure.update_yaxes(
        tickvals=list(rows.ticks), ticktext=list(rows.ticks.values()), range=[rows.bottom, -0.6], showgrid=False
    )
    for place in rows.places.values():  # no line beside the name of a group
        figure.add_hline(y=place, line={"color": PALE, "width": 1}, layer="below")
    figure.update_layout(showlegend=False)
