"""Tokens of a prompt, coloured by span: HTML for notebooks, plain text for terminals."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from piggyback_lens.conversations.tokens import Span
from piggyback_lens.errors import LensError

# Tints of the Okabe-Ito palette, which colour-blind readers can tell apart; text on them is near-black.
COLOURS = {"prefix": "#a9d7f2", "query": "#f6cf7a", "postfix": "#7fd1b6", "response": "#e5b3cf"}
_MAIN = tuple(COLOURS)
_VISIBLE = str.maketrans({" ": "·", "\t": "⇥", "\r": "␍", "\n": "⏎", "\u00a0": "⍽"})
_CONTINUED = "⋯"


@dataclass(frozen=True)
class TokenView:
    """What `RenderedPrompt.show` returns. `print` it, or let a notebook display it.

    White space is written as · ⏎ ⇥; ⋯ is a token that continues the character before it (emoji).
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    raw: tuple[str, ...]
    spans: Mapping[str, Span]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        spans = {name: (span.start, span.stop) for name, span in self.spans.items()}
        return {"ids": self.ids, "pieces": self.pieces, "raw": self.raw, "spans": spans, "notes": self.notes}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "TokenView":
        """What `to_dict` gave.

        Raises:
            LensError: anything else.
        """
        try:
            spans = {str(name): Span(str(name), *map(int, ends)) for name, ends in facts["spans"].items()}
            ids, pieces, raw, notes = (tuple(facts[name]) for name in ("ids", "pieces", "raw", "notes"))
            view = cls(tuple(map(int, ids)), tuple(map(str, pieces)), tuple(map(str, raw)), spans, tuple(notes))
            view._repr_html_()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
            raise LensError(f"a prompt cannot be shown ({error!r}): its file is damaged, run it again") from error
        return view

    def _home(self, position: int) -> tuple[str, list[str]]:
        inside = [name for name, span in self.spans.items() if position in span.positions]
        main = next(name for name in inside if name in _MAIN)
        return main, [name for name in inside if name != main]

    def __str__(self) -> str:
        lines = []
        for name in (*(m for m in _MAIN if m in self.spans), *(s for s in self.spans if s not in _MAIN)):
            span = self.spans[name]
            shown = "|".join(visible(self.pieces[i]) for i in span.positions)
            lines.append(f"{name:<9}{span.start:>5}:{span.stop:<5}{shown}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tokens = "".join(self._token_html(i) for i in range(len(self.ids)))
        legend = " ".join(
            f'<span style="background:{COLOURS[name]};color:#111;padding:0 .4em;border-radius:3px">'
            f"{name} {span.start}:{span.stop}</span>"
            for name, span in self.spans.items()
            if name in COLOURS
        )
        subs = ", ".join(
            f"{html.escape(name)} {span.start}:{span.stop}" for name, span in self.spans.items() if name not in COLOURS
        )
        legend += f" <span>underlined: {subs}</span>" if subs else ""
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            '<div class="piggyback-tokens" style="font-family:monospace;line-height:1.9">'
            f'<div style="margin-bottom:.4em">{legend}</div><div style="white-space:pre-wrap">{tokens}</div>'
            + (f"<ul>{notes}</ul>" if notes else "")
            + "</div>"
        )

    def _token_html(self, position: int) -> str:
        main, subs = self._home(position)
        title = f"{position}: id {self.ids[position]} {self.raw[position]!r}, {' / '.join([main, *subs])}"
        underline = "border-bottom:2px solid #111;" if subs else ""
        piece = self.pieces[position]
        return (
            f'<span title="{html.escape(title, quote=True)}" style="background:{COLOURS[main]};color:#111;'
            f'{underline}border-radius:3px;margin-right:1px">{html.escape(visible(piece))}</span>'
            + ("<br>" if "\n" in piece else "")
        )


def visible(piece: str) -> str:
    """A token's text with spaces, line ends and control characters as signs."""
    if not piece:
        return _CONTINUED
    shown = piece.translate(_VISIBLE)
    # Control and direction characters would hide, or turn the view around.
    return "".join(c if c.isprintable() else f"⟨{ord(c):04X}⟩" for c in shown)
