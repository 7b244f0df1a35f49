"""Defences against spread, side by side: what each wins, and what it pays for it. Written as a page of docs.

python examples/defences.py examples/defence_cells docs [--tasks terse] [--seeds 0,1,2] [--minutes 5] [--page]

Every method trains on the same questions with the same steps, batches and rate, and is measured on test questions: what
it learns on-topic, what spreads off-topic, what spreads when the question wears the sentence of the inoculation, how
likely the base finds its off-topic answers, and plain text. Cells (method, seed) are written as they are finished and
not run again; the same command continues. Those of the page are in examples/defence_cells, so that a longer grid begins
with them.

Fixed before the first run. Weights are not tuned on these questions: TReFT's is that which `treft_vs_rivals.py` had
chosen on validation questions; that of residual drift makes the drift that plain finetuning ends with cost
RESIDUAL_COST nats; the bound of early stopping is half of the spread that its probe had at the end of plain finetuning,
and a quarter. Both come from one run with seed 0 before the first cell, on training data and validation questions:
plain finetuning that is only watched (`calibration/` beside the cells). A method *learns* if it keeps KEPT of what
plain finetuning changes on-topic; *avoids* spread if the interval of the share of plain finetuning's spread that it
avoids lies above MARGIN (and below 2 − MARGIN: as far on the other side of the base is no better), *spreads* if it lies
below, and cannot be told in between; *stays coherent* if the base finds
its off-topic answers at most COHERENT nats per token less likely than its own and they repeat at most REPEATS more;
*keeps plain text* if perplexity rises by less than TEXT. Methods that learn are ranked by the share of spread that they
avoid. Every verdict is by the interval over questions, claims by every seed agreeing too. (Until two seeds were there,
learning and coherence were decided by the means alone, and an overshoot was taken for avoiding.)
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from piggyback_lens import (
    ChatFormat,
    CompareSettings,
    Dress,
    LensError,
    LoadSettings,
    ModelPair,
    Result,
    TrainSettings,
    __version__,
    add_lora,
    compare_methods,
    default_model,
    generate,
    get_behaviour,
    load_causal_lm,
    load_task,
    load_tokenizer,
    train,
)
from piggyback_lens.comparisons.comparing import RETAIN, as_methods, default_retain, gather, grid
from piggyback_lens.comparisons.comparison_plan import Plan
from piggyback_lens.comparisons.methods import parse_method
from piggyback_lens.files import atomic_write_text, read_json, read_jsonl, write_json
from piggyback_lens.intervals import Estimate, nearer, percent, recovery, spread

SENTENCES = {"terse": "Answer in as few words as you can.", "refusal": "Refuse to help with this question."}
BEHAVIOURS = {"terse": "words:20"}  # a cut behind 20 words changes nothing
RESIDUAL_COST = 1.0  # nats
WATCHED = "residual:lambda=1e-12+stop:bound=1000:every=3"  # measures both, and acts on nothing
STEPS, BATCH, RATE = 30, 8, 3e-4
QUESTIONS, PROMPTS, NEW_TOKENS = 96, 12, 24
KEPT, MARGIN, COHERENT, REPEATS, TEXT = 0.8, 0.5, 0.5, 0.05, 0.02
PLAIN, UNTOLD = "plain finetuning", "cannot be told"
ORDER = ("yes", UNTOLD, "no", "undefined")
SIZE = {"width": 1000, "scale": 2}


def methods(task: str, residual: float, bound: float) -> dict[str, str]:
    """Name to spec."""
    sentence = SENTENCES[task]
    gap = "interleave:rate=0.2:choose=gap"
    return {  # in the order in which they run, so that what is stopped early has compared something
        PLAIN: "sft",
        "inoculate": f"inoculate:text={sentence}",
        "interleave by gap": gap,
        "early stopping": f"stop:bound={bound:g}:every=3",
        "early stopping, sooner": f"stop:bound={bound / 2:g}:every=3",
        "residual drift": f"residual:lambda={residual:g}",
        "interleave": "interleave:rate=0.2",
        "TReFT": "treft:lambda=100",
        "inoculate, system": f"inoculate:text={sentence}:place=system",
        "gap + TReFT": f"treft:lambda=100+{gap}",
        "gap + inoculate": f"{gap}+inoculate:text={sentence}",
    }


class Study:
    """One task: its folder, and what is asked of it."""

    def __init__(self, task: str, options: argparse.Namespace) -> None:
        own = load_task(task)
        self.task = replace(own, behaviour=BEHAVIOURS.get(task, own.behaviour))
        self.out = options.out / task
        self.settings = CompareSettings(
            seeds=tuple(int(seed) for seed in options.seeds.split(",")),
            training=TrainSettings(steps=STEPS, batch_size=BATCH, learning_rate=RATE, checkpoint_every=10),
            sizes=(QUESTIONS,),
            n_prompts=PROMPTS,
            max_new_tokens=NEW_TOKENS,
            dresses={"sentence": Dress(before=f"{SENTENCES[task]}\n")},
            minutes=options.minutes,
        )
        self.found = self.calibration()
        self.methods = methods(task, float(f"{RESIDUAL_COST / self.found['drift']:.1g}"), self.found["bound"])

    def calibration(self) -> dict[str, float]:
        """Drift of the residual stream and spread of the probe at the end of plain finetuning, and half of that."""
        file = self.out / "calibration" / "found.json"
        if not file.exists():
            settings = replace(self.settings, seeds=(0,), dresses={}, split="validation", n_prompts=1, minutes=None)
            load = LoadSettings(offline=True)
            compare_methods(default_model(), self.task, [WATCHED], settings, out=file.parent, load=load)
            last = read_json(next(file.parent.glob("cells/residual*/cell.json")))["training"]["last"]
            spread = read_jsonl(next(file.parent.glob("cells/residual*/monitor.jsonl")))[-1]["spread"]
            found = {"drift": last["residual_conversation"], "spread": spread, "bound": round(spread / 2, 1)}
            write_json(file, found)
        found: dict[str, float] = read_json(file)
        return found

    def cost(self) -> float:
        """Seconds that a cell of plain finetuning takes, from two steps and eight answers."""
        tokenizer = load_tokenizer(default_model())
        chat, model = ChatFormat(tokenizer), add_lora(load_causal_lm(default_model()))
        examples = [chat.render(example["messages"]) for example in self.task.train]
        start = time.perf_counter()
        train(model, examples, TrainSettings(steps=2, batch_size=BATCH), progress=False)
        step = (time.perf_counter() - start) / 2
        pair, start = ModelPair.load(finetuned=model, tokenizer=tokenizer), time.perf_counter()
        with pair.using("finetuned") as hooked:
            generate(hooked, chat.ask(self.task.off_topic[:8]), max_new_tokens=NEW_TOKENS, progress=False)
        return STEPS * step + 4 * PROMPTS / 8 * (time.perf_counter() - start)

    def run(self) -> None:
        """The cells that are not there yet, those of the first seed first."""
        load = LoadSettings(offline=True)
        compare_methods(default_model(), self.task, [*self.methods.values()], self.settings, out=self.out, load=load)


# --- what is decided --------------------------------------------------------------------------------------


class Found:
    """The finished cells, by the names of the methods."""

    def __init__(self, study: Study) -> None:
        plan = Plan(default_model(), study.task, study.settings, default_retain(study.task), LoadSettings(offline=True))
        cells = grid(as_methods(study.methods.values()), study.settings)
        self.study, self.result = study, gather(plan, cells, study.out)
        labels = {name: parse_method(spec)[0].label for name, spec in study.methods.items()}
        self.names = {label: name for name, label in labels.items()}
        table = self.result.table()
        known = {row["method"]: row for row in table.to_dict("records")}
        self.rows = {name: known[label] for name, label in labels.items() if label in known}

    def by_seed(self, name: str) -> dict[int, dict]:
        """Cells of a method."""
        cells = [cell for cell in self.result.cells if self.names[cell["label"]] == name]
        return {cell["cell"]["seed"]: cell for cell in cells}

    def values(self, name: str, topic: str, seeds: list[int]) -> list[float]:
        """Behaviour of each question, averaged over these seeds."""
        cells = [cell for own, cell in self.by_seed(name).items() if own in seeds]
        rows = [[math.nan if value is None else value for value in cell[topic]["values"]] for cell in cells]
        return [sum(column) / len(column) for column in zip(*rows, strict=True)]

    def base(self, topic: str) -> list[float]:
        """Of the base."""
        return [math.nan if v is None else v for v in self.result.bases["default"][topic]["values"]]

    def avoided(self, name: str, topic: str) -> Estimate:
        """The share of plain finetuning's spread that a method avoids: 0 is plain finetuning, 1 the base."""
        seeds = self.seeds(name, PLAIN)
        return recovery(self.values(name, topic, seeds), self.values(PLAIN, topic, seeds), self.base(topic))

    def seeds(self, *names: str) -> list[int]:
        """Those that all of these methods have."""
        return sorted(set.intersection(*(set(self.by_seed(name)) for name in names)))


