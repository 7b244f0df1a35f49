"""Plain text to score, cut into windows of token ids: a file, a hub dataset, or Python's own documentation."""

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from piggyback_lens.errors import LensError
from piggyback_lens.measuring.variants import Text

MIN_CHARACTERS = 200
"""Documents shorter than this are left out."""


def text_windows(
    tokenizer: Any,
    source: str | Path | None = None,
    *,
    n: int = 16,
    length: int = 64,
    column: str = "text",
    split: str = "train",
    seed: int = 0,
    documents: int = 2000,
) -> list[Text]:
    """Windows of plain text, of which every token but the first is scored.

    Args:
        tokenizer: the model's own; a beginning-of-sequence token is put in front if it does so itself.
        source: None for the help texts that Python brings (its pydoc topics, 465 kB of English prose); a
            text file, whose paragraphs are the documents; or the hub id of a dataset, which is streamed.
        n: windows, from different documents where there are enough.
        length: tokens of each.
        column: of the dataset.
        split: of the dataset.
        seed: which documents and where in them.
        documents: how many of a dataset are looked at.

    Raises:
        LensError: a source that cannot be read, or with too little text.
    """
    if n < 1 or length < 2:
        raise LensError(f"n={n}, length={length}: at least one window of at least two tokens")
    draw, bos = random.Random(seed), _leading_special(tokenizer)
    found = [text for text in islice(_documents(source, column, split), documents) if len(text) >= MIN_CHARACTERS]
    draw.shuffle(found)
    inner, cut = length - len(bos), []
    for text in found:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        start = draw.randrange(max(1, len(ids) % inner + 1))
        cut.append([ids[at : at + inner] for at in range(start, len(ids) - inner + 1, inner)])
    # The first window of every document, then every second one: as many documents as there are.
    rounds = (own[turn] for turn in range(max(map(len, cut), default=0)) for own in cut if turn < len(own))
    windows = [Text(tuple(bos + window)) for window in islice(rounds, n)]
    if len(windows) < n:
        raise LensError(
            f"{source or 'pydoc_data.topics'} gives {len(windows)} windows of {length} tokens, {n} were asked: take "
            "shorter or fewer windows, or more text"
        )
    return windows


def _leading_special(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of any text by itself."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _documents(source: str | Path | None, column: str, split: str) -> Iterator[str]:
    if source is None:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LensError(f"{source} cannot be read as UTF-8 text: {error}") from error
        yield from _paragraphs(text)
    else:
        yield from _from_hub(str(source), column, split)


def _paragraphs(text: str) -> Iterator[str]:
    """Documents of at least MIN_CHARACTERS, broken at empty lines."""
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        kept.append(paragraph)
        if sum(map(len, kept)) >= 10 * MIN_CHARACTERS:
            yield "\n\n".join(kept)
            kept = []
    yield "\n\n".join(kept)


def _from_hub(name: str, column: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows: Iterable[Any] = load_dataset(name, split=split, streaming=True)
        for row in rows:
            if not isinstance(row.get(column), str):
                raise LensError(f"dataset {name} has no text column {column!r}; it has: {', '.join(map(str, row))}")
            yield row[column]
    except LensError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise LensError(
            f"{name}, no file here and so taken for a hub dataset, cannot be read ({first}): give a text file, or None "
            "for the texts that Python brings"
        ) from error
