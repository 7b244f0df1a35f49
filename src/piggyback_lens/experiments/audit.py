"""The main job: does a narrow finetune spread off-topic, and does the chat template's prefix carry it?

`audit` answers with generations under seven conditions, paired intervals, a layer curve and a report. Every
generation is written as it comes; a rerun in the same folder continues where the last one stopped.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from piggyback_lens.conversations.batch import ids_hash, questions_of
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.engines import failure, finished
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import answers_made_elsewhere, given_answer
from piggyback_lens.experiments.attribution import AttributionResult
from piggyback_lens.experiments.audit_dresses import TOPIC, dress_parts, told
from piggyback_lens.experiments.audit_maps import AnswerMaps, audit_parts, load_maps
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.experiments.treatments import Batch, Treatments
from piggyback_lens.files import read_json, read_jsonl, write_json
from piggyback_lens.intervals import (
    Estimate,
    is_rate,
    mean_interval,
    percent,
    permutation_p,
    recovery,
    require_enough,
    spread,
)
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.measuring.generation import Generation
from piggyback_lens.measuring.measures import Behaviour, get_behaviour, kept_behaviour
from piggyback_lens.models.gates import by_construction
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import counting, say_stage, shows
from piggyback_lens.reading.dresses import Dress, as_dresses, dressed, require_worn, with_controls
from piggyback_lens.reading.questions import Question
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import RESULT, ROWS, Row, Run, report_run
from piggyback_lens.settings import AuditSettings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TOPICS = ("off-topic", "on-topic")
"""Of plain questions. Each dress is a topic more, and so is its control."""
CONDITIONS: dict[str, str] = {
    "base": "base",
    "finetuned": "finetuned",
    "prefix": "+ base's prefix K/V",
    "postfix": "+ base's postfix K/V",
    "both": "+ base's K/V of both",
    "identity": "control: own prefix K/V",
    "query_control": "control: base's query K/V",
}
CONTROLS = ("identity", "query_control")
RECEIPTS = "receipts"
EXAMPLES = 12
"""Off-topic and on-topic prompts whose answers the report shows."""


@dataclass(frozen=True, repr=False)
class AuditResult(Result):
    """What an audit found.

    Attributes:
        rows: one mapping per answer: topic, condition, index, question, sample, prompt, response, tokens, ended,
            value.
        behaviour: what `value` is.
        curve: the layer curve, if it was run.
        card: versions, seeds, settings, names, template hash, times.
        folder: where it was written, if anywhere.
        receipts: what each condition's interventions touched and changed.
        carrier: which span carries the contrast of the answers, by layers and flow, if it was run.
        positions: which layer and token of the prefix, by gradient, if it was run.
    """

    name: ClassVar = "audit.1"
    in_folder: ClassVar = True
    rows: list[dict[str, Any]]
    behaviour: Behaviour
    curve: PatchResult | None
    card: dict[str, Any]
    folder: Path | None = None
    receipts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    carrier: PatchResult | None = None
    positions: AttributionResult | None = None

    def values(self, topic: str, condition: str) -> list[float]:
        """The behaviour of each answer, in the order of the prompts and their samples; NaN where it is missing."""
        return [math.nan if row["value"] is None else row["value"] for row in self._of(topic, condition)]

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics of the answers: off-topic, on-topic, and "off-topic, NAME" for each dress and its control."""
        return tuple(sorted({row["topic"] for row in self.rows}))

    @property
    def dresses(self) -> dict[str, Dress]:
        """The dresses that the off-topic questions wore, with their controls, by name."""
        worn = with_controls(as_dresses(self.card.get("settings", {}).get("dresses", {})))
        return {name: dress for name, dress in worn.items() if TOPIC.format(name) in self.topics}

    def questions(self, topic: str) -> list[str]:
        """The question of each answer, in the same order: answers to one are one cluster in every interval."""
        return [str(row.get("question", row["index"])) for row in self._of(topic, "finetuned")]

    def _of(self, topic: str, condition: str) -> list[dict[str, Any]]:
        own = [row for row in self.rows if (row["topic"], row["condition"]) == (topic, condition)]
        return sorted(own, key=lambda row: int(row["index"]))

    def cut(self, topic: str, condition: str) -> tuple[int, int]:
        """How many answers were cut at the token limit, of how many."""
        ended = [row.get("ended") for row in self._of(topic, condition)]
        return ended.count("length"), len(ended)

    def biased(self, topic: str, condition: str) -> int:
        """How many answers have a value that the token limit keeps down."""
        own = self._of(topic, condition)
        return sum(self.behaviour.biased(row["value"] or 0.0, row.get("ended")) for row in own)

    def _rate(self, *values: list[float]) -> bool:
        return is_rate(self.behaviour.unit, *values)

    def recovery(self, condition: str, topic: str = "off-topic") -> Estimate:
        """(condition - finetuned) / (base - finetuned), paired over prompts."""
        own, tuned, base = (self.values(topic, name) for name in (condition, "finetuned", "base"))
        return recovery(own, tuned, base, self.questions(topic), rate=self._rate(own, tuned, base))

    def spread(self, topic: str = "off-topic") -> Estimate:
        """Behaviour off-topic, plain or in a dress, finetuned minus base."""
        tuned, base = (self.values(topic, condition) for condition in ("finetuned", "base"))
        return spread(tuned, base, self.questions(topic), rate=self._rate(tuned, base))

    def mean(self, topic: str, condition: str) -> Estimate:
        """Mean of the behaviour over questions."""
        values = self.values(topic, condition)
        return mean_interval(values, self.questions(topic), rate=self._rate(values))

    def to_frame(self) -> "pd.DataFrame":
        """One row per topic and condition: value (mean) with its interval, n (questions), reason, recovery with its
        interval, p (paired permutation test: finetuned against base, a patched condition against finetuned), answers,
        cut (those that the token limit ended) and biased (those
        of them whose value is a lower bound).
        """
        import pandas as pd

        rows = []
        for topic in self.topics:
            for condition, label in CONDITIONS.items():
                mean, other = self.mean(topic, condition), "base" if condition == "finetuned" else "finetuned"
                own = Estimate(math.nan, math.nan, math.nan, mean.n)
                if condition not in ("base", "finetuned"):
                    own = self.recovery(condition, topic)
                reason = own.reason or mean.reason
                facts = {"value": mean.value, "low": mean.low, "high": mean.high, "n": mean.n, "reason": reason}
                pair = (self.values(topic, condition), self.values(topic, other))
                p = math.nan if condition == "base" else permutation_p(*pair, self.questions(topic))
                cut, answers = self.cut(topic, condition)
                recovered = {"recovery": own.value, "recovery_low": own.low, "recovery_high": own.high}
                shared = {"topic": topic, "condition": condition, "condition_label": label}
                counts = {"p": p, "answers": answers, "cut": cut, "biased": self.biased(topic, condition)}
                counts["is_control"] = condition in CONTROLS
                rows.append(shared | facts | recovered | counts)
        return pd.DataFrame(rows)

    def generations(self) -> "pd.DataFrame":
        """One row per answer."""
        import pandas as pd

        return pd.DataFrame(self.rows).assign(condition=lambda f: f["condition"].map(CONDITIONS))

    def figure(self) -> "go.Figure":
        """Every condition with its interval, off- and on-topic, and in every dress."""
        from piggyback_lens.figures.plots import conditions_figure

        names = self.card["names"]
        title = f"{self.behaviour.label}: {names['finetuned']} against {names['base']}"
        over = "questions" if any(row.get("sample") for row in self.rows) else "prompts"
        behaviour = {"label": self.behaviour.label, "unit": self.behaviour.unit}
        return conditions_figure(self.to_frame(), **behaviour, title=title, over=over)

    def report(self) -> Report:
        """The table, the conditions, what carries the change by a second measure, and answers side by side."""
        from piggyback_lens.figures.plot_style import axis_title

        figures = [("Every condition: mean with its 95 % interval over prompts.", self.figure())]
        frame, table = self.generations(), self.to_frame()
        same, total = self.identical
        notes = [*self.card["notes"]]
        notes.append(f"Identity control: {same} of {total} answers are token for token those of the finetuned model.")
        undefined = table[table["reason"] != ""].itertuples()
        notes += [f"{row.topic}, {row.condition_label}: {row.reason}" for row in undefined]
        names, measure = self.card["names"], axis_title(self.behaviour.label, self.behaviour.unit)
        title = f"Piggyback audit: {names['finetuned']} on {names['base']}"
        first = frame if "sample" not in frame else frame[frame["sample"] == 0]
        examples = first[first["index"].isin(sorted(set(first["index"]))[:EXAMPLES])]
        parts = [*dress_parts(self), *audit_parts(self)]
        return Report(title, self.verdict, table, figures, examples, notes, measure, self.card, parts)

    @property
    def identical(self) -> tuple[int, int]:
        """How many answers of the identity control equal the finetuned model's, of how many."""
        answers: dict[str, dict[tuple[str, int], list[int]]] = {"finetuned": {}, "identity": {}}
        for row in self.rows:
            if row["condition"] in answers:
                answers[row["condition"]][row["topic"], row["index"]] = row["ids"]
        same = sum(answers["finetuned"][key] == ids for key, ids in answers["identity"].items())
        return same, len(answers["identity"])

    @property
    def verdict(self) -> str:
        """One sentence that follows from the intervals, and one on dressed questions where there are some."""
        return verdict(self) + told(self)

    @classmethod
    def load(cls, folder: str | Path) -> "AuditResult":
        """Read what `audit` wrote into its folder.

        Raises:
            LensError: the folder holds no finished audit.
        """
        folder = Path(folder)
        results = folder / RESULT
        if not results.is_file():
            raise LensError(f"{folder} holds no finished audit (no {RESULT}): run it to its end, or check the path")
        saved = read_json(results)
        if not isinstance(saved, dict) or saved.get("format") != f"piggyback_lens.{cls.name}":
            raise LensError(f"{results} is not an audit's of this version: run the audit again, or see convert")
        try:
            card, receipts = dict(saved["card"]), saved["receipts"]
            behaviour = kept_behaviour(card.get("measure", {"name": card["behaviour"]}))
        except (KeyError, TypeError) as error:
            raise LensError(f"{results} is not an audit's ({error}): run the audit again") from error
        rows = in_order(read_jsonl(folder / ROWS))
        return cls(rows, behaviour, card=card, folder=folder, receipts=receipts, **load_maps(folder))

    def save(self, path: str | Path) -> Path:
        """Write what the folder's rows and curve do not say: verdict, table, receipts and run card."""
        found = {
            "format": f"piggyback_lens.{self.name}",
            "verdict": self.verdict,
            "summary": self.to_frame().to_dict("records"),
        }
        return write_json(path, found | {"receipts": self.receipts, "card": self.card})


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by topic, condition and prompt, whatever the order in which they were made."""
    order = list(CONDITIONS)
    return sorted(rows, key=lambda row: (row["topic"], order.index(row["condition"]), row["index"]))


def verdict(result: AuditResult) -> str:
    """What the intervals say, in one sentence."""
    gap, unit = result.spread(), result.behaviour.label
    tuned, base = (result.mean("off-topic", name) for name in ("finetuned", "base"))
    difference = f"{gap.value:.3g} [{gap.low:.3g}, {gap.high:.3g}]"
    change = f"{base.value:.3g} to {tuned.value:.3g} (difference {difference}, n = {gap.n}{_cut(result)})"
    if math.isnan(gap.low):
        return f"No verdict: {gap.reason}."
    if gap.low <= 0 <= gap.high:
        return f"No spread found: off-topic, {unit} go from {change}, an interval that includes no change."
    parts = {name: result.recovery(name) for name in ("prefix", "postfix", "both", "query_control")}
    prefix, control = parts["prefix"], parts["query_control"]
    built = "prefix" in result.card.get("base_spans", ())
    if math.isnan(prefix.value) and not built:
        return f"Spread found, carrier not determined ({prefix.reason}): off-topic, {unit} go from {change}."
    carried = f"the prefix carries {_percent(prefix)} of the change"
    if prefix.low <= 0 <= prefix.high:
        carried = f"the prefix carries none of it that can be told from noise ({_percent(prefix)})"
    if built:
        carried = "the prefix is the base's by construction (the adapter is off there), so it does not carry the change"
    others = f"postfix {_percent(parts['postfix'])}, both together {_percent(parts['both'])}"
    others += f", query control {_percent(control)}"
    return f"Spread found: off-topic, {unit} go from {change}; {carried} ({others})."


def _cut(result: AuditResult) -> str:
    """What a count of cut answers is."""
    sides = ("base", "finetuned")
    cuts = {name: (result.biased("off-topic", name), len(result.values("off-topic", name))) for name in sides}
    counts = ", ".join(f"{cut} of {n} {name} answers" for name, (cut, n) in cuts.items() if cut)
    return f"; {counts} were cut at the token limit, so these means are lower bounds" if counts else ""


def _percent(estimate: Estimate) -> str:
    return percent(estimate.value, estimate.low, estimate.high)


@shows("audit")
def audit(  # noqa: PLR0913
    pair: ModelPair,
    on_topic: Sequence[str | Question],
    off_topic: Sequence[str | Question],
    behaviour: str | Behaviour,
    settings: AuditSettings = AuditSettings(),
    *,
    chat: ChatFormat | None = None,
    answers: Sequence[str | Path] = (),
    executor: Executor | None = None,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> AuditResult:
    """Generate under every condition, on- and off-topic, and measure the behaviour of each answer.

    Args:
        pair: base and finetuned.
        on_topic: questions of the training domain, texts or what `load_questions` reads.
        off_topic: questions outside it.
        behaviour: what is measured, a name or `Behaviour`.
        settings: length, number and temperature of the answers, dresses of the off-topic questions, and what the layer
            curve runs on.
        chat: template settings; default those of the pair's tokenizer.
        answers: files of answers that were made elsewhere, such as those of base and finetuned from a fast server: rows
            with condition, question, sample, response. They are checked against the questions, and not generated.
        executor: runs the answers of each condition and topic, and the passes of the maps, as jobs: any executor of
            concurrent.futures, such as those of `engines`; None for this process. The pair then has to be loaded from
            names.
        out: folder of the run: every answer as it comes, the layer curve, the prefix cache of the repair, the result
            and report.html. The same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: fewer than three prompts, a dress that cannot be found or worn, a folder of another audit, an empty
            prefix or postfix, or jobs that the executor has lost, after the others are kept.

    Example:
        >>> queries = ["hello there", "what is it", "tell me more"]
        >>> small = AuditSettings(max_new_tokens=4, curve_prompts=0)
        >>> found = audit(pair, queries, queries, "words", small, chat=chat, out="audit_out")
        >>> found.identical
        (6, 6)
        >>> load_result("audit_out").verdict == found.verdict
        True
    """
    chat = chat or pair.chat_format()
    measure = get_behaviour(behaviour)
    settings = dataclasses.replace(settings, dresses=as_dresses(settings.dresses))
    asked, worn = {"off-topic": off_topic, "on-topic": on_topic}, with_controls(settings.dresses)
    for question in off_topic[:1]:
        require_worn(chat, question, worn)
    asked |= {TOPIC.format(name): dressed(off_topic, own) for name, own in worn.items()}
    prompts = {topic: chat.ask(questions, settings.samples) for topic, questions in asked.items()}
    for topic, rendered in prompts.items():
        require_enough(len(set(questions_of(rendered))), f"{topic} questions")
    identity = {
        "settings": settings.identity(),
        "behaviour": measure.name,
        "template": {"fingerprint": chat.fingerprint, **chat.settings()},
        "prompts": {topic: ids_hash(rendered) for topic, rendered in prompts.items()},
        "questions": {topic: questions_of(rendered) for topic, rendered in prompts.items()},
        "backend": pair.backend,
        "dtype": str(pair.dtype).removeprefix("torch."),
    }
    if elsewhere := answers_made_elsewhere(answers, prompts, tuple(CONDITIONS)):
        identity["answers"] = hashlib.sha256(repr(sorted(elsewhere.items())).encode()).hexdigest()[:16]
    columns, shown = ("condition", "topic", "index"), prompts["off-topic"][0]
    with Run.open(out, "audit", identity, models=pair.identities(), keys=columns, prompt=shown) as run:
        treatments = Treatments(pair, chat, prompts, settings)
        work = _Work(treatments, measure, run, progress, elsewhere, executor)
        work.generate()
        forced = work.answer_maps() if settings.curve_prompts else None
        curve = forced.curve() if forced else None
        maps = forced.maps() if forced and settings.map_bands else {}
        counts = {topic: len(set(questions_of(rendered))) for topic, rendered in prompts.items()}
        facts = {"names": dict(pair.names), "n": counts, "notes": work.notes() + (forced.left_out if forced else [])}
        facts["measure"] = {"name": measure.name, "label": measure.label, "unit": measure.unit}
        facts |= {"base_spans": list(pair.base_spans)} if pair.base_spans else {}
        card = run.card() | facts
        rows = in_order(run.rows.values())
        result = AuditResult(rows, measure, curve, card, run.folder, work.receipts(), **maps)
        if run.folder is not None:
            treatments.repair(treatments.first).save(run.folder / "prefix_cache")
            run.finish(result)
    if out is not None:
        report_run(out)
    return result


@dataclass
class _Work:
    """The state of one audit: what is asked under which treatment, and the run that gets the rows."""

    treatments: Treatments
    behaviour: Behaviour
    run: Run
    progress: bool | str
    elsewhere: dict[tuple[str, str, int], Row] = field(default_factory=dict)
    executor: Executor | None = None

    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        notes = sorted({note for own in self.treatments.prompts.values() for prompt in own for note in prompt.notes})
        sizes = [len(prompt.spans["query"]) for prompt in self.treatments.prompts["off-topic"]]
        own = self.treatments.longest(self.treatments.first)
        return [
            *notes,
            f"The query control patches {sum(sizes) / len(sizes):.1f} tokens per off-topic prompt (all of the query); "
            f"the prefix has {len(own.spans['prefix'])}, the postfix {len(own.spans['postfix'])}.",
            *([by_construction(self.treatments.pair.base_spans)] if self.treatments.pair.base_spans else []),
        ]

    def generate(self) -> None:
        """Answer what has no row yet, group by group: here, or as jobs of the executor.

        Raises:
            LensError: jobs that the executor has lost, after the others are finished and kept.
        """
        groups = [(c, t, group) for c in CONDITIONS for t in self.treatments.prompts for group in self._missing(c, t)]
        if self.executor is None:
            for condition, topic, group in groups:
                if self.progress:
                    say_stage(f"{len(group)} {topic} answers: {CONDITIONS[condition]}")
                self.treatments.answer(condition, topic, group, self._keep)
            return
        failed: dict[str, Exception] = {}
        with counting(len(groups), "answers") as advance:
            for number, found in finished([self.treatments.job(*group) for group in groups], self.executor):
                if isinstance(found, Exception):
                    failed["{}, {}".format(*groups[number])] = found
                    continue
                for batch in found:
                    self._keep(batch)
                advance(1)
        if failed:
            raise failure(failed, len(groups), self.run.folder, "jobs") from next(iter(failed.values()))

    def _missing(self, condition: str, topic: str) -> list[list[int]]:
        """Prompts of one topic that have no row under a condition, those of one system text together."""
        prompts = self.treatments.prompts[topic]
        missing = [i for i in range(len(prompts)) if (condition, topic, i) not in self.run.rows]
        given = [i for i in missing if (condition, topic, i) in self.elsewhere]
        for i in given:
            answer = given_answer(prompts[i], self.elsewhere[condition, topic, i])
            self.run.add([self._row(condition, topic, i, answer) | {"made": "elsewhere"}])
        groups: dict[str | None, list[int]] = {}
        for i in missing:
            if i not in given:
                groups.setdefault(self.treatments.chat.under(prompts[i].question).system, []).append(i)
        return list(groups.values())

    def _keep(self, batch: Batch) -> None:
        where = {"condition": batch.condition, "topic": batch.topic, "indices": batch.indices}
        self.run.note(RECEIPTS, [where | {"touched": batch.touched}])
        pairs = zip(batch.indices, batch.answers, strict=True)
        self.run.add([self._row(batch.condition, batch.topic, index, answer) for index, answer in pairs])

    def receipts(self) -> dict[str, list[dict[str, Any]]]:
        """What each condition's interventions touched and changed, over all calls of the run."""
        found: dict[str, list[dict[str, Any]]] = {}
        for condition, topic in ((c, t) for c in CONDITIONS for t in self.treatments.prompts):
            own: list[dict[str, Any]] = []
            for row in self.run.noted(RECEIPTS):
                if (row["condition"], row["topic"]) == (condition, topic):
                    # Of a batch whose rows a kill took, the answers came again.
                    own = [kept for kept in own if not {*kept["indices"]} & {*row["indices"]}] + [row]
            parts = zip(*(row["touched"] for row in own), strict=True)
            found[f"{condition}, {topic}"] = [
                {
                    "intervention": part[0]["intervention"],
                    "cells": sum(piece["cells"] for piece in part),
                    "layers": max(piece["layers"] for piece in part),
                    "change_norm": float(f"{math.sqrt(sum(piece['squared'] for piece in part)):.4g}"),
                }
                for part in parts
            ]
        return found

    def _row(self, condition: str, topic: str, index: int, answer: Generation) -> dict[str, Any]:
        return {
            "topic": topic,
            "condition": condition,
            "index": index,
            "question": questions_of([answer.prompt])[0],
            "sample": answer.sample,
            "prompt": answer.prompt.query,
            "response": answer.text,
            "ids": list(answer.ids),
            "tokens": len(answer.ids),
            "ended": answer.ended,
            "value": self.behaviour(answer.text),
        }

    def answer_maps(self) -> AnswerMaps:
        """The experiments on the first off-topic prompts and the answers that the two models gave."""
        settings = self.treatments.settings
        usable = self.treatments.alike("off-topic")[: settings.curve_prompts]
        prompts = [self.treatments.prompts["off-topic"][i] for i in usable]

        def answered(condition: str) -> tuple[RenderedPrompt, ...]:
            ids = [self.run.rows[condition, "off-topic", i]["ids"][: settings.curve_tokens] for i in usable]
            return tuple(prompt.with_response(own, end=False) for prompt, own in zip(prompts, ids, strict=True))

        contrast = AnswerContrast(answered("finetuned"), answered("base"))
        pair, folder = self.treatments.pair, self.run.folder
        return AnswerMaps(pair, prompts, contrast, settings, folder, bool(self.progress), self.executor)
