"""Ratios against named peers doing the same work in the same run, on the real demo model.

    python benchmarks/foundation.py [--repeats 3] [--threads 2]

Each comparison first asserts that both sides give the same numbers. Prints a Markdown table: seconds are
medians of `repeats` runs on this machine, only the ratios are meant to travel.
"""

import argparse
import statistics
import time

import torch

from piggyback_lens.conversations.chat import ChatFormat, batch_prompts
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.steps import forward_step, sft
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import Step
from piggyback_lens.interventions.donors import prefix_activations
from piggyback_lens.interventions.kinds import patch
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import generate
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer
from piggyback_lens.tasks import load_task

N_PROMPTS, NEW_TOKENS = 16, 24


def median_seconds(function, repeats):
    function()  # warm-up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def perturbed(model, scale=0.02):
    """A LoRA adapter that is not the identity, so that base and finetuned differ."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


def training_rows(source, repeats):
    """The shared-prefix step against the ordinary step of transformers, same batch, same gradients."""
    tokenizer = load_tokenizer(source, offline=True)
    chat = ChatFormat(tokenizer)
    examples = [chat.render([dict(m) for m in e["messages"]]) for e in load_task("terse").train[:16]]
    model = perturbed(add_lora(load_causal_lm(source, offline=True)))
    shared, plain = (make_batch(examples, share_prefix=share) for share in (True, False))
    labels = plain.ids.masked_fill(~plain.supervised, -100)

    def ours(batch):
        model.zero_grad()
        loss = sft(Step(model, batch, forward_step(model, batch), 0)).total
        loss.backward()
        return loss

    def ordinary():
        model.zero_grad()
        loss = model(input_ids=plain.ids, attention_mask=plain.attention_mask, labels=labels).loss
        loss.backward()
        return loss

    def gradients():
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    a, ga = ours(shared), None
    ga = gradients().clone()
    b = ordinary()
    gb = gradients()
    assert abs(float(a.detach() - b.detach())) < 1e-4
    assert float((ga - gb).norm() / gb.norm()) < 1e-4
    base = median_seconds(ordinary, repeats)
    yield (
        "training step, 16 rows",
        "transformers step, whole rows, labels=",
        base,
        median_seconds(lambda: ours(shared), repeats),
    )
    full = median_seconds(lambda: ours(plain), repeats)
    yield (
        "training step, 16 rows",
        "our step without prefix sharing",
        full,
        median_seconds(lambda: ours(shared), repeats),
    )


def generation_rows(source, repeats):
    """Repaired generation from a PrefixCache against HF's unpatched one and a hook-per-sample loop."""
    tokenizer = load_tokenizer(source, offline=True)
    tokenizer.padding_side = "left"
    plain = perturbed(add_lora(load_causal_lm(source, offline=True))).eval()
    tuned = perturbed(add_lora(load_causal_lm(source, offline=True))).eval()
    pair = ModelPair.load(finetuned=tuned, tokenizer=tokenizer)
    chat = pair.chat_format()
    prompts = [chat.render(q) for q in load_task("terse").off_topic[:N_PROMPTS]]
    batch = batch_prompts(prompts, pad_id=tokenizer.pad_token_id)
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    repair = PrefixCache.compile(pair, prompts[0], side="base")

    @torch.no_grad()
    def hf_unpatched():
        return plain.generate(input_ids=batch.ids, attention_mask=batch.attention_mask, **limits)

    def ours(prefix_cache=None):
        with pair.using("finetuned") as model:
            return generate(model, prompts, prefix_cache=prefix_cache, max_new_tokens=NEW_TOKENS, stop_ids=[])

    def hook_per_sample():
        donor = prefix_activations(pair, "base", prompts[0], ("k", "v"))
        with pair.using("finetuned") as model:
            one = patch(donor)
            return [
                generate(model, [p], interventions=one, max_new_tokens=NEW_TOKENS, stop_ids=[], share_prefix=False)[0]
                for p in prompts
            ]

    reference = hf_unpatched()[:, batch.ids.shape[1] :]
    mine = ours()
    same = sum(tuple(row.tolist()) == answer.ids for row, answer in zip(reference, mine, strict=True))
    assert same >= N_PROMPTS - 1, f"{same} of {N_PROMPTS} answers equal"
    start = time.perf_counter()
    looped = hook_per_sample()  # long enough to be timed once, without a warm-up
    loop_seconds = time.perf_counter() - start
    cached = ours(repair)
    same = sum(a.ids == b.ids for a, b in zip(looped, cached, strict=True))
    assert same >= N_PROMPTS - 1, f"{same} of {N_PROMPTS} answers equal"
    fast = median_seconds(lambda: ours(repair), repeats)
    yield (
        f"repaired generation, {N_PROMPTS} prompts",
        "transformers generate, unpatched",
        median_seconds(hf_unpatched, repeats),
        fast,
    )
    yield (
        f"repaired generation, {N_PROMPTS} prompts",
        "hooks, one prompt at a time",
        loop_seconds,
        fast,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = default_model()
    print(f"{arguments.threads} threads, medians of {arguments.repeats}\n")
    print("| work | peer | peer, s | ours, s | ratio |\n|---|---|---|---|---|")
    for rows in (training_rows, generation_rows):
        for work, peer, theirs, ours in rows(source, arguments.repeats):
            print(f"| {work} | {peer} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
