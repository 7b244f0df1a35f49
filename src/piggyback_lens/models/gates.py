"""Gates: the tokens at which a finetune's adapter is off in every pass, because it was trained with itself off there.

The places are spans of the template, so a pass has to know which token of which conversation each of its columns is.
Interventions know that and switch the adapter off; a pass that does not is refused, since it would run another model.
"""

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from piggyback_lens.errors import LensError

OFF_FILE = "adapter_off.json"
"""Beside an adapter that was trained by `GatedAdapter`: where it was off."""
Gate = Sequence[Mapping[str, Any]]
"""What `adapter_off` gives, as JSON: span, layers, tokens, phase of each part."""
_IN_ORDER = ("prefix", "query", "postfix")


@dataclass
class _Gated:
    gate: tuple[dict[str, Any], ...]
    told: int = 0  # how many blocks are open in which the tokens are known


_GATED: "weakref.WeakKeyDictionary[Any, _Gated]" = weakref.WeakKeyDictionary()


def set_gate(view: Any, gate: Gate) -> None:
    """From now on, the adapter of a hooked model is off at these tokens."""
    if gate:
        _GATED[view] = _Gated(tuple(dict(part) for part in gate))


def gate_of(model: Any) -> Gate:
    """The tokens at which the adapter of a model is off in every pass; nothing for any other model."""
    found = _gated(model)
    return () if found is None else found.gate


def as_texts(gate: Gate) -> tuple[str, ...]:
    """The parts, each as one text that can be compared."""
    return tuple(json.dumps(dict(part), sort_keys=True) for part in gate)


def base_spans(gate: Gate) -> tuple[str, ...]:
    """Spans whose keys and values are the base's by construction: off as a whole, like all that stands before."""
    whole = [part for part in gate if part.get("layers") is None and part.get("tokens") is None]
    named = {part["span"] for part in whole if part.get("phase", "both") != "generation"}
    if named & {"prompt", "all"}:
        return _IN_ORDER
    closed = [name in named for name in _IN_ORDER]
    return _IN_ORDER[: closed.index(False)] if False in closed else _IN_ORDER


def by_construction(spans: Sequence[str]) -> str:
    """What a reader of patches has to know of such spans; "" where there are none."""
    if not spans:
        return ""
    where = " and ".join(spans)
    return (
        f"The adapter is off at the {where}, whose keys and values are the base's by construction: patches there "
        "change nothing, whatever spreads."
    )


@contextmanager
def tokens_told(view: Any) -> Iterator[None]:
    """Passes inside are let through: their tokens are known, or none of them is one of a conversation."""
    found = _gated(view)
    if found is None:
        yield
        return
    found.told += 1
    try:
        yield
    finally:
        found.told -= 1


def require_tokens_told(view: Any) -> None:
    """Refuse a pass of a gated model in which nobody knows the spans of the tokens.

    Raises:
        LensError: it says where the adapter is off.
    """
    found = _gated(view)
    if found is not None and not found.told:
        spans = ", ".join(part["span"] for part in found.gate)
        raise LensError(
            f"this finetune's adapter is off at {spans}, and this pass does not know which tokens those are: use "
            "generate, the scores and maps, or  with applied(model, batch_prompts(prompts), ())"
        )


def _gated(model: Any) -> _Gated | None:
    try:
        return _GATED.get(model)
    except TypeError:  # what cannot be referred to weakly is no hooked model
        return None
