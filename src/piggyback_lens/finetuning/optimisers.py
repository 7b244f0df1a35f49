"""Optimisers and learning-rate schedules of the training loop: transformers' own, by their names."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from piggyback_lens.errors import LensError
from piggyback_lens.settings import TrainSettings


def optimiser_of(settings: TrainSettings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that transformers' Trainer would make.

    Raises:
        LensError: it needs a package that is not installed.
    """
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    beta1, beta2 = settings.betas
    asked: Any = SimpleNamespace(  # the part of its arguments that the Trainer reads
        optim=OptimizerNames(settings.optim),
        optim_args=None,
        learning_rate=settings.learning_rate,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=1e-8,
    )
    try:
        kind, chosen = Trainer.get_optimizer_cls_and_kwargs(asked)
    except (ImportError, ValueError) as error:
        raise LensError(
            f"optim {settings.optim!r} needs bitsandbytes: pip install 'piggyback-lens[quant]', or use 'adamw_torch'"
        ) from error
    made: torch.optim.Optimizer = kind([{"params": list(parameters), "weight_decay": settings.weight_decay}], **chosen)
    return made


def learning_rate_at(settings: TrainSettings, index: int) -> float:
    """The learning rate of step `index` (from 0): linear up to the peak, then as the schedule says.

    transformers' schedules begin their warm-up with a step at rate zero, which is left out here, and reach their end
    one step after the last: so no step is wasted.
    """
    warmup = round(settings.warmup_fraction * settings.steps)
    part = _schedule(
        settings.lr_scheduler_type, warmup, settings.steps, settings.learning_rate, settings.min_lr_fraction
    )
    return settings.learning_rate * part(index + 1 if index < warmup else index)


@lru_cache(maxsize=16)
def _schedule(name: str, warmup: int, steps: int, peak: float, floor: float) -> Callable[[int], float]:
    """The rate of a step of transformers' schedule, as a part of the peak."""
    from transformers import get_scheduler

    name, more = ("cosine_with_min_lr", {"min_lr_rate": floor}) if floor else (name, None)
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    schedule: Any = get_scheduler(name, unused, warmup, steps, more)
    part: Callable[[int], float] = schedule.lr_lambdas[0]
    return part
