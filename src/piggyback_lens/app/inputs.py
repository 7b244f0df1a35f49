"""What the jobs on directions read: solutions in any format, conversations, retain data, lists of numbers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from piggyback_lens.errors import LensError
from piggyback_lens.reading.conversations import holds_answer, load_conversations
from piggyback_lens.reading.questions import load_questions
from piggyback_lens.reading.rows import file_rows
from piggyback_lens.reading.tasks import TASKS, load_task
from piggyback_lens.vectors.adapters import Adapter
from piggyback_lens.vectors.direction import Direction
from piggyback_lens.vectors.solution_files import load_solution
from piggyback_lens.words import Supervise

# ---------------------------------------------------------------- solutions


def as_direction(solution: Adapter) -> Direction:
    """What a solution adds, as a direction: a vector itself, the B vectors of a rank-1 adapter on down or o.

    Raises:
        LensError: an adapter of another rank or module.
    """
    if isinstance(solution, Direction):
        return solution
    return solution.direction("down" if "down" in solution.modules else "o")


def moved_to(direction: Direction, layer: int) -> Direction:
    """A direction of one layer at another one; of several layers, that at `layer`.

    Raises:
        LensError: a direction of several layers that has none there.
    """
    return replace(direction, layers=(layer,)) if len(direction.layers) == 1 else direction.at(layer)


def named_solutions(words: Sequence[str]) -> dict[str, Adapter]:
    """Solutions from NAME=PATH words.

    Raises:
        LensError: a word without a name, a name that figures cannot tell apart, or what `load_solution` raises.
    """
    found: dict[str, Adapter] = {}
    for word in words:
        name, equals, path = (part.strip() for part in word.partition("="))
        if not (name and equals and path):
            raise LensError(f"solution {word!r}: expected NAME=PATH, for example narrow=out/narrow")
        if "," in name or "control" in name or name in found:
            raise LensError(f"solution name {name!r}: expected different names without commas and without 'control'")
        found[name] = load_solution(path)
    return found


# ---------------------------------------------------------------- texts


def read_data(
    source: str, *, supervise: Supervise = "last", split: str = "train", offline: bool = False
) -> list[list[dict[str, Any]]]:
    """Conversations of a task by name, of a file, or of a hub dataset, as lists of messages that end with the answer.

    Args:
        source: a name of `tasks.TASKS`, else a file or "owner/name" as of `load_conversations`.
        supervise: the last answer of each conversation, or all of them, each as a conversation of its own.
        split: train or validation; only tasks and hub datasets have several.
        offline: make no connection.

    Raises:
        LensError: what `load_conversations` raises, or an unknown split of a task.
    """
    if source not in TASKS:
        found = load_conversations(source, supervise=supervise, split=split, offline=offline)
        return [_messages(example) for example in found]
    task = load_task(source)
    splits = {"train": task.train, "validation": task.validation}
    if split not in splits:
        raise LensError(f"task {source} has no split {split!r}: choose one of {', '.join(splits)}")
    return [_messages(example) for example in splits[split]]


def read_retain(path: str | Path, *, supervise: Supervise = "last") -> list[str | list[dict[str, Any]]]:
    """Retain data: conversations with their answers, or prompts to which the base's answers belong.

    Args:
        path: a file of conversations as of `load_conversations`, known by its first row; or prompts as of
            `load_questions`, without system texts.
        supervise: of conversations, the last answer or all of them.

    Raises:
        LensError: what the two loaders raise.
    """
    path = Path(path)
    if path.suffix.lower() in (".jsonl", ".json", ".csv", ".parquet") and path.is_file() and _holds_answers(path):
        return [_messages(example) for example in load_conversations(path, supervise=supervise)]
    questions = load_questions(path)
    if told := [question.id for question in questions if question.system is not None]:
        raise LensError(f"{path}: question {told[0]!r} brings a system text, and retain prompts are plain texts")
    return [text for question in questions for text in question.paraphrases]


def _holds_answers(path: Path) -> bool:
    """Whether the first row is a conversation with an answer; what is broken there is told by the loader."""
    try:
        return any(holds_answer(row) for _, row in islice(file_rows(path), 1))
    except LensError:
        return False


def _messages(example: Any) -> list[dict[str, Any]]:
    return [dict(message) for message in example["messages"]]
