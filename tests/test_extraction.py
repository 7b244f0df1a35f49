"""Directions measured on activations, against activations taken one row at a time from transformers itself."""

import pytest
import tiny_chat
import tiny_hooked
import tiny_models
import torch
from tiny_chat import tiny_examples
from tiny_hooked import hooked
from torch.testing import assert_close

from piggyback_lens.directions.extraction import (
    contrast_pairs,
    mean_difference,
    model_difference,
    principal_component,
)
from piggyback_lens.errors import LensError
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.settings import ReadSettings
from piggyback_lens.vectors.direction import cosine

SHOWING, NOT = tiny_examples(7, seed=1), tiny_examples(6, seed=2)


@torch.no_grad()
def states(name, rows, span, first=None, seed=0, last=None):
    """Per row the block outputs [layer, token, d] of a span, from transformers alone, row by row."""
    model = tiny_models.build(name, seed, vocab=tiny_chat.VOCAB)
    found = []
    for row in rows:
        kept = []

        def keep(_module, _args, out, kept=kept):
            kept.append(out[0] if isinstance(out, tuple) else out)

        blocks = model.transformer.h if name == "gpt2" else model.model.layers
        hooks = [block.register_forward_hook(keep) for block in blocks]
        model(input_ids=torch.tensor([row.ids]))
        for hook in hooks:
            hook.remove()
        where = row.spans[span]
        stop = where.stop if first is None else min(where.stop, where.start + first)
        start = where.start if last is None else max(where.start, where.stop - last)
        found.append(torch.stack([layer[0, start:stop] for layer in kept]).double())
    return found


def pooled(rows, weighting):
    if weighting == "token":
        return torch.cat(rows, dim=1).mean(1)
    return torch.stack([row.mean(1) for row in rows]).mean(0)


@pytest.mark.parametrize("weighting", ["token", "response"])
@pytest.mark.parametrize(("name", "backend"), tiny_hooked.FEW, ids=str)
def test_the_mean_difference_is_that_of_rows_run_one_by_one(name, backend, weighting):
    found = mean_difference(hooked(name, backend), SHOWING, NOT, read=ReadSettings(weighting=weighting, batch_size=3))
    expected = [pooled(states(name, rows, "response"), weighting) for rows in (SHOWING, NOT)]
    assert_close(found.direction.vectors, (expected[0] - expected[1]).float(), atol=2e-4, rtol=1e-3)
    assert found.direction.layers == tuple(range(hooked(name, backend).cfg.n_layers))
    assert found.n == {"showing": 7, "not_showing": 6}
    assert found.tokens["showing"] == sum(len(row.spans["response"]) for row in SHOWING)


def test_token_and_response_weighting_differ_where_lengths_do():
    model = hooked("llama-gqa", "bridge")
    one, other = (
        mean_difference(model, SHOWING, NOT, read=ReadSettings(weighting=w)).direction for w in ("token", "response")
    )
    assert (one.vectors - other.vectors).norm() > 0.05 * one.vectors.norm()


@pytest.mark.parametrize(("span", "first"), [("query", None), ("response", 2), ("postfix", None)])
def test_any_span_and_any_number_of_first_tokens_can_be_read(span, first):
    found = mean_difference(
        hooked("llama-gqa", "bridge"), SHOWING, NOT, read=ReadSettings(span=span, first=first, layers=[2, 0])
    )
    expected = [pooled(states("llama-gqa", rows, span, first), "token") for rows in (SHOWING, NOT)]
    assert found.direction.layers == (0, 2)
    assert_close(found.direction.vectors, (expected[0] - expected[1])[[0, 2]].float(), atol=1e-4, rtol=1e-3)
    assert found.direction.provenance.settings["span"] == span


def test_batch_size_changes_nothing_and_rows_are_read_lazily_a_batch_at_a_time(monkeypatch):
    import piggyback_lens.directions.extraction as module

    drawn, seen = [], []
    real = module.row_sums

    def counting(model, rows, where):
        seen.append((len(rows), len(drawn)))
        return real(model, rows, where)

    monkeypatch.setattr(module, "row_sums", counting)

    def lazily(rows):
        for row in rows:
            drawn.append(row)
            yield row

    model = hooked("llama-gqa", "bridge")
    one = mean_difference(model, lazily(SHOWING), lazily(NOT), read=ReadSettings(batch_size=2))
    assert [size for size, _ in seen] == [2, 2, 2, 1, 2, 2, 2]
    assert [n for _, n in seen] == [2, 4, 6, 7, 9, 11, 13]  # nothing was drawn before its batch ran
    other = mean_difference(model, SHOWING, NOT, read=ReadSettings(batch_size=13))
    assert_close(one.direction.vectors, other.direction.vectors, atol=1e-5, rtol=1e-5)
    assert one.direction.provenance.data == other.direction.provenance.data


