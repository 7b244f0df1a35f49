"""Show an audit to a person: the terminal's table and verdict, and the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.figures.monitor_plot import monitor_figure
from piggyback_lens.figures.plot_style import axis_title
from piggyback_lens.jobs.auditing import AuditResult, check_identity
from piggyback_lens.jobs.report import write_report
from piggyback_lens.maths import percent

if TYPE_CHECKING:
    import pandas as pd

    from piggyback_lens.finetuning.training import TrainResult

WATCHED = (
    "The training, watched on off-topic prompts that are not used elsewhere: how much more probable an answer that "
    "shows the behaviour has become, against the base's own answer; how much of that goes away when the base's prefix "
    "keys and values are put in; and how far those of each layer have moved (TReFT's measure)."
)
EXAMPLES = 12
"""Off-topic and on-topic prompts whose answers the report shows."""


def present(
    result: AuditResult,
    out: str | Path,
    trained: "TrainResult | None" = None,
    watched: "pd.DataFrame | None" = None,
) -> Path:
    """Print the table and the verdict, and write the report into `out`."""
    from rich.console import Console

    path = report(result, out, trained, watched)
    console = Console()
    console.print(table(result))
    same, total = identity = check_identity(result)
    if same < total:
        console.print(f"identity control: only {identity[0]} of {total} answers equal the finetuned model's")
    console.print(result.verdict, style="bold", highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return path


def table(result: AuditResult) -> Any:
    """The summary as a rich table."""
    from rich.table import Table

    shown = Table(title=f"{result.behaviour.label} (mean [95 % interval])", title_justify="left")
    for name, justify in (
        ("", "left"),
        ("condition", "left"),
        ("n", "right"),
        ("value", "right"),
        ("recovery", "right"),
    ):
        shown.add_column(name, justify=justify, no_wrap=name != "condition")  # type: ignore[arg-type]
    before = None
    for row in result.to_frame().to_dict("records"):
        if before not in (None, row["topic"]):
            shown.add_section()
        topic = row["topic"] if row["topic"] != before else ""
        before = row["topic"]
        value = f"{row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
        shown.add_row(topic, row["condition_label"], str(row["n"]), value, _recovery(row))
    return shown


def _recovery(row: Mapping[Any, Any]) -> str:
    if row["condition"] in ("base", "finetuned"):
        return ""
    return percent(row["recovery"], row["recovery_low"], row["recovery_high"])


def report(
    result: AuditResult,
    out: str | Path,
    trained: "TrainResult | None" = None,
    watched: "pd.DataFrame | None" = None,
) -> Path:
    """Write `report.html` into `out`: verdict, table, figures, answers side by side, prompt, run card.

    Args:
        result: what was found.
        out: the folder.
        trained: how the finetuned model was trained, for the curve of its loss.
        watched: rows of the training's `Monitor`.
    """
    figures = [("Every condition: mean with its bootstrap interval over prompts.", result.figure())]
    if result.curve is not None:
        figures.append(
            (
                "The prefix's residual stream of the other model, patched in at one layer at a time. Recovery of "
                "log p(finetuned's answer) - log p(base's answer), per token.",
                result.curve.figure(),
            )
        )
    if trained is not None:
        figures.append(("Training loss on response tokens.", trained.figure()))
    if watched is not None:
        figures.append((WATCHED, monitor_figure(watched)))
    frame = result.generations()
    notes = list(result.card["notes"])
    same, total = check_identity(result)
    notes.append(f"Identity control: {same} of {total} answers are token for token those of the finetuned model.")
    reasons = result.to_frame().query("reason != ''")
    notes += [f"{row.topic}, {row.condition_label}: recovery undefined, {row.reason}" for row in reasons.itertuples()]
    return write_report(
        Path(out) / "report.html",
        title=f"Piggyback audit: {result.card['names']['finetuned']} on {result.card['names']['base']}",
        verdict=result.verdict,
        summary=result.to_frame(),
        figures=figures,
        examples=frame[frame["index"] < EXAMPLES],
        prompt_html=result.prompt_html,
        card=result.card,
        notes=notes,
        measure=axis_title(result.behaviour.label, result.behaviour.unit),
    )
