# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 TReFT in your own trainer
#
# Token-regularised finetuning (arXiv:2606.06667) holds the keys and values of the template's prefix to the base's
# while a model is finetuned, so that the prefix cannot carry the new behaviour to other questions. `PenaltyTrainer`
# is `transformers.Trainer` with such penalties; your collator, arguments and callbacks stay as they are.
#
# **You will see** the same short LoRA finetune twice, plain and with TReFT: loss, how far the prefix has moved, and
# what both answer on and off the topic. Two minutes on two CPU cores, and far too few steps to judge the method: see
# docs/treft_smollm2.md for that.

# %%
import os
import tempfile

import pandas as pd

from piggyback_lens import (
    ChatFormat,
    LoRASettings,
    Penalised,
    PenaltyTrainer,
    TReFT,
    Weighted,
    add_lora,
    default_model,
    generate,
    hook_model,
    load_causal_lm,
    load_task,
    load_tokenizer,
)

STEPS = int(os.environ.get("PIGGYBACK_LENS_STEPS", "12"))
source = default_model(os.environ.get("PIGGYBACK_LENS_MODEL"))
tokenizer = load_tokenizer(source)
chat = ChatFormat(tokenizer)  # the template settings of your data: every row has to begin with their prefix
task = load_task("terse")

# %% [markdown]
# ## Rows as any Trainer takes them
#
# Token ids, and labels of -100 where nothing is trained. Rows of your own pipeline do as well.

# %%
examples = [chat.render(example["messages"]) for example in task.train]
rows = [{"input_ids": list(e.ids), "labels": [-100] * e.n_prompt + list(e.ids[e.n_prompt :])} for e in examples]
examples[0].show()


# %% [markdown]
# ## The same finetune, with a weight of next to nothing and of 30
#
# `Weighted(TReFT(reference="template"), weight)` is the whole difference. Its reference, the base's keys and values
# of the prefix, is computed before the first step. `drift` is the penalty before its weight: the mean over layers of
# the relative squared distance of keys plus that of values.


# %%
from transformers import DataCollatorForSeq2Seq, TrainingArguments


def finetune(weight):
    """A LoRA finetune through the Trainer; the model, and what the Trainer logged."""
    model = add_lora(load_causal_lm(source), LoRASettings(rank=8), seed=0)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,  # of use on a GPU only
    )
    trainer = PenaltyTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        objective=Penalised((Weighted(TReFT(reference="template"), weight),)),
        prompt=chat.empty_query(),
    )
    trainer.train()
    return model.eval(), [row for row in trainer.state.log_history if "loss" in row]


tuned = {name: finetune(weight) for name, weight in {"almost plain": 1e-6, "TReFT": 30.0}.items()}

# %% [markdown]
# ## How far the prefix has moved

# %%
logs = {name: pd.DataFrame(log).set_index("epoch")[["loss", "drift_prefix"]] for name, (_, log) in tuned.items()}
moved = {name: float(log["drift_prefix"].iloc[-1]) for name, log in logs.items()}
print(f"the prefix moved by {moved['almost plain']:.2e}, with TReFT by {moved['TReFT']:.2e}")
pd.concat(logs, axis=1).tail(5).round(5)

# %% [markdown]
# ## What both answer
#
# On the topic, then off it. A PEFT model becomes a hooked one as it is.

# %%
queries = [task.on_topic[0], task.on_topic[1], task.off_topic[0], task.off_topic[1]]
prompts = [chat.render(query) for query in queries]
answers = {}
for name, (model, _) in tuned.items():
    found = generate(hook_model(model, tokenizer), prompts, max_new_tokens=16)
    answers[name] = [answer.text for answer in found]
pd.set_option("display.max_colwidth", None)
pd.DataFrame({"query": queries} | answers)

# %% [markdown]
# ## What to try
#
# - Your own data: `load_conversations("train.jsonl")`, and your own arguments; `save_strategy="steps"` keeps the
#   reference in every checkpoint.
# - Other penalties beside it: `Weighted(KLOnRetain(retain), 1.0)` with conversations on which the model should stay
#   as it was.
# - The postfix, or both: `TReFT("postfix", "template")`.
# - Watch the spread while it trains: `trainer.add_callback(Monitor(model, towards, against).callback(trainer))`.
# - The library's own loop, where the prefix is computed once per batch: `train(model, examples, objective=...)`.
# - Rivals on equal terms: `compare_methods("demo", "terse", ["sft", "treft:lambda=30", "kl_retain:lambda=1"],
#   out="compare")`.
