"""Task vectors of LoRA adapters, s·BA per module, compared layer by layer without forming the big matrices.

<BA, B'A'> = tr((BᵀB')(A'Aᵀ)): two products of rank × rank. 2606.06667 compares methods by the cosine of their
weight updates (its figure 8).
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from piggyback_lens.models.peft_adapters import Factors, lora_factors


def read_factors(folder: str | Path) -> Factors:
    """A and s·B of a PEFT LoRA adapter, in double precision.

    Raises:
        LensError: not a plain LoRA adapter.
    """
    config, factors = lora_factors(folder, allow=("fan_in_fan_out",))
    rank, alpha = config["r"], float(config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {place: (a.double(), scale * b.double()) for place, (a, b) in factors.items()}


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
