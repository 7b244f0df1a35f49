"""Load options: dtype, attention, quantisation, revisions and folders of the hub, each as it reaches the model."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_chat
import tiny_hooked
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from test_loading import alone, refusal  # noqa: F401
from tiny_chat import tiny_examples
from torch.testing import assert_close
from transformers import masking_utils, modeling_utils

from piggyback_lens.app import cli
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.patching import layer_curve
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.models.peft_adapters import adapter_folder, attach_adapter
from piggyback_lens.models.places import Place, locate
from piggyback_lens.models.sources import load_causal_lm, load_tokenizer
from piggyback_lens.settings import ChatSettings, LoadSettings, LoRASettings, TrainSettings

IDS = torch.tensor([[1, 7, 8, 9, 20, 21, 5]])
COMMIT = "a" * 40


def tiny(seed=0):
    return tiny_models.build("llama-gqa", seed, vocab=tiny_chat.VOCAB)


def save_adapter(folder, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny(), config).save_pretrained(folder)
    return folder


def save_model(folder, seed=0, dtype=torch.float32):
    tiny(seed).to(dtype).save_pretrained(folder)
    tiny_chat.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("options") / "base")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


# ---------------------------------------------------------------- dtype and attention


def test_dtype_auto_is_the_one_that_the_weights_are_stored_in(base, tmp_path):
    stored = save_model(tmp_path / "half", dtype=torch.bfloat16)
    assert load_causal_lm(stored, settings=LoadSettings(dtype="auto")).dtype is torch.bfloat16
    assert load_causal_lm(base, settings=LoadSettings(dtype="auto")).dtype is torch.float32
    assert load_causal_lm(stored).dtype is torch.float32
    assert load_causal_lm(base, LoadSettings(dtype=torch.float16)).dtype is torch.float16


def test_a_dtype_is_a_name_or_torchs_own(base):
    named, own = (LoadSettings(dtype=dtype, attn_implementation="eager") for dtype in ("bfloat16", torch.bfloat16))
    assert named == own
    assert load_causal_lm(base, named).dtype is torch.bfloat16
    assert_close(logits(load_causal_lm(base, named)), logits(load_causal_lm(base, own)))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_that_is_asked_for_is_used(base, name):
    model = load_causal_lm(base, settings=LoadSettings(attn_implementation=name))
    assert model.config._attn_implementation == name
    assert_close(logits(model), logits(tiny()), rtol=1e-4, atol=1e-4)


def padding_only(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention that is told of padding, as flash attention is (a mask of two axes, or none), and not of scores."""
    assert attention_mask is None or attention_mask.ndim == 2, "flash attention takes no mask of scores"
    news, total, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    seen = torch.ones(news, total, dtype=torch.bool).tril(total - news)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, -total:]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch):
    """The name of an attention that transformers calls as it calls flash attention, which needs a GPU."""
    monkeypatch.setitem(modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "padding_only", padding_only)
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(masks, "padding_only", masking_utils.flash_attention_mask)
    return "padding_only"


def test_a_model_with_flash_attention_is_hooked_patched_and_trained(flash):
    chat, answers, values, losses = tiny_hooked.chat(), {}, {}, {}
    prompts = tiny_hooked.prompts(("what", "how so", "so"))
    for name in ("eager", flash):
        sides = [tiny(seed) for seed in (0, 1)]
        for side in sides:
            side.set_attn_implementation(name)
        pair = ModelPair.load(*sides, tokenizer=chat.tokenizer)
        assert [side.config._attn_implementation for side in sides] == [name] * 2
        with pair.using("finetuned") as model:
            answers[name] = [answer.ids for answer in generate(model, prompts, max_new_tokens=6)]
            if name == flash:
                with pytest.raises(LensError, match="padding_only attention does not take this mask"):
                    generate(model, prompts, max_new_tokens=6, static_cache=True)
        curve = layer_curve(pair, prompts, control_layers=0, progress=False)
        values[name] = torch.tensor(curve.to_frame()["raw"].to_numpy())
        tuned = add_lora(sides[0], LoRASettings(rank=2))
        steps = train(tuned, tiny_examples(6, seed=3), TrainSettings(steps=2, batch_size=3), progress=False).history
        losses[name] = torch.tensor([step["loss"] for step in steps])
    assert answers[flash] == answers["eager"]
    assert_close(values[flash], values["eager"], atol=1e-4, rtol=1e-4, equal_nan=True)
    assert_close(losses[flash], losses["eager"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8 is not known: choose one of float32"),
        ({"quantization": "2bit"}, "quantization='2bit': expected '4bit', '8bit' or a config"),
        ({"attn_implementation": "owner/kernel"}, "is code of the hub: read it, then pass trust_remote_code=True"),
        ({"attn_implementation": "no_such_attention"}, "no_such_attention"),
    ],
)
def test_options_that_make_no_sense_are_one_line(base, wrong, expected):
    assert expected in refusal(lambda: load_causal_lm(base, LoadSettings(**wrong)))


