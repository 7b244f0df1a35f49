"""A cell of a comparison trained by transformers' Trainer: the rows, steps, rates and optimiser of our own loop.

What differs is the pass: that of the model's own loss, over whole padded rows. Numbers agree up to rounding, but for
the adapter's dropout, which is drawn in another order.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from piggyback_lens.comparisons.methods import SetUp
from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import batch_indices
from piggyback_lens.finetuning.checkpoints import PREFIX, STOPPED, Row, write_folder
from piggyback_lens.finetuning.objectives import Penalised
from piggyback_lens.finetuning.optimisers import learning_rate_at, optimiser_of
from piggyback_lens.finetuning.trainables import seeded
from piggyback_lens.settings import TrainSettings

STATE = "trainer_state.json"
"""Written last into a checkpoint of the Trainer."""


@dataclass(frozen=True)
class Trained:
    """What a comparison needs of a training run.

    Attributes:
        history: one row per step, as `train` gives them, without their seconds; penalties where they count.
        adapter_dir: the saved adapter.
        plan: why training was stopped early, if it was.
    """

    history: tuple[Row, ...]
    adapter_dir: Path
    plan: Mapping[str, Any] = field(default_factory=dict)


def train_by_trainer(use: SetUp, settings: TrainSettings, prompt: RenderedPrompt, out: Path) -> Trained:
    """Train what `train` takes by transformers' Trainer; a run that was stopped goes on from its checkpoint.

    Args:
        use: objective, examples and trainable of a method.
        settings: those of our loop.
        prompt: any prompt of the template.
        out: folder of the checkpoints and of the adapter.

    Raises:
        LensError: a setting or a model that the Trainer treats otherwise than our loop, by its name; a loss that is not
            finite.
    """
    network: Any = use.trainable.model
    _refuse_dropout(network)
    batches = _batches(settings, use.examples)
    objective = use.objective if isinstance(use.objective, Penalised) else Penalised(())
    with seeded(settings.seed, next(network.parameters()).device), _modes_kept(network):
        trainer = _trainer(use, settings, batches, objective=objective, prompt=prompt, out=out)
        if use.on_step is not None:
            trainer.add_callback(use.on_step.callback(trainer))
        trainer.train(resume_from_checkpoint=_last_complete(out))
    history = tuple(_rows(trainer.state.log_history, batches, use.examples))
    if bad := next((row for row in history if not math.isfinite(row["loss"])), None):
        raise LensError(f"the loss of step {bad['step']} is {bad['loss']}; lower learning_rate, or warm up longer")
    stopped = None if use.on_step is None else use.on_step.stopped
    return Trained(
        history, write_folder(out / "adapter", use.trainable.save), {} if stopped is None else {STOPPED: stopped}
    )


def _trainer(
    use: SetUp,
    settings: TrainSettings,
    batches: Sequence[Sequence[Sequence[int]]],
    *,
    objective: Penalised,
    prompt: RenderedPrompt,
    out: Path,
) -> Any:
    from transformers import PrinterCallback

    from piggyback_lens.finetuning.hf_trainer import PenaltyTrainer, training_rows

    rows: Any = training_rows(use.examples)
    passes = [list(micro) for step in batches for micro in step]

    class InOurOrder(PenaltyTrainer):
        """The batches of our loop."""

        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(rows, batch_sampler=passes, collate_fn=_padded)

    optimiser = optimiser_of(settings, list(use.trainable.parameters().values()))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda index: learning_rate_at(settings, index) / settings.learning_rate
    )
    trainer: Any = InOurOrder(
        model=use.trainable,
        args=_arguments(settings, out, optimiser),
        train_dataset=rows,
        optimizers=(optimiser, schedule),
        objective=objective,
        prompt=prompt,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: TrainSettings, out: Path, optimiser: torch.optim.Optimizer) -> Any:
    """The settings by the Trainer's names. What `optimizers=` and the data loader say is not among them."""
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    # Its name since transformers 5.23.
    recompute = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    given: dict[str, Any] = {
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": settings.max_grad_norm or 0.0,
        "bf16": settings.bf16,
        recompute: settings.gradient_checkpointing,
        "seed": settings.seed,
        "save_steps": settings.checkpoint_every,
    }
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "logging_nan_inf_filter": False}
    kept = {"save_strategy": "steps", "save_total_limit": 1, "remove_unused_columns": False}
    on_cpu = optimiser.param_groups[0]["params"][0].device.type == "cpu"
    return TrainingArguments(output_dir=str(out), use_cpu=on_cpu, **given, **quiet, **kept)


def _batches(settings: TrainSettings, examples: Sequence[RenderedPrompt]) -> list[list[tuple[int, ...]]]:
    """Step by step the examples of each pass, as in our loop.

    Raises:
        LensError: a step with fewer passes or rows than others, which the Trainer would fill or weigh otherwise.
    """
    passes, lengths = settings.gradient_accumulation_steps, tuple(len(example.ids) for example in examples)
    size = settings.batch_size * passes
    if passes > 1 and len(examples) % size:
        raise LensError(
            f"gradient_accumulation_steps is {passes} and {len(examples)} rows are no multiple of the {size} of a "
            "step: the Trainer weighs passes of unequal size equally; change one of them, or use trainer='own'"
        )
    drawn = [batch_indices(lengths, size, settings.seed, index) for index in range(settings.steps)]
    return [[step[at : at + settings.batch_size] for at in range(0, len(step), settings.batch_size)] for step in drawn]


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }


def _refuse_dropout(model: nn.Module) -> None:
    """The Trainer trains with the base's own dropout, our loop without."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        rates = [value for key, value in vars(module).items() if "dropout" in key]
        rates += [module.p] if isinstance(module, nn.Dropout) else []
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise LensError(
                f"the base has dropout ({name}), with which the Trainer trains and our loop does not: set it to 0 in "
                "the model's config, or use trainer='own'"
            )


def _last_complete(out: Path) -> str | None:
    """The newest checkpoint; what a kill left unfinished is deleted."""
    found = []
    for folder in out.glob(f"{PREFIX}*"):
        if (folder / STATE).exists():
            found.append(folder)
        else:
            shutil.rmtree(folder)
    return str(max(found, key=lambda folder: int(folder.name.removeprefix(PREFIX)))) if found else None


def _rows(
    log: Sequence[Mapping[str, Any]], batches: Sequence[Sequence[Sequence[int]]], examples: Sequence[RenderedPrompt]
) -> Iterator[Row]:
    """The Trainer's log as a history of our loop."""
    names = {"learning_rate": "lr"}
    for row in log:
        if "loss" not in row:
            continue
        step = int(row["step"])
        shown = {names.get(name, name): value for name, value in row.items() if name not in ("epoch", "penalty")}
        tokens = sum(len(examples[n].ids) - examples[n].n_prompt for micro in batches[step - 1] for n in micro)
        yield {**shown, "sft": row["loss"] - row.get("penalty", 0.0), "tokens": tokens}


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """The Trainer leaves a model in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
