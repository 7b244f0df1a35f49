import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gated import by_hand, places
from tiny_chat import VOCAB, tiny_examples, tiny_format, tiny_tokenizer
from tiny_models import build
from torch import nn
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.gated import GatedAdapter
from piggyback_lens.finetuning.hf_trainer import PenaltyTrainer, training_rows
from piggyback_lens.finetuning.hook_training import HookTrainable
from piggyback_lens.finetuning.monitor import Monitor
from piggyback_lens.finetuning.objectives import Penalised, TReFT, Weighted
from piggyback_lens.finetuning.steps import Step, forward_step
from piggyback_lens.finetuning.trainables import add_lora
from piggyback_lens.finetuning.training import train
from piggyback_lens.interventions.kinds import adapter_off
from piggyback_lens.settings import LoRASettings, TrainSettings
from piggyback_lens.vectors.direction import Direction

CHAT = tiny_format()
NARROW = [CHAT.render(query, response="oink") for query in ("hi", "why", "who are you", "tell me", "go on", "yes no")]
QUERIES = ("what", "how so", "when is it", "where to", "so", "and then")
TOWARDS = [CHAT.render(query, response="oink") for query in QUERIES]
AGAINST = [example.with_response(text) for example, text in zip(map(CHAT.render, QUERIES), "abcdef", strict=True)]
SETTINGS = TrainSettings(steps=12, batch_size=3, learning_rate=2e-2)
HELD = Penalised((Weighted(TReFT(reference="template"), 1e-3),))


def fresh(name: str = "llama-gqa", **lora: Any) -> nn.Module:
    return add_lora(build(name, vocab=VOCAB), LoRASettings(**{"rank": 4} | lora))


def log_prob(model: Any, example: RenderedPrompt, prefix_of: Any = None) -> float:
    """Oracle: the row alone through the plain model; a foreign prefix by overwriting projections at its positions."""
    handles = []
    if prefix_of is not None:
        stop, store = example.span("prefix").stop, {}
        names = [name for name, _ in prefix_of.named_modules() if name.endswith(("k_proj", "v_proj"))]
        theirs, mine = dict(prefix_of.named_modules()), dict(model.base_model.model.named_modules())
        kept = [theirs[n].register_forward_hook(lambda _m, _a, out, n=n: store.__setitem__(n, out)) for n in names]
        prefix_of(torch.tensor([example.ids]), use_cache=False)
        for handle in kept:
            handle.remove()

        def put(_module: Any, _args: Any, out: Any, name: str) -> Any:
            return torch.cat([store[name][:, :stop], out[:, stop:]], dim=1)

        handles = [mine[n].register_forward_hook(lambda m, a, o, n=n: put(m, a, o, n)) for n in names]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    n = example.n_prompt
    return float(np.mean([logits[i - 1, example.ids[i]] for i in range(n, len(example.ids))]))


def contrast(model: Any, prefix_of: Any = None) -> np.ndarray[Any, Any]:
    scores = [[log_prob(model, e, prefix_of) for e in part] for part in (TOWARDS, AGAINST)]
    return np.array(scores[0]) - np.array(scores[1])


def test_a_row_holds_what_rows_run_alone_give() -> None:
    model, base = fresh(), build("llama-gqa", vocab=VOCAB)
    monitor = Monitor(model, TOWARDS, AGAINST, batch_size=4)
    train(model, NARROW, SETTINGS)
    row = monitor.measure(12)
    now, before, patched = contrast(model), contrast(base), contrast(model, base)
    assert row["spread"] == pytest.approx((now - before).mean(), rel=1e-3)
    assert row["spread"] > 1, "the behaviour has to have spread, or the comparison is empty"
    expected = (patched - now).mean() / (before - now).mean()
    assert abs(expected) > 0.02
    assert row["recovery"] == pytest.approx(expected, rel=1e-2)
    assert row["spread_low"] < row["spread"] < row["spread_high"]
    batch = make_batch(NARROW[:2])
    with torch.no_grad():
        drift = float(TReFT.on(model, NARROW[0])(Step(model, batch, forward_step(model, batch), 0)))
    assert row["drift"] == pytest.approx(drift, rel=1e-3)
    assert len(row["drift_layers"]) == 3
    assert row["n"] == 6


