"""The template stress suite: variants on many templates, and the experiment."""

import math

import numpy as np
import pytest
import tiny_chat
import tiny_models
from chat_templates import DATE, TEMPLATES, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_hooked import BACKENDS

from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.conversations.prompt_edits import added_ids, perturbed_prompt, with_prefix_text
from piggyback_lens.conversations.template_variants import Part, Variant, prefix_parts, query_ids, stress_variants
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.stress_suite import StressResult, stress
from piggyback_lens.intervals import paired_difference
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.results import run as run_module
from piggyback_lens.settings import StressSettings

QUERIES = ["hello there", "what is it", "tell me more", "why not"]
LETTERS = Behaviour("letters", "letters per answer", "letters", "length", len)
CHAT = tiny_chat.tiny_format()
ASKED = ("Why is the sky blue?", "7", "  spaces", "你好 😀", "the zebra's <b>")
FAMILIES = ["case", "spacing", "system prompt", "role names", "date", "thinking"]


@pytest.fixture(scope="module", params=BACKENDS)
def pair(request):
    tokenizer = tiny_chat.tiny_tokenizer()
    models = [
        hook_model(tiny_models.build("llama-gqa", seed, vocab=len(tokenizer)), tokenizer, backend=request.param)
        for seed in (0, 1)
    ]
    return ModelPair(*models, tokenizer=tokenizer)


def prompts(queries=QUERIES):
    return [CHAT.render(query) for query in queries]


def family_format(family, kind="bytes", **settings):
    date = {"date": DATE} if family in ("llama3", "harmony") else {}
    return ChatFormat(make_tokenizer(family, kind), **date | settings)


def by_name(chat, **kwargs):
    return {variant.name: variant for variant in stress_variants(chat, **kwargs)}


def prefix_of(chat, name, query="Why?", **kwargs):
    return by_name(chat, **kwargs)[name](chat.render(query)).span_text("prefix")


def parts_of(prompt):
    """Ids of prefix, query and postfix, each by itself."""
    spans = (prompt.spans[name] for name in ("prefix", "query", "postfix"))
    return [prompt.ids[s.start : s.stop] for s in spans]


# ---------------------------------------------------------------- on every template


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_every_variant_keeps_the_query_and_text_edits_keep_postfix_and_special_tokens(family, kind):
    chat = family_format(family, kind)
    special = added_ids(chat.tokenizer)
    usable = [variant for variant in stress_variants(chat) if not variant.skipped]
    assert len(usable) >= 3
    for query in ASKED:
        prompt = chat.render(query)
        before, asked, after = parts_of(prompt)
        for variant in usable:
            other = variant(prompt)
            prefix, same, postfix = parts_of(other)
            assert same == asked
            assert other.query == prompt.query
            assert prefix + same + postfix == other.ids
            assert "".join(other.pieces) == other.text
            assert len(other.pieces) == len(other.ids)
            if variant.family in ("case", "spacing", "role names"):
                assert postfix == after
                assert [i for i in prefix if i in special] == [i for i in before if i in special]
            if variant.family != "thinking":
                assert prefix != before
                assert postfix == after
                assert other.fingerprint != prompt.fingerprint


@pytest.mark.parametrize("family", TEMPLATES)
def test_all_families_are_there_and_what_is_skipped_says_why(family):
    variants = stress_variants(family_format(family))
    assert list(dict.fromkeys(variant.family for variant in variants)) == FAMILIES
    assert len({variant.name for variant in variants}) == len(variants)
    chat = family_format(family)
    seen = {chat.render("Why").ids}
    for variant in variants:
        if not variant.skipped:
            ids = variant(chat.render("Why")).ids
            assert ids not in seen
            seen.add(ids)


