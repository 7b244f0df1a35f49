"""Interventions against hooks written by hand: numerics, receipts, phases, gradients, refusals, and tidiness."""

import dataclasses
import json
from pathlib import Path

import jaxtyping
import pytest
import tiny_hooked
import tiny_models
import torch
from tiny_hooked import CASES, FEW, chat, columns, hook_count, hooked, logits_of, no_hook_left, prompts, real
from torch.testing import assert_close

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.activations import Activations
from piggyback_lens.interventions.hooks import Intervention, Interventions, Record
from piggyback_lens.interventions.kinds import ablate, add, cache, clamp, mean_ablate, patch, resample, zero
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied, mean_norms
from piggyback_lens.maths import set_projection
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.backends import shape_of
from piggyback_lens.models.booting import boot_bridge
from piggyback_lens.models.network import forward
from piggyback_lens.words import SITES

EXACT = "donot_use_mm_for_euclid_dist"


@pytest.fixture(scope="module", params=FEW, ids="-".join)
def model(request):
    return hooked(*request.param)


@pytest.fixture(scope="module", params=tiny_hooked.BACKENDS)
def llama(request):
    return hooked("llama-gqa", request.param)


@pytest.fixture(autouse=True)
def nothing_stays_installed(request):
    """Every test leaves the shared models as it got them."""
    yield
    for name in ("model", "llama"):
        if name in request.fixturenames:
            assert hook_count(request.getfixturevalue(name)) == 0


