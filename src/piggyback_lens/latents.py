"""Latents of a sparse autoencoder (SAE): load one and check it, see how well it fits, attribute, steer, ablate.

The SAEs are those of sae-lens (the extra `sae`). Activations are read without the first token of every text and
without any other that is more than ten times as long as the median of its text: such attention sinks (massive
activations) outweigh all other tokens in any sum of squares, and SAEs are not trained on them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from piggyback_lens.attachment import core_of, decoder_blocks, edited_sites, has_modules
from piggyback_lens.backends import HookedModel, Site, check_layers, device_of, forward, hook_name, shape_of
from piggyback_lens.chat import RenderedPrompt
from piggyback_lens.curve_points import weighted_interval
from piggyback_lens.directions import Direction, Provenance
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.hooks import Intervention, add, cache
from piggyback_lens.models import SIDES, Identity, ModelPair, identify
from piggyback_lens.placement import OPEN, Phase, Placement, Row
from piggyback_lens.running import applied
from piggyback_lens.variants import Text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TokenSource = Text | RenderedPrompt | Sequence[int]
"""A text to read activations of: a window of plain text, a conversation, or bare token ids."""

CONTROL_SEED = 7_000_000
OUTLIER = 10.0
"""Tokens whose activation is longer than this many times the median of their text are left out."""
FORMAT = "piggyback_lens.latent_attribution.1"
_HOOKS: dict[str, Site] = {
    "hook_resid_pre": "resid_pre", "hook_in": "resid_pre", "hook_resid_mid": "resid_mid", "ln2.hook_in": "resid_mid",
    "hook_resid_post": "resid_post", "hook_out": "resid_post", "hook_attn_out": "attn_out",
    "attn.hook_out": "attn_out", "hook_mlp_out": "mlp_out", "mlp.hook_out": "mlp_out", "mlp.hook_post": "mlp_post",
}  # fmt: skip
"""Names of hook points within a block, HookedTransformer's and the bridge's, at which an SAE can sit."""


@dataclass(frozen=True, eq=False)
class Latents:
    """An SAE with the place in the model that it reads; made by `load_sae` or `train_sae`.

    Attributes:
        sae: the `sae_lens.SAE`, frozen.
        site: where its input lives.
        layer: at which layer.
        provenance: where it came from, and how its model was checked.
    """

    sae: Any
    site: Site
    layer: int
    provenance: Provenance

    def __repr__(self) -> str:
        return f"Latents({self.d_sae} at {self.site}, layer {self.layer}; {self.provenance.how})"

    @property
    def d_in(self) -> int:
        """Width of the activations it reads."""
        return int(self.sae.cfg.d_in)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.sae.cfg.d_sae)

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_in"]:
        """What one unit of each latent's activation adds to the reconstruction: W_dec.

        Its rows have unit length where the SAE counts activations that way (rescale_acts_by_decoder_norm). An
        SAE that normalises its input adds it in normalised units.
        """
        rows: Tensor = self.sae.W_dec.detach()
        if getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False):
            rows = rows / rows.norm(dim=1, keepdim=True)
        return rows.clone()

    def encode(self, activations: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any d_sae"]:
        """Activations of the latents, never negative in the usual architectures."""
        codes: Tensor = self.sae.encode(activations.to(self.sae.W_dec.device))
        return codes

    def reconstruct(self, activations: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any d_in"]:
        """What the latents say the activations are."""
        decoded: Tensor = self.sae.decode(self.encode(activations))
        return decoded

    def contribution(
        self, activations: Float[Tensor, "*any d_in"], indices: Sequence[int]
    ) -> Float[Tensor, "*any d_in"]:
        """What some latents add to the reconstruction: f_i(a)·W_dec[i] summed over i, zero where none is active."""
        whole = self.reconstruct(activations)
        # Encoded again: an SAE that normalises keeps the scale of what it encoded last until it is decoded.
        rest = self.encode(activations).clone()
        rest[..., list(indices)] = 0
        decoded: Tensor = whole - self.sae.decode(rest)
        return decoded

    def check(self, model: HookedModel) -> None:
        """Refuse a model that has no such site, or another width there.

        Raises:
            LensError: the widths, or what the model lacks.
        """
        name, width = hook_name(model, self.site, self.layer), _width(model, self.site)
        if self.d_in != width:
            raise LensError(f"the SAE reads activations of width {self.d_in}, this model has {width} at {name}")

    def indices(self, index: int | Sequence[int]) -> tuple[int, ...]:
        """One or several latents, checked to exist.

        Raises:
            LensError: the numbers there are.
        """
        found = (index,) if isinstance(index, int) else tuple(index)
        if not found or not all(0 <= i < self.d_sae for i in found):
            raise LensError(f"latents {list(found)} asked: this SAE has 0 to {self.d_sae - 1}")
        return found


# ---------------------------------------------------------------- loading


def load_sae(
    path_or_release: str | Path,
    sae_id: str | None = None,
    *,
    model: HookedModel,
    site: Site | None = None,
    layer: int | None = None,
    other_model: bool = False,
) -> Latents:
    """Load an SAE and check what it says of itself against the model and the place that is meant.

    Args:
        path_or_release: a folder written by sae-lens; or, with `sae_id`, a release of sae-lens' list or a hub id.
        sae_id: which SAE of the release.
        model: either backend.
        site: where the SAE is meant to sit; None takes the SAE's word for it.
        layer: the same.
        other_model: take an SAE of another model of the same width (a finetune, say); `fit` tells how it does.

    Raises:
        LensError: sae-lens is not installed, the SAE cannot be loaded, or hook name, layer, width or model differ.
    """
    from safetensors import SafetensorError

    sae_class = require_sae_lens().SAE
    device, source = str(device_of(model)), str(path_or_release)
    if sae_id is None and not Path(source).is_dir():
        raise LensError(f"{source} is no folder: give one that sae-lens has written, or a release with sae_id=")
    try:
        sae = (
            sae_class.load_from_disk(source, device=device, dtype="float32")
            if sae_id is None
            else sae_class.from_pretrained(source, sae_id, device=device, dtype="float32")
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        what = f"{source} ({sae_id})" if sae_id else source
        raise LensError(f"no SAE can be loaded from {what}: {type(error).__name__}: {first}") from error
    named = source if sae_id else Path(source).name  # a result says which folder, not where it is on this machine
    return latents_of(sae, model, named, sae_id, site=site, layer=layer, other_model=other_model)


def latents_of(
    sae: Any,
    model: HookedModel,
    source: str = "an SAE in memory",
    sae_id: str | None = None,
    *,
    site: Site | None = None,
    layer: int | None = None,
    other_model: bool = False,
) -> Latents:
    """The same checks for an SAE that is already loaded; it is frozen (no gradients of its weights).

    Args and errors as `load_sae`.
    """
    about = sae.cfg.metadata
    _check_kind(sae)
    site, layer = _place(about, site, check_layers(layer, shape_of(model).n_layers)[0] if layer is not None else None)
    settings = {
        "source": source,
        "sae_id": sae_id,
        "architecture": sae.cfg.architecture(),
        "hook_name": about.get("hook_name"),
        "model_name": about.get("model_name"),
        "normalize_activations": sae.cfg.normalize_activations,
    }
    noted = about.get("piggyback_lens") or {}
    recorded = noted.get("model")
    settings |= {"longest": noted["longest"]} if "longest" in noted else {}
    draft = Latents(sae.eval().requires_grad_(False), site, layer, Provenance("unchecked"))
    draft.check(model)
    settings["model_check"] = _check_model(about, recorded, model, other_model)
    how = f"SAE from {source}" + (f", {sae_id}" if sae_id else "")
    return Latents(draft.sae, site, layer, Provenance(how, model=recorded, settings=settings))


def require_sae_lens() -> Any:
    """The module sae_lens.

    Raises:
        LensError: it is not installed.
    """
    try:
        import sae_lens
    except ImportError as error:
        raise LensError(
            f"SAEs need sae-lens, which cannot be imported ({error}): install piggyback-lens[sae]"
        ) from error
    return sae_lens


def _check_kind(sae: Any) -> None:
    """Refuse what is no SAE of single tokens in the model's own units."""
    about, kind = sae.cfg.metadata, sae.cfg.architecture()
    if kind == "temporal" or hasattr(sae.cfg, "d_out"):
        raise LensError(
            f"this is a {kind}: only SAEs that encode and rebuild one activation of one token are read here"
        )
    if about.get("hook_head_index") is not None:
        raise LensError(f"this SAE reads head {about.get('hook_head_index')} only: give one of a whole site")
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise LensError(
            f"this SAE has normalize_activations={sae.cfg.normalize_activations!r}, which is not folded into its "
            "weights: save it at the end of its training, or fold it first (fold_activation_norm_scaling_factor)"
        )


