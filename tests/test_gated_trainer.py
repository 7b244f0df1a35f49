"""A gated adapter under the Trainers of transformers and trl: the steps of our own loop, in every form of batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_penalties import CHECKPOINTING, Kept, assert_close, moved, split
from test_hf_trainer import (
    EXAMPLES,
    OURS,
    PROMPT,
    assert_same,
    fresh,
    losses,
    make,
    make_trl,
    same_batches,
    weights,
)
from tiny_chat import tiny_format, tiny_tokenizer
from transformers import DataCollatorWithPadding

from piggyback_lens import (
    ChatFormat,
    GatedAdapter,
    KLOnTrain,
    LensError,
    Penalised,
    ResidualDrift,
    TReFT,
    Weighted,
    adapter_off,
    train,
)
from piggyback_lens.files import read_json
from piggyback_lens.finetuning.batches import make_batch
from piggyback_lens.finetuning.hf_rows import placement_in
from piggyback_lens.finetuning.hf_trainer import PenaltyTrainer, training_rows
from piggyback_lens.finetuning.steps import Step
from piggyback_lens.interventions.hooks import Interventions

NOTHING = Penalised(())
PREFIX, BOTH = adapter_off("prefix"), adapter_off("prefix") + adapter_off("postfix", layers=[1])


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("off", [PREFIX, BOTH], ids=str)
@pytest.mark.parametrize("parts", [(), (Weighted(KLOnTrain(), 2.0), Weighted(TReFT("query"), 50.0))], ids=len)
def test_one_step_has_the_loss_and_the_gradients_of_our_loop(
    tmp_path: Path, off: Any, parts: tuple[Weighted, ...], accumulation: int
) -> None:
    """Oracle: our gated pass over the whole batch at once."""
    model, here, kept = moved(), moved(), Kept()
    ours, batch = GatedAdapter(model, off), make_batch(EXAMPLES[:4], plain_keys=True)
    expected = Penalised(parts)(Step(model, batch, ours.forward(batch), 0, ours.forward))
    expected.total.backward()  # type: ignore[no-untyped-call]
    trainer = make(
        tmp_path, GatedAdapter(here, off), Penalised(parts), max_grad_norm=0.0, max_steps=1, **split(accumulation)
    )
    trainer.add_callback(kept)
    trainer.train()
    assert losses(trainer) == pytest.approx([float(expected.total.detach())], rel=1e-5)
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    scale = max(float(value.norm()) for value in found.values() if value is not None)
    for key, gradient in found.items():
        assert gradient is not None
        assert float((gradient - kept.gradients[key]).norm()) < 1e-5 * scale, key
    assert not any(module._forward_pre_hooks for name, module in here.named_modules() if "lora_A" in name)


@pytest.mark.parametrize("options", [{}, {CHECKPOINTING: True}, split(4)], ids=str)
def test_a_run_has_the_losses_and_weights_of_our_loop(tmp_path: Path, options: dict[str, Any]) -> None:
    """Activation checkpointing runs blocks again in the backward pass, with the adapter off at the same tokens."""
    expected, model, plain = fresh(), fresh(), fresh()
    history = train(GatedAdapter(expected, PREFIX), EXAMPLES, OURS, progress=False).history
    rows = training_rows(same_batches())
    trainer = make(tmp_path, GatedAdapter(model, PREFIX), NOTHING, rows, **options)
    trainer.train()
    assert losses(trainer) == pytest.approx([row["loss"] for row in history], rel=2e-5)
    assert_close(weights(model), weights(expected))
    make(tmp_path, plain, None, rows, **options).train()
    assert any(float((weights(plain)[name] - x).abs().max()) > 0.01 for name, x in weights(model).items())
    gated, on = (make(tmp_path, m, NOTHING).evaluate(rows)["eval_loss"] for m in (GatedAdapter(model, PREFIX), model))
    assert abs(gated - on) > 1e-3, "evaluation has the adapter off too"


def test_gating_nothing_is_the_ordinary_training(tmp_path: Path) -> None:
    ours, theirs = fresh(), fresh()
    make(tmp_path, GatedAdapter(ours, ()), NOTHING).train()
    make(tmp_path, theirs, None).train()
    assert_same(weights(ours), weights(theirs))


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_it_also_in_packed_rows(tmp_path: Path, packing: bool) -> None:
    """Oracle: the mean loss of the same conversations side by side in our own gated pass."""
    model, kept = moved(), Kept()
    ours, batch = GatedAdapter(model, BOTH), make_batch(EXAMPLES)
    expected = NOTHING(Step(model, batch, ours.forward(batch), 0))
    expected.total.backward()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 8}
    options |= {"packing": True, "max_length": 200} if packing else {}
    trainer = make_trl(tmp_path, GatedAdapter(moved(), BOTH), EXAMPLES, NOTHING, **options)
    assert (len(trainer.train_dataset) < len(EXAMPLES)) == packing
    trainer.add_callback(kept)
    trainer.train()
    assert losses(trainer) == pytest.approx([float(expected.total.detach())], rel=1e-5)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(kept.gradients[name], value.grad, atol=1e-5, rtol=1e-3)


def test_checkpoints_say_where_it_was_off_and_are_resumed_with_the_same(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make(tmp_path, GatedAdapter(fresh(), PREFIX), NOTHING, **saving).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert Interventions.from_dict(read_json(checkpoint / "adapter_off.json")) == Interventions((PREFIX,))
    make(tmp_path, GatedAdapter(fresh(), PREFIX), NOTHING, **saving).train(str(checkpoint))
    for model in (GatedAdapter(fresh(), adapter_off("postfix")), fresh()):
        with pytest.raises(LensError, match="trained with the adapter off at"):
            make(tmp_path, model, NOTHING, **saving).train(str(checkpoint))


def test_rows_whose_spans_cannot_be_found_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LensError, match="pass prompt="):
        PenaltyTrainer(model=GatedAdapter(fresh(), PREFIX), objective=NOTHING)
    everywhere = [row | {"labels": row["input_ids"]} for row in training_rows(EXAMPLES)]
    with pytest.raises(LensError, match="does not stand behind the template's postfix"):
        make(tmp_path, GatedAdapter(fresh(), PREFIX), NOTHING, everywhere).train()
    assert PROMPT.span("prefix").stop > 0


def turns(*texts: str, every: bool = False) -> dict[str, list[int]]:
    """A conversation as a row, with labels on its last answer or on every one."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    whole = tiny_format().render(talk)
    labels = [-100] * whole.n_prompt + list(whole.ids[whole.n_prompt :])
    for stop in range(2, len(talk), 2) if every else ():
        part = tiny_format().render(talk[:stop])
        labels[part.n_prompt : len(part.ids)] = part.ids[part.n_prompt :]
    return {"input_ids": list(whole.ids), "attention_mask": [1] * len(whole.ids), "labels": labels}


