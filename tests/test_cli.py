"""The command line as a user meets it: one-line errors with status 2, and a whole audit of tiny models."""

import dataclasses
import json
import math

import pytest
import tiny_chat
import tiny_models
import torch
from tiny_hooked import BACKENDS
from typer.main import get_command

import piggyback_lens
from piggyback_lens.app import cli
from piggyback_lens.app.commands import app
from piggyback_lens.app.gate import Gate
from piggyback_lens.app.options import PairOptions
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.intervals import Estimate
from piggyback_lens.settings import (
    AuditSettings,
    ChatSettings,
    CompareSettings,
    CurveSettings,
    DemoSettings,
    LoadSettings,
    LoRASettings,
    MapSettings,
    PerturbSettings,
    SteerSettings,
    StressSettings,
    TrainDirectionSettings,
    TrainSettings,
    field_docs,
)

QUERIES = ["hello there", "what is it", "tell me more"]


def save_model(folder, name="llama-gqa", seed=0, template=tiny_chat.TEMPLATE):
    tokenizer = tiny_chat.tiny_tokenizer(template)
    tiny_models.build(name, seed, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder, base_name="llama-gqa"):
    model = add_lora(tiny_models.build(base_name, 0, vocab=tiny_chat.VOCAB), LoRASettings(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_model(root / "base")
    save_adapter(root / "adapter")
    save_model(root / "no_template", template=None)
    (root / "on.txt").write_text("\n".join(QUERIES))
    (root / "off.txt").write_text("\n".join([*QUERIES, "why not", "who are you"]))
    (root / "empty.txt").write_text("\n\n")
    (root / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    (root / "one.txt").write_text("only one")
    (root / "not_a_model").mkdir()
    return root


def command(files, *extra, base="base", on="on.txt", off="off.txt", behaviour="words", adapter="adapter"):
    words = ["audit", str(files / base), "--on-topic", str(files / on), "--off-topic", str(files / off)]
    words += ["--behaviour", behaviour, "--offline", "--max-new-tokens", "4"]
    return [*words, *(["--adapter", str(files / adapter)] if adapter else []), *map(str, extra)]


def call(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["piggyback-lens", *words])
    cli.main()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_audit_of_an_adapter_writes_a_report_and_says_its_verdict(files, tmp_path, monkeypatch, capsys, backend):
    call(monkeypatch, command(files, "--out", tmp_path, "--backend", backend))
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "result.json").read_text())
    assert " ".join(facts["verdict"].split()) in " ".join(printed.split())
    assert (tmp_path / "report.html").stat().st_size > 100_000
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 7 * 8
    call(monkeypatch, command(files, "--out", tmp_path, "--backend", backend))
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines


def laboratory(files, *words):
    return [words[0], str(files / "base"), *map(str, words[1:]), "--adapter", str(files / "adapter"), "--offline"]


def test_a_map_writes_its_experiments_and_a_report_and_continues(files, tmp_path, monkeypatch, capsys):
    kinds = ["--kinds", "carrier,layers,positions,attribution,span,edges"]
    words = laboratory(files, "map", "--prompts", files / "off.txt", "--out", tmp_path, "--answer-tokens", 3, *kinds)
    call(monkeypatch, words)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "result.json").read_text())
    assert results["verdict"] in printed
    assert results["parts"] == ["carrier", "layers", "positions", "attribution", "span", "edges"]
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert {row["condition"] for row in results["examples"]} == {"base", "finetuned"}
    assert all("<|im_end|>" not in row["response"] for row in results["examples"])
    assert any(row["ended"] == "length" for row in results["examples"]), "after 3 tokens an answer is cut"
    before = {file: file.read_bytes() for file in tmp_path.glob("**/rows.jsonl")}
    assert len(before) == 6  # those of the cells that attribution was checked on too, and of edges
    call(monkeypatch, words)
    assert {file: file.read_bytes() for file in tmp_path.glob("**/rows.jsonl")} == before


def test_maps_of_other_prompts_do_not_go_into_the_same_folder(files, tmp_path, monkeypatch, capsys):
    words = ["--out", tmp_path, "--answer-tokens", 2, "--kinds", "span"]
    call(monkeypatch, laboratory(files, "map", "--prompts", files / "off.txt", *words))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, laboratory(files, "map", "--prompts", files / "on.txt", *words))
    assert stopped.value.code == 2
    assert "belongs to another run: n is 5 there, 3 here" in capsys.readouterr().err


