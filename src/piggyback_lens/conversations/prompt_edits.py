"""Prompts with other tokens at known places: replaced tokens, another query, another prefix text.

What is not edited keeps its ids, and the spans stay what they were. A prompt edited token by token is never
tokenised again: its text, made of its tokens, is for reading only.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.conversations.tokens import (
    Span,
    Tokens,
    common_prefix,
    common_suffix,
    decode,
    fixed_ids,
    pieces_of_ids,
    tokenise,
)
from piggyback_lens.errors import LensError


def added_ids(tokenizer: object) -> frozenset[int]:
    """Ids of special tokens, and of tags that were added to the vocabulary. Added words and white space are text."""
    return fixed_ids(tokenizer)


def perturbed_prompt(prompt: RenderedPrompt, span: str, replacements: Mapping[int, int]) -> RenderedPrompt:
    """The prompt with other tokens at some places of one span.

    Args:
        prompt: it stays as it is.
        span: a span or sub-span of the prompt.
        replacements: index within the span to the new token id.

    Returns:
        A prompt of the same length with the same spans. `query` follows where the span reaches into the
        query; the fingerprint is another one where prefix or postfix changed; a note lists what was replaced.

    Raises:
        LensError: unknown or empty span, no replacements, an index outside the span, a token id that the
            tokenizer does not have, or the id that stands there already.
    """
    home = prompt.span(span)
    if not replacements:
        raise LensError("there is nothing to replace: give at least one index of the span with its new token id")
    for index, token in replacements.items():
        if not 0 <= index < len(home):
            raise LensError(
                f"index {index} lies outside the span {span!r}, which has {len(home)} tokens (0 to the last)"
            )
        if token < 0 or prompt.tokenizer.convert_ids_to_tokens(token) is None:
            raise LensError(f"the tokenizer has no token with the id {token}")
        if token == prompt.ids[home.start + index]:
            raise LensError(f"token {index} of the span {span!r} is {token} already: replace it by another id")
    new = {home.start + index: token for index, token in replacements.items()}
    ids = tuple(new.get(i, old) for i, old in enumerate(prompt.ids))
    pieces = _pieces_after(prompt, ids, new)
    changes = ", ".join(f"{prompt.pieces[i]!r} by {pieces[i]!r}" for i in sorted(new))
    note = f"{len(new)} of {len(home)} tokens of the span {span!r} are replaced: {changes}"
    query_span = prompt.spans["query"]
    touched = any(i in query_span.positions for i in new)
    query = "".join(pieces[query_span.start : query_span.stop]) if touched else prompt.query
    return _rebuilt(prompt, ids, pieces, prompt.spans, query, note)


def _pieces_after(prompt: RenderedPrompt, ids: tuple[int, ...], places: Iterable[int]) -> tuple[str, ...]:
    """The texts of the tokens; those that share a character with a replaced one are decoded anew as well."""
    pieces, affected = list(prompt.pieces), set()
    for place in places:
        start, stop = place, place + 1
        while start > 0 and not pieces[start]:
            start -= 1
        while stop < len(pieces) and not pieces[stop]:
            stop += 1
        affected |= set(range(start, stop))
    while affected:
        start = stop = min(affected)
        while stop in affected:
            stop += 1
        pieces[start:stop] = _decoded(prompt, ids, start, stop)
        affected -= set(range(start, stop))
    return tuple(pieces)


def _decoded(prompt: RenderedPrompt, ids: tuple[int, ...], start: int, stop: int) -> tuple[str, ...]:
    if start > 0:
        return pieces_of_ids(prompt.tokenizer, ids[start:stop], ids[start - 1])
    first = decode(prompt.tokenizer, ids[:1])
    return (first, *pieces_of_ids(prompt.tokenizer, ids[1:stop], ids[0]))


def with_query(prompt: RenderedPrompt, query: str) -> RenderedPrompt:
    """The same template around another query, with the ids that rendering it would give.

    White space at the query's ends is dropped. The text is tokenised as a whole, so a token that the new
    query shares with the template shortens the prefix or the postfix, as in `ChatFormat.render`.

    Raises:
        LensError: a blank query, a prompt with a response, or a prompt whose ids are not those of its text.
    """
    query = query.strip()
    if not query:
        raise LensError("the new query is blank; give some text")
    if "response" in prompt.spans:
        raise LensError("the prompt holds a response already: exchange the query of a prompt without one")
    prefix, old, postfix = (prompt.spans[name] for name in ("prefix", "query", "postfix"))
    content = prompt.span_text("query")
    at = content.find(prompt.query)
    _require_own_text(prompt)
    if at < 0:
        raise LensError(f"the query {prompt.query[:40]!r} cannot be exchanged: its tokens do not hold its exact text")
    before = prompt.span_text("prefix") + content[:at]
    after = content[at + len(prompt.query) :] + prompt.span_text("postfix")
    tokens = tokenise(prompt.tokenizer, before + query + after)
    n_prefix = common_prefix(tokens.ids, prompt.ids[: prefix.stop])
    n_postfix = common_suffix(tokens.ids[n_prefix:], prompt.ids[postfix.start :])
    border, shift = len(tokens.ids) - n_postfix, len(tokens.ids) - len(prompt.ids)
    main = {
        "prefix": Span("prefix", 0, n_prefix),
        "query": Span("query", n_prefix, border),
        "postfix": Span("postfix", border, len(tokens.ids)),
    }
    spans = dict(main)
    for name, span in prompt.spans.items():
        if name not in main:
            home, moved = (main["postfix"], shift) if span.start >= old.stop else (main["prefix"], 0)
            start, stop = max(span.start + moved, home.start), min(span.stop + moved, home.stop)
            spans |= {name: Span(name, start, stop)} if start < stop else {}
    note = f"the query {prompt.query[:40]!r} is exchanged"
    return _rebuilt(prompt, tokens.ids, tokens.pieces, spans, query, note)


def with_prefix_text(
    prompt: RenderedPrompt, text: str, system: tuple[int, int] | None = None, note: str = "the prefix is edited"
) -> RenderedPrompt:
    """The same query and postfix, token by token, after another prefix text.

    The new text is tokenised as a whole. Where the query or the postfix would come out with other ids, because
    a token straddles the border, the prefix is tokenised by itself, and a note says so.

    Args:
        prompt: one turn, without a response.
        text: of the whole prefix, template markers included.
        system: character range of the system text in it.
        note: is added to the prompt's notes.

    Raises:
        LensError: a prompt with a response or a history, one whose ids are not those of its text, or a text
            that does not hold the same special and added tokens in the same order.
    """
    if "response" in prompt.spans or "history" in prompt.spans:
        raise LensError("the prefix can be edited of prompts with one turn and without a response")
    old, tokenizer = prompt.span("prefix"), prompt.tokenizer
    _require_own_text(prompt)
    rest = prompt.ids[old.stop :]
    tokens = tokenise(tokenizer, text + "".join(prompt.pieces[old.stop :]))
    stop = len(tokens.ids) - len(rest)
    if tokens.ids[max(stop, 0) :] == rest and "".join(tokens.pieces[:stop]) == text:
        tokens = Tokens(text, tokens.ids[:stop], tokens.offsets[:stop])
    else:
        tokens = tokenise(tokenizer, text)
        note += "; it is tokenised by itself, since it would merge with the query"
    fixed = added_ids(tokenizer)
    kept, wanted = ([i for i in ids if i in fixed] for ids in (tokens.ids, prompt.ids[: old.stop]))
    if not tokens.ids or kept != wanted:
        raise LensError(f"the edited prefix {text[:60]!r} does not hold the special tokens of the original")
    shift = len(tokens.ids) - old.stop
    ids, pieces = tokens.ids + prompt.ids[old.stop :], tokens.pieces + prompt.pieces[old.stop :]
    spans = {
        name: Span(name, 0 if name == "prefix" else span.start + shift, span.stop + shift)
        for name, span in prompt.spans.items()
        if name == "prefix" or span.start >= old.stop
    }
    if "bos" in prompt.spans:
        spans["bos"] = prompt.spans["bos"]
    start, stop = tokens.overlapping(*system) if system else (0, 0)
    if start < stop:
        spans["system"] = Span("system", start, stop)
    assert ids[spans["query"].start :] == prompt.ids[old.stop :]
    return _rebuilt(prompt, ids, pieces, spans, prompt.query, note)


def _require_own_text(prompt: RenderedPrompt) -> None:
    if tokenise(prompt.tokenizer, prompt.text).ids != prompt.ids:
        raise LensError(
            "the prompt's ids are not those of its text (was it perturbed?): start from the prompt as rendered"
        )


def _rebuilt(
    prompt: RenderedPrompt,
    ids: tuple[int, ...],
    pieces: tuple[str, ...],
    spans: Mapping[str, Span],
    query: str,
    note: str,
) -> RenderedPrompt:
    before, after = _around(prompt.ids, prompt.spans), _around(ids, spans)
    fingerprint = prompt.fingerprint
    if before != after:
        fingerprint = hashlib.sha256(repr((fingerprint, after)).encode()).hexdigest()[:16]
    return dataclasses.replace(
        prompt,
        ids=ids,
        text="".join(pieces),
        spans=spans,
        query=query,
        notes=(*prompt.notes, note),
        fingerprint=fingerprint,
        pieces=pieces,
    )


def _around(ids: tuple[int, ...], spans: Mapping[str, Span]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ids[: spans["query"].start], ids[spans["postfix"].start : spans["postfix"].stop]
