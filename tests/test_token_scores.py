"""Token scores: a colour, a tooltip and a line for each token, with every text of the model escaped."""

import html
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chat import tiny_format

from piggyback_lens.conversations.tokens import Span
from piggyback_lens.errors import LensError
from piggyback_lens.figures.token_scores import TokenScores, background, text_colour

PIECES = ("<script>", " a", "\n", "$x$", '"', "")
SPANS = {"prefix": Span("prefix", 0, 2), "query": Span("query", 2, 4), "postfix": Span("postfix", 4, 6)}
SCORES = (1.0, -2.0, 0.0, math.nan, 0.5, -0.25)
fixed = settings(deadline=None, derandomize=True, max_examples=100, database=None)


@pytest.fixture
def view() -> TokenScores:
    return TokenScores(PIECES, SCORES, SPANS, title="effect on <b>", unit="nats & more")


def boxes(page: str) -> list[tuple[str, str, str, str]]:
    """Tooltip, background, text colour and text of every token, unescaped."""
    pattern = r'<span title="([^"]*)" style="background:(#\w{6});color:(#\w{6});[^"]*">([^<]*)</span>'
    return [
        (html.unescape(tip), ground, ink, html.unescape(text)) for tip, ground, ink, text in re.findall(pattern, page)
    ]


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance, written from the standard."""
    total = 0.0
    for weight, start in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
        c = int(colour[start : start + 2], 16) / 255
        total += weight * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
    return total


def test_each_token_has_its_text_its_number_and_the_colour_of_its_sign(view):
    shown = boxes(view._repr_html_())
    assert [text for *_, text in shown] == ["<script>", "·a", "⏎", "$x$", '"', "⋯"]
    assert [tip for tip, *_ in shown] == [
        "0: <script> +1 nats & more, prefix",
        "1: ·a -2 nats & more, prefix",
        "2: ⏎ 0 nats & more, query",
        "3: $x$ not scored, query",
        '4: " +0.5 nats & more, postfix',
        "5: ⋯ -0.25 nats & more, postfix",
    ]
    grounds = [ground for _, ground, *_ in shown]
    assert grounds[0] == "#4393C3"  # half of the largest score: halfway to the end of the scale
    assert grounds[1] == "#7F3B08"
    assert grounds[2] == "#FFFFFF"
    assert grounds[3] == "#BDBDBD"


def test_nothing_of_the_model_or_the_title_becomes_markup(view):
    page = view._repr_html_()
    assert "<script" not in page
    assert "effect on &lt;b&gt; (nats &amp; more)" in page
    tags = set(re.findall(r"</?(\w+)", page))
    assert tags == {"div", "span", "b", "i", "br"}


@fixed
@given(st.text(max_size=12))
def test_any_piece_leaves_the_page_with_the_same_tags(piece):
    page = TokenScores((piece,), (1.0,), {}, title=piece, unit=piece)._repr_html_()
    assert set(re.findall(r"<(/?\w*)", page)) <= {"div", "/div", "span", "/span", "b", "/b", "br"}
    assert len(boxes(page)) == 1


def test_spans_have_a_border_where_they_begin(view):
    page = view._repr_html_()
    places = [page.index(f"<i>{name}</i>") for name in SPANS]
    tokens = [match.start() for match in re.finditer("<span title", page)]
    assert [sum(token < place for token in tokens) for place in places] == [0, 2, 4]
    assert page.count("border-left") == 3


def test_the_scale_names_both_ends_and_grey_only_where_a_token_was_not_scored(view):
    page = view._repr_html_()
    assert ">-2</span>" in page
    assert ">+2</span>" in page
    assert ">not scored</span>" in page
    assert "not scored" not in TokenScores(("a",), (0.0,), {})._repr_html_()


def test_the_plain_text_has_a_line_for_each_token_below_its_span(view):
    lines = str(view).splitlines()
    assert lines[0] == "effect on <b> (nats & more)"
    assert [line for line in lines if not line.startswith(" ")][1:] == ["prefix 0:2", "query 2:4", "postfix 4:6"]
    assert lines[2].split() == ["0", "+1", "+" * 6, "<script>"]
    assert lines[3].split() == ["1", "-2", "-" * 12, "·a"]
    assert lines[6].split() == ["3", "not", "scored", "$x$"]
    assert len(lines) == 1 + 3 + 6


@fixed
@given(st.floats(-1, 1))
def test_text_is_legible_on_every_colour(score):
    ground = background(score, 1.0)
    pair = sorted((luminance(ground), luminance(text_colour(ground))))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5
    assert text_colour("#FFFFFF") == "#000000"
    assert text_colour("#053061") == "#FFFFFF"


def test_scores_of_zero_or_none_have_a_scale():
    assert boxes(TokenScores(("a", "b"), (0.0, math.nan), {})._repr_html_())[0][1] == "#FFFFFF"
    assert "not scored" in str(TokenScores(("a",), (math.nan,), {}))


def test_scores_of_a_prompt_and_of_one_span_stand_at_their_tokens():
    prompt = tiny_format().render("hello")
    whole = TokenScores.of(prompt, torch.arange(len(prompt)), title="t", unit="nats")
    assert whole.scores == tuple(float(i) for i in range(len(prompt)))
    assert whole.pieces == prompt.pieces
    query = prompt.span("query")
    part = TokenScores.of(prompt, [1, 2, 3, 4, 5], span="query")
    assert part.scores[query.start : query.stop] == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert all(math.isnan(score) for i, score in enumerate(part.scores) if i not in query.positions)
    assert "query" in part._repr_html_()


def test_scores_that_do_not_fit_are_refused():
    prompt = tiny_format().render("hello")
    with pytest.raises(LensError, match=rf"3 scores for the {len(prompt)} tokens of the prompt; .* or name the span"):
        TokenScores.of(prompt, [1.0, 2.0, 3.0])
    with pytest.raises(LensError, match="3 scores for the 5 tokens of the query; pass one for each token"):
        TokenScores.of(prompt, [1.0, 2.0, 3.0], span="query")
    with pytest.raises(LensError, match="span 'think'"):
        TokenScores.of(prompt, [1.0], span="think")
    with pytest.raises(LensError, match=r"a Tensor of shape \(21, 4\); pass one axis"):
        TokenScores.of(prompt, torch.zeros(len(prompt), 4))
    with pytest.raises(LensError, match="1 scores for 2 tokens"):
        TokenScores(("a", "b"), (1.0,), {})
    with pytest.raises(LensError, match="token 1 is infinite"):
        TokenScores(("a", "b"), (1.0, math.inf), {})
