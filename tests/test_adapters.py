"""Adapters against PEFT, hand-written forwards and merged weights, on every kind of model; and their files."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
import tiny_chat
import tiny_hooked
import tiny_models
import torch
from jaxtyping import TypeCheckError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_hooked import chat, hooked, logits_of, needs_hooked, no_hook_left, prompts, real
from torch.testing import assert_close

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.directions.scalars import adapter_scalars, logistic_probe
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.steps import forward_step, response_nll
from piggyback_lens.finetuning.trainables import Trainable, add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.kinds import ablate, cache
from piggyback_lens.interventions.running import applied
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.peft_adapters import attach_adapter
from piggyback_lens.settings import LoRASettings, TrainSettings
from piggyback_lens.vectors.adapter_files import (
    load_gguf,
    load_npy,
    load_peft,
    load_pt,
    save_gguf,
    save_peft,
    save_with_bias,
)
from piggyback_lens.vectors.adapters import LoRAAdapter
from piggyback_lens.vectors.adapting import attached, attached_rows
from piggyback_lens.vectors.direction import Direction, Provenance
from piggyback_lens.vectors.solution_files import load_solution, save_solution
from piggyback_lens.words import MODULES

NAMES = ("llama-gqa", "qwen3", "gemma3", "mistral")
SIZES = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (48, 32), "up": (48, 32), "down": (32, 48)}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(modules=MODULES, layers=(0, 2), rank=2, alpha=3.0, rslora=False, seed=0):
    a, b = {}, {}
    for layer in layers:
        for number, module in enumerate(modules):
            d_out, d_in = SIZES[module]
            a[layer, module] = normal(rank, d_in, seed=seed + 100 * layer + number) * 0.3
            b[layer, module] = normal(d_out, rank, seed=seed + 100 * layer + number + 50) * 0.3
    return LoRAAdapter(a, b, alpha, rslora)


def plain(name="llama-gqa", seed=0):
    return tiny_models.build(name, seed, vocab=tiny_chat.VOCAB)


def batch(side="right"):
    return batch_prompts(prompts(), side=side)


@torch.no_grad()
def hf_logits(model, rows=None):
    """Logits of every prompt, run by itself without padding by transformers alone."""
    ids = [prompt.ids for prompt in prompts()] if rows is None else rows
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ids])


def own_logits(model, adapters=(), interventions=None, side="right"):
    with attached(model, *adapters):
        b = batch(side)
        logits, _ = logits_of(model, b, interventions)
    return real(logits, b)


def merged_by_hand(adapter, name="llama-gqa", seed=0):
    """A transformers model whose weights got s·BA written into them, name by name."""
    model = plain(name, seed)
    s = adapter.alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)
    with torch.no_grad():
        for (layer, module), a in adapter.a.items():
            block = model.model.layers[layer]
            owner = block.self_attn if module in "qkvo" else block.mlp
            getattr(owner, f"{module}_proj").weight.add_(s * adapter.b[layer, module] @ a)
    return model


# ---------------------------------------------------------------- acting on models


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("module", MODULES)
def test_a_hooked_adapter_is_the_model_with_the_adapter_in_its_weights(name, backend, module):
    adapter = lora((module,), layers=(0, 2), rslora=True)
    model = hooked(name, backend)
    with no_hook_left(model):
        ours = own_logits(model, [adapter])
    assert_close(ours, hf_logits(merged_by_hand(adapter, name)), atol=3e-4, rtol=1e-4)
    assert (ours - own_logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["transformers", *tiny_hooked.BACKENDS])
def test_all_modules_together_in_a_plain_model_and_on_both_backends(kind):
    adapter = lora()
    model = plain() if kind == "transformers" else hooked("llama-gqa", kind)
    with attached(model, adapter):
        ours = hf_logits(model) if kind == "transformers" else own_logits(model)
    assert_close(ours, hf_logits(merged_by_hand(adapter)), atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_merging_equals_attaching_and_the_old_weights_return_bit_for_bit(backend):
    adapter, model = lora(), hooked("llama-gqa", backend)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attached_logits = own_logits(model, [adapter])
    with adapter.merged(model):
        assert_close(own_logits(model), attached_logits, atol=3e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="inside"), adapter.merged(model):
        raise RuntimeError("inside")
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_an_adapter_is_removed_also_when_the_block_raises(backend):
    model = hooked("llama-gqa", backend)
    before = own_logits(model)
    with no_hook_left(model), pytest.raises(RuntimeError), attached(model, lora()):
        raise RuntimeError
    modules = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    with attached(model, lora()):
        pass
    assert modules == [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert torch.equal(own_logits(model), before)


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_two_adapters_add_up_and_scaling_scales(backend):
    model = hooked("llama-gqa", backend)
    one, other = lora(("down",), seed=1), lora(("down",), seed=2)
    a = {place: torch.cat([one.a[place], other.a[place]]) for place in one.a}
    b = {place: torch.cat([one.b[place], other.b[place]], dim=1) for place in one.a}
    stacked = LoRAAdapter(a, b, alpha=6.0)  # s = 6/4 = 3/2, that of both
    assert_close(own_logits(model, [one, other]), own_logits(model, [stacked]), atol=1e-4, rtol=1e-4)
    twice = own_logits(model, [one, one])
    assert_close(own_logits(model, [one.scaled(2.0)]), twice, atol=1e-4, rtol=1e-4)
    assert torch.equal(own_logits(model, [one.scaled(0.0)]), own_logits(model))


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
@pytest.mark.parametrize("module", ["o", "down"])
def test_an_intervention_at_the_input_of_a_module_reaches_the_adapter(backend, module):
    """The adapter must see the ablated input: silencing z or mlp_post silences what the adapter makes of it."""
    model, adapter = hooked("llama-gqa", backend), lora((module,), layers=(1,))
    from piggyback_lens.interventions.kinds import zero

    off = zero("z" if module == "o" else "mlp_post", layers=1)
    assert_close(own_logits(model, [adapter], off), own_logits(model, [], off), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_an_intervention_acts_on_what_the_adapter_wrote(backend):
    """Ablating the adapter's output direction where it is written leaves nothing of it."""
    model = hooked("llama-gqa", backend)
    adapter = lora(("down",), layers=(1,), rank=1)
    removed = ablate(adapter.b[1, "down"][:, 0], site="mlp_out", layers=1)
    assert_close(own_logits(model, [adapter], removed), own_logits(model, [], removed), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_rows_with_adapters_of_their_own_equal_one_run_for_each(backend):
    model, b = hooked("llama-gqa", backend), batch()
    loras = [lora(seed=7), lora(seed=8).scaled(0.4), lora(seed=9)]
    vectors = [Direction.of({0: normal(32, seed=i), 1: normal(32, seed=i + 9)}).scaled(0.5 + i) for i in range(3)]
    for family in (loras, vectors):
        with attached_rows(model, family, torch.tensor([2, 0, 1])):
            together, _ = logits_of(model, b)
        for row, owner in enumerate([2, 0, 1]):
            with attached(model, family[owner]):
                alone, _ = logits_of(model, b)
            keep = b.attention_mask[row].bool()
            assert_close(together[row][keep], alone[row][keep], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "attn_out", "resid_mid"])
