"""Spans of rendered prompts: properties over random queries, and one test per trap of chat templates."""

import inspect
import re
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import pytest
from chat_templates import DATE, LLAMA3, TEMPLATES, make_tokenizer, make_word_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from piggyback_lens.conversations.chat import ChatFormat, RenderedPrompt
from piggyback_lens.conversations.template import read_conversation
from piggyback_lens.errors import LensError

FAMILIES = sorted(TEMPLATES)
KINDS = ("bytes", "pieces", "unknowns")
TRIMS = ("llama3", "gemma")
DATED = ("llama3", "harmony")
BORDER_NOTES = re.compile("straddles|span holds|swallows|drops")

WORDS = "Hello why is 7 😀 é 你好 [INST] [/INST] <|im_end|> <|im_start|> </s> <s> <|eot_id|> <|end|> . ("
MORE_WORDS = "assistant <think> </think> Qzxlens {{x}} {%if%} ▁ Ġ <0x0A> e\u0301 👩\u200d👧 \u202e \x00"
SPACES = (" ", "  ", "\n", "\n\n", "\t", "\r\n", "user\n")
FRAGMENTS = st.sampled_from((*WORDS.split(" "), *MORE_WORDS.split(" "), *SPACES))
QUERIES = st.lists(FRAGMENTS | st.text(st.characters(codec="utf-8"), max_size=6), max_size=6).map("".join)


@cache
def chat_format(family: str, kind: str = "bytes", **options: object) -> ChatFormat:
    options = ({"date": DATE} if family in DATED else {}) | options
    return ChatFormat(make_tokenizer(family, kind), **options)


def plain_rendering(fmt: ChatFormat, messages: list[dict[str, str]]) -> str:
    """The rendering by transformers alone, with the date put in by text replacement."""
    text = fmt.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for day in (date.today(), date.today() - timedelta(days=1)):  # midnight may pass in between
        text = text.replace(f"Today Date: {day:%d %b %Y}", "Today Date: 26 Jul 2024")
        text = text.replace(f"Today Date: {day:%Y-%m-%d}", "Today Date: 2024-07-26")
    return text


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def check_spans(prompt: RenderedPrompt, prefix_ids: tuple[int, ...], postfix_ids: tuple[int, ...]) -> None:
    prefix, query, postfix = (prompt.spans[name] for name in ("prefix", "query", "postfix"))
    assert (prefix.start, prefix.stop, query.stop) == (0, query.start, postfix.start)
    assert postfix.stop == len(prompt.ids) == prompt.n_prompt
    assert "".join(prompt.span_text(name) for name in ("prefix", "query", "postfix")) == prompt.text
    notes = "\n".join(prompt.notes)
    head, tail = prompt.ids[: prefix.stop], prompt.ids[postfix.start :]
    assert head == prefix_ids or (head == prefix_ids[: len(head)] and "the prefix is" in notes)
    assert tail == postfix_ids or (tail == postfix_ids[len(postfix_ids) - len(tail) :] and "the postfix is" in notes)
    assert prompt.query in prompt.span_text("query") or "swallows" in notes or "drops" in notes
    if not BORDER_NOTES.search(notes):
        assert prompt.span_text("query") == prompt.query
    for name, span in prompt.spans.items():
        home = {"think": postfix, "bos": prefix, "system": prefix, "history": prefix}.get(name, span)
        assert home.start <= span.start < span.stop <= home.stop or name in ("prefix", "query", "postfix")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@given(query=QUERIES)
@example("")
@example(" ")
@example("\nhello")
@example("\n\n😀")
@example("Hello ")
@example("[/INST]")
@example("<|im_end|>\n<|im_start|>user\n")
@settings(max_examples=60)
def test_spans_tile_the_prompt_and_give_the_query_back(family: str, kind: str, query: str) -> None:
    fmt = chat_format(family, kind)
    prompt = fmt.render(query)
    assert prompt.text == plain_rendering(fmt, [user(query)])
    assert prompt.ids == tuple(fmt.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    assert prompt.query == (query.strip() if family in TRIMS else query)
    assert ("trims the query" in "".join(prompt.notes)) == (prompt.query != query)
    check_spans(prompt, fmt.prefix_ids, fmt.postfix_ids)
    span = prompt.spans["query"]
    if kind == "bytes":
        assert prompt.query in fmt.tokenizer.decode(prompt.ids[span.start : span.stop])
    elif kind == "pieces":
        text = fmt.tokenizer.decode(prompt.ids[: span.stop])  # it writes a space after a special token
        assert prompt.query in text or any("do not decode" in note for note in prompt.notes)


@pytest.mark.parametrize("family", FAMILIES)
@given(query=QUERIES, first=QUERIES, answer=QUERIES)
@settings(max_examples=25)
def test_history_belongs_to_the_prefix(family: str, query: str, first: str, answer: str) -> None:
    fmt = chat_format(family)
    messages = [user(first), assistant(answer), user(query)]
    prompt = fmt.render(messages)
    twin = fmt.render([*messages[:2], user("Zoo")])
    assert prompt.text == plain_rendering(fmt, messages)
    assert twin.ids[: twin.span("prefix").stop] != fmt.prefix_ids
    check_spans(prompt, twin.ids[: twin.span("prefix").stop], twin.ids[twin.span("postfix").start :])
    assert prompt.fingerprint == twin.fingerprint != fmt.fingerprint
    if "history" in prompt.spans:
        assert first.strip() in prompt.span_text("history")


@pytest.mark.parametrize("family", ["gemma", "mistral"])
@given(query=QUERIES)
@example("")
@example("\n")
@settings(max_examples=40)
def test_a_folded_system_text_is_prefix_not_query(family: str, query: str) -> None:
    fmt = chat_format(family, system="Be brief.", no_system_role="fold")
    prompt = fmt.render(query)
    assert prompt.text == plain_rendering(fmt, [user(f"Be brief.\n\n{query}")])
    check_spans(prompt, fmt.prefix_ids, fmt.postfix_ids)
    assert prompt.query == (query.rstrip() if family == "gemma" else query) or not query.strip()
    assert prompt.span_text("system").strip() == "Be brief."
    assert any("folded" in note for note in prompt.notes)


@pytest.mark.real
@given(query=QUERIES)
@example("  😀")
@settings(max_examples=150)
def test_spans_hold_on_the_real_tokenizer(real_model_dir: str, query: str) -> None:
    fmt = real_format(real_model_dir)
    prompt = fmt.render(query)
    assert prompt.text == plain_rendering(fmt, [user(query)])
    check_spans(prompt, fmt.prefix_ids, fmt.postfix_ids)
    span = prompt.spans["query"]
    text = fmt.tokenizer.decode(prompt.ids[span.start : span.stop])
    assert query in text or any("do not decode" in note for note in prompt.notes)


@cache
def real_format(folder: str) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(folder))


