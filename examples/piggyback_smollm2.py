"""The Piggyback paper's patching and perturbation results, redone on the demo's organism, as a page of docs.

python examples/piggyback_smollm2.py demo_out lab_out docs [--only PART ...]      (after `make demo`; resumable)

Parts: spans, carrier, curves, positions, heads, perturb, stress. Each writes into its own folder of the second
argument as it goes; the page and its pictures (Chrome or Chromium is needed) are written from what is finished.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pandas as pd

from piggyback_lens import (
    AnswerContrast,
    GeneratedBehaviour,
    LensError,
    ModelPair,
    PerturbSettings,
    Result,
    StressSettings,
    __version__,
    attribution_map,
    carrier_map,
    default_model,
    get_behaviour,
    layer_curve,
    layer_head_map,
    layer_position_map,
    load_result,
    patch_span,
    perturb,
    stress,
)
from piggyback_lens.figures.result_plots import carrier_plane
from piggyback_lens.files import atomic_write_text
from piggyback_lens.intervals import Estimate, percent

PARTS = ("spans", "carrier", "curves", "positions", "heads", "perturb", "stress")
TOPICS = {"off-topic": 12, "on-topic": 12}  # prompts of each
MAP_PROMPTS = 6  # prompts of the maps with hundreds of cells, and of the curves
GENERATED_PROMPTS = 8  # prompts of each topic that are answered under every perturbation and variant
ANSWER_TOKENS = 24  # of the models' own answers, for the teacher-forced contrast
NEW_TOKENS = 40  # of generated answers
SPANS = ("prefix", "query", "postfix")
WIDTH, SCALE = 1000, 2


class Laboratory:
    """The organism, its prompts and the answers that the demo generated."""

    def __init__(self, demo: Path, out: Path) -> None:
        self.audit, self.demo, self.out = load_result(demo), demo, out
        self.behaviour = get_behaviour(self.audit.card["behaviour"])

    @cached_property
    def pair(self) -> ModelPair:
        adapter = self.demo / "organism" / "adapter"
        return ModelPair.load(default_model(), adapter=adapter, names=tuple(self.audit.card["names"].values()))

    @cached_property
    def prompts(self) -> dict:
        chat = self.pair.chat_format()
        queries = {topic: {r["index"]: r["prompt"] for r in self.audit.rows if r["topic"] == topic} for topic in TOPICS}
        return {topic: [chat.render(queries[topic][i]) for i in range(n)] for topic, n in TOPICS.items()}

    def contrast(self, topic: str, n: int) -> AnswerContrast:
        """The answers of the demo, cut to the tokens that are scored."""
        ids = {(r["condition"], r["index"]): r["ids"] for r in self.audit.rows if r["topic"] == topic}
        prompts = self.prompts[topic][:n]
        sides = (
            [p.with_response(ids[side, i][:ANSWER_TOKENS], end=False) for i, p in enumerate(prompts)]
            for side in ("finetuned", "base")
        )
        return AnswerContrast(*sides)

    def run(self, name: str, experiment: Callable, topic: str, n: int, *args: object, **options: object) -> None:
        """One experiment into its own folder, unless it is there."""
        folder = self.out / name
        if not (folder / "result.json").exists():
            print(f"running {name}", flush=True)
            options.setdefault("measure", self.contrast(topic, n))
            experiment(self.pair, self.prompts[topic][:n], *args, out=folder, progress=True, **options)


def spans(lab: Laboratory) -> None:
    measure = GeneratedBehaviour(lab.behaviour, NEW_TOKENS)
    for topic, n in TOPICS.items():
        for flow in ("repair", "infect"):
            for span in (*SPANS, ("prefix", "postfix")):
                name = span if isinstance(span, str) else "+".join(span)
                options = {"flow": flow, "measure": measure, "controls": span == "prefix"}
                lab.run(f"span_{topic}_{flow}_{name}", patch_span, topic, n, span, **options)


def carrier(lab: Laboratory) -> None:
    for topic, n in TOPICS.items():
        lab.run(f"carrier_{topic}", carrier_map, topic, n, sites=[("k", "v")])


def curves(lab: Laboratory) -> None:
    layers = range(0, lab.pair.shape.n_layers, 2)
    shared = {"sites": ("k", "v"), "layers": layers, "control_layers": 3}
    for mode in ("single", "below", "above", "window"):
        lab.run(f"curve_{mode}", layer_curve, "off-topic", MAP_PROMPTS, mode=mode, window=5, **shared)
    lab.run("curve_postfix", layer_curve, "off-topic", MAP_PROMPTS, span="postfix", **shared)


def positions(lab: Laboratory) -> None:
    lab.run("positions", layer_position_map, "off-topic", MAP_PROMPTS, control_cells=4)
    for name, steps in (("attribution", None), ("attribution_ig", 4)):
        if not (lab.out / f"{name}.json").exists():
            print(f"running {name}", flush=True)
            found = attribution_map(
                lab.pair,
                lab.prompts["off-topic"][:MAP_PROMPTS],
                measure=lab.contrast("off-topic", MAP_PROMPTS),
                steps=steps,
                layers=None if steps is None else range(0, lab.pair.shape.n_layers, 3),
                check_cells=0,
                top_cells=0,
            )
            found.attributed.save(lab.out / f"{name}.json")


def heads(lab: Laboratory) -> None:
    lab.run("heads_z", layer_head_map, "off-topic", MAP_PROMPTS, sites="z", control_cells=4)
    lab.run("heads_kv", layer_head_map, "off-topic", MAP_PROMPTS, sites=("k", "v"), control_cells=4)


def perturbation(lab: Laboratory) -> None:
    file = lab.out / "perturb" / "result.json"
    if not file.exists():
        settings = PerturbSettings(spans=SPANS, max_new_tokens=NEW_TOKENS, batch_size=48)
        prompts = {topic: own[:GENERATED_PROMPTS] for topic, own in lab.prompts.items()}
        perturb(lab.pair, prompts, lab.behaviour, settings, out=file.parent, progress=True)


def stress_suite(lab: Laboratory) -> None:
    file = lab.out / "stress" / "result.json"
    if not file.exists():
        settings = StressSettings(max_new_tokens=NEW_TOKENS, batch_size=48)
        prompts = lab.prompts["off-topic"][:GENERATED_PROMPTS]
        stress(lab.pair, prompts, lab.behaviour, settings, out=file.parent, progress=True)


RUN = dict(zip(PARTS, (spans, carrier, curves, positions, heads, perturbation, stress_suite), strict=True))


# ---------------------------------------------------------------- the page


def table(frame: pd.DataFrame, columns: dict[str, str]) -> str:
    """Some columns of a frame as Markdown."""
    rows = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for record in frame.to_dict("records"):
        rows.append("| " + " | ".join(shown(record[name]) for name in columns) + " |")
    return "\n".join(rows)


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def span_table(lab: Laboratory) -> str:
    """Generated behaviour with one span's keys and values patched."""
    rows = []
    for file in sorted(lab.out.glob("span_*/result.json")):
        result = load_result(file)
        frame = result.to_frame()
        topic = file.parent.name.split("_")[1]
        frame["topic"], frame["recovered"] = topic, [percent(r.value, r.low, r.high) for r in frame.itertuples()]
        frame["base"], frame["finetuned"] = pd.Series(result.base).mean(), pd.Series(result.finetuned).mean()
        rows.append(frame)
    frame = pd.concat(rows, ignore_index=True)
    columns = {"topic": "", "flow": "flow", "span": "span", "series": "series", "base": "base"}
    columns |= {"finetuned": "finetuned", "raw": "patched", "recovered": "moved to the donor [95 %]", "n": "n"}
    return table(frame, columns)