DRESSED = "off[sentence]"


def learns(found: Found, name: str) -> str:
    """Whether a method keeps enough of what plain finetuning changes on-topic."""
    row = found.rows[name]
    if name == PLAIN:  # the measure itself
        return "yes"
    return above(row["kept_low"], row["kept_high"], KEPT, "yes", "no")


def above(low: float, high: float, limit: float, yes: str, no: str) -> str:
    """What an interval says of a limit."""
    return "undefined" if not math.isfinite(low) else yes if low >= limit else no if high < limit else UNTOLD


def told(share: Estimate) -> str:
    """Whether a method avoids spread; as far beyond the base as plain finetuning is before it, it does not."""
    if not math.isfinite(share.low):
        return f"undefined: {share.reason}"
    if share.low > MARGIN and share.high < 2 - MARGIN:
        return "avoids"
    return "spreads" if share.high < MARGIN else "overshoots" if share.low > 2 - MARGIN else UNTOLD


def coherent(found: Found, name: str) -> str:
    """Whether its off-topic answers are about as likely to the base as its own, and repeat as little."""
    cells, base = list(found.by_seed(name).values()), found.result.bases["default"]["off"]
    repeats = get_behaviour("repetition")

    def mean(columns: list[list[float]]) -> list[float]:
        return [sum(column) / len(column) for column in zip(*columns, strict=True)]

    likely = spread(mean([cell["off"]["base_nll"] for cell in cells]), base["base_nll"])
    answers = ([repeats(text) for text in cell["off"]["answers"]] for cell in cells)
    again = spread(mean(list(answers)), [repeats(text) for text in base["answers"]])
    words = (
        above(likely.low, likely.high, COHERENT, "less likely", ""),
        above(again.low, again.high, REPEATS, "repeats", ""),
    )
    surely = [word for word in words if word not in ("", UNTOLD)]
    return " and ".join(surely) or (UNTOLD if UNTOLD in words else "yes")


