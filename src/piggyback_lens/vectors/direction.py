"""Direction: a vector per layer at one site, with where it came from, its algebra and its file.

A direction is a value: every operation returns a new one whose provenance says what was done. Added to
activations it is a steering vector, projected out of them it is directional ablation; both are ordinary
interventions (`direction.steer(...)`, `direction.ablation(...)`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.files import atomic_write_bytes
from piggyback_lens.interventions.hooks import Interventions
from piggyback_lens.interventions.kinds import ALL_RESIDUAL_SITES, ablate, add
from piggyback_lens.maths import norm_matched_random, orthogonal_noise
from piggyback_lens.models.backends import HookedModel, check_layers, shape_of
from piggyback_lens.models.pair import Identity, identify
from piggyback_lens.words import HEAD_SITES, SITES, NoiseOn, NormOver, Phase, Site

Scale = Literal["raw", "unit", "rescaled"]
"""What the length of a vector means: as it was measured or trained, 1, or set by `rescaled` and `scaled`."""

FORMAT = "piggyback_lens.direction.1"


@dataclass(frozen=True)
class Provenance:
    """Where a direction came from.

    Attributes:
        how: the method, then every operation since, in words.
        data: sha256 (16 characters) of the token ids it was measured on; empty if none.
        model: `Identity.to_dict()` of the model it was measured on, None if unknown.
        seed: of whatever was random about it, None if nothing was.
        settings: numbers and names of the method, JSON-able.
    """

    how: str
    data: str = ""
    model: Mapping[str, Any] | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector per layer: what steering adds, ablation removes, and training may descend on.

    `attached(model, direction)` adds it in every pass, `direction.steer()` under an intervention's span and phase.

    Attributes:
        vectors: [layer, d] in float32, in the units of the activation; `direction[layer]` is that of one layer.
        layers: the layer of each vector, ascending.
        site: where the activation lives.
        sign: what the positive side means, in words.
        provenance: where it came from.
        scale: what the length means.

    Example:
        >>> direction = Direction.of({1: torch.ones(32)})
        >>> direction.layers, direction.site
        ((1,), 'resid_post')
        >>> with attached(model, direction):
        ...     steered = generate(model, prompts, max_new_tokens=4)
    """

    vectors: Float[Tensor, "layer d"]
    layers: tuple[int, ...]
    site: Site
    sign: str = "positive: as it is added"
    provenance: Provenance = Provenance("given")
    scale: Scale = "raw"

    def __post_init__(self) -> None:
        if self.site not in SITES or self.site in HEAD_SITES:
            usable = ", ".join(site for site in SITES if site not in HEAD_SITES)
            raise LensError(f"site {self.site!r} cannot hold a direction: choose one of {usable}")
        if self.scale not in get_args(Scale):
            raise LensError(f"scale {self.scale!r} is not known: choose one of {', '.join(get_args(Scale))}")
        if not self.layers or tuple(sorted(set(self.layers))) != self.layers or self.layers[0] < 0:
            raise LensError(f"layers {list(self.layers)}: expected different layer numbers from 0 up, ascending")
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.layers):
            shape = tuple(self.vectors.shape)
            raise LensError(f"vectors of shape {shape} for {len(self.layers)} layers: expected [layer, d]")
        if self.vectors.requires_grad:
            return  # made of parameters that are being trained (see `with_tensors`): they are left where they are
        if not bool(torch.isfinite(self.vectors).all()):
            raise LensError("a direction needs finite numbers, this one has NaN or infinity")
        object.__setattr__(self, "vectors", self.vectors.to("cpu", torch.float32, copy=True))

    @classmethod
    def of(
        cls,
        vectors: Mapping[int, Float[Tensor, " d"]],
        site: Site = "resid_post",
        *,
        sign: str = "positive: as it is added",
        provenance: Provenance | None = None,
    ) -> "Direction":
        """A direction from one vector per layer.

        Raises:
            LensError: no vectors, or of different lengths.
        """
        layers, shapes = tuple(sorted(vectors)), {tuple(v.shape) for v in vectors.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise LensError(f"vectors of shapes {sorted(shapes)}: expected one vector [d] per layer, of one length")
        table = torch.stack([vectors[layer] for layer in layers])
        return cls(table, layers, site, sign, provenance or Provenance("given"))

    @classmethod
    def zeros(cls, d_model: int, layers: Sequence[int] | int, site: Site = "resid_post") -> "Direction":
        """A direction that does nothing yet, to be trained; of one layer or several."""
        layers = [layers] if isinstance(layers, int) else layers
        return cls(torch.zeros(len(layers), d_model), tuple(sorted(layers)), site, provenance=Provenance("zeros"))

    def __repr__(self) -> str:
        lengths = ", ".join(f"{norm:.3g}" for norm in list(self.norms.values())[:4])
        return (
            f"Direction({self.site}, layers {list(self.layers)}, d = {self.vectors.shape[1]}, norms {lengths}"
            f"{', ...' if len(self.layers) > 4 else ''}; {self.provenance.how})"
        )

    # ---- reading it

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The vector of a direction of one layer (a copy).

        Raises:
            LensError: there are several layers.
        """
        if len(self.layers) != 1:
            raise LensError(f"this direction has {len(self.layers)} layers: choose one with .at(layer)")
        return self.vectors[0].clone()

    def __getitem__(self, layer: int) -> Float[Tensor, " d"]:
        """The vector of a layer.

        Raises:
            LensError: it has none at this layer.
        """
        if layer not in self.layers:
            raise LensError(f"this direction has no layer {layer}, it has {list(self.layers)}")
        return self.vectors[self.layers.index(layer)]

    def norm(self, over: NormOver = "sum") -> float:
        """Euclidean length, summed or averaged over the layers, in the units of the activation."""
        return total_norm(self.vectors.detach().float().norm(dim=1).tolist(), over)

    def tensors(self) -> dict[str, Tensor]:
        """The vectors by a stable name, for files and optimisers."""
        return {f"layers.{layer}.vector": vector for layer, vector in zip(self.layers, self.vectors, strict=True)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Direction":
        """The same with other vectors, named as in `tensors`; where they require a gradient, it flows to them."""
        return replace(self, vectors=torch.stack([tensors[f"layers.{layer}.vector"] for layer in self.layers]))

    def settings(self) -> dict[str, object]:
        """What was chosen about it, JSON-able."""
        # Strength is 1 since a direction holds what is added; runs of 0.1.0 have it in their identity.
        return {"kind": "steering vector", "site": self.site, "layers": list(self.layers), "strength": 1.0}

    @property
    def norms(self) -> dict[int, float]:
        """Euclidean length per layer, in the units of the activation."""
        return dict(zip(self.layers, self.vectors.norm(dim=1).tolist(), strict=True))

    def at(self, layer: int) -> "Direction":
        """The direction of one of its layers.

        Raises:
            LensError: it has none at this layer.
        """
        return replace(self, vectors=self[layer][None], layers=(layer,))

    def is_of(self, model: HookedModel) -> bool:
        """Whether it was measured on this very function (by probe logits); False if that is unknown."""
        known = self.provenance.model
        return known is not None and Identity.from_dict(known).matches(identify(model))

    def check(self, model: HookedModel) -> None:
        """Refuse a model whose layers or width do not fit.

        Raises:
            LensError: both sizes.
        """
        shape = shape_of(model)
        if self.site != "mlp_post" and self.vectors.shape[1] != shape.d_model:
            raise LensError(f"the direction has width {self.vectors.shape[1]}, this model has {shape.d_model}")
        check_layers(self.layers, shape.n_layers)

    # ---- algebra

    def unit(self) -> "Direction":
        """The same direction with every vector at length 1."""
        return self._to_norm(1.0, "unit", "made unit length")

    def rescaled(self, norm: float) -> "Direction":
        """The same direction with every vector at a given length."""
        return self._to_norm(norm, "rescaled", f"rescaled to length {norm:g}")

    def _to_norm(self, norm: float, scale: Scale, what: str) -> "Direction":
        lengths = self.vectors.norm(dim=1, keepdim=True)
        if not bool((lengths > 0).all()):
            zero = [layer for layer, length in self.norms.items() if length == 0]
            raise LensError(f"the direction is zero at layers {zero}: it has no orientation to rescale")
        return self._changed(self.vectors / lengths * norm, what, scale)

    def scaled(self, factor: float) -> "Direction":
        """factor · v; the positive side keeps its meaning where the factor is positive."""
        sign = self.sign if factor >= 0 else f"opposite of: {self.sign}"
        return replace(self._changed(self.vectors * factor, f"times {factor:g}", "rescaled"), sign=sign)

    def __neg__(self) -> "Direction":
        """The opposite direction."""
        negative = self._changed(-self.vectors, "negated", self.scale)
        return replace(negative, sign=f"opposite of: {self.sign}")

    def without(self, other: "Direction") -> "Direction":
        """v − (v·û)û per layer, û along `other`: the part that `other` does not explain.

        Raises:
            LensError: other layers, site or width, or `other` is zero somewhere.
        """
        _require_alike(self, other)
        unit = other.unit().vectors
        part = self.vectors - (self.vectors * unit).sum(1, keepdim=True) * unit
        return self._changed(part, f"without its part along ({other.provenance.how})", self.scale)

    def random_like(self, seed: int | torch.Generator) -> "Direction":
        """The control: a random direction with the same length at every layer, ‖random‖ = ‖v‖."""
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        vectors = torch.stack([norm_matched_random(vector, generator) for vector in self.vectors])
        source = Provenance(
            f"random, norm-matched to ({self.provenance.how})", seed=seed if isinstance(seed, int) else None
        )
        return replace(self, vectors=vectors, sign="none: random", provenance=source)

    def noisy(self, epsilon: float, generator: torch.Generator, on: NoiseOn = "both") -> "Direction":
        """√(1−ε²)·v + ε·y, y ⟂ v and ‖y‖ = ‖v‖, at every layer; `on` is for adapters."""
        moved = torch.stack([orthogonal_noise(vector, epsilon, generator) for vector in self.vectors])
        return self._changed(moved, f"with orthogonal noise {epsilon:g}", self.scale)

    def _changed(self, vectors: Tensor, what: str, scale: Scale) -> "Direction":
        source = replace(self.provenance, how=f"{self.provenance.how}; {what}")
        return replace(self, vectors=vectors, provenance=source, scale=scale)

    # ---- doing something with it

    def steer(
        self,
        strength: float = 1.0,
        *,
        fraction: float | None = None,
        norms: Mapping[int, float] | None = None,
        span: str = "all",
        phase: Phase = "both",
    ) -> Interventions:
        """a ← a + strength·v at every layer of the direction; fraction and norms as in `add`."""
        where: dict[str, Any] = {"site": self.site, "span": span, "phase": phase}
        size: dict[str, Any] = {"strength": strength, "fraction": fraction, "norms": norms}
        return Interventions(
            tuple(add(v, layers=layer, **where, **size) for layer, v in zip(self.layers, self.vectors, strict=True))
        )

    def ablation(
        self, *, layers: Sequence[int] | int | None = None, span: str = "all", phase: Phase = "both"
    ) -> Interventions:
        """Directional ablation at every residual site of every layer: a ← a − (a·v̂)v̂.

        A direction of one layer leaves the whole residual stream: all residual sites of `layers` (default
        every layer). A direction of several layers leaves its own site, each layer's vector at its layer.

        Raises:
            LensError: `layers` given to a direction that has its own.
        """
        where: dict[str, Any] = {"span": span, "phase": phase}
        if len(self.layers) == 1:
            return ablate(self.vectors[0], site=ALL_RESIDUAL_SITES, layers=layers, **where)
        if layers is not None:
            raise LensError("a direction of several layers is ablated at its own: choose one with .at(layer)")
        each = zip(self.layers, self.vectors, strict=True)
        parts = [ablate(v, site=self.site, layers=layer, **where).parts for layer, v in each]
        return Interventions(tuple(part for own in parts for part in own))

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; everything but the numbers is JSON in its header.

        Raises:
            LensError: the name does not end in .safetensors, or provenance that is not JSON.
        """
        from safetensors.torch import save

        path = _safetensors_path(path)
        about: dict[str, Any] = {"format": FORMAT, "layers": list(self.layers), "site": self.site, "sign": self.sign}
        about |= {"scale": self.scale, "provenance": asdict(self.provenance)}
        try:
            text = json.dumps(about, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise LensError(f"the provenance of this direction is not JSON ({error}): use numbers and text") from error
        return atomic_write_bytes(path, save({"vectors": self.vectors.contiguous()}, metadata={"direction": text}))

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """Read the file of a direction that `Direction.save` wrote.

        Raises:
            LensError: no such file, or a file of another kind.
        """
        from safetensors import SafetensorError, safe_open

        path = _safetensors_path(path)
        if not path.is_file():
            raise LensError(f"{path} does not exist: give a file written by Direction.save")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("direction", "{}"))
                if about.get("format") != FORMAT or list(file.keys()) != ["vectors"]:
                    raise LensError(f"{path} is not a direction of this library: adapter_files imports other formats")
                vectors = file.get_tensor("vectors")
            provenance = Provenance(**about["provenance"])
            return cls(vectors, tuple(about["layers"]), about["site"], about["sign"], provenance, scale=about["scale"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise LensError(f"{path} is a broken direction file ({error}): save it again") from error


def total_norm(lengths: Sequence[float], over: NormOver) -> float:
    """Lengths of the parts of a solution, summed or averaged.

    Raises:
        LensError: neither was asked.
    """
    if over not in ("sum", "mean"):
        raise LensError(f"norm over {over!r} is not known: choose 'sum' or 'mean'")
    return sum(lengths) / (len(lengths) if over == "mean" else 1)


def _safetensors_path(path: str | Path) -> Path:
    if Path(path).suffix != ".safetensors":
        raise LensError(f"{path}: a direction's file ends in .safetensors")
    return Path(path)


def _require_alike(a: Direction, b: Direction) -> None:
    for what, x, y in (
        ("layers", a.layers, b.layers),
        ("site", a.site, b.site),
        ("width", a.vectors.shape[1], b.vectors.shape[1]),
    ):
        if x != y:
            raise LensError(f"the two directions differ in {what}: {x} against {y}")


def cosine(a: Direction, b: Direction) -> dict[int, float]:
    """Cosine similarity per layer.

    Raises:
        LensError: other layers, site or width, or a zero vector.
    """
    _require_alike(a, b)
    values = (a.unit().vectors.double() * b.unit().vectors.double()).sum(1).clamp(-1, 1)
    return dict(zip(a.layers, values.tolist(), strict=True))


def combine(directions: Sequence[Direction], weights: Sequence[float] | None = None) -> Direction:
    """Σ weight·v (the mean without weights), per layer; the sign rule is that of the first.

    Raises:
        LensError: none given, as many weights as directions missing, or directions that differ in kind.
    """
    if not directions or (weights is not None and len(weights) != len(directions)):
        raise LensError(f"{len(directions)} directions and {len(weights or ())} weights: give one weight for each")
    factors = [1 / len(directions)] * len(directions) if weights is None else list(weights)
    first = directions[0]
    for other in directions[1:]:
        _require_alike(first, other)
    total = torch.stack([f * d.vectors for f, d in zip(factors, directions, strict=True)]).sum(0)
    parts = " + ".join(f"{f:g}·({d.provenance.how})" for f, d in zip(factors, directions, strict=True))
    source = Provenance(f"sum {parts}", model=first.provenance.model)
    return Direction(total, first.layers, first.site, first.sign, source, scale="rescaled")
