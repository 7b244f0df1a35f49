"""Training conversations: from files and from hub datasets, checked row by row."""

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from piggyback_lens.errors import LensError
from piggyback_lens.reading.rows import (
    FILE_SUFFIXES,
    HUB_ID,
    encodable,
    hub_rows,
    json_lines,
    kind_of,
    names_of,
    not_empty,
)

Message = Mapping[str, str]
"""One turn: exactly the keys "role" (system, user or assistant) and "content"."""
Example = Mapping[str, Sequence[Message]]
"""One conversation: {"messages": [message, ...]}."""
ROLES: Final = ("system", "user", "assistant")
_SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def load_conversations(
    path_or_hub_id: str | os.PathLike[str],
    *,
    split: str = "train",
    limit: int | None = None,
    offline: bool = False,
) -> list[Example]:
    """Read training conversations from a JSONL file or from a dataset on the Hugging Face hub.

    Keys other than "role" and "content", and columns other than the conversation, are dropped.

    Args:
        path_or_hub_id: a file with one {"messages": [{"role", "content"}, ...]} per line, blank lines
            skipped; or "owner/name" of a hub dataset with a column messages or conversations, whose turns
            may also be {"from", "value"} with human and gpt. An existing local path always wins.
        split: of the hub dataset; a file has no splits, so for a file it must stay "train".
        limit: read at most this many conversations, the first ones; rows after them are not looked at.
        offline: make no connection; a hub dataset then has to be in the local cache.

    Raises:
        LensError: nothing there, or a row that is no conversation ending with a user turn and its answer. The
            message names the line of the file, or the row of the dataset (from 1).
    """
    if limit is not None and limit < 1:
        raise LensError(f"limit is {limit}, expected at least 1 conversation (or None for all)")
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        if split != "train":
            raise LensError(f"{path} is a local file and has no split {split!r}: leave split out")
        rows = ((f"{path} line {number}", value) for number, value in json_lines(path))
        examples = [_conversation(where, row) for where, row in islice(rows, limit)]
        return not_empty(examples, f"{path} holds no conversations: expected one JSON object per line")
    name = str(path_or_hub_id)
    looks_local = isinstance(path_or_hub_id, os.PathLike) or path.suffix.lower() in FILE_SUFFIXES
    if looks_local or not HUB_ID.fullmatch(name):
        raise LensError(f"{name} does not exist and is no hub id (owner/name): check the path")
    return not_empty(_from_hub(name, split, limit, offline), f"split {split!r} of {name} holds no conversations")


def _conversation(where: str, row: Any) -> Example:
    """A row of a file or dataset, cut down to what training needs."""
    if not isinstance(row, Mapping):
        raise LensError(f"{where} is {kind_of(row)}, expected an object with 'messages'")
    if "messages" not in row:
        raise LensError(f"{where} has no 'messages', only {names_of(row)}; expected {{'messages': [...]}}")
    messages = messages_of(where, row["messages"])
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise LensError(f"{where} has no assistant turn to train on; its roles are {roles}")
    if roles[-2:] != ["user", "assistant"] or "system" in roles[1:]:
        raise LensError(f"{where} has the roles {roles}; expected [system,] user, assistant, ..., user, assistant")
    return {"messages": messages}


def messages_of(where: str, messages: Any) -> list[Message]:
    """The messages of a conversation, checked one by one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        found = "an empty list" if isinstance(messages, list) else kind_of(messages)
        raise LensError(f"{where}: 'messages' is {found}, expected a list of {{'role', 'content'}} objects")
    return [_message(f"{where}, message {i}", message) for i, message in enumerate(messages, 1)]


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise LensError(f"{where} is {kind_of(message)}, expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise LensError(f"{where} has role {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise LensError(f"{where}: content is {kind_of(content)}, expected a string")
    return {"role": role, "content": encodable(where, content)}


def _from_hub(name: str, split: str, limit: int | None, offline: bool) -> list[Example]:
    rows = hub_rows(name, split, limit, offline)
    return [_conversation(f"{name} row {i}", _hub_row(name, row)) for i, row in enumerate(rows, 1)]


def _hub_row(name: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`row` with its conversation under "messages", in our words."""
    column = next((column for column in ("messages", "conversations") if column in row), None)
    if column is None:
        raise LensError(f"{name} has the columns {names_of(row)}; expected one called 'messages' or 'conversations'")
    turns = row[column]
    return {"messages": [_from_value(turn) for turn in turns] if isinstance(turns, list) else turns}


def _from_value(turn: Any) -> Any:
    """A ShareGPT turn {"from", "value"} as {"role", "content"}; anything else as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        return turn
    return {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
