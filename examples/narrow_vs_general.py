"""A general and a narrow solution of the same narrow task, as steering vectors and rank-1 adapters: a page of docs.

python examples/narrow_vs_general.py out docs [--tasks terse refusal] [--only PART ...]        (resumable)

Parts, in order: train, behaviour, curves, drift, latents. The general solution is trained on the task alone, the
narrow one with a KL term to the base on retain data from other topics. Learning rate and weight of the KL term are
chosen on validation prompts; what is reported comes from others. Pictures need Chrome or Chromium.
"""

import argparse
import sys
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from piggyback_lens import (
    ChatFormat,
    CurveSettings,
    Direction,
    HookTrainable,
    KLOnRetain,
    LensError,
    LoRAAdapter,
    Penalised,
    Result,
    RetainData,
    SnapshotKeeper,
    TrainSettings,
    Weighted,
    __version__,
    attached,
    default_model,
    efficiency,
    generate,
    get_behaviour,
    hook_model,
    load_causal_lm,
    load_result,
    load_solution,
    load_task,
    load_tokenizer,
    significance,
    snapshot_cosines,
    stability,
    text_windows,
    train,
    trajectory,
)
from piggyback_lens.files import atomic_write_text, read_json, write_json
from piggyback_lens.finetuning.trajectories import SnapshotCosines
from piggyback_lens.intervals import Estimate, mean_interval
from piggyback_lens.measuring.variants import response_texts, variant_kl, variant_nll
from piggyback_lens.reading.tasks import TASKS
from piggyback_lens.vectors.adapters import Adapter

PARTS = ("train", "behaviour", "curves", "drift", "latents")
KINDS = ("vector", "adapter")
LAYER = 15  # the middle of 30
STEPS, BATCH = 40, 8
RATES = {"vector": (0.03, 0.1), "adapter": (0.003, 0.01)}  # learning rates tried
WEIGHTS = (1.0, 4.0, 16.0)  # of the KL term, per nat
KEEP = 0.7  # of the general solution's gain on validation conversations a narrow one has to keep
RETAIN, RETAIN_TOKENS = 36, 16  # conversations of other tasks, answered by the base
VALIDATION = 16  # conversations and prompts that choose the settings
REPORTED = 16  # prompts of each topic
NEW_TOKENS = 32
CURVE_TEXTS, WINDOWS, WINDOW = 16, 10, 48
EPSILONS = (0.0, 0.3, 0.6, 0.9)
FRACTIONS = (0.0, 0.5, 1.0, 1.5)
SAE_LATENTS, SAE_ACTIVE, SAE_STEPS, SAE_TEXTS, SAE_HELD = 2048, 32, 90, 230, 24
DRIFT_EVERY, DRIFT_PROMPTS = 10, 8
WIDTH, SCALE = 1000, 1