@pytest.mark.parametrize(
    ("family", "settings", "name", "reason"),
    [
        ("gemma", {}, "system: assistant", "no system role"),
        ("mistral", {"no_system_role": "fold"}, "system: assistant", "changes the tokens of the query"),
        ("chatml", {}, "empty system prompt", "has the same tokens as 'no system prompt'"),
        ("qwen3", {}, "no system prompt", "has the same tokens as the unmodified template"),
        ("qwen3", {}, "thinking on", "has the same tokens as the unmodified template"),
        ("chatml", {}, "thinking off", "does not react to enable_thinking"),
        ("chatml", {}, "the template's own date", "does not read the clock"),
        ("qwen3", {}, "lower case", "has the same tokens as the unmodified template"),
        ("mistral", {}, "no newline after headers", "has the same tokens as the unmodified template"),
    ],
)
def test_variants_that_cannot_be_used_are_reported(family, settings, name, reason):
    assert reason in by_name(family_format(family, **settings))[name].skipped


def test_a_template_without_role_names_reports_that():
    assert by_name(CHAT)["role names"].skipped.startswith("the prefix names none of the roles user, system")


# ---------------------------------------------------------------- what each variant writes


def test_variants_of_chatml_are_these():
    chat = family_format("chatml")
    system = "You are a helpful assistant named Pig."
    wanted = {
        "upper case": "<|im_start|>SYSTEM\nYOU ARE A HELPFUL ASSISTANT NAMED PIG.<|im_end|>\n<|im_start|>USER\n",
        "lower case": f"<|im_start|>system\n{system.lower()}<|im_end|>\n<|im_start|>user\n",
        "title case": "<|im_start|>System\nYou Are A Helpful Assistant Named Pig.<|im_end|>\n<|im_start|>User\n",
        "double spaces": f"<|im_start|>system\n{system.replace(' ', '  ')}<|im_end|>\n<|im_start|>user\n",
        "no newline after headers": f"<|im_start|>system{system}<|im_end|>\n<|im_start|>user",
        "extra newline after headers": f"<|im_start|>system\n\n{system}<|im_end|>\n<|im_start|>user\n\n",
        "system: questions": "<|im_start|>system\nYou answer questions.<|im_end|>\n<|im_start|>user\n",
        "system: mine": "<|im_start|>system\nBe a pig.<|im_end|>\n<|im_start|>user\n",
        "no system prompt": "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n",
        "user -> human": f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>human\n",
        "system -> instructions": f"<|im_start|>instructions\n{system}<|im_end|>\n<|im_start|>user\n",
        "all role names": f"<|im_start|>instructions\n{system}<|im_end|>\n<|im_start|>human\n",
        "date in the system prompt": (
            f"<|im_start|>system\n{system}\n\nToday's date is 2020-02-29.<|im_end|>\n<|im_start|>user\n"
        ),
    }
    variants = by_name(chat, systems={"mine": "Be a pig."}, date="2020-02-29")
    prompt = chat.render("Why?")
    assert {name: variants[name](prompt).span_text("prefix") for name in wanted} == wanted
    assert variants["upper case"](prompt).span_text("system") == system.upper()
    assert variants["extra newline after headers"](prompt).span_text("system") == system


def test_role_names_inside_the_system_text_stay():
    chat = family_format("chatml", system="The user of this system is a user.")
    assert prefix_of(chat, "all role names") == (
        "<|im_start|>instructions\nThe user of this system is a user.<|im_end|>\n<|im_start|>human\n"
    )


def test_other_templates_change_where_they_can():
    assert prefix_of(family_format("alpaca"), "Instruction -> Question") == "### Question:\n"
    assert prefix_of(family_format("mistral"), "INST -> USER") == "<s>[USER]"
    assert prefix_of(family_format("harmony"), "extra newline after headers").endswith("<|message|>\n")
    assert "Today Date: 29 Feb 2020" in prefix_of(family_format("llama3"), "the template's own date", date="2020-02-29")
    assert prefix_of(family_format("harmony"), "user -> human").endswith("<|start|>human<|message|>")
    folded = family_format("gemma", system="Be brief.", no_system_role="fold")
    assert prefix_of(folded, "upper case") == "<s><start_of_turn>USER\nBE BRIEF.\n\n"
    off = by_name(family_format("qwen3"))["thinking off"](family_format("qwen3").render("Why?"))
    assert off.span_text("think").strip() == "<think>\n\n</think>"


