"""The engine of the patching experiments: forked passes, chunks, receipts, hooks, generated measures."""

from contextlib import contextmanager

import numpy as np
import pytest
import slow_oracle
import torch
from tiny_hooked import BACKENDS, FEW, chat, hook_count, prompts
from tiny_pairs import ANSWERS, THREE, contrast, pair, weights
from torch.testing import assert_close

import piggyback_lens.experiments.cells as cells_module
from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.attribution import attribution_map
from piggyback_lens.experiments.cells import evaluate, first_layer, require_one_prefix
from piggyback_lens.experiments.patching import layer_curve, layer_position_map, patch_span
from piggyback_lens.interventions.donors import prefix_activations, span_activations
from piggyback_lens.interventions.hooks import Record
from piggyback_lens.interventions.kinds import add, patch, zero
from piggyback_lens.interventions.placement import Placement
from piggyback_lens.interventions.running import applied, applied_each
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.models.backends import hook_name, shape_of
from piggyback_lens.models.forking import Lineage, forking
from piggyback_lens.models.network import forward
from piggyback_lens.settings import PatchSettings

IDS = list(map("-".join, FEW))

# ---------------------------------------------------------------- forking


def test_a_lineage_orders_rows_by_the_layer_that_they_are_born_at():
    lineage, order = Lineage.of(2, [2, 0, 1, 2], [0, 1, 1, 0])
    assert order == [0, 1, 3, 4, 2, 5]
    assert lineage.born == (0, 0, 0, 1, 2, 2)
    assert lineage.parents == (0, 1, 2, 1, 0, 0)
    assert [lineage.alive(layer) for layer in range(4)] == [3, 4, 6, 6]


@pytest.mark.parametrize(("name", "backend"), FEW, ids=IDS)
def test_a_forked_pass_is_one_pass_for_each_variant(name, backend):
    """Padded rows of different lengths; variants of either row are born at each layer."""
    some = prompts(THREE[:2])
    with pair(name, backend).using("finetuned") as model:
        last = shape_of(model).n_layers - 1
        vectors = torch.randn(4, shape_of(model).d_model, generator=torch.Generator().manual_seed(0))
        firsts, parents = [last, 0, 1, 1], [1, 0, 1, 0]
        changes = [add(v, site="resid_pre", layers=at, span="query") for v, at in zip(vectors, firsts, strict=True)]
        lineage, order = Lineage.of(2, firsts, parents)
        rows = [*some, *(some[parent] for parent in parents)]
        batch = batch_prompts([rows[number] for number in order], side="right")
        placement = Placement.of(batch)
        variants = [(placement.only([order.index(2 + i)]), (change,), Record()) for i, change in enumerate(changes)]
        begin = lineage.alive(0)
        with torch.no_grad(), applied_each(model, variants), forking(model, lineage):
            together = forward(model, batch.ids[:begin], batch.attention_mask[:begin])
        assert len(together) == 6
        for place, number in enumerate(order):
            own = [rows[number]]
            change = None if number < 2 else changes[number - 2]
            with torch.no_grad(), applied(model, batch_prompts(own), change):
                alone = forward(model, batch_prompts(own).ids, batch_prompts(own).attention_mask)
            assert_close(together[place, : len(own[0].ids)], alone[0], rtol=1e-4, atol=1e-4)
        assert [record.receipts[0].cells for _, _, record in variants] == [len(some[p].spans["query"]) for p in parents]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_forked_pass_are_those_of_its_copies(backend):
    batch = batch_prompts(prompts(THREE[:1]))
    with pair("llama-gqa", backend).using("finetuned") as model:
        name, found = hook_name(model, "resid_pre", 0), []
        for lineage in (Lineage((0, 1, 2), (0, 0, 1)), Lineage((0,), (0,))):
            kept = []

            def keep(activation, hook, kept=kept):
                kept.append(activation.detach().requires_grad_())
                return kept[0]

            with model.hooks(fwd_hooks=[(name, keep)]), forking(model, lineage):
                logits = forward(model, batch.ids, batch.attention_mask)
            found.append(torch.autograd.grad(logits.sum(), kept)[0] / len(lineage.born))
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert found[1].abs().max() > 1e-3


