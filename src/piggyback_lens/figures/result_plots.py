"""The picture of each kind of patching experiment."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import INK, wrapped
from piggyback_lens.interventions.donors import IDENTITY
from piggyback_lens.words import DONOR, RECIPIENT

if TYPE_CHECKING:
    import plotly.graph_objects as go


@runtime_checkable
class Drawn(Protocol):
    """What a figure needs of a patching result."""

    @property
    def kind(self) -> str:
        """Of experiment."""

    @property
    def cells(self) -> Any:
        """The labels of each cell."""

    @property
    def measure(self) -> Any:
        """Name, label and unit of what was measured."""

    @property
    def settings(self) -> Any:
        """Of the run, the models' names among them."""

    @property
    def noise_floor(self) -> Any:
        """Recovery that the controls reach."""

    def to_frame(self) -> Any:
        """One row per cell."""


def draw(result: Drawn) -> "go.Figure":
    """The figure of a result; `PatchResult.figure` calls it."""
    drawings: dict[str, Callable[[Drawn], go.Figure]] = {
        "span": _span,
        "layer_curve": _layer_curve,
        "layer_position": _layer_position,
        "layer_head": _layer_head,
        "carrier": _carrier,
        "edges": _edges,
    }
    if result.kind not in drawings:
        raise LensError(f"a result of kind {result.kind!r} has no figure: there are {', '.join(drawings)}")
    figure, frame = drawings[result.kind](result), result.to_frame()
    if not np.isfinite(frame["value"].to_numpy(float)).any():
        _say_why_empty(figure, str(frame["reason"].iloc[0]))
    return figure


def _say_why_empty(figure: "go.Figure", reason: str) -> None:
    """Where nothing is defined, the figure says so and why."""
    text = f"<b>no recovery is defined here</b><br>{wrapped(reason, 60)}"
    box = {"bgcolor": "rgba(255,255,255,0.9)", "borderpad": 8, "font": {"size": 15, "color": INK}}
    figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, **box)


def carrier_plane(result: Drawn) -> "go.Figure":
    """Necessity (repair) against sufficiency (infect) of every cell of a carrier map."""
    from piggyback_lens.figures.carrier_plots import carrier_plane_figure

    return carrier_plane_figure(
        result.to_frame(), title=_title("Necessary and sufficient", result), noise_floor=_floor(result)
    )


def _title(what: str, result: Drawn) -> str:
    names = result.settings.get("names", {})
    return f"{what}: {names.get('finetuned', 'finetuned')} and {names.get('base', 'base')}, {result.measure['name']}"


def _what(result: Drawn) -> str:
    """Flow, span and sites of the patched cells."""
    labels = [cell for cell in result.cells if cell["series"] == "patched" and cell.get("mode") != "all layers"]
    flow, span, sites = (
        " / ".join(dict.fromkeys(str(cell[name]) for cell in labels)) for name in ("flow", "span", "sites")
    )
    return f"{flow}, {span} {sites}"


def _floor(result: Drawn) -> float | None:
    return None if np.isnan(result.noise_floor) else float(result.noise_floor)


def _span(result: Drawn) -> "go.Figure":
    from piggyback_lens.figures.map_plots import recovery_map_figure

    frame = result.to_frame().assign(row=_what(result)).rename(columns={"series": "column"}).assign(series="patched")
    return recovery_map_figure(
        frame, x="column", y="row", title=_title("Recovery", result), noise_floor=_floor(result), text=True
    )


def _layer_curve(result: Drawn) -> "go.Figure":
    from piggyback_lens.figures.plots import layer_curve_figure

    frame, flow = result.to_frame(), result.cells[0]["flow"]
    whole = frame[frame["mode"] == "all layers"]
    labels = {0.0: f"0 = {RECIPIENT[flow]}", 1.0: f"1 = {DONOR[flow]}"}
    about = ""
    if len(whole) and np.isfinite(whole["value"].iloc[0]):
        value, low, high = (float(whole[name].iloc[0]) for name in ("value", "low", "high"))
        labels[value] = f"{value:.2f} = all layers' K/V"
        about = f"all layers' keys and values at once: {value:.2f} [{low:.2f}, {high:.2f}]"
    mode = {"single": "one layer", "below": "all layers up to l", "above": "all layers from l on"}
    modes = [cell["mode"] for cell in result.cells if cell["mode"] != "all layers"]
    shown = mode.get(modes[0], "a window of layers")
    return layer_curve_figure(
        frame[(frame["mode"] != "all layers") & (frame["series"] != IDENTITY)],
        title=_title(f"{_what(result)} of {shown}", result),
        y_label="recovery (fraction)",
        references=labels,
        noise_floor=_floor(result),
        subtitle=about,
    )


def _layer_position(result: Drawn) -> "go.Figure":
    from piggyback_lens.figures.map_plots import recovery_map_figure

    frame = result.to_frame()
    frame["token"] = [text.replace(" ", "·", 1) if text.startswith(" ") else text for text in frame["token"]]
    return recovery_map_figure(
        frame,
        x="position",
        y="layer",
        x_text="token",
        x_title=f"token of the {result.cells[0]['span']}",
        title=_title(_what(result), result),
        subtitle="by gradient" if result.settings.get("method") == "attribution" else "",
        noise_floor=_floor(result),
    )


def _layer_head(result: Drawn) -> "go.Figure":
    from piggyback_lens.figures.map_plots import head_map_figure

    labels = {cell["head"]: cell["label"] for cell in result.cells}
    return head_map_figure(
        result.to_frame(),
        labels=labels,
        title=_title(_what(result), result),
        subtitle="by gradient" if result.settings.get("method") == "attribution" else "",
        noise_floor=_floor(result),
    )


def _edges(result: Drawn) -> "go.Figure":
    """The heads of every edge side by side."""
    from piggyback_lens.figures.map_plots import head_map_figure

    frame = result.to_frame()
    frame = frame[frame["mode"] == "edge"]
    named = [f"{reader} ← {read}" for reader, read in zip(frame["span"], frame["read_from"], strict=True)]
    heads = max(cell["head"] for cell in result.cells) + 1
    order = {edge: i for i, edge in enumerate(dict.fromkeys(named))}
    columns = [order[edge] * heads + head for edge, head in zip(named, frame["head"], strict=True)]
    by = "by gradient" if result.settings.get("method") == "attribution" else ""
    return head_map_figure(
        frame.assign(column=columns, group=named),
        x="column",
        labels={column: str(head) for column, head in zip(columns, frame["head"], strict=True)},
        title=_title("What cutting an attention edge restores", result),
        subtitle=by,
        noise_floor=_floor(result),
    )


def _carrier(result: Drawn) -> "go.Figure":
    from piggyback_lens.figures.carrier_plots import carrier_map_figure

    return carrier_map_figure(result.to_frame(), title=_title("Where it rides", result), noise_floor=_floor(result))
