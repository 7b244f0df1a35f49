"""LoRA adapters as values: scaled, made noisy, compared and merged; each gives a new one, as a `Direction` does.

`adapting` lets them act on a model through hooks, `hook_training` trains them, `adapter_files` reads and
writes them.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.maths import norm_matched_random, orthogonal_noise
from piggyback_lens.models.attachment import changed_weight, linear_weights, module_sizes, other_differences
from piggyback_lens.models.backends import check_layers, n_layers_of
from piggyback_lens.vectors.direction import Direction, Provenance, total_norm
from piggyback_lens.words import MODULES, Module, NoiseOn, NormOver, Site, module_name

Place = tuple[int, Module]


@dataclass(frozen=True, eq=False)
class LoRAAdapter:
    """y ← y + s·B(Ax) at linear modules, s = alpha/r, or alpha/√r with rsLoRA.

    Attributes:
        a: (layer, module) to A [r, in]; all modules of all layers that it has.
        b: the same to B [out, r].
        alpha: numerator of s.
        rslora: rank-stabilised scale.
        provenance: where it came from, if known.
    """

    a: Mapping[Place, Float[Tensor, "r d_in"]]
    b: Mapping[Place, Float[Tensor, "d_out r"]]
    alpha: float
    rslora: bool = False
    provenance: Provenance | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.a or self.a.keys() != self.b.keys():
            raise LensError(f"A has {len(self.a)} modules, B {len(self.b)}: expected the same ones, at least one")
        layers, modules = {layer for layer, _ in self.a}, {module for _, module in self.a}
        if unknown := sorted(modules - set(MODULES)):
            raise LensError(f"module {unknown[0]!r} is not known: choose from {', '.join(MODULES)}")
        if len(self.a) != len(layers) * len(modules):
            raise LensError(f"{len(self.a)} modules for {len(layers)} layers x {len(modules)} kinds: some are missing")
        ranks = {a.shape[0] for a in self.a.values()} | {b.shape[1] for b in self.b.values()}
        if len(ranks) > 1 or 0 in ranks:
            raise LensError(f"ranks {sorted(ranks)} in one adapter: every A is [r, in] and every B [out, r]")

    @classmethod
    def fresh(
        cls,
        model: Any,
        *,
        rank: int = 1,
        alpha: float | None = None,
        modules: Sequence[Module] = ("down",),
        layers: Sequence[int] | None = None,
        rslora: bool = False,
        seed: int = 0,
    ) -> "LoRAAdapter":
        """An adapter that does nothing yet: B is zero, A uniform in ±1/√in as in PEFT.

        Args:
            model: transformers model, bridge, or HookedTransformer (for its sizes).
            rank: r.
            alpha: default 2·rank.
            modules: any of q, k, v, o, gate, up, down.
            layers: default all.
            rslora: s = alpha/√r.
            seed: of A, which depends on nothing else.

        Raises:
            LensError: a rank below 1, or a module or layer that the model does not have.
        """
        modules = [module_name(module) for module in modules]
        if rank < 1:
            raise LensError(f"rank {rank}: it must be at least 1")
        chosen = check_layers(layers, n_layers_of(model))
        generator = torch.Generator().manual_seed(seed)
        a, b = {}, {}
        for layer in chosen:
            for module in modules:
                d_out, d_in = module_sizes(model, layer, module)
                a[layer, module] = (torch.rand(rank, d_in, generator=generator) * 2 - 1) / d_in**0.5
                b[layer, module] = torch.zeros(d_out, rank)
        return cls(a, b, 2.0 * rank if alpha is None else alpha, rslora, Provenance("fresh", seed=seed))

    @classmethod
    def between(
        cls,
        base: Any,
        finetuned: Any,
        *,
        rank: int | None = None,
        modules: Sequence[Module] | None = None,
        layers: Sequence[int] | None = None,
    ) -> "LoRAAdapter":
        """A full finetune as an adapter: the difference of its linear weights, cut to a rank by its singular values.

        With full rank base and adapter are the finetuned model, if nothing but these weights was changed; what else
        differs (norms, biases, embeddings, an output layer of its own, the configuration) is named in a warning.

        Args:
            base: transformers model, or bridge.
            finetuned: the same, of the same sizes.
            rank: r of every module; None for full rank.
            modules: any of q, k, v, o, gate, up, down; None for all that the model has.
            layers: None for all.

        Raises:
            LensError: models of different sizes, a rank below 1, or a module or layer that they do not have.
        """
        if rank is not None and rank < 1:
            raise LensError(f"rank {rank}: it must be at least 1")
        chosen = check_layers(layers, n_layers_of(base))
        ours, theirs = (linear_weights(model, chosen, modules) for model in (base, finetuned))
        if {p: w.shape for p, w in ours.items()} != {p: w.shape for p, w in theirs.items()}:
            raise LensError("base and finetuned have linear weights of different sizes: they are no pair")
        if not ours:
            raise LensError(
                f"{type(base).__name__} has none of the modules {'/'.join(MODULES)} as linear layers of their own: "
                "there is nothing that a LoRA of these modules could hold"
            )
        width = rank or max(min(weight.shape) for weight in ours.values())
        a, b, kept, whole = {}, {}, 0.0, 0.0
        for place, weight in ours.items():
            u, s, v = torch.linalg.svd(_difference(theirs[place], weight), full_matrices=False)
            part = s[:width].sqrt()
            a[place] = torch.zeros(width, v.shape[1])
            b[place] = torch.zeros(u.shape[0], width)
            a[place][: len(part)] = part[:, None] * v[:width]
            b[place][:, : len(part)] = u[:, :width] * part
            kept, whole = kept + float(s[:width].square().sum()), whole + float(s.square().sum())
        if differ := other_differences(base, finetuned, ours):
            more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
            warnings.warn(f"{differ[0]}{more} differ too, which no LoRA of these modules holds", stacklevel=2)
        share = kept / whole if whole else 1.0
        how = f"rank {width} of the difference of two models, {share:.3%} of its squared norm"
        return cls(a, b, float(width), provenance=Provenance(how))

    def __add__(self, other: "LoRAAdapter") -> "LoRAAdapter":
        """An adapter that adds what both add, in float32; its rank is the sum of theirs.

        Raises:
            LensError: adapters on different modules or layers.
        """
        if self.a.keys() != other.a.keys():
            raise LensError(f"{self!r} and {other!r} are on different modules: attached(model, a, b) adds such ones")
        places = self._places()
        a = {p: torch.cat([self.a[p].float(), other.a[p].float()]) for p in places}
        b = {p: torch.cat([self.scale * self.b[p].float(), other.scale * other.b[p].float()], dim=1) for p in places}
        return LoRAAdapter(a, b, float(self.rank + other.rank), provenance=Provenance("sum of two adapters"))

    def __sub__(self, other: "LoRAAdapter") -> "LoRAAdapter":
        """An adapter that adds what this one adds and takes away what the other adds."""
        return self + other.scaled(-1.0)

    def without(self, direction: Direction) -> "LoRAAdapter":
        """The adapter that writes nothing along a direction of the residual stream: B ← B − v vᵀB on o and down.

        In float32, since half precision leaves a hundredth of it. Modules that do not write into the residual stream
        (q, k, v, gate, up) stay as they are.

        Args:
            direction: with a vector for each layer of the adapter, or one vector for all of them. Its length does not
                count.

        Raises:
            LensError: no module that writes into the residual stream, missing layers, another width, or a vector of
                length zero, which is no direction.
        """
        writing = [place for place in self._places() if place[1] in ("o", "down")]
        if not writing:
            raise LensError(f"{self!r} has neither o nor down, the modules that write into the residual stream")
        a, b = ({place: x.float() for place, x in part.items()} for part in (self.a, self.b))
        for layer, module in writing:
            if len(direction.layers) > 1 and layer not in direction.layers:
                raise LensError(f"{direction!r} has no vector of layer {layer}: give one for each, or one for all")
            vector = direction[layer] if layer in direction.layers else direction[direction.layers[0]]
            old = b[layer, module]
            if len(vector) != len(old):
                raise LensError(f"the direction has width {len(vector)}, {module} of layer {layer} writes {len(old)}")
            if not vector.any():
                raise LensError(f"{direction!r} has length zero at layer {layer}: it is no direction")
            unit = torch.nn.functional.normalize(vector.to(old.device, old.dtype), dim=0)
            b[layer, module] = old - torch.outer(unit, unit @ old)
        source = self.provenance or Provenance("an adapter of unknown origin")
        return replace(self, a=a, b=b, provenance=replace(source, how=f"{source.how}; without a direction"))

    def __repr__(self) -> str:
        return (
            f"LoRAAdapter(rank {self.rank}, {'/'.join(self.modules)}, layers {list(self.layers)}, "
            f"s = {self.scale:g}, norm {self.norm():.3g})"
        )

    @property
    def rank(self) -> int:
        """The rank: the inner width of every A and B."""
        return next(iter(self.a.values())).shape[0]

    @property
    def scale(self) -> float:
        """The factor s in W + s·BA: alpha/rank, or alpha/√rank with rsLoRA."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it acts at, in ascending order."""
        return tuple(sorted({layer for layer, _ in self.a}))

    @property
    def modules(self) -> tuple[Module, ...]:
        """Kinds of modules, in the order q k v o gate up down."""
        present = {module for _, module in self.a}
        return tuple(module for module in MODULES if module in present)

    def _places(self) -> list[Place]:
        return [(layer, module) for layer in self.layers for module in self.modules]

    def tensors(self) -> dict[str, Tensor]:
        """A and B of every module by a stable name, for files and optimisers."""
        both = (("A", self.a), ("B", self.b))
        return {f"layers.{i}.{m}.{name}": part[i, m] for i, m in self._places() for name, part in both}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "LoRAAdapter":
        """The same with other numbers, named as in `tensors`."""
        a, b = ({(i, m): tensors[f"layers.{i}.{m}.{name}"] for i, m in self._places()} for name in ("A", "B"))
        return replace(self, a=a, b=b)

    def settings(self) -> dict[str, object]:
        """What was chosen about it, JSON-able."""
        chosen: dict[str, object] = {"kind": "LoRA", "rank": self.rank, "alpha": self.alpha, "rslora": self.rslora}
        return chosen | {"modules": list(self.modules), "layers": list(self.layers)}

    def delta(self, layer: int, module: Module) -> Float[Tensor, "d_out d_in"]:
        """s·BA, what the adapter adds to the weight, in float32 or better."""
        a, b = self.a[layer, module], self.b[layer, module]
        at_least = torch.promote_types(a.dtype, torch.float32)
        return self.scale * (b.to(at_least) @ a.to(at_least))

    def norm(self, over: NormOver = "sum") -> float:
        """Frobenius norm of s·BA, summed or averaged over the modules."""
        lengths = []
        for place, a in self.a.items():
            wide, tall = a.detach().double(), self.b[place].detach().double()
            squared = ((tall.T @ tall) * (wide @ wide.T)).sum()  # ‖BA‖² = tr(BᵀB AAᵀ), without the product
            lengths.append(abs(self.scale) * float(squared.clamp(min=0).sqrt()))
        return total_norm(lengths, over)

    def scaled(self, factor: float) -> "LoRAAdapter":
        """The adapter with s multiplied by a factor, through alpha."""
        return replace(self, alpha=self.alpha * factor)

    def random_like(self, generator: torch.Generator) -> "LoRAAdapter":
        """The control: random A and B with the same ‖s·BA‖ at every module."""
        a, b = {}, {}
        for place in self._places():
            wide, tall = self.a[place].detach(), self.b[place].detach()
            a[place] = norm_matched_random(wide, generator)
            drawn = torch.randn(tall.shape, generator=generator).to(tall.device, tall.dtype)
            b[place] = drawn * ((tall @ wide).norm() / (drawn @ a[place]).norm())
        return replace(self, a=a, b=b, provenance=Provenance("random, norm-matched"))

    def noisy(self, epsilon: float, generator: torch.Generator, on: NoiseOn = "both") -> "LoRAAdapter":
        """Every A, every B, or both ← √(1−ε²)·x + ε·y, y ⟂ x and ‖y‖ = ‖x‖.

        Raises:
            LensError: `on` is not known, or a matrix is zero.
        """
        if on not in ("both", "A", "B"):
            raise LensError(f"noise on {on!r} is not known: choose 'A', 'B' or 'both'")
        a, b = dict(self.a), dict(self.b)
        for place in self._places():
            for part, name in ((a, "A"), (b, "B")):
                if on in ("both", name):
                    part[place] = orthogonal_noise(part[place], epsilon, generator)
        return replace(self, a=a, b=b)

    def direction(self, module: Module = "down") -> Direction:
        """The B vectors of a rank-1 adapter on `down` or `o`, times s: what each layer writes per unit of A·x.

        Their site is `mlp_out` or `attn_out` (in models with a norm behind the module, before that norm).

        Raises:
            LensError: another rank or module.
        """
        if self.rank != 1 or module not in self.modules or module not in ("down", "o"):
            raise LensError(
                f"rank {self.rank} on {', '.join(self.modules)}: the B vector of a rank-1 adapter on down or o is asked"
            )
        vectors = torch.stack([self.b[layer, module][:, 0].detach() * self.scale for layer in self.layers])
        source = self.provenance or Provenance("a rank-1 adapter of unknown origin")
        source = replace(source, how=f"B vector of a rank-1 adapter on {module} ({source.how})")
        site: Site = "mlp_out" if module == "down" else "attn_out"
        return Direction(vectors, self.layers, site, "positive: where A·x is positive", source)

    @contextmanager
    def merged(self, model: Any) -> Iterator[None]:
        """The adapter in the weights themselves while the block runs; they return bit for bit.

        Models that share weights with this one change too.

        Raises:
            LensError: a module or layer that the model does not have, or other sizes.
        """
        with ExitStack() as stack:
            for layer, module in self._places():
                delta = self.delta(layer, module).detach()
                stack.enter_context(changed_weight(model, layer, module, delta))
            yield


Adapter = Direction | LoRAAdapter
"""What can be added to a model, trained and scaled: both have `tensors`, `scaled`, `noisy`, `random_like`, `norm`."""


def _difference(new: Float[Tensor, "d_out d_in"], old: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """In float32: half precision would round the small difference of two large weights once more."""
    return new.detach().cpu().float() - old.detach().cpu().float()
