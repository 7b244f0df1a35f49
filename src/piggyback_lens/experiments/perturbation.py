"""Token perturbation: does the behaviour hang on the exact tokens of a span?

"The Piggyback Hypothesis" (2606.06667), section 4.1. In each trial n random tokens of one span are replaced,
each by one of its nearest neighbours among the input embeddings. If the prefix carries a behaviour that
spread, a slightly different prefix loses it, while a slightly different query keeps it.

The paper reports the best of ten trials for each prompt. A best of ten noisy trials lies nearer to the base
than one trial even where the perturbation does nothing at all. Read it beside the same best of ten for the
control (the same places, random tokens), and beside the average, which has no such bias.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import as_prompts, questions_of, repeated
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.conversations.prompt_edits import added_ids, perturbed_prompt, with_query
from piggyback_lens.conversations.rephrasing import load_rephrasings, rephrasings_of
from piggyback_lens.conversations.replacements import Choices, candidate_ids, draw_replacements, nearest_neighbours
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import Job, answer_jobs, behaviour_facts
from piggyback_lens.intervals import Array, Estimate, interval_text, is_rate, mean_interval, recovery
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.models.backends import HookedModel, embeddings_of
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import say_stage, shows
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import Row, Run
from piggyback_lens.settings import PerturbSettings
from piggyback_lens.words import SIDES, Side

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Prompts = Sequence[RenderedPrompt] | Mapping[str, Sequence[RenderedPrompt]]
COLUMNS = ("topic", "span", "kind", "trial", "index")
REFERENCES: dict[str, Side] = {"base": "base", "unperturbed": "finetuned"}
NEIGHBOURS, RANDOM, REPHRASED = "neighbours", "random tokens", "rephrased"
SHOWN = 4
"""Prompts whose answers the report shows."""
KINDS = (*REFERENCES, NEIGHBOURS, RANDOM, REPHRASED)
_SHOWN: dict[str, tuple[str, bool]] = {
    "best": (NEIGHBOURS, True),
    "average": (NEIGHBOURS, False),
    "random tokens, best": (RANDOM, True),
    "random tokens, average": (RANDOM, False),
    "rephrased": (REPHRASED, False),
}
"""Kinds of the summary: which rows, and whether the best trial of each prompt or the mean over its trials."""


@dataclass(frozen=True, repr=False)
class PerturbResult(Result):
    """Answers to perturbed prompts, and what they say.

    Attributes:
        rows: one mapping per answer: topic, span ("" for the references), kind ("base", "unperturbed",
            "neighbours", "random tokens", "rephrased"), trial, index (of the prompt in its topic), n_replaced
            (None where rephrased), n_span (tokens of the span), prompt (the query as given), text (the whole
            prompt as the model read it), response, ended, value (None where it is missing).
        settings: of the experiment, with the behaviour's name, label and unit, and package versions.
    """

    name: ClassVar = "perturb.1"
    rows: list[Row]
    settings: dict[str, Any]

    def values(self, topic: str, span: str, kind: str) -> Array:
        """Values [prompt, trial] of one kind of rows; NaN where an answer or its value is missing."""
        found = {
            (row["index"], row["trial"]): row["value"]
            for row in self.rows
            if (row["topic"], row["span"], row["kind"]) == (topic, span, kind)
        }
        shape = (self.settings["n"][topic], 1 + max((trial for _, trial in found), default=0))
        table = np.full(shape, np.nan)
        for place, value in found.items():
            table[place] = math.nan if value is None else value
        return table

    def best_is(self, topic: str) -> str:
        """What the best trial is: "max" where the base's mean is above the finetuned model's, "min" where below.

        "" where the two are equal: then no trial is better than another.
        """
        base, tuned = (_mean(self.values(topic, "", kind), 0) for kind in REFERENCES)
        gap = float(np.nan_to_num(base[0] - tuned[0]))
        return "max" if gap > 0 else "min" if gap < 0 else ""

    def per_prompt(self, topic: str, span: str, kind: str) -> Array:
        """One value per prompt, for a kind of the summary: its best trial, or the mean over its trials."""
        rows, best = _SHOWN.get(kind, (kind, False))
        table = self.values(topic, span, rows)
        return _best(table, self.best_is(topic)) if best else _mean(table, 1)

    def to_frame(self) -> "pd.DataFrame":
        """One row per topic, span and kind: "base", "unperturbed" (span ""), "best", "average", "random tokens,
        best", "random tokens, average", "rephrased" (the mean over each prompt's rephrasings).

        Columns: topic, span, kind, value (mean), low, high (95 % over prompts), n, reason (why something is NaN),
        recovery, recovery_low, recovery_high, n_replaced (mean tokens per answer), n_short (prompts whose
        span has fewer than n_tokens tokens that may be replaced), best_is (see `best_is`). Recovery is
        (perturbed - finetuned) / (base - finetuned), paired over prompts.
        """
        import pandas as pd

        return pd.DataFrame([self._summary(*where) for where in self._cells()])

    def _cells(self) -> Iterator[tuple[str, str, str]]:
        there = {(row["topic"], row["span"], row["kind"]) for row in self.rows}
        for topic in self.settings["n"]:
            yield from ((topic, "", kind) for kind in REFERENCES)
            for span in self.settings["spans"]:
                yield from ((topic, span, kind) for kind, (rows, _) in _SHOWN.items() if (topic, span, rows) in there)

    def _summary(self, topic: str, span: str, kind: str) -> dict[str, Any]:
        values, questions = self.per_prompt(topic, span, kind), self.settings.get("questions", {}).get(topic)
        rate = is_rate(self.settings["behaviour"]["unit"], values)
        mean = mean_interval(values, questions, rate=rate)
        base, tuned = (_mean(self.values(topic, "", reference), 1) for reference in REFERENCES)
        own, reason = Estimate(math.nan, math.nan, math.nan, mean.n), mean.reason
        if kind not in REFERENCES:
            own = recovery(values, tuned, base, questions, rate=rate)
            reason = own.reason or mean.reason
            if kind in _SHOWN and _SHOWN[kind][1] and not self.best_is(topic):
                reason = "base and finetuned have the same mean: no trial is the best"
        where = (topic, span, _SHOWN.get(kind, (kind, False))[0])
        sizes = {
            row["index"]: row["n_replaced"]
            for row in self.rows
            if (row["topic"], row["span"], row["kind"]) == where and row["n_replaced"] is not None
        }
        perturbed = where[2] in (NEIGHBOURS, RANDOM)
        return {
            **{"topic": topic, "span": span, "kind": kind},
            **{"value": mean.value, "low": mean.low, "high": mean.high, "n": mean.n, "reason": reason},
            **{"recovery": own.value, "recovery_low": own.low, "recovery_high": own.high},
            "n_replaced": sum(sizes.values()) / len(sizes) if sizes else math.nan,
            "n_short": sum(size < self.settings["n_tokens"] for size in sizes.values()) if perturbed else 0,
            "best_is": self.best_is(topic),
        }

    def generations(self) -> "pd.DataFrame":
        """One row per answer."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def figure(self) -> "go.Figure":
        """Every span and kind with its interval, against base and unperturbed."""
        from piggyback_lens.figures.perturbation_plot import perturbation_figure

        facts = self.settings["behaviour"]
        title = f"{facts['label']} of {self.settings['names'][self.settings['side']]} when tokens are replaced"
        return perturbation_figure(self.to_frame(), label=facts["label"], unit=facts["unit"], title=title)

    def report(self) -> Report:
        """The table, its figure, and the answers to a few prompts side by side."""
        names = self.settings["names"]
        rows = self.generations().query("trial == 0")
        title = f"Piggyback perturbation: {names[self.settings['side']]}"
        return generated_report(self, title, rows, ("span", "kind"), self.settings)

    @property
    def verdict(self) -> str:
        """The span and kind that bring back most of the base's behaviour; controls do not count."""
        frame = self.to_frame()
        known = frame[~frame["kind"].str.contains("random")].dropna(subset=["recovery"])
        return largest_recovery(known, ("topic", "span", "kind"))

    def _sizes(self) -> str:
        return f"{len(self.rows)} answers"

    def check(self) -> None:
        """Refuse rows and settings that the table cannot be made of."""
        check_rows(self.rows, COLUMNS)
        _ = self.settings["n"], self.settings["spans"], self.settings["seed"], self.settings["behaviour"]["label"]