def perturb_table(result: Result) -> str:
    frame = result.to_frame()
    frame["interval"] = [f"{r.value:.3g} [{r.low:.3g}, {r.high:.3g}]" for r in frame.itertuples()]
    frame["recovered"] = [
        percent(r.recovery, r.recovery_low, r.recovery_high) if r.kind not in ("base", "unperturbed") else ""
        for r in frame.itertuples()
    ]
    columns = {
        "topic": "",
        "span": "span",
        "kind": "kind",
        "interval": "mean [95 %]",
        "recovered": "recovery",
        "n": "n",
    }
    return table(frame, columns)


def stress_table(result: Result) -> str:
    frame = result.to_frame()
    wide = frame.pivot_table(index="variant", columns="side", values="value", sort=False).reset_index()
    once = frame.drop_duplicates("variant").set_index("variant")
    wide["spread"] = [
        f"{once.spread[v]:.3g} [{once.spread_low[v]:.3g}, {once.spread_high[v]:.3g}]" for v in wide["variant"]
    ]
    columns = {"variant": "variant", "base": "base", "finetuned": "finetuned", "spread": "spread [95 %]"}
    return table(wide, columns)


def rank_correlation(exact: Result, attributed: Result) -> tuple[float, int]:
    """Spearman's rho over all cells that both maps have."""
    from scipy.stats import spearmanr

    keys = ["layer", "position"]
    known = exact.to_frame().query("series == 'patched'")[[*keys, "raw"]]
    both = known.merge(attributed.to_frame()[[*keys, "raw"]], on=keys, suffixes=("_exact", "_attributed"))
    return float(spearmanr(both["raw_exact"], both["raw_attributed"]).statistic), len(both)


