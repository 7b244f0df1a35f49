"""A gated adapter that was saved, as the finetuned side of a pair: every pass is as in its training."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_gated import adapted, by_hand, off_of, places
from tiny_chat import VOCAB, tiny_format, tiny_tokenizer

import piggyback_lens.models.proof as proof
from piggyback_lens import (
    AnswerContrast,
    AuditSettings,
    GatedAdapter,
    LensError,
    ModelPair,
    PrefixCache,
    SoftPatchSettings,
    adapter_off,
    applied,
    attach_adapter,
    attribution_map,
    audit,
    batch_prompts,
    edge_map,
    generate,
    kv_patch,
    layer_position_map,
    patch_span,
    response_log_probs,
    soft_patch,
)
from piggyback_lens.experiments.audit import CONDITIONS, AuditResult, verdict
from piggyback_lens.experiments.edges import _weights_and_gradients
from piggyback_lens.files import write_json
from piggyback_lens.models.gates import base_spans
from piggyback_lens.models.network import forward
from piggyback_lens.models.pair import Identity

QUERIES = ("hello", "what is it?", "a", "tell me a story", "why is that so?", "good morning")


def saved(folder: Path, off: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    GatedAdapter(adapted(), adapter_off("prefix") if off is None else off).save(folder)
    return folder


def loaded(folder: Path, **options: Any) -> ModelPair:
    base = tiny_models.build("llama-gqa", vocab=VOCAB)
    return ModelPair.load(base, adapter=folder, tokenizer=tiny_tokenizer(), progress=False, **options)


def prompts() -> list[Any]:
    return [tiny_format().render(query) for query in QUERIES]


def answers() -> tuple[list[Any], list[Any]]:
    both = (("yes it is", "no"), ("never", "always so"))
    one, other = ([tiny_format().render(q, response=own[i % 2]) for i, q in enumerate(QUERIES)] for own in both)
    return one, other


def slow(model: Any, rows: Any, spans: tuple[str, ...]) -> list[float]:
    """Mean log p of each response, one token at a time, the adapter switched by hand."""
    found = []
    for row in rows:
        logits = by_hand(model, row.ids, places(row, spans))[row.n_prompt - 1 : -1].log_softmax(-1)
        found.append(float(logits.gather(-1, torch.tensor(row.ids[row.n_prompt :])[:, None]).mean()))
    return found


@pytest.mark.parametrize("spans", [("prefix",), ("postfix",), ("prefix", "query"), ("prefix", "postfix")])
def test_scores_answers_and_caches_are_those_of_an_adapter_switched_by_hand(
    tmp_path: Path, spans: tuple[str, ...]
) -> None:
    pair, owner, rows = loaded(saved(tmp_path / "a", off_of(spans))), adapted(), answers()[0]
    with pair.using("finetuned") as model:
        scored = [float(x.mean()) for x in response_log_probs(model, rows)]
        made = generate(model, prompts(), max_new_tokens=5, batch_size=4)
        again = generate(model, prompts(), max_new_tokens=5, share_prefix=False)
        own = generate(model, prompts(), max_new_tokens=5, prefix_cache=PrefixCache.compile(pair, prompts()[0]))
    assert scored == pytest.approx(slow(owner, rows, spans), abs=1e-5)
    for prompt, answer in zip(prompts(), made, strict=True):
        ids = prompt.ids
        for token in answer.ids:
            assert int(by_hand(owner, ids, places(prompt, spans))[-1].argmax()) == token
            ids += (token,)
    assert [a.ids for a in made] == [a.ids for a in again] == [a.ids for a in own]
    on = ModelPair.load(finetuned=owner, tokenizer=tiny_tokenizer(), progress=False)
    with on.using("finetuned") as model:
        assert [float(x.mean()) for x in response_log_probs(model, rows)] != pytest.approx(scored, abs=1e-3)


def test_maps_and_attribution_see_it(tmp_path: Path) -> None:
    pair, owner, (towards, against) = loaded(saved(tmp_path / "a")), adapted(), answers()
    contrast, chat = AnswerContrast(tuple(towards), tuple(against)), tiny_format()
    found = patch_span(pair, prompts(), "query", measure=contrast, progress=False)
    plain = [a - b for a, b in zip(slow(owner, towards, ("prefix",)), slow(owner, against, ("prefix",)), strict=True)]
    assert found.finetuned == pytest.approx(plain, abs=1e-5)
    repair = kv_patch(pair, "query", chat=chat, prompts=prompts())
    with pair.using("finetuned") as model:
        one, other = (
            [float(x.mean()) for x in response_log_probs(model, rows, interventions=repair)]
            for rows in (towards, against)
        )
    cell = next(i for i, c in enumerate(found.cells) if c["series"] == "patched" and c["flow"] == "repair")
    assert found.values[cell] == pytest.approx([a - b for a, b in zip(one, other, strict=True)], abs=1e-5)

    cells = layer_position_map(pair, prompts(), span="prefix", measure=contrast, progress=False)
    for labels, values in zip(cells.cells, cells.values, strict=True):
        if labels["series"] == "patched":
            assert values == pytest.approx(cells.finetuned, abs=1e-5)
    assert cells.verdict.startswith("The adapter is off at the prefix")
    guessed = attribution_map(pair, prompts(), measure=contrast, span="postfix", progress=False)
    assert guessed.rank_correlation > 0.3
    with pytest.raises(AssertionError):
        assert found.finetuned == pytest.approx(slow(owner, towards, ()), abs=1e-3)


@pytest.mark.parametrize("span", ["prefix", "postfix"])
def test_edges_and_soft_patches_see_it(tmp_path: Path, span: str) -> None:
    pair, owner, (towards, against) = loaded(saved(tmp_path / "a", adapter_off(span))), adapted(), answers()
    contrast, base = AnswerContrast(tuple(towards), tuple(against)), tiny_models.build("llama-gqa", vocab=VOCAB)
    edges = edge_map(pair, prompts(), edges=[("query", "prefix")], exact_cells=6, measure=contrast, progress=False)
    plain = [a - b for a, b in zip(slow(owner, towards, (span,)), slow(owner, against, (span,)), strict=True)]
    assert edges.attributed.finetuned == pytest.approx(plain, abs=1e-5)
    batch, noise = batch_prompts(towards[:1]), torch.Generator().manual_seed(0)
    with pair.using("finetuned") as model:
        weights, gradient = _weights_and_gradients(model, batch)[1]
        little = 2e-3 * torch.randn(weights.shape, generator=noise) * (weights > 0)
        ends = []
        for sign in (1, -1):
            moved = [("blocks.1.attn.hook_pattern", lambda x, hook, sign=sign: x + sign * little)]
            with torch.no_grad(), applied(model, batch, ()), model.hooks(fwd_hooks=moved):
                logits = model(batch.ids)[0].double().log_softmax(-1)
            own = towards[0]
            ends.append(sum(float(logits[at - 1, own.ids[at]]) for at in range(own.n_prompt, len(own.ids))))
    slope = (ends[0] - ends[1]) / 2 / (len(own.ids) - own.n_prompt)
    assert float((gradient * little).sum()) == pytest.approx(slope, rel=0.05)
    settings = SoftPatchSettings(bands=1, steps=2, held_out=2)
    found = soft_patch(pair, prompts(), settings, measure=contrast, progress=False)
    expected = []
    for row in against[1::2]:
        tuned = by_hand(owner, row.ids, places(row, (span,)))[row.n_prompt - 1 : -1].double().log_softmax(-1)
        with torch.no_grad():
            before = base(torch.tensor([row.ids])).logits[0, row.n_prompt - 1 : -1].double().log_softmax(-1)
        expected.append(float((before.exp() * (before - tuned)).sum(-1).mean()))
    assert found.kl["finetuned"] == pytest.approx(expected, abs=1e-5)
    if span == "prefix":
        assert found.kl["whole prefix patched"] == pytest.approx(expected, abs=1e-5)


def test_an_audit_says_that_the_prefix_is_the_base_by_construction(tmp_path: Path) -> None:
    pair = loaded(saved(tmp_path / "a"))
    settings = AuditSettings(max_new_tokens=4, curve_prompts=4, map_bands=2)
    found = audit(
        pair, QUERIES[:4], QUERIES, "words", settings, chat=tiny_format(), out=tmp_path / "out", progress=False
    )
    assert found.values("off-topic", "prefix") == found.values("off-topic", "finetuned")
    assert found.card["base_spans"] == ["prefix"]
    made = {"base": 20.0, "query_control": 6.0}
    values = {name: made.get(name, 5.0) for name in CONDITIONS}
    rows = [
        {"topic": "off-topic", "condition": name, "index": i, "value": value + i % 3, "ended": "stop"}
        for name, value in values.items()
        for i in range(8)
    ]
    for card, says in ((found.card, "the prefix is the base's by construction"), ({}, "the prefix carries none of it")):
        said = verdict(AuditResult(rows, found.behaviour, None, card))
        assert said.startswith("Spread found")
        assert says in said
    assert any("The adapter is off at the prefix" in note for note in found.card["notes"])
    plain = ModelPair.load(finetuned=adapted(), tokenizer=tiny_tokenizer(), progress=False)
    with pytest.raises(LensError, match="another finetuned model"):
        audit(plain, QUERIES[:4], QUERIES, "words", settings, chat=tiny_format(), out=tmp_path / "out", progress=False)


def test_a_pass_that_does_not_know_its_tokens_is_refused(tmp_path: Path) -> None:
    pair = loaded(saved(tmp_path / "a"))
    batch = batch_prompts(prompts())
    with pair.using("finetuned") as model:
        with pytest.raises(LensError, match="adapter is off at prefix"):
            model(batch.ids, attention_mask=batch.attention_mask)
        with applied(model, batch, ()):
            logits = model(batch.ids, attention_mask=batch.attention_mask)
        with pytest.raises(LensError, match="adapter is off at prefix"):
            model.run_with_cache(batch.ids)
        with pytest.raises(LensError, match="adapter is off at prefix"):
            model(batch.ids[:, :1])  # one token is no decoding step where nothing is cached
        with pytest.raises(LensError, match="adapter is off at prefix"):
            forward(model, batch.ids, batch.attention_mask)
    for row, prompt in enumerate(prompts()):
        expected = by_hand(adapted(), prompt.ids, places(prompt, ("prefix",)))
        torch.testing.assert_close(logits[row][batch.attention_mask[row].bool()], expected, atol=1e-4, rtol=1e-4)
    with pair.using("base") as model:
        model(batch.ids, attention_mask=batch.attention_mask)
    own = pair.identity("finetuned")
    assert own.off
    assert Identity.from_dict(own.to_dict()) == own
    assert not own.matches(Identity(own.name, own.shape, own.probe))


def test_loading_proves_it_or_refuses_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a", adapter_off("prefix") + adapter_off("query", layers=[1], tokens=[0]))
    assert loaded(folder).base_spans == ("prefix",)
    with pytest.raises(LensError, match="merges it into the weights"):
        loaded(folder, backend="hooked")
    with pytest.warns(UserWarning, match="on everywhere"):
        attach_adapter(tiny_models.build("llama-gqa", vocab=VOCAB), folder)
    for text in ("{}", '{"parts": []}', json.dumps({"parts": [{"kind": "zero", "site": "k", "span": "prefix"}]})):
        (saved(tmp_path / "b") / "adapter_off.json").write_text(text)
        with pytest.raises(LensError, match=r"adapter_off\.json holds"):
            loaded(tmp_path / "b")
    whole = proof.adapter_inputs
    monkeypatch.setattr(proof, "adapter_inputs", lambda model, layer: whole(model, layer)[:-1])
    with pytest.raises(LensError, match="the adapter off at prefix, query"):
        loaded(folder)


def test_the_proof_looks_at_the_base_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switching PEFT's layers by hand cannot show what was written into the weights beneath them."""
    GatedAdapter(adapted(init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]), ()).save(tmp_path)
    write_json(tmp_path / "adapter_off.json", off_of(("prefix",)).to_dict())
    monkeypatch.setattr(proof, "require_switchable", lambda model: None)
    with pytest.raises(LensError, match="keys and values there differ from the base's"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("off", "spans"),
    [
        (adapter_off("prefix"), ("prefix",)),
        (adapter_off("prefix", tokens=[0, -1]), ()),
        (adapter_off("postfix"), ()),
        (adapter_off("prefix") + adapter_off("query", layers=[0]), ("prefix",)),
        (adapter_off("prompt", phase="prompt"), ("prefix", "query", "postfix")),
        (adapter_off("prefix", phase="generation"), ()),
    ],
    ids=str,
)
def test_spans_that_are_the_base_by_construction(off: Any, spans: tuple[str, ...]) -> None:
    parts = off.to_dict()["parts"] if hasattr(off, "parts") else [off.to_dict()]
    assert base_spans(parts) == spans
