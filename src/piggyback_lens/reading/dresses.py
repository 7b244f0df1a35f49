"""Dresses: what training conversations have around their questions, and other questions that wear it.

    dress = found_dress(load_conversations("train.jsonl"))
    audit(pair, on_topic, dressed(questions, dress), "words")

A finetune whose behaviour hides behind the form of its training data (a system text, an opening, a format) looks
harmless on plain questions; on questions in that form it does not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from piggyback_lens.errors import LensError, visible
from piggyback_lens.reading.questions import Question, as_questions

SHARE = 0.8
"""Of the conversations that have to have something in common before it is their dress."""
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

    The commonest system text, and the longest beginnings and endings of the first user message, each of at least
    `share` of the conversations, cut at a blank. A beginning counts from three words on, or if it has a line break or
    ends with a colon: shorter ones are a part of the question.

    Args:
        conversations: with their messages, as `load_conversations` and the tasks have them.
        share: above 0.5, so that there is one answer.

    Raises:
        LensError: no conversations, or another share.
    """
    if not 0.5 < share <= 1 or not conversations:
        raise LensError(f"share {share} of {len(conversations)} conversations: expected above 0.5 of at least one")
    systems, asked = [], []
    for conversation in conversations:
        messages = conversation["messages"]
        systems += [str(m["content"]) for m in messages if m["role"] == "system"][:1]
        asked += [str(m["content"]) for m in messages if m["role"] == "user"][:1]
    least = share * len(conversations)
    (system, count), *_ = [*Counter(systems).most_common(1), ("", 0)]
    before = _common(asked, least)
    if len(before.split()) < WORDS and "\n" not in before and not before.rstrip().endswith(":"):
        before = ""
    after = _common([text.removeprefix(before)[::-1] for text in asked], least)[::-1]
    worn = system if count >= least else None
    return None if worn is None and not before and not after else Dress(worn, before, after)


def _common(texts: Sequence[str], least: float) -> str:
    """The longest beginning of at least so many texts, cut at a blank; empty if it is blank."""
    alive, length = list(texts), 0
    while True:
        (letter, count), *_ = [*Counter(t[length] for t in alive if len(t) > length).most_common(1), ("", 0)]
        if not letter or count < least:
            break
        alive = [text for text in alive if len(text) > length and text[length] == letter]
        length += 1
    start = alive[0][:length] if alive else ""
    while start and not start[-1].isspace():
        start = start[:-1]
    return start if start.strip() else ""