@pytest.mark.real
def test_the_real_template_gives_the_known_pieces(real_model_dir: str) -> None:
    fmt = real_format(real_model_dir)
    prompt = fmt.render("Hello", response="Hi.")
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt.span_text("prefix") == f"<|im_start|>system\n{default}<|im_end|>\n<|im_start|>user\n"
    assert prompt.span_text("postfix") == "<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.span_text("response") == "Hi.<|im_end|>"
    assert prompt.span_text("system") == default == fmt.default_system
    assert fmt.turn_end_ids == fmt.stop_ids == (fmt.tokenizer.eos_token_id,)


# Borders


@pytest.mark.real
def test_a_query_that_merges_with_the_header_shrinks_the_prefix_and_says_so(real_model_dir: str) -> None:
    fmt = real_format(real_model_dir)
    prompt = fmt.render("\n x")
    assert prompt.spans["prefix"].stop == len(fmt.prefix_ids) - 1
    assert "the prefix is 1 token(s) shorter than that of other queries" in prompt.notes
    assert any(r"straddles the border of prefix and query: '\n' | '\n'" in note for note in prompt.notes)
    assert prompt.span_text("query") == "\n\n x"


def test_a_space_of_the_header_that_merges_with_words_is_never_in_the_prefix() -> None:
    fmt = chat_format("mistral")
    assert fmt.tokenizer.decode(fmt.prefix_ids) == "<s>[INST]"
    prompt = fmt.render("the")
    assert prompt.span_text("query") == " the"
    assert any("straddles the border of prefix and query: ' ' | 'the'" in note for note in prompt.notes)
    spaced = fmt.render("\n")  # here the header's space is a token of its own
    assert spaced.ids[: spaced.spans["prefix"].stop] == fmt.prefix_ids
    assert any("the query span holds ' ' of the template" in note for note in spaced.notes)


def test_a_query_that_merges_with_the_postfix_shrinks_it_and_says_so() -> None:
    fmt = chat_format("alpaca")
    prompt = fmt.render("Hello\n")
    tail = prompt.ids[prompt.span("postfix").start :]
    assert 0 < len(tail) < len(fmt.postfix_ids)
    assert tail == fmt.postfix_ids[-len(tail) :]
    assert prompt.span_text("query").startswith("Hello\n\n")
    assert any("the postfix is" in note for note in prompt.notes)
    assert any("straddles the border of query and postfix: '\\n' | '\\n" in note for note in prompt.notes)


def test_a_sub_span_stays_inside_the_prefix_when_its_last_token_straddles_the_border() -> None:
    tokenizer = make_tokenizer("chatml", template="{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>")
    prompt = ChatFormat(tokenizer, system="The capital of Fr").render("ance")
    assert any("straddles the border of prefix and query: ' Fr' | 'ance'" in note for note in prompt.notes)
    assert prompt.span_text("system") == "The capital of"
    assert prompt.span("system").stop == prompt.span("prefix").stop


def test_words_that_are_all_unknown_do_not_make_the_query_part_of_the_prefix() -> None:
    fmt = ChatFormat(make_word_tokenizer())
    assert (fmt.prefix_ids, fmt.postfix_ids) == ((1,), (2,))
    assert fmt.render("some words").ids == (1, 0, 0, 2)


def test_emoji_that_share_byte_offsets_stay_in_one_span() -> None:
    fmt = chat_format("chatml")
    prompt = fmt.render("😀😀")
    assert len(prompt.span("query")) > 2
    assert prompt.span_text("query") == "😀😀"
    assert prompt.ids[: prompt.span("query").start] == fmt.prefix_ids


def test_template_markers_in_a_query_are_allowed_and_reported() -> None:
    query = "say <|im_end|> and [INST]"
    assert any("'<|im_end|>'" in note for note in chat_format("chatml").render(query).notes)
    assert any("'[INST]'" in note for note in chat_format("mistral").render(query).notes)
    assert not chat_format("chatml").render("say im_end").notes


def test_an_unknown_character_is_reported_as_lost() -> None:
    assert any("unknown token" in note for note in chat_format("chatml", "unknowns").render("a 😀").notes)
    assert not chat_format("chatml", "pieces").render("a 😀").notes


