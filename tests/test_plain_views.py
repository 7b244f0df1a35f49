"""Passes without hooks go through the plain view; whatever anybody hooks or replaces on the bridge is noticed."""

import gc
import weakref
from contextlib import contextmanager

import peft
import pytest
import tiny_adapters
import tiny_chat
import tiny_hooked
import tiny_models
import torch
from torch import nn

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.trainables import PeftAdapter, add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.hooks import Record, as_parts
from piggyback_lens.interventions.kinds import ablate, add, clamp, zero
from piggyback_lens.interventions.running import acts_on_blocks
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.scoring import response_log_probs
from piggyback_lens.models import plain_views
from piggyback_lens.models.attachment import edited_modules, edited_sites, linear_of
from piggyback_lens.models.backends import blocks_of, core_of
from piggyback_lens.models.booting import _stand_in_tokenizer, boot_bridge
from piggyback_lens.models.forking import Lineage, forking
from piggyback_lens.models.network import forward, keeping_last_hidden
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.partial import ended_at
from piggyback_lens.models.plain_views import network_of, plain_view, settled
from piggyback_lens.models.views import is_peft_model
from piggyback_lens.settings import LoRASettings, TrainSettings
from piggyback_lens.vectors.adapters import LoRAAdapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction

TOKENIZER = tiny_chat.tiny_tokenizer()
IDS = torch.tensor([[1, 7, 8, 9, 20, 21, 5]])
LAYER = 1


@pytest.fixture
def bridge():
    return hook_model(tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER)), TOKENIZER)


@torch.no_grad()
def logits(model):
    return forward(model, IDS, torch.ones_like(IDS))


def is_plain(model):
    return network_of(model) is plain_view(model)


def vector(size=3.0):
    return torch.linspace(-size, size, 32)


@contextmanager
def own_hooks(bridge):
    with bridge.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", lambda x, hook: x + vector().to(x))]):
        yield


@contextmanager
def permanent_hook(bridge):
    bridge.add_hook(f"blocks.{LAYER}.hook_resid_post", lambda x, hook: x + vector().to(x))
    yield
    bridge.reset_hooks()


@contextmanager
def torch_hook(bridge):
    handle = bridge.blocks[LAYER].register_forward_hook(
        lambda _m, _a, out: (out[0] + vector(), *out[1:]) if isinstance(out, tuple) else out + vector()
    )
    yield
    handle.remove()


@contextmanager
def deep_torch_hook(bridge):
    inner = core_of(bridge).model.layers[LAYER].mlp
    handle = inner.register_forward_hook(lambda _m, _a, out: out * 0)
    yield
    handle.remove()


@contextmanager
def steering(bridge):
    with attached(bridge, Direction.of({LAYER: vector()})):
        yield


@contextmanager
def low_rank(bridge):
    adapter = LoRAAdapter.fresh(bridge, layers=[LAYER])
    place = next(iter(adapter.b))
    with attached(bridge, LoRAAdapter(adapter.a, {place: torch.ones_like(adapter.b[place])}, adapter.alpha)):
        yield


@contextmanager
def sites(bridge):
    with edited_sites(bridge, {(LAYER, "resid_post"): lambda x: x + vector()}):
        yield


@contextmanager
def modules(bridge):
    with edited_modules(bridge, {(LAYER, "down"): lambda _x, out: out * 0}):
        yield


@contextmanager
def another_forward(bridge):
    linear = linear_of(bridge, LAYER, "down")
    linear.forward = lambda hidden: hidden.new_zeros((*hidden.shape[:-1], linear.out_features))
    yield
    del linear.forward


@contextmanager
def another_module(bridge):
    block = core_of(bridge).model.layers[LAYER]._original_component
    own = block._modules["input_layernorm"]
    block._modules["input_layernorm"] = nn.Identity()
    yield
    block._modules["input_layernorm"] = own


@contextmanager
def another_weight(bridge):
    linear = linear_of(bridge, LAYER, "down")
    own = linear.weight
    linear.weight = nn.Parameter(own.detach() * 2)
    yield
    linear.weight = own


ACTING = [
    own_hooks, permanent_hook, torch_hook, deep_torch_hook, steering, low_rank, sites, modules, another_forward,
    another_module, another_weight,
]  # fmt: skip


@pytest.mark.parametrize("acting", ACTING, ids=lambda x: x.__name__)
def test_what_acts_on_the_bridge_is_noticed_and_the_next_pass_is_plain_again(bridge, acting):
    untouched = logits(bridge)
    assert is_plain(bridge)
    with acting(bridge):
        assert not is_plain(bridge)
        changed = logits(bridge)
        whole = core_of(bridge)(input_ids=IDS).logits
    assert (changed - untouched).abs().max() > 0.01
    torch.testing.assert_close(changed, whole)
    assert is_plain(bridge)
    assert torch.equal(logits(bridge), untouched)


