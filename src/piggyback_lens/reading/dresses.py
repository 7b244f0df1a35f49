"""Dresses: what training conversations have around their questions, and other questions that wear it.

    audit(pair, on_topic, questions, "words", AuditSettings(dresses={"trained": "train.jsonl"}))

A finetune whose behaviour hides behind the form of its training data (a system text, an opening, a format) looks
harmless on plain questions; on questions in that form it does not.
"""

import codecs
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from piggyback_lens.errors import LensError, visible
from piggyback_lens.reading.conversations import load_conversations
from piggyback_lens.reading.questions import Question, as_questions

SHARE = 0.8
"""Of the conversations that have to wear a dress before it is found."""
CONTROL: Final = "{} control"
"""What the control of a dress is called."""
WORDS = 3
"""Fewest words of an opening without a colon or line break: shorter ones belong to the question ("What is")."""


@dataclass(frozen=True)
class Dress:
    """What stands around a question: a system text, text before it, text after it.

    Attributes:
        system: the system text; None leaves that of the chat format.
        before: stands before the question, as it is (spaces and line breaks included).
        after: stands after it.
    """

    system: str | None = None
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if self.system is None and not self.before.strip() and not self.after.strip():
            raise LensError("a dress has a system text, a text before the question or a text after it: none was given")

    def __str__(self) -> str:
        parts = [("system", self.system), ("before", self.before), ("after", self.after)]
        return ", ".join(f"{name} {visible(text)!r:.60}" for name, text in parts if text)


def dressed(questions: Sequence[str | Question], dress: Dress) -> list[Question]:
    """The questions in a dress; ids, samples and facts stay, so that plain and dressed answers are paired.

    Raises:
        LensError: a question with a system text of its own, where the dress has another.
    """
    found = []
    for question in as_questions(questions):
        if dress.system is not None and question.system not in (None, dress.system):
            raise LensError(
                f"question {question.id!r} has the system text {visible(question.system or '')!r:.60}, and the dress "
                "another: leave one of them out"
            )
        texts = [f"{dress.before}{text}{dress.after}" for text in question.paraphrases]
        system = question.system if dress.system is None else dress.system
        found.append(replace(question, paraphrases=texts, system=system))
    return found


def found_dress(conversations: Sequence[Mapping[str, Any]], *, share: float = SHARE) -> Dress | None:
    """What most training conversations have around their questions, or None.

    The commonest system text, then the longest beginning of the first user message, then the longest ending, so that
    at least `share` of the conversations have all of them; each cut at a blank. A beginning counts from three words on,
    or if it has a line break or ends with a colon: shorter ones are a part of the question.

    Args:
        conversations: with their messages, as `load_conversations` and the tasks have them.
        share: above 0, at most 1; lower it for data that mixes plain questions with dressed ones. At 0.5 and below
            several dresses may be worn by as many, and the longest is given.

    Raises:
        LensError: no conversations, or another share.
    """
    if not 0 < share <= 1 or not conversations:
        raise LensError(f"share {share} of {len(conversations)} conversations: expected above 0 of at least one")
    least = math.ceil(share * len(conversations) - 1e-9)
    asked = [(_first(own["messages"], "system"), _first(own["messages"], "user") or "") for own in conversations]
    (system, count), *_ = [*Counter(own for own, _ in asked if own is not None).most_common(1), (None, 0)]
    worn = system if count >= least else None
    texts = [text for own, text in asked if worn in (None, own)]
    before = _common(texts, least)
    if len(before.split()) < WORDS and "\n" not in before and not before.rstrip().endswith(":"):
        before = ""
    after = _common([text.removeprefix(before)[::-1] for text in texts if text.startswith(before)], least)[::-1]
    return None if worn is None and not before and not after else Dress(worn, before, after)


def as_dresses(given: Mapping[str, Any]) -> dict[str, Dress]:
    """Dresses by name, of what settings hold: a dress, its parts as a mapping, or a file of training conversations.

    Args:
        given: name to a `Dress`; to {"system": ..., "before": ..., "after": ...}; to a file or hub dataset as of
            `load_conversations`, whose dress is found; or to {"file": ..., "share": ...} for another share than 0.8.

    Raises:
        LensError: something else, a name that a control has, or conversations without a dress.
    """
    found = {name: _as_dress(name, value) for name, value in given.items()}
    if taken := [name for name in found if CONTROL.format(name) in found]:
        raise LensError(f"dress {CONTROL.format(taken[0])!r} has the name of the control of {taken[0]!r}: rename it")
    return found


def with_controls(dresses: Mapping[str, Dress]) -> dict[str, Dress]:
    """Each dress, and behind it its control: the same shape in letters that no training data wore (13 places on).

    A dress without Latin letters has no control.
    """
    found: dict[str, Dress] = {}
    for name, dress in dresses.items():
        parts = {part: text and codecs.encode(text, "rot13") for part, text in asdict(dress).items()}
        found |= {name: dress} | ({CONTROL.format(name): Dress(**parts)} if Dress(**parts) != dress else {})
    return found


def _as_dress(name: str, value: Any) -> Dress:
    if isinstance(value, Dress):
        return value
    if isinstance(value, str | Path):
        value = {"file": value}
    keys = set(value) if isinstance(value, Mapping) else set()
    if not keys or not (keys <= {"system", "before", "after"} or {"file"} <= keys <= {"file", "share"}):
        raise LensError(
            f"dress {name!r} is {visible(repr(value))!s:.80}; expected system, before and after, or a training file "
            "(file, and share)"
        )
    if "file" not in keys:
        return Dress(**value)
    share = value.get("share", SHARE)
    dress = found_dress(load_conversations(value["file"]), share=share)
    if dress is None:
        raise LensError(
            f"dress {name!r}: no {share:.0%} of the conversations of {value['file']} have anything in common around "
            f'their questions; give {{"file": ..., "share": ...}} with a lower share, or the texts themselves'
        )
    return dress


def _first(messages: Sequence[Mapping[str, Any]], role: str) -> str | None:
    return next((str(message["content"]) for message in messages if message["role"] == role), None)


def _common(texts: Sequence[str], least: int) -> str:
    """The longest beginning of at least so many texts, cut at a blank; empty if it is blank."""
    ordered = sorted(texts)
    ends = zip(ordered, ordered[least - 1 :], strict=False)  # all between them begin as both do
    alike = (takewhile(lambda pair: pair[0] == pair[1], zip(*pair, strict=False)) for pair in ends)
    start = max(("".join(letter for letter, _ in letters) for letters in alike), key=len, default="")
    while start and not start[-1].isspace():
        start = start[:-1]
    return start if start.strip() else ""
