"""What the jobs on directions say in one sentence, and their reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.directions.curve_points import Curve, Kind
from piggyback_lens.directions.sweeps import RANDOM, Sweep
from piggyback_lens.figures.direction_plots import curve_figure
from piggyback_lens.figures.plot_style import plot_text
from piggyback_lens.finetuning.training import TrainResult
from piggyback_lens.jobs.report import write_report
from piggyback_lens.maths import interval_text
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.direction import Direction

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CURVE_CAPTIONS: Mapping[Kind, str] = {
    "efficiency": "loss on the conversations against the norm, beside random vectors or adapters of that norm.",
    "stability": "how much of the gain orthogonal noise takes away: 0 = the solution, 1 = the base.",
    "significance": "KL to the base on plain text against the norm, beside random ones of that norm.",
    "ablation": "what taking the direction out of the residual stream costs on plain text.",
}
SHOWN_PROMPTS = 4
"""Prompts whose answers the report of a sweep shows."""
SHOWN_MAXIMA = 5
"""Tokens of largest KL per solution in the report."""


# ---------------------------------------------------------------- train


def train_verdict(
    solution: Adapter, kl: float | None, interleaved: float, trained: TrainResult, scores: "pd.DataFrame"
) -> str:
    """What was trained, its norm, its loss, and its KL on the retain data."""
    kind = "General" if kl is None and not interleaved else "Narrow"
    means = [f"KL weight {kl:g}"] if kl is not None else []
    means += [f"{100 * interleaved:g} % retain data mixed in"] if interleaved else []
    how = f" ({', '.join(means)})" if means else ""
    rows = {row["data"]: row for row in scores.to_dict("records")}
    parts = []
    for title in ("training data", "validation data"):
        if title in rows:
            row = rows[title]
            after = interval_text(row["loss"], row["loss_low"], row["loss_high"])
            parts.append(f"loss on the {title} {row['base_loss']:.2f} -> {after} nats per token (n = {row['n']})")
    title = "retain data" if "retain data" in rows else "training data"
    row = rows[title]
    parts.append(f"KL(base ‖ tuned) on the {title} {interval_text(row['kl'], row['kl_low'], row['kl_high'])}")
    steps = len(trained.history)
    return f"{kind} {_described(solution)}{how}, norm {solution.norm():.3g} after {steps} steps: {'; '.join(parts)}."


def _described(solution: Adapter) -> str:
    layers = list(solution.layers)
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
    if isinstance(solution, Direction):
        return f"steering vector at {solution.site} of {where}"
    return f"rank-{solution.rank} adapter on {', '.join(solution.modules)} of {where}"


def train_report(
    path: Path,
    verdict: str,
    trained: TrainResult,
    scores: "pd.DataFrame",
    answers: "pd.DataFrame",
    example: RenderedPrompt,
    card: Mapping[str, Any],
) -> Path:
    """Scores, history, and a few answers side by side."""
    history = trained.figure()
    notes = ["Losses and KL are means over tokens, with 95 % bootstrap intervals over conversations."]
    return write_report(
        path,
        title=f"Trained direction: {card['model'] or 'model'}",
        verdict=verdict,
        summary=scores,
        figures=[("Loss and its terms, norm, gradient and learning rate over the steps.", history)],
        examples=answers,
        prompt_html=example.show()._repr_html_(),
        card=card,
        notes=notes,
    )


# ---------------------------------------------------------------- curves


def at_equal_norms(curves: Mapping[Kind, Curve], solutions: Mapping[str, Adapter]) -> dict[Kind, "pd.DataFrame"]:
    """First minus second solution at equal norms, where there are exactly two of one kind."""
    kinds = {isinstance(solution, LoRAAdapter) for solution in solutions.values()}
    if len(solutions) != 2 or len(kinds) > 1:
        return {}
    by_norm: tuple[Kind, ...] = ("efficiency", "significance")
    return {kind: curves[kind].difference(*solutions) for kind in by_norm if kind in curves}


def curves_verdict(curves: Mapping[Kind, Curve], names: Sequence[str]) -> str:
    """One clause per curve: the solutions at their own norm, at half noise, or where ablating them costs most."""
    return "; ".join(_clause(kind, curve, names) for kind, curve in curves.items()) + "."


def _clause(kind: Kind, curve: Curve, names: Sequence[str]) -> str:
    frame = curve.to_frame()
    parts = []
    for name in names:
        own = _at(kind, frame[frame["series"] == name])
        text = f"{name} {interval_text(own['value'], own['low'], own['high'])}"
        control = frame[(frame["series"] == f"{name}, random control") & (frame["x"] == own["x"])]
        parts.append(text + (f" (random {float(control.iloc[0]['value']):.3g})" if len(control) else ""))
    heads: dict[Kind, str] = {
        "efficiency": "loss at about the own norm",
        "stability": f"share of the gain lost at ε = {_half(frame):g}",
        "significance": "KL on plain text at about the own norm",
        "ablation": "largest change of the loss when ablated",
    }
    return f"{heads[kind]}: {', '.join(parts)}"


def _at(kind: Kind, own: "pd.DataFrame") -> Any:
    """The row of a solution that the verdict gives."""
    if kind == "ablation":
        return own.iloc[int(own["value"].abs().argmax())]
    if kind == "stability":
        return own.iloc[int((own["x"] - _half(own)).abs().argmin())]
    return own.iloc[int((own["fraction"].astype(float) - 1).abs().argmin())]


def _half(frame: "pd.DataFrame") -> float:
    return float(min(frame["x"].unique(), key=lambda x: abs(x - 0.5)))


def curves_report(
    path: Path,
    verdict: str,
    curves: Mapping[Kind, Curve],
    differences: Mapping[Kind, "pd.DataFrame"],
    prompts: Sequence[RenderedPrompt],
    card: Mapping[str, Any],
    notes: Sequence[str],
) -> Path:
    """Every curve, the differences, and the tokens of largest KL."""
    import pandas as pd

    figures: list[tuple[str, go.Figure]] = []
    said, tables = list(notes), []
    for kind, curve in curves.items():
        figures.append((CURVE_CAPTIONS[kind], curve.figure()))
        frame = curve.to_frame()
        tables.append(frame.assign(curve=kind))
        if kind in differences:
            figures.append(("The difference at equal norms, paired over texts.", _gap(curve, differences[kind])))
        said += [f"{kind}, {row['series']} at {row['x']:g}: {row['reason']}" for row in _undefined(frame)]
        said += _largest(curve)
    columns = ["curve", "series", "x", "value", "low", "high", "n", "seeds", "seed_sd"]
    return write_report(
        path,
        title=f"Curves of {', '.join(card['solutions'])} on {card['model'] or 'model'}",
        verdict=verdict,
        summary=pd.concat(tables, ignore_index=True)[columns],
        figures=figures,
        examples=pd.DataFrame(),
        prompt_html=prompts[0].show()._repr_html_() if prompts else None,
        card=card,
        notes=said,
    )


def _gap(curve: Curve, frame: "pd.DataFrame") -> "go.Figure":
    label = f"difference in {curve.y_label}"
    figure: go.Figure = curve_figure(frame.assign(seeds=1), curve.kind, curve.x_label, label)
    title = f"{curve.kind.capitalize()}: {frame['series'].iloc[0]} at equal norms"
    figure.update_layout(title_text=plot_text(title), title_subtitle_text="band: 95 % bootstrap interval over texts")
    figure.add_hline(y=0, line={"color": "#777777", "width": 1})
    return figure


def _undefined(frame: "pd.DataFrame") -> list[dict[Any, Any]]:
    return list(frame[frame["reason"] != ""].to_dict("records"))


def _largest(curve: Curve) -> list[str]:
    """The tokens of largest KL, one line each."""
    lines, counts = [], dict.fromkeys(curve.series, 0)
    for row in curve.maxima:
        counts[row["series"]] += 1
        if counts[row["series"]] <= SHOWN_MAXIMA:
            where = f"{row['token']!r} after {row['before']!r}"
            lines.append(f"Largest KL of {row['series']} at norm {row['norm']:.3g}: {row['kl']:.3g} nats at {where}.")
    return lines


# ---------------------------------------------------------------- steer


def steer_report(
    path: Path,
    sweep: Sweep,
    prompts: Sequence[RenderedPrompt],
    card: Mapping[str, Any],
    notes: Sequence[str],
) -> Path:
    """The sweep with its controls, and answers at every strength of the layer that moves the behaviour most."""
    return write_report(
        path,
        title=f"Steering {card['model'] or 'a model'}: {sweep.measure['label']}",
        verdict=sweep.verdict,
        summary=sweep.to_frame(),
        figures=[("Behaviour, KL to the unsteered model, and perplexity, beside random vectors.", sweep.figure())],
        examples=_answers(sweep, prompts),
        prompt_html=prompts[0].show()._repr_html_(),
        card=card,
        notes=[*notes, f"Answers are those at layer {sweep.strongest_layer}."],
    )


def _answers(sweep: Sweep, prompts: Sequence[RenderedPrompt]) -> "pd.DataFrame":
    """A few prompts x strengths at one layer, and one random control at the largest strength."""
    import pandas as pd

    layer = sweep.strongest_layer
    largest = max(abs(point.x) for point in sweep.points if point.layer == layer)
    rows = []
    for number, prompt in enumerate(prompts[:SHOWN_PROMPTS]):
        for point, texts in zip(sweep.points, sweep.answers, strict=True):
            control = point.seed == 0 and abs(point.x) == largest
            if point.layer == layer and (point.seed is None or control):
                condition = f"strength {point.x:g}" if point.seed is None else f"{RANDOM}, strength {point.x:g}"
                rows.append({"prompt": prompt.query, "condition": condition, "response": texts[number]})
    return pd.DataFrame(rows)
