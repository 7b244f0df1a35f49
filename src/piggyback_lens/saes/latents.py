"""Latents of a sparse autoencoder (SAE): load one and check it against the model, steer and ablate by latent.

The SAEs are those of sae-lens (the extra `sae`). `latent_fit` says how well one fits, `latent_attribution` which
latents a direction is made of, `latent_training` trains one.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Intervention
from piggyback_lens.interventions.kinds import add
from piggyback_lens.models.attachment import edited_sites
from piggyback_lens.models.backends import HookedModel, check_layers, device_of, hook_name, shape_of
from piggyback_lens.models.pair import Identity, identify
from piggyback_lens.vectors.direction import Provenance
from piggyback_lens.words import Phase, Site

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
        """The number of latents of the autoencoder."""
        return int(self.sae.cfg.d_sae)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of its place and its weights."""
        digest = hashlib.sha256(f"{self.site} {self.layer}".encode())
        for name, value in sorted(self.sae.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

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
        other_model: take an SAE of another model of the same width (a finetune, say); `fit_latents` tells how it does.

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
    raise LensError(f"{why}: load the SAE's own model, or pass other_model=True and look at fit_latents(...)")


def _plain_name(name: str) -> str:
    """A model's name without organisation and folders, TransformerLens' aliases resolved."""
    with suppress(ImportError, ValueError):
        from transformer_lens.loading_from_pretrained import get_official_model_name

        name = get_official_model_name(name)
    return PurePath(name).name.lower()


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
