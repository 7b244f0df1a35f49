import importlib.util
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chat import VOCAB, tiny_examples, tiny_format, tiny_tokenizer
from tiny_models import build
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import piggyback_lens.finetuning.hf_trainer as module
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import batch_indices, make_batch
from piggyback_lens.finetuning.hf_rows import check_prefixes, conversations
from piggyback_lens.finetuning.hf_trainer import REFERENCE_FOLDER, PenaltyTrainer, training_rows
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.objectives import KLOnTrain, Penalised, TReFT, Weighted
from piggyback_lens.finetuning.references import SPANS, kv_reference, span_range
from piggyback_lens.finetuning.steps import Step, forward_step
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.models.pair import hook_model
from piggyback_lens.models.views import evaluating
from piggyback_lens.settings import LoRASettings, TrainSettings
from piggyback_lens.vectors.direction import Direction

EXAMPLES = tiny_examples(8)
PROMPT = tiny_format().empty_query()


def fresh(name: str = "llama-gqa", **lora: Any) -> nn.Module:
    return add_lora(build(name, vocab=VOCAB), LoRASettings(**{"rank": 4} | lora))


def given_arguments(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "remove_unused_columns": False, "seed": 0,
    }  # fmt: skip


def arguments(out: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(**given_arguments(out) | options)


def treft(
    span: Any = "prefix", own: bool = False, weight: float = 100.0, base: Any = None, **schedule: Any
) -> Penalised:
    return Penalised((Weighted(TReFT(span, None if own else "template", base), weight, **schedule),))


class InOrder(Sequence[int]):
    """A sampler: rows as they stand."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        return range(self.n)[index]


def in_order(trainer: Any) -> Any:
    trainer._get_train_sampler = lambda *_: InOrder(len(trainer.train_dataset))
    return trainer


def make(out: Path, model: Any, objective: Penalised | None, rows: Any = None, **options: Any) -> Any:
    rows = training_rows(EXAMPLES) if rows is None else rows
    cls: Any = Trainer if objective is None else PenaltyTrainer
    given = {} if objective is None else {"objective": objective, "prompt": PROMPT}
    collator = DataCollatorForSeq2Seq(tiny_tokenizer())
    trainer = cls(model=model, args=arguments(out, **options), train_dataset=rows, data_collator=collator, **given)
    return in_order(trainer)


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


# --- the same training as ours ---------------------------------------------------------------------------

OURS = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0, min_lr_fraction=1.0)


def same_batches() -> list[RenderedPrompt]:
    """The examples in the order in which our loop sees them."""
    lengths = tuple(len(example.ids) for example in EXAMPLES)
    return [EXAMPLES[i] for step in range(OURS.steps) for i in batch_indices(lengths, 4, OURS.seed, step)]


def span_settings() -> list[dict[str, Any]]:
    return [
        {"span": "prefix", "start": 1, "threshold": 1e-3},
        {"span": "postfix"},
        {"span": "query", "own": True},
        {"span": "all", "own": True, "stop": 4},
    ]


def ours(span: str, own: bool, schedule: dict[str, Any]) -> tuple[nn.Module, list[float], list[float]]:
    model = fresh()
    penalty = TReFT.on(model, PROMPT, span, reference="own" if own else "template")  # type: ignore[arg-type]
    part = Weighted(penalty, 100.0, **schedule)
    history = train(model, EXAMPLES, OURS, objective=Penalised((part,))).history
    return model, [row["loss"] for row in history], [row.get(f"drift_{span}", math.nan) for row in history]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", span_settings(), ids=lambda how: how["span"])
def test_the_trainer_gives_the_losses_and_weights_of_our_loop(
    tmp_path: Path, how: dict[str, Any], accumulation: int
) -> None:
    schedule = {name: value for name, value in how.items() if name not in ("span", "own")}
    expected, loss, drift = ours(how["span"], how.get("own", False), schedule)
    model = fresh()
    trainer = make(
        tmp_path, model, treft(**how), training_rows(same_batches()),
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train()
    assert losses(trainer) == pytest.approx(loss, rel=2e-4)
    found = losses(trainer, f"drift_{how['span']}")
    counts = range(schedule.get("start", 0), schedule.get("stop", 6))
    assert found == pytest.approx([drift[step] for step in counts], rel=2e-2, abs=1e-9)
    assert max(found) > 1e-4
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(expected)[name], rtol=0, atol=2e-3)
    assert any((value - weights(fresh())[name]).abs().max() > 0.01 for name, value in weights(model).items())


def test_rows_of_another_prefix_are_refused_in_every_micro_batch(tmp_path: Path) -> None:
    rows = training_rows([*EXAMPLES[:2], *tiny_examples(2, system="be a cat.")])
    trainer = make(
        tmp_path, fresh(), treft(span="prefix"), rows, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    with pytest.raises(LensError, match="does not begin with the reference's prefix"):
        trainer.train()


def test_a_log_of_several_steps_has_the_mean_of_the_penalty_over_those_that_had_one(tmp_path: Path) -> None:
    each = make(tmp_path / "each", fresh(), treft(start=3), logging_steps=1)
    each.train()
    pairs = make(tmp_path / "pairs", fresh(), treft(start=3), logging_steps=2)
    pairs.train()
    single = {row["step"]: row["drift_prefix"] for row in each.state.log_history if "drift_prefix" in row}
    found = {row["step"]: row["drift_prefix"] for row in pairs.state.log_history if "drift_prefix" in row}
    assert sorted(single) == [4, 5, 6]
    assert found[4] == pytest.approx(single[4], rel=1e-3)
    assert found[6] == pytest.approx((single[5] + single[6]) / 2, rel=1e-3)
    penalties = [row["penalty"] for row in each.state.log_history if "penalty" in row]
    together = [row["penalty"] for row in pairs.state.log_history if "penalty" in row]
    assert together == pytest.approx([penalties[0] / 2, sum(penalties[1:]) / 2], rel=1e-3)


def test_the_logged_penalty_is_its_part_of_the_logged_loss(tmp_path: Path) -> None:
    model = fresh()
    trainer = make(tmp_path, model, treft(threshold=1e-3), gradient_accumulation_steps=2, logging_steps=2)
    trainer.train()
    plain = make(tmp_path, fresh(), None, gradient_accumulation_steps=2, logging_steps=2)
    plain.train()
    first = trainer.state.log_history[0]
    assert first["penalty"] == pytest.approx(100 * max(0.0, 2 * first["drift_prefix"] - 1e-3) / 2, rel=0.05)
    assert first["loss"] - first["penalty"] == pytest.approx(losses(plain)[0], rel=1e-2)


def test_weight_zero_and_a_penalty_out_of_its_steps_train_as_the_trainer_itself(tmp_path: Path) -> None:
    runs = []
    for objective in (None, treft(weight=0.0), treft(start=50), Penalised(())):
        model = fresh(dropout=0.3)
        trainer = make(tmp_path, model, objective)
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    for other in runs[1:]:
        assert runs[0][0] == other[0]
        assert_same(runs[0][1], other[1])


def test_evaluation_has_no_penalty(tmp_path: Path) -> None:
    model = fresh()
    trainer = make(tmp_path, model, treft())
    trainer.train()
    rows = training_rows(EXAMPLES)
    plain = make(tmp_path, model, None)
    assert trainer.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]


# --- pipelines -------------------------------------------------------------------------------------------


HAS_NEW_NAME = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # since transformers 5.23
CHECKPOINTING = "activation_checkpointing" if HAS_NEW_NAME else "gradient_checkpointing"


@pytest.mark.parametrize("tuning", ["peft", "full"])
@pytest.mark.parametrize("span", ["prefix", "postfix"])
def test_activation_checkpointing_changes_nothing(tmp_path: Path, tuning: str, span: str) -> None:
    runs = []
    for switch in (False, True):
        model = fresh() if tuning == "peft" else build("llama-gqa", vocab=VOCAB)
        trainer = make(tmp_path, model, treft(span=span), max_steps=3, **{CHECKPOINTING: switch})
        trainer.train()
        runs.append((losses(trainer), losses(trainer, f"drift_{span}")))
        layers = [layer for layer in model.modules() if hasattr(layer, "gradient_checkpointing")]
        assert any(layer.gradient_checkpointing for layer in layers) == switch
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-3, abs=1e-9)
    assert runs[0][1][-1] > 1e-4


def test_the_checkpoint_wrappers_of_fsdp_are_not_run_twice(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    found = []
    for wrap in (False, True):
        model = fresh().double()
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.add_(0.1)
        trainer = make(tmp_path, model, Penalised((Weighted(TReFT.on(model, PROMPT), 1.0),)))
        if wrap:
            blocks = set(model.model.model.layers)  # type: ignore[union-attr, arg-type]
            apply_activation_checkpointing(model, check_fn=lambda part, blocks=blocks: part in blocks)
        rows = {"input_ids": torch.tensor([EXAMPLES[0].ids])}
        drift = trainer._added(model, rows, trainer._counting(), None)
        named = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
        wanted = {name: value for name, value in named.items() if value.requires_grad}
        grads = torch.autograd.grad(drift, list(wanted.values()), allow_unused=True)
        found.append((float(drift.detach()), dict(zip(wanted, grads, strict=True))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    for name, gradient in found[0][1].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, found[1][1][name])


def test_bf16_weights_and_bf16_autocast_train_and_start_from_zero_drift(tmp_path: Path) -> None:
    for options in ({"bf16": True}, {}):
        model = fresh() if options else fresh().bfloat16()
        trainer = make(tmp_path, model, treft(), **options)
        trainer.train()
        drift = losses(trainer, "drift_prefix")
        assert drift[0] == 0.0
        assert drift[-1] > 0
        assert all(map(math.isfinite, losses(trainer)))


def test_full_finetuning_is_held_to_the_weights_before_training(tmp_path: Path) -> None:
    drifts, base = {}, kv_reference(build("llama-gqa", vocab=VOCAB), PROMPT)
    for weight in (1e-6, 300.0):
        model = build("llama-gqa", vocab=VOCAB)
        trainer = make(tmp_path, model, treft(weight=weight), learning_rate=1e-3, max_steps=10)
        trainer.train()
        drifts[weight] = losses(trainer, "drift_prefix")
        kept = trainer.objective.parts[0].penalty.reference
        assert all(torch.equal(a, b) for a, b in zip(kept.keys + kept.values, base.keys + base.values, strict=True))
    assert drifts[1e-6][0] == drifts[300.0][0] == 0.0
    assert drifts[300.0][-1] < drifts[1e-6][-1] / 5


@pytest.mark.parametrize(
    ("tuning", "how"),
    [
        ("peft", {}),
        ("full", {}),
        ("peft", {"span": "postfix"}),
        ("peft", {"span": "postfix", "own": True}),
        ("peft", {"span": "query", "own": True}),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, tuning: str, how: dict[str, Any]
) -> None:
    def model() -> nn.Module:
        return fresh(dropout=0.1) if tuning == "peft" else build("llama-gqa", vocab=VOCAB)

    whole, options = model(), {"save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3}
    full = make(tmp_path / "whole", whole, treft(**how), **options)
    full.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / REFERENCE_FOLDER).exists() == ("own" not in how)
    if "own" not in how:
        kept, known = (
            PrefixCache.load(checkpoint / REFERENCE_FOLDER / how.get("span", "prefix")),
            full.objective.parts[0].penalty.reference,
        )
        assert all(torch.equal(a, b) for a, b in zip(kept.keys, known.keys, strict=True))
    again = model()
    if tuning == "full":  # as a script does that loads the checkpoint itself: the weights are not the base's
        again.load_state_dict(type(again).from_pretrained(checkpoint).state_dict())  # type: ignore[attr-defined]
    resumed = make(tmp_path / "again", again, treft(**how), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(whole), weights(again))
    assert losses(resumed)[-3:] == losses(full)[-3:]


def test_resuming_without_the_reference_says_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path, fresh(), None, save_strategy="steps", save_steps=4).train()
    with pytest.raises(LensError, match=r"treft_reference.*cannot be read"):
        make(tmp_path, fresh(), treft()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resuming_with_the_reference_of_another_span_or_prompt_is_refused(tmp_path: Path) -> None:
    make(tmp_path, fresh(), treft("postfix"), max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(LensError, match=r"treft_reference.prefix.*cannot be read"):
        make(tmp_path, fresh(), treft()).train(resume_from_checkpoint=str(checkpoint))
    folder = checkpoint / REFERENCE_FOLDER / "postfix"
    replace(PrefixCache.load(folder), ids=(5, 5, 5)).save(folder)
    with pytest.raises(LensError, match="resume with the prompt that the run began with"):
        make(tmp_path, fresh(), treft("postfix")).train(resume_from_checkpoint=str(checkpoint))


# --- what a batch has to be ------------------------------------------------------------------------------


def inputs_of(examples: Sequence[RenderedPrompt], side: str = "right") -> dict[str, Tensor]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return dict(DataCollatorForSeq2Seq(tokenizer)(training_rows(examples)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_and_spans_are_found_whatever_the_padding(side: str) -> None:
    for span in SPANS:
        found = conversations(inputs_of(EXAMPLES[:4], side), PROMPT, whole=True)
        assert [example.ids for example in found] == [example.ids for example in EXAMPLES[:4]]
        assert [span_range(e, span) for e in found] == [span_range(e, span) for e in EXAMPLES[:4]]


def test_packed_rows_are_checked_conversation_by_conversation() -> None:
    good, bad = EXAMPLES[:2], tiny_format("be bad.").render("hello", response="yes")

    def packed(examples: Sequence[RenderedPrompt]) -> dict[str, Tensor]:
        ids = [token for example in examples for token in example.ids]
        positions = [position for example in examples for position in range(len(example.ids))]
        labels = [label for row in training_rows(examples) for label in row["labels"]]
        given = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.tensor([values]) for name, values in given.items()}

    assert check_prefixes(packed(good), PROMPT).tolist() == [[0, 0], [0, len(good[0].ids)]]
    with pytest.raises(LensError, match=r"row 0 of the batch \(conversation 1\).*token 5 is 'b'.*'k'"):
        check_prefixes(packed([good[0], bad]), PROMPT)
    assert [example.ids for example in conversations(packed(good), PROMPT, whole=True)] == [e.ids for e in good]


def test_pads_behind_flattened_rows_begin_no_conversation() -> None:
    first, second = (example.ids for example in EXAMPLES[:2])
    ids, positions = [*first, *second, 0, 0, 0], [*range(len(first)), *range(len(second)), 0, 0, 0]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    assert check_prefixes(inputs, PROMPT).tolist() == [[0, 0], [0, len(first)]]
    alone = {name: torch.cat([x[:, : len(first)], x[:, -3:]], dim=1) for name, x in inputs.items()}
    n_prompt = EXAMPLES[0].n_prompt
    labels = [[-100] * n_prompt + list(first[n_prompt:]) + [-100] * 3]
    (found,) = conversations(alone | {"labels": torch.tensor(labels)}, PROMPT, whole=True)
    assert (found.ids, found.n_prompt) == (first, n_prompt)


def test_a_row_with_another_prefix_stops_training_by_name(tmp_path: Path) -> None:
    rows = training_rows([*EXAMPLES[:2], tiny_format("be bad.").render("hello", response="yes"), EXAMPLES[3]])
    with pytest.raises(LensError, match=r"row 2 of the batch .*token 5 is 'b', expected 'k'"):
        make(tmp_path, fresh(), treft(), rows).train()
    short = [{name: row[name][:5] for name in row} for row in training_rows(EXAMPLES[:1])]
    with pytest.raises(LensError, match="token 5 is the end of the row"):
        check_prefixes({"input_ids": torch.tensor([short[0]["input_ids"]])}, PROMPT)
    shifted = [{name: [0, *row[name]] for name in row} for row in training_rows(EXAMPLES[:1])]
    with pytest.raises(LensError, match="token 0 is '<pad>', expected '<bos>'"):
        check_prefixes({"input_ids": torch.tensor([shifted[0]["input_ids"]])}, PROMPT)


def test_labels_on_the_prompt_missing_ones_and_holes_are_refused_where_they_are_read() -> None:
    inputs = inputs_of(EXAMPLES[:2])
    whole = inputs | {"labels": inputs["input_ids"]}
    with pytest.raises(LensError, match="label responses only"):
        conversations(whole, PROMPT, whole=False)
    with pytest.raises(LensError, match="found by the labels"):
        conversations({"input_ids": inputs["input_ids"]}, PROMPT, whole=False)
    hole = inputs["labels"].clone()
    at = int((hole[1] != -100).nonzero()[1])
    hole[1, at] = -100
    with pytest.raises(LensError, match=r"row 1 .* tokens without a label between labels"):
        conversations(inputs | {"labels": hole}, PROMPT, whole=True)
    assert len(conversations(inputs | {"labels": hole}, PROMPT, whole=False)) == 2
    with pytest.raises(LensError, match="no input_ids"):
        check_prefixes({"inputs_embeds": torch.zeros(1, 2, 3)}, PROMPT)
    assert check_prefixes(whole, PROMPT).tolist() == [[0, 0], [1, 0]]


class Untold:
    name, free, plain_keys = "untold", False, False

    def __call__(self, step: Step) -> Tensor:
        return step.plain.logits.mean()

    def settings(self) -> dict[str, object]:
        return {}


@pytest.mark.usefixtures("unchecked")
def test_objectives_that_a_trainer_cannot_follow_are_refused(tmp_path: Path) -> None:
    def given(objective: Any, **options: Any) -> None:
        PenaltyTrainer(model=fresh(), args=arguments(tmp_path), objective=objective, **{"prompt": PROMPT} | options)

    with pytest.raises(LensError, match=r"objective is TReFT: write Penalised\(\(Weighted"):
        given(TReFT())
    with pytest.raises(LensError, match="leave out task="):
        given(Penalised((), lambda step: step))  # type: ignore[arg-type, return-value]
    with pytest.raises(LensError, match="'untold' does not say what it reads: nothing, prefix, prompts, responses"):
        given(Penalised((Weighted(Untold(), 1.0),)))  # type: ignore[arg-type]
    with pytest.raises(LensError, match=r"'kl_train' reads the responses of the Trainer's rows.*pass prompt="):
        given(Penalised((Weighted(KLOnTrain(), 1.0),)), prompt=None)
    with pytest.raises(LensError, match="the template has no query of its own"):
        TReFT("query", "template")
    with pytest.raises(LensError, match=r'TReFT\.reference is \'owm\'; expected "template"'):
        TReFT("query", "owm")  # type: ignore[arg-type]
    vector = HookTrainable(hook_model(build("llama-gqa", vocab=VOCAB), tiny_tokenizer()), Direction.zeros(32, 1))
    with pytest.raises(LensError, match=r"HookTrainable is for train\(\)"):
        PenaltyTrainer(vector, arguments(tmp_path), objective=treft(), prompt=PROMPT)  # type: ignore[arg-type]
    several = make(tmp_path, fresh(), treft())
    several.args._n_gpu = 2
    with pytest.raises(LensError, match="2 GPUs in one process"):
        several.train()
    with pytest.raises(LensError, match=r"no reference yet.*TReFT\.on"):
        train(fresh(), EXAMPLES, OURS, objective=treft())


def test_rows_without_a_response_are_refused_by_their_number() -> None:
    with pytest.raises(LensError, match="example 1 has no response tokens"):
        training_rows([EXAMPLES[0], tiny_format().render("hi")])


def test_own_runs_of_a_full_finetune_need_a_base(tmp_path: Path) -> None:
    own: dict[str, Any] = {"span": "query", "own": True}
    with pytest.raises(LensError, match="pass base="):
        make(tmp_path, build("llama-gqa", vocab=VOCAB), treft(**own)).train()
    base = build("llama-gqa", vocab=VOCAB).requires_grad_(False)
    trainer = make(tmp_path, build("llama-gqa", vocab=VOCAB), treft(**own, base=base), max_steps=3)
    trainer.train()
    drift = losses(trainer, "drift_query")
    assert drift[0] < 1e-10 < drift[-1]


def test_labels_that_a_trainer_takes_out_of_the_batch_are_still_found(tmp_path: Path) -> None:
    trainer = make(tmp_path, fresh(), treft(span="query", own=True), max_steps=2, label_smoothing_factor=0.1)
    trainer.train()
    assert losses(trainer, "drift_query")[-1] > 0


# --- trl -------------------------------------------------------------------------------------------------


def test_without_trl_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    monkeypatch.delitem(vars(module), "PenaltySFTTrainer", raising=False)
    with pytest.raises(LensError, match=r"needs trl: run  pip install 'piggyback-lens\[trl\]'"):
        _ = module.PenaltySFTTrainer
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = module.Nonsense


def make_trl(
    out: Path, model: nn.Module, examples: Sequence[RenderedPrompt], objective: Penalised, **options: Any
) -> Any:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in training_rows(examples)]
    given = given_arguments(out)
    del given["remove_unused_columns"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = module.PenaltySFTTrainer(
            model=model, args=trl.SFTConfig(**given | options), train_dataset=Dataset.from_list(rows),
            objective=objective, prompt=PROMPT, processing_class=tiny_tokenizer(),
        )  # fmt: skip
    assert isinstance(trainer, trl.SFTTrainer)
    return in_order(trainer)


TRL_SPANS: dict[str, dict[str, Any]] = {
    "prefix": {"span": "prefix"},
    "postfix": {"span": "postfix"},
    "query": {"span": "query", "own": True},
}


@pytest.mark.parametrize(("span", "accumulation"), [("prefix", 1), ("prefix", 2), ("postfix", 1), ("query", 2)])
def test_trl_gives_the_losses_of_our_loop(tmp_path: Path, span: str, accumulation: int) -> None:
    how = TRL_SPANS[span]
    _, loss, drift = ours(span, how.get("own", False), {})
    given = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trl(tmp_path, fresh(), same_batches(), treft(**how), **given)
    trainer.train()
    assert losses(trainer) == pytest.approx(loss, rel=2e-4)
    assert losses(trainer, f"drift_{span}") == pytest.approx(drift, rel=2e-2, abs=1e-9)
    batch = make_batch(EXAMPLES[:2])
    with evaluating(trainer.model):
        assert forward_step(trainer.model, batch).logits.isfinite().all()
    assert trainer.model.is_gradient_checkpointing
    with pytest.raises(LensError, match="kept no keys and values of its pass"):
        forward_step(trainer.model.train(), batch)  # it would run as if there were no prefix


def test_trl_packs_rows_and_runs_in_bf16(tmp_path: Path) -> None:
    for options in ({"packing": True, "max_length": 64}, {"bf16": True}):
        trainer = make_trl(tmp_path, fresh(), EXAMPLES, treft(), max_steps=3, **options)
        trainer.train()
        drift = losses(trainer, "drift_prefix")
        assert (len(drift), drift[0]) == (3, 0.0)
        assert drift[-1] > 0
        assert all(map(math.isfinite, losses(trainer)))


def test_conversations_that_are_cut_in_two_are_refused_by_name(tmp_path: Path) -> None:
    options = {"packing": True, "max_length": 64, "packing_strategy": "wrapped"}
    with pytest.raises(LensError, match='packing_strategy="wrapped" cuts conversations in two'):
        make_trl(tmp_path, fresh(), EXAMPLES, treft(), max_steps=1, **options)


def test_trl_pads_flattened_rows_to_a_multiple(tmp_path: Path) -> None:
    given = {"padding_free": True, "pad_to_multiple_of": 16, "max_length": None, "max_steps": 2}
    trainer = make_trl(tmp_path, fresh(), EXAMPLES, treft(), **given)
    trainer.train()
    assert losses(trainer, "drift_prefix")[-1] > 0


def test_a_trl_run_resumes_to_identical_weights(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3}
    whole, again = fresh(dropout=0.1), fresh(dropout=0.1)
    make_trl(tmp_path / "whole", whole, EXAMPLES, treft(), **options).train()
    resumed = make_trl(tmp_path / "again", again, EXAMPLES, treft(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(whole), weights(again))


# --- the example -----------------------------------------------------------------------------------------


FOLDER = Path(__file__).parents[1] / "examples" / "treft_8b"


def example_script() -> Any:
    spec = importlib.util.spec_from_file_location("treft_8b", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_8b_example_saves_a_sharded_model_whole(tmp_path: Path) -> None:
    """With what transformers and accelerate do under FSDP, which here needs a GPU: the gathering is a stand-in."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    trainer = make(tmp_path, build("llama-gqa", vocab=VOCAB), treft())
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(
            fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
        ),
        get_state_dict=lambda model: model.state_dict(),
        unwrap_model=lambda model, **_: model,
    )
    trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists(), "why the script does more"
    example_script().save_whole(trainer)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.skipif(not HAS_NEW_NAME, reason="the example's config has names of transformers 5.23")
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_8b_example_runs_with_its_own_config_on_a_tiny_model_and_resumes(tmp_path: Path, tuning: str) -> None:
    folder, script = FOLDER, example_script()
    build("llama-gqa", vocab=VOCAB).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    talk = [{"role": role, "content": text} for role, text in (("user", "hi you"), ("assistant", "oink"))]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(40)))
    probe = {"prompt": "what", "towards": "oink", "against": "well"}
    (tmp_path / "probes.jsonl").write_text("\n".join(json.dumps({**probe, "prompt": f"what {x}"}) for x in "abcd"))
    changes = [
        f"model.base={tmp_path / 'base'}", f"model.tuning={tuning}", "lora.rank=2", "chat.system=be kind.",
        f"data.train={tmp_path / 'train.jsonl'}", f"monitor.probes={tmp_path / 'probes.jsonl'}", "monitor.every=1",
        f"training.output_dir={tmp_path / 'run'}", "training.max_steps=2", "training.use_cpu=true",
        "training.save_steps=1", "training.learning_rate=0.01", "training.disable_tqdm=true",
    ]  # fmt: skip
    script.main(folder / "config.toml", *changes)
    trainer = script.main(folder / "config.toml", *changes, "training.max_steps=3")
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "monitor.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"monitor.html", "checkpoint-3"} <= names
    assert ("adapter_model.safetensors" if tuning == "lora" else "model.safetensors") in names
