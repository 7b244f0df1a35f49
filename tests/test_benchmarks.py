"""The benchmarks run: on a tiny shape, with every comparison of numbers that they make first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from piggyback_lens.models.sources import default_model

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = {
    "foundation": ["--prompts", "3", "--tokens", "4", "--stopping", "6"],
    "training": ["--rows", "4", "--long", "40"],
    "patching": ["--answer-tokens", "2", "--map-layers", "2", "--skip-hooked"],
    "directions": ["--rows", "3"],
}


CASES = [*((name, "float32") for name in SMALL), ("foundation", "bfloat16"), ("training", "bfloat16")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_benchmark_runs_on_a_tiny_shape_and_leaves_its_table(name: str, dtype: str, tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / f"{name}.py", *SMALL[name], "--shape", "tiny", "--dtype", dtype]
    command += ["--tokenizer", default_model(), "--repeats", "1", "--out", tmp_path, "--threads", "1"]
    command += ["--profile"] * (name == "training")  # a profile is long
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (written,) = tmp_path.glob("*.json")
    table = json.loads(written.read_text())
    assert table["facts"]["dtype"] == dtype
    assert table["facts"]["torch"] == torch.__version__
    assert len(table["rows"]) >= 3
    assert all(row["peer_s"] > 0 and row["ours_s"] > 0 and row["work"] in ran.stdout for row in table["rows"])
    assert bool(table["spent"]) == (name == "training")
    assert all(0.795 <= sum(parts.values()) <= 1.001 for parts in table["spent"].values())
    page = tmp_path / "performance.md"
    subprocess.run([sys.executable, FOLDER / "performance.py", page, written], check=True, capture_output=True)
    text = page.read_text()
    assert f"## tiny, {dtype}, 1 threads" in text
    assert all(f"| {row['work']} | {row['peer']} |" in text for row in table["rows"])
    assert f"- `python benchmarks/{name}.py" in text
    assert all(f"- {work}: {next(iter(parts))}" in text for work, parts in table["spent"].items())
    assert written.with_suffix(".md").read_text().count("\n") == len(table["rows"]) + 2


def test_the_page_says_what_the_tables_in_the_repository_say(tmp_path: Path) -> None:
    page, tables = tmp_path / "performance.md", sorted(FOLDER.glob("tables/*/*.json"))
    assert {"directions", "generation", "patching", "training"} <= {table.stem for table in tables}
    subprocess.run([sys.executable, FOLDER / "performance.py", page, *tables], check=True, capture_output=True)
    assert page.read_text() == (FOLDER.parent / "docs" / "performance.md").read_text(), "run  make benchmarks"
