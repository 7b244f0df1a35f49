"""The laboratory's jobs: `map`, `perturb` and `stress`, each into one folder with result.json and report.html."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from piggyback_lens.card import machine, peak_memory_gb, versions
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.answering import own_contrast
from piggyback_lens.experiments.attribution import AttributionResult, attribution_map
from piggyback_lens.experiments.cells import require_one_prefix
from piggyback_lens.experiments.experiment import prompt_facts
from piggyback_lens.experiments.patching import (
    RunOptions,
    carrier_map,
    layer_curve,
    layer_head_map,
    layer_position_map,
    patch_span,
)
from piggyback_lens.experiments.perturbation import PerturbResult
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.experiments.stress_suite import StressResult
from piggyback_lens.figures.result_plots import carrier_plane
from piggyback_lens.files import write_json
from piggyback_lens.interventions.donors import Direction, check_direction
from piggyback_lens.jobs.report import write_report
from piggyback_lens.maths import require_enough
from piggyback_lens.measuring.answers import AnswerContrast
from piggyback_lens.models.backends import SITES, Site
from piggyback_lens.models.pair import ModelPair
from piggyback_lens.progress import say
from piggyback_lens.results.run import RESULT, Run

if TYPE_CHECKING:
    import plotly.graph_objects as go

MapKind = Literal["span", "carrier", "layers", "positions", "heads", "attribution"]
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)
Found = PatchResult | AttributionResult

_CAPTIONS: dict[MapKind, str] = {
    "span": "The whole span patched at once.",
    "carrier": "Every span x layer band x site, in both directions, each with its controls.",
    "layers": "One layer at a time.",
    "positions": "Every layer x token, one cell at a time.",
    "heads": "Every layer x head, one cell at a time.",
    "attribution": "Every layer x token by gradient: a first-order estimate of the exact map.",
}


@dataclass(frozen=True)
class MapSettings:
    """What `map` runs.

    Attributes:
        kinds: which experiments, in order.
        span: of all but the carrier map.
        sites: patched together; of all but the carrier map.
        direction: of all but the carrier map.
        answer_tokens: tokens of the models' own answers that the contrast scores.
        seed: of the random controls and the bootstrap.
        budget_gb: memory for one pass beside the weights, in GB; None for 1, on a GPU for half of what is free.
    """

    kinds: tuple[MapKind, ...] = ("carrier", "layers", "attribution")
    span: str = "prefix"
    sites: tuple[Site, ...] = ("resid_pre",)
    direction: Direction = "repair"
    answer_tokens: int = 24
    seed: int = 0
    budget_gb: float | None = None

    def __post_init__(self) -> None:
        unknown = sorted({*self.kinds} - {*MAP_KINDS}) + sorted({*self.sites} - {*SITES})
        if unknown or not self.kinds or not self.sites:
            raise LensError(f"{unknown} is not known: kinds are {', '.join(MAP_KINDS)}; sites are {', '.join(SITES)}")
        check_direction(self.direction)
        keyed, read = {"k", "v", "rot_k"}, {"z", "q"}
        if "heads" in self.kinds and not (set(self.sites) <= keyed or set(self.sites) <= read):
            raise LensError(f"sites {'+'.join(self.sites)} have no heads of one kind: kind heads takes k+v, or z, q")
        if "attribution" in self.kinds and len(self.sites) > 1 and not set(self.sites) <= {"q", "k", "v"}:
            raise LensError(
                f"sites {'+'.join(self.sites)} lie behind one another, and gradients would count twice: "
                "kind attribution takes one site, or k+v"
            )


def run_maps(
    pair: ModelPair,
    prompts: Sequence[RenderedPrompt],
    settings: MapSettings = MapSettings(),
    *,
    out: str | Path,
    progress: bool = True,
) -> dict[MapKind, Found]:
    """Run the chosen experiments on the contrast of the models' own answers, and write a report.

    Each experiment has a folder of its own in `out` and continues there; `out` gets the answers, all maps in
    result.json, and report.html.

    Raises:
        LensError: what the experiments raise, or a folder that holds maps of other prompts.
    """
    require_enough(len(prompts))
    _check_kinds(settings, prompts)
    facts = prompt_facts(pair, prompts) | {"answer_tokens": settings.answer_tokens}
    with Run.open(out, "map", facts, models=pair.identities()) as run:
        folder = Path(out)
        if progress and not (folder / "answers.json").exists():
            say(f"both models answer {len(prompts)} prompts")
        measure = own_contrast(run, pair, prompts, tokens=settings.answer_tokens)
        found: dict[MapKind, Found] = {}
        for kind in settings.kinds:
            if progress:
                say(f"{kind}: {_CAPTIONS[kind].lower()}")
            options: RunOptions = {"measure": measure, "seed": settings.seed, "budget_gb": settings.budget_gb}
            options |= {"out": folder / kind, "progress": progress}
            found[kind] = _experiment(kind, pair, prompts, settings, options)
        maps = {kind: _patched(result).to_frame().to_dict("records") for kind, result in found.items()}
        card = run.card()
        write_json(folder / RESULT, {"verdict": map_verdict(found), "maps": maps, "card": card})
        _map_report(found, prompts, measure, card, folder)
    return found


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
    kind: MapKind, pair: ModelPair, prompts: Sequence[RenderedPrompt], settings: MapSettings, run: RunOptions
) -> Found:
    span, sites, direction = settings.span, settings.sites, settings.direction
    experiments: dict[MapKind, Callable[[], Found]] = {
        "span": lambda: patch_span(pair, prompts, span, sites, direction=direction, **run),
        "carrier": lambda: carrier_map(pair, prompts, **run),
        "layers": lambda: layer_curve(pair, prompts, span=span, sites=sites, direction=direction, **run),
        "positions": lambda: layer_position_map(pair, prompts, span=span, sites=sites, direction=direction, **run),
        "heads": lambda: layer_head_map(pair, prompts, span=span, sites=sites, direction=direction, **run),
        "attribution": lambda: attribution_map(pair, prompts, span=span, sites=sites, direction=direction, **run),
    }
    return experiments[kind]()


def map_verdict(found: Mapping[MapKind, Found]) -> str:
    """What a carrier map says of whole spans, and the strongest cell of every other map."""
    parts = []
    if "carrier" in found:
        frame = _patched(found["carrier"]).to_frame()
        whole = frame[(frame["band"] == "all layers") & (frame["series"] == "patched")]
        for direction, verb in (("repair", "restores"), ("infect", "carries over")):
            own = whole[whole["direction"] == direction].dropna(subset=["value"])
            if len(own):
                texts = [
                    f"{row.span} {row.sites} {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
                    for row in own.sort_values("value", ascending=False).itertuples()
                ]
                parts.append(f"{direction} {verb}, as a fraction of the contrast: {', '.join(texts)}.")
    order: tuple[MapKind, ...] = ("positions", "attribution", "heads", "layers", "span")
    parts += [f"{kind}: {found[kind].verdict}" for kind in order if kind in found]
    return " ".join(parts)


def _patched(result: Found) -> PatchResult:
    return result.attributed if isinstance(result, AttributionResult) else result


def _map_report(
    found: Mapping[MapKind, Found],
    prompts: Sequence[RenderedPrompt],
    measure: AnswerContrast,
    card: Mapping[str, Any],
    out: Path,
) -> Path:
    import pandas as pd

    figures: list[tuple[str, go.Figure]] = []
    notes = []
    for kind, result in found.items():
        figures.append((_CAPTIONS[kind], result.figure()))
        if isinstance(result, AttributionResult):
            if result.exact is not None:
                figures.append(("The cells of the attribution map that were run exactly.", result.check_figure()))
            notes.append(f"Attribution: Spearman rank correlation with exact patches {result.rank_correlation:.2f}.")
            continue
        notes.append(f"{kind}: identity controls move the measure by at most {result.noise_floor:.1e} of the gap.")
        if result.kind == "carrier":
            figures.append(("Necessity against sufficiency.", carrier_plane(result)))
    tops = [_patched(result).top(8).assign(map=kind) for kind, result in found.items()]
    columns = ["map", "direction", "span", "sites", "band", "layer", "token", "label", "value", "low", "high", "n"]
    top = pd.concat(tops, ignore_index=True)
    examples = [
        {"prompt": prompt.query, "condition": side, "response": row.span_text("response")}
        for i, prompt in enumerate(prompts[:12])
        for side, row in (("base", measure.against[i]), ("finetuned", measure.towards[i]))
    ]
    return write_report(
        out / "report.html",
        title=f"Piggyback map: {card['names']['finetuned']} on {card['names']['base']}",
        verdict=map_verdict(found),
        summary=top[[name for name in columns if name in top]],
        figures=figures,
        examples=pd.DataFrame(examples),
        prompt_html=prompts[0].show()._repr_html_(),
        card=card,
        notes=notes,
    )


def write_generated(
    result: PerturbResult | StressResult, prompts: Iterable[RenderedPrompt], pair: ModelPair, out: str | Path
) -> Path:
    """The report of a perturbation or a stress suite, beside its result."""
    out, prompts = Path(out), list(prompts)
    card = _card(pair, prompts, result.settings)
    rows = result.generations()
    label = "variant" if isinstance(result, StressResult) else "kind"
    names = [name for name in ("side", "span", label) if name in rows]
    rows = rows.assign(condition=rows[names].astype(str).agg(" ".join, axis=1).str.strip())
    if "trial" in rows:
        rows = rows[rows["trial"] == 0]
    skipped = result.skipped if isinstance(result, StressResult) else {}
    return write_report(
        out / "report.html",
        title=f"Piggyback {'stress' if isinstance(result, StressResult) else 'perturbation'}: "
        f"{card['names']['finetuned']}",
        verdict=result.verdict,
        summary=result.to_frame(),
        figures=[("Mean with its bootstrap interval over prompts.", result.figure())],
        examples=rows[rows["index"] < 4],
        prompt_html=prompts[0].show()._repr_html_(),
        card=card,
        notes=[f"not run: {name}: {reason}" for name, reason in skipped.items()],
    )


def _card(pair: ModelPair, prompts: Sequence[RenderedPrompt], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "names": dict(pair.names),
        "n": len(prompts),
        "fingerprint": prompts[0].fingerprint,
        "backend": pair.backend,
        "settings": dict(settings),
        "versions": versions(),
        "machine": machine(),
        "peak_memory_gb": peak_memory_gb(),
    }
