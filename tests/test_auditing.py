"""The main job on tiny models: conditions, resuming, verdicts, files."""

import collections
import dataclasses
import json
import math

import pytest
import tiny_chat
import tiny_models
import torch
from tiny_hooked import BACKENDS

import piggyback_lens.experiments.audit_maps as audit_maps
import piggyback_lens.experiments.treatments as treatments_module
from piggyback_lens.app.summary import table
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.audit import CONDITIONS, AuditResult, audit
from piggyback_lens.experiments.audit_maps import audit_parts
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.intervals import recovery
from piggyback_lens.interventions.donors import kv_patch
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.measuring.generation import generate
from piggyback_lens.measuring.measures import Behaviour, get_behaviour
from piggyback_lens.measuring.sampling import Sampling
from piggyback_lens.models.pair import ModelPair, hook_model
from piggyback_lens.reading.questions import Question
from piggyback_lens.settings import AuditSettings

QUERIES = ["hello there", "what is it", "tell me more", "why not", "a"]
SETTINGS = AuditSettings(max_new_tokens=5, batch_size=3, curve_prompts=4, curve_tokens=3, control_layers=2, map_bands=0)
MAPPED = dataclasses.replace(SETTINGS, map_bands=1)
LETTERS = Behaviour("letters", "letters per answer", "letters", "length", len)


def tiny_pair(seeds=(0, 1), backend="bridge"):
    tokenizer = tiny_chat.tiny_tokenizer()
    models = [
        hook_model(tiny_models.build("llama-gqa", seed, vocab=len(tokenizer)), tokenizer, backend=backend)
        for seed in seeds
    ]
    return ModelPair(*models, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=BACKENDS)
def pair(request):
    return tiny_pair(backend=request.param)


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.tiny_format()


def run(pair, chat, out=None, **kwargs):
    fields = {"settings": SETTINGS, "chat": chat} | kwargs
    return audit(pair, QUERIES[:3], QUERIES, LETTERS, out=out, **fields)


def test_every_condition_has_every_prompt_and_the_answers_are_those_of_generate(pair, chat, tmp_path):
    result = run(pair, chat, tmp_path)
    counts = {(r["topic"], r["condition"]): 0 for r in result.rows}
    for row in result.rows:
        counts[row["topic"], row["condition"]] += 1
        assert row["value"] == len(row["response"])
    assert counts == {(t, c): {"off-topic": 5, "on-topic": 3}[t] for t in ("off-topic", "on-topic") for c in CONDITIONS}
    prompts = [chat.render(query) for query in QUERIES]
    with pair.using("finetuned") as model:
        direct = generate(
            model,
            prompts,
            interventions=kv_patch(pair, "query", chat=chat, prompts=prompts),
            max_new_tokens=5,
            share_prefix=False,
        )
    wanted = ("off-topic", "query_control")
    by_index = {r["index"]: r["ids"] for r in result.rows if (r["topic"], r["condition"]) == wanted}
    assert [list(g.ids) for g in direct] == [by_index[i] for i in range(5)]


def test_the_identity_control_repeats_the_finetuned_answers_exactly(pair, chat):
    assert run(pair, chat).identical == (8, 8)


def test_recovery_of_the_result_is_that_of_its_rows(pair, chat):
    result = run(pair, chat)
    mine = result.recovery("prefix")
    direct = recovery(*(result.values("off-topic", c) for c in ("prefix", "finetuned", "base")))
    assert (mine.value == direct.value) or (math.isnan(mine.value) and mine.reason == direct.reason)


class Killed(Exception):
    pass


def test_a_killed_audit_resumes_to_the_same_result_without_doing_anything_twice(pair, chat, tmp_path, monkeypatch):
    import piggyback_lens.results.run as run_module

    whole = run(pair, chat, tmp_path / "whole")
    real, calls = run_module.append_jsonl, []

    def dying(path, rows):
        calls.append(len(list(rows)))
        if len(calls) == 6:
            raise Killed
        return real(path, rows)

    monkeypatch.setattr(run_module, "append_jsonl", dying)
    with pytest.raises(Killed):
        run(pair, chat, tmp_path / "cut")
    done = len((tmp_path / "cut" / "rows.jsonl").read_text().splitlines())
    assert 0 < done < len(whole.rows)
    monkeypatch.setattr(run_module, "append_jsonl", real)
    resumed = run(pair, chat, tmp_path / "cut")
    assert resumed.rows == whole.rows
    assert len((tmp_path / "cut" / "rows.jsonl").read_text().splitlines()) == len(whole.rows)
    assert resumed.curve.cells == whole.curve.cells
    assert resumed.verdict == whole.verdict


