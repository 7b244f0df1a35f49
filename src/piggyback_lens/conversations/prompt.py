"""One rendered prompt: its ids, its text, its spans, and the response that may follow."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from piggyback_lens.conversations.template import Template, TemplateRefusal, Turn, cut, short
from piggyback_lens.conversations.token_view import TokenView
from piggyback_lens.conversations.tokens import (
    Span,
    check_ids,
    common_prefix,
    fixed_ids,
    pieces_of_ids,
    special_ids,
    tokenise,
)
from piggyback_lens.errors import LensError
from piggyback_lens.reading.questions import Question


@dataclass(frozen=True, eq=False)
class AnswerForm:
    """How a template writes an assistant's turn.

    Attributes:
        template: with its variables filled in.
        turns: those before the answer: the system text, the history, and a question in place of the query.
    """

    template: Template
    turns: tuple[Turn, ...] = (("user", "Hello"),)

    @cached_property
    def _ending(self) -> tuple[int, ...]:
        """Ids that the template writes after the assistant's content, up to and including the first special token."""
        tokenizer = self.template.tokenizer
        before, after = self.template.answer_cut
        tokens = tokenise(tokenizer, f"{before}yes{after}")
        border = len(before) + len("yes")
        straddles = any(start < border < stop for start, stop in tokens.offsets)
        ending = (
            tokenise(tokenizer, after).ids
            if straddles
            else tuple(i for i, (start, _) in zip(tokens.ids, tokens.offsets, strict=True) if start >= border)
        )
        special = special_ids(tokenizer)
        last = next((at for at, token in enumerate(ending) if token in special), None)
        if last is None:
            return () if self.template.writes_next_header else ending
        return ending[: last + 1]

    @property
    def _own_stop(self) -> tuple[int, ...]:
        """The special token that ends a turn; in its place the first added one that is no plain text."""
        if self._ends_specially:
            return self._ending[-1:]
        fixed = fixed_ids(self.template.tokenizer)
        return tuple(token for token in self._ending if token in fixed)[:1]

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that follow the assistant's content, up to and including the first special token.

        Where the template ends a turn without one: all that it writes, and the tokenizer's EOS.
        """
        eos = self.template.tokenizer.eos_token_id
        if self._ends_specially or (self.stop_ids and eos is None):
            return self._ending
        return (*self._ending, eos)

    @property
    def _ends_specially(self) -> bool:
        return bool(self._ending) and self._ending[-1] in special_ids(self.template.tokenizer)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The token that ends a turn, where it is no plain text, and the tokenizer's EOS."""
        eos = self.template.tokenizer.eos_token_id
        if eos is None and not self._own_stop:
            raise LensError(
                "the chat template ends an assistant's turn without a special token and the tokenizer has "
                "no EOS token; set tokenizer.eos_token"
            )
        return tuple(dict.fromkeys((*self._own_stop, *(() if eos is None else (eos,)))))

    @cached_property
    def end_notes(self) -> tuple[str, ...]:
        """What is unusual about the end of a turn."""
        if not self._ending or self._ends_specially:
            return ()
        tokenizer, text = self.template.tokenizer, self.template.answer_cut[1]
        added = "" if tokenizer.eos_token is None else f"; {tokenizer.eos_token!r} is added to it"
        stops = " and ".join(map(repr, tokenizer.convert_ids_to_tokens(list(self.stop_ids))))
        return (
            f"the template ends an assistant's turn with {text!r}, which is no special token{added}; "
            f"generation stops at {stops}",
        )

    @cached_property
    def _around(self) -> tuple[str, str]:
        """Text around the assistant's content where it answers these turns."""
        return cut(
            lambda text: self.template.render([*self.turns, ("assistant", text)], False),
            "assistant's content",
            (text for _, text in self.turns),
        )

    @cached_property
    def _prompt(self) -> str:
        return self.template.render(self.turns)

    @cached_property
    def _opening(self) -> str | None:
        """What the template writes between the prompt and the assistant's content of the finished turn.

        Where the finished conversation does not continue the prompt (Mistral's leaves out the system text), that after
        a single question; None where that does not continue its prompt either.
        """
        before, _ = self._around
        if before.startswith(self._prompt):
            return before[len(self._prompt) :]
        alone = AnswerForm(self.template)
        return None if self.turns == alone.turns else alone._opening

    def written(self, response: str) -> tuple[str, tuple[str, ...]]:
        """What follows the prompt for a response given as text, and notes.

        The template's opening (a channel, an empty think block, a space) and the response as the template writes it.
        """
        before, after = self._around
        opening, notes = self._opening or "", list(self._other_start)
        try:
            turn = self.template.render([*self.turns, ("assistant", response)], False)
        except TemplateRefusal as error:
            return response, (f"the response follows the prompt as given: {error}",)
        shapes = (response, response.strip(), response.rstrip(), response.lstrip())
        content = next((shape for shape in shapes if turn == before + shape + after), None)
        if content is None:
            return (response, tuple(notes)) if notes else self._rewritten(response, turn, after)
        if content != response:
            notes.append(f"the template trims the response: {short(response)} became {short(content)}")
        if opening:
            notes.append(
                f"the response begins with {opening!r}, which the template writes before an assistant's content"
            )
        return opening + content, tuple(notes)

    @cached_property
    def _other_start(self) -> tuple[str, ...]:
        """A note where the finished conversation does not continue the prompt."""
        before, prompt = self._around[0], self._prompt
        if before.startswith(prompt):
            return ()
        at = common_prefix(before, prompt)
        tag = before.rfind("<", 0, at)
        at = tag if tag >= 0 and ">" not in before[tag:at] else at  # show whole tags
        told = "follows the prompt as given" if self._opening is None else "opens as after a single question"
        return (
            f"the template writes {before[at:]!r} before an assistant's content where the prompt has "
            f"{prompt[at:]!r}: the response {told}",
        )

    def _rewritten(self, response: str, turn: str, after: str) -> tuple[str, tuple[str, ...]]:
        """A response with other text than usual around it: one that brings its own thoughts, for example."""
        prompt = self._prompt
        own = turn[len(prompt) : len(turn) - len(after)]
        if not (turn.startswith(prompt) and turn.endswith(after) and _letters(response) in _letters(own)):
            return response, (
                f"the template would not write the response {short(response)} in full (thinking removed, for "
                "example): it follows the prompt as given",
            )
        if own == response:
            return own, ()
        return own, (f"the template writes the response {short(response)} as {short(own)}",)