# ---------------------------------------------------------------- quantisation


def test_without_bitsandbytes_the_extra_is_named(base, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    assert "pip install 'piggyback-lens[quant]'" in refusal(
        lambda: load_causal_lm(base, settings=LoadSettings(quantization="4bit"))
    )


def test_a_gguf_file_is_not_quantised_again(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "leave quantization= out" in refusal(
        lambda: load_causal_lm(tmp_path / "a.gguf", settings=LoadSettings(quantization="4bit"))
    )


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="needs the extra quant")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The folder of a model whose widths are multiples of 64, bitsandbytes' blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=tiny_chat.VOCAB))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_a_quantised_base_is_near_the_plain_one_on_the_cpu_in_bfloat16(wide, tmp_path, bitsandbytes, name):
    model = load_causal_lm(wide, settings=LoadSettings(quantization=name, dtype=torch.bfloat16))
    layer = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[name]
    assert isinstance(model.model.layers[0].self_attn.q_proj, layer)
    assert model.dtype is torch.bfloat16
    plain = load_causal_lm(wide)
    expected, found = logits(plain), logits(model).float()
    assert found.isfinite().all()
    assert 0 < (found - expected).abs().max() / expected.abs().max() < {"4bit": 0.5, "8bit": 0.1}[name]
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(plain, lora).save_pretrained(tmp_path / "adapter")
    adapted = attach_adapter(
        load_causal_lm(wide, settings=LoadSettings(quantization=name, dtype=torch.bfloat16)), tmp_path / "adapter"
    )
    assert (logits(adapted).float() - found).abs().max() > 0.05 * expected.abs().max()
    with adapted.disable_adapter():
        assert_close(logits(adapted).float(), found)


def test_a_base_that_is_stored_quantised_is_loaded_as_it_is(wide, tmp_path, bitsandbytes):
    model = load_causal_lm(wide, settings=LoadSettings(quantization="4bit", dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "stored")
    again = load_causal_lm(tmp_path / "stored", settings=LoadSettings(dtype=torch.bfloat16))
    assert isinstance(again.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert_close(logits(again), logits(model))


def test_a_config_of_transformers_quantises_as_well(wide, bitsandbytes):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["up_proj"])
    model = load_causal_lm(wide, settings=LoadSettings(quantization=config))
    assert isinstance(model.model.layers[0].mlp.down_proj, bitsandbytes.nn.Linear4bit)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


# ---------------------------------------------------------------- revisions and folders of the hub


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", Place("owner/name")),
        ("owner/name@main", Place("owner/name", "main")),
        ("owner/name@refs/pr/3:checkpoint-120", Place("owner/name", "refs/pr/3", "checkpoint-120")),
        ("owner/na.me-1:runs/checkpoint-120/", Place("owner/na.me-1", None, "runs/checkpoint-120")),
        (Path("owner/name@v1"), Place("owner/name", "v1")),
        ("./owner@name:x", Place("./owner@name:x")),
        ("C:/models/base", Place("C:/models/base")),
        ("a folder/with a/model", Place("a folder/with a/model")),
    ],
)
def test_a_source_says_its_revision_and_folder(source, expected):
    assert locate(source) == expected


