"""What a pass of a model costs on this device, measured once: the last block on few tokens and on many, and attention.

What was measured is kept in the cache folder, by device, threads and kind of block: the cheapest way of a batch through
the model (see `packing`) decides the last bits of a run, so the same run has to find the same costs.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from piggyback_lens.files import read_json, write_json
from piggyback_lens.models.backends import (
    blocks_of,
    config_of,
    device_of,
    floating_dtype,
    has_modules,
    width_of,
)
from piggyback_lens.models.network import NOTHING, forward_keeping
from piggyback_lens.models.packing import Costs, assumed, takes_masks
from piggyback_lens.models.partial import begun_at, residual_at
from piggyback_lens.models.plain_views import attention_of
from piggyback_lens.models.sources import cache_folder
from piggyback_lens.models.views import evaluating

BUDGET_S = 0.6
"""Time in which no further size is measured."""
MOST_TOKENS = 4096
ATTENDED = 512
"""At most so many tokens of the attention that is timed: its cost is theirs squared."""


def known_costs(model: Any) -> Costs:
    """The costs of a model's last block here: those that were kept, or measured now in under a second.

    A HookedTransformer has assumed ones.
    """
    if not has_modules(model):
        return assumed(device_of(model), width_of(model))
    file, key = cache_folder() / "costs.json", _key(model)
    if key in (kept := _kept(file)):
        return kept[key]
    costs = measured(model)
    if key in (kept := _kept(file)):  # another process was first: all keep to one measurement
        return kept[key]
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {name: asdict(one) for name, one in kept.items()} | {key: asdict(costs)})
    return costs


def _kept(file: Path) -> dict[str, Costs]:
    """What was measured before; nothing where the file is not there, or damaged."""
    with suppress(Exception):
        return {name: Costs(**one) for name, one in read_json(file).items()}
    return {}


def _key(model: Any) -> str:
    device, block = device_of(model), blocks_of(model)[-1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shapes = [(part, tuple(value.shape), str(value.dtype)) for part, value in block.named_parameters()]
    facts = [name, torch.get_num_threads(), torch.__version__, type(block).__name__, shapes]
    facts += [attention_of(model), torch.is_autocast_enabled(device.type)]
    facts.append("forward" in vars(block))  # as activation checkpointing leaves it
    facts.append("block and attention alone")  # what is measured, if that changes
    return f"{name} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


@torch.enable_grad()
def measured(model: Any) -> Costs:
    """Time the model's last block, on few tokens and on many, and its attention under a mask."""
    began, device, d_model = time.perf_counter(), device_of(model), width_of(model)
    last = len(blocks_of(model)) - 1
    in_tuple = last > 0 and residual_at(model, torch.zeros((1, 2), dtype=torch.long), last)[1]

    def seconds(rows: int, width: int) -> float:
        return _fastest(lambda: _last_seconds(model, last, (rows, width, d_model), in_tuple=in_tuple))

    with evaluating(model):
        launch, tokens = seconds(1, 8), 128
        rows = seconds(8, tokens // 8)
        while rows < 3 * launch and tokens < MOST_TOKENS and time.perf_counter() - began < BUDGET_S:
            tokens *= 2
            rows = seconds(8, tokens // 8)
    pair = assumed(device, d_model).pair / assumed(device, d_model).token * rows / tokens
    if takes_masks(model, 2):
        seen = min(tokens, ATTENDED)
        long, short = (_fastest(lambda n=n: _attention_seconds(model, n)) for n in (seen, 8))  # type: ignore[misc]
        pair = max(long - short, 0.05 * long) / seen**2
    token = max(rows / tokens - pair * tokens / 8, 0.1 * rows / tokens)
    return Costs(*(float(f"{value:.2g}") for value in (launch, token, pair)))


def _attention_seconds(model: Any, tokens: int) -> float:
    """Of the attention of one row under a mask, as this model computes it, and its gradient."""
    config, device, dtype = config_of(model), device_of(model), floating_dtype(model)
    heads = int(config.num_attention_heads)
    size = (3, 1, heads, tokens, width_of(model) // heads)
    inputs = torch.ones(size, dtype=dtype, device=device).mul_(0.1).requires_grad_()
    seen = torch.ones((tokens, tokens), dtype=torch.bool, device=device).tril()
    q, k, v = inputs
    began = _now(device)
    if attention_of(model) == "sdpa":
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    else:
        scores = q @ k.mT  # under autocast of another dtype than the weights
        out = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) @ v
    torch.autograd.grad(out.float().sum(), [inputs])
    return _now(device) - began


def _last_seconds(model: Any, last: int, shape: tuple[int, int, int], *, in_tuple: bool) -> float:
    """Of the last block in a pass, and of its gradient; not of what the pass does beside it."""
    device = device_of(model)
    rows, width, _ = shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    residual = drawn.to(device, floating_dtype(model)).requires_grad_()
    ids = torch.zeros((rows, width), dtype=torch.long, device=device)
    found: list[torch.Tensor] = []
    times: list[float] = []

    def begun(*_: Any) -> None:
        times.append(_now(device))

    def ended(_: Any, __: Any, out: Any) -> None:
        times.append(_now(device))
        found.append(out[0] if type(out) is tuple else out)

    block = blocks_of(model)[last]
    with begun_at(model, last, [residual], in_tuple=in_tuple):
        handles = [block.register_forward_pre_hook(begun), block.register_forward_hook(ended)]
        try:
            forward_keeping(model, ids, read=NOTHING)
        finally:
            for handle in handles:
                handle.remove()
    between = _now(device)
    torch.autograd.grad(found[0].float().sum(), [residual])
    return times[1] - times[0] + _now(device) - between


def _now(device: torch.device) -> float:
    """When what was begun on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fastest(run: Callable[[], float]) -> float:
    """Seconds of the fastest of three runs, after one that is not counted; of fewer where they are long."""
    times = []
    for _ in range(4):
        times.append(run())
        if len(times) > 1 and sum(times) > 0.15:
            break
    return min(times[1:])
