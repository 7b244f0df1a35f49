"""Formulas against hand-computed values, algebra and independent oracles."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piggyback_lens import maths
from piggyback_lens.errors import LensError

fixed = settings(deadline=None, derandomize=True, max_examples=40, database=None)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# --- KL, log-probabilities, masked mean --------------------------------------------------------------


def test_kl_of_two_known_distributions_is_the_hand_computed_number_of_nats():
    # base (1/2, 1/2), x (1/4, 3/4): 0.5 ln 2 + 0.5 ln(2/3) = 0.5 ln(4/3)
    base = torch.tensor([[[0.5, 0.5]]]).log()
    x = torch.tensor([[[0.25, 0.75]]]).log()
    assert maths.kl_per_token(base, x).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    # the other direction is another number: 0.25 ln(1/2) + 0.75 ln(3/2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert maths.kl_per_token(x, base).item() == pytest.approx(expected, abs=1e-6)


def test_kl_does_not_shrink_with_the_vocabulary_or_the_number_of_tokens():
    base = torch.tensor([0.5, 0.5] + [0.0] * 98).log()
    x = torch.tensor([0.25, 0.75] + [0.0] * 98).log()
    kl = maths.kl_per_token(base.expand(3, 7, 100), x.expand(3, 7, 100))
    torch.testing.assert_close(kl, torch.full((3, 7), 0.5 * math.log(4 / 3)))


@fixed
@given(seeds)
def test_kl_is_zero_on_itself_not_negative_and_blind_to_a_constant(seed):
    a, b = normal(2, 3, 11, seed=seed) * 4, normal(2, 3, 11, seed=seed + 1) * 4
    assert torch.equal(maths.kl_per_token(a, a), torch.zeros(2, 3))
    kl = maths.kl_per_token(a, b)
    assert (kl > 0).all()
    torch.testing.assert_close(maths.kl_per_token(a + 3, b - 5), kl, atol=1e-5, rtol=1e-4)
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a.double()), torch.distributions.Categorical(logits=b.double())
    )
    torch.testing.assert_close(kl.double(), oracle, atol=1e-5, rtol=1e-4)


def test_masked_kl_is_nan_outside_the_mask_and_its_gradient_stays_inside():
    base, x = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    x[0, 2] = math.nan  # padding may hold anything
    x.requires_grad_(True)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    kl = maths.kl_per_token(base, x, mask)
    assert torch.equal(kl.isnan(), ~mask)
    torch.testing.assert_close(kl[mask], maths.kl_per_token(base, x)[mask])
    maths.masked_mean(kl, mask).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad.abs().sum(-1) > 0, mask)


def test_half_precision_logits_are_computed_in_float32():
    base, x = normal(1, 2, 50).bfloat16(), normal(1, 2, 50, seed=1).bfloat16()
    kl = maths.kl_per_token(base, x)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, maths.kl_per_token(base.float(), x.float()))
    assert maths.token_log_probs(x, torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float32


def test_token_log_probs_are_the_entries_of_the_log_softmax():
    logits, targets = normal(2, 4, 9), torch.tensor([[0, 3, 8, 1], [2, 2, 0, 5]])
    log_probs = maths.token_log_probs(logits, targets)
    for row in range(2):
        for i in range(4):
            p = math.exp(logits[row, i, targets[row, i]]) / sum(math.exp(z) for z in logits[row, i].tolist())
            assert log_probs[row, i].item() == pytest.approx(math.log(p), abs=1e-5)


def test_masked_mean_is_over_marked_entries_over_all_rows_or_per_row():
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.nan, math.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert maths.masked_mean(values, mask).item() == pytest.approx(7 / 3)
    torch.testing.assert_close(maths.masked_mean(values, mask, per_row=True), torch.tensor([1.5, 4.0]))


def test_masked_mean_of_nothing_is_refused():
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(LensError, match="at least one row"):
        maths.masked_mean(torch.ones(2, 2), mask, per_row=True)
    with pytest.raises(LensError, match="no mean"):
        maths.masked_mean(torch.ones(2, 2), torch.zeros_like(mask))


# --- directions --------------------------------------------------------------------------------------


def test_project_out_of_a_known_vector():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    torch.testing.assert_close(maths.project_out(x, torch.tensor([0.0, 7.0])), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))


@fixed
@given(seeds, st.floats(0.01, 100))
def test_projecting_out_leaves_nothing_along_the_direction_twice_is_once_and_length_does_not_matter(seed, length):
    x, v = normal(2, 3, 8, seed=seed, dtype=torch.float64), normal(8, seed=seed + 1, dtype=torch.float64)
    once = maths.project_out(x, v)
    torch.testing.assert_close(once @ v, torch.zeros(2, 3, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(maths.project_out(once, v), once)
    torch.testing.assert_close(maths.project_out(x, v * length), once)
    # what was removed is parallel to v
    removed = x - once
    cosine = torch.cosine_similarity(removed, v.expand_as(removed), dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine))


@fixed
@given(seeds, st.floats(-5, 5))
def test_set_projection_sets_the_coefficient_and_moves_nothing_else(seed, value):
    x, v = normal(2, 3, 8, seed=seed, dtype=torch.float64), normal(8, seed=seed + 1, dtype=torch.float64)
    clamped = maths.set_projection(x, v, value)
    torch.testing.assert_close(clamped @ (v / v.norm()), torch.full((2, 3), value, dtype=torch.float64))
    torch.testing.assert_close(maths.project_out(clamped, v), maths.project_out(x, v))


def test_set_projection_takes_a_value_per_position():
    x, v = normal(2, 3, 4), normal(4, seed=1)
    values = torch.arange(6.0).view(2, 3)
    torch.testing.assert_close(maths.set_projection(x, v, values) @ (v / v.norm()), values)


def test_a_direction_of_no_length_is_refused():
    for bad in (torch.zeros(4), torch.full((4,), math.nan)):
        with pytest.raises(LensError, match="length"):
            maths.project_out(torch.ones(2, 4), bad)


def test_directions_keep_the_dtype_of_x():
    x = normal(2, 8).bfloat16()
    assert maths.project_out(x, normal(8, seed=1)).dtype == torch.bfloat16
    assert maths.norm_matched_random(x, generator()).dtype == torch.bfloat16
    assert maths.orthogonal_noise(x, 0.5, generator()).dtype == torch.bfloat16


@fixed
@given(seeds, st.floats(0, 1))
def test_orthogonal_noise_keeps_the_norm_and_has_the_stated_cosine(seed, epsilon):
    x = normal(4, 16, seed=seed, dtype=torch.float64)
    noisy = maths.orthogonal_noise(x, epsilon, generator(seed + 1))
    assert noisy.norm().item() == pytest.approx(x.norm().item(), rel=1e-9)
    cosine = torch.cosine_similarity(noisy.flatten(), x.flatten(), dim=0).item()
    assert cosine == pytest.approx(math.sqrt(1 - epsilon**2), abs=1e-9)


def test_orthogonal_noise_repeats_with_its_seed_and_differs_between_seeds():
    x = normal(20)
    once, again, other = (maths.orthogonal_noise(x, 0.5, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)


def test_orthogonal_noise_refuses_what_has_no_orthogonal_noise():
    for x, epsilon, text in [
        (torch.ones(4), 1.5, "0..1"),
        (torch.ones(4), math.nan, "0..1"),
        (torch.ones(1), 0.5, "at least 2"),
        (torch.zeros(4), 0.5, "length"),
    ]:
        with pytest.raises(LensError, match=text):
            maths.orthogonal_noise(x, epsilon, generator())


@pytest.mark.parametrize("d", [2, 64, 5120])
def test_random_control_has_the_norm_of_the_vector_whatever_the_width(d):
    v = normal(d) * 3
    control = maths.norm_matched_random(v, generator(1))
    assert control.norm().item() == pytest.approx(v.norm().item(), rel=1e-5)
    assert torch.equal(control, maths.norm_matched_random(v, generator(1)))
    assert not torch.allclose(control, maths.norm_matched_random(v, generator(2)))


def test_random_control_of_a_wide_vector_is_nearly_orthogonal_to_it():
    v = normal(5120)
    assert abs(torch.cosine_similarity(v, maths.norm_matched_random(v, generator(1)), dim=0)) < 0.06


# --- drift -------------------------------------------------------------------------------------------


def test_drift_of_a_known_example():
    # two tokens, two heads of one dimension. keys: token 0 moves by (3, 4) from (0, 5): 25/25; token 1 stays
    k0 = torch.tensor([[[0.0], [5.0]], [[1.0], [1.0]]])
    k = torch.tensor([[[3.0], [9.0]], [[1.0], [1.0]]])
    # values: token 0 moves by (1, 0) from (2, 0): 1/4; token 1 doubles: 1
    v0 = torch.tensor([[[2.0], [0.0]], [[0.5], [7.0]]])
    v = torch.tensor([[[3.0], [0.0]], [[1.0], [14.0]]])
    drift = maths.relative_kv_drift(k, k0, v, v0)
    assert drift.item() == pytest.approx((1 + 0) / 2 + (0.25 + 1) / 2)


@fixed
@given(seeds, st.floats(0.5, 3))
def test_drift_is_relative_zero_at_base_and_quadratic_in_the_change(seed, scale):
    k0, v0, dk, dv = (normal(2, 5, 3, 4, seed=seed + i, dtype=torch.float64) for i in range(4))
    drift = maths.relative_kv_drift(k0 + dk, k0, v0 + dv, v0)
    assert drift.shape == (2,)
    torch.testing.assert_close(maths.relative_kv_drift(k0, k0, v0, v0), torch.zeros(2, dtype=torch.float64))
    scaled = maths.relative_kv_drift(scale * (k0 + dk), scale * k0, scale * (v0 + dv), scale * v0)
    torch.testing.assert_close(scaled, drift)
    larger = maths.relative_kv_drift(k0 + scale * dk, k0, v0 + scale * dv, v0)
    torch.testing.assert_close(larger, scale**2 * drift)
    # oracle: explicit loop over tokens with concatenated heads
    for row in range(2):
        total = 0.0
        for x, x0 in ((k0 + dk, k0), (v0 + dv, v0)):
            for t in range(5):
                total += float((x - x0)[row, t].flatten().norm() ** 2 / x0[row, t].flatten().norm() ** 2) / 5
        assert drift[row].item() == pytest.approx(total)


def test_drift_of_no_tokens_is_refused():
    empty = torch.zeros(0, 2, 4)
    with pytest.raises(LensError, match="without tokens"):
        maths.relative_kv_drift(empty, empty, empty, empty)


# --- estimates ---------------------------------------------------------------------------------------


def test_mean_interval_of_known_values_has_the_mean_and_encloses_it():
    estimate = maths.mean_interval([1.0, 2.0, 3.0, 4.0, 10.0])
    assert estimate.value == 4.0
    assert estimate.low < 4.0 < estimate.high
    assert (estimate.n, estimate.n_missing, estimate.reason) == (5, 0, "")


def test_a_large_sample_gives_the_interval_of_the_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, size=2000)
    estimate = maths.mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for repeat in range(200):
        estimate = maths.mean_interval(rng.normal(1.0, 1.0, size=20), n_resamples=500, seed=repeat)
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_a_higher_level_a_wider_one():
    values = np.random.default_rng(2).normal(size=15)
    assert maths.mean_interval(values, seed=1) == maths.mean_interval(values, seed=1)
    assert maths.mean_interval(values, seed=1).low != maths.mean_interval(values, seed=2).low
    narrow, wide = maths.mean_interval(values, level=0.5), maths.mean_interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    with pytest.raises(LensError, match="between 0 and 1"):
        maths.mean_interval(values, level=95.0)


def test_constant_data_give_an_interval_without_width_and_without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = maths.mean_interval([0.25] * 8)
        difference = maths.paired_difference([5.0, 6.0, 7.0], [4.0, 5.0, 6.0])
        whole = maths.recovery([40.0] * 5, [10.0] * 5, [40.0] * 5)
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0.25, 0.25)
    assert (difference.value, difference.low, difference.high) == (1.0, 1.0, 1.0)
    assert (whole.value, whole.low, whole.high) == (1.0, 1.0, 1.0)


def test_nearly_constant_data_fall_back_without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = maths.mean_interval([0.0, 0.0, 0.0, 0.0, 1.0])
    assert estimate.value == 0.2
    assert 0.0 <= estimate.low <= 0.2 <= estimate.high <= 1.0


def test_missing_values_leave_with_their_pair_and_are_counted():
    a = [1.0, math.nan, 3.0, 4.0, 9.0]
    b = [0.0, 5.0, math.nan, 1.0, 3.0]
    estimate = maths.paired_difference(a, b)
    assert (estimate.n, estimate.n_missing) == (3, 2)
    assert estimate.value == pytest.approx((1 + 3 + 6) / 3)
    assert maths.mean_interval([None, 1.0, 2.0, 3.0]).n_missing == 1


def test_too_few_prompts_give_no_interval_and_say_so():
    two = maths.mean_interval([1.0, 3.0])
    assert two.value == 2.0
    assert math.isnan(two.low)
    assert math.isnan(two.high)
    assert "only 2 prompts" in two.reason
    none = maths.mean_interval([math.nan, math.nan])
    assert math.isnan(none.value)
    assert (none.n, none.n_missing) == (0, 2)
    assert "no prompt" in none.reason


def test_prompts_that_do_not_match_and_infinities_are_refused():
    with pytest.raises(LensError, match="same prompts"):
        maths.paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(LensError, match="one value for each prompt"):
        maths.mean_interval([[1.0, 2.0]])
    with pytest.raises(LensError, match="infinite"):
        maths.mean_interval([1.0, math.inf, 2.0])


def test_pairing_removes_the_variance_between_prompts():
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 10, size=30)
    paired = maths.spread(prompts + 1 + rng.normal(0, 0.1, 30), prompts)
    assert paired.low == pytest.approx(1, abs=0.2)
    assert paired.high == pytest.approx(1, abs=0.2)
    assert paired.value == pytest.approx(1, abs=0.1)


def test_recovery_is_the_ratio_of_the_mean_changes_not_the_mean_of_the_ratios():
    finetuned, base = np.array([10.0, 12.0, 8.0, 10.0]), np.array([40.0, 50.0, 20.0, 50.0])
    patched = np.array([30.0, 14.0, 20.0, 40.0])
    estimate = maths.recovery(patched, finetuned, base)
    assert estimate.value == pytest.approx((26 - 10) / (40 - 10))
    assert estimate.low < estimate.value < estimate.high
    assert maths.recovery(finetuned, finetuned, base).value == 0.0
    assert maths.recovery(base, finetuned, base).value == 1.0
    assert maths.recovery(2 * finetuned - base, finetuned, base).value == pytest.approx(-1.0)


@fixed
@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_recovery_does_not_depend_on_unit_and_zero_of_the_measure(seed, scale, shift):
    rng = np.random.default_rng(seed)
    finetuned = rng.normal(10, 1, 12)
    base, patched = finetuned + rng.normal(8, 1, 12), finetuned + rng.normal(3, 1, 12)
    one = maths.recovery(patched, finetuned, base, n_resamples=200)
    two = maths.recovery(*(scale * x + shift for x in (patched, finetuned, base)), n_resamples=200)
    assert two.value == pytest.approx(one.value)
    assert (two.low, two.high) == pytest.approx((one.low, one.high))
    # a behaviour that falls recovers as one that rises
    assert maths.recovery(-patched, -finetuned, -base, n_resamples=200).value == pytest.approx(one.value)


def test_recovery_is_undefined_with_the_reason_where_there_is_nothing_to_recover():
    rng = np.random.default_rng(0)
    base = rng.normal(size=20)
    noise = maths.recovery(base, base + rng.normal(0, 1, 20), base)
    assert math.isnan(noise.value)
    assert "do not differ beyond noise" in noise.reason
    assert noise.n == 20
    assert "differ" in maths.recovery([0.0] * 5, [0.0] * 5, [0.0] * 5).reason
    few = maths.recovery([1.0, 1.0, math.nan], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert (few.value, math.isnan(few.low), math.isnan(few.high)) == (1.0, True, True)
    assert "no interval: only 2 complete prompts" in few.reason
    assert few.n_missing == 1


def test_recovery_of_rates_with_few_prompts_has_an_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = maths.recovery([1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0])
    assert estimate.value == pytest.approx(0.6)
    assert estimate.low <= 0.6 <= estimate.high


def test_an_estimate_reads_as_number_interval_and_n():
    assert str(maths.Estimate(0.5, 0.25, 0.75, 12)) == "0.5 [0.25, 0.75] (n = 12)"
    assert str(maths.Estimate(0.5, 0.25, 0.75, 12, n_missing=2)) == "0.5 [0.25, 0.75] (n = 12, 2 missing)"
    assert str(maths.Estimate(math.nan, math.nan, math.nan, 1, "why")).endswith(": why")


def test_em_f1_of_known_scores():
    # ID 20, EM 60: harmonic mean of 80 and 60
    assert maths.em_f1(20.0, 60.0) == pytest.approx(2 * 80 * 60 / 140)
    assert maths.em_f1(0.0, 100.0) == 100
    assert maths.em_f1(100.0, 0.0) == 0
    assert maths.em_f1(100.0, 90.0) == 0
    assert math.isnan(maths.em_f1(math.nan, 50.0))
    for bad in ((-1.0, 50.0), (50.0, 101.0)):
        with pytest.raises(LensError, match=r"0\.\.100"):
            maths.em_f1(*bad)


def test_noise_drawn_with_the_seed_of_the_vector_is_orthogonal_all_the_same():
    x = torch.randn(64, generator=torch.Generator().manual_seed(7))
    noisy = maths.orthogonal_noise(x, 1.0, torch.Generator().manual_seed(7))
    assert abs(float(noisy @ x)) < 1e-4 * float(x.norm() ** 2)
    assert float(noisy.norm()) == pytest.approx(float(x.norm()), rel=1e-5)


def test_nearer_compares_distances_of_means_so_that_overshooting_does_not_win():
    base, near, far, beyond = (np.full(20, v) + np.arange(20) % 2 for v in (10.0, 8.0, 4.0, 17.0))
    found = maths.nearer(near, far, base)
    assert (found.value, found.low, found.high, found.n) == (4.0, 4.0, 4.0, 20)
    assert maths.nearer(far, beyond, base).value == 1.0
    assert maths.nearer(beyond, near, base).value == -5.0
    noisy = base + np.random.default_rng(0).normal(0, 3, 20)
    found = maths.nearer(noisy, far, base)
    assert found.value == pytest.approx(6 - abs((noisy - base).mean()))
    assert found.low < found.value < found.high
    with pytest.raises(LensError):
        maths.nearer(near, far[:3], base)