def test_forking_takes_its_hooks_away_also_after_an_error():
    batch = batch_prompts(prompts(THREE[:1]))
    with pair().using("base") as model:
        before = every_hook(model)
        during = []

        def stop():
            with forking(model, Lineage((0, 1), (0, 0))):
                during.append(every_hook(model))
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            stop()
        assert during == [before + 2]  # of layers 1 and 2
        with forking(model, Lineage((0, 0), (0, 1))):
            assert every_hook(model) == before
        assert every_hook(model) == before
        assert forward(model, batch.ids, batch.attention_mask).shape[0] == 1


# ---------------------------------------------------------------- chunks


def outcomes(model, some, measure, cells, **kwargs):
    found = [pair for chunk in evaluate(model, some, measure, cells, **kwargs) for pair in chunk]
    assert sorted(number for number, _ in found) == list(range(len(cells)))
    return dict(found)


def a_few_cells(tiny, some):
    """Cells that begin at different layers and tokens, within the prefix, beyond it, and across its end."""
    donors = {
        "prefix": prefix_activations(tiny, "base", some[0], ("v", "resid_pre")),
        "query": span_activations(tiny, "base", some, "query", ("v", "resid_pre")),
        "prompt": span_activations(tiny, "base", some, "prompt", ("v",)),
    }
    return [
        patch(donors["query"], sites="v", layers=2).parts,
        patch(donors["prefix"], sites="resid_pre", layers=1).parts,
        (),
        patch(donors["prompt"], sites="v", layers=[0, 1]).parts,
        patch(donors["prefix"], sites="v", layers=[0], heads=[0]).parts + patch(donors["query"], sites="v").parts,
        (zero("v", layers=[2], span="prefix", tokens=[12]).parts),
        (zero("z", layers=[1], span="postfix").parts),
    ]


@pytest.mark.parametrize(("name", "backend"), FEW, ids=IDS)
def test_chunks_and_batches_do_not_change_the_numbers(name, backend, monkeypatch):
    tiny, some, measure = pair(name, backend), prompts(THREE), contrast()
    cells = a_few_cells(tiny, some)
    with tiny.using("finetuned") as model:
        wide = outcomes(model, some, measure, cells)
        chunks = list(evaluate(model, some, measure, cells, budget_gb=1e-9))
        assert [len(chunk) for chunk in chunks] == [1] * len(cells)
        narrow = dict(chunk[0] for chunk in chunks)
        monkeypatch.setattr(cells_module, "MOST_ROWS", 12)
        monkeypatch.setattr(cells_module, "ROWS_TOGETHER", 5)
        middle = outcomes(model, some, measure, cells)
    for number in range(len(cells)):
        for other in (narrow, middle):
            assert_close(other[number].values, wide[number].values, rtol=0, atol=1e-5)
            assert other[number].touched == wide[number].touched
            assert other[number].change_norm == pytest.approx(wide[number].change_norm, rel=1e-3)


def test_an_experiment_does_not_depend_on_its_memory():
    run = {"span": "prefix", "tokens": [0, 7, 12], "control_cells": 2, "measure": contrast(), "flow": "infect"}
    wide, narrow = (
        layer_position_map(pair(), prompts(THREE), settings=PatchSettings(budget_gb=gb), **run) for gb in (1.0, 1e-6)
    )
    assert np.abs(np.array(wide.values) - narrow.values).max() < 1e-5
    assert [labels["token"] for labels in wide.cells] == [labels["token"] for labels in narrow.cells]


