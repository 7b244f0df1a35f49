"""Adapters that are off at chosen tokens, against a model whose adapter is switched by hand, token by token."""

from pathlib import Path
from typing import Any

import pytest
import tiny_adapters
import tiny_models
import torch
from peft import LoraConfig, PeftModel
from tiny_chat import VOCAB, tiny_examples, tiny_format, tiny_tokenizer

from piggyback_lens import (
    ChatFormat,
    LensError,
    ModelPair,
    PrefixCache,
    TrainSettings,
    adapter_off,
    applied,
    attach_adapter,
    batch_prompts,
    generate,
    load_solution,
    response_log_probs,
    train,
    zero,
)
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.gated import GatedAdapter
from piggyback_lens.finetuning.steps import response_nll
from piggyback_lens.finetuning.trainables import PeftAdapter
from piggyback_lens.interventions.hooks import Intervention, Interventions
from piggyback_lens.vectors.adapter_files import load_peft
from piggyback_lens.vectors.task_vectors import read_factors

LAYOUTS = ("llama-gqa", "qwen3", "gpt2")
MODULES = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
SPANS = (("prefix",), ("postfix",), ("prefix", "query"), ("prefix", "postfix"), ("prefix", "query", "postfix"))


def adapted(layout: str = "llama-gqa", **changes: Any) -> Any:
    """A PEFT model whose adapter is not the identity."""
    given = {"r": 2, "lora_alpha": 8, "target_modules": MODULES.get(layout, "all-linear"), "task_type": "CAUSAL_LM"}
    config = LoraConfig(**given | changes)
    return tiny_adapters.put_on(tiny_models.build(layout, vocab=VOCAB), config)


def off_of(spans: tuple[str, ...]) -> Interventions:
    return Interventions(tuple(adapter_off(span) for span in spans))


@torch.no_grad()
def by_hand(model: Any, ids: tuple[int, ...], off: set[int]) -> torch.Tensor:
    """Logits [pos, vocab], one token at a time, the whole adapter switched off where `off` says."""
    from transformers import DynamicCache

    cache, logits = DynamicCache(), []
    for place, token in enumerate(ids):
        one = torch.tensor([[token]])
        if place in off:
            with model.disable_adapter():
                logits.append(model(input_ids=one, past_key_values=cache, use_cache=True).logits[0, 0])
        else:
            logits.append(model(input_ids=one, past_key_values=cache, use_cache=True).logits[0, 0])
    return torch.stack(logits)


