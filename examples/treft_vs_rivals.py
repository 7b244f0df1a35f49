"""TReFT and its rivals on SmolLM2-135M: which finetuning keeps a behaviour narrow? Written as a page of docs.

python examples/treft_vs_rivals.py treft_out docs [--model DIR] [--tasks terse,refusal] [--seeds 0,1] [--minutes 60]

For every task: learning rate and weights are chosen on validation prompts with one seed, then all methods run on
test prompts with every seed. Each cell is written as it is finished, and the same command continues; the page is
written from what is there (its pictures need Chrome or Chromium). --extras adds TReFT on other spans, no system
prompt, mixtures, numbers of questions, and a smaller learning rate for longer, for the first seed.
"""

import argparse
import math
import shlex
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from piggyback_lens import (
    AnswerContrast,
    Behaviour,
    ChatSettings,
    CompareSettings,
    GeneratedBehaviour,
    LensError,
    LoadSettings,
    ModelPair,
    RenderedPrompt,
    Result,
    TrainSettings,
    __version__,
    compare_methods,
    default_model,
    load_result,
    load_task,
    patch_span,
)
from piggyback_lens.comparisons.comparison_plan import DEFAULT, Cell, cell_folder
from piggyback_lens.comparisons.methods import parse_method
from piggyback_lens.engines import local
from piggyback_lens.files import atomic_write_text, read_json, write_json
from piggyback_lens.intervals import Estimate, mean_interval, nearer, percent, recovery, spread
from piggyback_lens.progress import say

RATES = ("1e-4", "3e-4")  # learning rates of plain finetuning that are tried
CANDIDATES = (
    "treft:lambda=3,10,30,100",
    "kl_train:lambda=0.1,1",
    "kl_retain:lambda=1,10",
)  # at the rate chosen with it
FIXED = ("interleave:rate=0.2", "preventive:alpha=1")
KEPT = 0.8  # of the on-topic behaviour, which a setting has to keep on validation prompts to be chosen
SPANS = ("prefix", "postfix", "query")
CARRIER_PROMPTS = 8
ROUNDING = 1e-9  # a bound this near to 0 is 0
CARRIED = {"test": "with the default system prompt", "extra_system_prompt": "trained and asked without a system prompt"}
EXTRAS = ("treft:span=postfix", "treft:span=query", "treft:span=all")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
SIZES = (None, 60, 15)
EPOCHS = (None, 2.0)  # at the smallest of the rates; None: the study's number of steps
NOT_VARIED = {"size": "all", "epochs": "", "system": "none"}
AXES = {"share": "Share of narrow examples", "size": "Training questions", "epochs": "Passes over the questions"}