@pytest.mark.real
def test_a_character_without_any_token_is_reported_as_dropped(real_model_dir: str) -> None:
    prompt = real_format(real_model_dir).render("\x06")
    assert not len(prompt.spans["query"])
    assert any(r"no token for these characters and drops them: '\x06'" in note for note in prompt.notes)


def test_a_normalising_tokenizer_is_reported() -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    prompt = ChatFormat(tokenizer).render("HELLO")
    assert prompt.query == prompt.span_text("query") == "HELLO"
    assert any("normalisation" in note for note in prompt.notes)


@pytest.mark.parametrize("query", ["cafe\u0301", "e\u0301 a\u0323\u0302 x", "\u1100\u1161", "n\u0303\u0308", "\u0301x"])
def test_marks_that_a_tokenizer_composes_stay_in_the_query(query: str) -> None:
    import unicodedata

    from tokenizers import normalizers

    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    fmt = ChatFormat(tokenizer)
    for prompt in (fmt.render(query), fmt.render("hi", response=query)):
        span = prompt.spans["response" if "response" in prompt.spans else "query"]
        assert "".join(prompt.pieces[span.start : span.stop]).removesuffix("<|im_end|>") == query
        assert "".join(prompt.pieces) == prompt.text
        assert prompt.ids == tuple(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    composed = unicodedata.normalize("NFC", query)
    notes = fmt.render(query).notes
    assert any(f"normalisation or spaces): the model reads {composed!r}" in note for note in notes) == (
        query != composed
    )


def test_a_special_token_that_swallows_the_querys_newlines_is_reported() -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("chatml", template="{% for m in messages %}<|u|>\n{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|u|>", rstrip=True, special=True)]})
    fmt = ChatFormat(tokenizer)
    prompt = fmt.render("\n\nhi")
    assert prompt.ids[: prompt.span("prefix").stop] == fmt.prefix_ids
    assert any("swallows '\\n\\n'" in note for note in prompt.notes)


def test_an_empty_query_has_an_empty_query_span_and_the_same_borders() -> None:
    for family in ("chatml", "gemma", "harmony", "mistral", "qwen3"):
        fmt = chat_format(family)
        prompt = fmt.empty_query()
        assert prompt.query == ""
        assert prompt.ids[: prompt.spans["prefix"].stop] == fmt.prefix_ids
        assert prompt.ids[prompt.spans["postfix"].start :] == fmt.postfix_ids
    merged = chat_format("alpaca").empty_query()  # the line ends of header and postfix become one token
    assert any(r"border of prefix and postfix: '\n' | '\n" in note for note in merged.notes)
    with pytest.raises(LensError, match=r"span 'query' is empty .* it has: prefix, postfix"):
        chat_format("chatml").empty_query().span("query")
    with pytest.raises(LensError, match="span 'answer' does not exist"):
        chat_format("chatml").render("a").span("answer")


def test_a_template_that_rewrites_or_repeats_the_query_is_refused() -> None:
    upper = make_tokenizer("chatml", template="{% for m in messages %}U: {{ m.content | upper }}{% endfor %}")
    with pytest.raises(LensError, match="user's content 0 times"):
        ChatFormat(upper).render("hello")
    twice = make_tokenizer("chatml", template="{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}")
    with pytest.raises(LensError, match="user's content 2 times"):
        ChatFormat(twice).render("hello")
    chars = "{% for m in messages %}U: {{ m.content | replace('!', '?') }}{% endfor %}"
    with pytest.raises(LensError, match=r"rewrites the query 'hello!' as 'hello\?'"):
        ChatFormat(make_tokenizer("chatml", template=chars)).render("hello!")
    switch = "{% for m in messages %}{{ 'ON' if '/x' in m.content else 'OFF' }}: {{ m.content }}{% endfor %}"
    with pytest.raises(LensError, match=r"other text around the query 'a /x': at character 1 it has 'N: a"):
        ChatFormat(make_tokenizer("chatml", template=switch)).render("a /x")
    length = "{% for m in messages %}{{ m.content | length }}: {{ m.content }}{% endfor %}"
    with pytest.raises(LensError, match="different text around the user's content"):
        ChatFormat(make_tokenizer("chatml", template=length)).render("a")


# BOS


def test_bos_is_written_once_and_two_are_refused() -> None:
    fmt = chat_format("gemma")
    assert fmt.render("hi").ids.count(fmt.tokenizer.bos_token_id) == 1
    assert fmt.render("hi").span_text("bos") == "<s>"
    twice = make_tokenizer("gemma", template="{{ bos_token }}" + TEMPLATES["gemma"])
    with pytest.raises(LensError, match="two BOS tokens"):
        ChatFormat(twice).render("hi")
    assert "bos" not in chat_format("qwen3").render("hi").spans


def test_a_bos_that_the_tokenizer_writes_but_the_template_does_not_is_reported() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    prompt = ChatFormat(tokenizer).render("hi")
    assert tokenizer.bos_token_id not in prompt.ids
    assert any("puts BOS in front of plain text" in note for note in prompt.notes)


# System text


def test_the_default_system_text_is_found_replaced_and_switched_off() -> None:
    default = "You are a helpful assistant named Pig."
    assert chat_format("chatml").default_system == default
    assert chat_format("chatml").render("hi").span_text("system") == default
    named = chat_format("chatml", system="Be brief.").render("hi")
    assert (named.span_text("system"), default in named.text) == ("Be brief.", False)
    empty = chat_format("chatml", system=None).render("hi")
    assert empty.text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    assert "system" not in empty.spans
    assert any("empty system message" in note and default in note for note in empty.notes)
    minimal = chat_format("qwen3", system=None).render("hi")
    assert minimal.span_text("prefix") == "<|im_start|>user\n"
    assert not minimal.notes