@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_an_attached_steering_vector_is_the_add_intervention(backend, site):
    model = hooked("llama-gqa", backend)
    vector = Direction.of({0: normal(32), 2: normal(32, seed=1)}, site).scaled(-0.7)
    with no_hook_left(model):
        ours = own_logits(model, [vector])
    assert_close(ours, own_logits(model, [], vector.steer()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_a_plain_transformers_model_is_steered_as_a_bridge_is(site):
    vector, model = Direction.of({1: normal(32)}, site).scaled(2.0), plain()
    with attached(model, vector):
        ours = hf_logits(model)
    assert_close(ours, own_logits(hooked("llama-gqa", "bridge"), [vector]), atol=1e-4, rtol=1e-4)
    with (
        pytest.raises(LensError, match="resid_pre and resid_post, not mlp_out"),
        attached(model, Direction.of({1: normal(32)}, "mlp_out")),
    ):
        pass


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_generation_with_an_adapter_is_generation_of_the_merged_model(backend):
    adapter = lora(("v", "down"))
    with attached(hooked("llama-gqa", backend), adapter):
        ours = generate(hooked("llama-gqa", backend), prompts(), max_new_tokens=6)
    model = merged_by_hand(adapter)
    for answer in ours:
        ids = list(answer.prompt.ids)
        for token in answer.ids:
            logits = hf_logits(model, [ids])[-1]
            assert logits[token] > logits.max() - 1e-4
            ids.append(token)


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        ("bridge", lambda: lora(layers=(0, 5)), r"this model has layers 0 to 2"),
        pytest.param("hooked", lambda: lora(layers=(0, 5)), r"this model has layers 0 to 2", marks=needs_hooked),
        ("bridge", lambda: Direction.of({0: normal(31)}), "width 31, the activation 32"),
        pytest.param(
            "hooked",
            lambda: LoRAAdapter({(0, "q"): normal(1, 30)}, {(0, "q"): normal(32, 1)}, 1.0),
            "maps 30 to 32",
            marks=needs_hooked,
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(kind, adapter, message):
    with pytest.raises(LensError, match=message):
        own_logits(hooked("llama-gqa", kind), [adapter()])


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
def test_gpt2_has_no_separate_projections_on_the_bridge_and_says_to_use_peft(backend):
    adapter = LoRAAdapter({(0, "gate"): normal(1, 32)}, {(0, "gate"): normal(128, 1)}, 1.0)
    message = "use PEFT for this architecture" if backend == "bridge" else "has no gate"
    with pytest.raises(LensError, match=message), attached(hooked("gpt2", backend), adapter):
        pass


# ---------------------------------------------------------------- the values themselves


def test_norm_is_the_frobenius_norm_of_s_b_a():
    adapter = lora(rslora=True)
    lengths = [float(torch.linalg.matrix_norm(3.0 / 2**0.5 * (adapter.b[p] @ adapter.a[p]))) for p in adapter.a]
    assert adapter.norm() == pytest.approx(sum(lengths), rel=1e-5)
    assert adapter.norm("mean") == pytest.approx(sum(lengths) / 14, rel=1e-5)
    assert adapter.scaled(-2.5).norm() == pytest.approx(2.5 * sum(lengths), rel=1e-5)
    vector = Direction.of({0: torch.tensor([3.0, 4.0]), 1: torch.tensor([0.0, 2.0])}).scaled(-2.0)
    assert vector.norm() == pytest.approx(14)
    assert vector.norm("mean") == pytest.approx(7)
    with pytest.raises((LensError, TypeCheckError)):
        vector.norm("max")


def test_the_random_control_has_the_same_norm_at_every_place_and_another_orientation():
    adapter = lora()
    control = adapter.random_like(torch.Generator().manual_seed(3))
    for layer, module in adapter.a:
        ours, theirs = adapter.delta(layer, module), control.delta(layer, module)
        assert float(theirs.norm()) == pytest.approx(float(ours.norm()), rel=1e-5)
        assert abs(float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))) < 0.3
    vector = Direction.of({0: normal(500), 1: normal(500, seed=1) * 3})
    control = vector.random_like(torch.Generator().manual_seed(3))
    for layer in (0, 1):
        assert float(control[layer].norm()) == pytest.approx(float(vector[layer].norm()), rel=1e-6)


@pytest.mark.parametrize("on", ["A", "B", "both"])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_noise_keeps_every_norm_and_turns_only_what_was_asked(on, epsilon):
    adapter = lora()
    noisy = adapter.noisy(epsilon, torch.Generator().manual_seed(12345), on)
    for name, old, new in (("A", adapter.a, noisy.a), ("B", adapter.b, noisy.b)):
        for place, before in old.items():
            if on not in (name, "both") or epsilon == 0:
                assert torch.equal(new[place], before)
            else:
                assert float(new[place].norm()) == pytest.approx(float(before.norm()), rel=1e-6)
                cosine = torch.cosine_similarity(new[place].flatten(), before.flatten(), dim=0)
                assert float(cosine) == pytest.approx((1 - epsilon**2) ** 0.5, abs=1e-5)


def test_the_b_vector_of_a_rank_1_adapter_is_what_it_writes():
    adapter, model = lora(("down",), layers=(1,), rank=1), hooked("llama-gqa", "bridge")
    direction = adapter.direction()
    assert (direction.site, direction.layers) == ("mlp_out", (1,))
    b = batch()
    changes = []
    for adapters in ((), (adapter,)):
        with attached(model, *adapters), torch.no_grad(), applied(model, b, cache("mlp_out", layers=1)) as record:
            model.original_model(input_ids=b.ids, attention_mask=b.attention_mask)
        changes.append(record.activations.flat("mlp_out", 1))
    written = changes[1] - changes[0]
    cosines = torch.cosine_similarity(written, direction.vector[None], dim=1)
    assert_close(cosines.abs(), torch.ones_like(cosines), atol=1e-4, rtol=0)
    with pytest.raises(LensError, match="rank 2 on down"):
        lora(("down",)).direction()


def test_a_direction_is_trained_under_stable_names_and_gradients_flow_to_them():
    direction = Direction.of({3: normal(8), 1: normal(8, seed=1)}, "resid_mid", provenance=Provenance("test"))
    assert direction.layers == (1, 3)
    assert torch.equal(direction[3], normal(8))
    assert direction.tensors().keys() == {"layers.1.vector", "layers.3.vector"}
    live = {name: torch.nn.Parameter(value.clone()) for name, value in direction.tensors().items()}
    (direction.with_tensors(live).scaled(1.5)[3] * 2).sum().backward()
    assert_close(live["layers.3.vector"].grad, torch.full((8,), 3.0))
    assert torch.equal(direction.with_tensors(live).vectors, direction.vectors)
    assert direction.settings() == {"kind": "steering vector", "site": "resid_mid", "layers": [1, 3], "strength": 1.0}
    with pytest.raises(LensError, match=r"no layer 2, it has \[1, 3\]"):
        direction[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Direction.of({}), "expected one vector"),
        (lambda: Direction.of({0: normal(3), 1: normal(4)}), r"shapes \[\(3,\), \(4,\)\]"),
        (lambda: Direction.of({0: normal(3)}, "k"), "site 'k' cannot hold a direction"),
        (lambda: LoRAAdapter({}, {}, 1.0), "at least one"),
        (lambda: LoRAAdapter({(0, "q"): normal(1, 3)}, {(0, "k"): normal(3, 1)}, 1.0), "expected the same ones"),
        (
            lambda: LoRAAdapter(
                {(0, "q"): normal(1, 3), (1, "k"): normal(1, 3)}, {(0, "q"): normal(3, 1), (1, "k"): normal(3, 1)}, 1.0
            ),
            "2 modules for 2 layers x 2 kinds",
        ),
        (lambda: LoRAAdapter.fresh(plain(), rank=0), "rank 0"),
        (lambda: LoRAAdapter.fresh(plain(), layers=[3]), "this model has layers 0 to 2"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_at_once(make, message):
    with pytest.raises(LensError, match=message):
        make()


@pytest.mark.parametrize("kind", ["transformers", *tiny_hooked.BACKENDS])
def test_a_fresh_adapter_does_nothing_and_has_the_models_sizes(kind):
    model = plain() if kind == "transformers" else hooked("llama-gqa", kind)
    adapter = LoRAAdapter.fresh(model, rank=2, modules=MODULES, seed=4)
    assert {(m, *b.shape[:1], a.shape[1]) for (_, m), a in adapter.a.items() for b in [adapter.b[0, m]]} == {
        (module, *size) for module, size in SIZES.items()
    }
    assert adapter.norm() == 0
    again = LoRAAdapter.fresh(model, rank=2, modules=MODULES, seed=4)
    assert all(torch.equal(again.a[place], value) for place, value in adapter.a.items())
    assert not torch.equal(LoRAAdapter.fresh(model, seed=5).a[0, "down"], LoRAAdapter.fresh(model).a[0, "down"])


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("modules", "layers"), [(MODULES, (0, 1, 2)), (("down",), (1,)), (("q", "v"), (0, 2))])
def test_an_exported_adapter_gives_the_same_logits_in_peft(tmp_path, modules, layers, rslora):
    adapter = lora(modules, layers, rank=3, alpha=5.5, rslora=rslora)
    save_peft(adapter, tmp_path / "adapter")
    model = plain()
    with attached(model, adapter):
        ours = hf_logits(model)
    theirs = PeftModel.from_pretrained(plain(), str(tmp_path / "adapter")).eval()
    assert_close(hf_logits(theirs), ours, atol=1e-6, rtol=0)
    strict = attach_adapter(plain(), tmp_path / "adapter")  # every stored tensor has its place, and no other
    assert_close(hf_logits(strict), ours, atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["layers_to_transform"] == list(layers)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["q_proj", "o_proj"]])
