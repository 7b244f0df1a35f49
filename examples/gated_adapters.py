"""Sufficiency beside necessity: is the span that carries a behaviour needed to learn it?

python examples/gated_adapters.py examples/gated_cells docs [--tasks terse] [--seeds 0,1,2] [--rates 3e-4] [--page]

For every span: how much of the spread goes away when the base's keys and values of the span are patched into a
finetune (at test time), and how much of it never comes when the finetune's adapter is off at the span from the start
(in training and in use). Both are one number, recovery on the same off-topic questions: 0 is the plain finetune, 1 the
base. Cells (rate, gate, seed) are written as they are finished and not run again; a killed one goes on. Those of the
page are in examples/gated_cells, so that a longer grid begins with them.

What is decided, fixed before the first run: a span is *needed* if the interval of its necessity lies above MARGIN, *not
needed* if it lies below 1 − MARGIN, with on-topic behaviour kept to at least KEPT; else it cannot be told here.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from piggyback_lens import (
    ChatFormat,
    GatedAdapter,
    Interventions,
    LensError,
    LoRASettings,
    ModelPair,
    TrainSettings,
    __version__,
    adapter_off,
    add_lora,
    default_model,
    generate,
    get_behaviour,
    kv_patch,
    load_causal_lm,
    load_task,
    load_tokenizer,
    train,
)
from piggyback_lens.files import atomic_write_text, read_json, write_json
from piggyback_lens.intervals import mean_interval, percent, recovery

GATES = {
    "none": (),
    "prefix": ("prefix",),
    "query": ("query",),
    "postfix": ("postfix",),
    "prefix + postfix": ("prefix", "postfix"),
    "whole prompt": ("prefix", "query", "postfix"),
}
MARGIN, KEPT = 0.5, 0.8
STEPS, BATCH, PROMPTS, NEW_TOKENS = 30, 8, 16, 24
BEHAVIOURS = {"terse": "words:20"}  # a cut behind 20 words changes nothing
TOPICS = ("off-topic", "on-topic")
WIDTH, HEIGHT, SCALE = 900, 620, 2
COLUMNS = ("adapter off at", "off-topic", "each seed", "on-topic", "kept on-topic", "last loss", "patch at test time")
COLUMNS += ("off from the start", "needed to spread?")


class Study:
    """One task at one learning rate."""

    def __init__(self, task: str, rate: str, out: Path) -> None:
        self.task, self.rate, self.out = load_task(task), rate, out / f"{task}_{rate}"
        self.tokenizer = load_tokenizer(default_model())
        self.chat = ChatFormat(self.tokenizer)
        self.behaviour = get_behaviour(BEHAVIOURS.get(task, self.task.behaviour))
        questions = (self.task.off_topic, self.task.on_topic)
        self.prompts = {
            t: [self.chat.render(q) for q in own[:PROMPTS]] for t, own in zip(TOPICS, questions, strict=True)
        }
        self.examples = [self.chat.render(example["messages"]) for example in self.task.train]

    def model(self, seed: int):
        return add_lora(load_causal_lm(default_model()), LoRASettings(), seed=seed)

    def settings(self, seed: int, steps: int = STEPS) -> TrainSettings:
        return TrainSettings(
            steps=steps, batch_size=BATCH, learning_rate=float(self.rate), seed=seed, checkpoint_every=10
        )

    def answers(self, pair: ModelPair, side: str, topic: str, interventions=None) -> list[float]:
        """The behaviour of each answer."""
        with pair.using(side) as model:
            made = generate(
                model, self.prompts[topic], interventions=interventions, max_new_tokens=NEW_TOKENS, progress=False
            )
        return [self.behaviour(answer.text) for answer in made]

    def cost(self) -> float:
        """Seconds that a cell takes, from one step and two answers."""
        model = self.model(0)
        start = time.perf_counter()
        train(GatedAdapter(model, adapter_off("prefix")), self.examples, self.settings(0, steps=1), progress=False)
        step = time.perf_counter() - start
        pair = ModelPair.load(finetuned=model, tokenizer=self.tokenizer)
        start = time.perf_counter()
        with pair.using("finetuned") as hooked:
            generate(hooked, self.prompts["off-topic"][:8], max_new_tokens=NEW_TOKENS, progress=False)
        return STEPS * step + 2 * PROMPTS / 8 * (time.perf_counter() - start)

    def cell(self, gate: str, seed: int) -> None:
        """Train behind one gate and measure, unless that is there."""
        name = f"{gate.replace(' ', '_')}_{seed}"
        file = self.out / f"{name}.json"
        if file.exists():
            return
        print(f"{self.out.name} {name}", flush=True)
        model, off = self.model(seed), Interventions(tuple(adapter_off(span) for span in GATES[gate]))
        done = train(GatedAdapter(model, off), self.examples, self.settings(seed), out=self.out / name, progress=False)
        pair = ModelPair.load(finetuned=model, tokenizer=self.tokenizer)
        row = {"gate": gate, "seed": seed, "loss": done.history[-1]["loss"]}
        row |= {topic: self.answers(pair, "finetuned", topic, off) for topic in TOPICS}
        if gate == "none":
            row["base"] = {topic: self.answers(pair, "base", topic) for topic in TOPICS}
            row["patched"] = {
                other: self.answers(pair, "finetuned", "off-topic", self.repair(pair, GATES[other]))
                for other in GATES
                if GATES[other]
            }
        write_json(file, row)

    def repair(self, pair: ModelPair, spans: tuple[str, ...]):
        """The base's keys and values of these spans."""
        found = Interventions()
        for span in spans:
            found = found + kv_patch(pair, span, chat=self.chat, prompts=self.prompts["off-topic"])
        return found

    def rows(self) -> list[dict]:
        return [read_json(file) for file in sorted(self.out.glob("*.json"))]


