"""Every number of the patching experiments against plain transformers, one conversation at a time (`slow_oracle`)."""

from functools import cache

import numpy as np
import pytest
import torch
from slow_oracle import DONOR, RECIPIENT, Overwrite, SlowLab
from tiny_hooked import BACKENDS, CASES, FEW, chat, prompts
from tiny_pairs import LEVEL, THREE, contrast, pair, weights

from piggyback_lens.experiments.patching import carrier_map, layer_curve, layer_head_map, layer_position_map, patch_span
from piggyback_lens.interventions.donors import Donors
from piggyback_lens.settings import PatchSettings

TOLERANCE = 1e-4
EXACT = 1e-5  # patching a model with its own activations


@cache
def lab(name, queries=THREE, empty=False, short=False):
    """The slow path on a layout; what it found serves both backends."""
    some = prompts(queries)
    measure = contrast(some, short=short)
    models = {side: weights(name, side) for side in ("base", "finetuned")}
    towards, against = ([row.ids for row in rows] for rows in (measure.towards, measure.against))
    return SlowLab(models, some, towards, against, chat().empty_query() if empty else None)


def agree(result, slow):
    """Every cell but the random ones is the slow path's; how far each cell is from its recipient."""
    ends = {side: slow.contrasts(side) for side in ("base", "finetuned")}
    assert result.base == pytest.approx(ends["base"], abs=TOLERANCE)
    assert result.finetuned == pytest.approx(ends["finetuned"], abs=TOLERANCE)
    moved = []
    for labels, values in zip(result.cells, result.values, strict=True):
        recipient = ends[RECIPIENT[labels["flow"]]]
        if labels["series"] != "random control":
            assert values == pytest.approx(slow.cell(labels), abs=TOLERANCE), labels
        if labels["series"] == "identity control":
            assert values == pytest.approx(recipient, abs=EXACT), labels
        moved.append(float(np.abs(np.array(values) - recipient).max()))
    return moved


def patched(result, name):
    """A label of the patched cells, in order."""
    return [labels[name] for labels in result.cells if labels["series"] == "patched"]


# ---------------------------------------------------------------- one span

SETTINGS = {
    "keys and values of the prefix": {"span": "prefix", "sites": ("k", "v")},
    "one head of the whole prompt": {
        "span": "prompt", "sites": "v", "layers": [1, 2], "heads": [1], "flow": "infect"},
    "two spans together": {
        "span": ("prefix", "postfix"), "sites": ("k", "v"), "layers": [0, 2], "flow": "infect"},
    "some tokens and heads of the prefix": {
        "span": "prefix", "sites": "z", "layers": [0, 1], "heads": [1, 3], "tokens": [2, 5, 12]},
    "some tokens and heads of the query": {"span": "query", "sites": "q", "tokens": [0, 2], "heads": [0, 2]},
    "a part of the prefix": {"span": "system", "sites": "resid_post", "layers": [0], "flow": "infect"},
    "query and postfix": {"span": ("query", "postfix"), "sites": "resid_pre", "layers": [1]},
    "what the postfix adds": {"span": "postfix", "sites": ("attn_out", "mlp_out"), "layers": [0, 2]},
    "tokens on both sides of the prefix's end": {"span": "prompt", "sites": "mlp_post", "tokens": [12, 0, 13, 15]},
    "keys as attention uses them": {"span": "prefix", "sites": ("rot_k", "v"), "layers": [0, -1]},
}  # fmt: skip
FIRST = (*list(SETTINGS)[:3], *list(SETTINGS)[-2:])  # for layouts that differ little from the few


@pytest.mark.parametrize(("name", "backend"), CASES, ids=map("-".join, CASES))
def test_a_patched_span_is_the_slow_paths(name, backend):
    for title, settings in SETTINGS.items():
        if (name == "gpt2" and "rot_k" in settings["sites"]) or ((name, backend) not in FEW and title not in FIRST):
            continue
        controls = title == "keys and values of the prefix"
        result = patch_span(pair(name, backend), prompts(THREE), measure=contrast(), controls=controls, **settings)
        moved = agree(result, lab(name))
        assert moved[0] > 1e-3, title
        assert patched(result, "flow") == [settings.get("flow", "repair")]


