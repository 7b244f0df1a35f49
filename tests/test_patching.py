"""Patching experiments against loops over single prompts with hooks of plain TransformerLens."""

import dataclasses
import json

import jaxtyping
import numpy as np
import pytest
import tiny_chat
import tiny_models
import torch
from tiny_hooked import BACKENDS, QUERIES, chat, hooked, prompts
from torch.testing import assert_close

from piggyback_lens.backends import forward
from piggyback_lens.booting import boot_bridge, build_hooked
from piggyback_lens.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.generation import Sampling, generate
from piggyback_lens.maths import recovery
from piggyback_lens.models import ModelPair
from piggyback_lens.patching import LayerCurve, kv_patch, layer_curve, prefix_activations, span_activations
from piggyback_lens.prefix import PrefixCache
from piggyback_lens.running import applied
from piggyback_lens.scoring import contrast

LAYOUTS = [(name, backend) for name in ("llama-gqa", "gemma3", "gpt2") for backend in BACKENDS]
MANY = [*QUERIES, "four", "five?", "a sixth query"]


def finetuned_a_little(name, backend):
    """The base with every matrix of its blocks moved a little, as by an adapter."""
    model = tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("layers" in parameter_name or ".h." in parameter_name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return (boot_bridge if backend == "bridge" else build_hooked)(model, chat().tokenizer, name)


@pytest.fixture(scope="module", params=LAYOUTS, ids="-".join)
def pair(request):
    tuned = finetuned_a_little(*request.param)
    return ModelPair(hooked(*request.param), tuned, tokenizer=chat().tokenizer, names=("tiny", "tiny-tuned"))


@pytest.fixture(scope="module", params=BACKENDS)
def llama(request):
    tuned = finetuned_a_little("llama-gqa", request.param)
    return ModelPair(hooked("llama-gqa", request.param), tuned, tokenizer=chat().tokenizer)


@pytest.fixture
def unchecked():
    """As for a user, who does not run the library under a run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def both_answers(pair):
    """Samples of each side's own answers, as `layer_curve` takes them: the finetuned model's, then the base's."""
    found = []
    for seed, side in enumerate(("finetuned", "base")):
        sampling = Sampling(temperature=1.5, seed=seed)
        with pair.using(side) as model:
            answers = generate(model, prompts(MANY), max_new_tokens=4, stop_ids=[], sampling=sampling)
        found.append([answer.completed() for answer in answers])
    return found


# ---------------------------------------------------------------- oracles: one prompt, plain hooks


@torch.no_grad()
def kept_by_hand(model, ids, names):
    kept = {}

    def keeping(name):
        return name, lambda activation, hook: kept.update({name: activation.clone()})

    model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[keeping(name) for name in names])
    return kept


@torch.no_grad()
def logits_by_hand(model, ids, patches):
    """`patches`: hook name to (start, stop, value of these columns)."""

    def patching(start, stop, value):
        def hook(activation, hook):
            activation = activation.clone()
            activation[0, start:stop] = value
            return activation

        return hook

    return model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(name, patching(*p)) for name, p in patches.items()])[0]


def contrast_by_hand(model, towards, against, patches):
    scores = []
    for prompt in (towards, against):
        log_probs = logits_by_hand(model, prompt.ids, patches).log_softmax(-1)
        n = prompt.n_prompt
        scores.append(torch.stack([log_probs[i - 1, prompt.ids[i]] for i in range(n, len(prompt.ids))]).mean())
    return float(scores[0] - scores[1])


def kv_names(layers):
    return [f"blocks.{layer}.attn.hook_{x}" for layer in layers for x in ("k", "v")]


# ---------------------------------------------------------------- key/value patches


@pytest.mark.parametrize("span", ["prefix", "postfix", "query"])
@pytest.mark.parametrize("direction", ["repair", "infect"])
def test_a_key_value_patch_is_the_donors_run_of_the_right_text(pair, span, direction):
    layers = [0, 2]
    some = prompts()
    patches = kv_patch(pair, span, chat=chat(), prompts=some, direction=direction, layers=layers)
    sides = ("base", "finetuned") if direction == "repair" else ("finetuned", "base")
    donors = []
    for prompt in some:
        donor_prompt = prompt if span == "query" else chat().empty_query()
        s = donor_prompt.spans[span]
        with pair.using(sides[0]) as donor:
            kept = kept_by_hand(donor, donor_prompt.ids, kv_names(layers))
        donors.append({name: value[0, s.start : s.stop] for name, value in kept.items()})
    batch = batch_prompts(some)
    with pair.using(sides[1]) as model, torch.no_grad():
        with applied(model, batch, patches) as record:
            ours = forward(model, batch.ids, batch.attention_mask)
        for row, prompt in enumerate(some):
            s = prompt.spans[span]
            by_hand = {name: (s.start, s.stop, value) for name, value in donors[row].items()}
            expected = logits_by_hand(model, prompt.ids, by_hand)
            assert_close(ours[row, -len(prompt.ids) :], expected, rtol=1e-4, atol=1e-4)
            plain = model(torch.tensor([prompt.ids]))[0]
            assert (expected - plain).abs().max() > 1e-4
    cells = sum(len(prompt.spans[span]) for prompt in some) * len(layers)
    assert [r.cells for r in record.receipts] == [cells, cells]