def test_an_adapter_of_peft_gives_the_same_logits_here(tmp_path, targets, rslora):
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, layers_to_transform=[0, 2] if targets != "all-linear" else None,
        use_rslora=rslora, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(plain(), config).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(theirs.named_parameters()):
            if "lora_" in name:
                parameter.copy_(normal(*parameter.shape, seed=number) * 0.3)
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter = load_peft(tmp_path / "a")
    for model in (plain(), hooked("llama-gqa", "bridge")):
        with attached(model, adapter):
            ours = hf_logits(model) if model is not hooked("llama-gqa", "bridge") else own_logits(model)
        assert_close(ours, hf_logits(theirs), atol=1e-6 if model is not hooked("llama-gqa", "bridge") else 1e-4, rtol=0)
    back = load_peft(save_peft(adapter, tmp_path / "b"))
    assert (back.alpha, back.rslora, back.layers, back.modules) == (7.0, rslora, adapter.layers, adapter.modules)
    assert all(torch.equal(back.a[p], adapter.a[p]) and torch.equal(back.b[p], adapter.b[p]) for p in adapter.a)


def test_scaling_survives_the_export_exactly(tmp_path):
    adapter = lora(("down",)).scaled(0.37)
    assert load_peft(save_peft(adapter, tmp_path)).scale == adapter.scale


