"""The jobs on directions: train one, draw its curves, steer with it; each in one folder with a report."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from piggyback_lens.conversations.batch import ids_hash
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.directions.curve_points import Curve, Kind
from piggyback_lens.directions.curves import ablation_cost, efficiency, significance, stability
from piggyback_lens.directions.kept import solution_hash
from piggyback_lens.directions.steering import steer
from piggyback_lens.directions.sweeps import Sweep
from piggyback_lens.files import write_json
from piggyback_lens.jobs.direction_reports import (
    CURVE_CAPTIONS,
    at_equal_norms,
    curves_report,
    curves_verdict,
    steer_report,
)
from piggyback_lens.jobs.direction_settings import (
    TEXT_KINDS,
    CurveSettings,
    SteerSettings,
)
from piggyback_lens.jobs.direction_training import TrainedDirection, train_direction_job
from piggyback_lens.jobs.job_inputs import as_direction, moved_to
from piggyback_lens.jobs.job_runs import run_card
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.measuring.variants import Text
from piggyback_lens.models.backends import HookedModel, check_layers, facts_of, shape_of
from piggyback_lens.models.pair import Identity, identify
from piggyback_lens.progress import say
from piggyback_lens.results.run import RESULT, Run, locked
from piggyback_lens.vectors.adapters import Adapter
from piggyback_lens.vectors.direction import Direction

__all__ = ["TrainedDirection", "curves_job", "steer_job", "train_direction_job"]


# ---------------------------------------------------------------- curves


def curves_job(
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    prompts: Sequence[RenderedPrompt],
    texts: Sequence[Text],
    settings: CurveSettings,
    *,
    out: str | Path,
    tokenizer: Any = None,
    name: str = "",
    progress: bool = True,
) -> dict[Kind, Curve]:
    """Draw the chosen curves of some solutions, each written to `out` when it is done, and a report.

    A curve that `out` has already, of the same solutions, data, model and settings, is read back.

    Args:
        model: either backend, without the solutions.
        solutions: by name.
        prompts: conversations with responses, for efficiency and stability.
        texts: plain text, for significance and ablation.
        settings: which curves, and how.
        out: folder.
        tokenizer: shows the tokens of largest KL as text.
        name: of the model, for the report.
        progress: say what is done.

    Raises:
        LensError: what the curves raise, or a folder with curves of another run.
    """
    out, own = Path(out), identify(model, name)
    for solution in solutions.values():
        if isinstance(solution, Direction):
            solution.check(model)
    make = _curve_makers(model, solutions, prompts, texts, settings, tokenizer)
    curves: dict[Kind, Curve] = {}
    with ExitStack() as stack:  # all folders first, so that one of another run is refused before anything is drawn
        stack.enter_context(locked(out))
        runs = {
            kind: stack.enter_context(
                Run.open(
                    out / kind,
                    kind,
                    _curve_identity(kind, model, solutions, prompts, texts, settings),
                    models={"model": own},
                )
            )
            for kind in settings.kinds
        }
        for kind, run in runs.items():
            done = run.result(Curve.load)
            if progress:
                say(f"{kind}: {CURVE_CAPTIONS[kind]}" if done is None else f"{kind}: already there")
            curves[kind] = run.finish(make[kind]()) if done is None else done
    notes = _curve_notes(solutions, own)
    differences, verdict = at_equal_norms(curves, solutions), curves_verdict(curves, list(solutions))
    card = run_card(model, name, prompts, asdict(settings)) | {"solutions": {n: repr(s) for n, s in solutions.items()}}
    tables = {kind: curve.to_frame().to_dict("records") for kind, curve in curves.items()}
    gaps = {kind: frame.to_dict("records") for kind, frame in differences.items()}
    maxima = {kind: curve.maxima for kind, curve in curves.items() if curve.maxima}
    results = {"verdict": verdict, "curves": tables, "differences": gaps, "maxima": maxima, "notes": notes}
    write_json(out / RESULT, results | {"card": card})
    curves_report(out / "report.html", verdict, curves, differences, prompts, card, notes)
    return curves


def _curve_makers(
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    prompts: Sequence[RenderedPrompt],
    texts: Sequence[Text],
    settings: CurveSettings,
    tokenizer: Any,
) -> dict[Kind, Callable[[], Curve]]:
    def options(kind: Kind) -> dict[str, Any]:
        return settings.of(kind) | {"rows_per_pass": settings.rows_per_pass}

    def ablated() -> Curve:
        directions = {name: as_direction(solution) for name, solution in solutions.items()}
        return ablation_cost(model, directions, texts, **options("ablation"))

    return {
        "efficiency": lambda: efficiency(model, solutions, prompts, **options("efficiency")),
        "stability": lambda: stability(model, solutions, prompts, **options("stability")),
        "significance": lambda: significance(model, solutions, texts, tokenizer=tokenizer, **options("significance")),
        "ablation": ablated,
    }


def _curve_identity(
    kind: Kind,
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    prompts: Sequence[RenderedPrompt],
    texts: Sequence[Text],
    settings: CurveSettings,
) -> dict[str, Any]:
    """Everything that decides the numbers of a curve, but for the model."""
    rows = [(text.ids, text.start) for text in texts] if kind in TEXT_KINDS else [(p.ids, p.n_prompt) for p in prompts]
    return {
        "settings": settings.of(kind),
        "solutions": {name: solution_hash(solution) for name, solution in solutions.items()},
        "data": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
        **facts_of(model),
    }


def _curve_notes(solutions: Mapping[str, Adapter], own: Identity) -> list[str]:
    """Solutions that say that they were made with another model."""
    notes = []
    for name, solution in solutions.items():
        known = solution.provenance.model if solution.provenance is not None else None
        if known is not None and not Identity.from_dict(known).matches(own):
            notes.append(f"{name} was made with another model ({known['name'] or 'unnamed'}) than this one.")
    return notes


# ---------------------------------------------------------------- steer


def steer_job(
    model: HookedModel,
    direction: Direction,
    prompts: Sequence[RenderedPrompt],
    behaviour: str | Behaviour,
    settings: SteerSettings,
    *,
    out: str | Path,
    name: str = "",
    progress: bool = True,
) -> Sweep:
    """Sweep strengths and layers beside random controls, and write a report.

    Each layer has a folder of its own in `out` and is read back by the same call; `out` gets all of them in
    result.json, and report.html.

    Args:
        model: either backend.
        direction: one layer's vector is tried at every layer of the settings; of several, each at its own.
        prompts: without responses.
        behaviour: what is measured on the answers.
        settings: strengths, layers, controls.
        out: folder.
        name: of the model, for the report.
        progress: say what is done, and show progress bars.

    Raises:
        LensError: what `steer` raises, or a folder with a sweep of another run.
    """
    out, measure, own = Path(out), get_behaviour(behaviour), identify(model, name)
    direction.check(model)
    layers = direction.layers if settings.layers is None else check_layers(settings.layers, shape_of(model).n_layers)
    chosen = [moved_to(direction, layer) for layer in layers]
    facts = {key: value for key, value in asdict(settings).items() if key not in ("layers", "batch_size")}
    identity = {"settings": facts, "behaviour": measure.name, "prompts": ids_hash(prompts), **facts_of(model)}
    sizes = {key: None if given is None else sorted({0.0, *given})
             for key, given in (("strengths", settings.strengths), ("fractions", settings.fractions))}  # fmt: skip
    options = {key: facts[key] for key in ("n_random", "seed", "max_new_tokens")}
    options |= sizes | {"batch_size": settings.batch_size, "progress": progress}
    parts: list[Sweep] = []
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        runs = [
            stack.enter_context(
                Run.open(
                    out / f"layer_{part.layers[0]:03d}",
                    "steer",
                    identity | {"direction": solution_hash(part)},
                    models={"model": own},
                )
            )
            for part in chosen
        ]
        for part, run in zip(chosen, runs, strict=True):
            done = run.result(Sweep.load)
            if progress:
                say(f"steering at layer {part.layers[0]}" + ("" if done is None else ": already there"))
            parts.append(
                run.finish(steer(model, part, prompts, behaviour=measure, **options)) if done is None else done
            )
        joined = _joined(parts)
        joined.save(out / RESULT)
        notes = _curve_notes({"The direction": direction}, own)
        card = run_card(model, name, prompts, asdict(settings))
        card |= {"direction": repr(direction), "behaviour": measure.name}
        steer_report(out / "report.html", joined, prompts, card, notes)
    return joined


def _joined(parts: Sequence[Sweep]) -> Sweep:
    points = tuple(point for part in parts for point in part.points)
    answers = tuple(texts for part in parts for texts in part.answers)
    return replace(parts[0], points=points, answers=answers)
