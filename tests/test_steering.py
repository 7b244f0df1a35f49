"""Steering experiments: variants against single runs, sweeps, ablation, bisection to a KL budget, transfer."""

import json
import math
from functools import partial

import numpy as np
import pytest
import tiny_chat
import tiny_hooked
import torch
from tiny_chat import tiny_examples
from tiny_hooked import hooked, logits_of, no_hook_left, prompts
from torch.testing import assert_close

import piggyback_lens.directions.curves as curves_module
import piggyback_lens.directions.steering as steering_module
import piggyback_lens.directions.transfer as transfer_module
from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.directions.curves import ablation_cost, efficiency, significance, stability
from piggyback_lens.directions.steering import ablate_sweep, steer, strength_for_kl
from piggyback_lens.directions.sweeps import RANDOM, Sweep
from piggyback_lens.directions.transfer import Organism, TransferResult, transfer_matrix
from piggyback_lens.errors import LensError
from piggyback_lens.intervals import mean_interval
from piggyback_lens.interventions.kinds import zero
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.measuring.scoring import nll
from piggyback_lens.measuring.variants import Text, response_texts, variant_kl, variant_nll
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.results.result import load_result
from piggyback_lens.settings import AnswerSettings, CurveSettings, SteerSettings
from piggyback_lens.vectors.adapters import LoRAAdapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction, Provenance

