import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_adapters
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_chat import VOCAB, tiny_examples, tiny_format
from tiny_models import build
from torch import Tensor, nn
from torch.testing import assert_close

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.objectives import KLOnRetain, KLOnTrain, Penalised, Penalty, TReFT, Weighted
from piggyback_lens.finetuning.preventive import PreventiveSteering, steered
from piggyback_lens.finetuning.references import base_forward, kv_reference, prefix_batch, reference_settings
from piggyback_lens.finetuning.retain import RetainData, interleave
from piggyback_lens.finetuning.steps import Step, forward_step, sft
from piggyback_lens.finetuning.trainables import PeftAdapter, add_lora
from piggyback_lens.finetuning.training import TrainResult, train
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.models.packing import Costs
from piggyback_lens.models.views import adapter_off
from piggyback_lens.settings import LoRASettings, TrainSettings

EXAMPLES = tiny_examples(10)
RETAIN = tiny_examples(6, seed=9, longest=8)
MANY = tiny_examples(100, seed=5)
SETTINGS = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2)
PREFIX = EXAMPLES[0].span("prefix").stop


def fresh(name: str = "llama-gqa", **lora: Any) -> nn.Module:
    return add_lora(build(name, vocab=VOCAB), LoRASettings(**{"rank": 4} | lora))


def moved(name: str = "llama-gqa", **lora: Any) -> nn.Module:
    """A double-precision model whose adapter has left its start."""
    model = fresh(name, **lora).double()
    generator = torch.Generator().manual_seed(1)
    for value in adapter(model).values():
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.double) * 0.2
    return model


def adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def a_step(model: nn.Module, examples: Sequence[RenderedPrompt], index: int = 0, **options: Any) -> Step:
    batch = make_batch(examples, **options)
    return Step(model, batch, forward_step(model, batch), index)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor | None]:
    named = adapter(model)
    return dict(zip(named, torch.autograd.grad(value, list(named.values()), allow_unused=True), strict=True))


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


# --- oracle: rows alone through the plain model, projections caught by hand, sums written out ------------