def test_gradients_through_hooks_are_those_of_peft():
    examples = tiny_chat.tiny_examples(4)
    settings = LoRASettings(rank=2, alpha=4.0, modules=("v_proj", "down_proj"), layers=(0, 2))
    theirs = add_lora(plain(), settings, seed=1)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(theirs.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(normal(*parameter.shape, seed=number) * 0.2)
    weights = {name: value for name, value in theirs.named_parameters() if "lora_" in name}
    a, b = {}, {}
    for name, value in weights.items():
        parts = name.split(".")
        place = (int(parts[parts.index("layers") + 1]), "v" if "v_proj" in name else "down")
        (a if "lora_A" in name else b)[place] = value.detach().clone()
    batch_ = make_batch(examples)
    output = forward_step(theirs, batch_)
    response_nll(output.logits, output.targets).backward()
    for kind in ("transformers", *tiny_hooked.BACKENDS):
        model = plain() if kind == "transformers" else hooked("llama-gqa", kind)
        trainable = HookTrainable(model, LoRAAdapter(a, b, 4.0))
        mine = trainable.forward(batch_)
        loss = response_nll(mine.logits, mine.targets)
        loss.backward()
        assert_close(mine.logits, output.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(mine.targets, output.targets)
        for ours, theirs_ in zip((*mine.keys, *mine.prefix_values), (*output.keys, *output.prefix_values), strict=True):
            real_tokens = min(len(e.ids) for e in examples)
            assert_close(ours[..., :real_tokens, :], theirs_[..., :real_tokens, :], atol=1e-4, rtol=1e-4)
        for (layer, module), _ in a.items():
            for matrix in "AB":
                grad = trainable.parameters()[f"layers.{layer}.{module}.{matrix}"].grad
                name = next(n for n in weights if f"layers.{layer}." in n and f"{module}_proj.lora_{matrix}" in n)
                assert_close(grad, weights[name].grad, atol=1e-5, rtol=1e-3)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in plain().parameters())


@pytest.mark.parametrize("kind", ["transformers", *tiny_hooked.BACKENDS])
@pytest.mark.parametrize("what", ["vector", "lora"])
def test_the_training_loop_trains_hooks_and_resumes(tmp_path, kind, what):
    model = plain() if kind == "transformers" else hooked("llama-gqa", kind)
    start = Direction.zeros(32, [1]) if what == "vector" else LoRAAdapter.fresh(model, rank=1, layers=[1], alpha=8.0)
    settings = TrainSettings(steps=8, batch_size=8, learning_rate=3e-2, checkpoint_every=4)
    examples = tiny_chat.tiny_examples(8)
    frozen_before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = HookTrainable(model, start)
    assert isinstance(trainable, Trainable)
    first = train(trainable, examples, settings, out=tmp_path / "run", progress=False)
    assert first.history[-1]["loss"] < first.history[0]["loss"]
    assert trainable.result().norm() > 0.01
    assert start.norm() == 0
    assert all(torch.equal(value, frozen_before[name]) for name, value in model.state_dict().items())
    again = HookTrainable(model, start)
    second = train(again, examples, settings, out=tmp_path / "run", progress=False)
    assert second.resumed_from == 8
    for name, value in trainable.parameters().items():
        assert torch.equal(again.parameters()[name], value)
    if what == "lora":
        saved = load_peft(tmp_path / "run" / "adapter")
        assert torch.equal(saved.b[1, "down"], trainable.result().b[1, "down"])
    else:
        saved = Direction.load(tmp_path / "run" / "adapter" / "direction.safetensors")
        assert torch.equal(saved.vector, trainable.result()[1])


def test_a_run_that_started_from_other_numbers_is_not_continued(tmp_path):
    settings = TrainSettings(steps=1, batch_size=4)
    for seed in (0, 1):
        trainable = HookTrainable(plain(), LoRAAdapter.fresh(plain(), layers=[1], seed=seed))
        run = {"out": tmp_path, "progress": False}
        if seed == 0:
            train(trainable, tiny_chat.tiny_examples(4), settings, **run)
        else:
            with pytest.raises(LensError, match=r"adapter\.start is"):
                train(trainable, tiny_chat.tiny_examples(4), settings, **run)


@needs_hooked
def test_bridge_and_transformers_train_to_the_same_vector():
    settings = TrainSettings(steps=3, batch_size=4, learning_rate=1e-2)
    found = []
    for model in (plain(), hooked("llama-gqa", "bridge"), hooked("llama-gqa", "hooked")):
        trainable = HookTrainable(model, Direction.zeros(32, [0]))
        train(trainable, tiny_chat.tiny_examples(8), settings, progress=False)
        found.append(trainable.result()[0])
    assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)
    assert_close(found[2], found[0], atol=1e-4, rtol=1e-3)


