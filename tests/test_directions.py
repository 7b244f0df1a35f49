"""Directions: algebra, files, what they do when applied, and what they say in tokens."""

import json
import math

import pytest
import tiny_chat
import tiny_hooked
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_hooked import hooked, logits_of, needs_hooked, no_hook_left, prompts, real
from torch.testing import assert_close

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.directions.lens_tokens import logit_lens, token_scores
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.kinds import cache
from piggyback_lens.models.pair import identify
from piggyback_lens.vectors.direction import Direction, Provenance, combine, cosine


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(n=2, d=16, seed=0, layers=None, site="resid_post", **fields):
    layers = tuple(range(1, n + 1)) if layers is None else layers
    provenance = fields.pop("provenance", Provenance("test", "abc", None, 3, {"span": "response"}))
    return Direction(normal(n, d, seed=seed), layers, site, "positive: more", provenance, **fields)


# ---------------------------------------------------------------- the value


def test_a_direction_keeps_its_own_copy_and_gives_copies():
    vectors = normal(1, 4)
    direction = Direction(vectors, (0,), "resid_post", "+", Provenance("test"))
    before = vectors.clone()
    vectors.mul_(5)
    direction.vector.mul_(7)
    assert torch.equal(direction.vectors, before)
    with pytest.raises(AttributeError):
        direction.site = "k"


@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_lengths_and_cosines_obey_the_algebra(seed, norm):
    a, b = made(seed=seed), made(seed=seed + 1)
    for length in a.unit().norms.values():
        assert length == pytest.approx(1, rel=1e-5)
    for length in a.rescaled(norm).norms.values():
        assert length == pytest.approx(norm, rel=1e-5)
    assert a.rescaled(norm).scale == "rescaled"
    for layer, value in cosine(a, b).items():
        x, y = a.at(layer).vector.double(), b.at(layer).vector.double()
        assert value == pytest.approx(float(x @ y / math.sqrt((x @ x) * (y @ y))), abs=1e-6)
    assert cosine(a, a.rescaled(norm)) == pytest.approx({1: 1.0, 2: 1.0})
    assert cosine(a, -a) == pytest.approx({1: -1.0, 2: -1.0})
    left = a.without(b)
    assert all(abs(value) < 1e-4 for value in cosine(left, b).values())
    assert_close(left.without(b).vectors, left.vectors, atol=1e-5, rtol=1e-5)


def test_combining_is_a_weighted_sum_and_the_mean_by_default():
    a, b = made(seed=1), made(seed=2)
    assert_close(combine([a, b], [2.0, -0.5]).vectors, 2 * a.vectors - 0.5 * b.vectors)
    assert_close(combine([a, b]).vectors, (a.vectors + b.vectors) / 2)
    assert_close(a.scaled(-3.0).vectors, -3 * a.vectors)
    assert a.scaled(-3.0).sign == "opposite of: positive: more"
    assert a.scaled(3.0).sign == "positive: more"
    assert (-a).sign == "opposite of: positive: more"
    assert_close((-a).vectors, -1 * a.vectors)


def test_every_operation_says_so_in_the_provenance():
    direction = made().unit().scaled(2.0)
    assert direction.provenance.how == "test; made unit length; times 2"
    assert direction.provenance.data == "abc"
    assert direction.random_like(5).provenance == Provenance(
        "random, norm-matched to (test; made unit length; times 2)", seed=5
    )


