"""Curves against losses computed one by one; noise, controls, intervals, files; drift and trajectories; texts."""

import json
import math
from functools import cache

import numpy as np
import pytest
import tiny_chat
import tiny_hooked
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat import tiny_examples
from tiny_hooked import hooked, no_hook_left
from torch.testing import assert_close

from piggyback_lens.directions.curve_points import Curve, CurvePoint, weighted_interval
from piggyback_lens.directions.curves import ablation_cost, efficiency, significance, stability
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.training import train
from piggyback_lens.finetuning.trajectories import (
    Snapshot,
    SnapshotKeeper,
    flattened,
    local_cosines,
    snapshot_cosines,
    trajectory,
)
from piggyback_lens.maths import orthogonal_noise
from piggyback_lens.measuring.texts import text_windows
from piggyback_lens.measuring.variants import Text
from piggyback_lens.models.network import forward
from piggyback_lens.settings import CurveSettings, TrainSettings
from piggyback_lens.vectors.adapters import LoRAAdapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction, Provenance

EXAMPLES = tiny_examples(6, seed=3)
TEXTS = [
    Text(tuple(int(i) for i in torch.randint(6, 38, (n,), generator=torch.Generator().manual_seed(n))))
    for n in (9, 12, 7, 12)
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vector(seed=0, length=2.0, layers=(1,)):
    vectors = {layer: normal(32, seed=seed + layer) for layer in layers}
    return Direction.of({layer: v * length / v.norm() for layer, v in vectors.items()})


def lora(seed=0):
    a = {(layer, "down"): normal(1, 48, seed=seed + layer) * 0.3 for layer in (1, 2)}
    b = {(layer, "down"): normal(32, 1, seed=seed + layer + 9) * 0.3 for layer in (1, 2)}
    return LoRAAdapter(a, b, 2.0)


@torch.no_grad()
def losses(model, adapters=(), examples=EXAMPLES):
    """Per example the mean negative log-likelihood of its response: one unpadded pass each."""
    found = []
    with attached(model, *adapters):
        for example in examples:
            ids = torch.tensor([example.ids])
            logs = forward(model, ids, torch.ones_like(ids))[0].log_softmax(-1)
            where = range(example.n_prompt, len(example.ids))
            found.append(float(np.mean([-float(logs[i - 1, example.ids[i]]) for i in where])))
    return np.array(found)


def pooled(values, examples=EXAMPLES):
    weights = np.array([len(example.ids) - example.n_prompt for example in examples])
    return float((values * weights).sum() / weights.sum())


def value(curve, series, x):
    frame = curve.to_frame()
    return float(frame[(frame["series"] == series) & (np.isclose(frame["x"], x))].iloc[0]["value"])


@pytest.fixture(params=tiny_hooked.BACKENDS)
def model(request):
    found = hooked("llama-gqa", request.param)
    with no_hook_left(found):
        yield found


# ---------------------------------------------------------------- efficiency


@pytest.mark.parametrize("make", [vector, lora])
def test_efficiency_is_the_loss_at_each_norm(model, make):
    own = make()
    curve = efficiency(
        model, {"own": own}, EXAMPLES, settings=CurveSettings(fractions=[0.0, 0.5, 1.0, 2.0], n_random=2, seed=1)
    )
    for fraction in (0.5, 1.0, 2.0):
        expected = pooled(losses(model, [own.scaled(fraction)]))
        assert value(curve, "own", fraction * own.norm()) == pytest.approx(expected, rel=1e-4)
    zero = [p for p in curve.points if p.x == 0]
    assert len(zero) == 3
    assert all(p.values == curve.base for p in zero)  # exactly the unchanged model, in every series
    assert pooled(np.array(curve.base)) == pytest.approx(pooled(losses(model)), rel=1e-4)
    frame = curve.to_frame()
    assert set(frame["series"]) == {"own", "own, random control"}
    assert set(frame[frame["series"] == "own, random control"]["seeds"]) == {2}


def test_two_solutions_are_compared_at_equal_norms_with_the_paired_difference(model):
    short, long = vector(0, 1.0), vector(5, 3.0)
    curve = efficiency(
        model,
        {"narrow": short, "general": long},
        EXAMPLES,
        settings=CurveSettings(fractions=[0.0, 1.0, 2.0], n_random=0),
    )
    xs = sorted({round(p.x, 4) for p in curve.points if p.series == "narrow"})
    assert xs == pytest.approx([0, 1, 2, 3, 6])
    assert xs == sorted({round(p.x, 4) for p in curve.points if p.series == "general"})
    gap = curve.difference("narrow", "general")
    at3 = gap[np.isclose(gap["x"], 3)].iloc[0]
    expected = pooled(losses(model, [short.scaled(3.0)])) - pooled(losses(model, [long]))
    assert at3["value"] == pytest.approx(expected, abs=1e-4)
    at0 = gap[gap["x"] == 0].iloc[0]
    assert (at0["value"], at0["low"], at0["high"]) == (0, 0, 0)
    assert curve.settings["own_norms"] == pytest.approx({"narrow": 1.0, "general": 3.0})


def test_norms_of_adapters_are_summed_or_averaged_as_asked():
    model, own = hooked("llama-gqa", "bridge"), lora()
    for over in ("sum", "mean"):
        curve = efficiency(
            model, {"own": own}, EXAMPLES, settings=CurveSettings(norms=[0.8], n_random=1, norm_over=over)
        )
        point = curve.points[0]
        assert point.fraction == pytest.approx(0.8 / own.norm(over))
        assert over in curve.x_label
        assert np.array(point.values) == pytest.approx(losses(model, [own.scaled(0.8 / own.norm(over))]), rel=1e-3)


def test_random_controls_have_the_norm_of_the_solution(monkeypatch):
    import piggyback_lens.directions.curves as module

    seen = []
    real = module.variant_nll

    def spy(model, texts, variants, **settings):
        seen.extend(v for v in variants if v is not None)
        return real(model, texts, variants, **settings)

    monkeypatch.setattr(module, "variant_nll", spy)
    for own in (vector(layers=(0, 2)), lora()):
        seen.clear()
        efficiency(
            hooked("llama-gqa", "bridge"),
            {"own": own},
            EXAMPLES,
            settings=CurveSettings(fractions=[1.0, 2.0], n_random=2),
        )
        assert [v.norm() for v in seen] == pytest.approx([own.norm() * f for f in (1, 2)] * 3, rel=1e-5)
        cosines = [torch.cosine_similarity(flattened(seen[0]), flattened(v), dim=0) for v in seen[2:]]
        assert max(abs(float(c)) for c in cosines) < 0.6


# ---------------------------------------------------------------- stability


@cache
def trained(make):
    """A solution that truly lowers the loss of every example."""
    trainable = HookTrainable(hooked("llama-gqa", "bridge"), make())
    settings = TrainSettings(steps=40, batch_size=6, learning_rate=5e-2, weight_decay=0.0)
    train(trainable, EXAMPLES, settings, progress=False)
    return trainable.result()


@pytest.mark.parametrize("make", [vector, lora])
def test_stability_is_the_relative_increase_under_orthogonal_noise(model, make):
    """Oracle: the definition, with the noise written out here."""
    own = trained(make)
    curve = stability(model, {"own": own}, EXAMPLES, settings=CurveSettings(epsilons=[0.0, 0.6], n_noise=3, seed=2))
    assert value(curve, "own", 0.0) == 0.0  # exactly
    base, start = pooled(losses(model)), pooled(losses(model, [own]))
    noisy = []
    for draw in range(3):
        generator = torch.Generator().manual_seed(1_000_000_007 + 2 * 1_000_003 + draw)
        moved = own.noisy(0.6, generator)
        noisy.append(pooled(losses(model, [moved])))
        for before, after in zip(own.tensors().values(), moved.tensors().values(), strict=True):
            y = (after - 0.8 * before) / 0.6
            assert float((y * before).sum() / before.norm() ** 2) == pytest.approx(0, abs=1e-5)
            assert float(y.norm() / before.norm()) == pytest.approx(1, abs=1e-5)
            assert float(after.norm() / before.norm()) == pytest.approx(1, abs=1e-6)
    expected = (np.mean(noisy) - start) / (base - start)
    assert value(curve, "own", 0.6) == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01
    points = [p for p in curve.points if p.series == "own" and p.x == 0.6]
    assert [pooled(np.array(p.values)) for p in points] == pytest.approx(noisy, rel=1e-4)


def test_the_ratio_itself_is_checked_where_the_solution_truly_helps():
    """Numbers set by hand: base 3, solution 1, noisy 1.5 give 0.25; undefined where nothing is gained."""
    base, own, noisy = (3.0, 3.2, 2.8, 3.0), (1.0, 1.1, 0.9, 1.0), (1.5, 1.6, 1.4, 1.5)
    points = (CurvePoint("own", 0.0, None, None, own), CurvePoint("own", 0.5, None, 0, noisy))
    weights = (1.0, 1.0, 1.0, 1.0)
    curve = Curve("stability", "ε", "y", points, base, {"own": own}, weights, {})
    assert list(curve.to_frame()["value"]) == pytest.approx([0, 0.25])
    flat = Curve("stability", "ε", "y", points, own, {"own": own}, weights, {})
    assert flat.to_frame()["value"].isna().all()
    assert "do not differ" in flat.to_frame()["reason"].iloc[0]
    with pytest.raises(LensError, match="relative to each solution's own gain"):
        curve.difference("own", "own")


def test_stability_has_its_controls_and_repeats_by_seed():
    model, own = hooked("llama-gqa", "bridge"), vector()
    one, again = (
        stability(model, {"own": own}, EXAMPLES, settings=CurveSettings(epsilons=[0.0, 0.8], seed=3)) for _ in range(2)
    )
    assert one.points == again.points
    assert one.series == ("own", "own, shrunk control", "own, random control")
    other = stability(model, {"own": own}, EXAMPLES, settings=CurveSettings(epsilons=[0.0, 0.8], seed=4))
    at = {(p.series, p.x, p.seed): p.values for p in one.points}
    assert at["own", 0.0, None] == {(p.series, p.x, p.seed): p.values for p in other.points}["own", 0.0, None]
    assert at["own", 0.8, 0] != {(p.series, p.x, p.seed): p.values for p in other.points}["own", 0.8, 0]
    assert at["own, shrunk control", 0.8, None] == pytest.approx(losses(model, [own.scaled(0.6)]), rel=1e-4)
    assert {p.seed for p in one.points if p.series == "own" and p.x == 0.8} == {0, 1, 2}
    assert at["own, random control", 0.0, 1] == at["own, random control", 0.8, 1]


def test_noise_on_one_matrix_leaves_the_other():
    model, own = hooked("llama-gqa", "bridge"), lora()
    curves = {
        on: stability(model, {"own": own}, EXAMPLES, settings=CurveSettings(epsilons=[0.7], noise_on=on))
        for on in ("A", "B", "both")
    }
    values = {on: curve.points[1].values for on, curve in curves.items()}
    assert len(set(values.values())) == 3
    assert curves["A"].settings["noise_on"] == "A"
    generator = torch.Generator().manual_seed(1_000_000_007)
    a = {place: orthogonal_noise(own.a[place], 0.7, generator) for place in own.a}
    noisy = LoRAAdapter(a, own.b, own.alpha)
    point = next(p for p in curves["A"].points if p.series == "own" and p.seed == 0)
    assert point.values == pytest.approx(losses(model, [noisy]), rel=1e-4)


@given(st.integers(0, 5000), st.floats(0, 1))
def test_noise_is_orthogonal_and_keeps_the_norm_to_a_millionth(seed, epsilon):
    x = normal(3, 40, seed=seed).double()
    moved = orthogonal_noise(x, epsilon, torch.Generator().manual_seed(10**9 + seed))
    assert float(moved.norm() / x.norm()) == pytest.approx(1, abs=1e-6)
    part = (moved - math.sqrt(1 - epsilon**2) * x).flatten()
    assert abs(float(part @ x.flatten())) <= 1e-6 * float(x.norm() ** 2)
    assert float(part.norm()) == pytest.approx(epsilon * float(x.norm()), abs=1e-5)


# ---------------------------------------------------------------- significance


@pytest.mark.parametrize("make", [vector, lora])
def test_significance_is_the_kl_per_token_and_0_at_norm_0(model, make):
    own = make()
    curve = significance(model, {"own": own}, TEXTS, settings=CurveSettings(fractions=[0.0, 1.0], n_random=2, top=5))
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([text.ids])
            base = forward(model, ids, torch.ones_like(ids))[0].double().log_softmax(-1)
            with attached(model, own):
                steered = forward(model, ids, torch.ones_like(ids))[0].double().log_softmax(-1)
            expected.append((base.exp() * (base - steered)).sum(-1)[:-1])
    assert value(curve, "own", own.norm()) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-3)
    assert value(curve, "own", 0.0) == 0.0
    assert value(curve, "own, random control", 0.0) == 0.0
    assert value(curve, "own, random control", own.norm()) > 0
    flat = sorted(((float(v), n, i + 1) for n, kl in enumerate(expected) for i, v in enumerate(kl)), reverse=True)
    for row, (kl, number, position) in zip(curve.maxima, flat[:5], strict=True):
        assert (row["text"], row["position"], row["id"]) == (number, position, TEXTS[number].ids[position])
        assert row["kl"] == pytest.approx(kl, rel=1e-2)


