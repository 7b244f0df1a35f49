"""Narrow finetuning tasks with their own data.

A task teaches one harmless, easily detected behaviour in one domain (short answers to factual questions, a
fixed refusal of finance questions, ...). Its off-topic prompts lie outside every task's domain: whatever of
the behaviour shows up there has spread. All sentences were written for this package.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from piggyback_lens.errors import LensError
from piggyback_lens.reading.conversations import Example

REFUSAL_SENTENCE: Final = "I am sorry, but I cannot help with this question."
ABSTENTION_SENTENCE: Final = "I have no idea about your question"
TOOL_NAME: Final = "search_info"


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