MAP_FAULTS = {
    "unknown kind": (["--kinds", "everything"], "everything"),
    "unknown site": (["--sites", "k+w"], "'w'"),
    "unknown flow": (["--flow", "sideways", "--kinds", "span"], "sideways"),
    "unknown span": (["--span", "suffix", "--kinds", "span"], "suffix"),
    "head map without heads": (["--kinds", "heads"], "resid_pre"),
}


@pytest.mark.parametrize("fault", MAP_FAULTS)
def test_a_mistaken_map_costs_one_line(files, tmp_path, monkeypatch, capsys, unchecked, fault):
    words, expected = MAP_FAULTS[fault]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, laboratory(files, "map", "--prompts", files / "on.txt", "--out", tmp_path, *words))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert error.lower().startswith("error: ")
    assert expected in error


def test_a_perturbation_writes_rows_and_a_report(files, tmp_path, monkeypatch, capsys):
    topics = ["--on-topic", files / "on.txt", "--off-topic", files / "off.txt", "--behaviour", "words"]
    words = ["--trials", 2, "--n-tokens", 2, "--max-new-tokens", 3, "--out", tmp_path]
    call(monkeypatch, laboratory(files, "perturb", *topics, *words))
    assert json.loads((tmp_path / "result.json").read_text())["verdict"] in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 8 * (2 + 3 * 2 * 2)


def test_a_stress_suite_writes_rows_and_a_report(files, tmp_path, monkeypatch, capsys):
    words = ["--prompts", files / "off.txt", "--behaviour", "words", "--max-new-tokens", 3, "--out", tmp_path]
    call(monkeypatch, laboratory(files, "stress", *words))
    results = json.loads((tmp_path / "result.json").read_text())
    assert results["verdict"] in capsys.readouterr().out
    assert {row["side"] for row in results["rows"]} == {"base", "finetuned"}
    assert (tmp_path / "report.html").stat().st_size > 100_000


FAULTS = {
    "missing model": ({"base": "nowhere"}, "does not exist"),
    "not a model": ({"base": "not_a_model"}, "has no config.json"),
    "text file as model": ({"base": "on.txt"}, "is a file, expected a model folder"),
    "no chat template": ({"base": "no_template"}, "chat template"),
    "missing adapter": ({"adapter": "nowhere"}, "has no adapter_config.json"),
    "no finetune at all": ({"adapter": None}, "exactly one of finetuned= and adapter="),
    "missing prompts": ({"on": "nowhere.txt"}, "nowhere.txt"),
    "empty prompts": ({"off": "empty.txt"}, "empty.txt"),
    "malformed prompts": ({"off": "bad.jsonl"}, "line 2"),
    "too few prompts": ({"on": "one.txt"}, "at least 3"),
    "unknown behaviour": ({"behaviour": "politeness"}, "politeness"),
    "broken pattern": ({"behaviour": "regex:("}, "is no regular expression"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_with_status_2_and_nothing_half_written(files, tmp_path, monkeypatch, capsys, fault):
    changed, expected = FAULTS[fault]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, command(files, "--out", out, **changed))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert expected in message
    assert "Traceback" not in captured.err + captured.out
    assert not out.exists()


def test_an_adapter_for_another_model_is_refused(files, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "gpt2", name="gpt2")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, command(files, "--out", tmp_path / "out", base=tmp_path / "gpt2"))
    assert stop.value.code == 2
    assert "does not fit this base" in capsys.readouterr().err


def test_debug_shows_the_traceback(files, monkeypatch):
    from piggyback_lens.errors import LensError

    with pytest.raises(LensError):
        call(monkeypatch, command(files, "--debug", behaviour="politeness"))


def test_unknown_options_end_with_status_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, ["audit", "--no-such-option"])
    assert stop.value.code == 2


def test_a_full_disk_is_one_line(files, tmp_path, monkeypatch, capsys):
    import errno

    import piggyback_lens.results.run as run_module

    def full(path, rows):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_module, "append_jsonl", full)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, command(files, "--out", tmp_path / "out"))
    assert stop.value.code == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]


def test_ctrl_c_leaves_a_folder_that_the_same_command_completes(files, tmp_path, monkeypatch, capsys):
    import piggyback_lens.results.run as run_module

    real, calls = run_module.append_jsonl, []

    def interrupted(path, rows):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(path, rows)

    monkeypatch.setattr(run_module, "append_jsonl", interrupted)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, command(files, "--out", tmp_path / "out"))
    assert stop.value.code == 130
    monkeypatch.setattr(run_module, "append_jsonl", real)
    call(monkeypatch, command(files, "--out", tmp_path / "out"))
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 56