def test_what_exists_as_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name@main:x").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "checkpoint-120").mkdir(parents=True)
    assert locate("owner/name@main:x") == Place("owner/name@main:x")
    assert locate("owner/name:checkpoint-120") == Place("owner/name/checkpoint-120")
    assert "is a local folder, which has none: leave @ out" in refusal(locate, "owner/name@v2:checkpoint-120")
    assert "leads out of the repository" in refusal(locate, "someone/else:../../etc")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with one repository: at "main" and "v2" a model each, at "main" an adapter in checkpoint-120."""
    import huggingface_hub.constants as constants

    repository = tmp_path / "hub" / "models--owner--name"
    for revision, commit, seed in (("main", COMMIT, 0), ("v2", "b" * 40, 1)):
        snapshot = repository / "snapshots" / commit
        save_model(snapshot, seed)
        save_model(snapshot / "deep" / "model", seed + 2)
        save_adapter(snapshot / "checkpoint-120", seed)
        for file in [
            path for path in snapshot.rglob("*") if path.is_file()
        ]:  # as links to blobs, like the hub's client
            blob = repository / "blobs" / f"{commit[:4]}-{file.relative_to(snapshot).as_posix().replace('/', '-')}"
            blob.parent.mkdir(exist_ok=True)
            shutil.move(file, blob)
            file.symlink_to(blob)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("source", "seed"),
    [
        ("owner/name", 0),
        ("owner/name@v2", 1),
        ("owner/name:deep/model", 2),
        ("owner/name@v2:deep/model", 3),
        (f"owner/name@{COMMIT}", 0),
    ],
)
def test_models_and_tokenizers_come_from_the_revision_and_folder_asked_for(hub, alone, source, seed):  # noqa: F811
    model = load_causal_lm(source, settings=LoadSettings(offline=True))
    assert_close(logits(model), logits(tiny(seed)), rtol=1e-4, atol=1e-4)
    assert model.config.name_or_path == "owner/name"
    tokenizer = load_tokenizer(source, settings=LoadSettings(offline=True))
    assert tokenizer.chat_template == tiny_chat.TEMPLATE
    assert tokenizer("abc")["input_ids"] == tiny_chat.tiny_tokenizer()("abc")["input_ids"]


def test_the_folder_has_a_tokenizer_of_its_own(hub):
    file = hub / "models--owner--name" / "snapshots" / COMMIT / "deep" / "model" / "chat_template.jinja"
    file.unlink()
    file.write_text("{{ 'other' }}")
    assert load_tokenizer("owner/name:deep/model", settings=LoadSettings(offline=True)).chat_template == "{{ 'other' }}"


def test_an_adapter_of_a_checkpoint_is_found_in_its_folder(hub, alone):  # noqa: F811
    found = adapter_folder(Path("owner/name@v2:checkpoint-120"), offline=True)
    assert found == hub / "models--owner--name" / "snapshots" / ("b" * 40) / "checkpoint-120"
    model = attach_adapter(load_causal_lm("owner/name", settings=LoadSettings(offline=True)), found)
    assert (logits(model) - logits(tiny())).abs().max() > 0.1
    message = refusal(lambda: adapter_folder("owner/name", offline=True))
    assert (
        "no adapter_config.json at its top: name the folder of one checkpoint, as in owner/name:checkpoint" in message
    )
    assert "no adapter_config.json in deep" in refusal(lambda: adapter_folder("owner/name:deep", offline=True))


def test_an_adapter_on_the_hub_is_not_taken_for_a_whole_model(hub, alone):  # noqa: F811
    message = refusal(lambda: load_causal_lm("owner/name:checkpoint-120", settings=LoadSettings(offline=True)))
    assert "is a PEFT adapter, expected a whole model: give it as adapter=" in message


@pytest.mark.parametrize("source", ["owner/name@v9", "owner/other", "owner/name:nowhere"])
@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer, adapter_folder])
def test_what_the_cache_does_not_hold_is_one_line_without_a_connection(hub, alone, source, load):  # noqa: F811
    offline = {"offline": True} if load is adapter_folder else {"settings": LoadSettings(offline=True)}
    assert source in refusal(lambda: load(source, **offline))


def test_only_the_files_that_are_read_are_asked_of_the_hub(hub, monkeypatch):
    import huggingface_hub

    real, asked = huggingface_hub.snapshot_download, []

    def snapshot(name, **settings):
        asked.append((name, settings))
        return real(name, **settings | {"local_files_only": True})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_causal_lm("owner/name@v2:deep/model")
    ((name, settings),) = asked
    assert (name, settings["revision"], settings["local_files_only"]) == ("owner/name", "v2", False)
    assert all(pattern.startswith("deep/model/") for pattern in settings["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in settings["allow_patterns"])


# ---------------------------------------------------------------- the command line


OPTIONS = {
    ("--dtype", "auto"): {"dtype": "auto"},
    ("--dtype", "bfloat16"): {"dtype": torch.bfloat16},
    ("--attn-implementation", "eager"): {"attn_implementation": "eager"},
    ("--quantization", "4bit"): {"quantization": "4bit"},
    ("--quantization", "8bit"): {"quantization": "8bit"},
    ("--trust-remote-code",): {"trust_remote_code": True},
    ("--offline",): {"offline": True},
}


class Seen(Exception):
    """What a command was about to load, and how."""


@pytest.mark.parametrize("words", OPTIONS)
@pytest.mark.parametrize("command", ["audit", "map", "perturb", "stress"])
def test_commands_on_pairs_pass_the_options_on(tmp_path, monkeypatch, command, words):
    def load(*sources, **settings):
        raise Seen(sources, settings)

    monkeypatch.setattr(ModelPair, "load", load)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello there\nwhat is it\ntell me more")
    both = ["--on-topic", prompts, "--off-topic", prompts, "--behaviour", "words"]
    needed = {"audit": both, "perturb": both, "map": ["--prompts", prompts]}
    needed["stress"] = ["--prompts", prompts, "--behaviour", "words"]
    sources = ["owner/base@v1:a", "--adapter", "owner/name@main:checkpoint-120"]
    line = ["piggyback-lens", command, *sources, *needed[command], "--out", tmp_path / "out", *words]
    monkeypatch.setattr("sys.argv", [str(word) for word in line])
    with pytest.raises(Seen) as caught:
        cli.main()
    (base, finetuned, adapter), settings = caught.value.args
    assert (base, finetuned, adapter) == ("owner/base@v1:a", None, "owner/name@main:checkpoint-120")
    assert settings == vars(LoadSettings(**OPTIONS[words])) | {"backend": "bridge"}


@pytest.mark.parametrize("words", OPTIONS)
@pytest.mark.parametrize("command", ["train-direction", "curves", "steer"])
def test_commands_on_directions_pass_the_options_on(base, tmp_path, monkeypatch, command, words):
    from test_direction_jobs import direction

    import piggyback_lens.models.sources as sources

    def load(source, options):
        raise Seen(source, options)

    monkeypatch.setattr(sources, "load_causal_lm", load)
    data, prompts, vector = tmp_path / "data.jsonl", tmp_path / "prompts.txt", tmp_path / "d.safetensors"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    data.write_text("\n".join([json.dumps({"messages": turns})] * 4))
    prompts.write_text("hello there\nwhat is it\ntell me more")
    direction().save(vector)
    needed = {
        "train-direction": ["--data", data, "--batch-size", "2"],
        "curves": ["--solution", f"d={vector}", "--data", data],
    }
    needed["curves"] += ["--kinds", "efficiency"]
    needed["steer"] = ["--direction", vector, "--prompts", prompts, "--behaviour", "words"]
    line = ["piggyback-lens", command, base, *needed[command], "--out", tmp_path / "out", *words]
    monkeypatch.setattr("sys.argv", [str(word) for word in line])
    with pytest.raises(Seen) as caught:
        cli.main()
    source, options = caught.value.args
    assert source == str(base)
    assert options == LoadSettings(**OPTIONS[words])


def test_every_command_that_loads_a_model_has_the_options(capsys, monkeypatch):
    for command in ("audit", "map", "perturb", "stress", "train-direction", "curves", "steer"):
        monkeypatch.setattr("sys.argv", ["piggyback-lens", command, "--help"])
        monkeypatch.setenv("COLUMNS", "200")
        cli.main()
        shown = capsys.readouterr().out
        missing = [word[0] for word in OPTIONS if word[0] not in shown]
        assert (command, missing) == (command, [])


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_a_quantised_pair_is_what_peft_computes_and_patches_and_generates(wide, tmp_path, bitsandbytes, name):
    settings = {"quantization": name, "dtype": torch.bfloat16, "device": "cpu", "offline": True}
    tokenizer = tiny_chat.tiny_tokenizer()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_causal_lm(wide), lora).save_pretrained(tmp_path)
    pair = ModelPair.load(wide, adapter=tmp_path, tokenizer=tokenizer, **settings)
    plain = load_causal_lm(wide, settings=LoadSettings(quantization=name, dtype=torch.bfloat16))
    expected = {"base": logits(plain).float()}
    plain = load_causal_lm(
        wide, settings=LoadSettings(quantization=name, dtype=torch.bfloat16)
    )  # 4-bit weights must not have run before
    expected["finetuned"] = logits(attach_adapter(plain, tmp_path)).float()
    for side, theirs in expected.items():
        with pair.using(side) as model, torch.no_grad():
            ours = forward(model, IDS, torch.ones_like(IDS)).float()
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert (expected["base"] - expected["finetuned"]).norm() > 0.2 * expected["base"].norm()
    prompts = [
        pair.chat_format(settings=ChatSettings(system="be kind.")).render(query) for query in ("one", "two words")
    ]
    repair = PrefixCache.compile(pair, prompts[0], side="base")
    with pair.using("finetuned") as model:
        answers = generate(model, prompts, max_new_tokens=3, prefix_cache=repair)
    assert all(answer.ids for answer in answers)
    curve = layer_curve(pair, prompts, layers=[0, 1])
    assert len(curve.to_frame()) >= 2


def test_a_4_bit_base_that_has_run_is_refused_where_attaching_would_spoil_it(wide, tmp_path, bitsandbytes):
    get_peft_model(load_causal_lm(wide), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = load_causal_lm(wide, settings=LoadSettings(quantization="4bit", dtype=torch.bfloat16))
    before = logits(model)
    state = model.model.layers[0].self_attn.q_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes lays weights out anew only on CPUs with AVX512-BF16")
    with pytest.raises(LensError, match="this 4-bit base has run on a CPU"):
        ModelPair.load(model, adapter=tmp_path, tokenizer=tiny_chat.tiny_tokenizer())
    assert_close(logits(model), before)
