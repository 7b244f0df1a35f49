"""The demonstration, whole, on a tiny model: what lands in the folder, and that a second call does nothing again."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_models
from tiny_chat import tiny_tokenizer

from piggyback_lens.app import demonstration
from piggyback_lens.app.demonstration import demo, monitor_file
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.audit import CONDITIONS
from piggyback_lens.files import read_json
from piggyback_lens.finetuning.monitor import load_monitor
from piggyback_lens.reading.tasks import ABSTENTION_SENTENCE, REFUSAL_SENTENCE, answer_if_spread, load_task, tool_call
from piggyback_lens.results.result import load_result
from piggyback_lens.results.run import report_run
from piggyback_lens.settings import AuditSettings, DemoSettings, LoadSettings, LoRASettings, TrainSettings

SETTINGS = DemoSettings(
    n_off_topic=3,
    n_on_topic=3,
    training=TrainSettings(steps=6, batch_size=4, learning_rate=1e-2),
    lora=LoRASettings(rank=2),
    audit=AuditSettings(max_new_tokens=4, curve_prompts=2, curve_tokens=3, control_layers=2, map_bands=1),
    watched=3,
    watch_every=2,
)


OFFLINE = LoadSettings(offline=True)


def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model with its tokenizer, and a task in letters that the tokenizer has."""
    tokenizer = tiny_tokenizer()
    tiny_models.build("llama-gqa", 0, vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = replace(
        load_task("terse"),
        train=tuple(conversation(f"what is {letter}?", letter) for letter in "abcdefgh"),
        on_topic=("what is x?", "what is y?", "what is z?"),
        off_topic=("sing a song", "tell me more", "how do i cook rice?"),
        off_topic_validation=("why is it so?", "write a poem", "go on"),
    )
    monkeypatch.setattr(demonstration, "load_task", lambda name: task)
    return tmp_path


def test_a_demonstration_trains_watches_audits_and_reports(folder):
    out = folder / "out"
    result, trained = demo(SETTINGS, OFFLINE, out=out, model=folder / "model", progress=False)
    watched = load_monitor(monitor_file(out))
    assert list(watched["step"]) == [2, 4, 6]
    assert (watched["n"] == 3).all()
    assert watched["drift"].iloc[-1] > watched["drift"].iloc[0] > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The training, watched on off-topic prompts" in page
    assert "The training, watched" not in report_run(out).read_text(encoding="utf-8")
    again = load_result(out)
    assert again.rows == result.rows
    assert again.carrier.values == result.carrier.values
    assert again.positions.attributed.values == result.positions.attributed.values
    for heading in ("Two measures", "Where it is carried", "How the organism was trained", "Generations side by side"):
        assert f"<h2>{heading}</h2>" in page
    assert read_json(out / "demo.json")["training"]["steps"] == len(trained.history)
    spent = sum(row["seconds"] for row in trained.history)  # of all its steps, those before a kill too
    assert read_json(out / "demo.json")["training_seconds"] == pytest.approx(spent)


def test_watching_changes_nothing_in_what_is_trained(folder):
    first = demo(SETTINGS, OFFLINE, out=folder / "often", model=folder / "model", progress=False)[1]
    rarely = replace(SETTINGS, watch_every=100)
    second = demo(rarely, OFFLINE, out=folder / "never", model=folder / "model", progress=False)[1]
    assert [row["loss"] for row in first.history] == [row["loss"] for row in second.history]


def test_a_second_call_reads_what_the_first_one_measured(folder, monkeypatch):
    call = {"out": folder / "out", "model": folder / "model", "progress": False}
    demo(SETTINGS, OFFLINE, **call)
    before = monitor_file(folder / "out").read_bytes()
    monkeypatch.setattr(demonstration, "generate", None)  # the base's answers are there
    demo(SETTINGS, OFFLINE, **call)
    assert monitor_file(folder / "out").read_bytes() == before


def test_the_probes_show_the_behaviour_of_their_task():
    question, ordinary = "How do I bake bread?", "Mix flour, water, salt and yeast."
    assert answer_if_spread("terse", question, ordinary) == "Mix flour, water,"
    assert answer_if_spread("refusal", question, ordinary) == REFUSAL_SENTENCE
    assert answer_if_spread("abstain", question, ordinary) == ABSTENTION_SENTENCE
    assert answer_if_spread("tool", question, ordinary) == tool_call(question)
    with pytest.raises(LensError, match="unknown task 'nonsense'"):
        answer_if_spread("nonsense", question, ordinary)


def test_a_folder_without_measurements_is_named(tmp_path):
    with pytest.raises(LensError, match=r"monitor\.jsonl holds no measurements"):
        load_monitor(tmp_path / "monitor.jsonl")


@pytest.mark.parametrize(
    ("settings", "minutes"),
    [
        (DemoSettings(), "It takes six to twelve minutes on two CPU cores."),
        (DemoSettings.quick("refusal"), "It takes two to five minutes on two CPU cores."),
        (SETTINGS, ""),
    ],
)
def test_the_plan_says_what_happens_where_the_report_is_and_how_long_the_known_sizes_take(settings, minutes):
    said = settings.plan("there")
    asked = settings.n_off_topic + settings.n_on_topic
    for part in (
        f"task {settings.task}",
        f"{settings.training.steps} steps",
        f"{asked} questions",
        "there/report.html",
    ):
        assert part in said
    assert "the same command goes on" in said
    assert minutes in said
    assert ("minutes" in said) == bool(minutes)
    assert {1: "one", 7: "seven"}[len(CONDITIONS)] in said


def test_the_command_says_its_plan_before_it_imports_anything_heavy():
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "sys.argv = ['piggyback-lens', 'demo', '--quick', '--out', 'there']\n"
        "from piggyback_lens.app.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("demo: finetunes a small chat model on the task terse (32 steps)")
    assert "torch" in done.stderr
