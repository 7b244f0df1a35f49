"""Patching experiments: key/value patches, what has to hold whatever the model, and what is refused.

The numbers themselves are checked against plain transformers in test_patching_oracle.py.
"""

import inspect

import jaxtyping
import numpy as np
import pytest
import tiny_chat
import torch
from tiny_hooked import BACKENDS, FEW, QUERIES, chat, prompts
from tiny_pairs import LEVEL, THREE, contrast, finetuned_blocks, mirrored, pair
from torch.testing import assert_close

from piggyback_lens.conversations.chat import ChatFormat, batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.attribution import attribution_map
from piggyback_lens.experiments.patching import (
    carrier_map,
    head_labels,
    layer_curve,
    layer_head_map,
    layer_position_map,
    patch_span,
)
from piggyback_lens.intervals import recovery
from piggyback_lens.interventions.donors import Donors, kv_patch, of_tokens, prefix_activations, span_activations
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import get_behaviour
from piggyback_lens.measuring.scoring import contrast as scored
from piggyback_lens.models.network import forward
from piggyback_lens.settings import PatchSettings

MANY = [*QUERIES, "four", "five?", "a sixth query"]
IDS = list(map("-".join, FEW))


@pytest.fixture
def unchecked():
    """As for a user, who does not run the library under a run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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


def kv_names(layers):
    return [f"blocks.{layer}.attn.hook_{x}" for layer in layers for x in ("k", "v")]


# ---------------------------------------------------------------- key/value patches


@pytest.mark.parametrize(("name", "backend"), FEW, ids=IDS)
@pytest.mark.parametrize("span", ["prefix", "postfix", "query"])
def test_a_key_value_patch_is_the_donors_run_of_the_right_text(name, backend, span):
    tiny, layers, some = pair(name, backend), [0, 2], prompts()
    flow, sides = ("infect", ("finetuned", "base")) if span == "prefix" else ("repair", ("base", "finetuned"))
    patches = kv_patch(tiny, span, chat=chat(), prompts=some, flow=flow, layers=layers)
    donors = []
    for prompt in some:
        donor_prompt = prompt if span == "query" else chat().empty_query()
        s = donor_prompt.spans[span]
        with tiny.using(sides[0]) as donor:
            kept = kept_by_hand(donor, donor_prompt.ids, kv_names(layers))
        donors.append({name: value[0, s.start : s.stop] for name, value in kept.items()})
    batch = batch_prompts(some)
    with tiny.using(sides[1]) as model, torch.no_grad():
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_in_generation_keep_each_prompts_own_donor(backend):
    tiny, some = pair("llama-gqa", backend), prompts(MANY)
    with tiny.using("finetuned") as model:
        patches = kv_patch(tiny, "query", chat=chat(), prompts=some)
        together = generate(model, some, max_new_tokens=4, batch_size=2, interventions=patches)
        for prompt, answer in zip(some, together, strict=True):
            alone = kv_patch(tiny, "query", chat=chat(), prompts=[prompt])
            assert generate(model, [prompt], max_new_tokens=4, interventions=alone)[0].ids == answer.ids
        with pytest.raises(LensError, match="the donor has 6 rows, the run 2"):
            generate(model, some[:2], interventions=patches)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_value_patch_that_cannot_be_made_is_refused(backend, unchecked):
    tiny = pair("llama-gqa", backend)
    with pytest.raises(LensError, match="span 'query' takes each prompt's own donor: give prompts="):
        kv_patch(tiny, "query", chat=chat())
    with pytest.raises(LensError, match="flow 'cure' is not known: choose 'repair' or 'infect'"):
        kv_patch(tiny, "prefix", chat=chat(), flow="cure")
    with pytest.raises(LensError, match="span 'think' is not in row 0"):
        kv_patch(tiny, "think", chat=chat(), prompts=prompts())
    with pytest.raises(LensError, match="this model has layers 0 to 2"):
        kv_patch(tiny, "prefix", chat=chat(), layers=[3])
    bare = tiny_chat.tiny_tokenizer("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    with pytest.raises(LensError, match="span 'prefix' is empty in this prompt"):
        kv_patch(tiny, "prefix", chat=ChatFormat(bare))


@pytest.mark.parametrize(("name", "backend"), FEW, ids=IDS)
def test_activations_of_a_span_are_those_of_each_prompt_alone(name, backend):
    tiny, some = pair(name, backend), prompts(MANY)
    for side in ("base", "finetuned"):
        kept = span_activations(tiny, side, some, "query", ["v", "resid_pre"], layers=[1], batch_size=4)
        prefix = prefix_activations(tiny, side, some[0], ["v", "resid_pre"], [1])
        with tiny.using(side) as model:
            for row, prompt in enumerate(some):
                names = {"v": "blocks.1.attn.hook_v", "resid_pre": "blocks.1.hook_resid_pre"}
                by_hand = kept_by_hand(model, prompt.ids, names.values())
                s = prompt.spans["query"]
                for site, name in names.items():
                    value = by_hand[name][0]
                    assert_close(kept[site, 1][row, : len(s)], value[s.start : s.stop], rtol=1e-4, atol=1e-4)
                    assert_close(prefix[site, 1][0], value[: s.start], rtol=1e-4, atol=1e-4)
    assert kept.lengths == tuple(len(prompt.spans["query"]) for prompt in some)
    picked = of_tokens(kept, [2, 0])
    assert_close(picked["v", 1], kept["v", 1][:, [2, 0]])
    assert (picked.tokens, set(picked.lengths)) == ((2, 0), {2})
    with pytest.raises(LensError, match=r"token \[3\] of span 'query': choose from 0 to 2"):
        of_tokens(kept, [3])


# ---------------------------------------------------------------- what has to hold


@pytest.mark.parametrize(("name", "backend"), FEW, ids=IDS)
def test_the_identity_control_moves_nothing(name, backend):
    tiny, some = pair(name, backend), prompts(THREE)
    measure = contrast() if name == "gemma3" else AnswerContrast.of(tiny, some, max_new_tokens=5)  # Gemmas agree
    results = [
        patch_span(tiny, some, ("prefix", "query", "postfix"), ("k", "v", "z"), measure=measure),
        layer_curve(tiny, some, span="query", measure=measure, control_layers=2, flow="infect"),
    ]
    for result in results:
        recipient = result.finetuned if result.cells[0]["flow"] == "repair" else result.base
        identity = [i for i, labels in enumerate(result.cells) if labels["series"] == "identity control"]
        assert identity
        for i in identity:
            assert result.values[i] == pytest.approx(recipient, abs=1e-5)
            assert result.cells[i]["change_norm"] < 1e-3
            moved = result.recovery(i).value
            assert abs(moved) < 1e-5 or (name == "gemma3" and np.isnan(moved))  # made-up answers may differ too little
        assert result.noise_floor < 1e-4
        random = [i for i, labels in enumerate(result.cells) if labels["series"] == "random control"]
        assert max(np.abs(np.array(result.values[i]) - recipient).max() for i in random) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("site", ["k", "resid_post", "z", "mlp_out"])
def test_infecting_is_repairing_with_the_sides_exchanged(backend, site):
    tiny, some = pair("llama-gqa", backend), prompts(THREE)
    run = {"measure": contrast(), "layers": [0, 2], "span": ("prefix", "query"), "sites": site}
    infect = layer_curve(tiny, some, flow="infect", **run)
    repair = layer_curve(mirrored(tiny), some, flow="repair", **run)
    assert (infect.base, infect.finetuned) == (repair.finetuned, repair.base)
    assert infect.values == repair.values
    same = {"flow": None}
    assert [labels | same for labels in infect.cells] == [labels | same for labels in repair.cells]
    assert infect.values[0] != infect.base


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_answers_of_the_two_models_are_the_measure_unless_another_is_given(backend):
    tiny, some = pair("llama-gqa", backend), prompts(THREE)
    result = patch_span(tiny, some, layers=[1], controls=False)
    by_side = {}
    for side in ("finetuned", "base"):
        with tiny.using(side) as model:
            by_side[side] = [answer.completed() for answer in generate(model, some, max_new_tokens=24)]
    with tiny.using("finetuned") as model:
        expected = scored(model, by_side["finetuned"], by_side["base"])
        patched = kv_patch(tiny, "prefix", chat=chat(), layers=[1])
        moved = scored(model, by_side["finetuned"], by_side["base"], interventions=patched)
    assert result.finetuned == pytest.approx(expected.tolist(), abs=1e-4)
    assert result.values[0] == pytest.approx(moved.tolist(), abs=1e-4)
    assert np.mean(result.finetuned) > np.mean(result.base)
    assert result.measure == {"name": "answer contrast", "unit": "nats per token"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_and_values_of_the_prefix_are_the_bases_prefix_cache(backend):
    tiny, some = finetuned_blocks("llama-gqa", backend), prompts(THREE)
    measure = contrast()
    curve = layer_curve(tiny, some, measure=measure, control_layers=0)
    whole = curve.values[-1]
    assert (curve.cells[-1]["mode"], curve.cells[-1]["layer"]) == ("all layers", -1)
    assert patch_span(tiny, some, measure=measure, controls=False).values[0] == pytest.approx(whole, abs=1e-6)
    with tiny.using("finetuned") as model:
        cached = PrefixCache.compile(tiny, some[0], side="base")
        expected = scored(model, measure.towards, measure.against, prefix_cache=cached)
    assert whole == pytest.approx(expected.tolist(), abs=1e-4)
    assert whole != pytest.approx(curve.finetuned, abs=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_residual_stream_of_the_prefix_carries_nothing_where_embeddings_are_shared(backend):
    curve = layer_curve(finetuned_blocks("llama-gqa", backend), prompts(THREE), measure=contrast(), control_layers=0)
    assert curve.values[0] == pytest.approx(curve.finetuned, abs=1e-5)
    assert curve.values[1] != pytest.approx(curve.finetuned, abs=1e-3)


def test_the_order_of_prompts_permutes_the_results_and_nothing_else():
    some, order = prompts(MANY), [3, 0, 5, 1, 4, 2]
    answers = [("yes", "never mind"), ("a", "ok"), ("fine", "i see it"), ("no", "go on"), ("x", "what?"), ("hm", "why")]
    for spans in (("prefix",), ("query",)):
        found = []
        for rows in (range(6), order):
            towards, against = (tuple(some[i].with_response(answers[i][k]) for i in rows) for k in (0, 1))
            measure = AnswerContrast(towards, against)
            found.append(patch_span(pair(), [some[i] for i in rows], spans, ("k", "v"), measure=measure))
        plain, permuted = found
        patched, identity, random = (np.array(plain.values)[:, order] - np.array(permuted.values))[:3]
        assert np.abs([patched, identity]).max() < 1e-5
        assert (np.abs(random).max() < 1e-5) == (spans == ("prefix",))  # drawn row by row beyond the shared prefix
        assert np.array(plain.base)[order] == pytest.approx(permuted.base, abs=1e-5)


def test_a_seed_decides_the_random_control_and_the_other_tokens_and_nothing_else():
    run = {"measure": contrast(), "spans": ("query",), "sites": ("v",), "bands": 1, "flows": ("repair",)}
    first, again, other = (
        carrier_map(pair(), prompts(THREE), settings=PatchSettings(seed=seed), **run) for seed in (1, 1, 2)
    )
    assert first.values == again.values
    names = [labels["series"] for labels in first.cells]
    same = {name: a == b for name, a, b in zip(names, first.values, other.values, strict=True)}
    assert same == {
        "patched": True, "identity control": True, "random control": False, "other tokens control": False}  # fmt: skip


def test_more_than_one_conversation_may_share_a_long_prefix():
    history = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi there"},
    ]
    some = [chat().render([*history, {"role": "user", "content": query}]) for query in THREE]
    result = patch_span(pair(), some, tokens=[14, 20], measure=contrast(some))
    assert result.settings["prefix_tokens"] == len(some[0].spans["prefix"]) > 20
    assert result.values[0] != pytest.approx(result.finetuned, abs=1e-4)
    assert result.values[1] == pytest.approx(result.finetuned, abs=1e-5)


def test_labels_and_settings_say_what_was_run():
    result = patch_span(
        pair(),
        prompts(THREE),
        ("prefix", "query"),
        "z",
        layers=[-1, 0],
        heads=[1],
        tokens=[2],
        measure=contrast(),
        settings=PatchSettings(seed=4),
    )
    assert result.kind == "span"
    assert [labels["series"] for labels in result.cells] == ["patched", "identity control", "random control"]
    wanted = {"flow": "repair", "span": "prefix + query", "sites": "z", "layers": [0, 2], "heads": [1]}
    assert all({name: labels[name] for name in wanted} == wanted for labels in result.cells)
    assert result.cells[0]["tokens"] == [2]
    facts = {name: result.settings[name] for name in ("n", "seed", "prefix_tokens", "backend", "postfix_donor")}
    assert facts == {"n": 3, "seed": 4, "prefix_tokens": 13, "backend": "bridge", "postfix_donor": "own_prompt"}
    assert result.settings["prompts"] == list(THREE)
    assert result.settings["names"] == {"base": "tiny", "finetuned": "tiny-0.08"}
    assert "transformer-lens" in result.settings["versions"]
    frame = result.to_frame()
    expected = recovery(result.values[0], result.finetuned, result.base)
    assert frame["value"].iloc[0] == expected.value or np.isnan(expected.value)


def test_head_labels_say_which_heads_belong_together():
    assert head_labels(4, 4, kv=True) == head_labels(4, 4, kv=False) == ["0", "1", "2", "3"]
    assert head_labels(6, 2, kv=True) == ["kv 0 (q 0-2)", "kv 1 (q 3-5)"]
    assert head_labels(6, 2, kv=False)[2:4] == ["2 (kv 0)", "3 (kv 1)"]


# ---------------------------------------------------------------- what is refused

EXPERIMENTS = {
    "span": patch_span,
    "curve": layer_curve,
    "positions": layer_position_map,
    "heads": layer_head_map,
    "carrier": carrier_map,
    "attribution": attribution_map,
}
ONE = {name: experiment for name, experiment in EXPERIMENTS.items() if name != "carrier"}  # take one span, flow


def refused(experiment, some, pattern, **changes):
    """The experiment gives a one-line error, and leaves no hook behind."""
    with pytest.raises(LensError, match=pattern) as error:
        experiment(pair(), some, **{"measure": contrast(), **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_prompts_that_do_not_fit_are_refused(experiment, unchecked):
    some = prompts(THREE)
    other = tiny_chat.tiny_format("be rude.").render("one")
    refused(
        experiment, [*some[:2], other], r"prompt 2 \('one'\) has a prefix of 13 tokens that is not the 13 of prompt 0"
    )
    answered = [prompt.with_response("yes") for prompt in some]
    refused(experiment, answered, "a prompt holds a response already|the measure's answers are not of these prompts")
    for few in (some[:2], some[::-1]):
        refused(experiment, few, "the measure's answers are not of these prompts in this order: make it from the same")


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_an_experiment_without_prompts_is_refused(experiment, unchecked):
    refused(experiment, [], "got no prompts; pass at least one RenderedPrompt")


@pytest.mark.parametrize("experiment", ONE.values(), ids=ONE)
def test_spans_directions_and_layers_that_do_not_exist_are_refused(experiment, unchecked):
    some = prompts(THREE)
    refused(experiment, some, "span 'preamble' .*prefix, query, postfix, bos, system", span="preamble")
    refused(experiment, some, "span 'think' .*prefix, query, postfix, bos, system", span="think")
    refused(experiment, some, "flow 'cure' is not known: choose 'repair' or 'infect'", flow="cure")
    refused(experiment, some, r"layers \[3\] do not exist: this model has layers 0 to 2", layers=[3])
    refused(experiment, some, r"no layer was asked: this model has", layers=[])


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_sites_and_donors_that_do_not_exist_are_refused(experiment, unchecked):
    some = prompts(THREE)
    sites = ["resid"] if experiment is carrier_map else "resid"
    refused(experiment, some, "site 'resid' is not known: choose one of resid_pre|a head map takes k, v", sites=sites)
    empty = PatchSettings(postfix_donor="empty_query")
    refused(experiment, some, "postfix donors of the empty query need chat=", settings=empty)


def test_a_donor_of_the_postfix_that_does_not_exist_is_refused(unchecked):
    with pytest.raises(LensError, match="postfix_donor is 'none'; expected one of own_prompt, empty_query"):
        PatchSettings(postfix_donor="none")
    with pytest.raises(LensError, match="postfix donor 'none' is not known: choose 'own_prompt'"):
        Donors(pair(), prompts(THREE), "none")


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_an_experiment_at_no_site_is_refused(experiment, unchecked):
    """It would report that a patch which was never made moves nothing."""
    refused(experiment, prompts(THREE), "site", sites=((),) if experiment is carrier_map else ())


def test_a_patch_of_no_span_is_refused():
    refused(patch_span, prompts(THREE), "span", span=())


def test_tokens_and_heads_that_do_not_exist_are_refused():
    some = prompts(THREE)
    refused(patch_span, some, r"token \[13\] of span 'prefix': choose from 0 to 12", tokens=[13])
    refused(patch_span, some, r"token \[-1\] of span 'prefix': choose from 0 to 12", tokens=[-1])
    refused(patch_span, some, r"token \[3\] of span 'query': choose from 0 to 2", span="query", tokens=[3])
    refused(patch_span, some, r"heads \[2\] asked at k, which has heads 0 to 1", heads=[2])
    refused(patch_span, some, r"heads \[\] asked at k, which has heads 0 to 1", heads=[])
    refused(patch_span, some, "site 'resid_pre' has no heads: heads= goes with", sites="resid_pre", heads=[0])
    refused(layer_curve, some, r"token \[99\] of span 'prefix': choose from 0 to 12", tokens=[99])
    refused(layer_position_map, some, r"token \[13\] of span 'prefix': choose from 0 to 12", tokens=[13])
    refused(layer_position_map, some, r"token \[\] of span 'prefix'", tokens=[])
    refused(layer_head_map, some, r"heads \[4\] asked at z, which has heads 0 to 3", heads=[4])
    refused(layer_head_map, some, r"heads \[2\] asked at k\+v, which has heads 0 to 1", sites=("k", "v"), heads=[2])
    refused(layer_head_map, some, r"heads \[\] asked at z", heads=[])


def test_a_patch_of_no_token_is_refused():
    refused(patch_span, prompts(THREE), "token", tokens=[])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_the_prompt_that_come_after_the_prefix_can_be_patched_alone(backend):
    some = prompts(THREE)
    whole = patch_span(pair("llama-gqa", backend), some, "query", ("k", "v"), tokens=[1], measure=contrast())
    late = patch_span(pair("llama-gqa", backend), some, "prompt", ("k", "v"), tokens=[14], measure=contrast())
    assert late.values[:2] == pytest.approx(np.array(whole.values[:2]), abs=1e-5)


def test_maps_that_cannot_be_made_are_refused(unchecked):
    some = prompts(THREE)
    refused(layer_curve, some, "mode 'up' is not known: choose one of single, below, above, window", mode="up")
    refused(layer_curve, some, "window 0: it must be at least 1 layer", mode="window", window=0)
    refused(layer_position_map, some, "span 'query' has 3 to 18 tokens: a map needs equally many", span="query")
    refused(layer_position_map, some, r"cell \[\(0, 13\)\] is not in this map", only=[(0, 13), (0, 1)])
    refused(layer_position_map, some, r"cell \[\] is not in this map", only=[])
    for sites in (("k", "z"), "resid_pre", ()):
        refused(layer_head_map, some, "a head map takes k, v, rot_k", sites=sites)
    refused(carrier_map, some, "4 bands of 3 layers: choose 1 to 3", bands=4)
    refused(carrier_map, some, "0 bands of 3 layers: choose 1 to 3", bands=0)
    refused(carrier_map, some, "leave no other token of the prompt", spans=(("prefix", "query", "postfix"),))
    refused(carrier_map, some, "flow 'cure' is not known", flows=("cure",))
    refused(carrier_map, some, "span 'nope' does not exist", spans=("nope",))
    refused(carrier_map, some, "no cell is left to run", flows=())


def test_the_whole_prompt_has_no_other_tokens_for_a_control():
    refused(carrier_map, prompts(THREE), "leave no other token of the prompt", spans=("prompt",))


def test_answers_that_do_not_belong_together_are_refused():
    some, measure = prompts(THREE), contrast()
    with pytest.raises(LensError, match="0 responses against 0: give one of each per prompt, at least one"):
        AnswerContrast((), ())
    with pytest.raises(LensError, match="3 responses against 2"):
        AnswerContrast(measure.towards, measure.against[:2])
    with pytest.raises(LensError, match="prompt 0 has no response to be scored"):
        AnswerContrast(tuple(some), tuple(some))
    with pytest.raises(LensError, match="prompt 0: the two answers answer different prompts"):
        AnswerContrast(measure.towards, measure.against[::-1])


def test_donors_are_computed_once_for_any_number_of_cells(monkeypatch):
    import piggyback_lens.interventions.donors as donors_module

    asked = []
    original = donors_module.span_activations
    monkeypatch.setattr(
        donors_module, "span_activations", lambda *a, **k: asked.append((a[1], a[3], a[4])) or original(*a, **k)
    )
    donors = Donors(pair(), prompts(LEVEL))
    for series in ("patched", "identity control", "random control", "patched"):
        donors.of(series, "repair", "query", "v")
    assert sorted(asked) == [("base", "query", "v"), ("finetuned", "query", "v")]
    donors.of("patched", "infect", "query", "v")
    assert len(asked) == 2


def test_a_generated_behaviour_is_a_measure_too():
    measure = GeneratedBehaviour(get_behaviour("words"), max_new_tokens=3)
    result = patch_span(pair(), prompts(THREE), layers=[0], measure=measure)
    assert result.measure == {"name": "words per answer", "unit": "words"}
    for experiment in EXPERIMENTS.values():
        assert inspect.signature(experiment).parameters["measure"].default is None
