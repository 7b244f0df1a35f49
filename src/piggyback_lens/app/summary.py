"""Show an audit on a terminal: the table, the verdict, and where the report is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piggyback_lens.errors import visible
from piggyback_lens.experiments.audit import AuditResult
from piggyback_lens.intervals import percent


def show(result: AuditResult, out: str | Path) -> None:
    """Print the table and the verdict."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(table(result))
    same, total = result.identical
    if same < total:
        console.print(f"identity control: only {same} of {total} answers equal the finetuned model's")
    console.print(Text(visible(result.verdict), style="bold"))
    console.print(Text(visible(f"report: {Path(out) / 'report.html'}")), soft_wrap=True)


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
        value = f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
        shown.add_row(*map(Text, (topic, row["condition_label"], str(row["n"]), value, _recovery(row))))
    return shown


def _recovery(row: Mapping[Any, Any]) -> str:
    if row["condition"] in ("base", "finetuned"):
        return ""
    return percent(row["recovery"], row["recovery_low"], row["recovery_high"])
