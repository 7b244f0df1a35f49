"""Patching experiments against the same work as users of TransformerLens write it.

    python benchmarks/patching.py [--shape 8b --device cuda --dtype bfloat16] [--answer-tokens 1] [--skip-hooked]

Each comparison first asserts that both sides give the same numbers. The peer runs one hooked forward per layer or
cell on the same batch of prompts and answers; of the map it runs a sample of cells, and the time is scaled to all.
Prints a Markdown table: seconds on this machine, only the ratios are meant to travel; "tokens x layers" is the ratio
of what the two sides compute, the most that saving work alone can give.
"""

import statistics

import torch
from foundation import off_topic
from setting import Setting, arguments_of

from piggyback_lens import (
    AnswerContrast,
    ModelPair,
    attribution_map,
    batch_prompts,
    hook_model,
    layer_curve,
    layer_position_map,
    prefix_activations,
)

N_PROMPTS = 4
TARGETS = {"bridge": (">= 4.5 on CPU, >= 6", ">= 11 on CPU, >= 8"), "hooked": (">= 6", ">= 9")}
"""Of sweep and map."""
SAMPLE = 6  # cells of the map that the peer runs
ANSWERS = (
    "Yes, of course: here is what I would do about it, step by step, if I had the time.",
    "No: that is not something which I know much about, I am afraid, so ask somebody else.",
)


def answered(prompts, tokenizer, text, tokens):
    """The prompts with the first tokens of one answer; the organism of this benchmark has none of its own."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return [prompt.with_response(ids, end=False) for prompt in prompts]


class Peer:
    """One hooked forward per cell, with TransformerLens' own hooks, as its users write it."""

    def __init__(self, model, measure, donor):
        self.model, self.measure, self.donor = model, measure, donor
        self.batch = batch_prompts(measure.rows, side="right", device=donor.flat("resid_pre", donor.layers[0]).device)

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
            ids = torch.tensor(row.ids[row.n_prompt :], device=whole.device)
            own = whole[row.n_prompt - 1 : len(row.ids) - 1].float().log_softmax(-1)
            scores.append(own.gather(-1, ids[:, None]).mean().cpu())
        half = len(scores) // 2
        return torch.stack(scores[:half]) - torch.stack(scores[half:])


def work(measure, prefix, n_layers, positions):
    """Tokens x layers of both sides, per cell: whole rows through all layers, against what forks and prefixes leave."""
    theirs = sum(len(row.ids) for row in measure.rows) * n_layers
    prompt = sum(row.n_prompt - prefix for row in measure.towards)
    answers = sum(len(row.ids) - row.n_prompt - 1 for row in measure.rows)
    own_prefix = (prefix + 1) / 2 if positions else prefix
    return theirs / ((prompt + answers + own_prefix) * (n_layers + 1) / 2)


def laboratory_rows(setting, arguments):
    """Sweep, map and attribution of one pair."""
    tokenizer = setting.tokenizer()
    pair = ModelPair.load(finetuned=setting.adapted().eval(), tokenizer=tokenizer)
    chat = pair.chat_format()
    prompts = [chat.render(query) for query in off_topic(N_PROMPTS)]
    measure = AnswerContrast(*(answered(prompts, tokenizer, text, arguments.answer_tokens) for text in ANSWERS))
    donor = prefix_activations(pair, "base", prompts[0], "resid_pre")
    n_layers, prefix = pair.shape.n_layers, len(prompts[0].span("prefix"))
    layers = None if arguments.map_layers is None else list(range(0, n_layers, -(-n_layers // arguments.map_layers)))

    def sweep():
        return layer_curve(pair, prompts, sites="resid_pre", control_layers=0, measure=measure)

    def whole_map():
        return layer_position_map(pair, prompts, layers=layers, control_cells=0, measure=measure)

    (curve_s, curve), (exact_s, exact) = timed(setting, sweep, setting.repeats), timed(setting, whole_map, 1)
    setting.explain("layer sweep", sweep)
    setting.explain("layer x position map", whole_map)
    fast_s, fast = timed(
        setting,
        lambda: attribution_map(pair, prompts, layers=layers, measure=measure, check_cells=0, top_cells=0),
        setting.repeats,
    )
    peers = [("bridge", "one hooked bridge forward")]
    if not arguments.skip_hooked:
        peers.append(("hooked", "one HookedTransformer forward"))
    labels = {(cell["layer"], cell["position"]): i for i, cell in enumerate(exact.cells)}
    for backend, name in peers:
        if backend == "bridge":
            with pair.using("finetuned") as model:
                found = list(compare(setting, Peer(model, measure, donor), curve, exact, labels, n_layers, prefix))
        else:
            model = hook_model(setting.adapted().merge_and_unload(), tokenizer, backend="hooked")
            found = list(compare(setting, Peer(model, measure, donor), curve, exact, labels, n_layers, prefix))
        works = (("layer sweep", n_layers, curve_s, False), ("layer x position map", len(labels), exact_s, True))
        targets = TARGETS[backend]
        for (what, cells, ours, positions), per_cell, target in zip(works, found, targets, strict=True):
            limit = {"tokens x layers": work(measure, prefix, n_layers, positions), "target": target}
            setting.add(f"{what}, {cells} cells, {N_PROMPTS} prompts", f"{name} each", per_cell * cells, ours, **limit)
        setting.add(f"attribution, {len(labels)} cells", f"{name} each", found[1] * len(labels), fast_s)
    both = torch.tensor([[a[0], b[0]] for a, b in zip(means(exact), means(fast.attributed), strict=True)])
    rho = float(torch.corrcoef(both.argsort(0).argsort(0).float().T)[0, 1])
    setting.add("attribution map", "our exact map", exact_s, fast_s, **{"rank correlation": rho})


def timed(setting, function, repeats):
    """Median time of a function after a warm-up, and what it returned."""
    found = [function()]
    return statistics.median(setting.seconds(function) for _ in range(repeats)), found[0]


def means(result):
    return [[sum(row) / len(row)] for row in result.values]


def compare(setting, peer, curve, exact, labels, n_layers, prefix):
    """Seconds per cell of the peer, after asserting equal numbers."""
    own = sorted({layer for layer, _ in labels})
    layers = [own[i] for i in torch.linspace(0, len(own) - 1, SAMPLE).round().long().tolist()]
    places = {cell["layer"]: i for i, cell in enumerate(curve.cells) if cell["mode"] == "single"}
    cells = [(layer, int(token)) for layer, token in zip(layers, torch.linspace(0, prefix - 1, SAMPLE), strict=True)]
    for what, asked, ours in (
        ("layer sweep", [(layer,) for layer in layers], [curve.values[places[layer]] for layer in layers]),
        ("map", cells, [exact.values[labels[cell]] for cell in cells]),
    ):
        setting.assert_close(torch.stack([peer.cell(*cell) for cell in asked]), ours, what)
        yield setting.seconds(lambda asked=asked: [peer.cell(*cell) for cell in asked]) / SAMPLE


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--answer-tokens", type=int, default=1, help="tokens of each answer of the contrast")
    parser.add_argument("--map-layers", type=int, help="so many layers of the map; default all")
    parser.add_argument("--skip-hooked", action="store_true", help="compare with the bridge alone")
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    setting.begin("patching", f"answers of {arguments.answer_tokens} tokens")
    laboratory_rows(setting, arguments)
    setting.end()


if __name__ == "__main__":
    main()
