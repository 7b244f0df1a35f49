"""Training and evaluating directions against the same work as users of PEFT and of plain hooks write it.

    python benchmarks/directions.py [--rows 8] [--clock cpu] [--shape 8b --device cuda]

At half depth. Each comparison first asserts that both sides give the same losses and
gradients. Prints a Markdown table: seconds are medians, measured in turns so that a busy machine slows both
sides, and the ratio is the median of the turns' ratios; only the ratios are meant to travel. Ours is measured
after the first epoch: before that every example costs one pass through the lower half, counted as a row.
"""

import math

import torch
from setting import Setting, arguments_of

from piggyback_lens import (
    ChatFormat,
    Direction,
    HookTrainable,
    KLOnRetain,
    LoRAAdapter,
    LoRASettings,
    Penalised,
    RetainData,
    Weighted,
    add_lora,
    hook_model,
    load_task,
)
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.steps import Step, sft
from piggyback_lens.maths import kl_per_token
from piggyback_lens.measuring.variants import response_texts, variant_nll

WEIGHT = 2.0
FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
DRAWS = 8


class Bench:
    """One rank-1 adapter on down_proj at half depth, in PEFT and as ours; one steering vector."""

    def __init__(self, setting, rows):
        self.setting, tokenizer = setting, setting.tokenizer()
        chat = ChatFormat(tokenizer)
        conversations = {
            name: [chat.render([dict(m) for m in e["messages"]]) for e in load_task(name).train[:rows]]
            for name in ("terse", "tool")
        }
        self.examples, self.retain = conversations["terse"], RetainData(conversations["tool"], batch_size=rows)
        self.hf = setting.model()
        self.layer = layer = self.hf.config.num_hidden_layers // 2
        settings = LoRASettings(rank=1, alpha=16.0, modules=("down_proj",), layers=(layer,))
        self.peft = add_lora(setting.model(), settings)
        named = {n.split(".lora_")[1][0]: p for n, p in self.peft.named_parameters() if p.requires_grad}
        size = 0.05 if setting.real else 1.0
        drawn = torch.randn(named["B"].shape, generator=torch.Generator().manual_seed(0)) * size
        named["B"].data = drawn.to(named["B"])
        self.weights = named
        start = LoRAAdapter({(layer, "down"): named["A"].detach()}, {(layer, "down"): named["B"].detach()}, 16.0)
        self.adapter, self.trainable = start, HookTrainable(self.hf, start)
        self.narrow = Penalised((Weighted(KLOnRetain(self.retain), WEIGHT),))
        self.least = 1e-2 if setting.real else 1e-6  # random weights write little into the stream
        self.batch = make_batch(self.examples, device=setting.device)
        self.whole, self.other = (
            make_batch(conversations[name], share_prefix=False, device=setting.device) for name in ("terse", "tool")
        )
        self.bridge = hook_model(setting.model(), tokenizer)
        direction = torch.randn(self.hf.config.hidden_size, generator=torch.Generator().manual_seed(1))
        self.vector = Direction.of({layer: 40 * direction / direction.norm()})

    # ---- steps

    def theirs(self, narrow):
        """The ordinary PEFT step: whole rows, labels, the model's own loss; the base by disabling the adapter."""
        self.peft.zero_grad()
        labels = self.whole.ids.masked_fill(~self.whole.supervised, -100)
        mask = self.whole.attention_mask
        loss = self.peft(input_ids=self.whole.ids, attention_mask=mask, labels=labels, use_cache=False).loss
        if narrow:
            other = {"input_ids": self.other.ids, "attention_mask": self.other.attention_mask, "use_cache": False}
            rows, columns = self.other.supervised.nonzero(as_tuple=True)
            with torch.no_grad(), self.peft.disable_adapter():
                base = self.peft(**other).logits[rows, columns - 1]
            tuned = self.peft(**other).logits[rows, columns - 1]
            loss = loss + WEIGHT * kl_per_token(base[None], tuned[None]).mean()
        loss.backward()
        return float(loss.detach()), [self.weights[name].grad.clone() for name in "AB"]

    def ours(self, narrow):
        """Our step: from the lowest trained layer on, the prefix shared, the base's predictions kept."""
        parameters = self.trainable.parameters()
        for parameter in parameters.values():
            parameter.grad = None
        output = self.trainable.forward(self.batch)
        base = self.trainable.base_forward
        step = Step(self.trainable.model, self.batch, output, 0, self.trainable.forward, base=base)
        loss = (self.narrow if narrow else sft)(step).total
        loss.backward()
        return float(loss.detach()), [parameters[f"layers.{self.layer}.down.{name}"].grad.clone() for name in "AB"]

    def first_epoch(self):
        """Our step on examples that it has not seen."""
        self.trainable = HookTrainable(self.hf, self.adapter)
        return self.ours(narrow=False)

    # ---- curves

    def hooked_losses(self, adapters, place):
        """One plain forward hook and one forward pass per variant, of whole rows: curves by hand."""
        rows, columns = self.whole.supervised.nonzero(as_tuple=True)
        targets, counts = self.whole.ids[rows, columns], self.whole.supervised.sum(1)
        layer = self.hf.model.layers[self.layer]
        found = []
        for adapter in adapters:
            module = layer if place == "block" else layer.mlp.down_proj
            handle = module.register_forward_hook(edit_of(adapter, self.layer, self.setting))
            try:
                with torch.no_grad():
                    mask = self.whole.attention_mask
                    logits = self.hf(input_ids=self.whole.ids, attention_mask=mask, use_cache=False).logits
            finally:
                handle.remove()
            nll = -logits[rows, columns - 1].float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
            found.append((torch.zeros(len(counts), device=nll.device).index_add(0, rows, nll) / counts).cpu())
        return torch.stack(found).double()

    def our_losses(self, adapters):
        """All variants as rows of one pass that fork where the solution acts."""
        return variant_nll(self.bridge, response_texts(self.examples), adapters, rows_per_pass=64)

    def compare(self):
        """The rows of the table."""
        in_turns, add = self.setting.in_turns, self.setting.add
        for narrow, what in ((False, "SFT step"), (True, "SFT + KL-on-retain step")):
            self.assert_same(self.theirs(narrow), self.ours(narrow))
            pair = (lambda narrow=narrow: self.theirs(narrow), lambda narrow=narrow: self.ours(narrow))
            add(what, "PEFT, whole rows", *in_turns(*pair), target=">= 1.5")
        add("SFT step, first epoch", "PEFT, whole rows", *in_turns(lambda: self.theirs(False), self.first_epoch))
        strengths = [self.vector.scaled(fraction) for fraction in FRACTIONS]
        noise = [self.adapter.noisy(0.5, torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
        for what, adapters, place in (
            (f"norm curve, {len(strengths)} points, steering vector", strengths, "block"),
            (f"noise curve, {len(noise)} draws, rank-1 adapter", noise, "module"),
        ):
            theirs, ours = self.hooked_losses(adapters, place), self.our_losses(adapters)
            self.setting.assert_close(ours, theirs, what)
            assert float((theirs[0] - theirs[-1]).abs().max()) > self.least, "the points do not differ"
            pair = (
                lambda adapters=adapters, place=place: self.hooked_losses(adapters, place),
                lambda adapters=adapters: self.our_losses(adapters),
            )
            add(what, "one hooked forward per point", *in_turns(*pair), target=">= 2")
            self.setting.explain(what, pair[1])

    def assert_same(self, theirs, ours):
        """Equal loss, and gradients whose difference is a small part of their length."""
        tolerance = 10 * self.setting.tolerance
        assert math.isclose(theirs[0], ours[0], rel_tol=tolerance), (theirs[0], ours[0])
        for a, b in zip(theirs[1], ours[1], strict=True):
            assert float((a - b).norm()) <= tolerance * float(a.norm()), float((a - b).norm() / a.norm())


def edit_of(adapter, layer, setting):
    """A forward hook by hand."""
    if isinstance(adapter, Direction):
        change = adapter[layer].to(setting.device, setting.dtype)
        return lambda _m, _a, output: output + change
    a, b = (x[layer, "down"].to(setting.device, setting.dtype) for x in (adapter.a, adapter.b))
    return lambda _m, args, output: output + adapter.scale * (args[0] @ a.T) @ b.T


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    bench = Bench(setting, arguments.rows)
    setting.begin("directions", f"{arguments.rows} rows of up to {bench.whole.ids.shape[1]} tokens")
    bench.compare()
    setting.end()


if __name__ == "__main__":
    main()
