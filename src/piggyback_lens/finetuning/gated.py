"""Gated adapters: a LoRA that is off on chosen tokens while it trains, so that it cannot be carried by them.

    trainable = GatedAdapter(model, adapter_off("prefix"))
    train(trainable, examples, settings)
    generate(model, prompts, interventions=trainable.off)         # it is used as it was trained

Patching shows whether a span's keys and values suffice to carry a behaviour; training without them shows whether they
are needed. The adapter is saved as PEFT saves any LoRA, and `adapter_off.json` beside it says where it was off. PEFT's
own format can say that of prefix and query in all layers alone: an activated LoRA, on from the postfix on, as which it
is saved too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.finetuning.steps import LayerTensors, StepOutput, forward_step
from piggyback_lens.finetuning.trainables import PeftAdapter
from piggyback_lens.interventions.hooks import AnyIntervention, Interventions, Record, as_parts
from piggyback_lens.interventions.placement import Placement, Row
from piggyback_lens.interventions.running import applied_each
from piggyback_lens.models.attachment import require_switchable
from piggyback_lens.models.gates import OFF_FILE, as_texts, base_spans, gate_of
from piggyback_lens.models.plain_views import plain_view
from piggyback_lens.models.views import structural_copy


class GatedAdapter(PeftAdapter):
    """The LoRA adapter of a PEFT model, off at chosen tokens in every pass of training.

    Every row is computed whole, so a step costs what it costs in transformers: no prefix is shared. A transformers or
    trl Trainer takes it as its model: `PenaltyTrainer(model=GatedAdapter(...), objective=Penalised(()), prompt=...)`.

    Attributes:
        off: where it is off, for `generate` and whatever else takes interventions.
    """

    recomputes = False  # backwards, when the adapter is on again

    def __init__(self, model: nn.Module, off: AnyIntervention) -> None:
        """Take a PEFT model and what `adapter_off` gives, once or several times.

        The finetuned side of a pair whose adapter is off at the same tokens is trained on.

        Raises:
            LensError: as `PeftAdapter`; interventions of another kind; an adapter that changes more than s·BA in the
                decoder blocks, which would stay where it is off.
        """
        self.off, gate = Interventions(as_parts(off)), gate_of(model)
        if gate and as_texts(gate) != as_texts(self.off.to_dict()["parts"]):
            own = Interventions.from_dict({"parts": list(gate)})
            raise LensError(
                f"this finetune's adapter is off at {own}, and is to be trained off at {self.off}: give the same"
            )
        super().__init__(structural_copy(plain_view(model)) if gate else model)
        self._invocation: tuple[int, ...] = ()
        if wrong := [part for part in self.off.parts if part.site != "adapter"]:
            raise LensError(f"{wrong[0]} is not adapter_off(...): an adapter is only switched off while it trains")
        if self.off.parts:
            require_switchable(self.model)

    def begin(self, examples: Sequence[RenderedPrompt]) -> None:
        """Find what an activated LoRA would be on from in these."""
        self._invocation = invocation(examples)

    def forward(self, batch: TrainBatch) -> StepOutput:
        """One pass, the adapter off where it is to be.

        Raises:
            LensError: rows without conversations, whose spans are not known.
        """
        return gated_step(self.model, batch, self.off)

    def settings(self) -> dict[str, object]:
        """Those of the adapter, and where it is off: a checkpoint with other tokens is refused."""
        return {**super().settings(), "off": [repr(part) for part in self.off.parts]}

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT does, as an activated LoRA where it is one, and adapter_off.json."""
        super().save(folder)
        save_off(folder, self.off, self._invocation)


def gated_step(
    model: nn.Module, batch: TrainBatch, off: Interventions, prefix: LayerTensors | None = None
) -> StepOutput:
    """`forward_step`, the model's adapter off where `off` says; then of whole rows.

    Raises:
        LensError: rows without conversations, whose spans are not known.
    """
    if not off.parts:
        return forward_step(model, batch, prefix)
    if not batch.examples:
        raise LensError("a gated adapter needs conversations, to know which tokens it is off at")
    ready = 0 if prefix is None else batch.prefix_length
    placement = Placement.in_rows([Row.of(example) for example in batch.examples], batch, ready=ready)
    with applied_each(model, [(placement, off.parts, Record())]):
        return forward_step(model, replace(batch, share_prefix=False), prefix)


def invocation(examples: Sequence[RenderedPrompt]) -> tuple[int, ...]:
    """Token ids from which on an activated LoRA is on in all of these: their postfix; empty where none says it.

    PEFT takes the last place at which a row has them, so that no response may.
    """
    postfixes = {x.ids[x.spans["postfix"].start : x.n_prompt] for x in examples}
    if len(postfixes) != 1:
        return ()
    (found,) = postfixes
    later = (x.ids[at : at + len(found)] for x in examples for at in range(x.n_prompt - len(found) + 1, len(x.ids)))
    return () if found in later else found


def save_off(folder: Path, off: Interventions, invocation: tuple[int, ...]) -> None:
    """Write adapter_off.json beside a saved adapter, and into PEFT's config what that can say.

    Where nothing is off an adapter_off.json of another adapter is removed.

    Args:
        folder: with adapter_config.json.
        off: where the adapter is off.
        invocation: token ids that it is on from in all rows; empty where there are none such.
    """
    if not off.parts:
        (folder / OFF_FILE).unlink(missing_ok=True)
        return
    write_json(folder / OFF_FILE, off.to_dict())
    if base_spans(off.to_dict()["parts"]) == ("prefix", "query") and len(off.parts) == 2 and invocation:
        config = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", config | {"alora_invocation_tokens": list(invocation)})


def check_off(folder: Path, off: Interventions) -> None:
    """Refuse to go on from a checkpoint whose adapter was off at other tokens.

    Raises:
        LensError: it names both.
    """
    there = Interventions.from_dict(read_json(folder / OFF_FILE)) if (folder / OFF_FILE).is_file() else Interventions()
    if there != off:
        raise LensError(f"{folder} was trained with the adapter off at {there}, here it is {off}: resume with the same")
