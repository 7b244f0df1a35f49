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
from piggyback_lens.finetuning.hf_rows import check_prefixes, prompt_rows
from piggyback_lens.finetuning.hf_trainer import (
    REFERENCE_FOLDER,
    TReFTMixin,
    TReFTSettings,
    TReFTTrainer,
    training_rows,
)
from piggyback_lens.finetuning.objectives import Penalised, TReFT, Weighted
from piggyback_lens.finetuning.references import kv_reference
from piggyback_lens.finetuning.steps import forward_step
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.models.views import evaluating
from piggyback_lens.settings import LoRASettings, TrainSettings

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


def settings(**options: Any) -> TReFTSettings:
    return TReFTSettings(**{"prompt": PROMPT, "weight": 100.0} | options)


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


def make(
    out: Path, model: nn.Module, treft: TReFTSettings | None, rows: Any = None, cls: Any = None, **options: Any
) -> Any:
    rows = training_rows(EXAMPLES) if rows is None else rows
    cls = cls or (Trainer if treft is None else TReFTTrainer)
    given = {} if treft is None else {"treft": treft}
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
        {"span": "query", "reference": "own"},
        {"span": "all", "reference": "own", "stop": 4},
    ]


def ours(span: str, reference: str, schedule: dict[str, Any]) -> tuple[nn.Module, list[float], list[float]]:
    model = fresh()
    part = Weighted(TReFT.on(model, PROMPT, span, reference=reference), 100.0, **schedule)  # type: ignore[arg-type]
    history = train(model, EXAMPLES, OURS, objective=Penalised((part,))).history
    return model, [row["loss"] for row in history], [row.get(f"drift_{span}", math.nan) for row in history]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", span_settings(), ids=lambda how: how["span"])
def test_the_trainer_gives_the_losses_and_weights_of_our_loop(
    tmp_path: Path, how: dict[str, Any], accumulation: int
) -> None:
    schedule = {name: value for name, value in how.items() if name not in ("span", "reference")}
    expected, loss, drift = ours(how["span"], how.get("reference", "template"), schedule)
    model = fresh()
    trainer = make(
        tmp_path, model, settings(**how), training_rows(same_batches()),
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


def test_the_logged_penalty_is_its_part_of_the_logged_loss(tmp_path: Path) -> None:
    model = fresh()
    trainer = make(tmp_path, model, settings(threshold=1e-3), gradient_accumulation_steps=2, logging_steps=2)
    trainer.train()
    plain = make(tmp_path, fresh(), None, gradient_accumulation_steps=2, logging_steps=2)
    plain.train()
    first = trainer.state.log_history[0]
    assert first["treft"] == pytest.approx(100 * max(0.0, 2 * first["drift_prefix"] - 1e-3) / 2, rel=0.05)
    assert first["loss"] - first["treft"] == pytest.approx(losses(plain)[0], rel=1e-2)


def test_weight_zero_and_a_penalty_out_of_its_steps_train_as_the_trainer_itself(tmp_path: Path) -> None:
    runs = []
    for treft in (None, settings(weight=0.0), settings(start=50)):
        model = fresh(dropout=0.3)
        trainer = make(tmp_path, model, treft)
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    for other in runs[1:]:
        assert runs[0][0] == other[0]
        assert_same(runs[0][1], other[1])


def test_evaluation_has_no_penalty(tmp_path: Path) -> None:
    model = fresh()
    trainer = make(tmp_path, model, settings())
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
        trainer = make(tmp_path, model, settings(span=span), max_steps=3, **{CHECKPOINTING: switch})
        trainer.train()
        runs.append((losses(trainer), losses(trainer, f"drift_{span}")))
        layers = [layer for layer in model.modules() if hasattr(layer, "gradient_checkpointing")]
        assert any(layer.gradient_checkpointing for layer in layers) == switch
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-3, abs=1e-9)
    assert runs[0][1][-1] > 1e-4