def test_a_default_that_comes_even_with_an_empty_system_text_is_refused() -> None:
    stubborn = (
        "{% if messages[0].role == 'system' and messages[0].content %}S:{{ messages[0].content }}|"
        "{% else %}S:Default words.|{% endif %}"
        "{% for m in messages if m.role == 'user' %}U:{{ m.content }}{% endfor %}"
    )
    with pytest.raises(LensError, match=r"default system text 'Default words\.' even when given an empty one"):
        ChatFormat(make_tokenizer("chatml", template=stubborn), system=None)


def test_text_that_no_system_setting_can_remove_is_reported() -> None:
    notes = chat_format("harmony", system=None).render("hi").notes
    assert any("system=None cannot remove: 'system You are a helpful assistant." in note for note in notes)


def test_a_system_text_that_the_template_trims_is_found() -> None:
    prompt = chat_format("llama3", system=" Be brief.\n").render("hi")
    assert prompt.span_text("system").strip() == "Be brief."
    assert any("trims white space from the system text" in note for note in prompt.notes)


def test_a_template_without_system_role_refuses_folds_or_drops() -> None:
    for family in ("gemma", "mistral"):
        tokenizer = make_tokenizer(family)
        with pytest.raises(LensError, match=r"no system role .* no_system_role='fold'"):
            ChatFormat(tokenizer, system="Be brief.")
        dropped = ChatFormat(tokenizer, system="Be brief.", no_system_role="drop").render("hi")
        assert dropped.text == ChatFormat(tokenizer).render("hi").text
        assert any("dropped" in note for note in dropped.notes)
        assert ChatFormat(tokenizer, system="").render("hi").text == dropped.text
    silent = "{% for m in messages if m.role != 'system' %}U:{{ m.content }}{% endfor %}"
    with pytest.raises(LensError, match="no system role"):
        ChatFormat(make_tokenizer("chatml", template=silent), system="Be brief.")


def test_a_folded_system_text_goes_to_the_first_of_several_user_messages() -> None:
    fmt = chat_format("gemma", system="Be brief.", no_system_role="fold")
    prompt = fmt.render([user("one"), assistant("two"), user("three")])
    assert prompt.text.count("Be brief.") == 1
    assert "user\nBe brief.\n\none<end_of_turn>" in prompt.text
    assert (prompt.span_text("query"), prompt.query) == ("three", "three")
    assert prompt.span_text("history").startswith("one<end_of_turn>")