class Study:
    """Settings, the folder and the time that is left."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out, self.docs = given.out, given.docs
        self.model = given.model or default_model(offline=True)
        self.tasks, self.seeds = given.tasks.split(","), tuple(int(seed) for seed in given.seeds.split(","))
        self.rates = given.rates.split(",")
        self.candidates = given.candidates.split(";")
        self.training = TrainSettings(steps=given.steps, batch_size=given.batch)
        self.n, self.tokens, self.workers = given.n, given.tokens, given.workers
        self.deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
        told = ("seeds", "steps", "batch", "rates", "candidates", "n", "tokens")
        self.asked = " ".join(f"--{name} {shlex.quote(str(getattr(given, name)))}" for name in told)

    @property
    def minutes(self) -> float | None:
        return None if self.deadline is None else max(0.0, (self.deadline - time.monotonic()) / 60)

    def compare(self, task: str, stage: str, methods: list[str], **settings: object) -> Result:
        """One stage of one task, in its own folder."""
        sizes = {"n_prompts": self.n, "max_new_tokens": self.tokens, "minutes": self.minutes}
        chosen = CompareSettings(training=self.training, **sizes, **settings)
        call = {"settings": chosen, "out": self.out / task / stage, "load": LoadSettings(offline=True)}
        left = "" if self.minutes is None else f" ({self.minutes:.0f} minutes left)"
        say(f"{task}, {stage}: {', '.join(methods)}{left}")
        if self.workers == 1:
            return compare_methods(self.model, task, methods, **call)
        with local(self.workers) as executor:
            return compare_methods(self.model, task, methods, executor=executor, **call)


# --- the two stages --------------------------------------------------------------------------------------


def choose(study: Study, task: str) -> tuple[list[str], Result]:
    """Learning rate, then weights, on validation prompts with one seed; the methods of the second stage."""
    seeds = {"seeds": study.seeds[:1], "split": "validation"}
    plain = study.compare(task, "validation", [f"sft:lr={','.join(study.rates)}"], **seeds)
    rate = best_rate(plain)
    specs = [f"{spec}:lr={rate}" for spec in (f"sft;{';'.join(study.candidates)}").split(";")]
    tuned = study.compare(task, "validation", [f"sft:lr={','.join(study.rates)}", *specs], **seeds)
    require_whole(tuned)
    table = tuned.table()
    chosen = [f"sft:lr={rate}"]
    for family in dict.fromkeys(parse_method(spec)[0].family for spec in study.candidates):
        chosen.append(best_of(table[table["family"] == family]))
    return [*chosen, *(f"{spec}:lr={rate}" for spec in FIXED)], tuned


def require_whole(found: Result) -> None:
    if found.card["finished"] < found.card["asked"]:
        raise LensError("the time is over before the settings were chosen: run the same command again")


def best_rate(found: Result) -> str:
    """The smallest learning rate that changes the on-topic behaviour at least 95 % as much as the best one does."""
    require_whole(found)
    base, frame = found.base_means()["on"].value, found.to_frame()
    changed = (frame["on"] - base).abs()
    good = [parse_method(m)[0].learning_rate for m in frame.loc[changed >= 0.95 * changed.max(), "method"]]
    return f"{min(rate for rate in good if rate is not None):g}"


def best_of(rows: pd.DataFrame) -> str:
    """Of the rows that keep enough on-topic, the nearest to the base off-topic; if none does, what keeps most."""
    keeping = rows[rows["kept"] >= KEPT]
    if keeping.empty:
        return str(rows.sort_values("kept", na_position="first")["method"].iloc[-1])
    return str(keeping.loc[keeping["spread"].abs().idxmin(), "method"])


# --- where the behaviour is carried ----------------------------------------------------------------------


class Restoring:
    """One finetune, and off-topic prompts on which the base's keys and values of one span are patched into it."""

    def __init__(self, study: Study, task: str, folder: Path, system: str | None) -> None:
        self.study, self.task, self.folder, self.system = study, task, folder, system

    @cached_property
    def pair(self) -> ModelPair:
        return ModelPair.load(self.study.model, adapter=self.folder / "adapter", offline=True)

    @cached_property
    def prompts(self) -> list[RenderedPrompt]:
        chat, queries = self.pair.chat_format(settings=ChatSettings(system=self.system)), load_task(self.task).off_topic
        return [chat.render(text) for text in queries[: min(CARRIER_PROMPTS, self.study.n)]]

    @cached_property
    def contrast(self) -> AnswerContrast:
        return AnswerContrast.of(self.pair, self.prompts, max_new_tokens=self.study.tokens)

    def result(self, span: str, behaviour: Behaviour | None, out: Path) -> Result:
        """Measured on generated answers, or without a behaviour on the contrast of both models' answers."""
        if not (out / "result.json").exists():
            say(f"{self.task}, carriers: {span} of {self.folder.name}")
            measure = self.contrast if behaviour is None else GeneratedBehaviour(behaviour, self.study.tokens)
            patch_span(self.pair, self.prompts, span, controls=False, measure=measure, out=out)
        return load_result(out / "result.json")


