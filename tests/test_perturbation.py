"""Token perturbation: neighbours, edits of prompts, draws, the experiment, its statistics and its files."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny_chat
import tiny_models
import torch
from chat_templates import DATE, TEMPLATES, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_hooked import BACKENDS

from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.conversations.prompt_edits import added_ids, perturbed_prompt, with_query
from piggyback_lens.conversations.rephrasing import load_rephrasings
from piggyback_lens.conversations.replacements import candidate_ids, draw_replacements, nearest_neighbours
from piggyback_lens.errors import LensError
from piggyback_lens.experiments import answering
from piggyback_lens.experiments.perturbation import PerturbResult, perturb
from piggyback_lens.intervals import mean_interval, recovery
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.results import run as run_module
from piggyback_lens.settings import PerturbSettings

QUERIES = ["hello there", "what is it", "tell me more", "why not"]
LETTERS = Behaviour("letters", "letters per answer", "letters", "length", len)
ORDINARY = tuple(range(len(tiny_chat.SPECIAL), tiny_chat.VOCAB))
CHAT = tiny_chat.tiny_format()
SMALL = {"n_tokens": 4, "top": 3, "trials": 2, "max_new_tokens": 4}


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


def run(pair, prompts=None, rephrasings=None, out=None, **changes):
    settings = PerturbSettings(**SMALL | changes)
    some = [CHAT.render(query) for query in QUERIES] if prompts is None else prompts
    return perturb(pair, some, LETTERS, settings, rephrasings=rephrasings, out=out)


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("chunk", [3, 7, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_are_those_of_a_brute_force_search(chunk, dtype):
    embeddings = torch.randn((60, 8), generator=torch.Generator().manual_seed(1)).to(dtype)
    table = embeddings.double().numpy()
    candidates = [i for i in range(60) if i % 7]
    for top in (1, 5):
        found = nearest_neighbours(embeddings, [3, 14, 59, 3], candidates, top, chunk=chunk)
        assert sorted(found) == [3, 14, 59]
        for token, neighbours in found.items():
            others = [i for i in candidates if i != token]
            others.sort(key=lambda i: -float(table[i] @ table[token]))
            assert neighbours == tuple(others[:top])


def test_neighbours_have_the_largest_dot_product_not_the_largest_cosine():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [9.0, 9.0], [0.0, 1.0]])
    assert nearest_neighbours(embeddings, [0], [0, 1, 2, 3], top=2) == {0: (2, 1)}


def test_the_whole_table_of_dot_products_is_never_made(monkeypatch):
    """Of 4,000 rows only chunks are multiplied."""
    embeddings = torch.randn((4000, 4), generator=torch.Generator().manual_seed(0))
    largest = []
    real = torch.Tensor.masked_fill
    monkeypatch.setattr(
        torch.Tensor, "masked_fill", lambda self, *args: largest.append(tuple(self.shape)) or real(self, *args)
    )
    nearest_neighbours(embeddings, range(10), range(4000), 5, chunk=500)
    assert largest == [(10, 500)] * 8


def test_more_neighbours_than_candidates_are_refused():
    with pytest.raises(LensError, match="top 3 neighbours asked of 3 candidate"):
        nearest_neighbours(torch.eye(5), [0], [1, 2, 3], top=3)
    with pytest.raises(LensError, match="top 0"):
        nearest_neighbours(torch.eye(5), [0], [1, 2, 3], top=0)


def test_candidates_are_ordinary_tokens_with_an_embedding():
    tokenizer = tiny_chat.tiny_tokenizer()
    assert candidate_ids(tokenizer, 1000) == ORDINARY
    assert candidate_ids(tokenizer, 20) == tuple(range(len(tiny_chat.SPECIAL), 20))
    assert candidate_ids(tokenizer, 1000, special=True) == tuple(range(tiny_chat.VOCAB))
    tokenizer.add_tokens(["<tag>"])
    assert candidate_ids(tokenizer, 1000) == ORDINARY


# ---------------------------------------------------------------- the perturbed prompt


def kept(prompt):
    """Everything that a perturbation must leave alone."""
    return {name: (s.start, s.stop) for name, s in prompt.spans.items()}, len(prompt.ids)


@given(
    query=st.text(tiny_chat.LETTERS[:26] + " .", min_size=1, max_size=30).filter(str.strip),
    span=st.sampled_from(["prefix", "query", "postfix", "system", "bos"]),
    n=st.integers(1, 12),
    trial=st.integers(0, 50),
    seed=st.integers(0, 5),
    neighbours=st.booleans(),
)
def test_exactly_n_tokens_change_and_only_within_the_span(query, span, n, trial, seed, neighbours):
    prompt = CHAT.render(query)
    choices = {i: [t for t in ORDINARY if t != i][:5] for i in range(tiny_chat.VOCAB)} if neighbours else ORDINARY
    new = draw_replacements(prompt, span, choices, n_tokens=n, trial=trial, seed=seed)
    other = perturbed_prompt(prompt, span, new)
    home = prompt.span(span)
    changed = [i for i, (a, b) in enumerate(zip(prompt.ids, other.ids, strict=True)) if a != b]
    assert len(changed) == len(new) == min(n, len(home))
    assert set(changed) <= set(home.positions)
    assert all(other.ids[i] in ORDINARY for i in changed)
    assert kept(other) == kept(prompt)
    # The tiny tokenizer writes every token as its own text, so this oracle knows nothing of pieces.
    vocab = [*tiny_chat.SPECIAL, *tiny_chat.LETTERS]
    assert other.pieces == tuple(vocab[i] for i in other.ids)
    assert other.text == "".join(other.pieces)
    assert prompt.ids == CHAT.render(query).ids


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_texts_of_real_tokenizers_stay_consistent_around_replaced_tokens(kind):
    tokenizer = make_tokenizer("chatml", kind)
    prompt = ChatFormat(tokenizer).render("Why is the sky blue 😀 in 世界?")
    plain = candidate_ids(tokenizer, 10**6)
    for trial in range(30):
        for span in ("prefix", "query", "postfix"):
            new = draw_replacements(prompt, span, plain, n_tokens=3, trial=trial)
            other = perturbed_prompt(prompt, span, new)
            home = prompt.span(span)
            assert len(other.pieces) == len(other.ids)
            assert "".join(other.pieces) == other.text
            for name in ("prefix", "query", "postfix"):
                if name != span:
                    assert other.span_text(name) == prompt.span_text(name)
            whole = tokenizer.decode(list(other.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if "\ufffd" not in whole + other.text:  # this decoder writes a space after special tokens
                ours, theirs = (t.replace(" ", "") if kind == "pieces" else t for t in (other.text, whole))
                assert ours == theirs
            assert all(other.ids[home.start + i] == token for i, token in new.items())


def test_a_replaced_part_of_a_character_takes_the_character_with_it():
    prompt = ChatFormat(make_tokenizer("chatml")).render("a 😀 b")
    home = prompt.span("query")
    first = next(i for i in home.positions if "😀" in prompt.pieces[i])
    assert prompt.pieces[first + 1] == ""
    letter = prompt.tokenizer.convert_tokens_to_ids("z")
    other = perturbed_prompt(prompt, "query", {first + 1 - home.start: letter})
    assert "z" in other.span_text("query")
    assert "😀" not in other.text
    assert other.pieces[: home.start] == prompt.pieces[: home.start]


def test_query_fingerprint_and_notes_say_what_was_changed():
    prompt = CHAT.render("hello")
    letter = CHAT.tokenizer.convert_tokens_to_ids("z")
    query, prefix = perturbed_prompt(prompt, "query", {0: letter}), perturbed_prompt(prompt, "prefix", {3: letter})
    postfix = perturbed_prompt(prompt, "postfix", {0: letter})
    assert (query.query, prefix.query, postfix.query) == ("zello", "hello", "hello")
    assert query.fingerprint == prompt.fingerprint
    assert len({prompt.fingerprint, prefix.fingerprint, postfix.fingerprint}) == 3
    assert prefix.fingerprint == perturbed_prompt(CHAT.render("other"), "prefix", {3: letter}).fingerprint
    assert query.notes[-1] == "1 of 5 tokens of the span 'query' are replaced: 'h' by 'z'"
    assert query.with_response("yes").span_text("response") == "yes<end>"


@pytest.mark.parametrize(
    ("span", "new", "message"),
    [
        ("query", {}, "nothing to replace"),
        ("query", {5: 10}, "index 5 lies outside the span 'query', which has 5 tokens"),
        ("query", {-1: 10}, "index -1 lies outside"),
        ("query", {0: 999}, "no token with the id 999"),
        ("query", {0: tiny_chat.tiny_tokenizer().convert_tokens_to_ids("h")}, "already"),
        ("history", {0: 10}, "does not exist"),
        ("nonsense", {0: 10}, "span 'nonsense' does not exist"),
    ],
)
def test_impossible_replacements_are_refused(span, new, message):
    with pytest.raises(LensError, match=message):
        perturbed_prompt(CHAT.render("hello"), span, new)


# ---------------------------------------------------------------- draws


def drawn(prompt, span="prefix", choices=ORDINARY, **kwargs):
    return draw_replacements(prompt, span, choices, **{"n_tokens": 4} | kwargs)


def test_the_prefix_is_perturbed_alike_for_all_prompts_and_the_query_for_each_anew():
    a, b = CHAT.render("what is it now"), CHAT.render("what is it here")
    assert drawn(a) == drawn(b)
    assert drawn(a, "postfix") == drawn(b, "postfix")
    assert drawn(a, "query", n_tokens=9) != drawn(b, "query", n_tokens=9)
    assert drawn(a, "query") == drawn(CHAT.render("what is it now"), "query")


def test_trials_and_seeds_differ_and_repeat():
    prompt = CHAT.render("what is it now")
    table = {(seed, trial): drawn(prompt, seed=seed, trial=trial) for seed in range(3) for trial in range(10)}
    assert len({tuple(new.items()) for new in table.values()}) == 30
    assert all(drawn(prompt, seed=s, trial=t) == new for (s, t), new in table.items())


def test_every_place_and_every_neighbour_comes_up_equally_often():
    """Chi squared of 3,000 draws, against places and choices that are equally likely."""
    prompt = CHAT.render("what is it")
    n, span = 3000, prompt.span("prefix")
    table = {i: [t for t in ORDINARY if t != i][:5] for i in range(tiny_chat.VOCAB)}
    places, choices = np.zeros(len(span)), np.zeros(5)
    for trial in range(n):
        ((place, token),) = drawn(prompt, choices=table, n_tokens=1, trial=trial).items()
        places[place] += 1
        choices[table[prompt.ids[span.start + place]].index(token)] += 1
    for counts in (places, choices):
        expected = n / len(counts)
        degrees = len(counts) - 1
        assert ((counts - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


def test_the_control_replaces_the_same_places():
    prompt = CHAT.render("what is it")
    near = {i: [t for t in ORDINARY if t != i][:2] for i in range(tiny_chat.VOCAB)}
    for trial in range(10):
        a, b = drawn(prompt, choices=near, trial=trial), drawn(prompt, trial=trial)
        assert a.keys() == b.keys()
    assert all(drawn(prompt, choices=near, trial=t) != drawn(prompt, trial=t) for t in range(10))


def test_protected_tokens_stay():
    prompt = CHAT.render("what is it")
    special = added_ids(CHAT.tokenizer)
    new = drawn(prompt, n_tokens=99, protected=special)
    span = prompt.span("prefix")
    expected = {i for i, token in enumerate(prompt.ids[: span.stop]) if token not in special}
    assert set(new) == expected
    assert set(drawn(prompt, n_tokens=99)) == set(range(len(span)))
    with pytest.raises(LensError, match="all 1 tokens of the span 'bos' are special"):
        drawn(prompt, "bos", protected=special)


# ---------------------------------------------------------------- another query


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_an_exchanged_query_has_the_ids_that_rendering_gives(family, kind):
    chat = ChatFormat(make_tokenizer(family, kind), date=DATE if family in ("llama3", "harmony") else None)
    for old in ("Why is the sky blue?", "7", "\n\nhello"):
        for query in ("How do I boil an egg?", "42 eggs", "<odd> one", "é"):
            new, wanted = with_query(chat.render(old), query), chat.render(query)
            assert (new.ids, new.query, new.text) == (wanted.ids, wanted.query, wanted.text)
            # A query that merges with the template shortens the spans that all queries share.
            if old != "\n\nhello":
                assert {n: s for n, s in new.spans.items() if len(s)} == {
                    n: s for n, s in wanted.spans.items() if len(s)
                }


def test_sub_spans_move_with_an_exchanged_query():
    chat = ChatFormat(make_tokenizer("qwen3"), thinking=False, system="Be kind.")
    new = with_query(chat.render("Why?"), "What is the capital of France?")
    assert new.span_text("think").strip() == "<think>\n\n</think>"
    assert new.span_text("system") == "Be kind."


def test_a_perturbed_prompt_is_not_tokenised_again():
    perturbed = perturbed_prompt(CHAT.render("hello"), "prefix", {3: 2})
    chat = ChatFormat(make_tokenizer("chatml"))
    split = chat.render("the the the")
    vocab = chat.tokenizer.get_vocab()
    pair_of_letters = next(t for t in sorted(vocab) if len(t) == 2 and t.isalpha() and t.isascii())
    letters = [vocab[c] for c in pair_of_letters]
    torn = perturbed_prompt(split, "query", {0: letters[0], 1: letters[1]})
    with pytest.raises(LensError, match="not those of its text"):
        with_query(torn, "hello")
    assert with_query(perturbed, "hey").ids[: len(perturbed.span("prefix"))] == perturbed.ids[:13]
    for bad in ("", " \n"):
        with pytest.raises(LensError, match="blank"):
            with_query(split, bad)
    with pytest.raises(LensError, match="response already"):
        with_query(split.with_response("yes"), "hello")


# ---------------------------------------------------------------- rephrasings


def test_rephrasings_are_read_from_three_formats(tmp_path):
    wanted = {"one?": ("first", "second"), "two": ("third",)}
    (tmp_path / "a.json").write_text(json.dumps({"one?": [" first", "second "], "two": "third"}))
    lines = [{"prompt": "one?", "rephrasings": ["first"]}, {"prompt": "two", "rephrasings": ["third"]}]
    lines.append({"prompt": "one? ", "rephrasings": ["second"]})
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    (tmp_path / "a.txt").write_text("\ufeffone?\r\nfirst\r\nsecond\r\n\r\n\r\ntwo\n third\n", encoding="utf-8")
    for name in ("a.json", "a.jsonl", "a.txt"):
        assert load_rephrasings(tmp_path / name) == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", "has .csv suffix"),
        ("a.json", "[1]", "holds a list, expected one object"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": []}', "expected a list of at least one"),
        ("a.json", '{"a": 3}', "expected a list of at least one"),
        ("a.json", '{"a": ["b", " "]}', "' ' is no rephrasing"),
        ("a.json", "{}", "holds no rephrasings"),
        ("a.jsonl", '{"prompt": "a", "rephrasings": ["b"]}\n{"prompt": "a"}', "line 2: expected"),
        ("a.jsonl", "{}\n{", "line 1: expected"),
        ("a.jsonl", '{"prompt": " ", "rephrasings": ["b"]}', "the prompt is ' '"),
        ("a.txt", "alone\n\nq\nr\n", "line 1: expected a list of at least one"),
        ("a.txt", "\n \n", "holds no rephrasings"),
    ],
)
def test_broken_files_of_rephrasings_are_refused_with_their_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(LensError, match=message):
        load_rephrasings(tmp_path / name)


def test_a_missing_file_of_rephrasings_is_named(tmp_path):
    with pytest.raises(LensError, match=r"none\.json does not exist"):
        load_rephrasings(tmp_path / "none.json")


# ---------------------------------------------------------------- the experiment


def test_every_answer_is_that_of_generate_on_the_perturbed_prompt(pair):
    topics = {"off-topic": prompts(), "on-topic": prompts(["one", "two words"])}
    rephrased = {q: [q + " please", "so " + q, "oh"] for q in [*QUERIES, "one", "two words"]}
    result = run(pair, prompts=topics, rephrasings=rephrased)
    counts = {"base": 1, "unperturbed": 1, "neighbours": 3 * 2, "random tokens": 3 * 2, "rephrased": 3}
    for kind, count in counts.items():
        assert sum(row["kind"] == kind for row in result.rows) == 6 * count
    with pair.using("finetuned") as model:
        near = nearest_neighbours(model.W_E, range(tiny_chat.VOCAB), ORDINARY, 3)
        for row in result.rows:
            prompt = topics[row["topic"]][row["index"]]
            if row["kind"] in ("neighbours", "random tokens"):
                choices = near if row["kind"] == "neighbours" else ORDINARY
                new = draw_replacements(prompt, row["span"], choices, n_tokens=4, trial=row["trial"])
                prompt = perturbed_prompt(prompt, row["span"], new)
                assert row["n_replaced"] == len(new) == min(4, row["n_span"])
            elif row["kind"] == "rephrased":
                prompt = CHAT.render(rephrased[prompt.query][row["trial"]])
            elif row["kind"] == "base":
                continue
            (answer,) = generate(model, [prompt], max_new_tokens=4)
            assert (row["text"], row["response"]) == (prompt.text, answer.text)
            assert row["value"] == len(answer.text)
            assert row["prompt"] == topics[row["topic"]][row["index"]].query
    with pair.using("base") as model:
        answers = generate(model, prompts(), max_new_tokens=4)
    stored = {r["index"]: r["response"] for r in result.rows if (r["topic"], r["kind"]) == ("off-topic", "base")}
    assert [a.text for a in answers] == [stored[i] for i in range(4)]


@pytest.mark.parametrize(("batch_size", "calls_wanted"), [(4, 1 + 1 + 2 * 2), (40, 1 + 1 + 1)])
def test_a_prefix_of_many_prompts_is_shared_and_the_others_fill_batches_together(
    pair, monkeypatch, batch_size, calls_wanted
):
    calls = []
    real = answering.generate

    def counting(model, chosen, **kwargs):
        calls.append({p.ids[: p.span("prefix").stop] for p in chosen})
        return real(model, chosen, **kwargs)

    monkeypatch.setattr(answering, "generate", counting)
    run(pair, batch_size=batch_size)
    # Base; finetuned with the prefix as it is (references, query and postfix); two kinds x two trials, or all in one.
    assert len(calls) == calls_wanted
    assert [len(prefixes) for prefixes in calls[:2]] == [1, 1]


def test_neither_batch_size_nor_order_changes_an_answer(pair):
    def table(result, order=range(4)):
        where = dict(enumerate(order))
        return {(r["span"], r["kind"], r["trial"], where[r["index"]]): (r["text"], r["response"]) for r in result.rows}

    whole = table(run(pair))
    assert table(run(pair, batch_size=1)) == whole
    assert table(run(pair, batch_size=3, prompts=prompts()[::-1]), order=[3, 2, 1, 0]) == whole
    alone = table(run(pair, prompts=prompts()[2:3]), order=[2])
    assert alone.items() <= whole.items()


def test_another_seed_perturbs_otherwise_and_leaves_the_references(pair):
    a, b = run(pair), run(pair, seed=1)
    rows = list(zip(a.rows, b.rows, strict=True))
    assert all(x == y for x, y in rows if x["span"] == "")
    assert sum(x["text"] != y["text"] for x, y in rows if x["span"] == "prefix") == 16


def test_special_tokens_are_replaced_unless_they_are_kept(pair):
    special = [token for token in tiny_chat.SPECIAL if token != "<pad>"]

    def markers(result, span):
        return {sum(row["text"].count(token) for token in special) for row in result.rows if row["span"] == span}

    everything = run(pair, spans=["prefix", "postfix"], n_tokens=99)
    assert markers(everything, "prefix") == {2}  # <end> and <bot> of the postfix
    kept = run(pair, spans=["prefix", "postfix"], n_tokens=99, keep_special=True)
    assert markers(kept, "prefix") == {6}
    assert {r["n_replaced"] for r in kept.rows if r["span"] == "prefix"} == {13 - 4}
    with pytest.raises(LensError, match="'bos' are special"):
        run(pair, spans=["bos"], keep_special=True)
    loose = run(pair, spans=["prefix"], n_tokens=99, trials=6, special_candidates=True)
    assert len(markers(loose, "prefix")) > 1


def test_the_base_can_be_perturbed_too(pair):
    result = run(pair, side="base", spans=["prefix"], random_control=False)
    new = draw_replacements(
        prompts()[0],
        "prefix",
        nearest_neighbours(_embeddings(pair, "base"), range(tiny_chat.VOCAB), ORDINARY, 3),
        n_tokens=4,
    )
    with pair.using("base") as model:
        (answer,) = generate(model, [perturbed_prompt(prompts()[0], "prefix", new)], max_new_tokens=4)
    assert result.rows[8]["kind"] == "neighbours"
    assert result.rows[8]["response"] == answer.text
    assert set(result.to_frame()["kind"]) == {"base", "unperturbed", "best", "average"}


def _embeddings(pair, side):
    with pair.using(side) as model:
        return model.W_E.detach()


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_identical_rows_without_doing_anything_twice(pair, tmp_path, monkeypatch):
    whole = run(pair, out=tmp_path / "whole")
    real, calls = run_module.append_jsonl, []

    def dying(path, rows):
        calls.append(path)
        if len(calls) == 3:
            raise Killed
        return real(path, rows)

    monkeypatch.setattr(run_module, "append_jsonl", dying)
    with pytest.raises(Killed):
        run(pair, out=tmp_path / "cut")
    monkeypatch.setattr(run_module, "append_jsonl", real)
    file = tmp_path / "cut" / "rows.jsonl"
    before = file.read_text()
    assert 0 < len(before.splitlines()) < len(whole.rows)
    file.write_text(before + '{"topic": "prom')
    resumed = run(pair, out=tmp_path / "cut", batch_size=3)
    assert resumed.rows == whole.rows
    assert file.read_text().startswith(before)
    assert len(file.read_text().splitlines()) == len(whole.rows)
    monkeypatch.setattr(answering, "generate", lambda *args, **kwargs: pytest.fail("nothing is left to generate"))
    assert run(pair, out=tmp_path / "cut").rows == whole.rows


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"n_tokens": 3}, "n_tokens"),
        ({"seed": 1}, "seed"),
        ({"keep_special": True}, "keep_special"),
        ({"rephrasings": dict.fromkeys(QUERIES, "ah")}, "rephrasings"),
        ({"prompts": prompts(["other", *QUERIES[1:]])}, "prompts"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_name(pair, tmp_path, change, name):
    run(pair, out=tmp_path)
    with pytest.raises(LensError, match=rf"belongs to another run: {name}[\w. ]* is .* there, .* here"):
        run(pair, out=tmp_path, **change)


def test_a_folder_of_other_models_or_behaviours_is_refused(pair, tmp_path):
    run(pair, out=tmp_path)
    swapped = ModelPair(pair._models["finetuned"], pair._models["base"], tokenizer=pair.tokenizer)
    with pytest.raises(LensError, match="another base model"):
        run(swapped, out=tmp_path)
    with pytest.raises(LensError, match=r"another run: behaviour\.name is 'letters' there, 'words' here"):
        perturb(pair, prompts(), "words", PerturbSettings(**SMALL), out=tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(LensError, match=r"holds rows\.jsonl and no run\.json"):
        run(pair, out=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 0}, "PerturbSettings.n_tokens is 0; expected at least 1"),
        ({"trials": 0}, "PerturbSettings.trials is 0; expected at least 1"),
        ({"top": 0}, "PerturbSettings.top is 0; expected at least 1"),
        ({"top": 32}, "top 32 neighbours asked of 32"),
        ({"spans": ["prefix", "nonsense"]}, "prompts, prompt 0: span 'nonsense' does not exist"),
        ({"spans": ["history"]}, "span 'history' does not exist"),
        ({"spans": []}, r"spans is \(\); expected different span names"),
        ({"spans": ["query", "query"]}, r"spans is \('query', 'query'\); expected different span names"),
        ({"side": "other"}, "PerturbSettings.side is 'other'; expected one of base, finetuned"),
        ({"prompts": []}, "got no prompts"),
        ({"prompts": {}}, "got no prompts"),
        ({"prompts": {"off-topic": []}}, "got no prompts for the topic 'off-topic'"),
        ({"prompts": [CHAT.render("hello"), CHAT.render("")]}, "prompts, prompt 1: span 'query' is empty"),
        ({"prompts": [CHAT.render("a", response="b")]}, "prompt 0 holds a response already"),
        ({"rephrasings": {"hello there": ["hi"], "why not": ["no"]}}, "2 of 4 .* 'what is it', 'tell me more'"),
        ({"rephrasings": {}}, "4 of 4 prompts have no rephrasing"),
        ({"rephrasings": dict.fromkeys(QUERIES, "a"), "spans": ["prefix"]}, "add 'query'"),
        ({"max_new_tokens": 0}, "PerturbSettings.max_new_tokens is 0; expected at least 1"),
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


def test_a_span_may_be_named_alone():
    assert PerturbSettings(spans="prefix").spans == ("prefix",)


# ---------------------------------------------------------------- statistics

BASE, TUNED = [40.0, 42.0, 38.0, 41.0], [10.0, 12.0, 8.0, 11.0]
TRIALS = [[10.0, 30.0], [20.0, 15.0], [9.0, None], [11.0, 41.0]]
RANDOMS = [[12.0, 13.0], [14.0, 12.0], [8.0, 9.0], [11.0, 15.0]]


def fabricated(base=BASE, tuned=TUNED, sign=1.0):
    columns = {("", "base"): [[b] for b in base], ("", "unperturbed"): [[t] for t in tuned]}
    columns |= {("query", "neighbours"): TRIALS, ("query", "random tokens"): RANDOMS}
    columns |= {("query", "rephrased"): [[1.0, 3.0, 5.0], [2.0], [4.0, 4.0], [None]]}
    rows = [
        {
            **{"topic": "off-topic", "span": span, "kind": kind, "trial": trial, "index": index},
            "n_replaced": None if kind == "rephrased" else (4 if index else 2) if span else 0,
            "value": None if value is None else sign * value,
        }
        for (span, kind), table in columns.items()
        for index, values in enumerate(table)
        for trial, value in enumerate(values)
    ]
    settings = {"n": {"off-topic": 4}, "spans": ["prefix", "query"], "seed": 0, "n_tokens": 4, "side": "finetuned"}
    settings |= {"behaviour": {"name": "words", "label": "words", "unit": "words"}, "names": {"finetuned": "tuned"}}
    return PerturbResult(rows, settings)


def test_best_and_average_are_those_worked_out_by_hand():
    result = fabricated()
    frame = result.to_frame().set_index(["span", "kind"])
    assert list(frame.index) == [
        ("", "base"), ("", "unperturbed"), ("query", "best"), ("query", "average"),
        ("query", "random tokens, best"), ("query", "random tokens, average"), ("query", "rephrased"),
    ]  # fmt: skip
    assert frame["value"].to_dict() == {
        ("", "base"): 40.25,
        ("", "unperturbed"): 10.25,
        ("query", "best"): (30 + 20 + 9 + 41) / 4,
        ("query", "average"): (20 + 17.5 + 9 + 26) / 4,
        ("query", "random tokens, best"): (13 + 14 + 9 + 15) / 4,
        ("query", "random tokens, average"): (12.5 + 13 + 8.5 + 13) / 4,
        ("query", "rephrased"): (3 + 2 + 4) / 3,
    }
    assert frame.loc[("query", "best"), "recovery"] == pytest.approx((25 - 10.25) / 30)
    assert frame.loc[("query", "average"), "recovery"] == pytest.approx((18.125 - 10.25) / 30)
    assert frame.loc[("query", "rephrased"), "n"] == 3
    assert set(frame["best_is"]) == {"max"}
    assert frame.loc[("query", "best"), ["n_replaced", "n_short"]].tolist() == [3.5, 1]
    assert math.isnan(frame.loc[("query", "rephrased"), "n_replaced"])
    assert frame.loc[("", "base"), ["n_replaced", "n_short", "reason"]].tolist() == [0, 0, ""]


def test_intervals_are_paired_over_prompts():
    frame = fabricated().to_frame().set_index(["span", "kind"])
    best = [30.0, 20.0, 9.0, 41.0]
    mean, own = mean_interval(best), recovery(best, TUNED, BASE)
    row = frame.loc[("query", "best")]
    assert (row["low"], row["high"]) == (mean.low, mean.high)
    assert (row["recovery_low"], row["recovery_high"]) == (own.low, own.high)


def test_the_best_trial_is_the_lowest_where_the_base_is_below():
    result = fabricated(sign=-1.0)
    assert result.best_is("off-topic") == "min"
    assert result.per_prompt("off-topic", "query", "best").tolist() == [-30, -20, -9, -41]
    # The values turned round, the recovery is the same.
    ours, other = (r.to_frame()["recovery"] for r in (result, fabricated()))
    np.testing.assert_allclose(ours, other)


def test_no_trial_is_the_best_where_base_and_finetuned_are_equal():
    frame = fabricated(base=TUNED).to_frame().set_index(["span", "kind"])
    assert math.isnan(frame.loc[("query", "best"), "value"])
    assert "no trial is the best" in frame.loc[("query", "best"), "reason"]
    assert frame.loc[("query", "average"), "value"] == 18.125
    assert "do not differ beyond noise" in frame.loc[("query", "average"), "reason"]


def test_a_missing_value_is_missing_and_not_zero(pair):
    missing = Behaviour("odd", "odd", "odd", "missing where the answer is short", lambda text: math.nan)
    result = perturb(pair, prompts(), missing, PerturbSettings(spans=["prefix"], **SMALL))
    assert {row["value"] for row in result.rows} == {None}
    frame = result.to_frame()
    assert frame["value"].isna().all()
    assert set(frame["n"]) == {0}


# ---------------------------------------------------------------- files and figures


def test_a_saved_result_is_read_back_whole(pair, tmp_path):
    result = run(pair, rephrasings=dict.fromkeys(QUERIES, "</script>\u2028é"))
    path = result.save(tmp_path / "deep" / "result.json")
    again = PerturbResult.load(path)
    assert dataclasses.asdict(again) == dataclasses.asdict(result)
    assert again.to_frame().equals(result.to_frame())
    assert len(again.generations()) == len(result.rows)
    assert result.settings["behaviour"] == {"name": "letters", "label": "letters per answer", "unit": "letters"}
    path.write_text("[]")
    with pytest.raises(LensError, match=r"says no format.*no PerturbResult"):
        PerturbResult.load(path)


def test_the_figure_shows_every_span(pair):
    result = run(pair, prompts={"off-topic": prompts(), "on-topic": prompts(["one", "two", "three"])})
    shown = result.figure().to_json()
    for word in ("prefix", "query", "postfix", "random tokens, best", "off-topic", "on-topic", "letters per answer"):
        assert word in shown
