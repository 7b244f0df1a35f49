"""Attribution patching: exact where the model is linear between the two sides, and honest about the rest."""

import jaxtyping
import numpy as np
import pytest
import torch
from slow_oracle import Overwrite, SlowLab
from tiny_hooked import BACKENDS, FEW, chat, prompts
from tiny_pairs import LEVEL, THREE, contrast, mirrored, pair, weights

from piggyback_lens.errors import LensError
from piggyback_lens.experiments import attribution
from piggyback_lens.experiments.attribution import attribution_map
from piggyback_lens.experiments.patching import layer_curve, layer_head_map, layer_position_map
from piggyback_lens.interventions.kinds import add
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour
from piggyback_lens.measuring.measures import get_behaviour
from piggyback_lens.measuring.scoring import response_log_probs
from piggyback_lens.models.backends import core_of
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.settings import PatchSettings

NEAR = (3e-4, 3e-3)  # sizes of the finetune's step; the error of a first-order term shrinks with them
IDS = list(map("-".join, FEW))


def effects(result, where="patched"):
    """Change of the measure by each cell, [cell, prompt]."""
    recipient = result.finetuned if result.cells[0]["flow"] == "repair" else result.base
    rows = [values for c, values in zip(result.cells, result.values, strict=True) if c["series"] == where]
    return np.array(rows) - np.array(recipient)


def relative_error(attributed, exact):
    return np.linalg.norm(attributed - exact) / np.linalg.norm(exact)


def fast(tiny, by, sites, queries=THREE, **kwargs):
    some = prompts(queries)
    run = {"measure": contrast(some), "check_cells": 0, "top_cells": 0}
    return attribution_map(tiny, some, by=by, sites=sites, **run | kwargs)


def exact(tiny, by, sites, queries=THREE, **kwargs):
    some = prompts(queries)
    experiment = layer_position_map if by == "position" else layer_head_map
    controls = {"control_cells": 0, "measure": contrast(some)}
    return experiment(tiny, some, sites=sites, **controls | kwargs)


MAPS = {
    "residual stream": ("position", "resid_pre", {"span": "prefix"}),
    "keys and values": ("position", ("k", "v"), {"span": "postfix", "flow": "infect"}),
    "key/value heads": ("head", ("k", "v"), {"span": "prefix", "flow": "infect"}),
    "attention heads": ("head", "z", {"span": "query"}),
}


@pytest.mark.parametrize(("name", "backend"), FEW, ids=IDS)
@pytest.mark.parametrize("kind", MAPS.values(), ids=MAPS)
def test_attribution_is_the_exact_map_in_the_linear_limit(name, backend, kind):
    by, sites, run = kind
    errors = []
    for step in NEAR:
        tiny = pair(name, backend, step)
        slow, quick = exact(tiny, by, sites, **run), fast(tiny, by, sites, **run)
        assert quick.attributed.base == pytest.approx(slow.base, abs=1e-5)
        assert quick.attributed.finetuned == pytest.approx(slow.finetuned, abs=1e-5)
        errors.append(relative_error(effects(quick.attributed), effects(slow)))
        for name_ in ("layer", "position" if by == "position" else "head"):
            assert [c[name_] for c in quick.attributed.cells] == [c[name_] for c in slow.cells]
    assert errors[1] < 0.2
    assert errors[0] < 0.03
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("sites", ["resid_pre", ("k", "v")])
def test_integrated_gradients_add_up_to_the_patch_of_the_whole_layer(name, sites):
    """Completeness: over the tokens of a layer, they sum to what patching it does; a plain gradient does not."""
    tiny = pair(name, step=0.08)
    curve = layer_curve(tiny, prompts(THREE), sites=sites, control_layers=0, measure=contrast())
    whole = effects(curve)[:3]
    assert [labels["layer"] for labels in curve.cells[:3]] == [0, 1, 2]
    errors = []
    for steps in (None, 2, 16):
        tokens = effects(fast(tiny, "position", sites, steps=steps).attributed)
        errors.append(relative_error(tokens.reshape(3, 13, 3).sum(1), whole))
    assert errors[2] < 0.02
    assert errors[2] < errors[1] < errors[0]