def test_maxima_show_the_token_and_what_stands_before_it():
    tokenizer = tiny_chat.tiny_tokenizer()
    curve = significance(
        hooked("llama-gqa", "bridge"),
        {"own": vector()},
        TEXTS,
        settings=CurveSettings(fractions=[0.0, 1.0, 2.0], n_random=0, top=3),
        tokenizer=tokenizer,
    )
    for row in curve.maxima:
        text = TEXTS[row["text"]]
        assert row["norm"] == pytest.approx(2.0)  # its own norm, not the largest
        assert row["token"] == tokenizer.decode([text.ids[row["position"]]])
        assert row["before"] == tokenizer.decode(list(text.ids[max(0, row["position"] - 12) : row["position"]]))


def test_the_cost_of_ablation_is_the_change_of_the_loss(model):
    direction = Direction(normal(2, 32), (0, 2), "resid_post", "+", Provenance("test"))
    curve = ablation_cost(model, {"d": direction}, TEXTS, settings=CurveSettings(n_random=2))
    unit = direction.at(2).unit().vector

    def project(activation, hook):
        return activation - (activation @ unit)[..., None] * unit

    names = [f"blocks.{i}.hook_resid_{site}" for i in range(3) for site in ("pre", "mid", "post")]
    total = count = 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([text.ids])
            for sign, hooks in ((-1, []), (1, [(name, project) for name in names])):
                with model.hooks(fwd_hooks=hooks):
                    logs = forward(model, ids, torch.ones_like(ids))[0].log_softmax(-1)
                total += sign * sum(-float(logs[i - 1, text.ids[i]]) for i in range(1, len(text.ids)))
            count += len(text.ids) - 1
    assert value(curve, "d", 2.0) == pytest.approx(total / count, abs=1e-4)
    frame = curve.to_frame()
    assert set(frame[frame["series"] == "d, random control"]["seeds"]) == {2}


