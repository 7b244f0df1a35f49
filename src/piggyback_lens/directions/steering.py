"""Experiments with a direction: steer with it, ablate it, find the strength that a KL budget allows.

What steering does to a behaviour means little without what it costs: every point has the behaviour, the KL
to the unsteered model on the unsteered answers, and how surprising the steered answers are to the unsteered
model, beside random directions of the same length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from piggyback_lens.card import versions
from piggyback_lens.conversations.chat import RenderedPrompt, batch_prompts
from piggyback_lens.directions.kept import kept
from piggyback_lens.directions.sweeps import RANDOM, Sweep, SweepPoint
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Interventions
from piggyback_lens.interventions.kinds import ablate
from piggyback_lens.interventions.placement import Phase
from piggyback_lens.interventions.running import mean_norms
from piggyback_lens.measuring.generation import Generation, generate
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.measuring.variants import response_texts, variant_kl, variant_nll
from piggyback_lens.models.backends import HookedModel, Site, check_layers, shape_of
from piggyback_lens.progress import track
from piggyback_lens.vectors.direction import Direction


@dataclass(frozen=True, eq=False)
class _Bench:
    """The unsteered model's answers, against which every point is measured."""

    model: HookedModel
    prompts: tuple[RenderedPrompt, ...]
    behaviour: Behaviour
    max_new_tokens: int
    batch_size: int
    reference: tuple[Generation, ...]

    @classmethod
    def of(
        cls, model: HookedModel, prompts: Sequence[RenderedPrompt], behaviour: Behaviour, tokens: int, batch_size: int
    ) -> "_Bench":
        answers = generate(model, prompts, max_new_tokens=tokens, batch_size=batch_size)
        return cls(model, tuple(prompts), behaviour, tokens, batch_size, tuple(answers))

    def answers(self, interventions: Interventions | None) -> tuple[Generation, ...]:
        """Greedy answers; those of the unsteered model are the reference."""
        if interventions is None:
            return self.reference
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        return tuple(generate(self.model, self.prompts, interventions=interventions, **settings))

    def kl(self, variants: Sequence[Interventions | None]) -> list[tuple[float, ...]]:
        """Mean KL(unsteered || variant) over each unsteered answer's tokens: [variant][prompt]."""
        texts = response_texts([answer.completed() for answer in self.reference])
        found = variant_kl(self.model, texts, variants, rows_per_pass=self.batch_size)
        return [tuple(float(values.mean()) for values in row) for row in found]

    def own_nll(self, answers: Sequence[Generation]) -> tuple[float, ...]:
        """Nats per token of answers under the unsteered model."""
        texts = response_texts([answer.completed() for answer in answers])
        scores = variant_nll(self.model, texts, [None], rows_per_pass=self.batch_size)
        return tuple(scores[0].tolist())

    def points(
        self, blank: Sequence[SweepPoint], variants: Sequence[Interventions | None], label: str | None
    ) -> tuple[tuple[SweepPoint, ...], tuple[tuple[str, ...], ...]]:
        """The measured points and their answers."""
        kls, unsteered = self.kl(variants), self.own_nll(self.reference)
        done, texts = [], []
        for point, variant, kl in zip(track(list(blank), label), variants, kls, strict=True):
            answers = self.answers(variant)
            values = tuple(self.behaviour(answer.text) for answer in answers)
            surprise = unsteered if variant is None else self.own_nll(answers)
            done.append(replace(point, behaviour=values, kl=kl, own_nll=surprise))
            texts.append(tuple(answer.text for answer in answers))
        return tuple(done), tuple(texts)


@kept(Sweep)
def steer(
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    *,
    behaviour: str | Behaviour,
    strengths: Sequence[float] | None = None,
    fractions: Sequence[float] | None = None,
    layers: Sequence[int] | int | None = None,
    span: str = "all",
    phase: Phase = "both",
    n_random: int = 3,
    seed: int = 0,
    max_new_tokens: int = 60,
    batch_size: int = 16,
    progress: bool = False,
    out: str | Path | None = None,
) -> Sweep:
    """Add a direction at several strengths, at one layer at a time, and measure what it does and costs.

    Args:
        model: either backend.
        direction: one layer's vector is tried at every layer of `layers`; of several, each at its own.
        prompts: without responses.
        behaviour: what is measured on the answers.
        strengths: multiples of the vector. 0 is the unsteered model, exactly.
        fractions: instead of strengths, lengths as fractions of the mean activation norm at that site and
            layer on these prompts.
        layers: default those of the direction.
        span: which tokens are steered.
        phase: prompt, generation or both.
        n_random: random directions of the same length for each point.
        seed: of the random directions.
        max_new_tokens: per answer, greedy.
        batch_size: rows per pass.
        progress: show a progress bar.
        out: folder of the run; the same call reads its result back, another one is refused.

    Raises:
        LensError: strengths and fractions both given or neither, layers that do not fit, no prompts.
    """
    direction.check(model)
    if (strengths is None) == (fractions is None):
        raise LensError("give exactly one of strengths= and fractions=")
    chosen = _at_layers(direction, layers, shape_of(model).n_layers)
    norms = _norms(model, direction.site, prompts, batch_size)
    blank, variants = [], []
    for own in chosen:
        layer, length = own.layers[0], next(iter(own.norms.values()))
        if length == 0:
            raise LensError(f"the direction is zero at layer {layer}: there is nothing to add")
        asked = strengths if strengths is not None else [f * norms[layer] / length for f in fractions or ()]
        for number, vector in _with_controls(own, n_random, seed):
            series = "steered" if number is None else RANDOM
            for x in asked:
                point = SweepPoint(series, layer, float(x), abs(x) * length / norms[layer], number, (), (), ())
                blank.append(point)
                variants.append(vector.steer(float(x), span=span, phase=phase) if x else None)
    bench = _Bench.of(model, prompts, get_behaviour(behaviour), max_new_tokens, batch_size)
    points, answers = bench.points(blank, variants, "steering" if progress else None)
    settings = {"span": span, "phase": phase, "n_random": n_random, "seed": seed, "max_new_tokens": max_new_tokens}
    settings |= {"direction": repr(direction), "n_prompts": len(prompts), "template": prompts[0].fingerprint}
    return Sweep("steer", _measure(bench.behaviour), points, settings | {"versions": versions()}, answers)


