"""Structural copies: the owner's model is not touched by pairing, and what it does afterwards is seen or refused."""

import gc
import math

import pytest
import tiny_adapters
import tiny_chat
import tiny_models
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_hooked import BACKENDS, needs_hooked
from torch.testing import assert_close

from piggyback_lens.errors import LensError
from piggyback_lens.models import versions
from piggyback_lens.models.booting import boot_bridge
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.versions import version_of
from piggyback_lens.models.views import structural_copy, text_part

IDS = torch.tensor([[1, 7, 8, 9, 20, 21, 5]])
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.3}


def base(name="llama-gqa"):
    return tiny_models.build(name, 0, vocab=tiny_chat.VOCAB)


def adapted(name="llama-gqa", targets=("q_proj", "down_proj")):
    return tiny_adapters.put_on(base(name), LoraConfig(target_modules=list(targets), **LORA))


def paired(model, backend="bridge", **sides):
    return ModelPair.load(finetuned=model, tokenizer=tiny_chat.tiny_tokenizer(), backend=backend, **sides)


@torch.no_grad()
def owners(model, adapter=True):
    """Logits of the owner's own pass, as it would be used."""
    copy = structural_copy(model).eval()
    if adapter:
        return copy(input_ids=IDS).logits
    with copy.disable_adapter():
        return copy(input_ids=IDS).logits


@torch.no_grad()
def logits(pair, side):
    with pair.using(side) as model:
        return forward(model, IDS, torch.ones_like(IDS))