def test_text_edits_have_the_tokens_of_the_edited_text_as_a_whole():
    """For templates of which a tokenizer reads the end of the prefix together with the query."""
    chat = family_format("llama3")
    prompt = chat.render("Why?")
    other = by_name(chat)["upper case"](prompt)
    joint = chat.tokenizer(other.text, add_special_tokens=False)["input_ids"]
    assert other.ids == tuple(joint)
    alone = chat.tokenizer(other.span_text("prefix"), add_special_tokens=False)["input_ids"]
    assert parts_of(other)[0] != tuple(alone)


def test_a_prefix_that_would_merge_with_the_query_is_tokenised_by_itself_and_says_so():
    chat = family_format("chatml")
    prompt = chat.render("s")
    text = prompt.span_text("prefix").removesuffix("user\n") + "u"
    joint = chat.tokenizer(text + "s", add_special_tokens=False)["input_ids"]
    alone = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert joint != alone + list(query_ids(prompt)), "'us' is one token here, else this test shows nothing"
    other = with_prefix_text(prompt, text)
    assert parts_of(other) == [tuple(alone), *parts_of(prompt)[1:]]
    assert "tokenised by itself" in other.notes[-1]
    assert "tokenised by itself" not in with_prefix_text(prompt, text + "\n").notes[-1]


@given(query=st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable() and text.strip()))
def test_any_query_keeps_its_ids(query):
    chat = family_format("chatml")
    try:
        prompt = chat.render(query)
    except LensError:
        return
    for variant in stress_variants_of_chatml():
        assert parts_of(variant(prompt))[1:] == parts_of(prompt)[1:]


_CHATML: list[Variant] = []


def stress_variants_of_chatml():
    if not _CHATML:
        _CHATML.extend(v for v in stress_variants(family_format("chatml")) if not v.skipped)
    return _CHATML


def test_prefix_parts_are_the_prefix():
    prompt = family_format("chatml").render("Why?")
    assert prefix_parts(prompt) == [
        Part("special", "<|im_start|>"),
        Part("template", "system\n"),
        Part("system", "You are a helpful assistant named Pig."),
        Part("special", "<|im_end|>"),
        Part("template", "\n"),
        Part("special", "<|im_start|>"),
        Part("template", "user\n"),
    ]


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ("text", "expected different system texts"),
        ([""], "none of them blank"),
        (["a", "a"], "expected different system texts"),
        ({"polite": "a"}, "'polite'.* are taken"),
    ],
)
def test_unusable_system_texts_are_refused(systems, message):
    with pytest.raises(LensError, match=message):
        stress_variants(family_format("chatml"), systems=systems)


def test_edits_that_lose_special_tokens_or_take_other_prompts_are_refused():
    chat = family_format("chatml")
    prompt = chat.render("Why?")
    with pytest.raises(LensError, match="does not hold the special tokens"):
        with_prefix_text(prompt, "user\n")
    with pytest.raises(LensError, match="does not hold the special tokens"):
        with_prefix_text(prompt, prompt.span_text("prefix") + "<|im_end|>")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    variants = by_name(chat)
    for wrong in (chat.render(talk), chat.render("a", response="b")):
        for name in ("upper case", "no system prompt"):
            with pytest.raises(LensError, match="one turn and without a response"):
                variants[name](wrong)
    torn = next(t for t in sorted(chat.tokenizer.get_vocab()) if len(t) == 2 and t.isalpha() and t.isascii())
    ids = [chat.tokenizer.convert_tokens_to_ids(letter) for letter in torn]
    perturbed = perturbed_prompt(chat.render("the the the"), "query", dict(enumerate(ids)))
    with pytest.raises(LensError, match="not those of its text"):
        variants["upper case"](perturbed)


def test_a_variant_that_touches_the_query_is_refused_by_name():
    prompt = family_format("chatml").render("Why?")
    bad = Variant("loud", "case", lambda p: family_format("chatml").render(p.query.upper()))
    with pytest.raises(LensError, match="variant 'loud' changes the tokens of the query 'Why\\?'"):
        bad(prompt)


# ---------------------------------------------------------------- the experiment


