"""A learnt soft patch: its two ends, its slope, and that it finds what was planted."""

import dataclasses

import pytest
import torch
from tiny_hooked import BACKENDS, prompts
from tiny_pairs import THREE, contrast, pair
from torch.testing import assert_close

from piggyback_lens.errors import LensError
from piggyback_lens.experiments.soft_patch import Blend, SoftPatchResult, _reference, learn, soft_patch
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.scoring import kl_to_base
from piggyback_lens.results.result import load_result
from piggyback_lens.results.run import report_run
from piggyback_lens.settings import SoftPatchSettings

SOME = (*THREE, "abc", "why so?", "and you")
LENGTH = 13


@pytest.fixture(scope="module", params=BACKENDS)
def tiny(request):
    return pair("llama-gqa", request.param)


@pytest.fixture(scope="module")
def answered(tiny):
    """Base's prefix, finetuned's prefix, rows with answers, and the base's logits of them."""
    some = prompts(THREE)
    rows = contrast(some).against
    base, own = (PrefixCache.compile(tiny, some[0], side=side) for side in ("base", "finetuned"))
    with tiny.using("base") as model:
        return base, own, rows, _reference(model, rows, LENGTH)


def test_all_coefficients_0_are_the_finetuned_model_and_all_1_the_base_prefix(tiny, answered):
    base, own, rows, reference = answered
    with tiny.using("finetuned") as model:
        blend = Blend.of(model, own, base, 2)
        for value, cache, options in ((0.0, own, {}), (1.0, base, {"prefix_cache": base})):
            whole = torch.full((LENGTH, 2), value)
            keys, values = blend.at(whole)
            assert_close(keys, cache.keys, rtol=0, atol=1e-6)
            assert_close(values, cache.values, rtol=0, atol=1e-6)
            with torch.no_grad():
                ours = [float(blend.kl(whole, [row], [x])) for row, x in zip(rows, reference, strict=True)]
                together = float(blend.kl(whole, rows, reference))
            slow = [float(x.mean()) for x in kl_to_base(tiny, rows, progress=False, **options)]
            assert ours == pytest.approx(slow, abs=1e-5)
            assert together == pytest.approx(sum(slow) / 3, abs=1e-5)