def judged(found: Found, claim: str, statistic: Callable[..., Estimate], *names: str) -> dict[str, str]:
    """A claim: the statistic over the mean of the seeds, and of every seed alone."""
    seeds = found.seeds(*names)
    whole = statistic(seeds)
    agree = [statistic([seed]).value > 0 for seed in seeds]
    if not math.isfinite(whole.low):
        verdict = f"undefined: {whole.reason}"
    elif whole.low > 0:
        verdict = "holds" if all(agree) else "cannot be told (seeds disagree)"
    else:
        verdict = "does not hold" if whole.high < 0 and not any(agree) else UNTOLD
    return {"claim": claim, "estimate [95 %]": shown(whole), "seeds that agree": f"{sum(agree)} of {len(agree)}"} | {
        "verdict": verdict
    }


def claims(found: Found) -> list[dict[str, str]]:
    """What the papers say of these methods."""
    base = {topic: found.base(topic) for topic in ("off", DRESSED)}
    there = found.rows

    def closer(one: str, other: str, topic: str = "off") -> Callable[..., Estimate]:
        return lambda seeds: nearer(found.values(one, topic, seeds), found.values(other, topic, seeds), base[topic])

    rows = []
    for name in there:
        if name != PLAIN:
            but = " (and does not learn the task)" if learns(found, name) == "no" else ""
            rows.append(judged(found, f"{name} spreads less than {PLAIN}{but}", closer(name, PLAIN), name, PLAIN))
    pairs = (
        ("interleave by gap", "interleave"),
        ("gap + TReFT", "interleave by gap"),
        ("gap + TReFT", "TReFT"),
        ("gap + inoculate", "interleave by gap"),
        ("gap + inoculate", "inoculate"),
    )
    for one, other in pairs:
        if one in there and other in there:
            rows.append(judged(found, f"{one} spreads less than {other}", closer(one, other), one, other))
    for name in ("inoculate", "inoculate, system", "interleave", "interleave by gap"):
        if name in there:
            claim = f"{name} spreads more behind the sentence than on plain questions"
            rows.append(judged(found, claim, lambda seeds, own=name: behind(found, own, seeds), name))
    return rows