def draw(lab: Laboratory, docs: Path, name: str, figure: object) -> str:
    figure.write_image(docs / f"smollm2_{name}.png", width=WIDTH, scale=SCALE)
    return f"![{name.replace('_', ' ')}](smollm2_{name}.png)"


INTRODUCTION = """# Where the terse organism is carried

**Made with piggyback_lens {version}.**

{finetuned} on {base}, from `make demo`; one training seed. Written by
`python examples/piggyback_smollm2.py demo_out lab_out docs`; no number below is typed by hand.

Recovery is (patched - recipient) / (donor - recipient). *Repair* puts the base's activations into the finetuned model,
*infect* the finetuned model's into the base; 1 is all the way. Intervals: 95 %, over prompts. Off-topic and
on-topic: n = {off} and {on} prompts; maps with hundreds of cells and curves: n = {few}; perturbation and stress suite:
n = {generated}. The *contrast* is log p of the finetuned model's own answer minus log p of the base's, per token, over
at most {tokens} tokens. Of an answer of a few tokens the first one weighs most in it, and that is predicted at the last
token of the postfix. Postfix and query activations are those of the donor's run on the same prompt; the demo's table
takes the postfix from the empty query."""

CLAIMS = """A claim holds where the first interval lies above the second (or above 0), does not hold where it lies
below, and is not separable where they overlap. One organism of 135M parameters, one training seed."""

RANDOM_AVERAGE = "random tokens, average"

PERTURBATION = """## Token perturbation

Ten tokens of one span replaced by one of their five nearest neighbours (dot product of input embeddings), ten trials;
*best* is each prompt's trial nearest to the base, *average* the mean over trials (section 4.1 of the paper). A best of
ten is biased upwards by itself, so the control with random tokens gets it too. Where the query or the assistant's
header is broken, answers become short whatever was trained: read those rows beside the control."""


def page(lab: Laboratory, docs: Path) -> str:
    """Everything that is finished, as Markdown."""
    results = {f.parent.name: load_result(f) for f in sorted(lab.out.glob("*/result.json")) if is_patch(f)}
    facts = {
        "off": TOPICS["off-topic"],
        "on": TOPICS["on-topic"],
        "few": MAP_PROMPTS,
        "generated": GENERATED_PROMPTS,
        "tokens": ANSWER_TOKENS,
        "version": __version__,
    }
    sections = [INTRODUCTION.format(**lab.audit.card["names"], **facts)]
    for section in (span_section, perturb_section, carrier_section, curve_section, map_section, head_section):
        sections += section(lab, docs, results)
    sections += stress_section(lab, docs)
    sections[1:1] = claim_section(lab, results)
    return "\n\n".join(sections) + "\n"


def claim_section(lab: Laboratory, results: dict) -> list[str]:
    """What of the paper's findings holds here, decided by the intervals."""

    def spans(topic: str, flow: str, span: str) -> Estimate | None:
        found = results.get(f"span_{topic}_{flow}_{span}")
        return found.recovery(0) if found else None

    off, on = (spans(topic, "repair", "prefix") for topic in TOPICS)
    nothing = Estimate(0.0, 0.0, 0.0, 0)
    claims = [
        ("The base's prefix K/V restore off-topic answers", off, nothing),
        ("They restore more off-topic than on-topic", off, on),
        ("The prefix carries more than the query, off-topic", off, spans("off-topic", "repair", "query")),
        ("The prefix carries more than the postfix, off-topic", off, spans("off-topic", "repair", "postfix")),
        (
            "The finetuned model's prefix K/V infect the base, off-topic",
            spans("off-topic", "infect", "prefix"),
            nothing,
        ),
        ("On-topic, the postfix carries more than the prefix", spans("on-topic", "repair", "postfix"), on),
    ]
    file = lab.out / "perturb" / "result.json"
    if file.exists():
        found = perturbed(load_result(file))
        average, best = (found.get(("off-topic", "prefix", kind)) for kind in ("average", "best"))
        claims += [
            ("Perturbed prefix tokens restore off-topic answers (average)", average, nothing),
            ("... more than perturbed query tokens (average)", average, found.get(("off-topic", "query", "average"))),
            ("... more than perturbed query tokens (best)", best, found.get(("off-topic", "query", "best"))),
            ("... more off-topic than on-topic (average)", average, found.get(("on-topic", "prefix", "average"))),
            (
                "... more than random tokens there (average)",
                average,
                found.get(("off-topic", "prefix", RANDOM_AVERAGE)),
            ),
        ]
    rows = [
        {"claim": claim, "here": cell(a), "against": "" if b is nothing else cell(b), "verdict": verdict(a, b)}
        for claim, a, b in claims
        if a is not None and b is not None
    ]
    columns = {"claim": "claim", "here": "recovery [95 %]", "against": "against", "verdict": "verdict"}
    return ["## What of the paper holds here", CLAIMS, table(pd.DataFrame(rows), columns)] if rows else []


