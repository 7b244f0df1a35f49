"""Who reads the carrier: attention edges of narrow finetunes, and the least patch that restores the base.

python examples/attention_edges.py edges_out docs [--seeds 0,1,2] [--most 1] [--page]

For every seed a terse organism is trained (as those of gated_adapters.py, with no gate), its map of attention edges is
made, answers are generated with each whole edge cut, and a soft patch is learnt. Stages are kept as they are finished
and not run again; a killed one goes on. With --most N, so many stages are run and the page is left.

Fixed before the first run. Measured is the contrast of the models' own answers (teacher-forced, 24 tokens) on
off-topic questions. What a cut restores in the finetuned model, minus how far the same cut moves the base, either
way, is *specific*; all are fractions of the contrast (mere damage pulls both models to the middle). An edge *carries*
if the interval of what is specific lies above 0, it *does not* if that interval lies below MARGIN, else it *cannot be
told here*. The soft patch has *found* its tokens if it restores more than the same coefficients at other tokens, by an
interval above 0.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from piggyback_lens import (
    ChatFormat,
    LensError,
    LoRASettings,
    ModelPair,
    SoftPatchSettings,
    TrainSettings,
    __version__,
    add_lora,
    attach_adapter,
    cut_attention,
    default_model,
    edge_map,
    generate,
    get_behaviour,
    load_causal_lm,
    load_task,
    load_tokenizer,
    soft_patch,
    train,
)
from piggyback_lens.conversations.token_view import visible
from piggyback_lens.experiments.edges import specific
from piggyback_lens.files import atomic_write_text, read_json, write_json
from piggyback_lens.intervals import interval_text, mean_interval, recovery

EDGES = (("query", "prefix"), ("postfix", "prefix"), ("response", "prefix"))
MARGIN, TOP = 0.2, 10
RATE, STEPS, BATCH = 3e-4, 30, 8
MAPPED, LEARNT, ANSWERED, NEW_TOKENS, EXACT = 12, 18, 12, 24, 6
SOFT = SoftPatchSettings(bands=6, steps=40, batch_size=4, held_out=3)
BEHAVIOUR = "words:20"  # a cut behind 20 words changes nothing
SCALE = {"width": 1000, "height": 760}
CONDITIONS = ("finetuned", "soft patch", "other tokens control", "whole prefix patched")


class Study:
    """One organism, with a folder for each stage."""

    def __init__(self, seed: int, out: Path) -> None:
        self.seed, self.out, self.task = seed, out / f"seed_{seed}", load_task("terse")
        self.tokenizer = load_tokenizer(default_model())
        self.chat = ChatFormat(self.tokenizer)
        self.prompts = [self.chat.render(query) for query in self.task.off_topic]
        self.stages = {"train": self.train, "edges": self.edges, "answers": self.answers, "soft": self.soft}

    def done(self, stage: str) -> bool:
        file = {"train": "organism/result.json", "answers": "answers.json"}.get(stage, f"{stage}/result.json")
        return (self.out / file).exists()

    def train(self) -> None:
        examples = [self.chat.render(example["messages"]) for example in self.task.train]
        settings = TrainSettings(steps=STEPS, batch_size=BATCH, learning_rate=RATE, seed=self.seed, checkpoint_every=10)
        model = add_lora(load_causal_lm(default_model()), LoRASettings(), seed=self.seed)
        train(model, examples, settings, out=self.out / "organism", progress=False)

    def pair(self) -> ModelPair:
        model = attach_adapter(load_causal_lm(default_model()), self.out / "organism" / "adapter")
        names = ("SmolLM2-135M", f"terse, seed {self.seed}")
        return ModelPair.load(finetuned=model, tokenizer=self.tokenizer, names=names)

    def edges(self, pair: ModelPair | None = None):
        some = self.prompts[:MAPPED]
        return edge_map(
            pair or self.pair(), some, edges=EDGES, exact_cells=EXACT, out=self.out / "edges", progress=False
        )

    def soft(self, pair: ModelPair | None = None):
        return soft_patch(pair or self.pair(), self.prompts[:LEARNT], SOFT, out=self.out / "soft", progress=False)

    def answers(self) -> None:
        """Words of every answer with each whole edge cut, in both models."""
        pair, behaviour, found = self.pair(), get_behaviour(BEHAVIOUR), {}
        for side in ("base", "finetuned"):
            with pair.using(side) as model:
                for edge in (None, *EDGES):
                    cut = None if edge is None else cut_attention(*edge)
                    made = generate(
                        model,
                        self.prompts[:ANSWERED],
                        interventions=cut,
                        max_new_tokens=NEW_TOKENS,
                        progress=False,
                    )
                    name = "nothing" if edge is None else f"{edge[0]} ← {edge[1]}"
                    found[f"{side}: {name}"] = {
                        "words": [behaviour(answer.text) for answer in made],
                        "first": [answer.text for answer in made[:2]],
                    }
        write_json(self.out / "answers.json", found)

    def load(self, stage: str):
        """What a stage has left."""
        from piggyback_lens import load_result

        return read_json(self.out / "answers.json") if stage == "answers" else load_result(self.out / stage)


def over_seeds(each: list[list[float]]) -> tuple[list[float], list[int]]:
    """Values of all seeds, and the question of each: one cluster per question."""
    return [x for own in each for x in own], [i for own in each for i in range(len(own))]


def restored(moved: list[list[float]], finetuned: list[list[float]], base: list[list[float]]):
    """(moved - finetuned) / (base - finetuned) over all seeds."""
    values, questions = over_seeds(moved)
    return recovery(values, over_seeds(finetuned)[0], over_seeds(base)[0], questions, rate=False)


def whole_edges(maps: list) -> list[str]:
    """A row for every edge: restored, in the base, specific, and what is said of it."""
    lines = ["| reader ← read | restored in the finetuned | same cut in the base | specific | carries? | each seed |"]
    lines += ["|---|---|---|---|---|---|"]
    finetuned, base = ([list(getattr(own.exact, side)) for own in maps] for side in ("finetuned", "base"))
    for reader, read in EDGES:
        cut = {series: [] for series in ("patched", "same cut in the base")}
        for own in maps:
            for labels, values in zip(own.exact.cells, own.exact.values, strict=True):
                where = (labels["span"], labels["read_from"], labels["mode"])
                if where == (reader, read, "all layers") and labels["series"] in cut:
                    cut[labels["series"]].append(list(values))
        moved, in_base = cut.values()
        # What the cut does to the base, set off from the finetuned model, so that both have one unit.
        damaged = [
            [c - b + f for c, b, f in zip(*rows, strict=True)] for rows in zip(in_base, base, finetuned, strict=True)
        ]
        found = [restored(x, finetuned, base) for x in (moved, damaged)]
        columns = [over_seeds(x)[0] for x in (moved, in_base, finetuned, base)]
        found.append(specific(*columns, over_seeds(moved)[1]))
        seeds = ", ".join(
            f"{restored([m], [f], [b]).value:.2f}" for m, f, b in zip(moved, finetuned, base, strict=True)
        )
        said = "carries" if found[2].low > 0 else "does not" if found[2].high < MARGIN else "cannot be told here"
        texts = [interval_text(x.value, x.low, x.high) for x in found]
        lines.append(f"| {reader} ← {read} | {' | '.join(texts)} | {said} | {seeds} |")
    return lines


def short(maps: list, patches: list) -> str:
    """What was found, in two sentences."""
    rows = [line.split(" | ") for line in whole_edges(maps)[2:]]
    said = "; ".join(f"{row[0].removeprefix('| ')}: {row[4]}" for row in rows)
    plain = [own.kl["finetuned"] for own in patches]
    none = [[0.0] * len(own) for own in plain]
    gone = [restored([own.kl[name] for own in patches], plain, none).value for name in CONDITIONS[1:]]
    size = np.mean([np.mean(own.coefficients) for own in patches])
    return (
        f"{said}.\nA learnt soft patch takes {size:.0%} of the base's prefix and removes {gone[0]:.0%} of the KL to "
        f"the base\non questions that it was not learnt on; the whole prefix removes {gone[2]:.0%}, the same "
        f"coefficients\nat other tokens {gone[1]:.0%}."
    )


def single_heads(maps: list) -> list[str]:
    """The cells that were cut exactly in the first seed's map, the largest first."""
    frame = maps[0].to_frame().dropna(subset=["exact"])
    order = frame["exact"].abs().sort_values(ascending=False).index[:TOP]
    lines = [
        "| reader ← read | layer | head | by gradient | cut exactly | same cut in the base |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['span']} ← {row['read_from']} | {row['layer']} | {row['label']} | {row['value']:.3f} | "
        f"{row['exact']:.3f} | {row['in_base']:.3f} |"
        for row in frame.loc[order].to_dict("records")
    ]
    return lines


