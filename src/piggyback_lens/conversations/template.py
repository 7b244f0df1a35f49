"""One chat template, rendered and taken apart: text in, text out, no spans yet.

Where a piece of text lands in a rendering is found by rendering again with a sentinel in its place;
nothing is ever searched for in token ids.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime as Day
from functools import cached_property
from typing import Any

from piggyback_lens.conversations.template_limits import TooCostly, run_metered, settable_in
from piggyback_lens.errors import LensError
from piggyback_lens.message_keys import FullTurn, message_of, read_turn

Turn = tuple[str, str]
"""(role, content); a `FullTurn` where the message has more."""

_ROLES = ("system", "user", "assistant", "tool")
_OWN_KWARGS = {"messages", "conversation", "tokenize", "add_generation_prompt", "chat_template", "tools"}
# Newer transformers replace what is no plain value among the template's variables, so the frozen clock is a macro.
_FROZEN_CLOCK = (
    "{% macro strftime_now(fmt) -%}{%- if fmt in piggyback_day -%}{{ piggyback_day[fmt] }}{%- else -%}"
    "{%- set ns = namespace(text=fmt) -%}{%- for code, text in piggyback_day.items() -%}"
    "{%- set ns.text = ns.text | replace(code, text) -%}{%- endfor -%}{{ ns.text }}{%- endif -%}{%- endmacro +%}"
)
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_CODES = [f"%{flag}{letter}" for letter in "aAbBcdDeFGHIjmMpSuUVwWxXyYzZ" for flag in ("", "-")]
_DAYS = ("2001-02-03", "2012-11-10")


class TemplateRefusal(LensError):
    """The template itself raised an error for these messages."""


@dataclass(frozen=True)
class Conversation:
    """Messages, checked and sorted by their part in a prompt."""

    system: str | None
    history: tuple[Turn, ...]
    query: str
    response: str | None
    after: tuple[Turn, ...] = ()  # tool calls and their results, between the query and the response
    answer: FullTurn | None = None  # the response, where it is more than a text


def read_conversation(query_or_messages: str | Sequence[Mapping[str, Any]]) -> Conversation:
    """Sort a user string or a list of ``{"role", "content"}`` messages into a `Conversation`.

    Raises:
        LensError: empty list, unknown role or key, content that is no string, a system message that is
            not the first, or no user message at the end.
    """
    if isinstance(query_or_messages, str):
        check_text("the query", query_or_messages)
        return Conversation(None, (), query_or_messages, None)
    if not isinstance(query_or_messages, Sequence) or not query_or_messages:
        raise LensError(
            f"got {query_or_messages!r} as a conversation; pass the user's text or a non-empty list of messages"
        )
    turns = [_read_message(i, message) for i, message in enumerate(query_or_messages)]
    roles = [role for role, _ in turns]
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    if any(role == "system" for role, _ in turns):
        raise LensError("a system message stands after the first place; put one system message in front")
    last = turns.pop() if turns and turns[-1][0] == "assistant" else None
    answer = last if isinstance(last, FullTurn) else None
    _check_results(turns, len(roles) - len(turns) - (last is not None))
    at = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=None)
    if at is None or turns[-1][0] not in ("user", "tool"):
        raise LensError(
            f"the conversation's roles are {roles}; the last message must be the user's, or an assistant's "
            "answer to it: add a user message"
        )
    response = last[1] if last is not None and answer is None else None
    return Conversation(system, tuple(turns[:at]), turns[at][1], response, tuple(turns[at + 1 :]), answer)


def _check_results(turns: Sequence[Turn], shift: int) -> None:
    """Refuse a tool's result without a call, by the number of the message."""
    for i, (role, _) in enumerate(turns):
        if role == "tool" and (i == 0 or turns[i - 1][0] not in ("assistant", "tool")):
            raise LensError(
                f"message {i + shift} has role 'tool'; expected one of {', '.join(_ROLES[:3])}: "
                "a tool's result follows an assistant's call"
            )