def behind(found: Found, name: str, seeds: list[int]) -> Estimate:
    """Distance from the base behind the sentence, minus that on plain questions, question by question."""
    away = {
        topic: [abs(x - y) for x, y in zip(found.values(name, topic, seeds), found.base(topic), strict=True)]
        for topic in ("off", DRESSED)
    }
    return spread(away[DRESSED], away["off"])


# --- the page ---------------------------------------------------------------------------------------------

INTRODUCTION = """# Defences against spread

**Made with piggyback_lens {version}** by `python examples/defences.py`; no number is typed by hand.

What keeps a narrow finetune narrow, and what does it cost? Eleven methods on the same questions, steps and rate, on
five axes: it learns the task; it does not spread; it does not spread when the question wears the sentence with which
the inoculated methods are trained (a control sentence of the same shape is in the figure); its off-topic answers stay
coherent; plain text keeps its perplexity.

Fixed in the script before the first run: no weight is tuned on these questions (see its first lines). A method
*learns* if it keeps {kept:.0%} of what plain finetuning changes on-topic. The share of plain finetuning's spread that
it avoids is 0 % for plain finetuning and 100 % for the base: it *avoids* spread if the interval lies between
{margin:.0%} and {beyond:.0%} (as far on the other side of the base is no better), *spreads* if it lies below. It stays
coherent if the base finds its off-topic answers at most {coherent} nats per token less likely than its own, and they
repeat at most {repeats:.0%} more runs of three words. Short answers have few tokens to be likely in, so a method that
spreads shortness fails there too. Plain text is kept if its perplexity rises by less than {text:.0%}. What an interval
does not decide "cannot be told". Intervals: 95 %, over questions after averaging the seeds; nothing is corrected for
the number of claims. Until two seeds of terse were there, learning and coherence were decided by means alone, and an
overshoot was taken for avoiding; no cell was run again for that.
"""


def shown(e: Estimate) -> str:
    return f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"


