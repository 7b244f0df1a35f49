"""Two processes on the CPU (gloo) train as one does: the same losses, penalties and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")
OWN = {"span": "query", "reference": "own"}
CASES: dict[str, dict[str, Any]] = {
    "ddp, adapter, prefix": {"how": "ddp", "tuning": "peft", "treft": {}, "watched": True},
    "ddp, adapter, query": {
        "how": "ddp", "tuning": "peft", "treft": OWN, "arguments": {"activation_checkpointing": True},
    },
    "fsdp, full, prefix": {"how": "fsdp", "tuning": "full", "treft": {}, "checkpointed": True},
    "fsdp, adapter, query": {"how": "fsdp", "tuning": "peft", "treft": OWN},
    "fsdp, full, postfix behind a key norm": {
        "how": "fsdp", "tuning": "full", "treft": {"span": "postfix"}, "layout": "qwen3",
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
    drift = f"drift_{case['treft'].get('span', 'prefix')}"
    assert len(one["log"]) == len(two["log"]) == 4
    for a, b in zip(one["log"], two["log"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        if drift == "drift_prefix":  # of other spans each process logs that of its own rows
            assert a[drift] == pytest.approx(b[drift], rel=1e-2, abs=1e-9)
    assert [row["step"] for row in two["monitor"]] == ([1, 2, 3, 4] if case.get("watched") else []), "one writes"
    for a, b in zip(one["monitor"], two["monitor"], strict=True):
        assert a["spread"] == pytest.approx(b["spread"], rel=1e-2, abs=1e-5)
    assert one["log"][-1]["treft"] > 1e-3, "the penalty has to be part of what is compared"
    assert one["weights"].keys() == two["weights"].keys()
    for key, values in one["weights"].items():
        assert values == pytest.approx(two["weights"][key], abs=1e-3), key
