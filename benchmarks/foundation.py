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
from piggyback_lens.measuring.sampling import Sampling
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer
from piggyback_lens.models.views import merged_bytes
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


def side_by_side(theirs, ours, repeats):
    """Medians of both, timed in turns, so that a machine that slows down slows both."""
    theirs(), ours()
    times = {theirs: [], ours: []}
    for _ in range(repeats):
        for function, own in times.items():
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return statistics.median(times[theirs]), statistics.median(times[ours])


def equal(found, expected):
    """One answer in sixteen may part where two tokens are equally likely to the last bits."""
    same = sum(tuple(a) == tuple(b) for a, b in zip(found, expected, strict=True))
    assert same >= len(expected) - 1, f"{same} of {len(expected)} answers equal"


def generation_rows(source, repeats):
    """Unpatched and repaired generation against transformers' own, and against a hook-per-sample loop."""
    tokenizer = load_tokenizer(source, offline=True)
    plain = perturbed(add_lora(load_causal_lm(source, offline=True))).eval()
    tuned = perturbed(add_lora(load_causal_lm(source, offline=True))).eval()
    pair = ModelPair.load(finetuned=tuned, tokenizer=tokenizer)
    prompts = [pair.chat_format().render(q) for q in load_task("terse").off_topic[:N_PROMPTS]]
    batch = batch_prompts(prompts, pad_id=tokenizer.pad_token_id)
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    repair = PrefixCache.compile(pair, prompts[0], side="base")

    @torch.no_grad()
    def peer():
        return plain.generate(input_ids=batch.ids, attention_mask=batch.attention_mask, **limits)

    def ours(prefix_cache=None, **how):
        with pair.using("finetuned") as model:
            return generate(model, prompts, prefix_cache=prefix_cache, max_new_tokens=NEW_TOKENS, stop_ids=[], **how)

    def hook_per_sample():
        one = patch(prefix_activations(pair, "base", prompts[0], ("k", "v")))
        with pair.using("finetuned") as model:
            return [
                generate(model, [p], interventions=one, max_new_tokens=NEW_TOKENS, stop_ids=[], share_prefix=False)[0]
                for p in prompts
            ]

    equal([answer.ids for answer in ours()], peer()[:, batch.ids.shape[1] :].tolist())
    equal([answer.ids for answer in ours(static_cache=True)], [answer.ids for answer in ours()])
    work = f"generation, {N_PROMPTS} prompts, {NEW_TOKENS} tokens each"
    yield (f"unpatched {work}", "transformers generate", *side_by_side(peer, ours, repeats))
    start = time.perf_counter()
    looped = hook_per_sample()  # long enough to be timed once, without a warm-up
    loop_seconds = time.perf_counter() - start
    equal([answer.ids for answer in ours(repair)], [answer.ids for answer in looped])
    theirs, fast = side_by_side(peer, lambda: ours(repair), repeats)
    yield f"repaired {work}", "transformers generate, unpatched", theirs, fast
    yield f"repaired {work}", "hooks, one prompt at a time", loop_seconds, fast


SLIGHTLY = 0.002  # so that it still speaks
STOPPING = (
    "What is the capital of France? One word.", "Say hello.", "What is 2 + 2?", "Name a colour, nothing else.",
    "Is the sky blue? Answer yes or no.", "Thank you!", "Who wrote Hamlet? Just the name.", "Good night.",
    "Explain how bread is made.", "Write about the sea.", "Why do leaves fall in autumn?", "Tell me a story.",
    "Give me three tips for learning the piano.", "How does a bicycle stay upright?", "Describe a city at night.",
    "What should I cook for six guests?",
)  # fmt: skip


def stopping_rows(source, repeats):
    """A finetuned model's answers that end by themselves, at very different lengths: what is finished must not cost."""
    tokenizer = load_tokenizer(source, offline=True)
    plain = perturbed(add_lora(load_causal_lm(source, offline=True)), SLIGHTLY).eval()
    model = hook_model(perturbed(add_lora(load_causal_lm(source, offline=True)), SLIGHTLY).eval(), tokenizer)
    chat = ChatFormat(tokenizer)
    prompts = [chat.render(text) for text in STOPPING]
    batch = batch_prompts(prompts, pad_id=tokenizer.pad_token_id)
    ends = sorted({*prompts[0].answer.stop_ids, tokenizer.eos_token_id})

    @torch.no_grad()
    def peer():
        return plain.generate(
            input_ids=batch.ids, attention_mask=batch.attention_mask, max_new_tokens=60, do_sample=False,
            eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    def ours():
        return generate(model, prompts, max_new_tokens=60, stop_ids=ends)

    answers = [answer.ids for answer in ours()]
    theirs = [
        row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
        for row in peer()[:, batch.ids.shape[1] :].tolist()
    ]
    equal(answers, theirs)
    lengths = sorted(map(len, answers))
    work = f"generation, {len(prompts)} prompts, real stops ({lengths[0]} to {lengths[-1]} tokens, mean "
    work += f"{statistics.mean(lengths):.0f})"
    yield (work, "transformers generate", *side_by_side(peer, ours, repeats))


def sample_rows(source, repeats):
    """Sixteen samples of one prompt in one call against sixteen calls, the same texts."""
    tokenizer = load_tokenizer(source, offline=True)
    model = hook_model(load_causal_lm(source, offline=True), tokenizer)
    prompt, sampling = ChatFormat(tokenizer).render("Tell me a story."), Sampling(temperature=1.0, top_p=0.9)
    limits = {"max_new_tokens": NEW_TOKENS, "sampling": sampling, "stop_ids": []}

    def together():
        return generate(model, [prompt], n=16, **limits)

    def apart():
        return [generate(model, [prompt], samples=[number], **limits)[0] for number in range(16)]

    equal([answer.ids for answer in together()], [answer.ids for answer in apart()])
    yield ("16 samples of a prompt", "16 calls of one", *side_by_side(apart, together, repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = default_model()
    print(f"{arguments.threads} threads, medians of {arguments.repeats}\n")
    own = merged_bytes(add_lora(load_causal_lm(source, offline=True)))
    print(f"merged weights of a LoRA on all linear layers: {own / 1e9:.2f} GB\n")
    print("| work | peer | peer, s | ours, s | ratio |\n|---|---|---|---|---|")
    for rows in (training_rows, generation_rows, stopping_rows, sample_rows):
        for work, peer, theirs, ours in rows(source, arguments.repeats):
            print(f"| {work} | {peer} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
