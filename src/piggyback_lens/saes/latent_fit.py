"""How well a sparse autoencoder describes the activations of some texts, on one model or on both of a pair."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from piggyback_lens.directions.curve_points import weighted_interval
from piggyback_lens.errors import LensError
from piggyback_lens.intervals import interval_text
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import shows
from piggyback_lens.words import SIDES, Site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

from piggyback_lens.saes.latent_activations import TokenSource, site_activations, usual
from piggyback_lens.saes.latents import Latents


@dataclass(frozen=True)
class FitSide:
    """Sums over the tokens of each text, on one model.

    Attributes:
        side: "base", "finetuned", or "model".
        tokens: number of tokens.
        error: Σ‖a − â‖² of the reconstruction â.
        variance: Σ‖a − ā‖², ā the mean over all tokens of all texts.
        square: Σ‖a‖².
        active: Σ number of active latents.
        dead: latents that are active on no token of any text.
        left_out: tokens that are not in any sum because they are far longer than the others (see `OUTLIER`).
    """

    side: str
    tokens: tuple[int, ...]
    error: tuple[float, ...]
    variance: tuple[float, ...]
    square: tuple[float, ...]
    active: tuple[float, ...]
    dead: int
    left_out: int = 0


@dataclass(frozen=True)
class Fit:
    """How well an SAE describes the activations of some texts.

    Attributes:
        sides: one for each model.
        site: where it was read.
        layer: at which layer.
        d_sae: number of latents.
    """

    sides: tuple[FitSide, ...]
    site: Site
    layer: int
    d_sae: int

    def to_frame(self) -> "pd.DataFrame":
        """One row per side and metric.

        Columns: side, metric, value, low, high (95 % interval over texts), n (texts), tokens, left_out. Metrics:
        explained_variance 1 − Σ‖a − â‖² / Σ‖a − ā‖²; l0, active latents per token; relative_error
        Σ‖a − â‖² / Σ‖a‖²; dead_share, the part of the latents that is active on none of these tokens.
        """
        import pandas as pd

        rows = []
        for side in self.sides:
            error, variance, square, active = map(np.array, (side.error, side.variance, side.square, side.active))
            found = {
                "explained_variance": weighted_interval(1 - error / variance, side.variance),
                "l0": weighted_interval(active / np.array(side.tokens), [float(n) for n in side.tokens]),
                "relative_error": weighted_interval(error / square, side.square),
            }
            numbers = {name: (x.value, x.low, x.high) for name, x in found.items()}
            numbers["dead_share"] = (side.dead / self.d_sae, math.nan, math.nan)
            rows += [
                {"side": side.side, "metric": metric, "value": value, "low": low, "high": high}
                | {"n": len(side.tokens), "tokens": sum(side.tokens), "left_out": side.left_out}
                for metric, (value, low, high) in numbers.items()
            ]
        return pd.DataFrame(rows)

    def figure(self) -> "go.Figure":
        """One panel per metric, the models under each other."""
        from plotly.subplots import make_subplots

        from piggyback_lens.figures.plot_style import BLUE, INK, VERMILION, apply_style, n_text

        frame = self.to_frame()
        names = {
            "explained_variance": "explained variance", "l0": "L0 (active latents per token)",
            "relative_error": "relative squared error", "dead_share": "latents never active (share)",
        }  # fmt: skip
        figure = make_subplots(
            rows=len(names), cols=1, vertical_spacing=0.32 / len(names), subplot_titles=list(names.values())
        )
        figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
        for row, metric in enumerate(names, start=1):
            part = frame[frame["metric"] == metric]
            value, low, high = (part[column].to_numpy(float) for column in ("value", "low", "high"))
            shown = [interval_text(*numbers) for numbers in zip(value, low, high, strict=True)]
            figure.add_scatter(
                x=value, y=part["side"], mode="markers+text", showlegend=False, cliponaxis=False,
                text=shown, textposition="top center", hovertemplate="%{y}: <b>%{text}</b><extra></extra>",
                marker={"size": 10, "color": [VERMILION if side == "finetuned" else BLUE for side in part["side"]]},
                error_x={"type": "data", "symmetric": False, "color": INK, "thickness": 1.4,
                         "array": np.nan_to_num(high - value), "arrayminus": np.nan_to_num(value - low)},
                row=row, col=1,
            )  # fmt: skip
            if metric == "l0":
                figure.update_xaxes(rangemode="tozero", row=row)
            else:
                ends = np.concatenate([value, low, high])
                figure.update_xaxes(
                    range=[min(-0.03, 1.05 * np.nanmin(ends)), max(1.03, 1.05 * np.nanmax(ends))], row=row
                )
        subtitle = f"95 % interval over texts, {n_text(frame)}; {self.d_sae} latents at {self.site}, layer {self.layer}"
        height = 200 + len(names) * (90 + 44 * len(self.sides))
        apply_style(figure, "How well the SAE fits", subtitle, height=height, room=18)
        # From the top down, with room for the first side's number under the panel's title.
        figure.update_yaxes(type="category", range=[len(self.sides) - 0.5, -0.85])
        return figure


@shows("fit of latents")
def fit_latents(
    latents: Latents,
    model: HookedModel | ModelPair,
    texts: Sequence[TokenSource],
    *,
    span: str = "all",
    batch_size: int = 8,
    progress: bool | str = True,
) -> Fit:
    """Explained variance, L0, relative error and dead latents on the activations of some texts.

    Args:
        latents: the SAE.
        model: either backend; of a pair both sides.
        texts: windows of plain text (`text_windows`), conversations or token ids.
        span: which tokens of conversations.
        batch_size: texts per pass.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: no texts, a model that does not fit, or activations that do not vary.
    """
    if not isinstance(model, ModelPair):
        sides = [_fit_side("model", latents, model, texts, span, batch_size)]
    else:
        sides = []
        for side in SIDES:
            with model.using(side) as own:
                sides.append(_fit_side(side, latents, own, texts, span, batch_size))
    return Fit(tuple(sides), latents.site, latents.layer, latents.d_sae)


def _fit_side(
    side: str, latents: Latents, model: HookedModel, texts: Sequence[TokenSource], span: str, batch_size: int
) -> FitSide:
    latents.check(model)
    numbers: list[tuple[int, float, float, float]] = []
    sums: list[Tensor] = []
    seen = torch.zeros(latents.d_sae, dtype=torch.bool, device=latents.sae.W_dec.device)
    where: dict[str, Any] = {"site": latents.site, "layer": latents.layer, "span": span, "batch_size": batch_size}
    left_out = 0
    for every in site_activations(model, texts, **where, outliers=True):
        own = every[usual(every)]
        left_out += len(every) - len(own)
        with torch.no_grad():
            active, rebuilt = latents.encode(own) != 0, latents.reconstruct(own)
        seen |= active.any(0)
        wide = own.double()
        error = (wide - rebuilt.to(own.device).double()).square().sum()
        numbers.append((len(own), float(error), float(wide.square().sum()), float(active.sum())))
        sums.append(wide.sum(0).cpu())
    tokens, errors, squares, n_active = zip(*numbers, strict=True)
    mean = torch.stack(sums).sum(0) / sum(tokens)
    centred = [
        square - 2 * float(mean @ total) + n * float(mean @ mean)
        for n, square, total in zip(tokens, squares, sums, strict=True)
    ]
    if min(centred) <= 1e-12 * sum(squares):
        raise LensError("the activations of a text do not vary, so there is no variance to explain: take longer texts")
    return FitSide(side, tokens, errors, tuple(centred), squares, n_active, int((~seen).sum()), left_out)