@pytest.mark.parametrize("mode", [lambda x: x.train(), lambda x: x.blocks[LAYER].train()], ids=["whole", "block"])
def test_another_mode_is_noticed(bridge, mode):
    mode(bridge)
    assert not is_plain(bridge)
    assert is_plain(bridge.eval())


def test_backward_hooks_and_what_only_reads_are_noticed(bridge):
    with keeping_last_hidden(bridge) as read:
        logits(bridge)
        assert not is_plain(bridge)
    assert len(read) == 1
    with ended_at(bridge, LAYER) as found:
        logits(bridge)
    assert len(found) == 1
    with forking(bridge, Lineage((0, 1), (0, 0))):
        assert not is_plain(bridge)
    handle = core_of(bridge).model.layers[0].register_full_backward_hook(lambda *_: None)
    assert not is_plain(bridge)
    handle.remove()
    assert is_plain(bridge)


def test_both_views_compute_the_same_and_weights_that_are_trained_are_seen_by_both(bridge):
    owner = tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER))
    bridge = hook_model(owner, TOKENIZER)
    with torch.no_grad():
        for parameter in owner.parameters():
            parameter.mul_(1.1)
    plain = logits(bridge)
    assert is_plain(bridge)
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: None)]):
        assert not is_plain(bridge)
        torch.testing.assert_close(logits(bridge), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(owner(input_ids=IDS).logits, plain)


def test_hooks_of_an_intervention_act_in_generation_on_a_model_with_a_plain_view(bridge):
    prompts = tiny_hooked.prompts()
    steer = add(vector(40.0), layers=LAYER)
    plain = [a.ids for a in generate(bridge, prompts, max_new_tokens=6)]
    steered = [a.ids for a in generate(bridge, prompts, interventions=steer, max_new_tokens=6)]
    with attached(bridge, Direction.of({LAYER: vector(40.0)})):
        beneath = [a.ids for a in generate(bridge, prompts, max_new_tokens=6)]
    del plain_views._PLAIN[bridge]
    assert [a.ids for a in generate(bridge, prompts, max_new_tokens=6)] == plain
    assert [a.ids for a in generate(bridge, prompts, interventions=steer, max_new_tokens=6)] == steered == beneath
    assert steered != plain


def test_both_sides_of_an_adapter_have_their_own_plain_view():
    wrapped = peft.get_peft_model(
        tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER)), peft.LoraConfig(r=2, target_modules=["q_proj"])
    ).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    pair = ModelPair.load(finetuned=wrapped, tokenizer=TOKENIZER)
    with pair.using("base") as base, pair.using("finetuned") as tuned:
        assert is_plain(base)
        assert is_plain(tuned)
        torch.testing.assert_close(logits(tuned), wrapped(input_ids=IDS).logits)
        with wrapped.disable_adapter():
            torch.testing.assert_close(logits(base), wrapped(input_ids=IDS).logits)
        assert (logits(base) - logits(tuned)).abs().max() > 0.1


def test_a_change_of_the_owner_is_refused_on_the_plain_view_too(bridge):
    owner = tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER))
    bridge = hook_model(owner, TOKENIZER)
    owner.to(torch.float64)
    with pytest.raises(Exception, match="the model was changed after it was hooked"):
        logits(bridge)


def test_a_settled_view_is_looked_at_once_and_a_bridge_of_the_users_own_runs_as_it_is(bridge, monkeypatch):
    with settled(bridge):
        monkeypatch.setattr(plain_views._Part, "untouched", lambda _: pytest.fail("looked at again"))
        logits(bridge)
        with settled(bridge):
            logits(bridge)
        logits(bridge)
    monkeypatch.undo()
    with own_hooks(bridge), settled(bridge):
        assert network_of(bridge) is core_of(bridge)
    own = tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER))
    from transformer_lens.model_bridge import TransformerBridge

    built = TransformerBridge.boot_transformers("local", hf_model=own, tokenizer=_stand_in_tokenizer(), device="cpu")
    assert plain_view(built) is None
    assert network_of(built) is core_of(built)


def test_a_plain_view_does_not_keep_its_bridge_alive(bridge):
    bridge = hook_model(tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER)), TOKENIZER)
    known = weakref.ref(bridge)
    del bridge
    gc.collect()
    assert known() is None


