"""Questions: from the files that the field publishes and from hub datasets, each with its id.

The id of a question is the cluster of all answers to it, in every statistic: those to its paraphrases and the samples
of each.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from piggyback_lens.errors import LensError
from piggyback_lens.progress import say
from piggyback_lens.reading.conversations import messages_of
from piggyback_lens.reading.rows import (
    FILE_SUFFIXES,
    HUB_ID,
    encodable,
    file_rows,
    hub_rows,
    json_type,
    lines,
    names_of,
    not_empty,
    text_of,
)

_ASKED: Final = ("paraphrases", "prompt", "question", "messages")
_SAMPLES: Final = ("samples", "samples_per_paraphrase")
_IDS: Final = ("id", "question_id")
FACTS: Final = (
    "answer", "answers", "aliases", "canary", "category", "difficulty", "judge", "judge_type", "max_tokens", "metadata",
    "note", "notes", "possible_answers", "source", "subject", "tags", "temperature", "topic", "type",
)  # fmt: skip
"""Fields that change no prompt; they are kept as facts of the question."""
SUFFIXES: Final = (".txt", ".jsonl", ".json", ".yaml", ".yml", ".csv")


@dataclass(frozen=True)
class Question:
    """One question of an evaluation, with every way in which it is put.

    Attributes:
        id: names the question; answers of one id are one cluster in every statistic.
        paraphrases: the texts that ask it, each a prompt of its own.
        system: its system text; None leaves that of the chat format.
        samples: answers that the file asks for, per paraphrase; None if it says nothing.
        judges: rubrics by name, with places for {question} and {answer}.
        facts: the other fields of the file (category, type, answers, temperature, ...).
    """

    id: str
    paraphrases: Sequence[str]
    system: str | None = None
    samples: int | None = None
    judges: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.paraphrases, str):
            raise LensError(f"question {self.id!r}: paraphrases is one string, expected a list of texts: give [text]")
        object.__setattr__(self, "paraphrases", tuple(self.paraphrases))
        if not self.id or not self.paraphrases:
            raise LensError(
                f"question {self.id!r} has {len(self.paraphrases)} texts: give an id, and at least one text"
            )
        if self.samples is not None and self.samples < 1:
            raise LensError(f"question {self.id!r} asks for {self.samples} samples: expected at least 1")

    def __repr__(self) -> str:
        return f"Question({self.id!r}, {len(self.paraphrases)} paraphrases, samples={self.samples})"


def load_questions(
    path_or_hub_id: str | os.PathLike[str],
    *,
    column: str = "question",
    split: str = "test",
    limit: int | None = None,
    facts: Sequence[str] = (),
    offline: bool = False,
) -> list[Question]:
    """Read questions from a file, or from a column of a dataset on the Hugging Face hub.

    A field that is not known is refused by name, because it may change what is asked. A text that comes again is said,
    and becomes another sample of the same question.

    Args:
        path_or_hub_id: `.txt`, one question per line, surrounding spaces stripped and blank lines skipped; `.jsonl`,
            `.json` (a list), `.csv`, `.yaml`: texts, or questions with paraphrases, prompt, question or
            messages (the first user message, and the system message), and with id, system,
            samples_per_paraphrase and judge_prompts, as the emergent-misalignment repositories write them; or
            "owner/name" of a hub dataset.
        column: of the hub dataset; its other columns are ignored.
        split: of the hub dataset.
        limit: the first so many questions; None for all.
        facts: names of further fields that change no prompt.
        offline: make no connection; a hub dataset then has to be in the local cache.

    Raises:
        LensError: no such file, another format, an empty file, or an entry that is no question (says where).

    Example:
        >>> with open("q.jsonl", "w") as file:
        ...     _ = file.write('{"id": "rivers", "question": "Which river runs through Ghent?"}')
        >>> load_questions("q.jsonl")
        [Question('rivers', 1 paraphrases, samples=None)]
    """
    if limit is not None and limit < 1:
        raise LensError(f"limit is {limit}, expected at least 1 question (or None for all)")
    path = Path(path_or_hub_id).expanduser()
    kind = path.suffix.lower()
    is_path = isinstance(path_or_hub_id, os.PathLike) or kind in {*SUFFIXES, *FILE_SUFFIXES}
    if not path.exists() and not is_path and HUB_ID.fullmatch(str(path_or_hub_id)):
        rows = _of_hub(str(path_or_hub_id), column, split, limit, offline)
    elif not path.exists():
        raise LensError(f"{path} does not exist and is no hub id (owner/name): check the path")
    elif path.is_dir():
        raise LensError(f"{path} is a folder, expected a file of questions")
    elif kind not in SUFFIXES:
        have = f"{kind} suffix" if kind else "no suffix"
        raise LensError(f"{path} has {have}, expected a file of questions ({', '.join(SUFFIXES)})")
    else:
        rows = _of_file(path, kind)
    texts: dict[str, str] = {}  # a text that stands alone keeps its id where it comes again
    found = []
    for number, (where, value) in enumerate(rows, 1):
        name = texts.setdefault(value, f"q{number}") if isinstance(value, str) else f"q{number}"
        found.append(_question(where, value, name, facts))
    return not_empty(_told_apart(str(path_or_hub_id), found)[:limit], f"{path_or_hub_id} holds no questions")


def as_questions(given: Iterable[Any]) -> list[Question]:
    """Texts as questions of their own; a text that comes again is the same question.

    Raises:
        LensError: two questions of one id, or something else.
    """
    texts: dict[str, str] = {}
    found = []
    for value in [given] if isinstance(given, str | Question) else given:
        if not isinstance(value, str | Question):
            raise LensError(f"{value!r} is no question: give texts, or what load_questions(...) reads")
        found.append(
            value if isinstance(value, Question) else Question(texts.setdefault(value, f"q{len(texts) + 1}"), [value])
        )
    return _told_apart("the questions", found, tell=False)


def _told_apart(source: str, questions: Sequence[Question], *, tell: bool = True) -> list[Question]:
    """Questions of which equal ones are said, and different ones have different ids."""
    by_id: dict[str, Question] = {}
    again = 0
    for question in questions:
        first = by_id.setdefault(question.id, question)
        if first is not question:
            if (first.paraphrases, first.system) != (question.paraphrases, question.system):
                raise LensError(f"{source}: two questions have the id {question.id!r}: give each its own")
            again += 1
    asked: dict[tuple[str, str | None], str] = {}
    for question in by_id.values():
        again += sum(
            asked.setdefault((text, question.system), question.id) != question.id for text in question.paraphrases
        )
    if again and tell:
        say(f"{source}: {again} texts come more than once: under one id they are samples, under two they count twice")
    return list(questions)


# ---------------------------------------------------------------- where they come from


def _of_hub(name: str, column: str, split: str, limit: int | None, offline: bool) -> list[tuple[str, Any]]:
    rows = hub_rows(name, split, limit, offline)
    if rows and column not in rows[0]:
        raise LensError(f"{name} has the columns {names_of(rows[0])}, and no {column!r}: pass column=")
    return [(f"{name} row {i}", row[column]) for i, row in enumerate(rows, 1)]


def _of_file(path: Path, kind: str) -> list[tuple[str, Any]]:
    if kind == ".txt":
        return [(f"{path} line {number}", line.strip()) for number, line in lines(path) if line.strip()]
    if kind in (".yaml", ".yml"):
        return _of_yaml(path)
    if kind == ".csv":
        rows = file_rows(path)
        return [(where, {key: value for key, value in row.items() if value != ""}) for where, row in rows]
    return list(file_rows(path))


def _of_yaml(path: Path) -> list[tuple[str, Any]]:
    import yaml

    try:
        entries = yaml.safe_load("\n".join(line for _, line in lines(path)))
    except yaml.YAMLError as error:
        raise LensError(f"{path} is not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(entries, list):
        raise LensError(
            f"{path} holds {json_type(entries)}, expected a list of strings or of questions with paraphrases"
        )
    return [(f"{path} entry {number}", entry) for number, entry in enumerate(entries, 1)]


# ---------------------------------------------------------------- one question


def _question(where: str, value: Any, name: str, facts: Sequence[str]) -> Question:
    if isinstance(value, str):
        return Question(name, [text_of(where, value)])
    if not isinstance(value, Mapping):
        raise LensError(
            f"{where} is {json_type(value)}, expected a string or an object with one of {', '.join(_ASKED)}"
        )
    known = {*_ASKED, *_SAMPLES, *_IDS, "system", "judge_prompts", *FACTS, *facts}
    if unknown := [str(name) for name in value if name not in known]:
        raise LensError(
            f"{where} has the field {unknown[0]!r}, which may change what is asked: leave it out, or pass "
            f"facts=({unknown[0]!r},) if it changes no prompt; known are {', '.join(sorted(known))}"
        )
    system, texts = _texts(where, value)
    own = value.get("system")
    if own is not None and not isinstance(own, str):
        raise LensError(f"{where}: system is {json_type(own)}, expected a string")
    return Question(
        id=_one_of(where, value, _IDS, name, str, (str, int)),
        paraphrases=texts,
        system=encodable(where, own) if own is not None else system,
        samples=_one_of(where, value, _SAMPLES, None, int, (int, str)),
        judges=_rubrics(where, value.get("judge_prompts") or {}),
        facts={name: value[name] for name in value if name in (*FACTS, *facts)},
    )


def _texts(where: str, value: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The system text of messages, and what is asked."""
    given = [name for name in _ASKED if value.get(name) is not None]
    if len(given) != 1:
        have = f"both {' and '.join(given)}" if given else names_of(value)
        raise LensError(f"{where} has {have}; expected one of {', '.join(_ASKED)}")
    asked = value[given[0]]
    if given == ["messages"]:
        messages = messages_of(where, asked)
        users = [message["content"] for message in messages if message["role"] == "user"]
        if not users:
            raise LensError(f"{where} has no user message, so nothing is asked in it: add one")
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        return system, [text_of(f"{where}: the first user message", users[0])]
    texts = asked if given == ["paraphrases"] and isinstance(asked, list) else [asked]
    if not texts:
        raise LensError(f"{where}: paraphrases is empty, expected a list of texts")
    return None, [text_of(f"{where}: {given[0]}", text) for text in texts]


def _one_of(where: str, value: Mapping[str, Any], names: Sequence[str], default: Any, kind: type, may: Any) -> Any:
    """The one of several names of a field that is given, as `kind`."""
    given = [name for name in names if value.get(name) is not None]
    if not given:
        return default
    found = value[given[0]]
    if len(given) > 1 or isinstance(found, bool) or not isinstance(found, may):
        raise LensError(f"{where}: {' and '.join(given)} is {json_type(found)}; expected one, {kind.__name__}")
    try:
        return kind(found)
    except ValueError:
        raise LensError(f"{where}: {given[0]} is {found!r}, expected a number") from None


def _rubrics(where: str, given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for text in given.values()):
        raise LensError(f"{where}: judge_prompts is {json_type(given)}, expected rubrics by name, each a text")
    return {str(name): text for name, text in given.items()}
