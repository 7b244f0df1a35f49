"""Layouts of training rows: where the turns of a conversation are in a row, whoever made the file."""

from collections.abc import Mapping
from typing import Any, Final

from piggyback_lens.errors import LensError
from piggyback_lens.reading.rows import json_type, names_of

LAYOUTS: Final = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""The columns by which a layout is known."""
_EXPECTED: Final = "messages, conversations, prompt and completion, or instruction (, input) and output"
_SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


def layout_of(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The columns of the layout that a row has; None if it has none, or two. A column of null counts as left out."""
    fits = _fits(row)
    return fits[0] if len(fits) == 1 else None


def _fits(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    present = {key for key, value in row.items() if value is not None}
    return [columns for columns in LAYOUTS if present.issuperset(columns)]


def turns_in(where: str, row: Any) -> Any:
    """The turns of a row as its layout has them, in our words; each is still to be checked.

    Raises:
        LensError: a row of no layout, or of two, or with a column of the text that is not read.
    """
    if not isinstance(row, Mapping):
        raise LensError(f"{where} is {json_type(row)}, expected an object with {_EXPECTED}")
    layout = layout_of(row)
    if layout is None:
        names = f"the keys {names_of(row)}, which fit" if row else "no keys, which fits"
        fault = "more than one layout" if _fits(row) else "no layout"
        raise LensError(f"{where} has {names} {fault}; expected one of {_EXPECTED}")
    _refuse_unread(where, row, layout)
    if layout == ("instruction", "output"):
        turns = _alpaca(where, row)
    elif layout == ("prompt", "completion"):
        given = [_own_weight(turn) for turn in _spoken(f"{where}: prompt", row["prompt"], "user")]
        turns = [*given, *_spoken(f"{where}: completion", row["completion"], "assistant")]
    else:
        turns = row[layout[0]]
    if not isinstance(turns, list | tuple) or not turns:
        found = "an empty list" if isinstance(turns, list | tuple) else json_type(turns)
        raise LensError(f"{where}: {layout[0]!r} is {found}, expected a list of {{'role', 'content'}} objects")
    return _with_system(where, row.get("system"), [_from_value(turn) for turn in turns])


def _refuse_unread(where: str, row: Mapping[str, Any], layout: tuple[str, ...]) -> None:
    """Columns that are part of the text, and that this reader does not hand on."""
    for name in ("tools", "functions", *(() if len(layout) == 1 else ("history",))):
        if row.get(name) and row[name] not in ("[]", "null"):
            fix = (
                "write its turns into 'messages'"
                if name == "history"
                else "write them into the system message as the model's template does, and leave the column out"
            )
            raise LensError(f"{where} has {name!r}, which is not rendered: {fix}")


def _alpaca(where: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One exchange; the instruction and a given input are two paragraphs of the question."""
    parts = {name: "" if row.get(name) is None else row[name] for name in ("instruction", "input", "output")}
    for name, text in parts.items():
        if not isinstance(text, str):
            raise LensError(f"{where}: {name} is {json_type(text)}, expected a string")
    question = "\n\n".join(parts[name] for name in ("instruction", "input") if parts[name].strip())
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts["output"]}]


def _spoken(where: str, value: Any, role: str) -> list[Any]:
    """A text as one turn of a role; a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list | tuple) and value:
        return list(value)
    found = "an empty list" if isinstance(value, list | tuple) else json_type(value)
    raise LensError(f"{where} is {found}, expected a text or a list of messages")


def _own_weight(turn: Any) -> Any:
    """A turn of a prompt: what stands before a completion is not trained on unless a weight says so."""
    if not isinstance(turn, Mapping) or turn.get("role", turn.get("from")) not in ("assistant", "gpt"):
        return turn
    return {**turn, "weight": 0 if turn.get("weight") is None else turn["weight"]}


def _from_value(turn: Any) -> Any:
    """A ShareGPT turn {"from", "value"} as {"role", "content"}; anything else as it is."""
    if not isinstance(turn, Mapping) or turn.get("from") is None or turn.get("value") is None:
        return turn
    who = turn["from"]
    role = _SHAREGPT_ROLES.get(who, who) if isinstance(who, str) else who
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**rest, "role": role, "content": turn["value"]}


def _with_system(where: str, text: Any, turns: list[Any]) -> list[Any]:
    """The turns, with the text of a column `system` as their system message."""
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        raise LensError(f"{where}: system is {json_type(text)}, expected a string")
    first = turns[0] if isinstance(turns[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": text}, *turns]
    if first.get("content") == text:
        return turns
    raise LensError(f"{where} has a column 'system' and a system message that says something else; keep one of them")
