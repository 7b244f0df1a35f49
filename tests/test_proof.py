"""The proof at load: wrong models are found, by figures and by calls, and right ones are not refused for rounding."""

import re

import peft
import pytest
import tiny_adapters
import tiny_chat
import tiny_models
import torch
from tiny_hooked import BACKENDS, needs_hooked

from piggyback_lens.app.doctor import _parity
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.models import network, proof, states
from piggyback_lens.models.booting import boot_bridge, build_hooked
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.plain_views import network_of, plain_view
from piggyback_lens.models.proof import Expected, prove
from piggyback_lens.models.views import structural_copy

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def deep(name="llama-gqa", dtype=torch.bfloat16, attention="sdpa", layers=32, width=64):
    """A deep model whose activations keep their size, so that rounding adds up as in a trained one."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width}
    sizes = {"n_layer": layers, "n_embd": width} if name == "gpt2" else sizes
    model = tiny_models.build(name, 0, vocab=200, attn_implementation=attention, **sizes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "emb" not in key:
                parameter.mul_(4 * width**-0.5)
    return model.to(dtype)


def expected(model):
    return Expected.of(structural_copy(model).eval(), "model")


# ---------------------------------------------------------------- right models


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2"])
def test_a_right_model_of_32_layers_in_bfloat16_is_accepted(name, backend, attention):
    assert hook_model(deep(name, attention=attention), None, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_sides_of_a_peft_model_in_half_precision_are_accepted(backend, dtype):
    wrapped = tiny_adapters.put_on(deep(dtype=dtype, layers=8), peft.LoraConfig(**LORA))
    tiny_adapters.move(wrapped)
    pair = ModelPair.load(finetuned=wrapped, tokenizer=tiny_chat.tiny_tokenizer(), backend=backend)
    ids = torch.arange(3, 15)[None]
    plain = structural_copy(wrapped).eval()
    with torch.no_grad(), plain.disable_adapter():
        base = plain(input_ids=ids).logits
    with pair.using("base") as own, pair.using("finetuned") as other, torch.no_grad():
        assert proof.relative(forward(own, ids, torch.ones_like(ids))[0], base[0]) < 0.1
        assert proof.relative(forward(other, ids, torch.ones_like(ids))[0], base[0]) > 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_needs_no_noise_to_be_accepted(backend, monkeypatch):
    monkeypatch.setattr(Expected, "noise", property(lambda _: pytest.fail("noise was measured")))
    assert hook_model(deep(dtype=torch.float32), None, backend=backend)


def test_the_noise_is_what_rounding_makes():
    half, single = expected(deep()), expected(deep(dtype=torch.float32))
    assert single.noise < 1e-5
    assert 1e-3 < half.noise < 0.3
    assert half.drift == 0


# ---------------------------------------------------------------- wrong models


def spoil_a_bias(model):
    model.original_model.model.layers[1].self_attn.q_proj._original_component.bias = torch.nn.Parameter(torch.zeros(32))


def shift_positions(model):
    rotary = model.original_model.model.rotary_emb
    inner = getattr(rotary, "_original_component", rotary)
    own = inner.forward
    inner.forward = lambda x, position_ids, **kwargs: own(x, position_ids=position_ids.clamp(min=1), **kwargs)


@pytest.mark.parametrize("wrong", [spoil_a_bias, shift_positions])
def test_a_model_that_is_wrong_in_float32_is_found(wrong):
    owner = tiny_models.build("llama-bias", 0, vocab=tiny_chat.VOCAB)
    bridge = boot_bridge(owner, None, "model")
    prove(bridge, expected(owner))
    wrong(bridge)
    with pytest.raises(LensError, match=r"bridge model of model differs from transformers by \d.*left-padded rows"):
        prove(bridge, expected(owner))


def test_a_cache_that_is_not_kept_is_found(monkeypatch):
    """As under transformers 5.24, where TransformerLens' attention did not hear of the cache."""
    owner = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    bridge = boot_bridge(owner, None, "model")
    for block in bridge.blocks:
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k not in states.CACHE_NAMES}),
            with_kwargs=True,
        )
    with pytest.raises((LensError, RuntimeError)) as caught:
        prove(bridge, expected(owner))
    assert "a pass on a filled cache" in str(caught.value) or isinstance(caught.value, RuntimeError)


def test_a_decoding_step_that_is_wrong_is_found(monkeypatch):
    """Padding that stays between a row and its next token, in a model with a sliding window."""
    owner = tiny_models.build("mistral", 0, vocab=tiny_chat.VOCAB)
    bridge = boot_bridge(owner, None, "model")
    monkeypatch.setattr(states.KVState, "right_align", lambda self: None)
    with pytest.raises(LensError, match="a decoding step"):
        prove(bridge, expected(owner))


