"""Variants of a chat template's prefix: other case, spacing, system text, role names, date, thinking switch.

The query keeps its token ids in every variant. *Text edits* (case, spacing, role names) change only the plain
text of the prefix, between its special tokens, and keep the postfix as it is, token by token. *Settings* (system
text, date, thinking) are rendered by the template itself; a thinking switch may change the postfix, where
templates write an empty think block.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

from piggyback_lens.conversations.chat import DEFAULT, ChatFormat, RenderedPrompt
from piggyback_lens.conversations.prompt_edits import added_ids, with_prefix_text
from piggyback_lens.errors import LensError

NEUTRAL_SYSTEMS: Mapping[str, str] = {
    "assistant": "You are a helpful assistant.",
    "questions": "You answer questions.",
    "polite": "Please be polite and accurate.",
}
ROLE_NAMES: Mapping[str, str] = {
    "user": "human",
    "system": "instructions",
    "developer": "instructions",
    "Instruction": "Question",
    "INST": "USER",
}
DATE = "2025-01-31"
_FAMILIES = ("case", "spacing", "system prompt", "role names", "date", "thinking")
_PROBES = ("Why", "the zebra", "7 apples?")
_WORD = re.compile(r"\w+(?:['’]\w+)*")

Render = Callable[[RenderedPrompt], RenderedPrompt]


@dataclass(frozen=True)
class Variant:
    """One way to write a prompt's template.

    Attributes:
        name: unique within a suite.
        family: what kind of change it is.
        render: a prompt of the unmodified template, with one turn and no response, to the same query in this
            variant.
        skipped: why the variant cannot be used; "" where it can.
    """

    name: str
    family: str
    render: Render = field(repr=False)
    skipped: str = ""

    def __call__(self, prompt: RenderedPrompt) -> RenderedPrompt:
        """The prompt in this variant.

        Raises:
            LensError: the template refuses it, the query's token ids would change, or the prompt has a history
                or a response.
        """
        if "response" in prompt.spans or "history" in prompt.spans:
            raise LensError("template variants take prompts with one turn and without a response")
        new = self.render(prompt)
        if query_ids(new) != query_ids(prompt):
            raise LensError(
                f"variant {self.name!r} changes the tokens of the query {prompt.query[:40]!r} itself: leave out "
                "the variant or the prompt"
            )
        return new


def query_ids(prompt: RenderedPrompt) -> tuple[int, ...]:
    """Token ids of the query span."""
    span = prompt.spans["query"]
    return prompt.ids[span.start : span.stop]


# --- text edits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A stretch of a prefix: a special or added token, the template's own text, or the system text."""

    kind: Literal["special", "template", "system"]
    text: str


Edit = Callable[[list[Part]], list[Part]]


def prefix_parts(prompt: RenderedPrompt) -> list[Part]:
    """The prefix, cut at its special tokens and around its system text."""
    fixed, system = added_ids(prompt.tokenizer), prompt.spans.get("system")
    parts: list[Part] = []
    for i in prompt.span("prefix").positions:
        if prompt.ids[i] in fixed:
            parts.append(Part("special", prompt.pieces[i]))
            continue
        kind: Literal["template", "system"] = "system" if system and i in system.positions else "template"
        if parts and parts[-1].kind == kind:
            parts[-1] = Part(kind, parts[-1].text + prompt.pieces[i])
        else:
            parts.append(Part(kind, prompt.pieces[i]))
    return parts


def edit_prefix(prompt: RenderedPrompt, edit: Edit, note: str) -> RenderedPrompt:
    """The prompt with an edited prefix text; special tokens, query and postfix stay, token by token.

    Raises:
        LensError: the edit lost or made a special token, or the prompt's ids are not those of its text.
    """
    parts = edit(prefix_parts(prompt))
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.text))
    places = [place for part, place in zip(parts, pairwise(starts), strict=True) if part.kind == "system"]
    system = (places[0][0], places[-1][1]) if places else None
    return with_prefix_text(prompt, "".join(part.text for part in parts), system, note)


def _map_text(parts: list[Part], change: Callable[[str], str]) -> list[Part]:
    return [part if part.kind == "special" else Part(part.kind, change(part.text)) for part in parts]


def _map_template(parts: list[Part], change: Callable[[str], str]) -> list[Part]:
    return [Part(part.kind, change(part.text)) if part.kind == "template" else part for part in parts]


def _after_headers(parts: list[Part], change: Callable[[str], str]) -> list[Part]:
    """Change the end of what stands right before the system text and right before the query."""
    if parts[-1].kind == "special":
        parts = [*parts, Part("template", "")]
    ends = [*(parts[i + 1].kind == "system" for i in range(len(parts) - 1)), True]
    return [
        Part(part.kind, change(part.text)) if end and part.kind != "special" else part
        for part, end in zip(parts, ends, strict=True)
    ]


def _title(text: str) -> str:
    return _WORD.sub(lambda match: match.group().capitalize(), text)


def _double_spaces(text: str) -> str:
    return re.sub(r"(?<! ) (?! )", "  ", text)


def _rename(text: str, names: Mapping[str, str]) -> str:
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in names)
    return re.sub(pattern, lambda match: names[match.group()], text)


