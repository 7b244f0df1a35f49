"""Estimates over questions, with intervals that cover: means, differences, recoveries, p-values.

The questions are what is sampled; answers to one question are one cluster, whose mean counts. Values of any size get
Student's t, a part 1/n wider (Fieller's form for a recovery). Rates get Clopper-Pearson limits for the effective number
of answers (Korn and Graubard 1998), put together for differences and recoveries by their squares (MOVER; Zou and Donner
2008). `benchmarks/coverage.py` measures how often each of them covers; docs/coverage.md has its table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from piggyback_lens.errors import LensError

Array = npt.NDArray[np.float64]
MIN_PROMPTS = 3
"""Fewer questions than this give no interval."""
FLIPS = 10_000
"""Random sign flips of a permutation test with too many questions for all of them."""
EXACT = 13
"""Up to so many questions all sign flips are tried."""
FARTHEST = 1e7


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval over `n` questions.

    `reason` is empty unless `value` or the interval is NaN or an event was never or always seen, and then says so.
    `n_missing` counts the answers that were left out because a measurement was missing (NaN).
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


def is_rate(unit: str, *values: npt.ArrayLike) -> bool:
    """Whether a behaviour of this unit is a rate here: all values are 0 or 1 (means of several answers are not)."""
    columns = [np.asarray(column, dtype=float) for column in values]
    return unit.startswith("rate") and all(bool(np.isin(c[~np.isnan(c)], (0, 1)).all()) for c in columns)


def require_enough(n: int, what: str = "prompts") -> None:
    """Refuse what no interval can be made of, before anything runs.

    Raises:
        LensError: fewer than three.
    """
    if n < MIN_PROMPTS:
        raise LensError(f"{n} {what} given, an interval needs at least {MIN_PROMPTS}: give more")


# ---------------------------------------------------------------- the estimates


def mean_interval(
    values: npt.ArrayLike,
    questions: Sequence[Any] | None = None,
    *,
    rate: bool | None = None,
    pooled: bool = False,
    level: float = 0.95,
) -> Estimate:
    """Mean over questions, each the mean of its answers.

    Args:
        values: one per answer, NaN where missing.
        questions: which question each answer is to; None if every answer is to another.
        rate: whether values are 0 or 1; None looks at them (where all are 0, they are taken as no rate).
        pooled: the mean over all answers instead, in which questions count by their answers; still one cluster each.
        level: how often the interval is to cover.

    Raises:
        LensError: shapes that differ, or an infinite value.
    """
    return _table({"values": values}, questions, rate, level, pooled=pooled).estimate([1.0])


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    questions: Sequence[Any] | None = None,
    *,
    rate: bool | None = None,
    pooled: bool = False,
    level: float = 0.95,
) -> Estimate:
    """mean(a) − mean(b) for two measurements of the same questions, in the same order; arguments as `mean_interval`."""
    return _table({"a": a, "b": b}, questions, rate, level, pooled=pooled).estimate([1.0, -1.0])


def spread(
    finetuned: npt.ArrayLike,
    base: npt.ArrayLike,
    questions: Sequence[Any] | None = None,
    *,
    rate: bool | None = None,
    level: float = 0.95,
) -> Estimate:
    """Behaviour off-topic, finetuned minus base, on the same questions."""
    return paired_difference(finetuned, base, questions, rate=rate, level=level)


def second_difference(
    one: tuple[npt.ArrayLike, npt.ArrayLike],
    other: tuple[npt.ArrayLike, npt.ArrayLike],
    questions: Sequence[Any] | None = None,
    *,
    rate: bool | None = None,
    level: float = 0.95,
) -> Estimate:
    """(a − b) − (c − d) of the pairs `one` = (a, b) and `other` = (c, d), all to the same questions: of two spreads."""
    table = _table(dict(zip("abcd", (*one, *other), strict=True)), questions, rate, level)
    return table.estimate([1.0, -1.0, -1.0, 1.0])


def nearer(one: npt.ArrayLike, other: npt.ArrayLike, base: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """|mean(other) − mean(base)| − |mean(one) − mean(base)| on the same questions; above 0 if `one` is nearer to base.

    Distances, so that going past the base counts as leaving it; the interval takes the two directions as found.
    """
    table = _table({"one": one, "other": other, "base": base}, None, None, level)
    x, y, b = table.means.mean(1) if table.n else (0.0, 0.0, 0.0)
    first, second = np.sign(y - b), np.sign(x - b)
    return table.estimate([-second, first, second - first])


def recovery(
    patched: npt.ArrayLike,
    finetuned: npt.ArrayLike,
    base: npt.ArrayLike,
    questions: Sequence[Any] | None = None,
    *,
    rate: bool | None = None,
    pooled: bool = False,
    level: float = 0.95,
) -> Estimate:
    """(patched − finetuned) / (base − finetuned) of the means over the same questions; 1 = fully restored.

    Negative: away from base; above 1: beyond it. NaN with the reason where the interval of base − finetuned
    includes 0 (nothing there to recover). Fewer than three questions give the value without an interval.
    """
    columns = {"patched": patched, "finetuned": finetuned, "base": base}
    table = _table(columns, questions, rate, level, pooled=pooled)
    n, missing = table.n, table.n_missing
    if n < MIN_PROMPTS:
        p, f, b = table.means.mean(1) if n else (0.0, 0.0, 0.0)
        reason = f"no interval: only {n} complete prompts, recovery needs at least {MIN_PROMPTS}"
        return replace(_undefined(reason, n, missing), value=float((p - f) / (b - f)) if b != f else math.nan)
    gap = table.estimate([0.0, -1.0, 1.0])
    if gap.low <= 0 <= gap.high:
        interval = f"{gap.value:.3g} [{gap.low:.3g}, {gap.high:.3g}]"
        return _undefined(f"base and finetuned do not differ beyond noise (difference {interval})", n, missing)
    p, f, b = table.means.mean(1)
    found = float((p - f) / (b - f))

    def contains(share: float) -> bool:
        _, low, high = table.limits([1.0, share - 1.0, -share])
        return low <= 0 <= high

    return Estimate(found, _edge(contains, found, -1.0), _edge(contains, found, 1.0), n, "", missing)


def permutation_p(
    a: npt.ArrayLike, b: npt.ArrayLike, questions: Sequence[Any] | None = None, *, seed: int = 0
) -> float:
    """Two-sided p-value of no difference between two measurements of the same questions.

    Paired permutation test: the signs of the questions' differences are flipped, all ways up to 13 questions, 10,000
    random ways beyond. NaN without a question.
    """
    table = _table({"a": a, "b": b}, questions, None, 0.95)
    if not table.n:
        return math.nan
    differences = table.means[0] - table.means[1]
    if table.n <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**table.n)[:, None] >> np.arange(table.n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, table.n))
    flipped = np.abs(signs @ differences)
    as_far = int((flipped >= abs(differences.sum()) * (1 - 1e-12)).sum())
    return as_far / len(flipped) if table.n <= EXACT else (as_far + 1) / (len(flipped) + 1)


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


# ---------------------------------------------------------------- how


@dataclass(frozen=True)
class _Table:
    """Means of every question under every condition, and how many answers they are of.

    Of a pooled table they are m + (w/w̄)(mean − m), with the mean m over all answers and w answers to the question: the
    linearised ratio, whose mean is m.
    """

    means: Array  # condition x question
    sizes: Array
    rate: bool
    level: float
    n_missing: int

    @property
    def n(self) -> int:
        return int(self.means.shape[1])

    def estimate(self, weights: Sequence[float]) -> Estimate:
        """Σ weight · mean, with its interval."""
        if not self.n:
            return _undefined("no prompt has a measurement", 0, self.n_missing)
        value = float(np.dot(weights, self.means.mean(1)))
        if self.n < MIN_PROMPTS:
            reason = f"only {self.n} prompts, too few for an interval"
            return Estimate(value, math.nan, math.nan, self.n, reason, self.n_missing)
        _, low, high = self.limits(weights)
        return Estimate(value, low, high, self.n, self._bound(), self.n_missing)

    def limits(self, weights: Sequence[float]) -> tuple[float, float, float]:
        """Σ weight · mean and the ends of its interval."""
        w = np.asarray(weights, dtype=float)
        if not self.rate:
            combined = w @ self.means
            # A part 1/n wider than normal values need: so it covers for skewed ones too (coverage.py).
            half = (1 + 1 / self.n) * _student(self.n - 1, self.level) * combined.std(ddof=1) / math.sqrt(self.n)
            return float(combined.mean()), float(combined.mean() - half), float(combined.mean() + half)
        value, below, above = 0.0, 0.0, 0.0
        for weight, own, sizes in zip(w, self.means, self.sizes, strict=True):
            rate, low, high = _rate_limits(own, sizes, self.level)
            down, up = (rate - low, high - rate) if weight >= 0 else (high - rate, rate - low)
            value, below, above = value + weight * rate, below + (weight * down) ** 2, above + (weight * up) ** 2
        return float(value), float(value - math.sqrt(below)), float(value + math.sqrt(above))

    def _bound(self) -> str:
        """Where an event was never or always seen: that one end of the interval is all that is known."""
        rate = _rate(self.means)
        if not self.rate or len(self.means) > 1 or 0 < rate < 1:
            return ""
        answers, times = int(self.sizes.sum()), "no event" if rate == 0 else "the event every time"
        text = f"{times} in {answers} answers"
        if answers == self.n:
            return text
        _, low, high = _exact_limits(rate, answers, self.level)
        bound = f"at most {high:.2g}" if rate == 0 else f"at least {low:.2g}"
        return f"{text} to {self.n} questions: the interval is over questions ({bound} if answers were independent)"


def _table(
    columns: dict[str, npt.ArrayLike],
    questions: Sequence[Any] | None,
    rate: bool | None,
    level: float,
    *,
    pooled: bool = False,
) -> _Table:
    if not 0 < level < 1:
        raise LensError(f"level is the coverage of the interval, between 0 and 1, got {level}")
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    one = next(iter(arrays.values()))
    if any(array.ndim != 1 for array in arrays.values()) or len(set(shapes.values())) > 1:
        raise LensError(f"expected one value for each prompt, the same prompts in every argument; got shapes {shapes}")
    if questions is not None and len(questions) != len(one):
        raise LensError(f"{len(one)} values and {len(questions)} questions: name the question of every value")
    table = np.stack(list(arrays.values()))
    if np.isinf(table).any():
        raise LensError("a measurement is infinite; pass NaN for a missing one and look where the infinity came from")
    order: dict[Any, int] = {}
    places = [order.setdefault(q, len(order)) for q in (range(len(one)) if questions is None else questions)]
    sums, sizes = np.zeros((len(table), len(order))), np.zeros((len(table), len(order)))
    for row, values in enumerate(table):
        known = ~np.isnan(values)
        np.add.at(sums[row], np.array(places, dtype=int)[known], values[known])
        np.add.at(sizes[row], np.array(places, dtype=int)[known], 1)
    complete = (sizes > 0).all(0)
    measured = table[~np.isnan(table)]
    binary = bool(np.isin(measured, (0, 1)).all())
    if rate and not binary:
        raise LensError("a rate was asked for, and there are values other than 0 and 1")
    seen = bool(measured.any()) if rate is None else rate
    missing = int(np.isnan(table).any(0).sum())
    means, sizes = sums[:, complete] / sizes[:, complete], sizes[:, complete]
    if pooled and complete.any():
        of_all = (means * sizes).sum(1, keepdims=True) / sizes.sum(1, keepdims=True)
        means = of_all + sizes / sizes.mean(1, keepdims=True) * (means - of_all)
    return _Table(means, sizes, binary and seen, level, missing)


def _rate(means: Array) -> float:
    """A mean of rates, without what rounding leaves of 0 and 1."""
    return float(np.clip(np.round(means.mean(), 12), 0, 1))


def _rate_limits(means: Array, sizes: Array, level: float) -> tuple[float, float, float]:
    """A rate and its limits, for as many independent answers as the scatter of the questions is worth."""
    n, answers, rate = len(means), sizes.sum(), _rate(means)
    if answers == n or rate in (0, 1):  # without events nothing says how alike the answers to one question are
        return _exact_limits(rate, n, level)
    variance = means.var(ddof=1) / n
    effective = min(answers, rate * (1 - rate) / variance) if variance > 0 else answers
    return _exact_limits(rate, effective * (_student(10**6, level) / _student(n - 1, level)) ** 2, level)


def _exact_limits(rate: float, n: float | int, level: float) -> tuple[float, float, float]:
    """Clopper-Pearson, for any number of answers."""
    from scipy.special import betaincinv

    tail, events = (1 - level) / 2, rate * n
    low = 0.0 if events <= 0 else float(betaincinv(events, n - events + 1, tail))
    high = 1.0 if events >= n else float(betaincinv(events + 1, n - events, 1 - tail))
    return float(rate), low, high


def _student(degrees: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(max(degrees, 1), 0.5 + level / 2))


def _edge(contains: Callable[[float], bool], inside: float, side: float) -> float:
    """The end of an interval around a point that it contains; infinite where it has none."""
    step, start = 0.125, inside
    while contains(start + side * step):
        inside, step = start + side * step, 2 * step
        if step > FARTHEST:
            return side * math.inf
    outside = start + side * step
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if contains(middle) else (inside, middle)
    return inside


def _undefined(reason: str, n: int, n_missing: int) -> Estimate:
    return Estimate(math.nan, math.nan, math.nan, n, reason, n_missing)
