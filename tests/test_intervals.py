"""Estimates over questions: known numbers, coverage, and what is refused."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from piggyback_lens import intervals
from piggyback_lens.errors import LensError

seeds = st.integers(0, 2**31 - 1)
fixed = settings(derandomize=True, max_examples=25, deadline=None)


def test_mean_interval_of_known_values_has_the_mean_and_encloses_it():
    estimate = intervals.mean_interval([1.0, 2.0, 3.0, 4.0, 10.0])
    assert estimate.value == 4.0
    assert estimate.low < 4.0 < estimate.high
    assert (estimate.n, estimate.n_missing, estimate.reason) == (5, 0, "")


def test_a_large_sample_gives_the_interval_of_the_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, size=2000)
    estimate = intervals.mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        estimate = intervals.mean_interval(rng.normal(1.0, 1.0, size=20))
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_higher_level_gives_a_wider_interval():
    values = np.random.default_rng(2).normal(size=15)
    narrow, wide = intervals.mean_interval(values, level=0.5), intervals.mean_interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    with pytest.raises(LensError, match="between 0 and 1"):
        intervals.mean_interval(values, level=95.0)


def test_constant_data_give_an_interval_without_width_and_without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = intervals.mean_interval([0.25] * 8)
        difference = intervals.paired_difference([5.0, 6.0, 7.0], [4.0, 5.0, 6.0])
        whole = intervals.recovery([40.0] * 5, [10.0] * 5, [40.0] * 5)
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0.25, 0.25)
    assert (difference.value, difference.low, difference.high) == (1.0, 1.0, 1.0)
    assert (whole.value, whole.low, whole.high) == (1.0, 1.0, 1.0)


def test_missing_values_leave_with_their_pair_and_are_counted():
    a = [1.0, math.nan, 3.0, 4.0, 9.0]
    b = [0.0, 5.0, math.nan, 1.0, 3.0]
    estimate = intervals.paired_difference(a, b)
    assert (estimate.n, estimate.n_missing) == (3, 2)
    assert estimate.value == pytest.approx((1 + 3 + 6) / 3)
    assert intervals.mean_interval([None, 1.0, 2.0, 3.0]).n_missing == 1


def test_too_few_prompts_give_no_interval_and_say_so():
    two = intervals.mean_interval([1.0, 3.0])
    assert two.value == 2.0
    assert math.isnan(two.low)
    assert math.isnan(two.high)
    assert "only 2 prompts" in two.reason
    none = intervals.mean_interval([math.nan, math.nan])
    assert math.isnan(none.value)
    assert (none.n, none.n_missing) == (0, 2)
    assert "no prompt" in none.reason


def test_prompts_that_do_not_match_and_infinities_are_refused():
    with pytest.raises(LensError, match="same prompts"):
        intervals.paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(LensError, match="one value for each prompt"):
        intervals.mean_interval([[1.0, 2.0]])
    with pytest.raises(LensError, match="infinite"):
        intervals.mean_interval([1.0, math.inf, 2.0])


def test_pairing_removes_the_variance_between_prompts():
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 10, size=30)
    paired = intervals.spread(prompts + 1 + rng.normal(0, 0.1, 30), prompts)
    assert paired.low == pytest.approx(1, abs=0.2)
    assert paired.high == pytest.approx(1, abs=0.2)
    assert paired.value == pytest.approx(1, abs=0.1)


def test_recovery_is_the_ratio_of_the_mean_changes_not_the_mean_of_the_ratios():
    finetuned, base = np.array([10.0, 12.0, 8.0, 10.0]), np.array([40.0, 50.0, 20.0, 50.0])
    patched = np.array([30.0, 14.0, 20.0, 40.0])
    estimate = intervals.recovery(patched, finetuned, base)
    assert estimate.value == pytest.approx((26 - 10) / (40 - 10))
    assert estimate.low < estimate.value < estimate.high
    assert intervals.recovery(finetuned, finetuned, base).value == 0.0
    assert intervals.recovery(base, finetuned, base).value == 1.0
    assert intervals.recovery(2 * finetuned - base, finetuned, base).value == pytest.approx(-1.0)


@fixed
@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_recovery_does_not_depend_on_unit_and_zero_of_the_measure(seed, scale, shift):
    rng = np.random.default_rng(seed)
    finetuned = rng.normal(10, 1, 12)
    base, patched = finetuned + rng.normal(8, 1, 12), finetuned + rng.normal(3, 1, 12)
    one = intervals.recovery(patched, finetuned, base)
    two = intervals.recovery(*(scale * x + shift for x in (patched, finetuned, base)))
    assert two.value == pytest.approx(one.value)
    assert (two.low, two.high) == pytest.approx((one.low, one.high))
    # a behaviour that falls recovers as one that rises
    assert intervals.recovery(-patched, -finetuned, -base).value == pytest.approx(one.value)


def test_recovery_is_undefined_with_the_reason_where_there_is_nothing_to_recover():
    rng = np.random.default_rng(0)
    base = rng.normal(size=20)
    noise = intervals.recovery(base, base + rng.normal(0, 1, 20), base)
    assert math.isnan(noise.value)
    assert "do not differ beyond noise" in noise.reason
    assert noise.n == 20
    assert "differ" in intervals.recovery([0.0] * 5, [0.0] * 5, [0.0] * 5).reason
    few = intervals.recovery([1.0, 1.0, math.nan], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert (few.value, math.isnan(few.low), math.isnan(few.high)) == (1.0, True, True)
    assert "no interval: only 2 complete prompts" in few.reason
    assert few.n_missing == 1


def test_recovery_of_rates_with_few_prompts_has_an_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = intervals.recovery([1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0])
    assert estimate.value == pytest.approx(0.6)
    assert estimate.low <= 0.6 <= estimate.high


def test_an_estimate_reads_as_number_interval_and_n():
    assert str(intervals.Estimate(0.5, 0.25, 0.75, 12)) == "0.5 [0.25, 0.75] (n = 12)"
    assert str(intervals.Estimate(0.5, 0.25, 0.75, 12, n_missing=2)) == "0.5 [0.25, 0.75] (n = 12, 2 missing)"
    assert str(intervals.Estimate(math.nan, math.nan, math.nan, 1, "why")).endswith(": why")


def test_em_f1_of_known_scores():
    # ID 20, EM 60: harmonic mean of 80 and 60
    assert intervals.em_f1(20.0, 60.0) == pytest.approx(2 * 80 * 60 / 140)
    assert intervals.em_f1(0.0, 100.0) == 100
    assert intervals.em_f1(100.0, 0.0) == 0
    assert intervals.em_f1(100.0, 90.0) == 0
    assert math.isnan(intervals.em_f1(math.nan, 50.0))
    for bad in ((-1.0, 50.0), (50.0, 101.0)):
        with pytest.raises(LensError, match=r"0\.\.100"):
            intervals.em_f1(*bad)


def test_nearer_compares_distances_of_means_so_that_overshooting_does_not_win():
    base, near, far, beyond = (np.full(20, v) + np.arange(20) % 2 for v in (10.0, 8.0, 4.0, 17.0))
    found = intervals.nearer(near, far, base)
    assert (found.value, found.low, found.high, found.n) == (4.0, 4.0, 4.0, 20)
    assert intervals.nearer(far, beyond, base).value == 1.0
    assert intervals.nearer(beyond, near, base).value == -5.0
    noisy = base + np.random.default_rng(0).normal(0, 3, 20)
    found = intervals.nearer(noisy, far, base)
    assert found.value == pytest.approx(6 - abs((noisy - base).mean()))
    assert found.low < found.value < found.high
    with pytest.raises(LensError):
        intervals.nearer(near, far[:3], base)


# ---------------------------------------------------------------- against the textbook


def test_differences_of_values_are_student_s_and_a_part_of_one_nth_wider():
    a, b = np.random.default_rng(5).normal(size=(2, 9))
    found = intervals.paired_difference(a, b)
    d = a - b
    half = 10 / 9 * stats.t.ppf(0.975, 8) * d.std(ddof=1) / 3
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))


def test_recoveries_of_values_are_fieller_s():
    rng = np.random.default_rng(6)
    finetuned = rng.normal(10, 1, 12)
    base, patched = finetuned + rng.normal(8, 1, 12), finetuned + rng.normal(3, 1, 12)
    found = intervals.recovery(patched, finetuned, base)
    x, y, t = patched - finetuned, base - finetuned, 13 / 12 * stats.t.ppf(0.975, 11)
    cov = np.cov(x, y) / 12
    a = y.mean() ** 2 - t**2 * cov[1, 1]
    b = -2 * (x.mean() * y.mean() - t**2 * cov[0, 1])
    c = x.mean() ** 2 - t**2 * cov[0, 0]
    assert (found.low, found.high) == pytest.approx(tuple(sorted(np.roots([a, b, c]))))


@pytest.mark.parametrize(("events", "n"), [(0, 12), (1, 12), (5, 12), (12, 12)])
def test_a_rate_with_one_answer_to_each_question_has_the_exact_interval(events, n):
    found = intervals.mean_interval([1.0] * events + [0.0] * (n - events), rate=True)
    exact = stats.binomtest(events, n).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert ("no event" in found.reason) == (events == 0)


def test_answers_to_one_question_are_one_cluster():
    alike = [1.0] * 10 + [0.0] * 110  # one of 12 questions, always
    questions = [i // 10 for i in range(120)]
    clustered, independent = intervals.mean_interval(alike, questions), intervals.mean_interval(alike)
    assert clustered.value == independent.value == pytest.approx(1 / 12)
    assert (clustered.n, independent.n) == (12, 120)
    assert clustered.high - clustered.low > 2 * (independent.high - independent.low)
    mixed = [1.0 if i % 10 == 0 else 0.0 for i in range(120)]  # one answer of ten to every question
    even = intervals.mean_interval(mixed, questions)
    free = intervals.mean_interval(mixed)
    assert even.high - even.low < 1.3 * (free.high - free.low)


def test_a_question_counts_once_however_many_answers_it_has():
    found = intervals.mean_interval([1.0, 3.0, 10.0, 10.0, 10.0, 10.0, 4.0], ["a", "a", "b", "b", "b", "b", "c"])
    assert (found.value, found.n) == (pytest.approx((2 + 10 + 4) / 3), 3)


def test_a_missing_answer_leaves_its_question_as_long_as_another_is_there():
    questions = ["a", "a", "b", "b", "c", "c", "d", "d"]
    a = [1.0, math.nan, 2.0, 2.0, 3.0, 5.0, math.nan, math.nan]
    found = intervals.paired_difference(a, [0.0] * 8, questions)
    assert (found.n, found.n_missing) == (3, 3)
    assert found.value == pytest.approx((1 + 2 + 4) / 3)


def test_no_event_in_many_answers_says_both_bounds():
    found = intervals.mean_interval([0.0] * 80, [i // 10 for i in range(80)], rate=True)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 8))
    assert "no event in 80 answers to 8 questions" in found.reason
    assert f"{1 - 0.025 ** (1 / 80):.2g}" in found.reason


def test_values_that_are_zero_are_no_rate_unless_it_is_said():
    assert intervals.mean_interval([0.0] * 8).high == 0
    assert intervals.mean_interval([0.0] * 8, rate=True).high > 0.3
    with pytest.raises(LensError, match="other than 0 and 1"):
        intervals.mean_interval([0.0, 2.0, 1.0], rate=True)


def test_permutation_p_is_that_of_all_sign_flips():
    rng = np.random.default_rng(8)
    a, b = rng.normal(0.8, 1, 10), rng.normal(0, 1, 10)
    expected = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=2**10, vectorized=True
    ).pvalue
    assert intervals.permutation_p(a, b) == pytest.approx(expected)
    many = intervals.permutation_p(np.tile(a, 4), np.tile(b, 4), seed=1)
    assert many == intervals.permutation_p(np.tile(a, 4), np.tile(b, 4), seed=1)
    assert many < expected
    assert intervals.permutation_p([1.0] * 4, [1.0] * 4) == 1
    assert math.isnan(intervals.permutation_p([math.nan], [1.0]))


@pytest.mark.parametrize("n", [6, 24])
@pytest.mark.parametrize("rates", [(0.9, 0.05), (0.05, 0.05)])
def test_differences_of_rates_cover(n, rates):
    rng, covered = np.random.default_rng(n), 0
    for _ in range(400):
        a, b = (rng.random(n) < rate for rate in rates)
        found = intervals.paired_difference(a.astype(float), b.astype(float), rate=True)
        covered += found.low <= rates[0] - rates[1] <= found.high
    assert covered / 400 >= 0.93
