"""Experiments with a direction: steer with it, ablate it, find the strength that a KL budget allows.

What steering does to a behaviour means little without what it costs: every point has the behaviour, the KL
to the unsteered model on the unsteered answers, and how surprising the steered answers are to the unsteered
model, beside random directions of the same length.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from piggyback_lens.card import versions
from piggyback_lens.conversations.batch import as_prompts, ids_hash, questions_of, repeated
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.directions.kept import solution_hash
from piggyback_lens.directions.sweeps import METRICS, RANDOM, Sweep, SweepPoint
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Interventions
from piggyback_lens.interventions.kinds import ablate
from piggyback_lens.interventions.running import mean_norms
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.measuring.variants import response_texts, variant_kl, variant_nll
from piggyback_lens.models.backends import HookedModel, check_layers, facts_of, shape_of
from piggyback_lens.models.pair import Identity, identify
from piggyback_lens.progress import shows, track
from piggyback_lens.results.run import Row, Run
from piggyback_lens.settings import SteerSettings
from piggyback_lens.vectors.direction import Direction
from piggyback_lens.words import Site

Points = list[tuple[SweepPoint, Interventions | None]]
"""What is measured: each point without its numbers, and what acts there."""


@dataclass(frozen=True, eq=False)
class _Bench:
    """The unsteered model's answers, against which every point is measured."""

    model: HookedModel
    prompts: tuple[RenderedPrompt, ...]
    behaviour: Behaviour
    settings: "SteerSettings"
    reference: tuple[Generation, ...]

    @classmethod
    def of(
        cls, model: HookedModel, prompts: Sequence[RenderedPrompt], behaviour: Behaviour, settings: "SteerSettings"
    ) -> "_Bench":
        return cls(
            model,
            tuple(prompts),
            behaviour,
            settings,
            tuple(generate(model, prompts, **_sizes(settings), progress="unsteered answers")),
        )

    def answers(self, interventions: Interventions | None) -> tuple[Generation, ...]:
        """Answers, with the same draws at every point; those of the unsteered model are the reference."""
        if interventions is None:
            return self.reference
        return tuple(generate(self.model, self.prompts, interventions=interventions, **_sizes(self.settings)))

    def kl(self, variants: Sequence[Interventions | None]) -> list[tuple[float, ...]]:
        """Mean KL(unsteered || variant) over each unsteered answer's tokens: [variant][prompt]."""
        texts = response_texts([answer.completed() for answer in self.reference])
        found = variant_kl(self.model, texts, variants, rows_per_pass=self.settings.batch_size)
        return [tuple(float(values.mean()) for values in row) for row in found]

    def own_nll(self, answers: Sequence[Generation]) -> tuple[float, ...]:
        """Nats per token of answers under the unsteered model."""
        texts = response_texts([answer.completed() for answer in answers])
        scores = variant_nll(self.model, texts, [None], rows_per_pass=self.settings.batch_size)
        return tuple(scores[0].tolist())

    def point(self, variant: Interventions | None, kl: tuple[float, ...]) -> Row:
        """What a point is when it is measured, and its answers."""
        answers = self.answers(variant)
        values = [self.behaviour(answer.text) for answer in answers]
        surprise = self.own_nll(answers)
        return {"behaviour": values, "kl": kl, "own_nll": surprise, "answers": [answer.text for answer in answers]}


