"""The configurations of examples/treft_8b: what they need fits their cards, and both start on a tiny model."""

import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_chat import tiny_tokenizer
from transformers import LlamaConfig, Qwen2Config

from piggyback_lens.app.memory import Sizes, plan
from piggyback_lens.app.options import Work

FOLDER = Path(__file__).parents[1] / "examples" / "treft_8b"


SHAPES = {
    "config.toml": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    ),
    "config_14b_4bit.toml": Qwen2Config(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
        vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Of the bases of the two configurations, as their config.json says."""


@pytest.mark.parametrize(
    ("config", "card", "weights"), [("config.toml", 80, "bfloat16"), ("config_14b_4bit.toml", 24, "4bit")]
)
def test_a_configuration_fits_its_card_and_the_readme_says_so(config: str, card: int, weights: str) -> None:
    chosen = tomllib.loads((FOLDER / config).read_text(encoding="utf-8"))
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert chosen["training"]["activation_checkpointing"]
    sizes = {
        "batch_size": chosen["training"]["per_device_train_batch_size"],
        "row_tokens": chosen["data"]["max_tokens"],
    }
    work = Work(memory_gb=float(card), rank=chosen["lora"]["rank"], **sizes)
    lines = list(plan(Sizes.of(SHAPES[config], work), work, 1e9 * card, 1))
    at = next(i for i, (name, _) in enumerate(lines) if name == f"{weights} weights")
    shown = (lines[at], next(line for line in lines[at:] if line[0].strip() == "training"))
    assert all(line.endswith(", fits") for _, line in shown)
    told = "\n".join(f"{name:18} {line}" for name, line in shown)
    assert told in readme, told
    command = f"{chosen['model']['base']} --memory-gb {card} --rank {work.rank} --batch-size {work.batch_size}"
    assert f"piggyback-lens doctor {command} --row-tokens {work.row_tokens}" in readme


def test_the_14b_configuration_starts_on_a_tiny_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    if not hasattr(__import__("transformers").TrainingArguments, "activation_checkpointing"):
        pytest.skip("the configuration has names of transformers 5.23")
    spec = importlib.util.spec_from_file_location("treft_14b", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tokenizer = tiny_tokenizer()
    tiny_models.build("llama-gqa", vocab=len(tokenizer), **small).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    talk = [{"role": role, "content": text} for role, text in (("user", "hi you"), ("assistant", "oink"))]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(40)))
    probe = {"prompt": "what", "towards": "oink", "against": "well"}
    (tmp_path / "probes.jsonl").write_text(json.dumps(probe) + "\n" + json.dumps({**probe, "prompt": "who"}))
    changes = [
        f"model.base={tmp_path / 'base'}", "lora.rank=2", "chat.system=be kind.", "monitor.every=1",
        f"data.train={tmp_path / 'train.jsonl'}", f"monitor.probes={tmp_path / 'probes.jsonl'}",
        f"training.output_dir={tmp_path / 'run'}", "training.max_steps=3", "training.use_cpu=true",
        "training.gradient_accumulation_steps=2", "training.warmup_steps=0",
        "training.learning_rate=0.01", "training.disable_tqdm=true",
    ]  # fmt: skip
    trainer = script.main(FOLDER / "config_14b_4bit.toml", *changes)
    assert trainer.model.base_model.model.is_loaded_in_4bit
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
