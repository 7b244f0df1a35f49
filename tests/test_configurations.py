"""The configurations of examples/treft_8b: what they need fits their cards, and both start on a tiny model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_chat import tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "examples" / "treft_8b"


@pytest.mark.parametrize(("config", "card"), [("config.toml", 80), ("config_14b_4bit.toml", 24)])
def test_a_configuration_fits_its_card_and_the_readme_has_its_table(config: str, card: int) -> None:
    ran = subprocess.run([sys.executable, "memory.py", config], cwd=FOLDER, capture_output=True, text=True, check=True)
    rows = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    parts = [float(row.split("|")[2]) for row in rows[2:]]
    assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.5)
    assert parts[-1] < 0.8 * card
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(row in readme for row in rows)


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
