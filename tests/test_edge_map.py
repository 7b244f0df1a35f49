"""Attention edges as a map: exact cells against plain transformers, the gradient against finite differences."""

import functools

import numpy as np
import pytest
import torch
from test_attention_edges import added_to_scores, bias_of
from tiny_hooked import BACKENDS, prompts
from tiny_pairs import THREE, contrast, pair, weights

from piggyback_lens.errors import LensError
from piggyback_lens.experiments.cells import evaluate
from piggyback_lens.experiments.edges import EdgeResult, edge_map, specific
from piggyback_lens.interventions.kinds import cut_attention
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour
from piggyback_lens.results.result import load_result
from piggyback_lens.results.run import report_run

SOME = (*THREE, "abc", "why so?")
EDGES = (("query", "prefix"), ("response", "prompt"), ("prefix", "system"))


@functools.cache
def answers():
    """The models' own answers, on which they differ."""
    return AnswerContrast.of(pair(), prompts(SOME), max_new_tokens=5)


@pytest.fixture(scope="module", params=BACKENDS)
def found(request):
    return edge_map(pair("llama-gqa", request.param), prompts(SOME), edges=EDGES, exact_cells=4, measure=answers())


def slow_contrast(model, measure, edge, layers=None, heads=None):
    """Per prompt, one conversation at a time in plain transformers with masks added."""
    scores = []
    for row in measure.rows:
        bias = bias_of(row, *edge, 0.0, 4, heads)
        with torch.no_grad(), added_to_scores(model, bias, layers):
            logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        own = [float(logits[at - 1, row.ids[at]]) for at in range(row.n_prompt, len(row.ids))]
        scores.append(sum(own) / len(own))
    return np.array(scores[: len(measure)]) - np.array(scores[len(measure) :])


def test_exact_cells_are_masks_in_plain_transformers_in_both_models(found):
    sides = {"repair": weights("llama-gqa", "finetuned"), "infect": weights("llama-gqa", "base")}
    measure, seen = answers(), set()
    for labels, values in zip(found.exact.cells, found.exact.values, strict=True):
        if labels["series"] == "identity control":
            np.testing.assert_allclose(values, found.exact.finetuned, atol=1e-5)
            continue
        edge = (labels["span"], labels["read_from"])
        expected = slow_contrast(sides[labels["flow"]], measure, edge, labels["layers"], labels["heads"])
        np.testing.assert_allclose(values, expected, atol=2e-4)
        seen.add((edge, labels["mode"], labels["flow"]))
    assert {(edge, "all layers", flow) for edge in EDGES for flow in sides} <= seen
    assert found.exact.noise_floor < 1e-3


def test_the_gradient_is_the_slope_towards_the_cut(found):
    """The weights of one head moved a little towards those of the cut, which are computed one by one."""
    measure = answers()
    frame = found.attributed.to_frame()
    with pair("llama-gqa", found.attributed.settings["backend"]).using("finetuned") as model:
        for edge, layer, head in ((EDGES[0], 1, 3), (EDGES[1], 2, 0), (EDGES[2], 0, 2)):
            ends = []
            for little in (0.005, -0.005):
                scores = []
                for row in measure.rows:
                    readers, read = (bias_of(row, name, name, 0.0)[0, 0].diagonal() < 0 for name in edge)

                    def move(weights, hook, readers=readers, read=read, little=little, head=head):
                        weights = weights.clone()
                        for query in readers.nonzero().flatten().tolist():
                            own = weights[0, head, query]
                            cut = torch.where(read, torch.zeros_like(own), own)
                            weights[0, head, query] = own + little * (cut / cut.sum() - own)
                        return weights

                    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", move)]):
                        logits = model(torch.tensor([row.ids]))[0].double().log_softmax(-1)
                    own = [float(logits[at - 1, row.ids[at]]) for at in range(row.n_prompt, len(row.ids))]
                    scores.append(sum(own) / len(own))
                ends.append(np.array(scores[:5]) - np.array(scores[5:]))
            slope = (ends[0] - ends[1]) / 0.01
            at = frame[(frame["layer"] == layer) & (frame["head"] == head) & (frame["span"] == edge[0])].index[0]
            ours = np.array(found.attributed.values[at]) - np.array(found.attributed.finetuned)
            np.testing.assert_allclose(ours, slope, rtol=0.03, atol=2e-4)


def test_edges_of_the_answer_go_through_the_engine_as_through_a_whole_row(found):
    """Beside cells that fork elsewhere, and for prompts of unequal length."""
    some, measure = prompts(THREE), contrast()
    cells = [
        (cut_attention("response", "prefix", layers=[2], heads=[1]),),
        (cut_attention("postfix", "query", layers=[1]),),
        (),
    ]
    tiny = pair("llama-gqa", found.attributed.settings["backend"])
    with tiny.using("finetuned") as model:
        values = {number: own.values for part in evaluate(model, some, measure, cells) for number, own in part}
    plain = weights("llama-gqa", "finetuned")
    np.testing.assert_allclose(values[0], slow_contrast(plain, measure, ("response", "prefix"), [2], [1]), atol=2e-4)
    np.testing.assert_allclose(values[1], slow_contrast(plain, measure, ("postfix", "query"), [1]), atol=2e-4)


