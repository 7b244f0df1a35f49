"""Answers a second through Inspect's provider, beside the same questions one by one, and how many texts are equal.

    python benchmarks/inspect_provider.py --questions 24 --tokens 32 --batch-size 16

A draw between two tokens of the tail can go the other way in a batch of another size, by rounding; counted, not hidden.
Both ways go through `get_model("piggyback/...")` in one process: concurrently, as a task asks them, and each after the
answer to the one before it. `direct` is one call of `generate` over all of them, without Inspect and without a queue.
"""

import argparse
import statistics
import time
from pathlib import Path

import anyio
import torch
from inspect_ai.model import GenerateConfig, get_model

from piggyback_lens import Sampling, generate

TOPICS = Path(__file__).parent.parent / "examples" / "prompts_off_topic.txt"
CHANGES = ("{}", "In one sentence: {}", "{} Say why.", "Briefly, {}")


def questions_of(count):
    """Different questions: those of the example file, and rephrasings of them."""
    lines = [line for line in TOPICS.read_text().splitlines() if line.strip()]
    return [change.format(line) for change in CHANGES for line in lines][:count]


async def concurrently(model, questions, config):
    """As a task asks: all at once, as many at a time as Inspect lets through."""
    found = [None] * len(questions)

    async def ask(place):
        found[place] = (await model.generate(questions[place], config=config)).completion

    async with anyio.create_task_group() as group:
        for place in range(len(questions)):
            group.start_soon(ask, place)
    return found


async def one_by_one(model, questions, config):
    return [(await model.generate(question, config=config)).completion for question in questions]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base", choices=["base", "finetuned", "patched"])
    parser.add_argument("--base", default="demo")
    parser.add_argument("--adapter")
    parser.add_argument("--prefix-cache")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    own = {"base": given.base, "adapter": given.adapter, "prefix_cache": given.prefix_cache}
    arguments = {name: value for name, value in own.items() if value is not None}
    model = get_model(f"piggyback/{given.model}", batch_size=given.batch_size, **arguments)
    asked = questions_of(given.questions)
    config = GenerateConfig(temperature=1.0, seed=1, max_tokens=given.tokens, max_connections=len(asked))
    answering = model.api.answering
    prompts = [answering.prompt([{"role": "user", "content": question}]) for question in asked]

    def direct():
        condition = answering.condition
        with answering.queue.using(condition.side) as hooked:
            sampling = Sampling(temperature=1.0, seed=1)
            how = {"sampling": sampling, "max_new_tokens": given.tokens, "batch_size": given.batch_size}
            return [answer.text for answer in generate(hooked, prompts, prefix_cache=condition.prefix, **how)]

    ways = {
        "one by one": lambda: anyio.run(one_by_one, model, asked, config),
        "concurrently": lambda: anyio.run(concurrently, model, asked, config),
        "direct": direct,
    }
    seconds = {name: [] for name in ways}
    texts = {name: way() for name, way in ways.items()}  # a warm-up too
    answering.queue.batches.clear()
    for _ in range(given.repeats):  # in turns, so that a machine that slows down slows all of them
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f"piggyback/{given.model}, {len(asked)} questions, {given.tokens} tokens, {given.threads} threads")
    for name, own in seconds.items():
        print(f"{name:14} {statistics.median(own):6.2f} s, {len(asked) / statistics.median(own):6.2f} answers a second")
    ratios = [a / b for a, b in zip(seconds["one by one"], seconds["concurrently"], strict=True)]
    print(
        f"ratio, one by one to concurrently: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    equal = {name: sum(map(str.__eq__, texts["concurrently"], texts[name])) for name in ("direct", "one by one")}
    print(f"texts equal to those asked concurrently, of {len(asked)}: {equal}")
    print(f"batches by size: {dict(sorted(answering.queue.batches.items()))}")


if __name__ == "__main__":
    main()