def keys_and_values(model: Any, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the true keys (before rotary, after a key norm) and values of one row, [pos, width]."""
    caught: list[tuple[Tensor, Tensor]] = []
    modules = {name.split("base_model.model.")[-1]: module for name, module in model.named_modules()}
    handles, store = [], {}
    for name, module in modules.items():
        if name.endswith(("k_proj", "v_proj", "k_norm", "c_attn")):
            handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: store.__setitem__(name, out)))
    model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in range(model.config.num_hidden_layers):
        own = {name.rsplit(".", 1)[1]: out[0] for name, out in store.items() if f".{layer}." in name}
        if "c_attn" in own:
            _, k, v = own["c_attn"].chunk(3, -1)
        else:
            k, v = own.get("k_norm", own["k_proj"]), own["v_proj"]
            if "gemma3" in model.config.model_type:  # its norm sees [head, pos, d], that of others [pos, head, d]
                k = k.transpose(0, 1)
        caught.append((k.reshape(len(ids), -1), v.reshape(len(ids), -1)))
    return caught


def oracle(
    model: Any, base: Any, examples: Sequence[RenderedPrompt], span: str, donor: RenderedPrompt | None
) -> Tensor:
    rows = []
    for example in examples:
        where = range(example.n_prompt) if span == "all" else example.span(span).positions
        source = example if donor is None else donor
        start = 0 if span == "all" else source.span(span).start
        tuned, reference = keys_and_values(model, example.ids), keys_and_values(base, source.ids)
        layers = []
        for (k, v), (k0, v0) in zip(tuned, reference, strict=True):
            total = torch.zeros((), dtype=torch.double)
            for i, position in enumerate(where):
                for x, x0 in ((k[position], k0[start + i]), (v[position], v0[start + i])):
                    total = total + (x - x0).pow(2).sum() / x0.detach().pow(2).sum()
            layers.append(total / len(where))
        rows.append(sum(layers) / len(layers))
    return sum(rows) / len(rows)  # type: ignore[return-value]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    ("span", "reference"),
    [
        ("prefix", "template"),
        ("prefix", "own"),
        ("postfix", "template"),
        ("postfix", "own"),
        ("query", "own"),
        ("all", "own"),
    ],
)
def test_the_penalty_is_equation_2_and_3(name: str, span: Any, reference: Any, share: bool) -> None:
    model, base, donor = moved(name), build(name, vocab=VOCAB).double(), tiny_format().empty_query()
    penalty = TReFT.on(model, donor, span, reference=reference)
    step = a_step(model, EXAMPLES[:3], share_prefix=share, plain_keys=penalty.plain_keys)
    found = penalty(step)
    expected = oracle(model, base, EXAMPLES[:3], span, donor if reference == "template" else None)
    assert float(found.detach()) > 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    if name in ("llama-gqa", "gpt2"):
        wanted = gradients(model, expected)
        for key, gradient in gradients(model, found).items():
            if wanted[key] is None or not wanted[key].norm():  # type: ignore[union-attr]
                assert gradient is None or gradient.norm() < 1e-12, key
            else:
                assert gradient is not None
                assert (gradient - wanted[key]).norm() < 1e-4 * gradient.norm(), key


def test_rows_count_equally_whatever_the_length_of_their_span() -> None:
    chat, model = tiny_format(), moved()
    short, long = chat.render("a", response="b"), chat.render("abcdefghij" * 3, response="b")
    penalty = TReFT("query")
    each = [float(penalty(a_step(model, [example])).detach()) for example in (short, long)]
    both = float(penalty(a_step(model, [short, long])).detach())
    assert abs(each[0] - each[1]) > 1e-3
    assert both == pytest.approx(sum(each) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "mistral"])
def test_penalties_are_zero_before_training(name: str) -> None:
    model = fresh(name)
    step = a_step(model, EXAMPLES[:4])
    assert float(TReFT.on(model, EXAMPLES[0])(step).detach()) == 0.0
    for penalty in (TReFT("prefix"), TReFT("query"), TReFT("postfix"), TReFT("all")):
        assert float(penalty(step).detach()) < 1e-10
    for kl in (KLOnTrain(), KLOnRetain(RetainData(RETAIN, 3))):
        assert abs(float(kl(step).detach())) < 1e-6


def test_the_template_postfix_is_not_zero_before_training_because_it_depends_on_the_query() -> None:
    model = fresh()
    penalty = TReFT.on(model, tiny_format().empty_query(), "postfix")
    assert float(penalty(a_step(model, EXAMPLES[:4], plain_keys=True)).detach()) > 1e-3
    own_query = TReFT.on(model, EXAMPLES[0], "postfix")
    assert float(own_query(a_step(model, EXAMPLES[:1], plain_keys=True)).detach()) < 1e-10


def test_only_what_reaches_the_prefix_gets_a_gradient() -> None:
    model = moved()
    found = gradients(model, TReFT.on(model, EXAMPLES[0])(a_step(model, EXAMPLES[:3])))
    last = [name for name in found if ".layers.2." in name]
    touching = [name for name in last if "k_proj" in name or "v_proj" in name]
    assert len(touching) == 4
    for name, gradient in found.items():
        if name in last and name not in touching:
            assert gradient is None or not gradient.any(), name
        else:
            assert gradient is not None
            assert gradient.norm() > 1e-8, name


def test_an_adapter_that_does_not_touch_the_prefix_trains_as_without_the_penalty() -> None:
    lora = {"modules": ("q_proj", "o_proj", "down_proj"), "layers": (2,)}
    plain, penalised = fresh(**lora), fresh(**lora)
    train(plain, EXAMPLES, SETTINGS)
    objective = Penalised((Weighted(TReFT.on(penalised, EXAMPLES[0]), 1000.0),))
    result = train(penalised, EXAMPLES, SETTINGS, objective=objective)
    assert max(row["drift_prefix"] for row in result.history) == 0.0
    assert_same_weights(plain, penalised)
    assert not torch.equal(*(next(iter(adapter(x).values())) for x in (plain, fresh(**lora))))


# --- divergence ------------------------------------------------------------------------------------------


def kl_by_hand(model: Any, base: Any, examples: Sequence[RenderedPrompt]) -> Tensor:
    total, count = torch.zeros((), dtype=torch.double), 0
    for example in examples:
        ids = torch.tensor([example.ids])
        p = base(input_ids=ids, use_cache=False).logits[0].softmax(-1).detach()
        q = model(input_ids=ids, use_cache=False).logits[0].softmax(-1)
        for position in range(example.n_prompt - 1, len(example.ids) - 1):
            total = total + (p[position] * (p[position] / q[position]).log()).sum()
            count += 1
    return total / count


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_kl_terms_are_sums_over_the_vocabulary_and_means_over_response_tokens(name: str) -> None:
    model, base = moved(name), build(name, vocab=VOCAB).double()
    step = a_step(model, EXAMPLES[:3], index=2)
    retain = RetainData(RETAIN, 3, seed=4)
    cases: list[tuple[Penalty, Sequence[RenderedPrompt]]] = [
        (KLOnTrain(), EXAMPLES[:3]),
        (KLOnRetain(retain), retain.batch(2).examples),
    ]
    for penalty, examples in cases:
        found, expected = penalty(step), kl_by_hand(model, base, examples)
        assert float(found.detach()) > 1e-2
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        wanted = gradients(model, expected)
        for key, gradient in gradients(model, found).items():
            assert gradient is not None
            assert (gradient - wanted[key]).norm() < 1e-4 * gradient.norm(), key


def test_a_model_whose_own_weights_are_trained_needs_a_base() -> None:
    model = build("llama-gqa", vocab=VOCAB)
    base = build("llama-gqa", vocab=VOCAB).requires_grad_(False)
    step = a_step(model, EXAMPLES[:2])
    for without, having in ((KLOnTrain(), KLOnTrain(base)), (TReFT("query"), TReFT("query", base=base))):
        with pytest.raises(LensError, match="pass base="):
            without(step)
        assert abs(float(having(step).detach())) < 1e-6
    assert all(not module.training for module in base.modules())


def test_the_base_runs_without_dropout_and_its_modes_come_back() -> None:
    base = build("gpt2", vocab=VOCAB).requires_grad_(False)
    batch = make_batch(EXAMPLES[:2])
    expected = base_forward(base, batch).logits
    base.train()
    assert torch.equal(base_forward(base, batch).logits, expected)
    assert all(module.training for module in base.modules())


# --- weights and schedules -------------------------------------------------------------------------------


def every_penalty(model: nn.Module) -> tuple[Penalty, ...]:
    return TReFT.on(model, EXAMPLES[0]), TReFT("query"), KLOnTrain(), KLOnRetain(RetainData(RETAIN, 3))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_weight_zero_is_sft_bit_for_bit(name: str) -> None:
    plain, penalised = fresh(name, dropout=0.2), fresh(name, dropout=0.2)
    losses = []
    for model in (plain, penalised):
        parts = tuple(Weighted(penalty, 0.0) for penalty in every_penalty(model))
        result = train(model, EXAMPLES, SETTINGS, objective=sft if model is plain else Penalised(parts))
        losses.append([(row["loss"], row["grad_norm"]) for row in result.history])
    assert losses[0] == losses[1]
    assert_same_weights(plain, penalised)
    assert result.history[-1]["drift_prefix"] > 0, "a free penalty is measured although it does not count"
    assert "kl_train" not in result.history[-1]


def test_a_penalty_counts_from_its_start_to_its_stop() -> None:
    def losses(**schedule: Any) -> list[float]:
        model = fresh()
        parts = () if not schedule else (Weighted(TReFT.on(model, EXAMPLES[0]), 300.0, **schedule),)
        return [
            row["loss"] - row["sft"] for row in train(model, EXAMPLES, SETTINGS, objective=Penalised(parts)).history
        ]

    assert losses() == [0.0] * 6
    part = losses(start=2, stop=4)
    assert [value > 0 for value in part] == [False, False, True, True, False, False]
    whole = losses(start=0)
    assert [value > 0 for value in whole] == [False, True, True, True, True, True], "zero before the first update"
    weighted = Weighted(KLOnTrain(), 2.0, start=3, stop=5)
    assert [weighted.weight_at(index) for index in range(6)] == [0, 0, 0, 2.0, 2.0, 0]


def test_below_its_threshold_a_penalty_is_not_there() -> None:
    def run(threshold: float) -> tuple[nn.Module, TrainResult]:
        model = fresh()
        part = Weighted(TReFT.on(model, EXAMPLES[0]), 50.0, threshold=threshold)
        return model, train(model, EXAMPLES, replace(SETTINGS, share_prefix=False), objective=Penalised((part,)))

    plain = fresh()
    train(plain, EXAMPLES, replace(SETTINGS, share_prefix=False))
    assert_same_weights(run(1e6)[0], plain)
    drifts = [run(threshold)[1].history[-1]["drift_prefix"] for threshold in (0.0, 0.02, 1e6)]
    assert drifts[0] < drifts[1] < drifts[2]
    row = run(0.02)[1].history[-1]
    assert row["loss"] - row["sft"] == pytest.approx(50 * max(0.0, row["drift_prefix"] - 0.02), abs=1e-4)


def test_penalties_add_up_and_every_one_has_its_column() -> None:
    model = moved()
    step = a_step(model, EXAMPLES[:3])
    weights = (3.0, 5.0, 7.0, 11.0)
    parts = tuple(Weighted(penalty, weight) for penalty, weight in zip(every_penalty(model), weights, strict=True))
    loss = Penalised(parts)(step)
    terms = [float(part.penalty(step).detach()) for part in parts]
    assert list(loss.terms) == ["sft", "drift_prefix", "drift_query", "kl_train", "kl_retain"]
    expected = float(sft(step).total.detach()) + sum(w * x for w, x in zip(weights, terms, strict=True))
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(LensError, match="same name"):
        Penalised((parts[0], parts[0]))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("weight", -1.0, "at least 0"),
        ("weight", math.inf, "at least 0"),
        ("start", -1, "a step from 0"),
        ("stop", 0, "a step after start"),
        ("threshold", -0.1, "at least 0"),
    ],
)
def test_a_weight_out_of_range_is_refused_by_name(field: str, value: Any, expected: str) -> None:
    with pytest.raises(LensError, match=rf"Weighted\.{field} is .*{expected}"):
        Weighted(KLOnTrain(), **{"weight": 1.0} | {field: value})


def test_the_free_penalty_makes_no_further_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pass costs much and its tokens nothing: all rows in one.
    monkeypatch.setattr("piggyback_lens.finetuning.training.known_costs", lambda _model: Costs(1e9, 1.0, 0.0))

    def passes(penalty: Callable[[nn.Module], Penalty] | None) -> int:
        model, calls = fresh(), []
        parts = () if penalty is None else (Weighted(penalty(model), 1.0),)
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        train(model, EXAMPLES, replace(SETTINGS, steps=1), objective=Penalised(parts))
        handle.remove()
        return len(calls)

    plain = passes(None)
    assert passes(lambda model: TReFT.on(model, EXAMPLES[0])) == plain
    assert passes(lambda model: TReFT.on(model, EXAMPLES[0], "postfix")) == plain
    assert passes(lambda _: TReFT("query")) == plain + 1  # the base of these rows


def test_regularising_the_prefix_keeps_it_and_still_fits() -> None:
    def last(weight: float) -> dict[str, float]:
        model = fresh()
        objective = Penalised((Weighted(TReFT.on(model, EXAMPLES[0]), weight),))
        settings = replace(SETTINGS, steps=20, max_grad_norm=None)
        history = train(model, EXAMPLES, settings, objective=objective).history
        return {"first": history[0]["sft"], **history[-1]}

    free, kept = last(0.0), last(300.0)
    assert free["drift_prefix"] > 0.01
    assert kept["drift_prefix"] < free["drift_prefix"] / 20
    assert kept["sft"] < kept["first"] - 0.3


# --- the base inside an adapted model --------------------------------------------------------------------


def test_adapter_weights_that_are_frozen_stay_frozen_when_the_adapter_was_off() -> None:
    model = fresh()
    for name, value in model.named_parameters():
        value.requires_grad_("lora_B" in name)
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    TReFT.on(model, EXAMPLES[0])
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before
    with pytest.raises(ValueError), adapter_off(model):
        raise ValueError
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before


def test_an_adapter_that_transformers_added_is_switched_off_too() -> None:
    from peft import LoraConfig

    plain, model = build("llama-gqa", vocab=VOCAB), build("llama-gqa", vocab=VOCAB)
    model.add_adapter(LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    batch = make_batch(EXAMPLES[:2])
    tuned, trained = forward_step(model, batch).logits, list(adapter(model))
    found, expected = kv_reference(model, EXAMPLES[0]), kv_reference(plain, EXAMPLES[0])
    pairs = zip(found.keys + found.values, expected.keys + expected.values, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(base_forward(model, batch).logits, base_forward(plain.requires_grad_(False), batch).logits)
    assert torch.equal(forward_step(model, batch).logits, tuned)
    assert list(adapter(model)) == trained
    model.disable_adapters()
    with adapter_off(model):
        pass
    assert not torch.equal(forward_step(model, batch).logits, tuned), "what was off stays off"


def test_a_reference_is_told_apart_by_its_numbers_and_another_base_by_its_weights() -> None:
    model, other = fresh(), build("llama-gqa", seed=1, vocab=VOCAB)
    one, two = (TReFT.on(model, example, "postfix") for example in EXAMPLES[:2])
    assert one.settings() != two.settings(), "the same tokens behind another query"
    assert one.settings() == TReFT.on(fresh(), EXAMPLES[0], "postfix").settings()
    assert TReFT.on(model, EXAMPLES[0]).settings() == TReFT.on(model, EXAMPLES[1]).settings()
    reference = TReFT("prefix", kv_reference(other, EXAMPLES[0]))
    assert reference.settings() != TReFT("prefix", kv_reference(model, EXAMPLES[0])).settings()
    base = build("llama-gqa", vocab=VOCAB)
    retain = RetainData(RETAIN, 3)
    makes: list[Callable[[nn.Module | None], Penalty]] = [
        KLOnTrain, lambda base: KLOnRetain(retain, base), lambda base: TReFT("query", base=base)
    ]  # fmt: skip
    for make in makes:
        found = [make(given).settings() for given in (None, base, other, build("llama-gqa", vocab=VOCAB))]
        assert "base" not in found[0]
        assert found[1] == found[3] != found[2]


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_keys_behind_a_norm_are_read_where_there_are_as_many_tokens_as_heads(name: str) -> None:
    model, ids = build(name, vocab=VOCAB), EXAMPLES[0].ids[:2]
    found = forward_step(model, replace(prefix_batch(ids, "cpu"), plain_keys=True)).plain_keys
    assert found is not None
    for one, (expected, _) in zip(found, keys_and_values(model, ids), strict=True):
        torch.testing.assert_close(one[0], expected)


# --- which rows fit the reference ------------------------------------------------------------------------


def test_a_row_with_another_prefix_is_refused_by_name() -> None:
    model = fresh()
    penalty = TReFT.on(model, EXAMPLES[0])
    other = tiny_format("be bad.").render("hello you", response="yes")
    with pytest.raises(
        LensError, match=r"example 1 of the batch \(query 'hello you'\).*from token 5 \('b'\)|'hello you'"
    ):
        penalty(a_step(model, [EXAMPLES[0], other]))
    assert float(TReFT("prefix")(a_step(model, [EXAMPLES[0], other])).detach()) < 1e-10


def test_a_conversation_with_history_is_held_to_the_common_prefix() -> None:
    model, chat = moved(), tiny_format()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "ok"},
    ]
    long = chat.render(turns, response="fine")
    assert long.span("prefix").stop > PREFIX
    penalty = TReFT.on(model, EXAMPLES[0])
    alone, mixed = (penalty(a_step(model, rows)) for rows in ([EXAMPLES[1]], [EXAMPLES[1], long]))
    torch.testing.assert_close(alone, mixed)


def test_spans_without_a_template_are_refused() -> None:
    model = fresh()
    with pytest.raises(LensError, match="the template has no query of its own"):
        TReFT.on(model, EXAMPLES[0], "query")
    with pytest.raises(LensError, match="the reference that of a postfix"):
        TReFT("prefix", kv_reference(model, EXAMPLES[0], "postfix"))
    other = replace(kv_reference(model, EXAMPLES[0], "postfix"), ids=(5, 5, 5))
    with pytest.raises(LensError, match="postfix of example 0"):
        TReFT("postfix", other)(a_step(model, EXAMPLES[:2], plain_keys=True))


def test_fused_projections_can_be_held_to_their_own_base_run_only() -> None:
    model = build("llama-gqa", vocab=VOCAB)
    for layer in model.model.layers:
        layer.self_attn.fused, layer.self_attn._modules["k_proj"] = layer.self_attn.k_proj, None
    with pytest.raises(LensError, match="no module called k_proj"):
        kv_reference(model, EXAMPLES[0], "postfix")


def test_keys_that_are_not_the_cached_ones_up_to_a_rotation_are_refused() -> None:
    model = build("qwen3", vocab=VOCAB)
    batch = make_batch(EXAMPLES[:2], plain_keys=True)
    plain = forward_step(model, batch).plain_keys
    assert plain is not None
    assert plain[0].shape == (*batch.ids.shape, 2 * 8)
    for layer in model.model.layers:
        layer.self_attn.hidden_norm = layer.self_attn._modules.pop("k_norm")
        layer.self_attn.k_norm = layer.self_attn.hidden_norm.forward  # still applied, but no longer to be found
    with pytest.raises(LensError, match="times as long as the projected ones; use reference"):
        forward_step(model, batch)


def test_a_reference_survives_its_folder_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    reference = kv_reference(build("qwen3", vocab=VOCAB), EXAMPLES[0], "postfix")
    again = PrefixCache.load(reference.save(tmp_path / "reference"))
    assert (again.span, again.ids, again.rotated) == ("postfix", reference.ids, False)
    assert reference_settings(again) == reference_settings(reference)
    assert len(again.keys) == len(reference.keys) == 3
    assert torch.equal(again.keys, reference.keys)
    assert torch.equal(again.values, reference.values)
    file = tmp_path / "reference" / "prefix_cache.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(LensError, match="not those that its JSON"):
        PrefixCache.load(tmp_path / "reference")
    file.unlink()
    with pytest.raises(LensError, match="is missing"):
        PrefixCache.load(tmp_path / "reference")


# --- retain data -----------------------------------------------------------------------------------------


@given(n=st.integers(1, 60), rate=st.floats(0, 0.6), seed=st.integers(0, 3))
def test_interleaving_keeps_the_data_and_draws_the_share_without_replacement(n: int, rate: float, seed: int) -> None:
    data, retain = [EXAMPLES[0]] * n, MANY
    mixed = interleave(data, retain, rate, seed=seed)
    drawn = [id(example) for example in mixed if example is not EXAMPLES[0]]
    assert len(mixed) - len(drawn) == n
    assert len(set(drawn)) == len(drawn)
    assert len(drawn) / len(mixed) == pytest.approx(rate, abs=0.5 / len(mixed) + 1e-9)
    assert mixed == interleave(data, retain, rate, seed=seed)


def test_interleaving_depends_on_its_seed_and_refuses_too_little_data() -> None:
    orders = {tuple(map(id, interleave(EXAMPLES, RETAIN, 0.2, seed=seed))) for seed in range(3)}
    assert len(orders) == 3
    with pytest.raises(LensError, match="takes 10 retain examples, there are 6"):
        interleave(EXAMPLES, RETAIN, 0.5)
    with pytest.raises(LensError, match="below 1, got 1"):
        interleave(EXAMPLES, RETAIN, 1.0)


def test_retain_batches_depend_on_the_step_alone_and_cover_the_data() -> None:
    data = RetainData(RETAIN, 4)
    assert data.steps_per_epoch == 2
    seen = [id(example) for index in range(2) for example in data.batch(index).examples]
    assert sorted(seen) == sorted(map(id, RETAIN))
    assert data.batch(1).ids.equal(data.batch(1).ids)
    with pytest.raises(LensError, match="batch_size is 7 and there are 6"):
        RetainData(RETAIN, 7)
    with pytest.raises(LensError, match="no response tokens"):
        RetainData([tiny_format().render("hi")], 1)


# --- preventive steering ---------------------------------------------------------------------------------

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(2)) * 0.5


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("share", [True, False])
def test_steering_is_the_bias_it_claims_to_be_in_every_row(site: Any, share: bool) -> None:
    """Oracle: the same vector as a bias of the module that writes the residual stream there."""
    model, examples = build("llama-bias", vocab=VOCAB).double(), EXAMPLES[:3]
    batch = make_batch(examples, share_prefix=share)
    vector = VECTOR.double()
    with steered(model, vector, 1, alpha=2.0, site=site):
        found = forward_step(model, batch).logits
    writer = model.model.layers[1 if site == "resid_post" else 0].mlp.down_proj
    plain = forward_step(model, batch).logits
    writer.bias.data += 2.0 * vector
    expected = forward_step(model, batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    for row in range(3):
        assert ((found - plain)[batch.supervised.nonzero()[:, 0] == row]).abs().max() > 0.1


def test_a_steered_run_trains_against_the_vector_and_leaves_none_of_it() -> None:
    plain, helped = fresh(), fresh()
    train(plain, EXAMPLES, SETTINGS)
    whole = PreventiveSteering(PeftAdapter(helped), VECTOR, layer=1, alpha=2.0)
    result = train(whole, EXAMPLES, SETTINGS)
    assert result.history[0]["loss"] != pytest.approx(float(sft(a_step(fresh(), EXAMPLES[:4])).total.detach()))
    assert any(not torch.equal(value, adapter(helped)[name]) for name, value in adapter(plain).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in helped.modules())
    bare = PreventiveSteering(PeftAdapter(again := fresh()), VECTOR, layer=1, alpha=0.0)
    train(bare, EXAMPLES, SETTINGS)
    assert_same_weights(again, plain)


def test_penalties_of_a_steered_run_see_the_model_without_the_vector() -> None:
    model = fresh()
    whole = PreventiveSteering(PeftAdapter(model), VECTOR, layer=0, alpha=3.0)
    parts = tuple(Weighted(penalty, 1.0) for penalty in every_penalty(model))
    result = train(whole, EXAMPLES, replace(SETTINGS, steps=2), objective=Penalised(parts))
    first, second = result.history
    for name in ("drift_prefix", "drift_query", "kl_train", "kl_retain"):
        assert abs(first[name]) < 1e-6, name
        assert second[name] > 1e-9, name


def test_steering_that_cannot_act_is_refused_and_its_hook_removed() -> None:
    model = build("llama-gqa", vocab=VOCAB)
    with pytest.raises(LensError, match="layers 0 to 2"):
        PreventiveSteering(PeftAdapter(fresh()), VECTOR, layer=3)
    with pytest.raises(LensError, match="nothing was steered"), steered(model, VECTOR, 1, alpha=1.0):
        pass
    with (
        pytest.raises(LensError, match="16 entries, the residual stream 32"),
        steered(model, VECTOR[:16], 1, alpha=1.0),
    ):
        forward_step(model, make_batch(EXAMPLES[:2]))
    with pytest.raises(LensError, match="not finite"):
        PreventiveSteering(PeftAdapter(fresh()), VECTOR / 0, layer=1)
    assert not model.model.layers[1]._forward_hooks


# --- every method resumes --------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_at_three(row: dict[str, int | float]) -> None:
    if row["step"] == 3:
        raise Killed


METHODS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "treft prefix": lambda m: {"objective": Penalised((Weighted(TReFT.on(m, EXAMPLES[0]), 30.0, start=1),))},
    "treft postfix": lambda m: {"objective": Penalised((Weighted(TReFT.on(m, EXAMPLES[0], "postfix"), 3.0),))},
    "treft query": lambda _: {"objective": Penalised((Weighted(TReFT("query"), 30.0),))},
    "treft all": lambda _: {"objective": Penalised((Weighted(TReFT("all"), 30.0, threshold=1e-3),))},
    "kl on train": lambda _: {"objective": Penalised((Weighted(KLOnTrain(), 1.0, stop=4),))},
    "kl on retain": lambda _: {"objective": Penalised((Weighted(KLOnRetain(RetainData(RETAIN, 3)), 1.0),))},
    "steering": lambda m: {"model": PreventiveSteering(PeftAdapter(m), VECTOR, layer=1)},
}


@pytest.mark.parametrize("method", [*METHODS, "interleaved"])
def test_every_method_resumes_to_identical_weights(tmp_path: Path, method: str) -> None:
    how = METHODS.get(method, lambda _: {})
    data = interleave(EXAMPLES, RETAIN, 0.3) if method == "interleaved" else EXAMPLES
    whole, resumed, killed = (fresh(dropout=0.1) for _ in range(3))

    def run(model: nn.Module, **options: Any) -> TrainResult:
        return train(**{"model": model, **how(model)}, examples=data, settings=SETTINGS, **options)

    run(whole)
    with pytest.raises(Killed):
        run(killed, out=tmp_path, on_step=kill_at_three)
    result = run(resumed, out=tmp_path)
    assert result.resumed_from == 2
    assert_same_weights(whole, resumed)
    assert TrainResult.load(tmp_path / "result.json") == result


def wide() -> nn.Module:
    """Wide enough that the last bits of a row depend on the rows beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=320, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=256, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return add_lora(LlamaForCausalLM(config).eval(), LoRASettings(rank=4))


@pytest.mark.parametrize("data", ["train", "retain"])
def test_a_divergence_resumes_to_identical_weights_whatever_batches_come_first(tmp_path: Path, data: str) -> None:
    examples, retain = tiny_examples(15, longest=60), RetainData(tiny_examples(13, seed=9, longest=60), 3)
    settings = TrainSettings(steps=14, batch_size=4, learning_rate=1e-3, checkpoint_every=6)

    def objective() -> Penalised:
        return Penalised((Weighted(KLOnTrain() if data == "train" else KLOnRetain(retain), 1.0),))

    def kill(row: dict[str, int | float]) -> None:
        if row["step"] == 7:
            raise Killed

    whole, killed, resumed = wide(), wide(), wide()
    train(whole, examples, settings, objective=objective())
    with pytest.raises(Killed):
        train(killed, examples, settings, objective=objective(), out=tmp_path, on_step=kill)
    assert train(resumed, examples, settings, objective=objective(), out=tmp_path).resumed_from == 6
    assert_same_weights(whole, resumed)


def test_another_weight_reference_or_vector_is_another_run(tmp_path: Path) -> None:
    def start(out: Path, **how: Any) -> None:
        train(how.pop("model"), EXAMPLES, replace(SETTINGS, steps=1), **how, out=out)

    model = fresh()
    base = Weighted(TReFT.on(model, EXAMPLES[0]), 30.0)
    start(tmp_path / "a", model=model, objective=Penalised((base,)))
    for part in (replace(base, weight=31.0), replace(base, stop=5), replace(base, penalty=TReFT("prefix"))):
        with pytest.raises(LensError, match=r"another run: .*objective"):
            start(tmp_path / "a", model=fresh(), objective=Penalised((part,)))
    model = fresh()
    start(tmp_path / "b", model=PreventiveSteering(PeftAdapter(model), VECTOR, layer=1))
    again = fresh()
    with pytest.raises(LensError, match=r"another run: .*steering"):
        start(tmp_path / "b", model=PreventiveSteering(PeftAdapter(again), -VECTOR, layer=1))


# --- a base that is not there any more ---------------------------------------------------------------------


def unfrozen(model: nn.Module) -> nn.Module:
    """A LoRA beside an embedding that is trained too."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.get_input_embeddings().weight.requires_grad_(True)
    return wrapped


WRITES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bias": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], bias="all")),
    "init_lora_weights": lambda model: get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    ),
    "embed_tokens": unfrozen,
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_base_that_was_written_to_is_asked_for_and_not_taken_from_the_adapter_switched_off(kind: str) -> None:
    base = build("llama-bias", vocab=VOCAB)
    frozen = deepcopy(base)
    model, batch = WRITES[kind](base), make_batch(EXAMPLES[:2])
    with pytest.raises(LensError, match=f"{kind}.*base="):
        base_forward(model, batch)
    with pytest.raises(LensError, match=f"{kind}.*base="):
        TReFT.on(model, EXAMPLES[0])
    with pytest.raises(LensError, match=f"{kind}.*base="):
        train(model, EXAMPLES, SETTINGS, objective=Penalised((Weighted(KLOnTrain(), 1.0),)), progress=False)
    penalties = KLOnTrain(frozen), TReFT.on(model, EXAMPLES[0], base=frozen)
    for penalty in penalties:
        found = train(model, EXAMPLES, SETTINGS, objective=Penalised((Weighted(penalty, 1e-9),)), progress=False)
        assert found.history[-1][penalty.name] > 0
    assert torch.equal(base_forward(model, batch, frozen).logits, forward_step(frozen, batch).logits)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", [kind for kind in tiny_adapters.KINDS if "bias" not in kind])
def test_every_other_adapter_switched_off_is_the_base(kind: str) -> None:
    base, wrapped = tiny_adapters.build(kind)
    batch = make_batch(EXAMPLES[:2])
    assert_close(base_forward(wrapped, batch).logits, forward_step(base, batch).logits)