def _read_message(index: int, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise LensError(f"message {index} is {message!r}; expected a dict with 'role' and 'content'")
    turn = read_turn(index, message)
    role, content = turn
    if role not in _ROLES:
        raise LensError(f"message {index} has role {role!r}; expected one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise LensError(f"message {index} has content of type {type(content).__name__}; pass its text as a string")
    check_text(f"message {index}", turn.more if isinstance(turn, FullTurn) else content)
    return turn


def check_text(what: str, text: str) -> None:
    """Refuse half a character, as bytes that are no UTF-8 become on the command line.

    Raises:
        LensError: says where it stands.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LensError(f"{what} holds half a character (a lone surrogate) at {error.start}; remove it") from None


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with its variables filled in.

    Attributes:
        tokenizer: it holds the template.
        kwargs: variables that the template reads.
        date: ISO day; freezes the template's clock.
        today: whether the date is that of the computer's clock, which nobody asked for.
    """

    tokenizer: Any
    kwargs: Mapping[str, Any]
    date: str | None = None
    today: bool = False

    def __post_init__(self) -> None:
        _check_tokenizer(self.tokenizer)
        if clash := sorted(_OWN_KWARGS & set(self.kwargs)):
            raise LensError(f"template_kwargs contains {clash}, which the library passes itself; leave it out")
        if unread := sorted(set(self.kwargs) - self._read):
            raise LensError(f"the chat template does not read {unread} from template_kwargs; it reads {self.settable}")
        if self.date is not None:
            self._check_date(self.date)
        try:
            text = json.dumps(dict(self.kwargs), ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise LensError(f"template_kwargs must be plain JSON values: {error}") from None
        check_text("template_kwargs", text)

    @cached_property
    def source(self) -> str:
        """The template's jinja text."""
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise LensError(f"the tokenizer has no default chat template: {error}") from None

    @cached_property
    def _read(self) -> frozenset[str]:
        """Names that the template reads from outside."""
        try:
            return settable_in(self.source)
        except Exception as error:  # a syntax error, and what a parser runs into
            raise LensError(f"the tokenizer's chat template is not valid jinja: {error}") from None

    @property
    def settable(self) -> list[str]:
        """Names of the variables that a user may give."""
        return sorted(self._read - _OWN_KWARGS - set(self.tokenizer.special_tokens_map))

    def _check_date(self, date: str) -> None:
        try:
            Day.fromisoformat(date)
        except ValueError:
            raise LensError(f"date={date!r} is no ISO date; write it like '2025-01-31'") from None
        if "strftime_now" not in self.source:
            names = [name for name in self.settable if "date" in name]
            hint = f"; the template reads template_kwargs={{{names[0]!r}: ...}} instead" if names else ""
            raise LensError(f"date={date!r} has no effect: the chat template reads no clock; leave date=None{hint}")

    @cached_property
    def _day(self) -> dict[str, str]:
        """The date in the formats that the template names, and in the codes of which it may compute others."""
        assert self.date is not None
        formats = [match.group(2) for match in _DATE_CALL.finditer(self.source)]
        return {code: Day.fromisoformat(self.date).strftime(code) for code in [*formats, *_CODES]}

    def render(self, turns: Sequence[Turn], generation_prompt: bool = True) -> str:
        """The template's text for these turns.

        Raises:
            TemplateRefusal: the template raised an error (a role it does not know, roles out of order ...).
        """
        messages = [message_of(turn) for turn in turns]
        kwargs = dict(self.kwargs)
        if self.date is not None:
            kwargs["chat_template"] = _FROZEN_CLOCK + self.source
            kwargs["piggyback_day"] = self._day
        source = kwargs.get("chat_template", self.source)
        variables = {"add_generation_prompt": generation_prompt, **self.tokenizer.special_tokens_map, **kwargs}
        try:
            run_metered(source, messages, variables)
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **kwargs
            )
        except TooCostly as error:
            raise LensError(f"the chat template {error}: it is broken or hostile, use another tokenizer") from error
        except Exception as error:  # templates divide, recurse and index: every type
            roles = ", ".join(role for role, _ in turns)
            why = str(error) or type(error).__name__
            raise TemplateRefusal(f"the chat template refuses messages with the roles {roles}: {why}") from error
        return str(text)

    def writes_day(self, turns: Sequence[Turn]) -> bool:
        """Whether the rendering of these turns depends on the day that the template's clock shows."""
        if "strftime_now" not in self.source:
            return False
        one, two = (Template(self.tokenizer, self.kwargs, day).render(turns) for day in _DAYS)
        return one != two

    @cached_property
    def reads_clock(self) -> bool:
        """Whether some rendering depends on the day: of a question alone, or of one with a system text or a history."""
        talks: list[list[Turn]] = [[], [("system", "Hi")], [("user", "Hi"), ("assistant", "Hi")]]
        for talk in talks:
            with suppress(TemplateRefusal):
                if self.writes_day([*talk, ("user", "Hello")]):
                    return True
        return False

    @cached_property
    def system_cut(self) -> tuple[str, str] | None:
        """Text around the system text in a one-turn rendering; None if it is refused or ignored."""
        self.render([("user", "Hello")])  # a template that refuses this too has another problem: let it raise
        try:
            return cut(lambda text: self.render([("system", text), ("user", "Hello")]), "system text")
        except LensError:
            return None

    @cached_property
    def default_system(self) -> str | None:
        """The system text that the template writes when none is given, where that can be told apart."""
        if self.system_cut is None:
            return None
        before, after = self.system_cut
        text = self.render([("user", "Hello")])
        if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
            return None
        default = text[len(before) : len(text) - len(after)]
        return default if default.strip() else None

    @cached_property
    def answer_cut(self) -> tuple[str, str]:
        """Text around the assistant's content in a finished exchange of one question and one answer."""
        return cut(lambda text: self.render([("user", "Hello"), ("assistant", text)], False), "assistant's content")

    @cached_property
    def writes_next_header(self) -> bool:
        """Whether what follows an answer may hold the header of the next one, since the template always writes it."""
        talk = [("user", "Hello")]
        if self.render(talk) != self.render(talk, False):
            return False
        answer, question = spare_words(["Hello"])
        longer = self.render([*talk, ("assistant", answer), ("user", question)])
        return not longer.partition(answer)[2].startswith(self.answer_cut[1])

    @cached_property
    def user_header(self) -> str:
        """`header_after` without a system text."""
        return self.header_after("", list)

    def header_after(self, system: str, compose: Callable[[list[Turn]], list[Turn]]) -> str:
        """What stands between the end of an assistant's turn and the next user's content.

        Where the last turn ends differently from earlier ones, the assistant's turn end is included.

        Args:
            system: the system text, which some templates put into the last user message.
            compose: puts it into the turns.
        """
        answer, question = spare_words(["Hello", system])
        text = self.render(compose([("user", "Hello"), ("assistant", answer), ("user", question)]))
        if text.count(answer) != 1 or text.count(question) != 1:
            raise LensError("the chat template does not write every message of a longer conversation once")
        between = text.partition(answer)[2].partition(question)[0]
        closing = self.answer_cut[1]
        return between[len(closing) :] if between.startswith(closing) else between


def _check_tokenizer(tokenizer: Any) -> None:
    if not hasattr(tokenizer, "apply_chat_template"):
        raise LensError(f"got a {type(tokenizer).__name__} as tokenizer; pass a transformers tokenizer")
    if not getattr(tokenizer, "is_fast", False):
        raise LensError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; load the fast one "
            "(AutoTokenizer with a tokenizer.json)"
        )
    if not tokenizer.chat_template:
        raise LensError(
            "the tokenizer has no chat template; use an instruction-tuned model's tokenizer or set "
            "tokenizer.chat_template"
        )


def short(text: str, limit: int = 40) -> str:
    """The beginning of a text, quoted, for messages."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def spare_words(texts: Iterable[str]) -> tuple[str, str]:
    """Two words that occur in none of `texts`: stand-ins for a message's content."""
    joined = "\n".join(texts)
    first, second = "Qzxlens", "7vjqlens"
    while first in joined or second in joined:
        first, second = first + "q", second + "z"
    return first, second


def cut(render: Callable[[str], str], what: str, texts: Iterable[str] = ()) -> tuple[str, str]:
    """The text before and after the place where ``render(x)`` writes x.

    Raises:
        LensError: the template leaves x out, writes it more than once, or writes different text around
            different x.
    """
    sides = set()
    for word in spare_words(texts):
        text = render(word)
        if (count := text.count(word)) != 1:
            raise LensError(f"the chat template writes the {what} {count} times instead of once; it cannot be used")
        before, _, after = text.partition(word)
        sides.add((before, after))
    if len(sides) > 1:
        raise LensError(f"the chat template writes different text around the {what} depending on what it says")
    return sides.pop()