def agreement(maps: list) -> str:
    """How far the maps of two seeds name the same heads."""
    frames = [own.attributed.to_frame() for own in maps]
    tops = [set(frame["value"].abs().sort_values(ascending=False).index[:TOP]) for frame in frames]
    pairs = [(i, j) for i in range(len(maps)) for j in range(i)]
    if not pairs:
        return ""
    from scipy.stats import spearmanr

    common = ", ".join(str(len(tops[i] & tops[j])) for i, j in pairs)
    rho = ", ".join(f"{spearmanr(frames[i]['value'], frames[j]['value']).statistic:.2f}" for i, j in pairs)
    cells = len(frames[0])
    return f"\nOf the {TOP} largest cells of {cells}, two seeds share {common}; rank correlation of all cells {rho}."


def cut_answers(studies: list) -> list[str]:
    """Words per answer with each whole edge cut."""
    rows = [study.load("answers") for study in studies]
    lines = ["| cut | base | finetuned |", "|---|---|---|"]
    for name in ("nothing", *(f"{reader} ← {read}" for reader, read in EDGES)):
        means = [
            mean_interval(*over_seeds([own[f"{side}: {name}"]["words"] for own in rows]))
            for side in ("base", "finetuned")
        ]
        lines.append(f"| {name} | {means[0]} | {means[1]} |")
    return lines