@kept(Sweep)
def ablate_sweep(
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    *,
    behaviour: str | Behaviour,
    layers: Sequence[int] | int | None = None,
    span: str = "all",
    phase: Phase = "both",
    n_random: int = 3,
    seed: int = 0,
    max_new_tokens: int = 60,
    batch_size: int = 16,
    progress: bool = False,
    out: str | Path | None = None,
) -> Sweep:
    """Project a direction out at one layer at a time, and out of the whole residual stream.

    "At one layer" takes the vector out at its site in that layer only; "everywhere" at every residual site of
    every layer, and is shown at the layer that the vector comes from.

    Args and errors as `steer`. `out` as well.
    """
    direction.check(model)
    chosen = _at_layers(direction, layers, shape_of(model).n_layers)
    blank: list[SweepPoint] = []
    variants: list[Interventions | None] = []
    where: dict[str, Any] = {"span": span, "phase": phase}
    for own in chosen:
        for number, vector in _with_controls(own, n_random, seed):
            series = "ablated at one layer" if number is None else f"{RANDOM} at one layer"
            blank.append(SweepPoint(series, own.layers[0], 1.0, None, number, (), (), ()))
            variants.append(ablate(vector.vector, site=own.site, layers=own.layers[0], **where))
    for own in chosen if len(direction.layers) > 1 else [direction]:
        for number, vector in _with_controls(own, n_random, seed):
            series = "ablated everywhere" if number is None else f"{RANDOM} everywhere"
            blank.append(SweepPoint(series, own.layers[0], 1.0, None, number, (), (), ()))
            variants.append(vector.ablation(**where))
    bench = _Bench.of(model, prompts, get_behaviour(behaviour), max_new_tokens, batch_size)
    points, answers = bench.points(blank, variants, "ablating" if progress else None)
    settings = {"span": span, "phase": phase, "n_random": n_random, "seed": seed, "max_new_tokens": max_new_tokens}
    settings |= {"direction": repr(direction), "n_prompts": len(prompts), "template": prompts[0].fingerprint}
    return Sweep("ablate", _measure(bench.behaviour), points, settings | {"versions": versions()}, answers)


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


def strength_for_kl(
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    budget: float,
    *,
    tolerance: float = 0.05,
    span: str = "all",
    phase: Phase = "both",
    max_new_tokens: int = 40,
    batch_size: int = 16,
    max_steps: int = 40,
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
        tolerance: relative to the budget.
        span: which tokens are steered.
        phase: prompt, generation or both.
        max_new_tokens: of the answers.
        batch_size: rows per pass.
        max_steps: evaluations at most.

    Raises:
        LensError: a budget or tolerance that is not positive, or one that is not met in `max_steps`.
    """
    direction.check(model)
    if not (budget > 0 and tolerance > 0):
        raise LensError(f"budget {budget:g}, tolerance {tolerance:g}: both must be above 0")
    if any("response" not in prompt.spans for prompt in prompts):
        answers = generate(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        prompts = [answer.completed() for answer in answers]
    texts = response_texts(prompts)
    tried: list[tuple[float, float]] = []
    low, high, strength = 0.0, float("inf"), 1.0
    while len(tried) < max_steps:
        steered = direction.steer(strength, span=span, phase=phase)
        values = variant_kl(model, texts, [steered], rows_per_pass=batch_size)[0]
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


def _at_layers(direction: Direction, layers: Sequence[int] | int | None, n_layers: int) -> list[Direction]:
    """One direction of one layer for each layer that is asked."""
    chosen = direction.layers if layers is None else check_layers(layers, n_layers)
    if len(direction.layers) == 1:
        return [replace(direction, layers=(layer,)) for layer in chosen]
    return [direction.at(layer) for layer in chosen]


def _norms(model: HookedModel, site: Site, prompts: Sequence[RenderedPrompt], batch_size: int) -> dict[int, float]:
    """Mean activation norm per layer over all tokens of the prompts."""
    if not prompts or batch_size < 1:
        raise LensError(f"{len(prompts)} prompts, batch_size {batch_size}: each must be at least 1")
    sums: dict[int, float] = {}
    for at in range(0, len(prompts), batch_size):
        batch = batch_prompts(prompts[at : at + batch_size])
        tokens = int(batch.attention_mask.sum())
        for layer, norm in mean_norms(model, batch, site=site).items():
            sums[layer] = sums.get(layer, 0.0) + tokens * norm
    return {layer: total / sum(len(prompt.ids) for prompt in prompts) for layer, total in sums.items()}


def _with_controls(own: Direction, n_random: int, seed: int) -> list[tuple[int | None, Direction]]:
    """The direction, and its numbered random controls; their seeds are far from those that vectors are drawn with."""
    start = 1_000_000_007 + 1_000_003 * seed + 1009 * own.layers[0]
    return [(None, own), *((number, own.random_like(start + number)) for number in range(n_random))]


def _measure(behaviour: Behaviour) -> dict[str, str]:
    return {"name": behaviour.name, "label": behaviour.label, "unit": behaviour.unit}
