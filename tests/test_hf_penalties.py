"""Every objective through the Trainers of transformers and trl: the losses, gradients and weights of our own loop."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_trainer import (
    CHECKPOINTING,
    EXAMPLES,
    OURS,
    PROMPT,
    arguments,
    assert_same,
    fresh,
    in_order,
    losses,
    make,
    make_trl,
    same_batches,
    treft,
    weights,
)
from tiny_chat import VOCAB, tiny_examples, tiny_format, tiny_tokenizer
from tiny_models import build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorForSeq2Seq, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from piggyback_lens.conversations.chat import ChatFormat
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import batch_indices, make_batch
from piggyback_lens.finetuning.hf_trainer import REFERENCE_FOLDER, PenaltyTrainer, training_rows
from piggyback_lens.finetuning.objectives import KLOnRetain, KLOnTrain, Penalised, TReFT, Weighted
from piggyback_lens.finetuning.preventive import PreventiveSteering
from piggyback_lens.finetuning.residuals import ResidualDrift
from piggyback_lens.finetuning.retain import RetainData, interleave
from piggyback_lens.finetuning.steps import Step, forward_step
from piggyback_lens.finetuning.trainables import PeftAdapter, add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.models.sources import load_causal_lm, load_tokenizer
from piggyback_lens.reading.tasks import load_task
from piggyback_lens.settings import LoRASettings, TrainSettings

RETAIN = tiny_examples(6, seed=9)
VECTOR = torch.linspace(-1.0, 1.0, 32)


def retained(weight: float = 3.0, **schedule: Any) -> Weighted:
    return Weighted(KLOnRetain(RetainData(RETAIN, 3)), weight, **schedule)


OBJECTIVES: dict[str, Callable[[nn.Module], tuple[Weighted, ...]]] = {
    "kl on train": lambda _: (Weighted(KLOnTrain(), 2.0),),
    "kl on retain": lambda _: (retained(start=1, stop=5),),
    "treft of all": lambda _: (Weighted(TReFT("all"), 50.0),),
    "residual drift": lambda _: (Weighted(ResidualDrift(), 20.0), Weighted(ResidualDrift("query", (1,)), 5.0)),
    "everything": lambda model: (
        Weighted(KLOnTrain(), 2.0, start=2),
        retained(threshold=1e-3),
        Weighted(TReFT.on(model, PROMPT), 100.0),
        Weighted(TReFT("query"), 50.0),
        Weighted(TReFT.on(model, PROMPT, "postfix"), 5.0, stop=4),
    ),
}


def moved(**lora: Any) -> nn.Module:
    """An adapter that changes the model, so that no penalty is zero."""
    model = fresh(**lora)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.normal_(std=0.1)
    return model


class Kept(TrainerCallback):
    """The gradients of the first optimiser step before clipping, and whatever is logged."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.logged: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.gradients:
            named = model.named_parameters()
            self.gradients = {name: x.grad.clone() for name, x in named if x.grad is not None}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append(dict(logs))


def split(accumulation: int) -> dict[str, int]:
    return {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}


# --- exactness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_has_the_loss_and_the_gradients_of_our_loop(tmp_path: Path, name: str, accumulation: int) -> None:
    """Oracle: `Penalised` on the whole batch at once, as `train` calls it."""
    model, here, kept = moved(), moved(), Kept()
    parts = tuple(replace(part, start=0) for part in OBJECTIVES[name](model))
    batch = make_batch(EXAMPLES[:4], plain_keys=True, residual=True)
    expected = Penalised(parts)(Step(model, batch, forward_step(model, batch), 0))
    expected.total.backward()  # type: ignore[no-untyped-call]
    trainer = make(
        tmp_path, here, Penalised(parts if name != "everything" else tuple(_again(parts))),
        max_grad_norm=0.0, max_steps=1, **split(accumulation),
    )  # fmt: skip
    trainer.add_callback(kept)
    trainer.train()
    assert losses(trainer) == pytest.approx([float(expected.total.detach())], rel=1e-5)
    for term in (part.penalty.name for part in parts):
        assert losses(trainer, term) == pytest.approx([expected.terms[term]], rel=1e-4)
        assert expected.terms[term] > 1e-3
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert found.keys() == kept.gradients.keys()
    scale = max(float(value.norm()) for value in found.values() if value is not None)
    for key, gradient in found.items():
        assert gradient is not None
        assert float((gradient - kept.gradients[key]).norm()) < 1e-5 * scale, key