def _place(about: Any, site: Site | None, layer: int | None) -> tuple[Site, int]:
    """Site and layer, from the SAE's hook name, which must be the place that was asked for."""
    name = about.get("hook_name")
    if name is None:
        if site is None or layer is None:
            raise LensError("this SAE does not say where it sits (no hook_name): give site= and layer=")
        return site, layer
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(name))
    if found is None or found[2] not in _HOOKS:
        known = ", ".join(_HOOKS)
        raise LensError(f"the SAE sits at {name}, which is none of blocks.<layer>.<one of {known}>")
    own_layer, own_site = int(found[1]), _HOOKS[found[2]]
    stated = about.get("hook_layer")
    if stated is not None and int(stated) != own_layer:
        raise LensError(f"the SAE contradicts itself: hook name {name}, hook layer {stated}")
    if site is not None and site != own_site:
        raise LensError(f"the SAE sits at site {own_site} ({name}), {site} was asked: take another SAE or that site")
    if layer is not None and layer != own_layer:
        raise LensError(
            f"the SAE sits at layer {own_layer} ({name}), {layer} was asked: take another SAE or that layer"
        )
    return own_site, own_layer


def _width(model: HookedModel, site: Site) -> int:
    return int(model.cfg.d_mlp) if site == "mlp_post" else shape_of(model).d_model


