"""The demonstration: train a narrow organism on the demo model, then audit it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.experiments.audit import AuditResult, audit
from piggyback_lens.figures.monitor_plot import monitor_figure
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.monitor import Monitor, load_monitor
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import TrainResult, train
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer, source_name
from piggyback_lens.progress import say_stage, shows
from piggyback_lens.reading.tasks import Task, answer_if_spread, load_task
from piggyback_lens.results.report import Part
from piggyback_lens.results.run import report_run
from piggyback_lens.settings import DemoSettings, LoadSettings
from piggyback_lens.words import Backend

MONITOR_FILE = "monitor.jsonl"
DEMO_FILE = "demo.json"
"""Task and training of the organism, beside the audit's own files."""
WATCHED = (
    "The training, watched on off-topic prompts that are not used elsewhere: how much more probable an answer that "
    "shows the behaviour has become, against the base's own answer; how much of that goes away when the base's prefix "
    "keys and values are put in; and how far those of each layer have moved (TReFT's measure)."
)
PROBES_FILE = "probes.json"
PROBE_TOKENS = 32
"""Of the base's answers, which the monitor holds against answers that show the behaviour."""


@shows("demo")
def demo(
    settings: DemoSettings = DemoSettings(),
    load: LoadSettings = LoadSettings(),
    *,
    out: str | Path,
    model: str | Path | None = None,
    backend: Backend = "bridge",
    progress: bool | str = True,
) -> tuple[AuditResult, TrainResult]:
    """Train a LoRA organism on one task, then audit it and write a report; resumes in the same folder.

    Args:
        settings: task, sizes, training and audit; `DemoSettings.quick()` for a few minutes on two cores.
        load: device, and whether connections may be made.
        out: folder; training goes to `out/organism`, the audit beside it.
        model: demo model to use; default `default_model()`.
        backend: "bridge" or "hooked".
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: what `train` and `audit` raise.
    """
    task, out = load_task(settings.task), Path(out)
    source = default_model(model, offline=load.offline)
    if progress:
        say_stage(
            f"training the {task.name} organism: {settings.training.steps} steps on {len(task.train)} conversations"
        )
    tokenizer, loaded = load_tokenizer(source, load), load_causal_lm(source, load)
    organism, trained = train_organism(loaded, tokenizer, task, settings, out=out / "organism", progress=progress)
    seconds = sum(float(row["seconds"]) for row in trained.history)  # a run that went on has those before too
    names = (source_name(source), f"{task.name} organism")
    pair = ModelPair.load(finetuned=organism, tokenizer=tokenizer, backend=backend, names=names)
    prompts = task.on_topic[: settings.n_on_topic], task.off_topic[: settings.n_off_topic]
    # Long answers are cut at the token limit: what is counted ends before it. A word is rarely three tokens long.
    most = max(1, settings.audit.max_new_tokens // 3)
    behaviour = f"words:{most}" if task.behaviour == "words" else task.behaviour
    result = audit(pair, *prompts, behaviour, settings.audit, out=out, progress=progress)
    about = {"task": task.name, "training": asdict(settings.training), "lora": asdict(settings.lora)}
    write_json(out / DEMO_FILE, about | {"training_seconds": seconds})
    figures = [("Training loss on response tokens.", trained.figure())]
    if monitor_file(out).exists():
        figures.append((WATCHED, monitor_figure(load_monitor(monitor_file(out)))))
    training = f"{settings.training.steps} steps on {len(task.train)} conversations, {seconds:.0f} seconds."
    report_run(out, parts=[Part("How the organism was trained", [training], figures=figures, folded=True)])
    return result, trained


def monitor_file(out: str | Path) -> Path:
    """Where a demonstration in `out` writes what it sees while training."""
    return Path(out) / "organism" / MONITOR_FILE


def train_organism(
    model: nn.Module, tokenizer: Any, task: Task, settings: DemoSettings, *, out: Path, progress: bool | str
) -> tuple[nn.Module, TrainResult]:
    """Finetune a LoRA adapter on the task's conversations, watched off-topic; the PEFT model, and how it went.

    The adapter lands in `out/adapter`, the monitor's rows in `out/monitor.jsonl`.
    """
    chat = ChatFormat(tokenizer)
    examples = [chat.render(_messages(example)) for example in task.train]
    towards, against = _probes(model, chat, task, settings.watched, out / PROBES_FILE)
    adapted = add_lora(model, settings.lora, seed=settings.training.seed)
    monitor = Monitor(adapted, towards, against, every=settings.watch_every, out=out / MONITOR_FILE)
    return adapted, train(adapted, examples, settings.training, on_step=monitor, out=out, progress=progress)


def _probes(
    model: Any, chat: ChatFormat, task: Task, n: int, file: Path
) -> tuple[list[RenderedPrompt], list[RenderedPrompt]]:
    """Off-topic validation prompts with an answer that shows the behaviour, and with the base's own; kept in a file."""
    prompts = [chat.render(text) for text in task.off_topic_validation[:n]]
    if not file.exists():
        own = generate(hook_model(model, chat.tokenizer), prompts, max_new_tokens=PROBE_TOKENS)
        shown = [answer_if_spread(task.name, p.query, a.text) for p, a in zip(prompts, own, strict=True)]
        write_json(file, {"towards": shown, "against": [list(answer.ids) for answer in own]})
    kept = read_json(file)
    towards = [chat.render(p.query, response=text) for p, text in zip(prompts, kept["towards"], strict=True)]
    return towards, [p.with_response(tuple(ids), end=False) for p, ids in zip(prompts, kept["against"], strict=True)]


def _messages(example: Mapping[str, Any]) -> list[dict[str, str]]:
    return [dict(message) for message in example["messages"]]