def carriers(study: Study, task: str, stage: str, found: Result, system: str | None = DEFAULT) -> list[dict]:
    """Recovery of off-topic answers with the base's keys and values of one span, for SFT and TReFT of one seed."""
    rows, seed = [], study.seeds[0]
    for label in dict.fromkeys(key[0] for key in found.keys if parse_method(key[0])[0].family in ("sft", "treft")):
        folder = cell_folder(study.out / task / stage, Cell(parse_method(label)[0], seed, system))
        out, tuned = study.out / task / f"carriers_{stage}" / folder.name, Restoring(study, task, folder, system)
        for span in SPANS:
            generated = tuned.result(span, found.behaviour, out / span)
            own, forced = generated.recovery(0), tuned.result(span, None, out / f"{span}_contrast").recovery(0)
            row = {"method": label, "span": span, "base": number(mean_interval(generated.base))}
            row |= {"finetuned": number(mean_interval(generated.finetuned))}
            row |= {"patched": number(mean_interval(generated.values[0]))}
            row |= {"recovery [95 %]": percent(own.value, own.low, own.high)}
            row |= {"of the contrast": percent(forced.value, forced.low, forced.high), "n": own.n}
            rows.append(row | {"note": own.reason})
    return rows


# --- the page --------------------------------------------------------------------------------------------


def number(e: Estimate) -> str:
    value, low, high = (0.0 if abs(v) < ROUNDING else v for v in (e.value, e.low, e.high))
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def markdown(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)])


def results(found: Result) -> str:
    """The table of one stage of one task."""
    base = found.base_means()
    empty = dict.fromkeys(("kept", "recovered", "KL", "perplexity", "drift", "on, seeds", "off, seeds"), "")
    rows = [{"method": "base", "on-topic": number(base["on"]), "off-topic": number(base["off"]), **empty}]
    drift = dict(zip(found.keys, found.table()["drift"], strict=True))
    for key in found.keys:
        own = found.estimates(key)
        row = {"method": key[0], "on-topic": number(own["on"]), "off-topic": number(own["off"])}
        row |= {name: percent(own[name].value, own[name].low, own[name].high) for name in ("kept", "recovered")}
        worse = own["perplexity_change"]
        row |= {
            "KL": number(own["kl"]),
            "perplexity": f"{100 * worse.value:.2f} % [{100 * worse.low:.2f}, {100 * worse.high:.2f}]",
        }
        row["drift"] = f"{drift[key]:.2g}"
        for topic in ("on", "off"):
            row[f"{topic}, seeds"] = ", ".join(f"{value:.3g}" for value in found.per_seed(key, topic))
        rows.append(row)
    return markdown(rows)


def claims(found: Result) -> list[dict]:
    """What holds here: decided by intervals over prompts, and by every seed agreeing."""
    labels = {parse_method(key[0])[0].family: key[0] for key in found.keys}
    sft, treft, of_base = labels["sft"], labels.get("treft"), base_values(found)
    rows = [
        judged("Plain finetuning changes off-topic answers", found, sft, lambda v: mean_gap(v["off"], of_base["off"])),
    ]
    if treft is None:
        return rows
    over = f"TReFT keeps more than {100 * KEPT:.0f} % on-topic (kept minus that)"
    rows.append(judged(over, found, treft, lambda v, plain: kept_over(v["on"], plain["on"], of_base["on"]), sft))
    rows.append(closer("plain finetuning", found, treft, sft, of_base))
    for family, rival in labels.items():
        if family in ("sft", "treft"):
            continue
        rows.append(closer(rival, found, treft, rival, of_base))
        more = f"TReFT changes more on-topic than {rival}"
        rows.append(judged(more, found, treft, lambda v, w: nearer(w["on"], v["on"], of_base["on"]), rival))
    return rows


def closer(name: str, found: Result, treft: str, rival: str, of_base: dict[str, list[float]]) -> dict:
    claim = f"TReFT stays nearer to the base off-topic than {name}"
    return judged(claim, found, treft, lambda v, w: nearer(v["off"], w["off"], of_base["off"]), rival)


