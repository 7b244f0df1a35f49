"""Show an audit to a person: the terminal's table and verdict, and the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.errors import visible
from piggyback_lens.jobs.auditing import AuditResult, check_identity, report
from piggyback_lens.maths import percent

if TYPE_CHECKING:
    import pandas as pd

    from piggyback_lens.finetuning.training import TrainResult


def present(
    result: AuditResult,
    out: str | Path,
    trained: "TrainResult | None" = None,
    watched: "pd.DataFrame | None" = None,
) -> Path:
    """Print the table and the verdict, and write the report into `out`."""
    from rich.console import Console
    from rich.text import Text

    path = Path(out) / "report.html"
    if trained is not None or watched is not None:  # else the audit has written it
        path = report(result, out, trained, watched)
    console = Console()
    console.print(table(result))
    same, total = identity = check_identity(result)
    if same < total:
        console.print(f"identity control: only {identity[0]} of {total} answers equal the finetuned model's")
    console.print(Text(visible(result.verdict), style="bold"))
    console.print(Text(visible(f"report: {path}")), soft_wrap=True)
    return path


def table(result: AuditResult) -> Any:
    """The summary as a rich table."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{visible(result.behaviour.label)} (mean [95 % interval])")
    shown = Table(title=title, title_justify="left")
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
        shown.add_row(*map(Text, (topic, row["condition_label"], str(row["n"]), value, _recovery(row))))
    return shown


def _recovery(row: Mapping[Any, Any]) -> str:
    if row["condition"] in ("base", "finetuned"):
        return ""
    return percent(row["recovery"], row["recovery_low"], row["recovery_high"])
