"""Everything of a prompt but the query: the text around it, the ids common to all queries, the landmarks.

Settings and the turns before the last user message determine a `Frame`; a query is then laid into it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from piggyback_lens.conversations.prompt import AnswerForm
from piggyback_lens.conversations.template import Template, Turn, cut, short
from piggyback_lens.conversations.tokens import (
    Span,
    Tokens,
    common_prefix,
    common_suffix,
    decode,
    special_texts,
    tokenise,
)
from piggyback_lens.errors import LensError
from piggyback_lens.message_keys import message_of
from piggyback_lens.words import NoSystemRole

# Queries that no header is likely to merge with: what they have in common belongs to the settings alone.
_PROBES = ("a", "Why", "7", "the", "Zebra")
_THINK = re.compile(r"<(think|thinking|thought|reasoning)>\s*(</\1>\s*)?")
_BAD_OFFSETS = (
    "the tokenizer's character offsets leave out {}; they cannot be trusted: use another version of the tokenizer"
)
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class SystemText:
    """A system text and the way it is handed to the template (`None`: no system text is passed)."""

    text: str | None
    how: Literal["message", "fold"] = "message"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The part of a rendering that does not depend on the query.

    `pre` and `post` are the text around the user's content; `prefix_ids` and `postfix_ids` the token
    ids that all queries share; `landmarks` character ranges in `pre` (system, history) and, counted
    from its start, in `post` (think).
    """

    template: Template
    system: SystemText
    history: tuple[Turn, ...]
    pre: str
    post: str
    prefix_ids: tuple[int, ...]
    postfix_ids: tuple[int, ...]
    landmarks: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]
    fingerprint: str
    after: tuple[Turn, ...] = ()  # tool calls and their results after the query: part of `post`

    @cached_property
    def answer(self) -> AnswerForm:
        """How an assistant's answer is written after these turns."""
        return AnswerForm(self.template, tuple(self.turns("Hello")))

    def turns(self, query: str) -> list[Turn]:
        """All turns of the prompt with a query."""
        return compose(self.system, [*self.history, ("user", query), *self.after])


@dataclass(frozen=True)
class Layout:
    """One query laid into its frame: tokens, spans, what the template made of the query, notes."""

    tokens: Tokens
    spans: Mapping[str, Span]
    query: str
    notes: tuple[str, ...]


def resolve_system(template: Template, text: str | None, policy: NoSystemRole) -> SystemText:
    """Decide how a system text reaches the template. ``None`` asks for a prompt without any system text.

    Raises:
        LensError: the template has no system role and the policy is "error", or its default cannot be
            switched off.
    """
    if text is None:
        return _no_system(template)
    if template.system_cut is not None:
        return SystemText(text)
    if not text:
        return SystemText(None)
    if policy == "fold":
        return SystemText(
            text,
            "fold",
            ("the template has no system role: the system text is folded into the first user message",),
        )
    if policy == "drop":
        return SystemText(None, notes=("the template has no system role: the system text is dropped",))
    raise LensError(
        "the chat template has no system role but a system text is set; use no_system_role='fold' to prepend "
        "it to the first user message, or 'drop'"
    )


def _no_system(template: Template) -> SystemText:
    default = template.default_system
    if default is None:
        plain, _ = cut(lambda text: template.render([("user", text)]), "user's content")
        words = _MARKER.sub(" ", plain).split()
        note = f"the template writes text of its own that system=None cannot remove: {' '.join(words)!r}"
        return SystemText(None, notes=(note,) if len(words) > 3 else ())
    if default in template.render([("system", ""), ("user", "Hello")]):
        raise LensError(
            f"the chat template writes its default system text {default!r} even when given an empty one; "
            "pass a system text or system='default'"
        )
    note = f"an empty system message is passed to keep out the template's default system text {default!r}"
    return SystemText("", notes=(note,))