def test_patches_in_generation_keep_each_prompts_own_donor(llama):
    some = prompts(MANY)
    with llama.using("finetuned") as model:
        together = generate(
            model,
            some,
            max_new_tokens=4,
            batch_size=2,
            interventions=kv_patch(llama, "query", chat=chat(), prompts=some),
        )
        for prompt, answer in zip(some, together, strict=True):
            alone = kv_patch(llama, "query", chat=chat(), prompts=[prompt])
            assert generate(model, [prompt], max_new_tokens=4, interventions=alone)[0].ids == answer.ids
        with pytest.raises(LensError, match="the donor has 6 rows, the run 2"):
            generate(model, some[:2], interventions=kv_patch(llama, "query", chat=chat(), prompts=some))


def test_a_patch_that_cannot_be_made_is_refused(llama, unchecked):
    with pytest.raises(LensError, match="span 'query' takes each prompt's own donor: give prompts="):
        kv_patch(llama, "query", chat=chat())
    with pytest.raises(LensError, match="direction 'cure' is not known: choose 'repair' or 'infect'"):
        kv_patch(llama, "prefix", chat=chat(), direction="cure")
    with pytest.raises(LensError, match="span 'think' is not in row 0"):
        kv_patch(llama, "think", chat=chat(), prompts=prompts())
    with pytest.raises(LensError, match="this model has 0 to 2"):
        kv_patch(llama, "prefix", chat=chat(), layers=[3])
    bare = tiny_chat.tiny_tokenizer("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    no_prefix = llama.chat_format().__class__(bare)
    with pytest.raises(LensError, match="span 'prefix' is empty in this prompt"):
        kv_patch(llama, "prefix", chat=no_prefix)


def test_activations_of_a_span_are_those_of_each_prompt_alone(pair):
    some = prompts(MANY)
    for side in ("base", "finetuned"):
        kept = span_activations(pair, side, some, "query", ["v", "resid_pre"], layers=[1], batch_size=4)
        prefix = prefix_activations(pair, side, some[0], ["v", "resid_pre"], [1])
        with pair.using(side) as model:
            for row, prompt in enumerate(some):
                names = {"v": "blocks.1.attn.hook_v", "resid_pre": "blocks.1.hook_resid_pre"}
                by_hand = kept_by_hand(model, prompt.ids, names.values())
                s = prompt.spans["query"]
                for site, name in names.items():
                    value = by_hand[name][0]
                    assert_close(kept[site, 1][row, : len(s)], value[s.start : s.stop], rtol=1e-4, atol=1e-4)
                    assert_close(prefix[site, 1][0], value[: s.start], rtol=1e-4, atol=1e-4)
    assert kept.lengths == tuple(len(prompt.spans["query"]) for prompt in some)


# ---------------------------------------------------------------- layer curve


@pytest.mark.parametrize("direction", ["repair", "infect"])
def test_the_layer_curve_is_a_slow_loop_over_layers_and_prompts(pair, direction):
    towards, against = both_answers(pair)
    curve = layer_curve(pair, towards, against, direction=direction, control_layers=2, batch_size=4)
    sides = ("base", "finetuned") if direction == "repair" else ("finetuned", "base")
    stop = towards[0].spans["prefix"].stop
    for layer in curve.layers:
        name = f"blocks.{layer}.hook_resid_pre"
        with pair.using(sides[0]) as donor:
            value = kept_by_hand(donor, towards[0].ids, [name])[name][0, :stop]
        with pair.using(sides[1]) as model:
            slow = [
                contrast_by_hand(model, a, b, {name: (0, stop, value)}) for a, b in zip(towards, against, strict=True)
            ]
        ours = curve.contrasts[f"{sides[0]} resid_pre of this layer patched in"][layer]
        assert ours == pytest.approx(slow, rel=1e-3, abs=1e-4)
    with pair.using(sides[0]) as donor:
        slow = [contrast_by_hand(donor, a, b, {}) for a, b in zip(towards, against, strict=True)]
    assert curve.donor == pytest.approx(slow, rel=1e-3, abs=1e-4)
    with pair.using(sides[1]) as model:
        slow = [contrast_by_hand(model, a, b, {}) for a, b in zip(towards, against, strict=True)]
    assert curve.recipient == pytest.approx(slow, rel=1e-3, abs=1e-4)
    assert curve.settings["n"] == len(MANY)
    assert curve.settings["prefix_tokens"] == stop


def test_patching_the_first_layer_of_residuals_does_nothing_where_embeddings_are_shared(llama):
    """The prefix's input is the base's: there is nothing to patch below the first block."""
    curve = layer_curve(llama, *both_answers(llama), control_layers=0)
    first = curve.contrasts["base resid_pre of this layer patched in"][0]
    assert first == pytest.approx(curve.recipient, abs=1e-5)


def test_the_identity_control_moves_nothing(pair):
    towards, against = both_answers(pair)
    curve = layer_curve(pair, towards, against, control_layers=3)
    identity = np.array(curve.contrasts["identity control"])
    measured = ~np.isnan(identity).all(axis=1)
    assert measured.sum() == 3
    assert np.abs(identity[measured] - np.array(curve.recipient)).max() < 1e-5
    assert curve.noise_floor < 1e-3
    moved = np.array(curve.contrasts["random control"])[measured]
    assert np.abs(moved[1:] - np.array(curve.recipient)).max() > 1e-3


def test_the_random_control_is_displaced_as_far_as_the_patch_token_by_token(pair, monkeypatch):
    import piggyback_lens.patching as patching

    seen = []
    displaced = patching._displaced
    monkeypatch.setattr(
        patching,
        "_displaced",
        lambda own, donor, seed: seen.append((own, donor, displaced(own, donor, seed))) or seen[-1][2],
    )
    answers = both_answers(pair)
    first = layer_curve(pair, *answers, control_layers=4, seed=1)
    own, donor, random = seen[0]
    for key, value in own.values.items():
        patched, moved = donor[key] - value, random[key] - value
        assert_close(moved.norm(dim=-1), patched.norm(dim=-1), rtol=1e-3, atol=1e-4)
        if key[1] > 0:
            cosine = torch.nn.functional.cosine_similarity(moved, patched, dim=-1)
            assert cosine.abs().mean() < 0.4
    again, other = (layer_curve(pair, *answers, control_layers=4, seed=seed) for seed in (1, 2))
    assert_close(again.contrasts["random control"], first.contrasts["random control"], equal_nan=True)
    assert not np.allclose(other.contrasts["random control"], first.contrasts["random control"], equal_nan=True)


@pytest.mark.parametrize("site", ["resid_post", "v"])
def test_infecting_is_repairing_with_the_sides_exchanged(llama, site):
    towards, against = both_answers(llama)
    with llama.using("base") as base, llama.using("finetuned") as tuned:
        mirror = ModelPair(tuned, base, tokenizer=llama.tokenizer)
    infect = layer_curve(llama, towards, against, site=site, direction="infect", layers=[0, 2], control_layers=1)
    repair = layer_curve(mirror, towards, against, site=site, direction="repair", layers=[0, 2], control_layers=1)
    assert infect.donor == repair.donor
    assert infect.recipient == repair.recipient
    one = infect.contrasts[f"finetuned {site} of this layer patched in"]
    assert one == repair.contrasts[f"base {site} of this layer patched in"]
    assert_close(infect.contrasts["random control"], repair.contrasts["random control"], equal_nan=True)
    assert infect.direction == "infect"


def test_an_intervention_on_all_keys_and_values_recovers_what_the_prefix_carries(llama):
    """The curve's last word: all layers' keys and values from the base are the base's prefix cache."""
    towards, against = both_answers(llama)
    with llama.using("finetuned") as model:
        hooks = contrast(model, towards, against, interventions=kv_patch(llama, "prefix", chat=chat()))
        cached = PrefixCache.compile(llama, towards[0], side="base")
        assert_close(contrast(model, towards, against, prefix_cache=cached), hooks, rtol=1e-4, atol=1e-4)
    assert layer_curve(llama, towards, against, control_layers=0).whole == pytest.approx(hooks.tolist(), abs=1e-4)
    with llama.using("finetuned") as model:
        plain = contrast(model, towards, against)
    with llama.using("base") as model:
        base = contrast(model, towards, against)
    assert plain.mean() > base.mean()
    assert not torch.allclose(hooks, plain)


# ---------------------------------------------------------------- the result


def small_curve(**changes):
    draw = np.random.default_rng(0)
    recipient, donor = draw.normal(2, 0.1, 6), draw.normal(-2, 0.1, 6)
    patched = [(recipient + share * (donor - recipient)).tolist() for share in (0.0, 0.5, 1.0)]
    nothing = [float("nan")] * 6
    series = {
        "base resid_pre of this layer patched in": patched,
        "identity control": [(recipient + 0.004).tolist(), nothing, recipient.tolist()],
        "random control": [recipient.tolist(), nothing, (recipient + 0.1).tolist()],
    }
    whole = (recipient + 0.8 * (donor - recipient)).tolist()
    facts = {"names": {"base": "tiny-base", "finetuned": "tuned"}}
    curve = LayerCurve((0, 1, 2), series, recipient.tolist(), donor.tolist(), whole, "resid_pre", "repair", facts)
    return dataclasses.replace(curve, **changes)


def test_recovery_runs_from_recipient_to_donor():
    curve = small_curve()
    name = "base resid_pre of this layer patched in"
    values = [curve.estimate(name, layer).value for layer in curve.layers]
    assert values == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)
    frame = curve.to_frame()
    assert frame.groupby("series")["layer"].apply(list).to_dict() == {
        name: [0, 1, 2],
        "identity control": [0, 2],
        "random control": [0, 2],
    }
    row = frame[(frame["series"] == name) & (frame["layer"] == 1)].iloc[0]
    expected = recovery(curve.contrasts[name][1], curve.recipient, curve.donor)
    assert (row["value"], row["low"], row["high"], row["n"]) == (expected.value, expected.low, expected.high, 6)
    assert curve.noise_floor == pytest.approx(0.004 / abs(np.mean(curve.donor) - np.mean(curve.recipient)))


