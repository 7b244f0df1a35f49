"""The template stress suite: how robust is a behaviour to small changes of the prefix, the query untouched?

A behaviour that hangs on the exact prefix of the training template fades when the template is written a little
differently; one that the finetune learned from the queries stays.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import as_prompts, ids_hash, questions_of, repeated
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.conversations.template_variants import Variant, stress_variants
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import Job, answer_jobs, behaviour_facts
from piggyback_lens.experiments.perturbation import check_rows, generated_report, largest_recovery
from piggyback_lens.intervals import Array, Estimate, is_rate, mean_interval, recovery, spread
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import say_stage, shows
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import Row, Run
from piggyback_lens.settings import StressSettings
from piggyback_lens.words import SIDES, Side

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

UNMODIFIED = "unmodified"
COLUMNS = ("variant", "side", "index")


@dataclass(frozen=True, repr=False)
class StressResult(Result):
    """Answers under every variant of the template, and what they say.

    Attributes:
        rows: one mapping per answer: variant, side, index (of the prompt), family, prefix_tokens, prompt (the
            query), text (the whole prompt), response, ended, value (None where it is missing).
        settings: of the experiment; "variants" lists name, family and first prompt's prefix text of each, and
            why it was skipped, if so.
    """

    name: ClassVar = "stress.1"
    rows: list[Row]
    settings: dict[str, Any]

    @property
    def skipped(self) -> dict[str, str]:
        """Variants that were not run, with the reason."""
        return {variant["name"]: variant["skipped"] for variant in self.settings["variants"] if variant["skipped"]}

    def values(self, variant: str, side: str) -> Array:
        """The behaviour of each prompt's answer; NaN where it is missing."""
        values = np.full(self.settings["n"], np.nan)
        for row in self.rows:
            if (row["variant"], row["side"]) == (variant, side):
                values[row["index"]] = math.nan if row["value"] is None else row["value"]
        return values

    def spread(self, variant: str) -> Estimate:
        """Finetuned minus base under one variant, paired over prompts."""
        tuned, base = (self.values(variant, side) for side in ("finetuned", "base"))
        return spread(tuned, base, self.settings.get("questions"), rate=self._rate(tuned, base))

    def _rate(self, *values: Array) -> bool:
        return is_rate(self.settings["behaviour"]["unit"], *values)

    def recovery(self, variant: str) -> Estimate:
        """How much of the unmodified template's spread a variant takes away, paired over prompts.

        1 - spread(variant) / spread(unmodified): 1 where the two models no longer differ, 0 where they differ
        as before, negative where they differ more. NaN with the reason where the unmodified template has no
        spread beyond noise.
        """
        before, after = (self.values(name, "finetuned") - self.values(name, "base") for name in (UNMODIFIED, variant))
        return recovery(after, before, np.zeros(len(before)), self.settings.get("questions"), rate=False)

    def to_frame(self) -> "pd.DataFrame":
        """One row per variant and side, the unmodified template first.

        Columns: variant, family, side, value (mean), low, high (95 % over prompts), n, reason (why something is
        NaN), prefix_tokens (of the longest prefix), spread, spread_low, spread_high, recovery, recovery_low,
        recovery_high (see `spread` and `recovery`; the same on both rows of a variant, NaN if one side was not
        run). Skipped variants have no rows: see `skipped`.
        """
        import pandas as pd

        run = [variant for variant in self.settings["variants"] if not variant["skipped"]]
        return pd.DataFrame([row for variant in run for row in self._summary(variant["name"], variant["family"])])

    def _summary(self, name: str, family: str) -> list[dict[str, Any]]:
        n = self.settings["n"]
        gap = gone = Estimate(math.nan, math.nan, math.nan, n, "only one of base and finetuned was run")
        if set(self.settings["sides"]) == set(SIDES):
            gap = self.spread(name)
            gone = Estimate(math.nan, math.nan, math.nan, n) if name == UNMODIFIED else self.recovery(name)
        rows = []
        for side in self.settings["sides"]:
            own = self.values(name, side)
            mean = mean_interval(own, self.settings.get("questions"), rate=self._rate(own))
            sizes = [row["prefix_tokens"] for row in self.rows if (row["variant"], row["side"]) == (name, side)]
            rows.append(
                {
                    **{"variant": name, "family": family, "side": side},
                    **{"value": mean.value, "low": mean.low, "high": mean.high, "n": mean.n},
                    "reason": gone.reason or gap.reason or mean.reason,
                    "prefix_tokens": max(sizes),
                    **{"spread": gap.value, "spread_low": gap.low, "spread_high": gap.high},
                    **{"recovery": gone.value, "recovery_low": gone.low, "recovery_high": gone.high},
                }
            )
        return rows

    def generations(self) -> "pd.DataFrame":
        """One row per answer."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def figure(self) -> "go.Figure":
        """Every variant with its interval, base beside finetuned."""
        from piggyback_lens.figures.perturbation_plot import stress_figure

        facts, names = self.settings["behaviour"], self.settings["names"]
        title = f"{facts['label']} under variants of the template: {names['finetuned']} against {names['base']}"
        frame = self.to_frame().rename(columns={"side": "model"})
        return stress_figure(frame, label=facts["label"], unit=facts["unit"], title=title)

    def report(self) -> Report:
        """The table, its figure, the answers to a few prompts side by side, and what was not run."""
        title = f"Piggyback stress: {self.settings['names']['finetuned']}"
        shown = generated_report(self, title, self.generations(), ("side", "variant"), self.settings)
        return replace(shown, notes=[f"not run: {name}: {reason}" for name, reason in self.skipped.items()])

    @property
    def verdict(self) -> str:
        """The variant that takes away most of the spread."""
        return largest_recovery(self.to_frame().dropna(subset=["recovery"]), ("variant",))

    def _sizes(self) -> str:
        return f"{len(self.rows)} answers"

    def check(self) -> None:
        """Refuse rows and settings that the table cannot be made of."""
        check_rows(self.rows, COLUMNS)
        _ = self.settings["n"], self.settings["sides"], self.settings["seed"], self.settings["behaviour"]["label"]
        _ = [(variant["name"], variant["family"], variant["skipped"]) for variant in self.settings["variants"]]


@shows("stress")
def stress(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    behaviour: str | Behaviour,
    settings: StressSettings = StressSettings(),
    *,
    variants: Sequence[Variant] | None = None,
    chat: ChatFormat | None = None,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> StressResult:
    """Answer the same queries under every variant of the template, and measure the behaviour.

    Args:
        pair: base and finetuned.
        prompts: of the unmodified template, one turn each, without a response.
        behaviour: what is measured, a name or `Behaviour`.
        settings: which models, and the length of the answers.
        variants: by default those of the library, of `chat`. Those that say why they are skipped are reported, not run.
        chat: the settings of the prompts, for the default variants; default those of the pair's tokenizer.
        out: folder of the run, written as answers come; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: no prompts, prompts of other settings than `chat`, two variants of one name, a variant that
            changes the tokens of a query, or a folder that holds another experiment.
    """
    measure = get_behaviour(behaviour)
    prompts, sides = repeated(as_prompts(prompts), settings.samples), settings.sides
    if variants is None:
        variants = stress_variants(_checked(chat or pair.chat_format(), prompts))
    names = [UNMODIFIED, *(variant.name for variant in variants)]
    if len(set(names)) < len(names):
        raise LensError(f"two variants have one name ({UNMODIFIED!r} is taken): {', '.join(names)}")
    used = {v.name: [_same(p, v(p)) for p in prompts] for v in variants if not v.skipped}
    rendered = {UNMODIFIED: list(prompts)} | used
    families = {UNMODIFIED: UNMODIFIED} | {variant.name: variant.family for variant in variants}
    facts: dict[str, Any] = asdict(settings) | {"sides": list(sides), "questions": questions_of(prompts)}
    del facts["batch_size"]
    hashes = {name: ids_hash(own) for name, own in rendered.items()}
    facts |= {"n": len(prompts), **behaviour_facts(pair, measure, prompts)}
    facts |= {"variants": hashes}
    with Run.open(out, "stress", facts, models=pair.identities(), keys=COLUMNS, prompt=prompts[0]) as run:
        for side in sides:
            jobs = _jobs(rendered, families, side)
            if progress:
                say_stage(f"{sum(job.key not in run.rows for job in jobs)} answers of {pair.names[side]}")
            with pair.using(side) as model:
                answer_jobs(model, jobs, run, measure, settings, pair.names[side])
        reasons = {UNMODIFIED: ""} | {variant.name: variant.skipped for variant in variants}
        shown = [
            {
                "name": name,
                "family": families[name],
                "skipped": reason,
                "prefix": "" if reason else rendered[name][0].span_text("prefix"),
            }
            for name, reason in reasons.items()
        ]
        models = {side: model.to_dict() for side, model in run.models.items()}
        more = {"models": models, "variants": shown, "batch_size": settings.batch_size, "versions": versions()}
        order = list(rendered)
        rows = sorted(run.rows.values(), key=lambda r: (order.index(r["variant"]), SIDES.index(r["side"]), r["index"]))
        return run.finish(StressResult(rows, dict(run.identity) | more))


def _same(asked: RenderedPrompt, other: RenderedPrompt) -> RenderedPrompt:
    """Another rendering of the same question, for the same sample of its answer."""
    return replace(other, question=asked.question, sample=asked.sample)


def _checked(chat: ChatFormat, prompts: Sequence[RenderedPrompt]) -> ChatFormat:
    for i, prompt in enumerate(prompts):
        if prompt.fingerprint != chat.fingerprint:
            raise LensError(
                f"prompt {i} was rendered with other settings than the chat format of the variants: pass chat=, "
                "and prompts of one turn without a system message of their own"
            )
    return chat


def _jobs(rendered: dict[str, list[RenderedPrompt]], families: dict[str, str], side: Side) -> list[Job]:
    return [
        Job(
            (name, side, index),
            prompt,
            {
                "family": families[name],
                "prefix_tokens": len(prompt.spans["prefix"]),
                "prompt": prompt.query,
            },
        )
        for name, own in rendered.items()
        for index, prompt in enumerate(own)
    ]
