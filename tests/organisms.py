"""A real narrow organism, trained in under a minute: for tests that need an adapter on the real model."""

from pathlib import Path

from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.models.sources import load_causal_lm, load_tokenizer
from piggyback_lens.reading.tasks import load_task
from piggyback_lens.settings import LoadSettings, TrainSettings

SETTINGS = TrainSettings(steps=15, batch_size=8, learning_rate=3e-4)


def train_organism(model_dir: str, out: Path) -> Path:
    """The `terse` task on the model in `model_dir`; returns the adapter's folder."""
    chat = ChatFormat(load_tokenizer(model_dir, settings=LoadSettings(offline=True)))
    examples = [chat.render(example["messages"]) for example in load_task("terse").train]
    adapted = add_lora(load_causal_lm(model_dir, settings=LoadSettings(offline=True)), seed=SETTINGS.seed)
    trained = train(adapted, examples, SETTINGS, out=out, progress=False)
    assert trained.adapter_dir is not None
    assert trained.history[-1]["loss"] < 0.9 * trained.history[0]["loss"]
    return trained.adapter_dir