@pytest.mark.parametrize(("name", "backend"), FEW, ids=map("-".join, FEW))
def test_a_patch_in_the_middle_of_a_layer_reaches_the_residual_stream_as_well_as_the_mlp(name, backend):
    for span, flow in (("prefix", "infect"), ("query", "repair")):
        run = {"layers": [1], "measure": contrast(), "flow": flow}
        result = patch_span(pair(name, backend), prompts(THREE), span, "resid_mid", **run)
        assert agree(result, lab(name))[0] > 1e-3


@pytest.mark.parametrize(("name", "backend"), FEW, ids=map("-".join, FEW))
def test_the_postfix_of_an_empty_query_can_be_the_donor_for_all_prompts(name, backend):
    run = {"measure": contrast(), "flow": "infect" if backend == "hooked" else "repair", "controls": False}
    tiny, some = pair(name, backend), prompts(THREE)
    for span, sites in (("postfix", ("k", "v")), (("prefix", "postfix"), "v"), ("postfix", "resid_pre")):
        result = patch_span(
            tiny, some, span, sites, settings=PatchSettings(postfix_donor="empty_query", chat=chat()), **run
        )
        assert agree(result, lab(name, empty=True))[0] > 1e-3
        own = patch_span(tiny, some, span, sites, **run)
        assert np.abs(np.array(own.values[0]) - result.values[0]).max() > 1e-3


