"""From a conversation to a `RenderedPrompt`: ids, text and named token spans.

A prompt is rendered with the tokenizer's own chat template and tokenised once, without adding special
tokens. Its spans `prefix` (everything before the user's content), `query` (the user's content),
`postfix` (up to the first response token) and `response` tile the ids; `bos`, `system`, `history` and
`think` are sub-spans where the template writes such a thing. With several turns the query is the last
user message, and what stands before it belongs to the prefix.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Day
from functools import cached_property
from typing import Any

from piggyback_lens.conversations.batch import PromptBatch, batch_prompts, repeated
from piggyback_lens.conversations.frame import Frame, SystemText, build_frame, lay_query, resolve_system
from piggyback_lens.conversations.full_turns import answered, check_places, has_more, settled
from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.conversations.template import Template, Turn, check_text, read_conversation
from piggyback_lens.conversations.tokens import Span, common_prefix, decode
from piggyback_lens.errors import LensError
from piggyback_lens.reading.questions import Question, as_questions
from piggyback_lens.settings import ChatSettings

__all__ = [
    "DEFAULT",
    "ChatFormat",
    "PromptBatch",
    "RenderedPrompt",
    "Span",
    "TemplateDiff",
    "batch_prompts",
    "compare_templates",
]

DEFAULT = "default"
"""As `ChatFormat.system`: pass no system message, so that the template's own default applies."""

