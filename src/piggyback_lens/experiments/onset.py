"""Onset: at which checkpoint of a run does a finetune begin to spread, and what does the prefix carry there?

    onset("Qwen/Qwen2.5-7B-Instruct", "my-run", prompts)                                  # my-run/checkpoint-120, ...
    onset(base, ["owner/name:checkpoint-10", "owner/name:checkpoint-20"], prompts)         # folders of a hub repository

A `Monitor` measures while a model trains. This measures what was saved, and only as much of it as the question needs:
by default a bisection, which takes for granted that what spreads at one checkpoint spreads at all later ones.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import as_prompts, ids_hash, questions_of
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import measure_facts, own_contrast
from piggyback_lens.experiments.patching import patch_span
from piggyback_lens.intervals import Estimate, interval_text, is_rate, percent, recovery, spread
from piggyback_lens.measuring.answers import Measure
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.models.places import is_adapter_folder
from piggyback_lens.models.sources import load_causal_lm, source_name, weights_fingerprint
from piggyback_lens.progress import counting, shows
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Number, Result
from piggyback_lens.results.run import Run
from piggyback_lens.settings import LoadSettings, OnsetSettings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SEARCHES = {
    "bisect": "it was found by bisection, which takes for granted that what spreads once goes on spreading",
    "first": "checkpoints were measured in order up to the first that spreads; later ones were not",
    "all": "every checkpoint was measured",
}

UNSEEN = "what spreads once is taken to go on spreading, so the earlier ones were not looked at (search='all' does)"


@dataclass(frozen=True, repr=False)
class OnsetResult(Result):
    """The spread at the checkpoints that were measured.

    Attributes:
        steps: of the checkpoints that were measured, ascending.
        finetuned: the measure per (checkpoint, prompt).
        patched: the same with the base's keys and values of the prefix.
        base: the measure of the base per prompt.
        available: the steps of all checkpoints.
        measure: name and unit.
        settings: bound, search, names, n, versions.
    """

    name: ClassVar = "onset.1"
    steps: tuple[int, ...]
    finetuned: list[list[Number]]
    patched: list[list[Number]]
    base: list[Number]
    available: tuple[int, ...]
    measure: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def spread(self, step: int) -> Estimate:
        """The measure at a checkpoint minus the base's, paired over prompts."""
        return _spread(self.finetuned[self.steps.index(step)], self.base, self.settings, self.measure)

    def recovery(self, step: int) -> Estimate:
        """The part of a checkpoint's spread that goes away with the base's keys and values of the prefix."""
        at = self.steps.index(step)
        columns = (self.patched[at], self.finetuned[at], self.base)
        return recovery(*columns, self.settings.get("questions"), rate=is_rate(self.measure["unit"], *columns))

    @property
    def sign(self) -> int:
        """The direction of the largest spread that lies beyond the bound, else of the last: 1 up, -1 down."""
        found = [self.spread(step) for step in self.steps]
        beyond = [own for own in found if any(_exceeds(own, sign, self.settings["bound"]) for sign in (1, -1))]
        return -1 if max(beyond, key=lambda own: abs(own.value), default=found[-1]).value < 0 else 1

    def exceeds(self, step: int) -> bool:
        """Whether the whole interval of the spread lies beyond the bound, in the direction of `sign`."""
        return _exceeds(self.spread(step), self.sign, self.settings["bound"])

    @property
    def onset(self) -> int | None:
        """The first step, of those measured, at which the spread exceeds the bound."""
        return next((step for step in self.steps if self.exceeds(step)), None)

    def to_frame(self) -> "pd.DataFrame":
        """One row per measured checkpoint: step, value (spread), low, high, n, reason, recovery with its interval,
        exceeds.
        """
        import pandas as pd

        rows = []
        for step in self.steps:
            own, part = self.spread(step), self.recovery(step)
            row: dict[str, Any] = {"step": step, "value": own.value, "low": own.low, "high": own.high, "n": own.n}
            row |= {"reason": own.reason or part.reason, "recovery": part.value}
            row |= {"recovery_low": part.low, "recovery_high": part.high, "exceeds": self.exceeds(step)}
            rows.append(row)
        return pd.DataFrame(rows)

    def figure(self) -> "go.Figure":
        """Spread with the bound, and prefix recovery, over the steps; a tick for every checkpoint there is."""
        from piggyback_lens.figures.monitor_plot import onset_figure

        title = f"where {self.settings['names']['finetuned']} begins to spread"
        about = {"unit": self.measure["unit"], "bound": self.sign * self.settings["bound"], "available": self.available}
        figure: go.Figure = onset_figure(self.to_frame(), title=title, **about)
        return figure

    def report(self) -> Report:
        """The verdict, the table and the figure."""
        title = f"Piggyback onset: {self.settings['names']['finetuned']}"
        figures = [(f"Spread and prefix recovery by checkpoint; {SEARCHES[self.settings['search']]}.", self.figure())]
        return Report(title, self.verdict, self.to_frame(), figures, card=self.settings)

    @property
    def verdict(self) -> str:
        """Between which steps the spread begins, how large it is there, and what was taken for granted."""
        unit, bound, step = self.measure["unit"], self.settings["bound"], self.onset
        seen = f"{len(self.steps)} of {len(self.available)} checkpoints measured"
        if step is None:
            last = self.spread(self.steps[-1])
            found = interval_text(last.value, last.low, last.high)
            return (
                f"No spread beyond {bound:g} {unit} up to step {self.steps[-1]}: {found} there (n = {last.n}). {seen}; "
                f"{SEARCHES[self.settings['search']] if len(self.steps) > 1 else UNSEEN}."
            )
        own, part, at = self.spread(step), self.recovery(step), self.available.index(step)
        place = f"at or before step {step}" if at == 0 else f"after step {self.available[at - 1]}, by step {step}"
        back = [s for s in self.steps if s > step and not self.exceeds(s)]
        undone = f"; not beyond it any more at step {', '.join(map(str, back))}" if back else ""
        carried = f"the prefix carries {percent(part.value, part.low, part.high)} of it"
        return (
            f"The spread begins {place}: {interval_text(own.value, own.low, own.high)} {unit} there, beyond {bound:g} "
            f"(n = {own.n}); {carried}{undone}. {seen}; {SEARCHES[self.settings['search']]}."
        )

    def _sizes(self) -> str:
        return f"{len(self.steps)} of {len(self.available)} checkpoints, {len(self.base)} prompts"

    def check(self) -> None:
        """Refuse columns that do not belong together."""
        sizes = {len(row) for row in (*self.finetuned, *self.patched, self.base)}
        counts = {len(self.steps), len(self.finetuned), len(self.patched)}
        if not self.steps or len(counts) != 1 or len(sizes) != 1 or not set(self.steps) <= set(self.available):
            raise ValueError(f"{sorted(counts)} checkpoints with rows of {sorted(sizes)} values")
        _ = self.settings["bound"], SEARCHES[self.settings["search"]], self.measure["unit"]


