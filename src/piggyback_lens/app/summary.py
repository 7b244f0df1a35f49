"""Show an audit on a terminal: the table, the verdict, and where the report is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piggyback_lens.errors import visible
from piggyback_lens.experiments.audit import AuditResult
from piggyback_lens.experiments.audit_maps import compared, forced_text
from piggyback_lens.intervals import percent

TO_TRY = (
    "your own pair      piggyback-lens audit BASE --adapter ADAPTER --on-topic FILE --off-topic FILE --behaviour words",
    "the exact map      piggyback-lens map demo --adapter {out}/organism/adapter --prompts FILE --kinds positions",
    "another behaviour  piggyback-lens demo --task refusal --out refusal_out",
)
"""What a demonstration's reader may do next."""
TOPIC_WIDTH = 10
"""Longer topics (those of dresses) are broken, so that the conditions keep their room on 80 characters."""


def show(result: AuditResult, out: str | Path, *, to_try: Sequence[str] = ()) -> None:
    """Print the table, what carries the change by both measures, the verdict, where the report is, and what to try."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(table(result))
    same, total = result.identical
    if same < total:
        console.print(f"identity control: only {same} of {total} answers equal the finetuned model's")
    if result.carrier is not None:
        console.print(Text(visible(f"Teacher-forced contrast: {forced_text(result)}. {compared(result)}")))
    console.print(Text(visible(result.verdict), style="bold"))
    console.print(Text(visible(f"report: {Path(out) / 'report.html'}")), soft_wrap=True)
    for line in to_try:
        console.print(Text(visible(f"try: {line.format(out=out)}")), soft_wrap=True)


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
        width = None if name else TOPIC_WIDTH
        shown.add_column(name, justify=justify, no_wrap=name not in ("", "condition"), max_width=width)  # type: ignore[arg-type]
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
