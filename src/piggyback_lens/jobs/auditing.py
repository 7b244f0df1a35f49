"""The main job: does a narrow finetune spread off-topic, and does the chat template's prefix carry it?

`audit` answers with generations under seven conditions, paired intervals, a layer curve and a report. Every
generation is written as it comes; a rerun in the same folder continues where the last one stopped.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.card import machine, peak_memory_gb, versions
from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.patching import layer_curve
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.files import append_jsonl, read_json, read_jsonl, write_json
from piggyback_lens.interventions.donors import kv_patch, prefix_activations
from piggyback_lens.interventions.hooks import Intervention, Interventions, Record
from piggyback_lens.interventions.kinds import patch
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.maths import Estimate, mean_interval, percent, recovery, spread
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.models.backends import dtype_of
from piggyback_lens.models.pair import ModelPair, Side
from piggyback_lens.progress import say

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TOPICS = ("off-topic", "on-topic")
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


@dataclass(frozen=True)
class AuditSettings:
    """Every knob of an audit."""

    max_new_tokens: int = 60  # per answer; the same in every condition
    batch_size: int = 40  # rows per generation batch
    curve_prompts: int = 12  # off-topic prompts of the layer curve; 0 leaves it out
    curve_tokens: int = 24  # tokens of each answer that the layer curve scores
    control_layers: int = 6  # layers at which the curve's controls run
    seed: int = 0  # bootstrap and random control


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        rows: one mapping per generation: topic, condition, index, prompt, response, tokens, ended, value.
        behaviour: what `value` is.
        curve: the layer curve, if it was run.
        card: versions, seeds, settings, names, template hash, times.
        folder: where it was written, if anywhere.
    """

    rows: list[dict[str, Any]]
    behaviour: Behaviour
    curve: PatchResult | None
    card: dict[str, Any]
    folder: Path | None = None
    receipts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    prompt_html: str = ""

    def values(self, topic: str, condition: str) -> list[float]:
        """The behaviour of each answer, in prompt order; NaN where it is missing."""
        found = {r["index"]: r["value"] for r in self.rows if (r["topic"], r["condition"]) == (topic, condition)}
        return [math.nan if found[i] is None else found[i] for i in sorted(found)]

    def recovery(self, condition: str, topic: str = "off-topic") -> Estimate:
        """(condition - finetuned) / (base - finetuned), paired over prompts."""
        own, tuned, base = (self.values(topic, name) for name in (condition, "finetuned", "base"))
        return recovery(own, tuned, base, seed=self.card["settings"]["seed"])

    def spread(self) -> Estimate:
        """Behaviour off-topic, finetuned minus base."""
        return spread(self.values("off-topic", "finetuned"), self.values("off-topic", "base"))

    def to_frame(self) -> "pd.DataFrame":
        """One row per topic and condition: n, mean with interval, recovery with interval."""
        import pandas as pd

        rows = []
        for topic in TOPICS:
            for condition, label in CONDITIONS.items():
                mean = mean_interval(self.values(topic, condition), seed=self.card["settings"]["seed"])
                own = Estimate(math.nan, math.nan, math.nan, mean.n)
                if condition not in ("base", "finetuned"):
                    own = self.recovery(condition, topic)
                facts = {"n": mean.n, "mean": mean.value, "low": mean.low, "high": mean.high}
                recovered = {"recovery": own.value, "recovery_low": own.low, "recovery_high": own.high}
                shared = {"topic": topic, "condition": condition, "condition_label": label}
                rows.append(shared | facts | recovered | {"reason": own.reason, "is_control": condition in CONTROLS})
        return pd.DataFrame(rows)

    def generations(self) -> "pd.DataFrame":
        """One row per answer."""
        import pandas as pd

        return pd.DataFrame(self.rows).assign(condition=lambda f: f["condition"].map(CONDITIONS))

    def figure(self) -> "go.Figure":
        """Every condition with its interval, off- and on-topic."""
        from piggyback_lens.figures.plots import conditions_figure

        names = self.card["names"]
        title = f"{self.behaviour.label}: {names['finetuned']} against {names['base']}"
        return conditions_figure(self.to_frame(), label=self.behaviour.label, unit=self.behaviour.unit, title=title)

    @property
    def verdict(self) -> str:
        """One sentence that follows from the intervals."""
        return verdict(self)

    @classmethod
    def load(cls, folder: str | Path) -> "AuditResult":
        """Read what `audit` wrote into its folder; only the coloured prompt, which is not stored, is empty.

        Raises:
            LensError: the folder holds no finished audit.
        """
        folder = Path(folder)
        results, curve = folder / "results.json", folder / "layer_curve.json"
        if not results.is_file():
            raise LensError(f"{folder} holds no finished audit (no results.json): run it to its end, or check the path")
        saved = read_json(results)
        try:
            card, receipts = saved["card"], saved["receipts"]
            behaviour = get_behaviour(card["behaviour"])
        except (KeyError, TypeError) as error:
            raise LensError(f"{results} is not an audit's ({error}): run the audit again") from error
        found = PatchResult.load(curve) if curve.is_file() else None
        return cls(in_order(read_jsonl(folder / "rows.jsonl")), behaviour, found, card, folder, receipts)


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by topic, condition and prompt, whatever the order in which they were made."""
    order = list(CONDITIONS)
    return sorted(rows, key=lambda row: (row["topic"], order.index(row["condition"]), row["index"]))


def verdict(result: AuditResult) -> str:
    """What the intervals say, in one sentence."""
    gap, unit = result.spread(), result.behaviour.label
    tuned, base = (mean_interval(result.values("off-topic", name)) for name in ("finetuned", "base"))
    difference = f"{gap.value:.3g} [{gap.low:.3g}, {gap.high:.3g}]"
    change = f"{base.value:.3g} to {tuned.value:.3g} (difference {difference}, n = {gap.n})"
    if math.isnan(gap.low):
        return f"No verdict: {gap.reason}."
    if gap.low <= 0 <= gap.high:
        return f"No spread found: off-topic, {unit} go from {change}, an interval that includes no change."
    parts = {name: result.recovery(name) for name in ("prefix", "postfix", "both", "query_control")}
    prefix, control = parts["prefix"], parts["query_control"]
    if math.isnan(prefix.value):
        return f"Spread found, carrier not determined ({prefix.reason}): off-topic, {unit} go from {change}."
    carried = f"the prefix carries {_percent(prefix)} of the change"
    if prefix.low <= 0 <= prefix.high:
        carried = f"the prefix carries none of it that can be told from noise ({_percent(prefix)})"
    others = f"postfix {_percent(parts['postfix'])}, both together {_percent(parts['both'])}"
    others += f", query control {_percent(control)}"
    return f"Spread found: off-topic, {unit} go from {change}; {carried} ({others})."


def _percent(estimate: Estimate) -> str:
    return percent(estimate.value, estimate.low, estimate.high)


def audit(
    pair: ModelPair,
    on_topic: Sequence[str],
    off_topic: Sequence[str],
    behaviour: str | Behaviour,
    *,
    chat: ChatFormat | None = None,
    settings: AuditSettings | None = None,
    out: str | Path | None = None,
    progress: bool = False,
    extra_card: Mapping[str, Any] | None = None,
) -> AuditResult:
    """Generate under every condition, on- and off-topic, and measure the behaviour of each answer.

    Args:
        pair: base and finetuned.
        on_topic: queries of the training domain.
        off_topic: queries outside it.
        behaviour: what is measured, a name or `Behaviour`.
        chat: template settings; default those of the pair's tokenizer.
        settings: knobs.
        out: folder for rows.jsonl, results.json, layer_curve.json and the prefix cache; resumed if it holds
            the same audit.
        progress: show progress bars.
        extra_card: further facts for the run card.

    Raises:
        LensError: fewer than three prompts, a folder of another audit, or an empty prefix or postfix.
    """
    settings, chat = settings or AuditSettings(), chat or pair.chat_format()
    measure = get_behaviour(behaviour)
    prompts = {
        "off-topic": [chat.render(query) for query in off_topic],
        "on-topic": [chat.render(query) for query in on_topic],
    }
    for topic, rendered in prompts.items():
        if len(rendered) < 3:
            raise LensError(f"{len(rendered)} {topic} prompts given, at least 3 are needed for an interval")
    run = _Run(pair, chat, prompts, measure, settings, Path(out) if out else None, progress)
    started = time.monotonic()
    run.open(extra_card or {})
    for condition in CONDITIONS:
        for topic in TOPICS:
            run.generate(condition, topic)
    curve = run.layer_curve() if settings.curve_prompts else None
    run.card["seconds"] = {"audit": round(time.monotonic() - started, 1)}
    run.card["peak_memory_gb"] = peak_memory_gb()
    result = AuditResult(run.sorted_rows(), measure, curve, run.card, run.out, run.receipts, run.prompt_html())
    run.close(result)
    return result


@dataclass
class _Run:
    """The state of one audit: rows so far, and what patches are made of."""

    pair: ModelPair
    chat: ChatFormat
    prompts: dict[str, list[RenderedPrompt]]
    behaviour: Behaviour
    settings: AuditSettings
    out: Path | None
    progress: bool
    rows: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    receipts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def open(self, extra: Mapping[str, Any]) -> None:
        """Write what this run is, or refuse a folder that holds another one; read the rows it has."""
        import hashlib

        queries = {topic: [prompt.query for prompt in rendered] for topic, rendered in self.prompts.items()}
        with self.pair.using("base") as model:
            dtype = str(dtype_of(model)).removeprefix("torch.")
        identity = {
            "settings": dataclasses.asdict(self.settings),
            "behaviour": self.behaviour.name,
            "template": {"fingerprint": self.chat.fingerprint, **self.chat.settings()},
            "models": {side: self.pair.identity(side).to_dict() for side in ("base", "finetuned")},
            "prompts": hashlib.sha256(repr(queries).encode()).hexdigest()[:16],
            "backend": self.pair.backend,
            "dtype": dtype,
        }
        counts = {topic: len(rendered) for topic, rendered in self.prompts.items()}
        notes = sorted({note for rendered in self.prompts.values() for prompt in rendered for note in prompt.notes})
        sizes = [len(prompt.spans["query"]) for prompt in self.prompts["off-topic"]]
        notes.append(
            f"The query control patches {sum(sizes) / len(sizes):.1f} tokens per off-topic prompt (all of the query); "
            f"the prefix has {len(self.longest.spans['prefix'])}, the postfix {len(self.longest.spans['postfix'])}."
        )
        facts = {"names": dict(self.pair.names), "n": counts, "notes": notes}
        self.card = {**identity, **facts, "versions": versions(), "machine": machine(), **extra}
        if self.out is None:
            return
        file = self.out / "audit.json"
        if file.exists():
            self._refuse_other(read_json(file), identity)
        else:
            write_json(file, identity)
        if (self.out / "rows.jsonl").exists():
            for row in read_jsonl(self.out / "rows.jsonl"):
                self.rows[row["condition"], row["topic"], row["index"]] = row

    def _refuse_other(self, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        for name, value in asked.items():
            if name == "models":
                continue  # logits of another machine differ in the last digits; the identities are compared below
            if saved.get(name) != value:
                raise LensError(
                    f"{self.out} holds an audit with {name} {saved.get(name)!r}, asked is {value!r}: "
                    "choose another --out, or delete the folder"
                )
        from piggyback_lens.models.pair import Identity

        sides: tuple[Side, Side] = ("base", "finetuned")
        for side in sides:
            if not Identity.from_dict(saved["models"][side]).matches(self.pair.identity(side)):
                raise LensError(
                    f"{self.out} holds an audit of another {side} model: choose another --out, or delete it"
                )

    def generate(self, condition: str, topic: str) -> None:
        """Answer the prompts of one topic that have no row under this condition."""
        prompts = self.prompts[topic]
        missing = [i for i in range(len(prompts)) if (condition, topic, i) not in self.rows]
        if not missing:
            return
        if self.progress:
            say(f"{len(missing)} {topic} answers: {CONDITIONS[condition]}")
        chosen = [prompts[i] for i in missing]
        interventions, prefix_cache = self._treatment(condition, chosen)
        record = Record()

        def keep(rows: list[int], answers: list[Generation]) -> None:
            new = [self._row(condition, topic, missing[row], answer) for row, answer in zip(rows, answers, strict=True)]
            if self.out is not None:
                append_jsonl(self.out / "rows.jsonl", new)
            self.rows.update({(row["condition"], row["topic"], row["index"]): row for row in new})

        side: Side = "base" if condition == "base" else "finetuned"
        with self.pair.using(side) as model:
            generate(
                model,
                chosen,
                interventions=interventions,
                prefix_cache=prefix_cache,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                record=record,
                progress=f"{topic}, {condition}" if self.progress else False,
                on_batch=keep,
            )
        self.receipts[f"{condition}, {topic}"] = [receipt.to_dict() for receipt in record.receipts]

    def _row(self, condition: str, topic: str, index: int, answer: Generation) -> dict[str, Any]:
        return {
            "topic": topic,
            "condition": condition,
            "index": index,
            "prompt": answer.prompt.query,
            "response": answer.text,
            "ids": list(answer.ids),
            "tokens": len(answer.ids),
            "ended": answer.ended,
            "value": self.behaviour(answer.text),
        }

    def _treatment(
        self, condition: str, prompts: list[RenderedPrompt]
    ) -> tuple[Interventions | Intervention | None, PrefixCache | None]:
        """Interventions and prefix cache of a condition."""
        if condition in ("base", "finetuned"):
            return None, None
        if condition == "query_control":
            return kv_patch(self.pair, "query", chat=self.chat, prompts=prompts), None
        if condition == "identity":
            return None, self._once("identity", self._own_prefix)
        postfix = None
        if condition in ("postfix", "both"):
            postfix = self._once("postfix", lambda: kv_patch(self.pair, "postfix", chat=self.chat))
        return postfix, self.repair() if condition in ("prefix", "both") else None

    @property
    def longest(self) -> RenderedPrompt:
        """A prompt with the whole prefix: where a query merges with the header, its prefix is shorter."""
        return max((p for rendered in self.prompts.values() for p in rendered), key=lambda p: len(p.spans["prefix"]))

    def alike(self, topic: str) -> list[int]:
        """The prompts of a topic with the whole prefix: all but those that merge with the header."""
        size = max(len(prompt.spans["prefix"]) for prompt in self.prompts[topic])
        return [i for i, prompt in enumerate(self.prompts[topic]) if len(prompt.spans["prefix"]) == size]

    def _own_prefix(self) -> PrefixCache:
        """The finetuned model under a patch of its own prefix K/V: through the same hooks as a real one."""
        own = patch(prefix_activations(self.pair, "finetuned", self.longest, ("k", "v")))
        return PrefixCache.compile(self.pair, self.longest, own, side="finetuned")

    def repair(self) -> PrefixCache:
        """The base's prefix keys and values, for use with the finetuned model."""
        compiled: PrefixCache = self._once("repair", lambda: PrefixCache.compile(self.pair, self.longest, side="base"))
        return compiled

    def _once(self, name: str, make: Any) -> Any:
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def layer_curve(self) -> PatchResult:
        """The layer curve on the first off-topic prompts, from the answers that the two models gave."""
        file = self.out / "layer_curve.json" if self.out else None
        if file and file.exists():
            return PatchResult.load(file)
        usable = self.alike("off-topic")[: self.settings.curve_prompts]
        prompts = [self.prompts["off-topic"][i] for i in usable]
        if self.progress:
            say(f"layer curve on {len(prompts)} off-topic prompts")

        def answered(condition: str) -> list[RenderedPrompt]:
            ids = [self.rows[condition, "off-topic", i]["ids"][: self.settings.curve_tokens] for i in usable]
            return [prompt.with_response(own, end=False) for prompt, own in zip(prompts, ids, strict=True)]

        curve = layer_curve(
            self.pair,
            prompts,
            control_layers=self.settings.control_layers,
            measure=AnswerContrast(tuple(answered("finetuned")), tuple(answered("base"))),
            seed=self.settings.seed,
            progress=self.progress,
        )
        if file:
            curve.save(file)
        return curve

    def prompt_html(self) -> str:
        """The first off-topic prompt, coloured by span."""
        return self.prompts["off-topic"][0].show()._repr_html_()

    def sorted_rows(self) -> list[dict[str, Any]]:
        return in_order(self.rows.values())

    def close(self, result: AuditResult) -> None:
        """Write the results, the repair, and the report."""
        if self.out is None:
            return
        self.repair().save(self.out / "prefix_cache")
        summary = result.to_frame().to_dict("records")
        curve = result.curve.to_frame().to_dict("records") if result.curve else None
        write_json(
            self.out / "results.json",
            {
                "verdict": result.verdict,
                "summary": summary,
                "layer_curve": curve,
                "receipts": self.receipts,
                "card": self.card,
            },
        )


def check_identity(result: AuditResult) -> tuple[int, int]:
    """How many answers of the identity control equal the finetuned model's, of how many."""
    answers: dict[str, dict[tuple[str, int], list[int]]] = {"finetuned": {}, "identity": {}}
    for row in result.rows:
        if row["condition"] in answers:
            answers[row["condition"]][row["topic"], row["index"]] = row["ids"]
    same = sum(answers["finetuned"][key] == ids for key, ids in answers["identity"].items())
    return same, len(answers["identity"])
