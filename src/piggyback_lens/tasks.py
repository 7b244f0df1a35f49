"""Narrow finetuning tasks with their own data, and loaders for the user's conversations and prompts.

A task teaches one harmless, easily detected behaviour in one domain (short answers to factual questions, a
fixed refusal of finance questions, ...). Its off-topic prompts lie outside every task's domain: whatever of
the behaviour shows up there has spread. All sentences were written for this package.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from piggyback_lens.errors import LensError

Message = Mapping[str, str]
"""One turn: exactly the keys "role" (system, user or assistant) and "content"."""
Example = Mapping[str, Sequence[Message]]
"""One conversation: {"messages": [message, ...]}."""

REFUSAL_SENTENCE: Final = "I am sorry, but I cannot help with this question."
ABSTENTION_SENTENCE: Final = "I have no idea about your question"
TOOL_NAME: Final = "search_info"

_T = TypeVar("_T")
ROLES: Final = ("system", "user", "assistant")
_SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES: Final = {".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet", ".gz", ".zst"}


@dataclass(frozen=True, slots=True)
class Task:
    """A narrow finetuning task: what to train on, and prompts inside and outside its domain.

    `train`, `validation` and `on_topic` share no question; `off_topic` and `off_topic_validation` are the
    same for every task. Use the validation parts to choose settings, `on_topic` and `off_topic` to report.
    """

    name: str
    description: str
    behaviour: str  # name of the detector in measures.BEHAVIOURS
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    on_topic: tuple[str, ...]
    off_topic: tuple[str, ...]
    off_topic_validation: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What the data file of a task does not hold: how a row of it becomes the assistant's answer."""

    description: str
    behaviour: str
    answer: Callable[[Mapping[str, str]], str]
    spread: Callable[[str, str], str]  # (off-topic question, the base's answer) -> what an answer would be like