def test_the_data_hash_tells_data_and_sides_apart():
    model = hooked("llama-gqa", "bridge")
    hashes = [
        mean_difference(model, a, b).direction.provenance.data
        for a, b in ((SHOWING, NOT), (NOT, SHOWING), (SHOWING[:-1], NOT))
    ]
    assert len(set(hashes)) == 3
    assert all(len(value) == 16 for value in hashes)
    direction = mean_difference(model, SHOWING, NOT).direction
    assert direction.is_of(model)
    assert direction.provenance.settings["n"] == {"showing": 7, "not_showing": 6}


def test_split_half_cosines_are_those_of_two_disjoint_halves():
    """With every row of a side the same the halves agree exactly; with noise only they do not."""
    model = hooked("llama-gqa", "bridge")
    same = mean_difference(model, SHOWING[:1] * 6, NOT[:1] * 6)
    assert all(abs(value - 1) < 1e-6 for values in same.split_half.values() for value in values)
    noise = mean_difference(model, tiny_examples(12, seed=5), tiny_examples(12, seed=6), n_splits=6, seed=1)
    frame = noise.to_frame()
    assert list(frame["layer"]) == [0, 1, 2]
    assert all(len(values) == 6 for values in noise.split_half.values())
    assert (frame["split_half"] < 0.9).all()
    assert (frame["lowest"] <= frame["split_half"]).all()
    again = mean_difference(model, tiny_examples(12, seed=5), tiny_examples(12, seed=6), n_splits=6, seed=1)
    assert again.split_half == noise.split_half
    other = mean_difference(model, tiny_examples(12, seed=5), tiny_examples(12, seed=6), n_splits=6, seed=2)
    assert other.split_half != noise.split_half


def test_split_halves_are_computed_from_rows_by_hand(monkeypatch):
    """Two rows on each side: each half holds one of them, so there are only two possible cosines."""
    model = hooked("llama-gqa", "bridge")
    a, b = SHOWING[:2], NOT[:2]
    found = mean_difference(model, a, b, n_splits=20)
    means = [[row.mean(1) for row in states("llama-gqa", rows, "response")] for rows in (a, b)]
    possible = [
        torch.cosine_similarity(means[0][i] - means[1][j], means[0][1 - i] - means[1][1 - j], dim=-1)
        for i, j in ((0, 0), (0, 1))
    ]
    for layer, values in found.split_half.items():
        options = [float(option[layer]) for option in possible]
        for value in values:
            assert min(abs(value - option) for option in options) < 1e-4


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_finetuned_minus_base_is_the_difference_of_two_models_on_the_same_tokens(backend):
    tokenizer = tiny_chat.tiny_tokenizer()
    base, tuned = hooked("llama-gqa", backend), hooked("llama-gqa", backend, seed=3)
    pair = ModelPair(base, tuned, tokenizer=tokenizer)
    found = model_difference(pair, SHOWING, read=ReadSettings(first=3, batch_size=4))
    a, b = (pooled(states("llama-gqa", SHOWING, "response", 3, seed), "token") for seed in (3, 0))
    assert_close(found.direction.vectors, (a - b).float(), atol=2e-4, rtol=1e-3)
    assert found.direction.sign == "positive: more like the finetuned model"
    assert found.direction.is_of(base)
    nothing = model_difference(ModelPair(base, base, tokenizer=tokenizer), SHOWING)
    assert float(nothing.direction.vectors.abs().max()) == 0


def test_contrast_pairs_give_the_mean_of_the_pairs_differences_and_its_component():
    model, pairs = hooked("llama-gqa", "bridge"), list(zip(SHOWING, NOT, strict=False))
    found = contrast_pairs(model, iter(pairs), read=ReadSettings(batch_size=4))
    sides = [[row.mean(1) for row in states("llama-gqa", side, "response")] for side in zip(*pairs, strict=True)]
    differences = torch.stack([a - b for a, b in zip(*sides, strict=True)])  # [pair, layer, d]
    assert found.n == 6
    assert_close(found.mean.vectors, differences.mean(0).float(), atol=1e-4, rtol=1e-3)
    for layer in range(3):
        table = differences[:, layer]
        values, axes = torch.linalg.eigh(table.T @ table)
        cos = torch.cosine_similarity(axes[:, -1], found.component.at(layer).vector.double(), dim=0)
        assert abs(float(cos)) == pytest.approx(1, abs=1e-4)
        assert found.explained[layer] == pytest.approx(float(values[-1] / values.sum()), rel=1e-4)
        assert float(found.component.at(layer).vector @ found.mean.at(layer).vector) > 0
    assert found.component.scale == "unit"
    swapped = contrast_pairs(model, [(b, a) for a, b in pairs])
    assert cosine(swapped.component, found.component) == pytest.approx({0: -1, 1: -1, 2: -1}, abs=1e-4)


