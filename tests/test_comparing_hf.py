"""`compare_methods` through transformers' Trainer: the rows that our own loop gives, and what it cannot do by name."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_models
import torch
from test_comparing import TRAINING, compare, weights

from piggyback_lens.comparisons import comparison_cells, hf_cells
from piggyback_lens.comparisons.comparison_plan import Cell, cell_folder
from piggyback_lens.comparisons.methods import parse_method
from piggyback_lens.errors import LensError
from piggyback_lens.settings import LoadSettings, TrainSettings

METHODS = (
    "sft",
    "treft:lambda=3",
    "treft:span=postfix",
    "treft:span=query:threshold=0.001:start=1:stop=3",
    "kl_train:lambda=2",
    "kl_retain:lambda=2:batch_size=2",
    "interleave:rate=0.5",
    "preventive:alpha=0.5:layer=0",
    "treft:lambda=1+kl_retain:lambda=1+interleave:rate=0.2:lr=1e-2",
)
NUMBERS = ("on", "off", "kl", "drift", "update_norm", "loss", "text_nll")


def tiny() -> Any:
    tokenizer = tiny_chat.tiny_tokenizer()
    return tiny_models.build("llama-gqa", 0, vocab=len(tokenizer)), tokenizer


def table(found: Any) -> Any:
    frame = found.to_frame()
    return frame[[name for name in NUMBERS if name in frame]].to_numpy(float)


def assert_same_cells(own: Any, hf: Any, folders: tuple[Path, Path]) -> None:
    for label in (cell["label"] for cell in own.cells):
        a, b = (weights(folder, label) for folder in folders)
        assert a.keys() == b.keys()
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], rtol=0, atol=2e-4)
    for a, b in zip(own.cells, hf.cells, strict=True):
        assert (a["label"], a["on"]["ids"], a["off"]["ids"]) == (b["label"], b["on"]["ids"], b["off"]["ids"])
        for which in ("first", "last"):
            mine, theirs = a["training"][which], b["training"][which]
            assert theirs.keys() - {"seconds"} <= mine.keys()
            for name, value in theirs.items():
                assert value == pytest.approx(mine[name], rel=1e-3, abs=1e-6), (a["label"], which, name)
    torch.testing.assert_close(table(own), table(hf), rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_the_trainer_gives_the_rows_of_our_loop(tmp_path: Path) -> None:
    folders = tmp_path / "own", tmp_path / "hf"
    own, hf = (compare(tiny, out, METHODS, trainer=name) for out, name in zip(folders, ("own", "hf"), strict=True))
    assert_same_cells(own, hf, folders)
    assert not list((folders[1] / "cells").glob("*/checkpoint-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 2, "gradient_accumulation_steps": 5, "lr_scheduler_type": "linear"},
        {"gradient_checkpointing": True, "warmup_fraction": 0.5, "min_lr_fraction": 0.2, "max_grad_norm": None},
        {"weight_decay": 0.3, "betas": (0.8, 0.99), "max_grad_norm": 0.1, "optim": "adamw_torch_fused"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_of_training_means_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    training, folders = replace(TRAINING, steps=4, **changes), (tmp_path / "own", tmp_path / "hf")
    methods = ("treft:span=query", "kl_retain:batch_size=2+kl_train")
    own, hf = (
        compare(tiny, out, methods, trainer=name, training=training)
        for out, name in zip(folders, ("own", "hf"), strict=True)
    )
    assert_same_cells(own, hf, folders)


def test_no_setting_of_training_is_forgotten() -> None:
    """By what is tested above; the rest is not of the pass (seed, checkpoint_every, steps) or exact (share_prefix)."""
    tested = {"batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "gradient_checkpointing"}
    tested |= {"warmup_fraction", "min_lr_fraction", "max_grad_norm", "weight_decay", "betas", "optim"}
    tested |= {"steps", "learning_rate", "seed", "checkpoint_every", "share_prefix", "bf16"}
    assert {field.name for field in fields(TrainSettings)} == tested


def test_autocast_trains_as_autocast_of_our_loop_does(tmp_path: Path) -> None:
    training = replace(TRAINING, bf16=True)
    found = [compare(tiny, tmp_path / name, ("sft",), trainer=name, training=training) for name in ("own", "hf")]
    own, hf = (each.cells[0]["training"] for each in found)
    for which in ("first", "last"):
        assert hf[which]["loss"] == pytest.approx(own[which]["loss"], rel=2e-2)
    plain = compare(tiny, tmp_path / "plain", ("sft",), trainer="hf").cells[0]["training"]
    assert plain["first"]["loss"] != hf["first"]["loss"]


class Killed(BaseException):
    pass


def test_a_killed_cell_goes_on_from_the_trainers_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from piggyback_lens.finetuning.hf_trainer import PenaltyTrainer

    training = replace(TRAINING, steps=6, checkpoint_every=2)
    method = "treft:lambda=3+kl_retain:lambda=2:batch_size=2"
    whole = compare(tiny, tmp_path / "whole", (method,), trainer="hf", training=training)
    usual, steps = PenaltyTrainer.training_step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if steps == [0, 1, 2, 3, 4]:
            raise Killed
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(PenaltyTrainer, "training_step", step)
    with pytest.raises(Killed):
        compare(tiny, tmp_path / "killed", (method,), trainer="hf", training=training)
    folder = cell_folder(tmp_path / "killed", Cell(parse_method(method)[0], 0))
    (folder / "checkpoint-5").mkdir()  # what a kill while saving leaves
    resumed = compare(tiny, tmp_path / "killed", (method,), trainer="hf", training=training)
    assert steps == [0, 1, 2, 3, 4, 4, 5]
    a, b = (weights(tmp_path / name, method) for name in ("whole", "killed"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert whole.cells[0]["training"]["last"] == resumed.cells[0]["training"]["last"]


def test_a_folder_of_one_trainer_is_not_continued_with_the_other(tmp_path: Path) -> None:
    compare(tiny, tmp_path, ("sft",))
    with pytest.raises(LensError, match=r"another run: trainer is None there, 'hf' here"):
        compare(tiny, tmp_path, ("sft",), trainer="hf")


def with_dropout() -> Any:
    return tiny_models.build("gpt2", 0, vocab=tiny_chat.VOCAB), tiny_chat.tiny_tokenizer()


def test_what_the_trainer_does_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LensError, match=r"the base has dropout \(.*\), with which the Trainer trains"):
        compare(with_dropout, tmp_path / "a", ("sft",), trainer="hf")
    ragged = replace(TRAINING, batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(LensError, match=r"gradient_accumulation_steps is 4 and 10 rows are no multiple of the 8"):
        compare(tiny, tmp_path / "b", ("sft",), trainer="hf", training=ragged)


def test_the_users_modes_and_random_state_are_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    compare(tiny, tmp_path, ("sft",), trainer="hf")
    assert torch.equal(torch.random.get_rng_state(), before)
    base, _ = comparison_cells._loaded(tiny, LoadSettings())
    assert not any(module.training for module in base.modules())


def test_a_killed_training_goes_on_from_the_newest_checkpoint_by_number(tmp_path):
    for name, whole in (("checkpoint-9", True), ("checkpoint-10", True), ("checkpoint-11", False)):
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / hf_cells.STATE).write_text("{}")
    assert hf_cells._last_complete(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-11").exists()
