"""Train steering vectors and LoRA adapters through hooks, in the loop of `training`.

    trainable = HookTrainable(model, Direction.zeros(576, [15]))
    train(trainable, examples, settings)
    learned = trainable.result()

`model` is a transformers model, a bridge or a HookedTransformer; its own weights get no gradient.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.finetuning.frozen_lower import FrozenLower
from piggyback_lens.finetuning.steps import StepOutput, forward_step
from piggyback_lens.finetuning.trainables import Trainable
from piggyback_lens.models.backends import core_of, device_of
from piggyback_lens.models.partial import can_begin_late
from piggyback_lens.models.views import frozen
from piggyback_lens.vectors.adapters import Adapter
from piggyback_lens.vectors.adapting import attached
from piggyback_lens.vectors.direction import Direction, Provenance


class HookTrainable(Trainable):
    """A steering vector or LoRA adapter as a `Trainable`; `result()` is the value it has reached.

    Attributes:
        hooked: the model as given; `model` is what the passes go through, of a bridge the model inside.
        start: where training begins.
    """

    def __init__(self, model: Any, start: Adapter, *, cache_below: bool = True, budget_gb: float = 1.0) -> None:
        """Make parameters of the tensors of `start`, on the model's device, in float32.

        Args:
            model: transformers model, bridge or HookedTransformer.
            start: where training begins; it is not changed.
            cache_below: run the layers below the lowest trained one once per example and keep what they give
                (exact, and faster). Nothing else that acts on those layers may come or go meanwhile. A
                HookedTransformer runs them in every step.
            budget_gb: memory for that; the rest goes to files.
        """
        self.hooked, self.model = model, core_of(model)
        self.start = start
        lowest = start.layers[0]
        caches = cache_below and can_begin_late(model) and lowest > 0
        self.below = FrozenLower(self.model, lowest, budget_gb=budget_gb) if caches else None
        device = device_of(model)
        self._parameters = {
            name: nn.Parameter(value.detach().to(device, torch.float32, copy=True))
            for name, value in start.tensors().items()
        }

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The tensors to descend on, by a stable name."""
        return self._parameters

    def current(self) -> Adapter:
        """The adapter made of the live parameters: gradients flow to them."""
        return self.start.with_tensors(self._parameters)

    def result(self) -> Adapter:
        """The adapter as trained so far, cut off from the parameters."""
        done = self.start.with_tensors({k: v.detach().cpu().clone() for k, v in self._parameters.items()})
        source = self.start.provenance
        how = "trained" if source is None else f"{source.how}; trained"
        return replace(done, provenance=Provenance(how, seed=None if source is None else source.seed))

    def forward(self, batch: TrainBatch) -> StepOutput:
        """One pass under the adapter, with gradient to `parameters()` only.

        Where the lower layers are not run, the output holds no keys and values.
        """
        with frozen(self.model), attached(self.hooked, self.current()):
            if self.below is None or batch.plain_keys or batch.residual:
                return forward_step(self.model, batch)
            with self.below.standing_in(batch):
                output = forward_step(self.model, batch)
            bare = replace(output, keys=(), values=(), prefix_keys=(), prefix_values=())
            return replace(bare, way=f"{output.way}, lower layers kept")

    @torch.no_grad()
    def base_forward(self, batch: TrainBatch) -> StepOutput:
        """The pass of the model without the adapter."""
        return forward_step(self.model, batch)

    def logged(self) -> dict[str, float]:
        """For the history: the norm of the solution, summed over layers or modules."""
        return {"norm": self.current().norm()}

    def settings(self) -> Mapping[str, object]:
        """Those of the adapter, and a hash of the numbers it starts from: another start is another run."""
        digest = hashlib.sha256()
        for name, value in self.start.tensors().items():
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return {**self.start.settings(), "start": digest.hexdigest()[:16]}

    def save(self, folder: Path) -> None:
        """Write the finished adapter: PEFT's format for LoRA, a direction file for a steering vector."""
        from piggyback_lens.vectors.adapter_files import save_peft

        done = self.result()
        if isinstance(done, Direction):
            done.save(folder / "direction.safetensors")
        else:
            save_peft(done, folder)
