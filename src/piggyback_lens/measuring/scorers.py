"""Scorers: what gives answers a number, a word, or a reason why there is none; string behaviours and judges alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from piggyback_lens.errors import LensError
from piggyback_lens.measuring.measures import Behaviour, get_behaviour


class Answered(NamedTuple):
    """One answer with what was asked, and the row from which they come."""

    question: str
    answer: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """What a scorer gave one answer.

    Attributes:
        value: a number, a word in place of one (REFUSAL, CODE), or NaN where there is none.
        reason: why there is none, or how it was read if not in the usual way.
    """

    value: float | str
    reason: str = ""

    @property
    def number(self) -> float:
        """The value where it is a number; NaN elsewhere."""
        return math.nan if isinstance(self.value, str) else self.value


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores batches of answers; each gets a number, a word, a `Score`, or None for a missing one."""

    def __call__(self, answers: Sequence[Answered]) -> Sequence[Score | float | str | None]:
        """The scores of the answers, in their order."""


def missing(reason: str) -> Score:
    """No score, and why."""
    return Score(math.nan, reason)


def answered(row: Mapping[str, Any]) -> Answered:
    """The question and the answer of a row, under the names that runs and files of the field have for them."""
    question = next((row[name] for name in ("prompt", "question") if isinstance(row.get(name), str)), "")
    answer = next((row[name] for name in ("response", "answer") if isinstance(row.get(name), str)), "")
    return Answered(question, answer, row)


def as_scorer(given: str | Behaviour | Scorer) -> tuple[Scorer, Mapping[str, str]]:
    """A scorer, and the name, label and unit of what it measures.

    Raises:
        LensError: neither the name of a behaviour nor something to call.
    """
    if isinstance(given, str | Behaviour):
        behaviour = get_behaviour(given)

        def each(answers: Sequence[Answered]) -> list[Score]:
            return [Score(behaviour(own.answer)) for own in answers]

        return each, {"name": behaviour.name, "label": behaviour.label, "unit": behaviour.unit}
    if not callable(given):
        raise LensError(f"{given!r} is no scorer: give a behaviour, its name, a Judge, or a function of answers")
    name = str(getattr(given, "name", getattr(given, "__name__", type(given).__name__)))
    # Apart from behaviours of the same name, which a file would be read with.
    facts = {"name": f"scorer:{name}", "label": str(getattr(given, "label", name))}
    return given, facts | {"unit": str(getattr(given, "unit", "score"))}


def scores_of(scorer: Callable[..., Any], rows: Sequence[Mapping[str, Any]]) -> list[Score]:
    """What a scorer gives rows, as `Score` values.

    Raises:
        LensError: another number of scores than rows, or something that is no score.
    """
    found = list(scorer([answered(row) for row in rows]))
    if len(found) != len(rows):
        raise LensError(f"the scorer gave {len(found)} scores for {len(rows)} answers: it has to give one for each")
    return [_score(value, place) for place, value in enumerate(found)]


def _score(value: Any, place: int) -> Score:
    if isinstance(value, Score):
        return value
    if value is None:
        return missing("the scorer gave none")
    if isinstance(value, str):
        return Score(value)
    try:
        return Score(float(value))
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise LensError(f"score {place} is {kind}, expected a number, a word, None or a Score") from None