class Laboratory:
    """The base, and everything about one task."""

    def __init__(self, name: str, out: Path, model: Any, tokenizer: Any) -> None:
        self.task, self.out = load_task(name), out / name
        self.model, self.tokenizer, self.chat = model, tokenizer, ChatFormat(tokenizer)
        self.behaviour = get_behaviour(self.task.behaviour)

    def conversations(self, examples: Any) -> list:
        found = []
        for example in examples:
            question, answer = (message["content"] for message in example["messages"])
            found.append(self.chat.render(question, response=answer))
        return found

    @cached_property
    def train(self) -> list:
        return self.conversations(self.task.train)

    @cached_property
    def validation(self) -> list:
        return self.conversations(self.task.validation[:VALIDATION])

    @cached_property
    def retain(self) -> list:
        """Questions of the other tasks with the base's own answers."""
        questions = [
            example["messages"][0]["content"]
            for name in TASKS
            if name != self.task.name
            for example in load_task(name).train[: RETAIN // (len(TASKS) - 1)]
        ]
        prompts = [self.chat.render(question) for question in questions]
        return self.answered("retain", prompts, RETAIN_TOKENS)

    @cached_property
    def off_validation(self) -> list:
        """Off-topic prompts, disjoint from the reported ones, with the base's own answers."""
        prompts = [self.chat.render(question) for question in self.task.off_topic_validation[:VALIDATION]]
        return self.answered("off_validation", prompts, RETAIN_TOKENS)

    def answered(self, name: str, prompts: list, tokens: int) -> list:
        file = self.out / f"{name}.json"
        if not file.exists():
            answers = generate(self.model, prompts, max_new_tokens=tokens, batch_size=12)
            write_json(file, [list(answer.ids) for answer in answers])
        return [p.with_response(ids, end=False) for p, ids in zip(prompts, read_json(file), strict=True)]

    def prompts(self, topic: str, n: int = REPORTED) -> list:
        return [self.chat.render(q) for q in getattr(self.task, topic.replace("-", "_"))[:n]]

    def solution(self, kind: str, name: str) -> Adapter:
        """A trained one: general or narrow."""
        return load_solution(self.out / kind / read_json(self.out / kind / "chosen.json")[name]["run"] / "adapter")


def fresh(lab: Laboratory, kind: str) -> Adapter:
    if kind == "vector":
        return Direction.zeros(lab.model.cfg.d_model, [LAYER])
    return LoRAAdapter.fresh(lab.model, rank=1, alpha=16, modules=["down"], layers=[LAYER])


# ---------------------------------------------------------------- train


def train_part(lab: Laboratory) -> None:
    for kind in KINDS:
        file = lab.out / kind / "chosen.json"
        if not file.exists():
            rows = [row_of(lab, kind, rate, 0.0) for rate in RATES[kind]]
            general = min(rows, key=lambda row: row["validation_loss"])
            rows += [row_of(lab, kind, general["rate"], weight) for weight in WEIGHTS]
            narrow = chosen_narrow(general, [row for row in rows if row["weight"]], base_loss(lab))
            write_json(file, {"tried": rows, "general": general, "narrow": narrow, "base_loss": base_loss(lab)})


def chosen_narrow(general: dict, tried: list[dict], base: float) -> dict:
    """Of those that keep enough of the gain, the one that changes off-topic validation prompts least."""
    gain = base - general["validation_loss"]
    keeps = [row for row in tried if base - row["validation_loss"] >= KEEP * gain]
    if keeps:
        return min(keeps, key=lambda row: row["off_topic_kl"])
    return min(tried, key=lambda row: row["validation_loss"])


def row_of(lab: Laboratory, kind: str, rate: float, weight: float) -> dict:
    """One training run, and what it does on validation data."""
    run = f"rate_{rate:g}_kl_{weight:g}"
    file = lab.out / kind / run / "row.json"
    if not file.exists():
        print(f"{lab.task.name}: training {kind}, learning rate {rate:g}, KL weight {weight:g}", flush=True)
        solution, result = trained(lab, fresh(lab, kind), rate, weight, lab.out / kind / run)
        loss = variant_nll(lab.model, response_texts(lab.validation), [solution])
        kl = variant_kl(lab.model, response_texts(lab.off_validation), [solution])
        row = {"run": run, "kind": kind, "rate": rate, "weight": weight, "norm": solution.norm()}
        row |= {"loss": float(np.mean([r["sft"] for r in result.history[-5:]]))}
        row |= {"validation_loss": float(loss.mean()), "off_topic_kl": float(torch.cat(kl[0]).mean())}
        write_json(file, row | {"seconds_per_step": float(np.median([r["seconds"] for r in result.history]))})
    return read_json(file)


def trained(lab: Laboratory, start: Adapter, rate: float, weight: float, out: Path, on_step: Any = None) -> Any:
    objective = Penalised(())
    if weight:
        objective = Penalised((Weighted(KLOnRetain(RetainData(lab.retain, batch_size=BATCH)), weight),))
    trainable = HookTrainable(lab.model, start)
    keeper = SnapshotKeeper(trainable, every=5) if on_step is None else on_step(trainable)
    settings = TrainSettings(steps=STEPS, batch_size=BATCH, learning_rate=rate, checkpoint_every=STEPS)
    discard(out)  # a run that was stopped half-way would lack its first snapshots: it is short, and starts anew
    run = {"objective": objective, "on_step": keeper}
    result = train(trainable, lab.train, settings, out=out, **run)
    if len(keeper.snapshots) > 1:
        write_json(out / "snapshots.json", [{"step": s.step, "values": flat(s.solution)} for s in keeper.snapshots])
    return trainable.result(), result


def flat(solution: Adapter) -> dict:
    return {name: value.flatten().tolist() for name, value in solution.tensors().items()}


@cache
def base_loss(lab: Laboratory) -> float:
    return float(variant_nll(lab.model, response_texts(lab.validation), [None]).mean())


# ---------------------------------------------------------------- what they do


def behaviour_part(lab: Laboratory) -> None:
    for name, solution in {"base": None, **everything(lab)}.items():
        for topic in ("on-topic", "off-topic"):
            file = lab.out / "behaviour" / f"{name}_{topic}.json".replace(" ", "_")
            if not file.exists():
                print(f"{lab.task.name}: {name} answers {topic} prompts", flush=True)
                answers = answers_of(lab, solution, lab.prompts(topic))
                values = [lab.behaviour(text) for text in answers]
                write_json(file, {"name": name, "topic": topic, "values": values, "answers": answers})


def answers_of(lab: Laboratory, solution: Adapter | None, prompts: list) -> list[str]:
    with attached(lab.model, *([] if solution is None else [solution])):
        return [answer.text for answer in generate(lab.model, prompts, max_new_tokens=NEW_TOKENS, batch_size=16)]


def everything(lab: Laboratory) -> dict[str, Adapter]:
    return {f"{name} {kind}": lab.solution(kind, name) for kind in KINDS for name in ("general", "narrow")}


# ---------------------------------------------------------------- curves


def curves_part(lab: Laboratory) -> None:
    conversations = lab.train[:CURVE_TEXTS]
    texts = text_windows(lab.tokenizer, n=WINDOWS, length=WINDOW)
    for kind in KINDS:
        solutions = {name: lab.solution(kind, name) for name in ("general", "narrow")}
        jobs = {
            "efficiency": lambda own: efficiency(
                lab.model, own, conversations, settings=CurveSettings(fractions=FRACTIONS, n_random=2)
            ),
            "stability": lambda own: stability(
                lab.model, own, conversations, settings=CurveSettings(epsilons=EPSILONS)
            ),
            "significance": lambda own: significance(
                lab.model, own, texts, settings=CurveSettings(fractions=FRACTIONS), tokenizer=lab.tokenizer
            ),
        }
        for name, job in jobs.items():
            file = lab.out / kind / f"{name}.json"
            if not file.exists():
                print(f"{lab.task.name}: {name} of the {kind}s", flush=True)
                job(solutions).save(file)


# ---------------------------------------------------------------- drift


def drift_part(lab: Laboratory) -> None:
    """The narrow vector goes on without its KL term; the control goes on with it."""
    chosen = read_json(lab.out / "vector" / "chosen.json")
    references = {name: lab.solution("vector", name) for name in ("narrow", "general")}
    for name, weight in (("without", 0.0), ("with", chosen["narrow"]["weight"])):
        file = lab.out / "drift" / f"{name}.json"
        if file.exists():
            continue
        print(f"{lab.task.name}: the narrow vector goes on {name} its KL term", flush=True)
        keepers: list[SnapshotKeeper] = []

        def keep(trainable: HookTrainable, keepers: list = keepers) -> SnapshotKeeper:
            keepers.append(SnapshotKeeper(trainable, every=DRIFT_EVERY))
            return keepers[0]

        start = references["narrow"]
        run = lab.out / "drift" / name
        trained(lab, start, chosen["narrow"]["rate"], weight, run, keep)
        measures = {
            f"{lab.behaviour.label} {topic}": lambda solution, topic=topic: [
                lab.behaviour(text) for text in answers_of(lab, solution, lab.prompts(topic, DRIFT_PROMPTS))
            ]
            for topic in ("on-topic", "off-topic")
        }
        found = snapshot_cosines(keepers[0].snapshots, references, measures)
        write_json(file, found.frame.to_dict("records"))


def discard(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- latents


def latents_part(lab: Laboratory) -> None:
    """A small SAE trained here on help texts, and the latents that the vectors point along."""
    from piggyback_lens.saes import SAESettings, attribute_latents, fit_latents, load_sae, train_sae

    folder, files = lab.out.parent / "sae", {name: lab.out / f"latents_{name}.json" for name in ("general", "narrow")}
    texts = text_windows(lab.tokenizer, n=SAE_TEXTS + SAE_HELD, length=128)
    held, texts = texts[:SAE_HELD], texts[SAE_HELD:]
    if not (folder.parent / "sae_fit.json").exists():
        print("training a sparse autoencoder", flush=True)
        discard(folder)
        found = train_sae(
            lab.model,
            texts,
            layer=LAYER,
            out=folder,
            settings=SAESettings(d_sae=SAE_LATENTS, k=SAE_ACTIVE, steps=SAE_STEPS),
        )
        frame = fit_latents(found.latents, lab.model, held).to_frame()
        write_json(folder.parent / "sae_fit.json", {"tokens": found.tokens, "fit": frame.to_dict("records")})
    latents = load_sae(folder, model=lab.model, site="resid_post", layer=LAYER)
    for name, file in files.items():
        if not file.exists():
            print(f"{lab.task.name}: latents of the {name} vector", flush=True)
            direction = lab.solution("vector", name)
            attribute_latents(latents, direction, lab.model, held[:8]).save(file)


RUN = dict(zip(PARTS, (train_part, behaviour_part, curves_part, drift_part, latents_part), strict=True))


# ---------------------------------------------------------------- the page

INTRODUCTION = """# Narrow is harder than general, at 135M parameters?

**Made with piggyback_lens {version}.**

SmolLM2-135M-Instruct, tasks {tasks}. A steering vector on the output of block {layer} (of 30) and a rank-1 adapter on
`down_proj` of that block, {steps} steps of {batch} conversations each, from the task alone (*general*) or with
KL(base || tuned) on {retain} conversations of other topics, answered by the base (*narrow*). Learning rate and KL
weight were chosen on validation conversations and prompts that are not among the reported ones: of the narrow
solutions that keep {keep:.0%} of the general one's gain in validation loss, the one that changes off-topic validation
answers least.

Written by `python examples/narrow_vs_general.py out docs`; no number below is typed by hand. Intervals: 95 %
over prompts or texts. One training seed per solution. Random controls have the same norm; the stability curve
averages 3 noise seeds."""

CLAIMS = """Decided by the intervals alone: a claim holds where the interval of the difference lies on its side of 0.
Norms are those of the vector, or of s*B*A. Equal norms are the smaller of the two solutions' own. Noise as the paper
defines it also shortens the solution; where the shortening alone costs as much, the solution is less efficient rather
than less stable."""


def page(labs: list[Laboratory], docs: Path) -> str:
    facts = {"tasks": " and ".join(lab.task.name for lab in labs), "layer": LAYER, "steps": STEPS, "batch": BATCH}
    sections = [INTRODUCTION.format(**facts, retain=RETAIN, keep=KEEP, version=__version__)]
    sections += ["## Which of the paper's claims hold here", CLAIMS, table(claims(labs))]
    for lab in labs:
        sections += [f"## {lab.task.name}: {lab.task.description}", *training_section(lab), *behaviour_section(lab)]
        sections += [*curve_section(lab, docs), *drift_section(lab, docs), *latent_section(lab, docs)]
    return "\n\n".join(sections) + "\n"


def table(rows: list[dict]) -> str:
    if not rows:
        return "(not run yet)"
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(shown, row.values())) + " |" for row in rows)])


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def interval(found: Any) -> str:
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def verdict(found: Any) -> str:
    if found.low > 0:
        return "holds"
    return "does not hold" if found.high < 0 else "not separable"