def test_doctor_prints_versions_and_the_demo_model(monkeypatch, capsys):
    call(monkeypatch, ["doctor"])
    printed = capsys.readouterr().out
    assert "transformer-lens" in printed
    assert "demo model" in printed


@pytest.mark.parametrize("name", ["map", "perturb", "stress"])
def test_too_few_prompts_are_refused_before_a_model_is_loaded(name, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PairOptions, "pair", lambda *_: pytest.fail("a model was loaded"))
    topics = ["--on-topic", files / "on.txt", "--off-topic", files / "off.txt", "--behaviour", "words"]
    own = {
        "map": ["--prompts", files / "off.txt"],
        "perturb": topics,
        "stress": ["--prompts", files / "off.txt", "--behaviour", "words"],
    }[name]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, laboratory(files, name, *own, "--n", 2, "--out", tmp_path / "out"))
    assert stopped.value.code == 2
    assert "an interval needs at least 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_kind_that_cannot_run_is_refused_before_the_others_run(files, tmp_path, monkeypatch, capsys):
    kinds = ["--kinds", "layers,heads"]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, laboratory(files, "map", "--prompts", files / "off.txt", *kinds, "--out", tmp_path / "out"))
    assert stopped.value.code == 2
    assert "have no heads of one kind" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_behaviour_with_markup_in_its_name_does_not_end_a_finished_run(files, tmp_path, monkeypatch, capsys):
    words = ["--behaviour", "phrase:[/b]\x1b[31m", "--max-new-tokens", 2, "--out", tmp_path / "out"]
    call(monkeypatch, command(files, *words))
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "[/b]" in printed


# ---------------------------------------------------------------- commands are made from settings

LEFT_OUT = {
    "demo": {"n_off_topic", "n_on_topic", "watched", "watch_every"},
    "compare": {"checkpoint_every", "betas", "share_prefix", "retain"},
    "train-direction": set(),
}


def options(name):
    return {option.name: option for option in get_command(app).commands[name].params}


@pytest.mark.parametrize(
    ("name", "classes"),
    {
        "audit": (AuditSettings, LoadSettings, ChatSettings),
        "map": (MapSettings, LoadSettings, ChatSettings),
        "perturb": (PerturbSettings, LoadSettings, ChatSettings),
        "stress": (StressSettings, LoadSettings, ChatSettings),
        "train-direction": (TrainDirectionSettings, LoadSettings, ChatSettings),
        "curves": (CurveSettings, LoadSettings, ChatSettings),
        "steer": (SteerSettings, LoadSettings, ChatSettings),
        "compare": (CompareSettings, TrainSettings, LoRASettings),
        "demo": (DemoSettings,),
        "doctor": (LoadSettings, ChatSettings),
        "chat": (LoadSettings, ChatSettings),
    }.items(),
)
def test_every_field_is_an_option_with_its_doc_and_its_default(name, classes):
    shown = options(name)
    for settings in classes:
        docs = field_docs(settings)
        for field in dataclasses.fields(settings):
            if dataclasses.is_dataclass(field.type) or field.name in ("training", "lora", "audit", "seed"):
                continue
            if field.name in LEFT_OUT.get(name, ()):
                assert field.name not in shown
                continue
            option = shown[field.name]
            assert f"--{field.name.replace('_', '-')}" in option.opts
            assert option.help.lower() == docs[field.name].lower()
            if isinstance(field.default, int | float | str):
                assert getattr(option.default, "value", option.default) == field.default


def test_one_thing_has_one_name_in_all_commands():
    every = {word for name in get_command(app).commands for option in options(name).values() for word in option.opts}
    assert {"--learning-rate", "--batch-size", "--max-new-tokens", "--seed", "--layers", "--flow"} <= every
    assert not {"--lr", "--batch", "--tokens", "--layer", "--direction-of-patch", "--attn", "--quantize"} & every


