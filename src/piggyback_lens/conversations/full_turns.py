"""Tool calls, their results and reasoning: written as the template writes them, or refused by name.

Whether a template has a place for something is found by rendering with something else in it, or without it: where the
text stays the same, there is none.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.conversations.template import Conversation, Template, TemplateRefusal, Turn, short, spare_words
from piggyback_lens.conversations.tokens import common_prefix, special_ids, tokenise
from piggyback_lens.errors import LensError
from piggyback_lens.message_keys import LINK_KEYS, FullTurn, message_of


def has_more(talk: Conversation) -> bool:
    """Whether a conversation has more than texts of system, user and assistant."""
    return talk.answer is not None or any(
        isinstance(turn, FullTurn) or turn[0] == "tool" for turn in (*talk.history, *talk.after)
    )


def settled(template: Template, talk: Conversation) -> Conversation:
    """The conversation with its tool calls in the form that the template writes.

    Raises:
        LensError: the template has no place for them.
    """
    parts = (*talk.history, *talk.after, *(() if talk.answer is None else (talk.answer,)))
    names = _names(parts)
    turns = [
        _settled(template, turn, name) if isinstance(turn, FullTurn) else turn
        for turn, name in zip(parts, names, strict=True)
    ]
    answer = None if talk.answer is None else turns.pop()
    n = len(talk.history)
    return dataclasses.replace(talk, history=tuple(turns[:n]), after=tuple(turns[n:]), answer=answer)


def _names(turns: Sequence[Turn]) -> list[str]:
    """What each turn is called in messages."""
    seen: dict[str, int] = {}
    names = []
    for role, _ in turns:
        seen[role] = seen.get(role, 0) + 1
        names.append(f"{role} turn {seen[role]}")
    return names


def _settled(template: Template, turn: FullTurn, name: str) -> FullTurn:
    message = turn.message()
    if "tool_calls" not in message:
        return turn
    plain = _rendered(template, [("user", "Hello"), (turn[0], turn[1])])
    forms = list(_forms(turn, message))
    tried = [_rendered(template, [("user", "Hello"), form]) for form in forms]
    for form, text in zip(forms, tried, strict=True):
        names = [call["function"]["name"] for call in message["tool_calls"]]
        if isinstance(text, str) and text != plain and all(called in text for called in names):
            return form
    if isinstance(tried[0], TemplateRefusal):
        raise LensError(f"tool_calls of {name} cannot be rendered: {tried[0]}")
    raise _no_place("tool_calls", name)


def _forms(turn: FullTurn, message: dict[str, Any]) -> Iterator[FullTurn]:
    """Arguments as an object, then as JSON text; an empty content as a text, then as null."""
    texts = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    for calls in (message["tool_calls"], texts):
        for content in (turn[1],) if turn[1] else ("", None):
            yield FullTurn(*turn, {**message, "content": content, "tool_calls": calls})


def _rendered(template: Template, turns: Sequence[Turn]) -> str | TemplateRefusal:
    try:
        return template.render(turns, False)
    except TemplateRefusal as error:
        return error


def check_places(template: Template, turns: Sequence[Turn]) -> tuple[str, ...]:
    """Refuse what the template would leave out; notes on what it writes in an answer and not in the history.

    Raises:
        LensError: it names the key, or the role tool, and the turn.
    """
    names, notes, whole = _names(turns), [], template.render(turns, False)
    for i, turn in enumerate(turns):
        if not isinstance(turn, FullTurn) and turn[0] != "tool":
            continue
        before, text = turns[:i], template.render(turns[: i + 1], False)
        for part, other in _without(turn):
            if _rendered(template, [*before, other]) == text:
                raise _no_place(part, names[i])
            if _rendered(template, [*before, other, *turns[i + 1 :]]) == whole:
                notes.append(f"the template leaves {part} of {names[i]} out of the history")
    return tuple(notes)


def _without(turn: Turn) -> Iterator[tuple[str, Turn]]:
    """The parts of a turn, each with the turn as it would be with other text there, or without the part."""
    role, content = turn
    message = message_of(turn)
    other, _ = spare_words([str(message)])
    if content.strip():
        yield "content", FullTurn(role, other, {**message, "content": other})
    if role == "tool":
        yield "the role tool", ("assistant", content)
        yield "the role tool", ("user", content)
    for key in message.keys() - {"role", "content", *LINK_KEYS}:
        rest = {name: value for name, value in message.items() if name != key}
        yield key, FullTurn(role, content, {**rest, key: other} if isinstance(message[key], str) else rest)
    calls: list[Any] = message.get("tool_calls", [])
    for number, call in enumerate(calls if len(calls) > 1 else (), 1):
        others = [own for own in calls if own is not call]
        yield f"tool call {number}", FullTurn(role, content, {**message, "tool_calls": others})


def _no_place(part: str, name: str) -> LensError:
    return LensError(
        f"the chat template has no place for {part} of {name}: leave the row out, write it into the content, or use a "
        "template that writes it"
    )


def answered(prompt: RenderedPrompt, turns: Sequence[Turn], answer: FullTurn, end: bool) -> RenderedPrompt:
    """A prompt followed by an answer as the template writes it.

    Args:
        prompt: the rendering of `turns`.
        turns: everything before the answer.
        answer: the assistant's turn.
        end: with the end of the turn.

    Raises:
        LensError: the template writes other text before the answer than the prompt has.
    """
    template, tokenizer = prompt.answer.template, prompt.tokenizer
    text = template.render([*turns, answer], False)
    keys = ", ".join(sorted(answer.message().keys() - {"role", "content"}))
    if not text.startswith(prompt.text):
        at = common_prefix(text, prompt.text)
        raise LensError(
            f"the answer has {keys}, before which the template writes {short(text[at:])} where the prompt ends with "
            f"{short(prompt.text[at:])}: render with other thinking= settings, or leave {keys} out"
        )
    closing = template.answer_cut[1]
    usual = text.endswith(closing)
    whole = tokenise(tokenizer, text.removesuffix(closing) if usual else text)
    n, notes = len(prompt.ids), list(prompt.notes)
    if whole.ids[:n] == prompt.ids:
        ids = whole.ids[n:]
    else:
        ids = tokenise(tokenizer, whole.text[len(prompt.text) :]).ids
        notes.append("the response would merge with the prompt's last token: it is tokenised by itself")
    if not usual:
        ids = _up_to_end(ids, special_ids(tokenizer), keys)
        ids = ids if end else ids[:-1]
    found = prompt.with_response(ids, end and usual)
    return dataclasses.replace(found, notes=(*notes, *found.notes[len(prompt.notes) :]))


def _up_to_end(ids: tuple[int, ...], special: frozenset[int], keys: str) -> tuple[int, ...]:
    """The ids up to the last special token, with which a turn ends that has an end of its own."""
    last = next((i for i in reversed(range(len(ids))) if ids[i] in special), None)
    if last is None:
        raise LensError(f"the template ends an answer with {keys} without a special token: leave the row out")
    return ids[: last + 1]
