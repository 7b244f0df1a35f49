"""Interventions: immutable, composable descriptions of what to do to activations, and how to run them.

    repair = patch(base_activations, span="prefix")            # what, where
    with applied(model, batch, repair) as record:              # TransformerLens hooks, always removed
        logits = model.forward(batch.ids)
    print(record)                                              # how much was touched

`intervention.fwd_hooks(model, batch)` gives ordinary TransformerLens `(name, function)` pairs, for
`model.run_with_hooks`, `model.hooks()` and `run_with_cache`. All functions are differentiable, keep the
activation's dtype, and return a new tensor; only at `resid_mid` of a bridge do they write into the one they get,
which is the residual stream itself.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.conversations.chat import PromptBatch
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.activations import Activations
from piggyback_lens.interventions.placement import PHASES, Phase, Placement
from piggyback_lens.models.backends import HEAD_SITES, SITES, HookedModel, Site

if TYPE_CHECKING:
    from piggyback_lens.interventions.running import Record

Kind = Literal["cache", "add", "ablate", "clamp", "patch", "zero", "fill", "resample"]
HookPair = tuple[str, Callable[..., Tensor | None]]
ALL_RESIDUAL_SITES: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """One thing to do at one site; made by the factories of this module, composed with `+`.

    Attributes:
        kind: what to do.
        site: where the activation lives.
        layers: which layers; None for all.
        heads: which heads (key/value heads at k, v, rot_k); None for all.
        span: which tokens: prefix, query, postfix, response, prompt, all, or a sub-span of the template.
        tokens: indices within the span; None for the whole span.
        phase: prompt tokens, generated (or teacher-forced response) tokens, or both.
        rows: rows of the batch; None for all.
        tensors: vectors and donor activations, by name.
        options: numbers and names.
    """

    kind: Kind
    site: Site
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    span: str = "all"
    tokens: tuple[int, ...] | None = None
    phase: Phase = "both"
    rows: tuple[int, ...] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise LensError(f"intervention {self.kind!r} is not known: choose one of {', '.join(get_args(Kind))}")
        if self.site not in SITES:
            raise LensError(f"site {self.site!r} is not known: choose one of {', '.join(SITES)}")
        if self.phase not in PHASES:
            raise LensError(f"phase {self.phase!r} is not known: choose one of {', '.join(PHASES)}")
        if self.heads is not None and self.site not in HEAD_SITES:
            raise LensError(f"site {self.site!r} has no heads: heads= goes with {', '.join(HEAD_SITES)}")
        for name in ("layers", "heads", "tokens", "rows"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(x) for x in ([value] if isinstance(value, int) else value)))

    def __add__(self, other: "Intervention | Interventions") -> "Interventions":
        return Interventions((self,)) + other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Intervention):
            return NotImplemented
        mine, theirs = self._fields(), other._fields()
        if mine != theirs or self.tensors.keys() != other.tensors.keys():
            return False
        return all(torch.equal(value, other.tensors[name]) for name, value in self.tensors.items())

    def __hash__(self) -> int:
        return hash((self.kind, self.site, self.layers, self.heads, self.span, self.tokens, self.phase, self.rows))

    def __repr__(self) -> str:
        where = f"layers {layer_ranges(self.layers)}" if self.layers is not None else "all layers"
        parts = [self.site, where, self.span]
        parts += [f"{name} {list(value)}" for name in ("heads", "tokens", "rows") if (value := getattr(self, name))]
        parts += [f"{self.phase} only"] if self.phase != "both" else []
        parts += [f"{name}={value}" for name, value in self.options.items() if isinstance(value, (int, float, str))]
        return f"{self.kind}({', '.join(parts)})"

    def _fields(self) -> dict[str, Any]:
        names = ("kind", "site", "layers", "heads", "span", "tokens", "phase", "rows")
        return {name: getattr(self, name) for name in names} | {"options": dict(self.options)}

    def fwd_hooks(
        self, model: HookedModel, batch: PromptBatch | Placement, record: "Record | None" = None
    ) -> list[HookPair]:
        """TransformerLens `(name, function)` pairs for one pass over `batch`; see `Interventions.fwd_hooks`."""
        return Interventions((self,)).fwd_hooks(model, batch, record)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, tensors included (safetensors in base64)."""
        from safetensors.torch import save

        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in self._fields().items()}
        if self.tensors:
            blob = save({name: value.detach().cpu().contiguous() for name, value in self.tensors.items()})
            fields["tensors"] = base64.b64encode(blob).decode("ascii")
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Intervention":
        """Inverse of `to_dict`.

        Raises:
            LensError: unknown fields, or tensors that are not safetensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        known = set(cls.__dataclass_fields__)
        if not {"kind", "site"} <= set(data) <= known:
            raise LensError(f"an intervention has the fields {sorted(known)}, got {sorted(data)}")
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
        try:
            fields["tensors"] = load(base64.b64decode(fields.get("tensors", ""))) if "tensors" in fields else {}
        except (SafetensorError, ValueError) as error:
            raise LensError(f"the tensors of the intervention are not safetensors in base64 ({error})") from error
        return cls(**fields)


@dataclass(frozen=True)
class Interventions:
    """Several interventions; at the same hook point they act in order."""

    parts: tuple[Intervention, ...] = ()

    def __add__(self, other: "Intervention | Interventions") -> "Interventions":
        if not isinstance(other, (Intervention, Interventions)):
            return NotImplemented
        return Interventions(self.parts + as_parts(other))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts)) or "no intervention"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Interventions":
        """Inverse of `to_dict`.

        Raises:
            LensError: not a dictionary with "parts", or parts that are no interventions.
        """
        if set(data) != {"parts"}:
            raise LensError(f"expected a dictionary with 'parts', got the keys {sorted(data)}")
        return cls(tuple(Intervention.from_dict(part) for part in data["parts"]))

    def fwd_hooks(
        self, model: HookedModel, batch: PromptBatch | Placement, record: "Record | None" = None
    ) -> list[HookPair]:
        """TransformerLens `(name, function)` pairs.

        Args:
            model: HookedTransformer or TransformerBridge.
            batch: the very batch whose ids will go through the model (or a `Placement` that is moved along).
            record: collects receipts and cached activations, if given.

        Raises:
            LensError: a layer, head, span or donor that does not fit this model and batch.
        """
        from piggyback_lens.interventions.running import hook_pairs

        return hook_pairs(self.parts, model, batch, record)


AnyIntervention = Intervention | Interventions | Sequence[Intervention] | None


def as_parts(interventions: AnyIntervention) -> tuple[Intervention, ...]:
    """The single interventions of anything that stands for some."""
    if interventions is None:
        return ()
    if isinstance(interventions, Intervention):
        return (interventions,)
    if isinstance(interventions, Interventions):
        return interventions.parts
    return tuple(part for item in interventions for part in as_parts(item))


# ---------------------------------------------------------------- factories


def cache(
    sites: Site | Sequence[Site],
    *,
    layers: Sequence[int] | int | None = None,
    span: str = "all",
    tokens: Sequence[int] | None = None,
    phase: Phase = "both",
    device: str | torch.device | None = "cpu",
    dtype: torch.dtype | None = None,
    detach: bool = True,
) -> Interventions:
    """Keep activations: only these sites, layers and tokens; read them from `record.activations`.

    Args:
        sites: one or several.
        layers: None for all.
        span: which tokens; `tokens` picks indices within it.
        tokens: indices within the span.
        phase: prompt, generation or both.
        device: where to keep them; None leaves them on the model's device.
        dtype: None keeps the model's.
        detach: False keeps the graph, for gradients (then device and dtype are left as they are).

    Raises:
        LensError: span "all" in the generation phase, which is span "response".
    """
    if phase == "generation" and span == "all":
        raise LensError("the tokens of the generation phase are span='response': keep that span, it starts at 0 there")
    options = {
        "device": None if device is None else str(device),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "detach": detach,
    }
    return _each(sites, "cache", layers=layers, span=span, tokens=tokens, phase=phase, options=options)


def add(
    vector: Float[Tensor, "*feature"],
    *,
    site: Site = "resid_post",
    layers: Sequence[int] | int | None,
    strength: float = 1.0,
    fraction: float | None = None,
    norms: Mapping[int, float] | None = None,
    heads: Sequence[int] | None = None,
    span: str = "all",
    tokens: Sequence[int] | None = None,
    phase: Phase = "both",
) -> Intervention:
    """Steering: a <- a + strength * vector.

    Args:
        vector: [d_model], or [d_head] at a head site.
        site: where to add.
        layers: which layers; None for all.
        strength: raw multiple of the vector.
        fraction: instead of `strength`, the length of what is added as a fraction of the mean activation
            norm at each layer, which `norms` gives (see `mean_norms`).
        norms: layer to mean activation norm.
        heads: at a head site.
        span: which tokens.
        tokens: indices within the span.
        phase: prompt, generation or both.

    Raises:
        LensError: fraction without norms, or a zero vector with a fraction.
    """
    vector = _vector(vector)
    options: dict[str, Any] = {"strength": float(strength)}
    if fraction is not None:
        length = float(vector.float().norm())
        chosen = sorted(norms or {}) if layers is None else [layers] if isinstance(layers, int) else list(layers)
        missing = [layer for layer in chosen if layer not in (norms or {})]
        if not chosen or missing or length == 0:
            raise LensError(f"fraction={fraction} needs a non-zero vector and norms= for each layer, {missing} missing")
        options = {
            "fraction": float(fraction),
            "strengths": {str(layer): fraction * (norms or {})[layer] / length for layer in chosen},
        }
        layers = chosen
    return Intervention(
        "add",
        site,
        _ints(layers),
        _ints(heads),
        span,
        _ints(tokens),
        phase,
        None,
        {"vector": vector},
        options,
    )


def ablate(
    direction: Float[Tensor, "*feature"],
    *,
    site: Site | Sequence[Site] = ALL_RESIDUAL_SITES,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | None = None,
    span: str = "all",
    tokens: Sequence[int] | None = None,
    phase: Phase = "both",
) -> Interventions:
    """Directional ablation: a <- a - (a . v) v for the unit vector v along `direction`.

    By default at every residual site of every layer, so that the direction is absent from the whole
    residual stream.
    """
    unit = _unit(direction)
    return _each(
        site,
        "ablate",
        layers=layers,
        heads=heads,
        span=span,
        tokens=tokens,
        phase=phase,
        tensors={"unit": unit},
    )


def clamp(
    direction: Float[Tensor, "*feature"],
    value: float,
    *,
    site: Site = "resid_post",
    layers: Sequence[int] | int | None,
    heads: Sequence[int] | None = None,
    span: str = "all",
    tokens: Sequence[int] | None = None,
    phase: Phase = "both",
) -> Intervention:
    """Set the projection on the unit vector along `direction` to `value`, the rest unchanged."""
    fields = {"tensors": {"unit": _unit(direction)}, "options": {"value": float(value)}}
    return Intervention("clamp", site, _ints(layers), _ints(heads), span, _ints(tokens), phase, **fields)  # type: ignore[arg-type]


def patch(
    donor: Activations,
    *,
    sites: Site | Sequence[Site] | None = None,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
) -> Interventions:
    """Replace the recipient's activations by the donor's at the same span (2606.06667 eq. 1 for k and v).

    Args:
        donor: kept with `cache` from the other model. One row serves every row of the recipient;
            otherwise the rows must be the recipient's.
        sites: None for all that the donor holds.
        layers: None for all that the donor holds.
        heads: only these heads.
        rows: only these rows of the recipient.
    """
    chosen_sites: tuple[Site, ...] = donor.sites if sites is None else _sites(sites)
    chosen_layers = donor.layers if layers is None else _ints(layers)
    lengths = torch.tensor(donor.lengths)
    return Interventions(
        tuple(
            Intervention(
                "patch",
                site,
                chosen_layers,
                _ints(heads),
                donor.span,
                donor.tokens,
                rows=_ints(rows),
                tensors={str(layer): donor[site, layer] for layer in chosen_layers or ()} | {"lengths": lengths},
            )
            for site in chosen_sites
        )
    )


def zero(
    sites: Site | Sequence[Site],
    *,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | None = None,
    span: str = "all",
    tokens: Sequence[int] | None = None,
    phase: Phase = "both",
) -> Interventions:
    """Zero ablation."""
    return _each(sites, "zero", layers=layers, heads=heads, span=span, tokens=tokens, phase=phase)


def mean_ablate(
    reference: Activations,
    *,
    sites: Site | Sequence[Site] | None = None,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | None = None,
    span: str | None = None,
    phase: Phase = "both",
) -> Interventions:
    """Mean ablation: every token of the span becomes the mean over all tokens of `reference`."""
    chosen = reference.layers if layers is None else _ints(layers) or ()
    return Interventions(
        tuple(
            Intervention(
                "fill", site, chosen, _ints(heads), span or reference.span, phase=phase,
                tensors={str(layer): reference.mean(site, layer) for layer in chosen},
            )
            for site in (reference.sites if sites is None else _sites(sites))
        )
    )  # fmt: skip


def resample(
    reference: Activations,
    *,
    seed: int,
    sites: Site | Sequence[Site] | None = None,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | None = None,
    span: str | None = None,
    phase: Phase = "both",
) -> Interventions:
    """Resample ablation: every token of the span becomes that of a random token of `reference`.

    The choice depends on seed, row and token only, and is the same at every site and layer.

    Raises:
        LensError: a negative seed.
    """
    if seed < 0:
        raise LensError(f"seed {seed} given, expected 0 or more")
    chosen = reference.layers if layers is None else _ints(layers) or ()
    return Interventions(
        tuple(
            Intervention(
                "resample", site, chosen, _ints(heads), span or reference.span, phase=phase,
                tensors={str(layer): reference.flat(site, layer) for layer in chosen}, options={"seed": int(seed)},
            )
            for site in (reference.sites if sites is None else _sites(sites))
        )
    )  # fmt: skip


def _each(sites: Site | Sequence[Site], kind: Kind, **fields: Any) -> Interventions:
    for name in ("layers", "heads", "tokens"):
        fields[name] = _ints(fields.get(name))
    return Interventions(tuple(Intervention(kind, site, **fields) for site in _sites(sites)))


def _sites(sites: Site | Sequence[Site]) -> tuple[Site, ...]:
    return (sites,) if isinstance(sites, str) else tuple(sites)


def _ints(values: Sequence[int] | int | None) -> tuple[int, ...] | None:
    return None if values is None else (values,) if isinstance(values, int) else tuple(values)


def _vector(vector: Tensor) -> Tensor:
    if vector.ndim != 1 or not bool(torch.isfinite(vector).all()):
        raise LensError(f"a direction is one finite vector, got shape {tuple(vector.shape)}: pick one layer's vector")
    return vector.clone()  # what happens to the caller's tensor later does not reach the intervention; gradients do


def _unit(direction: Tensor) -> Tensor:
    vector = _vector(direction).float()
    if not bool(vector.any()):
        raise LensError("the direction is the zero vector: it has no orientation to ablate or clamp")
    unit: Tensor = vector / vector.norm()
    return unit


def layer_ranges(layers: Sequence[int]) -> str:
    """Layers for a message: "0-29", or "1,3"."""
    if len(layers) > 2 and tuple(layers) == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