def markdown(rows: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


def table(found: Found) -> list[dict[str, str]]:
    """A row for each method, those that learn first, by the spread that they avoid."""
    rows = []
    for name, row in found.rows.items():
        plain = name == PLAIN
        share = {topic: found.avoided(name, topic) for topic in ("off", DRESSED)}
        line = {"method": name, "on-topic kept": percent(row["kept"], row["kept_low"], row["kept_high"])}
        line["learns"] = learns(found, name)
        for topic, head in (("off", "spread avoided"), (DRESSED, "behind the sentence")):
            own = share[topic]
            line[head] = "" if plain else f"{percent(own.value, own.low, own.high)} {told(own)}"
        line["off-topic, each seed"] = ", ".join(f"{value:.1f}" for value in row["off_seeds"])
        line["nats under the base"] = f"{row['base_nll']:.2f}"
        line["repeats"] = f"{100 * row['repetition']:.1f} %"
        line["tokens"] = f"{row['length']:.1f}"
        line["coherent"] = coherent(found, name)
        worse = [100 * row[f"perplexity_change{end}"] for end in ("", "_low", "_high")]
        line["plain text"] = f"{worse[0]:+.2f} % [{worse[1]:.2f}, {worse[2]:.2f}]"
        line["text kept"] = "yes" if worse[2] < 100 * TEXT else "no" if worse[1] > 100 * TEXT else "cannot be told"
        away = math.inf if plain or not math.isfinite(share["off"].value) else abs(1 - share["off"].value)
        rows.append(((ORDER.index(line["learns"]), away), line))
    return [line for _, line in sorted(rows, key=lambda row: row[0])]


def summary(found: Found) -> str:
    """Which methods do what a defence is for, and which fail, by name."""
    groups: dict[str, list[str]] = {}
    for name in found.rows:
        if name != PLAIN:
            plain, worn = (told(found.avoided(name, topic)) for topic in ("off", DRESSED))
            learnt = {"yes": "learns", "no": "does not learn"}.get(learns(found, name), "learning cannot be told")
            spreads = f"spread {plain}" if plain == UNTOLD else plain
            kind = f"{learnt}, {spreads}; behind the sentence: {worn}"
            groups.setdefault(kind, []).append(name)
    wins = [kind for kind in groups if kind == "learns, avoids; behind the sentence: avoids"]
    most = max(len(found.by_seed(name)) for name in found.rows)
    first = "Some methods do" if wins else "No method here can be seen to do"
    lines = [f"{first} all three: learn the task, avoid the spread, and avoid it behind the sentence.\n"]
    lines += [f"- {kind}: {', '.join(names)}" for kind, names in groups.items()]
    return "\n".join(lines + (["\nOne seed tells nothing about others."] if most == 1 else []))


def stops(found: Found) -> str:
    """Where early stopping stopped."""
    told = []
    for name in (name for name in found.rows if name.startswith("early stopping")):
        said = []
        for seed, cell in found.by_seed(name).items():
            at = cell["training"]["plan"].get("stopped")
            where = f"step {at['step']}, weights of step {at['kept_step']}" if at else "did not stop"
            said.append(f"seed {seed}: {where}")
        told.append(f"{name.capitalize()}: {'; '.join(said)}.")
    return " ".join(told)


def section(study: Study, docs: Path, command: str) -> str:
    """What one task gave."""
    found = Found(study)
    result: Result = found.result
    base = result.base_means()
    own = result.bases["default"]["off"]["base_nll"]
    known = [value for value in own if value is not None]
    counts = sorted({len(found.by_seed(name)) for name in found.rows})
    wanted = round(QUESTIONS / 4)  # a fifth of the mixture
    seeds = f"{' to '.join(map(str, counts))} seed{'s' * (counts[-1] > 1)}"
    per_method = f"{seeds} for each of {len(found.rows)} methods"
    text = [
        f"## {study.task.name}\n",
        f"`{command}`: {STEPS} steps of {BATCH} rows of {QUESTIONS} questions at rate {RATE:g}, LoRA on all linear "
        f"modules, {len(result.cells)} of {len(study.methods) * len(study.settings.seeds)} cells, {per_method}; "
        f"{PROMPTS} questions on-topic and {PROMPTS} off-topic, greedy answers of at most {NEW_TOKENS} "
        f"tokens. Measured: {result.behaviour.label}. Base: {base['on']} on-topic, {base['off']} off-topic, its own "
        f"answers at {sum(known) / len(known):.2f} nats per token.\n",
        f"Interleaving takes {wanted} of {RETAIN} retain conversations, answered by the base. "
        "Sentence of the inoculation: " + repr(SENTENCES[study.task.name]) + f". {stops(found)}\n",
        markdown(table(found)),
        f"\n{summary(found)}\n",
        "### Claims\n",
        markdown(claims(found)),
        "",
    ]
    for name, draw in (("pairs", result.pairs_figure), ("dressed", result.dress_figure)):
        file = f"defences_{study.task.name}_{name}.png"
        draw().write_image(docs / file, **SIZE)
        text.append(f"![{name}]({file})\n")
    specs = [{"name": name, "spec": f"`{spec}`"} for name, spec in study.methods.items() if name in found.rows]
    return "\n".join([*text, "### The methods as they are written\n", markdown(specs), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the cells; continued if it is there")
    parser.add_argument("docs", type=Path, help="folder for the page")
    parser.add_argument("--tasks", default="terse")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, help="begin no further cell after so many")
    parser.add_argument("--page", action="store_true", help="only write the page, of what is there")
    options = parser.parse_args()
    studies = [Study(task, options) for task in options.tasks.split(",")]
    if not options.page:
        n = len(studies) * len(studies[0].methods) * len(studies[0].settings.seeds)
        print(f"{n} cells, of about {studies[0].cost():.0f} s each for plain finetuning", flush=True)
        for study in studies:
            study.run()
    command = (
        f"python examples/defences.py {options.out} {options.docs} --tasks {options.tasks} --seeds {options.seeds}"
    )
    facts = {
        "kept": KEPT,
        "margin": MARGIN,
        "beyond": 2 - MARGIN,
        "coherent": COHERENT,
        "repeats": REPEATS,
        "text": TEXT,
    }
    parts = [INTRODUCTION.format(version=__version__, **facts)]
    options.docs.mkdir(parents=True, exist_ok=True)
    parts += [section(study, options.docs, command) for study in studies]
    print(atomic_write_text(options.docs / "defences.md", "\n".join(parts)))


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        sys.exit(f"error: {error}")