def run(pair, prompts=None, chat=CHAT, variants=None, out=None, **changes):
    settings = StressSettings(**{"max_new_tokens": 4} | changes)
    some = [CHAT.render(query) for query in QUERIES] if prompts is None else prompts
    return stress(pair, some, LETTERS, settings, variants=variants, chat=chat, out=out)


def test_every_answer_is_that_of_generate_on_the_variant(pair):
    result = run(pair)
    variants = {v.name: v for v in stress_variants(CHAT)}
    ran = [name for name, v in variants.items() if not v.skipped]
    assert len(ran) >= 5
    assert list(dict.fromkeys(row["variant"] for row in result.rows)) == ["unmodified", *ran]
    assert len(result.rows) == (1 + len(ran)) * 2 * 4
    assert result.skipped == {name: v.skipped for name, v in variants.items() if v.skipped}
    for row in result.rows:
        prompt = prompts()[row["index"]]
        prompt = prompt if row["variant"] == "unmodified" else variants[row["variant"]](prompt)
        with pair.using(row["side"]) as model:
            (answer,) = generate(model, [prompt], max_new_tokens=4)
        assert (row["text"], row["response"], row["value"]) == (prompt.text, answer.text, len(answer.text))
        assert row["prefix_tokens"] == len(prompt.span("prefix"))


def test_the_frame_has_a_row_for_every_variant_and_side(pair):
    result = run(pair)
    frame = result.to_frame()
    assert list(frame.columns) == [
        "variant", "family", "side", "value", "low", "high", "n", "reason", "prefix_tokens", "spread", "spread_low",
        "spread_high", "recovery", "recovery_low", "recovery_high",
    ]  # fmt: skip
    assert not frame.duplicated(["variant", "side"]).any()
    assert frame["variant"].nunique() * 2 == len(frame)
    assert frame.iloc[0].tolist()[:3] == ["unmodified", "unmodified", "base"]
    for row in frame.itertuples():
        own = [r["value"] for r in result.rows if (r["variant"], r["side"]) == (row.variant, row.side)]
        assert row.value == pytest.approx(sum(own) / 4)


def test_one_side_alone_has_no_spread(pair):
    frame = run(pair, sides=["finetuned"]).to_frame()
    assert set(frame["side"]) == {"finetuned"}
    assert frame["spread"].isna().all()
    assert set(frame["reason"]) == {"only one of base and finetuned was run"}


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_identical_rows(pair, tmp_path, monkeypatch):
    whole = run(pair, out=tmp_path / "whole")
    real, calls = run_module.append_jsonl, []

    def dying(path, rows):
        calls.append(path)
        if len(calls) == 5:
            raise Killed
        return real(path, rows)

    monkeypatch.setattr(run_module, "append_jsonl", dying)
    with pytest.raises(Killed):
        run(pair, out=tmp_path / "cut")
    monkeypatch.setattr(run_module, "append_jsonl", real)
    before = (tmp_path / "cut" / "rows.jsonl").read_text()
    assert 0 < len(before.splitlines()) < len(whole.rows)
    resumed = run(pair, out=tmp_path / "cut", batch_size=3)
    after = (tmp_path / "cut" / "rows.jsonl").read_text()
    assert resumed.rows == whole.rows
    assert after.startswith(before)
    assert len(after.splitlines()) == len(whole.rows)


def test_a_folder_of_other_settings_is_refused_by_name(pair, tmp_path):
    run(pair, out=tmp_path)
    with pytest.raises(LensError, match="belongs to another run: max_new_tokens is 4 there, 5 here"):
        run(pair, out=tmp_path, max_new_tokens=5)
    with pytest.raises(LensError, match=r"belongs to another run: .*variants\."):
        run(pair, out=tmp_path, variants=stress_variants(CHAT, systems=["be mean."]))
    with pytest.raises(LensError, match="belongs to another run: prompts is"):
        run(pair, out=tmp_path, prompts=prompts(QUERIES[::-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "got no prompts; pass at least one"),
        ({"sides": []}, r"StressSettings.sides is \(\); expected some of base, finetuned"),
        ({"sides": ["base", "base"]}, r"StressSettings.sides is \('base', 'base'\); expected each side once"),
        ({"sides": ["other"]}, r"StressSettings.sides is \('other',\); expected some of base, finetuned"),
        ({"chat": tiny_chat.tiny_format("be mean.")}, "prompt 0 was rendered with other settings"),
        ({"chat": None}, "prompt 0 was rendered with other settings"),
        ({"variants": [Variant("unmodified", "x", lambda p: p)]}, "two variants have one name"),
        ({"variants": [Variant("a", "x", lambda p: CHAT.render("no"))]}, "variant 'a' changes the tokens"),
    ],
)
def test_impossible_settings_are_refused(pair, change, message):
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)  # as for a user, without the run-time type checker
    try:
        with pytest.raises(LensError, match=message):
            run(pair, **change)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# ---------------------------------------------------------------- statistics, files, figure


