"""The command `piggyback-lens compare`: finetuning methods on equal terms, with a report.

Heavy libraries are imported inside the command.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from piggyback_lens.commands.cli_options import BaseArgument, DebugOption, OfflineOption, OutOption, tell
from piggyback_lens.errors import LensError

if TYPE_CHECKING:
    from piggyback_lens.comparisons.comparison import Comparison

T = TypeVar("T", int, float)


class EngineName(StrEnum):
    """Where cells run."""

    here = "here"
    local = "local"
    ray = "ray"


class SplitName(StrEnum):
    """Which prompts are measured."""

    validation = "validation"
    test = "test"


def compare(
    base: BaseArgument = "demo",
    task: Annotated[str, typer.Option(help="terse, refusal, abstain or tool.")] = "terse",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="sft, treft, kl_train, kl_retain, interleave or preventive, with settings: treft:lambda=1,10,30, "
            "treft:lambda=30:span=postfix, kl_retain:lambda=1+interleave:rate=0.2, sft:lr=5e-5; repeatable."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Joined by commas.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of all methods that have none of their own.")] = 1e-4,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapters.")] = 8,
    share: Annotated[str, typer.Option(help="Percent of narrow examples, joined by commas: 1 to 100.")] = "100",
    size: Annotated[str, typer.Option(help="Training conversations, joined by commas; default all.")] = "",
    epochs: Annotated[str, typer.Option(help="Instead of --steps, joined by commas.")] = "",
    system: Annotated[
        list[str] | None, typer.Option(help="System prompt; 'default' or 'none'; repeatable for a comparison.")
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Prompts that are measured.")] = SplitName.test,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts on-topic, and as many off-topic.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 48,
    engine: Annotated[EngineName, typer.Option(help="This process, local processes, or a Ray cluster.")] = (
        EngineName.here
    ),
    workers: Annotated[int, typer.Option(min=1, help="Processes of the local engine.")] = 1,
    gpus_per_cell: Annotated[float, typer.Option(min=0, help="GPUs that Ray reserves for a cell.")] = 0.0,
    minutes: Annotated[float | None, typer.Option(help="Begin no further cell after so many.")] = None,
    out: OutOption = Path("compare_out"),
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare finetuning methods on equal terms: what they keep on-topic, and what spreads off-topic."""
    from piggyback_lens.comparisons.comparing import as_methods, compare_methods
    from piggyback_lens.finetuning.trainables import LoRASettings
    from piggyback_lens.finetuning.training import TrainSettings
    from piggyback_lens.tasks import load_task

    # Cheap checks first: a typo must not cost a model load.
    methods = as_methods(method or ["sft", "treft:lambda=1,10,30"])
    axes: dict[str, Any] = {
        "seeds": _numbers("seeds", seeds, int),
        "shares": [percent / 100 for percent in _numbers("share", share, float)],
        "sizes": _numbers("size", size, int) or [None],
        "epochs": _numbers("epochs", epochs, float) or [None],
        "systems": [None if text == "none" else text for text in system or ["default"]],
    }
    training = TrainSettings(steps=steps, batch_size=batch, learning_rate=lr)
    settings: dict[str, Any] = {"training": training, "split": split.value}
    settings |= {"lora": LoRASettings(rank=rank, alpha=2.0 * rank), "n_prompts": n, "max_new_tokens": max_new_tokens}
    chosen = load_task(task)
    with _executor(engine, workers, gpus_per_cell) as executor:
        found = compare_methods(
            base, chosen, methods, out=out, **axes, **settings, minutes=minutes, executor=executor, offline=offline
        )
    path = write_comparison_report(found, out)
    tell(found.verdict, ("report", path))


def _executor(engine: EngineName, workers: int, gpus: float) -> Any:
    """A context manager that gives the executor, or None for this process."""
    from contextlib import nullcontext

    from piggyback_lens.comparisons import engines

    if engine == EngineName.here:
        if workers > 1:
            raise LensError(f"--workers {workers} needs processes: add --engine local")
        return nullcontext()
    return engines.local(workers) if engine == EngineName.local else engines.ray(num_gpus_per_cell=gpus)


def _numbers(name: str, text: str, kind: type[T]) -> list[T]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise LensError(f"--{name} is {text!r}: give {what} joined by commas, e.g. 1,2,3") from None


def write_comparison_report(found: "Comparison", out: str | Path) -> Path:
    """`report.html` in `out`: verdict, table, figures, answers side by side, card."""
    import pandas as pd

    from piggyback_lens.jobs.report import write_report
    from piggyback_lens.maths import interval_text

    table = found.table()
    shown = table[["method", *found.varied, "seeds", "n"]].copy()
    shown["seeds"] = [", ".join(map(str, seeds)) for seeds in table["seeds"]]
    for name in ("on", "off", "kept", "recovered", "kl", "perplexity_change"):
        rows = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
        shown[name] = [interval_text(*row) for row in rows]
    for topic in ("on", "off"):
        shown[f"{topic}, seeds"] = [", ".join(f"{value:.3g}" for value in row) for row in table[f"{topic}_seeds"]]
    first = [cell for cell in found.cells if cell["cell"]["seed"] == found.cells[0]["cell"]["seed"]]
    examples = [
        {"topic": f"{topic}-topic", "prompt": prompt, "condition": name, "response": answer}
        for topic in ("off", "on")
        for name, rows in [*(("base", base) for base in found.bases.values()), *((c["label"], c) for c in first)]
        for prompt, answer in list(zip(rows[topic]["prompts"], rows[topic]["answers"], strict=True))[:4]
    ]
    label, unit = found.behaviour.label, found.behaviour.unit
    asked, finished = found.card["asked"], found.card["finished"]
    notes = [f"{asked - finished} of {asked} cells are not finished: the same command continues"]
    notes = [*(notes if finished < asked else []), *found.notes]
    return write_report(
        Path(out) / "report.html",
        title=f"Finetuning methods on {found.card['task']}",
        verdict=found.verdict,
        summary=shown,
        figures=found.figures(),
        examples=pd.DataFrame(examples),
        prompt_html=None,
        card=found.card,
        notes=notes,
        measure=f"{label} ({unit})",
    )
