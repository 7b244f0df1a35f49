"""The run card: everything that somebody needs to judge or repeat a result."""

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "piggyback-lens",
    "torch",
    "transformers",
    "transformer-lens",
    "peft",
    "safetensors",
    "numpy",
    "scipy",
)


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor, threads and accelerator."""
    import torch

    gpus = dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        "platform": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or None,
    }


def peak_memory() -> dict[str, float]:
    """Largest memory of this process so far, in GB (1e9 bytes): resident, and where there are GPUs on the fullest."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"peak_memory_gb": round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)}
    if cards := torch.cuda.device_count():
        found["peak_gpu_gb"] = round(max(map(torch.cuda.max_memory_allocated, range(cards))) / 1e9, 2)
    return found