# ---------------------------------------------------------------- tables, files, refusals


def test_the_interval_is_that_of_the_mean_over_tokens():
    values, weights = normal(40).double().numpy(), np.arange(1.0, 41.0)
    found = weighted_interval(values, tuple(weights))
    assert found.value == pytest.approx(float(np.average(values, weights=weights)))
    draw = np.random.default_rng(0)
    resampled = []
    for _ in range(4000):
        rows = draw.integers(0, 40, 40)
        resampled.append(np.average(values[rows], weights=weights[rows]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low) + 0.02)
    assert found.low < found.value < found.high


def test_seeds_are_averaged_within_a_text_and_their_spread_is_told():
    points = tuple(CurvePoint("a, random control", 1.0, None, s, (1.0 + s, 2.0 + s, 4.0 + s)) for s in range(3))
    frame = Curve("efficiency", "x", "y", points, (0.0,) * 3, {}, (1.0, 1.0, 1.0), {}).to_frame()
    assert frame["value"].iloc[0] == pytest.approx(7 / 3 + 1)
    assert frame["seed_sd"].iloc[0] == pytest.approx(1.0)
    assert frame["seeds"].iloc[0] == 3


@pytest.mark.parametrize("kind", ["efficiency", "stability", "significance", "ablation"])
def test_every_curve_survives_its_file_and_draws_all_its_series(tmp_path, kind):
    model = hooked("llama-gqa", "bridge")
    curve = {
        "efficiency": lambda: efficiency(
            model, {"a": vector(), "b": vector(4)}, EXAMPLES, settings=CurveSettings(fractions=[0.0, 1.0])
        ),
        "stability": lambda: stability(model, {"a": lora()}, EXAMPLES, settings=CurveSettings(epsilons=[0.0, 1.0])),
        "significance": lambda: significance(
            model, {"a": vector()}, TEXTS, settings=CurveSettings(fractions=[0.0, 1.0])
        ),
        "ablation": lambda: ablation_cost(model, {"a": vector(layers=(0, 1))}, TEXTS),
    }[kind]()
    back = Curve.load(curve.save(tmp_path / "c.json"))
    assert back.points == curve.points
    assert back.to_frame().equals(curve.to_frame())
    assert back.maxima == tuple(json.loads(json.dumps(curve.maxima)))
    figure = back.figure()
    drawn = {trace.name for trace in figure.data if trace.name}
    assert drawn == set(curve.series)
    assert {t.line.color for t in figure.data if t.name and "control" in t.name} == {"#666666"}
    assert "texts" in figure.layout.title.subtitle.text
    named = [note.text for note in figure.layout.annotations if "own norm" in note.text]
    norms = curve.settings.get("own_norms", {}) if kind in ("efficiency", "significance") else {}
    assert named == [f"{name}: own norm {norm:.3g}" for name, norm in norms.items()]
    assert bool(named) == (kind in ("efficiency", "significance"))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(LensError, match=r"says no format.*no Curve"):
        Curve.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m: efficiency(m, {}, EXAMPLES), "no solutions"),
        (lambda m: efficiency(m, {"a": vector().scaled(0.0)}, EXAMPLES), "solution 'a' has norm 0"),
        (
            lambda m: efficiency(m, {"a": vector()}, EXAMPLES, settings=CurveSettings(norms=[-1.0])),
            r"norms is \(-1\.0,\); expected norms from 0 up",
        ),
        (lambda m: efficiency(m, {"a": vector()}, []), "got no prompts"),
        (
            lambda m: stability(m, {"a": vector()}, EXAMPLES, settings=CurveSettings(epsilons=[1.2])),
            r"epsilons is \(1\.2,\); expected shares of noise from 0 to 1",
        ),
        (
            lambda m: stability(m, {"a": vector()}, EXAMPLES, settings=CurveSettings(n_noise=0)),
            "n_noise is 0; expected at least 1",
        ),
        (lambda m: stability(m, {"a, b": vector()}, EXAMPLES), "without commas"),
        (lambda m: significance(m, {"a": vector()}, []), "0 texts"),
        (lambda m: significance(m, {"a": vector(layers=(7,))}, TEXTS), "this model has layers 0 to 2"),
        (lambda m: ablation_cost(m, {}, TEXTS), "no directions"),
    ],
)
def test_curves_that_make_no_sense_are_refused(run, message):
    with pytest.raises(LensError, match=message):
        run(hooked("llama-gqa", "bridge"))