def compose(system: SystemText, turns: Sequence[Turn]) -> list[Turn]:
    """The turns with the system text in front, or folded into the first user turn."""
    turns = list(turns)
    if system.text is None:
        return turns
    if system.how == "message":
        return [("system", system.text), *turns]
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    turns[first] = ("user", f"{system.text}\n\n{turns[first][1]}")
    return turns


def build_frame(
    template: Template,
    system: SystemText,
    history: tuple[Turn, ...],
    settings: Mapping[str, Any],
    after: tuple[Turn, ...] = (),
) -> Frame:
    """Render with sentinels and probes in place of the query.

    Raises:
        LensError: the template refuses the turns, or does not write the last user message exactly once.
    """
    texts = [system.text or "", *(str(message_of(turn)) for turn in (*history, *after))]
    pre, post = cut(
        lambda query: template.render(compose(system, [*history, ("user", query), *after])), "user's content", texts
    )
    notes = list(system.notes)
    if after:
        notes.append(f"the postfix holds the {len(after)} messages of tool calls and results that follow the query")
    landmarks = {
        "system": _find_system(template, system, history, pre, notes),
        "history": _find_history(template, system, history, pre, notes),
        "think": think.span() if not after and (think := _THINK.search(post)) else None,
    }
    if template.today and template.writes_day(compose(system, [*history, ("user", "Hello")])):
        names = [name for name in template.settable if "date" in name]
        hint = f" or template_kwargs={{{names[0]!r}: ...}}" if names else ""
        notes.append(
            f"the template writes today's date, which was fixed as date={template.date!r}: pass this date{hint} for "
            "the same prompts on another day"
        )
    prefix_ids, postfix_ids = _canonical(template.tokenizer, pre, post)
    bos = template.tokenizer.bos_token_id
    if bos is not None and prefix_ids[:1] != (bos,) and template.tokenizer("a")["input_ids"][:1] == [bos]:
        notes.append("the tokenizer puts BOS in front of plain text, but the template writes none")
    content = [template.source, settings, prefix_ids, postfix_ids]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    found = {name: chars for name, chars in landmarks.items() if chars is not None}
    return Frame(template, system, history, pre, post, prefix_ids, postfix_ids, found, tuple(notes), fingerprint, after)


