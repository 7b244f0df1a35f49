"""One training step: a batch of conversations, its forward pass, and the loss of the response tokens.

Attention is causal, so the prefix of a chat template (the same ids in every row) has the same keys and values
in every row. `forward_step` computes them once, with gradient, and lets every row attend to them; the
gradients of the rows sum in the one prefix pass. This is exact, not an approximation: `check_sharing`
compares it with the ordinary pass at the start of every run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.plain_keys import keep_plain_keys

LayerTensors = tuple[
    Sequence[Float[Tensor, "kv_head prefix head_dim"]], Sequence[Float[Tensor, "kv_head prefix head_dim"]]
]
"""Keys and values of one prefix, layer by layer."""


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """Right-padded rows of prompt + response; positions count from the first token of the row."""

    examples: tuple[RenderedPrompt, ...]
    ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]  # 1 at real tokens
    supervised: Bool[Tensor, "row pos"]  # True at response tokens, the turn end included
    prefix_length: int  # leading tokens that are prefix in every row, and the same ids
    share_prefix: bool  # compute those tokens once instead of once per row
    plain_keys: bool = False  # keep the keys before the rotary embedding too

    @property
    def n_supervised(self) -> int:
        """Number of response tokens, the denominator of the loss."""
        return int(self.supervised.sum())


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
    keys: tuple[Float[Tensor, "row kv_head pos head_dim"], ...]  # per layer, all positions, padding included
    values: tuple[Float[Tensor, "row kv_head pos head_dim"], ...]
    plain_keys: tuple[Float[Tensor, "row pos width"], ...] | None = None  # before the rotary embedding, if asked


@dataclass(frozen=True, eq=False)
class Step:
    """What an objective sees: the model, the batch, its forward pass, and the number of the step (from 0)."""

    model: nn.Module
    batch: TrainBatch
    output: StepOutput
    index: int
    forward: Callable[[TrainBatch], StepOutput] | None = None  # another pass; None for `forward_step` of the model
    steered: bool = False  # `output` has something added that `forward`, and the finished model, do not have
    base: Callable[[TrainBatch], StepOutput] | None = None  # the base's pass, where the trainable knows it

    def run(self, batch: TrainBatch) -> StepOutput:
        """A pass of the model as it will be used, on any batch, with gradient."""
        return forward_step(self.model, batch) if self.forward is None else self.forward(batch)

    @cached_property
    def plain(self) -> StepOutput:
        """The pass of this batch as the model will be used: `output`, or another pass where that was steered."""
        return self.run(self.batch) if self.steered else self.output


@dataclass(frozen=True, eq=False)
class Loss:
    """A scalar to descend, in nats per token, and its named parts (detached) for the history."""

    total: Float[Tensor, ""]
    terms: Mapping[str, float]


Objective = Callable[[Step], Loss]


def make_batch(
    examples: Sequence[RenderedPrompt],
    *,
    share_prefix: bool = True,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    plain_keys: bool = False,
) -> TrainBatch:
    """Right-pad examples into one batch.

    Raises:
        LensError: no examples, or an example without response tokens.
    """
    if not examples:
        raise LensError("got an empty batch; pass at least one example with a response")
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        check_supervised(example, row)
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        supervised[row, example.n_prompt : length] = True
    return TrainBatch(
        examples=tuple(examples),
        ids=ids.to(device),
        attention_mask=mask.to(device),
        supervised=supervised.to(device),
        prefix_length=common_prefix_length(examples),
        share_prefix=share_prefix,
        plain_keys=plain_keys,
    )


def batch_indices(lengths: tuple[int, ...], batch_size: int, seed: int, index: int) -> tuple[int, ...]:
    """The examples of step `index`: a function of the arguments alone, each example once per epoch.

    Every epoch is shuffled anew. Within windows of eight batches, examples of similar length go together
    (lengths are jittered by a quarter, else small data would give the same batches in every epoch). Where
    batch_size does not divide the number of examples, one batch of each epoch is smaller.
    """
    epoch, position = divmod(index, math.ceil(len(lengths) / batch_size))
    return _epoch_batches(lengths, batch_size, seed, epoch)[position]


@lru_cache(maxsize=4)
def _epoch_batches(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
    generator = np.random.default_rng([seed, epoch])
    order = [int(number) for number in generator.permutation(len(lengths))]
    jittered = np.asarray(lengths) * generator.uniform(0.8, 1.25, len(lengths))
    batches: list[tuple[int, ...]] = []
    for at in range(0, len(order), 8 * batch_size):
        window = sorted(order[at : at + 8 * batch_size], key=lambda number: float(jittered[number]))
        batches += [tuple(window[at : at + batch_size]) for at in range(0, len(window), batch_size)]
    return tuple(batches[int(place)] for place in generator.permutation(len(batches)))


def check_supervised(example: RenderedPrompt, number: int) -> None:
    """Refuse an example that the loss could not see."""
    if len(example.ids) <= example.n_prompt:
        raise LensError(
            f"example {number} has no response tokens ({len(example.ids)} tokens, all prompt); render it "
            "with response=... or use .with_response(...)"
        )
    if example.n_prompt < 1:
        raise LensError(f"example {number} has no prompt token before its response; nothing predicts its start")


def common_prefix_length(examples: Sequence[RenderedPrompt]) -> int:
    """Number of leading tokens that are prefix in every example and the same in all of them.

    A template whose prefix border lies inside a token gives some prompts a shorter prefix, and conversations
    of several turns count their history as prefix; the batch shares what is common. The last prompt token
    is never shared, since it predicts the response.
    """
    limit = min(min(_prefix_stop(example), example.n_prompt - 1) for example in examples)
    first = examples[0].ids
    for position in range(limit):
        if any(example.ids[position] != first[position] for example in examples):
            return position
    return limit


def _prefix_stop(example: RenderedPrompt) -> int:
    span = example.spans.get("prefix")
    return 0 if span is None else int(span.stop)


def forward_step(model: nn.Module, batch: TrainBatch, prefix: LayerTensors | None = None) -> StepOutput:
    """Logits of the response tokens, and the keys and values of the pass, in one forward with gradient.

    Exact for full, grouped-query and sliding-window attention: the cache keeps every prefix position, the
    rows follow it without a gap, and the model's own masks apply.

    Args:
        model: a Hugging Face causal LM, or a PEFT model of one.
        batch: the rows; `batch.share_prefix` says whether their prefix is computed once.
        prefix: keys and values to use for the first `batch.prefix_length` tokens instead of the model's own
            (at least as many), e.g. the base's.

    Raises:
        LensError: the model has no output embeddings, or does not compute its logits with them.
    """
    from transformers import DynamicCache

    n_rows, width = batch.ids.shape
    rows, targets_at = batch.supervised.nonzero(as_tuple=True)
    start = batch.prefix_length if batch.share_prefix or prefix is not None else 0
    # Without a config the cache is a plain one on every layer: sliding layers would drop prefix tokens.
    cache = DynamicCache()
    with keep_plain_keys(model) if batch.plain_keys else nullcontext() as kept:
        if prefix is None and start:
            ids = batch.ids[:1, :start]
            _logits_at(model, ids, start=0, cache=cache, reads=(rows[:0], rows[:0]))
            prefix = [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]
            cache = DynamicCache()
        if prefix is not None:
            for layer, pair in enumerate(zip(*prefix, strict=True)):
                key, value = (x[:, :start].expand(n_rows, -1, -1, -1) for x in pair)
                cache.update(key, value, layer)
        reads = rows, targets_at - 1 - start
        logits = _logits_at(model, batch.ids[:, start:], start=start, cache=cache, reads=reads)
    keys = tuple(layer.keys for layer in cache.layers)
    values = tuple(layer.values for layer in cache.layers)
    assert all(key.shape[-2] == width for key in keys), "a cache layer dropped positions"
    if prefix is None:
        prefix = [key[0] for key in keys], [value[0] for value in values]
    return StepOutput(
        logits=logits,
        targets=batch.ids[rows, targets_at],
        rows=rows,
        prefix_keys=tuple(key[:, : batch.prefix_length] for key in prefix[0]),
        prefix_values=tuple(value[:, : batch.prefix_length] for value in prefix[1]),
        keys=keys,
        values=values,
        plain_keys=kept.joined(keys) if kept else None,
    )


def _logits_at(
    model: nn.Module,
    ids: Int[Tensor, "row new"],
    *,
    start: int,
    cache: Any,
    reads: tuple[Int[Tensor, " token"], Int[Tensor, " token"]],
) -> Float[Tensor, "token vocab"]:
    """Run `ids` from position `start` on top of `cache`; logits only at `reads`, (rows, columns) of `ids`."""
    n_rows, stop = ids.shape[0], start + ids.shape[1]
    with _head_reads(model, *reads):
        output = cast(Any, model)(
            input_ids=ids,
            # Padding is on the right, where no real token looks. It is not masked: a row of the mask without
            # any key (padding beyond a sliding window) can make NaN.
            attention_mask=ids.new_ones(n_rows, stop),
            position_ids=torch.arange(start, stop, device=ids.device).expand(n_rows, -1),
            past_key_values=cache,
            use_cache=True,
        )
    logits: Tensor = output.logits
    if logits.shape[:2] != (1, len(reads[0])):
        raise LensError(
            f"{type(model).__name__} gave logits of shape {tuple(logits.shape)} where its output embeddings "
            f"were asked for {len(reads[0])} positions; this architecture is not supported for training"
        )
    return logits[0]


@contextmanager
def _head_reads(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Let the output embeddings see only the hidden states at (rows, columns), as one row.

    The vocabulary is the widest matrix of a small model. The model itself still applies what comes after
    (logit soft-capping, scaling).
    """
    head = cast(Any, model).get_output_embeddings()
    if head is None:
        raise LensError(f"{type(model).__name__} has no output embeddings; pass a causal language model")
    calls = 0

    def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        hidden, *rest = args
        return (hidden[rows, columns].unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise LensError(f"{type(model).__name__} called its output embeddings {calls} times in one pass, expected 1")


def sft(step: Step) -> Loss:
    """Supervised finetuning: mean negative log-likelihood of the batch's response tokens, nats per token."""
    total = response_nll(step.output.logits, step.output.targets)
    return Loss(total, {"sft": float(total.detach())})


def response_nll(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood in nats per token, in float32."""
    return functional.cross_entropy(logits.float(), targets)


@torch.no_grad()
def check_sharing(forward: Callable[[TrainBatch], StepOutput], batch: TrainBatch) -> None:
    """Compare the shared-prefix pass with the ordinary one on this batch.

    Raises:
        LensError: the two losses differ by more than 1e-3 of their value (2e-2 below float32).
    """
    shared, ordinary = (forward(replace(batch, share_prefix=share)) for share in (True, False))
    losses = [float(response_nll(output.logits, output.targets)) for output in (shared, ordinary)]
    tolerance = 1e-3 if shared.logits.dtype in {torch.float32, torch.float64} else 2e-2
    # A loss that is not finite is reported by the loop, with its step.
    if all(map(math.isfinite, losses)) and not math.isclose(*losses, rel_tol=tolerance, abs_tol=tolerance):
        raise LensError(
            f"sharing the prefix changes the loss of this model from {losses[1]:.5f} to {losses[0]:.5f} "
            "nats per token, so its layers do not read a plain key-value cache; set share_prefix=False"
        )