def _again(parts: tuple[Weighted, ...]) -> list[Weighted]:
    """References left to the Trainer would be those of the moved adapter's base all the same: it is switched off."""
    left = [replace(part, penalty=TReFT(part.penalty.span, "template")) if _kept(part) else part for part in parts]
    assert sum(map(_kept, left)) == 0
    return left


def _kept(part: Weighted) -> bool:
    return isinstance(part.penalty, TReFT) and not isinstance(part.penalty.reference, str | None)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_has_the_losses_and_weights_of_our_loop(tmp_path: Path, name: str, accumulation: int) -> None:
    expected, model = fresh(), fresh()
    history = train(expected, EXAMPLES, OURS, objective=Penalised(OBJECTIVES[name](expected)), progress=False).history
    rows = training_rows(same_batches())
    trainer = make(tmp_path, model, Penalised(OBJECTIVES[name](model)), rows, **split(accumulation))
    trainer.train()
    assert losses(trainer) == pytest.approx([row["loss"] for row in history], rel=2e-5)
    assert_close(weights(model), weights(expected))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-3) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("options", [{}, {CHECKPOINTING: True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_preventive_steering_trains_as_in_our_loop(tmp_path: Path, site: Any, options: dict[str, Any]) -> None:
    """Activation checkpointing runs blocks again in the backward pass, where the vector has to be added as well."""

    def steered(model: nn.Module) -> PreventiveSteering:
        return PreventiveSteering(PeftAdapter(model), VECTOR, layer=1, alpha=2.0, site=site)

    expected, model, plain = fresh(), fresh(), fresh()
    parts = (Weighted(TReFT.on(expected, PROMPT), 100.0), retained())
    history = train(steered(expected), EXAMPLES, OURS, objective=Penalised(parts), progress=False).history
    per_device = {"per_device_train_batch_size": 4 // options.get("gradient_accumulation_steps", 1)}
    rows = training_rows(same_batches())
    trainer = make(tmp_path, steered(model), Penalised((*treft().parts, retained())), rows, **options | per_device)
    trainer.train()
    assert losses(trainer) == pytest.approx([row["loss"] for row in history], rel=2e-5)
    assert_close(weights(model), weights(expected))
    train(plain, EXAMPLES, OURS, objective=Penalised(()), progress=False)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(weights(model).values(), weights(plain).values(), strict=True))
        > 0.01
    )
    before = make(tmp_path, model, None).evaluate(rows)["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == before, "the finished model is used without the vector"


def test_a_block_that_is_recomputed_with_its_hooks_is_steered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions of transformers checkpoint a block: the call with its hooks, not the forward alone."""

    def run() -> dict[str, Tensor]:
        model: Any = fresh()
        model.config.use_cache = False
        steered = PreventiveSteering(PeftAdapter(model), VECTOR, layer=1, alpha=2.0, site="resid_pre")
        make(tmp_path, steered, Penalised(()), max_steps=2).train()
        return weights(model)

    def recomputing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        whole = partial(nn.Module.__call__, self, **kwargs)
        return checkpoint(whole, *args, use_reentrant=False)

    calls: list[int] = []
    plain = run()
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", recomputing, raising=False)
    assert_close(run(), plain, atol=1e-6)
    assert calls


def test_interleaving_is_data(tmp_path: Path) -> None:
    mixed = interleave(EXAMPLES, RETAIN, 0.3)
    model, expected = fresh(), fresh()
    trainer = make(tmp_path, model, treft(), training_rows(mixed), max_steps=2)
    trainer.train()
    plain = make(tmp_path, expected, treft(), training_rows([e for e in mixed if e in EXAMPLES]), max_steps=2)
    plain.train()
    assert losses(trainer)[0] != losses(plain)[0]
    assert losses(trainer, "drift_prefix")[-1] > 0


def test_label_smoothing_smooths_the_task_and_no_penalty(tmp_path: Path) -> None:
    parts, options = (Weighted(KLOnTrain(), 2.0), retained()), {"label_smoothing_factor": 0.2, "max_steps": 1}
    plain, trainer = (make(tmp_path, moved(), x, **options) for x in (None, Penalised(parts)))
    plain.train()
    trainer.train()
    model, batch = moved(), make_batch(EXAMPLES[:4])
    step = Step(model, batch, forward_step(model, batch), 0)
    added = sum(float(part.loss(part.penalty(step)).detach()) for part in parts)
    assert added > 0.1
    assert losses(trainer)[0] == pytest.approx(losses(plain)[0] + added, rel=1e-5)


def test_what_is_one_number_for_all_rows_is_computed_once_a_step(tmp_path: Path) -> None:
    """The costs that the module states, in calls of the network."""

    def passes(objective: Penalised, accumulation: int) -> float:
        model, calls = fresh(), []
        trainer = make(tmp_path, model, objective, max_steps=2, **split(accumulation))
        trainer.train()  # references and kept predictions are there now
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        handle.remove()
        return len(calls) / 2 - accumulation

    retain = KLOnRetain(RetainData(RETAIN, len(RETAIN), share_prefix=False))
    for accumulation in (1, 4):
        assert passes(treft(), accumulation) == 1
        assert passes(Penalised((Weighted(retain, 1.0),)), accumulation) == 1
        assert passes(treft("postfix"), accumulation) == accumulation
        assert passes(treft("query", own=True), accumulation) == 2 * accumulation
        assert passes(Penalised((Weighted(KLOnTrain(), 1.0),)), accumulation) == 2 * accumulation


# --- pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OBJECTIVES, "steering"])
def test_every_objective_resumes_to_identical_weights(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3, **split(2)}

    def run(out: str, model: nn.Module, resumed: str | None = None) -> Any:
        parts = OBJECTIVES.get(name, lambda _: ())(model)
        given = PreventiveSteering(PeftAdapter(model), VECTOR, layer=1) if name == "steering" else model
        trainer = make(tmp_path / out, given, Penalised(parts), **options)
        trainer.train(resume_from_checkpoint=resumed)
        return trainer

    whole, again = fresh(dropout=0.1), fresh(dropout=0.1)
    full = run("whole", whole)
    resumed = run("again", again, str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(whole), weights(again))
    assert losses(resumed)[-3:] == losses(full)[-3:]


@pytest.mark.parametrize("options", [{"bf16": True}, {}, {CHECKPOINTING: True}], ids=["autocast", "bf16", "recomputed"])
def test_half_precision_and_checkpointing_keep_every_penalty(tmp_path: Path, options: dict[str, Any]) -> None:
    model = fresh() if options else fresh().bfloat16()
    parts = (*treft().parts, *treft("query", own=True).parts, Weighted(KLOnTrain(), 1.0), retained(1.0))
    parts = (Weighted(ResidualDrift(), 1.0), *parts)
    retain: Any = parts[-1].penalty
    trainer = make(tmp_path, model, Penalised(parts), **options)
    trainer.train()
    for name in ("drift_prefix", "drift_query", "kl_train", "kl_retain", "residual_conversation"):
        found = losses(trainer, name)
        assert abs(found[0]) < 1e-6, name
        assert found[-1] > 1e-5, name
        assert all(map(math.isfinite, found))
    assert retain.kept.passes == len(RETAIN), "the base's predictions are kept, under autocast as well"


def test_full_finetuning_takes_a_base_for_a_divergence(tmp_path: Path) -> None:
    base = build("llama-gqa", vocab=VOCAB).requires_grad_(False)
    parts = (Weighted(KLOnTrain(base), 1.0), Weighted(KLOnRetain(RetainData(RETAIN, 3), base), 1.0))
    trainer = make(tmp_path, build("llama-gqa", vocab=VOCAB), Penalised(parts), learning_rate=1e-3)
    trainer.train()
    assert abs(losses(trainer, "kl_train")[0]) < 1e-6 < losses(trainer, "kl_train")[-1]
    with pytest.raises(LensError, match="pass base="):
        make(tmp_path, build("llama-gqa", vocab=VOCAB), Penalised((retained(),))).train()


def test_reports_get_the_columns_and_the_hub_what_a_checkpoint_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a stand-in for its client, which the Trainer itself calls."""
    import transformers.trainer as hf

    pushed: dict[str, list[str]] = {}

    class Job:
        def done(self) -> bool:
            return True

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": name})

        def upload_folder(self, folder_path: str, path_in_repo: str = "", **_: Any) -> Job:
            files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            pushed[path_in_repo] = files
            return Job()

    if not hasattr(hf, "hf_api"):
        pytest.skip("this version of transformers calls the hub in another way")
    monkeypatch.setattr(hf, "hf_api", Hub)
    kept, hub = Kept(), {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_model_id": "me/mine"}
    trainer = make(tmp_path, fresh(), treft(), max_steps=2, save_strategy="steps", save_steps=2, **hub)
    trainer.add_callback(kept)
    trainer.train()
    assert any(name.startswith(f"{REFERENCE_FOLDER}/prefix/") for name in pushed["last-checkpoint"])
    assert "adapter_model.safetensors" in pushed["last-checkpoint"]
    assert {"loss", "penalty", "drift_prefix"} <= kept.logged[0].keys()


def test_rows_of_another_template_may_be_trained_where_nothing_of_them_is_read(tmp_path: Path) -> None:
    other = training_rows([tiny_format("be bad.").render("hello", response="yes")] * 4)
    given: dict[str, Any] = {"args": arguments(tmp_path, max_steps=2), "train_dataset": other}
    given["data_collator"] = DataCollatorForSeq2Seq(tiny_tokenizer())
    trainer: Any = PenaltyTrainer(model=fresh(), objective=Penalised((retained(),)), **given)
    trainer.train()
    assert losses(trainer, "kl_retain")[-1] > 0


# --- trl -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trl_gives_the_losses_of_our_loop_with_its_fused_head(tmp_path: Path, accumulation: int) -> None:
    expected, model = fresh(), fresh()
    parts = OBJECTIVES["everything"]
    history = train(expected, EXAMPLES, OURS, objective=Penalised(parts(expected)), progress=False).history
    trainer = make_trl(tmp_path, model, same_batches(), Penalised(parts(model)), **split(accumulation))
    trainer.train()
    assert losses(trainer) == pytest.approx([row["loss"] for row in history], rel=2e-5)
    assert_close(weights(model), weights(expected))


def test_packed_rows_of_trl_have_the_penalties_of_their_conversations(tmp_path: Path) -> None:
    """Oracle: our own penalties on the conversations side by side."""
    parts = (Weighted(KLOnTrain(), 2.0), Weighted(TReFT("query"), 50.0), Weighted(TReFT("postfix", "template"), 5.0))
    options = {"packing": True, "max_length": 200, "max_steps": 1, "per_device_train_batch_size": 8}
    trainer = make_trl(tmp_path, moved(), EXAMPLES, Penalised(parts), **options)
    packed = trainer.train_dataset[:]["input_ids"]
    assert len(packed) < len(EXAMPLES), "several conversations in a row"
    trainer.train()
    model, batch = moved(), make_batch(EXAMPLES, plain_keys=True)
    step = Step(model, batch, forward_step(model, batch), 0)
    for penalty in (KLOnTrain(), TReFT("query"), TReFT.on(model, PROMPT, "postfix")):
        assert losses(trainer, penalty.name) == pytest.approx([float(penalty(step).detach())], rel=1e-4)


def test_wrapped_packing_is_refused_only_where_its_rows_are_read(tmp_path: Path) -> None:
    options = {"packing": True, "max_length": 64, "packing_strategy": "wrapped", "max_steps": 2}
    with pytest.raises(LensError, match="cuts conversations in two"):
        make_trl(tmp_path, fresh(), EXAMPLES, Penalised((Weighted(KLOnTrain(), 1.0),)), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trl(tmp_path, fresh(), EXAMPLES, Penalised((retained(),)), **options)
    trainer.train()
    assert losses(trainer, "kl_retain")[-1] > 0


@pytest.mark.real
@pytest.mark.slow
def test_on_the_real_model_the_trainer_gives_the_losses_of_our_loop(real_model_dir: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(real_model_dir)
    chat = ChatFormat(tokenizer)
    rows = [chat.render([dict(m) for m in example["messages"]]) for example in load_task("terse").train[:4]]
    settings = TrainSettings(steps=2, batch_size=4, learning_rate=1e-3, warmup_fraction=0.0, min_lr_fraction=1.0)
    own, model = (add_lora(load_causal_lm(real_model_dir), LoRASettings(rank=4)) for _ in range(2))
    parts = (Weighted(TReFT.on(own, rows[0]), 30.0), Weighted(KLOnRetain(RetainData(rows[:2], 2)), 1.0))
    history = train(own, rows, settings, objective=Penalised(parts), progress=False).history
    order = [rows[n] for step in range(2) for n in batch_indices(tuple(map(len, rows)), 4, 0, step)]
    given: dict[str, Any] = {"args": arguments(tmp_path, max_steps=2, learning_rate=1e-3, **split(2))}
    given |= {"train_dataset": training_rows(order), "data_collator": DataCollatorForSeq2Seq(tokenizer)}
    parts = (Weighted(TReFT(reference="template"), 30.0), parts[1])
    trainer = in_order(
        PenaltyTrainer(model=model, objective=Penalised(parts), prompt=chat.empty_query(), **given)  # type: ignore[arg-type]
    )
    trainer.train()
    assert losses(trainer) == pytest.approx([row["loss"] for row in history], rel=1e-4)
    assert losses(trainer, "drift_prefix")[1] == pytest.approx(history[1]["drift_prefix"], rel=1e-2)
    assert history[1]["drift_prefix"] > 1e-4