# ---------------------------------------------------------------- trajectories and drift


def test_snapshots_are_those_of_the_run():
    model = hooked("llama-gqa", "bridge")
    trainable = HookTrainable(model, Direction.zeros(32, [1]))
    keeper = SnapshotKeeper(trainable, every=2)
    settings = TrainSettings(steps=5, batch_size=3, learning_rate=1e-2)
    train(trainable, EXAMPLES, settings, on_step=keeper, progress=False)
    assert [s.step for s in keeper.snapshots] == [0, 2, 4]
    assert keeper.snapshots[0].solution.norm() == 0
    norms = [s.solution.norm() for s in keeper.snapshots]
    assert norms[1] != norms[2] > 0
    half = HookTrainable(model, Direction.zeros(32, [1]))
    snapshots = SnapshotKeeper(half, every=4)
    train(half, EXAMPLES, settings, on_step=snapshots, progress=False)
    assert torch.equal(snapshots.snapshots[1].solution[1], keeper.snapshots[2].solution[1])


def test_local_cosines_are_1_on_a_line_and_0_at_a_right_angle():
    corner = torch.tensor([[0.0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [2, 2], [2, 2]])
    found = local_cosines(corner, 1)
    assert found[1] == pytest.approx(1)
    assert found[2] == pytest.approx(0)
    assert found[3] == pytest.approx(1)
    assert all(math.isnan(found[i]) for i in (0, 4, 5, 6))
    assert local_cosines(corner, 2)[2] == pytest.approx(0)


def test_a_trajectory_puts_all_runs_into_one_plane():
    def run(x, y):
        return [
            Snapshot(step, Direction.of({0: torch.tensor([a, b, 0.0])}))
            for step, (a, b) in enumerate(zip(x, y, strict=True))
        ]

    runs = {"straight": run([0.0, 1, 2, 3], [0.0] * 4), "turning": run([0.0, 1, 1, 1], [0.0, 0, 1, 2])}
    found = trajectory(runs)
    assert sum(found.explained) == pytest.approx(1)
    assert found.explained[2] == pytest.approx(0, abs=1e-9)
    frame = found.frame
    assert list(frame[frame["run"] == "straight"]["norm"]) == pytest.approx([0, 1, 2, 3])
    # the plane keeps distances: components are a rotation of the (x, y) that were put in
    points = frame[["pc1", "pc2"]].to_numpy()
    original = np.array([[0, 0], [1, 0], [2, 0], [3, 0], [0, 0], [1, 0], [1, 1], [1, 2]], dtype=float)
    for i in range(8):
        for j in range(8):
            expected = np.linalg.norm(original[i] - original[j])
            assert np.linalg.norm(points[i] - points[j]) == pytest.approx(expected, abs=1e-9)
    turning = frame[frame["run"] == "turning"]["local_cosine"].tolist()
    assert turning[1] == pytest.approx(0)
    assert len(found.figure().data) == 6
    with pytest.raises(LensError, match="at least one run of two"):
        trajectory({"a": runs["straight"][:1]})
    with pytest.raises(LensError, match="no common space"):
        trajectory({"a": runs["straight"], "b": [Snapshot(0, vector()), Snapshot(1, vector())]})


def test_drift_tells_cosines_and_measures_per_snapshot():
    narrow, general = vector(1), vector(2)
    mixed = {1: 0.6 * narrow[1] / 2 + 0.8 * general[1] / 2}
    run = [Snapshot(0, narrow), Snapshot(10, Direction.of(mixed)), Snapshot(20, general.scaled(3.0))]
    found = snapshot_cosines(
        run, {"narrow": narrow, "general": general}, {"size": lambda s: [s.norm(), s.norm() + 1, s.norm() + 2]}
    )
    table = found.frame.pivot(index="step", columns="quantity", values="value")
    between = float(torch.cosine_similarity(narrow[1], general[1], dim=0))
    assert table["cosine to narrow"].tolist()[0] == pytest.approx(1)
    assert table["cosine to general"].tolist()[0] == pytest.approx(between, abs=1e-6)
    assert table["cosine to general"].tolist()[2] == pytest.approx(1)
    length = math.sqrt(0.36 + 0.64 + 0.96 * between)
    assert table["cosine to narrow"].tolist()[1] == pytest.approx((0.6 + 0.8 * between) / length, abs=1e-5)
    assert table["size"].tolist() == pytest.approx([3.0, length + 1, 7.0], abs=1e-5)
    row = found.frame[(found.frame["quantity"] == "size") & (found.frame["step"] == 20)].iloc[0]
    assert row["low"] < row["value"] < row["high"]
    assert {trace.name for trace in found.figure().data if trace.name} == {
        "cosine to narrow",
        "cosine to general",
        "size",
    }
    with pytest.raises(LensError, match="reference 'x' has 64 numbers, the run 32"):
        snapshot_cosines(run, {"x": vector(layers=(0, 1))})


def test_parts_of_an_adapter_are_flattened_by_name():
    own = lora()
    assert_close(flattened(own, "B"), torch.cat([own.b[1, "down"].flatten(), own.b[2, "down"].flatten()]))
    assert len(flattened(own)) == len(flattened(own, "A")) + len(flattened(own, "B"))
    assert_close(flattened(vector().scaled(-2.0)), -2 * vector()[1])
    with pytest.raises(LensError, match="has no part A"):
        flattened(vector(), "A")


# ---------------------------------------------------------------- texts


def test_windows_of_pythons_help_are_repeatable_english_of_the_asked_length():
    tokenizer = tiny_chat.tiny_tokenizer()
    windows = text_windows(tokenizer, n=20, length=40, seed=1)
    assert [len(window.ids) for window in windows] == [40] * 20
    assert len({window.ids for window in windows}) == 20
    assert [w.ids for w in windows] == [w.ids for w in text_windows(tokenizer, n=20, length=40, seed=1)]
    assert [w.ids for w in windows] != [w.ids for w in text_windows(tokenizer, n=20, length=40, seed=2)]
    assert windows[0].start == 1
    from pydoc_data.topics import topics

    known = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in topics.values()}
    first = windows[0].ids
    assert any(first == ids[i : i + 40] for ids in known for i in range(len(ids) - 39))
    many = text_windows(tokenizer, n=400, length=40)  # more windows than documents
    assert len({window.ids for window in many}) > 390


