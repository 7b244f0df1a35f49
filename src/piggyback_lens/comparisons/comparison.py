"""What a comparison of finetuning methods found: cells, a table with intervals, figures, one file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from piggyback_lens.comparisons.comparison_plan import system_name
from piggyback_lens.comparisons.methods import Method, plain_finetuning
from piggyback_lens.errors import LensError
from piggyback_lens.intervals import (
    Estimate,
    interval_text,
    is_rate,
    mean_interval,
    recovery,
    second_difference,
    spread,
)
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.reading.dresses import CONTROL
from piggyback_lens.results.report import Report
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import RESULT

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Array = npt.NDArray[np.float64]
AXES = ("system", "share", "size", "epochs")
TOPICS = {"on": "on-topic", "off": "off-topic"}
COHERENCE = ("base_nll", "repetition", "length")
SHOWN = 4
"""Prompts of each topic whose answers the report shows."""


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Finished cells of a grid, and the base beside them.

    Attributes:
        cells: one mapping per cell: cell (method, seed, axes), label, on, off and off[NAME] of every dress (values,
            answers), kl (nats per token of each off-topic prompt), text_nll (of each text), drift and update_norms
            (per layer), training, and `cosines`: per layer to plain finetuning with the same seed (`sft`) and with
            another (`sft_seeds`).
        bases: the base's answers, values and losses, by system prompt.
        card: task, behaviour, settings, what was asked, versions.
    """

    name: ClassVar = "comparison.1"
    cells: tuple[dict[str, Any], ...]
    bases: Mapping[str, Mapping[str, Any]]
    card: Mapping[str, Any]

    @property
    def behaviour(self) -> Behaviour:
        """What was measured on each answer."""
        return get_behaviour(self.card["behaviour"])

    @property
    def dressed(self) -> tuple[str, ...]:
        """Topics of dressed questions: "off[NAME]" for each dress and its control."""
        return tuple(self.card["settings"].get("dresses", ()))

    def to_frame(self) -> "pd.DataFrame":
        """One row per cell: method, lambda, seed, axes, means on- and off-topic, KL, perplexity, drift, norms."""
        import pandas as pd

        rows = []
        for cell in self.cells:
            base, method = self._base(cell["cell"]["system"]), _method(cell)
            worse = _column(cell["text_nll"]) - _column(base["text_nll"])
            row: dict[str, Any] = {"method": cell["label"], "family": method.family, "lambda": method.weight}
            row |= {"seed": cell["cell"]["seed"], **{axis: cell["cell"][axis] for axis in AXES}}
            for topic in (*TOPICS, *self.dressed):
                row[topic] = float(np.nanmean(_column(cell[topic]["values"])))
                row[f"base_{topic}"] = float(np.nanmean(_column(base[topic]["values"])))
            row |= {"kl": float(np.mean(cell["kl"])), "perplexity_change": math.expm1(float(worse.mean()))}
            row["kept"] = self._kept_of(cell)
            for of, prefix in ((cell["off"], ""), (base["off"], "base_")):
                row |= {f"{prefix}{name}": _mean(values) for name, values in _coherence(of).items()}
            row |= {"drift": float(np.mean(cell["drift"])), "update_norm": float(np.linalg.norm(cell["update_norms"]))}
            row |= {"steps": cell["training"]["steps"], "loss": cell["training"]["last"]["loss"]}
            rows.append(row | {"n": len(cell["on"]["values"]), "seconds": cell["seconds"]["all"]})
        return pd.DataFrame(rows)

    def _kept_of(self, cell: Mapping[str, Any]) -> float:
        """On-topic behaviour kept by one cell: (method - base) / (sft - base) with the same seed; NaN without that."""
        own = [other for other in self.cells if {**other["cell"], "method": None} == {**cell["cell"], "method": None}]
        plain = plain_finetuning(_method(cell), map(_method, own))
        base = _mean(_column(self._base(cell["cell"]["system"])["on"]["values"]))
        sft = [_mean(_column(other["on"]["values"])) - base for other in own if _method(other) == plain]
        return (_mean(_column(cell["on"]["values"])) - base) / sft[0] if sft and sft[0] else math.nan

    @cached_property
    def _groups(self) -> "dict[tuple[Any, ...], list[dict[str, Any]]]":
        """Cells that differ by the seed alone, in seed order; keys (label, *axes)."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for cell in sorted(self.cells, key=lambda c: int(c["cell"]["seed"])):
            key = (cell["label"], *(cell["cell"][axis] for axis in AXES))
            groups.setdefault(key, []).append(cell)
        return groups

    def _base(self, system: str | None) -> Mapping[str, Any]:
        return self.bases[system_name(system)]

    def _rate(self, *values: Array) -> bool:
        """Whether these are answers that show the behaviour or not; means over several seeds are numbers."""
        return is_rate(self.behaviour.unit, *values)

    def values(self, key: tuple[Any, ...], topic: str) -> Array:
        """Behaviour of each prompt of a topic (on, off, or off[NAME] in a dress), averaged over the seeds.

        Missing where any seed's is.
        """
        rows = [_column(cell[topic]["values"]) for cell in self._groups[key]]
        averaged: Array = np.stack(rows).mean(0)
        return averaged

    def _sft(self, key: tuple[Any, ...], topic: str) -> Array | None:
        """Plain finetuning at the same axes over the same seeds."""
        methods = {k[0]: _method(cells[0]) for k, cells in self._groups.items() if k[1:] == key[1:]}
        plain = plain_finetuning(methods[key[0]], methods.values())
        if plain is None:
            return None
        same = (plain.label, *key[1:])
        seeds = [{cell["cell"]["seed"] for cell in self._groups[k]} for k in (key, same)]
        if not seeds[0] <= seeds[1]:
            return None
        found = [cell for cell in self._groups[same] if cell["cell"]["seed"] in seeds[0]]
        averaged: Array = np.stack([_column(cell[topic]["values"]) for cell in found]).mean(0)
        return averaged

    def estimates(self, key: tuple[Any, ...]) -> dict[str, Estimate]:
        """Everything of one row of the table; intervals: over prompts (texts), seeds averaged first.

        on, off: behaviour; spread: off-topic minus base; spread[NAME]: the same of questions in a dress, minus the base
        in it; kept: (method - base) / (sft - base) on-topic; recovered: (method - sft) / (base - sft) off-topic, with
        the seeds that sft has; kl; perplexity_change (fraction). Of the off-topic answers: base_nll, nats per token
        under the base (short answers have fewer tokens to be likely in); repetition, the share of runs of three words
        that come again; length in tokens.
        """
        base = self._base(key[1])
        of_base = {topic: _column(base[topic]["values"]) for topic in TOPICS}
        own = {topic: self.values(key, topic) for topic in TOPICS}
        asked = {topic: base[topic].get("questions") for topic in TOPICS}
        found = {topic: mean_interval(own[topic], asked[topic], rate=self._rate(own[topic])) for topic in TOPICS}
        for topic in ("off", *self.dressed):
            pair = (self.values(key, topic), _column(base[topic]["values"]))
            found[_spread_of(topic)] = spread(*pair, asked["off"], rate=self._rate(*pair))
        sft = {topic: self._sft(key, topic) for topic in TOPICS}
        if sft["on"] is None or sft["off"] is None:
            nothing = Estimate(math.nan, math.nan, math.nan, len(of_base["on"]), "no plain finetuning with these seeds")
            found |= {"kept": nothing, "recovered": nothing}
        else:
            found["kept"] = recovery(
                own["on"], of_base["on"], sft["on"], asked["on"], rate=self._rate(own["on"], of_base["on"], sft["on"])
            )
            found["recovered"] = recovery(
                own["off"],
                sft["off"],
                of_base["off"],
                asked["off"],
                rate=self._rate(own["off"], sft["off"], of_base["off"]),
            )
        cells = self._groups[key]
        found["kl"] = mean_interval(np.stack([_column(cell["kl"]) for cell in cells]).mean(0), asked["off"], rate=False)
        worse = np.stack([_column(cell["text_nll"]) - _column(base["text_nll"]) for cell in cells]).mean(0)
        loss = mean_interval(worse)
        value, low, high = (math.expm1(number) for number in (loss.value, loss.low, loss.high))
        found["perplexity_change"] = replace(loss, value=value, low=low, high=high)
        of_seeds = [_coherence(cell["off"]) for cell in cells]
        for name in COHERENCE:
            found[name] = mean_interval(np.stack([own[name] for own in of_seeds]).mean(0), asked["off"], rate=False)
        return found

    @property
    def keys(self) -> tuple[tuple[Any, ...], ...]:
        """Rows of the table: (method, system, share, size, epochs)."""
        return tuple(self._groups)

    def seeds(self, key: tuple[Any, ...]) -> tuple[int, ...]:
        """Seeds of a row."""
        return tuple(int(cell["cell"]["seed"]) for cell in self._groups[key])

    def per_seed(self, key: tuple[Any, ...], topic: str) -> list[float]:
        """Mean behaviour of every seed of a row."""
        return [float(np.nanmean(_column(cell[topic]["values"]))) for cell in self._groups[key]]

    def table(self) -> "pd.DataFrame":
        """One row per method, lambda and axes: means over seeds with their interval.

        Columns method, family, lambda, the axes, seeds, n, and for every quantity of `estimates` its value, _low
        and _high (and _reason where it is undefined); on_seeds and off_seeds list the means of the seeds.
        """
        import pandas as pd

        rows = []
        for key, cells in self._groups.items():
            method = _method(cells[0])
            row: dict[str, Any] = {"method": key[0], "family": method.family, "lambda": method.weight}
            row |= dict(zip(AXES, key[1:], strict=True))
            row |= {"seeds": list(self.seeds(key)), "n": len(cells[0]["on"]["values"])}
            for name, estimate in self.estimates(key).items():
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
                row[f"{name}_reason"] = estimate.reason
            row |= {f"{topic}_seeds": self.per_seed(key, topic) for topic in (*TOPICS, *self.dressed)}
            row["drift"] = float(np.mean([np.mean(cell["drift"]) for cell in cells]))
            rows.append(row)
        return pd.DataFrame(rows)

    def base_means(self, system: str | None = "default") -> dict[str, Estimate]:
        """The base's behaviour on- and off-topic."""
        base = self._base(system)
        own = {topic: _column(base[topic]["values"]) for topic in TOPICS}
        return {t: mean_interval(own[t], base[t].get("questions"), rate=self._rate(own[t])) for t in TOPICS}

    @property
    def varied(self) -> tuple[str, ...]:
        """Axes with more than one value."""
        return tuple(axis for axis in AXES if len({str(cell["cell"][axis]) for cell in self.cells}) > 1)

    @property
    def verdict(self) -> str:
        """One sentence from the intervals: whose off-topic answers are nearest to the base's, and at what price."""
        table = self.table()
        base = next(iter(self.bases))
        known = table[(table["family"] != "sft") & table["recovered"].notna() & table["kept"].notna()]
        if known.empty:
            told = {reason for name in ("recovered_reason", "kept_reason") for reason in table[name]}
            reasons = sorted(reason for reason in told if isinstance(reason, str))
            why = "; ".join(reasons) or "only sft ran"
            return f"No method can be compared with plain finetuning here: {why}.{self._told_of_dresses()}"
        row = known.iloc[int(known["spread"].abs().to_numpy().argmin())]  # going past the base is leaving it
        gained = f"{100 * row['recovered']:.0f} % [{100 * row['recovered_low']:.0f}, {100 * row['recovered_high']:.0f}]"
        kept = f"{100 * row['kept']:.0f} % [{100 * row['kept_low']:.0f}, {100 * row['kept_high']:.0f}]"
        said = "recovers" if row["recovered_low"] > 0 else "recovers nothing that can be told from noise, at most"
        where = "" if base == "default" and len(self.bases) == 1 else f" (system {row['system']})"
        return (
            f"{row['method']}{where} {said} {gained} of the off-topic behaviour that plain finetuning lost, and keeps "
            f"{kept} of the on-topic behaviour (n = {row['n']} prompts each, {len(row['seeds'])} seeds)."
            f"{self._told_of_dresses()}"
        )

    def _told_of_dresses(self) -> str:
        """Which methods spread in a dress beyond plain questions and beyond its control, paired over questions."""
        said = []
        controls = {f"off[{CONTROL.format(topic[4:-1])}]" for topic in self.dressed}
        for topic in self.dressed:
            if topic in controls:
                continue
            control = f"off[{CONTROL.format(topic[4:-1])}]"
            others = ("off", control) if control in self.dressed else ("off",)
            more = {key: [self.beyond(key, topic, other) for other in others] for key in self.keys}
            shown = [
                f"{key[0]} {interval_text(own[0].value, own[0].low, own[0].high)}"
                for key, own in more.items()
                if min(x.low for x in own) > 0 or max(x.high for x in own) < 0
            ]
            without = "" if control in self.dressed else " (no control)"
            said.append(f"{topic[4:-1]}{without}: {', '.join(shown) or 'none'}")
        return f" Spread in a dress beyond plain questions and its control: {'; '.join(said)}." if said else ""

    def beyond(self, key: tuple[Any, ...], topic: str, other: str = "off") -> Estimate:
        """Spread of a row on one off-topic topic minus that on another, paired over questions.

        Args:
            key: of the row, of `keys`.
            topic: "off[NAME]".
            other: "off" for plain questions, or another "off[NAME]".
        """
        base = self._base(key[1])
        one, two = ((self.values(key, own), _column(base[own]["values"])) for own in (topic, other))
        return second_difference(one, two, base["off"].get("questions"), rate=self._rate(*one, *two))

    def figure(self) -> "go.Figure":
        """What is kept on-topic against what spreads."""
        return self.pareto_figure()

    def pareto_figure(self) -> "go.Figure":
        """On-topic behaviour kept against off-topic spread, one marker per row of the table.

        Raises:
            LensError: no row has a defined share of on-topic behaviour, e.g. as plain finetuning was not run.
        """
        from piggyback_lens.figures.comparison_plots import pareto_figure

        amounts = {key[0]: _method(cells[0]).amounts for key, cells in self._groups.items()}
        return pareto_figure(self.table(), self.behaviour, str(self.card["task"]), amounts)

    def dress_figure(self) -> "go.Figure":
        """Spread of every method on plain questions and in every dress.

        Raises:
            LensError: no dress was asked for.
        """
        from piggyback_lens.figures.comparison_plots import dress_figure

        names = {_spread_of(topic): topic.removeprefix("off")[1:-1] for topic in self.dressed}
        return dress_figure(self.table(), names, self.behaviour, str(self.card["task"]))

    def pairs_figure(self) -> "go.Figure":
        """Off-topic spread against every other axis, each seed a dot: kept, dressed, coherence, plain text."""
        from piggyback_lens.figures.comparison_pairs import pairs_figure

        worn = [topic for topic in self.dressed if not topic.endswith(CONTROL.format("") + "]")]
        return pairs_figure(self.to_frame(), worn, self.behaviour, str(self.card["task"]))

    def update_figure(self) -> "go.Figure":
        """Cosine of every method's weight update with plain finetuning's, layer by layer."""
        from piggyback_lens.figures.comparison_plots import update_figure

        return update_figure(self.update_frame(), str(self.card["task"]))

    def axis_figure(self, axis: str) -> "go.Figure":
        """On- and off-topic behaviour over an axis: share, size, epochs or system."""
        from piggyback_lens.figures.comparison_plots import axis_figure

        if axis not in self.varied:
            raise LensError(f"{axis!r} was not varied here: choose among {', '.join(self.varied) or 'nothing'}")
        bases = {system: self.base_means(system) for system in {key[1] for key in self.keys}}
        return axis_figure(self.table(), axis, self.behaviour, bases, self._instead(axis))

    def _instead(self, axis: str) -> list[float] | None:
        """What None stands for on an axis of numbers, for each row of the table."""
        if axis not in ("size", "epochs"):
            return None
        unlimited = [cell for cell in self.cells if cell["cell"]["size"] is None]
        all_of_it = min((int(cell["training"]["rows"]) for cell in unlimited), default=0)  # interleaving adds rows
        if axis == "size":
            return [float(all_of_it)] * len(self.keys)
        batch, found = int(self.card["settings"]["training"]["batch_size"]), []
        for key, cells in self._groups.items():
            size, training = key[1 + AXES.index("size")], cells[0]["training"]
            rows = min(batch, all_of_it if size is None else size)
            found.append(float(training["steps"] / math.ceil(training["rows"] / rows)))  # as `train_settings` counts
        return found

    def figures(self) -> list[tuple[str, "go.Figure"]]:
        """(caption, figure) of everything that can be drawn; `notes` says what cannot."""
        drawn = []
        if self._has_kept:
            drawn.append(("On-topic behaviour kept against off-topic spread.", self.pareto_figure()))
            drawn.append(("Off-topic spread against what it costs, every seed.", self.pairs_figure()))
        if self.dressed:
            drawn.append(("Spread on plain questions, and in every dress.", self.dress_figure()))
        if not self.update_frame().empty:
            drawn.append(("Weight updates compared with plain finetuning.", self.update_figure()))
        return drawn + [(f"Behaviour over {axis}.", self.axis_figure(axis)) for axis in self.varied]

    def report(self) -> Report:
        """The table, every figure that can be drawn, and answers of the first seed side by side."""
        import pandas as pd

        table = self.table()
        shown = table[["method", *self.varied, "seeds", "n"]].copy()
        shown["seeds"] = [", ".join(map(str, seeds)) for seeds in table["seeds"]]
        worn = [_spread_of(topic) for topic in self.dressed]
        for name in ("on", "off", "kept", "recovered", *worn, "kl", "perplexity_change"):
            rows = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
            shown[name] = [interval_text(*row) for row in rows]
        for topic in TOPICS:
            shown[f"{topic}, seeds"] = [", ".join(f"{value:.3g}" for value in row) for row in table[f"{topic}_seeds"]]
        first = [cell for cell in self.cells if cell["cell"]["seed"] == self.cells[0]["cell"]["seed"]]
        examples = [
            {"topic": TOPICS[topic], "prompt": prompt, "condition": name, "response": answer}
            for topic in ("off", "on")
            for name, own in [*(("base", base) for base in self.bases.values()), *((c["label"], c) for c in first)]
            for prompt, answer in list(zip(own[topic]["prompts"], own[topic]["answers"], strict=True))[:SHOWN]
        ]
        asked, finished = self.card["asked"], self.card["finished"]
        left = [f"{asked - finished} of {asked} cells are not finished: the same command continues"]
        return Report(
            f"Finetuning methods on {self.card['task']}",
            self.verdict,
            shown,
            self.figures(),
            pd.DataFrame(examples),
            [*(left if finished < asked else []), *self.notes],
            f"{self.behaviour.label} ({self.behaviour.unit})",
            self.card,
        )

    @property
    def _has_kept(self) -> bool:
        """Whether there is a row for the figure of what was kept."""
        return any(_method(cells[0]).is_sft for cells in self._groups.values()) or any(
            math.isfinite(self.estimates(key)["kept"].value) for key in self.keys
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Which figures are left out, and why."""
        needs = "it needs plain finetuning (sft) with the same seeds and axes"
        found = [] if self._has_kept else [f"no figure of what is kept on-topic: {needs}"]
        return (*found, *([f"no figure of weight updates: {needs}"] if self.update_frame().empty else []))

    def update_frame(self) -> "pd.DataFrame":
        """Rows method, layer, value (mean cosine over seeds and axes), low, high (over seeds), n (cells)."""
        import pandas as pd

        collected: dict[tuple[str, int], list[float]] = {}
        for cell in self.cells:
            for name, values in (("", cell["cosines"]["sft"]), (" of another seed", cell["cosines"]["sft_seeds"])):
                if _method(cell).is_sft == bool(name):  # sft against itself is 1; its seeds are the yardstick
                    for layer, value in enumerate(values):
                        collected.setdefault((cell["label"] + name, layer), []).append(_number(value))
        rows = []
        for (label, layer), values in collected.items():
            if known := [value for value in values if math.isfinite(value)]:
                ends = {"low": min(known), "high": max(known), "n": len(known)}
                rows.append({"method": label, "layer": layer, "value": float(np.mean(known)), **ends})
        return pd.DataFrame(rows, columns=["method", "layer", "value", "low", "high", "n"])

    def save(self, path: str | Path) -> Path:
        """Write as one JSON file; a folder gets result.json."""
        path = Path(path)
        return super().save(path / RESULT if path.is_dir() else path)

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read what `save` wrote: the file, or the folder with its result.json.

        Raises:
            LensError: there is none, or it is not a comparison's.
        """
        path = Path(path)
        return super().load(path / RESULT if path.is_dir() else path)

    def _sizes(self) -> str:
        return f"{len(self.cells)} cells of {self.card['task']}"

    def check(self) -> None:
        """Refuse cells and cards that the table cannot be made of."""
        _ = [(cell["label"], cell["cell"]["system"], cell["on"]["values"]) for cell in self.cells]
        _ = self.card["behaviour"], self.card["task"]


def _method(cell: Mapping[str, Any]) -> Method:
    return Method.from_settings(cell["cell"]["method"])


def _spread_of(topic: str) -> str:
    """The column of a topic's spread: "off" has spread, "off[NAME]" has spread[NAME]."""
    return topic.replace("off", "spread", 1)


def _coherence(own: Mapping[str, Any]) -> dict[str, Array]:
    """Of each answer of a topic: nats per token under the base (NaN before 0.3.0), repetition, tokens."""
    repeats, missing = get_behaviour("repetition"), [None] * len(own["ids"])
    found: dict[str, Array] = {"base_nll": _column(own.get("base_nll", missing))}
    found["repetition"] = np.array([repeats(text) for text in own["answers"]])
    return found | {"length": np.array([float(len(ids)) for ids in own["ids"]])}


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _number(value: float | None) -> float:
    """JSON has null for a missing number."""
    return math.nan if value is None else float(value)


def _column(values: Sequence[float | None]) -> Array:
    return np.array([_number(value) for value in values])