def _letters(text: str) -> str:
    return "".join(text.split())


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
        question: what it asks, where it came of a question (`ChatFormat.ask`).
        sample: number of the answer that is wanted, of several to this prompt.
    """

    ids: tuple[int, ...]
    text: str
    spans: Mapping[str, Span]
    query: str
    notes: tuple[str, ...]
    fingerprint: str
    pieces: tuple[str, ...]
    answer: AnswerForm
    question: Question | None = None
    sample: int = 0

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
            response: text, or the token ids that a model generated. Text is written as the template writes an
                assistant's content: after the template's opening (a channel, an empty think block), without white
                space that it trims, and tokenised where it stands. Ids are left as they are.
            end: append the template's end of an assistant's turn, unless the response brings a stop token.

        Raises:
            LensError: there is a response already, or no token to add.
        """
        if "response" in self.spans:
            raise LensError("this prompt has a response already; add another to the prompt without one")
        notes = list(self.notes)
        if isinstance(response, str):
            text, told = self.answer.written(response)
            notes += told
            ids, pieces = _tokenise_response(self, text, notes) if text else ((), ())
        else:
            ids = check_ids(response, "the response's ids")
            pieces = pieces_of_ids(self.tokenizer, ids, self.ids[-1])
        if end and not (ids and ids[-1] in self.answer.stop_ids):
            closing = self.answer.end_ids
            pieces += pieces_of_ids(self.tokenizer, closing, (self.ids + ids)[-1])
            ids += closing
            notes += self.answer.end_notes
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
