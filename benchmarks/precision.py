"""How far half precision takes a loss curve from float32's: ours beside transformers' own, with the same seeds.

    python benchmarks/precision.py [--shape 8b --device cuda] [--steps 40] [--rows 8]

Four runs from one adapter, on the same conversations in the same order at the same rates: in float32, and with the
weights in bfloat16 under autocast, each as `train` does it and as the ordinary loop around transformers' and PEFT's
model does (whole rows, labels, the model's own loss, the optimiser and schedule that transformers makes). The two
float32 curves have to agree to 1e-3; then what is told is the mean distance of a bfloat16 curve from its own float32
curve over the steps, in nats per token, for several seeds.
"""

import json
import math
import statistics

import torch
from setting import Setting, arguments_of

from piggyback_lens import ChatFormat, LoRASettings, TrainSettings, add_lora, load_task, train
from piggyback_lens.finetuning.batches import batch_indices, make_batch
from piggyback_lens.finetuning.optimisers import learning_rate_at, optimiser_of


def our_losses(model, examples, settings):
    """The loss of every step of our loop."""
    return [row["loss"] for row in train(model, examples, settings, progress=False).history]


def their_losses(model, examples, settings):
    """The same by the ordinary loop."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimiser, device = optimiser_of(settings, parameters), parameters[0].device
    lengths, losses = tuple(len(example.ids) for example in examples), []
    for index in range(settings.steps):
        rows = [examples[n] for n in batch_indices(lengths, settings.batch_size, settings.seed, index)]
        batch = make_batch(rows, device=device)
        labels = batch.ids.masked_fill(~batch.supervised, -100)
        optimiser.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            loss = model(input_ids=batch.ids, attention_mask=batch.attention_mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimiser.param_groups[0]["lr"] = learning_rate_at(settings, index)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def distance(curve, other):
    """Mean over the steps, in nats per token."""
    return statistics.fmean(abs(a - b) for a, b in zip(curve, other, strict=True))


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="conversations per step")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    chat = ChatFormat(setting.tokenizer())
    examples = [chat.render([dict(m) for m in e["messages"]]) for e in load_task("terse").train[: 8 * arguments.rows]]
    curves, found = {}, []
    print("| seed | ours, nats per token | transformers', nats per token | ratio |\n|---|---|---|---|", flush=True)
    for seed in range(arguments.seeds):
        for dtype in (torch.float32, torch.bfloat16):
            chosen = {"steps": arguments.steps, "batch_size": arguments.rows, "learning_rate": 3e-4, "seed": seed}
            settings = TrainSettings(**chosen, bf16=dtype == torch.bfloat16)
            for name, losses in (("ours", our_losses), ("theirs", their_losses)):
                setting.dtype = dtype
                model = add_lora(setting.model(), LoRASettings(), seed=seed)
                curves[name, dtype] = losses(model, examples, settings)
                del model
        exact = distance(curves["ours", torch.float32], curves["theirs", torch.float32])
        assert exact < 1e-3, f"the float32 curves are {exact:.2g} nats apart: nothing is compared"
        assert curves["ours", torch.float32][-1] < curves["ours", torch.float32][0], "nothing was learnt"
        ours, theirs = (
            distance(curves[name, torch.bfloat16], curves[name, torch.float32]) for name in ("ours", "theirs")
        )
        assert min(ours, theirs) > 0
        assert math.isfinite(ours + theirs)
        found.append({"seed": seed, "ours": ours, "theirs": theirs, "float32 apart": exact})
        print(f"| {seed} | {ours:.5f} | {theirs:.5f} | {ours / theirs:.2f} |", flush=True)
    ours, theirs = (statistics.fmean(row[name] for row in found) for name in ("ours", "theirs"))
    print(f"| mean | {ours:.5f} | {theirs:.5f} | {ours / theirs:.2f} |")
    if setting.out is not None:
        setting.out.mkdir(parents=True, exist_ok=True)
        named = {f"{name}, {str(dtype).removeprefix('torch.')}": losses for (name, dtype), losses in curves.items()}
        table = {"seeds": found, "last seed's curves": named}
        (setting.out / "precision.json").write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