def curve_of(lab: Laboratory, kind: str, name: str) -> Result | None:
    file = lab.out / kind / f"{name}.json"
    return load_result(file) if file.exists() else None


def claims(labs: list[Laboratory]) -> list[dict]:
    rows = []
    for lab in labs:
        for kind in KINDS:
            rows += [{"task": lab.task.name, "solution": kind} | row for row in claims_of(lab, kind)]
        if (found := drift_of(lab, "without")) is not None:
            rows.append({"task": lab.task.name, "solution": "vector"} | drift_claim(found))
    return rows


def claims_of(lab: Laboratory, kind: str) -> list[dict]:
    found = behaviour_claims(lab, kind)
    if (curve := curve_of(lab, kind, "efficiency")) is not None:
        own = curve.settings["own_norms"]
        at = min(own.values())
        row = nearest(curve.difference("narrow", "general"), at)
        what = f"general is more efficient: loss of narrow minus general at norm {row.x:.3g}"
        found.append({"claim": what, "difference [95 %]": interval(row), "verdict": verdict(row)})
        paired = own_losses(curve, own)
        what = f"narrow costs more: loss at its own norm ({own['narrow']:.3g}) minus general's ({own['general']:.3g})"
        found.append({"claim": what, "difference [95 %]": interval(paired), "verdict": verdict(paired)})
    if (curve := curve_of(lab, kind, "stability")) is not None:
        found.append(stability_claim(curve))
    if (curve := curve_of(lab, kind, "significance")) is not None:
        own = curve.settings["own_norms"]
        row = nearest(curve.difference("general", "narrow"), min(own.values()))
        what = f"general is more significant: KL on plain text of general minus narrow at norm {row.x:.3g}"
        found.append({"claim": what, "difference [95 %]": interval(row), "verdict": verdict(row)})
    return found


