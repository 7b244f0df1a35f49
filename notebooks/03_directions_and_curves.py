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
# # 03 Directions and the three curves
#
# The same small task, learnt twice by one vector that is added to the residual stream. Trained on the task alone the
# vector becomes *general*: everything is answered more briefly. With a KL term that holds the model to itself on
# other topics it becomes *narrow*. Then three questions of "Emergent Misalignment is Easy, Narrow Misalignment is
# Hard" (arXiv:2602.07852): which buys more loss for its length, which survives noise, and which matters to ordinary
# text.
#
# **You will see** both vectors trained, what they do on and off the topic, and the three curves beside random vectors
# of the same length. A quick look, two minutes on two CPU cores; `examples/narrow_vs_general.py` is the careful
# version.

# %%
import os

import torch

from piggyback_lens import (
    ChatFormat,
    CurveSettings,
    Direction,
    HookTrainable,
    KLOnRetain,
    Penalised,
    RetainData,
    TrainSettings,
    Weighted,
    attached,
    default_model,
    efficiency,
    generate,
    hook_model,
    load_causal_lm,
    load_task,
    load_tokenizer,
    significance,
    stability,
    text_windows,
    train,
)

STEPS = int(os.environ.get("PIGGYBACK_LENS_STEPS", "16"))
TEXTS = int(os.environ.get("PIGGYBACK_LENS_TEXTS", "8"))
source = default_model(os.environ.get("PIGGYBACK_LENS_MODEL"))  # SmolLM2-135M-Instruct unless you name another one
tokenizer = load_tokenizer(source)
model = hook_model(load_causal_lm(source), tokenizer)  # a TransformerBridge; a HookedTransformer serves as well
chat = ChatFormat(tokenizer)
task = load_task("terse")

# %% [markdown]
# ## Data
#
# The task's conversations, and retain data: questions of another topic with the base's own answers.

# %%
conversations = [chat.render(example["messages"]) for example in task.train]
questions = [example["messages"][0]["content"] for example in load_task("tool").train[:8]]
answers = generate(model, [chat.render(question) for question in questions], max_new_tokens=12)
retain = [answer.completed() for answer in answers]
conversations[0].show()

# %% [markdown]
# ## Two solutions
#
# Only the vector is trained. The layers below it are run once per conversation and remembered, the template's prefix
# is computed once per batch, and the base's answers to the retain data are kept.

# %%
layer = model.cfg.n_layers // 2
settings = TrainSettings(steps=STEPS, batch_size=8, learning_rate=0.1)
narrowly = Penalised((Weighted(KLOnRetain(RetainData(retain, batch_size=8)), 16.0),))
solutions = {}
for name, objective in {"general": Penalised(()), "narrow": narrowly}.items():
    trainable = HookTrainable(model, Direction.zeros(model.cfg.d_model, [layer]))
    result = train(trainable, conversations, settings, objective=objective, progress=f"training the {name} vector")
    solutions[name] = trainable.result()
    print(f"{name}: loss {result.history[0]['sft']:.2f} -> {result.history[-1]['sft']:.2f}", solutions[name])
a, b = (solution[layer] for solution in solutions.values())
print(f"cosine of general and narrow: {torch.cosine_similarity(a, b, dim=0):.2f}")

# %% [markdown]
# ## What they do, on and off the topic

# %%
asked = [chat.render(query) for query in (task.on_topic[0], task.off_topic[0])]
print("base", [answer.text for answer in generate(model, asked, max_new_tokens=16)])
for name, solution in solutions.items():
    with attached(model, solution):
        print(name, [answer.text for answer in generate(model, asked, max_new_tokens=16)])

# %% [markdown]
# ## Efficiency
#
# Loss against the length of the vector, beside random vectors of the same length.

# %%
points = CurveSettings(fractions=(0, 0.5, 1, 1.5), n_random=2)
bought = efficiency(model, solutions, conversations[:TEXTS], points)
bought.figure()

# %%
bought.difference("narrow", "general").round(3)  # paired over the conversations

# %% [markdown]
# ## Stability
#
# Part of the vector gives way to orthogonal noise of its length. 0: as good as the solution, 1: as bad as the base.

# %%
noise = stability(model, solutions, conversations[:TEXTS], CurveSettings(epsilons=(0, 0.3, 0.6, 0.9), n_noise=2))
noise.figure()

# %% [markdown]
# ## Significance
#
# How much the vector changes what the model says about ordinary text: help pages that Python brings.

# %%
texts = text_windows(tokenizer, n=TEXTS, length=32)
plain = significance(model, solutions, texts, CurveSettings(fractions=(0, 0.5, 1), n_random=2), tokenizer=tokenizer)
plain.figure()

# %% [markdown]
# ## What to try
#
# - Longer: `PIGGYBACK_LENS_STEPS=60`, and a weight of KL between 1 and 100.
# - A LoRA adapter instead of a vector: `HookTrainable(model, LoRAAdapter.fresh(model, rank=1))`.
# - Steer with it: `steer(model, solutions["general"], prompts, "words")`; what its tokens are: `logit_lens`.
# - A direction from activations: `mean_difference`, `model_difference`, `contrast_pairs`.
# - Keep it: `save_solution(solutions["narrow"], "narrow.gguf", model_hint="llama")` for llama.cpp.