def test_a_curve_survives_being_saved(tmp_path, llama):
    real = layer_curve(llama, *both_answers(llama), control_layers=1)
    for i, curve in enumerate((small_curve(), real)):
        back = LayerCurve.load(curve.save(tmp_path / f"{i}.json"))
        assert back.layers == curve.layers
        assert back.settings == curve.settings
        for name, rows in curve.contrasts.items():
            np.testing.assert_array_equal(back.contrasts[name], rows)
        assert (back.recipient, back.donor, back.whole) == (curve.recipient, curve.donor, curve.whole)
        json.loads((tmp_path / f"{i}.json").read_text())
    for text in ("{}", "[]", '{"layers": [0], "contrasts": {}, "extra": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(LensError, match=r"bad.json is no layer curve .*: make it again"):
            LayerCurve.load(tmp_path / "bad.json")


def test_the_figure_shows_the_data():
    curve = small_curve()
    figure = curve.figure()
    frame = curve.to_frame()
    drawn = {
        tuple(round(y, 6) for y in trace.y if y is not None and not np.isnan(y))
        for trace in figure.data
        if trace.y is not None
    }
    for name in ("base resid_pre of this layer patched in", "random control"):
        assert tuple(np.round(frame[frame["series"] == name]["value"], 6)) in drawn
    text = figure.to_json()
    assert "1 = base" in text
    assert "0 = finetuned" in text
    assert "0.80 = all layers" in text
    assert "tiny-base" in text
    infect = small_curve(direction="infect").figure().to_json()
    assert "0 = base" in infect


def test_a_curve_without_controls_has_no_noise_floor_and_still_a_figure(llama, recwarn):
    curve = layer_curve(llama, *both_answers(llama), control_layers=0)
    assert np.isnan(curve.noise_floor)
    assert curve.figure().data
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_curve_that_cannot_be_made_is_refused(llama):
    towards, against = both_answers(llama)
    with pytest.raises(LensError, match="6 responses against 5"):
        layer_curve(llama, towards, against[:5])
    with pytest.raises(LensError, match="0 responses"):
        layer_curve(llama, [], [])
    with pytest.raises(LensError, match="this model has 0 to 2"):
        layer_curve(llama, towards, against, layers=[4])
    other = tiny_chat.tiny_format("be rude.").render("one", response="yes")
    with pytest.raises(LensError, match="the prompt's prefix differs from the cached one"):
        layer_curve(llama, [*towards[:5], other], against)
    with pytest.raises(LensError, match="every prompt needs a response"):
        layer_curve(llama, prompts(MANY), against)
