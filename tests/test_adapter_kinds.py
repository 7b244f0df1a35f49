"""Adapters of every kind: both sides of a pair against what PEFT itself computes, or refused by name."""

import peft
import pytest
import tiny_adapters
import tiny_chat
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_hooked import BACKENDS

from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json
from piggyback_lens.finetuning.trainables import PeftAdapter, add_lora
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.settings import LoRASettings

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about tied weights and biases
IDS = torch.tensor([[1, 7, 8, 9, 20, 21, 5, 4, 3, 30]])
TOKENIZER = tiny_chat.tiny_tokenizer()
CLOSE = 1e-4  # each adapter moves the logits by a thousand times as much; rounding differs by machine


@torch.no_grad()
def owners(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def error(pair, side, expected):
    """Largest difference of the hooked logits from the owner's, as a fraction of the largest logit."""
    with pair.using(side) as model:
        found = forward(model, IDS, torch.ones_like(IDS))
    return float((found - expected).abs().max() / expected.abs().max())


def writes_into_its_base(config):
    return getattr(config, "bias", "none") in ("all", "lora_only")


CASES = [
    (kind, backend)
    for kind, (layout, _) in tiny_adapters.KINDS.items()
    for backend in BACKENDS
    if (layout, backend) != ("llama-bias", "hooked")  # refused: HookedTransformer drops the biases
]


@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_both_sides_are_what_peft_computes(kind, backend, tmp_path):
    base, wrapped = tiny_adapters.build(kind)
    plain, adapted = owners(base), owners(wrapped)
    assert (plain - adapted).abs().max() > 0.1 * adapted.abs().max()
    wrapped.save_pretrained(tmp_path)
    pairs = [ModelPair.load(base, adapter=tmp_path, tokenizer=TOKENIZER, backend=backend)]
    if writes_into_its_base(wrapped.peft_config["default"]):
        with pytest.raises(LensError, match=r"adapter 'default' has bias='.*': it wrote into the weights of its base"):
            ModelPair.load(finetuned=wrapped, tokenizer=TOKENIZER, backend=backend)
        pairs.append(ModelPair.load(base, wrapped, tokenizer=TOKENIZER, backend=backend))
    else:
        pairs.append(ModelPair.load(finetuned=wrapped, tokenizer=TOKENIZER, backend=backend))
    for pair in pairs:
        assert error(pair, "base", plain) < CLOSE
        assert error(pair, "finetuned", adapted) < CLOSE
    assert torch.equal(owners(base), plain)
    assert torch.equal(owners(wrapped), adapted)


@pytest.mark.parametrize("kind", [kind for kind in tiny_adapters.KINDS if "fused" in kind])
def test_a_fresh_adapter_on_a_fused_module_is_seen_when_it_is_trained_after_pairing(kind):
    layout, config = tiny_adapters.KINDS[kind]
    wrapped = peft.get_peft_model(tiny_models.build(layout, 0, vocab=tiny_adapters.VOCAB), config()).eval()
    pair = ModelPair.load(finetuned=wrapped, tokenizer=TOKENIZER)
    plain = owners(wrapped)
    assert error(pair, "finetuned", plain) < CLOSE
    tiny_adapters.move(wrapped)
    adapted = owners(wrapped)
    assert (plain - adapted).abs().max() > 0.1 * adapted.abs().max()
    assert error(pair, "finetuned", adapted) < CLOSE
    assert error(pair, "base", plain) < CLOSE


def test_an_adapter_that_lost_its_trained_biases_is_refused(tmp_path):
    """PEFT 0.18 does not save those of bias="lora_only"; later versions miss them when they load."""
    base, wrapped = tiny_adapters.build("LoRA with bias=lora_only")
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith("bias")}, file)
    with pytest.raises(LensError, match=r"holds no bias: save it again|3 of its tensors are missing"):
        ModelPair.load(base, adapter=tmp_path, tokenizer=TOKENIZER)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_rewrites_the_base_is_right_from_its_folder(init, tmp_path):
    base = tiny_models.build("llama-mha", 0, vocab=tiny_adapters.VOCAB)
    plain = owners(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    wrapped = tiny_adapters.put_on(tiny_models.build("llama-mha", 0, vocab=tiny_adapters.VOCAB), config)
    wrapped.save_pretrained(tmp_path)
    pair = ModelPair.load(base, adapter=tmp_path, tokenizer=TOKENIZER)
    assert error(pair, "base", plain) < CLOSE
    assert error(pair, "finetuned", owners(wrapped)) < CLOSE
    assert torch.equal(owners(base), plain)
    with pytest.raises(LensError, match=f"has init_lora_weights='{init}': it wrote into the weights of its base"):
        ModelPair.load(finetuned=wrapped, tokenizer=TOKENIZER)


@pytest.mark.parametrize("kind", tiny_adapters.REFUSED)
def test_what_is_no_change_of_weights_is_refused_by_name(kind, tmp_path):
    config, message = tiny_adapters.REFUSED[kind]
    base = tiny_models.build("llama-mha", 0, vocab=tiny_adapters.VOCAB)
    wrapped = peft.get_peft_model(tiny_models.build("llama-mha", 0, vocab=tiny_adapters.VOCAB), config()).eval()
    wrapped.save_pretrained(tmp_path)
    for sides in ({"finetuned": wrapped}, {"base": base, "finetuned": wrapped}, {"base": base, "adapter": tmp_path}):
        with pytest.raises(LensError, match=message) as caught:
            ModelPair.load(**sides, tokenizer=TOKENIZER)
        assert "\n" not in str(caught.value)


def test_a_note_says_that_an_adapter_was_made_for_another_base(tmp_path):
    base, wrapped = tiny_adapters.build("LoRA, attention")
    wrapped.peft_config["default"].base_model_name_or_path = "someone/Other-7B"
    wrapped.save_pretrained(tmp_path)
    base.name_or_path = "me/tiny-model"
    with pytest.warns(UserWarning, match="made for someone/Other-7B, and is put on me/tiny-model"):
        pair = ModelPair.load(base, adapter=tmp_path, tokenizer=TOKENIZER)
    assert len(pair.notes) == 1
    base.name_or_path = "mirror/Other-7B"
    assert ModelPair.load(base, adapter=tmp_path, tokenizer=TOKENIZER).notes == ()


def test_an_adapter_of_the_demo_model_names_it_so_that_another_machine_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PIGGYBACK_LENS_CACHE", str(tmp_path / "cache"))
    base = tiny_models.build("llama-mha", 0, vocab=tiny_adapters.VOCAB)
    base.name_or_path = base.config._name_or_path = str(tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4-1234")
    PeftAdapter(add_lora(base, LoRASettings(rank=2))).save(tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "demo"
    fresh = tiny_models.build("llama-mha", 0, vocab=tiny_adapters.VOCAB)
    fresh.name_or_path = str(tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4-1234")
    assert ModelPair.load(fresh, adapter=tmp_path / "adapter", tokenizer=TOKENIZER).notes == ()