def break_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layers_of_two_stacks_are_not_taken_for_one(tmp_path):
    file = save_peft(lora(("down",)), tmp_path) / "adapter_model.safetensors"
    own = load_file(file)
    vision = {name.replace(".model.layers.", ".vision_tower.layers."): value + 5 for name, value in own.items()}
    assert not vision.keys() & own.keys()
    save_file(own | vision, file)
    with pytest.raises(LensError, match=r"several stacks \(.*model\.layers, .*vision_tower\.layers\)"):
        load_peft(tmp_path)


def test_an_adapter_whose_start_moved_the_base_is_no_change_of_that_base(tmp_path):
    save_peft(lora(("down",)), tmp_path)
    break_config(tmp_path, init_lora_weights="pissa")
    with pytest.raises(LensError, match="init_lora_weights='pissa'"):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: break_config(f, use_dora=True), "use_dora=True, which is not supported"),
        (lambda f: break_config(f, rank_pattern={"down_proj": 4}), "rank_pattern"),
        (lambda f: break_config(f, peft_type="IA3"), "is a IA3 adapter"),
        (lambda f: break_config(f, r=9), "config says rank 9, the tensors have 2"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle"),
            "the weights of adapter .* cannot be read",
        ),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    ],
)
def test_a_peft_folder_that_says_more_or_less_is_refused_by_name(tmp_path, spoil, message):
    save_peft(lora(("down",)), tmp_path)
    spoil(tmp_path)
    with pytest.raises(LensError, match=message):
        load_peft(tmp_path)


