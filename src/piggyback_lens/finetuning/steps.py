"""One training step: the forward pass of a batch of conversations, and the loss of the response tokens.

Attention is causal, so the prefix of a chat template (the same ids in every row) has the same keys and values
in every row. Where it pays `forward_step` computes them once, with gradient, and lets every row attend to them; the
gradients of the rows sum there. Mostly all of this is one pass without padding (see `packing`). This is
exact, not an approximation: `check_sharing` compares it with the ordinary pass at the start of every run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.models.attachment import edited_sites
from piggyback_lens.models.backends import n_layers_of
from piggyback_lens.models.network import NOTHING, Past, forward_keeping
from piggyback_lens.models.packing import Packing, Plan, UnpackedLayers, plan_of
from piggyback_lens.models.plain_keys import keep_plain_keys

LayerTensors = tuple[
    Sequence[Float[Tensor, "kv_head prefix head_dim"]], Sequence[Float[Tensor, "kv_head prefix head_dim"]]
]
"""Keys and values of one prefix, layer by layer."""


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What one forward pass leaves for the objectives. Everything carries gradient.

    Keys are as the attention uses them, after the rotary embedding (a rotation: norms of differences at equal
    positions are those before it) and after a key norm where the model has one.
    """

    logits: Float[Tensor, "token vocab"]  # at the position before each response token, row by row
    targets: Int[Tensor, " token"]  # the response tokens
    rows: Int[Tensor, " token"]  # the row of the batch that each of them belongs to
    prefix_keys: tuple[Float[Tensor, "kv_head prefix head_dim"], ...]  # per layer, of `prefix_length` tokens
    prefix_values: tuple[Float[Tensor, "kv_head prefix head_dim"], ...]
    keys: Sequence[Float[Tensor, "row kv_head pos head_dim"]]  # per layer, all positions, padding included
    values: Sequence[Float[Tensor, "row kv_head pos head_dim"]]
    plain_keys: tuple[Float[Tensor, "row pos width"], ...] | None = None  # before the rotary embedding, if asked
    residual: tuple[Float[Tensor, "row pos d_model"], ...] | None = None  # after each block, if asked
    prefix_pass: tuple[int, int] | None = None  # rows and tokens of the pass that computed the prefix
    way: str = ""  # the passes that it took (see `Plan`)


@dataclass(frozen=True)
class Part:
    """Which part of an optimiser step a pass is, where the gradients of several add up."""

    tokens: float = 1.0  # its share of the response tokens, by which its loss counts
    rows: float = 1.0  # its share of the conversations
    first: bool = True


@dataclass(frozen=True, eq=False)
class Step:
    """What an objective sees: the model, the batch, its forward pass, and the number of the step (from 0)."""

    model: nn.Module
    batch: TrainBatch
    output: StepOutput | None  # None where the loss comes from elsewhere, such as a Trainer's own pass
    index: int
    forward: Callable[[TrainBatch], StepOutput] | None = None  # another pass; None for `forward_step` of the model
    steered: bool = False  # `output` has something added that `forward`, and the finished model, do not have
    base: Callable[[TrainBatch], StepOutput] | None = None  # the base's pass, where the trainable knows it
    keeps: bool = True  # whether its rows come again, so that it pays to keep what the base says of them
    part: Part = Part()

    def run(self, batch: TrainBatch) -> StepOutput:
        """A pass of the model as it will be used, on any batch, with gradient."""
        return forward_step(self.model, batch) if self.forward is None else self.forward(batch)

    @cached_property
    def plain(self) -> StepOutput:
        """The pass of this batch as the model will be used: `output`, or one of its own where that will not do."""
        return self.run(self.batch) if self.steered or self.output is None else self.output


@dataclass(frozen=True, eq=False)
class Loss:
    """A scalar to descend, in nats per token, and its named parts (detached) for the history.

    Where a step has several passes (see `Part`) each counts by its response tokens, as a mean over them has to.
    """

    total: Float[Tensor, ""]
    terms: Mapping[str, float]


Objective = Callable[[Step], Loss]


def forward_step(model: Any, batch: TrainBatch, prefix: LayerTensors | None = None) -> StepOutput:
    """Logits of the response tokens, and the keys and values of the pass, in one forward with gradient.

    Exact for full, grouped-query and sliding-window attention: the cache keeps every prefix position, the
    rows follow it without a gap, and the model's own masks apply.

    Args:
        model: a transformers causal LM, a PEFT model of one, or a hooked model.
        batch: the rows; `batch.share_prefix` says whether their prefix may be computed once.
        prefix: keys and values to use for the first `batch.prefix_length` tokens instead of the model's own
            (at least as many), e.g. the base's.

    Raises:
        LensError: the model has no output embeddings, or does not compute its logits with them.
    """
    plan = plan_for(model, batch)
    n_rows, width = batch.ids.shape
    rows, targets_at = batch.supervised.nonzero(as_tuple=True)
    start = plan.alone if prefix is None else batch.prefix_length
    keys_kept = keep_plain_keys(model) if batch.plain_keys else nullcontext()
    streams_kept = _keeping_residual(model) if batch.residual else nullcontext()
    with keys_kept as kept, streams_kept as streams:
        if prefix is None and start:
            _, *once = forward_keeping(model, batch.ids[:1, :start], read=NOTHING)
            prefix = [key[0] for key in once[0]], [value[0] for value in once[1]]
        if plan.packing is not None:
            return replace(_packed_step(model, batch, plan.packing, prefix), way=plan.name)
        past = None if prefix is None else _in_rows(prefix, start, n_rows)
        reads = rows, targets_at - 1 - start
        logits, keys, values = forward_keeping(model, batch.ids[:, start:], past, read=reads)
    assert all(key.shape[-2] == width for key in keys), "a cache layer dropped positions"
    if prefix is None:
        prefix = [key[0] for key in keys], [value[0] for value in values]
    return StepOutput(
        logits=logits[0],
        targets=batch.ids[rows, targets_at],
        rows=rows,
        prefix_keys=tuple(key[:, : batch.prefix_length] for key in prefix[0]),
        prefix_values=tuple(value[:, : batch.prefix_length] for value in prefix[1]),
        keys=tuple(keys),
        values=tuple(values),
        plain_keys=kept.joined(keys) if kept else None,
        residual=None if streams is None else tuple(_one_behind_another(passes, n_rows) for passes in streams),
        prefix_pass=(1, start) if start else (n_rows, width),
        way=plan.name,
    )


