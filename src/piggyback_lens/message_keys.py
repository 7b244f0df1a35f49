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


class FullTurn(tuple[str, str]):
    """(role, content) of a message that has more keys; equal to another only if those are equal too."""

    more: str

    def __new__(cls, role: str, content: str, message: Mapping[str, Any]) -> "FullTurn":
        """Of the whole message as the template is to have it."""
        turn = super().__new__(cls, (role, content))
        turn.more = json.dumps({**message, "role": role}, ensure_ascii=False)
        return turn

    def message(self) -> dict[str, Any]:
        """The message as the template has it."""
        message: dict[str, Any] = json.loads(self.more)
        return message

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FullTurn) and self.more == other.more

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.more)


def message_of(turn: tuple[str, str]) -> dict[str, Any]:
    """A turn as a message for the template."""
    return turn.message() if isinstance(turn, FullTurn) else {"role": turn[0], "content": turn[1]}


def read_turn(index: int, message: Mapping[str, Any]) -> tuple[str, Any]:
    """Role and content of a message; a `FullTurn` if it has keys that a template may write.

    Raises:
        LensError: a key that no message of this role has, or malformed tool calls.
    """
    role = message.get("role")
    allowed = {"assistant": WRITTEN_KEYS, "tool": LINK_KEYS}.get(str(role), ())
    more = {key: message[key] for key in allowed if message.get(key) not in (None, "", [])}
    keys = {key for key, value in message.items() if value is not None}  # datasets fill unused columns with None
    keys -= set(allowed)
    if "tool_calls" in more:
        more["tool_calls"] = read_calls(f"message {index}", more["tool_calls"])
        keys.add("content")
    if keys != {"role", "content"}:
        hint = "; load_conversations and training_turns act on weights and take them out" if "weight" in keys else ""
        raise LensError(
            f"message {index} has the keys {sorted(map(str, keys))}; expected exactly 'role' and 'content'{hint}"
        )
    content = "" if "tool_calls" in more and message.get("content") is None else message["content"]
    if not more or not isinstance(content, str):
        return str(role), content
    return FullTurn(str(role), content, {"content": content, **more})
