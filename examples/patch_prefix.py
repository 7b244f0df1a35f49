"""Put the base's prefix keys and values into a finetuned model, and find the layers that matter.

python examples/patch_prefix.py [ADAPTER] [--model BASE] [--out layer_curve.html]      (after `make demo`)
"""

import argparse

from piggyback_lens import AnswerContrast, ModelPair, PrefixCache, default_model, generate, layer_curve, load_task

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", nargs="?", default="demo_out/organism/adapter", help="PEFT adapter folder")
parser.add_argument("--model", help="hub id, folder or .gguf of the base; default the demo model")
parser.add_argument("--prompts", type=int, default=4)
parser.add_argument("--tokens", type=int, default=24, help="per answer")
parser.add_argument("--out", default="layer_curve.html")
options = parser.parse_args()

pair = ModelPair.load(options.model or default_model(), adapter=options.adapter)
chat = pair.chat_format()
prompts = [chat.render(query) for query in load_task("terse").off_topic[: options.prompts]]
prefix = PrefixCache.compile(pair, prompts[0], side="base")  # serves every query of these template settings

with pair.using("base") as model:
    base = generate(model, prompts, max_new_tokens=options.tokens)
with pair.using("finetuned") as model:
    finetuned = generate(model, prompts, max_new_tokens=options.tokens)
    patched = generate(model, prompts, max_new_tokens=options.tokens, prefix_cache=prefix)
for prompt, *answers in zip(prompts, base, finetuned, patched, strict=True):
    print(f"\n{prompt.query}")
    for name, answer in zip(("base", "finetuned", "+ base's prefix"), answers, strict=True):
        print(f"  {name:16} {answer.text!r}")

own_answers = AnswerContrast([a.completed() for a in finetuned], [a.completed() for a in base])
curve = layer_curve(pair, prompts, layers=range(0, pair.shape.n_layers, 3), measure=own_answers)
shown = curve.to_frame()[["layer", "series", "value", "low", "high"]].round(3).to_string(index=False)
print(f"\n{shown}\nnoise floor {curve.noise_floor:.1e}")
curve.figure().write_html(options.out)
