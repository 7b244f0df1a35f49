"""What rendered prompts are used for: responses, padded batches, template comparison, the token view."""

import html
import re
from html.parser import HTMLParser

import pytest
import torch
from chat_templates import make_tokenizer, make_word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import FAMILIES, KINDS, QUERIES, assistant, chat_format, user

from piggyback_lens.conversations.chat import ChatFormat, Span, batch_prompts, compare_templates
from piggyback_lens.conversations.token_view import TokenView
from piggyback_lens.errors import LensError

# Responses

OPENINGS = {"harmony": "<|channel|>final<|message|>", "mistral": " ", "qwen3": "<think>\n\n</think>\n\n"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@given(query=QUERIES, response=QUERIES)
@settings(max_examples=20)
def test_a_response_never_changes_the_prompt(family: str, kind: str, query: str, response: str) -> None:
    fmt = chat_format(family, kind)
    prompt, full = fmt.render(query), fmt.render(query, response=response)
    n = len(prompt.ids)
    assert full.ids[:n] == prompt.ids
    assert full.n_prompt == n
    assert (full.spans["response"].start, full.spans["response"].stop) == (n, len(full.ids))
    assert full.ids[-1] in fmt.stop_ids
    assert "".join(response.split()) in "".join(full.span_text("response").split())
    if family not in ("gemma", "harmony", "llama3", "mistral", "qwen3"):  # they trim, or open the turn themselves
        assert full.text.startswith(prompt.text + response)
    assert "".join(full.pieces) == full.text
    assert len(full.pieces) == len(full.ids)


def test_a_response_is_tokenised_where_it_stands_and_ended_by_the_template() -> None:
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>"}
    ends |= {"alpaca": "</s>", "gemma": "<end_of_turn>", "mistral": "</s>", "harmony": "<|return|>"}
    for family, end in ends.items():
        fmt = chat_format(family, "pieces")  # "bytes" splits the line ends before a word
        assert fmt.tokenizer.decode(fmt.turn_end_ids) == end
        prompt = fmt.render("hi", response="Yes, it is.")
        text = fmt.render("hi").text + OPENINGS.get(family, "") + "Yes, it is." + end
        whole = fmt.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompt.ids == tuple(whole)
        open_ended = fmt.render("hi", response="Yes, it is.", end=False)
        assert open_ended.ids == prompt.ids[: -len(fmt.turn_end_ids)]
    assert set(chat_format("gemma").stop_ids) == set(
        chat_format("gemma").tokenizer.convert_tokens_to_ids(["<end_of_turn>", "</s>"])
    )


def test_pieces_tokenizers_do_not_put_a_space_before_a_response() -> None:
    prompt = chat_format("chatml", "pieces").render("hi", response="Paris is")
    assert prompt.span_text("response") == "Paris is<|im_end|>"
    newline, paris = prompt.ids[prompt.n_prompt - 1], prompt.ids[prompt.n_prompt]
    tokens = prompt.tokenizer.convert_ids_to_tokens([newline, paris])
    assert not tokens[1].startswith("▁")


def test_a_response_that_would_merge_with_the_prompt_is_tokenised_alone_and_reported() -> None:
    tokenizer = make_tokenizer("chatml", template="{% for m in messages %}{{ m.content }} A: The ans{% endfor %}")
    tokenizer.eos_token = "<|im_end|>"
    fmt = ChatFormat(tokenizer)
    prompt = fmt.render("hi").with_response("wers it", end=False)
    assert prompt.ids[: prompt.n_prompt] == fmt.render("hi").ids
    assert prompt.text.endswith("The answers it")
    assert any("would merge with the prompt" in note for note in prompt.notes)


def test_a_prompt_end_that_would_swallow_the_responses_line_ends_is_reported() -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("chatml", template="{% for m in messages %}{{ m.content }}<|a|>{% endfor %}")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|a|>", rstrip=True, special=True)]})
    prompt = ChatFormat(tokenizer).render("hi").with_response("\n\nyes", end=False)
    assert tokenizer.decode(prompt.ids[prompt.n_prompt :]) == "\n\nyes"
    assert any("would share a token with the prompt" in note for note in prompt.notes)


def test_response_ids_are_taken_as_they_are_and_end_once() -> None:
    fmt = chat_format("chatml")
    ids = tuple(fmt.tokenizer("Sure 😀 thing", add_special_tokens=False)["input_ids"])
    prompt = fmt.render("hi", response=list(ids))
    assert prompt.ids[prompt.n_prompt :] == ids + fmt.turn_end_ids
    assert prompt.span_text("response") == "Sure 😀 thing<|im_end|>"
    assert fmt.render("hi", response=[*ids, *fmt.turn_end_ids]).ids == prompt.ids
    half = next(i for i in ids if fmt.tokenizer.decode([i]) == "\ufffd")
    assert fmt.render("hi", response=[half, half, half], end=False).span_text("response") == "\ufffd" * 3


def test_response_ids_of_a_pieces_tokenizer_keep_their_spaces() -> None:
    fmt = chat_format("chatml", "pieces")
    ids = fmt.tokenizer("Paris is the capital", add_special_tokens=False)["input_ids"]
    assert fmt.render("hi", response=ids, end=False).span_text("response") == " Paris is the capital"


def test_an_assistant_message_at_the_end_is_the_response() -> None:
    fmt = chat_format("chatml")
    assert fmt.render([user("hi"), assistant("Yes.")]).ids == fmt.render("hi", response="Yes.").ids
    with pytest.raises(LensError, match="pass one of them"):
        fmt.render([user("hi"), assistant("Yes.")], response="No.")
    with pytest.raises(LensError, match="has a response already"):
        fmt.render("hi", response="Yes.").with_response("No.")
    with pytest.raises(LensError, match="response is empty"):
        fmt.render("hi").with_response("", end=False)


# Batches


@pytest.mark.parametrize("side", ["left", "right"])
@given(queries=st.lists(QUERIES, min_size=1, max_size=5))
@settings(max_examples=20)
def test_batches_hold_each_prompt_at_its_positions(side: str, queries: list[str]) -> None:
    prompts = [chat_format("chatml").render(query, response="ok" * len(query)) for query in queries]
    batch = batch_prompts(prompts, side=side, pad_id=99)
    width = max(len(p.ids) for p in prompts)
    for row, prompt in enumerate(prompts):
        n = len(prompt.ids)
        pads = [99] * (width - n)
        real, zeros = [1] * n, [0] * (width - n)
        minus = [-1] * (width - n)
        expected = {
            "ids": (list(prompt.ids), pads),
            "attention_mask": (real, zeros),
            "position_ids": (list(range(n)), zeros),
            "positions": (list(range(n)), minus),
        }
        for name, (tokens, padding) in expected.items():
            line = padding + tokens if side == "left" else tokens + padding
            assert getattr(batch, name)[row].tolist() == line
        for name in ("prefix", "response"):
            chosen = batch.ids[row][batch.span_mask(name)[row]].tolist()
            assert tuple(chosen) == prompt.ids[prompt.span(name).start : prompt.span(name).stop]
    assert len(batch) == len(prompts)


def test_batches_of_nothing_or_on_no_side_are_refused() -> None:
    with pytest.raises(LensError, match="no prompts to batch"):
        batch_prompts([])
    prompt = chat_format("chatml").render("hi")
    assert batch_prompts([prompt], device="cpu").ids.device == torch.device("cpu")
    with pytest.raises(LensError, match="span 'response' does not exist"):
        batch_prompts([prompt]).span_mask("response")


# Comparison


def test_equal_templates_compare_equal() -> None:
    diff = compare_templates(chat_format("chatml"), ChatFormat(make_tokenizer("chatml")))
    assert diff.same
    assert str(diff).startswith("the templates agree")
    assert diff.to_frame()["same"].all()


def test_the_first_difference_and_the_default_systems_are_named() -> None:
    diff = compare_templates(chat_format("chatml"), chat_format("qwen3"))
    index, a, b = diff.prefix
    assert not diff.same
    assert (index, a) == (1, "system")
    assert b in ("user", "us")
    assert diff.postfix is None
    assert diff.default_systems == ("You are a helpful assistant named Pig.", None)
    assert "prefix: first difference at token 1: 'system' | 'us" in str(diff)
    frame = diff.to_frame().set_index("part")
    assert frame.loc["prefix", "first_difference"] == 1
    assert not frame.loc["default_system", "same"]
    thought = compare_templates(chat_format("qwen3"), chat_format("qwen3", thinking=False))
    at, a, b = thought.postfix
    assert (at, a, b) == (len(chat_format("qwen3").postfix_ids), "", "<think>")


def test_equal_ids_with_other_texts_are_a_difference() -> None:
    a, b = ChatFormat(make_word_tokenizer("<u>")), ChatFormat(make_word_tokenizer("<v>"))
    assert a.prefix_ids == b.prefix_ids
    diff = compare_templates(a, b)
    assert not diff.same
    assert diff.prefix == (0, "<u>", "<v>")


# View


class Spans(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title" and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_shown_is_escaped() -> None:
    query = "<script>alert('x')</script> & \"q\" <|im_end|><b>"
    view = chat_format("chatml").render(query, response="<img src=x onerror=y>").show()
    page = view._repr_html_()
    parsed = Spans()
    parsed.feed(page)
    assert set(parsed.tags) == {"div", "span", "br", "ul", "li"}
    assert "<script" not in page
    assert "<script>alert('x')</script>·&·\"q\"·<|im_end|><b>" in parsed.text
    assert len(parsed.titles) == len(view.ids)


def test_a_whole_tag_in_one_token_a_title_or_a_note_is_escaped() -> None:
    spans = {"query": Span("query", 0, 1)}
    view = TokenView((1,), ("<script>x</script>",), ('"><img>',), spans, ("<i>note</i>",))
    parsed = Spans()
    parsed.feed(view._repr_html_())
    assert set(parsed.tags) == {"div", "span", "ul", "li"}
    assert "<script>x</script>" in parsed.text
    assert parsed.titles == ["""0: id 1 '"><img>', query"""]


def test_the_view_names_spans_colours_and_white_space() -> None:
    prompt = chat_format("qwen3", thinking=False).render(" a\tb\n😀\u202e", response="ok")
    page = html.unescape(prompt.show()._repr_html_())
    for name in ("prefix", "query", "postfix", "response"):
        assert f">{name} {prompt.span(name).start}:{prompt.span(name).stop}<" in page
    assert "underlined: think" in page
    assert len(set(re.findall("background:(#[0-9a-f]{6})", page))) == 4
    shown = str(prompt.show())
    assert "·" in shown
    assert "⇥" in shown
    assert "⏎" in shown
    assert "😀|⋯" in shown
    assert "⟨202E⟩" in shown
    assert "\u202e" not in page


def test_the_plain_view_lists_spans_and_notes() -> None:
    shown = str(chat_format("gemma").render(" hi ").show())
    lines = dict(line.split(None, 1) for line in shown.splitlines() if not line.startswith("note"))
    assert list(lines) == ["prefix", "query", "postfix", "bos"]
    assert "note: the template trims the query: ' hi ' became 'hi'" in shown