def perturbed(result: Result) -> dict:
    """Recovery by topic, span and kind."""
    return {
        (r.topic, r.span, r.kind): Estimate(r.recovery, r.recovery_low, r.recovery_high, r.n)
        for r in result.to_frame().itertuples()
    }


def cell(estimate: Estimate) -> str:
    return percent(estimate.value, estimate.low, estimate.high)


def verdict(a: Estimate, b: Estimate) -> str:
    """By the intervals alone: they are apart, or they are not."""
    if a.low > b.high:
        return "holds"
    return "does not hold" if a.high < b.low else "not separable"


def span_section(lab: Laboratory, docs: Path, results: dict) -> list[str]:
    if not any(name.startswith("span_") for name in results):
        return []
    text = (
        f"Mean {lab.behaviour.label} of {NEW_TOKENS}-token answers with the span's keys and values patched, all layers."
    )
    return ["## One span at a time, general and in-domain", text, span_table(lab)]


def perturb_section(lab: Laboratory, docs: Path, results: dict) -> list[str]:
    file = lab.out / "perturb" / "result.json"
    if not file.exists():
        return []
    found = load_result(file)
    return [PERTURBATION, perturb_table(found), draw(lab, docs, "perturb", found.figure())]


def carrier_section(lab: Laboratory, docs: Path, results: dict) -> list[str]:
    sections = []
    for topic in TOPICS:
        if found := results.get(f"carrier_{topic}"):
            sections += [f"## Carrier map, {topic}", floor(found), draw(lab, docs, f"carrier_{topic}", found.figure())]
            sections.append(draw(lab, docs, f"plane_{topic}", carrier_plane(found)))
    return sections


def curve_section(lab: Laboratory, docs: Path, results: dict) -> list[str]:
    there = [name for name in results if name.startswith("curve_")]
    return ["## Layer curves, off-topic", *(draw(lab, docs, n, results[n].figure()) for n in there)] if there else []


def map_section(lab: Laboratory, docs: Path, results: dict) -> list[str]:
    if not (exact := results.get("positions")):
        return []
    sections = ["## Layer x prefix token, off-topic", floor(exact), draw(lab, docs, "positions", exact.figure())]
    top = exact.top(8)
    top["interval"] = [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in top.itertuples()]
    columns = {"layer": "layer", "position": "position", "token": "token", "interval": "recovery"}
    sections.append(f"The {len(top)} strongest cells:\n\n{table(top, columns)}")
    for name, what in (("attribution", "plain gradient"), ("attribution_ig", "integrated gradients, 4 steps")):
        if (lab.out / f"{name}.json").exists():
            found = load_result(lab.out / f"{name}.json")
            rho, n = rank_correlation(exact, found)
            sections.append(f"Attribution by {what}: Spearman's rho with the exact map {rho:.2f} over {n} cells.")
            sections += [draw(lab, docs, name, found.figure())] if name == "attribution" else []
    return sections


def head_section(lab: Laboratory, docs: Path, results: dict) -> list[str]:
    sections = []
    for name, what in (("heads_z", "head outputs (z)"), ("heads_kv", "keys and values")):
        if found := results.get(name):
            sections += [f"## Layer x head of the prefix, {what}, off-topic", floor(found)]
            sections.append(draw(lab, docs, name, found.figure()))
    return sections


def stress_section(lab: Laboratory, docs: Path) -> list[str]:
    file = lab.out / "stress" / "result.json"
    if not file.exists():
        return []
    found = load_result(file)
    notes = [f"Not run: {name} ({reason})." for name, reason in found.skipped.items()]
    return [
        "## Template stress suite, off-topic",
        stress_table(found),
        draw(lab, docs, "stress", found.figure()),
        *notes,
    ]


def is_patch(file: Path) -> bool:
    return file.parent.name not in ("perturb", "stress")


def floor(result: Result) -> str:
    return f"Identity controls stay within {result.noise_floor:.1e} of the gap; n = {len(result.base)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("out", type=Path, help="folder for the experiments; continued if it is there")
    parser.add_argument("docs", type=Path, help="folder for the page")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    lab = Laboratory(options.demo, options.out)
    for part in options.only:
        RUN[part](lab)
    atomic_write_text(options.docs / "piggyback_smollm2.md", page(lab, options.docs))
    print(options.docs / "piggyback_smollm2.md")


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        sys.exit(f"error: {error}")