def _text_variants(prompt: RenderedPrompt) -> list[Variant]:
    texts = [part.text for part in prefix_parts(prompt) if part.kind == "template"]
    names = {old: new for old, new in ROLE_NAMES.items() if any(_rename(text, {old: new}) != text for text in texts)}
    renamed: dict[str, Mapping[str, str]] = {f"{old} -> {new}": {old: new} for old, new in names.items()}
    if len(names) > 1:
        renamed["all role names"] = names
    edits: list[tuple[str, str, Edit]] = [
        ("upper case", "case", partial(_map_text, change=str.upper)),
        ("lower case", "case", partial(_map_text, change=str.lower)),
        ("title case", "case", partial(_map_text, change=_title)),
        ("double spaces", "spacing", partial(_map_text, change=_double_spaces)),
        ("no newline after headers", "spacing", partial(_after_headers, change=lambda text: text.rstrip("\n"))),
        ("extra newline after headers", "spacing", partial(_after_headers, change=lambda text: text + "\n")),
        *(
            (name, "role names", partial(_map_template, change=partial(_rename, names=pairs)))
            for name, pairs in renamed.items()
        ),
    ]
    found = [
        Variant(name, family, partial(edit_prefix, edit=edit, note=f"template variant: {name}"))
        for name, family, edit in edits
    ]
    if not names:
        reason = f"the prefix names none of the roles {', '.join(ROLE_NAMES)}"
        found.append(Variant("role names", "role names", _unchanged, reason))
    return found


# --- settings ----------------------------------------------------------------------------------------


def _unchanged(prompt: RenderedPrompt) -> RenderedPrompt:
    return prompt


def _rendered(prompt: RenderedPrompt, chat: ChatFormat) -> RenderedPrompt:
    return chat.render(prompt.query)


def _settings_variants(chat: ChatFormat, systems: Mapping[str, str], date: str) -> list[Variant]:
    own = (chat.default_system if chat.system == DEFAULT else chat.system) or ""
    dated = f"{own}\n\nToday's date is {date}." if own else f"Today's date is {date}."
    asked: list[tuple[str, str, Mapping[str, object]]] = [
        *((f"system: {name}", "system prompt", {"system": text}) for name, text in systems.items()),
        ("no system prompt", "system prompt", {"system": None}),
        ("empty system prompt", "system prompt", {"system": ""}),
        ("date in the system prompt", "date", {"system": dated}),
        ("the template's own date", "date", {"date": date}),
        ("thinking on", "thinking", {"thinking": True}),
        ("thinking off", "thinking", {"thinking": False}),
    ]
    variants = []
    for name, family, changes in asked:
        if "date" in changes and "strftime_now" not in str(chat.tokenizer.get_chat_template()):
            variants.append(Variant(name, family, _unchanged, "the template does not read the clock"))
            continue
        try:
            other = dataclasses.replace(chat, **changes)  # type: ignore[arg-type]
            variants.append(Variant(name, family, partial(_rendered, chat=other)))
        except LensError as error:
            variants.append(Variant(name, family, _unchanged, str(error)))
    return variants


# --- the suite ---------------------------------------------------------------------------------------


def stress_variants(
    chat: ChatFormat, *, systems: Sequence[str] | Mapping[str, str] = (), date: str = DATE
) -> list[Variant]:
    """The template stress suite: variants of the prefix that leave the query alone.

    Families: case (upper, lower and title case of all plain text of the prefix), spacing (double spaces; no
    newline, or one more, right before the system text and the query), system prompt (neutral ones, `systems`,
    none, an empty one), role names (`ROLE_NAMES`, each that the prefix has, and all), date (a line in the
    system prompt; the template's own date where it reads the clock), thinking (on, off).

    Args:
        chat: the unmodified template and its settings.
        systems: further system texts; a mapping names them.
        date: ISO day.

    Returns:
        All variants, in this order. Those which the template refuses, which change the query's tokens, or
        which have the tokens of the unmodified template or of an earlier variant say so in `skipped`.

    Raises:
        LensError: a system text that is empty, or a name given twice.
    """
    named = dict(systems) if isinstance(systems, Mapping) else {text[:40]: text for text in systems}
    if isinstance(systems, str) or len(named) < len(systems) or not all(text.strip() for text in named.values()):
        raise LensError("systems: expected different system texts, none of them blank; a mapping names them")
    if clash := sorted(set(named) & set(NEUTRAL_SYSTEMS)):
        raise LensError(f"systems: the names {clash} are taken by the built-in ones; choose others")
    probes = [chat.render(query) for query in _PROBES]
    suite = [*_text_variants(probes[0]), *_settings_variants(chat, {**NEUTRAL_SYSTEMS, **named}, date)]
    seen = {tuple(prompt.ids for prompt in probes): "the unmodified template"}
    checked = []
    for variant in sorted(suite, key=lambda variant: _FAMILIES.index(variant.family)):
        reason, ids = variant.skipped, None
        if not reason:
            try:
                ids = tuple(variant(prompt).ids for prompt in probes)
                reason = f"has the same tokens as {seen[ids]}" if ids in seen else ""
            except LensError as error:
                reason = str(error)
        if ids is not None and not reason:
            seen[ids] = repr(variant.name)
        checked.append(dataclasses.replace(variant, skipped=reason))
    return checked