def test_integrated_gradients_follow_the_curvature_that_a_gradient_misses():
    slow = effects(exact(pair(), "position", "resid_pre"))
    plain, many = (
        relative_error(effects(fast(pair(), "position", "resid_pre", steps=steps).attributed), slow)
        for steps in (None, 8)
    )
    assert many < 0.9 * plain


def test_one_step_is_the_gradient_half_way():
    """The midpoint rule, whose error is of second order."""
    tiny = pair(step=3e-3)
    whole = effects(layer_curve(tiny, prompts(THREE), sites="v", control_layers=0, measure=contrast()))[:3]
    plain, middle = (
        relative_error(effects(fast(tiny, "position", "v", steps=steps).attributed).reshape(3, 13, 3).sum(1), whole)
        for steps in (None, 1)
    )
    assert middle < plain / 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("span", ["prefix", "postfix"])
def test_heads_and_positions_are_two_sums_of_the_same_terms(backend, span):
    """Over the same sites: all heads of a layer together are all positions of it together."""
    tiny = pair("llama-gqa", backend)
    for sites, steps in ((("k", "v"), None), ("z", None), ("q", 2)):
        heads, positions = (
            effects(fast(tiny, by, sites, span=span, steps=steps).attributed) for by in ("head", "position")
        )
        heads, positions = (x.reshape(3, -1, 3).sum(1) for x in (heads, positions))
        np.testing.assert_allclose(heads, positions, rtol=1e-3, atol=1e-5)
        assert np.abs(heads).max() > 1e-3


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2"])
def test_an_attribution_is_the_slope_of_the_slow_path(name):
    """Plain transformers, the cell moved a little towards the donor in either sense: the same number per prompt.

    In float64, though norms and softmax stay in float32, which limits how little.
    """
    some, measure, site, layer = prompts(THREE), contrast(), "v", 1
    slow = SlowLab(
        {side: weights(name, side).double() for side in ("base", "finetuned")},
        some,
        [row.ids for row in measure.towards],
        [row.ids for row in measure.against],
    )
    quick = fast(pair(name), "position", site, layers=[layer], span="postfix").attributed
    for token in range(3):
        little, ends = 1e-2, []
        for fraction in (little, -little):
            overwrites = []
            for prompt in some:
                at = prompt.spans["postfix"].start + token
                own, donor = (slow.activations(side, prompt.ids)[site, layer][at] for side in ("finetuned", "base"))
                overwrites.append([Overwrite(site, layer, [at], (own + fraction * (donor - own))[None])])
            ends.append(np.array(slow.contrasts("finetuned", overwrites)))
        slope = (ends[0] - ends[1]) / (2 * little)
        np.testing.assert_allclose(effects(quick)[token], slope, rtol=2e-3, atol=1e-4)
    assert np.abs(effects(quick)).max() > 1e-2


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"])
def test_a_gradient_is_the_slope_under_a_small_vector(site, frozen):
    """Central differences; the stream goes on beside what is read, and nothing of that may be left out."""
    tiny = ModelPair(*(hook_model(weights("llama-gqa", side), chat().tokenizer) for side in ("base", "finetuned")),
                     tokenizer=chat().tokenizer)  # fmt: skip
    some, measure, layer, n = prompts(THREE), contrast(), 1, len(THREE)
    with tiny.using("finetuned") as model:
        for parameter in core_of(model).parameters():
            parameter.requires_grad_(not frozen)
        way = torch.randn(32, generator=torch.Generator().manual_seed(1))
        (gradient,) = attribution._gradients(model, some, measure, range(n), [site], [layer], "query", None).values()
        slopes = (gradient * way).flatten(1).sum(1)
        little, ends = 3e-3, []
        for sign in (1, -1):
            moved = {"layers": layer, "site": site, "span": "query", "strength": sign * little}
            scores = response_log_probs(model, measure.rows[:n], interventions=add(way, **moved))
            ends.append(torch.stack([row.mean() for row in scores]))
    torch.testing.assert_close(slopes, (ends[0] - ends[1]) / (2 * little), rtol=2e-2, atol=2e-3)
    assert float(slopes.abs().max()) > 0.01


