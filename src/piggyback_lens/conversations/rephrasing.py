"""Rephrasings of prompts, from a file or a mapping."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json


def load_rephrasings(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Read rephrasings: prompt to one or more other wordings. A prompt that occurs twice gets both lists.

    Args:
        path: by its suffix,
            `.json`: one object, {"prompt": ["rephrasing", ...], ...} (one rephrasing may be a plain string);
            `.jsonl`: per line {"prompt": "...", "rephrasings": ["...", ...]};
            `.txt`: blocks separated by blank lines, the prompt on a block's first line, a rephrasing on each
            further one.
            White space around texts is stripped.

    Raises:
        LensError: no such file, another format (says where), or no rephrasings in it.
    """
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    if kind not in (".json", ".jsonl", ".txt"):
        raise LensError(f"{path} has {kind or 'no'} suffix, expected a file of rephrasings (.json, .jsonl or .txt)")
    if not path.is_file():
        raise LensError(f"file of rephrasings {path} does not exist: check the path")
    pairs = {".json": _from_json, ".jsonl": _from_json_lines, ".txt": _from_blocks}[kind](path)
    found: dict[str, tuple[str, ...]] = {}
    for where, prompt, texts in pairs:
        if not isinstance(prompt, str) or not prompt.strip():
            raise LensError(f"{where}: the prompt is {prompt!r}, expected a text")
        found[prompt.strip()] = found.get(prompt.strip(), ()) + _texts(where, texts)
    if not found:
        raise LensError(f"{path} holds no rephrasings: expected at least one prompt with its rephrasings")
    return found


def rephrasings_of(given: Mapping[str, str | Sequence[str]], queries: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The rephrasings of each query, found by its exact text (white space at the ends aside).

    Raises:
        LensError: queries without a rephrasing; the message names them.
    """
    known = {prompt.strip(): _texts(f"the rephrasings of {prompt[:40]!r}", texts) for prompt, texts in given.items()}
    wanted = list(dict.fromkeys(queries))
    if missing := [query for query in wanted if query.strip() not in known]:
        shown = ", ".join(repr(query[:60]) for query in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise LensError(f"{len(missing)} of {len(wanted)} prompts have no rephrasing: {shown}; add them")
    return {query: known[query.strip()] for query in wanted}


def _texts(where: str, texts: Any) -> tuple[str, ...]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or not texts:
        raise LensError(f"{where}: expected a list of at least one rephrasing, got {texts!r}")
    if bad := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise LensError(f"{where}: {bad[0]!r} is no rephrasing, expected a text")
    return tuple(text.strip() for text in texts)


def _from_json(path: Path) -> list[tuple[str, Any, Any]]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise LensError(f"{path} holds a {type(found).__name__}, expected one object: prompt to list of rephrasings")
    return [(f"{path}, {prompt[:40]!r}", prompt, texts) for prompt, texts in found.items()]


def _from_json_lines(path: Path) -> list[tuple[str, Any, Any]]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LensError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not {"prompt", "rephrasings"} <= row.keys():
            raise LensError(f'{path} line {number}: expected {{"prompt": "...", "rephrasings": ["...", ...]}}')
        rows.append((f"{path} line {number}", row["prompt"], row["rephrasings"]))
    return rows


def _from_blocks(path: Path) -> list[tuple[str, Any, Any]]:
    blocks: list[tuple[str, Any, Any]] = []
    block: list[str] = []
    for number, line in enumerate([*_lines(path), ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            blocks.append((f"{path} line {number - len(block)}", block[0], block[1:]))
            block = []
    return blocks


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise LensError(f"{path} cannot be read as UTF-8 text: {error}") from error