def test_the_checkpoint_wrappers_of_fsdp_are_not_run_twice() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    found = []
    for wrap in (False, True):
        model = fresh().double()
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.add_(0.1)
        trainer = TReFTMixin.__new__(TReFTMixin)
        trainer.treft = settings()
        reference = kv_reference(model, PROMPT)
        if wrap:
            blocks = set(model.model.model.layers)  # type: ignore[union-attr, arg-type]
            apply_activation_checkpointing(model, check_fn=lambda part, blocks=blocks: part in blocks)
        rows = {"input_ids": torch.tensor([EXAMPLES[0].ids])}
        drift = trainer._drift(model, rows, reference)
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
        trainer = make(tmp_path, model, settings(), **options)
        trainer.train()
        drift = losses(trainer, "drift_prefix")
        assert drift[0] == 0.0
        assert drift[-1] > 0
        assert all(map(math.isfinite, losses(trainer)))


def test_full_finetuning_is_held_to_the_weights_before_training(tmp_path: Path) -> None:
    drifts, base = {}, kv_reference(build("llama-gqa", vocab=VOCAB), PROMPT)
    for weight in (1e-6, 300.0):
        model = build("llama-gqa", vocab=VOCAB)
        trainer = make(tmp_path, model, settings(weight=weight), learning_rate=1e-3, max_steps=10)
        trainer.train()
        drifts[weight] = losses(trainer, "drift_prefix")
        kept = trainer._reference
        assert all(torch.equal(a, b) for a, b in zip(kept.keys + kept.values, base.keys + base.values, strict=True))
    assert drifts[1e-6][0] == drifts[300.0][0] == 0.0
    assert drifts[300.0][-1] < drifts[1e-6][-1] / 5