def _canonical(tokenizer: Any, pre: str, post: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids common to all probes, of tokens that lie wholly before or wholly after the query."""
    heads, tails = [], []
    for probe in _PROBES:
        tokens = tokenise(tokenizer, pre + probe + post)
        n_head = next((i for i, (_, stop) in enumerate(tokens.offsets) if stop > len(pre)), len(tokens.ids))
        border = len(pre) + len(probe)
        n_tail = next((i for i, (start, _) in enumerate(reversed(tokens.offsets)) if start < border), len(tokens.ids))
        heads.append(tokens.ids[:n_head])
        tails.append(tokens.ids[len(tokens.ids) - n_tail :])
    head, tail = heads[0], tails[0]
    for other_head, other_tail in zip(heads[1:], tails[1:], strict=True):
        head = head[: common_prefix(head, other_head)]
        tail = tail[len(tail) - common_suffix(tail, other_tail) :]
    return head, tail


def _find_system(
    template: Template, system: SystemText, history: tuple[Turn, ...], pre: str, notes: list[str]
) -> tuple[int, int] | None:
    if system.text is None:
        default, cuts = template.default_system, template.system_cut
        if default is None or cuts is None or not pre.startswith(cuts[0] + default):
            return None
        return len(cuts[0]), len(cuts[0]) + len(default)
    if not system.text.strip():
        return None
    texts = [content for _, content in history]

    def render(text: str) -> str:
        return template.render(compose(SystemText(text, system.how), [*history, ("user", "Hello")]))

    try:
        before, _ = cut(render, "system text", texts)
    except LensError as error:
        notes.append(f"the system text could not be located: {error}")
        return None
    for text in (system.text, system.text.strip(), system.text.rstrip(), system.text.lstrip()):
        if pre.startswith(before + text):
            if text != system.text:
                notes.append("the template trims white space from the system text")
            return len(before), len(before) + len(text)
    notes.append("the system text could not be located: the template does not write it as given")
    return None


def _find_history(
    template: Template, system: SystemText, history: tuple[Turn, ...], pre: str, notes: list[str]
) -> tuple[int, int] | None:
    if not history:
        return None
    if changed := [i for i, (_, content) in enumerate(history) if content.strip() not in pre]:
        notes.append(
            f"the template does not write the content of history messages {changed} as given "
            "(thinking removed, for example)"
        )
    role = history[0][0]
    texts = [system.text or "", *(content for _, content in history)]
    try:
        before, _ = cut(
            lambda text: template.render(compose(system, [(role, text), *history[1:], ("user", "Hello")])),
            "first message",
            texts,
        )
        headers = [template.user_header]
        if system.text and not pre.endswith(headers[0]):
            headers.append(template.header_after(system.text, lambda turns: compose(system, turns)))
    except LensError as error:
        notes.append(f"the history could not be located: {error}")
        return None
    header = next((header for header in headers if pre.endswith(header)), "")
    if not header and any(headers):
        notes.append("the end of the history could not be located: its span runs to the end of the prefix")
    stop = len(pre) - len(header)
    return (len(before), stop) if pre.startswith(before) and len(before) < stop else None


def lay_query(frame: Frame, query: str) -> Layout:
    """Render one query, find it, and cut the tokens into prefix, query and postfix.

    Raises:
        LensError: the template changed the query or the text around it, two BOS tokens, or offsets that
            do not give the query back.
    """
    template = frame.template
    text = template.render(frame.turns(query))
    notes = list(frame.notes)
    start, stop = _locate(frame, query, text, notes)
    tokens = tokenise(template.tokenizer, text)
    n_prefix = common_prefix(tokens.ids, frame.prefix_ids)
    n_postfix = common_suffix(tokens.ids[n_prefix:], frame.postfix_ids)
    border = len(tokens.ids) - n_postfix
    spans = {
        "prefix": Span("prefix", 0, n_prefix),
        "query": Span("query", n_prefix, border),
        "postfix": Span("postfix", border, len(tokens.ids)),
    }
    notes += _border_notes(frame, tokens, spans, start, stop)
    notes += _check(template.tokenizer, tokens, spans["query"], start, stop)
    notes += _marker_notes(frame, text[start:stop])
    spans |= _sub_spans(frame, tokens, spans, stop)
    return Layout(tokens, spans, text[start:stop], tuple(notes))


def _locate(frame: Frame, query: str, text: str, notes: list[str]) -> tuple[int, int]:
    """Character range of the query in the rendering; only white space at its ends may have gone."""
    pre, post = frame.pre, frame.post
    if not query.strip() and text != pre + query + post and text == pre.rstrip() + post:
        notes.append("the template trims the empty query together with the white space before it")
        return (len(pre.rstrip()),) * 2
    if text.startswith(pre) and text.endswith(post) and len(text) >= len(pre) + len(post):
        start, stop = len(pre), len(text) - len(post)
        written = text[start:stop]
        if written == query:
            return start, stop
        if written.strip() == query.strip() and written in query:
            notes.append(f"the template trims the query: {query!r} became {written!r}")
            return start, stop
        raise LensError(f"the chat template rewrites the query {short(query)} as {short(written)}; reword it")
    expected = pre + query + post
    at = common_prefix(text, expected)
    raise LensError(
        f"the chat template writes other text around the query {short(query)}: at character {at} it has "
        f"{short(text[at:])} where {short(expected[at:])} was expected; reword the query"
    )


def _border_notes(frame: Frame, tokens: Tokens, spans: Mapping[str, Span], start: int, stop: int) -> list[str]:
    """What tokens that straddle a border did to the spans."""
    notes, text, query = [], tokens.text, spans["query"]
    if query.start < len(frame.prefix_ids):
        lost = len(frame.prefix_ids) - query.start
        notes.append(f"the prefix is {lost} token(s) shorter than that of other queries")
    if (shorter := len(frame.postfix_ids) - (len(tokens.ids) - query.stop)) > 0:
        notes.append(f"the postfix is {shorter} token(s) shorter than that of other queries")
    first = len("".join(tokens.pieces[: query.start]))
    last = first + len("".join(tokens.pieces[query.start : query.stop]))
    borders = {start: ("prefix and query", text[first:start]), stop: ("query and postfix", text[stop:last])}
    if start == stop:
        borders = {start: ("prefix and postfix", text[first:last])}
    for border, (sides, guests) in borders.items():
        hit = next(((i, a, b) for i, (a, b) in enumerate(tokens.offsets) if a < border < b), None)
        if hit:
            i, a, b = hit
            home = next(name for name, span in spans.items() if i in span.positions)
            notes.append(
                f"token {i} straddles the border of {sides}: {text[a:border]!r} | {text[border:b]!r} is one "
                f"token; it counts as {home}"
            )
        elif guests:
            notes.append(
                f"the query span holds {guests!r} of the template, at the border of {sides}: other queries "
                "merge with it"
            )
    return notes


def _check(tokenizer: Any, tokens: Tokens, query: Span, start: int, stop: int) -> list[str]:
    """Run-time invariants of one layout; returns notes on losses, raises on contradictions."""
    notes: list[str] = []
    ids, pieces = tokens.ids, tokens.pieces
    content = tokens.text[start:stop]
    assert "".join(pieces) == tokens.text
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == (bos, bos):
        raise LensError(
            "the rendering begins with two BOS tokens; the template writes one: leave it out of the "
            "messages, and out of a template that writes it twice"
        )
    if lost := tokens.uncovered:
        characters = "".join(tokens.text[i] for i in lost)
        if any(a == b for a, b in tokens.offsets):
            raise LensError(_BAD_OFFSETS.format(short(characters)))
        notes.append(f"the tokenizer has no token for these characters and drops them: {short(characters)}")
    first = len("".join(pieces[: query.start]))
    last = first + len("".join(pieces[query.start : query.stop]))
    if outside := "".join(tokens.text[i] for i in range(start, stop) if not first <= i < last and i not in lost):
        # Special tokens may take white space in, and unknown characters may share one unknown token.
        if outside.strip() and tokenizer.unk_token_id not in ids[max(query.start - 1, 0) : query.stop + 1]:
            raise LensError(_BAD_OFFSETS.format(short(outside)))
        notes.append(f"a neighbouring token outside the query span swallows {outside!r} of it")
    before = decode(tokenizer, ids[: query.start])
    read = decode(tokenizer, ids[: query.stop])[len(before) :]
    if content not in read:
        cause = (
            "unknown token" if tokenizer.unk_token_id in ids[query.start : query.stop] else "normalisation or spaces"
        )
        notes.append(f"the query's ids do not decode to its exact text ({cause}): the model reads {short(read)}")
    return notes


def _marker_notes(frame: Frame, content: str) -> list[str]:
    tokenizer = frame.template.tokenizer
    markers = (*special_texts(tokenizer), *_MARKER.findall(frame.pre[-80:] + frame.post))
    found = sorted({m for m in markers if m in content})
    return [f"the query contains markers of the template: {', '.join(map(repr, found))}"] if found else []


def _sub_spans(frame: Frame, tokens: Tokens, spans: Mapping[str, Span], stop: int) -> dict[str, Span]:
    """Landmarks as token ranges, clipped to the span that they lie in."""
    found = {}
    bos = frame.template.tokenizer.bos_token_id
    if bos is not None and tokens.ids[:1] == (bos,) and len(spans["prefix"]):
        found["bos"] = Span("bos", 0, 1)
    for name, (a, b) in frame.landmarks.items():
        home = spans["postfix" if name == "think" else "prefix"]
        shift = stop if name == "think" else 0
        first, last = tokens.overlapping(a + shift, b + shift)
        first, last = max(first, home.start), min(last, home.stop)
        if first < last:
            found[name] = Span(name, first, last)
    return found