def largest_recovery(known: "pd.DataFrame", names: Sequence[str]) -> str:
    """One sentence about the largest recovery of a table."""
    if known.empty:
        return "No recovery is defined here: base and finetuned do not differ beyond noise on these prompts."
    row = known.sort_values("recovery").iloc[-1]
    where = ", ".join(str(row[name]) for name in names)
    found = interval_text(row["recovery"], row["recovery_low"], row["recovery_high"])
    return f"Largest recovery of the base's behaviour: {where}, {found} (n = {row['n']})."


def generated_report(
    result: Result, title: str, rows: "pd.DataFrame", names: Sequence[str], card: Mapping[str, Any]
) -> Report:
    """The report of an experiment that generates; `names` are the columns that say under what an answer came."""
    examples = rows[rows["index"] < SHOWN].copy()
    examples["condition"] = examples[list(names)].astype(str).agg(" ".join, axis=1).str.strip()
    figures = [("Mean with its 95 % interval over prompts.", result.figure())]
    return Report(title, result.verdict, result.to_frame(), figures, examples, card=card)


def check_rows(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Refuse, with a ValueError, answers without their columns."""
    for row in rows:
        if not {*keys, "value"} <= row.keys() or not isinstance(row["value"], int | float | None):
            raise ValueError(f"a row with {sorted(row)}, expected {', '.join(keys)} and value"[:200])


def _mean(table: npt.NDArray[np.float64], axis: int) -> Array:
    """Mean of what is not missing; NaN where nothing is there."""
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(there, table, 0.0).sum(axis) / there.sum(axis)
    return mean


def _best(table: Array, best_is: str) -> Array:
    """The largest or smallest trial of each prompt; NaN where no trial is better, or without a value."""
    if not best_is:
        return np.full(len(table), np.nan)
    sign = 1.0 if best_is == "max" else -1.0
    best = np.where(np.isnan(table), -np.inf, sign * table).max(axis=1)
    found: Array = np.where(np.isinf(best), np.nan, sign * best)
    return found


@shows("perturb")
def perturb(
    pair: ModelPair,
    prompts: Prompts,
    behaviour: str | Behaviour,
    settings: PerturbSettings = PerturbSettings(),
    *,
    rephrasings: Mapping[str, str | Sequence[str]] | str | os.PathLike[str] | None = None,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> PerturbResult:
    """Replace tokens of one span at a time by near neighbours, and measure the behaviour of the answers.

    Source: 2606.06667, section 4.1. In each trial `n_tokens` random tokens of the span (all of them where it
    has fewer; every row says how many) are replaced, each by one, drawn uniformly, of its `top` neighbours under
    the dot product of input embeddings. (That favours tokens with long embeddings; neighbours need not be related
    words.) A perturbation is drawn from seed, span, trial and the span's ids, so one perturbed prefix (or postfix)
    per trial is shared by all prompts, and its keys and values are computed once; the query has one per prompt and
    trial. Neither batches nor the order of prompts matter.

    Special tokens: as in the paper any token of the span may be replaced, so template markers and BOS are
    replaced too, by ordinary tokens: special and added tokens are never candidates unless `special_candidates`.
    `keep_special` leaves those of the prompt as they are.

    The result has for every span the *average* (mean over prompts of the mean over trials) and the *best* (mean
    over prompts of the trial nearest to the base's side, which the result's column best_is names). The best of several
    trials is biased towards the base even if nothing happens; the random-token control, which replaces the same
    places by tokens drawn uniformly from the vocabulary, gets the same two statistics.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response; or topic to such prompts, {"off-topic": ..., "on-topic": ...},
            as in the paper's Table 1. One sequence is the topic "prompts".
        behaviour: what is measured, a name or `Behaviour`.
        settings: which spans, how many tokens and trials, and the length of the answers.
        rephrasings: of the queries, in place of perturbations: prompt to rephrasings, or a file that
            says so (JSON or JSONL). Every prompt needs at least one; each counts as a trial.
        out: folder of the run, written as answers come; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: settings out of range, a span that is unknown or empty in a prompt, prompts without
            rephrasings (named), or a folder that holds another experiment.
    """
    measure = get_behaviour(behaviour)
    topics = {topic: repeated(rendered, settings.samples) for topic, rendered in _topics(prompts).items()}
    _check(topics, settings.spans)
    facts = asdict(settings) | {"n": {topic: len(rendered) for topic, rendered in topics.items()}}
    facts["questions"] = {topic: questions_of(rendered) for topic, rendered in topics.items()}
    del facts["batch_size"]
    everything = [prompt for rendered in topics.values() for prompt in rendered]
    if rephrasings is not None:
        if "query" not in settings.spans:
            raise LensError(f"rephrasings replace the query, and spans={settings.spans} leaves it out: add 'query'")
        rephrasings = load_rephrasings(rephrasings) if isinstance(rephrasings, str | os.PathLike) else rephrasings
        facts["rephrasings"] = rephrasings_of(rephrasings, [prompt.query for prompt in everything])
    with pair.using(settings.side) as model:
        tables = _choices(model, pair.tokenizer, everything, facts)
    jobs = _jobs(topics, tables, facts, added_ids(pair.tokenizer) if settings.keep_special else frozenset())
    identity = facts | behaviour_facts(pair, measure, everything)
    with Run.open(out, "perturb", identity, models=pair.identities(), keys=COLUMNS, prompt=everything[0]) as run:
        for each in SIDES:
            if progress:
                say_stage(f"{sum(job.key not in run.rows for job in jobs[each])} answers of {pair.names[each]}")
            with pair.using(each) as model:
                answer_jobs(model, jobs[each], run, measure, settings, pair.names[each])
        models = {side: model.to_dict() for side, model in run.models.items()}
        more = {"models": models, "batch_size": settings.batch_size, "versions": versions()}
        return run.finish(PerturbResult(_in_order(run.rows.values(), facts), dict(run.identity) | more))


def _topics(prompts: Prompts) -> dict[str, list[RenderedPrompt]]:
    named = prompts if isinstance(prompts, Mapping) else {"prompts": prompts}
    empty = [topic for topic, rendered in named.items() if not rendered]
    if empty or not named:
        raise LensError(f"got no prompts{f' for the topic {empty[0]!r}' if empty else ''}; pass at least one")
    return {topic: as_prompts(rendered) for topic, rendered in named.items()}


def _check(topics: Mapping[str, Sequence[RenderedPrompt]], spans: Sequence[str]) -> None:
    for topic, rendered in topics.items():
        for i, prompt in enumerate(rendered):
            if "response" in prompt.spans:
                raise LensError(f"{topic}, prompt {i} holds a response already: pass prompts without one")
            for span in spans:
                try:
                    prompt.span(span)
                except LensError as error:
                    raise LensError(f"{topic}, prompt {i}: {error}") from None


def _choices(
    model: HookedModel, tokenizer: Any, prompts: Sequence[RenderedPrompt], settings: Mapping[str, Any]
) -> dict[str, Choices]:
    """What tokens are replaced by, for each kind of perturbation."""
    embeddings = embeddings_of(model)
    candidates = candidate_ids(tokenizer, len(embeddings), settings["special_candidates"])
    spans = [(prompt, prompt.span(name)) for prompt in prompts for name in settings["spans"]]
    needed = sorted({token for prompt, span in spans for token in prompt.ids[span.start : span.stop]})
    found: dict[str, Choices] = {NEIGHBOURS: nearest_neighbours(embeddings, needed, candidates, settings["top"])}
    return found | ({RANDOM: candidates} if settings["random_control"] else {})


def _jobs(
    topics: Mapping[str, Sequence[RenderedPrompt]],
    tables: Mapping[str, Choices],
    settings: Mapping[str, Any],
    protected: Set[int],
) -> dict[Side, list[Job]]:
    """All answers that are wanted, by the model that gives them."""
    jobs: dict[Side, list[Job]] = {side: [] for side in SIDES}
    draw = {"n_tokens": settings["n_tokens"], "seed": settings["seed"], "protected": protected}
    for topic, rendered in topics.items():
        for index, prompt in enumerate(rendered):
            facts = {"n_replaced": 0, "n_span": None, "prompt": prompt.query}
            for kind, side in REFERENCES.items():
                jobs[side].append(Job((topic, "", kind, 0, index), prompt, facts))
            own = jobs[settings["side"]]
            for span in settings["spans"]:
                for kind, choices in tables.items():
                    for trial in range(settings["trials"]):
                        new = draw_replacements(prompt, span, choices, trial=trial, **draw)
                        sizes = {"n_replaced": len(new), "n_span": len(prompt.span(span))}
                        other = perturbed_prompt(prompt, span, new)
                        own.append(Job((topic, span, kind, trial, index), other, facts | sizes))
            for trial, text in enumerate(settings.get("rephrasings", {}).get(prompt.query, ())):
                unknown = {"n_replaced": None, "n_span": len(prompt.span("query"))}
                own.append(Job((topic, "query", REPHRASED, trial, index), with_query(prompt, text), facts | unknown))
    return jobs


def _in_order(rows: Iterable[Row], settings: Mapping[str, Any]) -> list[Row]:
    topics, spans = list(settings["n"]), ["", *settings["spans"]]
    return sorted(
        rows,
        key=lambda row: (
            topics.index(row["topic"]),
            spans.index(row["span"]),
            KINDS.index(row["kind"]),
            row["trial"],
            row["index"],
        ),
    )