def test_receipts_say_what_was_touched_and_how_far_it_was_moved():
    some, measure = prompts(THREE), contrast()
    result = patch_span(pair(), some, ("prefix", "query"), "v", layers=[0], tokens=[0, 2], measure=measure)
    patched, identity = result.cells[:2]
    assert patched["touched"] == identity["touched"] == 2 + 2 * len(some)  # the prefix once, every query once
    models = {side: weights("llama-gqa", side) for side in ("base", "finetuned")}
    squares = 0.0
    for i, prompt in enumerate(some):
        base, tuned = (slow_oracle.read(models[side], prompt.ids)["v", 0] for side in ("base", "finetuned"))
        start = prompt.spans["query"].start
        squares += float((base - tuned)[[start, start + 2]].pow(2).sum())
        squares += float((base - tuned)[[0, 2]].pow(2).sum()) if i == 0 else 0
    assert patched["change_norm"] == pytest.approx(squares**0.5, rel=1e-4)
    assert identity["change_norm"] < 1e-4


def test_the_lowest_layer_of_a_cell_is_where_its_rows_are_born():
    with pair().using("base") as model:
        assert first_layer((), model) == 0
        assert first_layer(zero("v").parts, model) == 0
        assert first_layer((zero("v", layers=2) + zero("z", layers=[1, 2])).parts, model) == 1
        assert first_layer(zero("v", layers=-1).parts, model) == 2


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_evaluated_is_refused():
    some, measure = prompts(THREE), contrast()
    with pytest.raises(LensError, match="no prompts"):
        require_one_prefix([])
    assert require_one_prefix(some) == 13
    with pair().using("base") as model:
        with pytest.raises(LensError, match="the measure's answers are not of these prompts in this order"):
            list(evaluate(model, some[::-1], measure, [()]))
        with pytest.raises(LensError, match="span 'think' is no span of the prompt: it has prefix, query"):
            list(evaluate(model, some, measure, [zero("v", span="think").parts]))
        with pytest.raises(LensError, match=r"zero\(v, all layers, prefix, generation only\) touched nothing"):
            list(evaluate(model, some, measure, [(), zero("v", span="prefix", phase="generation").parts]))


# ---------------------------------------------------------------- hooks and gradients


def every_hook(model):
    """Hook functions of TransformerLens and of torch, on hook points and on any other module."""
    modules = {id(module): module for module in model.modules()}
    if hasattr(model, "original_model"):
        modules |= {id(module): module for module in model.original_model.modules()}
    torch_hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules.values()
    )
    return hook_count(model) + torch_hooks


@contextmanager
def untouched(tiny):
    """Hooks, gradients and the global gradient mode are afterwards what they were."""
    sides = ("base", "finetuned")

    def state():
        found = []
        for side in sides:
            with tiny.using(side) as model:
                parameters = list(model.parameters())
                found.append((every_hook(model), [p.requires_grad for p in parameters]))
                assert all(p.grad is None for p in parameters)
        return found, torch.is_grad_enabled()

    ids = torch.tensor([[1, 7, 8]])
    for side in sides:  # transformers puts hooks of its own on a model in its first pass
        with tiny.using(side) as model, torch.no_grad():
            forward(model, ids, torch.ones_like(ids))
    before = state()
    yield
    assert state() == before


EXPERIMENTS = {
    "span": lambda tiny: patch_span(tiny, prompts(THREE), ("prefix", "query"), measure=contrast()),
    "curve": lambda tiny: layer_curve(tiny, prompts(THREE), measure=contrast()),
    "attribution": lambda tiny: attribution_map(
        tiny, prompts(THREE), steps=1, layers=[1], check_cells=2, top_cells=1, measure=contrast()
    ),
    "generated": lambda tiny: patch_span(tiny, prompts(THREE), "prompt", measure=letters(2), controls=False),
}


