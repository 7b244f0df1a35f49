"""Rows one behind the other in one pass: the numbers are those of rows that are run alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steps import assert_same_step, nll, tuned
from tiny_chat import VOCAB, tiny_examples
from tiny_models import NAMES, WINDOW, build

from piggyback_lens.conversations.batch import Batch
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.frozen_lower import FrozenLower
from piggyback_lens.finetuning.objectives import Penalised, TReFT, Weighted
from piggyback_lens.finetuning.references import kv_reference, prefix_drift
from piggyback_lens.finetuning.steps import Step, forward_step, plan_for
from piggyback_lens.models import packing
from piggyback_lens.models.packing import Costs, Packing


def widened(model: Any) -> Any:
    """Attention windows that reach over every row, so that one mask suits all layers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner.config, "sliding_window", None) is not None:
        inner.config.sliding_window = 256
    return model


@pytest.fixture
def packs_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "costs_of", lambda _model: Costs(0.0, 1.0, 0.0))


@pytest.mark.usefixtures("packs_always")
@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_packed_step_has_the_loss_and_gradients_of_rows_run_alone(name: str, impl: str) -> None:
    model, examples = widened(tuned(name, impl)), tiny_examples(5)
    assert plan_for(model, make_batch(examples)).packing is not None
    assert_same_step(model, examples)


@pytest.mark.usefixtures("packs_always")
@pytest.mark.parametrize("name", NAMES)
def test_its_keys_and_values_lie_in_their_rows(name: str) -> None:
    model, examples = widened(tuned(name)), tiny_examples(4)
    (_, packed), (_, ordinary) = (nll(model, examples, share_prefix=share) for share in (True, False))
    real = make_batch(examples).attention_mask.bool()
    for field in ("keys", "values"):
        found, expected = getattr(packed, field), getattr(ordinary, field)
        assert isinstance(found, packing.UnpackedLayers)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[-1], found[len(found) - 1])
        assert torch.equal(found[1:][0], found[1])


@pytest.mark.parametrize("span", ["prefix", "query", "postfix", "all"])
def test_penalties_on_keys_and_values_are_those_of_whole_rows(span: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tuned("llama-gqa"), tiny_examples(4)
    objective = Penalised((Weighted(TReFT.on(model, examples[0], span, reference="own"), 3.0),))
    found = []
    monkeypatch.setattr(packing, "costs_of", lambda _model: Costs(0.0, 1.0, 0.0))
    for packs in (True, False):
        if not packs:
            monkeypatch.setattr(packing, "LONGEST", dict.fromkeys(packing.LONGEST, 0))
        batch = make_batch(examples)
        assert (plan_for(model, batch).packing is not None) == packs
        loss = objective(Step(model, batch, forward_step(model, batch), 0)).total
        parameters = [value for value in model.parameters() if value.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, parameters)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).detach().norm()) < 1e-4 * float(b.detach().norm())  # drifts are taken in float32


@pytest.mark.usefixtures("packs_always")
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2"])
def test_stored_activations_of_lower_layers_are_packed_alike(name: str) -> None:
    model, batch = build(name, vocab=VOCAB), make_batch(tiny_examples(4))
    assert plan_for(model, batch).packing is not None
    whole = forward_step(model, batch).logits
    with FrozenLower(model, 2).standing_in(batch):
        torch.testing.assert_close(forward_step(model, batch).logits, whole, rtol=1e-5, atol=1e-5)


def test_rows_beyond_a_window_keys_before_rotation_and_flash_attention_are_not_packed(packs_always: None) -> None:
    examples = tiny_examples(3)
    batch = make_batch(examples)
    assert batch.ids.shape[1] > WINDOW
    assert plan_for(build("mistral", vocab=VOCAB), batch).packing is None
    assert plan_for(build("gemma3", vocab=VOCAB), batch).packing is None
    llama = build("llama-gqa", vocab=VOCAB)
    assert plan_for(llama, batch).packing is not None
    assert plan_for(llama, make_batch(examples, share_prefix=False)).packing is None
    assert plan_for(llama, make_batch(examples, plain_keys=True)).packing is None
    llama.config._attn_implementation = "flash_attention_2"
    assert plan_for(llama, batch).packing is None


def test_models_without_positions_or_with_other_layers_than_attention_are_not_packed(packs_always: None) -> None:
    import transformers

    batch = make_batch(tiny_examples(3))
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    )
    assert plan_for(bloom, batch).packing is None
    gpt_neo = transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    assert plan_for(transformers.GPTNeoForCausalLM(gpt_neo), batch).packing is None
    convolving = another("Lfm2", layer_types=["conv", "full_attention"])
    assert isinstance(convolving.config, transformers.Lfm2Config)
    assert plan_for(convolving, batch).packing is None