@shows("steer")
def steer(
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    behaviour: str | Behaviour,
    settings: SteerSettings = SteerSettings(),
    *,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Sweep:
    """Add a direction at several strengths, at one layer at a time, and measure what it does and costs.

    Args:
        model: either backend.
        direction: one layer's vector is tried at every layer of the settings; of several, each at its own.
        prompts: without responses; each is answered `samples` times.
        behaviour: what is measured on the answers.
        settings: strengths, layers, controls, length of the answers.
        out: folder of the run, which gets every point as it comes; the same call continues there.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: layers that do not fit, no prompts, a direction that is zero, or a folder of another run.

    Example:
        >>> direction = Direction.of({1: torch.ones(32)})
        >>> settings = SteerSettings(strengths=(1.0,), n_random=1, max_new_tokens=4)
        >>> sweep = steer(model, direction, prompts, "words", settings)
        >>> sorted({point.x for point in sweep.points})
        [0.0, 1.0]
    """
    prompts, chosen = as_prompts(prompts), _at_layers(model, direction, settings.layers)
    for own in chosen:
        if own.norm() == 0:
            raise LensError(f"the direction is zero at layer {own.layers[0]}: there is nothing to add")

    def plan() -> Points:
        norms = _norms(model, direction.site, prompts, settings.batch_size)
        found: Points = []
        for own in chosen:
            layer, length = own.layers[0], next(iter(own.norms.values()))
            scale = 1.0 if settings.fractions is None else norms[layer] / length
            for number, vector in _with_controls(own, settings):
                series = "steered" if number is None else RANDOM
                for x in (size * scale for size in settings.sizes):
                    point = SweepPoint(series, layer, x, abs(x) * length / norms[layer], number, (), (), ())
                    parts = vector.steer(x, span=settings.span, phase=settings.phase) if x else None
                    found.append((point, parts))
        return found

    return _swept("steer", model, direction, prompts, get_behaviour(behaviour), settings, plan, out)


@shows("ablate")
def ablate_sweep(
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    behaviour: str | Behaviour,
    settings: SteerSettings = SteerSettings(),
    *,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Sweep:
    """Project a direction out at one layer at a time, and out of the whole residual stream.

    "At one layer" takes the vector out at its site in that layer only; "everywhere" at every residual site of
    every layer, and is shown at the layer that the vector comes from. Strengths and fractions have no meaning here.

    Args and errors as `steer`.
    """
    prompts, chosen = as_prompts(prompts), _at_layers(model, direction, settings.layers)
    where: dict[str, Any] = {"span": settings.span, "phase": settings.phase}

    def plan() -> Points:
        found: Points = []
        for own in chosen:
            for number, vector in _with_controls(own, settings):
                series = "ablated at one layer" if number is None else f"{RANDOM} at one layer"
                point = SweepPoint(series, own.layers[0], 1.0, None, number, (), (), ())
                found.append((point, ablate(vector.vector, site=own.site, layers=own.layers[0], **where)))
        for own in chosen if len(direction.layers) > 1 else [direction]:
            for number, vector in _with_controls(own, settings):
                series = "ablated everywhere" if number is None else f"{RANDOM} everywhere"
                found.append(
                    (SweepPoint(series, own.layers[0], 1.0, None, number, (), (), ()), vector.ablation(**where))
                )
        return found

    return _swept("ablate", model, direction, prompts, get_behaviour(behaviour), settings, plan, out)


def _swept(
    kind: Literal["steer", "ablate"],
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    measure: Behaviour,
    settings: SteerSettings,
    plan: Callable[[], Points],
    out: str | Path | None,
) -> Sweep:
    """Measure the points of a plan, each kept as it comes."""
    own = identify(model)
    prompts = repeated(prompts, settings.samples)
    deciding = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    identity = {"settings": deciding, "direction": solution_hash(direction), "behaviour": measure.name}
    identity |= {"prompts": ids_hash(prompts), **facts_of(model)}
    with Run.open(out, kind, identity, models={"model": own}, keys=("point",), prompt=prompts[0]) as run:
        if (done := run.result(Sweep.load)) is not None:
            return done
        points = plan()
        missing = [i for i in range(len(points)) if (i,) not in run.rows]
        if missing:
            bench = _Bench.of(model, prompts, measure, settings)
            costs = bench.kl([points[i][1] for i in missing])
            for i, kl in zip(track(missing), costs, strict=True):
                run.add([{"point": i, **bench.point(points[i][1], kl)}])
        rows = [run.rows[i,] for i in range(len(points))]
        filled = tuple(_filled(point, row) for (point, _), row in zip(points, rows, strict=True))
        facts = deciding | {"direction": repr(direction), "prompts": [prompt.query for prompt in prompts]}
        facts |= {"questions": questions_of(prompts), "template": prompts[0].fingerprint}
        facts |= {"notes": _foreign(direction, own), "versions": versions()}
        about = {"name": measure.name, "label": measure.label, "unit": measure.unit}
        return run.finish(Sweep(kind, about, filled, facts, tuple(tuple(row["answers"]) for row in rows)))


def _sizes(settings: SteerSettings) -> dict[str, Any]:
    sizes = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    return sizes | {"sampling": settings.sampling}


def _filled(point: SweepPoint, row: Row) -> SweepPoint:
    """A point with what its row of a file says; null is a missing number there."""
    numbers = {metric: tuple(math.nan if x is None else float(x) for x in row[metric]) for metric in METRICS}
    return replace(point, **numbers)  # type: ignore[arg-type]


def _foreign(direction: Direction, own: Identity) -> list[str]:
    """Says that a direction was made with another model, where it says so itself."""
    known = direction.provenance.model if direction.provenance is not None else None
    if known is None or Identity.from_dict(known).matches(own):
        return []
    return [f"The direction was made with another model ({known['name'] or 'unnamed'}) than this one."]


@dataclass(frozen=True)
class Calibrated:
    """The strength that a KL budget allows.

    Attributes:
        strength: multiple of the direction.
        kl: KL(unsteered || steered) there, mean over the scored tokens, in nats per token.
        tried: every (strength, kl) that was evaluated, in order.
    """

    strength: float
    kl: float
    tried: tuple[tuple[float, float], ...]


@shows("strength for KL")
def strength_for_kl(
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    budget: float,
    settings: SteerSettings = SteerSettings(),
    *,
    tolerance: float = 0.05,
    max_steps: int = 40,
    progress: bool | str = True,
) -> Calibrated:
    """The positive strength at which steering costs `budget` nats per token, by bracketing and bisection.

    The KL is measured on the prompts' responses, or on the unsteered model's own greedy answers where the
    prompts have none. It need not grow with the strength everywhere; the strength found is one at which it
    meets the budget.

    Args:
        model: either backend.
        direction: added at all its layers.
        prompts: with or without responses.
        budget: nats per token, above 0.
        settings: which tokens are steered, in which phase, and the length of the answers.
        tolerance: relative to the budget.
        max_steps: evaluations at most.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: a budget or tolerance that is not positive, or one that is not met in `max_steps`.
    """
    direction.check(model)
    prompts = as_prompts(prompts)
    if not (budget > 0 and tolerance > 0):
        raise LensError(f"budget {budget:g}, tolerance {tolerance:g}: both must be above 0")
    if any("response" not in prompt.spans for prompt in prompts):
        answers = generate(model, prompts, **_sizes(settings))
        prompts = [answer.completed() for answer in answers]
    texts = response_texts(prompts)
    tried: list[tuple[float, float]] = []
    low, high, strength = 0.0, float("inf"), 1.0
    while len(tried) < max_steps:
        steered = direction.steer(strength, span=settings.span, phase=settings.phase)
        values = variant_kl(model, texts, [steered], rows_per_pass=settings.batch_size)[0]
        kl = float(sum(v.sum() for v in values)) / sum(len(v) for v in values)
        tried.append((strength, kl))
        if abs(kl - budget) <= tolerance * budget:
            return Calibrated(strength, kl, tuple(tried))
        low, high = (strength, high) if kl < budget else (low, strength)
        strength = 2 * low if high == float("inf") else (low + high) / 2
    at, kl = tried[-1]
    raise LensError(
        f"no strength reaches {budget:g} nats per token within {max_steps} steps (strength {at:.3g} gives {kl:.3g}): "
        "choose another budget, or a wider tolerance"
    )


def _at_layers(model: HookedModel, direction: Direction, layers: Sequence[int] | None) -> list[Direction]:
    """One direction of one layer for each layer that is asked."""
    direction.check(model)
    chosen = direction.layers if layers is None else check_layers(layers, shape_of(model).n_layers)
    if len(direction.layers) == 1:
        return [replace(direction, layers=(layer,)) for layer in chosen]
    return [direction.at(layer) for layer in chosen]


def _norms(model: HookedModel, site: Site, prompts: Sequence[RenderedPrompt], batch_size: int) -> dict[int, float]:
    """Mean activation norm per layer over all tokens of the prompts."""
    sums: dict[int, float] = {}
    for at in range(0, len(prompts), batch_size):
        batch = batch_prompts(prompts[at : at + batch_size])
        tokens = int(batch.attention_mask.sum())
        for layer, norm in mean_norms(model, batch, site=site).items():
            sums[layer] = sums.get(layer, 0.0) + tokens * norm
    return {layer: total / sum(len(prompt.ids) for prompt in prompts) for layer, total in sums.items()}


def _with_controls(own: Direction, settings: SteerSettings) -> list[tuple[int | None, Direction]]:
    """The direction, and its numbered random controls; their seeds are far from those that vectors are drawn with."""
    start = 1_000_000_007 + 1_000_003 * settings.seed + 1009 * own.layers[0]
    return [(None, own), *((number, own.random_like(start + number)) for number in range(settings.n_random))]
