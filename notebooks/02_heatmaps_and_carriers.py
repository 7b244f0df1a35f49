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
# # 02 Heatmaps: layers, tokens, heads, and who carries it
#
# The prefix carries part of a narrow finetune. Which of its tokens, at which layers, in which heads? And how much do
# the other spans carry?
#
# **You will see** a carrier map (which span, beside its controls), a map of layers and tokens by gradient with a
# sample of its cells checked exactly, exact patches of some cells, and the key/value heads. Two or three minutes on
# two CPU cores; every cell of a map is a patched run, and a bar says how long it takes.

# %%
import os
import tempfile
from pathlib import Path

from piggyback_lens import (
    AnswerContrast,
    ChatFormat,
    ModelPair,
    TrainSettings,
    add_lora,
    attribution_map,
    carrier_map,
    default_model,
    layer_head_map,
    layer_position_map,
    load_causal_lm,
    load_task,
    load_tokenizer,
    train,
)

BASE = default_model(os.environ.get("PIGGYBACK_LENS_MODEL"))
task = load_task("terse")

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
# ## One measure for all maps
#
# Both models answer the prompts; the measure is log p of the finetuned model's answer minus log p of the base's, per
# token. Given once, it serves every map.

# %%
chat = pair.chat_format()
prompts = [chat.render(query) for query in task.off_topic[:8]]
contrast = AnswerContrast.of(pair, prompts, max_new_tokens=16)

# %% [markdown]
# ## Which span carries it
#
# The base's keys and values of one span are put into the finetuned model, at all layers: how much of the way back to
# the base do its answers go? In the cells stand the intervals; below come the controls.

# %%
carrier = carrier_map(pair, prompts, sites=[("k", "v")], bands=1, flows=("repair",), measure=contrast)
carrier.figure()

# %% [markdown]
# ## Layer by token
#
# By gradient, for the price of a few passes. A gradient is a guess about a patch, so some cells are patched exactly
# and the two are compared.

# %%
fast = attribution_map(pair, prompts, check_cells=5, top_cells=1, measure=contrast)
fast.figure()

# %%
print(f"rank correlation of gradient and exact patch: {fast.rank_correlation:.2f}")

# %% [markdown]
# Exactly, one cell at a time: the last tokens of the prefix at the middle layer. What lies below a patched layer is
# computed once for all cells.

# %%
middle = [pair.shape.n_layers // 2]
exact = layer_position_map(pair, prompts, layers=middle, tokens=range(16, 24), control_cells=2, measure=contrast)
exact.figure()

# %% [markdown]
# ## Heads
#
# Keys and values of one key/value head at that layer, over the whole prefix. Every one of them serves three query
# heads here.

# %%
heads = layer_head_map(pair, prompts, sites=("k", "v"), layers=middle, control_cells=1, measure=contrast)
heads.figure()

# %% [markdown]
# The numbers behind a map are a frame, the value and its interval first:

# %%
frame = exact.to_frame().sort_values("value", ascending=False)
frame[["series", "layer", "position", "token", "value", "low", "high", "n"]].head().round(3)

# %% [markdown]
# ## What to try
#
# - More prompts (`task.off_topic[:24]`), and all layers and tokens: `layer_position_map(pair, prompts)`. With
#   `out="map_out"` cells are written as they come, and the same call goes on where it was stopped.
# - `carrier_map(pair, prompts)`: also *infect* (is the span sufficient?), early, middle and late layers apart, and
#   the residual stream.
# - Other sites: `sites="mlp_out"`, `sites="z"` for the attention heads' own outputs.
# - A behaviour instead of the contrast: `measure=GeneratedBehaviour("words")`.
# - All of it at once with a report: `piggyback-lens map demo --adapter demo_out/organism/adapter ...`.