LENGTH = Behaviour("letters", "letters per answer", "letters", "Number of characters.", lambda text: float(len(text)))
EXAMPLES = tiny_examples(5, seed=3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direction(layers=(1,), seed=0, site="resid_post"):
    return Direction(normal(len(layers), 32, seed=seed), layers, site, "positive: test", Provenance("test"))


def lora(seed, layers=(1, 2)):
    places = [(layer, module) for layer in layers for module in ("v", "down")]
    sizes = {"v": (16, 32), "down": (32, 48)}
    a = {p: normal(2, sizes[p[1]][1], seed=seed + i) * 0.3 for i, p in enumerate(places)}
    b = {p: normal(sizes[p[1]][0], 2, seed=seed + i + 40) * 0.3 for i, p in enumerate(places)}
    return LoRAAdapter(a, b, 2.0)


@pytest.fixture(params=tiny_hooked.BACKENDS)
def model(request):
    found = hooked("llama-gqa", request.param)
    with no_hook_left(found):
        yield found


# ---------------------------------------------------------------- many variants of a model


def variants():
    vectors = [Direction.of({1: normal(32, seed=i)}).scaled(0.5 * i) for i in range(4)]
    above = [Direction.of({2: normal(32, seed=i)}, "resid_pre") for i in range(2)]
    below = [Direction.of({0: normal(32, seed=7), 2: normal(32, seed=8)}, "resid_pre")] * 2
    return [*vectors, *above, None, *below, lora(1), lora(2).scaled(0.3), zero("z", layers=1), direction().ablation()]


@pytest.mark.parametrize("rows_per_pass", [1, 7, 64])
def test_many_variants_at_once_score_as_each_by_itself(model, rows_per_pass):
    """Oracle: the library's scoring of one text at a time, with the variant attached the ordinary way."""
    found = variant_nll(model, response_texts(EXAMPLES), variants(), rows_per_pass=rows_per_pass)
    for row, variant in enumerate(variants()):
        adapters = [variant] if isinstance(variant, Direction | LoRAAdapter) else []
        parts = None if adapters else variant
        with attached(model, *adapters):
            expected = [float(nll(model, [prompt], interventions=parts)[0]) for prompt in EXAMPLES]
        assert_close(found[row].float(), torch.tensor(expected), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen3"])
def test_rows_that_fork_at_a_layer_are_right_with_sliding_windows_too(name):
    for backend in tiny_hooked.BACKENDS:
        model = hooked(name, backend)
        vectors = [Direction.of({2: normal(32, seed=i)}).scaled(1.0 + i) for i in range(3)]
        found = variant_nll(model, response_texts(EXAMPLES), vectors)
        for row, vector in enumerate(vectors):
            with attached(model, vector):
                expected = nll(model, EXAMPLES)
            assert_close(found[row].float(), expected, atol=2e-4, rtol=2e-4)


def test_blocks_below_the_vector_run_once_for_all_variants():
    """What makes the curves fast: a lower block sees each text once, an upper one once for each variant."""
    model, rows = hooked("llama-gqa", "bridge"), {}
    handles = [
        block.register_forward_hook(lambda _m, a, _o, i=i: rows.setdefault(i, []).append(len(a[0])))
        for i, block in enumerate(model.blocks)
    ]
    vectors = [Direction.of({1: normal(32, seed=i)}) for i in range(6)]
    variant_nll(model, response_texts(EXAMPLES), vectors, rows_per_pass=30)
    for handle in handles:
        handle.remove()
    assert rows == {0: [5], 1: [30], 2: [30]}


def test_kl_is_that_of_the_two_distributions_token_by_token(model):
    vector = Direction.of({1: normal(32)}).scaled(1.5)
    found = variant_kl(model, response_texts(EXAMPLES), [vector, None, direction().ablation()])
    for number, prompt in enumerate(EXAMPLES):
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            base = forward(model, ids, torch.ones_like(ids))[0].double().log_softmax(-1)
            with attached(model, vector):
                steered = forward(model, ids, torch.ones_like(ids))[0].double().log_softmax(-1)
        expected = (base.exp() * (base - steered)).sum(-1)[prompt.n_prompt - 1 : -1]
        assert_close(found[0][number], expected, atol=1e-4, rtol=1e-3)
        assert torch.equal(found[1][number], torch.zeros(len(expected), dtype=torch.float64))
    assert all(float(values.min()) > -1e-6 for values in found[2])


def test_plain_texts_are_scored_from_their_second_token_on(model):
    texts = [Text((5, 9, 11, 7)), Text((8, 6, 20), start=2)]
    found = variant_nll(model, texts, [None, direction().steer(2.0), direction().ablation()])
    with torch.no_grad():
        for number, text in enumerate(texts):
            ids = torch.tensor([text.ids])
            logs = forward(model, ids, torch.ones_like(ids))[0].log_softmax(-1)
            wanted = [float(-logs[i - 1, text.ids[i]]) for i in range(text.start, len(text.ids))]
            assert float(found[0, number]) == pytest.approx(np.mean(wanted), rel=1e-4)
    with attached(model, direction().scaled(2.0)):
        again = variant_nll(model, texts, [None])
    assert_close(found[1], again[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m: variant_nll(m, [], [None]), "0 texts"),
        (lambda m: variant_nll(m, response_texts(EXAMPLES), [None], rows_per_pass=0), "rows_per_pass 0"),
        (lambda m: response_texts(prompts()), "needs a response to be scored"),
        (lambda m: Text((1,)), "nothing to score"),
        (
            lambda m: variant_nll(m, [Text((1, 2))], [direction().steer(1.0, span="query")]),
            "span 'query' is not in row",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(run, message):
    with pytest.raises(LensError, match=message):
        run(hooked("llama-gqa", "bridge"))


# ---------------------------------------------------------------- sweeps


SMALL = {"max_new_tokens": 4, "batch_size": 3}


def test_a_sweep_measures_what_generation_under_the_vector_gives(model):
    found = steer(
        model,
        direction(),
        prompts(),
        behaviour=LENGTH,
        settings=SteerSettings(strengths=[0.0, 1.5], n_random=2, seed=4, **SMALL),
    )
    labels = [(p.series, p.layer, p.x, p.seed) for p in found.points]
    assert labels == [
        ("steered", 1, 0.0, None), ("steered", 1, 1.5, None), (RANDOM, 1, 0.0, 0), (RANDOM, 1, 1.5, 0),
        (RANDOM, 1, 0.0, 1), (RANDOM, 1, 1.5, 1),
    ]  # fmt: skip
    unsteered = generate(model, prompts(), max_new_tokens=4)
    answers = generate(model, prompts(), interventions=direction().steer(1.5), max_new_tokens=4)
    point = found.points[1]
    assert found.answers[1] == tuple(answer.text for answer in answers)
    assert point.behaviour == tuple(float(len(answer.text)) for answer in answers)
    own = nll(model, [answer.completed() for answer in answers])
    assert_close(torch.tensor(point.own_nll), own, atol=1e-4, rtol=1e-4)
    texts = response_texts([answer.completed() for answer in unsteered])
    kl = [float(values.mean()) for values in variant_kl(model, texts, [direction().steer(1.5)])[0]]
    assert point.kl == pytest.approx(kl)
    assert min(point.kl) > 1e-3


def test_strength_zero_is_the_unsteered_model_exactly_and_costs_nothing(model):
    settings = SteerSettings(strengths=[1.0], n_random=1, **SMALL)
    found = steer(model, direction(), prompts(), LENGTH, settings)
    unsteered = tuple(answer.text for answer in generate(model, prompts(), max_new_tokens=4))
    still = [(p, texts) for p, texts in zip(found.points, found.answers, strict=True) if p.x == 0]
    assert [point.series for point, _ in still] == ["steered", RANDOM]  # 0 is there without being asked for
    for point, texts in still:
        assert texts == unsteered
        assert point.kl == (0.0,) * 3


def test_fractions_are_of_the_mean_activation_norm_at_each_layer():
    model, batch = hooked("llama-gqa", "bridge"), batch_prompts(prompts(), side="right")
    kept = {}

    def keep(activation, hook):
        kept[hook.name] = activation[batch.attention_mask.bool()].norm(dim=-1).mean()

    logits_of(model, batch, fwd_hooks=[(f"blocks.{i}.hook_resid_post", keep) for i in (0, 2)])
    norms = list(kept.values())
    found = steer(
        model,
        direction(),
        prompts(),
        behaviour=LENGTH,
        settings=SteerSettings(fractions=[0.5], layers=[0, 2], n_random=0, **SMALL),
    )
    length = float(direction().vector.norm())
    assert [(p.layer, p.x == 0) for p in found.points] == [(0, True), (0, False), (2, True), (2, False)]
    assert [p.fraction for p in found.points if p.x == 0] == [0.0, 0.0]
    for point, norm in zip([p for p in found.points if p.x], norms, strict=True):
        assert point.x * length == pytest.approx(0.5 * float(norm), rel=1e-4)
        assert point.fraction == pytest.approx(0.5, rel=1e-5)


def test_controls_are_as_long_as_the_direction_and_sweeps_repeat_by_seed():
    model = hooked("llama-gqa", "bridge")

    def swept(seed):
        settings = SteerSettings(strengths=[2.0], n_random=2, seed=seed, **SMALL)
        found = steer(model, direction(), prompts(), LENGTH, settings)
        return [point for point in found.points if point.x]

    one, again = swept(1), swept(1)
    assert one == again
    other = swept(2)
    assert [point.seed for point in one] == [None, 0, 1]
    assert one[0] == other[0]
    assert one[1].kl != other[1].kl
    assert one[1].kl != one[2].kl


def test_a_table_has_every_metric_with_its_interval_seeds_averaged_first():
    model = hooked("llama-gqa", "bridge")
    settings = SteerSettings(strengths=[2.0], n_random=2, **SMALL)
    found = steer(model, direction(), prompts(), LENGTH, settings)
    frame = found.to_frame()
    assert len(frame) == 2 * 2 * 3
    frame, points = frame[frame["x"] == 2.0], [p for p in found.points if p.x == 2.0]
    assert len(frame) == 2 * 3
    control = frame[(frame["series"] == RANDOM) & (frame["metric"] == "kl")].iloc[0]
    by_hand = mean_interval(np.mean([p.kl for p in points if p.series == RANDOM], axis=0))
    assert (control["value"], control["low"], control["high"]) == (by_hand.value, by_hand.low, by_hand.high)
    assert (control["seeds"], control["n"]) == (2, 3)
    perplexity = frame[(frame["series"] == "steered") & (frame["metric"] == "perplexity")].iloc[0]
    assert perplexity["value"] == pytest.approx(math.exp(np.mean(points[0].own_nll)))


def test_an_ablation_sweep_takes_the_direction_out_at_one_layer_and_everywhere(model):
    many = direction(layers=(0, 2))
    found = ablate_sweep(model, many, prompts(), LENGTH, SteerSettings(n_random=1, **SMALL))
    labels = [(p.series, p.layer, p.seed) for p in found.points]
    one, everywhere = "at one layer", "everywhere"
    assert labels == [
        (f"ablated {one}", 0, None), (f"{RANDOM} {one}", 0, 0), (f"ablated {one}", 2, None), (f"{RANDOM} {one}", 2, 0),
        (f"ablated {everywhere}", 0, None), (f"{RANDOM} {everywhere}", 0, 0), (f"ablated {everywhere}", 2, None),
        (f"{RANDOM} {everywhere}", 2, 0),
    ]  # fmt: skip
    texts = response_texts([a.completed() for a in generate(model, prompts(), max_new_tokens=4)])
    unit = many.at(2).unit().vector

    def project(activation, hook):
        return activation - (activation @ unit)[..., None] * unit

    def run(names):
        out = []
        for text in texts:
            ids = torch.tensor([text.ids])
            with torch.no_grad():
                base = forward(model, ids, torch.ones_like(ids))[0].log_softmax(-1)
                with model.hooks(fwd_hooks=[(name, project) for name in names]):
                    other = forward(model, ids, torch.ones_like(ids))[0].log_softmax(-1)
            out.append(float((base.exp() * (base - other)).sum(-1)[text.start - 1 : -1].mean()))
        return out

    assert found.points[2].kl == pytest.approx(run(["blocks.2.hook_resid_post"]), abs=1e-4)
    names = [f"blocks.{i}.hook_resid_{site}" for i in range(3) for site in ("pre", "mid", "post")]
    assert found.points[6].kl == pytest.approx(run(names), abs=1e-4)


def test_a_sweep_survives_its_file_and_draws_controls_in_grey(tmp_path):
    model = hooked("llama-gqa", "bridge")
    for made in (
        steer(model, direction(), prompts(), LENGTH, SteerSettings(strengths=[0.0, 1.0], n_random=1, **SMALL)),
        ablate_sweep(model, direction(), prompts(), "words", SteerSettings(n_random=1, **SMALL)),
    ):
        back = Sweep.load(made.save(tmp_path / "s.json"))
        assert back.points == made.points
        assert back.answers == made.answers
        assert back.to_frame().equals(made.to_frame())
        figure = back.figure()
        lines = [trace for trace in figure.data if trace.name]
        assert {trace.line.color for trace in lines if "control" in trace.name} == {"#666666"}
        assert len({trace.yaxis for trace in lines}) == 3
    (tmp_path / "x.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(LensError, match="is of format 'other', expected sweep"):
        Sweep.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strengths": [0.0]}, "at least one that is not 0"),
        ({"strengths": [1.0], "fractions": [1.0]}, "strengths and fractions are both given: choose one"),
        ({"strengths": [1.0], "layers": [3]}, "this model has layers 0 to 2"),
        ({"strengths": [1.0], "behaviour": "politeness"}, "no behaviour is called"),
        ({"strengths": [1.0], "span": "history"}, "span 'history' is not in row"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(settings, message):
    behaviour = settings.get("behaviour", LENGTH)
    chosen = {name: value for name, value in settings.items() if name != "behaviour"}
    with pytest.raises(LensError, match=message):
        steer(hooked("llama-gqa", "bridge"), direction(), prompts(), behaviour, SteerSettings(**SMALL, **chosen))


def test_a_zero_direction_cannot_be_swept():
    with pytest.raises(LensError, match="zero at layer 1"):
        steer(
            hooked("llama-gqa", "bridge"),
            direction().scaled(0.0),
            prompts(),
            LENGTH,
            SteerSettings(strengths=[1.0], **SMALL),
        )


# ---------------------------------------------------------------- a KL budget


@pytest.mark.parametrize("budget", [0.002, 0.05, 0.4])
def test_the_strength_found_spends_the_budget(model, budget):
    found = strength_for_kl(model, direction(), EXAMPLES, budget, tolerance=0.02)
    values = variant_kl(model, response_texts(EXAMPLES), [direction().scaled(found.strength)])[0]
    kl = float(torch.cat(values).mean())  # over all tokens
    assert kl == pytest.approx(budget, rel=0.021)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.tried[-1] == (found.strength, found.kl)


def test_a_budget_out_of_reach_is_refused_with_what_was_reached():
    model = hooked("llama-gqa", "bridge")
    with pytest.raises(LensError, match=r"no strength reaches 1000 nats per token within 6 steps"):
        strength_for_kl(model, direction(), EXAMPLES, 1000.0, max_steps=6)
    with pytest.raises(LensError, match="must be above 0"):
        strength_for_kl(model, direction(), EXAMPLES, 0.0)


def test_without_responses_the_models_own_answers_are_scored():
    model = hooked("llama-gqa", "bridge")
    own = [answer.completed() for answer in generate(model, prompts(), max_new_tokens=5)]
    one = strength_for_kl(model, direction(), prompts(), 0.05, settings=SteerSettings(max_new_tokens=5))
    other = strength_for_kl(model, direction(), own, 0.05)
    assert one.strength == pytest.approx(other.strength, rel=1e-6)


# ---------------------------------------------------------------- transfer


def organisms():
    tokenizer = tiny_chat.tiny_tokenizer()
    base = hooked("llama-gqa", "bridge")
    return {
        name: Organism(
            ModelPair(base, hooked("llama-gqa", "bridge", seed=seed), tokenizer=tokenizer),
            direction(seed=seed),
            LENGTH,
            strength=float(seed),
        )
        for name, seed in (("A", 1), ("B", 2))
    }


def test_every_direction_meets_every_organism_and_controls_run(tmp_path):
    given = organisms()
    found = transfer_matrix(given, prompts(), n_random=2, settings=AnswerSettings(**SMALL))
    labels = {(cell.mode, cell.direction, cell.organism): cell for cell in found.cells}
    assert set(labels) == {(m, d, o) for m in ("added", "ablated") for d in ("A", "B", RANDOM) for o in ("A", "B")}
    with given["B"].pair.using("base") as model:
        added = generate(model, prompts(), interventions=given["A"].direction.steer(1.0), max_new_tokens=4)
    with given["B"].pair.using("finetuned") as model:
        ablated = generate(model, prompts(), interventions=given["A"].direction.ablation(), max_new_tokens=4)
        plain = generate(model, prompts(), max_new_tokens=4)
    assert labels["added", "A", "B"].values == tuple(float(len(a.text)) for a in added)
    assert labels["ablated", "A", "B"].values == tuple(float(len(a.text)) for a in ablated)
    assert found.finetuned["B"] == tuple(float(len(a.text)) for a in plain)
    assert labels["added", RANDOM, "A"].n_seeds == 2
    back = TransferResult.load(found.save(tmp_path / "t.json"))
    assert back == found
    assert len(back.figure().data) == 2


def test_effects_are_0_at_the_start_and_1_at_the_other_model():
    from piggyback_lens.directions.transfer import TransferCell

    base, tuned = (0.0, 1.0, 0.0, 1.0, 0.5), (4.0, 5.0, 4.5, 5.0, 4.0)
    middle = tuple((a + b) / 2 for a, b in zip(base, tuned, strict=True))
    cells = [
        TransferCell(mode, label, "A", values)
        for mode in ("added", "ablated")
        for label, values in (("base", base), ("tuned", tuned), ("middle", middle))
    ]
    found = TransferResult(tuple(cells), {"A": base}, {"A": tuned}, {"A": "words"}, {})
    effects = {(row["mode"], row["direction"]): row["value"] for _, row in found.to_frame().iterrows()}
    assert effects == pytest.approx(
        {
            ("added", "base"): 0, ("added", "tuned"): 1, ("added", "middle"): 0.5,
            ("ablated", "base"): 1, ("ablated", "tuned"): 0, ("ablated", "middle"): 0.5,
        }
    )  # fmt: skip
    same = TransferResult((TransferCell("added", "A", "A", base),), {"A": base}, {"A": base}, {"A": "words"}, {})
    row = same.to_frame().iloc[0]
    assert math.isnan(row["value"])
    assert "do not differ" in row["reason"]


def test_organisms_that_do_not_fit_are_refused():
    with pytest.raises(LensError, match="no organisms"):
        transfer_matrix({}, prompts())
    given = organisms()
    wrong = Direction(normal(1, 16), (1,), "resid_post", "+", Provenance("t"))
    given["A"] = Organism(given["A"].pair, wrong, LENGTH)
    with pytest.raises(LensError, match="width 16, this model has 32"):
        transfer_matrix(given, prompts())


# ---------------------------------------------------------------- folders


def kept_calls():
    """Every experiment with directions that takes `out=`, and a change of its settings that makes another run."""
    model, texts = hooked("llama-gqa", "bridge"), [Text(tuple(range(6, 15))), Text(tuple(range(8, 20)))]
    own, swept = {"a": direction()}, {"max_new_tokens": 3, "n_random": 1, "layers": [1]}

    transfer = partial(transfer_matrix, n_random=1)

    def with_settings(function, *given, **chosen):
        kind = {steer: SteerSettings, ablate_sweep: SteerSettings, transfer: AnswerSettings}.get(
            function, CurveSettings
        )
        return lambda out=None, **change: function(*given, settings=kind(**chosen | change), out=out)

    return {
        "steer": (
            with_settings(steer, model, direction(), prompts(), "words", strengths=[0.0, 1.0], **swept),
            {"strengths": [0.0, 2.0]}, r"strengths is \[0\.0, 1\.0\] there, \[0\.0, 2\.0\] here",
        ),
        "ablate_sweep": (
            with_settings(ablate_sweep, model, direction(), prompts(), "words", **swept),
            {"seed": 1}, "seed is 0 there, 1 here",
        ),
        "efficiency": (
            with_settings(efficiency, model, own, tiny_examples(3), fractions=[0.0, 1.0], n_random=1),
            {"fractions": [1.0]}, r"fractions is \[0\.0, 1\.0\] there, \[1\.0\] here",
        ),
        "stability": (
            with_settings(stability, model, own, tiny_examples(3), epsilons=[0.0, 0.5], n_noise=1),
            {"n_noise": 2}, "n_noise is 1 there, 2 here",
        ),
        "significance": (
            with_settings(significance, model, own, texts, fractions=[0.0, 1.0], n_random=1),
            {"n_random": 2}, "n_random is 1 there, 2 here",
        ),
        "ablation_cost": (
            with_settings(ablation_cost, model, own, texts, n_random=1), {"seed": 3}, "seed is 0 there, 3 here",
        ),
        "transfer_matrix": (
            with_settings(transfer, organisms(), prompts(), max_new_tokens=3),
            {"max_new_tokens": 4}, "max_new_tokens is 3 there, 4 here",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", kept_calls())
def test_an_experiment_with_directions_is_kept_in_its_folder(name, tmp_path, monkeypatch):
    call, change, told = kept_calls()[name]
    first = call(out=tmp_path / "run")
    assert first.to_frame().equals(call().to_frame())
    page = (tmp_path / "run" / "result.json").read_bytes()
    with monkeypatch.context() as context:
        for place in ("generate", "variant_nll", "variant_kl"):
            for module in (steering_module, curves_module, transfer_module):
                context.setattr(module, place, lambda *_, **__: pytest.fail("it was computed again"), raising=False)
        again = call(out=tmp_path / "run")
    assert again.to_frame().equals(first.to_frame())
    with pytest.raises(LensError, match=f"belongs to another run: .*{told}"):
        call(out=tmp_path / "run", **change)
    assert (tmp_path / "run" / "result.json").read_bytes() == page
    assert load_result(tmp_path / "run").to_frame().equals(first.to_frame())
