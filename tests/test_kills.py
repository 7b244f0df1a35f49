"""Every experiment is killed once while it runs, and the same call ends with the results of an undisturbed one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kills.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_every_experiment_survives_a_kill() -> None:
    ran = subprocess.run([sys.executable, SCRIPT, "--kills", "1"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 16
    assert all(int(row[-1]) == int(row[1]) == 1 for row in rows)
    assert sum(int(row[2]) for row in rows) >= 10  # most kills came before the end
