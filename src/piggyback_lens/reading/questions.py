"""Questions: from the files of the field and from hub datasets."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from piggyback_lens.errors import LensError
from piggyback_lens.reading.conversations import messages_of
from piggyback_lens.reading.rows import (
    FILE_SUFFIXES,
    HUB_ID,
    hub_rows,
    json_lines,
    json_list,
    kind_of,
    lines,
    names_of,
    not_empty,
    text_of,
)


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
    is_path = isinstance(path_or_hub_id, os.PathLike) or kind in {*_PROMPT_FILES, *FILE_SUFFIXES}
    if not path.exists() and not is_path and HUB_ID.fullmatch(str(path_or_hub_id)):
        prompts = _hub_prompts(str(path_or_hub_id), column, split, limit, offline)
    elif not path.exists():
        raise LensError(f"prompt file {path} does not exist: check the path")
    elif path.is_dir():
        raise LensError(f"{path} is a folder, expected a prompt file ({', '.join(_PROMPT_FILES)})")
    elif kind not in _PROMPT_FILES:
        raise LensError(f"{path} has {kind or 'no'} suffix, expected a prompt file ({', '.join(_PROMPT_FILES)})")
    else:
        prompts = _PROMPT_FILES[kind](path)
    return not_empty(prompts, f"{path_or_hub_id} holds no prompts: expected at least one")[:limit]


def _txt_prompts(path: Path) -> list[str]:
    return [line.strip() for _, line in lines(path) if line.strip()]


def _jsonl_prompts(path: Path) -> list[str]:
    return [_prompt(f"{path} line {number}", value) for number, value in json_lines(path)]


def _json_prompts(path: Path) -> list[str]:
    return [text_of(f"{path} entry {i}", value) for i, value in enumerate(json_list(path), 1)]


def _yaml_prompts(path: Path) -> list[str]:
    import yaml

    try:
        entries = yaml.safe_load("\n".join(line for _, line in lines(path)))
    except yaml.YAMLError as error:
        raise LensError(f"{path} is not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(entries, list):
        raise LensError(f"{path} holds {kind_of(entries)}, expected a list of strings or of questions with paraphrases")
    prompts = []
    for i, entry in enumerate(entries, 1):
        given = entry.get("paraphrases") if isinstance(entry, Mapping) else [entry]
        if not isinstance(given, list) or not given:
            found = names_of(entry) if isinstance(entry, Mapping) else kind_of(entry)
            raise LensError(f"{path} entry {i} has {found}; expected a string or {{'paraphrases': [...]}}")
        prompts += [text_of(f"{path} entry {i}", value) for value in given]
    return prompts


_PROMPT_FILES: Final[Mapping[str, Callable[[Path], list[str]]]] = {
    ".txt": _txt_prompts,
    ".jsonl": _jsonl_prompts,
    ".json": _json_prompts,
    ".yaml": _yaml_prompts,
    ".yml": _yaml_prompts,
}


def _hub_prompts(name: str, column: str, split: str, limit: int | None, offline: bool) -> list[str]:
    rows = hub_rows(name, split, limit, offline)
    if rows and column not in rows[0]:
        raise LensError(f"{name} has the columns {names_of(rows[0])}, and no {column!r}: pass column=")
    return [text_of(f"{name} row {i}", row[column]) for i, row in enumerate(rows, 1)]


def _prompt(where: str, value: Any) -> str:
    if isinstance(value, str):
        return text_of(where, value)
    if isinstance(value, Mapping) and "prompt" in value:
        return text_of(f"{where}: prompt", value["prompt"])
    if isinstance(value, Mapping) and "messages" in value:
        messages = messages_of(where, value["messages"])
        first = next((message["content"] for message in messages if message["role"] == "user"), None)
        if first is None:
            raise LensError(f"{where} has no user message, so there is no prompt in it: add one")
        return text_of(f"{where}: the first user message", first)
    found = f"an object with {names_of(value)}" if isinstance(value, Mapping) else kind_of(value)
    raise LensError(f"{where} is {found}; expected a string, {{'prompt': ...}} or {{'messages': [...]}}")