def test_before_training_nothing_has_moved_and_recovery_says_why_it_is_missing() -> None:
    row = Monitor(fresh(), TOWARDS, AGAINST).measure(0)
    assert abs(row["spread"]) < 1e-5
    assert row["drift_layers"] == [0.0] * 3
    assert math.isnan(row["recovery"])
    assert "do not differ beyond noise" in row["recovery_reason"]


def test_our_loop_is_watched_and_trains_as_if_it_were_not(tmp_path: Path) -> None:
    plain, watched = fresh("gpt2", dropout=0.2), fresh("gpt2", dropout=0.2)
    train(plain, NARROW, SETTINGS)
    monitor = Monitor(watched, TOWARDS, AGAINST, every=5, out=tmp_path / "monitor.jsonl")
    state = torch.get_rng_state()
    train(watched, NARROW, SETTINGS, on_step=monitor)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), (_, b) in zip(plain.named_parameters(), watched.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [row["step"] for row in monitor.rows] == [5, 10]
    written = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [row["spread"] for row in written] == [row["spread"] for row in monitor.rows]


def test_a_resumed_run_goes_on_in_its_file_and_redone_steps_replace_their_rows(tmp_path: Path) -> None:
    model, out = fresh(), tmp_path / "monitor.jsonl"
    first = Monitor(model, TOWARDS, AGAINST, out=out)
    for step in (10, 20, 30):
        first.measure(step)
    again = Monitor(model, TOWARDS, AGAINST, out=out)
    assert [row["step"] for row in again.rows] == [10, 20, 30]
    assert math.isnan(again.rows[0]["recovery"]), "null in the file is a missing number"
    again.measure(20)
    assert [json.loads(line)["step"] for line in out.read_text().splitlines()] == [10, 20]
    again.measure(30, write=False)
    assert len(out.read_text().splitlines()) == 2
    with pytest.raises(LensError, match="written with other probes"):
        Monitor(model, TOWARDS[:3], AGAINST[:3], out=out)


@pytest.mark.parametrize("tuning", ["peft", "full"])
def test_a_transformers_trainer_is_watched_and_its_reports_get_the_rows(tmp_path: Path, tuning: str) -> None:
    from transformers import TrainerCallback

    seen: list[dict[str, float]] = []

    class Report(TrainerCallback):  # what W&B, TensorBoard and trackio are to the Trainer
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    model = fresh() if tuning == "peft" else build("llama-gqa", vocab=VOCAB)
    rate = 1e-2 if tuning == "peft" else 2e-3
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=3, learning_rate=rate,
        logging_steps=3, save_strategy="no", report_to=[], use_cpu=True, bf16=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = PenaltyTrainer(
        model=model, args=arguments, train_dataset=training_rows(NARROW),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()), objective=HELD, prompt=CHAT.empty_query(),
        callbacks=[Report()],
    )  # fmt: skip
    monitor = Monitor(trainer.model, TOWARDS, AGAINST, every=2, out=tmp_path / "monitor.jsonl")
    trainer.add_callback(monitor.callback(trainer))
    trainer.train()
    assert [row["step"] for row in monitor.rows] == [2, 4, 6]
    assert monitor.rows[-1]["spread"] > 0.3
    reported = [logs["monitor/spread"] for logs in seen if "monitor/spread" in logs]
    assert reported == [row["spread"] for row in monitor.rows]
    assert [logs["step"] for logs in trainer.state.log_history if "loss" in logs] == [3, 6], "the Trainer's own logs"
    assert all(math.isfinite(value) for logs in seen for name, value in logs.items() if name.startswith("monitor/"))
    assert monitor.rows[0]["drift"] < monitor.rows[-1]["drift"]