def behaviours(lab: Laboratory) -> dict[tuple[str, str], np.ndarray]:
    """Values per prompt, by solution and topic."""
    files = (read_json(file) for file in (lab.out / "behaviour").glob("*.json"))
    return {(data["name"], data["topic"]): np.array(data["values"], dtype=float) for data in files}


def behaviour_claims(lab: Laboratory, kind: str) -> list[dict]:
    """Whether the narrow solution is narrow in what the model answers, not only in its loss."""
    values = behaviours(lab)
    if (f"narrow {kind}", "off-topic") not in values:
        return []
    narrow, general, base = (
        {topic: values[name, topic] for topic in ("on-topic", "off-topic")}
        for name in (f"narrow {kind}", f"general {kind}", "base")
    )
    sign = np.sign((general["on-topic"] - base["on-topic"]).mean())
    less = mean_interval(sign * (general["off-topic"] - narrow["off-topic"]))
    more = mean_interval(sign * (narrow["on-topic"] - base["on-topic"]))
    what = f"narrow {{}}: {lab.behaviour.label}, change of the answers in the direction trained"
    return [
        {"claim": what.format("does the task, on-topic against the base"), "difference [95 %]": interval(more),
         "verdict": verdict(more)},
        {"claim": what.format("spreads less than general, off-topic"), "difference [95 %]": interval(less),
         "verdict": verdict(less)},
    ]  # fmt: skip


