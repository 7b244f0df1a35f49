"""SAEs: loading and refusing, fit, attribution, steering and ablating by latent, training with sae-lens' trainer."""

import json
import sys

import pytest
import tiny_chat
import tiny_hooked
import tiny_models
import torch
from tiny_chat import tiny_examples
from tiny_hooked import hooked, logits_of, needs_hooked, no_hook_left, prompts
from tiny_pairs import pair
from torch.testing import assert_close

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.kinds import add
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.variants import Text
from piggyback_lens.models.backends import backend_of, hook_name
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import hook_model, identify
from piggyback_lens.models.plain_views import network_of, plain_view
from piggyback_lens.saes.latent_activations import site_activations
from piggyback_lens.saes.latent_attribution import CONTROL_SEED, LatentAttribution, attribute_latents
from piggyback_lens.saes.latent_fit import fit_latents
from piggyback_lens.saes.latent_training import train_sae
from piggyback_lens.saes.latents import ablate_latent, latents_of, load_sae, steer_latent
from piggyback_lens.settings import SAESettings
from piggyback_lens.vectors.direction import Direction, Provenance

sae_lens = pytest.importorskip("sae_lens", reason="the extra sae is not installed")

D, LAYER = 32, 1
HOOK = f"blocks.{LAYER}.hook_resid_post"
EXAMPLES = tiny_examples(4, seed=3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXTS = [
    Text(tuple(int(i) for i in torch.randint(6, 38, (n,), generator=torch.Generator().manual_seed(n))))
    for n in (9, 12, 7, 12)
]


def sae_of(model, d_in=D, hook=HOOK, seed=0, d_sae=24, config=sae_lens.StandardSAEConfig, **settings):
    """A random SAE which says that it belongs to this model."""
    about = {"model_name": model.cfg.model_name, "hook_name": hook} | settings.pop("about", {})
    about = {name: value for name, value in about.items() if value is not None}
    cfg = config(d_in=d_in, d_sae=d_sae, metadata=sae_lens.saes.sae.SAEMetadata(**about), **settings)
    sae = sae_lens.registry.get_sae_class(cfg.architecture())[0](cfg)
    with torch.no_grad():
        sae.W_dec.copy_(normal(d_sae, d_in, seed=seed))
        sae.W_enc.copy_(normal(d_in, d_sae, seed=seed + 1) * 0.3)
        sae.b_enc.copy_(normal(d_sae, seed=seed + 2) * 0.1)
        sae.b_dec.copy_(normal(d_in, seed=seed + 3) * 0.1)
    return sae


def perfect_sae(model):
    """Latents 2i and 2i + 1 are the positive and the negative part of coordinate i: nothing is lost."""
    sae = sae_of(model, d_sae=2 * D)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[0::2], sae.W_dec[1::2] = torch.eye(D), -torch.eye(D)
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


@pytest.fixture(params=tiny_hooked.BACKENDS)
def model(request):
    found = hooked("llama-gqa", request.param)
    with no_hook_left(found):
        yield found


@pytest.fixture(name="bridge")
def one_model():
    found = hooked("llama-gqa", "bridge")
    with no_hook_left(found):
        yield found


def direction(vector, site="resid_post", layer=LAYER):
    return Direction(vector[None], (layer,), site, "positive: test", Provenance("test"))


def activations_of(model, text, layer=LAYER, name=None):
    """Oracle: TransformerLens' own hooks, one text at a time."""
    kept = {}
    ids = torch.tensor([text.ids])
    name = name or hook_name(model, "resid_post", layer)
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda value, hook: kept.update(a=value.clone()))]):
        forward(model, ids, torch.ones_like(ids))
    return kept["a"][0, 1:].float()


# ---------------------------------------------------------------- loading