def test_the_frame_says_what_was_cut_in_both_models(found):
    frame = found.to_frame()
    assert len(frame) == 3 * 3 * 4
    assert frame["exact"].notna().sum() == frame["in_base"].notna().sum() >= 4
    assert found.whole["span"].tolist() == [edge[0] for edge in EDGES]
    gap = np.array(found.attributed.base).mean() - np.array(found.attributed.finetuned).mean()
    row = found.whole.iloc[0]
    moved = slow_contrast(weights("llama-gqa", "base"), answers(), EDGES[0]).mean() - np.mean(found.attributed.base)
    assert row["in_base"] == pytest.approx(moved / gap, abs=1e-3)
    cell = frame.loc[frame["in_base"].abs().idxmax()]
    edge = (cell["span"], cell["read_from"])
    moved = slow_contrast(weights("llama-gqa", "base"), answers(), edge, [cell["layer"]], [cell["head"]])
    assert cell["in_base"] == pytest.approx((moved.mean() - np.mean(found.attributed.base)) / gap, abs=1e-3)
    assert abs(cell["in_base"]) > 0.01
    assert "query reading prefix" in found.verdict
    columns = found.whole[["value", "in_base", "specific"]].to_numpy()
    np.testing.assert_allclose(columns[:, 2], columns[:, 0] - np.abs(columns[:, 1]), atol=1e-4)
    assert "Rank correlation of the gradient with exact cuts" in found.verdict


def test_the_largest_cells_are_cut_whichever_way_they_move(found):
    moved = np.array(found.attributed.values).mean(1) - np.mean(found.attributed.finetuned)
    largest = sorted(range(len(moved)), key=lambda i: -abs(moved[i]))[:4]
    assert min(moved[largest]) < 0, "or the order of signed sizes would be the same"
    places = [tuple(cell[name] for name in ("span", "read_from", "layer", "head")) for cell in found.attributed.cells]
    cut = {
        (cell["span"], cell["read_from"], cell["layer"], cell["head"])
        for cell in found.exact.cells
        if cell["series"] == "patched" and cell["mode"] == "edge"
    }
    assert cut == {places[i] for i in {*largest, *found.sampled}}


def test_mere_damage_is_not_specific():
    """Both contrasts go to the middle: half of the way is restored, and nothing of it is the finetune's."""
    finetuned, base = [3.0, 2.0, 4.0, 3.5], [-3.0, -2.0, -4.0, -3.5]
    half = [1.5, 1.0, 2.0, 1.75]
    assert specific(half, [-x for x in half], finetuned, base).value == pytest.approx(0.25 - 0.25)
    assert specific(half, base, finetuned, base).value == pytest.approx(0.25)
    assert specific(half, [x - 1.5 for x in base], finetuned, base).value == pytest.approx(0.25 - 1.5 / 6.25)


def test_a_run_is_kept_continued_and_loaded(tmp_path):
    tiny, some = pair(), prompts(THREE)
    asked = {"edges": EDGES[:1], "exact_cells": 3, "out": tmp_path / "run", "progress": False}
    first = edge_map(tiny, some, **asked)
    (tmp_path / "run" / "result.json").unlink()
    rows = (tmp_path / "run" / "exact" / "rows.jsonl").read_text().splitlines()
    (tmp_path / "run" / "exact" / "rows.jsonl").write_text("\n".join(rows[:3]) + "\n")
    (tmp_path / "run" / "exact" / "result.json").unlink()
    again = edge_map(tiny, some, **asked)
    assert again.to_frame()["value"].tolist() == pytest.approx(first.to_frame()["value"].tolist(), rel=1e-6)
    loaded = load_result(tmp_path / "run")
    assert isinstance(loaded, EdgeResult)
    assert loaded.verdict == again.verdict
    assert "query reading prefix" in report_run(tmp_path / "run").read_text(encoding="utf-8")
    with pytest.raises(LensError, match="another"):
        edge_map(tiny, some, **asked | {"edges": EDGES[:2]})


def test_what_has_no_edges_is_refused(unchecked):
    tiny, some = pair(), prompts(THREE)
    for edges in ([], ["query"], ("query", "prefix")):
        with pytest.raises(LensError, match="pairs of spans"):
            edge_map(tiny, some, edges=edges)
    with pytest.raises(LensError, match="has no gradient"):
        edge_map(tiny, some, measure=GeneratedBehaviour("words"))
    with pytest.raises(LensError, match="span 'heading' is not in row"):
        edge_map(tiny, some, edges=[("query", "heading")], measure=contrast(some))
    only = edge_map(tiny, some, edges=[("postfix", "prefix")], exact_cells=0, measure=contrast(some))
    with pytest.raises(LensError, match="no cell was cut exactly"):
        _ = only.whole
    assert only.to_frame()["exact"].isna().all()
    assert only.figure().data
