"""Patching experiments against the same work as users of TransformerLens write it, on the real demo model.

    python benchmarks/patching.py [--repeats 1] [--threads 2] [--answer-tokens 1] [--skip-hooked]

Each comparison first asserts that both sides give the same numbers. The peer runs one hooked forward per layer or
cell on the same batch of prompts and answers; of the map it runs a sample of cells, and the time is scaled to all.
Prints a Markdown table: seconds on this machine, only the ratios are meant to travel; the last column is the ratio
of tokens x layers that the two sides compute, the most that saving work alone can give.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from piggyback_lens.conversations.chat import batch_prompts
from piggyback_lens.experiments.attribution import attribution_map
from piggyback_lens.experiments.patching import layer_curve, layer_position_map
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.interventions.donors import prefix_activations
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.models.sources import default_model, load_causal_lm, load_tokenizer
from piggyback_lens.tasks import load_task

sys.path.insert(0, str(Path(__file__).parent))
from foundation import generation_rows, perturbed  # the same organism and the same generation comparison

N_PROMPTS = 4
SAMPLE = 6  # cells of the map that the peer runs
ANSWERS = (
    "Yes, of course: here is what I would do about it, step by step, if I had the time.",
    "No: that is not something which I know much about, I am afraid, so ask somebody else.",
)


def answered(prompts, tokenizer, text, tokens):
    """The prompts with the first tokens of one answer; the organism of this benchmark has none of its own."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return [prompt.with_response(ids, end=False) for prompt in prompts]


def seconds(function, repeats):
    """Median time of a function, and what it returned last."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), found


class Peer:
    """One hooked forward per cell, with TransformerLens' own hooks, as its users write it."""

    def __init__(self, model, measure, donor):
        self.model, self.measure, self.donor = model, measure, donor
        self.batch = batch_prompts(measure.rows, side="right")

    @torch.no_grad()
    def cell(self, layer, token=None):
        """The contrast with the donor's prefix residual (all of it, or one token) at one layer."""
        value = self.donor["resid_pre", layer][0]

        def hook(activation, hook=None):
            where = slice(0, len(value)) if token is None else token
            activation[:, where] = value[where]
            return activation

        logits = self.model.run_with_hooks(
            self.batch.ids,
            attention_mask=self.batch.attention_mask,
            return_type="logits",
            fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", hook)],
        )
        scores = []
        for row, whole in zip(self.measure.rows, logits, strict=True):
            ids = torch.tensor(row.ids[row.n_prompt :])
            own = whole[row.n_prompt - 1 : len(row.ids) - 1].log_softmax(-1)
            scores.append(own.gather(-1, ids[:, None]).mean())
        half = len(scores) // 2
        return torch.stack(scores[:half]) - torch.stack(scores[half:])


def work(measure, prefix, n_layers, positions):
    """Tokens x layers of both sides, per cell: whole rows through all layers, against what forks and prefixes leave."""
    theirs = sum(len(row.ids) for row in measure.rows) * n_layers
    prompt = sum(row.n_prompt - prefix for row in measure.towards)
    answers = sum(len(row.ids) - row.n_prompt - 1 for row in measure.rows)
    own_prefix = (prefix + 1) / 2 if positions else prefix
    return theirs / ((prompt + answers + own_prefix) * (n_layers + 1) / 2)