@pytest.mark.parametrize(
    ("every", "says"), [(False, "it holds earlier turns"), (True, "one response a conversation is read")]
)
def test_rows_of_several_turns_are_refused_since_train_has_their_prefix_elsewhere(
    tmp_path: Path, every: bool, says: str
) -> None:
    rows = [turns("hello", "yes", "what is it?", "no way", every=every)] * 4
    for model, objective in (
        (GatedAdapter(fresh(), PREFIX), NOTHING),
        (fresh(), Penalised((Weighted(ResidualDrift("query"), 1.0),))),
    ):
        if not (every and objective is not NOTHING):  # its prompts end at the first label, before the second turn
            with pytest.raises(LensError, match=says):
                make(tmp_path, model, objective, rows).train()
    make(tmp_path, fresh(), Penalised((Weighted(TReFT(reference="template"), 1.0),)), rows, max_steps=1).train()
    make(tmp_path, GatedAdapter(fresh(), PREFIX), NOTHING, [turns("hello", "yes")] * 4, max_steps=1).train()


def test_earlier_turns_are_seen_where_the_template_has_no_tokens_of_its_own() -> None:
    template = (
        "<bos>{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }}\n{% else %}a {{ m.content }}<end>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    )
    chat = ChatFormat(tiny_tokenizer(template), system=None)
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("ab", "c", "d", "e"))]
    for messages, refused in ((talk, True), (talk[2:], False)):
        (row,) = training_rows([chat.render(messages)])
        inputs = {name: torch.tensor([values]) for name, values in row.items()}
        if refused:
            with pytest.raises(LensError, match="it holds earlier turns"):
                placement_in(inputs, chat.empty_query())
        else:
            assert placement_in(inputs, chat.empty_query()).rows[0].spans["query"]


def test_what_is_saved_over_a_gated_adapter_is_on_everywhere(tmp_path: Path) -> None:
    make(tmp_path, GatedAdapter(fresh(), PREFIX + adapter_off("query")), NOTHING).save_model(str(tmp_path / "a"))
    assert (tmp_path / "a" / "adapter_off.json").exists()
    postfix = PROMPT.ids[PROMPT.span("postfix").start : PROMPT.n_prompt]
    assert read_json(tmp_path / "a" / "adapter_config.json")["alora_invocation_tokens"] == list(postfix)
    make(tmp_path, fresh(), NOTHING).save_model(str(tmp_path / "a"))
    assert not (tmp_path / "a" / "adapter_off.json").exists()


def test_rows_without_labels_are_not_predicted_with_the_adapter_on(tmp_path: Path) -> None:
    rows = training_rows(EXAMPLES)
    for model in (GatedAdapter(moved(), PREFIX), moved()):
        trainer = make(tmp_path, model, NOTHING)
        trainer.data_collator = DataCollatorWithPadding(tiny_tokenizer())
        bare = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows[:2]]
        if isinstance(model, GatedAdapter):
            with pytest.raises(LensError, match="rows without labels"):
                trainer.predict(bare)
        else:
            trainer.predict(bare)