def _check_model(about: Any, recorded: Mapping[str, Any] | None, model: HookedModel, other_model: bool) -> str:
    """How the SAE's model is known to be this one: by its logits where they were recorded, else by its name."""
    named, own = about.get("model_name"), str(getattr(model.cfg, "model_name", "") or "unnamed")
    if recorded is not None:
        same, how = Identity.from_dict(recorded).matches(identify(model)), "same probe logits"
    elif named is not None:
        same, how = _plain_name(str(named)) == _plain_name(own), "same name"
    else:
        return "the SAE does not name its model"
    if same:
        return how
    if other_model:
        return f"another model, as was asked: the SAE's is {named}"
    why = f"the SAE is of model {named}, this one is {own}"
    why += ", and it gives other logits than the SAE's model" if recorded is not None else ""
    raise LensError(f"{why}: load the SAE's own model, or pass other_model=True and look at fit(...)")


def _plain_name(name: str) -> str:
    """A model's name without organisation and folders, TransformerLens' aliases resolved."""
    with suppress(ImportError, ValueError):
        from transformer_lens.loading_from_pretrained import get_official_model_name

        name = get_official_model_name(name)
    return PurePath(name).name.lower()


# ---------------------------------------------------------------- activations


class _Enough(Exception):
    """The layer that is read has run."""


def site_activations(
    model: HookedModel,
    texts: Sequence[TokenSource],
    *,
    site: Site,
    layer: int,
    span: str = "all",
    batch_size: int = 8,
    outliers: bool = False,
) -> Iterator[Float[Tensor, "token d"]]:
    """The activations of one text after the other, in float32 on the model's device, without its first token.

    Layers above `layer` are not run.

    Args:
        model: either backend.
        texts: windows of plain text, conversations or token ids.
        site: where to read.
        layer: at which layer.
        span: which tokens of conversations; plain texts and ids have "all" only.
        batch_size: texts per pass; does not change the result.
        outliers: keep tokens that are more than `OUTLIER` times as long as the median of the text's.

    Raises:
        LensError: no texts, or one without a token of the span beside its first.
    """
    if not texts or batch_size < 1:
        raise LensError(f"{len(texts)} texts, batch_size {batch_size}: each must be at least 1")
    device, rows = device_of(model), [_tokens(text) for text in texts]
    keep = cache(site, layers=layer, span=span, device=None, dtype=torch.float32)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        ids, mask = torch.zeros((2, len(chosen), max(len(own) for own, _ in chosen)), dtype=torch.long)
        for number, (own, _) in enumerate(chosen):
            ids[number, : len(own)], mask[number, : len(own)] = torch.tensor(own), 1
        positions = torch.arange(ids.shape[1]).expand_as(ids).masked_fill(mask == 0, -1)
        placement = Placement(tuple(row for _, row in chosen), positions, positions)
        read = torch.zeros((len(chosen), 1), dtype=torch.long, device=device)
        with torch.no_grad(), applied(model, placement, keep) as record, _stopped_after(model, layer):
            forward(model, ids.to(device), mask.to(device), read=read)
        kept = record.activations_of(span)
        for number, length in enumerate(kept.lengths):
            if length == 0:
                raise LensError(f"text {start + number} has no token in span {span!r} beside its first: leave it out")
            found = kept[site, layer][number, :length]
            yield found if outliers else found[usual(found)]


