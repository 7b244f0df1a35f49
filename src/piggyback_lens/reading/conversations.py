"""Training conversations: from files and from hub datasets, in any of the field's layouts, checked row by row."""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from piggyback_lens.errors import LensError
from piggyback_lens.message_keys import LINK_KEYS, WRITTEN_KEYS, read_calls
from piggyback_lens.progress import say
from piggyback_lens.reading.row_layouts import layout_of, turns_in
from piggyback_lens.reading.rows import (
    FILE_SUFFIXES,
    HUB_ID,
    encodable,
    file_rows,
    hub_rows,
    json_type,
    not_empty,
    without_nulls,
)
from piggyback_lens.words import Supervise

Message = Mapping[str, Any]
"""One turn: "role" (system, user, assistant or tool), "content", and what else of `message_keys` was said."""
Example = Mapping[str, Sequence[Message]]
"""One conversation: {"messages": [message, ...]}."""
ROLES: Final = ("system", "user", "assistant", "tool")
_KEPT: Final = frozenset(("role", "content", *WRITTEN_KEYS, *LINK_KEYS))


def load_conversations(
    path_or_hub_id: str | os.PathLike[str],
    *,
    supervise: Supervise = "last",
    split: str = "train",
    limit: int | None = None,
    offline: bool = False,
) -> list[Example]:
    """Read training conversations from a file or from a dataset on the Hugging Face hub, by one reader for both.

    Every conversation that is returned ends with the one assistant turn that it trains; the turns before it are
    its history. By default that is the last turn of each row, and a line says how many earlier ones are left out.

    A row has one of these layouts, and a file may mix them: {"messages": [...]} or {"conversations": [...]}, of
    {"role", "content"} or ShareGPT's {"from", "value"}; {"prompt", "completion"}, each a text or a list of messages
    (assistant turns of the prompt are not trained on); Alpaca's {"instruction", "input", "output"}, where a given
    input follows the instruction after a blank line. A text in a column system becomes the system message.

    A content may be a list of text parts, which are joined. tool_calls (with a null content), the role tool and
    reasoning_content are kept, and `ChatFormat.render` refuses them by name where the template does not write
    them. Other keys of messages are left out, and a line names them; other columns are no part of a conversation.

    An assistant message may have a weight: turns of weight 0 are not trained on. Where a conversation has turns
    of weight 1, exactly those are trained on, whatever `supervise` says; else `supervise` chooses among the rest.

    Args:
        path_or_hub_id: a .jsonl file (a row per line, blank lines skipped), .json (a list of rows), .csv or .parquet;
            or "owner/name" of a hub dataset. An existing local path always wins; an unknown suffix is read as JSONL.
        supervise: "last" trains on the last assistant turn of a row; "all" on every one, each as a row of its own.
        split: of the hub dataset; a file has no splits, so for a file it must stay "train".
        limit: read at most this many rows, the first ones; rows after them are not looked at.
        offline: make no connection; a hub dataset then has to be in the local cache.

    Raises:
        LensError: nothing there, or a row that is no conversation ending with an assistant's turn, or has no turn
            to train on. The message names the line of the file, or the row of the dataset (from 1).
    """
    if limit is not None and limit < 1:
        raise LensError(f"limit is {limit}, expected at least 1 conversation (or None for all)")
    path, name = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if path.exists():
        if split != "train":
            raise LensError(f"{path} is a local file and has no split {split!r}: leave split out")
        rows: Iterable[tuple[str, Any]] = islice(file_rows(path), limit)
        empty = f"{path} holds no conversations: expected one JSON object per line, or a list of them"
    else:
        looks_local = isinstance(path_or_hub_id, os.PathLike) or path.suffix.lower() in FILE_SUFFIXES
        if looks_local or not HUB_ID.fullmatch(name):
            raise LensError(f"{name} does not exist and is no hub id (owner/name): check the path")
        found = hub_rows(name, split, limit, offline)
        rows = ((f"{name} row {number}", without_nulls(row)) for number, row in enumerate(found, 1))
        empty = f"split {split!r} of {name} holds no conversations"
    talks = not_empty([(where, _conversation(where, row)) for where, row in rows], empty)
    _tell(name, [messages for _, messages in talks], supervise)
    return [{"messages": turns} for where, messages in talks for turns in _turns(where, messages, supervise)]


def training_turns(conversation: Example, supervise: Supervise = "last") -> list[list[Message]]:
    """The conversations that a conversation trains on: one per supervised assistant turn, which it ends with.

    Args:
        conversation: {"messages": [...]}, ending with an assistant's turn; weights as in `load_conversations`.
        supervise: the last assistant turn, or all of them.

    Raises:
        LensError: a malformed message, roles in another order, or no turn to train on.

    Example:
        >>> def said(role, text):
        ...     return {"role": role, "content": text}
        >>> talk = [said("user", "1?"), said("assistant", "one"), said("user", "2?"), said("assistant", "two")]
        >>> [turns[-1]["content"] for turns in training_turns({"messages": talk}, "all")]
        ['one', 'two']
    """
    where = "the conversation"
    return _turns(where, _conversation(where, conversation), supervise)


