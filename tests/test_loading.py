"""Loading runs no code of others, asks nothing and connects nowhere; whatever a file says is a model or one line."""

import contextlib
import io
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_chat
import tiny_models
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from piggyback_lens.app import cli
from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.errors import LensError, visible
from piggyback_lens.models.peft_adapters import attach_adapter
from piggyback_lens.models.places import usable_device
from piggyback_lens.models.sources import load_causal_lm, load_tokenizer, multimodal_kind
from piggyback_lens.settings import LoadSettings


def tiny():
    return tiny_models.build("llama-gqa", vocab=tiny_chat.VOCAB)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base: a model with its tokenizer; adapter: a LoRA adapter for it."""
    root = tmp_path_factory.mktemp("loading")
    tiny().save_pretrained(root / "base")
    tiny_chat.tiny_tokenizer().save_pretrained(root / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny(), config).save_pretrained(root / "adapter")
    return root


def changed(folder, target, file, change):
    """A copy of a folder in which the JSON of one file is changed: by a dictionary, or to this text."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    text = change if isinstance(change, str) else json.dumps(json.loads((target / file).read_text()) | change)
    (target / file).write_text(text)
    return target


def refusal(load, *given):
    """The message of the `LensError`, which is one line that nothing in it can break out of."""
    with pytest.raises(LensError) as caught:
        load(*given)
    message = str(caught.value)
    assert message == visible(message)
    assert "\n" not in message
    return message


def load_adapter(folder):
    return attach_adapter(tiny(), folder)


# ---------------------------------------------------------------- no code, no question, no process, no connection

ears = SimpleNamespace(open=False, heard=[])  # an audit hook cannot be taken away again


def hear(event, arguments):
    watched = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.connect")
    if ears.open and event.startswith((*watched, "socket.getaddrinfo")):
        ears.heard.append(f"{event} {arguments}")


sys.addaudithook(hear)


@contextlib.contextmanager
def listening():
    ears.open, ears.heard = True, []
    try:
        yield ears.heard
    finally:
        ears.open = False


@pytest.fixture
def alone(monkeypatch):
    """While the test ran no process was started, no connection made, nothing asked; no thread stays."""
    asked, before = [], set(threading.enumerate())
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with listening() as heard:
        yield
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=30)  # transformers reads tensors in threads that end on their own
    assert (heard, asked, [thread for thread in left if thread.is_alive()]) == ([], [], [])


def test_the_guard_hears_processes_and_connections():
    with listening() as heard:
        with contextlib.suppress(OSError):
            subprocess.run([sys.executable, "-c", ""], check=True)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.connect(("127.0.0.1", 9))
    assert "subprocess.Popen" in " ".join(heard)
    assert "socket.connect" in " ".join(heard)


def with_code(folder, target, marker, **maps):
    """A model folder that brings Python code, which would write a marker file when it is imported."""
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    code += "class C(LlamaConfig):\n    model_type = 'own'\nclass M(LlamaForCausalLM):\n    config_class = C\n"
    code += "class T(PreTrainedTokenizerFast):\n    pass\n"
    for file, change in maps.items():
        target = changed(folder if not target.exists() else target, target.with_name(target.name + "_"), file, change)
    (target / "own.py").write_text(code)
    (target / "custom_generate").mkdir()
    (target / "custom_generate" / "generate.py").write_text(code + "def generate(model, **_):\n    return None\n")
    return target


CODE = {
    "config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    "tokenizer_config.json": {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "own.T"]}},
}


def test_code_that_a_folder_brings_is_not_run_and_nothing_is_asked(folders, tmp_path, alone, capfd):
    folder = with_code(folders / "base", tmp_path / "own", tmp_path / "marker", **CODE)
    message = refusal(load_causal_lm, folder)
    assert "read that code, then pass trust_remote_code=True (--trust-remote-code)" in message
    with contextlib.suppress(LensError):  # transformers may know a class for the tokenizer
        load_tokenizer(folder)
    assert not (tmp_path / "marker").exists()
    assert "y/N" not in "".join(capfd.readouterr())


def test_code_beside_a_known_architecture_is_not_run_either(folders, tmp_path, alone):
    known = {"config.json": {"auto_map": {"AutoModelForCausalLM": "own.M"}}}
    folder = with_code(folders / "base", tmp_path / "own", tmp_path / "marker", **known)
    assert type(load_causal_lm(folder)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "marker").exists()


