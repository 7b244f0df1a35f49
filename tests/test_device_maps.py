"""Models spread by a device map, over two devices or between memory and disk: the numbers are those of one device."""

import functools
import json

import pytest
import tiny_adapters
import tiny_hooked
import tiny_pairs
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from other_device import DEVICE, is_there, other_device
from tiny_pairs import LEVEL

import piggyback_lens as lens
from piggyback_lens.models.backends import block_devices
from piggyback_lens.models.static import static_refusal
from piggyback_lens.models.views import absent_weights

pytestmark = pytest.mark.usefixtures("unchecked")  # type checks read many attributes, each through the mode

CHAT = tiny_hooked.chat()
PROMPTS = tiny_hooked.prompts(LEVEL)
OUTSIDE = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
ON_DISK = {**dict.fromkeys((*OUTSIDE, "model.layers.0"), "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}


def spread(side):
    """A model whose last two layers are on the other device, dispatched as accelerate does it."""
    model = tiny_pairs.weights("llama-gqa", side)
    places = dict.fromkeys(("", *OUTSIDE, "model.layers.0"), torch.device("cpu"))
    places |= {f"model.layers.{i}": DEVICE for i in (1, 2)}
    for name, device in places.items():
        part = model.get_submodule(name)
        if name:
            part.to(device)
        add_hook_to_module(part, AlignDevicesHook(device, io_same_device=not name, skip_keys=["past_key_values"]))
    return model


@functools.cache
def in_memory():
    sides = (tiny_pairs.weights("llama-gqa", side) for side in ("base", "finetuned"))
    return lens.ModelPair.load(*sides, tokenizer=CHAT.tokenizer, progress=False)


def numbers(pair, folder):
    """What goes through hooks, forks, caches, gradients and decoding."""
    patch = lens.patch(lens.prefix_activations(pair, "base", PROMPTS[0], "resid_pre", layers=[0, 2]))
    cache = lens.PrefixCache.compile(pair, PROMPTS[0], patch)
    cache.save(folder)
    with pair.using("finetuned") as model:
        texts = [answer.text for answer in lens.generate(model, PROMPTS, prefix_cache=cache, max_new_tokens=4)]
        both = patch + lens.add(torch.ones(32), layers=[0, 2], site="resid_post", span="query")
        with lens.applied(model, lens.batch_prompts(PROMPTS), both) as record:
            model(lens.batch_prompts(PROMPTS).ids)
        texts += [a.text for a in lens.generate(model, PROMPTS, interventions=both, max_new_tokens=4)]
    curve = lens.layer_curve(pair, PROMPTS, sites=("k", "v"), control_layers=1, progress=False)
    cells = lens.attribution_map(pair, PROMPTS, layers=[0, 2], check_cells=1, top_cells=0, progress=False)
    found = [*curve.to_frame()["raw"], *cells.to_frame()["raw"], *(r.change_norm for r in record.receipts)]
    return texts, torch.tensor(found)


def assert_same(pair, tmp_path):
    texts, values = numbers(in_memory(), tmp_path / "one")
    others, found = numbers(pair, tmp_path / "other")
    assert others == texts
    torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5)


def saved(tmp_path):
    for side in ("base", "finetuned"):
        tiny_pairs.weights("llama-gqa", side).save_pretrained(tmp_path / side)
    return tmp_path / "base", tmp_path / "finetuned"


def test_a_pair_on_two_devices_gives_the_numbers_of_one(tmp_path):
    with other_device() as device:
        pair = lens.ModelPair.load(spread("base"), spread("finetuned"), tokenizer=CHAT.tokenizer, progress=False)
        with pair.using("base") as model:
            assert block_devices(model) == [torch.device("cpu"), device, device]
        assert_same(pair, tmp_path)


def test_a_prefix_cache_goes_from_one_layout_to_another(tmp_path):
    with in_memory().using("base") as model:
        whole = lens.PrefixCache.compile(model, PROMPTS[0])
        expected = [a.text for a in lens.generate(model, PROMPTS, prefix_cache=whole, max_new_tokens=4)]
    with other_device():
        apart = lens.hook_model(spread("base"), CHAT.tokenizer)
        lens.PrefixCache.compile(apart, PROMPTS[0]).save(tmp_path / "apart")
        whole.save(tmp_path / "whole")
        loaded = lens.PrefixCache.load(tmp_path / "whole", model=apart, prompt=PROMPTS[0])
        assert [a.text for a in lens.generate(apart, PROMPTS, prefix_cache=loaded, max_new_tokens=4)] == expected
        state = loaded.state(apart, 2)
        assert [is_there(layer.keys) for layer in state.cache.layers] == [False, True, True]
    with in_memory().using("base") as model:
        loaded = lens.PrefixCache.load(tmp_path / "apart", model=model, prompt=PROMPTS[0])
        torch.testing.assert_close(loaded.keys, whole.keys)
        assert [a.text for a in lens.generate(model, PROMPTS, prefix_cache=loaded, max_new_tokens=4)] == expected


def test_a_pair_that_is_partly_on_the_disk_gives_the_numbers_of_memory(tmp_path):
    pair = lens.ModelPair.load(*saved(tmp_path), tokenizer=CHAT.tokenizer, device_map=ON_DISK, progress=False)
    with pair.using("base") as model:
        weights = {name for name, x in model.original_model.named_parameters() if x.is_meta}
        assert any("layers.1" in name for name in weights)
        assert "device map" in static_refusal(model, 8)
    assert_same(pair, tmp_path)


def test_an_adapter_beside_weights_on_the_disk_is_that_of_memory(tmp_path):
    base, _ = saved(tmp_path)
    config = tiny_adapters.KINDS["LoRA, all linear"][1]()
    tiny_adapters.put_on(tiny_pairs.weights("llama-gqa", "base"), config).save_pretrained(tmp_path / "adapter")
    pairs = [
        lens.ModelPair.load(
            base, adapter=tmp_path / "adapter", tokenizer=CHAT.tokenizer, device_map=where, progress=False
        )
        for where in (None, ON_DISK)
    ]
    curves = [lens.layer_curve(pair, PROMPTS, control_layers=0, progress=False).to_frame()["raw"] for pair in pairs]
    assert curves[0].std() > 0
    assert (curves[0] - curves[1]).abs().max() < 1e-5


def test_what_a_device_map_cannot_be_is_refused(tmp_path):
    base, _ = saved(tmp_path)
    assert lens.LoadSettings(device_map=json.dumps(ON_DISK)).device_map == ON_DISK
    with pytest.raises(lens.LensError, match="device='cpu' and device_map='auto': give one of them"):
        lens.LoadSettings(device="cpu", device_map="auto")
    for wrong in ("everywhere", "{broken", {}, 3):
        with pytest.raises(lens.LensError, match="expected auto, balanced, balanced_low_0, sequential, or a mapping"):
            lens.LoadSettings(device_map=wrong)
    with pytest.raises(lens.LensError, match="cannot be used here"):
        lens.load_causal_lm(base, lens.LoadSettings(device_map={"": 7}))
    model = lens.load_causal_lm(base, lens.LoadSettings(device_map=ON_DISK))
    with pytest.raises(lens.LensError, match="a HookedTransformer is on one: use backend='bridge'"):
        lens.hook_model(model, CHAT.tokenizer, backend="hooked")


def test_weights_that_nobody_puts_into_memory_are_named():
    model = tiny_pairs.weights("llama-gqa", "base")
    model.model.layers[1].mlp.up_proj.to("meta")
    assert absent_weights(model) == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(lens.LensError, match=r"1 weight tensors of .* are on no device, e\.g\. model\.layers\.1"):
        lens.hook_model(model, CHAT.tokenizer)