_MAX_FRAMES = 64
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, eq=False)
class ChatFormat(ChatSettings):
    """How conversations become prompts: a tokenizer with its chat template, and `ChatSettings`.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        system: system text; "default" passes none, so that the template's own default applies; None is for no system
            text at all. This and the following are the fields of `ChatSettings`, and are given by keyword.
        thinking: handed to the template's own switch, enable_thinking or thinking; None leaves it alone.
        no_system_role: what to do with a system text if the template has no system role: "error", "fold" or "drop".
        template_kwargs: further variables that the template reads.
        date: ISO day of the clock of templates which write today's date. None is today's date where the template
            writes it, and stays what it was when the format was made.

    Raises:
        LensError: no fast tokenizer, no chat template, variables, a thinking switch or a date that the template
            does not read, a system text that it cannot take.
    """

    tokenizer: Any = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "template_kwargs", dict(self.template_kwargs))
        if self.no_system_role not in ("error", "fold", "drop"):
            raise LensError(f"no_system_role={self.no_system_role!r}; expected 'error', 'fold' or 'drop'")
        if not (self.system is None or isinstance(self.system, str)):
            raise LensError(f"system={self.system!r}; pass the system text, 'default' or None")
        check_text("the system text", self.system or "")
        _ = self._template, self._system

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={value!r}"
            for f in dataclasses.fields(self)
            if f.repr and (value := getattr(self, f.name)) != f.default and value != {}
        ]
        return f"ChatFormat({', '.join(shown)})"

    @cached_property
    def _template(self) -> Template:
        plain = Template(self.tokenizer, dict(self.template_kwargs), self.date)
        if self.date is None and plain.reads_clock:
            object.__setattr__(self, "date", Day.today().isoformat())  # a run may pass midnight
            plain = dataclasses.replace(plain, date=self.date, today=True)
        return plain if self.thinking is None else self._switched(plain, self.thinking)

    def _switched(self, plain: Template, thinking: bool) -> Template:
        """The template with its own switch for thinking set."""
        for name in _SWITCHES:
            if name in self.template_kwargs:
                raise LensError(f"template_kwargs sets {name} as well as thinking=; use thinking= only")
        for name in (name for name in _SWITCHES if name in plain.settable):
            on, off = (dataclasses.replace(plain, kwargs={**plain.kwargs, name: switch}) for switch in (True, False))
            if on.render([("user", "Hello")]) != off.render([("user", "Hello")]):
                return on if thinking else off
        read = f" or {_SWITCHES[1]}; it reads {plain.settable}" if plain.settable else ""
        raise LensError(
            f"thinking={thinking} has no effect: the chat template does not react to {_SWITCHES[0]}{read}; "
            "leave thinking=None"
        )

    @cached_property
    def _system(self) -> SystemText:
        if self.system == DEFAULT:
            return SystemText(None)
        return resolve_system(self._template, self.system, self.no_system_role)

    @cached_property
    def _frames(self) -> dict[tuple[SystemText, tuple[Turn, ...], tuple[Turn, ...]], Frame]:
        return {}

    def _frame(self, system: SystemText, history: tuple[Turn, ...], after: tuple[Turn, ...] = ()) -> Frame:
        key = (system, history, after)
        if key not in self._frames:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            self._frames[key] = build_frame(self._template, system, history, self.settings(), after)
        return self._frames[key]

    @property
    def _bare(self) -> Frame:
        return self._frame(self._system, ())

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids before the user's content that all one-turn queries of these settings share."""
        return self._bare.prefix_ids

    @property
    def postfix_ids(self) -> tuple[int, ...]:
        """Ids between the user's content and the response that all queries of these settings share."""
        return self._bare.postfix_ids

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the sha256 of template text, settings and canonical ids."""
        return self._bare.fingerprint

    @property
    def default_system(self) -> str | None:
        """The system text that the template writes by itself, None if it writes none."""
        return self._template.default_system

    @property
    def turn_end_ids(self) -> tuple[int, ...]:
        """Ids that follow the assistant's content, up to and including the first special token.

        Where the template ends a turn without one: all that it writes, and the end-of-sequence token.
        """
        return self._bare.answer.end_ids

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant's turn: EOS, and the template's turn end where it is no plain text."""
        return self._bare.answer.stop_ids

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {
            "system": self.system,
            "thinking": self.thinking,
            "no_system_role": self.no_system_role,
            "template_kwargs": dict(self.template_kwargs),
            "date": self.date,
        }

    def render(
        self,
        query_or_messages: str | Sequence[Mapping[str, Any]],
        *,
        response: str | Sequence[int] | None = None,
        end: bool = True,
    ) -> RenderedPrompt:
        """Render a user's text, or a list of messages of which the last user message is the query.

        An assistant message at the end of the list is the response; so is `response` (text or ids). A
        system message in the list is allowed if the settings name no other. Tool calls with their results
        (role tool) and reasoning_content are written as the template writes them; a response with such a
        key is all that the template writes for it, and calls and results after the query belong to the postfix.

        Raises:
            LensError: malformed messages; a template that changes the query, refuses the roles or has no
                place for a key of a message; two leading BOS tokens; a response given twice.

        Example:
            >>> prompt = chat.render("hello there")
            >>> prompt.span_text("query")
            'hello there'
            >>> sorted(name for name in prompt.spans if name in ("prefix", "query", "postfix"))
            ['postfix', 'prefix', 'query']
        """
        talk = read_conversation(query_or_messages)
        if (talk.response is not None or talk.answer is not None) and response is not None:
            raise LensError("the messages end with an assistant message and response= is given too; pass one of them")
        system, notes = self._system, []
        if talk.system is not None and talk.system != self.system:
            if self.system != DEFAULT:
                raise LensError(
                    f"the messages bring the system text {talk.system[:40]!r} but the settings have "
                    f"system={self.system!r}; give it in one place"
                )
            system = resolve_system(self._template, talk.system, self.no_system_role)
            notes.append("the system text comes with the messages: the prefix is not that of the settings")
        if has_more(talk):
            talk = settled(self._template, talk)
        frame = self._frame(system, talk.history, talk.after)
        if has_more(talk):
            said = frame.turns(talk.query)
            notes += check_places(self._template, said if talk.answer is None else [*said, talk.answer])
        layout = lay_query(frame, talk.query)
        prompt = RenderedPrompt(
            ids=layout.tokens.ids,
            text=layout.tokens.text,
            spans=layout.spans,
            query=layout.query,
            notes=(*notes, *layout.notes),
            fingerprint=frame.fingerprint,
            pieces=layout.tokens.pieces,
            answer=frame.answer,
        )
        if talk.answer is not None:
            return answered(prompt, frame.turns(talk.query), talk.answer, end)
        answer = talk.response if response is None else response
        return prompt if answer is None else prompt.with_response(answer, end)

    def ask(self, questions: Iterable[str | Question], samples: int = 1) -> list[RenderedPrompt]:
        """A prompt for every paraphrase of every question, in order, each knowing its question.

        A question's own system text stands in place of that of these settings.

        Args:
            questions: texts, or what `load_questions` reads.
            samples: answers that are wanted of each prompt, which is repeated for them; 0 for as many as its question
                asks for.

        Raises:
            LensError: as `render`.

        Example:
            >>> [prompt.question.id for prompt in chat.ask([Question("a", ["hello there", "what is it"]), "tell me"])]
            ['a', 'a', 'q1']
        """
        prompts = [
            dataclasses.replace(self.under(question).render(text), question=question)
            for question in as_questions(questions)
            for text in question.paraphrases
        ]
        return repeated(prompts, samples)

    def under(self, question: Question | None) -> "ChatFormat":
        """These settings with the system text that a question brings; themselves where it brings none."""
        if question is None or question.system is None or question.system == self.system:
            return self
        return self._with_system.setdefault(question.system, dataclasses.replace(self, system=question.system))

    @cached_property
    def _with_system(self) -> dict[str, "ChatFormat"]:
        return {}

    def empty_query(self) -> RenderedPrompt:
        """The template with an empty query: donor of postfix activations."""
        return self.render("")