def nearest(frame: pd.DataFrame, x: float) -> Any:
    return frame.iloc[(frame["x"] - x).abs().argmin()]


def own_losses(curve: Result, own: dict) -> Estimate:
    """Loss of the narrow solution minus that of the general one, each at its own norm."""
    weights = np.array(curve.weights) / np.mean(curve.weights)
    values = {}
    for name, norm in own.items():
        points = [p for p in curve.points if p.series == name]
        values[name] = np.array(min(points, key=lambda p: abs(p.x - norm)).values)
    return mean_interval((values["narrow"] - values["general"]) * weights)


def stability_claim(curve: Result, epsilon: float = 0.6) -> dict:
    """The two solutions have scales of their own: they differ where their intervals are apart."""
    frame = curve.to_frame()
    rows = {name: frame[(frame.series == name) & (frame.x == epsilon)].iloc[0] for name in ("narrow", "general")}
    narrow, general = rows["narrow"], rows["general"]
    text = f"{interval(narrow)} against {interval(general)}"
    apart = "holds" if narrow.low > general.high else "does not hold" if narrow.high < general.low else "not separable"
    shrunk = [frame[(frame.series == f"{name}, shrunk control") & (frame.x == epsilon)].value.iloc[0] for name in rows]
    what = f"general is more stable: relative loss increase of narrow against general at noise {epsilon:g}"
    what += f" (from the shortening alone, without noise: {shrunk[0]:.3g} against {shrunk[1]:.3g})"
    return {"claim": what, "difference [95 %]": text, "verdict": apart}


def training_section(lab: Laboratory) -> list[str]:
    sections = []
    for kind in KINDS:
        file = lab.out / kind / "chosen.json"
        if file.exists():
            data = read_json(file)
            chosen = {data["general"]["run"]: "general", data["narrow"]["run"]: "narrow"}
            rows = [
                {"learning rate": r["rate"], "KL weight": r["weight"], "norm": r["norm"], "training loss": r["loss"],
                 "validation loss": r["validation_loss"], "off-topic KL": r["off_topic_kl"],
                 "chosen as": chosen.get(r["run"], "")}
                for r in data["tried"]
            ]  # fmt: skip
            text = f"Tried {kind}s; nats per token, validation loss of the base {data['base_loss']:.3g}:"
            sections.append(f"{text}\n\n{table(rows)}")
    return sections


def behaviour_section(lab: Laboratory) -> list[str]:
    found = behaviours(lab)
    if not found:
        return []
    rows = []
    for name in ("base", *(f"{name} {kind}" for kind in KINDS for name in ("general", "narrow"))):
        row: dict[str, object] = {"solution": name}
        for topic in ("on-topic", "off-topic"):
            if (name, topic) in found:
                row[topic] = interval(mean_interval(found[name, topic]))
                change = found[name, topic] - found["base", topic]
                row[f"{topic} minus base"] = "" if name == "base" else interval(mean_interval(change))
        rows.append(row)
    text = f"{lab.behaviour.label} ({lab.behaviour.unit}), answers of {NEW_TOKENS} tokens at most, n = {REPORTED} each:"
    return [f"{text}\n\n{table(rows)}"]