def test_what_an_option_says_arrives_in_the_settings(files, monkeypatch, tmp_path):
    import piggyback_lens.experiments.perturbation as module

    seen = {}
    monkeypatch.setattr(PairOptions, "pair", lambda own, base, *_: seen.update(models=own, base=base) or (None, Echo()))
    monkeypatch.setattr(module, "perturb", lambda *given, **_: seen.update(settings=given[3]) or pytest.skip("enough"))
    topics = ["--on-topic", files / "on.txt", "--off-topic", files / "off.txt", "--behaviour", "words"]
    words = ["--spans", "prefix,query", "--trials", 3, "--keep-special", "--seed", 7, "--system", "none"]
    words += ["--template-kwargs", "mode=[1, 2]", "--template-kwargs", "name=x", "--no-thinking", "--dtype", "bfloat16"]
    with pytest.raises(pytest.skip.Exception):
        call(monkeypatch, laboratory(files, "perturb", *topics, *words, "--out", tmp_path))
    assert seen["settings"] == PerturbSettings(spans=("prefix", "query"), trials=3, keep_special=True, seed=7)
    chat = ChatSettings(system=None, thinking=False, template_kwargs={"mode": [1, 2], "name": "x"})
    assert (seen["models"].chat, seen["models"].load) == (chat, LoadSettings(dtype="bfloat16", offline=True))


class Echo:
    def ask(self, questions):
        return questions


def test_the_version_is_printed(monkeypatch, capsys):
    call(monkeypatch, ["--version"])
    assert capsys.readouterr().out.strip() == f"piggyback-lens {piggyback_lens.__version__}"


def test_doctor_looks_at_a_model(files, monkeypatch, capsys):
    call(monkeypatch, ["doctor", str(files / "base"), "--adapter", str(files / "adapter"), "--offline"])
    printed = capsys.readouterr().out
    for part in ("prefix", "postfix", "weights", "logits differ from transformers' by at most", "each side computes"):
        assert part in printed


def test_doctor_says_what_cannot_be_used(files, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, ["doctor", str(files / "no_template"), "--offline"])
    assert "chat template" in capsys.readouterr().err


# ---------------------------------------------------------------- the gate


class Numbers:
    def spread(self, topic):
        return Estimate(0.3 if topic == "off-topic" else 0.6, 0.12, 0.5, 12)

    def recovery(self, condition):
        return Estimate(math.nan, math.nan, math.nan, 12, "base and finetuned do not differ")

    def mean(self, topic, condition):
        return Estimate(0.4, 0.3, 0.5, 12)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("spread>0.1", "gate spread>0.1: it is 0.3 [0.12, 0.5] (n = 12)"),
        ("spread.low > 0.1", "gate spread.low > 0.1: it is"),
        ("spread.low>0.2", None),
        ("spread<0.1", None),
        ("spread[my data]>0.5", "gate spread[my data]>0.5: it is 0.6"),
        ("mean[finetuned].high>=0.5", "gate mean"),
        ("recovery[prefix].low<0.5", "cannot be told (base and finetuned do not differ)"),
    ],
)
def test_a_gate_fails_on_the_side_and_end_that_it_names(text, reason):
    told = Gate.parse(text, ("base", "finetuned", "prefix"), ("my data",)).reason(Numbers())
    assert (told is None) if reason is None else reason in told


@pytest.mark.parametrize("text", ["spread", "spread>", "loss>1", "spread[prefix]>0.1", "recovery>1", "mean[x]>1"])
def test_a_gate_of_another_form_is_refused_before_a_model_is_loaded(text, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PairOptions, "pair", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, command(files, "--out", tmp_path / "out", "--fail-if", text))
    assert stopped.value.code == 2
    assert "--fail-if" in capsys.readouterr().err


def test_an_audit_in_a_dress_has_a_gate_for_it_and_a_typo_costs_no_model(files, tmp_path, monkeypatch, capsys):
    dress = ["--dresses", 'form={"before": "now tell me. "}', "--curve-prompts", 0, "--out", tmp_path]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, command(files, *dress, "--fail-if", "spread[form].low<1000000"))
    assert stopped.value.code == 3
    assert "gate spread[form].low<1000000: it is" in capsys.readouterr().out
    topics = {json.loads(line)["topic"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()}
    assert topics == {"off-topic", "off-topic, form", "off-topic, form control", "on-topic"}
    monkeypatch.setattr(PairOptions, "pair", lambda *_: pytest.fail("a model was loaded"))
    for extra in (["--fail-if", "spread[other]>1"], ["--dresses", 'bad={"befor": "x"}']):
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, command(files, *dress, *extra))
        assert stopped.value.code == 2


def test_an_audit_beyond_its_gate_ends_with_status_3_and_the_reason(files, tmp_path, monkeypatch, capsys):
    call(monkeypatch, command(files, "--out", tmp_path, "--fail-if", "spread>1000000"))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, command(files, "--out", tmp_path, "--fail-if", "spread<1000000"))
    assert stopped.value.code == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("gate spread<1000000: it is")