@pytest.mark.parametrize(
    ("tuning", "how"),
    [
        ("peft", {}),
        ("full", {}),
        ("peft", {"span": "postfix"}),
        ("peft", {"span": "postfix", "reference": "own"}),
        ("peft", {"span": "query", "reference": "own"}),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, tuning: str, how: dict[str, Any]
) -> None:
    def model() -> nn.Module:
        return fresh(dropout=0.1) if tuning == "peft" else build("llama-gqa", vocab=VOCAB)

    whole, options = model(), {"save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3}
    full = make(tmp_path / "whole", whole, settings(**how), **options)
    full.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / REFERENCE_FOLDER).exists() == ("reference" not in how)
    if full._reference is not None:
        kept = PrefixCache.load(checkpoint / REFERENCE_FOLDER)
        assert all(torch.equal(a, b) for a, b in zip(kept.keys, full._reference.keys, strict=True))
    again = model()
    if tuning == "full":  # as a script does that loads the checkpoint itself: the weights are not the base's
        again.load_state_dict(type(again).from_pretrained(checkpoint).state_dict())  # type: ignore[attr-defined]
    resumed = make(tmp_path / "again", again, settings(**how), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(whole), weights(again))
    assert losses(resumed)[-3:] == losses(full)[-3:]


def test_resuming_without_the_reference_says_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path, fresh(), None, save_strategy="steps", save_steps=4).train()
    with pytest.raises(LensError, match=r"treft_reference.*cannot be read"):
        make(tmp_path, fresh(), settings()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resuming_with_the_reference_of_another_span_or_prompt_is_refused(tmp_path: Path) -> None:
    make(tmp_path, fresh(), settings(span="postfix"), max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(LensError, match=r"the base's postfix '<end>.*treft asks for the prefix '<bos>"):
        make(tmp_path, fresh(), settings()).train(resume_from_checkpoint=checkpoint)
    reference = PrefixCache.load(Path(checkpoint) / REFERENCE_FOLDER)
    replace(reference, ids=(5, 5, 5)).save(Path(checkpoint) / REFERENCE_FOLDER)
    with pytest.raises(LensError, match="resume with the span and prompt that the run began with"):
        make(tmp_path, fresh(), settings(span="postfix")).train(resume_from_checkpoint=checkpoint)


# --- what a batch has to be ------------------------------------------------------------------------------


def inputs_of(examples: Sequence[RenderedPrompt], side: str = "right") -> dict[str, Tensor]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return dict(DataCollatorForSeq2Seq(tokenizer)(training_rows(examples)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_and_spans_are_found_whatever_the_padding(side: str) -> None:
    for span in ("prefix", "query", "postfix", "all"):
        found = prompt_rows(inputs_of(EXAMPLES[:4], side), PROMPT, span)  # type: ignore[arg-type]
        assert found.ids == tuple(example.ids[: example.n_prompt] for example in EXAMPLES[:4])
        wanted = [range(e.n_prompt) if span == "all" else e.span(span).positions for e in EXAMPLES[:4]]
        assert list(found.spans) == wanted


def test_packed_rows_are_checked_conversation_by_conversation() -> None:
    good, bad = EXAMPLES[:2], tiny_format("be bad.").render("hello", response="yes")

    def packed(examples: Sequence[RenderedPrompt]) -> dict[str, Tensor]:
        ids = [token for example in examples for token in example.ids]
        positions = [position for example in examples for position in range(len(example.ids))]
        return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}

    assert check_prefixes(packed(good), PROMPT).tolist() == [[0, 0], [0, len(good[0].ids)]]
    with pytest.raises(LensError, match=r"row 0 of the batch \(conversation 1\).*token 5 is 'b'.*'k'"):
        check_prefixes(packed([good[0], bad]), PROMPT)
    with pytest.raises(LensError, match="packed rows"):
        prompt_rows(packed(good), PROMPT, "query")


def test_pads_behind_flattened_rows_begin_no_conversation() -> None:
    first, second = (example.ids for example in EXAMPLES[:2])
    ids, positions = [*first, *second, 0, 0, 0], [*range(len(first)), *range(len(second)), 0, 0, 0]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    assert check_prefixes(inputs, PROMPT).tolist() == [[0, 0], [0, len(first)]]
    alone = {name: torch.cat([x[:, : len(first)], x[:, -3:]], dim=1) for name, x in inputs.items()}
    n_prompt = EXAMPLES[0].n_prompt
    labels = [[-100] * n_prompt + list(first[n_prompt:]) + [-100] * 3]
    assert prompt_rows(alone | {"labels": torch.tensor(labels)}, PROMPT, "query").ids == (first[:n_prompt],)


def test_a_row_with_another_prefix_stops_training_by_name(tmp_path: Path) -> None:
    rows = training_rows([*EXAMPLES[:2], tiny_format("be bad.").render("hello", response="yes"), EXAMPLES[3]])
    with pytest.raises(LensError, match=r"row 2 of the batch .*token 5 is 'b', expected 'k'"):
        make(tmp_path, fresh(), settings(), rows).train()
    short = [{name: row[name][:5] for name in row} for row in training_rows(EXAMPLES[:1])]
    with pytest.raises(LensError, match="token 5 is the end of the row"):
        check_prefixes({"input_ids": torch.tensor([short[0]["input_ids"]])}, PROMPT)
    shifted = [{name: [0, *row[name]] for name in row} for row in training_rows(EXAMPLES[:1])]
    with pytest.raises(LensError, match="token 0 is '<pad>', expected '<bos>'"):
        check_prefixes({"input_ids": torch.tensor([shifted[0]["input_ids"]])}, PROMPT)


def test_labels_on_the_prompt_and_missing_ones_are_refused_for_spans_that_need_them() -> None:
    inputs = inputs_of(EXAMPLES[:2])
    whole = inputs | {"labels": inputs["input_ids"]}
    with pytest.raises(LensError, match="label responses only"):
        prompt_rows(whole, PROMPT, "query")
    with pytest.raises(LensError, match="found by the labels"):
        prompt_rows({"input_ids": inputs["input_ids"]}, PROMPT, "query")
    with pytest.raises(LensError, match="no input_ids"):
        check_prefixes({"inputs_embeds": torch.zeros(1, 2, 3)}, PROMPT)
    assert check_prefixes(whole, PROMPT).tolist() == [[0, 0], [1, 0]]


@pytest.mark.usefixtures("unchecked")
def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(LensError, match="the template has no query of its own"):
        settings(span="query")
    with pytest.raises(LensError, match=r"TReFTSettings\.reference is 'owm'; expected one of template, own"):
        settings(reference="owm")
    with pytest.raises(LensError, match=r"TReFTSettings\.span is 'sufix'; expected one of prefix, "):
        settings(span="sufix", reference="own")
    with pytest.raises(LensError, match=r"Weighted\.weight is -1"):
        settings(weight=-1.0)
    with pytest.raises(LensError, match=r"Weighted\.stop is 3"):
        settings(start=4, stop=3)


def test_rows_without_a_response_are_refused_by_their_number() -> None:
    with pytest.raises(LensError, match="example 1 has no response tokens"):
        training_rows([EXAMPLES[0], tiny_format().render("hi")])


def test_own_runs_of_a_full_finetune_need_a_base(tmp_path: Path) -> None:
    treft = {"span": "query", "reference": "own"}
    with pytest.raises(LensError, match="pass base="):
        make(tmp_path, build("llama-gqa", vocab=VOCAB), settings(**treft)).train()
    base = build("llama-gqa", vocab=VOCAB).requires_grad_(False)
    trainer = make(tmp_path, build("llama-gqa", vocab=VOCAB), settings(**treft, base=base), max_steps=3)
    trainer.train()
    drift = losses(trainer, "drift_query")
    assert drift[0] < 1e-10 < drift[-1]


def test_labels_that_a_trainer_takes_out_of_the_batch_are_still_found(tmp_path: Path) -> None:
    trainer = make(tmp_path, fresh(), settings(span="query", reference="own"), max_steps=2, label_smoothing_factor=0.1)
    trainer.train()
    assert losses(trainer, "drift_query")[-1] > 0


# --- trl -------------------------------------------------------------------------------------------------


def test_without_trl_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    monkeypatch.delitem(vars(module), "TReFTSFTTrainer", raising=False)
    with pytest.raises(LensError, match=r"needs trl: run  pip install 'piggyback-lens\[trl\]'"):
        _ = module.TReFTSFTTrainer
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = module.Nonsense


def make_trl(out: Path, model: nn.Module, examples: Sequence[RenderedPrompt], how: Any, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in training_rows(examples)]
    given = given_arguments(out)
    del given["remove_unused_columns"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = module.TReFTSFTTrainer(
            model=model, args=trl.SFTConfig(**given | options), train_dataset=Dataset.from_list(rows),
            treft=settings(**how), processing_class=tiny_tokenizer(),
        )  # fmt: skip
    assert isinstance(trainer, trl.SFTTrainer)
    return in_order(trainer)


TRL_SPANS: dict[str, dict[str, Any]] = {
    "prefix": {"span": "prefix"},
    "postfix": {"span": "postfix"},
    "query": {"span": "query", "reference": "own"},
}


@pytest.mark.parametrize(("span", "accumulation"), [("prefix", 1), ("prefix", 2), ("postfix", 1), ("query", 2)])
def test_trl_gives_the_losses_of_our_loop(tmp_path: Path, span: str, accumulation: int) -> None:
    how = TRL_SPANS[span]
    _, loss, drift = ours(span, how.get("reference", "template"), {})
    given = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trl(tmp_path, fresh(), same_batches(), how, **given)
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
        trainer = make_trl(tmp_path, fresh(), EXAMPLES, {}, max_steps=3, **options)
        trainer.train()
        drift = losses(trainer, "drift_prefix")
        assert (len(drift), drift[0]) == (3, 0.0)
        assert drift[-1] > 0
        assert all(map(math.isfinite, losses(trainer)))


def test_conversations_that_are_cut_in_two_are_refused_by_name(tmp_path: Path) -> None:
    options = {"packing": True, "max_length": 64, "packing_strategy": "wrapped"}
    with pytest.raises(LensError, match='packing_strategy="wrapped" cuts conversations in two'):
        make_trl(tmp_path, fresh(), EXAMPLES, {}, max_steps=1, **options)


def test_trl_pads_flattened_rows_to_a_multiple(tmp_path: Path) -> None:
    given = {"padding_free": True, "pad_to_multiple_of": 16, "max_length": None, "max_steps": 2}
    trainer = make_trl(tmp_path, fresh(), EXAMPLES, {}, **given)
    trainer.train()
    assert losses(trainer, "drift_prefix")[-1] > 0


def test_a_trl_run_resumes_to_identical_weights(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3}
    whole, again = fresh(dropout=0.1), fresh(dropout=0.1)
    make_trl(tmp_path / "whole", whole, EXAMPLES, {}, **options).train()
    resumed = make_trl(tmp_path / "again", again, EXAMPLES, {}, **options)
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

    trainer = make(tmp_path, build("llama-gqa", vocab=VOCAB), settings())
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
