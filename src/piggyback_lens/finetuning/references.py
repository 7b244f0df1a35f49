"""What the base gives: the keys and values of a span that training should keep, and whole forward passes."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch, unsupervised
from piggyback_lens.finetuning.steps import Step, StepOutput, forward_step
from piggyback_lens.interventions.prefix import PrefixCache, TemplateSpan
from piggyback_lens.maths import relative_kv_drift
from piggyback_lens.models.peft_adapters import refuse_lost_base
from piggyback_lens.models.views import adapter_layers, adapter_off, adapter_parameters, evaluating, has_adapter

SpanName = Literal["prefix", "query", "postfix", "all"]
"""A part of the prompt; "all" is the whole prompt. The response is never part of it."""
SPANS: tuple[SpanName, ...] = get_args(SpanName)


def reference_settings(reference: PrefixCache) -> dict[str, object]:
    """What identifies a reference, JSON-able: its tokens, and the lengths of its last layer's keys and values.

    The last layer depends on the weights of all others and, of a postfix, on the query. Three digits tell
    references apart, and are the same with another number of threads, where the last bits are not.
    """
    digest = hashlib.sha256(repr(reference.ids).encode()).hexdigest()
    lengths = {"key": reference.keys[-1], "value": reference.values[-1]}
    norms = {f"last_{name}_norm": float(f"{float(x.float().norm()):.3g}") for name, x in lengths.items()}
    return {"span": reference.span, "tokens": len(reference.ids), "sha256": digest[:16], **norms}


def model_fingerprint(model: nn.Module, without: Collection[int] = ()) -> str:
    """16 hex digits that tell models apart, from a few numbers of every tensor: cheap at any size.

    Args:
        model: any model.
        without: `id` of parameters that do not count, such as those that are trained.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in model.named_parameters():
        if id(value) in without:
            continue
        few = value.detach().flatten()[:16].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode() + few)
    return digest.hexdigest()[:16]


def kv_reference(
    model: nn.Module, example: RenderedPrompt, span: TemplateSpan = "prefix", base: nn.Module | None = None
) -> PrefixCache:
    """Run the base once on one example of the template and keep a span's keys and values.

    Args:
        model: a PEFT model (its adapter is switched off for the pass) or, before a full finetune, the model
            itself as it is now.
        example: any prompt of the template settings; `chat.empty_query()` is the usual one for a postfix.
            Of a prefix nothing after it matters (attention is causal); a postfix depends on the query.
        span: "prefix" or "postfix".
        base: another model to run instead.

    Raises:
        LensError: no such span, the span is empty in this template, (postfix) the model's fused projections hide its
            keys before the rotary embedding, or a PEFT model that writes into its base, without a `base`.
    """
    if base is None and has_adapter(model):
        _require_untouched_base(model)
    if span not in get_args(TemplateSpan):
        raise LensError(f"span {span!r} has no fixed tokens to take a reference from; use 'prefix' or 'postfix'")
    where = example.span(span)
    batch = prefix_batch(example.ids[: where.stop], next(model.parameters()).device)
    batch = replace(batch, plain_keys=span == "postfix")
    runs = model if base is None else base
    with torch.no_grad(), adapter_off(runs), evaluating(runs):
        output = forward_step(runs, batch)
    values = torch.stack([value[0] for value in output.values])
    if output.plain_keys is None:
        keys = torch.stack([key[0] for key in output.keys])
    else:
        joined = torch.stack([key[0] for key in output.plain_keys])
        keys = rearrange(joined, "layer pos (kv d) -> layer kv pos d", kv=values.shape[1])
    # Copies: a slice would keep the whole pass in memory.
    keys, values = (x[:, :, where.start : where.stop].clone() for x in (keys, values))
    ids = example.ids[where.start : where.stop]
    return PrefixCache(ids, keys, values, fingerprint=example.fingerprint, span=span, rotated=output.plain_keys is None)


def prefix_batch(ids: Sequence[int], device: torch.device | str) -> TrainBatch:
    """One row of tokens, all of them prefix: a pass that is run for its keys and values."""
    return replace(unsupervised([ids], device), prefix_length=len(ids))


def by_token(x: Float[Tensor, "layer kv_head pos head_dim"]) -> Float[Tensor, "token width"]:
    """Heads joined, the tokens of all layers in a row."""
    return rearrange(x, "layer kv pos d -> (layer pos) (kv d)")


@torch.no_grad()
def base_forward(model: nn.Module, batch: TrainBatch, base: nn.Module | None = None) -> StepOutput:
    """The base's pass of a batch, without gradient: `base`, or `model` without its adapter.

    Raises:
        LensError: a model whose own weights are trained (also beside an adapter) or were moved into its adapter,
            without a `base`.
    """
    if base is not None:
        with evaluating(base):
            return forward_step(base, batch)
    _require_untouched_base(model)
    with adapter_off(model), evaluating(model):
        return forward_step(model, batch)