def test_the_gradient_of_a_coefficient_is_its_slope(tiny, answered):
    base, own, rows, reference = answered
    with tiny.using("finetuned") as model:
        blend = Blend.of(model, own, base, 3)
        at = torch.full((LENGTH, 3), 0.4, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(blend.kl(at, rows, reference), [at])
        for token, band in ((0, 0), (4, 1), (12, 2)):
            little = torch.zeros_like(gradient)
            little[token, band] = 0.02
            with torch.no_grad():
                slope = (blend.kl(at + little, rows, reference) - blend.kl(at - little, rows, reference)) / 0.04
            assert float(gradient[token, band]) == pytest.approx(float(slope), rel=0.05, abs=2e-4)
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("planted", [(3, 0), (9, 1)])
def test_a_position_at_which_keys_and_values_were_changed_is_found(tiny, planted):
    """The base with keys and values replaced at one token in one band, and a little noise at all others."""
    token, band = planted
    some = prompts(THREE)
    rows = contrast(some).against
    base = PrefixCache.compile(tiny, some[0], side="base")
    noise = torch.Generator().manual_seed(1)
    changed = {}
    for name in ("keys", "values"):
        side = getattr(base, name)
        moved = side + 0.02 * torch.randn(side.shape, generator=noise)
        layers = slice(0, 2) if band == 0 else slice(2, 3)
        moved[layers, :, token] += 2.0 * torch.randn(moved[layers, :, token].shape, generator=noise)
        changed[name] = moved
    own = dataclasses.replace(base, **changed)
    settings = SoftPatchSettings(bands=2, steps=40, learning_rate=0.1, sparsity=0.05)
    with tiny.using("base") as model:
        reference = _reference(model, rows, LENGTH)
        with torch.enable_grad():
            found, history = learn(Blend.of(model, own, base, 2), rows, reference, settings)
    assert found[token, band] > 0.8
    assert divmod(int(found.argmax()), 2) == planted
    assert found.sum() - found[token, band] < 0.5
    assert history[-1]["kl"] < 0.1 * history[0]["kl"]


def test_without_a_price_everything_is_patched_and_at_a_high_price_nothing(tiny, answered):
    base, own, rows, reference = answered
    with tiny.using("finetuned") as model, torch.enable_grad():
        blend = Blend.of(model, own, base, 1)
        dear, _ = learn(blend, rows, reference, SoftPatchSettings(sparsity=100.0, steps=12, learning_rate=0.1))
        cheap, _ = learn(blend, rows, reference, SoftPatchSettings(sparsity=0.0, steps=12, learning_rate=0.1))
        assert float(dear.max()) == 0
        assert float(cheap.mean()) > 0.2
        with torch.no_grad():
            assert float(blend.kl(cheap, rows, reference)) < float(blend.kl(dear, rows, reference))


def test_a_result_is_measured_on_prompts_that_were_held_out_kept_and_loaded(tmp_path):
    tiny, some = pair(), prompts(SOME)
    settings = SoftPatchSettings(bands=2, steps=3, held_out=2, answer_tokens=5)
    found = soft_patch(tiny, some, settings, out=tmp_path / "run", progress=False)
    again = soft_patch(tiny, some, settings, progress=False)
    assert found.coefficients == again.coefficients
    assert found.kl == again.kl
    assert len(found.questions) == 3
    assert found.settings["trained_on"] == 3
    assert sorted(map(sum, zip(*found.coefficients, strict=True))) != [0, 0]
    frame = found.to_frame()
    assert len(frame) == LENGTH * 2
    assert frame["band"].unique().tolist() == ["0-1", "2-2"]
    assert found.restored.set_index("condition").loc["finetuned", "value"] == 0
    loaded = load_result(tmp_path / "run")
    assert isinstance(loaded, SoftPatchResult)
    assert loaded.verdict == found.verdict
    assert found.figure().data[0].z.shape == (2, LENGTH)
    assert "held-out prompts" in report_run(tmp_path / "run").read_text(encoding="utf-8")
    with pytest.raises(LensError, match="another"):
        soft_patch(tiny, some, dataclasses.replace(settings, seed=1), out=tmp_path / "run")


def test_each_part_of_an_experiment_gets_what_is_its_own(tiny):
    """The steps of `soft_patch` one by one: who donates, who answers, which prompts are learnt on, which measured."""
    some = prompts(SOME)
    settings = SoftPatchSettings(bands=2, steps=4, held_out=2, batch_size=2, learning_rate=0.2, answer_tokens=5)
    found = soft_patch(tiny, some, settings, progress=False)
    rows = AnswerContrast.of(tiny, some, max_new_tokens=5).against
    with tiny.using("base") as model:
        assert [row.ids[row.n_prompt :] for row in rows] == [x.ids for x in generate(model, some, max_new_tokens=5)]
        reference = _reference(model, rows, LENGTH)
    base, own = (PrefixCache.compile(tiny, some[0], side=side) for side in ("base", "finetuned"))
    with tiny.using("finetuned") as model:
        blend = Blend.of(model, own, base, 2)
        with torch.enable_grad():
            learnt, history = learn(blend, rows[::2], reference[::2], settings)
        assert found.coefficients == learnt.tolist()
        assert [row["kl"] for row in found.history] == [row["kl"] for row in history]
        with torch.no_grad():
            for name, each in (
                ("finetuned", torch.zeros_like(learnt)),
                ("soft patch", learnt),
                ("whole prefix patched", torch.ones_like(learnt)),
            ):
                slow = [float(blend.kl(each, [rows[i]], [reference[i]])) for i in (1, 3, 5)]
                assert found.kl[name] == pytest.approx(slow, abs=1e-6)
    assert found.kl["other tokens control"] != pytest.approx(found.kl["soft patch"], abs=1e-5)
    assert max(found.kl["whole prefix patched"]) > 1e-4


def test_coefficients_stay_between_both_models(tiny, answered):
    base, own, rows, reference = answered
    with tiny.using("finetuned") as model, torch.enable_grad():
        wide = SoftPatchSettings(sparsity=0.0, steps=6, learning_rate=0.9)
        found, _ = learn(Blend.of(model, own, base, 1), rows, reference, wide)
    assert float(found.min()) >= 0
    assert float(found.max()) == 1


def test_what_cannot_be_learnt_is_refused():
    tiny, some = pair(), prompts(THREE)
    with pytest.raises(LensError, match="3 prompts with held_out=5: give at least 5"):
        soft_patch(tiny, some, SoftPatchSettings(held_out=5))
    with pytest.raises(LensError, match="4 bands of 3 layers"):
        soft_patch(tiny, some, SoftPatchSettings(bands=4, held_out=3))
    with pytest.raises(LensError, match="start"):
        SoftPatchSettings(start=1.5)
