"""The kinds of interventions: what each of them does, and the functions that make them.

A new kind is a class here (see `Action`) and a function beside it; nothing else knows the kinds apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.interventions.activations import Activations
from piggyback_lens.interventions.hooks import Action, Intervention, Interventions, layer_ranges
from piggyback_lens.interventions.placement import OPEN, Cells, Placement
from piggyback_lens.maths import project_out, set_projection
from piggyback_lens.words import Phase, Site

ALL_RESIDUAL_SITES: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post")


# ---------------------------------------------------------------- what each kind does


class _Cache(Action):
    kind = "cache"
    changes = False

    def one_row_stands_for_all(self, part: Intervention) -> bool:
        return False

    def new_value(self, part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
        return old


class _Add(Action):
    kind = "add"

    def new_value(self, part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
        strength = part.options.get("strengths", {}).get(str(layer), part.options.get("strength"))
        steered: Tensor = old + strength * _fit(part, part.tensors["vector"], old).to(old.dtype)
        return steered


class _Ablate(Action):
    kind = "ablate"

    def new_value(self, part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
        return project_out(old, _fit(part, part.tensors["unit"], old))


class _Clamp(Action):
    kind = "clamp"

    def new_value(self, part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
        return set_projection(old, _fit(part, part.tensors["unit"], old), part.options["value"])


class _Zero(Action):
    kind = "zero"

    def new_value(self, part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
        return torch.zeros_like(old)


class _Cut(Action):
    """Attention weights times a factor before they are normalised: the logarithm of it, added to the scores."""

    kind = "cut"

    def check(self, part: Intervention, placement: Placement, layers: Sequence[int]) -> None:
        tokens = part.options["from_tokens"]
        placement.check(part.options["read_from"], None if tokens is None else tuple(tokens), part.rows)

    def one_row_stands_for_all(self, part: Intervention) -> bool:
        return all(token >= 0 for token in part.options["from_tokens"] or ())

    def new_value(self, part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
        read, scale = cells.read, part.options["scale"]
        assert read is not None
        if read.shape[1] != old.shape[-1]:
            raise LensError(
                f"attention looks at {old.shape[-1]} keys, the batch says {read.shape[1]}: pass the ids of this very "
                "batch to the model"
            )
        if scale > 0:
            return old + math.log(scale) * read[:, None].to(old.dtype)
        cut = old.masked_fill(read[:, None], -math.inf)
        left = (cut > torch.finfo(cut.dtype).min / 2).any(-1).all(-1)
        if not bool(left.all()):
            at = int((~left).nonzero()[0])
            raise LensError(
                f"{part} leaves token {int(cells.slots[at])} of {part.span} in row {int(cells.origins[at])} no key to "
                f"read in layer {layer}: leave its own position out of read_from, or give a scale above 0"
            )
        return cut

    def squared_change(self, old: Tensor, new: Tensor) -> Tensor:
        return super().squared_change(old.float().softmax(-1), new.float().softmax(-1))


class _Replace(Action):
    """What takes its values from activations that were kept: a tensor for each layer."""

    kind = "fill"

    def check(self, part: Intervention, placement: Placement, layers: Sequence[int]) -> None:
        missing = [layer for layer in layers if str(layer) not in part.tensors]
        if missing:
            raise LensError(f"{part} has no donor activations for layers {layer_ranges(missing)}")

    def new_value(self, part: Intervention, layer: int, old: Tensor, cells: Cells, heads: Tensor | None) -> Tensor:
        donor = self.chosen(part, part.tensors[str(layer)], cells).to(old.device)
        if heads is not None:
            donor = donor[:, heads.to(old.device)]
        if donor.shape != old.shape:
            raise LensError(f"{part} gives {tuple(donor.shape[1:])} per token, the model has {tuple(old.shape[1:])}")
        return donor

    def chosen(self, part: Intervention, donor: Tensor, cells: Cells) -> Tensor:
        """The donor's value for each cell, all heads; picked where the donor is, which may be large."""
        return donor.to(cells.rows.device).expand(len(cells), *donor.shape)


class _Resample(_Replace):
    kind = "resample"

    def one_row_stands_for_all(self, part: Intervention) -> bool:
        return False

    def chosen(self, part: Intervention, donor: Tensor, cells: Cells) -> Tensor:
        return donor[_drawn(part.options["seed"], cells, len(donor)).to(donor.device)]


class _Patch(_Replace):
    kind = "patch"

    def one_row_stands_for_all(self, part: Intervention) -> bool:
        return len(part.tensors["lengths"]) == 1

    def check(self, part: Intervention, placement: Placement, layers: Sequence[int]) -> None:
        super().check(part, placement, layers)
        _check_donor(part, placement)

    def chosen(self, part: Intervention, donor: Tensor, cells: Cells) -> Tensor:
        _check_covered(part, cells)
        cells = cells.to(donor.device)
        return donor[cells.origins if len(donor) > 1 else torch.zeros_like(cells.origins), cells.slots]


def _check_donor(part: Intervention, placement: Placement) -> None:
    lengths = part.tensors["lengths"].tolist()
    if len(lengths) not in (1, placement.total):
        raise LensError(f"the donor has {len(lengths)} rows, the run {placement.total}: keep it from the same prompts")
    for row in placement.chosen(part.rows):
        origin = placement.origins[row]
        donor, own = lengths[origin if len(lengths) > 1 else 0], placement.length(row, part.span, part.tokens)
        if donor != own and own < OPEN:  # open-ended spans are checked token by token, as they come
            raise LensError(
                f"span {part.span!r} has {donor} tokens in the donor and {own} in row {origin}: a patch needs equally "
                "many (compare_templates shows where the prompts differ)"
            )