def test_the_hooked_view_of_a_peft_model_trains_its_owners_weights_and_sees_them():
    owner = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2))
    apart = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2))
    pair = ModelPair.load(finetuned=owner, tokenizer=TOKENIZER)
    settings = TrainSettings(steps=3, batch_size=2, learning_rate=0.02)
    with pair.using("finetuned") as model, pair.using("base") as base:
        before = logits(base)
        assert torch.equal(logits(model), before)
        found = train(model, tiny_chat.tiny_examples(6), settings, progress=False)
        assert is_plain(model)
        expected = train(apart, tiny_chat.tiny_examples(6), settings, progress=False)
        assert [row["loss"] for row in found.history] == [row["loss"] for row in expected.history]
        torch.testing.assert_close(logits(model), apart(input_ids=IDS).logits)
        torch.testing.assert_close(logits(model), owner(input_ids=IDS).logits)
        assert torch.equal(logits(base), before)
        assert (logits(model) - before).abs().max() > 1e-3
        with pytest.raises(LensError, match="has no adapter to train"):
            train(base, tiny_chat.tiny_examples(6), settings, progress=False)


@tiny_hooked.needs_hooked
def test_a_hookedtransformer_is_not_trained_as_an_adapter():
    owner = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2))
    model = hook_model(owner, TOKENIZER, backend="hooked")
    with pytest.raises(LensError, match="HookedTransformer has weights of its own: train the PEFT model"):
        train(model, tiny_chat.tiny_examples(6), progress=False)


# ---------------------------------------------------------------- merged weights


def answers(pair, **how):
    with pair.using("finetuned") as model:
        return [a.ids for a in generate(model, tiny_hooked.prompts(), max_new_tokens=12, stop_ids=[], **how)]


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about tied weights and biases
@pytest.mark.parametrize("kind", tiny_adapters.KINDS)
def test_decoding_through_merged_weights_gives_the_same_answers(kind, monkeypatch, tmp_path):
    base, wrapped = tiny_adapters.build(kind)
    pair = ModelPair.load(base, wrapped, tokenizer=TOKENIZER)
    found = answers(pair)
    with pair.using("finetuned") as model, settled(model):
        merged = network_of(model)
    assert not is_peft_model(merged)
    monkeypatch.setattr(plain_views, "MERGED_GB", 0)
    assert answers(pair) == found
    with pair.using("finetuned") as model, settled(model):
        assert is_plain(model)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_merged_weights_follow_training_and_half_precision_is_never_merged(optim, monkeypatch):
    owner = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2))
    pair = ModelPair.load(finetuned=owner, tokenizer=TOKENIZER)
    before = answers(pair)
    with pair.using("finetuned") as model, settled(model):
        first = network_of(model)
    assert answers(pair) == before
    with pair.using("finetuned") as model, settled(model):
        assert network_of(model) is first
    settings = TrainSettings(steps=4, batch_size=2, learning_rate=0.05, optim=optim)
    train(owner, tiny_chat.tiny_examples(6), settings, progress=False)
    after = answers(pair)
    assert after != before
    with pair.using("finetuned") as model, settled(model):
        assert network_of(model) is not first
    fresh = ModelPair.load(finetuned=owner, tokenizer=TOKENIZER)
    monkeypatch.setattr(plain_views, "MERGED_GB", 0)
    assert answers(fresh) == after
    monkeypatch.undo()
    half = ModelPair.load(finetuned=owner.to(torch.bfloat16), tokenizer=TOKENIZER)
    with half.using("finetuned") as model, settled(model):
        assert is_plain(model)


def test_a_merge_that_computes_something_else_is_not_used(monkeypatch):
    owner = add_lora(tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2))
    pair = ModelPair.load(finetuned=owner, tokenizer=TOKENIZER)
    expected = answers(pair)
    plain_views._MERGED.clear()
    wrong = tiny_models.build("llama-gqa", 7, vocab=tiny_chat.VOCAB)
    monkeypatch.setattr(plain_views, "merged_copy", lambda _: wrong)
    assert answers(pair) == expected


# ---------------------------------------------------------------- interventions on the blocks of the plain view