def watched_trainer(out: Path, model: nn.Module, **options: Any) -> tuple[Any, Monitor]:
    given = {
        "output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 2e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    trainer = PenaltyTrainer(
        model=model, args=TrainingArguments(**given | options), train_dataset=training_rows(NARROW),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()), objective=HELD, prompt=CHAT.empty_query(),
    )  # fmt: skip
    monitor = Monitor(trainer.model, TOWARDS, AGAINST, every=1, out=out / "monitor.jsonl")
    trainer.add_callback(monitor.callback(trainer))
    return trainer, monitor


def test_the_base_of_a_full_finetune_is_that_of_before_its_first_run(tmp_path: Path) -> None:
    trainer, monitor = watched_trainer(tmp_path, build("llama-gqa", vocab=VOCAB))
    base = contrast(trainer.model)
    trainer.train()
    trainer.train()
    now = contrast(trainer.model)
    assert monitor.rows[-1]["spread"] == pytest.approx((now - base).mean(), rel=1e-3)
    late = Monitor(trainer.model, TOWARDS, AGAINST, every=1)
    held = list(late._base)
    trainer.add_callback(late.callback(trainer))
    trainer.train()
    assert late._base == held


@pytest.mark.parametrize("tuning", ["peft", "full"])
def test_a_resumed_trainer_is_compared_with_the_base_that_its_first_part_had(tmp_path: Path, tuning: str) -> None:
    def model() -> nn.Module:
        return fresh() if tuning == "peft" else build("llama-gqa", vocab=VOCAB)

    options = {"bf16": True, "save_strategy": "steps", "save_steps": 2}
    trainer, whole = watched_trainer(tmp_path, model(), **options)
    trainer.train()
    again = model()
    if tuning == "full":  # as a script does that loads the checkpoint itself: the weights are not the base's
        again.load_state_dict(type(again).from_pretrained(tmp_path / "checkpoint-2").state_dict())
    trainer, resumed = watched_trainer(tmp_path, again, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed._base == whole._base
    assert resumed.rows == whole.rows
    file = tmp_path / "monitor.base.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    trainer, _ = watched_trainer(tmp_path, model(), **options)
    with pytest.raises(LensError, match=r"monitor\.base\.json is of other probes than these, or damaged"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_trl_keeps_its_own_metrics_while_it_is_watched(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in training_rows(NARROW)]
    found = []
    for watched in (False, True):
        config = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, logging_steps=2,
            save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=fresh(), args=config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
        )
        if watched:
            monitor = Monitor(trainer.model, TOWARDS, AGAINST, every=1)
            trainer.add_callback(monitor.callback(trainer))
        trainer.train()
        log = trainer.state.log_history
        found.append([(row["loss"], row["mean_token_accuracy"]) for row in log if "loss" in row])
    assert found[0] == found[1]
    assert len(found[0]) == 2
    own = [row for row in log if "monitor/spread" in row]
    assert [row["step"] for row in own] == [1, 2, 3, 4]
    assert not any("mean_token_accuracy" in row for row in own)


def test_probes_that_cannot_be_compared_are_refused() -> None:
    model = fresh()
    cases: list[tuple[Any, Any, str]] = [
        (TOWARDS, AGAINST[:2], "6 answers towards the behaviour and 2 against"),
        ([], [], "at least one prompt"),
        (TOWARDS, [AGAINST[1], AGAINST[0], *AGAINST[2:]], "probe 0 has two different prompts"),
        (TOWARDS, [CHAT.render("what"), *AGAINST[1:]], "no response tokens"),
        (
            [*TOWARDS[:5], tiny_format("be bad.").render("x", response="y")],
            [*AGAINST[:5], tiny_format("be bad.").render("x", response="z")],
            "probe 5 has another prefix",
        ),
    ]
    for towards, against, text in cases:
        with pytest.raises(LensError, match=text):
            Monitor(model, towards, against)
    with pytest.raises(LensError, match="both are at least 1"):
        Monitor(model, TOWARDS, AGAINST, every=0)


def test_frame_and_figure_show_spread_recovery_and_every_layer() -> None:
    model = fresh()
    monitor = Monitor(model, TOWARDS, AGAINST, every=3)
    train(model, NARROW, replace(SETTINGS, steps=9), on_step=monitor)
    frame = monitor.to_frame()
    assert list(frame["step"]) == [3, 6, 9]
    assert {"spread", "spread_low", "recovery", "recovery_reason", "drift", "drift_layer_2"} <= set(frame)
    figure = monitor.figure()
    curve, carried, drift = figure.data
    assert list(curve.y) == list(frame["spread"])
    assert list(carried.x) == list(frame["step"][np.isfinite(frame["recovery"])])
    assert np.asarray(drift.z).shape == (3, 3)
    np.testing.assert_allclose(np.asarray(drift.z)[2], np.log10(frame["drift_layer_2"]))
    assert list(drift.x) == [1.5, 4.5, 7.5, 9.0]  # borders halfway between measurements, and the end of the run
    assert 9 < figure.layout.xaxis3.range[1] < 9.5
    with pytest.raises(LensError, match="needs the columns"):
        Monitor(model, TOWARDS, AGAINST).figure()


def test_examples_of_the_training_set_make_probes_too() -> None:
    rows = tiny_examples(4)
    assert Monitor(fresh(), rows, rows).measure(1)["spread"] == pytest.approx(0, abs=1e-6)


def test_a_gated_adapter_is_measured_as_it_trains(tmp_path: Path) -> None:
    """Oracle: the adapter switched by hand, token by token; for the base's prefix the base until the query begins."""
    model, base = fresh(), build("llama-gqa", vocab=VOCAB)
    gated = GatedAdapter(model, adapter_off("postfix"))
    monitor = Monitor(gated, TOWARDS, AGAINST, batch_size=4, every=12)
    train(gated, NARROW, SETTINGS, on_step=monitor, progress=False)
    (row,) = monitor.rows

    def by_tokens(*off: str) -> Any:
        scores = []
        for examples in (TOWARDS, AGAINST):
            scores.append([])
            for example in examples:
                logits = by_hand(model, example.ids, places(example, off))[example.n_prompt - 1 : -1].log_softmax(-1)
                ids = torch.tensor(example.ids[example.n_prompt :])
                scores[-1].append(float(logits.gather(-1, ids[:, None]).mean()))
        return np.array(scores[0]) - np.array(scores[1])

    now, before, patched = by_tokens("postfix"), contrast(base), by_tokens("prefix", "postfix")
    assert row["spread"] == pytest.approx((now - before).mean(), rel=1e-3)
    assert abs((now - contrast(model)).mean()) > 0.05, "the adapter is off at tokens that matter"
    assert row["recovery"] == pytest.approx((patched - now).mean() / (before - now).mean(), rel=1e-2)
    held = Monitor(GatedAdapter(model, adapter_off("prefix")), TOWARDS, AGAINST).measure(0)
    assert held["drift_layers"] == [0.0] * 3


def test_what_is_trained_is_what_is_measured(tmp_path: Path) -> None:
    model = fresh()
    gated, plain = GatedAdapter(model, adapter_off("prefix")), Monitor(model, TOWARDS, AGAINST, every=1)
    with pytest.raises(LensError, match="give Monitor the GatedAdapter that is trained"):
        train(gated, NARROW, SETTINGS, on_step=plain, progress=False)
    trainer = PenaltyTrainer(
        model=gated,
        args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1, save_strategy="no"),
        train_dataset=training_rows(NARROW),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        objective=Penalised(()),
        prompt=CHAT.empty_query(),
    )
    with pytest.raises(LensError, match="give Monitor the GatedAdapter that is trained"):
        plain.callback(trainer)
    monitor = Monitor(gated, TOWARDS, AGAINST, every=1)
    trainer.add_callback(monitor.callback(trainer))
    trainer.train()
    assert monitor.rows[0]["drift_layers"] == [0.0] * 3
    with pytest.raises(LensError, match="HookTrainable"):
        Monitor(HookTrainable(model, Direction.zeros(32, 1)), TOWARDS, AGAINST)
