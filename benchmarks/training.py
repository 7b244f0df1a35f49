"""What a training step costs, as ratios against named peers doing the same work.

    python benchmarks/training.py [--shape 8b --device cuda --dtype bfloat16] [--rows 16] [--long 0] [--brief]

Each comparison first asserts that both sides give the same loss and the same gradients. Prints a Markdown
table: seconds are medians of `repeats` steps, measured in turns so that a busy machine slows both sides, and
the ratio is the median of the turns' ratios. Only the ratios are meant to travel. Where others use the
machine, `--clock cpu` counts this process's processor time instead (with one thread). Beside the table stands what a
block was found to cost here, and the way that six batches take through the model by it.
"""

import math

import torch
from setting import Setting, arguments_of

from piggyback_lens import ChatFormat, Penalised, TReFT, Weighted, load_task
from piggyback_lens.conversations.batch import Batch
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.steps import Step, forward_step, plan_for, sft
from piggyback_lens.models.costs import known_costs
from piggyback_lens.models.packing import costing, plan_of

LAMBDA = 30.0
SIX = ((16, 48, 24), (16, 400, 24), (64, 48, 24), (4, 48, 24), (32, 400, 200), (1, 400, 24))
"""Rows, width and common prefix of batches whose way is told; rows are up to seven tokens shorter."""


class Bench:
    """One model, one batch, and the steps that are compared."""

    def __init__(self, setting, model, rows, at_least=0):
        tokenizer = setting.tokenizer()
        chat = ChatFormat(tokenizer)
        conversations = [[dict(m) for m in e["messages"]] for e in load_task("terse").train[:rows]]
        for number, conversation in enumerate(conversations):
            while at_least and len(tokenizer(conversation[-1]["content"])["input_ids"]) < at_least - 8 * (number % 4):
                conversation[-1]["content"] += f" And again, {len(conversation[-1]['content'])} times, as before."
        examples = [chat.render(conversation) for conversation in conversations]
        self.setting, self.model = setting, model
        self.shared, self.full = (make_batch(examples, share_prefix=s, device=setting.device) for s in (True, False))
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
        return loss, torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])

    def assert_same(self, first, second, tolerance=None):
        """Equal loss, and gradients whose difference is at most `tolerance` of their length."""
        tolerance = self.setting.tolerance if tolerance is None else tolerance
        (a, ga), (b, gb) = self.result(first), self.result(second)
        assert math.isclose(a, b, rel_tol=max(tolerance, 1e-12)), (a, b)
        apart = float((ga - gb).norm() / gb.norm())
        # Rounding of half precision adds up over the layers, in gradients more than in losses.
        assert apart <= tolerance * (1 if self.setting.exact else 5), f"gradients {apart:.2g} apart"

    def compare(self, brief):
        """The rows of the table; of what others do alone if it is brief."""
        in_turns, add = self.setting.in_turns, self.setting.add
        size = f"{len(self.full.ids)} x {self.full.ids.shape[1]}"
        shared_sft = lambda: self.step(sft, self.shared)  # noqa: E731
        shared_treft = lambda: self.step(self.treft, self.shared)  # noqa: E731
        full_sft = lambda: self.step(sft, self.full)  # noqa: E731
        full_own = lambda: self.step(self.own, self.full)  # noqa: E731

        # Attention's gradient is not summed in one order on a GPU.
        nothing = 0.0 if self.setting.exact else 1e-6 if self.setting.device == "cpu" else None
        self.assert_same(shared_sft, lambda: self.step(self.off, self.shared), nothing)
        self.assert_same(shared_treft, full_own)
        added = float(shared_treft()) - float(shared_sft())
        assert added > 0.01, f"the penalty adds {added} to the loss: nothing is compared"
        self.assert_same(shared_sft, self.transformers_step)
        step, way = "transformers, whole rows, labels", plan_for(self.model, self.shared).name
        times = in_turns(self.transformers_step, shared_sft)
        add(f"SFT step, {size}", step, *times, target=">= 2 on CPU, >= 1", way=way)
        treft, plain, ratio = in_turns(shared_treft, shared_sft)
        add(f"TReFT step / SFT step, {size}", "our SFT step", treft, plain, ratio, target="<= 1.05", way=way)
        self.setting.explain(f"SFT step, {size}", shared_sft)
        self.setting.explain(f"TReFT step, {size}", shared_treft)
        if brief:
            return
        self.assert_same(shared_sft, full_sft)
        add(f"SFT step, {size}", "our SFT step, whole rows", *in_turns(full_sft, shared_sft))
        add(f"TReFT step, {size}", "whole rows, base run at every step", *in_turns(full_own, shared_treft))


def way_of(model, rows, width, n_prefix):
    """The way of a batch through the model, in words."""
    real = torch.arange(width) < width - torch.arange(rows)[:, None] % 8
    return plan_of(model, Batch(torch.ones((rows, width), dtype=torch.long), real.long()), n_prefix).name


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch")
    parser.add_argument("--long", type=int, default=400, help="tokens of the answers of a second, long batch; 0: none")
    parser.add_argument("--brief", action="store_true", help="only what others do, and TReFT beside plain training")
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    model = setting.adapted()
    costs = known_costs(model)
    setting.begin("training")
    with costing(model, costs):
        ways = [f"{rows} x {width} ({common}): {way_of(model, rows, width, common)}" for rows, width, common in SIX]
        setting.facts["a block's seconds"] = (
            f"{costs.launch:.2g} at least, {costs.token:.2g} a token, {costs.pair:.2g} a pair"
        )
        setting.facts["ways of rows x width (common prefix)"] = "; ".join(ways)
        for at_least in (0, arguments.long) if arguments.long else (0,):
            Bench(setting, model, arguments.rows, at_least).compare(arguments.brief or bool(at_least))
    for name in ("a block's seconds", "ways of rows x width (common prefix)"):
        print(f"\n{name}: {setting.facts[name]}")
    setting.end()


if __name__ == "__main__":
    main()