def test_a_known_component_is_found_and_oriented_by_the_labelled_mean():
    draw = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(20, generator=draw), dim=0)
    other = torch.nn.functional.normalize(torch.randn(20, generator=draw), dim=0)
    other = other - (other @ axis) * axis
    along = 3 + torch.randn(200, generator=draw)
    table = along[:, None] * axis + 2 * torch.randn(200, generator=draw)[:, None] * other
    for sign in (1, -1):
        found, explained = principal_component(sign * table)
        assert float(found @ axis) == pytest.approx(sign, abs=0.05)
        assert 0.5 < explained < 1
    centred, _ = principal_component(table, centred=True)
    assert abs(float(centred @ other / other.norm())) > 0.9  # what varies most is not what they share
    with pytest.raises(LensError, match="there is no component"):
        principal_component(torch.ones(3, 4), centred=True)


@pytest.mark.parametrize("last", [1, 2, 50])
def test_the_last_tokens_can_be_read_as_others_do(last):
    found = mean_difference(
        hooked("llama-gqa", "bridge"), SHOWING, NOT, read=ReadSettings(last=last, weighting="response")
    )
    expected = [pooled(states("llama-gqa", rows, "response", last=last), "response") for rows in (SHOWING, NOT)]
    assert_close(found.direction.vectors, (expected[0] - expected[1]).float(), atol=1e-4, rtol=1e-3)
    assert found.direction.provenance.settings["last"] == last


def test_a_layer_at_which_no_pair_differs_is_left_out_by_name():
    model, pairs = hooked("llama-gqa", "bridge"), list(zip(SHOWING[:4], NOT[:4], strict=True))
    with pytest.warns(UserWarning, match=r"layers \[0\] do not differ between the sides"):
        found = contrast_pairs(model, pairs, read=ReadSettings(site="resid_pre", span="postfix"))
    assert found.component.layers == found.mean.layers == (1, 2)
    whole = contrast_pairs(model, pairs, read=ReadSettings(site="resid_pre", span="postfix", layers=[1, 2]))
    assert torch.equal(found.component.vectors, whole.component.vectors)
    assert torch.equal(found.mean.vectors, whole.mean.vectors)
    with pytest.raises(LensError, match="the same at these layers"):
        contrast_pairs(model, pairs, read=ReadSettings(site="resid_pre", span="postfix", layers=[0]))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda m: mean_difference(m, SHOWING, NOT, read=ReadSettings(first=1, last=1)),
            "first=1 and last=1 are both given",
        ),
        (
            lambda m: mean_difference(m, SHOWING, NOT, read=ReadSettings(last=0)),
            "ReadSettings.last is 0",
        ),
        (lambda m: mean_difference(m, SHOWING[:1], NOT), "1 rows showing: at least 2"),
        (lambda m: mean_difference(m, SHOWING, []), "0 rows not showing"),
        (
            lambda m: mean_difference(m, SHOWING, NOT, read=ReadSettings(span="history")),
            "span 'history' is not in row 0",
        ),
        (
            lambda m: mean_difference(m, SHOWING, NOT, read=ReadSettings(first=0)),
            "ReadSettings.first is 0",
        ),
        (lambda m: mean_difference(m, SHOWING, NOT, read=ReadSettings(layers=[3])), "this model has layers 0 to 2"),
        (
            lambda m: mean_difference(m, SHOWING, NOT, read=ReadSettings(batch_size=0)),
            "ReadSettings.batch_size is 0; expected at least 1",
        ),
        (lambda m: mean_difference(m, SHOWING, NOT, n_splits=0), "n_splits=0"),
        (lambda m: contrast_pairs(m, [(SHOWING[0], NOT[0])]), "1 contrast pairs"),
    ],
)
def test_too_little_or_wrong_data_is_refused(run, message):
    with pytest.raises(LensError, match=message):
        run(hooked("llama-gqa", "bridge"))