LAST_SYSTEM = (  # in the manner of Mistral Nemo
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_text_that_stands_in_the_last_user_message_is_not_history() -> None:
    fmt = ChatFormat(make_tokenizer("mistral", template=LAST_SYSTEM), system="Be brief.")
    assert fmt.render("hi").text == "<s>[INST]Be brief.\n\nhi[/INST]"
    prompt = fmt.render([user("one"), assistant("two"), user("three")])
    assert prompt.text == "<s>[INST]one[/INST]two</s>[INST]Be brief.\n\nthree[/INST]"
    spans = {name: prompt.span_text(name) for name in ("history", "system", "query")}
    assert spans == {"history": "one[/INST]two</s>", "system": "Be brief.", "query": "three"}
    assert not prompt.notes


def test_a_history_whose_end_cannot_be_told_is_reported() -> None:
    counted = "{% for m in messages %}{{ m.role }} {{ loop.index }}: {{ m.content }}|{% endfor %}"
    prompt = ChatFormat(make_tokenizer("mistral", template=counted)).render(
        [user("one"), assistant("two"), user("three"), assistant("four"), user("five")]
    )
    assert prompt.span_text("history").endswith("four|user 5:")
    assert any("end of the history could not be located" in note for note in prompt.notes)


def test_a_system_message_in_the_conversation_sets_the_system_text_once() -> None:
    fmt = chat_format("chatml")
    prompt = fmt.render([system("Be brief."), user("hi")])
    assert prompt.ids == chat_format("chatml", system="Be brief.").render("hi").ids
    assert prompt.fingerprint != fmt.fingerprint
    assert any("the prefix is not that of the settings" in note for note in prompt.notes)
    same = chat_format("chatml", system="Be brief.").render([system("Be brief."), user("hi")])
    assert not same.notes
    with pytest.raises(LensError, match="give it in one place"):
        chat_format("chatml", system="Be long.").render([system("Be brief."), user("hi")])


# Date


def test_todays_date_is_reported_and_a_fixed_date_is_reproducible() -> None:
    for family in DATED:
        today = ChatFormat(make_tokenizer(family)).render("hi")
        assert any("writes today's date" in note and f"date='{date.today()}'" in note for note in today.notes)
        fixed = ChatFormat(make_tokenizer(family), date="2024-07-26")
        assert not fixed.render("hi").notes
        assert "26 Jul 2024" in fixed.render("hi").text or "2024-07-26" in fixed.render("hi").text
        assert fixed.fingerprint == ChatFormat(make_tokenizer(family), date="2024-07-26").fingerprint
        assert fixed.fingerprint != ChatFormat(make_tokenizer(family), date="2024-07-27").fingerprint
    kwarg = ChatFormat(make_tokenizer("llama3"), template_kwargs={"date_string": "26 Jul 2024"})
    assert kwarg.render("hi").ids == chat_format("llama3").render("hi").ids
    assert not kwarg.render("hi").notes
    assert any(
        "template_kwargs={'date_string': ...}" in note
        for note in ChatFormat(make_tokenizer("llama3")).render("a").notes
    )
    assert not chat_format("chatml").render("hi").notes


def test_a_date_format_that_is_computed_is_frozen_too() -> None:
    computed = LLAMA3.replace("strftime_now('%d %b %Y')", "strftime_now('%d' ~ ' %b')")
    fmt = ChatFormat(make_tokenizer("llama3", template=computed), date=DATE)
    assert "Today Date: 26 Jul\n" in fmt.render("hi").text


def test_todays_date_is_fixed_when_the_format_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from piggyback_lens.conversations import chat

    class Clock(date):
        day = "2025-12-31"

        @classmethod
        def today(cls) -> date:
            return date.fromisoformat(cls.day)

    monkeypatch.setattr(chat, "Day", Clock)
    for family in DATED:
        fmt = ChatFormat(make_tokenizer(family))
        before = fmt.render("hi")
        Clock.day = "2026-01-01"
        later = fmt.render([user("hi"), assistant("a"), user("b")])
        assert "31 Dec 2025" in later.text or "2025-12-31" in later.text
        assert (fmt.render("hi").ids, fmt.settings()["date"]) == (before.ids, "2025-12-31")
        assert ChatFormat(make_tokenizer(family), **fmt.settings()).fingerprint == fmt.fingerprint
        assert ChatFormat(make_tokenizer(family)).fingerprint != fmt.fingerprint
        Clock.day = "2025-12-31"
    assert ChatFormat(make_tokenizer("chatml")).date is None
    assert ChatFormat(make_tokenizer("llama3"), template_kwargs={"date_string": "1 May"}).date is None


def test_a_run_that_is_continued_keeps_the_day_on_which_it_was_begun(tmp_path: Path) -> None:
    from piggyback_lens.app.options import ModelOptions
    from piggyback_lens.results.run import Run
    from piggyback_lens.settings import ChatSettings

    make_tokenizer("llama3").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"

    def continue_run(settings: ChatSettings) -> RenderedPrompt:
        _, fmt = ModelOptions(chat=settings).chat_format(str(tmp_path / "model"), out)
        prompt = fmt.render("hi")
        with Run.open(out, "words", {"template": fmt.fingerprint}, prompt=prompt):
            return prompt

    begun = continue_run(ChatSettings(date=DATE))
    assert continue_run(ChatSettings()).ids == begun.ids
    with pytest.raises(
        LensError, match=r"have the date 2024-07-26, these have 2024-07-27: continue with .* --date 2024"
    ):
        continue_run(ChatSettings(date="2024-07-27"))
    (out / "run.json").write_text("[]")
    assert f"{date.today():%d %b %Y}" in ModelOptions().chat_format(str(tmp_path / "model"), out)[1].render("hi").text


def test_a_date_for_a_template_without_clock_is_refused() -> None:
    with pytest.raises(LensError, match=r"date='2024-07-26' has no effect: .* reads no clock; leave date=None$"):
        ChatFormat(make_tokenizer("chatml"), date=DATE)
    given = "{{ date_string or '1 May' }}" + TEMPLATES["chatml"]
    with pytest.raises(LensError, match=r"reads template_kwargs=\{'date_string': ...\} instead"):
        ChatFormat(make_tokenizer("chatml", template=given), date=DATE)


# Template variants


def test_added_tokens_of_white_space_are_ordinary_text() -> None:
    from piggyback_lens.conversations.prompt_edits import added_ids
    from piggyback_lens.conversations.template_variants import stress_variants

    tokenizer = make_tokenizer("gemma")
    tokenizer.add_tokens(["\n", "\n\n", "▁▁", "word", "<tag>", "[X]"])
    tokens = {tokenizer.decode([i]) for i in added_ids(tokenizer)}
    assert {"<tag>", "[X]", "<start_of_turn>"} <= tokens
    assert not tokens & {"\n", "\n\n", "▁▁", "word"}
    skipped = {variant.name: variant.skipped for variant in stress_variants(ChatFormat(tokenizer))}
    for name in ("no newline after headers", "extra newline after headers", "upper case", "user -> human"):
        assert not skipped[name]


# Responses given as text

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("talk", [[user("hi")], [user("one"), assistant("two"), user("hi")]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_response_makes_the_turn_that_the_template_writes(family: str, talk: list[dict[str, str]]) -> None:
    fmt = chat_format(family, "pieces")  # "bytes" splits the line ends before a word
    prompt, full = fmt.render(talk), fmt.render([*talk, assistant("Yes, it is.")])
    whole = fmt.tokenizer.apply_chat_template([*talk, assistant("Yes, it is.")], tokenize=False)
    if family in DATED:
        whole = re.sub(r"(Today Date: )([\d-]{10}|\d\d \w{3} \d{4})", rf"\g<1>{_written_date(family)}", whole)
    ids = fmt.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert full.ids == tuple(ids[: len(full.ids)])
    assert not fmt.tokenizer.decode(ids[len(full.ids) :]).strip()
    assert full.ids[: full.n_prompt] == prompt.ids
    opening = (
        full.span_text("response").removesuffix(fmt.tokenizer.decode(fmt.turn_end_ids)).removesuffix("Yes, it is.")
    )
    assert opening == {
        "harmony": "<|channel|>final<|message|>",
        "mistral": " ",
        "qwen3": "<think>\n\n</think>\n\n",
    }.get(family, "")
    assert any(f"begins with {opening!r}" in note for note in full.notes) == bool(opening)


def _written_date(family: str) -> str:
    return "26 Jul 2024" if family == "llama3" else DATE


def test_response_ids_get_no_opening() -> None:
    fmt = chat_format("harmony")
    ids = fmt.tokenizer("<|channel|>analysis<|message|>Hm", add_special_tokens=False)["input_ids"]
    assert fmt.render("hi", response=ids, end=False).ids == fmt.render("hi").ids + tuple(ids)
    assert fmt.render("hi").ids[-len(fmt.postfix_ids) :] == fmt.postfix_ids


def test_a_response_that_brings_its_own_thoughts_gets_no_second_block() -> None:
    fmt = chat_format("qwen3")
    text = "<think>\nhm\n</think>\n\nYes."
    assert fmt.render("hi", response=text).span_text("response") == text + "<|im_end|>"
    close = fmt.render("hi", response="<think>hm</think>Yes.")
    assert close.span_text("response") == text + "<|im_end|>"
    assert any("writes the response '<think>hm</think>Yes.' as" in note for note in close.notes)


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>OPEN{% endif %}"
)


def test_a_generation_prompt_that_the_finished_turn_does_not_continue_is_reported() -> None:
    forced = ChatFormat(make_tokenizer("qwen3", template=R1.replace("OPEN", "<think>\n"), eos_token="</s>"))
    prompt = forced.render("hi", response="Yes.")
    assert prompt.span_text("response") == "Yes.</s>"
    assert any(r"has '<think>\n': the response follows the prompt as given" in note for note in prompt.notes)
    closed = R1.replace("OPEN", "<think>").replace("{{ m.content.split", "</think>{{ m.content.split")
    notes = ChatFormat(make_tokenizer("qwen3", template=closed, eos_token="</s>")).render("hi", response="Yes.").notes
    assert any(
        "writes '</think>' before an assistant's content where the prompt has '<think>'" in note for note in notes
    )
    bare = ChatFormat(make_tokenizer("qwen3", template=R1.replace("OPEN", ""), eos_token="</s>"))
    assert not bare.render("hi", response="Yes.").notes
    thoughtful = bare.render("hi", response="<think>hm</think>Yes.")
    assert thoughtful.span_text("response") == "<think>hm</think>Yes.</s>"
    assert any("would not write the response '<think>hm</think>Yes.' in full" in note for note in thoughtful.notes)


def test_a_finished_turn_without_the_system_text_opens_as_after_a_single_question() -> None:
    spaced = LAST_SYSTEM.replace("{{ m.content + eos", "{{ ' ' + m.content + eos")
    fmt = ChatFormat(make_tokenizer("mistral", template=spaced), system="Be brief.")
    for talk in ([user("hi")], [user("one"), assistant("two"), user("hi")]):
        prompt = fmt.render(talk).with_response("Yes.")
        assert prompt.text == fmt.render(talk).text + " Yes.</s>"
        assert any("the response opens as after a single question" in note for note in prompt.notes)


def test_a_response_is_trimmed_as_the_template_trims_it() -> None:
    for family, trimmed in (("gemma", "yes"), ("llama3", "yes"), ("chatml", " yes ")):
        prompt = chat_format(family).render("hi", response=" yes ")
        assert prompt.span_text("response") == trimmed + prompt.tokenizer.decode(chat_format(family).turn_end_ids)
        assert any("trims the response: ' yes ' became 'yes'" in note for note in prompt.notes) == (trimmed == "yes")


def test_a_turn_end_of_plain_text_is_written_out_and_followed_by_eos() -> None:
    fmt = ChatFormat(make_tokenizer("chatml", template=PLAIN))
    eos = fmt.tokenizer.eos_token_id
    assert fmt.turn_end_ids == (*fmt.tokenizer("\n")["input_ids"], eos)
    assert fmt.stop_ids == (eos,)
    prompt = fmt.render("hi", response="Yes.")
    assert prompt.span_text("response") == " Yes.\n<|im_end|>"
    assert any(r"ends an assistant's turn with '\n', which is no special token" in note for note in prompt.notes)
    assert not any("ends an assistant" in note for note in fmt.render("hi", response="Yes.", end=False).notes)
    endless = ChatFormat(make_tokenizer("chatml", template=PLAIN, eos_token=None))
    assert endless.render("hi").ids
    with pytest.raises(LensError, match=r"set tokenizer\.eos_token"):
        _ = endless.stop_ids


def test_an_added_token_that_is_not_special_ends_a_turn_and_stops_generation() -> None:
    tokenizer = make_tokenizer("chatml", template=PLAIN.replace("\n", "[end]\n"))
    tokenizer.add_tokens("[end]")
    fmt = ChatFormat(tokenizer)
    end, eos = tokenizer.convert_tokens_to_ids("[end]"), tokenizer.eos_token_id
    assert tokenizer.decode(fmt.turn_end_ids) == "[end]\n<|im_end|>"
    assert fmt.stop_ids == (end, eos)
    tokenizer.eos_token = None
    assert (ChatFormat(tokenizer).turn_end_ids[0], ChatFormat(tokenizer).stop_ids) == (end, (end,))


def test_a_template_that_writes_nothing_after_an_answer_falls_back_to_eos() -> None:
    fmt = ChatFormat(make_tokenizer("chatml", template=PLAIN.replace("\n", "")))
    assert fmt.turn_end_ids == fmt.stop_ids == (fmt.tokenizer.eos_token_id,)
    assert not any("ends an assistant" in note for note in fmt.render("hi", response="Yes.").notes)
    always = ChatFormat(make_tokenizer("chatml", template=PLAIN.partition("{% if add")[0] + "assistant:"))
    assert always.turn_end_ids == (always.tokenizer.eos_token_id,)  # what follows an answer is the next header as well


def test_special_tokens_that_are_added_later_are_seen() -> None:
    tokenizer = make_tokenizer("chatml")
    fmt = ChatFormat(tokenizer)
    assert not fmt.render("a ~late~ b").notes
    tokenizer.add_special_tokens({"extra_special_tokens": ["~late~"]})
    assert any("markers of the template: '~late~'" in note for note in fmt.render("a ~late~ b").notes)


# Thinking


def test_thinking_off_forces_an_empty_block_and_on_does_not() -> None:
    off = chat_format("qwen3", thinking=False).render("hi")
    assert off.span_text("think") == "<think>\n\n</think>\n\n"
    assert off.span("think").stop == off.span("postfix").stop
    assert off.span_text("postfix").startswith("<|im_end|>\n<|im_start|>assistant\n<think>")
    for open_ended in (chat_format("qwen3", thinking=True), chat_format("qwen3")):
        assert "think" not in open_ended.render("hi").spans


def test_an_open_think_tag_in_the_prompt_is_a_span() -> None:
    opened = (
        TEMPLATES["qwen3"]
        .replace("{{- '<think>\\n\\n</think>\\n\\n' }}", "")
        .replace("'<|im_start|>assistant\n' }}{%- if enable", "'<|im_start|>assistant\n<think>\n' }}{%- if enable")
    )
    prompt = ChatFormat(make_tokenizer("qwen3", template=opened)).render("say <think>")
    assert prompt.span_text("think") == "<think>\n"
    assert prompt.span("think").start > prompt.span("postfix").start


def test_a_thinking_switch_without_effect_is_refused() -> None:
    with pytest.raises(LensError, match="does not react to enable_thinking"):
        ChatFormat(make_tokenizer("chatml"), thinking=False)
    mentioned = "{% set t = enable_thinking %}" + TEMPLATES["chatml"]
    with pytest.raises(LensError, match="does not react to enable_thinking"):
        ChatFormat(make_tokenizer("chatml", template=mentioned), thinking=True)
    with pytest.raises(LensError, match="use thinking= only"):
        ChatFormat(make_tokenizer("qwen3"), thinking=True, template_kwargs={"enable_thinking": True})


def test_a_switch_named_thinking_is_found() -> None:
    template = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}" + TEMPLATES["chatml"].replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n' }}{{ '<think>' if thinking else '</think>' }}"
    )
    tokenizer = make_tokenizer("qwen3", template=template)
    ends = {"<think>": True, "</think>": False}
    for end, thinking in ends.items():
        assert ChatFormat(tokenizer, thinking=thinking).render("hi").text.endswith(end)
    assert ChatFormat(tokenizer).render("hi").text.endswith("</think>")
    with pytest.raises(LensError, match="sets thinking as well as thinking="):
        ChatFormat(tokenizer, thinking=True, template_kwargs={"thinking": True})
    with pytest.raises(LensError, match=r"enable_thinking or thinking; it reads \['date_string'\]; leave"):
        ChatFormat(make_tokenizer("llama3"), thinking=True)