def test_an_sae_comes_back_from_its_folder_with_its_place(model, tmp_path):
    sae = sae_of(model)
    sae.save_model(tmp_path / "sae")
    latents = load_sae(tmp_path / "sae", model=model, site="resid_post", layer=LAYER)
    assert (latents.site, latents.layer, latents.d_in, latents.d_sae) == ("resid_post", LAYER, D, 24)
    assert latents.provenance.settings["model_check"] == "same name"
    assert str(tmp_path) not in str(latents.provenance)
    a = normal(5, D, seed=9)
    assert_close(latents.encode(a), torch.relu((a - sae.b_dec) @ sae.W_enc + sae.b_enc).detach())
    assert_close(latents.reconstruct(a), sae(a).detach())
    assert not any(parameter.requires_grad for parameter in latents.sae.parameters())


def test_the_bridges_own_hook_names_are_understood(bridge):
    for hook, site in (("hook_out", "resid_post"), ("hook_in", "resid_pre"), ("mlp.hook_out", "mlp_out")):
        assert latents_of(sae_of(bridge, hook=f"blocks.2.{hook}"), bridge).site == site


@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        ({"d_in": 16}, {}, "width 16, this model has 32"),
        ({"hook": "blocks.2.hook_resid_post"}, {"layer": 1}, r"layer 2 \(blocks.2.hook_resid_post\), 1 was asked"),
        ({}, {"site": "mlp_out"}, "site resid_post .* mlp_out was asked"),
        ({"hook": "blocks.7.hook_resid_post"}, {}, "layers 0 to 2"),
        ({"hook": "blocks.1.attn.hook_z"}, {}, "none of blocks"),
        ({"about": {"hook_layer": 2}}, {}, "contradicts itself"),
        ({"about": {"model_name": "gpt2"}}, {}, "of model gpt2, this one is"),
        ({"about": {"hook_head_index": 3}}, {}, "head 3 only"),
        ({"about": {"hook_name": None}}, {"site": "resid_post"}, "give site= and layer="),
        ({"normalize_activations": "expected_average_only_in"}, {}, "not folded into its weights"),
    ],
)
def test_an_sae_of_another_place_or_model_is_refused_by_name(bridge, tmp_path, change, asked, message):
    sae_of(bridge, **change).save_model(tmp_path)
    with pytest.raises(LensError, match=message) as caught:
        load_sae(tmp_path, model=bridge, **asked)
    assert "\n" not in str(caught.value)


def test_an_sae_of_another_model_is_taken_when_asked_for(bridge):
    sae = sae_of(bridge, about={"model_name": "gpt2"})
    assert "another model" in latents_of(sae, bridge, other_model=True).provenance.settings["model_check"]


def test_a_model_is_known_by_its_recorded_logits_whatever_its_name(bridge):
    about = {"model_name": "renamed", "piggyback_lens": {"model": identify(bridge).to_dict()}}
    assert latents_of(sae_of(bridge, about=about), bridge).provenance.settings["model_check"] == "same probe logits"
    other = hooked("llama-gqa", "bridge", 1)
    about["model_name"] = other.cfg.model_name
    with pytest.raises(LensError, match="gives other logits"):
        latents_of(sae_of(bridge, about=about), other)


def test_what_is_no_sae_is_refused_in_one_line(bridge, tmp_path):
    with pytest.raises(LensError, match="is no folder"):
        load_sae(tmp_path / "missing", model=bridge)
    with pytest.raises(LensError, match="no SAE can be loaded"):
        load_sae(tmp_path, model=bridge)
    sae_of(bridge).save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"architecture": "unheard-of"}))
    with pytest.raises(LensError, match="no SAE can be loaded") as caught:
        load_sae(tmp_path, model=bridge)
    assert "\n" not in str(caught.value)


def test_a_release_is_loaded_by_its_name_and_id(bridge, monkeypatch):
    asked = []

    def from_pretrained(release, sae_id, **settings):
        asked.append((release, sae_id, settings["device"]))
        if sae_id == "layer_9":
            raise ValueError("ID layer_9 not found.\nValid IDs are many.")
        return sae_of(bridge)

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    assert load_sae("some-release", "layer_1", model=bridge).provenance.how == "SAE from some-release, layer_1"
    assert asked == [("some-release", "layer_1", "cpu")]
    with pytest.raises(LensError, match=r"some-release \(layer_9\): ValueError: ID layer_9 not found.$"):
        load_sae("some-release", "layer_9", model=bridge)


