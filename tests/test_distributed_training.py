"""Two processes on the CPU (gloo) train as one does: the same losses, penalties and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")
DIVERGENCES = ["kl_train", "kl_retain"]
CASES: dict[str, dict[str, Any]] = {
    "ddp, adapter, prefix and divergences": {
        "how": "ddp", "tuning": "peft", "penalties": ["prefix", *DIVERGENCES], "watched": True,
    },
    "ddp, adapter, query, steered": {
        "how": "ddp", "tuning": "peft", "penalties": ["query"], "steered": True,
        "arguments": {"activation_checkpointing": True},
    },
    "fsdp, full, prefix and divergences": {
        "how": "fsdp", "tuning": "full", "penalties": ["prefix", *DIVERGENCES], "checkpointed": True,
    },
    "fsdp, adapter, query and retain, steered": {
        "how": "fsdp", "tuning": "peft", "penalties": ["query", "kl_retain"], "steered": True,
    },
    "fsdp, full, postfix behind a key norm": {
        "how": "fsdp", "tuning": "full", "penalties": ["postfix"], "layout": "qwen3",
    },
}  # fmt: skip


def train(out: Path, case: dict[str, Any], processes: int) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(WORKER), str(out), json.dumps(case), str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    one, two = (train(tmp_path / f"{processes}.json", case, processes) for processes in (1, 2))
    assert len(one["log"]) == len(two["log"]) == 4
    terms = one["log"][-1].keys() & {"penalty", "drift_prefix", "drift_query", "drift_postfix", *DIVERGENCES}
    assert len(terms) == 1 + len(case["penalties"])
    for a, b in zip(one["log"], two["log"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        for term in terms:  # means over the rows of both
            assert a[term] == pytest.approx(b[term], rel=1e-2, abs=1e-6), term
    assert [row["step"] for row in two["monitor"]] == ([1, 2, 3, 4] if case.get("watched") else []), "one writes"
    for a, b in zip(one["monitor"], two["monitor"], strict=True):
        assert a["spread"] == pytest.approx(b["spread"], rel=1e-2, abs=1e-5)
    assert all(one["log"][-1][term] > 1e-4 for term in terms), "the penalties have to be part of what is compared"
    assert one["weights"].keys() == two["weights"].keys()
    for key, values in one["weights"].items():
        assert values == pytest.approx(two["weights"][key], abs=1e-3), key