def test_only_what_a_user_can_set_is_listed_for_an_unknown_variable() -> None:
    inner = (
        "{% macro turn(message, mark='') %}{{ sign ~ message.role }}: {{ message.content }}{{ mark }}{% endmacro %}"
        "{% if style is defined %}{% set sign = style %}{% else %}{% set sign = '#' %}{% endif %}"
        "{% if effort %}{% set level = effort %}{% endif %}{% set mode = mode or 'plain' %}{{ level }}{{ mode }}"
        "{% for m in messages %}{% set text = m %}{{ bos_token }}{{ turn(text) }}{% endfor %}{{ m }}"
    )
    tokenizer = make_tokenizer("chatml", template=inner)
    for wrong in ("level", "turn", "m", "text", "efort"):
        with pytest.raises(LensError, match=rf"not read \['{wrong}'\].* it reads \['effort', 'mode', 'style'\]$"):
            ChatFormat(tokenizer, template_kwargs={wrong: "x"})
    chosen = ChatFormat(tokenizer, template_kwargs={"effort": "high", "mode": "m", "style": ">"})
    assert chosen.render("hi").text == "highm<s>>user: hi"


def test_thinking_stripped_from_the_history_is_reported() -> None:
    fmt = chat_format("qwen3")
    prompt = fmt.render([user("one"), assistant("<think>\nhm\n</think>\n\ntwo"), user("three")])
    assert "hm" not in prompt.text
    assert any("history messages [1]" in note for note in prompt.notes)
    assert prompt.span_text("history") == "one<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    assert not fmt.render([user("one"), assistant("two"), user("three")]).notes