def test_weights_have_no_part_in_the_graph_of_an_attribution(monkeypatch):
    """Else a pass of a whole finetune keeps the inputs of all its linear layers."""
    own, wanted = attribution.forward, []

    def watched(model, *args, **kwargs):
        wanted.append(any(parameter.requires_grad for parameter in core_of(model).parameters()))
        return own(model, *args, **kwargs)

    monkeypatch.setattr(attribution, "forward", watched)
    tiny = pair("llama-gqa")
    with tiny.using("finetuned") as model:
        before = [parameter.requires_grad for parameter in core_of(model).parameters()]
        fast(tiny, "position", "v", layers=[1])
        assert [parameter.requires_grad for parameter in core_of(model).parameters()] == before
    assert any(before)
    assert wanted
    assert not any(wanted)


def test_sites_that_lie_behind_one_another_are_refused():
    """A patch of both fixes the later one, so what reaches it from the earlier one must not be counted."""
    with pytest.raises(LensError, match="lie behind one another"):
        fast(pair(step=NEAR[0]), "position", ("resid_pre", "resid_post"))


def test_rows_of_different_lengths_and_their_order_do_not_matter():
    some, order = prompts(THREE), [2, 0, 1]
    measure = contrast(some)
    permuted = AnswerContrast(*(tuple(rows[i] for i in order) for rows in (measure.towards, measure.against)))
    run = {"by": "head", "sites": "z", "span": "query", "check_cells": 0, "top_cells": 0}
    one = attribution_map(pair(), some, measure=measure, **run).attributed
    other = attribution_map(pair(), [some[i] for i in order], measure=permuted, **run).attributed
    np.testing.assert_allclose(effects(one)[:, order], effects(other), rtol=1e-3, atol=1e-5)
    alone = attribution_map(
        pair(), some[:1], measure=AnswerContrast(measure.towards[:1], measure.against[:1]), **run
    ).attributed
    np.testing.assert_allclose(effects(one)[:, 0], effects(alone)[:, 0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 2])
def test_infecting_is_repairing_with_the_sides_exchanged(steps):
    infect = fast(pair(), "position", ("k", "v"), flow="infect", steps=steps).attributed
    repair = fast(mirrored(pair()), "position", ("k", "v"), steps=steps).attributed
    np.testing.assert_allclose(effects(infect), effects(repair), rtol=1e-4, atol=1e-6)
    assert (infect.base, infect.finetuned) == (repair.finetuned, repair.base)


def test_models_that_do_not_differ_are_attributed_nothing():
    with pair().using("base") as model:
        from piggyback_lens.models.pair import ModelPair

        same = ModelPair(model, model, tokenizer=pair().tokenizer)
    assert np.abs(effects(fast(same, "position", "resid_pre").attributed)).max() == 0


def test_postfix_activations_of_an_empty_query_are_a_donor_here_too():
    settings = PatchSettings(postfix_donor="empty_query", chat=chat())
    run = {"span": "postfix", "settings": settings, "layers": [1]}
    quick, slow = (
        effects(x) for x in (fast(pair(), "position", "v", **run).attributed, exact(pair(), "position", "v", **run))
    )
    own = effects(fast(pair(), "position", "v", span="postfix", layers=[1]).attributed)
    assert np.abs(quick - own).max() > 1e-3
    assert np.corrcoef(quick.ravel(), slow.ravel())[0, 1] > 0.7


# ---------------------------------------------------------------- the check against exact patches


def test_a_sample_and_the_top_cells_are_run_exactly():
    some, measure = prompts(THREE), contrast()
    result = attribution_map(pair(), some, measure=measure, check_cells=5, top_cells=4)
    cells = result.attributed.cells
    assert len(cells) == 3 * 13
    assert result.sampled == (0, 10, 19, 28, 38)
    size = np.abs(effects(result.attributed).mean(1))
    top = set(np.argsort(-size)[:4].tolist())
    wanted = {(cells[i]["layer"], cells[i]["position"]) for i in {*result.sampled, *top}}
    run = [(c["layer"], c["position"]) for c in result.exact.cells if c["series"] == "patched"]
    assert (set(run), len(run)) == (wanted, len(wanted))
    slow = exact(pair(), "position", "resid_pre")
    known = {(c["layer"], c["position"]): values for c, values in zip(slow.cells, slow.values, strict=True)}
    for labels, values in zip(result.exact.cells, result.exact.values, strict=True):
        if labels["series"] == "patched":
            assert values == pytest.approx(known[labels["layer"], labels["position"]], abs=1e-5)