def checkpoints_of(source: str | Path | Sequence[str | Path]) -> dict[int, str]:
    """Step to place of every checkpoint: the folders checkpoint-<step> in a folder, or places whose names say the step.

    Raises:
        LensError: fewer than two, one without a step, two of one step, or one that holds no model.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        if not folder.is_dir():
            raise LensError(
                f"{source} is no folder of checkpoints: give one, or a list such as ['owner/name:checkpoint-10', ...]"
            )
        places = [
            str(path) for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
        ]
    else:
        places = [str(place) for place in source]
    found: dict[int, str] = {}
    for place in places:
        named = re.search(r"(\d+)/?$", place)
        if named is None:
            raise LensError(f"{place} does not end with its step: call it checkpoint-120")
        if int(named[1]) in found:
            raise LensError(f"{found[int(named[1])]} and {place} are both of step {int(named[1])}: give one of them")
        if Path(place).is_dir() and not any(
            (Path(place) / f).is_file() for f in ("adapter_config.json", "config.json")
        ):
            raise LensError(
                f"{place} holds no adapter and no model (a training state of train()?): save the adapter itself at "
                "every step that counts, by on_step"
            )
        found[int(named[1])] = place
    if len(found) < 2:
        raise LensError(f"{source} has {len(found)} checkpoints (checkpoint-<step>), expected at least two")
    return dict(sorted(found.items()))


@shows("onset")
def onset(
    base: Any,
    checkpoints: str | Path | Sequence[str | Path],
    prompts: Sequence[RenderedPrompt],
    settings: OnsetSettings = OnsetSettings(),
    *,
    measure: Measure | None = None,
    load: LoadSettings = LoadSettings(),
    out: str | Path | None = None,
    progress: bool | str = True,
) -> OnsetResult:
    """Find the first checkpoint of a run whose spread exceeds a bound with its whole interval.

    Args:
        base: what the run began from: as of `ModelPair.load`, but no hooked model.
        checkpoints: a folder with checkpoint-<step> folders (PEFT adapters, or whole models), or a list of places whose
            names end with the step: folders, or adapters on the hub ("owner/name@main:checkpoint-120").
        prompts: off-topic, all with the same prefix, without responses.
        settings: the bound, and which checkpoints are measured.
        measure: teacher-forced or generated; default the contrast of the last checkpoint's own answers and the base's,
            teacher-forced at every checkpoint, in nats per token.
        load: how weights are loaded.
        out: folder of the run, which gets each checkpoint as it is measured; the same call goes on, and so does one
            with another bound or search.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: checkpoints that cannot be told apart or loaded, prompts of different prefixes, or a folder that
            holds another run.
    """
    places, prompts = checkpoints_of(checkpoints), as_prompts(prompts)
    available, tokenizer = tuple(places), prompts[0].tokenizer
    model = load_causal_lm(base, load) if isinstance(base, str | Path) else base
    name = source_name(base) if isinstance(base, str | Path) else getattr(base, "name_or_path", "") or "base"

    def pair_at(step: int) -> ModelPair:
        place = places[step]
        whole = Path(place).is_dir() and not is_adapter_folder(place)
        given: dict[str, Any] = {"finetuned" if whole else "adapter": place, "names": (name, f"step {step}")}
        return ModelPair.load(model, tokenizer=tokenizer, progress=False, **given, **vars(load))

    last = pair_at(available[-1])
    # Neither bound nor search, so that another search goes on with what is there.
    facts: dict[str, Any] = {"steps": list(available), "prompts": ids_hash(prompts)}
    facts |= {"measure": measure_facts(measure, tokens=settings.answer_tokens), "questions": questions_of(prompts)}
    with Run.open(out, "onset", facts, models=last.identities(), keys=("step",), prompt=prompts[0]) as run:
        _refuse_replaced(run, places)
        asked = measure or own_contrast(run, last, prompts, tokens=settings.answer_tokens)
        about = {"name": asked.name, "unit": asked.unit}

        def measured(step: int) -> Estimate:
            if (step,) not in run.rows:
                with counting(None, f"step {step}"):
                    pair = last if step == available[-1] else pair_at(step)
                    found = patch_span(pair, prompts, "prefix", controls=False, measure=asked, progress=False)
                cell = next(i for i, labels in enumerate(found.cells) if labels["series"] == "patched")
                row = {"finetuned": found.finetuned, "patched": found.values[cell], "base": found.base}
                run.add([{"step": step, **row, **_weights_of(places[step])}])
            known = run.rows[step,]
            return _spread(known["finetuned"], known["base"], facts, about)

        steps = sorted(set(_searched(available, measured, settings)))
        rows = [run.rows[step,] for step in steps]
        finetuned, patched = ([row[name] for row in rows] for name in ("finetuned", "patched"))
        named = {
            "names": {"base": name, "finetuned": _run_name(checkpoints)},
            "n": len(prompts),
            "versions": versions(),
        }
        facts |= asdict(settings) | named
        return run.finish(OnsetResult(tuple(steps), finetuned, patched, rows[-1]["base"], available, about, facts))


def _searched(available: Sequence[int], measured: Callable[[int], Estimate], settings: OnsetSettings) -> Iterator[int]:
    """The steps that a search measures, the last one first. A bisection looks for spread in its direction."""
    yield available[-1]
    last = measured(available[-1])
    sign = -1 if last.value < 0 else 1
    fell_back = settings.search == "first" and not _exceeds(last, sign, settings.bound)
    signs = (1, -1) if fell_back else (sign,)

    def beyond(step: int) -> bool:
        return any(_exceeds(measured(step), sign, settings.bound) for sign in signs)

    if settings.search != "bisect":
        for step in available:
            yield step
            if beyond(step) and settings.search == "first":
                return
        return
    if not beyond(available[-1]):
        return
    yield available[0]
    low, high = 0, len(available) - 1
    while not beyond(available[low]) and high - low > 1:
        middle = (low + high) // 2
        yield available[middle]
        low, high = (low, middle) if beyond(available[middle]) else (middle, high)


def _weights_of(place: str) -> dict[str, str]:
    """What tells a checkpoint on this machine from another that is put in its place."""
    return {"weights": weights_fingerprint(place)} if Path(place).is_dir() else {}


def _refuse_replaced(run: Run, places: Mapping[int, str]) -> None:
    for (step,), row in run.rows.items():
        if "weights" in row and row["weights"] != _weights_of(places[step]).get("weights"):
            raise LensError(
                f"{places[step]} has other weights than when it was measured in {run.folder}: choose another folder"
            )


def _exceeds(found: Estimate, sign: int, bound: float) -> bool:
    nearer = found.low if sign > 0 else -found.high
    return math.isfinite(nearer) and nearer > bound


def _spread(
    finetuned: Sequence[float], base: Sequence[float], settings: Mapping[str, Any], measure: Mapping[str, str]
) -> Estimate:
    rate = is_rate(measure["unit"], finetuned, base)
    return spread(finetuned, base, settings.get("questions"), rate=rate)


def _run_name(checkpoints: str | Path | Sequence[str | Path]) -> str:
    """What the run is called: its folder, or what the places of its checkpoints begin with."""
    if isinstance(checkpoints, str | Path):
        return Path(checkpoints).resolve().name
    return re.sub(r"[:/]?(checkpoint-)?\d+/?$", "", str(checkpoints[-1])) or "the run"
