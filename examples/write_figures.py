"""Write the README's figures and numbers from a finished demo (needs Chrome or Chromium for the pictures).

python examples/write_figures.py demo_out docs [--readme README.md]
python examples/write_figures.py --audit em_audit docs/em_evaluation.md     (a table only: no browser)

Writes demo_conditions.png, demo_layer_curve.png and demo_results.md into the second folder, and the verdict into
the README between its two markers. No figure in the README is typed by hand.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from piggyback_lens import DemoSettings, LensError, Result, load_result
from piggyback_lens.files import atomic_write_text
from piggyback_lens.intervals import interval_text, percent

START, END = "<!-- demo:start -->", "<!-- demo:end -->"
AUDIT = ("<!-- audit:start -->", "<!-- audit:end -->")
OWN = ("piggyback-lens", "torch", "transformers", "transformer-lens")
"""Versions that stand below the table."""
WIDTH, SCALE = 1100, 2  # px, and how many picture points stand for one


def results_markdown(result: Result) -> str:
    """The demo's table, verdict, time and memory."""
    rows = ["| | condition | n | mean [95 % interval] | recovery |", "|---|---|---:|---:|---:|"]
    for row in result.to_frame().to_dict("records"):
        value = f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
        rows.append(f"| {row['topic']} | {row['condition_label']} | {row['n']} | {value} | {recovered(row)} |")
    measured = f"Measured: {result.behaviour.label}. Recovery: 0 = finetuned, 1 = base restored, paired over prompts."
    return "\n".join([f"**{result.verdict}**", "", measured, "", *rows, "", circumstances(result)])


def summary_markdown(result: Result) -> str:
    """What the README says of the demo: verdict, time and memory."""
    return f"**{result.verdict}**\n\n{circumstances(result)}"


def circumstances(result: Result) -> str:
    """The identity control, time, memory, versions and command."""
    card = {**result.card, **about(result)}
    same, total = result.identical
    versions = ", ".join(f"{name} {card['versions'][name]}" for name in OWN)
    return "\n".join(
        [
            f"Identity control: {same} of {total} answers are token for token the finetuned model's.",
            f"Time: {duration(card)}; peak memory {card['peak_memory_gb']} GB; "
            f"{card['machine']['gpu'] or str(card['machine']['cores']) + ' CPU cores'}, {versions}.",
            f"Command: `{command(card)}`, then `python examples/write_figures.py`.",
        ]
    )


def about(result: Result) -> dict:
    """What the demo has written beside its audit: task and training."""
    return json.loads((result.folder / "demo.json").read_text(encoding="utf-8"))


def recovered(row: dict) -> str:
    """A recovery with its interval, in per cent."""
    if row["condition"] in ("base", "finetuned"):
        return ""
    return percent(row["recovery"], row["recovery_low"], row["recovery_high"])


def command(card: dict) -> str:
    """What was typed; a quick demo is known by its audit's settings."""
    quick = " --quick" if card["settings"] == asdict(DemoSettings.quick().audit) else ""
    return f"piggyback-lens demo --task {card['task']}{quick}"


def duration(card: dict) -> str:
    """Training and audit in minutes."""
    parts = {"training": card["training_seconds"], "audit": card["seconds"]}
    return ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in parts.items())


def audit_markdown(result: Result) -> str:
    """The off-topic half of an audit with samples: answers, cuts and p-values too."""
    heads = (
        "condition",
        "questions",
        "answers",
        "mean [95 % interval]",
        "recovery",
        "p",
        "cut",
        "of them lower bounds",
    )
    rows = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * 7]
    for row in result.to_frame().to_dict("records"):
        if row["topic"] == "off-topic":
            p = "" if math.isnan(row["p"]) else f"{row['p']:.3g}"
            mean = interval_text(row["value"], row["low"], row["high"])
            cells = (
                row["condition_label"],
                row["n"],
                row["answers"],
                mean,
                recovered(row),
                p,
                row["cut"],
                row["biased"],
            )
            rows.append(f"| {' | '.join(map(str, cells))} |")
    same, total = result.identical
    told = f"Identity control: {same} of {total} answers are token for token the finetuned model's."
    return "\n".join([f"**{result.verdict}**", "", *rows, "", told])


def with_results(page: str, results: str, markers: tuple[str, str] = (START, END)) -> str:
    """The page with `results` between its markers."""
    before, start, rest = page.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not start or not end:
        raise LensError(f"the page lacks the markers {' and '.join(markers)}: put them where the numbers belong")
    return f"{before}{start}\n{results}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("docs", type=Path, help="folder for the pictures")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--audit", action="store_true", help="the folder is an audit's, and the second a page")
    options = parser.parse_args()
    result = load_result(options.demo)
    if options.audit:
        page = options.docs.read_text(encoding="utf-8")
        atomic_write_text(options.docs, with_results(page, audit_markdown(result), AUDIT))
        return
    results = results_markdown(result)
    options.docs.mkdir(parents=True, exist_ok=True)
    result.figure().write_image(options.docs / "demo_conditions.png", width=WIDTH, scale=SCALE)
    if result.curve is not None:
        result.curve.figure().write_image(options.docs / "demo_layer_curve.png", width=WIDTH, scale=SCALE)
    atomic_write_text(options.docs / "demo_results.md", f"# Results of the demo\n\n{results}\n")
    readme = options.readme.read_text(encoding="utf-8")
    atomic_write_text(options.readme, with_results(readme, summary_markdown(result)))
    print(results)


if __name__ == "__main__":
    try:
        main()
    except LensError as error:
        sys.exit(f"error: {error}")
