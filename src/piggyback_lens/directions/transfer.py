"""Do directions of one organism work in another? Added to every base, ablated from every finetune."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import as_prompts, questions_of, repeated
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.directions.kept import kept
from piggyback_lens.directions.sweeps import RANDOM
from piggyback_lens.errors import LensError
from piggyback_lens.intervals import is_rate, mean_interval, recovery
from piggyback_lens.interventions.hooks import AnyIntervention
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import counting, shows
from piggyback_lens.results.result import Number, Result
from piggyback_lens.settings import AnswerSettings
from piggyback_lens.vectors.direction import Direction
from piggyback_lens.words import Side

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Organism:
    """A finetune with its direction and the behaviour it was made to show.

    Attributes:
        pair: base and finetuned.
        direction: of this behaviour.
        behaviour: measured on every answer of this organism.
        strength: with which the direction is added.
    """

    pair: ModelPair
    direction: Direction
    behaviour: str | Behaviour
    strength: float = 1.0


@dataclass(frozen=True)
class TransferCell:
    """One direction on one organism: the behaviour per prompt, random controls averaged over their seeds."""

    mode: str  # "added" to the base, or "ablated" from the finetuned model
    direction: str
    organism: str
    values: tuple[Number, ...]
    n_seeds: int = 1


@dataclass(frozen=True, repr=False)
class TransferResult(Result):
    """Every direction on every organism.

    Attributes:
        cells: one for each mode, direction (random controls are named "random control") and organism.
        base: behaviour of each organism's base, per prompt.
        finetuned: the same of its finetuned model.
        units: unit of each organism's behaviour.
        settings: what was chosen.
    """

    name: ClassVar = "transfer.1"
    cells: tuple[TransferCell, ...]
    base: Mapping[str, tuple[Number, ...]]
    finetuned: Mapping[str, tuple[Number, ...]]
    units: Mapping[str, str]
    settings: Mapping[str, Any]

    def to_frame(self) -> "pd.DataFrame":
        """One row per cell.

        Columns: mode, direction, organism, raw, raw_low, raw_high (behaviour in its unit), value, low, high
        (effect with its 95 % interval), reason, n, seeds. The effect of adding is (x − base) / (finetuned −
        base), that of ablating (x − finetuned) / (base − finetuned): 1 makes one model behave like the other.
        """
        import pandas as pd

        rows = []
        for cell in self.cells:
            base, tuned, values = map(np.array, (self.base[cell.organism], self.finetuned[cell.organism], cell.values))
            start, goal = (base, tuned) if cell.mode == "added" else (tuned, base)
            rate, asked = is_rate(self.units[cell.organism], values, start, goal), self.settings.get("questions")
            raw = mean_interval(values, asked, rate=rate)
            effect = recovery(values, start, goal, asked, rate=rate)
            label = {"mode": cell.mode, "direction": cell.direction, "organism": cell.organism}
            numbers = {"raw": raw.value, "raw_low": raw.low, "raw_high": raw.high}
            numbers |= {"value": effect.value, "low": effect.low, "high": effect.high}
            rows.append(label | numbers | {"reason": effect.reason, "n": effect.n, "seeds": cell.n_seeds})
        return pd.DataFrame(rows)

    def figure(self) -> "go.Figure":
        """Two maps, added and ablated: directions down, organisms across, effects as colours."""
        from piggyback_lens.figures.direction_plots import transfer_figure

        figure: go.Figure = transfer_figure(self.to_frame())
        return figure

    def _sizes(self) -> str:
        return f"{len(self.cells)} cells, {len(self.units)} organisms"

    def check(self) -> None:
        """Refuse cells of organisms that are not there."""
        unknown = {cell.organism for cell in self.cells} - (self.base.keys() & self.finetuned.keys())
        if unknown or not self.cells:
            raise ValueError(f"cells of {sorted(unknown)}, which have no base or finetuned")


@shows("transfer")
@kept(TransferResult)
def transfer_matrix(
    organisms: Mapping[str, Organism],
    prompts: Sequence[RenderedPrompt],
    *,
    n_random: int = 2,
    settings: AnswerSettings = AnswerSettings(),
    progress: bool | str = True,
    out: str | Path | None = None,
) -> TransferResult:
    """Add every organism's direction to every base, ablate it from every finetuned model.

    Args:
        organisms: by name; their models must have the same width and layers, and use one chat template.
        prompts: without responses, the same for all.
        n_random: random directions of each organism's direction's length, per mode.
        settings: how answers are generated; its seed is that of the random directions too.
        progress: show a line with the time left; a text is its label.
        out: folder of the run; the same call reads its result back, another one is refused.

    Raises:
        LensError: no organisms, or directions that do not fit a model.
    """
    if not organisms:
        raise LensError("no organisms: give at least one, {'name': Organism(pair, direction, behaviour)}")
    for other in organisms.values():
        for own in organisms.values():
            with other.pair.using("base") as model:
                own.direction.check(model)
    asked = repeated(as_prompts(prompts), settings.samples)
    sizes: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    sizes["sampling"] = settings.sampling

    def measure(organism: Organism, side: Side, parts: AnyIntervention) -> tuple[float, ...]:
        behaviour = get_behaviour(organism.behaviour)
        with organism.pair.using(side) as model:
            answers = generate(model, asked, interventions=parts, **sizes)
        advance(1)
        return tuple(behaviour(answer.text) for answer in answers)

    cells: list[TransferCell] = []
    base: dict[str, tuple[float, ...]] = {}
    finetuned: dict[str, tuple[float, ...]] = {}
    per_organism = 2 + 2 * (len(organisms) + n_random)
    with counting(len(organisms) * per_organism) as advance:
        for name, organism in organisms.items():
            base[name], finetuned[name] = (measure(organism, side, None) for side in ("base", "finetuned"))
            start = 1_000_000_007 + 1_000_003 * settings.seed
            controls = [organism.direction.random_like(start + number) for number in range(n_random)]
            tried = {other: ([own.direction], own.strength) for other, own in organisms.items()}
            if controls:
                tried[RANDOM] = (controls, organism.strength)
            for label, (vectors, strength) in tried.items():
                added = [measure(organism, "base", vector.steer(strength)) for vector in vectors]
                ablated = [measure(organism, "finetuned", vector.ablation()) for vector in vectors]
                for mode, found in (("added", added), ("ablated", ablated)):
                    values = tuple(np.mean(found, axis=0).tolist())
                    cells.append(TransferCell(mode, label, name, values, len(found)))
    chosen = {"n_random": n_random, "n_prompts": len(prompts), **asdict(settings), "versions": versions()}
    chosen["questions"] = questions_of(asked)
    chosen["strengths"] = {name: organism.strength for name, organism in organisms.items()}
    units = {name: get_behaviour(organism.behaviour).unit for name, organism in organisms.items()}
    return TransferResult(tuple(cells), base, finetuned, units, chosen)
