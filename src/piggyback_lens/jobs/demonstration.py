"""The demonstration: train a narrow organism on the demo model, then audit it."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.monitor import Monitor
from piggyback_lens.finetuning.trainables import LoRASettings, add_lora
from piggyback_lens.finetuning.training import TrainResult, TrainSettings, train
from piggyback_lens.jobs.auditing import AuditResult, AuditSettings, audit
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.backends import Backend
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer
from piggyback_lens.progress import say
from piggyback_lens.tasks import Task, answer_if_spread, load_task


@dataclass(frozen=True)
class DemoSettings:
    """What `piggyback-lens demo` runs."""

    task: str = "terse"
    n_off_topic: int = 40  # off-topic prompts
    n_on_topic: int = 24  # on-topic prompts, held out from training
    training: TrainSettings = field(default_factory=TrainSettings)
    lora: LoRASettings = field(default_factory=LoRASettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    watched: int = 8  # off-topic validation prompts on which the training is watched
    watch_every: int = 10  # steps between two measurements


FULL = DemoSettings()
QUICK = replace(
    FULL,
    n_off_topic=16,
    n_on_topic=8,
    training=TrainSettings(steps=32, batch_size=12, learning_rate=2e-4),
    audit=AuditSettings(max_new_tokens=32, curve_prompts=6, curve_tokens=8, control_layers=3),
    watched=6,
    watch_every=8,
)

MONITOR_FILE = "monitor.jsonl"
PROBES_FILE = "probes.json"
PROBE_TOKENS = 32
"""Of the base's answers, which the monitor holds against answers that show the behaviour."""


def demo(
    settings: DemoSettings = FULL,
    *,
    out: str | Path,
    model: str | Path | None = None,
    backend: Backend = "bridge",
    offline: bool = False,
    progress: bool = True,
) -> tuple[AuditResult, TrainResult]:
    """Train a LoRA organism on one task, then audit it; resumes in the same folder.

    Args:
        settings: task, sizes and knobs; `FULL` or `QUICK`.
        out: folder; training goes to `out/organism`, the audit beside it.
        model: demo model to use; default `default_model()`.
        backend: "bridge" or "hooked".
        offline: make no connection.
        progress: show progress bars.
    """
    task = load_task(settings.task)
    source = default_model(model, offline=offline)
    out = Path(out)
    started = time.monotonic()
    if progress:
        say(f"training the {task.name} organism: {settings.training.steps} steps on {len(task.train)} conversations")
    tokenizer = load_tokenizer(source, offline=offline)
    loaded = load_causal_lm(source, offline=offline, device="cuda" if torch.cuda.is_available() else "cpu")
    organism, trained = train_organism(loaded, tokenizer, task, settings, out=out / "organism", progress=progress)
    training_seconds = round(time.monotonic() - started, 1)
    names = (_shown(source), f"{task.name} organism")
    pair = ModelPair.load(finetuned=organism, tokenizer=tokenizer, backend=backend, names=names)
    extra = {"task": task.name, "training": asdict(settings.training), "lora": asdict(settings.lora)}
    result = audit(
        pair,
        task.on_topic[: settings.n_on_topic],
        task.off_topic[: settings.n_off_topic],
        task.behaviour,
        settings=settings.audit,
        out=out,
        progress=progress,
        extra_card={**extra, "training_seconds": training_seconds},
    )
    return result, trained


def monitor_file(out: str | Path) -> Path:
    """Where a demonstration in `out` writes what it sees while training."""
    return Path(out) / "organism" / MONITOR_FILE


def train_organism(
    model: nn.Module, tokenizer: Any, task: Task, settings: DemoSettings, *, out: Path, progress: bool
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


def _shown(source: str) -> str:
    """Name for figures: without what the conversion of a GGUF file appends."""
    return Path(source).name.split(".Q")[0]


def _messages(example: Mapping[str, Any]) -> list[dict[str, str]]:
    return [dict(message) for message in example["messages"]]