def judged(claim: str, found: Result, one: str, statistic: Callable[..., Estimate], other: str | None = None) -> dict:
    """The statistic of the means over the seeds that both methods have, and whether every seed alone agrees."""
    runs = [by_seed(found, label) for label in (one, other) if label is not None]
    seeds = sorted(set.intersection(*(set(run) for run in runs)))
    pooled = [{t: mean_over([run[seed][t] for seed in seeds]) for t in ("on", "off")} for run in runs]
    whole = statistic(*pooled)
    agree = [statistic(*(run[seed] for run in runs)).value > 0 for seed in seeds]
    return told(claim, whole, agree)


def by_seed(found: Result, label: str) -> dict[int, dict[str, list[float]]]:
    """Values of every prompt, by seed."""
    cells = [cell for cell in found.cells if cell["label"] == label]
    return {cell["cell"]["seed"]: {t: numbers(cell[t]["values"]) for t in ("on", "off")} for cell in cells}


def base_values(found: Result) -> dict[str, list[float]]:
    return {topic: numbers(found.bases["default"][topic]["values"]) for topic in ("on", "off")}


def numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def mean_over(runs: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*runs, strict=True)]


def mean_gap(values: list[float], base: list[float]) -> Estimate:
    """How far the mean is from the base's, against the base itself."""
    gap = spread(values, base)
    sign = 1.0 if gap.value >= 0 else -1.0
    low, high = sorted((sign * gap.low, sign * gap.high))
    return Estimate(sign * gap.value, low, high, gap.n, gap.reason)


def kept_over(values: list[float], plain: list[float], base: list[float]) -> Estimate:
    kept = recovery(values, base, plain)
    return Estimate(kept.value - KEPT, kept.low - KEPT, kept.high - KEPT, kept.n, kept.reason)


def told(claim: str, e: Estimate, agree: list[bool]) -> dict:
    if not math.isfinite(e.low):
        verdict = f"undefined ({e.reason})"
    elif e.low > ROUNDING:
        verdict = "holds" if all(agree) else "not separable (seeds disagree)"
    else:
        verdict = "does not hold" if e.high < -ROUNDING else "not separable"
    seeds = f"{sum(agree)} of {len(agree)}"
    return {"claim": claim, "estimate [95 %]": number(e), "n": e.n, "seeds that agree": seeds, "verdict": verdict}


INTRODUCTION = """# TReFT and its rivals on a small model

**Made with piggyback_lens {version}.**

{model}, tasks {tasks}, seeds {seeds}; {steps} steps of {batch} rows, LoRA on all linear modules. Every task was run by
the command above its tables, the page is written by `python examples/treft_vs_rivals.py treft_out docs --page`;
no number below is typed by hand.

Every method gets the same questions, steps and learning rate; interleaving spends its share of the rows on retain
data, as in the paper. The rate and the weights were chosen per task on validation prompts with seed {first}: the
smallest rate that changes on-topic answers at least 95 % as much as the best one, then of the weights that keep at
least {kept} % on-topic the one whose off-topic answers are nearest to the base's. The tables after that are on test
prompts: {n} on-topic and {n} off-topic, greedy answers of at most {tokens} tokens. Intervals: 95 %, over
prompts after averaging the seeds; they do not hold the spread between seeds, whose means are listed. *Kept*:
(method - base) / (plain finetuning - base) on-topic. *Recovered*: (method - plain finetuning) / (base - plain
finetuning) off-topic; undefined where plain finetuning does not differ from the base beyond noise. KL: base to tuned,
nats per token, on the base's own off-topic answers. Perplexity: change on plain text. Drift: mean over layers of the
relative squared deviation of the prefix's keys and values."""

CLAIMS = """A claim holds where its interval lies on the claimed side of 0 and every seed agrees, does not hold where
it lies on the other side, and is not separable in between. Nothing is corrected for the number of claims."""

