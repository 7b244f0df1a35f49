"""The job `map`: several patching experiments on the contrast of the models' own answers, and one report."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import own_contrast
from piggyback_lens.experiments.attribution import attribution_map
from piggyback_lens.experiments.cells import require_one_prefix
from piggyback_lens.experiments.edges import edge_map
from piggyback_lens.experiments.experiment import prompt_facts
from piggyback_lens.experiments.patching import (
    carrier_map,
    layer_curve,
    layer_head_map,
    layer_position_map,
    patch_span,
)
from piggyback_lens.intervals import require_enough
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import say_stage, shows
from piggyback_lens.results.collection import Collection
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import Run, report_run
from piggyback_lens.settings import MapSettings, PatchSettings
from piggyback_lens.words import MapKind

EXAMPLES = 12
"""Prompts whose answers the report shows."""


@shows("map")
def run_maps(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    settings: MapSettings = MapSettings(),
    *,
    executor: Executor | None = None,
    out: str | Path,
    progress: bool | str = True,
) -> Collection:
    """Run the chosen experiments on the contrast of the models' own answers, and write a report.

    Each experiment has a folder of its own in `out` and continues there; `out` gets the answers, result.json and
    report.html. Further kinds can be asked of the same folder later.

    Args:
        pair: base and finetuned.
        prompts: rendered, without a response, all with the same prefix.
        settings: which experiments, and on what.
        executor: runs the passes of cells as jobs; None for this process. The pair then has to be loaded from names.
        out: folder of the run.
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: what the experiments raise, or a folder that holds maps of other prompts.
    """
    require_enough(len(prompts))
    _check_kinds(settings, prompts)
    facts = prompt_facts(pair, prompts) | {"answer_tokens": settings.answer_tokens}
    with Run.open(out, "map", facts, models=pair.identities(), prompt=prompts[0]) as run:
        if progress and not (Path(out) / "answers.json").exists():
            say_stage(f"both models answer {len(prompts)} prompts")
        measure = own_contrast(run, pair, prompts, tokens=settings.answer_tokens)
        options: dict[str, Any] = {"measure": measure}
        options["settings"] = PatchSettings(
            seed=settings.seed,
            budget_gb=settings.budget_gb,
            cells_per_pass=settings.cells_per_pass,
            executor=executor,
        )
        found: dict[str, Result] = {}
        for kind in settings.kinds:
            if progress:
                say_stage(kind)
            own = options | {"out": Path(out) / kind, "progress": kind}
            found[kind] = _experiment(kind, pair, prompts, settings, own)
        examples = tuple(
            {"prompt": prompt.query, "condition": side, **_answer(row)}
            for i, prompt in enumerate(prompts[:EXAMPLES])
            for side, row in (("base", measure.against[i]), ("finetuned", measure.towards[i]))
        )
        title = f"Piggyback map: {pair.names['finetuned']} on {pair.names['base']}"
        result = run.finish(Collection(found, title, examples))
    report_run(out)
    return result


def _answer(row: RenderedPrompt) -> dict[str, str]:
    """The answer as people read it, and whether it is whole."""
    ids = row.ids[row.n_prompt :]
    ended = "stop" if ids[-1] in row.answer.stop_ids else "length"
    return {"response": row.tokenizer.decode(ids, skip_special_tokens=True), "ended": ended}


def _check_kinds(settings: MapSettings, prompts: Sequence[RenderedPrompt]) -> None:
    """Refuse what one of the kinds could not run, before the first of them has run for an hour.

    Raises:
        LensError: a span that a prompt does not have, or that differs in length where a map needs it equal.
    """
    lengths = {len(prompt.span(settings.span)) for prompt in prompts}
    level = [kind for kind in settings.kinds if kind in ("positions", "attribution")]
    if level and len(lengths) > 1:
        raise LensError(
            f"span {settings.span!r} has {min(lengths)} to {max(lengths)} tokens in these prompts, and kind {level[0]} "
            "needs equally many: leave it out, or choose another span"
        )
    require_one_prefix(prompts)


def _experiment(
    kind: MapKind, pair: ModelPair, prompts: Sequence[RenderedPrompt], settings: MapSettings, options: dict[str, Any]
) -> Result:
    span, sites, flow = settings.span, tuple(settings.sites), settings.flow
    experiments: dict[MapKind, Callable[[], Result]] = {
        "span": lambda: patch_span(pair, prompts, span, sites, flow=flow, **options),
        "carrier": lambda: carrier_map(pair, prompts, **options),
        "layers": lambda: layer_curve(pair, prompts, span=span, sites=sites, flow=flow, **options),
        "positions": lambda: layer_position_map(pair, prompts, span=span, sites=sites, flow=flow, **options),
        "heads": lambda: layer_head_map(pair, prompts, span=span, sites=sites, flow=flow, **options),
        "attribution": lambda: attribution_map(pair, prompts, span=span, sites=sites, flow=flow, **options),
        "edges": lambda: edge_map(pair, prompts, **options),
    }
    return experiments[kind]()