def test_a_peft_adapter_of_other_modules_is_refused_by_the_tensors_name(tmp_path):
    get_peft_model(plain(), LoraConfig(r=1, target_modules=["lm_head"], task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(LensError, match="lm_head"):
        load_peft(tmp_path)


# ---------------------------------------------------------------- other files


def test_a_gguf_control_vector_holds_what_llama_cpp_reads(tmp_path):
    from gguf import GGUFReader

    vector = Direction.of({1: normal(32), 2: normal(32, seed=1)}).scaled(2.5)
    path = save_gguf(vector, tmp_path / "v.gguf", model_hint="llama", n_layers=3)
    reader = GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    stored = {t.name: t for t in reader.tensors}
    assert set(stored) == {"direction.1", "direction.2"}
    assert all(t.tensor_type.name == "F32" and t.data.shape == (32,) for t in stored.values())
    np.testing.assert_array_equal(stored["direction.2"].data, (vector[2]).numpy())
    back = load_gguf(path)
    assert (back.site, back.layers) == ("resid_post", (1, 2))
    assert torch.equal(back[1], vector[1])
    assert list(tmp_path.iterdir()) == [path]


def test_layers_that_a_control_vector_leaves_out_are_zeros_and_are_dropped_when_it_is_read(tmp_path):
    from gguf import GGUFReader

    path = save_gguf(Direction.of({2: normal(32)}), tmp_path / "v.gguf", model_hint="llama", n_layers=5)
    stored = {tensor.name: tensor.data for tensor in GGUFReader(str(path)).tensors}
    assert [name for name, data in stored.items() if data.any()] == ["direction.2"]
    assert set(stored) == {f"direction.{layer}" for layer in (1, 2, 3, 4)}
    assert load_gguf(path).layers == (2,)


def test_a_control_vector_of_layer_0_says_how_to_drop_it(tmp_path):
    vector = Direction.of({0: normal(4), 1: normal(4)})
    with pytest.raises(LensError, match="without the others: ") as refused:
        save_gguf(vector, tmp_path / "v.gguf", model_hint="llama", n_layers=3)
    kept = eval(str(refused.value).partition("without the others: ")[2], {"Direction": Direction, "v": vector})
    assert save_gguf(kept, tmp_path / "v.gguf", model_hint="llama", n_layers=3).exists()


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_direction_is_saved_and_loaded_by_its_files_name(tmp_path, suffix):
    vector = Direction.of({1: normal(8), 2: normal(8, seed=1)})
    told = {"model_hint": "llama", "n_layers": 3} if suffix == "gguf" else {}
    path = save_solution(vector, tmp_path / f"v.{suffix}", **told)
    assert torch.equal(load_solution(path).vectors, vector.vectors)
    assert load_solution(f"{path}@2").layers == (2,)


def test_a_solution_is_refused_by_a_format_that_cannot_hold_it(tmp_path):
    vector = Direction.of({1: normal(8)})
    for path, solution, message in (
        ("v.gguf", vector, "says its model"),
        ("v.pt", vector, "ends in .safetensors or .gguf"),
        ("a.safetensors", lora(), "give a folder's name"),
    ):
        with pytest.raises(LensError, match=message):
            save_solution(solution, tmp_path / path)
    assert not any(tmp_path.iterdir())


def test_a_numpy_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    import io

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**36,)})
    (tmp_path / "huge.npy").write_bytes(header.getvalue() + b"1234")
    with pytest.raises(LensError, match="not a plain NumPy array file"):
        load_npy(tmp_path / "huge.npy", layers=0)


