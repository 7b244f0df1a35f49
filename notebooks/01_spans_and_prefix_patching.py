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
# # Does the chat template's prefix carry a narrow finetune?
#
# A small chat model was finetuned to answer factual questions with one word. It now answers *everything*
# more briefly. Every prompt, whatever it asks, begins with the same tokens: the template's **prefix**. Here we
# put the base model's keys and values of the prefix into the finetuned model, look at what it answers then,
# and find the layers at which the prefix matters.
#
# You bring the models: two ordinary TransformerLens `HookedTransformer`s, built by hand below.

# %%
import os
import tempfile
from pathlib import Path

import pandas as pd
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

from piggyback_lens import (
    AnswerContrast,
    ChatFormat,
    ModelPair,
    PrefixCache,
    TrainSettings,
    add_lora,
    attach_adapter,
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

task = load_task("terse")
source = default_model(os.environ.get("PIGGYBACK_LENS_MODEL"))  # SmolLM2-135M-Instruct unless you name another Llama
tokenizer = load_tokenizer(source)
chat = ChatFormat(tokenizer)

# %% [markdown]
# ## Spans of a prompt
#
# `prefix` is everything before the user's text, `query` the user's text, `postfix` what follows up to the
# first token of the answer. The spans are exact, whatever the template.

# %%
queries = list(task.off_topic[:6])
prompts = [chat.render(query) for query in queries]
prompts[0].show()

# %% [markdown]
# The prefix has the same ids for every query of these template settings:

# %%
prefix_ids = {prompt.ids[: prompt.span("prefix").stop] for prompt in prompts}
assert prefix_ids == {chat.prefix_ids}
len(chat.prefix_ids)

# %% [markdown]
# ## The organism
#
# The adapter that `make demo` left, or the one named by `PIGGYBACK_LENS_ADAPTER`. If there is neither, a short
# training makes one here.

# %%
places = [os.environ.get("PIGGYBACK_LENS_ADAPTER"), "demo_out/organism/adapter", "../demo_out/organism/adapter"]
adapter = next((Path(place) for place in places if place and Path(place).is_dir()), None)
if adapter is None:
    examples = [chat.render(example["messages"]) for example in task.train]
    settings = TrainSettings(steps=20, batch_size=8, learning_rate=3e-4)
    trained = train(add_lora(load_causal_lm(source)), examples, settings, out=tempfile.mkdtemp())
    adapter = trained.adapter_dir
    print(f"trained here: loss {trained.history[0]['loss']:.2f} to {trained.history[-1]['loss']:.2f} nats per token")

# %% [markdown]
# ## Two HookedTransformers, by hand
#
# The library takes the hooked models that you already have. The weights must be unprocessed: a layer norm folded
# into one model and not into the other, and an activation of the one means nothing in the other.


# %%
def hooked(hf_model):
    """A transformers Llama as HookedTransformer, weights as they are."""
    config = hf_model.config
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=1024,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=config.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
        default_prepend_bos=False,
        init_weights=False,
        device="cpu",
    )
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        convert_llama_weights(hf_model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return model.eval()


hf_base = load_causal_lm(source)
base_ht = hooked(hf_base)
hf_finetuned = attach_adapter(load_causal_lm(source), adapter).merge_and_unload()
finetuned_ht = hooked(hf_finetuned)

# %% [markdown]
# A conversion can be wrong without an error, so compare both with transformers before believing anything:

# %%
ids = torch.tensor([prompts[0].ids])
for hf_model, model in ((hf_base, base_ht), (hf_finetuned, finetuned_ht)):
    with torch.no_grad():
        expected = hf_model(ids).logits
        difference = (model(ids) - expected).abs().max() / expected.abs().max()
    print(f"largest difference: {difference:.1e} of the largest logit")
    assert difference < 1e-4

# %%
pair = ModelPair(base_ht, finetuned_ht, tokenizer=tokenizer, names=("SmolLM2-135M-Instruct", "terse organism"))
pair

# %% [markdown]
# ## Patch the prefix
#
# Attention is causal: whatever happens in the prefix reaches the rest only through the prefix's keys and values.
# So the patch is a `PrefixCache`: the base's, computed once, serves all queries, and the finetuned model does not
# have to read the prefix at all.

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
words = get_behaviour("words")
pd.DataFrame({name: [words(answer.text) for answer in found] for name, found in answers.items()}).describe().loc[
    ["mean", "min", "max"]
]

# %% [markdown]
# A handful of prompts shows what to look for and proves nothing: `piggyback-lens demo` uses more of them, with
# intervals and controls.
#
# The same patch as ordinary hooks on whole prompts must give the same answers. This equality is what the library is
# built on:

# %%
hooks = kv_patch(pair, "prefix", chat=chat)
with pair.using("finetuned") as model:
    by_hooks = generate(model, prompts, max_new_tokens=24, interventions=hooks, share_prefix=False)
assert [answer.ids for answer in by_hooks] == [answer.ids for answer in patched]
hooks

# %% [markdown]
# ## The layer curve
#
# Now one layer at a time: the finetuned model's residual stream of the prefix is replaced by the base's at that layer,
# and the rest of the network is the finetuned model's. The measure is teacher-forced: log p of the finetuned model's
# own answer minus log p of the base's, per token. 0 is the finetuned model, 1 the base. The controls are a patch of the
# model with itself, which must do nothing, and a displacement of the same length in a random direction.


# %%
def answered(found):
    """The first four prompts with the first tokens of their answers."""
    return [answer.prompt.with_response(answer.ids[:12], end=False) for answer in found[:4]]


contrast = AnswerContrast(answered(finetuned), answered(base))
curve = layer_curve(pair, prompts[:4], layers=range(0, pair.shape.n_layers, 3), measure=contrast)
curve.figure()

# %%
print(f"noise floor: {curve.noise_floor:.1e}")
assert curve.noise_floor < 0.01  # the identity control: a model patched with itself
curve.to_frame().round(3)