@dataclass(frozen=True)
class TemplateDiff:
    """How the prompts of two formats differ outside the query.

    `prefix`, `postfix` and `turn_end` hold the first token index at which the two differ, counted from the
    part's start, with both tokens' text ("" past the end); None where ids and texts are equal.
    """

    prefix: tuple[int, str, str] | None
    postfix: tuple[int, str, str] | None
    turn_end: tuple[int, str, str] | None
    default_systems: tuple[str | None, str | None]

    @property
    def same(self) -> bool:
        """Whether prefix, postfix and turn end have equal ids and equal token texts."""
        return self.prefix is None and self.postfix is None and self.turn_end is None

    def __str__(self) -> str:
        lines = ["the templates agree" if self.same else "the templates differ"]
        for name in ("prefix", "postfix", "turn_end"):
            if (found := getattr(self, name)) is not None:
                index, a, b = found
                lines.append(f"{name}: first difference at token {index}: {a!r} | {b!r}")
        a, b = self.default_systems
        lines.append(f"default system text: {a!r}" if a == b else f"default system texts: {a!r} | {b!r}")
        return "\n".join(lines)

    def to_frame(self) -> Any:
        """One row per part: whether it is the same, the first differing token, both sides' text."""
        import pandas as pd

        rows = []
        for name in ("prefix", "postfix", "turn_end"):
            index, a, b = getattr(self, name) or (None, None, None)
            rows.append({"part": name, "same": index is None, "first_difference": index, "a": a, "b": b})
        a, b = self.default_systems
        rows.append({"part": "default_system", "same": a == b, "first_difference": None, "a": a, "b": b})
        return pd.DataFrame(rows).astype({"first_difference": "Int64"})


def compare_templates(a: ChatFormat, b: ChatFormat) -> TemplateDiff:
    """Compare what two formats write around the query, token by token."""
    return TemplateDiff(
        prefix=_first_difference(a, b, a.prefix_ids, b.prefix_ids),
        postfix=_first_difference(a, b, a.postfix_ids, b.postfix_ids),
        turn_end=_first_difference(a, b, a.turn_end_ids, b.turn_end_ids),
        default_systems=(a.default_system, b.default_system),
    )


def _first_difference(
    a: ChatFormat, b: ChatFormat, ids_a: tuple[int, ...], ids_b: tuple[int, ...]
) -> tuple[int, str, str] | None:
    texts_a, texts_b = ([decode(f.tokenizer, (i,)) for i in ids] for f, ids in ((a, ids_a), (b, ids_b)))
    pairs_a, pairs_b = list(zip(ids_a, texts_a, strict=True)), list(zip(ids_b, texts_b, strict=True))
    if pairs_a == pairs_b:
        return None
    at = common_prefix(pairs_a, pairs_b)
    text_a, text_b = (texts[at] if at < len(texts) else "" for texts in (texts_a, texts_b))
    return at, text_a, text_b