def test_the_history_span_runs_from_the_first_content_to_the_last_header() -> None:
    texts = {  # harmony's last turn ends differently, so its turn end is left out
        "alpaca": "one\n\n### Response:\ntwo</s>\n\n",
        "chatml": "one<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n",
        "llama3": "one<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>",
        "gemma": "one<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n",
        "mistral": "one [/INST] two</s>",
        "harmony": "one<|end|><|start|>assistant<|channel|>final<|message|>two",
    }
    for family, text in texts.items():
        prompt = chat_format(family).render([user("one"), assistant("two"), user("three")])
        assert prompt.span_text("history").strip(" ") == text


# Input errors


def test_malformed_conversations_are_refused_with_a_way_out() -> None:
    render = chat_format("chatml").render
    cases = {
        "non-empty list of messages": [],
        "role 'tool'; expected one of system, user, assistant": [{"role": "tool", "content": "x"}],
        "last message must be the user's": [system("x")],
        "a system message stands after the first place": [user("a"), system("x"), user("b")],
        r"keys \['content', 'name', 'role'\]": [{"role": "user", "content": "x", "name": "Bo"}],
        r"keys \['role'\]": [{"role": "user"}],
        "content of type list": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "lone surrogate": [user("\ud83d")],
    }
    for message, messages in cases.items():
        with pytest.raises(LensError, match=message):
            render(messages)
    with pytest.raises(LensError, match="last message must be the user's"):
        render([user("a"), assistant("b"), assistant("c")])
    unchecked = inspect.unwrap(read_conversation)  # the tests' type checker would refuse these first
    with pytest.raises(LensError, match="got 7 as a conversation"):
        unchecked(7)
    with pytest.raises(LensError, match="message 0 is 'hi'"):
        unchecked(["hi"])
    assert render([user("a") | {"tool_calls": None}]).query == "a"
    with pytest.raises(LensError, match="refuses messages with the roles assistant, user: Conversation roles must"):
        chat_format("gemma").render([assistant("a"), user("b")])