def test_the_identity_control_is_the_identity_whatever_the_donor_of_the_postfix():
    settings = PatchSettings(postfix_donor="empty_query", chat=chat())
    result = patch_span(pair(), prompts(THREE), "postfix", measure=contrast(), settings=settings)
    identity = next(i for i, labels in enumerate(result.cells) if labels["series"] == "identity control")
    assert result.values[identity] == pytest.approx(result.finetuned, abs=EXACT)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_the_random_control_is_the_slow_paths_run_with_activations_moved_as_far_as_the_donors(name):
    slow, tiny, some = lab(name), pair(name), prompts(THREE)
    for span, site in (("prefix", "v"), ("query", "resid_pre")):
        result = patch_span(tiny, some, span, site, layers=[1], measure=contrast(), settings=PatchSettings(seed=3))
        random = next(i for i, labels in enumerate(result.cells) if labels["series"] == "random control")
        drawn = Donors(tiny, some, seed=3).of("random control", "repair", span, site)[site, 1]
        overwrites = []
        for i, prompt in enumerate(some):
            at = list(range(prompt.spans[span].start, prompt.spans[span].stop))
            own, donor = (
                slow.activations(side["repair"], prompt.ids)[site, 1][at].flatten(1) for side in (RECIPIENT, DONOR)
            )
            new = drawn[i if len(drawn) > 1 else 0, : len(at)]
            moved = new.flatten(1) - own
            torch.testing.assert_close(moved.norm(dim=1), (donor - own).norm(dim=1), rtol=1e-4, atol=1e-5)
            assert torch.nn.functional.cosine_similarity(moved, donor - own, dim=1).abs().mean() < 0.4
            overwrites.append([Overwrite(site, 1, at, new)])
        assert result.values[random] == pytest.approx(slow.contrasts("finetuned", overwrites), abs=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_may_be_single_tokens(backend):
    measure = contrast(short=True)
    assert {len(row.ids) - row.n_prompt for row in measure.rows} == {1}
    for span in ("prefix", "query"):
        result = patch_span(pair("llama-gqa", backend), prompts(THREE), span, "v", measure=measure)
        assert agree(result, lab("llama-gqa", short=True))[0] > 1e-3


# ---------------------------------------------------------------- layer curve

MODES = {
    "single": {0: [0], 1: [1], 2: [2]},
    "below": {0: [0], 1: [0, 1], 2: [0, 1, 2]},
    "above": {0: [0, 1, 2], 1: [1, 2], 2: [2]},
    "window": {0: [0, 1], 1: [0, 1, 2], 2: [1, 2]},
}
CURVES = [(*case, mode) for case in CASES for mode in MODES if case in FEW or mode == "window"]


@pytest.mark.parametrize(("name", "backend", "mode"), CURVES, ids=map("-".join, CURVES))
def test_a_layer_curve_is_the_slow_paths(name, backend, mode):
    span, sites = {"single": ("prefix", "resid_pre"), "above": ("query", "v")}.get(mode, ("prefix", ("k", "v")))
    flow = "infect" if mode == "below" else "repair"
    run = {"span": span, "sites": sites, "mode": mode, "flow": flow, "layers": [0, 1, 2]}
    result = layer_curve(pair(name, backend), prompts(THREE), control_layers=2, measure=contrast(), **run)
    assert max(agree(result, lab(name))) > 1e-3
    layers = dict(enumerate(MODES[mode].values()))
    if name == "gemma3":  # has 4 layers
        layers = {
            **layers,
            **{"above": {i: list(range(i, 4)) for i in range(3)}, "window": {2: [1, 2, 3]}}.get(mode, {}),
        }
    curve = [labels for labels in result.cells if labels["mode"] == mode]
    assert {c["layer"]: c["layers"] for c in curve if c["series"] == "patched"} == layers
    for series in ("identity control", "random control"):
        assert [c["layer"] for c in curve if c["series"] == series] == [0, 2]
    rest = [labels for labels in result.cells if labels["mode"] != mode]
    if mode == "single":  # of the prefix: all its keys and values, as a yardstick
        assert [(c["layer"], c["sites"], len(c["layers"])) for c in rest] == [
            (-1, "k+v", pair(name, backend).shape.n_layers)
        ]
    else:
        assert not rest


def test_a_window_of_an_even_number_of_layers_reaches_upwards():
    result = layer_curve(pair(), prompts(THREE), mode="window", window=2, sites="v", measure=contrast(), tokens=[3, 12])
    agree(result, lab("llama-gqa"))
    assert [c["layers"] for c in result.cells[:3]] == [[0, 1], [1, 2], [2]]
    assert patched(result, "tokens") == [[3, 12]] * 4


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize(("name", "backend"), FEW, ids=map("-".join, FEW))
def test_a_map_of_layers_and_positions_is_the_slow_paths(name, backend):
    result = layer_position_map(
        pair(name, backend), prompts(THREE), tokens=[0, 4, 12], sites=("k", "v"), control_cells=3, measure=contrast()
    )
    assert max(agree(result, lab(name))) > 1e-3
    layers = range(pair(name, backend).shape.n_layers)
    text = {0: "<bos>", 4: " ", 12: "\n"}
    wanted = [(layer, token, text[token]) for layer in layers for token in text]
    assert list(zip(*(patched(result, n) for n in ("layer", "position", "token")), strict=True)) == wanted
    assert patched(result, "tokens") == [[token] for _, token, _ in wanted]
    assert patched(result, "layers") == [[layer] for layer, _, _ in wanted]
    controls = [c for c in result.cells if c["series"] == "identity control"]
    assert len(controls) == 3
    assert [(c["layer"], c["position"]) for c in (controls[0], controls[-1])] == [wanted[0][:2], wanted[-1][:2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_of_later_spans_take_each_prompts_own_donor(backend):
    some, slow = prompts(LEVEL), lab("llama-gqa", LEVEL)
    run = {"measure": contrast(some), "flow": "infect", "control_cells": 1}
    for span in ("query", "postfix"):
        result = layer_position_map(pair("llama-gqa", backend), some, span=span, layers=[1, 2], **run)
        moved = agree(result, slow)
        assert len(patched(result, "layer")) == 6
        assert min(moved[:6]) > 1e-3
    asked = [(2, 1), (1, 0)]
    result = layer_position_map(pair("llama-gqa", backend), some, span="query", only=asked, **run)
    agree(result, slow)
    assert sorted(zip(patched(result, "layer"), patched(result, "position"), strict=True)) == sorted(asked)


HEAD_CASES = [*FEW, ("llama-mha", "bridge"), ("qwen3", "bridge")]


@pytest.mark.parametrize(("name", "backend"), HEAD_CASES, ids=map("-".join, HEAD_CASES))
def test_a_map_of_layers_and_heads_is_the_slow_paths(name, backend):
    tiny = pair(name, backend)
    for sites, span in (("z", "query"), ("k", "prefix"), (("k", "v"), "prefix")):
        result = layer_head_map(
            tiny, prompts(THREE), sites=sites, span=span, layers=[0, 2], control_cells=2, measure=contrast()
        )
        assert max(agree(result, lab(name))) > 1e-3
        grouped = name not in ("gpt2", "llama-mha")
        count = 2 if grouped and sites != "z" else 4
        wanted = [(layer, head) for layer in (0, 2) for head in range(count)]
        assert list(zip(patched(result, "layer"), patched(result, "head"), strict=True)) == wanted
        assert patched(result, "heads") == [[head] for _, head in wanted]
        if grouped:
            assert patched(result, "group")[:count] == ([0, 0, 1, 1] if sites == "z" else [0, 1])
            texts = (
                ["0 (kv 0)", "1 (kv 0)", "2 (kv 1)", "3 (kv 1)"] if sites == "z" else ["kv 0 (q 0-1)", "kv 1 (q 2-3)"]
            )
            assert patched(result, "label")[:count] == texts


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_value_head_serves_its_query_heads_and_no_others(backend):
    """Under grouped-query attention: patched heads of z that read key/value head 1 change with it, others do not."""
    result = layer_head_map(
        pair("llama-gqa", backend), prompts(THREE), sites="v", only=[(1, 1)], measure=contrast(), control_cells=0
    )
    assert agree(result, lab("llama-gqa"))[0] > 1e-3
    assert (result.cells[0]["heads"], result.cells[0]["group"]) == ([1], 1)


# ---------------------------------------------------------------- carrier map


def check_other_tokens(result, some):
    """Each cell's control: as many tokens as the span has (or all others), none of them the span's."""
    main = ("prefix", "query", "postfix")
    for number, labels in enumerate(result.cells):
        if labels["series"] != "other tokens control":
            continue
        spans = labels["span"].split(" + ")
        inside = {(span, i) for span in spans for prompt in some for i in range(len(prompt.spans[span]))}
        chosen = [(span, i) for span, tokens in labels["other_tokens"].items() for i in tokens]
        there = [(n, i) for n in main if n not in spans for i in range(min(len(p.spans[n]) for p in some))]
        size = round(sum(len(p.spans[span]) for span in spans for p in some) / len(some))
        assert len(set(chosen)) == len(chosen) == min(size, len(there)), labels
        assert set(chosen) <= set(there)
        assert not set(chosen) & inside
        full = [n for n, tokens in labels["other_tokens"].items() if {len(p.spans[n]) for p in some} == {len(tokens)}]
        assert labels["whole_spans"] == full
        beside = result.cells[number - 3]
        assert (beside["series"], beside["span"], beside["band"]) == ("patched", labels["span"], labels["band"])


@pytest.mark.parametrize(("name", "backend"), FEW, ids=map("-".join, FEW))
def test_a_carrier_map_is_the_slow_paths(name, backend):
    tiny, some = pair(name, backend), prompts(THREE)
    n_layers, few = tiny.shape.n_layers, name != "llama-gqa"
    result = carrier_map(tiny, some, bands=1 if few else 2, measure=contrast())
    moved = agree(result, lab(name))
    bands = ({} if few else {"0-1": [0, 1], "2-2": [2]}) | {"all layers": [*range(n_layers)]}
    wanted = [
        (flow, span, sites, band, layers, series)
        for flow in ("repair", "infect")
        for sites in ("k+v", "resid_pre")
        for span in ("prefix", "query", "postfix")
        for band, layers in bands.items()
        for series in ("patched", "identity control", "random control", "other tokens control")
    ]
    names = ("flow", "span", "sites", "band", "layers", "series")
    assert [tuple(labels[n] for n in names) for labels in result.cells] == wanted
    check_other_tokens(result, some)
    assert sum(change > 1e-3 for change in moved) > len(moved) / 2


CROSS = ("q", "k", "v", "rot_k", "z", "resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_post")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_sites_at_all_spans_in_bands_of_layers_are_the_slow_paths(backend):
    some, spans = prompts(THREE), ("prefix", "query", ("prefix", "postfix"))
    run = {"spans": spans, "sites": CROSS, "bands": 2, "flows": ("repair",), "measure": contrast()}
    result = carrier_map(pair("llama-gqa", backend), some, **run)
    assert len(result.cells) == 4 * len(spans) * len(CROSS) * 3
    moved = agree(result, lab("llama-gqa"))
    check_other_tokens(result, some)
    kinds = {(c["sites"], c["span"]) for c, m in zip(result.cells, moved, strict=True) if m > 1e-3}
    assert kinds == {(site, span) for site in CROSS for span in ("prefix", "query", "prefix + postfix")}


def test_the_control_of_a_part_of_the_prefix_leaves_that_part_alone():
    some = prompts(THREE)
    result = carrier_map(pair(), some, spans=("system",), sites=("v",), bands=1, flows=("repair",), measure=contrast())
    control = result.cells[-1]
    assert control["series"] == "other tokens control"
    system = {("prefix", i) for i in range(some[0].spans["system"].start, some[0].spans["system"].stop)}
    assert not system & {(span, i) for span, tokens in control["other_tokens"].items() for i in tokens}