def over_seeds(rows: list[dict], values) -> tuple[list[float], list[int]]:
    """Values of all seeds, and the question of each: one cluster per question."""
    each = [values(row) for row in sorted(rows, key=lambda row: row["seed"])]
    return [x for own in each for x in own], [i for own in each for i in range(len(own))]


def table(study: Study) -> tuple[list[dict], int]:
    """A row for every gate, of the seeds that every gate has."""
    rows = study.rows()
    seeds = set.intersection(*({row["seed"] for row in rows if row["gate"] == gate} for gate in GATES))
    if not seeds:
        raise LensError(f"{study.out} has no seed with all gates yet: run the same command again")
    of = {gate: [row for row in rows if row["gate"] == gate and row["seed"] in seeds] for gate in GATES}
    plain = {topic: over_seeds(of["none"], lambda row, t=topic: row[t]) for topic in TOPICS}
    base = {topic: over_seeds(of["none"], lambda row, t=topic: row["base"][t])[0] for topic in TOPICS}
    found = []
    for gate in GATES:
        own = {topic: over_seeds(of[gate], lambda row, t=topic: row[t])[0] for topic in TOPICS}
        line = {"gate": gate}
        for topic in TOPICS:
            line[topic] = mean_interval(own[topic], plain[topic][1])
        line["kept"] = recovery(own["on-topic"], base["on-topic"], plain["on-topic"][0], plain["on-topic"][1])
        line["seeds"] = [float(np.mean(row["off-topic"])) for row in sorted(of[gate], key=lambda row: row["seed"])]
        line["loss"] = float(np.mean([row["loss"] for row in of[gate]]))
        if gate != "none":
            line["necessity"] = recovery(
                own["off-topic"], plain["off-topic"][0], base["off-topic"], plain["off-topic"][1]
            )
            patched = over_seeds(of["none"], lambda row, g=gate: row["patched"][g])[0]
            line["sufficiency"] = recovery(patched, plain["off-topic"][0], base["off-topic"], plain["off-topic"][1])
        found.append(line)
    for line in found:
        line["base"] = {topic: mean_interval(base[topic], plain[topic][1]) for topic in TOPICS}
    return found, len(seeds)


def said(estimate) -> str:
    return percent(estimate.value, estimate.low, estimate.high)


def verdict(line: dict) -> str:
    if not line["kept"].value >= KEPT:
        return f"the task is not learnt ({said(line['kept'])} kept)"
    if line["necessity"].low > MARGIN:
        return "needed"
    return "not needed" if line["necessity"].high < 1 - MARGIN else "cannot be told here"


