"""Training at the scale people work at: accumulation, autocast, activation checkpointing, optimisers, schedules."""

import importlib.util
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from test_training import EXAMPLES, SETTINGS, Killed, adapter, fresh, kill_at, without_seconds
from tiny_chat import VOCAB, tiny_examples
from tiny_models import build
from torch import nn

from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import batch_indices, make_batch
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.objectives import KLOnRetain, KLOnTrain, Penalised, TReFT, Weighted
from piggyback_lens.finetuning.optimisers import learning_rate_at
from piggyback_lens.finetuning.retain import RetainData
from piggyback_lens.finetuning.steps import Step, forward_step
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.models.backends import blocks_of
from piggyback_lens.models.packing import Costs
from piggyback_lens.models.recomputing import recomputed
from piggyback_lens.settings import LoRASettings, TrainSettings
from piggyback_lens.vectors.direction import Direction

RETAIN = tiny_examples(14)[8:]


def trained_alike(one: nn.Module, other: nn.Module, atol: float) -> None:
    for name, value in adapter(one).items():
        torch.testing.assert_close(value, adapter(other)[name], rtol=0, atol=atol)


# --- accumulation --------------------------------------------------------------------------------------


def every_penalty(model: nn.Module) -> Penalised:
    """Penalties of each kind: of the shared prefix, of every row, of the responses, and of other data."""
    return Penalised(
        (
            Weighted(TReFT.on(model, EXAMPLES[0]), 3.0),
            Weighted(TReFT("query"), 2.0),
            Weighted(KLOnTrain(), 0.7),
            Weighted(KLOnRetain(RetainData(RETAIN, batch_size=3)), 0.5),
        )
    )


def test_accumulated_passes_are_one_large_batch() -> None:
    large, cut = fresh().double(), fresh().double()
    settings = replace(SETTINGS, steps=4, batch_size=6)
    whole = train(large, EXAMPLES, settings, objective=every_penalty(large))
    parts = train(
        cut, EXAMPLES, replace(settings, batch_size=2, gradient_accumulation_steps=3), objective=every_penalty(cut)
    )
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-12), name
    assert whole.history[-1]["drift_query"] > 1e-6
    trained_alike(large, cut, 1e-6)  # losses are taken in float32