def usual(activations: Float[Tensor, "token d"]) -> Bool[Tensor, " token"]:
    """Which tokens are not longer than `OUTLIER` times the median; at least half of them."""
    norms = activations.norm(dim=1)
    kept: Tensor = norms <= OUTLIER * norms.median()
    return kept


def _tokens(text: TokenSource) -> tuple[tuple[int, ...], Row]:
    """Token ids, and the spans to read, which begin after the first token."""
    if isinstance(text, Text):
        ids, prompt = text.ids, text.prompt
    elif isinstance(text, RenderedPrompt):
        ids, prompt = text.ids, text
    else:
        ids, prompt = tuple(int(i) for i in text), None
    row = Row({"all": (0, OPEN)}, 1) if prompt is None else Row.of(prompt)
    return ids, Row({name: (max(1, start), stop) for name, (start, stop) in row.spans.items()}, row.n_prompt)


@contextmanager
def _stopped_after(model: Any, layer: int) -> Iterator[None]:
    """End the forward passes of the block when this layer has run."""
    blocks = decoder_blocks(core_of(model)) if has_modules(model) else model.blocks

    def stop(*_: Any) -> None:
        raise _Enough

    if layer + 1 == len(blocks):
        yield
        return
    handle = blocks[layer + 1].register_forward_pre_hook(stop)
    try:
        with suppress(_Enough):
            yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- fit


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

        Columns: side, metric, value, low, high (95 % bootstrap over texts), n (texts), tokens, left_out. Metrics:
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

        from piggyback_lens.plot_style import BLUE, INK, VERMILION, apply_style, interval_text, n_text

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