def letters(tokens):
    """The number of characters of an answer, as a behaviour."""
    behaviour = Behaviour("letters", "letters per answer", "letters", "Number of characters.", len)
    return GeneratedBehaviour(behaviour, max_new_tokens=tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_hooks_and_gradients_are_left_as_they_were(experiment, backend):
    tiny = pair("llama-gqa", backend)
    with untouched(tiny):
        experiment(tiny)
    with torch.no_grad(), untouched(tiny):
        experiment(tiny)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_hooks_are_removed_after_an_error_in_the_middle_of_a_pass(experiment, backend):
    tiny = pair("llama-gqa", backend)
    with tiny.using("finetuned") as model:
        seen = []

        def fail(activation, hook):
            seen.append(activation.shape)
            if len(seen) > 4:
                raise KeyboardInterrupt

        failing = model.hooks(fwd_hooks=[(hook_name(model, "resid_post", 1), fail)])
        with untouched(tiny), failing, pytest.raises(KeyboardInterrupt):
            experiment(tiny)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_hooks_of_the_user_survive_and_act(experiment, backend):
    """A steering vector that the user put on the finetuned model stays on, whatever the library runs."""
    tiny = pair("llama-gqa", backend)
    plain = experiment(tiny)
    with tiny.using("finetuned") as model:
        vector = torch.randn(shape_of(model).d_model, generator=torch.Generator().manual_seed(3)) * 2
        name, calls = hook_name(model, "resid_post", 0), []

        def steer(activation, hook):
            calls.append(1)
            return activation + vector

        point = model.hook_dict[name]
        point.add_hook(steer)
        try:
            before = every_hook(model)
            steered, seen = experiment(tiny), len(calls)
            assert every_hook(model) == before
            batch = batch_prompts(prompts(THREE[:1]))
            forward(model, batch.ids, batch.attention_mask)
            assert len(calls) == seen + 1 > 1
        finally:
            point.fwd_hooks.pop().hook.remove()
    one, other = (result.attributed if hasattr(result, "attributed") else result for result in (plain, steered))
    assert one.base == other.base
    assert one.finetuned != other.finetuned


# ---------------------------------------------------------------- generated behaviours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spans", [("prefix",), ("query",), ("prompt",), ("prefix", "postfix"), ("prefix", "prompt")])
def test_a_generated_behaviour_is_that_of_generating_by_hand_under_the_same_patches(backend, spans):
    tiny, some, kv = pair("llama-gqa", backend), prompts(THREE), ("k", "v")
    result = patch_span(tiny, some, spans, kv, measure=letters(5), flow="infect")
    by_hand, plain = [], []
    for prompt in some:
        donors = [span_activations(tiny, "finetuned", [prompt], span, kv) for span in spans]
        patches = [part for donor in donors for part in patch(donor).parts]
        with tiny.using("base") as model:
            for found, interventions in ((by_hand, patches), (plain, None)):
                answer = generate(
                    model, [prompt], interventions=interventions, max_new_tokens=5, share_prefix=False, batch_size=1
                )
                found.append(len(answer[0].text))
    assert result.values[0] == by_hand
    assert result.base == result.values[1] == plain
    with tiny.using("finetuned") as model:
        assert result.finetuned == [len(answer.text) for answer in generate(model, some, max_new_tokens=5)]
    assert result.cells[0]["change_norm"] > 0


def test_generated_answers_under_patches_differ_from_plain_ones():
    """Otherwise the test above would compare nothing."""
    tiny, some = pair(), prompts(THREE)
    donor = span_activations(tiny, "finetuned", some, "prompt", ("k", "v"))
    with tiny.using("base") as model:
        texts = [
            [a.text for a in generate(model, some, interventions=i, max_new_tokens=5)] for i in (None, patch(donor))
        ]
    assert texts[0] != texts[1]


def test_a_contrast_is_scored_from_the_answers_alone():
    some = prompts(THREE)
    measure = contrast()
    assert len(measure) == 3
    assert [row.span_text("response") for row in measure.rows][:4] == [
        "yes<end>",
        "a word, no<end>",
        "fine<end>",
        "never mind<end>",
    ]
    scores = torch.tensor([[1.0, 2.0, 3.0, 0.5, 0.5, 0.5]])
    assert measure.combine(scores).tolist() == [[0.5, 1.5, 2.5]]
    swapped = AnswerContrast(measure.against, measure.towards)
    with pair().using("base") as model:
        one, other = (outcomes(model, some, m, [()])[0].values for m in (measure, swapped))
    assert_close(one, -other)
    assert measure.to_dict()["ids"][0] == list(some[0].with_response(ANSWERS[0][0]).ids)
    assert chat().fingerprint == some[0].fingerprint
