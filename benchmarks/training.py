"""What a training step costs, as ratios against named peers doing the same work, on the real demo model.

    python benchmarks/training.py [--repeats 5] [--threads 2] [--rows 16] [--clock cpu]

Each comparison first asserts that both sides give the same loss and the same gradients. Prints a Markdown
table: seconds are medians of `repeats` steps, measured in turns so that a busy machine slows both sides, and
the ratio is the median of the turns' ratios. Only the ratios are meant to travel. Where others use the
machine, `--clock cpu` counts this process's processor time instead (with one thread).
"""

import argparse
import math
import statistics
import time

import torch

from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.objectives import Penalised, TReFT, Weighted
from piggyback_lens.finetuning.steps import Step, forward_step, sft
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer
from piggyback_lens.tasks import load_task

LAMBDA = 30.0


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turns(first, second, repeats, clock):
    """Median seconds of both, and the median of first / second over the turns."""
    first(), second()  # warm-up
    pairs = []
    for _ in range(repeats):
        pair = []
        for function in (first, second):
            start = clock()
            function()
            pair.append(clock() - start)
        pairs.append(pair)
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    return a, b, statistics.median(x / y for x, y in pairs)


def perturbed(model, scale=0.02):
    """A LoRA adapter that is not the identity, so that the penalty is not zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


class Bench:
    """One model, one batch, and the steps that are compared."""

    def __init__(self, source, rows):
        chat = ChatFormat(load_tokenizer(source, offline=True))
        examples = [chat.render([dict(m) for m in e["messages"]]) for e in load_task("terse").train[:rows]]
        self.model = perturbed(add_lora(load_causal_lm(source, offline=True)))
        self.shared, self.full = (make_batch(examples, share_prefix=share) for share in (True, False))
        self.labels = self.full.ids.masked_fill(~self.full.supervised, -100)
        self.treft = Penalised((Weighted(TReFT.on(self.model, examples[0]), LAMBDA),))
        self.own = Penalised((Weighted(TReFT("prefix"), LAMBDA),))
        self.off = Penalised((Weighted(self.treft.parts[0].penalty, 0.0),))

    def step(self, objective, batch):
        """Forward and backward of our loop, without the optimiser."""
        self.model.zero_grad()
        loss = objective(Step(self.model, batch, forward_step(self.model, batch), 0)).total
        loss.backward()
        return loss.detach()

    def transformers_step(self):
        """The ordinary step: whole rows, labels, the model's own loss."""
        self.model.zero_grad()
        loss = self.model(
            input_ids=self.full.ids, attention_mask=self.full.attention_mask, labels=self.labels, use_cache=False
        ).loss
        loss.backward()
        return loss.detach()

    def result(self, function):
        """Loss and all gradients as one vector."""
        loss = float(function())
        return loss, torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def assert_same(self, first, second, tolerance):
        """Equal loss, and gradients whose difference is at most `tolerance` of their length."""
        (a, ga), (b, gb) = self.result(first), self.result(second)
        assert math.isclose(a, b, rel_tol=max(tolerance, 1e-12)), (a, b)
        assert float((ga - gb).norm()) <= tolerance * float(gb.norm()), float((ga - gb).norm() / gb.norm())

    def rows(self, repeats, clock):
        """Work, peer, seconds of the peer, seconds of ours, ratio, target."""
        shared_sft = lambda: self.step(sft, self.shared)  # noqa: E731
        shared_treft = lambda: self.step(self.treft, self.shared)  # noqa: E731
        full_sft = lambda: self.step(sft, self.full)  # noqa: E731
        full_own = lambda: self.step(self.own, self.full)  # noqa: E731

        self.assert_same(shared_sft, lambda: self.step(self.off, self.shared), 0.0)
        self.assert_same(shared_treft, full_own, 1e-4)
        added = float(shared_treft()) - float(shared_sft())
        assert added > 0.01, f"the penalty adds {added} to the loss: nothing is compared"
        ours, plain, ratio = in_turns(shared_treft, shared_sft, repeats, clock)
        yield "TReFT step / SFT step", "our SFT step, prefix shared", plain, ours, ratio, "<= 1.05"

        self.assert_same(shared_sft, self.transformers_step, 1e-4)
        theirs, ours, ratio = in_turns(self.transformers_step, shared_sft, repeats, clock)
        yield "ordinary step / shared-prefix step", "transformers, whole rows, labels", theirs, ours, ratio, ">= 1.8"

        self.assert_same(shared_sft, full_sft, 1e-4)
        theirs, ours, ratio = in_turns(full_sft, shared_sft, repeats, clock)
        yield "ordinary step / shared-prefix step", "our SFT step, whole rows", theirs, ours, ratio, ""

        theirs, ours, ratio = in_turns(full_own, shared_treft, repeats, clock)
        yield "ordinary TReFT step / ours", "whole rows, base run at every step", theirs, ours, ratio, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(default_model(), arguments.rows)
    prefix, width = bench.shared.prefix_length, bench.shared.ids.shape[1]
    print(f"{arguments.threads} threads, {arguments.rows} rows of up to {width} tokens, {prefix} of them prefix")
    print(f"medians of {arguments.repeats} turns, {arguments.clock} time\n")
    print("| ratio of | peer | peer, s | ours, s | ratio | target |\n|---|---|---|---|---|---|")
    for work, peer, theirs, ours, ratio, target in bench.rows(arguments.repeats, CLOCKS[arguments.clock]):
        print(f"| {work} | {peer} | {theirs:.2f} | {ours:.2f} | {ratio:.2f} | {target} |", flush=True)


if __name__ == "__main__":
    main()