def soft_table(found: list) -> tuple[list[str], str]:
    """What the learnt coefficients restore on held-out prompts, and what is said of them."""
    plain = [own.kl["finetuned"] for own in found]
    none = [[0.0] * len(own) for own in plain]
    lines = ["| condition | KL to the base, nats per token | fraction gone |", "|---|---|---|"]
    for name in CONDITIONS:
        own = [result.kl[name] for result in found]
        gone = restored(own, plain, none)
        kl = mean_interval(*over_seeds(own), rate=False)
        text = "" if name == "finetuned" else interval_text(gone.value, gone.low, gone.high)
        lines.append(f"| {name} | {kl.value:.3f} | {text} |")
    three = [[own.kl[name] for name in ("soft patch", "other tokens control", "finetuned")] for own in found]
    more = [[s - c + p for s, c, p in zip(*own, strict=True)] for own in three]
    above = restored(more, plain, none)
    verdict = "found" if above.low > 0 else "not found"
    sizes = ", ".join(f"{np.mean(own.coefficients):.2f}" for own in found)
    text = (
        f"Mean coefficient of each seed: {sizes}. Beyond the same coefficients at other tokens, the soft patch "
        f"restores {interval_text(above.value, above.low, above.high)}: its tokens are **{verdict}**."
    )
    names = []
    for own in found:
        by_token = np.array(own.coefficients).mean(1)
        best = by_token.argsort()[::-1][:3]
        names.append(", ".join(f"`{visible(own.tokens[i])}` ({i}, {by_token[i]:.2f})" for i in best))
    text += " Tokens with the largest mean coefficient, by seed: " + "; ".join(names) + "."
    pairs = [(i, j) for i in range(len(found)) for j in range(i)]
    if pairs:
        flat = [np.ravel(own.coefficients) for own in found]
        text += " Correlation of the coefficients of two seeds: "
        text += ", ".join(f"{np.corrcoef(flat[i], flat[j])[0, 1]:.2f}" for i, j in pairs) + "."
    return lines, text


