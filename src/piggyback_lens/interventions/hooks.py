"""Interventions: immutable, composable descriptions of what to do to activations; their hooks; what happened.

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from piggyback_lens.conversations.chat import PromptBatch
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.activations import Activations, assemble
from piggyback_lens.interventions.placement import PHASES, Cells, Placement
from piggyback_lens.models.attachment import adapter_inputs, require_switchable
from piggyback_lens.models.backends import (
    HookedModel,
    check_layers,
    hook_name,
    hook_points,
    n_layers_of,
    shape_of,
    writes_through,
)
from piggyback_lens.words import HEAD_SITES, SITES, OwnSite, Phase, Site

HookPair = tuple[str, Callable[..., Tensor | None]]


class Action(ABC):
    """What a kind of intervention does; one object of each subclass serves all interventions of its kind.

    A new kind is a subclass with a `kind` and `new_value` (see `kinds`), and a function that makes interventions of it.

    Attributes:
        kind: its name in `Intervention.kind`.
        changes: False for what only reads.
    """

    kind: str
    changes: bool = True

    def __init_subclass__(cls) -> None:
        ACTIONS[cls.kind] = cls()

    def check(self, part: "Intervention", placement: Placement, layers: Sequence[int]) -> None:  # noqa: B027
        """Refuse, before anything runs, what does not fit the rows and layers."""

    def one_row_stands_for_all(self, part: "Intervention") -> bool:
        """Whether it does the same to the tokens of a prefix in every row."""
        return True

    @abstractmethod
    def new_value(
        self,
        part: "Intervention",
        layer: int,
        old: Float[Tensor, "cell *feature"],
        cells: Cells,
        heads: Int[Tensor, " head"] | None,
    ) -> Float[Tensor, "cell *feature"]:
        """What the touched cells become; of the chosen heads, if there are any."""

    def squared_change(
        self, old: Float[Tensor, "cell *feature"], new: Float[Tensor, "cell *feature"]
    ) -> Float[Tensor, ""]:
        """How much was changed, squared, for the receipt."""
        return (new - old).float().pow(2).sum()


ACTIONS: dict[str, Action] = {}
"""Every kind of intervention, by name."""


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """One thing to do at one site; made by the factories of this module, composed with `+`.

    Attributes:
        kind: what to do.
        site: where the activation lives; "adapter" for `adapter_off`, "attn_scores" for `cut_attention`.
        layers: which layers; None for all.
        heads: which heads (key/value heads at k, v, rot_k); None for all.
        span: which tokens: prefix, query, postfix, response, prompt, all, or a sub-span of the template.
        tokens: indices within the span; None for the whole span.
        phase: prompt tokens, generated (or teacher-forced response) tokens, or both.
        rows: rows of the batch; None for all.
        tensors: vectors and donor activations, by name.
        options: numbers and names.
    """

    kind: str
    site: Site | OwnSite
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    span: str = "all"
    tokens: tuple[int, ...] | None = None
    phase: Phase = "both"
    rows: tuple[int, ...] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ACTIONS:
            raise LensError(f"intervention {self.kind!r} is not known: choose one of {', '.join(ACTIONS)}")
        if self.site == "adapter" and self.kind != "zero":
            raise LensError(
                f"{self.kind} at site 'adapter': what an adapter reads can only be switched off (adapter_off)"
            )
        if (self.site == "attn_scores") != (self.kind == "cut"):
            raise LensError(f"{self.kind} at site {self.site!r}: attention scores are cut or scaled by cut_attention")
        if self.site not in (*SITES, "adapter", "attn_scores"):
            raise LensError(f"site {self.site!r} is not known: choose one of {', '.join(SITES)}")
        if self.phase not in PHASES:
            raise LensError(f"phase {self.phase!r} is not known: choose one of {', '.join(PHASES)}")
        if self.heads is not None and self.site not in (*HEAD_SITES, "attn_scores"):
            raise LensError(f"site {self.site!r} has no heads: heads= goes with {', '.join(HEAD_SITES)}")
        for name in ("layers", "heads", "tokens", "rows"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(x) for x in ([value] if isinstance(value, int) else value)))

    @property
    def action(self) -> Action:
        """The rule that changes activations, one for each kind of intervention."""
        return ACTIONS[self.kind]

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
        parts += [
            f"{name}={value}" for name, value in self.options.items() if isinstance(value, (int, float, str, list))
        ]
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
        """The intervention that `Intervention.to_dict` described.

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
        """A description of all parts that JSON can hold."""
        return {"parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Interventions":
        """The interventions that `Interventions.to_dict` described.

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
            batch: the very batch whose ids will go through the model (or its placement, which is moved along).
            record: collects receipts and cached activations, if given.

        Raises:
            LensError: a layer, head, span or donor that does not fit this model and batch.
        """
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


def layer_ranges(layers: Sequence[int]) -> str:
    """Layers for a message: "0-29", or "1,3"."""
    if len(layers) > 2 and tuple(layers) == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


# ---------------------------------------------------------------- what happened


@dataclass
class Receipt:
    """Proof that an intervention happened: hook calls, cells touched, size of the change."""

    part: Intervention
    n_rows: int
    calls: int = 0
    cells: int = 0
    layers: set[int] = field(default_factory=set)
    squared_change: Tensor | None = None
    chunks: dict[tuple[Site, int], list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def change_norm(self) -> float:
        """Frobenius norm of everything that was changed."""
        return 0.0 if self.squared_change is None else float(self.squared_change.sqrt())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able row: cells are (row, token) pairs summed over layers."""
        return {
            "intervention": repr(self.part),
            "calls": self.calls,
            "cells": self.cells,
            "layers": len(self.layers),
            "change_norm": self.change_norm,
        }


@dataclass
class Record:
    """Receipts and kept activations of the interventions of one run."""

    receipts: list[Receipt] = field(default_factory=list)

    def open(self, parts: Sequence[Intervention], n_rows: int) -> list[Receipt]:
        """A receipt for each part; those that are already there, if their hooks are made again."""
        free, opened = list(self.receipts), []
        for part in parts:
            receipt = next((receipt for receipt in free if receipt.part is part), None)
            if receipt is None:
                receipt = Receipt(part, n_rows)
                self.receipts.append(receipt)
            else:
                free.remove(receipt)
            receipt.n_rows = max(receipt.n_rows, n_rows)
            opened.append(receipt)
        return opened

    def check(self) -> None:
        """Refuse a run in which an intervention touched nothing.

        Raises:
            LensError: it names the intervention.
        """
        for receipt in self.receipts:
            if receipt.cells == 0:
                missing = "no token of its span and phase was in the passes that were run"
                if receipt.part.site == "attn_scores":
                    missing += ", or none that stands behind what it is to read"
                raise LensError(f"{receipt.part} touched nothing ({receipt.calls} hook calls): {missing}")

    @property
    def activations(self) -> Activations:
        """What the `cache` interventions kept, all of one span.

        Raises:
            LensError: nothing was kept, or from different spans (then use `activations_of`).
        """
        kept = [receipt for receipt in self.receipts if receipt.chunks]
        if not kept or len({(r.part.span, r.part.tokens) for r in kept}) > 1:
            raise LensError(f"expected activations of one span, there are {len(kept)} kept: use activations_of(span)")
        return self.activations_of(kept[0].part.span)

    def activations_of(self, span: str) -> Activations:
        """The activations that were kept of one span.

        Raises:
            LensError: nothing was kept, or of different tokens, or of a part of the span only.
        """
        kept = [receipt for receipt in self.receipts if receipt.chunks and receipt.part.span == span]
        if not kept:
            raise LensError(f"nothing was kept of span {span!r}: add cache(..., span={span!r}) and run the model")
        if len({receipt.part.tokens for receipt in kept}) > 1:
            raise LensError(f"different tokens of span {span!r} were kept: use a record for each")
        chunks: dict[tuple[Site, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for receipt in kept:
            for key, parts in receipt.chunks.items():
                chunks.setdefault(key, []).extend(parts)
        return assemble(span, kept[0].part.tokens, chunks, kept[0].n_rows)

    def to_frame(self) -> Any:
        """One row per intervention: where it acted, and how much it changed."""
        import pandas as pd

        return pd.DataFrame([receipt.to_dict() for receipt in self.receipts])

    def __str__(self) -> str:
        return "\n".join(
            f"{r.part}: {r.cells} cells in {len(r.layers)} layers, {r.calls} calls, change {r.change_norm:.4g}"
            for r in self.receipts
        )


# ---------------------------------------------------------------- hooks


def hook_pairs(
    parts: Sequence[Intervention],
    model: HookedModel,
    batch: PromptBatch | Placement,
    record: Record | None = None,
    points: Any = None,
) -> list[HookPair]:
    """`(name, function)` pairs of several interventions, in order; see `Interventions.fwd_hooks`."""
    points = hook_points(model) if parts and points is None else points
    return [
        (hook_name(model, part.site, layer, points), _by_query(hook) if part.site == "attn_scores" else hook)
        for part, layer, hook in placed_hooks(parts, model, Placement.of(batch), record or Record())
    ]


def placed_hooks(
    parts: Sequence[Intervention], model: HookedModel, placement: Placement, record: Record
) -> list[tuple[Intervention, int, Callable[..., Tensor | None]]]:
    """What each intervention does in each of its layers, in order.

    Raises:
        LensError: one that does not fit this model and these rows, or is at no hook point.
    """
    found = []
    for part, receipt in zip(parts, record.open(parts, placement.total), strict=True):
        if part.site == "adapter":
            raise LensError(f"{part} is at no hook point of TransformerLens: use `with applied(...)`, or generate")
        layers = check_layers(part.layers, shape_of(model).n_layers)
        _check(part, model, placement, layers)
        in_place = writes_through(model, part.site)
        found += [(part, layer, _hook(part, layer, placement, receipt, in_place)) for layer in layers]
    return found


def adapter_hooks(
    parts: Sequence[Intervention], model: Any, batch: PromptBatch | Placement, record: Record
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Modules, and what is to be done to their input by a forward pre-hook, for interventions at site "adapter".

    Raises:
        LensError: a model without a LoRA adapter that can be switched off by token, or a span that a row lacks.
    """
    if parts:
        require_switchable(model)
    placement = Placement.of(batch)
    found: list[tuple[nn.Module, Callable[..., Any]]] = []
    for part, receipt in zip(parts, record.open(parts, placement.total), strict=True):
        placement.check(part.span, part.tokens, part.rows)
        for layer in check_layers(part.layers, n_layers_of(model)):
            hook = _hook(part, layer, placement, receipt)
            found += [(module, _before(hook)) for module in adapter_inputs(model, layer)]
    return found


def _by_query(change: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Attention scores [batch, head, query, key] as an activation of the query tokens."""

    def turned(scores: Tensor, hook: Any = None) -> Tensor | None:
        changed = change(scores.transpose(1, 2))
        return None if changed is None else changed.transpose(1, 2)

    return turned


def _before(hook: Callable[..., Tensor | None]) -> Callable[..., Any]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = hook(args[0])
        return None if changed is None else (changed, *args[1:])

    return before


def _check(part: Intervention, model: HookedModel, placement: Placement, layers: tuple[int, ...]) -> None:
    """Refuse what does not fit, before anything runs."""
    placement.check(part.span, part.tokens, part.rows)
    shape = shape_of(model)
    if part.heads is not None:
        count = shape.n_kv_heads if part.site in ("k", "v", "rot_k") else shape.n_heads
        wrong = [head for head in part.heads if not 0 <= head < count]
        if wrong or not part.heads:
            raise LensError(f"heads {list(part.heads)} asked at {part.site}, which has heads 0 to {count - 1}")
    part.action.check(part, placement, layers)


def _hook(
    part: Intervention, layer: int, placement: Placement, receipt: Receipt, in_place: bool = False
) -> Callable[..., Tensor | None]:
    heads = None if part.heads is None else torch.tensor(part.heads)
    return partial(_act, part, layer, placement, receipt, in_place, heads)


def _act(
    part: Intervention,
    layer: int,
    placement: Placement,
    receipt: Receipt,
    in_place: bool,
    heads: Int[Tensor, " head"] | None,
    activation: Tensor,
    hook: Any = None,
) -> Tensor | None:
    """What a hook makes of an activation; None leaves it."""
    receipt.calls += 1
    cells = _cells(part, placement, activation.shape[1])
    if part.site == "adapter":  # rows of a forking pass that are born later follow one that is off as well
        cells = cells.of_rows(activation.shape[0])
    if not len(cells):
        return None
    cells = cells.to(activation.device)
    receipt.cells += len(cells)
    receipt.layers.add(layer)
    old = activation[cells.rows, cells.columns]
    if not part.action.changes:
        _keep(part, layer, cells, old, receipt)
        return None
    chosen = old if heads is None else old[:, heads.to(old.device)]
    new = part.action.new_value(part, layer, chosen, cells, heads).to(activation.dtype)
    if heads is not None:
        new = old.index_copy(1, heads.to(old.device), new)
    change = part.action.squared_change(old.detach(), new.detach())
    before = receipt.squared_change  # of a layer that may be on another device
    receipt.squared_change = change if before is None else before + change.to(before.device)
    put = activation.index_put_ if in_place else activation.index_put
    return put((cells.rows, cells.columns), new)


def _cells(part: Intervention, placement: Placement, width: int) -> Cells:
    """What a part touches of an activation of `width` columns."""
    which = (part.span, part.tokens, part.phase, part.rows)
    cells = placement.cells(*which, width)
    if part.site != "attn_scores":
        return cells
    tokens = part.options["from_tokens"]
    return placement.edges(cells, part.options["read_from"], None if tokens is None else tuple(tokens), which)


def _keep(part: Intervention, layer: int, cells: Cells, value: Tensor, receipt: Receipt) -> None:
    if part.options["detach"]:
        name = part.options["dtype"]
        value = value.detach().to(part.options["device"], dtype=getattr(torch, name) if name else None)
    assert part.site != "adapter", "only what changes acts there"
    assert part.site != "attn_scores", "likewise"
    receipt.chunks.setdefault((part.site, layer), []).append((cells.origins, cells.slots, value))
