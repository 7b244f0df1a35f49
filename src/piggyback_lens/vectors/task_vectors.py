"""Task vectors of LoRA adapters, s·BA per module, compared layer by layer without forming the big matrices.

<BA, B'A'> = tr((BᵀB')(A'Aᵀ)): two products of rank × rank. 2606.06667 compares methods by the cosine of their
weight updates (its figure 8).
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json

_KEY = re.compile(r"\.(\d+)\.(.+)\.lora_([AB])(?:\.\w+)?\.weight$")
Factors = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(layer, module) to A [rank, d_in] and s·B [d_out, rank]; sizes differ from module to module."""


def read_factors(folder: str | Path) -> Factors:
    """The factors of a PEFT LoRA adapter, in double precision.

    Raises:
        LensError: not a plain LoRA adapter.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA" or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise LensError(f"{folder} is no LoRA adapter with one rank and alpha: its task vector is not read")
    rank, alpha = config["r"], float(config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        if (found := _KEY.search(key)) is None:
            raise LensError(f"{folder}: tensor {key} is not of a LoRA adapter on decoder blocks")
        halves.setdefault((int(found[1]), found[2]), {})[found[3]] = value.double()
    return {place: (half["A"], scale * half["B"]) for place, half in halves.items()}


def inner_products(one: Factors, other: Factors) -> dict[int, float]:
    """Per layer the inner product of two task vectors, all modules of the layer as one vector."""
    found = dict.fromkeys(sorted({layer for layer, _ in (*one, *other)}), 0.0)
    for place in one.keys() & other.keys():
        (a, b), (a2, b2) = one[place], other[place]
        found[place[0]] += float(((b.T @ b2) * (a @ a2.T)).sum())
    return found


def update_cosines(one: str | Path, other: str | Path) -> dict[int, float]:
    """Cosine of the task vectors of two adapter folders in every layer; NaN where one of them is zero."""
    a, b = read_factors(one), read_factors(other)
    ab, aa, bb = inner_products(a, b), inner_products(a, a), inner_products(b, b)
    return {
        layer: value / math.sqrt(aa[layer] * bb[layer]) if aa.get(layer) and bb.get(layer) else math.nan
        for layer, value in ab.items()
    }


def update_norms(folder: str | Path) -> list[float]:
    """Frobenius norm of the task vector, layer by layer."""
    own = read_factors(folder)
    return [math.sqrt(max(0.0, value)) for value in inner_products(own, own).values()]


def mean_by_layer(tables: Iterable[dict[int, float]]) -> dict[int, float]:
    """The mean over several tables by layer, NaN entries left out."""
    rows = list(tables)
    layers = sorted({layer for row in rows for layer in row})
    return {
        layer: float(torch.tensor([row[layer] for row in rows if layer in row], dtype=torch.float64).nanmean())
        for layer in layers
    }
