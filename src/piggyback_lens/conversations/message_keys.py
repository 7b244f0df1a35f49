"""What a message may hold beside its role and its content, and what it means for the text."""

import json
from collections.abc import Mapping
from typing import Any, Final

from piggyback_lens.errors import LensError

WRITTEN_KEYS: Final = ("tool_calls", "reasoning_content", "reasoning", "thinking", "function_call", "refusal", "audio")
"""Keys that are part of what is said: a template has to write them, or the message is refused."""
LINK_KEYS: Final = ("tool_call_id", "name")
"""Keys that say to which call a tool's result belongs: handed to the template, which may do without them."""
CALL_FORM: Final = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'


def read_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """The tool calls of a message, their arguments as objects (the field's files have them as JSON texts).

    Raises:
        LensError: a call of another form, by its number.
    """
    if not isinstance(calls, list | tuple):
        raise LensError(f"{where}: tool_calls is of type {type(calls).__name__}, expected a list of {CALL_FORM}")
    return [_read_call(f"{where}: tool call {i}", call) for i, call in enumerate(calls, 1)]


def _read_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise LensError(f"{where} is {json.dumps(call, default=repr)[:120]}, expected {CALL_FORM}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = function["arguments"]
    if not isinstance(arguments, Mapping):
        shown = json.dumps(arguments, default=repr)[:120]
        raise LensError(f"{where} has the arguments {shown}, expected an object or the JSON text of one")
    return {**call, "function": {**function, "arguments": dict(arguments)}}