def section(study: Study, docs: Path, command: str) -> str:
    """What one study found, with its picture."""
    lines, n_seeds = table(study)
    base = lines[0]["base"]
    text = [
        f"## {study.task.name}, rate {study.rate}\n",
        f"`{command}`: {STEPS} steps of {BATCH} rows, LoRA on all linear modules, {n_seeds} seeds, {PROMPTS} questions "
        f"of each topic, greedy answers of at most {NEW_TOKENS} tokens. Measured: {study.behaviour.label}. "
        f"Base: {base['off-topic']} off-topic, {base['on-topic']} on-topic.\n",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for line in lines:
        shown = [
            line["gate"],
            str(line["off-topic"]),
            ", ".join(f"{x:.1f}" for x in line["seeds"]),
            str(line["on-topic"]),
        ]
        shown += [said(line["kept"]), f"{line['loss']:.3f}"]
        plain = line["gate"] == "none"
        shown += ["", "", ""] if plain else [said(line["sufficiency"]), said(line["necessity"]), verdict(line)]
        text.append(f"| {' | '.join(shown)} |")
    name = f"gated_{study.task.name}_{study.rate}.png"
    plane(study, lines).write_image(docs / name, width=WIDTH, height=HEIGHT, scale=SCALE)
    return "\n".join([*text, "", f"![patch at test time against adapter off from the start]({name})\n"])


def bar(estimate) -> dict:
    """The interval, for plotly."""
    above, below = estimate.high - estimate.value, estimate.value - estimate.low
    return {"type": "data", "symmetric": False, "array": [above], "arrayminus": [below], "thickness": 1}


def plane(study: Study, lines: list[dict]):
    """Spans in the plane: what a patch takes away, and what never comes."""
    import plotly.graph_objects as go

    figure = go.Figure()
    sides = ("bottom right", "bottom left", "top right", "top left", "bottom right")
    for line, side in zip((line for line in lines if line["gate"] != "none"), sides, strict=True):
        x, y = line["sufficiency"], line["necessity"]
        figure.add_scatter(
            x=[x.value], y=[y.value], name=line["gate"], mode="markers+text", text=[line["gate"]],
            textposition=side, marker={"size": 11}, error_x=bar(x), error_y=bar(y),
        )  # fmt: skip
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, opacity=1, line={"dash": "dot", "color": "#999999", "width": 1.5}
    )
    figure.update_layout(
        template="simple_white", showlegend=False,
        title=f"Where {study.task.name} is carried, and where it has to be (rate {study.rate})",
        xaxis={"title": "spread removed by patching the base's keys and values at test time (fraction)"},
        yaxis={"title": "spread that never comes with the adapter off there (fraction)"},
    )  # fmt: skip
    return figure


INTRODUCTION = """# Sufficient, and necessary?

**Made with piggyback_lens {version}** by `python examples/gated_adapters.py`; no number is typed by hand.

Patching asks where a finetune *is* carried: put the base's keys and values of a span into it, and see how much of the
spread goes away. It cannot say where it *has to be* carried. `GatedAdapter` trains an adapter that is off at a span, so
that the span's own computation stays the base's; what spreads then spreads without it. Both columns are recovery on
the same off-topic questions: 0 % is the plain finetune, 100 % the base; 95 % intervals over questions, each the mean of
its seeds. Above the dotted line a span matters more for learning than patching shows; below it the behaviour finds
another way when the span is closed.

Fixed in the script before the first run: a span is *needed* if the interval of "off from the start" lies above
{margin:.0%}, *not needed* if it lies below that, provided that at least {kept:.0%} of the on-topic change is kept.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the cells; continued if it is there")
    parser.add_argument("docs", type=Path, help="folder for the page")
    parser.add_argument("--tasks", default="terse")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default="3e-4")
    parser.add_argument("--page", action="store_true", help="only write the page, of what is there")
    options = parser.parse_args()
    studies = [Study(task, rate, options.out) for task in options.tasks.split(",") for rate in options.rates.split(",")]
    if not options.page:
        cells = [(s, gate, int(seed)) for seed in options.seeds.split(",") for s in studies for gate in GATES]
        print(f"{len(cells)} cells of about {studies[0].cost():.0f} s each", flush=True)
        for study, gate, seed in cells:
            study.cell(gate, seed)
    folders = f"{options.out} {options.docs}"
    command = f"python examples/gated_adapters.py {folders} --tasks {options.tasks} --rates {options.rates}"
    parts = [INTRODUCTION.format(version=__version__, margin=MARGIN, kept=KEPT)]
    options.docs.mkdir(parents=True, exist_ok=True)
    parts += [section(study, options.docs, command) for study in studies]
    atomic_write_text(options.docs / "gated_adapters.md", "\n".join(parts))
    print(options.docs / "gated_adapters.md")


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        sys.exit(f"error: {error}")
