"""Rows of files and of hub datasets, each with the place that a message names."""

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from piggyback_lens.errors import LensError

_T = TypeVar("_T")
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_SUFFIXES: Final = {".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet", ".gz", ".zst"}


def not_empty(found: list[_T], message: str) -> list[_T]:
    """`found`, unless there is nothing in it."""
    if not found:
        raise LensError(message)
    return found


def lines(path: Path) -> Iterator[tuple[int, str]]:
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


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered values of the non-blank lines."""
    for number, line in lines(path):
        if line.strip():
            yield number, parsed(f"{path} line {number}", line, "expected one JSON value per line")


def parsed(where: str, text: str, expected: str) -> Any:
    """The JSON value of a text; what is wrong in one line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise LensError(f"{where} is not JSON ({error.msg}, {place}): {expected}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise LensError(f"{where} is not readable JSON ({error}): {expected}") from error


def json_list(path: Path, expected: str = "expected a list of strings") -> list[Any]:
    """The list that a JSON file holds."""
    text = "\n".join(line for _, line in lines(path))
    value = parsed(str(path), text, expected) if text.strip() else []
    if not isinstance(value, list):
        raise LensError(f"{path} holds {json_type(value)}, {expected}")
    return value


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a .jsonl, .json (a list, or JSONL), .csv or .parquet file, each with its place.

    Raises:
        LensError: a file that cannot be read as its suffix says; a file of another suffix is read as JSONL.
    """
    kind = path.suffix.lower()
    if kind in (".csv", ".parquet") and path.is_file():
        rows = _csv_rows(path) if kind == ".csv" else _parquet_rows(path)
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
    elif kind == ".json" and next((line for _, line in lines(path) if line.strip()), "").lstrip().startswith("["):
        entries = json_list(path, "expected a list of rows")
        yield from ((f"{path} entry {number}", row) for number, row in enumerate(entries, 1))
    else:
        yield from ((f"{path} line {number}", value) for number, value in json_lines(path))


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Rows by the names of the first line; cells may be long."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        names, *rows = list(csv.reader(line + "\n" for _, line in lines(path))) or [[]]
    except csv.Error as error:
        raise LensError(f"{path} cannot be read as a CSV file: {error}") from error
    finally:
        csv.field_size_limit(before)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LensError(f"{path} has the column {twice[0]!r} twice: rename one of them")
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise LensError(f"{path} row {number} has {len(row)} cells, expected {len(names)}: quote cells with commas")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        rows: list[dict[str, Any]] = [without_nulls(row) for row in read_table(path).to_pylist()]
    except Exception as error:  # pyarrow raises many types
        raise LensError(f"{path} cannot be read as a Parquet file: {' '.join(str(error).split())[:240]}") from error
    return rows


def without_nulls(value: Any) -> Any:
    """A row of a table without the nulls that tables write where only other rows have a key."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def text_of(where: str, value: Any) -> str:
    """`value` if it is a prompt: a string that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise LensError(f"{where} is {json_type(value)}, expected a string")
    if not value.strip():
        raise LensError(f"{where} is blank, expected the text of a prompt")
    return encodable(where, value)


def encodable(where: str, text: str) -> str:
    """`text`, unless no tokenizer can read it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LensError(f"{where} holds half of a surrogate pair, which no tokenizer can read: mend it") from error
    return text


def json_type(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def names_of(row: Iterable[Any]) -> str:
    """The keys of a row, for messages."""
    return ", ".join(map(repr, row)) or "no keys"


def hub_rows(name: str, split: str, limit: int | None, offline: bool) -> list[Mapping[str, Any]]:
    """Rows of a dataset on the hub; only what is read is fetched."""
    import huggingface_hub.constants as hub
    from datasets import load_dataset

    with _offline(offline), _readable_hub_errors(name, offline):
        # Streaming fetches only what is read, but cannot be served from the local cache.
        streaming = limit is not None and not hub.HF_HUB_OFFLINE
        return list(islice(load_dataset(name, split=split, streaming=streaming), limit))


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