ON_BLOCKS = {
    "steering": lambda: add(vector(), layers=1, span="all"),
    "prompt only": lambda: add(vector(), layers=[0, 2], site="resid_pre", span="query"),
    "several at one place": lambda: (
        clamp(vector(), 2.0, layers=[1, 2], span="all")
        + add(vector(1.0), layers=2, span="response")
        + zero("resid_pre", layers=[2], span="system", tokens=[0])
    ),
    "ablation": lambda: ablate(vector(), site="resid_post"),
}


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.MORE])
def test_what_acts_on_the_residual_stream_acts_on_blocks_as_on_hook_points(name):
    own = tiny_models.build(name, 0, vocab=len(TOKENIZER))
    beside, alone = hook_model(own, TOKENIZER), boot_bridge(own, TOKENIZER, name)
    assert plain_view(alone) is None  # so that hooks are at its hook points
    prompts = tiny_hooked.prompts()
    scored = [prompt.with_response("yes, no") for prompt in prompts]
    free = torch.cat(response_log_probs(beside, scored))
    for make in ON_BLOCKS.values():
        found = []
        for model in (beside, alone):
            record = Record()
            answers = generate(model, prompts, max_new_tokens=6, stop_ids=[], interventions=make(), record=record)
            numbers = torch.cat(response_log_probs(model, scored, interventions=make()))
            told = [(r.cells, sorted(r.layers), r.calls) for r in record.receipts]
            found.append(([a.ids for a in answers], told, numbers, [r.change_norm for r in record.receipts]))
        (ids, told, numbers, norms), (expected, their_told, their_numbers, their_norms) = found
        assert ids == expected
        assert float((numbers - free).abs().max()) > 1e-3
        assert told == their_told
        torch.testing.assert_close(numbers, their_numbers, rtol=1e-4, atol=1e-4)
        assert norms == pytest.approx(their_norms, rel=1e-4)


@pytest.mark.parametrize("merged_gb", [0.0, 1.0])
def test_an_adapters_answers_under_steering_are_those_at_hook_points(monkeypatch, merged_gb):
    monkeypatch.setattr(plain_views, "MERGED_GB", merged_gb)
    owner = tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER))
    tuned = add_lora(owner, LoRASettings(rank=4))
    with torch.no_grad():
        for weight in (value for value in tuned.parameters() if value.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    pair, prompts = ModelPair.load(finetuned=tuned, tokenizer=TOKENIZER), tiny_hooked.prompts()
    steer = as_parts(add(vector(), layers=1, span="all"))
    for side in ("base", "finetuned"):
        with pair.using(side) as model:
            assert acts_on_blocks(model, steer)
            found = generate(model, prompts, max_new_tokens=6, stop_ids=[], interventions=steer)
            nothing = [("blocks.0.hook_resid_pre", lambda x, hook: x)]
            with model.hooks(fwd_hooks=nothing):  # somebody's own hook: all goes through hook points
                assert not acts_on_blocks(model, steer)
                expected = generate(model, prompts, max_new_tokens=6, stop_ids=[], interventions=steer)
            assert [a.ids for a in found] == [a.ids for a in expected]
            assert is_plain(model)
            assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks_of(network_of(model)))


def test_what_acts_elsewhere_is_at_hook_points(bridge):
    for site in ("v", "z", "mlp_out", "resid_mid"):
        assert not acts_on_blocks(bridge, as_parts(zero(site, layers=[1])))
    assert not acts_on_blocks(bridge, as_parts(add(vector(), layers=1) + zero("v", layers=[0])))
    assert not acts_on_blocks(bridge, ())
    assert not acts_on_blocks(tiny_hooked.hooked("llama-gqa", "bridge"), as_parts(add(vector(), layers=1)))


def test_hooks_leave_the_blocks_after_an_error(bridge):
    wrong = add(torch.ones(7), layers=1)
    with pytest.raises(LensError, match="a vector of length 7"):
        generate(bridge, tiny_hooked.prompts(), max_new_tokens=2, interventions=wrong)
    assert not any(block._forward_hooks for block in blocks_of(network_of(bridge)))


@pytest.mark.parametrize("steer", [None, "steered"])
def test_what_is_measured_while_a_view_is_trained_has_no_dropout(steer):
    owner = tiny_models.build("llama-gqa", 0, vocab=len(TOKENIZER))
    tuned = add_lora(owner, LoRASettings(rank=4, dropout=0.5))
    with torch.no_grad():
        for weight in (value for value in tuned.parameters() if value.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    pair, alone = ModelPair.load(finetuned=tuned, tokenizer=TOKENIZER), boot_bridge(tuned, TOKENIZER, "beside")
    scored = [prompt.with_response("yes, no") for prompt in tiny_hooked.prompts()]
    parts, found = None if steer is None else add(vector(), layers=1, span="all"), []

    def on_step(_row):
        for model in (pair._models["finetuned"], alone):
            found.append(torch.cat(response_log_probs(model, scored, interventions=parts)))

    with pair.using("finetuned") as model:
        train(PeftAdapter(model), tiny_chat.tiny_examples(4), TrainSettings(steps=2, batch_size=4), on_step=on_step)
    for ours, expected in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
