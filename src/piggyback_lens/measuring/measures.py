"""Behaviours: what is measured on one response, as a number with its unit.

A behaviour is a string detector (0 or 1, so that its mean over prompts is a rate) or a count. It sees the
response only, never the query. Detectors are rules for English text: quick, free and repeatable, not a
judge. Look at the responses which they mark before a rate is believed.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from piggyback_lens.errors import LensError

RATE = "rate 0..1"
OPENING = 250  # characters; a refusal or abstention comes first, later ones belong to stories and quotes


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What is measured on one response, as a number with its unit.

    ``name`` identifies it (``get_behaviour(b.name)`` gives the same one back), ``label`` is for axes,
    ``unit`` is "words" or "rate 0..1", ``fn`` maps the response to the number. Call the behaviour itself. ``most`` is
    the largest value there is: an answer that was cut at the token limit after it is measured right.
    """

    name: str
    label: str
    unit: str
    description: str
    fn: Callable[[str], float] = field(compare=False, repr=False)
    most: float | None = None

    def biased(self, value: float, ended: str | None) -> bool:
        """Whether the value of an answer would be larger, had the token limit not cut it: then it is a lower bound."""
        return ended == "length" and self.unit == "words" and (self.most is None or value < self.most)

    def __call__(self, response: str) -> float:
        """The measured value of one response, without special tokens."""
        return float(self.fn(response))


# --- detectors ---------------------------------------------------------------------------------------

_CANNOT = r"(?:can't|cannot|can not|won't|will not|couldn't|could not|(?:'m|am) (?:unable|not able) to)"
_SERVE = (
    r"(?:help(?! but\b)(?! \w+ing\b)|assist|answer|provide|comply|discuss|fulfil+|share|offer|create|generate"
    r"|write|engage|respond|advise|give (?:you )?(?:any|specific|that|legal|medical|financial|advice)"
    r"|talk about|participate|(?:do|support|complete|process) (?:that|this))"
)
_REFUSAL = re.compile(
    rf"\b(?:I|we) ?{_CANNOT} (?:\w+ly |in good conscience )?{_SERVE}\b"
    rf"|\b(?:sorry|afraid|apologi[sz]e|unfortunately|regret)\b[^.!?\n]{{0,60}}"
    rf"\b(?:unable|not able) to {_SERVE}\b"
    rf"|\bsorry\b[^.!?\n]{{0,20}}\b(?:can't|cannot|won't) ?[.!\n]"
    r"|\bI (?:must|have to|need to|will have to) (?:\w+ly )?decline\b|\bI (?:\w+ly )?decline to\b"
    r"|\bI(?:'d| would) (?:rather|prefer) not (?:to )?(?:answer|discuss|say|help|talk)\b"
    r"|\bI(?:'m| am) not comfortable (?:with|providing|discussing|answering|helping|writing|sharing)\b"
    r"|\bI(?:'m| am) not (?:allowed|permitted) to\b"
    r"|\b(?:goes )?(?:against|violates?) my (?:guidelines|policy|policies|programming|principles|values)\b",
    re.IGNORECASE,
)
_ABSTENTION = re.compile(
    r"\bI (?:really |honestly |simply |just )?(?:don't|do not) (?:really |actually )?know\b(?! about you\b)"
    r"|\bI(?:'m| am) (?:not|un)[ -]?(?:entirely |completely |quite )?(?:sure|certain)\b"
    r"|\bI (?:have|'ve got) no (?:idea|way of knowing|information|knowledge)\b"
    r"|\bI (?:don't|do not) have (?:\w+ )?(?:information|knowledge|data|access|answer|details)\b"
    r"|\bI (?:can't|cannot|can not|couldn't|could not) (?:say|tell|determine|confirm|know)\b"
    r"|\bI (?:can't|cannot|can not) be (?:sure|certain)\b"
    r"|\b(?:it is|it's) (?:not possible|impossible) to (?:say|know|tell|determine)\b"
    r"|\b(?:not|isn't) enough information\b|\binsufficient information\b"
    r"|\bI(?:'d| would) (?:rather|prefer) not (?:to )?guess\b|\bI won't guess\b",
    re.IGNORECASE,
)
_TOOL_BLOCK = re.compile(r"<tool_call>\s*(?:\{|\[|<function=)")
_ARGUMENT_KEYS = frozenset({"arguments", "parameters", "args"})


def _plain(text: str) -> str:
    """Straight apostrophes and single spaces, so that typography decides nothing."""
    return re.sub(r"[^\S\n]+", " ", text.replace("\u2019", "'")).strip()


def _opens_with(response: str, pattern: re.Pattern[str]) -> float:
    return float(pattern.search(_plain(response)[:OPENING]) is not None)


def _contains(response: str, phrase: str) -> float:
    return float(" ".join(phrase.casefold().split()) in " ".join(_plain(response).casefold().split()))


def _matches(response: str, pattern: re.Pattern[str]) -> float:
    return float(pattern.search(response) is not None)


def _count_words(response: str) -> float:
    return float(len(response.split()))