def holds_answer(row: Any) -> bool:
    """Whether a row is a conversation with an assistant's turn, as far as its layout tells."""
    layout = layout_of(row) if isinstance(row, Mapping) else None
    if layout is None or len(layout) == 2:
        return layout is not None
    turns = row[layout[0]]
    names = [turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, Mapping)]
    return "assistant" in names or "gpt" in names


# ---------------------------------------------------------------- what is trained


def _turns(where: str, messages: Sequence[Message], supervise: Supervise) -> list[list[Message]]:
    """The messages up to each supervised turn, without weights and without what is no part of the text."""
    chosen = _supervised(messages, supervise)
    if not chosen:
        raise LensError(f"{where} has no assistant turn to train on, all have weight 0: leave the row out")
    roles = [message["role"] for message in messages]
    for i in chosen:
        if i == 0 or roles[i - 1] not in ("user", "tool") or "user" not in roles[:i]:
            raise LensError(
                f"{where}: message {i + 1} is to be trained on and answers nobody, its roles are {roles}; "
                "give it weight 0, or put a user turn before it"
            )
    plain: list[Message] = [{key: message[key] for key in message if key in _KEPT} for message in messages]
    return [plain[: i + 1] for i in chosen]


def _supervised(messages: Sequence[Message], supervise: Supervise) -> list[int]:
    """Which messages are trained on. A weight of 1 is a choice of its own; without one `supervise` chooses."""
    weights = {i: message.get("weight") for i, message in enumerate(messages) if message["role"] == "assistant"}
    if 1 in weights.values():
        return [i for i, weight in weights.items() if weight == 1]
    free = [i for i, weight in weights.items() if weight != 0]
    return free if supervise == "all" else free[-1:]


def _tell(name: str, talks: Sequence[Sequence[Message]], supervise: Supervise) -> None:
    """One line for turns that are left out by default, and one for keys that are no part of the text."""
    if supervise == "last":
        pairs = [(_supervised(messages, "all"), _supervised(messages, "last")) for messages in talks]
        left_out = sum(len(every) - len(last) for every, last in pairs)
        if left_out:
            count = "1 earlier assistant turn is" if left_out == 1 else f"{left_out} earlier assistant turns are"
            say(
                f"{name}: {count} not trained on, only the last one of each conversation; "
                "supervise='all' (--supervise all) trains on all of them"
            )
    unread = sorted({str(key) for messages in talks for message in messages for key in message} - _KEPT - {"weight"})
    if unread:
        say(f"{name}: the keys {', '.join(map(repr, unread))} of messages are no part of the text and are left out")


# ---------------------------------------------------------------- one conversation, one message


def _conversation(where: str, row: Any) -> list[Message]:
    """The messages of a row, checked; with the weights and with the keys that are to be left out."""
    messages = messages_of(where, turns_in(where, row))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise LensError(f"{where} has no assistant turn to train on; its roles are {roles}")
    after = ["assistant", "tool"]  # what a tool's result follows
    lost = any(role == "tool" and (i == 0 or roles[i - 1] not in after) for i, role in enumerate(roles))
    if roles[-1] != "assistant" or len(roles) < 2 or "system" in roles[1:] or lost:
        raise LensError(
            f"{where} has the roles {roles}; expected [system,] user, assistant, ..., user, assistant "
            "(an assistant's tool calls may be followed by tool and assistant)"
        )
    return messages


def messages_of(where: str, messages: Any) -> list[Message]:
    """The messages of a conversation, checked one by one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        found = "an empty list" if isinstance(messages, list) else json_type(messages)
        raise LensError(f"{where}: 'messages' is {found}, expected a list of {{'role', 'content'}} objects")
    return [_message(f"{where}, message {i}", message) for i, message in enumerate(messages, 1)]


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise LensError(f"{where} is {json_type(message)}, expected an object with 'role' and 'content'")
    given = {key: value for key, value in message.items() if value is not None and value not in ([], "")}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise LensError(f"{where} has role {role!r}, expected one of {', '.join(ROLES)}")
    if "tool_calls" in given:
        given["tool_calls"] = read_calls(where, given["tool_calls"])
        content = "" if content is None else content
    if "weight" in given:
        given["weight"] = _weight(where, role, given["weight"])
    if isinstance(content, list | tuple):
        content = "".join(_part(f"{where}: part {i} of the content", part) for i, part in enumerate(content, 1))
    if not isinstance(content, str):
        raise LensError(f"{where}: content is {json_type(content)}, expected a string")
    return {**given, "role": role, "content": encodable(where, content)}


def _weight(where: str, role: str, weight: Any) -> int:
    if isinstance(weight, bool) or weight not in (0, 1):
        raise LensError(f"{where} has the weight {weight!r}, expected 0 or 1")
    if weight == 1 and role != "assistant":
        raise LensError(f"{where} has the role {role} and weight 1; only assistant turns are trained on: leave it out")
    return int(weight)


def _part(where: str, part: Any) -> str:
    """The text of a part of a content."""
    if not isinstance(part, Mapping):
        raise LensError(f"{where} is {json_type(part)}, expected {{'type': 'text', 'text': ...}}")
    if part.get("type") != "text":
        raise LensError(f"{where} is of type {part.get('type')!r}; only text is read: leave the row out")
    if not isinstance(part.get("text"), str):
        raise LensError(f"{where}: text is {json_type(part.get('text'))}, expected a string")
    return str(part["text"])