def another(name: str, **settings: Any) -> Any:
    """A tiny model of another architecture; attention reaches over every row."""
    import transformers

    small = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**small, **settings, attn_implementation="eager")
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = 256
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.parameters() if p.ndim > 1):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@pytest.mark.usefixtures("packs_always")
@pytest.mark.parametrize(
    "name", ["Cohere2", "Gemma2", "GptOss", "GPTNeoX", "Mixtral", "Olmo2", "OPT", "Phi3", "Qwen3Moe"]
)
def test_other_architectures_are_packed_too(name: str) -> None:
    model, examples = another(name), tiny_examples(4)
    assert plan_for(model, make_batch(examples)).packing is not None
    steps = (forward_step(model, make_batch(examples, share_prefix=share)) for share in (True, False))
    packed, ordinary = (step.logits.detach() for step in steps)
    assert float((packed - ordinary).norm() / ordinary.norm()) < 1e-5
    assert float(ordinary.std()) > 1e-3


def test_it_is_packed_where_it_pays() -> None:
    model = build("llama-gqa", vocab=VOCAB)  # 32 wide: attention costs as much as the linear layers
    model.config.hidden_size = 4096
    assert plan_for(model, make_batch(tiny_examples(6))).packing is not None
    model.config.hidden_size = 1
    assert plan_for(model, make_batch(tiny_examples(6))).packing is None


def test_a_second_pass_is_run_only_where_it_costs_less_than_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-gqa", vocab=VOCAB, attn_implementation="sdpa")
    model.config.hidden_size = 4096
    cpu, gpu = (packing.assumed(torch.device(kind), 4096) for kind in ("cpu", "cuda"))
    assert 1500 < gpu.launch / gpu.token < 2500  # an H200: 80 ms to launch a pass of 8B, 47 us a token
    assert cpu.launch == 0

    def chosen(rows: int, width: int, n_prefix: int, packs: bool = True) -> str:
        ids = torch.ones((rows, width), dtype=torch.long)
        real = torch.arange(width) < width - torch.arange(rows)[:, None] % 8
        plan = packing.plan_of(model, Batch(ids, real.long()), n_prefix, packs=packs)
        return "packed" if plan.packing is not None else f"{plan.alone} alone" if plan.alone else "whole"

    sizes = [(16, 48, 24), (16, 455, 24), (32, 400, 200), (1, 48, 24), (16, 48, 0)]
    assert [chosen(*size) for size in sizes] == ["packed", "24 alone", "200 alone", "whole", "packed"]
    monkeypatch.setattr(packing, "costs_of", lambda _model: gpu)
    assert [chosen(*size) for size in sizes] == ["packed", "whole", "200 alone", "whole", "packed"]
    assert chosen(16, 48, 24, packs=False) == "whole"