def fit(
    latents: Latents,
    model: HookedModel | ModelPair,
    texts: Sequence[TokenSource],
    *,
    span: str = "all",
    batch_size: int = 8,
) -> Fit:
    """Explained variance, L0, relative error and dead latents on the activations of some texts.

    Args:
        latents: the SAE.
        model: either backend; of a pair both sides.
        texts: as `site_activations`.
        span: which tokens of conversations.
        batch_size: texts per pass.

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


# ---------------------------------------------------------------- attribution


@dataclass(frozen=True)
class LatentAttribution:
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

    site: Site
    layer: int
    direction: str
    cosine: tuple[float, ...]
    cosine_low: tuple[float, ...]
    cosine_high: tuple[float, ...]
    change: tuple[float, ...] = ()
    change_low: tuple[float, ...] = ()
    change_high: tuple[float, ...] = ()
    change_rank: tuple[int, ...] = ()
    before: tuple[float, ...] = ()
    chance: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
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
            raise LensError(f"by={by!r}: choose 'cosine', or 'change' where texts were given to attribute(...)")
        frame = self.to_frame()
        return frame.loc[frame[by].abs().sort_values(ascending=False, kind="stable").index[:n]].reset_index(drop=True)

    def figure(self, n: int = 12) -> "go.Figure":
        """The top latents by cosine, and by change where it is known, over the band of random directions."""
        from plotly.subplots import make_subplots

        from piggyback_lens.plot_style import BLUE, GREY, INK, MISSING, apply_style

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

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file."""
        return write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> "LatentAttribution":
        """Read what `save` wrote.

        Raises:
            LensError: no file, or another kind of file.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("format", "") != FORMAT:
            raise LensError(f"{path} is not an attribution to latents saved by this library")
        data["chance"] = {name: tuple(values) for name, values in data["chance"].items()}
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in data.items()}
        return cls(**fields)


def attribute(
    latents: Latents,
    direction: Direction,
    model: HookedModel | None = None,
    texts: Sequence[TokenSource] = (),
    *,
    strength: float = 1.0,
    n_random: int = 20,
    seed: int = 0,
    span: str = "all",
    batch_size: int = 8,
) -> LatentAttribution:
    """Latents that a direction points along, and latents that it switches on and off.

    Two readings: the cosine with each (normalised) decoder row, and the change of the encoded activations of some
    texts when strength·v is added to them. Both also for random directions of the same length.

    Args:
        latents: the SAE.
        direction: at the SAE's site, with a vector of its layer.
        model: for the change; None for cosines only.
        texts: as `site_activations`; needed with a model.
        strength: multiple of the direction that is added.
        n_random: random directions.
        seed: of those.
        span: which tokens of conversations.
        batch_size: texts per pass.

    Raises:
        LensError: a direction of another site, layer or width, of length zero, or only one of model and texts.
    """
    own = _own_direction(latents, direction)
    if n_random < 2 or (model is None) != (not texts):
        raise LensError(f"n_random {n_random}, {len(texts)} texts: at least 2, and model and texts both or neither")
    device = latents.sae.W_dec.device
    # Far from small seeds, with which `direction` may itself have been drawn: it would be its own control.
    draws = [own.random_like(CONTROL_SEED + 1000 * seed + i).vector for i in range(n_random)]
    vectors = torch.stack([own.vector, *draws]).to(device)
    rows = torch.nn.functional.normalize(latents.decoder.float(), dim=1)
    cosine, cosine_low, cosine_high, chance = _beside_random(torch.nn.functional.normalize(vectors, dim=1) @ rows.T)
    numbers: dict[str, Any] = {}
    chances, tokens = {"cosine": chance}, 0
    if model is not None:
        latents.check(model)
        reading = site_activations(
            model, texts, site=latents.site, layer=latents.layer, span=span, batch_size=batch_size
        )
        before, changes, tokens = _mean_changes(latents, reading, strength * vectors)
        change, low, high, chances["change"] = _beside_random(changes)
        rank = (changes[1:].abs() >= changes[0].abs()).sum(0).tolist()
        numbers = {"change": change, "change_low": low, "change_high": high}
        numbers |= {"change_rank": tuple(rank), "before": tuple(before.tolist())}
    settings = {"strength": strength, "n_random": n_random, "seed": seed, "span": span, "d_in": latents.d_in}
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


# ---------------------------------------------------------------- steering and ablating


def steer_latent(
    latents: Latents, index: int, strength: float, *, span: str = "all", phase: Phase = "both"
) -> Intervention:
    """a ← a + strength · W_dec[index] at the SAE's site: as if the latent were active by so much more.

    Args:
        latents: the SAE.
        index: which latent.
        strength: in units of the latent's activation.
        span: which tokens.
        phase: prompt, generation or both.

    Raises:
        LensError: no such latent.
    """
    (chosen,) = latents.indices(index)
    row = latents.decoder[chosen].cpu()
    return add(row, site=latents.site, layers=latents.layer, strength=strength, span=span, phase=phase)


@contextmanager
def ablate_latent(
    latents: Latents, model: HookedModel, index: int | Sequence[int], *, longest: float | None = None
) -> Iterator[None]:
    """a ← a − f_i(a)·W_dec[i] at the SAE's site while the block runs, f_i(a) the activation of the latent.

    What the SAE does not explain stays. A context manager instead of an `Intervention`, because f_i is not
    linear and the SAE would have to be part of it: it acts on all tokens of every pass within the block, before
    any intervention. Attention sinks are left alone, by their length: on them an SAE's codes mean nothing and are
    huge, and taking such a part out breaks the model whatever the latent.

    Args:
        latents: the SAE.
        model: either backend.
        index: one latent, or several that are ablated together.
        longest: activations longer than this are left alone; None takes what `train_sae` has noted (ten times the
            median length), and with an SAE from elsewhere leaves none alone.

    Raises:
        LensError: no such latent, or a model that does not fit.
    """
    chosen = latents.indices(index)
    latents.check(model)

    limit = latents.provenance.settings.get("longest", math.inf) if longest is None else longest

    def edit(activation: Tensor) -> Tensor:
        part = latents.contribution(activation, chosen).to(activation)
        return torch.where(activation.norm(dim=-1, keepdim=True) > limit, activation, activation - part)

    with edited_sites(model, {(latents.layer, latents.site): edit}):
        yield
