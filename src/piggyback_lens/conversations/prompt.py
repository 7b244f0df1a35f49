"""One rendered prompt: its ids, its text, its spans, and the response that may follow."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from piggyback_lens.conversations.template import Template
from piggyback_lens.conversations.token_view import TokenView
from piggyback_lens.conversations.tokens import Span, check_ids, common_prefix, pieces_of_ids, special_ids, tokenise
from piggyback_lens.errors import LensError


@dataclass(frozen=True, eq=False)
class AnswerForm:
    """How a template writes an assistant's turn."""

    template: Template

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that follow the assistant's content, up to and including the first special token."""
        tokenizer = self.template.tokenizer
        before, after = self.template.answer_cut
        tokens = tokenise(tokenizer, f"{before}yes{after}")
        border = len(before) + len("yes")
        special = special_ids(tokenizer)
        ending: list[int] = []
        for token, (start, _) in zip(tokens.ids, tokens.offsets, strict=True):
            if start >= border:
                ending.append(token)
                if token in special:
                    return tuple(ending)
        if tokenizer.eos_token_id is None:
            raise LensError(
                "the chat template ends an assistant's turn without a special token and the tokenizer has "
                "no EOS token; set tokenizer.eos_token"
            )
        return (tokenizer.eos_token_id,)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The last of `end_ids`, and the tokenizer's EOS."""
        eos = self.template.tokenizer.eos_token_id
        return tuple(dict.fromkeys((self.end_ids[-1], *(() if eos is None else (eos,)))))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the template writes before an assistant's content where the prompt ends otherwise."""
        before, _ = self.template.answer_cut
        prompt = self.template.render([("user", "Hello")])
        if before == prompt:
            return ()
        at = common_prefix(before, prompt)
        return (
            f"the template writes {before[at:]!r} before an assistant's content where the prompt has "
            f"{prompt[at:]!r}: the response follows the prompt as given",
        )


@dataclass(frozen=True, eq=False)
class RenderedPrompt:
    """Token ids of one prompt with its text and named spans.

    Attributes:
        ids: token ids, the response's (if any) included.
        text: the rendering, followed by the response's text.
        spans: prefix, query, postfix and response tile the ids; bos, system, history, think are sub-spans.
        query: the user's content as the template wrote it.
        notes: everything unusual about this prompt.
        fingerprint: of the settings, the history and the ids around the query.
        pieces: the text of each token; together they are `text`.
        answer: how the template writes an assistant's turn.
    """

    ids: tuple[int, ...]
    text: str
    spans: Mapping[str, Span]
    query: str
    notes: tuple[str, ...]
    fingerprint: str
    pieces: tuple[str, ...]
    answer: AnswerForm

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        spans = ", ".join(f"{s.name} {s.start}:{s.stop}" for s in self.spans.values())
        return f"RenderedPrompt({len(self.ids)} tokens; {spans}; {len(self.notes)} notes)"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that made the token ids."""
        return self.answer.template.tokenizer

    @property
    def n_prompt(self) -> int:
        """Number of tokens before the response."""
        return self.spans["postfix"].stop

    def span(self, name: str) -> Span:
        """The span of a name, such as prefix, query or postfix.

        Raises:
            LensError: no such span in this prompt, or it holds no token.
        """
        span = self.spans.get(name)
        if span is None or not len(span):
            state = "is empty" if span is not None else "does not exist"
            full = ", ".join(s.name for s in self.spans.values() if len(s))
            raise LensError(f"span {name!r} {state} in this prompt; it has: {full}")
        return span

    def span_text(self, name: str) -> str:
        """The text of the named span (an empty span gives an empty string)."""
        span = self.spans[name] if name in self.spans else self.span(name)
        return "".join(self.pieces[span.start : span.stop])

    def with_response(self, response: str | Sequence[int], end: bool = True) -> "RenderedPrompt":
        """This prompt followed by a response, given as text or ids.

        Args:
            response: text (tokenised where it stands, after the prompt) or token ids.
            end: append the template's end of an assistant's turn, unless the response brings a stop token.

        Raises:
            LensError: there is a response already, or no token to add.
        """
        if "response" in self.spans:
            raise LensError("this prompt has a response already; add another to the prompt without one")
        notes = list(self.notes)
        if isinstance(response, str):
            ids, pieces = _tokenise_response(self, response, notes)
            notes += self.answer.notes
        else:
            ids = check_ids(response, "the response's ids")
            pieces = pieces_of_ids(self.tokenizer, ids, self.ids[-1])
        if end and not (ids and ids[-1] in self.answer.stop_ids):
            closing = self.answer.end_ids
            pieces += pieces_of_ids(self.tokenizer, closing, (self.ids + ids)[-1])
            ids += closing
        if not ids:
            raise LensError("the response is empty; pass some text or ids, or end=True")
        n = len(self.ids)
        return dataclasses.replace(
            self,
            ids=self.ids + ids,
            text=self.text + "".join(pieces),
            spans={**self.spans, "response": Span("response", n, n + len(ids))},
            notes=tuple(notes),
            pieces=self.pieces + pieces,
        )

    def show(self) -> TokenView:
        """A view of the tokens, coloured by span in notebooks and plain with `print`."""
        raw = self.tokenizer.convert_ids_to_tokens(list(self.ids))
        return TokenView(self.ids, self.pieces, tuple(map(str, raw)), self.spans, self.notes)


def _tokenise_response(
    prompt: RenderedPrompt, response: str, notes: list[str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and pieces of a response in its place, falling back to the response by itself."""
    tokenizer, n = prompt.tokenizer, len(prompt.ids)
    joint = tokenise(tokenizer, prompt.text + response)
    if joint.ids[:n] == prompt.ids and "".join(joint.pieces[:n]) == prompt.text:
        return joint.ids[n:], joint.pieces[n:]
    alone = tokenise(tokenizer, response)
    at = common_prefix(joint.ids, prompt.ids)
    notes.append(
        (
            f"the response would merge with the prompt's token {at} ({prompt.pieces[at]!r})"
            if at < n
            else "the response would share a token with the prompt"
        )
        + ": it is tokenised by itself"
    )
    return alone.ids, alone.pieces
