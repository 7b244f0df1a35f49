"""Efficiency, stability and significance of steering vectors and adapters, beside norm-matched random controls.

Definitions as in "Emergent Misalignment is Easy, Narrow Misalignment is Hard" (2602.07852). A *solution* is a
steering vector, a LoRA adapter, or a direction (then added as it is). Norms are ‖strength·v‖, or ‖s·BA‖ of
adapters, summed (or averaged) over layers and modules. A point of norm 0 is the unchanged model, exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from piggyback_lens.card import versions
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.directions.curve_points import Curve, CurvePoint
from piggyback_lens.directions.kept import kept
from piggyback_lens.errors import LensError
from piggyback_lens.interventions.hooks import Interventions
from piggyback_lens.measuring.variants import Text, response_texts, variant_kl, variant_nll
from piggyback_lens.models.backends import HookedModel
from piggyback_lens.progress import shows
from piggyback_lens.settings import CurveSettings
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.direction import Direction
from piggyback_lens.words import CurveKind, NormOver

Draft = tuple[CurvePoint, Adapter | None]


@shows("efficiency")
@kept(Curve, lambda settings: settings.deciding("efficiency"))
def efficiency(
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    prompts: Sequence[RenderedPrompt],
    settings: CurveSettings = CurveSettings(),
    *,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Curve:
    """Loss as a function of the parameter norm.

    Every solution is evaluated at the same norms, so that the difference of two of them compares
    equals: those that the settings' fractions of any solution's own norm give, or their absolute norms.

    Args:
        model: either backend, without the solutions.
        solutions: by name.
        prompts: conversations with responses: those that the solutions were trained on, or others like them.
        settings: which norms, and how many random solutions of each.
        out: folder of the run; the same call reads its result back, another one is refused.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: no solutions, a solution of norm 0, or prompts without responses.

    Example:
        >>> solutions = {"one": Direction.of({1: torch.ones(32)})}
        >>> curve = efficiency(model, solutions, conversations, CurveSettings(fractions=(0.0, 1.0), n_random=1))
        >>> curve.series
        ('one', 'one, random control')
    """
    _check_solutions(solutions)
    chosen, texts = solutions, response_texts(prompts)
    grid, n_random = _norm_grid(chosen, settings), settings.random_of("efficiency")
    drafts = [
        draft
        for number, (name, own) in enumerate(chosen.items())
        for draft in _by_norm(name, own, grid, settings, n_random, _seed(settings.seed, number))
    ]
    points, base = _losses(model, texts, drafts, settings.rows_per_pass)
    facts = _chosen(settings, "efficiency") | _about(chosen, settings.norm_over)
    x_label = (
        "norm of the vector" if _only_vectors(chosen) else f"norm of the solution ({settings.norm_over} over modules)"
    )
    weights = tuple(float(text.n_scored) for text in texts)
    return Curve("efficiency", x_label, "loss (nats per token)", points, base, {}, weights, facts)


@shows("stability")
@kept(Curve, lambda settings: settings.deciding("stability"))
def stability(
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    prompts: Sequence[RenderedPrompt],
    settings: CurveSettings = CurveSettings(),
    *,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Curve:
    """Relative loss increase under orthogonal noise: (L(x′) − L(x)) / (L_base − L(x)).

    x′ = √(1−ε²)·x + ε·y with y ⟂ x and ‖y‖ = ‖x‖, per vector, or per matrix A, B or both of an adapter.
    Controls: "shrunk control" is √(1−ε²)·x without the noise (how much is lost by shortening alone), "random
    control" a norm-matched random solution, on the same scale. 0 at ε = 0, exactly; 1 = as bad as the base.

    Args:
        model: either backend, without the solutions.
        solutions: by name, without commas.
        prompts: conversations with responses.
        settings: shares of noise, and how many draws of each.
        out: folder of the run; the same call reads its result back, another one is refused.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: as `efficiency`, or a name with a comma.
    """
    _check_solutions(solutions)
    chosen, texts = solutions, response_texts(prompts)
    epsilons, n_noise, noise_on = settings.epsilons, settings.n_noise, settings.noise_on
    if any("," in name for name in chosen):
        raise LensError(f"names of solutions without commas, please: {list(chosen)}")
    drafts: list[Draft] = []
    for number, (name, own) in enumerate(chosen.items()):
        start = _seed(settings.seed, number)
        drafts.append((CurvePoint(name, 0.0, None, None, ()), own))
        for epsilon in sorted(set(epsilons) - {0.0}):
            shrunk = own.scaled((1 - epsilon**2) ** (0.5 if noise_on != "both" or _is_vector(own) else 1.0))
            drafts.append((CurvePoint(f"{name}, shrunk control", epsilon, None, None, ()), shrunk))
            for draw in range(n_noise):
                noisy = own.noisy(epsilon, torch.Generator().manual_seed(start + draw), noise_on)
                drafts.append((CurvePoint(name, epsilon, None, draw, ()), noisy))
        for draw in range(n_noise):
            control = own.random_like(torch.Generator().manual_seed(start + 500_000 + draw))
            drafts.append((CurvePoint(f"{name}, random control", 1.0, None, draw, ()), control))
    points, base = _losses(model, texts, drafts, settings.rows_per_pass)
    own_loss = {p.series: p.values for p in points if p.x == 0 and p.series in chosen}
    facts = {"n_noise": n_noise, "seed": settings.seed, "noise_on": noise_on} | _about(chosen, "sum")
    weights = tuple(float(text.n_scored) for text in texts)
    y_label = "relative loss increase (0 = solution, 1 = base)"
    return Curve(
        "stability", "share of noise ε", y_label, _spread_out(points, epsilons), base, own_loss, weights, facts
    )


@shows("significance")
@kept(Curve, lambda settings: settings.deciding("significance"))
def significance(
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    texts: Sequence[Text],
    settings: CurveSettings = CurveSettings(),
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Curve:
    """KL(base || steered) per token on plain text, in nats, as a function of the norm.

    Args:
        model: either backend, without the solutions.
        solutions: by name.
        texts: windows of `text_windows`, text such as models are pre-trained on.
        settings: which norms, how many random solutions of each, how many tokens of largest KL.
        tokenizer: shows those tokens as text.
        out: folder of the run; the same call reads its result back, another one is refused.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: no solutions, a solution of norm 0, or no texts.
    """
    _check_solutions(solutions)
    chosen = solutions
    grid, n_random = _norm_grid(chosen, settings), settings.random_of("significance")
    drafts = [
        draft
        for number, (name, own) in enumerate(chosen.items())
        for draft in _by_norm(name, own, grid, settings, n_random, _seed(settings.seed, number))
    ]
    found = variant_kl(model, texts, [adapter for _, adapter in drafts], rows_per_pass=settings.rows_per_pass)
    points = [_measured(point, [float(v.mean()) for v in kl]) for (point, _), kl in zip(drafts, found, strict=True)]
    maxima: list[dict[str, Any]] = []
    for name in chosen:
        own_points = [i for i, (point, _) in enumerate(drafts) if point.series == name]
        nearest = min(own_points, key=lambda i: abs((points[i].fraction or 0.0) - 1))
        maxima += _maxima(name, points[nearest].x, found[nearest], texts, settings.top, tokenizer)
    facts = _chosen(settings, "significance") | _about(chosen, settings.norm_over)
    x_label = (
        "norm of the vector" if _only_vectors(chosen) else f"norm of the solution ({settings.norm_over} over modules)"
    )
    weights = tuple(float(text.n_scored) for text in texts)
    y_label = "KL(base ‖ steered) (nats per token)"
    base = (0.0,) * len(texts)
    return Curve("significance", x_label, y_label, tuple(points), base, {}, weights, facts, tuple(maxima))


@shows("ablation cost")
@kept(Curve, lambda settings: settings.deciding("ablation"))
def ablation_cost(
    model: HookedModel,
    directions: Mapping[str, Direction],
    texts: Sequence[Text],
    settings: CurveSettings = CurveSettings(),
    *,
    out: str | Path | None = None,
    progress: bool | str = True,
) -> Curve:
    """Change of the loss on plain text when a direction is projected out of the whole residual stream.

    Each layer's vector in turn is taken out at every layer; beside it random directions. In nats per token,
    ablated minus unchanged: what the model itself uses the direction for.

    Args and errors as `significance`.
    """
    n_random = settings.random_of("ablation")
    if not directions:
        raise LensError("no directions: give at least one by name, {'narrow': direction}")
    drafts: list[tuple[CurvePoint, Interventions]] = []
    for number, (name, direction) in enumerate(directions.items()):
        direction.check(model)
        for layer in direction.layers:
            own = direction.at(layer)
            drafts.append((CurvePoint(name, float(layer), None, None, ()), own.ablation()))
            for draw in range(n_random):
                control = own.random_like(_seed(settings.seed, number) + 1009 * layer + draw)
                point = CurvePoint(f"{name}, random control", float(layer), None, draw, ())
                drafts.append((point, control.ablation()))
    losses = variant_nll(model, texts, [None, *(parts for _, parts in drafts)], rows_per_pass=settings.rows_per_pass)
    changes = (losses[1:] - losses[0]).tolist()
    points = tuple(_measured(point, values) for (point, _), values in zip(drafts, changes, strict=True))
    weights = tuple(float(text.n_scored) for text in texts)
    facts: dict[str, Any] = {"n_random": n_random, "seed": settings.seed, "versions": versions()}
    facts["directions"] = {name: repr(direction) for name, direction in directions.items()}
    base = tuple(losses[0].tolist())
    y_label = "loss when ablated, minus unchanged (nats per token)"
    return Curve("ablation", "layer of the vector", y_label, points, base, {}, weights, facts)


# ---------------------------------------------------------------- points


def _check_solutions(solutions: Mapping[str, Adapter]) -> None:
    if not solutions:
        raise LensError("no solutions: give at least one by name, {'narrow': vector}")
    for name, own in solutions.items():
        if own.norm() == 0:
            raise LensError(f"solution {name!r} has norm 0: there is nothing to scale")


def _chosen(settings: CurveSettings, kind: CurveKind) -> dict[str, Any]:
    return {"n_random": settings.random_of(kind), "seed": settings.seed, "norm_over": settings.norm_over}


def _norm_grid(chosen: Mapping[str, Adapter], settings: CurveSettings) -> list[float]:
    lengths = [own.norm(settings.norm_over) for own in chosen.values()]
    grid = [fraction * length for length in lengths for fraction in settings.fractions]
    return sorted(set(grid if settings.norms is None else settings.norms))


def _by_norm(
    name: str, own: Adapter, grid: Sequence[float], settings: CurveSettings, n_random: int, start: int
) -> list[Draft]:
    """A solution and its random controls at every norm."""
    length = own.norm(settings.norm_over)
    controls = [own.random_like(torch.Generator().manual_seed(start + draw)) for draw in range(n_random)]
    drafts: list[Draft] = []
    for series, draw, adapter in [
        (name, None, own),
        *((f"{name}, random control", i, c) for i, c in enumerate(controls)),
    ]:
        for norm in grid:
            point = CurvePoint(series, norm, norm / length, draw, ())
            drafts.append((point, adapter.scaled(norm / length) if norm else None))
    return drafts


def _losses(
    model: HookedModel, texts: Sequence[Text], drafts: Sequence[Draft], rows_per_pass: int
) -> tuple[tuple[CurvePoint, ...], tuple[float, ...]]:
    """The points with their losses, and the loss of the unchanged model, which points of norm 0 have too."""
    changed = [adapter for _, adapter in drafts if adapter is not None]
    losses = variant_nll(model, texts, [None, *changed], rows_per_pass=rows_per_pass).tolist()
    base, rest = losses[0], iter(losses[1:])
    points = [_measured(point, base if adapter is None else next(rest)) for point, adapter in drafts]
    return tuple(points), tuple(base)


def _measured(point: CurvePoint, values: Sequence[float]) -> CurvePoint:
    return CurvePoint(point.series, point.x, point.fraction, point.seed, tuple(values))


def _spread_out(points: Sequence[CurvePoint], epsilons: Sequence[float]) -> tuple[CurvePoint, ...]:
    """Random controls do not depend on ε: their points are repeated at each. Drops ε = 0 if it was not asked."""
    spread: list[CurvePoint] = []
    for point in points:
        where = sorted(set(epsilons)) if point.series.endswith("random control") else [point.x]
        spread += [CurvePoint(point.series, x, None, point.seed, point.values) for x in where if x in set(epsilons)]
    return tuple(spread)


def _maxima(
    name: str, norm: float, kl: Sequence[torch.Tensor], texts: Sequence[Text], top: int, tokenizer: Any
) -> list[dict[str, Any]]:
    """The `top` tokens with the largest KL: position, token, and the twelve tokens before it."""
    show: Callable[[Sequence[int]], str] = (lambda ids: "") if tokenizer is None else tokenizer.decode
    ranked = [(float(v), number, place) for number, values in enumerate(kl) for place, v in enumerate(values.tolist())]
    found = []
    for value, number, place in sorted(ranked, reverse=True)[:top]:
        text, at = texts[number], texts[number].start + place
        before = text.ids[max(0, at - 12) : at]
        row = {"series": name, "norm": norm, "kl": value, "text": number, "position": at, "id": text.ids[at]}
        found.append(row | {"token": show([text.ids[at]]), "before": show(list(before))})
    return found


def _about(chosen: Mapping[str, Adapter], over: NormOver) -> dict[str, Any]:
    own = {name: adapter.norm(over) for name, adapter in chosen.items()}
    return {"own_norms": own, "solutions": {n: a.settings() for n, a in chosen.items()}, "versions": versions()}


def _only_vectors(chosen: Mapping[str, Adapter]) -> bool:
    return all(_is_vector(own) for own in chosen.values())


def _is_vector(own: Adapter) -> bool:
    return not isinstance(own, LoRAAdapter)


def _seed(seed: int, number: int) -> int:
    """Far from the small seeds that vectors themselves are drawn with: a vector is no noise to itself."""
    return 1_000_000_007 + 1_000_003 * seed + 10_007 * number