def _require_untouched_base(model: nn.Module) -> None:
    refuse_lost_base(model)
    own = {id(value) for part in adapter_layers(model).values() for value in adapter_parameters(part)}
    written = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in own]
    if written:
        raise LensError(
            f"weights of this {type(model).__name__} itself are trained, such as {written[0]}, so it cannot give the "
            "base's outputs; pass base=, a frozen copy of the model before training"
        )


def base_of(step: Step, batch: TrainBatch, base: nn.Module | None = None) -> StepOutput:
    """The base's pass of a batch, without gradient: of `base`, or as the step knows it, or without the adapter."""
    return base_forward(step.model, batch, base) if base is not None or step.base is None else step.base(batch)


def span_range(example: RenderedPrompt, span: SpanName) -> range:
    """Token positions of a span of a rendered prompt.

    Raises:
        LensError: an unknown span, or one that is empty in this prompt.
    """
    if span not in SPANS:
        raise LensError(f"span {span!r} is not known; choose one of {', '.join(SPANS)}")
    return range(example.n_prompt) if span == "all" else example.span(span).positions


def prefix_drift(output: StepOutput, reference: PrefixCache) -> Float[Tensor, " layer"]:
    """Per layer, the mean over the pass's prefix tokens of ‖k−k₀‖²/‖k₀‖² + ‖v−v₀‖²/‖v₀‖² (see `TReFT`).

    Where a pass has a shorter prefix than the reference, over the tokens that it has.
    """
    n = min(output.prefix_keys[0].shape[1], len(reference.ids))
    # All layers at once: on a GPU thirty small sums take as long to launch as a quarter of the pass.
    k, v = (torch.stack([x[:, :n] for x in side]) for side in (output.prefix_keys, output.prefix_values))
    found = _drift(*(by_token(x) for x in (k, reference.keys[:, :, :n], v, reference.values[:, :, :n])))
    return rearrange(found, "(layer pos) -> layer pos", pos=n).mean(dim=1)


def span_drift(
    output: StepOutput, spans: Sequence[range], reference: StepOutput | PrefixCache
) -> Float[Tensor, " layer"]:
    """Per layer, the mean over rows of the mean over a span's tokens of the relative squared deviation.

    Args:
        output: a pass with gradient; with `plain_keys` if the reference is a postfix of the template.
        spans: the positions of the span in each row.
        reference: the base's pass of the same rows, or a postfix in one example of the template.
    """
    rows, columns, weights = token_grid(spans, output.keys[0].device)
    drifts = []
    for layer in range(len(output.keys)):
        v = _gathered(output.values[layer], rows, columns)
        if isinstance(reference, PrefixCache):
            assert output.plain_keys is not None, "the pass did not keep its keys before the rotary embedding"
            k = output.plain_keys[layer][rows, columns]
            k0, v0 = (by_token(x[layer : layer + 1]).repeat(len(spans), 1) for x in (reference.keys, reference.values))
        else:
            k = _gathered(output.keys[layer], rows, columns)
            k0, v0 = (_gathered(x[layer], rows, columns) for x in (reference.keys, reference.values))
        drifts.append((_drift(k, k0, v, v0) * weights).sum())
    return torch.stack(drifts)


def _drift(
    k: Float[Tensor, "token width"],
    k0: Float[Tensor, "token width"],
    v: Float[Tensor, "token width"],
    v0: Float[Tensor, "token width"],
) -> Float[Tensor, " token"]:
    """The relative squared deviation of each token, by the one formula of `maths`."""
    return relative_kv_drift(*(x[:, None, None] for x in (k, k0, v, v0)))


def token_grid(
    spans: Sequence[range], device: torch.device
) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"], Float[Tensor, " token"]]:
    """Row, column and weight of every span token; the weights of a row sum to 1 / number of rows."""
    if any(not len(span) for span in spans):
        raise LensError("the drift of a span without tokens is not defined; choose a span that every row has")
    rows = [row for row, span in enumerate(spans) for _ in span]
    columns = [position for span in spans for position in span]
    weights = [1 / (len(span) * len(spans)) for span in spans for _ in span]
    numbers = torch.tensor([rows, columns], device=device)
    return numbers[0], numbers[1], torch.tensor(weights, device=device)


def _gathered(
    x: Float[Tensor, "row kv_head pos head_dim"], rows: Int[Tensor, " token"], columns: Int[Tensor, " token"]
) -> Float[Tensor, "token width"]:
    return rearrange(x[rows, :, columns], "token kv d -> token (kv d)")
