"""The formulas, each once: tensors or arrays in, tensors or estimates out.

Nothing here knows a model. Axis names in the shape annotations: ``batch`` rows, ``pos`` positions of a
padded batch, ``token`` positions of one span, ``vocab``, ``kv_head``, ``d_head``. Half precision inputs are
computed in float32. KL and log-probabilities are in nats.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from piggyback_lens.errors import LensError

Array = npt.NDArray[np.float64]
MIN_PROMPTS = 3  # below this a bootstrap over prompts says nothing


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
    return _relative_square(k, k0).mean(-1) + _relative_square(v, v0).mean(-1)


def _relative_square(
    x: Float[Tensor, "*batch token kv_head d_head"], x0: Float[Tensor, "*batch token kv_head d_head"]
) -> Float[Tensor, "*batch token"]:
    x, x0 = _at_least_float32(x), _at_least_float32(x0)
    return (x - x0).square().sum((-2, -1)) / x0.square().sum((-2, -1))


def require_enough(n: int, what: str = "prompts") -> None:
    """Refuse what no interval can be made of, before anything runs.

    Raises:
        LensError: fewer than three.
    """
    if n < MIN_PROMPTS:
        raise LensError(f"{n} {what} given, an interval needs at least {MIN_PROMPTS}: give more")


# --- estimates over prompts --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its bootstrap interval over ``n`` prompts.

    ``reason`` is empty unless ``value`` or the interval is NaN, and then says why. ``n_missing`` counts the
    prompts that were left out because a measurement was missing (NaN).
    """

    value: float
    low: float
    high: float
    n: int
    reason: str = ""
    n_missing: int = 0

    def __str__(self) -> str:
        text = f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n = {self.n}"
        text += f", {self.n_missing} missing)" if self.n_missing else ")"
        return f"{text}: {self.reason}" if self.reason else text


def interval_text(value: float, low: float, high: float) -> str:
    """``38.2 [35.1, 41.0]``, with as many digits as the largest of the three asks for."""
    if not math.isfinite(value):
        return "missing"
    size = max(abs(number) for number in (value, low, high) if math.isfinite(number))
    digits = 1 if size >= 2 else 2 if size >= 0.1 or size == 0 else 1 - math.floor(math.log10(size))
    shown, low_shown, high_shown = (f"{round(number, digits) + 0.0:.{digits}f}" for number in (value, low, high))
    interval = f"[{low_shown}, {high_shown}]" if math.isfinite(low) and math.isfinite(high) else "(no interval)"
    return f"{shown} {interval}"


def percent(value: float, low: float, high: float) -> str:
    """A fraction with its interval as text, ``57 % [39, 71]``; "undefined" where it is NaN."""
    if not math.isfinite(value):
        return "undefined"
    interval = f" [{round(100 * low)}, {round(100 * high)}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{round(100 * value)} %{interval}"


