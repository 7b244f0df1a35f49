"""Which latents of a sparse autoencoder a direction is made of, beside norm-matched random directions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.directions.kept import kept
from piggyback_lens.errors import LensError
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.progress import shows
from piggyback_lens.vectors.direction import Direction
from piggyback_lens.words import Site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

from piggyback_lens.results.result import Number, Result
from piggyback_lens.saes.latent_activations import TokenSource, site_activations
from piggyback_lens.saes.latents import Latents

TEXTS_PER_PASS = 8
CONTROL_SEED = 7_000_000


@dataclass(frozen=True, repr=False)
class LatentAttribution(Result):
    """Which latents a direction is made of, beside norm-matched random directions.

    Attributes:
        site: where.
        layer: at which layer.
        direction: how the direction came about.
        cosine: per latent, the cosine of the direction with its decoder row.
        cosine_low: 2.5 % quantile of the cosines of the random directions.
        cosine_high: 97.5 % quantile.
        change: per latent, the mean over tokens of encode(a + s·v) − encode(a); empty if no texts were given.
        change_low: 2.5 % quantile of that of the random directions.
        change_high: 97.5 % quantile.
        change_rank: how many of the random directions change the latent at least as much.
        before: per latent, the mean activation without the direction.
        chance: for "cosine" and "change", the largest absolute value over all latents, per random direction.
        settings: what was chosen.
    """

    name: ClassVar = "latent_attribution.1"
    site: Site
    layer: int
    direction: str
    cosine: tuple[Number, ...]
    cosine_low: tuple[Number, ...]
    cosine_high: tuple[Number, ...]
    change: tuple[Number, ...] = ()
    change_low: tuple[Number, ...] = ()
    change_high: tuple[Number, ...] = ()
    change_rank: tuple[int, ...] = ()
    before: tuple[Number, ...] = ()
    chance: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> "pd.DataFrame":
        """One row per latent.

        Columns: latent, cosine, random_low, random_high (95 % of the random directions), cosine_z (cosine·√d, a
        standard normal for a random direction), beyond_chance (larger than any cosine of any random direction);
        and, NaN without texts, change, change_random_low, change_random_high, change_rank, before,
        change_beyond_chance.
        """
        import pandas as pd

        frame = pd.DataFrame({"latent": range(len(self.cosine)), "cosine": self.cosine})
        frame = frame.assign(random_low=self.cosine_low, random_high=self.cosine_high)
        frame["cosine_z"] = frame["cosine"] * math.sqrt(self.settings["d_in"])
        frame["beyond_chance"] = frame["cosine"].abs() > max(self.chance["cosine"])
        missing = [math.nan] * len(self.cosine)
        for name, values in (
            ("change", self.change), ("change_random_low", self.change_low), ("change_random_high", self.change_high),
            ("change_rank", self.change_rank), ("before", self.before),
        ):  # fmt: skip
            frame[name] = list(values) or missing
        frame["change_beyond_chance"] = frame["change"].abs() > max(self.chance.get("change", (math.inf,)))
        return frame

    def top(self, n: int = 10, by: str = "cosine") -> "pd.DataFrame":
        """The n latents with the largest |cosine| or |change|, largest first.

        Raises:
            LensError: another column, or "change" where no texts were given.
        """
        if by not in ("cosine", "change") or (by == "change" and not self.change):
            raise LensError(f"by={by!r}: choose 'cosine', or 'change' where texts were given to attribute_latents(...)")
        frame = self.to_frame()
        return frame.loc[frame[by].abs().sort_values(ascending=False, kind="stable").index[:n]].reset_index(drop=True)

    def figure(self, n: int = 12) -> "go.Figure":
        """The top latents by cosine, and by change where it is known, over the band of random directions."""
        from plotly.subplots import make_subplots

        from piggyback_lens.figures.plot_style import BLUE, GREY, INK, MISSING, apply_style

        panels = {"cosine": "cosine with the decoder row"} | ({"change": "change of activation"} if self.change else {})
        figure = make_subplots(rows=len(panels), cols=1, vertical_spacing=0.12, subplot_titles=list(panels.values()))
        figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": INK})
        for row, by in enumerate(panels, start=1):
            band = ("random_low", "random_high") if by == "cosine" else ("change_random_low", "change_random_high")
            part, first = self.top(n, by), row == 1
            names = [f"latent {i}" for i in part["latent"]]
            ends = [x for pair in zip(part[band[0]], part[band[1]], [None] * len(part), strict=True) for x in pair]
            figure.add_scatter(
                x=ends, y=[name for name in names for _ in range(3)], mode="lines", hoverinfo="skip", showlegend=first,
                line={"color": MISSING, "width": 9}, name="95 % of random directions", row=row, col=1,
            )  # fmt: skip
            figure.add_scatter(
                x=part[by], y=names, mode="markers", marker={"size": 10, "color": BLUE}, name="direction",
                showlegend=first, hovertemplate="%{y}: <b>%{x:.4g}</b><extra></extra>", row=row, col=1,
            )  # fmt: skip
            limit = max(self.chance[by])
            for side in (-limit, limit):
                figure.add_vline(x=side, line={"color": GREY, "width": 1.2, "dash": "dot"}, row=row, col=1)
        count = self.settings["n_random"]
        subtitle = f"dotted: the largest of any latent for {count} norm-matched random directions"
        where = f"Top latents of the direction at {self.site}, layer {self.layer}"
        apply_style(figure, where, subtitle, height=200 + len(panels) * (90 + 24 * n), room=18)
        figure.update_yaxes(type="category", autorange="reversed")
        figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.06, "yanchor": "top"}, margin_b=90)
        return figure

    def _sizes(self) -> str:
        return f"{len(self.cosine)} latents at {self.site}, layer {self.layer}"

    def check(self) -> None:
        """Refuse columns of different lengths."""
        known = (self.cosine, self.cosine_low, self.cosine_high, *filter(None, (self.change, self.before)))
        if len({len(column) for column in known}) != 1:
            raise ValueError(f"columns of {[len(column) for column in known]} latents")
        _ = self.settings["d_in"], self.settings["n_random"], self.chance["cosine"]


@shows("attribution to latents")
@kept(LatentAttribution)
def attribute_latents(
    latents: Latents,
    direction: Direction,
    model: HookedModel | None = None,
    texts: Sequence[TokenSource] = (),
    *,
    n_random: int = 20,
    span: str = "all",
    out: str | Path | None = None,
    progress: bool | str = True,
) -> LatentAttribution:
    """Latents that a direction points along, and latents that it switches on and off.

    Two readings: the cosine with each (normalised) decoder row, and the change of the encoded activations of some
    texts when the direction is added to them as long as it is (`2 * direction` adds twice that). Both also for random
    directions of the same length.

    Args:
        latents: the SAE.
        direction: at the SAE's site, with a vector of its layer.
        model: for the change; None for cosines only.
        texts: windows of plain text (`text_windows`), conversations or token ids; needed with a model.
        n_random: random directions.
        span: which tokens of conversations.
        out: folder of the run; the same call reads its result back, another one is refused.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: a direction of another site, layer or width, of length zero, or only one of model and texts.
    """
    own = _own_direction(latents, direction)
    if n_random < 2 or (model is None) != (not texts):
        raise LensError(f"n_random {n_random}, {len(texts)} texts: at least 2, and model and texts both or neither")
    device = latents.sae.W_dec.device
    # Far from small seeds, with which `direction` may itself have been drawn: it would be its own control.
    draws = [own.random_like(CONTROL_SEED + i).vector for i in range(n_random)]
    vectors = torch.stack([own.vector, *draws]).to(device)
    rows = torch.nn.functional.normalize(latents.decoder.float(), dim=1)
    cosine, cosine_low, cosine_high, chance = _beside_random(torch.nn.functional.normalize(vectors, dim=1) @ rows.T)
    numbers: dict[str, Any] = {}
    chances, tokens = {"cosine": chance}, 0
    if model is not None:
        latents.check(model)
        where: dict[str, Any] = {"site": latents.site, "layer": latents.layer, "span": span}
        reading = site_activations(model, texts, **where, batch_size=TEXTS_PER_PASS)
        before, changes, tokens = _mean_changes(latents, reading, vectors)
        change, low, high, chances["change"] = _beside_random(changes)
        rank = (changes[1:].abs() >= changes[0].abs()).sum(0).tolist()
        numbers = {"change": change, "change_low": low, "change_high": high}
        numbers |= {"change_rank": tuple(rank), "before": tuple(before.tolist())}
    settings = {"n_random": n_random, "span": span, "d_in": latents.d_in}
    settings |= {"texts": len(texts), "tokens": tokens, "norm": float(vectors[0].norm()), "sae": latents.provenance.how}
    return LatentAttribution(
        latents.site, latents.layer, own.provenance.how, cosine, cosine_low, cosine_high,
        **numbers, chance=chances, settings=settings,
    )  # fmt: skip


def _own_direction(latents: Latents, direction: Direction) -> Direction:
    if direction.site != latents.site:
        raise LensError(f"the direction is at site {direction.site}, the SAE at {latents.site}: take them at one site")
    own = direction.at(latents.layer)
    if own.vectors.shape[1] != latents.d_in:
        raise LensError(f"the direction has width {own.vectors.shape[1]}, the SAE reads {latents.d_in}")
    if own.norms[latents.layer] == 0:
        raise LensError("the direction is the zero vector: it points along no latent")
    return own


def _mean_changes(
    latents: Latents, reading: Iterator[Tensor], vectors: Float[Tensor, "vector d"]
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, "vector d_sae"], int]:
    """Mean activation of every latent, how much each added vector changes it, and the number of tokens."""
    before = torch.zeros(latents.d_sae, dtype=torch.float64, device=vectors.device)
    after = torch.zeros(len(vectors), latents.d_sae, dtype=torch.float64, device=vectors.device)
    tokens = 0
    with torch.no_grad():
        for own in reading:
            activations = own.to(vectors.device)
            before += latents.encode(activations).double().sum(0)
            for number, vector in enumerate(vectors):
                after[number] += latents.encode(activations + vector).double().sum(0)
            tokens += len(own)
    return before / tokens, (after - before) / tokens, tokens


def _beside_random(
    table: Float[Tensor, "vector d_sae"],
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """The first row's numbers, the 95 % range of the other rows' per latent, and those rows' largest |number|."""
    wide = table.double().cpu()
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(wide[1:], bounds, dim=0)
    largest = wide[1:].abs().amax(1)
    return tuple(wide[0].tolist()), tuple(low.tolist()), tuple(high.tolist()), tuple(largest.tolist())
