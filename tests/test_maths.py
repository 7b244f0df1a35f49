"""Formulas against hand-computed values, algebra and independent oracles."""

import math

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


def test_noise_drawn_with_the_seed_of_the_vector_is_orthogonal_all_the_same():
    x = torch.randn(64, generator=torch.Generator().manual_seed(7))
    noisy = maths.orthogonal_noise(x, 1.0, torch.Generator().manual_seed(7))
    assert abs(float(noisy @ x)) < 1e-4 * float(x.norm() ** 2)
    assert float(noisy.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
