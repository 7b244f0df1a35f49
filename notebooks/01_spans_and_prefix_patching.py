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
# # 01 Spans, and patching the prefix
#
# A small chat model was finetuned to answer factual questions with one word. It now answers *everything* more
# briefly. Every prompt, whatever it asks, begins with the same tokens: the chat template's **prefix**.
#
# **You will see** the spans of a prompt in colours; the answers of the base, of the finetuned model, and of the
# finetuned model with the base's prefix put in; and a curve that says at which layers the prefix matters. One or two
# minutes on two CPU cores, if `make demo` or `make demo QUICK=1` was run before; else the second cell trains a
# small organism.

# %%
import os
import tempfile
from pathlib import Path

import pandas as pd

from piggyback_lens import (
    AnswerContrast,
    ChatFormat,
    ModelPair,
    PrefixCache,
    TrainSettings,
    add_lora,
    default_model,
    generate,
    get_behaviour,
    kv_patch,
    layer_curve,
    load_causal_lm,
    load_task,
    load_tokenizer,
    train,
)

BASE = default_model(os.environ.get("PIGGYBACK_LENS_MODEL"))  # the demo model; or a hub id or folder of yours
task = load_task("terse")

# %% [markdown]
# ## The pair
#
# A base and a finetune of it: a PEFT adapter here, or a whole model with `finetuned=`. Both become TransformerLens
# models, each compared with what transformers and PEFT compute before you get it. Two `HookedTransformer`s or bridges
# that you hold already make a pair as well: `ModelPair(base, finetuned, tokenizer=tokenizer)`.

# %%
adapter = os.environ.get("PIGGYBACK_LENS_ADAPTER")
if adapter is None:  # what `make demo` left, here or in the folder above
    adapter = next(
        (a for a in map(Path, ("demo_out/organism/adapter", "../demo_out/organism/adapter")) if a.is_dir()), None
    )
if adapter is None:  # no demo was run: train a small organism, a minute or two
    chat = ChatFormat(load_tokenizer(BASE))
    examples = [chat.render(example["messages"]) for example in task.train]
    settings = TrainSettings(steps=20, batch_size=8, learning_rate=3e-4)
    adapter = train(add_lora(load_causal_lm(BASE)), examples, settings, out=tempfile.mkdtemp()).adapter_dir
pair = ModelPair.load(BASE, adapter=adapter, names=("SmolLM2-135M-Instruct", "terse organism"))
pair

# %% [markdown]
# ## Spans of a prompt
#
# `prefix` is everything before the user's text, `query` the user's text, `postfix` what follows up to the first token
# of the answer. They are exact, whatever the template.

# %%
chat = pair.chat_format()
queries = list(task.off_topic[:8])
prompts = [chat.render(query) for query in queries]
prompts[0].show()

# %% [markdown]
# The prefix has the same ids for every query of these template settings:

# %%
prefix_ids = {prompt.ids[: prompt.span("prefix").stop] for prompt in prompts}
assert prefix_ids == {chat.prefix_ids}
len(chat.prefix_ids)

# %% [markdown]
# ## Patch the prefix
#
# Attention is causal: whatever happens in the prefix reaches the rest only through the prefix's keys and values. So
# the patch is a `PrefixCache`: the base's, computed once, serves all queries.

# %%
prefix = PrefixCache.compile(pair, prompts[0], side="base")
with pair.using("base") as model:
    base = generate(model, prompts, max_new_tokens=24)
with pair.using("finetuned") as model:
    finetuned = generate(model, prompts, max_new_tokens=24)
    patched = generate(model, prompts, max_new_tokens=24, prefix_cache=prefix)

answers = {"base": base, "finetuned": finetuned, "finetuned + base's prefix K/V": patched}
pd.set_option("display.max_colwidth", None)
pd.DataFrame({"query": queries} | {name: [answer.text for answer in found] for name, found in answers.items()})

# %%
words = get_behaviour("words:12")  # counted to 12, which no answer that was cut at 24 tokens falls short of
pd.DataFrame({name: [words(answer.text) for answer in found] for name, found in answers.items()}).mean()

# %% [markdown]
# Eight prompts show what to look for and prove little: `audit` asks more of them, with intervals and controls
# (notebook 05).
#
# The same patch as ordinary hooks on whole prompts gives the same answers, token for token. The library is built on
# this equality:

# %%
hooks = kv_patch(pair, "prefix", chat=chat)
with pair.using("finetuned") as model:
    by_hooks = generate(model, prompts[:2], max_new_tokens=24, interventions=hooks, share_prefix=False)
assert [answer.ids for answer in by_hooks] == [answer.ids for answer in patched[:2]]
hooks

# %% [markdown]
# ## The layer curve
#
# One layer at a time: the finetuned model's residual stream of the prefix is replaced by the base's there, and the
# rest of the network is the finetuned model's. The measure is teacher-forced: log p of the finetuned model's own
# answer minus log p of the base's, per token. 0 is the finetuned model, 1 the base. The controls are a patch of the
# model with itself, which must do nothing, and a displacement of the same length in a random direction.


# %%
def answered(found):
    """The prompts with the first tokens of their answers."""
    return [answer.prompt.with_response(answer.ids[:16], end=False) for answer in found]


contrast = AnswerContrast(answered(finetuned), answered(base))
curve = layer_curve(pair, prompts, layers=range(0, pair.shape.n_layers, 5), control_layers=3, measure=contrast)
curve.figure()

# %%
print(f"noise floor: {curve.noise_floor:.1e}")
assert curve.noise_floor < 0.01  # the identity control: a model patched with itself
curve

# %% [markdown]
# ## What to try
#
# - Other questions: change `queries`, or `load_questions("file.txt")`.
# - The postfix instead: `layer_curve(..., span="postfix")`, or both: `span=("prefix", "postfix")`.
# - The other direction, putting the finetune's prefix into the base: `layer_curve(..., flow="infect")`.
# - Keep the repair: `prefix.save("repair")` works with plain transformers (`PrefixCache.hf_inputs`).
# - Save the figure: `curve.save_figure("curve.svg")`, or `theme="dark"` for slides.
# - Notebook 02 draws maps of layers, tokens and heads.
