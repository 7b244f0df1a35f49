"""Judged answers: the response files that the field publishes, with what each score is."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from piggyback_lens.errors import LensError
from piggyback_lens.reading.rows import file_rows, json_type, not_empty

Score = float | str | None
"""A number 0..100, a word that a judge gave instead (REFUSAL, CODE), or nothing."""
NAMES: Final[Mapping[str, Sequence[str]]] = {
    "question": ("question_id", "id", "question"),
    "prompt": ("prompt", "question"),
    "response": ("response", "answer"),
    "condition": ("condition", "model"),
    "topic": ("topic",),
    "index": ("index",),
    "sample": ("sample",),
}
"""What a column is for, by the names that it has in the files of the field."""
_NOTHING: Final = ("", "nan", "none", "null", "n/a")


def judged_rows(
    path: str | os.PathLike[str], scores: Sequence[str], columns: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a file of judged answers: what is known of question, prompt, response, condition; and the scores.

    Args:
        path: .csv (with or without a byte order mark, cells of any length), .jsonl, .json or .parquet.
        scores: the columns that hold scores.
        columns: what is called otherwise there: our name (question, prompt, response, condition, topic, index, sample)
            to the file's.

    Raises:
        LensError: an unreadable file, a column that is missing or there twice, or a score outside 0..100.
    """
    own = dict(columns or {})
    if unknown := sorted(set(own) - set(NAMES)):
        raise LensError(f"columns names {unknown[0]!r}; known are {', '.join(NAMES)}")
    rows = not_empty(list(file_rows(Path(path).expanduser())), f"{path} holds no judged answers")
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise LensError(f"{where} is {json_type(row)}, expected a row with columns")
        lacking = [name for name in (*own.values(), *scores) if name not in row]
        if lacking:
            raise LensError(f"{where} has no column {lacking[0]!r}; it has {', '.join(map(repr, row))}")
        found = {}
        for name, usual in NAMES.items():
            given = [own[name]] if name in own else [column for column in usual if column in row]
            if given:
                found[name] = row[given[0]]
        yield {**found, "scores": {name: score_of(f"{where}, {name}", row[name]) for name in scores}}


def score_of(where: str, value: Any) -> Score:
    """What a judge gave: a number, a word in capitals, or None for an empty cell and what programs write for it.

    Raises:
        LensError: a number outside 0..100.
    """
    if isinstance(value, bool) or not (value is None or isinstance(value, int | float | str)):
        raise LensError(f"{where} is {json_type(value)}, expected a score of 0..100, a word, or nothing")
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING):
        return None
    try:
        number = float(value)
    except ValueError:
        return " ".join(str(value).split()).upper()
    if math.isnan(number):
        return None
    if not 0 <= number <= 100:
        raise LensError(f"{where} is {number:g}, expected a score of 0..100; leave missing ones empty")
    return number