@pytest.fixture
def unchecked():
    """As for a user, who does not run the library under a run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def donor(span="prefix", sites=("resid_post", "resid_pre"), layers=(0, 1, 2), rows=1, tokens=13, d=32):
    values = {(site, layer): normal(rows, tokens, d, seed=layer + 7) for site in sites for layer in layers}
    return Activations(span, None, values, (tokens,) * rows)


def one_of_each() -> dict[str, Intervention | Interventions]:
    v = normal(32)
    return {
        "cache": cache(["k", "resid_pre"], layers=[0, 2], span="query", tokens=[0, -1], dtype=torch.bfloat16),
        "add": add(v, layers=[0, 1, 2], strength=2.0, span="query", phase="prompt"),
        "fraction": add(v, layers=1, fraction=0.5, norms={1: 3.0}),
        "ablate": ablate(v, span="postfix"),
        "clamp": clamp(v, -1.5, layers=1, phase="generation"),
        "patch": patch(donor(), layers=[0, 1], rows=[0]),
        "zero": zero(("z", "v"), heads=[1], layers=2, span="prefix", tokens=[0, 1, 2]),
        "mean_ablate": mean_ablate(donor(), span="query"),
        "resample": resample(donor(rows=3), seed=5),
    }


# ---------------------------------------------------------------- descriptions


@pytest.mark.parametrize("name", one_of_each())
def test_an_intervention_survives_json(name):
    original = one_of_each()[name]
    back = type(original).from_dict(json.loads(json.dumps(original.to_dict())))
    assert back == original
    assert repr(back) == repr(original)
    assert hash(back) == hash(original)


@pytest.mark.parametrize("name", one_of_each())
def test_equal_descriptions_are_equal_and_any_change_makes_them_unequal(name):
    assert one_of_each()[name] == one_of_each()[name]
    parts = one_of_each()[name]
    part = parts if isinstance(parts, Intervention) else parts.parts[0]
    other_phase = "generation" if part.phase != "generation" else "both"
    changes = [{"layers": (1,)} if part.layers != (1,) else {"layers": (2,)}, {"phase": other_phase}]
    changes += [{"span": "think"}, {"tokens": (4,)}, {"rows": (1,)}, {"site": "k" if part.site != "k" else "v"}]
    changes += [{"options": {**part.options, "more": 1}}]
    if part.tensors:
        first = next(iter(part.tensors))
        changes += [{"tensors": {**part.tensors, first: part.tensors[first] + 1}}]
    for change in changes:
        assert dataclasses.replace(part, **change) != part, change
    assert part != repr(part)


def test_the_repr_says_what_where_and_when():
    v = normal(4)
    assert repr(add(v, layers=[0, 1, 2], strength=2.0, span="query", phase="prompt")) == (
        "add(resid_post, layers 0-2, query, prompt only, strength=2.0)"
    )
    assert repr(zero("z", heads=[1], layers=[1, 3], tokens=[0])) == "zero(z, layers 1,3, all, heads [1], tokens [0])"
    assert repr(clamp(v, 1.0, layers=None) + zero("v")) == (
        "clamp(resid_post, all layers, all, value=1.0) + zero(v, all layers, all)"
    )
    assert repr(zero("v", heads=[0])) != repr(zero("v"))
    assert repr(Interventions()) == "no intervention"


def test_a_sum_is_the_same_however_it_is_bracketed():
    a, b, c = add(normal(4), layers=0), zero("v"), clamp(normal(4), 1.0, layers=0)
    assert (a + b) + c == a + (b + c)
    assert [part.kind for part in (a + b + c).parts] == ["add", "zero", "clamp"]
    assert a + b != b + a
    with pytest.raises(TypeError):
        _ = a + 3


def test_a_vector_that_is_changed_afterwards_does_not_change_the_intervention():
    v = normal(4)
    steer, removed = add(v, layers=0), ablate(v)
    before = steer.to_dict(), removed.to_dict()
    v.mul_(3).add_(1)
    assert (steer.to_dict(), removed.to_dict()) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zero("hidden"), "site 'hidden' is not known: choose one of resid_pre"),
        (lambda: zero("v", phase="decode"), "phase 'decode' is not known: choose one of prompt, generation, both"),
        (lambda: zero("resid_pre", heads=[0]), "site 'resid_pre' has no heads: heads= goes with q, k, v"),
        (lambda: Intervention("scale", "v"), "intervention 'scale' is not known"),
        (lambda: ablate(torch.zeros(4)), "zero vector"),
        (lambda: add(torch.tensor([1.0, float("nan")]), layers=0), "one finite vector"),
        (lambda: clamp(normal(2, 3), 1.0, layers=0), r"one finite vector, got shape \(2, 3\)"),
        (lambda: add(normal(4), layers=[0, 1], fraction=0.5), r"needs a non-zero vector and norms=.*\[0, 1\] missing"),
        (lambda: add(normal(4), layers=[0, 1], fraction=0.5, norms={0: 1.0}), r"\[1\] missing"),
        (lambda: add(torch.zeros(4), layers=0, fraction=0.5, norms={0: 1.0}), "non-zero vector"),
        (lambda: Intervention.from_dict({"kind": "zero"}), "an intervention has the fields"),
        (lambda: Intervention.from_dict({"kind": "zero", "site": "v", "when": 1}), "an intervention has the fields"),
        (lambda: Intervention.from_dict({"kind": "add", "site": "v", "tensors": "no"}), "not safetensors in base64"),
        (lambda: Interventions.from_dict({"part": []}), "expected a dictionary with 'parts'"),
        (lambda: patch(donor(), sites="k"), "k of layer 0 was not kept"),
        (lambda: patch(donor(), layers=[7]), "resid_post of layer 7 was not kept"),
        (lambda: cache("v", phase="generation"), "span='response'"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_at_once(unchecked, make, message):
    with pytest.raises(LensError, match=message):
        make()


# ---------------------------------------------------------------- numerics


def by_hand(batch, span, change, rows=None):
    """A TransformerLens hook that changes the cells [row, columns of the span], row by row."""

    def hook(activation, hook):
        activation = activation.clone()
        for row in range(len(batch.prompts)) if rows is None else rows:
            chosen = columns(batch, row, span)
            activation[row, chosen] = change(activation[row, chosen], row)
        return activation

    return hook


def unit(v):
    return v / v.norm()


def head_one(change):
    def on_head(cells, row):
        cells = cells.clone()
        cells[:, 1] = change(cells[:, 1], row)
        return cells

    return on_head


def numeric_cases():
    v, u, w = normal(32), unit(normal(32)), normal(8, seed=3)
    single, many, mean_of = donor(), donor("query", rows=3, tokens=60), donor(rows=2)
    lengths = tuple(len(prompt.spans["query"]) for prompt in prompts())
    many = dataclasses.replace(many, lengths=lengths)
    reference = mean_of["resid_post", 1].reshape(-1, 32).mean(0)
    heads = Activations("postfix", None, {("v", 1): normal(1, 3, 2, 8)}, (3,))
    return {
        "add": (
            add(1.7 * v, layers=1, span="query", strength=2.0),
            "hook_resid_post",
            "query",
            lambda a, _: a + 3.4 * v,
        ),
        "add to a head": (
            add(w, site="z", heads=[1], layers=1, span="postfix"),
            "attn.hook_z",
            "postfix",
            head_one(lambda a, _: a + w),
        ),
        "ablate": (
            ablate(5 * v, site="resid_pre", layers=1),
            "hook_resid_pre",
            "all",
            lambda a, _: a - (a @ u)[:, None] * u,
        ),
        "ablate in a head": (
            ablate(w, site="q", layers=1, heads=[1]),
            "attn.hook_q",
            "all",
            head_one(lambda a, _: a - (a @ unit(w))[:, None] * unit(w)),
        ),
        "clamp": (
            clamp(3 * v, 2.5, layers=1, span="prompt"),
            "hook_resid_post",
            "prompt",
            lambda a, _: a + (2.5 - a @ u)[:, None] * u,
        ),
        "zero": (zero("mlp_out", layers=1, span="system"), "hook_mlp_out", "system", lambda a, _: 0 * a),
        "zero a key head": (zero("k", layers=1, heads=[1], span="prefix"), "attn.hook_k", "prefix", None),
        "mean": (
            mean_ablate(mean_of, sites="resid_post", layers=1, span="query"),
            "hook_resid_post",
            "query",
            lambda a, _: reference.expand_as(a),
        ),
        "patch from one row": (
            patch(single, sites="resid_post", layers=1),
            "hook_resid_post",
            "prefix",
            lambda a, _: single["resid_post", 1][0],
        ),
        "patch from each row": (
            patch(many, sites="resid_pre", layers=1),
            "hook_resid_pre",
            "query",
            lambda a, row: many["resid_pre", 1][row, : len(a)],
        ),
        "patch a value head": (
            patch(heads, heads=[1]),
            "attn.hook_v",
            "postfix",
            head_one(lambda a, _: heads["v", 1][0, :, 1]),
        ),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", numeric_cases())
def test_an_intervention_equals_the_hook_written_by_hand_and_its_receipt_counts_it(model, side, case):
    intervention, name, span, change = numeric_cases()[case]
    if shape_of(model).n_kv_heads == 4 and case == "patch a value head":
        pytest.skip("this donor has two key/value heads")
    change = change or head_one(lambda a, _: 0 * a)
    batch = batch_prompts(prompts(), side=side)
    hook = by_hand(batch, span, change)
    expected, _ = logits_of(model, batch, fwd_hooks=[(f"blocks.1.{name}", hook)])
    seen = {}

    def keep(activation, hook):
        seen["before"] = activation.clone()

    plain, _ = logits_of(model, batch, fwd_hooks=[(f"blocks.1.{name}", keep)])
    ours, record = logits_of(model, batch, intervention)
    assert_close(real(ours, batch), real(expected, batch), rtol=1e-5, atol=1e-5)
    assert (real(ours, batch) - real(plain, batch)).abs().max() > 1e-3
    receipt = record.receipts[0]
    assert (receipt.calls, receipt.cells, receipt.layers) == (
        1,
        sum(len(columns(batch, row, span)) for row in range(3)),
        {1},
    )
    change_norm = (hook(seen["before"], None) - seen["before"]).norm()
    assert receipt.change_norm == pytest.approx(float(change_norm), rel=1e-4)


def test_receipts_count_the_tokens_of_every_layer_and_site(llama):
    batch = batch_prompts(prompts())
    lengths = [len(prompt.spans["query"]) for prompt in prompts()]
    v = normal(32)
    many = add(v, layers=None, span="query") + zero("v", layers=[0, -1], span="query", tokens=[0, -1])
    many += cache("z", span="postfix") + patch(donor(), sites="resid_pre", layers=0, rows=[2])
    _, record = logits_of(llama, batch, many)
    assert [r.cells for r in record.receipts] == [3 * sum(lengths), 2 * 2 * 3, 3 * 3 * 3, 13]
    assert [r.calls for r in record.receipts] == [3, 2, 3, 1]
    assert [len(r.layers) for r in record.receipts] == [3, 2, 3, 1]
    assert record.receipts[0].change_norm == pytest.approx(float(v.norm()) * (3 * sum(lengths)) ** 0.5, rel=1e-4)
    assert record.receipts[2].change_norm == 0
    frame = record.to_frame()
    assert frame["cells"].tolist() == [r.cells for r in record.receipts]
    assert "9 tokens" not in str(record)
    assert f"{3 * sum(lengths)} cells in 3 layers" in str(record)


def test_the_same_intervention_twice_has_two_receipts(llama):
    batch = batch_prompts(prompts())
    steer = add(normal(32), layers=1, span="postfix")
    _, record = logits_of(llama, batch, steer + steer)
    assert [r.cells for r in record.receipts] == [9, 9]
    assert record.receipts[0].change_norm == pytest.approx(record.receipts[1].change_norm, rel=1e-4)


def test_only_the_chosen_heads_change(model):
    batch = batch_prompts(prompts())
    for site, heads in (("z", [0, 3]), ("k", [1])):
        before = logits_of(model, batch, cache(site, layers=1))[1].activations[site, 1]
        after = logits_of(model, batch, zero(site, layers=1, heads=heads) + cache(site, layers=1))[1].activations
        untouched = [head for head in range(before.shape[2]) if head not in heads]
        assert torch.equal(after[site, 1][:, :, untouched], before[:, :, untouched])
        assert not after[site, 1][:, :, heads].any()
        assert before[:, :, heads].any()


def test_the_order_of_a_sum_is_the_order_of_its_effects(model):
    batch = batch_prompts(prompts())
    v, u = normal(32), unit(normal(32) + normal(32, seed=1))
    steer, remove = add(v, layers=1), ablate(u, site="resid_post", layers=1)

    def project(a):
        return a - (a @ u)[..., None] * u

    for interventions, change in (
        (steer + remove, lambda a: project(a + v)),
        (remove + steer, lambda a: project(a) + v),
    ):
        ours, _ = logits_of(model, batch, interventions)
        expected, _ = logits_of(
            model, batch, fwd_hooks=[("blocks.1.hook_resid_post", lambda a, hook, change=change: change(a))]
        )
        assert_close(real(ours, batch), real(expected, batch), rtol=1e-5, atol=1e-5)
    one, other = (logits_of(model, batch, x)[0] for x in (steer + remove, remove + steer))
    assert (one - other).abs().max() > 1e-3


def test_ablating_twice_is_ablating_once_and_the_direction_is_gone_from_the_whole_residual_stream(model):
    batch = batch_prompts(prompts())
    v = normal(32)
    once, record = logits_of(model, batch, ablate(v) + cache(["resid_pre", "resid_mid", "resid_post"]))
    twice, _ = logits_of(model, batch, ablate(v) + ablate(-2 * v))
    assert_close(real(twice, batch), real(once, batch), rtol=1e-4, atol=1e-4)
    for key, value in record.activations.values.items():
        assert (value @ unit(v)).abs().max() < 1e-4 * value.norm(dim=-1).max(), key


def test_a_fraction_is_the_length_of_the_step_in_units_of_the_mean_norm(model):
    batch = batch_prompts(prompts())
    norms = mean_norms(model, batch, site="resid_post")
    for layer in (0, 2):
        lengths = []
        for prompt in prompts():
            _, alone = model.run_with_cache(torch.tensor([prompt.ids]))
            lengths += alone[f"blocks.{layer}.hook_resid_post"][0].norm(dim=-1).tolist()
        assert norms[layer] == pytest.approx(sum(lengths) / len(lengths), rel=1e-4)
    steer = add(normal(32), layers=[0, 2], fraction=0.5, norms=norms, span="query")
    tokens = sum(len(prompt.spans["query"]) for prompt in prompts())
    _, record = logits_of(model, batch, steer)
    expected = (tokens * (0.25 * norms[0] ** 2 + 0.25 * norms[2] ** 2)) ** 0.5
    assert record.receipts[0].change_norm == pytest.approx(expected, rel=1e-4)


def test_resampled_tokens_come_from_the_reference_and_the_seed_decides_which(llama):
    batch = batch_prompts(prompts())
    reference = donor("query", rows=2, tokens=20)
    found = {}
    for seed in (0, 1):
        random = resample(reference, sites="resid_post", seed=seed, span="all", layers=[0, 1])
        found[seed] = logits_of(llama, batch, random + cache("resid_post", layers=[0, 1]))[1].activations
    picks = {}
    for (seed, kept), layer in ((item, layer) for item in found.items() for layer in (0, 1)):
        pool = reference.flat("resid_post", layer)
        distance = torch.cdist(kept.flat("resid_post", layer), pool, compute_mode=EXACT)
        assert distance.min(dim=1).values.max() < 1e-5
        picks[seed, layer] = distance.argmin(dim=1)
    assert torch.equal(picks[0, 0], picks[0, 1])
    assert (picks[0, 0] == picks[1, 0]).float().mean() < 0.2
    shift = (picks[1, 0] - picks[0, 0]) % len(pool)
    assert len(shift.unique()) > 10, "another seed is another draw, not the old one moved along"
    assert len(picks[0, 0].unique()) > 25


def test_every_reference_token_is_drawn_about_equally_often():
    model = hooked("llama-gqa", "bridge")
    batch = batch_prompts(prompts(["abcdefghij" * 15] * 12))
    pool = donor("all", rows=1, tokens=10)
    kept = logits_of(model, batch, resample(pool, sites="resid_pre", layers=0, seed=3) + cache("resid_pre", layers=0))
    picks = torch.cdist(kept[1].activations.flat("resid_pre", 0), pool.flat("resid_pre", 0)).argmin(dim=1)
    counts = torch.bincount(picks, minlength=10).float()
    expected = len(picks) / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9  # chi squared, 9 degrees, p = 0.001
    pairs = torch.bincount(picks[:-1] * 10 + picks[1:], minlength=100).float()
    expected = (len(picks) - 1) / 100
    assert float(((pairs - expected) ** 2 / expected).sum()) < 149  # neighbours are independent too


def test_resampling_does_not_depend_on_the_batch(llama):
    random = resample(donor("query", rows=2, tokens=20), sites="resid_post", layers=1, seed=4)
    settings = {"interventions": random, "max_new_tokens": 4}
    together = [g.ids for g in generate(llama, prompts(), **settings, batch_size=3)]
    assert [g.ids for g in generate(llama, prompts(), **settings, batch_size=1)] == together


# ---------------------------------------------------------------- rows, phases and decoding


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_activations_of_a_row_in_a_padded_batch_are_those_of_the_row_alone(case):
    model = hooked(*case)
    sites = [site for site in SITES if site != "rot_k" or shape_of(model).rotary]
    for side in ("left", "right"):
        batch = batch_prompts(prompts(), side=side)
        together = logits_of(model, batch, cache(sites))[1].activations
        assert together.lengths == tuple(len(prompt.ids) for prompt in prompts())
        for row, prompt in enumerate(prompts()):
            _, alone = model.run_with_cache(torch.tensor([prompt.ids]))
            for site in sites:
                name = {"mlp_post": "mlp.hook_post"}.get(
                    site, f"hook_{site}" if site[:4] in ("resi", "attn", "mlp_") else f"attn.hook_{site}"
                )
                expected = alone[f"blocks.1.{name}"][0]
                assert_close(together.row(row)[site, 1][0], expected, rtol=1e-4, atol=1e-4)


@tiny_hooked.needs_hooked
@pytest.mark.parametrize("name", [n for n in tiny_models.NAMES if n != "llama-bias"])
def test_both_backends_have_the_same_activations_at_every_site(name):
    bridge, copied = hooked(name, "bridge"), hooked(name, "hooked")
    batch = batch_prompts(prompts())
    sites = [site for site in SITES if site != "rot_k" or shape_of(bridge).rotary]
    one, other = (logits_of(model, batch, cache(sites))[1].activations for model in (bridge, copied))
    for key, value in one.values.items():
        assert_close(value, other[key], rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("phase", "count"), [("prompt", lambda p, g: p), ("generation", lambda p, g: g), ("both", lambda p, g: p + g)]
)
def test_a_phase_says_which_tokens_are_touched(model, phase, count):
    record = Record()
    answers = generate(
        model,
        prompts(),
        interventions=add(normal(32), layers=[0, 1], phase=phase, strength=0.1),
        max_new_tokens=4,
        stop_ids=[],
        share_prefix=False,
        record=record,
        batch_size=2,
    )
    n_prompt = sum(len(prompt.ids) for prompt in prompts())
    n_run = sum(len(answer.ids) - 1 for answer in answers)  # the last token is never run
    assert record.receipts[0].cells == 2 * count(n_prompt, n_run)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_activations_kept_while_decoding_are_those_of_one_teacher_forced_pass(case):
    model = hooked(*case)
    sites = ["resid_pre", "resid_post", "k", "v", "z", "mlp_out"]
    steer = add(normal(32), layers=1, strength=0.3)
    record = Record()
    keep = steer + cache(sites, span="response")
    answers = generate(model, prompts(), interventions=keep, max_new_tokens=5, record=record, batch_size=2)
    kept = record.activations_of("response")
    assert len({len(answer.ids) for answer in answers}) >= 1
    for row, answer in enumerate(answers):
        n = len(answer.ids) - 1
        assert kept.lengths[row] == n
        batch = batch_prompts([answer.completed()])
        full = logits_of(model, batch, keep)[1].activations_of("response")
        for key, value in full.values.items():
            assert_close(kept[key][row, :n], value[0, :n], rtol=1e-4, atol=1e-4)


def test_keys_after_the_rotary_embedding_are_changed_once_in_every_way_of_running(llama):
    key = normal(8, seed=2)
    for span in ("prefix", "query", "all"):
        steer = add(key, site="rot_k", layers=1, span=span, strength=0.5)
        settings = {"interventions": steer, "max_new_tokens": 4, "stop_ids": []}
        whole = [g.ids for g in generate(llama, prompts(), **settings, share_prefix=False)]
        shared = generate(llama, prompts(), **settings)
        assert [g.ids for g in shared] == whole
        for answer in shared:
            batch = batch_prompts([answer.completed()])
            logits, _ = logits_of(llama, batch, steer)
            n = len(answer.ids)
            assert tuple(logits[0, -n - 1 : -1].argmax(-1).tolist()) == answer.ids, span


# ---------------------------------------------------------------- used with plain TransformerLens


def test_hooks_work_with_plain_transformer_lens(model):
    batch = batch_prompts(prompts([QUERY := "two words here"]))
    assert batch.prompts[0].query == QUERY
    v = normal(32)
    steer = add(v, layers=1, span="query") + zero("v", layers=0, span="prefix")
    expected, _ = logits_of(model, batch, steer)
    pairs = steer.fwd_hooks(model, batch)
    assert [name for name, _ in pairs] == ["blocks.1.hook_resid_post", "blocks.0.attn.hook_v"]
    with torch.no_grad(), no_hook_left(model):
        assert_close(model.run_with_hooks(batch.ids, fwd_hooks=pairs), expected, rtol=1e-5, atol=1e-5)
        with model.hooks(fwd_hooks=pairs):
            assert_close(model(batch.ids), expected, rtol=1e-5, atol=1e-5)
        with model.hooks(fwd_hooks=pairs):
            logits, kept = model.run_with_cache(batch.ids)
        assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert not kept["blocks.0.attn.hook_v"][0, :13].any()
    record = Record()
    model.run_with_hooks(batch.ids, fwd_hooks=add(v, layers=1, span="query").fwd_hooks(model, batch, record))
    assert record.receipts[0].cells == len(batch.prompts[0].spans["query"])


def test_applied_removes_its_hooks_also_when_the_body_raises_and_leaves_the_users_alone(model):
    batch = batch_prompts(prompts())
    clean, _ = logits_of(model, batch)
    calls = []
    model.add_hook("blocks.1.hook_resid_post", lambda a, hook: (calls.append(1), a * 1.1)[1])
    try:
        users, _ = logits_of(model, batch)
        before = hook_count(model)
        assert (users - clean).abs().max() > 1e-3
        with applied(model, batch, add(normal(32), layers=1) + cache("v")):
            assert hook_count(model) > before
            forward(model, batch.ids, batch.attention_mask)
        assert hook_count(model) == before
        with pytest.raises(RuntimeError, match="the user's own"), applied(model, batch, zero("v")):
            raise RuntimeError("the user's own")
        with pytest.raises(LensError, match="touched nothing"), applied(model, batch, zero("v")):
            pass
        with pytest.raises(LensError, match="layers"), applied(model, batch, zero("v") + zero("k", layers=9)):
            pass
        assert hook_count(model) == before
        calls.clear()
        assert torch.equal(logits_of(model, batch)[0], users)
        assert len(calls) == 1
    finally:
        model.reset_hooks()
    assert torch.equal(logits_of(model, batch)[0], clean)


def test_applied_and_the_users_hooks_act_in_the_order_they_were_installed(llama):
    batch = batch_prompts(prompts())
    v = normal(32)
    fixed = [("blocks.1.hook_resid_post", lambda a, hook: torch.zeros_like(a))]
    with (
        llama.hooks(fwd_hooks=fixed),
        applied(llama, batch, add(v, layers=1) + cache("resid_post", layers=1)) as record,
    ):
        forward(llama, batch.ids, batch.attention_mask)
    assert_close(record.activations.flat("resid_post", 1), v.expand(sum(len(p.ids) for p in prompts()), -1))


def test_an_intervention_that_touches_nothing_is_an_error(llama):
    batch = batch_prompts(prompts())
    with pytest.raises(LensError, match=r"clamp\(resid_post.*generation only.*touched nothing \(1 hook calls\)"):
        logits_of(llama, batch, clamp(normal(32), 1.0, layers=0, phase="generation"))
    with pytest.raises(LensError, match="touched nothing"):
        generate(llama, prompts(), interventions=add(normal(32), layers=0, phase="generation"), max_new_tokens=1)


# ---------------------------------------------------------------- what is kept


def test_only_what_was_asked_for_is_kept(llama):
    batch = batch_prompts(prompts())
    asked = cache(["k", "resid_mid"], layers=[0, 2], span="postfix", tokens=[0, -1], dtype=torch.float64)
    kept = logits_of(llama, batch, asked)[1].activations
    assert set(kept.values) == {(site, layer) for site in ("k", "resid_mid") for layer in (0, 2)}
    assert kept["k", 0].shape == (3, 2, 2, 8)
    assert kept["resid_mid", 2].dtype == torch.float64
    assert kept.nbytes == 8 * 2 * (3 * 2 * 2 * 8 + 3 * 2 * 32)
    full = logits_of(llama, batch, cache("k", layers=0))[1].activations
    for row in range(3):
        start = prompts()[row].spans["postfix"].start
        assert_close(kept["k", 0][row].float(), full["k", 0][row, [start, start + 2]])


def test_activations_of_different_tokens_or_spans_are_not_mixed_up(llama):
    batch = batch_prompts(prompts())
    _, record = logits_of(llama, batch, cache("v", span="prefix") + cache("v", span="query"))
    assert record.activations_of("query").lengths == tuple(len(p.spans["query"]) for p in prompts())
    with pytest.raises(LensError, match=r"use activations_of\(span\)"):
        _ = record.activations
    with pytest.raises(LensError, match="nothing was kept of span 'postfix'"):
        record.activations_of("postfix")
    _, record = logits_of(llama, batch, cache("v", span="query", tokens=[0]) + cache("v", span="query", tokens=[1]))
    with pytest.raises(LensError, match="different tokens"):
        record.activations_of("query")


def test_two_caches_of_one_span_are_put_together(llama):
    full = [prompt.with_response([7, 8, 9], end=False) for prompt in prompts()]
    batch = batch_prompts(full)
    expected = logits_of(llama, batch, cache("v", layers=1))[1].activations
    parts = cache("v", layers=1, phase="prompt") + dataclasses.replace(
        cache("v", layers=1).parts[0], phase="generation"
    )
    assert_close(logits_of(llama, batch, parts)[1].activations["v", 1], expected["v", 1])


def test_kept_activations_never_have_made_up_tokens(llama):
    """Half a span (the prompt was not seen) must not come back as zeros."""
    only_answers = dataclasses.replace(cache("v", layers=1).parts[0], phase="generation")
    full = batch_prompts([prompt.with_response([7, 8, 9], end=False) for prompt in prompts()])
    with pytest.raises(LensError, match="token 0 of span 'all' in row 0 was not in the passes"):
        _ = logits_of(llama, full, only_answers)[1].activations


def test_means_leave_the_padding_out():
    values = {("resid_pre", 0): torch.tensor([[[1.0], [3.0]], [[8.0], [0.0]]])}
    kept = Activations("query", None, values, (2, 1))
    assert kept.mean("resid_pre", 0).tolist() == [4.0]
    assert kept.flat("resid_pre", 0).flatten().tolist() == [1.0, 3.0, 8.0]
    assert kept.row(1)["resid_pre", 0].shape == (1, 1, 1)
    assert kept.row(1).lengths == (1,)


# ---------------------------------------------------------------- refusals


def refused(model, batch, intervention, message):
    with no_hook_left(model), pytest.raises(LensError, match=message):
        logits_of(model, batch, intervention)


def test_what_does_not_fit_the_model_is_refused_before_anything_runs(llama):
    batch = batch_prompts(prompts())
    refused(llama, batch, zero("v", layers=3), r"layers \[3\] do not exist: this model has layers 0 to 2")
    refused(llama, batch, zero("v", layers=-4), "this model has layers 0 to 2")
    refused(llama, batch, zero("v", layers=[]), "this model has layers 0 to 2")
    refused(llama, batch, zero("v", heads=[2]), r"heads \[2\] asked at v, which has heads 0 to 1")
    refused(llama, batch, zero("z", heads=[4]), r"heads \[4\] asked at z, which has heads 0 to 3")
    refused(llama, batch, zero("z", heads=[]), r"heads \[\] asked at z")
    refused(llama, batch, zero("v", span="think"), "span 'think' is not in row 0: it has prefix, query")
    refused(llama, batch, zero("v", span="postfix", tokens=[3]), "token 3 is outside span 'postfix' of row 0.*3 tokens")
    refused(llama, batch, zero("v", span="postfix", tokens=[-4]), "token -4 is outside span 'postfix'")
    refused(llama, batch, zero("v", span="all", tokens=[-1]), "token -1 is outside span 'all'")
    refused(llama, batch, add(normal(31), layers=0), "vector of length 31, the activation has 32")
    refused(llama, batch, ablate(normal(8), layers=0), "vector of length 8, the activation has 32")
    refused(llama, batch, patch(donor(d=16)), r"gives \(16,\) per token, the model has \(32,\)")
    refused(llama, batch, patch(donor(rows=2)), "the donor has 2 rows, the run 3")
    refused(llama, batch, patch(donor(tokens=11)), "span 'prefix' has 11 tokens in the donor and 13 in row 0")
    refused(llama, batch, patch(donor(), rows=[3]), "row 3 was asked, there are rows 0 to 2")
    more = dataclasses.replace(patch(donor(), layers=[0, 1]).parts[0], layers=(0, 1, 2))
    refused(llama, batch, more, "has no donor activations for layers 2")
    empty = batch_prompts([chat().empty_query(), *prompts()])
    refused(llama, empty, zero("v", span="query"), "span 'query' is empty in row 0")


def test_a_span_that_one_prompt_of_many_lacks_is_reported_with_the_prompts_own_number(llama):
    mixed = [*prompts(), chat().empty_query()]
    with pytest.raises(LensError, match="span 'query' is empty in row 3"):
        generate(llama, mixed, interventions=zero("v", span="query"), batch_size=1, max_new_tokens=2)
    tokens = zero("v", span="query", tokens=[5])
    with pytest.raises(LensError, match="token 5 is outside span 'query' of row 0, which has 3 tokens"):
        generate(llama, prompts(), interventions=tokens, batch_size=2, max_new_tokens=2)


def test_a_site_that_the_layout_lacks_is_refused():
    for backend in tiny_hooked.BACKENDS:
        model = hooked("gpt2", backend)
        refused(model, batch_prompts(prompts()), zero("rot_k"), "no hook point blocks.0.attn.hook_rot_k")


def test_the_ids_of_another_batch_are_refused(llama):
    batch, other = batch_prompts(prompts()), batch_prompts(prompts(["one"]))
    pairs = zero("v").fwd_hooks(llama, batch)
    with no_hook_left(llama), pytest.raises(LensError, match="pass the ids of this very batch"):
        llama.run_with_hooks(other.ids, fwd_hooks=pairs)


def test_a_donor_of_an_open_ended_span_is_refused_where_it_ends(llama):
    batch = batch_prompts(prompts())
    kept = logits_of(llama, batch, cache("v"))[1].activations
    with (
        no_hook_left(llama),
        pytest.raises(LensError, match=r"reaches token \d+ of its span in row \d, where the donor"),
    ):
        generate(llama, prompts(), interventions=patch(kept), max_new_tokens=3, stop_ids=[])
    kept = logits_of(llama, batch, cache("v", span="prompt"))[1].activations
    assert len(generate(llama, prompts(), interventions=patch(kept), max_new_tokens=3)) == 3


# ---------------------------------------------------------------- gradients and precision


def differentiable_cases(d=32):
    v = normal(d, seed=1).double()
    wide = {key: value.double() for key, value in donor("query", rows=3, tokens=60).values.items()}
    lengths = tuple(len(prompt.spans["query"]) for prompt in prompts())
    whole = Activations("query", None, wide, lengths)
    return {
        "add": add(v, layers=1, span="query"),
        "ablate": ablate(v, site="resid_post", layers=1),
        "clamp": clamp(v, 0.5, layers=1),
        "zero": zero("z", layers=2, heads=[1]),
        "patch": patch(whole, sites="resid_post", layers=1, rows=[0]),
        "mean_ablate": mean_ablate(whole, sites="resid_post", layers=1, span="postfix"),
        "resample": resample(whole, sites="resid_post", layers=1, span="postfix", seed=0),
        "cache": cache("resid_post", detach=False),
    }


@pytest.fixture(scope="module")
def precise():
    return boot_bridge(tiny_models.build("llama-gqa", 0, vocab=tiny_hooked.tiny_chat.VOCAB).double(), None, "precise")


@pytest.mark.parametrize("kind", differentiable_cases())
def test_gradients_flow_through_every_kind(precise, kind):
    """The derivative along a direction of a nudge at layer 0, against a central difference."""
    batch = batch_prompts(prompts(), side="right")
    direction = normal(32, seed=9).double()

    def loss(step):
        nudge = ("blocks.0.hook_resid_post", lambda a, hook: a + step * direction)
        with precise.hooks(fwd_hooks=[nudge]), applied(precise, batch, differentiable_cases()[kind]):
            logits = forward(precise, batch.ids, batch.attention_mask)
        return real(logits, batch).log_softmax(-1)[:, 7].mean()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(step), step)
    with torch.no_grad():
        difference = (loss(torch.tensor(1e-3)) - loss(torch.tensor(-1e-3))) / 2e-3
    assert float(gradient) == pytest.approx(float(difference), rel=0.01, abs=1e-4)  # norms compute in float32
    assert abs(float(gradient)) > 5e-3


@pytest.mark.parametrize(
    "factory", [add, lambda v, **k: ablate(v, site="resid_post", **k), lambda v, **k: clamp(v, 1.0, **k)]
)
def test_a_steering_vector_can_be_trained(precise, factory):
    batch = batch_prompts(prompts(), side="right")
    vector = normal(32, seed=4).double().requires_grad_()

    def loss(v):
        with applied(precise, batch, factory(v, layers=1)):
            logits = forward(precise, batch.ids, batch.attention_mask)
        return real(logits, batch).log_softmax(-1)[:, 7].mean()

    (gradient,) = torch.autograd.grad(loss(vector), vector)
    nudge = normal(32, seed=5).double()
    with torch.no_grad():
        difference = (loss(vector + 1e-3 * nudge) - loss(vector - 1e-3 * nudge)) / 2e-3
    assert float(gradient @ nudge) == pytest.approx(float(difference), rel=0.01)
    json.dumps(factory(vector, layers=1).to_dict())


def test_gradients_reach_activations_that_were_kept_with_their_graph(precise):
    batch = batch_prompts(prompts(), side="right")
    with applied(precise, batch, cache("resid_mid", layers=1, detach=False)) as record:
        logits = forward(precise, batch.ids, batch.attention_mask)
    assert record.receipts[0].chunks["resid_mid", 1][0][2].requires_grad
    assert logits.requires_grad
    with applied(precise, batch, cache("resid_mid", layers=1)) as record:
        forward(precise, batch.ids, batch.attention_mask)
    assert not record.activations["resid_mid", 1].requires_grad


@pytest.fixture(scope="module")
def half():
    model = tiny_models.build("llama-gqa", 0, vocab=tiny_hooked.tiny_chat.VOCAB).bfloat16()
    return boot_bridge(model, None, "half")


@pytest.mark.parametrize("kind", differentiable_cases())
def test_a_bfloat16_model_stays_in_bfloat16_whatever_the_dtype_of_vectors_and_donors(half, kind):
    batch = batch_prompts(prompts(), side="right")
    after = cache(["resid_post", "z"])
    logits, record = logits_of(half, batch, differentiable_cases()[kind] + after)
    assert logits.dtype == torch.bfloat16
    assert {value.dtype for value in record.activations_of("all").values.values()} == {torch.bfloat16}
    assert torch.isfinite(real(logits, batch)).all()


def test_half_precision_directions_are_applied_in_full_precision(half):
    batch = batch_prompts(prompts(), side="right")
    v = normal(32, seed=6)
    before = logits_of(half, batch, cache("resid_post", layers=1))[1].activations.flat("resid_post", 1)
    after = logits_of(half, batch, clamp(v, 2.0, layers=1) + cache("resid_post", layers=1))[1].activations
    assert torch.equal(after.flat("resid_post", 1), set_projection(before.float(), v, 2.0).bfloat16())


def test_a_new_kind_is_one_class_and_acts_in_hooks_and_prefix_caches(monkeypatch):
    """The example of CONTRIBUTING.md, run as it stands there."""
    from piggyback_lens.interventions import hooks as module

    monkeypatch.setattr(module, "ACTIONS", dict(module.ACTIONS))
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = text.partition("<!-- kind:start -->")[2].partition("<!-- kind:end -->")[0].strip().strip("`")
    here = {"Action": module.Action, "Intervention": Intervention}
    exec(code.removeprefix("python"), here)
    model, some = hooked("llama-gqa", "bridge"), prompts()
    batch = batch_prompts(some, side="right")
    mirrored = here["mirror"]("v", layers=(1,), span="prefix")
    plain, _ = logits_of(model, batch)
    by_hook, record = logits_of(model, batch, mirrored)
    assert (real(by_hook, batch) - real(plain, batch)).abs().max() > 1e-3
    assert record.receipts[0].cells == 3 * len(some[0].span("prefix"))
    kept = PrefixCache.compile(model, some[0], mirrored)
    length = len(kept.ids)
    expected = PrefixCache.compile(model, some[0]).values[1]
    assert_close(kept.values[1], -expected)
    assert kept.ids == some[0].ids[:length]
    assert Intervention.from_dict(mirrored.to_dict()) == mirrored