def test_code_is_run_where_the_user_asks_for_it(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    only = {"config.json": CODE["config.json"]}
    folder = with_code(folders / "base", tmp_path / "own", tmp_path / "marker", **only)
    assert type(load_causal_lm(folder, settings=LoadSettings(trust_remote_code=True))).__name__ == "M"
    assert (tmp_path / "marker").read_text() == "ran"


ACTING = {
    "parent_library": {"auto_mapping": {"base_model_class": "M", "parent_library": "ours_to_import"}},
    "megatron": {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "ours_to_import"},
    "base": {"base_model_name_or_path": "owner/name"},
}


@pytest.mark.parametrize("field", ACTING)
def test_an_adapter_that_names_code_or_a_hub_model_runs_and_fetches_nothing(
    folders, tmp_path, monkeypatch, alone, field
):
    (tmp_path / "ours_to_import.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = changed(folders / "adapter", tmp_path / "adapter", "adapter_config.json", ACTING[field])
    if field == "megatron":
        assert "sets megatron_config, which makes PEFT import a module" in refusal(load_adapter, folder)
    else:
        assert load_adapter(folder)
    assert "ours_to_import" not in sys.modules


def test_a_local_model_is_loaded_without_a_process_a_thread_or_a_connection(folders, alone):
    for offline in (False, True):
        assert load_tokenizer(folders / "base", settings=LoadSettings(offline=offline))
        attach_adapter(load_causal_lm(folders / "base", settings=LoadSettings(offline=offline)), folders / "adapter")


@pytest.mark.parametrize(
    ("kind", "expected"), [("Llava", "llava"), ("Gemma3", "gemma3"), ("Qwen2_5_VL", "qwen2_5_vl"), ("Llama", None)]
)
def test_multimodal_checkpoints_are_told_by_their_configuration(kind, expected):
    import transformers

    assert multimodal_kind(getattr(transformers, f"{kind}Config")()) == expected


def test_a_multimodal_checkpoint_is_refused_before_its_weights_are_read(folders, tmp_path, alone):
    from transformers import LlavaConfig

    LlavaConfig().save_pretrained(tmp_path / "llava")
    (tmp_path / "llava" / "model.safetensors").write_bytes(b"never read")
    assert "is a multimodal model (llava), expected a text model" in refusal(load_causal_lm, tmp_path / "llava")


# ---------------------------------------------------------------- pickles


def test_pickled_weights_are_refused_by_name_and_never_opened(folders, tmp_path, alone, monkeypatch):
    opened = []
    monkeypatch.setattr(torch, "load", lambda *given, **settings: opened.append(given))
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    for source, weights, pickled, load in (
        ("base", "model.safetensors", "pytorch_model.bin", load_causal_lm),
        ("adapter", "adapter_model.safetensors", "adapter_model.bin", load_adapter),
    ):
        folder = shutil.copytree(folders / source, tmp_path / source)
        (folder / weights).unlink()
        torch.save({"x": Bomb()}, folder / pickled)
        assert f"but {pickled}, a pickle, which could run code: save" in refusal(load, folder)
    named = changed(tmp_path / "base", tmp_path / "named", "config.json", {"transformers_weights": "adapter_model.bin"})
    save_file({"x": torch.zeros(1)}, named / "other.safetensors")
    assert "names 'adapter_model.bin' as its weights: only safetensors" in refusal(load_causal_lm, named)
    save_file({"x": torch.zeros(1)}, tmp_path / "base" / "other.safetensors")
    assert "no file named model.safetensors" in refusal(load_causal_lm, tmp_path / "base")
    assert not opened
    assert not marker.exists()


def test_weights_that_do_not_fill_the_model_are_refused_and_not_invented(folders, tmp_path):
    folder = shutil.copytree(folders / "base", tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.2.mlp.up_proj" in name)
    save_file({name: x for name, x in weights.items() if name != gone}, folder / "model.safetensors", {"format": "pt"})
    message = refusal(load_causal_lm, folder)
    assert f"lack 1 tensors that its config.json asks for, e.g. {gone}" in message


# ---------------------------------------------------------------- whatever a file says

BRACKETS = "[" * 100_000
ADAPTERS = {
    "a list": ("[]", "holds [], expected a JSON object"),
    "a number": ("3", "holds 3, expected a JSON object"),
    "brackets": (BRACKETS, "is not readable JSON"),
    "no text": ("\udcff", "is not readable JSON"),
    "no alpha": ({"lora_alpha": None}, "says lora_alpha=None, expected a finite number"),
    "a word": ({"lora_alpha": "big"}, "says lora_alpha='big', expected a finite number"),
    "not a number": ({"lora_alpha": float("nan")}, "says lora_alpha=nan, expected a finite number"),
    "a pattern": ({"alpha_pattern": {"q_proj": []}}, "says q_proj=[], expected a finite number"),
    "rank 0": ({"r": 0}, "says r=0, expected a whole number from 1 up"),
    "a huge rank": ({"r": 10**12}, "says rank 1000000000000, and none of its tensors is as large"),
    "other layers": ({"layer_replication": [[0, 10**9]]}, "sets layer_replication, which makes PEFT rebuild the base"),
    "other models": ({"peft_type": "XLORA"}, "says peft_type='XLORA', which makes PEFT load further models"),
    "no such module": ({"target_modules": ["c_attn"]}, "does not fit this base: Target modules {'c_attn'} not found"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_config_that_makes_no_sense_is_one_line(folders, tmp_path, case):
    change, expected = ADAPTERS[case]
    folder = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    if change == "\udcff":
        (folder / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    else:
        folder = changed(folder, tmp_path / "changed", "adapter_config.json", change)
    assert expected in refusal(load_adapter, folder)


def test_tensors_of_other_widths_are_named_with_both_shapes(folders, tmp_path):
    folder = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    wide = {name: torch.zeros(2, 40) if "lora_A" in name else x for name, x in weights.items()}
    save_file(wide, folder / "adapter_model.safetensors", {"format": "pt"})
    message = refusal(load_adapter, folder)
    assert "does not fit this base: Error(s) in loading state_dict for PeftModel: size mismatch for" in message
    assert "torch.Size([2, 40])" in message


def test_control_characters_of_a_config_are_shown_escaped(folders, tmp_path):
    hostile = "x\x1b[2J\x1b]0;title\x07\u202e\ud800"
    change = {"base_model_name_or_path": hostile, "target_modules": ["no_such_module"]}
    folder = changed(folders / "adapter", tmp_path / "adapter", "adapter_config.json", change)
    message = refusal(load_adapter, folder)
    assert r"made for x\x1b[2J\x1b]0;title\x07\u202e\ud800)" in message


def test_what_libraries_say_while_loading_is_shown_escaped(folders, monkeypatch, caplog):
    real = PeftModel.from_pretrained

    def loud(*given, **settings):
        warnings.warn("the file says \x1b[2J", stacklevel=1)
        logging.getLogger("transformers").warning("the file says %s", "\x1b[2J")
        return real(*given, **settings)

    monkeypatch.setattr(PeftModel, "from_pretrained", loud)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    with pytest.warns(UserWarning, match="the file says") as caught:
        load_adapter(folders / "adapter")
    said = [str(warning.message) for warning in caught] + [record.getMessage() for record in caplog.records]
    assert set(said) == {r"the file says \x1b[2J"}
    assert len(said) > 1


MODELS = {
    "a list": ("[]", "holds [], expected a JSON object"),
    "brackets": (BRACKETS, "is not readable JSON"),
    "no heads": ({"num_attention_heads": 0}, ""),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "many layers": ({"num_hidden_layers": 999_999}, "has 999999 layers, at most 1000"),
    "countless labels": ({"num_labels": 10**15}, "says num_labels=1000000000000000 in its config.json, at most"),
    "a kernel": ({"attn_implementation": "owner/kernel"}, "which is code of the hub"),
    "no such type": ({"model_type": "x\x1b[2J"}, r"x\x1b[2J"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_config_that_makes_no_sense_is_one_line(folders, tmp_path, alone, case):
    change, expected = MODELS[case]
    folder = changed(folders / "base", tmp_path / "base", "config.json", change)
    message = refusal(load_causal_lm, folder)
    assert expected in message
    assert str(folder) in message


@pytest.mark.parametrize("text", ["[]", "3", BRACKETS, '{"tokenizer_class": 3}', "{"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_tokenizer_files_that_make_no_sense_are_one_line(folders, tmp_path, alone, file, text):
    folder = changed(folders / "base", tmp_path / "base", file, text)
    assert f"no tokenizer could be loaded from {folder}" in refusal(load_tokenizer, folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def fields_of(kind):
    if kind == "adapter":
        return sorted(LoraConfig(r=2).to_dict())
    return sorted(tiny().config.to_dict() | {"auto_map": 0, "quantization_config": 0, "transformers_weights": 0})


@pytest.mark.parametrize("kind", ["adapter", "base"])
@given(data=st.data())
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_any_json_in_any_field_is_a_model_or_one_line(folders, tmp_path_factory, kind, data):
    field, value = data.draw(st.sampled_from(fields_of(kind))), data.draw(JSON)
    name, load = ("adapter_config.json", load_adapter) if kind == "adapter" else ("config.json", load_causal_lm)
    target = tmp_path_factory.getbasetemp() / f"any-{kind}"
    folder = changed(folders / kind, target, name, {field: value})
    with contextlib.suppress(LensError):
        load(folder)


@given(text=st.text(alphabet=st.characters(codec=None)))
@example("a\x1b[2J\r\nb\u2028\u202e\ud800\x9b1m")
def test_no_control_character_of_anything_gets_out_of_a_message(text):
    message = str(LensError(f"{text} came"))
    kinds = {unicodedata.category(character) for character in set(message) - {"\t", "\u200c", "\u200d"}}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert str(LensError(message)) == message
    message.encode()


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line_before_anything_is_read(tmp_path, device):
    message = refusal(lambda: load_causal_lm(tmp_path / "nowhere", settings=LoadSettings(device=device)))
    assert f"device {device!r}" in message
    assert "choose one of cpu" in message
    assert usable_device("cpu").type == "cpu"


# ---------------------------------------------------------------- chat templates

DOUBLED = "{{% set ns = namespace(x={0}, y={0}) %}}{{% for i in range(60) %}}{1}{{% endfor %}}"
PAIRS = "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
A = "{% set a = 'a' * 100000 %}"
LARGE = "makes a text or list of more than 1,00"
TEMPLATES = {
    "divides by zero": ("{{ 1 / 0 }}", "refuses messages with the roles user: division by zero"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "is cut off": ("{% if", "is not valid jinja"),
    "is nested": ("{{" + "(" * 100_000, "is not valid jinja"),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than"),
    "branches": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "more than"),
    "repeats": ("{{ 'x' * 2000000 }}", LARGE),
    "repeats a variable": ("{% set n = 99999 %}{{ n * 'x' * n }}", LARGE),
    "repeats a list": ("{{ ([1] * 999999999)|length }}", LARGE),
    "joins itself": (DOUBLED.format("'a'", "{% set ns.x = ns.x ~ ns.x %}"), LARGE),
    "adds itself": (DOUBLED.format("'a'", "{% set ns.x = ns.x + ns.x %}"), LARGE),
    "writes itself": (DOUBLED.format("'a'", "{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}"), LARGE),
    "squares": (DOUBLED.format("9", "{% set ns.x = ns.x * ns.x %}"), LARGE),
    "holds itself": (DOUBLED.format("[1]", PAIRS) + "{{ ns.x }}", LARGE),
    "holds itself as JSON": (DOUBLED.format("[1]", PAIRS) + "{{ ns.x|tojson }}", LARGE),
    "compares itself": (DOUBLED.format("[1]", PAIRS) + "{{ ns.x == ns.y }}", LARGE),
    "raises to powers": ("{{ 9 ** 9 ** 9 }}", LARGE),
    "centres": ("{{ 'x'.center(999999999) }}", LARGE),
    "centres by a filter": ("{{ 'x'|center(999999999) }}", LARGE),
    "formats": ("{{ '{:999999999}'.format(1) }}", LARGE),
    "formats by %": ("{{ '%*d' % (999999999, 1) }}", LARGE),
    "fills": ("{{ [1]|batch(999999999, 'x')|list }}", LARGE),
    "indents": ("{{ [1]|tojson(indent=999999999) }}", LARGE),
    "replaces": (A + "{{ a.replace('a', a) }}", LARGE),
    "replaces by a filter": (A + "{{ a|replace('a', a) }}", LARGE),
    "joins": (A + "{{ a.join(a) }}", LARGE),
    "translates": (A + "{{ a.translate({97: a}) }}", LARGE),
    "makes much": ("{% for i in range(1000) %}{% set a = 'x' * 900000 %}{% endfor %}", "makes a text or list of more"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_runs_away_is_stopped_in_time_and_memory(case, monkeypatch):
    from piggyback_lens.conversations import template_limits

    template, expected = TEMPLATES[case]
    monkeypatch.setattr(template_limits, "SECONDS", 0.5 if expected == "more than" else 60)
    started = time.process_time()
    tracemalloc.start()
    message = refusal(lambda: ChatFormat(tiny_chat.tiny_tokenizer(template + tiny_chat.TEMPLATE)).render("hi"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected in message
    assert "the chat template" in message or "chat template is" in message
    assert peak < 1e8
    assert time.process_time() - started < 20  # of this process: a busy machine is no fault


def test_a_long_conversation_is_within_the_limits(monkeypatch):
    from piggyback_lens.conversations import template_limits

    monkeypatch.setattr(template_limits, "STEPS", 2_000)
    turns = [{"role": role, "content": "hello there, " * 500} for role in ("user", "assistant") * 20]
    prompt = tiny_chat.tiny_format().render([*turns, {"role": "user", "content": "hi"}])
    assert len(prompt.text) > 250_000


@pytest.mark.parametrize("given", [{"system": "a\udcffb"}, {"template_kwargs": {"x": ["\ud800"]}}])
def test_half_a_character_is_refused_wherever_it_comes_from(given):
    template = "{{ x }}" + tiny_chat.TEMPLATE
    assert "half a character (a lone surrogate)" in refusal(
        lambda: ChatFormat(tiny_chat.tiny_tokenizer(template), **given).render("hi")
    )


# ---------------------------------------------------------------- the command line


COMMANDS = {
    "a list for an adapter": ({"adapter": ("adapter_config.json", "[]")}, [], "expected a JSON object"),
    "brackets for an adapter": ({"adapter": ("adapter_config.json", BRACKETS)}, [], "is not readable JSON"),
    "a list for a tokenizer": ({"base": ("tokenizer_config.json", "[]")}, [], "no tokenizer could be loaded"),
    "brackets for a base": ({"base": ("config.json", BRACKETS)}, [], "is not readable JSON"),
    "no heads": ({"base": ("config.json", {"num_attention_heads": 0})}, [], "config.json"),
    "code": ({"base": ("config.json", CODE["config.json"])}, [], "--trust-remote-code"),
    "escapes": (
        {
            "adapter": (
                "adapter_config.json",
                {"base_model_name_or_path": "x\x1b[2J\x1b]0;t\x07", "target_modules": ["y"]},
            )
        },
        [],
        r"made for x\x1b[2J\x1b]0;t\x07",
    ),
    "a template that divides by zero": ({"base": ("chat_template.jinja", "{{ 1 / 0 }}")}, [], "division by zero"),
    "tpu9": ({}, ["--device", "tpu9"], "device 'tpu9' cannot be used here"),
    "cuda:9": ({}, ["--device", "cuda:9"], "device 'cuda:9' cannot be used here"),
    "half a character": ({}, ["--system", "a\udcff"], "half a character"),
    "no such dtype": ({}, ["--dtype", "int8"], "choose one of float32, bfloat16, float16, auto"),
    "no such attention": ({}, ["--attn-implementation", "owner/kernel"], "is code of the hub"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_on_the_command_line_it_is_one_line_and_status_2(folders, tmp_path, monkeypatch, alone, capsys, case):
    changes, words, expected = COMMANDS[case]
    given = {name: folders / name for name in ("base", "adapter")}
    given |= {name: changed(folders / name, tmp_path / name, *change) for name, change in changes.items()}
    (tmp_path / "prompts.txt").write_text("hello there\nwhat is it\ntell me more")
    options = ["--adapter", given["adapter"], "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    command = ["piggyback-lens", "map", given["base"], *options, "--kinds", "span", "--n", "3", *words]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 1000))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert message.startswith("error: ")
    assert expected in message
    assert "Traceback" not in captured.err + captured.out
    assert "\x1b" not in captured.err + captured.out
    assert sys.stdin.tell() == 0
    assert not (tmp_path / "out").exists()