def mean_interval(values: npt.ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over prompts, one value for each prompt (average several samples of one prompt first).

    Interval: BCa bootstrap, or percentile where BCa is not defined. Values which are all equal give an
    interval without width: of a rate of 0 in few prompts it says less than it seems to.
    """
    (kept,), n_missing = _complete_prompts(values=values)
    return _estimate(
        lambda x, axis=-1: x.mean(axis), (kept,), n_missing, level=level, n_resamples=n_resamples, seed=seed
    )


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """mean(a) − mean(b) for two measurements of the same prompts, in the same order."""
    (x, y), n_missing = _complete_prompts(a=a, b=b)
    return _estimate(
        lambda d, axis=-1: d.mean(axis), (x - y,), n_missing, level=level, n_resamples=n_resamples, seed=seed
    )


def spread(
    finetuned: npt.ArrayLike,
    base: npt.ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Behaviour off-topic, finetuned minus base, on the same prompts."""
    return paired_difference(finetuned, base, level=level, n_resamples=n_resamples, seed=seed)


def nearer(
    one: npt.ArrayLike,
    other: npt.ArrayLike,
    base: npt.ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """|mean(other) − mean(base)| − |mean(one) − mean(base)| on the same prompts; above 0 if `one` is nearer to base.

    Distances, so that going past the base counts as leaving it.
    """
    (x, y, b), n_missing = _complete_prompts(one=one, other=other, base=base)

    def statistic(x: Array, y: Array, b: Array, axis: int = -1) -> Any:  # a number or an array, as mean() gives
        return np.abs((y - b).mean(axis)) - np.abs((x - b).mean(axis))

    return _estimate(statistic, (x, y, b), n_missing, level=level, n_resamples=n_resamples, seed=seed)


def recovery(
    patched: npt.ArrayLike,
    finetuned: npt.ArrayLike,
    base: npt.ArrayLike,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """(patched − finetuned) / (base − finetuned) of the means over the same prompts; 1 = fully restored.

    Negative: away from base; above 1: beyond it. NaN with the reason where the interval of base − finetuned
    includes 0 (nothing there to recover). Fewer than three complete prompts give the value without an interval.
    """
    (p, f, b), n_missing = _complete_prompts(patched=patched, finetuned=finetuned, base=base)
    n = len(p)
    if n < MIN_PROMPTS:
        reason = f"no interval: only {n} complete prompts, recovery needs at least {MIN_PROMPTS}"
        possible = float((b - f).mean()) if n else 0.0
        value = float((p - f).mean()) / possible if possible else math.nan
        return replace(_undefined(reason, n, n_missing), value=value)
    gap = paired_difference(b, f, level=level, n_resamples=n_resamples, seed=seed)
    if gap.low <= 0 <= gap.high:
        interval = f"{gap.value:.3g} [{gap.low:.3g}, {gap.high:.3g}]"
        return _undefined(f"base and finetuned do not differ beyond noise (difference {interval})", n, n_missing)

    def ratio(moved: Array, possible: Array, axis: int = -1) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(moved.mean(axis) / possible.mean(axis))

    return _estimate(ratio, (p - f, b - f), n_missing, level=level, n_resamples=n_resamples, seed=seed)


def em_f1(in_domain: float, general: float) -> float:
    """2(100−ID)·EM / ((100−ID)+EM): misaligned in the domain and aligned outside it, 0..100.

    ``in_domain`` (ID) and ``general`` (EM) are mean alignment scores, 0..100. A missing score (NaN) gives
    NaN; ID = 100 with EM = 0 gives 0.
    """
    for name, score in (("in_domain", in_domain), ("general", general)):
        if not (math.isnan(score) or 0 <= score <= 100):
            raise LensError(f"{name} is an alignment score of 0..100, got {score}")
    narrow = 100 - in_domain
    return 0.0 if narrow + general == 0 else 2 * narrow * general / (narrow + general)


def _undefined(reason: str, n: int, n_missing: int) -> Estimate:
    return Estimate(math.nan, math.nan, math.nan, n, reason, n_missing)


def _complete_prompts(**columns: npt.ArrayLike) -> tuple[tuple[Array, ...], int]:
    """The columns without the prompts of which any column is NaN, and how many those were."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(array.ndim != 1 for array in arrays.values()) or len(set(shapes.values())) > 1:
        raise LensError(f"expected one value for each prompt, the same prompts in every argument; got shapes {shapes}")
    table = np.stack(list(arrays.values()))
    if np.isinf(table).any():
        raise LensError("a measurement is infinite; pass NaN for a missing one and look where the infinity came from")
    complete = ~np.isnan(table).any(0)
    return tuple(table[:, complete]), int((~complete).sum())


def _estimate(
    statistic: Callable[..., Array],
    samples: tuple[Array, ...],
    n_missing: int,
    *,
    level: float,
    n_resamples: int,
    seed: int,
) -> Estimate:
    if not 0 < level < 1:
        raise LensError(f"level is the coverage of the interval, between 0 and 1, got {level}")
    n = len(samples[0])
    if n == 0:
        return _undefined("no prompt has a measurement", n, n_missing)
    value = float(statistic(*samples))
    if n < MIN_PROMPTS:
        return Estimate(value, math.nan, math.nan, n, f"only {n} prompts, too few for an interval", n_missing)
    low, high = _bootstrap_interval(statistic, samples, level, n_resamples, seed)
    return Estimate(value, low, high, n, "", n_missing)


def _bootstrap_interval(
    statistic: Callable[..., Array], samples: tuple[Array, ...], level: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    from scipy.stats import bootstrap

    settings = {
        "paired": True,
        "vectorized": True,
        "confidence_level": level,
        "n_resamples": n_resamples,
        "batch": max(1, 4_000_000 // len(samples[0])),  # bounds the memory of resamples × prompts
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of degenerate (constant) data; answered below
        result = bootstrap(samples, statistic, method="BCa", rng=np.random.default_rng(seed), **settings)
    interval = result.confidence_interval
    if np.isfinite([interval.low, interval.high]).all():
        return float(interval.low), float(interval.high)
    # Percentile interval of the same resamples. A ratio may be ±inf in a resample (kept) or 0/0 (dropped).
    resampled = result.bootstrap_distribution
    tails = np.quantile(resampled[~np.isnan(resampled)], [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(tails[0]), float(tails[1])