def test_without_the_extra_there_is_one_clear_sentence(bridge, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(LensError, match=r"install piggyback-lens\[sae\]"):
        load_sae(tmp_path, model=bridge)
    with pytest.raises(LensError, match=r"install piggyback-lens\[sae\]"):
        train_sae(bridge, TEXTS, layer=1, out=tmp_path)


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_activations_are_those_of_single_passes_without_the_first_token(model, layer):
    found = list(site_activations(model, TEXTS, site="resid_post", layer=layer, batch_size=3))
    for text, own in zip(TEXTS, found, strict=True):
        assert_close(own, activations_of(model, text, layer), atol=1e-5, rtol=1e-4)


def test_token_ids_and_spans_of_conversations_are_read(model):
    (bare,) = site_activations(model, [TEXTS[0].ids], site="resid_post", layer=LAYER)
    assert_close(bare, activations_of(model, TEXTS[0]), atol=1e-5, rtol=1e-4)
    prompt = EXAMPLES[0]
    (response,) = site_activations(model, [prompt], site="resid_post", layer=LAYER, span="response")
    assert_close(response, activations_of(model, Text(prompt.ids))[prompt.n_prompt - 1 :], atol=1e-5, rtol=1e-4)


def test_layers_above_the_one_that_is_read_do_not_run(bridge):
    ran = []
    with bridge.hooks(
        fwd_hooks=[(f"blocks.{i}.hook_out", lambda value, hook: ran.append(hook.name)) for i in range(3)]
    ):
        list(site_activations(bridge, TEXTS[:1], site="resid_post", layer=0))
    assert ran == ["blocks.0.hook_out"]


def test_tokens_far_longer_than_the_others_are_left_out_and_counted(bridge):
    latents = latents_of(perfect_sae(bridge), bridge)
    plain = fit_latents(latents, bridge, TEXTS[1:2])
    handle = bridge.hook_dict["blocks.1.hook_out"].register_forward_hook(stretch(4), prepend=True)
    try:
        (own,) = site_activations(bridge, TEXTS[1:2], site="resid_post", layer=LAYER)
        (every,) = site_activations(bridge, TEXTS[1:2], site="resid_post", layer=LAYER, outliers=True)
        found = fit_latents(latents, bridge, TEXTS[1:2])
    finally:
        handle.remove()
    assert (len(own), len(every)) == (10, 11)
    assert_close(own, torch.cat([every[:3], every[4:]]))
    assert (plain.sides[0].left_out, found.sides[0].left_out) == (0, 1)
    assert set(found.to_frame()["tokens"]) == {10}


def stretch(column):
    """A torch hook which makes one token's activation a hundred times as long."""

    def hook(_module, _args, output):
        factor = torch.ones(output.shape[1])
        factor[column] = 100
        return output * factor[:, None]

    return hook


def test_texts_without_a_token_to_read_are_refused(bridge):
    with pytest.raises(LensError, match="0 texts"):
        list(site_activations(bridge, [], site="resid_post", layer=0))
    with pytest.raises(LensError, match="text 1 has no token"):
        list(site_activations(bridge, [TEXTS[0], (7,)], site="resid_post", layer=0))


# ---------------------------------------------------------------- fit


def values(found, side="model"):
    frame = found.to_frame()
    return frame[frame["side"] == side].set_index("metric")["value"]


def test_an_sae_that_loses_nothing_explains_everything_with_one_latent_per_coordinate(model):
    found = values(fit_latents(latents_of(perfect_sae(model), model), model, TEXTS))
    assert found["explained_variance"] == pytest.approx(1, abs=1e-9)
    assert found["relative_error"] == pytest.approx(0, abs=1e-9)
    assert found["l0"] == D


def test_fit_is_the_ratio_of_sums_over_all_tokens(model):
    latents = latents_of(sae_of(model), model)
    frame = fit_latents(latents, model, TEXTS, batch_size=3).to_frame().set_index("metric")
    a = torch.cat([activations_of(model, text) for text in TEXTS]).double()
    rebuilt, codes = latents.reconstruct(a.float()).double(), latents.encode(a.float())
    error = (a - rebuilt).square().sum()
    expected = {
        "explained_variance": 1 - error / (a - a.mean(0)).square().sum(),
        "relative_error": error / a.square().sum(),
        "l0": (codes > 0).sum(1).double().mean(),
        "dead_share": (codes == 0).all(0).double().mean(),
    }
    for metric, value in expected.items():
        assert frame.loc[metric, "value"] == pytest.approx(float(value), rel=1e-4), metric
    assert (frame["tokens"] == len(a)).all()
    assert frame.loc["l0", "low"] < frame.loc["l0", "value"] < frame.loc["l0", "high"]


def test_a_pair_gets_a_row_for_each_side():
    both = pair()
    with both.using("base") as base:
        latents = latents_of(perfect_sae(base), base)
    found = fit_latents(latents, both, EXAMPLES, span="response")
    assert list(found.to_frame()["side"].unique()) == ["base", "finetuned"]
    noisy = sae_of(base)
    sides = fit_latents(latents_of(noisy, base), both, EXAMPLES)
    assert values(sides, "base")["explained_variance"] != values(sides, "finetuned")["explained_variance"]
    figure = found.figure()
    assert list(figure.data[0].y) == ["base", "finetuned"]
    assert len(figure.data) == 4


# ---------------------------------------------------------------- attribution


def test_a_decoder_row_is_its_own_top_latent_and_random_directions_have_none(bridge):
    latents = latents_of(sae_of(bridge), bridge)
    own = attribute_latents(latents, direction(3 * latents.decoder[7]), n_random=30)
    first = own.top(1).iloc[0]
    assert first["latent"] == 7
    assert first["cosine"] == pytest.approx(1, abs=1e-6)
    assert first["beyond_chance"]
    assert first["random_low"] < 0 < first["random_high"] < 0.6
    other = attribute_latents(latents, direction(normal(D, seed=77)), n_random=30)
    assert not other.to_frame()["beyond_chance"].any()
    assert other.to_frame()["cosine_z"].abs().max() < 4


def test_a_random_direction_is_not_among_its_own_controls(bridge):
    latents = latents_of(sae_of(bridge), bridge)
    for drawn in range(3):
        random = direction(normal(D)).random_like(drawn)
        found = attribute_latents(latents, random, n_random=5)
        assert max(map(abs, found.cosine)) not in [pytest.approx(chance, abs=1e-6) for chance in found.chance["cosine"]]


def test_cosines_do_not_depend_on_the_lengths_of_the_decoder_rows(bridge):
    sae, stretched = sae_of(bridge), sae_of(bridge)
    with torch.no_grad():
        stretched.W_dec.mul_(torch.linspace(0.1, 5, 24)[:, None])
    found = [attribute_latents(latents_of(s, bridge), direction(normal(D, seed=5))).cosine for s in (sae, stretched)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_changes_are_the_mean_differences_of_encoded_activations(model):
    latents = latents_of(sae_of(model), model)
    vector = normal(D, seed=4)
    found = attribute_latents(latents, direction(1.5 * vector), model, TEXTS, n_random=5)
    a = torch.cat([activations_of(model, text) for text in TEXTS])
    expected = (latents.encode(a + 1.5 * vector) - latents.encode(a)).double().mean(0)
    assert_close(torch.tensor(found.change, dtype=torch.float64), expected, atol=1e-4, rtol=1e-3)
    assert_close(torch.tensor(found.before), latents.encode(a).mean(0), atol=1e-4, rtol=1e-3)
    random = [direction(vector).random_like(CONTROL_SEED + seed).vector for seed in range(5)]
    changes = torch.stack([(latents.encode(a + 1.5 * r) - latents.encode(a)).mean(0) for r in random])
    rank = (changes.abs() >= expected.float().abs()).sum(0)
    assert found.change_rank == tuple(rank.tolist())
    assert found.chance["change"] == pytest.approx(changes.abs().amax(1).tolist(), rel=1e-3)
    assert found.top(3, by="change")["latent"].tolist() == expected.abs().topk(3).indices.tolist()


def test_an_attribution_survives_its_file_and_draws_itself(bridge, tmp_path):
    latents = latents_of(sae_of(bridge), bridge)
    for texts in ([], TEXTS):
        found = attribute_latents(latents, direction(normal(D)), bridge if texts else None, texts, n_random=4)
        again = LatentAttribution.load(found.save(tmp_path / "a.json"))
        assert again == found
        assert len(found.to_frame()) == 24
        figure = again.figure(5)
        assert len(figure.data) == (4 if texts else 2)
        assert list(figure.data[1].y) == [f"latent {i}" for i in found.top(5)["latent"]]
        assert list(figure.data[1].x) == found.top(5)["cosine"].tolist()
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(LensError, match=r"says no format.*no LatentAttribution"):
        LatentAttribution.load(tmp_path / "a.json")


def test_directions_and_settings_that_do_not_fit_are_refused(bridge):
    latents = latents_of(sae_of(bridge), bridge)
    for wrong, message in (
        (direction(normal(D), site="mlp_out"), "at site mlp_out, the SAE at resid_post"),
        (direction(normal(D), layer=2), "no layer 1"),
        (direction(normal(16)), "width 16"),
        (direction(torch.zeros(D)), "zero vector"),
    ):
        with pytest.raises(LensError, match=message):
            attribute_latents(latents, wrong)
    with pytest.raises(LensError, match="both or neither"):
        attribute_latents(latents, direction(normal(D)), bridge)
    with pytest.raises(LensError, match="by='change'"):
        attribute_latents(latents, direction(normal(D))).top(by="change")


# ---------------------------------------------------------------- steering and ablating


def test_steering_by_a_latent_is_adding_its_decoder_row(model):
    sae = sae_of(model)
    batch = batch_prompts(EXAMPLES, side="right")
    ours, _ = logits_of(model, batch, steer_latent(latents_of(sae, model), 5, 2.5, span="response"))
    row = sae.W_dec[5].detach()
    expected, _ = logits_of(model, batch, add(row, layers=LAYER, strength=2.5, span="response"))
    assert torch.equal(ours, expected)


def test_an_sae_that_counts_in_units_of_length_steers_by_unit_rows(bridge):
    sae = sae_of(bridge, config=sae_lens.TopKSAEConfig, k=3, rescale_acts_by_decoder_norm=True)
    latents = latents_of(sae, bridge)
    assert_close(latents.decoder.norm(dim=1), torch.ones(24))
    a = normal(6, D, seed=8)
    assert_close(latents.encode(a) @ latents.decoder + sae.b_dec, latents.reconstruct(a))


def run(model, prompts):
    batch = batch_prompts(prompts, side="right")
    return logits_of(model, batch)[0], batch


def test_ablating_a_silent_latent_changes_nothing(model):
    sae = sae_of(model)
    with torch.no_grad():
        sae.b_enc[4] = -1e6
    before, _ = run(model, EXAMPLES)
    with ablate_latent(latents_of(sae, model), model, 4):
        during, _ = run(model, EXAMPLES)
    assert torch.equal(before, during)


def test_a_model_that_has_a_plain_view_is_ablated_all_the_same(bridge):
    owner = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    viewed, latents = hook_model(owner, None), latents_of(perfect_sae(bridge), bridge)
    before, _ = run(viewed, EXAMPLES)
    assert network_of(viewed) is plain_view(viewed)
    with ablate_latent(latents, viewed, [0, 1, 2]):
        assert network_of(viewed) is not plain_view(viewed)
        during, _ = run(viewed, EXAMPLES)
        answers = generate(viewed, prompts(), max_new_tokens=4, stop_ids=[])
    with ablate_latent(latents, bridge, [0, 1, 2]):
        expected, _ = run(bridge, EXAMPLES)
        same = generate(bridge, prompts(), max_new_tokens=4, stop_ids=[])
    assert_close(during, expected, atol=1e-5, rtol=1e-5)
    assert [a.ids for a in answers] == [a.ids for a in same]
    assert (during - before).abs().max() > 1e-3


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_ablating_takes_a_latents_part_out_of_the_activation(model, normalisation):
    """The part by hand: activation times decoder row (times the token's standard deviation under layer norm)."""
    latents = latents_of(sae_of(model, normalize_activations=normalisation), model)
    name = hook_name(model, "resid_post", LAYER)
    ids = torch.tensor([TEXTS[1].ids])
    kept = {}
    before = activations_of(model, TEXTS[1])
    keep = (name, lambda value, hook: kept.update(a=value.clone()))
    with ablate_latent(latents, model, [3, 9]), torch.no_grad(), model.hooks(fwd_hooks=[keep]):
        forward(model, ids, torch.ones_like(ids))
    codes = latents.encode(before)[:, [3, 9]]
    part = codes @ latents.sae.W_dec[[3, 9]]
    if normalisation == "layer_norm":
        part = part * before.std(dim=-1, keepdim=True)
    assert codes.max() > 0.1
    assert_close(kept["a"][0, 1:], before - part, atol=1e-4, rtol=1e-4)


def test_ablating_an_active_latent_lowers_it(model):
    latents = latents_of(perfect_sae(model), model)
    name = hook_name(model, "resid_post", LAYER)
    before = latents.encode(activations_of(model, TEXTS[1]))
    chosen = int(before.mean(0).argmax())
    logits, _ = run(model, EXAMPLES)
    with ablate_latent(latents, model, chosen):
        after = latents.encode(activations_of(model, TEXTS[1], name=name))
        changed, _ = run(model, EXAMPLES)
    assert before[:, chosen].max() > 0
    assert_close(after[:, chosen], torch.zeros(len(after)))
    others = [i for i in range(2 * D) if i != chosen]
    assert_close(after[:, others], before[:, others])
    assert (changed - logits).abs().max() > 1e-3
    assert torch.equal(run(model, EXAMPLES)[0], logits)


def test_ablating_leaves_activations_alone_that_are_longer_than_any_the_sae_knows(bridge):
    latents = latents_of(perfect_sae(bridge), bridge)
    before = activations_of(bridge, TEXTS[1])
    chosen = int(latents.encode(before).mean(0).argmax())
    norms = before.norm(dim=1)
    with ablate_latent(latents, bridge, chosen, longest=float(norms.median())):
        after = activations_of(bridge, TEXTS[1])
    long = norms > norms.median()
    assert torch.equal(after[long], before[long])
    assert (after - before)[~long].abs().max() > 0.1


def test_latents_and_models_that_do_not_fit_are_refused(bridge):
    latents = latents_of(sae_of(bridge), bridge)
    with pytest.raises(LensError, match="0 to 23"):
        steer_latent(latents, 24, 1.0)
    with pytest.raises(LensError, match="0 to 23"), ablate_latent(latents, bridge, [2, -1]):
        pass


# ---------------------------------------------------------------- training

LONG = [
    Text(tuple(int(i) for i in torch.randint(6, 38, (40,), generator=torch.Generator().manual_seed(n))))
    for n in range(10)
]
SMALL = {"d_sae": 48, "steps": 60, "batch_size": 64, "learning_rate": 3e-3}


@pytest.mark.parametrize("sparsity", [{"k": 8}, {"l1": 0.05}])
def test_training_lowers_the_loss_and_saves_what_load_sae_takes(model, tmp_path, sparsity, capsys):
    settings = SAESettings(seed=1, **SMALL, **sparsity)
    trained = train_sae(model, LONG, settings, layer=LAYER, out=tmp_path / "sae")
    assert capsys.readouterr().err == ""
    assert len(trained.losses) == 60
    assert trained.tokens == 10 * 39
    assert sum(trained.losses[-5:]) < 0.6 * sum(trained.losses[:5])
    again = load_sae(tmp_path / "sae", model=model, site="resid_post", layer=LAYER)
    assert again.provenance.settings["model_check"] == "same probe logits"
    norms = torch.cat([activations_of(model, text) for text in LONG]).norm(dim=1)
    assert again.provenance.settings["longest"] == pytest.approx(10 * float(norms.median()), rel=1e-4)
    found = values(fit_latents(again, model, LONG))
    assert found["explained_variance"] > 0.3  # of the model's own activations: the scale is folded in
    if "k" in sparsity:
        assert found["l0"] <= 8
        assert_close(again.sae.W_dec.norm(dim=1), torch.ones(48))  # saved in units of length
    about = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert about["hook_name"] == hook_name(model, "resid_post", LAYER)
    with pytest.raises(LensError, match="holds an SAE already"):
        train_sae(model, LONG, SAESettings(**SMALL), layer=LAYER, out=tmp_path / "sae")
    with pytest.raises(LensError, match=r"layer 1 .* 2 was asked"):
        load_sae(tmp_path / "sae", model=model, layer=2)


def test_the_same_seed_gives_the_same_sae_and_leaves_the_global_seed_alone(bridge, tmp_path):
    state = torch.random.get_rng_state()
    short = SMALL | {"steps": 6}
    runs = [
        train_sae(bridge, LONG, SAESettings(seed=s, **short), layer=LAYER, out=tmp_path / str(i))
        for i, s in enumerate((3, 3, 4))
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert torch.equal(runs[0].latents.sae.W_enc, runs[1].latents.sae.W_enc)
    # One step on all tokens does not depend on their order, only on the first weights.
    whole = SMALL | {"steps": 1, "batch_size": 390}
    first = [
        train_sae(bridge, LONG, SAESettings(seed=s, **whole), layer=LAYER, out=tmp_path / f"whole{s}").losses[0]
        for s in (3, 4)
    ]
    assert abs(first[0] - first[1]) > 1e-5 * first[0], first


def test_training_settings_that_make_no_sense_are_refused(bridge, tmp_path):
    for change, message in (
        ({"k": 4, "l1": 1.0}, "not both"),
        ({"k": 49}, "1..d_sae"),
        ({"l1": -1.0}, "not negative"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": 10_000}, "390 tokens for batches of 10000"),
        ({"layer": 3}, "0 to 2"),
    ):
        layer = change.get("layer", LAYER)
        chosen = SMALL | {name: value for name, value in change.items() if name != "layer"}
        with pytest.raises(LensError, match=message):
            train_sae(bridge, LONG, SAESettings(**chosen), layer=layer, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@needs_hooked
def test_an_sae_trained_on_one_backend_is_known_on_the_other(tmp_path):
    settings = SAESettings(**SMALL | {"steps": 4})
    trained = train_sae(hooked("llama-gqa", "bridge"), LONG, settings, layer=LAYER, out=tmp_path / "sae")
    other = hooked("llama-gqa", "hooked")
    assert backend_of(other) == "hooked"
    again = load_sae(tmp_path / "sae", model=other)
    assert_close(again.sae.W_dec, trained.latents.sae.W_dec)


def test_an_attribution_is_kept_in_its_folder_and_another_sae_is_refused_there(bridge, tmp_path):
    latents, own = latents_of(sae_of(bridge), bridge), direction(normal(D, seed=5))
    first = attribute_latents(latents, own, bridge, TEXTS, n_random=3, out=tmp_path)
    again = attribute_latents(latents, own, bridge, TEXTS, n_random=3, out=tmp_path)
    assert again.change == first.change == attribute_latents(latents, own, bridge, TEXTS, n_random=3).change
    other = sae_of(bridge)
    with torch.no_grad():
        other.W_dec.mul_(2)
    with pytest.raises(LensError, match="latents"):
        attribute_latents(latents_of(other, bridge), own, bridge, TEXTS, n_random=3, out=tmp_path)