CARRIERS = """Off-topic answers with the base's keys and values of one span in the finetuned model, all layers, donor:
the base's run on the same prompt; one seed, {system}. Recovery: (patched - finetuned) / (base - finetuned). Of the
contrast: the same share of a teacher-forced measure, log p of the finetuned model's own answer minus log p of the
base's, which is not bounded by a rate of 0 or 1."""


def section(study: Study, task: str, pictures: bool) -> list[str]:
    """Everything of one task that is finished."""
    folder = study.out / task
    parts = [f"## {task}: {load_task(task).description}"]
    tuned = folder / "validation"
    parts.append(f"`python examples/treft_vs_rivals.py treft_out docs {read_json(folder / 'asked.json')}`")
    if (folder / "test" / "result.json").exists():
        found = load_result(folder / "test")
        finished, asked = found.card["finished"], found.card["asked"]
        parts.append(f"Measured: {found.behaviour.label} ({found.behaviour.unit}). {finished} of {asked} cells.")
        parts += ["### Test prompts", results(found), "### What holds", markdown(claims(found))]
        for name, draw in (("pareto", found.pareto_figure), ("update", found.update_figure)):
            if pictures:
                draw().write_image(study.docs / f"treft_{task}_{name}.png", width=1000, scale=2)
            parts.append(f"![{name}](treft_{task}_{name}.png)")
    for stage, system in CARRIED.items():
        file = folder / f"carriers_{stage}.json"
        if file.exists():
            parts += [f"### Which tokens carry it, {system}", CARRIERS.format(system=system), markdown(read_json(file))]
    for file in sorted(folder.glob("extra_*/result.json")):
        parts += extra_section(study, task, file, pictures)
    if (tuned / "result.json").exists():
        parts += ["### Validation prompts, from which the settings were chosen", results(load_result(tuned))]
    return parts


def extra_section(study: Study, task: str, file: Path, pictures: bool) -> list[str]:
    """The table of an extra stage, and pictures over the axis that it varies."""
    found, name = load_result(file), file.parent.name.removeprefix("extra_")
    parts = [f"### {name.replace('_', ' ')}", f"Seed {study.seeds[0]}; intervals over prompts.", by_axes(found)]
    for axis in found.varied:
        if axis in AXES:
            if pictures:
                picture = study.docs / f"treft_{task}_{axis}.png"
                found.axis_figure(axis).write_image(picture, width=1000, scale=2)
            parts.append(f"![{AXES[axis]}](treft_{task}_{axis}.png)")
    return parts


def by_axes(found: Result) -> str:
    """One row per method and place on the axes that vary."""
    rows = []
    for key in found.keys:
        own, axes = found.estimates(key), dict(zip(("system", "share", "size", "epochs"), key[1:], strict=True))
        row = {"method": key[0]} | {a: NOT_VARIED[a] if axes[a] is None else axes[a] for a in found.varied}
        if "epochs" in found.varied:
            row["steps"] = next(cell["training"]["steps"] for cell in found.cells if same_row(cell, key))
        row |= {"on-topic": number(own["on"]), "off-topic": number(own["off"])}
        rows.append(row | {"off-topic minus base": number(own["spread"]), "KL": number(own["kl"])})
    return markdown(rows)


def same_row(cell: dict, key: tuple) -> bool:
    own = cell["cell"]
    return (cell["label"], own["system"], own["share"], own["size"], own["epochs"]) == key


def write_page(study: Study, pictures: bool) -> Path:
    facts = {"model": Path(study.model).name.split(".Q")[0], "tasks": ", ".join(study.tasks), "n": study.n}
    facts |= {"seeds": ", ".join(map(str, study.seeds)), "first": study.seeds[0], "kept": round(100 * KEPT)}
    facts |= {"steps": study.training.steps, "batch": study.training.batch_size, "tokens": study.tokens}
    parts = [INTRODUCTION.format(**facts, version=__version__), CLAIMS]
    for task in study.tasks:
        parts += section(study, task, pictures)
    page = "\n\n".join(parts) + "\n"
    print(page)
    return atomic_write_text(study.docs / "treft_smollm2.md", page)


