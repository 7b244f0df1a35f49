"""`out=` of the experiments with directions: the call's arguments are what its run is, and its result is kept."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from piggyback_lens.conversations.batch import ids_hash
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.measuring.variants import Text, texts_hash
from piggyback_lens.models.pair import Identity, ModelPair, identify
from piggyback_lens.results.result import Result
from piggyback_lens.results.run import Run
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.direction import Direction

P = ParamSpec("P")
R = TypeVar("R", bound=Result)
NOT_DECIDING = {"model", "out", "progress", "batch_size", "rows_per_pass", "tokenizer"}
"""Arguments that change no number."""


def solution_hash(solution: Adapter) -> str:
    """16 hex digits of what a solution does: places, settings and numbers."""
    digest = hashlib.sha256(json.dumps(solution.settings(), sort_keys=True).encode())
    for name, value in solution.tensors().items():
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def kept(
    result: type[R], deciding: Callable[[Any], Mapping[str, Any]] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give `out=` to a function that makes such a result: a folder that the same call reads back.

    Of its settings, `deciding` says which decide the numbers.

    The function names `out` among its arguments, for its signature; it never gets one.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def run_in(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            out = given.arguments.pop("out")
            if out is None:
                return function(*args, **kwargs)
            models: dict[str, Identity] = {}
            if deciding is not None:
                given.arguments["settings"] = deciding(given.arguments["settings"])
            facts = {n: _described(x, n, models) for n, x in given.arguments.items() if n not in NOT_DECIDING}
            if given.arguments.get("model") is not None:
                models["model"] = identify(given.arguments["model"])
            plain = {name: value for name, value in kwargs.items() if name != "out"}
            asked = [row for value in given.arguments.values() if _are_prompts(value) for row in value]
            where = Path(str(out))
            with Run.open(where, function.__name__, facts, models=models, prompt=next(iter(asked), None)) as run:
                done = run.result(result.load)
                return run.finish(function(*args, **plain)) if done is None else done  # type: ignore[arg-type]

        return run_in

    return decorated


def _described(value: Any, name: str, models: dict[str, Identity]) -> Any:
    """An argument as JSON; models within it go to `models`, where they are compared by their logits."""
    found: Any = value
    if isinstance(value, Direction | LoRAAdapter):
        found = solution_hash(value)
    elif isinstance(value, Behaviour):
        found = value.name
    elif isinstance(getattr(value, "fingerprint", None), str):
        found = value.fingerprint
    elif isinstance(value, ModelPair):
        models.update({f"{name}, {side}": identity for side, identity in value.identities().items()})
        found = dict(value.names)
    elif isinstance(value, Mapping):
        found = {str(key): _described(part, f"{name}.{key}", models) for key, part in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str):
        found = _row(value, name, models)
    elif hasattr(value, "__dataclass_fields__"):
        names = [part for part in value.__dataclass_fields__ if part not in NOT_DECIDING]
        fields = {part: getattr(value, part) for part in names}
        found = {part: _described(own, f"{name}.{part}", models) for part, own in fields.items()}
    return found


def _row(values: Sequence[Any], name: str, models: dict[str, Identity]) -> Any:
    if _are_prompts(values):
        return ids_hash(values)
    if values and all(isinstance(part, Text) for part in values):
        return texts_hash(values)
    return [_described(part, f"{name}.{number}", models) for number, part in enumerate(values)]


def _are_prompts(value: Any) -> bool:
    """Whether an argument is rendered prompts."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(part, RenderedPrompt) for part in value)