PAGE = """# Attention edges

**Made with piggyback_lens {version}** by `{command}`; no number is typed by hand.

Patching says *where* a finetune is carried: in keys and values of the prefix, say. It does not say *who reads them*. An
attention edge is what the tokens of one span (readers) read from those of another. `cut_attention` takes edges away or
scales them (attention knockout), by layer and head; `edge_map` asks, for every layer and head, how much of the contrast
between base and finetuned comes back where one edge is cut in the finetuned model; `soft_patch` learns how little of
the base's prefix is enough to restore the base.

```python
from piggyback_lens import ModelPair, SoftPatchSettings, cut_attention, edge_map, generate, load_task, soft_patch

pair = ModelPair.load("Qwen/Qwen2.5-7B-Instruct", adapter="my-finetune")
prompts = pair.chat_format().ask(load_task("terse").off_topic[:6])
found = edge_map(pair, prompts, edges=[("query", "prefix"), ("response", "prefix")], exact_cells=2)
print(found.whole)  # every edge cut at all layers and heads, in the finetuned model and in the base
with pair.using("finetuned") as model:  # the answers themselves, with one head of one layer blind to the prefix
    generate(model, prompts, interventions=cut_attention("response", "prefix", layers=1, heads=[2]), max_new_tokens=8)
least = soft_patch(pair, prompts, SoftPatchSettings(bands=1, steps=10))
least.figure()
```

A cut also takes away what the base reads there (the first token of a prompt above all, on which attention rests). Mere
damage makes both models' answers equally improbable and pulls both contrasts to the middle, so a large number alone
says nothing: the same cut is made in the base, and how far it moves that, either way, is subtracted. What can be
cut: any readers and keys of the prompt, and of the answer (span `response`, generated or teacher-forced), on both
backends, on models loaded with any attention, since hooked models compute the scores by themselves. What cannot is
refused by name: a reader that would be left without a key, and layouts whose attention shows no scores before the
softmax.

Fixed in the script before the first run: *specific* is what a cut restores in the finetuned model minus how far the
same cut moves the base. An edge *carries* if the interval of that lies above 0, it *does not* if the interval lies
below {margin:.0%}, else it *cannot be told here*.

In short: {short}

## Whole edges

SmolLM2-135M, {n_seeds} terse organisms ({steps} steps of {batch} rows, rate {rate}), {mapped} off-topic questions,
contrast of the models' own answers of {tokens} tokens. Fractions of the contrast, with 95 % intervals over questions
(each the mean of its seeds).

{whole}

## Single heads

By gradient: {cells} cells a map, from one forward and one backward pass for each question and answer. The {exact}
largest and as many evenly spaced ones are cut exactly; on the even sample the rank correlation with exact cuts is
{rho}.{agreement}

![what cutting an edge restores, by layer and head](attention_edges_map.png)

Seed {first}, the largest of those that were cut exactly:

{heads}

## Answers

Words per answer (counted to 20) with a whole edge cut while {answered} questions are answered, greedily, with at most
{tokens} tokens:

{answers}

{examples}

## The least patch

One coefficient between 0 (the finetuned model's keys and values) and 1 (the base's) for each of the {n_tokens} prefix
tokens in each of {bands} bands of layers, learnt on {trained} questions ({soft_steps} steps, {price} nats per token for
patching everything), measured on {held} others.

{soft}

{soft_text}

![learnt coefficients](attention_edges_soft.png)
"""


def page(studies: list, docs: Path, command: str) -> None:
    maps, patches = ([study.load(stage) for study in studies] for stage in ("edges", "soft"))
    docs.mkdir(parents=True, exist_ok=True)
    maps[0].save_figure(docs / "attention_edges_map.png")
    patches[0].save_figure(docs / "attention_edges_soft.png")
    lines, text = soft_table(patches)
    first = studies[0].load("answers")
    examples = [
        f"*{name}*: {own['first'][0].replace(chr(10), '⏎')}  "
        for name, own in first.items()
        if name.startswith(("base", "finetuned"))
    ]
    asked = f'"{studies[0].prompts[0].query}", seed {studies[0].seed}:\n\n'
    rho = ", ".join(f"{own.rank_correlation:.2f}" for own in maps)
    written = PAGE.format(
        version=__version__, command=command, margin=MARGIN, n_seeds=len(studies), steps=STEPS, batch=BATCH, rate=RATE,
        mapped=MAPPED, tokens=NEW_TOKENS, short=short(maps, patches),
        whole="\n".join(whole_edges(maps)), cells=len(maps[0].attributed.cells),
        exact=EXACT, rho=rho, agreement=agreement(maps), first=studies[0].seed, heads="\n".join(single_heads(maps)),
        answered=ANSWERED, answers="\n".join(cut_answers(studies)), examples=asked + "\n".join(examples),
        n_tokens=len(patches[0].tokens), bands=SOFT.bands, trained=patches[0].settings["trained_on"],
        soft_steps=SOFT.steps, price=SOFT.sparsity, held=len(patches[0].questions), soft="\n".join(lines),
        soft_text=text,
    )  # fmt: skip
    atomic_write_text(docs / "attention_edges.md", written)
    print(docs / "attention_edges.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the stages; continued if it is there")
    parser.add_argument("docs", type=Path, help="folder for the page")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--most", type=int, help="run so many stages, and write no page")
    parser.add_argument("--page", action="store_true", help="only write the page, of what is there")
    options = parser.parse_args()
    studies = [Study(int(seed), options.out) for seed in options.seeds.split(",")]
    left = [(study, name) for study in studies for name in study.stages if not study.done(name)]
    if not options.page:
        print(f"{len(left)} stages are left", flush=True)
        for study, name in left[: options.most]:
            start = time.perf_counter()
            study.stages[name]()
            print(f"seed {study.seed} {name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.most is not None:
            return
    whole = [study for study in studies if all(map(study.done, study.stages))]
    if not whole:
        raise LensError(f"{options.out} has no seed with all stages yet: run the same command without --page")
    seeds = ",".join(str(study.seed) for study in whole)
    page(whole, options.docs, f"python examples/attention_edges.py edges_out docs --seeds {seeds}")


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        sys.exit(f"error: {error}")
