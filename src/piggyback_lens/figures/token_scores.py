"""Tokens coloured by a signed number each: HTML for notebooks, plain text for terminals."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import SupportsFloat

from torch import Tensor

from piggyback_lens.conversations.prompt import RenderedPrompt
from piggyback_lens.conversations.token_view import visible
from piggyback_lens.conversations.tokens import Span
from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import MISSING
from piggyback_lens.figures.plots import DIVERGING

MAIN = ("prefix", "query", "postfix", "response")  # the spans that tile a prompt
DARK, LIGHT = "#000000", "#FFFFFF"  # one of the two has a contrast above 4.5 to any colour
BAR = 12  # characters of the longest bar in plain text


@dataclass(frozen=True)
class TokenScores:
    """A number for each token of a prompt. `print` it, or let a notebook display it.

    Colours are orange below zero, white at zero, blue above, symmetric around zero; grey is not scored
    (NaN). White space is written as · ⏎ ⇥; ⋯ is a token that continues the character before it.

    Attributes:
        pieces: the text of each token.
        scores: a number for each token, in ``unit``; NaN = not scored.
        spans: the prompt's spans; the borders of prefix, query, postfix and response are marked.
        title: what the numbers are.
        unit: their unit.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    spans: Mapping[str, Span]
    title: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.pieces):
            raise LensError(f"{len(self.scores)} scores for {len(self.pieces)} tokens; pass one for each, NaN for none")
        for position, score in enumerate(self.scores):
            if math.isinf(score):
                raise LensError(f"the score of token {position} is infinite; pass NaN for a token without one")

    @classmethod
    def of(
        cls,
        prompt: RenderedPrompt,
        scores: Iterable[SupportsFloat] | Tensor,
        *,
        span: str | None = None,
        title: str = "",
        unit: str = "",
    ) -> "TokenScores":
        """The scores of the tokens of a rendered prompt.

        Args:
            prompt: its tokens (``ids``) are scored, a response among them.
            scores: one for each token of the prompt, or of ``span``; a sequence, array or tensor of one axis.
            span: the span that the scores are of; the other tokens are not scored.
            title: what the numbers are.
            unit: their unit.

        Raises:
            LensError: there are more or fewer scores than tokens, the prompt has no such span, or a score is no
                number or infinite.
        """
        try:
            given = [float(score) for score in scores]
        except (TypeError, ValueError, RuntimeError) as error:
            shape = f" of shape {tuple(scores.shape)}" if hasattr(scores, "shape") else ""
            raise LensError(
                f"scores are one number for each token, got a {type(scores).__name__}{shape}; pass one axis of numbers"
            ) from error
        where = prompt.span(span) if span is not None else Span("prompt", 0, len(prompt))
        if len(given) != len(where):
            raise LensError(
                f"{len(given)} scores for the {len(where)} tokens of the {where.name}; pass one for each token"
                + ("" if span is not None else ", or name the span that they are of")
            )
        values = [math.nan] * len(prompt)
        values[where.start : where.stop] = given
        return cls(prompt.pieces, tuple(values), prompt.spans, title, unit)

    @property
    def limit(self) -> float:
        """The largest |score|, where the colours end; 1 if there is none above zero."""
        return max((abs(score) for score in self.scores if not math.isnan(score)), default=0.0) or 1.0

    def __str__(self) -> str:
        lines = [line for line in (self._heading(),) if line]
        starts = self._starts()
        for position, (piece, score) in enumerate(zip(self.pieces, self.scores, strict=True)):
            lines += [f"{span.name} {span.start}:{span.stop}" for span in starts.get(position, ())]
            length = 0 if math.isnan(score) else round(abs(score) / self.limit * BAR)
            bar = ("+" if score > 0 else "-") * length
            lines.append(f"{position:>5} {number(score):>9} {bar:<{BAR}} {visible(piece)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        starts = self._starts()
        tokens = "".join(
            "".join(_border_html(span) for span in starts.get(position, ())) + self._token_html(position)
            for position in range(len(self.pieces))
        )
        heading = f"<div><b>{html.escape(self._heading())}</b></div>" if self._heading() else ""
        return (
            f'<div class="piggyback-scores" style="font-family:monospace;font-size:14px;line-height:2">{heading}'
            f'<div style="margin-bottom:.4em">{self._scale_html()}</div>'
            f'<div style="white-space:pre-wrap">{tokens}</div></div>'
        )

    def _heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.title and self.unit else self.title or self.unit

    def _starts(self) -> dict[int, list[Span]]:
        """The main spans that begin at each position."""
        starts: dict[int, list[Span]] = {}
        for name in MAIN:
            if name in self.spans and len(self.spans[name]):
                starts.setdefault(self.spans[name].start, []).append(self.spans[name])
        return starts

    def _scale_html(self) -> str:
        steps = [self.limit * share for share in (-1, -0.5, 0, 0.5, 1)]
        boxes = "".join(_box(number(step), step, self.limit) for step in steps)
        missing = _box("not scored", math.nan, self.limit) if any(map(math.isnan, self.scores)) else ""
        return f"{boxes} {html.escape(self.unit)} {missing}"

    def _token_html(self, position: int) -> str:
        piece, score = self.pieces[position], self.scores[position]
        home = next((name for name in MAIN if name in self.spans and position in self.spans[name].positions), "")
        unit = f" {self.unit}" if self.unit and not math.isnan(score) else ""
        tip = f"{position}: {visible(piece)} {number(score)}{unit}" + (f", {home}" if home else "")
        return _box(visible(piece), score, self.limit, tip) + ("<br>" if "\n" in piece else "")


def number(score: float) -> str:
    """The score with its sign and three digits; "not scored" for NaN."""
    if math.isnan(score):
        return "not scored"
    return f"{score:+.3g}" if score else "0"


def _box(text: str, score: float, limit: float, tip: str = "") -> str:
    ground = background(score, limit)
    title = f'title="{html.escape(tip, quote=True)}" ' if tip else ""
    return (
        f'<span {title}style="background:{ground};color:{text_colour(ground)};padding:.1em .15em;'
        f'border-radius:3px;margin-right:1px">{html.escape(text)}</span>'
    )


def _border_html(span: Span) -> str:
    # The border takes the notebook's own text colour, light or dark.
    return (
        '<span style="border-left:3px solid currentColor;padding:0 .3em;margin-left:.3em;font-size:13px">'
        f"<i>{html.escape(span.name)}</i></span>"
    )


# --- colours -----------------------------------------------------------------------------------------


def background(score: float, limit: float) -> str:
    """The colour of a score on the diverging scale from −limit to limit; grey for NaN."""
    if math.isnan(score):
        return MISSING
    place = min(max(0.5 + score / (2 * limit), 0.0), 1.0)
    stops = [(at, _channels(colour)) for at, colour in DIVERGING]
    (low, below), (high, above) = next(pair for pair in pairwise(stops) if place <= pair[1][0])
    share = (place - low) / (high - low)
    mixed = (round(a + share * (b - a)) for a, b in zip(below, above, strict=True))
    return "#" + "".join(f"{channel:02X}" for channel in mixed)


def text_colour(ground: str) -> str:
    """Black or white, whichever reads better on ``ground``."""
    return max((DARK, LIGHT), key=lambda ink: luminance_contrast(ink, ground))


def luminance_contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, 1..21 (WCAG 2, section 1.4.3: text takes at least 4.5)."""
    darker, lighter = sorted((_luminance(a), _luminance(b)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    shares = [channel / 255 for channel in _channels(colour)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> Sequence[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
