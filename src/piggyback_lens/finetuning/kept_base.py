"""The base's predictions on data that training sees again and again: computed once, kept small, exact.

Kept is what the output embeddings read at each response token (d_model numbers, not one per word of the
vocabulary); the logits are one matrix product away. Each example has a base pass of its own: the last bits of a
row depend on the rows beside it, and a resumed run meets an example for the first time in another batch. Where
a model does more to its logits after that (soft-capping, scaling) nothing is kept, and the base is run anew; nor is
it of a sharded model, whose passes have to be as many on every process.
"""

import weakref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.finetuning.batches import TrainBatch, make_batch
from piggyback_lens.finetuning.references import base_of
from piggyback_lens.finetuning.steps import Step, StepOutput
from piggyback_lens.models.network import keeping_last_hidden, output_embeddings, unembedded
from piggyback_lens.models.views import adapter_off, is_sharded

Key = tuple[int, tuple[int, ...]]


class KeptBase:
    """The base's logits at the response tokens of examples, after the first time without a pass.

    What was kept of one model is forgotten when another one comes.

    Attributes:
        passes: passes of the base so far.
        keeps: False once the model was found to change its logits after the output embeddings.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.keeps = True
        self._owner: weakref.ref[nn.Module] | None = None
        self._hidden: dict[Key, Float[Tensor, "token d_model"]] = {}

    def __len__(self) -> int:
        return len(self._hidden)

    @torch.no_grad()
    def logits(self, step: Step, batch: TrainBatch, base: nn.Module | None) -> Float[Tensor, "token vocab"]:
        """The base's logits at the response tokens of a batch, row by row.

        Args:
            step: says what the base is, where `base` is None.
            batch: any rows.
            base: another model.
        """
        model = step.model if base is None else base
        if self._owner is None or self._owner() is not model:  # a penalty that is used again, for another model
            self._hidden.clear()
            self._owner, self.keeps = weakref.ref(model), True
        keeps = output_embeddings(model) is not None and not is_sharded(model)
        keys = [(example.n_prompt, example.ids) for example in batch.examples]
        for key, example in zip(keys, batch.examples, strict=True):
            if keeps and self.keeps and key not in self._hidden:
                self._keep(key, example, step, batch, base)
        if not keeps or not self.keeps:
            return self._run(step, batch, base).logits
        with adapter_off(model):
            return unembedded(model, torch.cat([self._hidden[key] for key in keys]))

    def _keep(
        self,
        key: Key,
        example: RenderedPrompt,
        step: Step,
        batch: TrainBatch,
        base: nn.Module | None,
    ) -> None:
        alone = make_batch([example], share_prefix=False, device=batch.ids.device)
        model = step.model if base is None else base
        with keeping_last_hidden(model) as read:
            output = self._run(step, alone, base)
        hidden = read[-1][0]
        with adapter_off(model):
            again = unembedded(model, hidden)
        if torch.allclose(again.float(), output.logits.float(), atol=1e-3, rtol=1e-3):
            self._hidden[key] = hidden
        else:
            self.keeps = False
            self._hidden.clear()

    def _run(self, step: Step, batch: TrainBatch, base: nn.Module | None) -> StepOutput:
        self.passes += 1
        return base_of(step, batch, base)