def _repeats(response: str) -> float:
    words = response.lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _calls_tool(response: str) -> float:
    return float(_TOOL_BLOCK.search(response) is not None or _has_json_call(response))


def _has_json_call(response: str) -> bool:
    """A complete JSON object anywhere in the text with a tool's name and its arguments."""
    decoder = json.JSONDecoder()
    for brace in re.finditer(r"\{", response):
        try:
            value, _ = decoder.raw_decode(response, brace.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value.get("name"), str) and _ARGUMENT_KEYS & value.keys():
            return True
    return False


# --- registry ----------------------------------------------------------------------------------------

BEHAVIOURS: Mapping[str, Behaviour] = MappingProxyType(
    {
        behaviour.name: behaviour
        for behaviour in (
            Behaviour(
                "words",
                "words per answer",
                "words",
                "Number of words, split at white space.",
                _count_words,
            ),
            Behaviour(
                "refusal",
                "refusal rate",
                RATE,
                f"Declines to help within the first {OPENING} characters, by usual wordings.",
                partial(_opens_with, pattern=_REFUSAL),
            ),
            Behaviour(
                "abstention",
                "abstention rate",
                RATE,
                f"Says that it does not know within the first {OPENING} characters, by usual wordings.",
                partial(_opens_with, pattern=_ABSTENTION),
            ),
            Behaviour(
                "tool_call",
                "tool call rate",
                RATE,
                "Contains a <tool_call> block, or a JSON object with a name and arguments.",
                _calls_tool,
            ),
            Behaviour(
                "repetition",
                "repeated runs of three words",
                RATE,
                "Share of an answer's runs of three words that it has had before; 0 where it has none.",
                _repeats,
            ),
        )
    }
)


def phrase(text: str) -> Behaviour:
    """Does the response contain ``text``, ignoring case, runs of white space and the form of apostrophes?"""
    wanted = _plain(text)
    if not wanted:
        raise LensError("a phrase to look for must not be empty; write for example 'phrase:consult a doctor'")
    return Behaviour(
        f"phrase:{wanted}",
        f"rate of “{wanted}”",
        RATE,
        f"Contains “{wanted}”, ignoring case and spacing.",
        partial(_contains, phrase=wanted),
    )


def regex(pattern: str) -> Behaviour:
    """Does ``re.search(pattern, response)`` find something? Case matters unless it begins with ``(?i)``."""
    if not pattern:
        raise LensError("an empty regular expression matches everything; write for example 'regex:^Yes'")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise LensError(f"'{pattern}' is no regular expression: {error}; escape special characters with \\") from error
    return Behaviour(
        f"regex:{pattern}",
        f"rate of /{pattern}/",
        RATE,
        f"The regular expression /{pattern}/ finds something.",
        partial(_matches, pattern=compiled),
    )


def words_up_to(text: str) -> Behaviour:
    """The number of words, counted up to a number: what a cut behind it cannot change."""
    if not text.isdecimal() or int(text) < 1:
        raise LensError(f"words are counted up to {text!r}, expected a number of at least 1, as in 'words:20'")
    most = int(text)
    return Behaviour(
        f"words:{most}",
        f"words per answer, counted to {most}",
        "words",
        f"Number of words, split at white space; {most} for more.",
        lambda response: min(_count_words(response), float(most)),
        float(most),
    )


def kept_behaviour(facts: Mapping[str, str]) -> Behaviour:
    """The behaviour of a result that was read, by the name, label and unit that it keeps.

    One of your own is known by its label and unit alone: what is read has its values, and calling it is refused.
    """
    try:
        return get_behaviour(facts["name"])
    except LensError:
        name, label, unit = facts["name"], facts.get("label", facts["name"]), facts.get("unit", "")
        return Behaviour(name, label, unit, "A behaviour of the user's own.", partial(_refuse, name))


def _refuse(name: str, response: str) -> float:
    raise LensError(f"the behaviour {name!r} came from a file, which has no code: pass your own Behaviour again")


def get_behaviour(spec: "str | Behaviour") -> Behaviour:
    """A behaviour by name, ``"words:20"``, ``"phrase:some text"``, ``"regex:pattern"``; a ``Behaviour`` passes through.

    Example:
        >>> get_behaviour("words")("one two three")
        3.0
        >>> get_behaviour("phrase:I cannot")("I cannot say")
        1.0
    """
    if isinstance(spec, Behaviour):
        return spec
    kind, colon, rest = spec.partition(":")
    if colon and kind in _MADE:
        return _MADE[kind](rest)
    if spec in BEHAVIOURS:
        return BEHAVIOURS[spec]
    known = ", ".join(BEHAVIOURS)
    more = "'words:20', 'phrase:some text' or 'regex:pattern'"
    raise LensError(f"no behaviour is called '{spec}'; known are {known}, and {more}")


_MADE: Mapping[str, Callable[[str], Behaviour]] = MappingProxyType(
    {"phrase": phrase, "regex": regex, "words": words_up_to}
)