def fabricated():
    values = {
        ("unmodified", "base"): [40.0, 42.0, 38.0, 41.0],
        ("unmodified", "finetuned"): [10.0, 12.0, 8.0, 13.0],
        ("loud", "base"): [30.0, 32.0, 30.0, 31.0],
        ("loud", "finetuned"): [20.0, 22.0, 21.0, 26.0],
        ("same", "base"): [40.0, 42.0, 38.0, 41.0],
        ("same", "finetuned"): [10.0, 12.0, 8.0, None],
    }
    rows = [
        {"variant": variant, "side": side, "index": index, "value": value, "prefix_tokens": 7 + index % 2}
        for (variant, side), column in values.items()
        for index, value in enumerate(column)
    ]
    names = ["unmodified", "loud", "same", "broken"]
    variants = [{"name": n, "family": n, "skipped": "because" if n == "broken" else ""} for n in names]
    settings = {"n": 4, "sides": ["base", "finetuned"], "seed": 0, "variants": variants}
    settings |= {
        "behaviour": {"name": "w", "label": "words", "unit": "words"},
        "names": {"base": "a", "finetuned": "b"},
    }
    return StressResult(rows, settings)


def test_spread_and_recovery_are_those_worked_out_by_hand():
    result = fabricated()
    frame = result.to_frame().set_index(["variant", "side"])
    gap = paired_difference([20.0, 22.0, 21.0, 26.0], [30.0, 32.0, 30.0, 31.0])
    for side in ("base", "finetuned"):
        row = frame.loc[("loud", side)]
        assert row["spread"] == -(10 + 10 + 9 + 5) / 4
        assert (row["spread_low"], row["spread_high"]) == (gap.low, gap.high)
        assert row["recovery"] == pytest.approx(1 - 34 / (30 + 30 + 30 + 28))
        assert row["recovery_low"] < row["recovery"] < row["recovery_high"]
    assert frame.loc[("unmodified", "base"), "spread"] == -29.5
    assert math.isnan(frame.loc[("unmodified", "base"), "recovery"])
    assert frame.loc[("same", "finetuned"), "recovery"] == pytest.approx(0)
    assert frame.loc[("same", "finetuned"), "n"] == 3
    assert set(frame["prefix_tokens"]) == {8}
    assert "broken" not in frame.index
    assert result.skipped == {"broken": "because"}
    np.testing.assert_equal(result.values("same", "finetuned"), [10.0, 12.0, 8.0, math.nan])


def test_a_saved_result_is_read_back_whole(pair, tmp_path):
    result = run(pair)
    path = result.save(tmp_path / "result.json")
    again = StressResult.load(path)
    assert (again.rows, again.settings) == (result.rows, result.settings)
    assert again.to_frame().equals(result.to_frame())
    assert len(again.generations()) == len(result.rows)
    path.write_text('{"result": "perturb"}')
    with pytest.raises(LensError, match=r"says no format.*no StressResult"):
        StressResult.load(path)


def test_the_figure_shows_every_variant(pair):
    variants = [*stress_variants(CHAT), Variant("<b>&", "odd", lambda p: perturbed_prompt(p, "prefix", {3: 9}))]
    result = run(pair, variants=variants)
    shown = result.figure().to_json()
    assert all(v.name.replace("'", "") in shown.replace("'", "") for v in variants[:-1] if not v.skipped)
    assert "<b>&" not in shown
    assert "letters per answer" in shown