def test_the_frame_puts_exact_recoveries_beside_attributed_ones():
    result = attribution_map(
        pair(), prompts(LEVEL), by="head", sites="z", span="query", measure=AnswerContrast.of(pair(), prompts(LEVEL)),
        check_cells=12, top_cells=0,
    )  # fmt: skip
    frame = result.to_frame()
    assert len(frame) == 12
    assert frame[["layer", "head"]].drop_duplicates().shape[0] == 12
    recoveries = result.exact.to_frame()
    recoveries = recoveries[recoveries["series"] == "patched"].set_index(["layer", "head"])["value"]
    for row in frame.itertuples():
        assert row.exact == pytest.approx(recoveries[row.layer, row.head], nan_ok=True)
    assert frame["exact"].notna().all()
    order = frame[["value", "exact"]].rank()
    by_hand = np.corrcoef(order["value"], order["exact"])[0, 1]
    assert result.rank_correlation == pytest.approx(by_hand)


def test_the_rank_correlation_leaves_the_top_cells_out():
    result = attribution_map(pair(), prompts(THREE), measure=contrast(), check_cells=2, top_cells=6)
    assert len(result.sampled) == 2
    assert np.isnan(result.rank_correlation)
    none = fast(pair(), "position", "v")
    assert none.exact is None
    assert none.to_frame()["exact"].isna().all()
    assert np.isnan(none.rank_correlation)


def test_settings_and_labels_say_what_was_attributed():
    result = fast(pair(), "head", ("k", "v"), layers=[-1], steps=2, settings=PatchSettings(seed=4)).attributed
    assert (result.kind, fast(pair(), "position", "v").attributed.kind) == ("layer_head", "layer_position")
    assert [c["label"] for c in result.cells] == ["kv 0 (q 0-1)", "kv 1 (q 2-3)"]
    assert [(c["layer"], c["layers"], c["heads"], c["group"]) for c in result.cells] == [
        (2, [2], [0], 0),
        (2, [2], [1], 1),
    ]
    facts = {name: result.settings[name] for name in ("n", "seed", "steps", "method")}
    assert facts == {"n": 3, "seed": 4, "steps": 2, "method": "attribution"}


def test_gradients_of_frozen_models_are_the_same():
    """LoRA bases and loaded models often have no parameter that needs a gradient."""
    plain = effects(fast(pair(), "position", "resid_pre").attributed)
    with pair().using("finetuned") as model:
        parameters = list(model.parameters())
        flags = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            with torch.no_grad():
                frozen = effects(fast(pair(), "position", "resid_pre").attributed)
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
    np.testing.assert_allclose(frozen, plain, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def unchecked():
    """As for a user, who does not run the library under a run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


REFUSED = {
    "by layer": ({"by": "layer"}, "by 'layer' is not known: choose 'position' or 'head'"),
    "no steps": ({"steps": 0}, "steps 0: integrated gradients take at least 1, None is the plain gradient"),
    "generated": (
        {"measure": GeneratedBehaviour(get_behaviour("words"))},
        "a generated behaviour has no gradient: give an AnswerContrast",
    ),
    "unequal span": ({"span": "query"}, "span 'query' differs in length between prompts"),
    "head sites": ({"by": "head", "sites": ("k", "z")}, "a head map takes k, v, rot_k"),
    "no head site": ({"by": "head", "sites": "resid_pre"}, "a head map takes k, v, rot_k"),
    "span": ({"by": "head", "sites": "z", "span": "nope"}, "span 'nope' is not in row 0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "pattern"), REFUSED.values(), ids=REFUSED)
def test_an_attribution_that_cannot_be_made_is_refused(changes, pattern, unchecked):
    with pytest.raises(LensError, match=pattern) as error:
        attribution_map(pair(), prompts(THREE), **{"measure": contrast(), **changes})
    assert "\n" not in str(error.value)


def test_a_check_that_was_not_run_has_no_figure():
    with pytest.raises(LensError, match="no cell was run exactly: give check_cells or top_cells"):
        fast(pair(), "position", "v").check_figure()


def test_a_folder_is_written_or_refused_but_not_ignored(tmp_path):
    try:
        fast(pair(), "position", "v", out=tmp_path / "map")
    except LensError:
        return
    assert list((tmp_path / "map").iterdir())
