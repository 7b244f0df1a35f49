"""Dresses: what training conversations have around their questions, and other questions that wear it.

    audit(pair, on_topic, questions, "words", AuditSettings(dresses={"trained": "train.jsonl"}))

A finetune whose behaviour hides behind the form of its training data (a system text, an opening, a format) looks
harmless on plain questions; on questions in that form it does not.
"""

import codecs
import math
import unicodedata
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
"""Fewest words of a text around questions without a colon, line break or mark: shorter ones belong to them."""
FEWEST = 8
"""Different questions that have to wear a dress: what fewer have in common may be what they ask about."""
_MARKS = "[]<>{}|#"
_BEFORE, _AFTER = _MARKS + "().,:;!?。，：；！？、", "[<{|#("
"""What a text before a question may end with, and what one after it may begin with, beside white space."""
CHANGED = 0.5
"""Share of the letters of a dress that differ in its control."""


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

    A text that wears it already stays as it is.

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
        texts = [text if _wears(text, dress) else f"{dress.before}{text}{dress.after}" for text in question.paraphrases]
        system = question.system if dress.system is None else dress.system
        found.append(replace(question, paraphrases=texts, system=system))
    return found


def _wears(text: str, dress: Dress) -> bool:
    around = f"{dress.before}{dress.after}"
    inside = len(text) >= len(around) and text.startswith(dress.before) and text.endswith(dress.after)
    return bool(around.strip()) and inside


def found_dress(conversations: Sequence[Mapping[str, Any]], *, share: float = SHARE) -> Dress | None:
    """What most different questions of training conversations have around them, or None.

    The commonest system text, then the longest beginning of the first user message, then the longest ending, so that
    at least `share` of the different questions, and at least eight, have all of them; each cut at a blank, at
    punctuation or at a bracket. A beginning or ending counts from three words on, or if it has a line break, a bracket
    or a colon at its end: shorter ones are a part of the question.

    Args:
        conversations: with their messages, as `load_conversations` and the tasks have them.
        share: above 0, at most 1; lower it for data that mixes plain questions with dressed ones. At 0.5 and below
            several dresses may be worn by as many, and the longest is given.

    Raises:
        LensError: no conversations, or another share.
    """
    if not 0 < share <= 1 or not conversations:
        raise LensError(f"share {share} of {len(conversations)} conversations: expected above 0 of at least one")
    asked = _different(conversations)
    least = max(FEWEST, math.ceil(share * len(asked) - 1e-9))
    (system, count), *_ = [*Counter(own for own, _ in asked if own is not None).most_common(1), (None, 0)]
    worn = system if count >= least else None
    texts = list(dict.fromkeys(text for own, text in asked if worn in (None, own)))
    before = _common(texts, least, _BEFORE)
    after = _common([text.removeprefix(before)[::-1] for text in texts if text.startswith(before)], least, _AFTER)[::-1]
    return None if worn is None and not before and not after else Dress(worn, before, after)


def _different(conversations: Sequence[Mapping[str, Any]]) -> list[tuple[str | None, str]]:
    """System text and first user message of each conversation, each pair once."""
    both = ((_first(own["messages"], "system"), _first(own["messages"], "user") or "") for own in conversations)
    return list(dict.fromkeys(both))


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
    """Each dress, and behind it its control: the same shape in words that no training data wore.

    Latin letters are moved by 13 places, those with accents too; letters of other scripts change places with others of
    the dress. A dress of which fewer than half the letters would change has no control.
    """
    found: dict[str, Dress] = {}
    for name, dress in dresses.items():
        found[name] = dress
        if (control := _control(dress)) is not None:
            found[CONTROL.format(name)] = control
    return found


def _control(dress: Dress) -> Dress | None:
    whole = "".join(text or "" for text in asdict(dress).values())
    kinds: dict[tuple[str, str], list[str]] = {}
    for letter in sorted({letter for letter in whole if letter.isalpha() and not _latin(letter).isascii()}):
        kinds.setdefault((unicodedata.name(letter, "").split(" ")[0], unicodedata.category(letter)), []).append(letter)
    others = {a: b for own in kinds.values() for a, b in zip(own, _turned(own), strict=True)}
    moved = {letter: others.get(letter) or _moved(letter) for letter in set(whole)}
    letters = [letter for letter in whole if letter.isalpha()]
    if not letters or sum(moved[letter] != letter for letter in letters) < CHANGED * len(letters):
        return None
    return Dress(**{part: text and "".join(moved[letter] for letter in text) for part, text in asdict(dress).items()})


def _latin(letter: str) -> str:
    """The letter without its accents."""
    return unicodedata.normalize("NFD", letter)[0]


def _moved(letter: str) -> str:
    base = _latin(letter)
    if not base.isascii():
        return letter
    shifted = codecs.encode(base, "rot13")
    whole = unicodedata.normalize("NFC", shifted + unicodedata.normalize("NFD", letter)[1:])
    return whole if len(whole) == 1 else shifted  # not every letter is written with every accent


def _turned(letters: list[str]) -> list[str]:
    half = len(letters) // 2
    return letters[half:] + letters[:half]


def require_worn(chat: Any, question: str | Question, dresses: Mapping[str, Dress]) -> None:
    """Refuse dresses that do not reach the model: whose prompts are those of plain questions.

    Args:
        chat: the `ChatFormat` by which questions become prompts.
        question: any of those that will be asked.
        dresses: by name.

    Raises:
        LensError: it names the dress.
    """
    (own,) = as_questions([question])
    plain = [prompt.ids for prompt in chat.ask([own])]
    for name, dress in dresses.items():
        parts = [dress]
        if dress.system is not None and dress.system not in (own.system, chat.system):
            parts.append(Dress(dress.system))
        for part in parts:
            if [prompt.ids for prompt in chat.ask(dressed([own], part))] == plain:
                raise LensError(
                    f"dress {name!r} ({part}) leaves the prompts of plain questions as they are: they wear it already, "
                    "or the chat template has no place for a system text and no_system_role='drop' leaves it out. Give "
                    "another, or no_system_role='fold'"
                )


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
    conversations = load_conversations(value["file"])
    dress = found_dress(conversations, share=share)
    if dress is None:
        raise LensError(
            f"dress {name!r}: no {share:.0%} of the {len(_different(conversations))} different questions of "
            f"{value['file']}, and at least {FEWEST}, have anything in common around them; give "
            f'{{"file": ..., "share": ...}} with a lower share, or the texts themselves'
        )
    return dress


def _first(messages: Sequence[Mapping[str, Any]], role: str) -> str | None:
    return next((str(message["content"]) for message in messages if message["role"] == role), None)


def _common(texts: Sequence[str], least: int, borders: str) -> str:
    """The longest beginning of at least so many texts, cut behind white space or a border.

    Empty if it is blank, or so short that it belongs to the texts.
    """
    ordered = sorted(texts)
    ends = zip(ordered, ordered[least - 1 :], strict=False)  # all between them begin as both do
    alike = (takewhile(lambda pair: pair[0] == pair[1], zip(*pair, strict=False)) for pair in ends)
    start = max(("".join(letter for letter, _ in letters) for letters in alike), key=len, default="")
    while start and not (start[-1].isspace() or start[-1] in borders):
        start = start[:-1]
    told = len(start.split()) >= WORDS or start.strip().endswith((":", "：")) or start.strip().startswith((":", "："))
    return start if start.strip() and (told or any(mark in start for mark in f"\n{_MARKS}")) else ""