def places(prompt: Any, spans: tuple[str, ...]) -> set[int]:
    return {i for name in spans for i in range(prompt.span(name).start, prompt.span(name).stop)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spans", SPANS)
def test_logits_are_those_of_an_adapter_switched_by_hand(layout: str, spans: tuple[str, ...]) -> None:
    model = adapted(layout)
    pair = ModelPair.load(finetuned=model, tokenizer=tiny_tokenizer())
    examples = tiny_examples(3)
    batch = batch_prompts(examples)
    with pair.using("finetuned") as hooked, applied(hooked, batch, off_of(spans)) as record:
        found = hooked(batch.ids, attention_mask=batch.attention_mask).detach()
    with pair.using("finetuned") as hooked:
        always = hooked(batch.ids, attention_mask=batch.attention_mask).detach()
    for row, example in enumerate(examples):
        real = batch.attention_mask[row].bool()
        expected = by_hand(model, example.ids, places(example, spans))
        torch.testing.assert_close(found[row][real], expected, atol=1e-4, rtol=1e-4)
        assert float((always[row][real] - expected).abs().max()) > 1e-2
    assert all(receipt.cells and receipt.change_norm > 0 for receipt in record.receipts)


def test_off_everywhere_is_the_base_and_off_at_the_prefix_is_the_base_prefix() -> None:
    model = adapted()
    pair = ModelPair.load(finetuned=model, tokenizer=tiny_tokenizer())
    prompts = [tiny_format().render(query) for query in ("hello", "what is it?", "a")]
    with pair.using("base") as hooked:
        base = generate(hooked, prompts, max_new_tokens=6)
    repair = PrefixCache.compile(pair, prompts[0], side="base")
    with pair.using("finetuned") as hooked:
        off = generate(hooked, prompts, max_new_tokens=6, interventions=adapter_off("all"))
        gated = generate(hooked, prompts, max_new_tokens=6, interventions=adapter_off("prefix"))
        patched = generate(hooked, prompts, max_new_tokens=6, prefix_cache=repair)
        plain = generate(hooked, prompts, max_new_tokens=6)
        answers = [p.with_response(a.ids, end=False) for p, a in zip(prompts, gated, strict=True)]
        scored = response_log_probs(hooked, answers, interventions=adapter_off("prefix"))
    assert [a.ids for a in off] == [a.ids for a in base]
    assert [a.ids for a in gated] == [a.ids for a in patched] != [a.ids for a in plain]
    compiled = PrefixCache.compile(pair, prompts[0], adapter_off("prefix"))
    assert torch.equal(compiled.keys, repair.keys)
    assert torch.equal(compiled.values, repair.values)
    for answer, own in zip(answers, scored, strict=True):
        logits = by_hand(model, answer.ids, places(answer, ("prefix",)))[answer.n_prompt - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(answer.ids[answer.n_prompt :])[:, None])[:, 0]
        torch.testing.assert_close(torch.as_tensor(own), expected, atol=1e-4, rtol=1e-4)


def test_peft_agrees_where_it_can_say_the_same() -> None:
    example = tiny_examples(1)[0]
    postfix = list(example.ids[example.span("postfix").start : example.n_prompt])
    activated = adapted(alora_invocation_tokens=postfix)
    batch = make_batch([example], share_prefix=False)
    with torch.no_grad():
        theirs = activated(input_ids=batch.ids, attention_mask=batch.attention_mask).logits[0]
        ours = GatedAdapter(adapted(), [adapter_off("prefix"), adapter_off("query")]).forward(batch).logits
    torch.testing.assert_close(ours, theirs[example.n_prompt - 1 : len(example.ids) - 1], atol=1e-4, rtol=1e-4)


def test_off_at_prefix_and_query_is_saved_as_the_activated_lora_that_it_is(tmp_path: Path) -> None:
    """Oracle: PEFT's own reading of the folder."""
    examples = tiny_examples(4)
    trainable = GatedAdapter(adapted(), [adapter_off("prefix"), adapter_off("query")])
    batch = make_batch(examples, share_prefix=False)
    with torch.no_grad():
        ours = trainable.forward(batch).logits
    trainable.begin(examples)
    trainable.save(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_models.build("llama-gqa", vocab=VOCAB), tmp_path).eval()
    assert theirs.peft_config["default"].alora_invocation_tokens
    with torch.no_grad():
        logits = theirs(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
    rows, columns = batch.supervised.nonzero(as_tuple=True)
    torch.testing.assert_close(ours, logits[rows, columns - 1], atol=1e-4, rtol=1e-4)
    base = tiny_models.build("llama-gqa", vocab=VOCAB)
    pair = ModelPair.load(base, adapter=tmp_path, tokenizer=tiny_tokenizer(), progress=False)
    with pair.using("finetuned") as hooked:
        scored = torch.cat([torch.as_tensor(x) for x in response_log_probs(hooked, examples)])
    expected = ours.log_softmax(-1).gather(-1, batch.ids[batch.supervised][:, None])[:, 0]
    torch.testing.assert_close(scored, expected, atol=1e-4, rtol=1e-4)
    for off in (adapter_off("prefix"), [adapter_off("prefix"), adapter_off("query", layers=[0])]):
        other = GatedAdapter(adapted(), off)
        other.begin(examples)
        other.save(tmp_path)
        assert read_json(tmp_path / "adapter_config.json")["alora_invocation_tokens"] is None


QUIET = (
    "<bos>{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }}\n{% else %}a {{ m.content }}<end>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


def test_as_an_activated_lora_it_is_saved_only_where_all_rows_are_read_alike(tmp_path: Path) -> None:
    """It depends on the data alone, not on the passes of the process that saves it."""
    chat = ChatFormat(tiny_tokenizer(QUIET), system=None)
    other = ChatFormat(tiny_tokenizer(QUIET.replace("%}a {% endif", "%}a .{% endif")), system=None)
    plain = [chat.render(query, response="no.") for query in ("hello", "what")]
    kinds = {
        "one postfix": (plain, True),
        "two postfixes": ([*plain, other.render("hello", response="no.")], False),
        "the postfix again": ([*plain, chat.render("hello", response="no.\na yes")], False),
    }
    for name, (examples, said) in kinds.items():
        gated = GatedAdapter(adapted(), [adapter_off("prefix"), adapter_off("query")])
        gated.begin(examples)
        gated.forward(make_batch(examples[:1]))
        gated.save(tmp_path)
        assert bool(read_json(tmp_path / "adapter_config.json")["alora_invocation_tokens"]) == said, name


def test_a_finished_run_that_is_called_again_is_saved_as_it_was(tmp_path: Path) -> None:
    saved = []
    for _ in range(2):
        gated = GatedAdapter(adapted(), [adapter_off("prefix"), adapter_off("query")])
        train(gated, tiny_examples(8), SHORT, out=tmp_path, progress=False)
        saved.append(read_json(tmp_path / "adapter" / "adapter_config.json")["alora_invocation_tokens"])
    assert saved[0] == saved[1] != None  # noqa: E711


@pytest.mark.parametrize("later", [lambda: GatedAdapter(adapted(), ()), lambda: PeftAdapter(adapted())])
def test_an_adapter_that_is_saved_over_a_gated_one_is_on_everywhere(tmp_path: Path, later: Any) -> None:
    GatedAdapter(adapted(), adapter_off("prefix")).save(tmp_path)
    later().save(tmp_path)
    assert not (tmp_path / "adapter_off.json").exists()


def test_no_way_of_reading_it_forgets_where_it_is_off(tmp_path: Path) -> None:
    gated = GatedAdapter(adapted(), adapter_off("prefix"))
    gated.save(tmp_path)
    for read in (load_solution, load_peft, read_factors):
        with pytest.raises(LensError, match=r"adapter off at prefix .*ModelPair\.load"):
            read(tmp_path)
    base = tiny_models.build("llama-gqa", vocab=VOCAB)
    pair = ModelPair.load(base, adapter=tmp_path, tokenizer=tiny_tokenizer(), progress=False)
    batch = make_batch(tiny_examples(3))
    with pair.using("finetuned") as hooked:
        with pytest.raises(LensError, match="give GatedAdapter"):
            train(hooked, tiny_examples(3), SHORT, progress=False)
        with pytest.raises(LensError, match="give the same"):
            GatedAdapter(hooked, adapter_off("postfix"))
        again = GatedAdapter(hooked, adapter_off("prefix")).forward(batch).logits
    torch.testing.assert_close(again, gated.forward(batch).logits, atol=1e-5, rtol=1e-5)


SHORT = TrainSettings(steps=3, batch_size=4, learning_rate=0.01, checkpoint_every=1)


def test_off_nowhere_trains_as_any_adapter_step_by_step() -> None:
    runs = []
    for kind in (lambda model: GatedAdapter(model, ()), PeftAdapter):
        model = adapted()
        found = train(kind(model), tiny_examples(8), SHORT, progress=False)
        runs.append(
            (
                [row["loss"] for row in found.history],
                [p.detach().clone() for p in PeftAdapter(model).parameters().values()],
            )
        )
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5)
    for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_training_descends_the_gated_loss_and_leaves_the_keys_and_values_of_the_base(tmp_path: Path) -> None:
    model, examples = adapted(), tiny_examples(8)
    prompt = examples[0]
    trainable = GatedAdapter(model, adapter_off("prefix"))
    batch = make_batch(examples[:4])
    total = response_nll(trainable.forward(batch).logits, batch.ids[batch.supervised])
    slow = []
    for example in examples[:4]:
        logits = by_hand(model, example.ids, places(example, ("prefix",)))[example.n_prompt - 1 : -1].log_softmax(-1)
        slow += logits.gather(-1, torch.tensor(example.ids[example.n_prompt :])[:, None])[:, 0].tolist()
    assert float(total) == pytest.approx(-sum(slow) / len(slow), abs=1e-5)

    found = train(trainable, examples, SHORT, out=tmp_path / "run", progress=False)
    losses = [row["loss"] for row in found.history]
    assert len(set(losses)) == 3
    output = trainable.forward(make_batch(examples[:2]))
    with torch.no_grad(), model.disable_adapter():
        base = PeftAdapter(model).forward(make_batch(examples[:2], share_prefix=False))
    stop = prompt.span("prefix").stop
    for ours, theirs in zip([*output.keys, *output.values], [*base.keys, *base.values], strict=True):
        assert torch.equal(ours[:, :, :stop], theirs[:, :, :stop])
        assert not torch.equal(ours[:, :, stop:], theirs[:, :, stop:])
    folder = tmp_path / "run" / "adapter"
    assert Interventions.from_dict(read_json(folder / "adapter_off.json")) == trainable.off
    with pytest.warns(UserWarning, match="trained with itself off"):
        attach_adapter(tiny_models.build("llama-gqa", vocab=VOCAB), folder)
    again = train(GatedAdapter(adapted(), adapter_off("prefix")), examples, SHORT, out=tmp_path / "run", progress=False)
    assert [row["loss"] for row in again.history] == losses
    with pytest.raises(LensError, match="off"):
        train(GatedAdapter(adapted(), adapter_off("postfix")), examples, SHORT, out=tmp_path / "run", progress=False)


BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "use_dora=True": ("llama-gqa", {"use_dora": True}),
    "lora_bias=True": ("llama-gqa", {"lora_bias": True}),
    "modules_to_save=": ("llama-gqa", {"modules_to_save": ["lm_head"]}),
    "bias='all'": ("qwen2", {"bias": "all", "target_modules": ["o_proj"]}),  # of modules without an adapter, too
    "bias='lora_only'": ("qwen2", {"bias": "lora_only"}),
    "init_lora_weights='pissa'": ("llama-gqa", {"init_lora_weights": "pissa"}),
    "init_lora_weights='olora'": ("llama-gqa", {"init_lora_weights": "olora"}),
    "target_parameters=": ("llama-gqa", {"target_parameters": ["self_attn.v_proj.weight"], "target_modules": []}),
    "trainable_token_indices=": ("llama-gqa", {"trainable_token_indices": [3, 4]}),
    "alora_invocation_tokens=": ("llama-gqa", {"alora_invocation_tokens": [3, 4]}),
    "lm_head lies outside the decoder blocks": ("llama-mha", {"target_modules": ["q_proj", "lm_head"]}),
    "embed_tokens lies outside the decoder blocks": ("llama-mha", {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("says", BEYOND)
def test_what_cannot_be_off_by_token_is_refused_by_name(tmp_path: Path, says: str) -> None:
    """When it is to be trained, when it is loaded, and where it is switched off in use."""
    layout, changes = BEYOND[says]
    model = adapted(layout, **changes)
    with pytest.raises(LensError, match=says):
        GatedAdapter(model, adapter_off("prefix"))
    if "alora" not in says:  # which adapter_off.json stands in for
        GatedAdapter(model, ()).save(tmp_path)
        write_json(tmp_path / "adapter_off.json", Interventions((adapter_off("postfix"),)).to_dict())
        with pytest.raises(LensError, match=says):
            ModelPair.load(tiny_models.build(layout, vocab=VOCAB), adapter=tmp_path, tokenizer=tiny_tokenizer())
    if not any(field in says for field in ("alora", "init", "bias='")):  # which are no finetuned side of their own
        pair = ModelPair.load(finetuned=model, tokenizer=tiny_tokenizer(), progress=False)
        with pair.using("finetuned") as hooked, pytest.raises(LensError, match=says):
            generate(hooked, [tiny_format().render("hello")], max_new_tokens=1, interventions=adapter_off("all"))


def test_blocks_are_not_computed_again_with_the_adapter_on() -> None:
    again = TrainSettings(steps=1, batch_size=4, gradient_checkpointing=True)
    with pytest.raises(LensError, match="gradient_checkpointing=False"):
        train(GatedAdapter(adapted(), adapter_off("prefix")), tiny_examples(8), again, progress=False)


def test_models_without_an_adapter_of_their_own_are_refused() -> None:
    pair = ModelPair.load(finetuned=adapted(), tokenizer=tiny_tokenizer())
    prompts = [tiny_format().render("hello")]
    with pair.using("base") as hooked, pytest.raises(LensError, match="no adapter"):
        generate(hooked, prompts, max_new_tokens=2, interventions=adapter_off("prefix"))
    with pytest.raises(LensError, match="adapter_off"):
        GatedAdapter(adapted(), zero("resid_pre"))
    with pytest.raises(LensError, match="switched off"):
        Intervention("add", "adapter", tensors={"vector": torch.ones(4)})
    batch = batch_prompts(prompts)
    with pair.using("finetuned") as hooked, pytest.raises(LensError, match="no hook point"):
        adapter_off("prefix").fwd_hooks(hooked, batch)


def test_a_hooked_transformer_has_its_adapter_in_the_weights() -> None:
    pair = ModelPair.load(finetuned=adapted(), tokenizer=tiny_tokenizer(), backend="hooked")
    with pair.using("finetuned") as hooked, pytest.raises(LensError, match="merged into the weights"):
        generate(hooked, [tiny_format().render("hello")], max_new_tokens=2, interventions=adapter_off("prefix"))