def plan_for(model: Any, batch: TrainBatch) -> Plan:
    """The passes of `forward_step` on this batch."""
    if not batch.share_prefix:
        return Plan()
    return plan_of(model, batch, batch.prefix_length, packs=not (batch.plain_keys or batch.residual))


@contextmanager
def _keeping_residual(model: Any) -> Iterator[list[list[Float[Tensor, "row pos d_model"]]]]:
    """By layer what every pass inside has after its block, with gradient."""
    kept: list[list[Tensor]] = [[] for _ in range(n_layers_of(model))]

    def keep(stream: Tensor, into: list[Tensor]) -> Tensor:
        into.append(stream)
        return stream

    with edited_sites(model, {(layer, "resid_post"): partial(keep, into=into) for layer, into in enumerate(kept)}):
        yield kept


def _one_behind_another(
    passes: Sequence[Float[Tensor, "_ _pos d_model"]], n_rows: int
) -> Float[Tensor, "row pos d_model"]:
    """The tokens of all passes; one of a single row (a shared prefix) is every row's."""
    return torch.cat([stream.expand(n_rows, -1, -1) for stream in passes], dim=1)


def _in_rows(prefix: LayerTensors, length: int, n_rows: int) -> Past:
    """The first `length` tokens of a prefix, in every row."""
    keys, values = ([x[:, :length].expand(n_rows, -1, -1, -1) for x in side] for side in prefix)
    return keys, values


def _packed_step(model: Any, batch: TrainBatch, packing: Packing, prefix: LayerTensors | None) -> StepOutput:
    """`forward_step` with all rows in one."""
    if prefix is not None:
        packing = replace(packing, prefix_alone=batch.prefix_length > 0)
    rows, targets_at = batch.supervised.nonzero(as_tuple=True)
    *before, last = packing.pack(batch.ids)
    start = sum(ids.shape[1] for ids in before)
    past = None if prefix is None or not start else _in_rows(prefix, start, n_rows=1)
    reads = packing.places[rows, targets_at - 1] - start
    logits, keys, values = forward_keeping(
        model,
        last,
        past,
        read=(torch.zeros_like(reads), reads),
        seen=packing.mask()[:, :, start:],
        positions=packing.columns[None, start:],
    )
    return StepOutput(
        logits=logits[0],
        targets=batch.ids[rows, targets_at],
        rows=rows,
        prefix_keys=tuple(key[0, :, : batch.prefix_length] for key in keys),
        prefix_values=tuple(value[0, :, : batch.prefix_length] for value in values),
        keys=UnpackedLayers(packing, tuple(keys)),
        values=UnpackedLayers(packing, tuple(values)),
        prefix_pass=(1, start or len(packing.rows)),
    )


def sft(step: Step) -> Loss:
    """Supervised finetuning: mean negative log-likelihood of the batch's response tokens, nats per token."""
    assert step.output is not None, "this step has no pass that gives its loss"
    total = response_nll(step.output.logits, step.output.targets)
    return Loss(total, {"sft": float(total.detach())})


def response_nll(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood in nats per token, in float32."""
    return functional.cross_entropy(logits.float(), targets)


@torch.no_grad()
def check_sharing(forward: Callable[[TrainBatch], StepOutput], batch: TrainBatch) -> None:
    """Compare the pass that computes the prefix once, and where it can all rows in one, with the ordinary one.

    Raises:
        LensError: the logits differ by more than 1e-3 of their length (0.15 below float32, where rounding alone makes
            0.03 in a model of 30 layers).
    """
    shared, ordinary = (forward(replace(batch, share_prefix=share)).logits for share in (True, False))
    coarse = shared.dtype not in {torch.float32, torch.float64}
    differ = float((shared - ordinary).float().norm() / ordinary.float().norm())
    # Logits that are not finite are reported by the loop, with its step.
    if math.isfinite(differ) and differ > (0.15 if coarse else 1e-3):
        raise LensError(
            f"computing the prefix once changes the logits of this model by {differ:.2g} of their length, so its "
            "layers do not read a plain key-value cache, or not the masks they are given; set share_prefix=False"
        )