def test_what_a_control_vector_cannot_say_is_refused(tmp_path):
    for vector, message in (
        (Direction.of({0: normal(4)}), "layers 1 to 2"),
        (Direction.of({3: normal(4)}), "layers 1 to 2"),
        (Direction.of({1: normal(4)}, "resid_pre"), "acts on the output of blocks"),
    ):
        with pytest.raises(LensError, match=message):
            save_gguf(vector, tmp_path / "v.gguf", model_hint="llama", n_layers=3)
    (tmp_path / "bad.gguf").write_bytes(b"no gguf at all, but long enough to be read as one")
    with pytest.raises(LensError, match="not a GGUF file"):
        load_gguf(tmp_path / "bad.gguf")
    with pytest.raises(LensError, match="does not exist"):
        load_gguf(tmp_path / "none.gguf")


def test_numpy_files_are_read_with_layers_and_never_unpickled(tmp_path):
    table = normal(3, 8).numpy()
    np.save(tmp_path / "t.npy", table)
    np.save(tmp_path / "v.npy", table[1].astype(np.float64))
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "i.npy", np.arange(4))
    assert load_npy(tmp_path / "t.npy").layers == (0, 1, 2)
    chosen = load_npy(tmp_path / "t.npy", layers=[4, 2, 9])
    np.testing.assert_array_equal(chosen[2].numpy(), table[1])
    np.testing.assert_array_equal(load_npy(tmp_path / "v.npy", layers=7)[7].numpy(), table[1])
    for name, layers, message in (
        ("o", None, "not a plain NumPy array file"),
        ("i", 0, "expected floating-point"),
        ("v", None, "say at which layer"),
        ("t", [0, 1], "holds 3 vectors, layers= names 2"),
        ("t", [0, 1, 1], "give one layer for each"),
        ("none", None, "not a plain NumPy array file"),
    ):
        with pytest.raises(LensError, match=message):
            load_npy(tmp_path / f"{name}.npy", layers=layers)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_pt_files_are_read_without_running_what_they_hold(tmp_path, capsys):
    v = normal(8)
    torch.save({"steering_vector": v, "layer_idx": 5, "alpha": 256.0}, tmp_path / "v.pt")
    vector = load_pt(tmp_path / "v.pt")
    assert vector.layers == (5,)
    assert torch.equal(vector[5], 256.0 * v)
    for content, message in (
        ({"steering_vector": Evil(), "layer_idx": 5}, "will not be unpickled"),
        ([v], "holds a list"),
        ({"vector": v}, r"the keys \['vector'\]"),
        ({"steering_vector": normal(2, 2), "layer_idx": 5}, r"steering_vector is \[2, 2\]"),
        ({"steering_vector": v, "layer_idx": "5"}, "layer_idx '5'"),
        ({"steering_vector": v, "layer_idx": 5, "alpha": "a"}, "alpha 'a'"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(LensError, match=message):
            load_pt(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"text")
    with pytest.raises(LensError, match="will not be unpickled"):
        load_pt(tmp_path / "y.pt")
    assert "unpickled\n" not in capsys.readouterr().out


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_a_bias_export_is_a_plain_transformers_model_that_is_steered(tmp_path, site):
    from transformers import AutoModelForCausalLM

    vector, model = Direction.of({0: normal(32), 2: normal(32, seed=1)}, site).scaled(0.5), plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_with_bias(vector, model, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager").eval()
    assert_close(hf_logits(loaded), own_logits(hooked("llama-gqa", "bridge"), [vector]), atol=1e-4, rtol=1e-4)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for other, message in ((plain("qwen2"), "a qwen2 model"), (plain("llama-bias"), "mlp_bias=True")):
        with pytest.raises(LensError, match=message):
            save_with_bias(vector, other, tmp_path / "n")


def test_adapters_nest_in_any_order_and_leave_in_any_order():
    model = hooked("llama-gqa", "bridge")
    with ExitStack() as stack:
        stack.enter_context(attached(model, lora(("down",))))
        stack.enter_context(attached(model, Direction.of({1: normal(32)})))
        nested = own_logits(model)
    assert_close(nested, own_logits(model, [Direction.of({1: normal(32)}), lora(("down",))]), atol=1e-5, rtol=1e-5)
    assert chat() is chat()


# ---------------------------------------------------------------- scalars


def completed():
    return tiny_chat.tiny_examples(4, seed=5)


@pytest.mark.parametrize("backend", tiny_hooked.BACKENDS)
@pytest.mark.parametrize("active", [True, False])
def test_scalars_are_a_times_the_modules_input(backend, active):
    """Oracle: the inputs of PEFT's own lora_A layers in a plain transformers model, row by row."""
    adapter = lora(("down", "q"), layers=(0, 2), rank=1, alpha=1.0)
    model = plain()
    reference = merged_by_hand(adapter) if active else model
    found = adapter_scalars(hooked("llama-gqa", backend), adapter, completed(), active=active, batch_size=3)
    assert found.places == ((0, "q"), (0, "down"), (2, "q"), (2, "down"))
    for prompt, values in zip(completed(), found.values, strict=True):
        kept = {}
        handles = []
        for layer, module in found.places:
            block = reference.model.layers[layer]
            linear = block.mlp.down_proj if module == "down" else block.self_attn.q_proj

            def keep(_module, args, kept=kept, place=(layer, module)):
                kept[place] = args[0][0]

            handles.append(linear.register_forward_pre_hook(keep))
        with torch.no_grad():
            reference(input_ids=torch.tensor([prompt.ids]))
        for handle in handles:
            handle.remove()
        expected = torch.stack([kept[place] @ adapter.a[place][0] for place in found.places], dim=-1)
        assert_close(values, expected, atol=1e-4, rtol=1e-3)


def test_the_table_of_scalars_names_tokens_and_spans_and_the_view_colours_them():
    adapter = lora(("down",), layers=(0, 1), rank=1)
    found = adapter_scalars(hooked("llama-gqa", "bridge"), adapter, completed())
    frame = found.to_frame()
    assert len(frame) == 2 * sum(len(prompt.ids) for prompt in completed())
    row = frame[(frame["prompt"] == 2) & (frame["position"] == 15) & (frame["layer"] == 1)].iloc[0]
    assert row["scalar"] == pytest.approx(float(found.values[2][15, 1]))
    assert row["token"] == completed()[2].pieces[15]
    for name in ("prefix", "query", "postfix", "response"):
        span = completed()[2].spans[name]
        rows = frame[(frame["prompt"] == 2) & (frame["span"] == name) & (frame["layer"] == 0)]
        assert list(rows["position"]) == list(span.positions)
    means = found.means("response")
    span = completed()[1].spans["response"]
    assert_close(means[1], found.values[1][span.start : span.stop].mean(0))
    view = found.show(1, (1, "down"))
    assert list(view.scores) == pytest.approx(found.values[1][:, 1].tolist())
    assert "A·x of down in layer 1" in str(view)
    for bad in (None, (2, "down")):
        with pytest.raises(LensError, match="choose one of"):
            found.show(1, bad)
    with pytest.raises(LensError, match="prompt 9 was asked, there are 4"):
        found.show(9, (1, "down"))
    with pytest.raises(LensError, match="rank 2, 4 prompts"):
        adapter_scalars(hooked("llama-gqa", "bridge"), lora(), completed())


def test_the_probe_minimises_scikit_learns_objective_and_reports_held_out_accuracy():
    x = normal(60, 3)
    y = ((x @ torch.tensor([2.0, -1.0, 0.0]) + 0.5 + normal(60, seed=1)) > 0).long()
    probe = logistic_probe(x, y, c=0.7)
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    theta = torch.tensor([*probe.weights, probe.intercept], dtype=torch.float64, requires_grad=True)
    margin = (2.0 * y - 1) * (scaled @ theta[:3] + theta[3])
    loss = 0.5 * theta[:3] @ theta[:3] + 0.7 * torch.nn.functional.softplus(-margin).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    assert float(gradient.abs().max()) < 1e-4
    assert probe.accuracy == pytest.approx(float(((scaled @ theta[:3] + theta[3] > 0) == (y == 1)).float().mean()))
    assert 0.7 < np.mean(probe.held_out) <= 1
    assert set(probe.held_out) == {0.0, 1.0}
    assert logistic_probe(x, y, c=0.7) == probe or logistic_probe(x, y, c=0.7).held_out == probe.held_out
    noise = logistic_probe(normal(200, 3, seed=5), (normal(200, seed=6) > 0).long())
    assert 0.3 < np.mean(noise.held_out) < 0.65  # nothing to learn: near chance, unlike the accuracy on its own data
    with pytest.raises(LensError, match="5 folds"):
        logistic_probe(x[:5], torch.tensor([0, 0, 0, 0, 1]))
