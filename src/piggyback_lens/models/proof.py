"""Is a hooked model the function that its owner computes? Logits compared on probe rows, before it is used.

What is compared is what experiments rely on: whole rows, rows padded on either side, a pass on top of keys and
values that are there already, and one decoding step. The owner's side is transformers' (or PEFT's) own pass over
each row alone. Every adapter layer that acts in the owner's pass must be called in the hooked one, since one that is
near zero today would not be missed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from piggyback_lens.conversations.batch import PaddingSide, padded
from piggyback_lens.errors import LensError
from piggyback_lens.models.attachment import adapter_inputs, require_switchable
from piggyback_lens.models.backends import HookedModel, backend_of, blocks_of, check_layers, device_of, n_layers_of
from piggyback_lens.models.gates import Gate, base_spans
from piggyback_lens.models.network import forward
from piggyback_lens.models.states import new_state, recurrent_layers
from piggyback_lens.models.views import (
    absent_weights,
    adapter_layers,
    adapter_off,
    computing_device,
    gradients_kept,
    inner_model,
    structural_copy,
)

EXACT = 2e-4
"""A difference of the logits of a token, relative to their length, that needs no excuse."""
NOISES = 2.0
"""Differences up to this many times what rounding makes in the owner's own pass are accepted."""
LENGTHS = (24, 17)
"""Tokens of the probe rows: different, so that padding and positions are part of the proof."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What an owner's model computes on the probe rows.

    Attributes:
        plain: a structural copy of the owner's model, in evaluation mode.
        name: for messages.
        rows: token ids.
        logits: per row, of the row alone.
        called: adapter layers that acted: the parameters in them, which all views share, and a name.
        adapter: False for what the model computes without its adapter.
    """

    plain: Any
    name: str
    rows: tuple[Int[Tensor, " _"], ...]
    logits: tuple[Float[Tensor, "_ vocab"], ...]
    called: Mapping[tuple[int, ...], str]
    adapter: bool = True

    @classmethod
    def of(cls, plain: Any, name: str, *, adapter: bool = True) -> "Expected":
        """Run an owner's model on the probe rows.

        Args:
            plain: a transformers or PEFT model in evaluation mode that nobody else uses (see `structural_copy`).
            name: for messages.
            adapter: False to run it without its adapter.

        Raises:
            LensError: its own logits are not finite, or some of its weights are not in memory.
        """
        if away := absent_weights(plain):
            raise LensError(f"{len(away)} weight tensors of {name} are on no device, e.g. {away[0]}: load them first")
        rows = _probe_rows(int(inner_model(plain).get_input_embeddings().weight.shape[0]))
        with _counting_calls(plain) as called:
            found = cls(plain, name, rows, (), {}, adapter)
            logits = tuple(found.now(plain))
        spoilt = sum(int((~x.isfinite()).any(dim=-1).sum()) for x in logits)
        if spoilt:
            here = ((key, x) for key, x in plain.named_parameters() if x.is_floating_point() and not x.is_meta)
            bad = [key for key, x in here if not bool(x.isfinite().all())]
            where = "its weights are finite, so its activations overflow: try another dtype"
            if bad:
                where = f"{len(bad)} of its weight tensors hold NaN or infinity, e.g. {bad[0]}: load them again"
            raise LensError(
                f"transformers' own logits of {name} are not finite on {spoilt} of {sum(LENGTHS)} probe tokens: {where}"
            )
        return replace(found, logits=logits, called=called if adapter else {})

    @cached_property
    def noise(self) -> float:
        """What rounding makes in the owner's own pass: under padding, and with another attention kernel."""
        alone, found = self.now(self.plain), [0.0]
        for side in ("left", "right"):
            ids, mask = self.padded(side)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            with torch.no_grad(), self._as_expected(self.plain):
                logits = self.plain(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            found.append(_difference(logits, mask, alone))
        other = structural_copy(self.plain)
        inner = inner_model(other)
        with suppress(Exception):  # an architecture with one kernel only
            inner.set_attn_implementation("sdpa" if inner.config._attn_implementation == "eager" else "eager")
            found += map(relative, self.now(other), alone)
        return max(found)

    @property
    def drift(self) -> float:
        """How far the owner's own pass has moved since it was expected: weights that were written to meanwhile."""
        return max(map(relative, self.now(self.plain), self.logits))

    @torch.no_grad()
    def now(self, plain: Any) -> list[Float[Tensor, "_ vocab"]]:
        """What the model, or a copy of it, computes on the probe rows at this moment."""
        with self._as_expected(plain):
            return [plain(input_ids=row[None].to(_device(plain))).logits[0] for row in self.rows]

    def _as_expected(self, plain: Any) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter else adapter_off(plain)

    def padded(self, side: PaddingSide) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
        """All rows as ids and mask."""
        batch, device = padded([row.tolist() for row in self.rows], side), _device(self.plain)
        return batch.ids.to(device), batch.attention_mask.to(device)


def _difference(
    logits: Float[Tensor, "row pos vocab"], mask: Int[Tensor, "row pos"], alone: Sequence[Float[Tensor, "_ vocab2"]]
) -> float:
    """The largest relative difference over the real tokens of a padded pass."""
    pairs = zip(logits, mask, alone, strict=True)
    return max(relative(ours[real.bool().to(ours.device)], theirs) for ours, real, theirs in pairs)


def relative(ours: Float[Tensor, "pos _"], theirs: Float[Tensor, "pos vocab"]) -> float:
    """Length of the difference over the length of theirs, the largest over tokens; NaN where ours is not finite."""
    mine = ours[:, : theirs.shape[1]].float()
    reference = theirs.float().to(mine.device)
    return float(((mine - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


@torch.no_grad()
def prove(model: HookedModel, expected: Expected) -> None:
    """Compare a hooked model with its owner.

    Raises:
        LensError: a pass fails or differs by more than rounding explains, or an adapter layer is not called; with the
            figures.
    """
    with _counting_calls(model) as called, _told(model, expected.name):
        for name, difference in passes(model, expected):
            _judge(model, expected, name, difference)
    ignored = [name for key, name in expected.called.items() if key not in called]
    if ignored and backend_of(model) == "bridge":
        raise LensError(
            f"bridge model of {expected.name} never calls {len(ignored)} of its {len(expected.called)} adapter layers, "
            f"e.g. {ignored[0]}: this adapter cannot be hooked there; merge it and give the result as finetuned="
        )


def prove_gate(model: HookedModel, expected: Expected, gate: Gate, base: HookedModel) -> None:
    """Compare a hooked model whose adapter is off at some tokens with its owner's, switched by hand token by token.

    The probe rows are taken as conversations: a third prefix, a third query, then postfix and response. Where a span is
    to have the base's keys and values by construction, they are compared with those of the base itself.

    Raises:
        LensError: logits, keys or values differ, or the adapter is of a kind that cannot be off by token; with the
            figures.
    """
    if recurrent_layers(model):
        raise LensError(
            f"{expected.name} has an adapter that is off at some tokens and layers without keys and values, where that "
            "cannot be proven"
        )
    require_switchable(model)
    off = [_off_at(gate, len(row), n_layers_of(model)) for row in expected.rows]
    by_hand = [_switched_by_hand(expected.plain, row, own) for row, own in zip(expected.rows, off, strict=True)]
    ids, mask = expected.padded("right")
    handles = []
    for layer in range(n_layers_of(model)):
        at = torch.zeros_like(mask, dtype=torch.bool)
        for row, own in enumerate(off):
            at[row, : own.shape[1]] = own[layer].to(at.device)

        def before(_: nn.Module, args: tuple[Any, ...], at: Tensor = at) -> Any:
            return (args[0].masked_fill(at.to(args[0].device)[..., None], 0), *args[1:])

        handles += [module.register_forward_pre_hook(before) for module in adapter_inputs(model, layer)]
    left, reference = (new_state(side, len(ids)) for side in (model, base))
    try:
        with torch.no_grad():
            found = _difference(forward(model, ids, mask, state=left), mask, by_hand)
    finally:
        for handle in handles:
            handle.remove()
    _judge(model, expected, f"the adapter off at {', '.join(part['span'] for part in gate)}", found)
    if not (spans := base_spans(gate)):
        return
    with torch.no_grad():
        forward(base, ids, mask, state=reference)
    apart = 0.0
    for ours, theirs in zip(left.cache.layers, reference.cache.layers, strict=True):
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):  # [row, kv_head, pos, head_dim]
            for row, tokens in enumerate(expected.rows):
                stop = _spans_of(len(tokens))[spans[-1]][1]
                apart = max(apart, *(relative(a[:stop], b[:stop]) for a, b in zip(one[row], other[row], strict=True)))
    if not apart <= max(EXACT, NOISES * expected.noise):
        raise LensError(
            f"the adapter of {expected.name} is off at {' and '.join(spans)}, and keys and values there differ from "
            f"the base's by {apart:.1e}: it changes the base by more than what can be off, or is of another base"
        )


def _spans_of(length: int) -> dict[str, tuple[int, int]]:
    """The spans of a probe row of this length."""
    third, answer = length // 3, length - 3
    spans = {"prefix": (0, third), "query": (third, 2 * third), "postfix": (2 * third, answer)}
    return spans | {"response": (answer, length), "prompt": (0, answer), "all": (0, length)}


def _off_at(gate: Gate, length: int, n_layers: int) -> Bool[Tensor, "layer pos"]:
    """Where the adapter is off in a probe row of this length."""
    spans, answer = _spans_of(length), length - 3
    off = torch.zeros(n_layers, length, dtype=torch.bool)
    for part in gate:
        start, stop = spans.get(part["span"], (1, 3))  # a sub-span of the template is some place in the prefix
        places = [start + token % (stop - start) for token in _all_or(part.get("tokens"), stop - start)]
        places = [
            at for at in places if part.get("phase", "both") in ("both", "prompt" if at < answer else "generation")
        ]
        for layer in _all_or(part.get("layers"), n_layers):
            off[check_layers([layer], n_layers)[0], places] = True
    return off


def _all_or(chosen: Sequence[int] | None, count: int) -> Sequence[int]:
    return range(count) if chosen is None else chosen


@torch.no_grad()
def _switched_by_hand(
    plain: Any, row: Int[Tensor, " pos"], off: Bool[Tensor, "layer pos"]
) -> Float[Tensor, "pos vocab"]:
    """The owner's logits, one token after the other, its adapter layers switched between them."""
    from transformers import DynamicCache

    blocks, state, found = blocks_of(plain), DynamicCache(), []
    with gradients_kept(plain):  # PEFT gives an adapter gradients when it switches it on
        for place, token in enumerate(row.tolist()):
            silent: list[Any] = [
                own for layer, block in enumerate(blocks) if off[layer, place] for own in adapter_layers(block).values()
            ]
            for own in silent:
                own.enable_adapters(False)
            try:
                one = torch.tensor([[token]], device=_device(plain))
                found.append(plain(input_ids=one, past_key_values=state, use_cache=True).logits[0, 0])
            finally:
                for own in silent:
                    own.enable_adapters(True)
    return torch.stack(found)


@contextmanager
def _told(model: HookedModel, name: str) -> Iterator[None]:
    """What TransformerLens raises in a pass of an architecture that it gets wrong, in one line."""
    try:
        yield
    except (LensError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LensError(
            f"{backend_of(model)} model of {name} fails in a pass ({type(error).__name__}: {error}): TransformerLens "
            "does not support this architecture; use another model, or another version of transformer-lens"
        ) from error


def passes(model: HookedModel, expected: Expected) -> Iterator[tuple[str, float]]:
    """What each kind of pass makes of the probe rows: its name, and how far its logits are from the owner's.

    Rows padded on the left and on the right, a pass on a filled cache, a decoding step; relative, the largest of all
    tokens. A model with recurrent layers has the first two only.
    """
    for side in ("left", "right"):
        ids, mask = expected.padded(side)
        yield f"{side}-padded rows", _difference(forward(model, ids, mask), mask, expected.logits)
    if recurrent_layers(model):
        return  # no keys and values to start from
    ids, mask = expected.padded("right")
    device = device_of(model)
    ids, mask = ids.to(device), mask.to(device)
    begun, last = min(LENGTHS) // 2, mask.sum(dim=1) - 1
    state = new_state(model, len(ids))
    parts = [forward(model, ids[:, :begun], mask[:, :begun], state=state)]
    rest = mask[:, begun:] * (torch.arange(begun, ids.shape[1], device=device) < last[:, None])
    parts.append(forward(model, ids[:, begun:], rest, state=state))
    state.right_align()
    step = forward(model, ids.gather(1, last[:, None]), torch.ones_like(last[:, None]), state=state)
    logits = torch.cat(parts, dim=1)
    filled = [relative(logits[i, : len(theirs) - 1], theirs[:-1]) for i, theirs in enumerate(expected.logits)]
    yield "a pass on a filled cache", max(filled)
    yield "a decoding step", max(relative(step[i], theirs[-1:]) for i, theirs in enumerate(expected.logits))


def _judge(model: HookedModel, expected: Expected, what: str, difference: float) -> None:
    if difference <= EXACT:
        return
    allowed = max(EXACT, NOISES * expected.noise)
    if not expected.drift <= allowed:
        raise LensError(
            f"the weights of {expected.name} were written to while it was hooked (its own logits moved by "
            f"{expected.drift:.1e}): does something train it meanwhile, or does the adapter rewrite its base?"
        )
    if not difference <= allowed:
        raise LensError(
            f"{backend_of(model)} model of {expected.name} differs from transformers by {difference:.1e} of its logits "
            f"({what}; {allowed:.1e} allowed, rounding makes {expected.noise:.1e} in transformers' own pass): "
            "use the other backend, or report the architecture"
        )


def _probe_rows(vocab: int) -> tuple[Int[Tensor, " _"], ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(min(3, vocab - 1), vocab, (length,), generator=generator) for length in LENGTHS)


def _device(plain: Any) -> torch.device:
    return computing_device(inner_model(plain).get_input_embeddings())


@contextmanager
def _counting_calls(model: Any) -> Iterator[dict[tuple[int, ...], str]]:
    """Collects the adapter layers that are called: by the parameters in them, which all views share, with a name."""
    called: dict[tuple[int, ...], str] = {}
    handles = []
    for name, layer in adapter_layers(getattr(model, "original_model", model)).items():
        # Offloaded ones are new tensors in every pass.
        key = tuple(id(parameter) for parameter in layer.parameters() if parameter.device.type != "meta")

        def note(*_: Any, key: tuple[int, ...] = key, name: str = name) -> None:
            called[key] = name

        handles.append(layer.register_forward_pre_hook(note))
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