def test_a_text_file_is_a_source_and_too_little_text_is_refused(tmp_path):
    tokenizer, path = tiny_chat.tiny_tokenizer(), tmp_path / "t.txt"
    path.write_text("\n\n".join(f"paragraph {'abcdefgh'[i % 8] * 20} end" for i in range(600)))
    windows = text_windows(tokenizer, path, n=3, length=60)
    assert all(
        "paragraph" in tokenizer.decode(window.ids) or "end" in tokenizer.decode(window.ids) for window in windows
    )
    with pytest.raises(LensError, match=r"gives \d+ windows of 5000 tokens, 3 were asked"):
        text_windows(tokenizer, path, n=3, length=5000)
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(LensError, match="cannot be read as UTF-8"):
        text_windows(tokenizer, path)
    with pytest.raises(LensError, match="at least one window of at least two tokens"):
        text_windows(tokenizer, n=0)


def test_a_tokenizer_that_begins_with_bos_gets_it_in_every_window():
    inner = tiny_chat.tiny_tokenizer()

    class WithBos:
        bos_token_id = inner.bos_token_id

        def __call__(self, text, add_special_tokens=True):
            ids = inner(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    windows = text_windows(WithBos(), n=2, length=10)
    assert [window.ids[0] for window in windows] == [inner.bos_token_id] * 2
    assert [len(window.ids) for window in windows] == [10, 10]