def lora_of(size, model):
    """Wrapped, with one layer whose effect on the logits is `size` of their length; and that layer."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    layer = wrapped.get_base_model().model.layers[-1].self_attn.v_proj
    weight = layer.lora_B["default"].weight
    generator = torch.Generator().manual_seed(0)
    plain = expected(wrapped)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator))
        for _ in range(8):  # rounding and nonlinearity: go to the wanted size in a few steps
            weight.mul_(size / max(map(proof.relative, expected(wrapped).logits, plain.logits)))
    found = max(map(proof.relative, expected(wrapped).logits, plain.logits))
    assert size / 1.5 < found < size * 1.5
    return wrapped, layer


@pytest.mark.parametrize("case", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["by its figures", "by its calls"])
def test_an_adapter_layer_that_is_ignored_is_found(case, how, monkeypatch):
    model = deep(dtype=getattr(torch, case), layers=8)
    size = 1e-3 if case == "float32" else 3 * expected(model).noise
    wrapped, _ = lora_of(size, model)
    known = expected(wrapped)
    bridge = boot_bridge(wrapped, None, "model")
    prove(bridge, known)
    layer = bridge.original_model.model.layers[-1].self_attn.v_proj
    ignoring = getattr(layer, "_original_component", layer)
    owner = next(m for m in bridge.modules() if ignoring in m._modules.values())
    name = next(k for k, m in owner._modules.items() if m is ignoring)
    owner._modules[name] = ignoring.base_layer
    if how == "by its figures":
        known = Expected(known.plain, known.name, known.rows, known.logits, called={})
        with pytest.raises(LensError, match=r"differs from transformers by"):
            prove(bridge, known)
    else:
        monkeypatch.setattr(proof, "_judge", lambda *_: None)
        with pytest.raises(LensError, match=r"never calls 1 of its 16 adapter layers, e.g. .*v_proj: this adapter"):
            prove(bridge, known)


def test_weights_that_are_written_to_while_they_are_hooked_are_found():
    owner = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    known, bridge = expected(owner), boot_bridge(owner, None, "model")
    with torch.no_grad():
        owner.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(LensError, match="the weights of model were written to while it was hooked"):
        prove(bridge, known)


# ---------------------------------------------------------------- errors that carry their figures


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused_with_both_numbers():
    trimmed = tiny_models.build("llama-gqa", 0, vocab=30)
    with pytest.raises(LensError, match=rf"tokenizer has ids up to {tiny_chat.VOCAB - 1} and the model 30 embeddings"):
        ModelPair.load(trimmed, tiny_models.build("llama-gqa", 1, vocab=30), tokenizer=tiny_chat.tiny_tokenizer())


def test_a_resized_vocabulary_is_refused_with_both_numbers():
    larger = tiny_models.build("llama-gqa", 1, vocab=50)
    with pytest.raises(LensError, match=f"differ in sizes: d_vocab {tiny_chat.VOCAB} against 50$"):
        ModelPair.load(
            tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), larger, tokenizer=tiny_chat.tiny_tokenizer()
        )


def test_weights_with_nan_are_refused_with_their_names():
    spoilt = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)
    with torch.no_grad():
        spoilt.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(LensError, match=r"not finite on \d+ of 41 .*1 of its weight tensors .*layers.1.mlp.up_proj"):
        hook_model(spoilt, None)


@needs_hooked
def test_a_processed_model_is_refused_by_name():
    models = [build_hooked(tiny_models.build("llama-gqa", s, vocab=tiny_chat.VOCAB), None, "x") for s in (0, 1)]
    models[1].process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    with pytest.raises(LensError, match=r"finetuned model's weights were processed .*RMSPre.*no_processing"):
        ModelPair.load(*models, tokenizer=tiny_chat.tiny_tokenizer())


def recurrent(name):
    import transformers as tf

    sizes = {"vocab_size": tiny_chat.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "head_dim": 8}
    if name == "lfm2":
        return tiny_models.perturbed(tf.Lfm2ForCausalLM, tf.Lfm2Config(**sizes, full_attn_idxs=[1, 3]), 0)
    if name == "mamba":
        sizes = {"vocab_size": tiny_chat.VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
        return tiny_models.perturbed(tf.MambaForCausalLM, tf.MambaConfig(**sizes), 0)
    return tiny_models.perturbed(tf.Qwen3_5ForCausalLM, tf.Qwen3_5TextConfig(**sizes, **linear), 0)


@pytest.mark.parametrize(("name", "layers"), [("lfm2", "2 of 4"), ("mamba", "2 of 2")])
def test_models_with_recurrent_layers_are_hooked_and_refused_for_prefix_caches(name, layers):
    bridge = hook_model(recurrent(name), None)
    with pytest.raises(LensError, match=rf"{layers} layers hold a recurrent state, e.g. layer 0: .*prefix cache"):
        PrefixCache.compile(bridge, tiny_chat.tiny_format().render("one"))


def test_an_architecture_on_which_transformer_lens_fails_is_one_line():
    """Qwen3.5: TransformerLens 3.9 fails in a pass, 4.3 runs it."""
    with pytest.raises(LensError) as caught:
        PrefixCache.compile(hook_model(recurrent("qwen3.5"), None), tiny_chat.tiny_format().render("one"))
    assert "\n" not in str(caught.value)
    assert "fails in a pass" in str(caught.value) or "recurrent state" in str(caught.value)


def test_an_adapter_kind_is_not_needed_for_the_proof():
    wrapped = tiny_adapters.put_on(deep(layers=4), peft.LoraConfig(**LORA))
    assert len(expected(wrapped).called) == 8


def test_what_doctor_says_of_parity_is_said_of_the_hooked_model(monkeypatch):
    """Without a hook a pass goes through transformers' own model, and agrees with it whatever the hooked one does."""
    loaded, seen = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB), []
    hooked = hook_model(loaded, tiny_chat.tiny_tokenizer())
    prompt = tiny_chat.tiny_format().render("How do birds fly?")

    def spy(view):
        seen.append(network_of(view))
        return seen[-1]

    monkeypatch.setattr(network, "network_of", spy)
    forward(hooked, torch.arange(3, 9)[None], torch.ones((1, 6), dtype=torch.long))
    assert seen.pop() is plain_view(hooked)
    assert float(re.search(r"at most (\S+)", _parity(loaded, hooked, prompt))[1]) < 1e-4
    assert seen
    assert all(one is not plain_view(hooked) for one in seen)