def test_a_folder_of_another_audit_is_refused_by_name_of_what_differs(pair, chat, tmp_path):
    run(pair, chat, tmp_path)
    other = AuditSettings(max_new_tokens=6, batch_size=3, curve_prompts=0)
    with pytest.raises(LensError, match=r"belongs to another run: settings\.max_new_tokens is 5 there, 6 here"):
        run(pair, chat, tmp_path, settings=other)
    with pytest.raises(LensError, match="another base model"):
        run(tiny_pair((2, 1), pair.backend), chat, tmp_path)


def test_files_are_complete_and_the_prefix_cache_is_the_repair(pair, chat, tmp_path):
    from piggyback_lens.interventions.prefix import PrefixCache

    result = run(pair, chat, tmp_path, settings=MAPPED)
    path = tmp_path / "report.html"  # the audit's own
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "."} == {
        "run.json", "rows.jsonl", "receipts.jsonl", "layer_curve", "carrier", "attribution", "result.json",
        "report.html", "prefix_cache",
    }  # fmt: skip
    facts = json.loads((tmp_path / "result.json").read_text())
    assert facts["verdict"] == result.verdict
    assert len(facts["summary"]) == 14
    assert facts["card"]["template"]["fingerprint"] == chat.fingerprint
    assert result.verdict.split(":")[0] in path.read_text()
    prompts = [chat.render(query) for query in QUERIES]
    with pair.using("finetuned") as model:
        cache = PrefixCache.load(tmp_path / "prefix_cache", model=model, prompt=prompts[0])
        again = generate(model, prompts, prefix_cache=cache, max_new_tokens=5)
    stored = {r["index"]: r["ids"] for r in result.rows if (r["topic"], r["condition"]) == ("off-topic", "prefix")}
    assert [list(g.ids) for g in again] == [stored[i] for i in range(5)]
    assert table(result).row_count == 14


def test_a_map_that_the_model_does_not_allow_is_named_and_costs_the_audit_nothing(pair, chat, monkeypatch):
    def refused(*args, **kwargs):
        raise LensError("no gradient flows here")

    monkeypatch.setattr(audit_maps, "attribution_map", refused)
    result = run(pair, chat, settings=MAPPED)
    assert (result.positions, result.carrier is None) == (None, False)
    assert "The layer x token map was left out: no gradient flows here" in result.report().notes


def contrasts(prefix, postfix):
    """A carrier map whose prefix and postfix restore these shares of a contrast of 1."""
    shares = {"prefix": prefix, "query": 0.0, "postfix": postfix}
    labels = {"series": "patched", "flow": "repair", "sites": "k+v", "band": "all layers", "layers": [0]}
    noise = [-0.05, 0.05, -0.02, 0.02]
    values = [[1 - share + x / 4 for x in noise] for share in shares.values()]
    cells = tuple({**labels, "span": span} for span in shares)
    base, tuned = noise, [1 + x for x in noise]
    return PatchResult("carrier", cells, values, base, tuned, {"name": "answer contrast", "unit": "nats per token"})


def test_both_measures_stand_side_by_side_and_it_is_said_where_they_disagree():
    found = fabricated(noisy(60), noisy(20, seed=1), noisy(50, seed=2), postfix=noisy(30, seed=3))
    apart = dataclasses.replace(found, carrier=contrasts(prefix=0.2, postfix=0.6))
    parts = {part.heading: part for part in audit_parts(apart)}
    table = parts["Two measures"].table.set_index("base's K/V of the")
    free, forced = table.columns
    assert free == "words per answer, free answers (n = 30)"
    assert forced == "teacher-forced contrast (n = 4)"
    assert [text.partition(" %")[0] for text in table[forced]] == ["20", "60", "0"]
    assert int(table.loc["prefix", free].partition(" %")[0]) > int(table.loc["postfix", free].partition(" %")[0])
    assert "in free answers the prefix restores more, teacher-forced the postfix" in parts["Two measures"].texts[-1]
    alike = dataclasses.replace(found, carrier=contrasts(prefix=0.6, postfix=0.2))
    assert audit_parts(alike)[0].texts[-1] == "Here both put the prefix first."
    near = dataclasses.replace(found, carrier=contrasts(prefix=0.31, postfix=0.3))
    assert "Teacher-forced the two intervals overlap: that order may be chance." in audit_parts(near)[0].texts[-1]
    assert audit_parts(found) == []


