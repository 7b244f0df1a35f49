"""The formulas, each once: tensors in, tensors out.

Nothing here knows a model. Axis names in the shape annotations: ``batch`` rows, ``pos`` positions of a
padded batch, ``token`` positions of one span, ``vocab``, ``kv_head``, ``d_head``. Half precision inputs are
computed in float32. KL and log-probabilities are in nats.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError

# --- distributions over the vocabulary ---------------------------------------------------------------


def kl_per_token(
    base_logits: Float[Tensor, "batch pos vocab"],
    logits: Float[Tensor, "batch pos vocab"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos"]:
    """KL(base ‖ x) in nats at every position: the sum over the vocabulary, divided by nothing.

    The narrow-misalignment code divides by tokens × vocabulary as well, which is why its weights are 1e5
    to 1e6; divide their weight by the vocabulary size to get a weight for this unit.

    Positions outside ``mask`` are not computed and come back as NaN, so that a mean which forgot the mask
    shows; take the mean with ``masked_mean``. Gradients flow through the masked positions only.
    """
    if mask is None:
        return _kl(base_logits, logits)
    kl = _kl(base_logits[mask], logits[mask])
    return torch.full(mask.shape, math.nan, dtype=kl.dtype, device=kl.device).masked_scatter(mask, kl)


def _kl(base_logits: Float[Tensor, "*any vocab"], logits: Float[Tensor, "*any vocab"]) -> Float[Tensor, "*any"]:
    log_p = _at_least_float32(base_logits).log_softmax(-1)
    log_q = _at_least_float32(logits).log_softmax(-1)
    # Some heads set unused vocabulary rows to -inf; 0 · (−inf − −inf) is 0 here, not NaN.
    difference = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    return (log_p.exp() * difference).sum(-1)


def token_log_probs(
    logits: Float[Tensor, "batch pos vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """log p(targets[b, i]) in nats under ``logits[b, i]``; the caller has aligned (shifted) the two."""
    logits = _at_least_float32(logits)
    return logits.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def masked_mean(
    values: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], *, per_row: bool = False
) -> Float[Tensor, "*rows"]:
    """Mean of ``values`` where ``mask`` is True: one number over all rows, or one for each row.

    What stands outside the mask (NaN included) touches neither value nor gradient. Raises ``LensError``
    when there is nothing to average.
    """
    count = mask.sum(-1) if per_row else mask.sum()
    if bool((count == 0).any()):
        where = "in at least one row" if per_row else "anywhere"
        raise LensError(f"the mask is True nowhere {where}, so there is no mean; pass rows with marked positions")
    kept = torch.where(mask, values, torch.zeros_like(values))
    return (kept.sum(-1) if per_row else kept.sum()) / count


# --- directions --------------------------------------------------------------------------------------


def project_out(x: Float[Tensor, "*any d"], direction: Float[Tensor, "d"]) -> Float[Tensor, "*any d"]:
    """x − (x·v̂)v̂, directional ablation. ``direction`` need not be of unit length, but not zero."""
    return set_projection(x, direction, 0.0)


def set_projection(
    x: Float[Tensor, "*any d"], direction: Float[Tensor, "d"], value: float | Float[Tensor, "*#any"]
) -> Float[Tensor, "*any d"]:
    """Clamp the coefficient along the unit direction: x + (value − x·v̂)v̂, so that x·v̂ = value after it."""
    unit = _unit(direction).to(x.device)
    wide = _at_least_float32(x)
    unit = unit.to(wide.dtype)
    coefficient = wide @ unit
    moved: Tensor = wide + (value - coefficient).unsqueeze(-1) * unit
    return moved.to(x.dtype)


def orthogonal_noise(x: Float[Tensor, "*any"], epsilon: float, generator: torch.Generator) -> Float[Tensor, "*any"]:
    """x′ = √(1−ε²)·x + ε·y with y random, y ⟂ x and ‖y‖ = ‖x‖, all entries of ``x`` as one vector.

    The norm stays, the cosine to ``x`` becomes √(1−ε²): the perturbation of the stability measure.
    """
    if not 0.0 <= epsilon <= 1.0:
        raise LensError(f"epsilon is the share of noise and lies in 0..1, got {epsilon}")
    if x.numel() < 2:
        raise LensError(f"a tensor of {x.numel()} entries has no orthogonal direction; it takes at least 2")
    unit = _unit(x.flatten())
    drawn = _normal_like(unit, generator)
    noise = drawn - (drawn @ unit) * unit
    # Drawn with the seed of `x` itself, the noise is `x`, and what is left of it rounding errors: draw again.
    while noise.norm() < 1e-3 * drawn.norm():
        drawn = _normal_like(unit, generator)
        noise = drawn - (drawn @ unit) * unit
    y = noise * (_at_least_float32(x).norm() / noise.norm())
    noisy: Tensor = math.sqrt(1 - epsilon**2) * x + epsilon * y.view_as(x)
    return noisy.to(x.dtype)


def norm_matched_random(v: Float[Tensor, "*any"], generator: torch.Generator) -> Float[Tensor, "*any"]:
    """A random direction with ‖random‖ = ‖v‖ (not √d times it), the control for any vector."""
    wide = _at_least_float32(v)
    noise = _normal_like(wide, generator)
    scaled: Tensor = noise * (wide.norm() / noise.norm())
    return scaled.to(v.dtype)


def _unit(direction: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
    wide = _at_least_float32(direction)
    norm: Tensor = wide.norm()
    if not (torch.isfinite(norm) and norm > 0):
        raise LensError(f"a direction needs a finite length above zero, this one has length {norm.item()}")
    unit: Tensor = wide / norm
    return unit


def _normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn where the generator lives: the same seed then gives the same noise on every device.
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- training penalty --------------------------------------------------------------------------------


def relative_kv_drift(
    k: Float[Tensor, "*batch token kv_head d_head"],
    k0: Float[Tensor, "*batch token kv_head d_head"],
    v: Float[Tensor, "*batch token kv_head d_head"],
    v0: Float[Tensor, "*batch token kv_head d_head"],
) -> Float[Tensor, "*batch"]:
    """TReFT (2606.06667 eq. 2-3) for one layer: mean over tokens of ‖k−k₀‖²/‖k₀‖² + ‖v−v₀‖²/‖v₀‖².

    ``k0`` and ``v0`` are the base model's. Norms run over all key-value heads together. No unit; the mean
    over layers is the caller's. These are the real keys and values, as in the equation; the TReFT code
    takes projections of the residual stream before the input layer norm instead. A token whose base key or
    value is exactly zero gives inf or NaN.
    """
    if k.shape[-3] == 0:
        raise LensError("the drift of a span without tokens is not defined; choose a span which this template has")
    return relative_square(k, k0).mean(-1) + relative_square(v, v0).mean(-1)


def relative_square(
    x: Float[Tensor, "*batch token heads d"], x0: Float[Tensor, "*batch token heads d"]
) -> Float[Tensor, "*batch token"]:
    """‖x−x₀‖²/‖x₀‖² of every token, over all heads together, in at least float32."""
    x, x0 = _at_least_float32(x), _at_least_float32(x0)
    return (x - x0).square().sum((-2, -1)) / x0.square().sum((-2, -1))