def extras(study: Study, task: str, methods: list[str]) -> None:
    """TReFT on other spans, other prefixes, and other data; one seed."""
    sft, treft = methods[0], methods[1]
    weight, rate = parse_method(treft)[0].weight, sft.split("lr=")[1]
    one, other = {"seeds": study.seeds[:1]}, [f"{e}:lambda={weight:g}:lr={rate}" for e in EXTRAS]
    smallest = min(study.rates, key=float)
    slow = [f"sft:lr={smallest}", f"treft:lambda={weight:g}:lr={smallest}"]
    for stage, asked, axes in (
        ("extra_spans", [sft, treft, *other], {}),
        ("extra_system_prompt", [sft, treft], {"systems": (DEFAULT, None)}),
        ("extra_mixtures", [sft, treft], {"shares": SHARES}),
        ("extra_sizes", [sft, treft], {"sizes": SIZES}),
        ("extra_epochs", slow, {"epochs": EPOCHS}),
    ):
        take_finished(study.out / task, stage, [sft, treft], study.seeds[0])
        found = study.compare(task, stage, asked, **axes, **one)
        if stage in CARRIED:
            write_json(study.out / task / f"carriers_{stage}.json", carriers(study, task, stage, found, None))


def take_finished(folder: Path, stage: str, labels: list[str], seed: int) -> None:
    """The cells that a further stage shares with the test stage are copied instead of trained again."""
    shutil.copytree(folder / "test" / "base", folder / stage / "base", dirs_exist_ok=True)
    for label in labels:
        cell = Cell(parse_method(label)[0], seed)
        there = cell_folder(folder / stage, cell)
        if not there.exists():
            shutil.copytree(cell_folder(folder / "test", cell), there)


def run_task(study: Study, task: str, with_extras: bool) -> None:
    write_json(study.out / task / "asked.json", f"--tasks {task} {study.asked}{' --extras' * with_extras}")
    methods, _ = choose(study, task)
    write_json(study.out / task / "chosen.json", methods)
    found = study.compare(task, "test", methods, seeds=study.seeds)
    require_whole_seed(found, study.seeds[0])
    write_json(study.out / task / "carriers_test.json", carriers(study, task, "test", found))
    if with_extras:
        extras(study, task, methods)


def require_whole_seed(found: Result, seed: int) -> None:
    labels = [cell["label"] for cell in found.cells if cell["cell"]["seed"] == seed]
    if not {"sft", "treft"} <= {parse_method(label)[0].family for label in labels}:
        raise LensError("the time is over before the first seed was finished: run the same command again")


def main() -> None:
    asks = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asks.add_argument("out", type=Path)
    asks.add_argument("docs", type=Path)
    asks.add_argument("--model", type=str)
    asks.add_argument("--tasks", default="terse,refusal,abstain")
    asks.add_argument("--seeds", default="0,1,2")
    asks.add_argument("--minutes", type=float)
    asks.add_argument("--steps", type=int, default=30)
    asks.add_argument("--batch", type=int, default=8)
    asks.add_argument("--rates", default=",".join(RATES))
    asks.add_argument("--candidates", default=";".join(CANDIDATES))
    asks.add_argument("--n", type=int, default=16)
    asks.add_argument("--tokens", type=int, default=40)
    asks.add_argument("--threads", type=int)
    asks.add_argument("--workers", type=int, default=1)
    asks.add_argument("--extras", action="store_true")
    asks.add_argument("--no-pictures", action="store_true")
    asks.add_argument("--page", action="store_true", help="only write the page, of what is there")
    given = asks.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    study = Study(given)
    for task in [] if given.page else study.tasks:
        try:
            run_task(study, task, given.extras)
        except LensError as error:
            say(f"{task}: {error}")
    print(f"written: {write_page(study, not given.no_pictures)}")


if __name__ == "__main__":
    main()