def _drawn(seed: int, cells: Cells, count: int) -> Int[Tensor, " cell"]:
    """One of `count` for each cell, from seed, row and token alone, so that batches and phases do not matter."""
    cells = cells.to(torch.device("cpu"))
    origins, slots = cells.origins.tolist(), cells.slots.tolist()
    width = max(slots) + 1
    uniform = {origin: np.random.default_rng([seed, origin]).random(width) for origin in set(origins)}
    return torch.tensor([int(uniform[o][slot] * count) for o, slot in zip(origins, slots, strict=True)])


def _check_covered(part: Intervention, cells: Cells) -> None:
    """An open-ended span may reach tokens that the donor never had."""
    lengths = part.tensors["lengths"]
    cells = cells.to(lengths.device)  # where nothing waits for the answer
    own = lengths[cells.origins] if len(lengths) > 1 else lengths.expand(len(cells))
    if bool((cells.slots >= own).any()):
        at = int((cells.slots >= own).nonzero()[0])
        raise LensError(
            f"{part} reaches token {int(cells.slots[at])} of its span in row {int(cells.origins[at])}, where the donor "
            f"has {int(own[at])}: patch a closed span such as 'prompt', or keep the donor from the same tokens"
        )


def _fit(part: Intervention, vector: Tensor, old: Tensor) -> Tensor:
    if vector.shape[-1] != old.shape[-1]:
        raise LensError(f"{part} has a vector of length {vector.shape[-1]}, the activation has {old.shape[-1]}")
    return vector.to(old.device)


# ---------------------------------------------------------------- how they are made


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


def add(  # noqa: PLR0913
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

    Example:
        >>> vector = torch.ones(32)
        >>> with pair.using("finetuned") as model:
        ...     steered = generate(model, prompts, interventions=add(vector, layers=1), max_new_tokens=4)

    Example:
        >>> direction = torch.ones(32)
        >>> with pair.using("finetuned") as model:
        ...     without = generate(model, prompts, interventions=ablate(direction), max_new_tokens=4)
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
    """Zero ablation: every activation at the chosen cells becomes 0."""
    return _each(sites, "zero", layers=layers, heads=heads, span=span, tokens=tokens, phase=phase)


def adapter_off(
    span: str,
    *,
    layers: Sequence[int] | int | None = None,
    tokens: Sequence[int] | None = None,
    phase: Phase = "both",
) -> Intervention:
    """The finetune's LoRA adapter is off at these tokens: they are computed with the base's weights alone.

    Where all tokens before them are off too (the prefix, or prefix and query), their keys and values are exactly the
    base's; a postfix alone still reads the adapted query. Activated LoRA (arXiv 2504.12397) is the case of an adapter
    that is off before a given place. `GatedAdapter` trains an adapter that is off at the same tokens.

    Args:
        span: which tokens.
        layers: in which layers; None for all.
        tokens: indices within the span.
        phase: prompt, generation or both.

    Example:
        >>> with pair.using("finetuned") as model:
        ...     answers = generate(model, prompts, interventions=adapter_off("prefix"), max_new_tokens=4)
        >>> len(answers)
        3
    """
    return Intervention("zero", "adapter", _ints(layers), None, span, _ints(tokens), phase)


def cut_attention(
    read_by: str,
    read_from: str,
    *,
    scale: float = 0.0,
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    from_tokens: Sequence[int] | None = None,
    phase: Phase = "both",
) -> Intervention:
    """Attention knockout: what some tokens read from others is cut or scaled, per layer and head.

    The attention weights of these edges are multiplied by `scale` before they are normalised: log(scale) is added to
    the scores, and at 0 the keys are as if they were not there (arXiv 2304.14767). Both backends compute the scores by
    themselves, whatever attention the model was loaded with (sdpa, flash), so nothing has to be loaded as eager. Where
    the mask or a sliding window hides a key anyway, nothing changes. Generated and teacher-forced answer tokens are
    readers in span "response", which is in "all" too.

    Args:
        read_by: span of the tokens that read (query positions); spans are those of other interventions.
        read_from: span of the tokens that are read (key positions). Only those up to the reader's own position count.
        scale: 0 cuts, 1 changes nothing, above 1 strengthens.
        layers: in which layers; None for all.
        heads: query heads, also under grouped-query attention; None for all.
        tokens: indices within `read_by`; None for the whole span.
        from_tokens: indices within `read_from`; None for the whole span.
        phase: of the readers: prompt, generation or both.

    Raises:
        LensError: a scale that is negative or not finite; when it runs, a reader that would have no key left (its own
            position cut with all others), or a model whose attention shows its weights after they are normalised only
            (OPT, GPT-J and GPT-Neo among others).

    Example:
        >>> with pair.using("finetuned") as model:
        ...     answers = generate(model, prompts, interventions=cut_attention("query", "prefix"), max_new_tokens=4)
        >>> len(answers)
        3
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise LensError(f"scale {scale} given, expected a finite number from 0 (cut) up")
    kept = None if from_tokens is None else [int(token) for token in from_tokens]
    options = {"read_from": read_from, "from_tokens": kept, "scale": float(scale)}
    return Intervention(
        "cut", "attn_scores", _ints(layers), _ints(heads), read_by, _ints(tokens), phase, None, {}, options
    )


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


def _each(sites: Site | Sequence[Site], kind: str, **fields: Any) -> Interventions:
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