def state_of(model):
    """All that an owner could notice: tensors, where they are, hooks, forwards, modes, gradients."""
    return {
        "modules": [(name, id(part), part.training, sorted(vars(part))) for name, part in model.named_modules()],
        "tensors": [(name, id(x), x.data_ptr(), x._version) for name, x in model.state_dict(keep_vars=True).items()],
        "gradients": [(name, x.requires_grad, x.grad) for name, x in model.named_parameters()],
        "hooks": [
            (name, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in model.named_modules()
        ],
        "forward": [(name, vars(part).get("forward")) for name, part in model.named_modules()],
        "config": repr(model.config),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_pairing_leaves_the_owners_model_as_it_is(backend, training):
    model = adapted().train(training)
    before = state_of(model)
    pair = paired(model, backend)
    logits(pair, "base"), logits(pair, "finetuned")
    assert state_of(model) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_attaching_an_adapter_leaves_the_base_as_it_is_even_where_it_trained_biases(backend, tmp_path):
    name = "qwen2"
    wrapped = tiny_adapters.put_on(base(name), LoraConfig(target_modules=["q_proj"], bias="all", **LORA))
    wrapped.save_pretrained(tmp_path)
    plain = base(name).train()
    before, own = state_of(plain), owners(plain)
    pair = ModelPair.load(plain, adapter=tmp_path, tokenizer=tiny_chat.tiny_tokenizer(), backend=backend)
    assert state_of(plain) == before
    assert_close(logits(pair, "base"), own, **TOLERANCE)
    assert_close(logits(pair, "finetuned"), owners(wrapped), **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pairing_that_fails_leaves_the_owners_model_as_it_is(backend, monkeypatch):
    from piggyback_lens.models import pair as module

    def broken(*_):
        raise LensError("refused")

    model = adapted().train()
    before = state_of(model)
    monkeypatch.setattr(module, "prove", broken)
    with pytest.raises(LensError, match="refused"):
        paired(model, backend)
    assert state_of(model) == before


def test_what_is_saved_after_pairing_gives_the_same_logits_again(tmp_path):
    model = adapted()
    keys, pair = list(model.state_dict()), paired(model)
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == keys
    assert not any("_original_component" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    assert_close(again(input_ids=IDS).logits, logits(pair, "finetuned"), **TOLERANCE)


def test_several_pairs_can_be_made_of_the_same_models():
    model = adapted()
    first, second = paired(model), paired(model)
    plain = base()
    third, fourth = hook_model(plain, None), hook_model(plain, None)
    assert_close(logits(first, "finetuned"), logits(second, "finetuned"), rtol=0, atol=0)
    with torch.no_grad():
        assert_close(*(forward(x, IDS, torch.ones_like(IDS)) for x in (third, fourth)), rtol=0, atol=0)


def test_a_view_costs_no_memory_for_weights():
    for name in ("llama-gqa", "gpt-neox"):
        model = base(name)
        own = {x.data_ptr() for x in model.parameters()}
        bridge = boot_bridge(model, None, name)
        apart = sum(x.numel() for x in bridge.parameters() if x.data_ptr() not in own and "lm_head" not in name)
        assert apart <= tiny_chat.VOCAB  # the bridge of TransformerLens 3.9 adds an unembedding bias of zeros


# ---------------------------------------------------------------- training while it is paired


def step(model):
    """One step of an optimiser on the owner's own pass."""
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.05)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("name", "targets"), [("llama-gqa", ["q_proj"]), ("gpt2", ["c_attn"]), ("phi3", ["qkv_proj"])])
def test_what_an_optimiser_changes_is_seen_by_the_hooked_view(name, targets):
    model = adapted(name, targets).train()
    pair = paired(model)
    before, identity = logits(pair, "finetuned"), pair.identity("finetuned")
    torch.manual_seed(0)
    step(model)
    assert model.training
    assert_close(logits(pair, "finetuned"), owners(model), **TOLERANCE)
    assert_close(logits(pair, "base"), owners(model, adapter=False), **TOLERANCE)
    assert (logits(pair, "finetuned") - before).abs().max() > 0.01
    assert not pair.identity("finetuned").matches(identity)


def fused_step(model):
    """A step of the fused optimiser, transformers' default, which does not raise the tensors' own counts."""
    trained = [x for x in model.parameters() if x.requires_grad]
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(trained, lr=0.05, fused=True).step()
    model.zero_grad()


def written(model):
    """An edit through .data of one weight that nobody trains, a large one."""
    weight = next(x for x in model.parameters() if not x.requires_grad and x.ndim == 2)
    weight.data.mul_(-1)


def one_value(model):
    """An edit of one value, the last of its tensor."""
    next(x for x in model.parameters() if x.requires_grad).data[-1, -1] += 1


CHANGES = [(change, read) for change in (step, fused_step, written) for read in ("whole", "sampled")]


@pytest.mark.parametrize(("change", "read"), [*CHANGES, (one_value, "whole")])
def test_every_change_of_the_weights_is_another_version(change, read, monkeypatch):
    if read == "sampled":
        monkeypatch.setattr(versions, "WHOLE", 16)
        monkeypatch.setattr(versions, "SAMPLED", 16)
    model = adapted()
    before = version_of(model)
    owners(model)
    assert version_of(model) == before
    change(model)
    assert version_of(model) != before


def test_a_version_tells_places_apart_and_counts_what_is_not_a_number_as_equal():
    holder = torch.nn.Linear(3, 2).to(torch.bfloat16)
    first = version_of(holder)
    holder.weight.data = holder.weight.data.flip(0)
    assert version_of(holder) != first
    holder.weight.data.fill_(math.nan)
    assert version_of(holder) == version_of(holder)
    elsewhere = torch.nn.Linear(2, 2, device="meta")
    assert version_of(elsewhere) == version_of(elsewhere)


def test_an_identity_is_told_anew_after_a_fused_optimiser():
    model = adapted().train()
    pair = paired(model)
    before = pair.identity("finetuned")
    fused_step(model)
    assert not pair.identity("finetuned").matches(before)
    assert_close(logits(pair, "finetuned"), owners(model), **TOLERANCE)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt-neox", "phi3"])
def test_whole_weights_that_are_trained_are_seen_too(name):
    model = base(name)
    bridge = hook_model(model, None)
    step(model)
    with torch.no_grad():
        assert_close(forward(bridge, IDS, torch.ones_like(IDS)), model(input_ids=IDS).logits, **TOLERANCE)


def test_gradients_through_the_hooked_view_are_those_of_the_owners_pass():
    model = adapted("gpt2", ["c_attn"])
    pair = paired(model)
    with pair.using("finetuned") as hooked:
        forward(hooked, IDS, torch.ones_like(IDS)).pow(2).sum().backward()
    ours = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    model(input_ids=IDS).logits.pow(2).sum().backward()
    theirs = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert len(theirs) == 6
    assert ours.keys() >= theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_parts_of_a_fused_module_see_their_own_inputs():
    model = adapted("gpt2", ["c_attn"])
    attention = boot_bridge(model, None, "gpt2").blocks[0].attn
    fused = model.get_base_model().transformer.h[0].attn.c_attn
    x, y = torch.randn((2, 1, 3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k, v = (getattr(attention, name).original_component for name in "qkv")
        assert_close(q(x), fused(x)[..., :32])
        assert_close(k(y), fused(y)[..., 32:64])  # a hook changed what k reads
        y.mul_(2)  # or changed it in place
        assert_close(v(y), fused(y)[..., 64:])


# ---------------------------------------------------------------- what else the owner may do

CHANGES = {
    "train": lambda m: m.train(),
    "add_adapter": lambda m: m.add_adapter("other", LoraConfig(target_modules=["q_proj"], **LORA)),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "set_adapter to the same": lambda m: m.set_adapter("default"),
    "merge and unmerge": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
}
REFUSED = {
    "set_adapter": (
        lambda m: m.set_adapter("second"),
        r"adapters at .*q_proj: second .times 2. active, none merged, when it was hooked default .times 2. active",
    ),
    "to another dtype": (lambda m: m.to(torch.bfloat16), "is another tensor"),
    "merge_adapter": (lambda m: m.merge_adapter(), "adapters at .*q_proj: default .times 2. active, default merged"),
    "resize": (lambda m: m.get_base_model().resize_token_embeddings(50), "embed_tokens"),
    "assign": (
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        "is another tensor",
    ),
    "another LoRA layer": (
        lambda m: inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), m.model),
        "another",
    ),
    "scaling": (lambda m: m.get_base_model().model.layers[0].self_attn.q_proj.set_scale("default", 9.0), "adapters at"),
}


def with_two_adapters():
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], **LORA))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_the_hooked_view_agrees_with_the_owners_pass_after(change):
    model = with_two_adapters()
    pair = paired(model)
    CHANGES[change](model)
    assert_close(logits(pair, "finetuned"), owners(model), **TOLERANCE)
    assert_close(logits(pair, "base"), owners(model, adapter=False), **TOLERANCE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", REFUSED)
def test_a_pass_is_refused_after(change, backend):
    model = with_two_adapters()
    pair = paired(model, backend)
    with pair.using("finetuned") as kept:
        logits(pair, "base")
    act, message = REFUSED[change]
    act(model)
    for side in ("base", "finetuned"):
        with pytest.raises(LensError, match=rf"changed after it was hooked \(.*{message}.*make the pair") as caught:
            logits(pair, side)
        assert "\n" not in str(caught.value)
    for own_pass in (kept, kept.run_with_cache):  # also one that was kept, and TransformerLens' own calls
        with pytest.raises(LensError, match="changed after it was hooked"):
            own_pass(IDS)


@needs_hooked
@pytest.mark.parametrize("change", [step, fused_step, written])
def test_a_copy_of_the_weights_is_refused_after_any_change_of_the_owners(change):
    model = adapted()
    pair = paired(model, "hooked")
    logits(pair, "finetuned")
    change(model)
    with pytest.raises(LensError, match="values of its weights, which this backend has copied"):
        logits(pair, "finetuned")
    pair = paired(model, "hooked")
    del model
    gc.collect()
    assert logits(pair, "finetuned").isfinite().all()  # an owner that is gone changes nothing


def test_the_adapter_that_is_active_when_the_pair_is_made_is_the_finetuned_side():
    model = with_two_adapters()
    tiny_adapters.move(model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["second"].requires_grad_(True))
    first = paired(model)
    one = logits(first, "finetuned")
    model.set_adapter("second")
    second = paired(model)
    assert_close(logits(second, "finetuned"), owners(model), **TOLERANCE)
    assert (logits(second, "finetuned") - one).abs().max() > 0.01
    assert_close(logits(second, "base"), owners(model, adapter=False), **TOLERANCE)


def test_a_merged_adapter_leaves_no_base_to_pair_with():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(LensError, match=r"adapter default is merged into the weights of .*unmerge_adapter"):
        paired(model)


# ---------------------------------------------------------------- multimodal Gemma 3


def gemma3_with_vision():
    return base("gemma3-vision")


@pytest.fixture
def no_process(monkeypatch):
    def refuse(*args, **_):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr("subprocess.Popen.__init__", refuse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained_on", ["whole", "text"])
def test_gemma3_with_vision_works_through_its_text_model(backend, trained_on, tmp_path, no_process):
    whole = gemma3_with_vision()
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
    form = gemma3_with_vision() if trained_on == "whole" else text_part(gemma3_with_vision())
    wrapped = tiny_adapters.put_on(form, LoraConfig(target_modules=["q_proj", "down_proj"], **LORA))
    wrapped.save_pretrained(tmp_path / "adapter")
    whole.save_pretrained(tmp_path / "base")
    tokenizer = tiny_chat.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    for pair in (
        ModelPair.load(tmp_path / "base", adapter=tmp_path / "adapter", backend=backend, device="cpu"),
        ModelPair.load(whole, adapter=tmp_path / "adapter", tokenizer=tokenizer, backend=backend),
        ModelPair.load(finetuned=wrapped, tokenizer=tokenizer, backend=backend),
    ):
        assert_close(logits(pair, "base"), expected, **TOLERANCE)
        assert_close(logits(pair, "finetuned"), owners(wrapped), **TOLERANCE)


def test_other_multimodal_models_are_refused_before_anything_is_built(no_process):
    import transformers as tf

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": tiny_chat.VOCAB, "model_type": "llama"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    llava = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=37)
    )
    with pytest.raises(
        LensError, match=r"LlavaForConditionalGeneration is a multimodal model \(llava\), expected a text"
    ):
        boot_bridge(llava.eval(), None, "llava")