def test_an_accumulated_step_is_the_mean_over_its_tokens_and_no_mean_of_means() -> None:
    """Oracle: rows one by one through the plain model."""
    model, six = fresh().double(), EXAMPLES[:6]
    chosen = batch_indices(tuple(len(e.ids) for e in six), 6, 0, 0)
    by_row = []
    for number in chosen:
        ids, n = torch.tensor([six[number].ids]), six[number].n_prompt
        log_probs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        by_row.append(-log_probs[n - 1 : -1].gather(-1, ids[0, n:, None])[:, 0])
    expected = torch.cat(by_row).mean()
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(adapter(model).values()))]).norm()
    means = torch.stack([torch.cat(by_row[i : i + 2]).mean() for i in (0, 2, 4)]).mean()
    row = train(model, six, replace(SETTINGS, steps=1, batch_size=2, gradient_accumulation_steps=3)).history[0]
    assert row["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert abs(float((means - expected).detach())) > 1e-4  # what a mean of means would have given
    assert row["tokens"] == len(torch.cat(by_row))


def test_too_few_examples_for_a_step_are_refused_with_both_numbers() -> None:
    settings = TrainSettings(batch_size=4, gradient_accumulation_steps=3)
    with pytest.raises(LensError, match=r"batch_size is 4, gradient_accumulation_steps 3 and there are 10 examples"):
        train(fresh(), EXAMPLES, settings)


# --- activation checkpointing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mistral", "gemma3", "qwen3"])
def test_checkpointing_changes_no_gradient_and_keeps_keys_and_values(name: str) -> None:
    model = fresh(name, dropout=0.3)
    for index, value in enumerate(adapter(model).values()):
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
    objective = Penalised((Weighted(TReFT.on(model, EXAMPLES[0]), 3.0), Weighted(TReFT("query"), 2.0)))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    mlp = next(part for part_name, part in blocks_of(model)[0].named_modules() if part_name == "mlp")
    handle = mlp.register_forward_pre_hook(count)
    found = []
    for plan in (True, False):
        batch = make_batch(EXAMPLES, share_prefix=plan)
        for recomputes in (False, True):
            model.train()
            torch.manual_seed(0)
            calls, loss = 0, None
            if recomputes:
                with recomputed(model):
                    loss = objective(Step(model, batch, forward_step(model, batch), 0)).total
            else:
                loss = objective(Step(model, batch, forward_step(model, batch), 0)).total
            forwards = calls
            gradients = torch.autograd.grad(loss, list(adapter(model).values()))
            assert (calls > forwards) == recomputes  # blocks are run again backwards
            found.append([loss.detach(), *gradients])
        for a, b in zip(*found[-2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    handle.remove()
    assert not any("forward" in vars(block) for block in blocks_of(model))


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    model, batch = fresh(), make_batch(EXAMPLES)

    def kept(recomputes: bool) -> int:
        sizes = 0

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal sizes
            sizes += value.numel()
            return value

        settings = replace(SETTINGS, gradient_checkpointing=recomputes)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            if settings.gradient_checkpointing:
                with recomputed(model):
                    forward_step(model, batch)
            else:
                forward_step(model, batch)
        return sizes

    assert kept(True) < 0.5 * kept(False)


def test_a_checkpointed_run_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # The way through the model goes by measured costs, and dropout falls otherwise where that differs.
    monkeypatch.setattr("piggyback_lens.finetuning.training.known_costs", lambda _model: Costs(1e-2, 1e-5, 1e-8))
    plain, again = fresh(dropout=0.3), fresh(dropout=0.3)
    one = train(plain, EXAMPLES, SETTINGS)
    two = train(again, EXAMPLES, replace(SETTINGS, gradient_checkpointing=True))
    assert without_seconds(one) == without_seconds(two)
    trained_alike(plain, again, 0.0)


def test_what_acts_by_hooks_is_not_checkpointed() -> None:
    trainable = HookTrainable(build("llama-gqa", vocab=VOCAB), Direction.zeros(32, [1]))
    with pytest.raises(LensError, match=r"HookTrainable acts by hooks, .* gradient_checkpointing=False"):
        train(trainable, EXAMPLES, replace(SETTINGS, gradient_checkpointing=True))


# --- precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("span", ["prefix", "query", "all"])
def test_drift_is_zero_before_training_in_every_precision(weights: torch.dtype, share: bool, span: Any) -> None:
    for bf16 in (False, True):
        model = add_lora(build("llama-gqa", vocab=VOCAB).to(weights), LoRASettings(rank=2))
        assert {value.dtype for value in adapter(model).values()} == {torch.float32}
        keep = TReFT.on(model, EXAMPLES[0]) if span == "prefix" else TReFT(span)
        settings = replace(SETTINGS, steps=3, bf16=bf16, share_prefix=share, learning_rate=1e-12, warmup_fraction=0.0)
        result = train(model, EXAMPLES, settings, objective=Penalised((Weighted(keep, 3.0),)))
        assert result.history[0][f"drift_{span}"] == 0.0
        moved = train(
            model, EXAMPLES, replace(settings, learning_rate=0.03), objective=Penalised((Weighted(keep, 0.0),))
        )
        assert moved.history[-1].get(f"drift_{span}", 1.0) > 1e-6


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_half_precision_stays_near_the_loss_of_float32(weights: torch.dtype) -> None:
    def losses(model: Any, bf16: bool) -> torch.Tensor:
        result = train(add_lora(model, LoRASettings(rank=2)), EXAMPLES, replace(SETTINGS, bf16=bf16))
        return torch.tensor([row["loss"] for row in result.history])

    exact = losses(build("llama-gqa", vocab=VOCAB), False)
    found = losses(build("llama-gqa", vocab=VOCAB).to(weights), True)
    assert 0 < float((found - exact).abs().max()) < 0.03 * float(exact.mean())


def test_a_run_in_half_precision_resumes_to_its_own_weights(tmp_path: Path) -> None:
    settings = replace(SETTINGS, bf16=True, batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    whole, killed = (add_lora(build("llama-gqa", vocab=VOCAB).bfloat16(), LoRASettings(rank=2)) for _ in range(2))
    keep = lambda model: Penalised((Weighted(TReFT.on(model, EXAMPLES[0]), 3.0),))  # noqa: E731
    train(whole, EXAMPLES, settings, objective=keep(whole), out=tmp_path / "whole")
    with suppress(Killed):
        train(killed, EXAMPLES, settings, objective=keep(killed), out=tmp_path / "killed", on_step=kill_at(4))
    resumed = add_lora(build("llama-gqa", vocab=VOCAB).bfloat16(), LoRASettings(rank=2))
    assert train(resumed, EXAMPLES, settings, objective=keep(resumed), out=tmp_path / "killed").resumed_from == 3
    trained_alike(whole, resumed, 0.0)


# --- optimisers and schedules --------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_an_optimiser_is_transformers_own_and_resumes_to_identical_weights(tmp_path: Path, optim: Any) -> None:
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    lora = LoRASettings(rank=64)  # 8-bit averages begin at 4,096 numbers
    made = lambda: add_lora(build("llama-gqa", vocab=VOCAB), lora)  # noqa: E731
    settings = replace(SETTINGS, optim=optim, weight_decay=0.1)
    whole, killed, resumed = made(), made(), made()
    train(whole, EXAMPLES, settings, out=tmp_path / "whole")
    with suppress(Killed):
        train(killed, EXAMPLES, settings, out=tmp_path / "killed", on_step=kill_at(4))
    assert train(resumed, EXAMPLES, settings, out=tmp_path / "killed").resumed_from == 3
    trained_alike(whole, resumed, 0.0)
    usual = made()
    train(usual, EXAMPLES, replace(settings, optim="adamw_torch"))
    trained_alike(whole, usual, 0.05)
    assert any((value - adapter(made())[name]).abs().max() > 1e-3 for name, value in adapter(whole).items())


def test_an_optimiser_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Any) -> Any:
        raise ImportError("You need to install `bitsandbytes`")

    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", missing)
    with pytest.raises(LensError, match=r"'adamw_8bit' needs bitsandbytes: pip install 'piggyback-lens\[quant\]'"):
        train(fresh(), EXAMPLES, replace(SETTINGS, optim="adamw_8bit"))
    assert importlib.util.find_spec("transformers") is not None


@pytest.mark.parametrize(
    "name", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt", "cosine_with_restarts", "polynomial"]
)
def test_a_schedule_is_transformers_own_without_its_first_step_at_zero(name: Any) -> None:
    settings = TrainSettings(steps=10, learning_rate=2.0, warmup_fraction=0.2, lr_scheduler_type=name)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=2.0)
    theirs = transformers.get_scheduler(name, optimiser, 2, 10)
    rates = []
    for _ in range(10):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    assert [learning_rate_at(settings, index) for index in range(2)] == [*rates[1:2], 2.0]
    assert [learning_rate_at(settings, index) for index in range(2, 10)] == pytest.approx(rates[2:])


def test_schedules_that_do_not_go_with_their_settings_are_refused() -> None:
    with pytest.raises(LensError, match=r"min_lr_fraction is 0\.1 and lr_scheduler_type 'linear'"):
        TrainSettings(lr_scheduler_type="linear", min_lr_fraction=0.1)
    with pytest.raises(LensError, match="'constant', which has no warm-up"):
        TrainSettings(lr_scheduler_type="constant")
    assert learning_rate_at(TrainSettings(lr_scheduler_type="constant", warmup_fraction=0.0), 7) == 1e-4


def test_settings_that_came_later_leave_the_identity_of_older_runs_alone() -> None:
    assert "optim" not in TrainSettings().identity()
    assert TrainSettings(optim="adamw_torch_fused").identity()["optim"] == "adamw_torch_fused"
    assert SimpleNamespace(**TrainSettings().identity()).steps == 60
