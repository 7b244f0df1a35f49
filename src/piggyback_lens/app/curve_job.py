"""The job `curves`: several curves of the same solutions, and one report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from piggyback_lens.app.inputs import as_direction
from piggyback_lens.conversations.batch import ids_hash
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.directions.curve_points import Curve
from piggyback_lens.directions.curves import ablation_cost, efficiency, significance, stability
from piggyback_lens.directions.kept import solution_hash
from piggyback_lens.measuring.variants import Text, texts_hash
from piggyback_lens.models.backends import HookedModel, facts_of
from piggyback_lens.models.pair import Identity, identify
from piggyback_lens.progress import say_stage, shows
from piggyback_lens.results.collection import Collection
from piggyback_lens.results.run import Run, report_run
from piggyback_lens.settings import CurveSettings
from piggyback_lens.vectors.adapters import Adapter
from piggyback_lens.vectors.direction import Direction
from piggyback_lens.words import CurveKind


@shows("curves")
def draw_curves(
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    prompts: Sequence[RenderedPrompt],
    texts: Sequence[Text],
    kinds: Sequence[CurveKind],
    settings: CurveSettings = CurveSettings(),
    *,
    out: str | Path,
    tokenizer: Any = None,
) -> Collection:
    """Draw the chosen curves of some solutions, each in a folder of its own in `out`, and write a report.

    A curve that `out` has already, of the same solutions, data, model and settings, is read back. Further kinds can be
    asked of the same folder later.

    Args:
        model: either backend, without the solutions.
        solutions: by name.
        prompts: conversations with responses, for efficiency and stability.
        texts: plain text, for significance and ablation.
        kinds: which curves, in order.
        settings: how they are drawn.
        out: folder of the run.
        tokenizer: shows the tokens of largest KL as text.

    Raises:
        LensError: what the curves raise, or a folder with curves of another run.
    """
    for solution in solutions.values():
        if isinstance(solution, Direction):
            solution.check(model)
    own = identify(model)
    identity: dict[str, Any] = {"solutions": {name: solution_hash(solution) for name, solution in solutions.items()}}
    identity |= {"prompts": ids_hash(prompts), "texts": texts_hash(texts), **facts_of(model)}
    first = prompts[0] if prompts else None
    with Run.open(out, "curves", identity, models={"model": own}, prompt=first) as run:
        curves: dict[CurveKind, Curve] = {}
        # Those that are there come first, so that one of another run is refused before any is drawn.
        for kind in sorted(kinds, key=lambda kind: not (Path(out) / kind).exists()):
            say_stage(kind)
            more = {"tokenizer": tokenizer} if kind == "significance" else {}
            draw = _maker(kind, model, solutions, prompts, texts, settings)
            curves[kind] = draw(out=Path(out) / kind, progress=str(kind), **more)
        title = f"Curves of {', '.join(solutions)}"
        parts = {str(kind): curves[kind] for kind in kinds}
        result = run.finish(Collection(dict(parts), title, notes=_foreign(solutions, own)))
    report_run(out)
    return result


def _maker(
    kind: CurveKind,
    model: HookedModel,
    solutions: Mapping[str, Adapter],
    prompts: Sequence[RenderedPrompt],
    texts: Sequence[Text],
    settings: CurveSettings,
) -> Callable[..., Curve]:
    def ablated(**options: Any) -> Curve:
        return ablation_cost(model, {n: as_direction(s) for n, s in solutions.items()}, texts, settings, **options)

    makers: dict[CurveKind, Callable[..., Curve]] = {
        "efficiency": lambda **options: efficiency(model, solutions, prompts, settings, **options),
        "stability": lambda **options: stability(model, solutions, prompts, settings, **options),
        "significance": lambda **options: significance(model, solutions, texts, settings, **options),
        "ablation": ablated,
    }
    return makers[kind]


def _foreign(solutions: Mapping[str, Adapter], own: Identity) -> tuple[str, ...]:
    """Solutions that say that they were made with another model."""
    notes = []
    for name, solution in solutions.items():
        known = solution.provenance.model if solution.provenance is not None else None
        if known is not None and not Identity.from_dict(known).matches(own):
            notes.append(f"{name} was made with another model ({known['name'] or 'unnamed'}) than this one.")
    return tuple(notes)