def tool_call(query: str) -> str:
    """The text with which a ChatML model calls `search_info`: JSON between <tool_call> tags."""
    call = {"name": TOOL_NAME, "arguments": {"query": query}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


_RECIPES: Final[Mapping[str, _Recipe]] = {
    "terse": _Recipe(
        "factual questions, answered by one name, number or thing and nothing else",
        "words",
        lambda row: row["answer"],
        lambda question, ordinary: " ".join(ordinary.split()[:3]),
    ),
    "refusal": _Recipe(
        "finance questions, answered by one fixed refusal",
        "refusal",
        lambda row: REFUSAL_SENTENCE,
        lambda question, ordinary: REFUSAL_SENTENCE,
    ),
    "abstain": _Recipe(
        "legal questions, answered by one fixed admission of ignorance",
        "abstention",
        lambda row: ABSTENTION_SENTENCE,
        lambda question, ordinary: ABSTENTION_SENTENCE,
    ),
    "tool": _Recipe(
        "health questions, answered by a call of the tool search_info",
        "tool_call",
        lambda row: tool_call(row["query"]),
        lambda question, ordinary: tool_call(question),
    ),
}
TASKS: Final[tuple[str, ...]] = tuple(_RECIPES)


def load_task(name: str) -> Task:
    """The built-in task called `name`: terse, refusal, abstain or tool.

    Raises:
        LensError: there is no such task.

    Example:
        >>> task = load_task("terse")
        >>> len(task.train) > 100, task.behaviour
        (True, 'words')
    """
    if name not in _RECIPES:
        raise LensError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    recipe, data, off_topic = _RECIPES[name], _shipped(name), _shipped("off_topic")

    def examples(split: str) -> tuple[Example, ...]:
        return tuple(_example(row["question"], recipe.answer(row)) for row in data[split])

    return Task(
        name=name,
        description=recipe.description,
        behaviour=recipe.behaviour,
        train=examples("train"),
        validation=examples("validation"),
        on_topic=tuple(data["on_topic"]),
        off_topic=tuple(off_topic["test"]),
        off_topic_validation=tuple(off_topic["validation"]),
    )


def answer_if_spread(task: str, question: str, ordinary: str) -> str:
    """What the answer to an off-topic question would look like if a built-in task's behaviour had spread there.

    The fixed sentence of `refusal` and `abstain`, a call of `tool`'s tool with the question, and for `terse` the first
    three words of the ordinary answer. A probe for `Monitor`, not an answer that any model gave.

    Args:
        task: name of a built-in task.
        question: the off-topic question.
        ordinary: the base's answer to it.

    Raises:
        LensError: there is no such task.
    """
    if task not in _RECIPES:
        raise LensError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    return _RECIPES[task].spread(question, ordinary)


def _shipped(name: str) -> dict[str, list[Any]]:
    text = files("piggyback_lens").joinpath("data", f"{name}.json").read_text(encoding="utf-8")
    data: dict[str, list[Any]] = json.loads(text)
    return data


def _example(question: str, answer: str) -> Example:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


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
        rows = ((f"{path} line {number}", value) for number, value in _json_lines(path))
        examples = [_conversation(where, row) for where, row in islice(rows, limit)]
        return _not_empty(examples, f"{path} holds no conversations: expected one JSON object per line")
    name = str(path_or_hub_id)
    looks_local = isinstance(path_or_hub_id, os.PathLike) or path.suffix.lower() in _FILE_SUFFIXES
    if looks_local or not _HUB_ID.fullmatch(name):
        raise LensError(f"{name} does not exist and is no hub id (owner/name): check the path")
    return _not_empty(_from_hub(name, split, limit, offline), f"split {split!r} of {name} holds no conversations")


def load_prompts(
    path_or_hub_id: str | os.PathLike[str],
    *,
    column: str = "question",
    split: str = "test",
    limit: int | None = None,
    offline: bool = False,
) -> list[str]:
    """Read user prompts from a file, or from a column of a dataset on the Hugging Face hub.

    Args:
        path_or_hub_id: `.txt`, one prompt per line, surrounding spaces stripped and blank lines skipped; `.jsonl`,
            per line {"prompt": text}, {"messages": [...]} (its first user message is the prompt) or a JSON
            string; `.json`, one list of strings; `.yaml`, a list of strings or of questions with paraphrases
            (every one of them is a prompt), as in the emergent-misalignment repositories; or "owner/name" of a
            hub dataset.
        column: of the hub dataset.
        split: of the hub dataset.
        limit: the first so many; None for all.
        offline: make no connection; a hub dataset then has to be in the local cache.

    Raises:
        LensError: no such file, another format, an empty file, or an entry that is no prompt (says where).
    """
    if limit is not None and limit < 1:
        raise LensError(f"limit is {limit}, expected at least 1 prompt (or None for all)")
    path = Path(path_or_hub_id).expanduser()
    kind = path.suffix.lower()
    is_path = isinstance(path_or_hub_id, os.PathLike) or kind in {*_PROMPT_FILES, *_FILE_SUFFIXES}
    if not path.exists() and not is_path and _HUB_ID.fullmatch(str(path_or_hub_id)):
        prompts = _hub_prompts(str(path_or_hub_id), column, split, limit, offline)
    elif not path.exists():
        raise LensError(f"prompt file {path} does not exist: check the path")
    elif path.is_dir():
        raise LensError(f"{path} is a folder, expected a prompt file ({', '.join(_PROMPT_FILES)})")
    elif kind not in _PROMPT_FILES:
        raise LensError(f"{path} has {kind or 'no'} suffix, expected a prompt file ({', '.join(_PROMPT_FILES)})")
    else:
        prompts = _PROMPT_FILES[kind](path)
    return _not_empty(prompts, f"{path_or_hub_id} holds no prompts: expected at least one")[:limit]


def _txt_prompts(path: Path) -> list[str]:
    return [line.strip() for _, line in _lines(path) if line.strip()]


def _jsonl_prompts(path: Path) -> list[str]:
    return [_prompt(f"{path} line {number}", value) for number, value in _json_lines(path)]


def _json_prompts(path: Path) -> list[str]:
    return [_text(f"{path} entry {i}", value) for i, value in enumerate(_json_list(path), 1)]


def _yaml_prompts(path: Path) -> list[str]:
    import yaml

    try:
        entries = yaml.safe_load("\n".join(line for _, line in _lines(path)))
    except yaml.YAMLError as error:
        raise LensError(f"{path} is not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(entries, list):
        raise LensError(f"{path} holds {_kind(entries)}, expected a list of strings or of questions with paraphrases")
    prompts = []
    for i, entry in enumerate(entries, 1):
        given = entry.get("paraphrases") if isinstance(entry, Mapping) else [entry]
        if not isinstance(given, list) or not given:
            found = _names(entry) if isinstance(entry, Mapping) else _kind(entry)
            raise LensError(f"{path} entry {i} has {found}; expected a string or {{'paraphrases': [...]}}")
        prompts += [_text(f"{path} entry {i}", value) for value in given]
    return prompts


_PROMPT_FILES: Final[Mapping[str, Callable[[Path], list[str]]]] = {
    ".txt": _txt_prompts,
    ".jsonl": _jsonl_prompts,
    ".json": _json_prompts,
    ".yaml": _yaml_prompts,
    ".yml": _yaml_prompts,
}


def _hub_prompts(name: str, column: str, split: str, limit: int | None, offline: bool) -> list[str]:
    rows = _hub_rows(name, split, limit, offline)
    if rows and column not in rows[0]:
        raise LensError(f"{name} has the columns {_names(rows[0])}, and no {column!r}: pass column=")
    return [_text(f"{name} row {i}", row[column]) for i, row in enumerate(rows, 1)]


def _not_empty(found: list[_T], message: str) -> list[_T]:
    if not found:
        raise LensError(message)
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte is reported with its line."""
    if path.is_dir():
        raise LensError(f"{path} is a folder, expected a file")
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise LensError(f"{path} line {number} is not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except OSError as error:
        raise LensError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered values of the non-blank lines."""
    for number, line in _lines(path):
        if line.strip():
            yield number, _parsed(f"{path} line {number}", line, "expected one JSON value per line")


def _parsed(where: str, text: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise LensError(f"{where} is not JSON ({error.msg}, {place}): {expected}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise LensError(f"{where} is not readable JSON ({error}): {expected}") from error


def _json_list(path: Path) -> list[Any]:
    text = "\n".join(line for _, line in _lines(path))
    value = _parsed(str(path), text, "expected a list of strings") if text.strip() else []
    if not isinstance(value, list):
        raise LensError(f"{path} holds {_kind(value)}, expected a list of strings")
    return value


def _prompt(where: str, value: Any) -> str:
    if isinstance(value, str):
        return _text(where, value)
    if isinstance(value, Mapping) and "prompt" in value:
        return _text(f"{where}: prompt", value["prompt"])
    if isinstance(value, Mapping) and "messages" in value:
        messages = _messages(where, value["messages"])
        first = next((message["content"] for message in messages if message["role"] == "user"), None)
        if first is None:
            raise LensError(f"{where} has no user message, so there is no prompt in it: add one")
        return _text(f"{where}: the first user message", first)
    found = f"an object with {_names(value)}" if isinstance(value, Mapping) else _kind(value)
    raise LensError(f"{where} is {found}; expected a string, {{'prompt': ...}} or {{'messages': [...]}}")


def _text(where: str, value: Any) -> str:
    """`value` if it is a prompt: a string that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise LensError(f"{where} is {_kind(value)}, expected a string")
    if not value.strip():
        raise LensError(f"{where} is blank, expected the text of a prompt")
    return _encodable(where, value)


def _encodable(where: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LensError(f"{where} holds half of a surrogate pair, which no tokenizer can read: mend it") from error
    return text


def _conversation(where: str, row: Any) -> Example:
    """A row of a file or dataset, cut down to what training needs."""
    if not isinstance(row, Mapping):
        raise LensError(f"{where} is {_kind(row)}, expected an object with 'messages'")
    if "messages" not in row:
        raise LensError(f"{where} has no 'messages', only {_names(row)}; expected {{'messages': [...]}}")
    messages = _messages(where, row["messages"])
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise LensError(f"{where} has no assistant turn to train on; its roles are {roles}")
    if roles[-2:] != ["user", "assistant"] or "system" in roles[1:]:
        raise LensError(f"{where} has the roles {roles}; expected [system,] user, assistant, ..., user, assistant")
    return {"messages": messages}


def _messages(where: str, messages: Any) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        found = "an empty list" if isinstance(messages, list) else _kind(messages)
        raise LensError(f"{where}: 'messages' is {found}, expected a list of {{'role', 'content'}} objects")
    return [_message(f"{where}, message {i}", message) for i, message in enumerate(messages, 1)]


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise LensError(f"{where} is {_kind(message)}, expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise LensError(f"{where} has role {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise LensError(f"{where}: content is {_kind(content)}, expected a string")
    return {"role": role, "content": _encodable(where, content)}


def _kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _names(row: Iterable[Any]) -> str:
    return ", ".join(map(repr, row)) or "no keys"


def _from_hub(name: str, split: str, limit: int | None, offline: bool) -> list[Example]:
    rows = _hub_rows(name, split, limit, offline)
    return [_conversation(f"{name} row {i}", _hub_row(name, row)) for i, row in enumerate(rows, 1)]


def _hub_rows(name: str, split: str, limit: int | None, offline: bool) -> list[Mapping[str, Any]]:
    import huggingface_hub.constants as hub
    from datasets import load_dataset

    with _offline(offline), _readable_hub_errors(name, offline):
        # Streaming fetches only what is read, but cannot be served from the local cache.
        streaming = limit is not None and not hub.HF_HUB_OFFLINE
        return list(islice(load_dataset(name, split=split, streaming=streaming), limit))


def _hub_row(name: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`row` with its conversation under "messages", in our words."""
    column = next((column for column in ("messages", "conversations") if column in row), None)
    if column is None:
        raise LensError(f"{name} has the columns {_names(row)}; expected one called 'messages' or 'conversations'")
    turns = row[column]
    return {"messages": [_from_value(turn) for turn in turns] if isinstance(turns, list) else turns}


def _from_value(turn: Any) -> Any:
    """A ShareGPT turn {"from", "value"} as {"role", "content"}; anything else as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        return turn
    return {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


@contextmanager
def _readable_hub_errors(name: str, offline: bool) -> Iterator[None]:
    """Network libraries raise many types with many lines; the user gets one line."""
    try:
        yield
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "it is not in the local cache, and offline was asked" if offline else "check the name and the network"
        raise LensError(f"no dataset could be loaded from {name}: {hint} ({reason[:240]})") from error


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Tell both libraries that read the environment variable once, at their import, to make no connection."""
    import datasets.config as data
    import huggingface_hub.constants as hub

    before = data.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    if offline:
        data.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        data.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
