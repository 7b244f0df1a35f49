"""Finetune a chat model with TReFT through the transformers Trainer.

    python train.py config.toml [section.key=value ...]
    accelerate launch --config_file fsdp.yaml train.py config.toml model.tuning=full model.dtype=float32

The finished adapter or model is saved into `training.output_dir`; a run that is started again resumes from its
last checkpoint.
"""

import json
import sys
import tomllib
from pathlib import Path

from transformers import DataCollatorForSeq2Seq, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from piggyback_lens import (
    ChatFormat,
    LoadSettings,
    LoRASettings,
    Monitor,
    Penalised,
    PenaltyTrainer,
    TReFT,
    Weighted,
    add_lora,
    load_causal_lm,
    load_conversations,
    load_tokenizer,
)
from piggyback_lens.files import read_jsonl
from piggyback_lens.finetuning.hf_trainer import training_rows


def read_config(path, changes):
    config = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    for change in changes:
        name, _, text = change.partition("=")
        section, _, key = name.partition(".")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        config.setdefault(section, {})[key] = value
    return config


def load_model(config):
    settings = config["model"]
    load = LoadSettings(dtype=settings["dtype"], quantization=settings.get("quantization"))
    model = load_causal_lm(settings["base"], load)
    if settings["tuning"] == "full":
        return model
    adapted = add_lora(model, LoRASettings(**config.get("lora", {})), seed=config["training"].get("seed", 0))
    adapted.enable_input_require_grads()  # activation checkpointing of a frozen base needs an input with gradient
    return adapted


def load_examples(config, chat):
    examples = [chat.render(example["messages"]) for example in load_conversations(config["data"]["train"])]
    kept = [example for example in examples if len(example) <= config["data"]["max_tokens"]]
    print(f"{len(kept)} of {len(examples)} conversations have at most {config['data']['max_tokens']} tokens")
    return kept


def add_monitor(trainer, chat, settings, out):
    rows = read_jsonl(settings["probes"])
    towards, against = (
        [chat.render(row["prompt"], response=row[side]) for row in rows] for side in ("towards", "against")
    )
    monitor = Monitor(trainer.model, towards, against, every=settings["every"], out=Path(out) / "monitor.jsonl")
    trainer.add_callback(monitor.callback(trainer))
    return monitor


def objective_of(settings):
    how = dict(settings)
    own = how.pop("reference", "template") == "own"
    return Penalised((Weighted(TReFT(how.pop("span", "prefix"), None if own else "template"), **how),))


def save_whole(trainer):
    """One finished model. Checkpoints may be sharded, but of a sharded state `save_model` writes nothing."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def main(path, *changes):
    config = read_config(path, changes)
    arguments = TrainingArguments(**config["training"], remove_unused_columns=False)
    tokenizer = load_tokenizer(config["model"]["base"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chat = ChatFormat(tokenizer, **config["chat"])
    trainer = PenaltyTrainer(
        model=load_model(config),
        args=arguments,
        train_dataset=training_rows(load_examples(config, chat)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        objective=objective_of(config["treft"]),
        prompt=chat.empty_query(),
    )
    monitor = add_monitor(trainer, chat, config["monitor"], arguments.output_dir) if "monitor" in config else None
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    save_whole(trainer)
    if monitor is not None and trainer.is_world_process_zero() and monitor.rows:
        monitor.figure().write_html(Path(arguments.output_dir) / "monitor.html")
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