def curve_section(lab: Laboratory, docs: Path) -> list[str]:
    return [
        draw(docs, f"{lab.task.name}_{kind}_{name}", curve.figure())
        for kind in KINDS
        for name in ("efficiency", "stability", "significance")
        if (curve := curve_of(lab, kind, name)) is not None
    ]


def drift_of(lab: Laboratory, name: str) -> SnapshotCosines | None:
    file = lab.out / "drift" / f"{name}.json"
    return SnapshotCosines(pd.DataFrame(read_json(file))) if file.exists() else None


def cosine(found: SnapshotCosines, name: str, last: bool) -> float:
    rows = found.frame[found.frame.quantity == f"cosine to {name}"].sort_values("step")
    return float(rows["value"].iloc[-1 if last else 0])


def drift_claim(found: SnapshotCosines) -> dict:
    before, after = (cosine(found, "general", last) for last in (False, True))
    text = f"{before:.3f} to {after:.3f} (to narrow: {cosine(found, 'narrow', True):.3f})"
    what = "without its KL term narrow drifts to general: cosine to general, before and after"
    return {"claim": what, "difference [95 %]": text, "verdict": "moves there" if after > before else "does not"}


def drift_section(lab: Laboratory, docs: Path) -> list[str]:
    sections = []
    for name in ("without", "with"):
        if (found := drift_of(lab, name)) is not None:
            sections.append(f"The narrow vector goes on {name} its KL term, {STEPS} steps:")
            sections.append(draw(docs, f"{lab.task.name}_drift_{name}", found.figure()))
    if sections:
        runs = {name: snapshots(lab, name) for name in ("general", "narrow")}
        sections.append(draw(docs, f"{lab.task.name}_trajectory", trajectory(runs).figure()))
    return sections


def snapshots(lab: Laboratory, name: str) -> list:
    """Snapshots of a vector's training."""
    from piggyback_lens.finetuning.trajectories import Snapshot

    start = fresh(lab, "vector")
    folder = lab.out / "vector" / read_json(lab.out / "vector" / "chosen.json")[name]["run"]
    return [
        Snapshot(row["step"], start.with_tensors({k: torch.tensor(v) for k, v in row["values"].items()}))
        for row in read_json(folder / "snapshots.json")
    ]


def latent_section(lab: Laboratory, docs: Path) -> list[str]:
    files = {name: lab.out / f"latents_{name}.json" for name in ("general", "narrow")}
    if not all(file.exists() for file in files.values()):
        return []
    about = read_json(lab.out.parent / "sae_fit.json")
    numbers = ", ".join(f"{row['metric'].replace('_', ' ')} {row['value']:.3g}" for row in about["fit"])
    sections = [
        f"Latents of the vectors in an SAE trained here on {about['tokens']} tokens of help texts, {SAE_LATENTS} "
        f"latents, {SAE_ACTIVE} active (on held-out text: {numbers}), by |cosine| with the decoder's row. "
        f"Beyond chance: larger than the largest of any latent for any of the random directions."
    ]
    for name, file in files.items():
        rows = [
            {
                "latent": r.latent,
                "cosine": r.cosine,
                "random directions [95 %]": f"[{r.random_low:.3g}, {r.random_high:.3g}]",
                "beyond chance": "yes" if r.beyond_chance else "no",
                "change of activation": r.change,
            }
            for r in load_result(file).top(5).itertuples()
        ]
        sections.append(f"{name}:\n\n{table(rows)}")
    sections.append(draw(docs, f"{lab.task.name}_latents_general", load_result(files["general"]).figure()))
    return sections


def draw(docs: Path, name: str, figure: Any) -> str:
    figure.write_image(docs / f"directions_{name}.png", width=WIDTH, scale=SCALE)
    return f"![{name.replace('_', ' ')}](directions_{name}.png)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results; continued if it is there")
    parser.add_argument("docs", type=Path, help="folder for the page")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=("terse", "refusal"))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    tokenizer = load_tokenizer(default_model())
    model = hook_model(load_causal_lm(default_model()), tokenizer)
    labs = [Laboratory(task, options.out, model, tokenizer) for task in options.tasks]
    for part in (part for part in PARTS if part in options.only):
        for lab in labs:
            RUN[part](lab)
    options.docs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.docs / "narrow_vs_general_smollm2.md", page(labs, options.docs))
    print(f"wrote {options.docs / 'narrow_vs_general_smollm2.md'}")


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        sys.exit(f"error: {error}")