def test_the_random_control_is_as_long_and_unrelated_and_repeatable():
    direction = made(n=3, d=2000, layers=(0, 4, 9))
    control = direction.random_like(11)
    assert control.norms == pytest.approx(direction.norms, rel=1e-6)
    assert all(abs(value) < 0.1 for value in cosine(direction, control).values())
    assert torch.equal(control.vectors, direction.random_like(11).vectors)
    assert not torch.equal(control.vectors, direction.random_like(12).vectors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(site="k"), "site 'k' cannot hold a direction"),
        (lambda: made(layers=(2, 1)), "ascending"),
        (lambda: made(layers=(1, 1)), "ascending"),
        (lambda: made(layers=(1,)), r"shape \(2, 16\) for 1 layers"),
        (
            lambda: Direction(torch.tensor([[math.nan]]), (0,), "resid_post", "+", Provenance("t")),
            "NaN or infinity",
        ),
        (lambda: made().vector, "has 2 layers: choose one"),
        (lambda: made().at(7), r"no layer 7, it has \[1, 2\]"),
        (lambda: made().scaled(0.0).unit(), r"zero at layers \[1, 2\]"),
        (lambda: cosine(made(), made(layers=(1, 3))), "differ in layers"),
        (lambda: cosine(made(), made(d=8)), "differ in width: 16 against 8"),
        (lambda: made().without(made(site="mlp_out")), "differ in site"),
        (lambda: combine([]), "0 directions"),
        (lambda: combine([made()], [1.0, 2.0]), "1 directions and 2 weights"),
        (lambda: made().ablation(layers=1), "ablated at its own"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(make, message):
    with pytest.raises(LensError, match=message):
        make()


# ---------------------------------------------------------------- files


def test_a_saved_direction_comes_back_whole(tmp_path):
    direction = made(n=3, layers=(0, 5, 7), site="mlp_out").rescaled(2.5)
    back = Direction.load(direction.save(tmp_path / "d.safetensors"))
    assert torch.equal(back.vectors, direction.vectors)
    for name in ("layers", "site", "sign", "scale", "provenance"):
        assert getattr(back, name) == getattr(direction, name)


@needs_hooked
def test_the_model_of_a_direction_is_recognised_after_a_round_trip(tmp_path):
    model = hooked("llama-gqa", "bridge")
    source = Provenance("test", model=identify(model).to_dict())
    back = Direction.load(made(provenance=source).save(tmp_path / "d.safetensors"))
    assert back.is_of(model)
    assert back.is_of(hooked("llama-gqa", "hooked"))  # the same function on the other backend
    assert not back.is_of(hooked("llama-gqa", "bridge", seed=1))
    assert not made().is_of(model)


def test_other_files_are_refused_by_name(tmp_path):
    good = made().save(tmp_path / "d.safetensors")
    save_file({"vectors": normal(1, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    header = {"format": "piggyback_lens.direction.1", "layers": [1, 2]}
    save_file({"vectors": normal(2, 2)}, tmp_path / "part.safetensors", metadata={"direction": json.dumps(header)})
    for name, message in (
        ("other.safetensors", "not a direction of this library"),
        ("text.safetensors", "broken direction file"),
        ("part.safetensors", "broken direction file"),
        ("none.safetensors", "does not exist"),
        ("d.pt", "ends in .safetensors"),
    ):
        with pytest.raises(LensError, match=message):
            Direction.load(tmp_path / name)
    with pytest.raises(LensError, match="is not JSON"):
        made(provenance=Provenance("x", settings={"a": {1, 2}})).save(good)
    assert Direction.load(good).layers == (1, 2)  # the old file is untouched


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_steering_adds_each_layers_vector_at_its_layer(backend):
    model, batch = hooked("llama-gqa", backend), batch_prompts(prompts(), side="right")
    direction = made(n=2, d=32, layers=(0, 2))

    def by_hand(activation, hook):
        return activation + 1.7 * direction.at(0 if ".0." in hook.name else 2).vector

    names = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2)]
    expected, _ = logits_of(model, batch, fwd_hooks=[(name, by_hand) for name in names])
    with no_hook_left(model):
        ours, _ = logits_of(model, batch, direction.steer(1.7))
    assert_close(real(ours, batch), real(expected, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_ablating_twice_is_ablating_once_and_leaves_no_projection(backend):
    model, batch = hooked("llama-gqa", backend), batch_prompts(prompts(), side="right")
    direction = made(n=1, d=32)
    once, _ = logits_of(model, batch, direction.ablation())
    twice, _ = logits_of(model, batch, direction.ablation() + direction.scaled(4.0).ablation())
    assert_close(real(twice, batch), real(once, batch), atol=1e-5, rtol=1e-5)
    unsteered, _ = logits_of(model, batch)
    assert (real(once, batch) - real(unsteered, batch)).abs().max() > 1e-2
    sites = ("resid_pre", "resid_mid", "resid_post")
    _, record = logits_of(model, batch, direction.ablation() + cache(sites))
    kept = record.activations
    for site in sites:
        for layer in kept.layers:
            projection = kept.flat(site, layer) @ direction.unit().vector
            assert projection.abs().max() < 1e-4
    several = made(n=3, d=32, layers=(0, 1, 2))
    _, record = logits_of(model, batch, several.ablation() + cache("resid_post"))
    for layer in range(3):
        assert (record.activations.flat("resid_post", layer) @ several.at(layer).unit().vector).abs().max() < 1e-4


def test_a_direction_of_another_width_or_layer_is_refused():
    model = hooked("llama-gqa", "bridge")
    with pytest.raises(LensError, match="width 16, this model has 32"):
        made().check(model)
    with pytest.raises(LensError, match="this model has layers 0 to 2"):
        made(d=32, layers=(2, 3)).check(model)
    made(d=32, layers=(0, 2)).check(model)


# ---------------------------------------------------------------- logit lens


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma3"])
def test_the_logit_lens_is_gain_times_unembedding(name, backend):
    model, vectors = hooked(name, backend), normal(3, 32, seed=4)
    core = hooked(name, "bridge").original_model
    weights = {k.replace("._original_component", ""): v for k, v in core.state_dict().items()}
    if name == "gpt2":
        centred = vectors - vectors.mean(1, keepdim=True)
        normed = centred / centred.pow(2).mean(1, keepdim=True).sqrt() * weights["transformer.ln_f.weight"]
    else:
        gain = weights["model.norm.weight"] + (1 if name == "gemma3" else 0)
        normed = vectors / vectors.pow(2).mean(1, keepdim=True).sqrt() * gain
    expected = normed @ weights["lm_head.weight"].T
    assert_close(token_scores(model, vectors), expected, atol=1e-3, rtol=1e-3)


def test_top_tokens_of_both_sides_are_the_largest_and_smallest_scores():
    model, direction = hooked("llama-gqa", "bridge"), made(n=2, d=32, layers=(0, 2))
    tokenizer = tiny_chat.tiny_tokenizer()
    rows = logit_lens(model, direction, tokenizer, top=3)
    assert len(rows) == 2 * 2 * 3
    scores = token_scores(model, direction.at(2).vectors)[0]
    positive = [row for row in rows if row.layer == 2 and row.side == "positive"]
    negative = [row for row in rows if row.layer == 2 and row.side == "negative"]
    order = scores.argsort().tolist()
    assert [row.id for row in positive] == order[::-1][:3]
    assert [row.id for row in negative] == order[:3]
    assert [row.rank for row in positive] == [0, 1, 2]
    assert positive[0].token == tokenizer.decode([order[-1]])
    flipped = logit_lens(model, -direction, tokenizer, top=3)
    assert [r.id for r in flipped if r.layer == 2 and r.side == "negative"] == [row.id for row in positive]
    with pytest.raises(LensError, match="top from 1"):
        logit_lens(model, direction, tokenizer, top=0)