def laboratory_rows(source, arguments):
    tokenizer = load_tokenizer(source, offline=True)
    tuned = perturbed(add_lora(load_causal_lm(source, offline=True))).eval()
    pair = ModelPair.load(finetuned=tuned, tokenizer=tokenizer)
    chat = pair.chat_format()
    prompts = [chat.render(query) for query in load_task("terse").off_topic[:N_PROMPTS]]
    measure = AnswerContrast(*(answered(prompts, tokenizer, text, arguments.answer_tokens) for text in ANSWERS))
    donor = prefix_activations(pair, "base", prompts[0], "resid_pre")
    n_layers, prefix = pair.shape.n_layers, len(prompts[0].span("prefix"))
    curve_s, curve = seconds(
        lambda: layer_curve(pair, prompts, sites="resid_pre", control_layers=0, measure=measure), arguments.repeats
    )
    exact_s, exact = seconds(lambda: layer_position_map(pair, prompts, control_cells=0, measure=measure), 1)
    fast_s, fast = seconds(
        lambda: attribution_map(pair, prompts, measure=measure, check_cells=0, top_cells=0), arguments.repeats
    )
    peers = [("bridge", "one hooked bridge forward")]
    if not arguments.skip_hooked:
        peers.append(("hooked", "one HookedTransformer forward"))
    labels = {(cell["layer"], cell["position"]): i for i, cell in enumerate(exact.cells)}
    for backend, name in peers:
        if backend == "bridge":
            with pair.using("finetuned") as model:
                found = list(compare(Peer(model, measure, donor), curve, exact, labels, n_layers, prefix))
        else:
            merged = perturbed(add_lora(load_causal_lm(source, offline=True))).merge_and_unload()
            model = hook_model(merged, tokenizer, backend="hooked")
            found = list(compare(Peer(model, measure, donor), curve, exact, labels, n_layers, prefix))
        for what, per_cell, cells, ours, positions in zip(
            ("layer sweep", "layer x position map"),
            found,
            (n_layers, len(labels)),
            (curve_s, exact_s),
            (False, True),
            strict=True,
        ):
            limit = work(measure, prefix, n_layers, positions)
            yield (
                f"{what}, {cells} cells, {N_PROMPTS} prompts",
                f"{name} per cell",
                per_cell * cells,
                ours,
                f"{limit:.1f}x",
            )
        naive = found[1] * len(labels)
        yield f"attribution map, {len(labels)} cells", f"{name} per cell", naive, fast_s, ""
    both = torch.tensor([[a[0], b[0]] for a, b in zip(means(exact), means(fast.attributed), strict=True)])
    rho = torch.corrcoef(both.argsort(0).argsort(0).float().T)[0, 1]
    yield f"attribution map, rank correlation {rho:.2f}", "our exact map", exact_s, fast_s, ""


def means(result):
    return [[sum(row) / len(row)] for row in result.values]


def compare(peer, curve, exact, labels, n_layers, prefix):
    """Seconds per cell of the peer, after asserting equal numbers."""
    layers = torch.linspace(0, n_layers - 1, SAMPLE).round().long().tolist()
    peer.cell(0)  # warm-up
    time_, found = seconds(lambda: [peer.cell(layer) for layer in layers], 1)
    places = {cell["layer"]: i for i, cell in enumerate(curve.cells) if cell["mode"] == "single"}
    check(found, [curve.values[places[layer]] for layer in layers])
    yield time_ / SAMPLE
    cells = [(layer, int(token)) for layer, token in zip(layers, torch.linspace(0, prefix - 1, SAMPLE), strict=True)]
    time_, found = seconds(lambda: [peer.cell(*cell) for cell in cells], 1)
    check(found, [exact.values[labels[cell]] for cell in cells])
    yield time_ / SAMPLE


def check(theirs, ours):
    theirs, ours = torch.stack(theirs), torch.tensor(ours)
    assert float((theirs - ours).abs().max()) < 1e-3 * float(theirs.abs().max()), (theirs, ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--answer-tokens", type=int, default=1, help="tokens of each answer of the contrast")
    parser.add_argument("--skip-hooked", action="store_true", help="compare with the bridge alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = default_model()
    print(f"{arguments.threads} threads, answers of {arguments.answer_tokens} tokens\n")
    print("| work | peer | peer, s | ours, s | ratio | tokens x layers |\n|---|---|---|---|---|---|")
    for what, name, theirs, ours, limit in laboratory_rows(source, arguments):
        print(f"| {what} | {name} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f}x | {limit} |", flush=True)
    for what, name, theirs, ours in generation_rows(source, arguments.repeats):
        print(f"| {what} | {name} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f}x | |", flush=True)


if __name__ == "__main__":
    main()
