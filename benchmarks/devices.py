"""A pair on one device against the same pair spread by a device map: equal numbers, and what each takes.

    python benchmarks/devices.py --model Qwen/Qwen2.5-7B-Instruct --dtype bfloat16 --map balanced
    python benchmarks/devices.py --map disk          # no second device; slow, the disk is read in every pass

The finetune is a LoRA adapter of random numbers. Compared are greedy answers, a layer curve, and answers from a prefix
cache that was saved on one layout and loaded on the other. Prints a Markdown table; ends with status 1 where numbers
differ by more than the dtype explains.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch

from piggyback_lens import (
    AnswerContrast,
    LoadSettings,
    LoRASettings,
    ModelPair,
    PrefixCache,
    add_lora,
    default_model,
    generate,
    layer_curve,
    load_causal_lm,
    load_task,
)
from piggyback_lens.models.sources import load_config

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
SCALE = 0.08  # of the adapter's numbers: both sides speak, and say different things


def random_adapter(source, dtype, folder):
    """A PEFT folder of an adapter that moves the model everywhere."""
    model = add_lora(load_causal_lm(source, LoadSettings(device="cpu", dtype=dtype)), LoRASettings(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SCALE)
    model.save_pretrained(folder)
    return folder


def upper_half_on_disk(source):
    """A device map for machines without a second device."""
    layers = load_config(source).num_hidden_layers
    outside = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    blocks = {f"model.layers.{i}": "disk" if i >= layers // 2 else "cpu" for i in range(layers)}
    return dict.fromkeys(outside, "cpu") | blocks


def measured(pair, queries, cache, measure):
    """Answers, a curve, and answers from a cache made on the other layout (None: of this one, which is saved)."""
    prompts, times = pair.chat_format().ask(queries), {}

    def timed(name, make):
        began = time.perf_counter()
        found = make()
        times[name] = time.perf_counter() - began
        return found

    with pair.using("finetuned") as model:
        own = PrefixCache.compile(pair, prompts[0], side="base")
        if not (cache / "prefix_cache.json").exists():
            own.save(cache)
        loaded = PrefixCache.load(cache, model=model, prompt=prompts[0])
        answers = timed("answers", lambda: generate(model, prompts, max_new_tokens=4))
        patched = timed("from the cache", lambda: generate(model, prompts, max_new_tokens=4, prefix_cache=loaded))
    measure = measure or AnswerContrast.of(pair, prompts, max_new_tokens=4)
    options = {"control_layers": 0, "measure": measure, "progress": False}
    curve = timed("layer curve", lambda: layer_curve(pair, prompts, **options))
    texts = {"answers": [a.ids for a in answers], "from the cache": [a.ids for a in patched]}
    return texts, torch.tensor(curve.to_frame()["raw"].to_numpy()), times, measure


def main():
    """Run both layouts and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder; default the demo model")
    parser.add_argument("--map", default="balanced", help="auto, balanced, sequential, disk, or JSON")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCES)
    parser.add_argument("--prompts", type=int, default=4)
    asked = parser.parse_args()
    source, queries = asked.model or default_model(), load_task("terse").off_topic[: asked.prompts]
    spread = upper_half_on_disk(source) if asked.map == "disk" else asked.map
    found, measure = {}, None
    with tempfile.TemporaryDirectory() as folder:
        adapter = random_adapter(source, asked.dtype, Path(folder) / "adapter")
        for name, where in (("one device", {}), ("spread", {"device_map": spread})):
            began = time.perf_counter()
            pair = ModelPair.load(source, adapter=adapter, dtype=asked.dtype, progress=False, **where)
            loading = time.perf_counter() - began
            *found[name], measure = measured(pair, queries, Path(folder) / "cache", measure)
            found[name][2]["loading"] = loading
            with pair.using("base") as model:
                devices = sorted({str(x.device) for x in model.original_model.parameters()})
            print(f"{name}: weights on {', '.join(devices)}", flush=True)
            del pair, model
            gc.collect()  # a bridge holds itself
            torch.cuda.empty_cache()
    (texts, curve, times), (others, spread_curve, spread_times) = found.values()
    known = ~curve.isnan()  # rows of controls that a curve has not
    assert bool((curve[known].abs() > 0).any()), "the curve has no number, or the sides do not differ"
    assert torch.equal(known, ~spread_curve.isnan()), "one layout has numbers where the other has none"
    gap = float((curve - spread_curve)[known].abs().max() / curve[known].abs().max())
    equal = {name: sum(a == b for a, b in zip(texts[name], others[name], strict=True)) for name in texts}
    print("\n| | one device, s | spread, s | equal |\n|---|---:|---:|---|")
    for name in ("loading", "answers", "from the cache", "layer curve"):
        same = (
            f"{equal[name]} of {asked.prompts}" if name in equal else f"to {gap:.1e}" if name == "layer curve" else ""
        )
        print(f"| {name} | {times[name]:.2f} | {spread_times[name]:.2f} | {same} |")
    exact = asked.dtype != "float32" or all(count == asked.prompts for count in equal.values())
    return 0 if gap <= TOLERANCES[asked.dtype] and exact else 1


if __name__ == "__main__":
    sys.exit(main())