def fabricated(base, tuned, prefix, **others):
    """A result with given values, for the verdict."""
    values = {"base": base, "finetuned": tuned, "prefix": prefix, "postfix": tuned, "both": prefix}
    values |= {"identity": tuned, "query_control": tuned} | others
    rows = [
        {"topic": topic, "condition": c, "index": i, "value": v, "ids": [], "response": "", "prompt": ""}
        for topic in ("off-topic", "on-topic")
        for c, column in values.items()
        for i, v in enumerate(column)
    ]
    card = {"settings": {"seed": 0}, "names": {"base": "b", "finetuned": "f"}}
    return AuditResult(rows, get_behaviour("words"), None, card)


def noisy(mean, n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (mean + torch.randn(n, generator=generator)).tolist()


def test_the_verdict_follows_from_the_intervals():
    carried = fabricated(noisy(60), noisy(20, seed=1), noisy(40, seed=2)).verdict
    assert carried.startswith("Spread found")
    assert "the prefix carries 50 % [" in carried
    assert fabricated(noisy(60), noisy(60, seed=1), noisy(60, seed=2)).verdict.startswith("No spread found")
    nothing = fabricated(noisy(60), noisy(20, seed=1), noisy(20, seed=2)).verdict
    assert "the prefix carries none of it that can be told from noise" in nothing
    assert fabricated([1.0, 2.0], [3.0, 4.0], [1.0, 1.0]).verdict.startswith("No verdict: only 2")


def test_too_few_prompts_are_refused(pair, chat):
    with pytest.raises(LensError, match="2 on-topic questions given, an interval needs at least 3"):
        audit(pair, QUERIES[:2], QUERIES, LETTERS, chat=chat, settings=SETTINGS)


# ---------------------------------------------------------------- questions, samples

ASKED = [
    Question("hi", ["hello there", "hello"], samples=3),
    Question("what", ["what is it"], system="be kind"),
    Question("more", ["tell me more"]),
    "why not",
]
SAMPLED = AuditSettings(
    max_new_tokens=5,
    batch_size=4,
    samples=2,
    temperature=1.0,
    curve_prompts=3,
    curve_tokens=3,
    control_layers=1,
    map_bands=0,
)


def sampled(pair, chat, out=None, **changes):
    return audit(pair, ASKED, ASKED, LETTERS, dataclasses.replace(SAMPLED, **changes), chat=chat, out=out)


def test_every_sample_of_every_paraphrase_is_a_row_with_its_question(pair, chat, tmp_path):
    result = sampled(pair, chat, tmp_path)
    rows = [row for row in result.rows if (row["topic"], row["condition"]) == ("off-topic", "prefix")]
    assert [(row["question"], row["prompt"], row["sample"]) for row in rows] == [
        (name, text, sample)
        for name, text in (
            ("hi", "hello there"), ("hi", "hello"), ("what", "what is it"), ("more", "tell me more"), ("q1", "why not")
        )
        for sample in (0, 1)
    ]  # fmt: skip
    assert result.mean("off-topic", "base").n == 4
    assert result.identical == (20, 20)
    assert AuditResult.load(tmp_path).verdict == result.verdict


def test_sampled_answers_are_those_of_single_calls_with_the_question_s_own_system_text(pair, chat):
    rows = {
        (row["question"], row["prompt"], row["sample"]): row["ids"]
        for row in sampled(pair, chat).rows
        if (row["topic"], row["condition"]) == ("off-topic", "prefix")
    }
    kind = dataclasses.replace(chat, system="be kind")
    for own, query, name in ((chat, "hello", "hi"), (kind, "what is it", "what")):
        prompt = own.render(query)
        with pair.using("finetuned") as model:
            cache = PrefixCache.compile(pair, prompt, side="base")
            for sample in (0, 1):
                (answer,) = generate(
                    model, [prompt], samples=[sample], prefix_cache=cache, sampling=Sampling(1.0), max_new_tokens=5
                )
                assert list(answer.ids) == rows[name, query, sample]


def test_a_killed_audit_goes_on_sample_by_sample(pair, chat, tmp_path, monkeypatch):
    import piggyback_lens.results.run as run_module

    whole, real, calls = sampled(pair, chat, tmp_path / "whole"), run_module.append_jsonl, []

    def dying(path, rows):
        calls.append(path)
        if len(calls) == 8:
            raise Killed
        return real(path, rows)

    monkeypatch.setattr(run_module, "append_jsonl", dying)
    with pytest.raises(Killed):
        sampled(pair, chat, tmp_path / "cut")
    monkeypatch.setattr(run_module, "append_jsonl", real)
    assert sampled(pair, chat, tmp_path / "cut").rows == whole.rows


def test_as_many_samples_as_the_file_asks_for(pair, chat):
    rows = [r for r in sampled(pair, chat, samples=0, curve_prompts=0).rows if r["condition"] == "base"]
    counts = collections.Counter(row["question"] for row in rows if row["topic"] == "off-topic")
    assert counts == {"hi": 6, "what": 1, "more": 1, "q1": 1}


def test_several_samples_of_a_greedy_answer_are_refused():
    with pytest.raises(LensError, match="samples is 2 at temperature 0"):
        AuditSettings(samples=2)


def test_cut_answers_are_counted_and_make_means_of_words_lower_bounds(pair, chat):
    result = audit(pair, QUERIES[:3], QUERIES, "words", SETTINGS, chat=chat)
    table = result.to_frame()
    ended = [row["ended"] for row in result.rows if (row["topic"], row["condition"]) == ("off-topic", "base")]
    cut, answers = table.loc[(table["topic"] == "off-topic") & (table["condition"] == "base"), ["cut", "answers"]].iloc[
        0
    ]
    assert (cut, answers) == (ended.count("length"), 5)
    assert cut > 0
    assert "lower bounds" in result.verdict or result.verdict.startswith("No verdict")


# ---------------------------------------------------------------- answers made elsewhere


def written_answers(rows, path, **changes):
    keys = ("condition", "topic", "question", "sample", "prompt", "response", "ended")
    path.write_text("".join(json.dumps({key: row[key] for key in keys} | changes) + "\n" for row in rows))
    return path


def test_answers_made_elsewhere_stand_in_the_rows_and_are_not_generated(pair, chat, tmp_path, monkeypatch):
    whole = sampled(pair, chat, curve_prompts=0)
    made = [row for row in whole.rows if row["condition"] in ("base", "finetuned")]
    files = [written_answers(made, tmp_path / "answers.jsonl")]
    asked = []
    real = treatments_module.generate
    monkeypatch.setattr(treatments_module, "generate", lambda *a, **k: asked.append(len(a[1])) or real(*a, **k))
    settings = dataclasses.replace(SAMPLED, curve_prompts=0)
    found = audit(pair, ASKED, ASKED, LETTERS, settings, chat=chat, answers=files, out=tmp_path / "run")
    assert sum(asked) == 5 * 2 * 5 * 2  # conditions x topics x prompts x samples
    assert [row["response"] for row in found.rows] == [row["response"] for row in whole.rows]
    assert {row.get("made") for row in found.rows if row["condition"] == "base"} == {"elsewhere"}
    assert found.verdict == whole.verdict


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": "other"}, "question 'other', sample 0 is none of the questions"),
        ({"sample": 7}, "sample 7 is none of the questions"),
        ({"prompt": "something else"}, "is none of the questions"),
        ({"condition": "patched"}, "condition 'patched'; expected one of base, finetuned"),
        ({"response": 3}, "is no answer"),
    ],
)
def test_answers_that_fit_no_question_are_refused_before_anything_is_generated(pair, chat, tmp_path, changes, words):
    row = {"condition": "base", "topic": "off-topic", "question": "more", "sample": 0, "prompt": "tell me more"}
    file = written_answers([{**row, "response": "yes", "ended": "stop"}], tmp_path / "a.jsonl", **changes)
    with pytest.raises(LensError, match=words):
        audit(pair, ASKED, ASKED, LETTERS, SAMPLED, chat=chat, answers=[file])