@pytest.mark.parametrize(("impl", "limit"), packing.LONGEST.items())
def test_long_rows_are_not_packed(impl: str, limit: int, packs_always: None) -> None:
    model = build("llama-gqa", vocab=VOCAB, attn_implementation=impl)
    few = tiny_examples(4, longest=60)
    n_prefix, tokens = few[0].span("prefix").stop, [len(example.ids) for example in few]
    times = (limit - n_prefix) // (sum(tokens) - 4 * n_prefix)
    assert plan_for(model, make_batch(few * times)).packing is not None
    assert plan_for(model, make_batch(few * (times + 1))).packing is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_half_precision_stays_near(impl: str, dtype: torch.dtype, packs_always: None) -> None:
    model, batch = build("llama-gqa", vocab=VOCAB, attn_implementation=impl), make_batch(tiny_examples(4))
    exact = forward_step(model, batch).logits.detach()
    found = forward_step(model.to(dtype), batch).logits.detach()
    assert found.dtype == dtype
    assert float((found - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prefix_has_not_drifted_before_training(dtype: torch.dtype, packs_always: None) -> None:
    model, examples = build("llama-gqa", vocab=VOCAB, attn_implementation="sdpa").to(dtype), tiny_examples(6)
    batch = make_batch(examples)
    own = plan_for(model, batch).packing
    assert own is not None
    assert len(own.rows) % 64 == 0 or dtype == torch.float32
    drift = prefix_drift(forward_step(model, batch), kv_reference(model, examples[0])).detach()
    assert float(drift.max()) <= (1e-10 if dtype == torch.float32 else 1e-3)


def test_in_float32_rounding_is_no_drift_and_the_least_change_is(packs_always: None) -> None:
    model, examples = tuned("llama-gqa"), tiny_examples(6)
    lora_b = [value.data for name, value in model.named_parameters() if "lora_B" in name]
    keep, batch = TReFT.on(model, examples[0]), make_batch(examples)

    def drift(size: float) -> torch.Tensor:
        for value in lora_b:
            value.normal_(std=size, generator=torch.Generator().manual_seed(0))
        model.zero_grad()
        found = keep(Step(model, batch, forward_step(model, batch), 0))
        found.backward()
        return found.detach()

    assert float(drift(0.0)) == 0.0
    assert not any(value.grad.any() for value in model.parameters() if value.grad is not None)
    small, smaller = float(drift(1e-4)), float(drift(1e-5))
    assert 1e-8 < smaller < 1e-5
    assert small == pytest.approx(100 * smaller, rel=0.1)  # what is measured is not cut
    assert not keep.alike, "no further pass of the base"


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_treft_is_zero_before_training_in_half_precision_whatever_runs_beside_the_prefix(
    dtype: torch.dtype, share: bool, packs_always: None
) -> None:
    model, examples = tuned("llama-gqa").to(dtype), tiny_examples(24)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.zero_()
    keep, passes = TReFT.on(model, examples[0]), []
    for start in range(0, 24, 4):
        batch = make_batch(examples[start : start + 4], share_prefix=share, multiple=16)
        output = forward_step(model, batch)
        passes.append(output.prefix_pass)
        assert float(keep(Step(model, batch, output, 0)).detach()) == 0.0
    assert len(keep.alike) == len(set(passes)) < len(passes)  # one base pass for each shape
    for key, own in keep.alike.items():
        keep.alike[key] = replace(own, keys=2 * own.keys)
    assert float(keep(Step(model, batch, output, 0)).detach()) > 0.1  # and it is what the pass is held against
    keep.alike.clear()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(generator=torch.Generator().manual_seed(0))
    batch = make_batch(examples[:4], share_prefix=share, multiple=16)
    moved = float(keep(Step(model, batch, forward_step(model, batch), 0)).detach())
    exact = TReFT.on(model.float(), examples[0])
    expected = float(exact(Step(model, batch, forward_step(model, batch), 0)).detach())
    assert moved == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_prefix_is_packed_alike(dtype: torch.dtype, packs_always: None) -> None:
    model, batch = build("llama-gqa", vocab=VOCAB).to(dtype), make_batch(tiny_examples(5))
    plain = forward_step(model, batch)
    assert isinstance(plain.keys, packing.UnpackedLayers)
    given_own = forward_step(model, batch, (plain.prefix_keys, plain.prefix_values))
    assert isinstance(given_own.keys, packing.UnpackedLayers)
    apart = (plain.logits - given_own.logits).detach().abs().max()
    assert float(apart) <= (1e-5 if dtype == torch.float32 else 0.05)  # identity control
    doubled = tuple(2 * value for value in plain.prefix_values)
    changed = forward_step(model, batch, (plain.prefix_keys, doubled)).logits
    unshared = forward_step(model, replace(batch, share_prefix=False), (plain.prefix_keys, doubled)).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(changed, unshared, rtol=tolerance, atol=tolerance)
    assert float((changed - plain.logits).detach().abs().max()) > 0.1


def test_packing_works_under_autocast(packs_always: None) -> None:
    model, batch = build("llama-gqa", vocab=VOCAB, attn_implementation="sdpa"), make_batch(tiny_examples(4))
    exact = forward_step(model, batch).logits.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward_step(model, batch).logits.detach()
    assert float((found - exact).norm() / exact.norm()) < 0.05


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), n_prefix=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_token_has_one_place(lengths: list[int], n_prefix: int) -> None:
    width = n_prefix + max(lengths)
    ids = torch.arange(len(lengths) * width).reshape(len(lengths), width)
    ids[:, :n_prefix] = torch.arange(n_prefix)
    attention = (torch.arange(width) < n_prefix + torch.tensor(lengths)[:, None]).long()
    own = Packing.place(attention, n_prefix)
    alone = replace(own, prefix_alone=n_prefix > 0)
    filled = Packing.place(attention, n_prefix, multiple=8)
    assert filled.pack(ids)[0].shape[1] % 8 == 0
    assert torch.equal(filled.mask()[0, 0, : len(own.rows), : len(own.rows)], own.mask()[0, 0])
    assert not filled.mask()[0, 0, : len(own.rows), len(own.rows) :].any()
    (packed,) = own.pack(ids)
    assert torch.equal(torch.cat(alone.pack(ids), dim=1), packed)
    assert packed.shape[1] == n_prefix + sum(lengths)
    assert torch.equal(packed[0][own.places][attention.bool()], ids[attention.bool()])
    assert torch.equal(
        own.unpack(packed[:, None, :, None].float())[:, 0, :, 0][attention.bool()], ids[attention.bool()].float()
    )
    mask = own.mask()[0, 0]
    for i in range(len(own.rows)):
        for j in range(len(own.rows)):
            same = own.rows[i] == own.rows[j] or own.columns[j] < n_prefix
            assert bool(mask[i, j]) == bool(same and own.columns[j] <= own.columns[i])