def test_unusable_tokenizers_and_settings_are_refused_with_a_way_out() -> None:
    tokenizer = make_tokenizer("chatml")
    with pytest.raises(LensError, match="got a str as tokenizer"):
        ChatFormat("gpt2")
    bare = make_tokenizer("chatml", template="")
    with pytest.raises(LensError, match="no chat template; use an instruction-tuned"):
        ChatFormat(bare)

    class Slow:
        is_fast = False
        chat_template = "x"

        def apply_chat_template(self) -> None: ...

    with pytest.raises(LensError, match="Slow is a slow tokenizer"):
        ChatFormat(Slow())
    with pytest.raises(LensError, match=r"does not read \['dat'\]"):
        ChatFormat(tokenizer, template_kwargs={"dat": "x"})
    with pytest.raises(LensError, match="passes itself"):
        ChatFormat(tokenizer, template_kwargs={"tokenize": True})
    with pytest.raises(LensError, match="no ISO date"):
        ChatFormat(make_tokenizer("llama3"), date="yesterday")
    for field, value, message in (
        ("no_system_role", "keep", "no_system_role='keep'; expected"),
        ("system", 3, "system=3; pass the system text"),
    ):
        fmt = ChatFormat(tokenizer)
        object.__setattr__(fmt, field, value)  # the tests' type checker would refuse the constructor's call first
        with pytest.raises(LensError, match=message):
            fmt.__post_init__()
    with pytest.raises(LensError, match="plain JSON values"):
        ChatFormat(make_tokenizer("llama3"), template_kwargs={"date_string": object()})
    with pytest.raises(LensError, match="not valid jinja"):
        ChatFormat(make_tokenizer("chatml", template="{% if %}"), template_kwargs={"x": 1})


@pytest.mark.parametrize("wrong", [lambda a, b: (a, a), lambda a, b: (a, b + 4)])
def test_offsets_that_do_not_give_the_query_back_are_refused(wrong: Callable[[int, int], tuple[int, int]]) -> None:
    class Broken:
        """Offsets of no width, as some Llama 3 tokenizers had them, or too wide, for one text only."""

        def __init__(self, inner: object) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

        def __call__(self, text: str, **options: object) -> dict[str, object]:
            encoded = dict(self.inner(text, **options))
            if "Hello there" in text:
                encoded["offset_mapping"] = [wrong(a, b) for a, b in encoded.get("offset_mapping", ())]
            return encoded

    with pytest.raises(LensError, match=r"character offsets leave out .* cannot be trusted"):
        ChatFormat(Broken(make_tokenizer("chatml"))).render("Hello there")


def test_settings_are_copied_and_the_repr_is_short() -> None:
    kwargs = {"date_string": "26 Jul 2024"}
    fmt = ChatFormat(make_tokenizer("llama3"), template_kwargs=kwargs)
    kwargs["date_string"] = "27 Jul 2024"
    assert fmt.settings()["template_kwargs"] == {"date_string": "26 Jul 2024"}
    assert repr(fmt) == "ChatFormat(template_kwargs={'date_string': '26 Jul 2024'})"
    assert repr(chat_format("chatml")) == "ChatFormat()"
    assert "prefix 0:" in repr(fmt.render("hi"))


def test_the_fingerprint_tells_settings_templates_and_histories_apart() -> None:
    prints = [chat_format(family).fingerprint for family in FAMILIES]
    prints += [
        chat_format("qwen3", thinking=False).fingerprint,
        chat_format("chatml", system="x").fingerprint,
    ]
    prints.append(chat_format("chatml").render([user("a"), assistant("b"), user("c")]).fingerprint)
    prints.append(ChatFormat(make_tokenizer("chatml", template=TEMPLATES["chatml"] + "{# v2 #}")).fingerprint)
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{16}", p) for p in prints)
    assert chat_format("chatml").render("hi").fingerprint == chat_format("chatml").fingerprint
