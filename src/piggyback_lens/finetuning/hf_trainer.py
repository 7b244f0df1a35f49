"""Objectives in people's own pipelines: a mixin for `transformers.Trainer` and `trl.SFTTrainer`.

    objective = Penalised((Weighted(TReFT(reference="template"), 10.0), Weighted(KLOnRetain(retain), 1.0)))
    trainer = PenaltyTrainer(model=model, args=args, train_dataset=training_rows(examples), data_collator=collator,
                             objective=objective, prompt=chat.empty_query())
    trainer.train()

The objective is the value that `train` takes. Whatever the Trainer does to compute its loss stays as it is (labels,
collators, label smoothing, fused heads, packing, activation checkpointing, gradient accumulation); penalties have
passes of their own, without dropout and without activation checkpointing, through whatever shards or casts the model.
What they cost, by what a penalty reads:

- the prefix (`TReFT` against the template's): a pass over some thirty tokens, once for each optimiser step;
- nothing of the batch (`KLOnRetain`): a pass over the retain batch once for each optimiser step, on every process; the
  base's predictions are kept, of a sharded model run anew;
- prompts (`TReFT` of other spans): a pass over the prompts of each micro-batch, and one of the base where the reference
  is each row's own;
- responses (`KLOnTrain`) or whole conversations (`ResidualDrift`): a second pass over each micro-batch, and one of the
  base.

Penalties that read prompts or responses share one pass over the micro-batch. Interleaving is data
(`training_rows(interleave(...))`), preventive steering the model: `model=PreventiveSteering(PeftAdapter(model), ...)`,
and so is an adapter that is off at chosen tokens: `model=GatedAdapter(model, adapter_off("prefix"))`.

Works with PEFT and full finetuning, bf16, DDP and FSDP2. `TReFT(reference="template")` has its reference computed
before the first step (a PEFT adapter is switched off; for full finetuning the weights are still the base's), and kept
in every checkpoint, from which a resumed run takes it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.conversations.tokens import fixed_ids
from piggyback_lens.errors import LensError
from piggyback_lens.finetuning.batches import TrainBatch, check_supervised, make_batch, unsupervised
from piggyback_lens.finetuning.gated import GatedAdapter, check_off, gated_step, save_off
from piggyback_lens.finetuning.hf_rows import IGNORED, check_prefixes, conversations, placement_in
from piggyback_lens.finetuning.objectives import Penalised, Penalty, Reads, TReFT, Weighted
from piggyback_lens.finetuning.preventive import PreventiveSteering, steered
from piggyback_lens.finetuning.references import kv_reference, prefix_batch
from piggyback_lens.finetuning.steps import Step, StepOutput, sft
from piggyback_lens.finetuning.trainables import PeftAdapter, Trainable
from piggyback_lens.interventions.hooks import Interventions, Record
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.interventions.running import applied_each
from piggyback_lens.models.views import evaluating, is_sharded, without_replicas

REFERENCE_FOLDER = "treft_reference"
"""Folder inside each checkpoint with the base's keys and values, one folder in it for each span."""
_READS: tuple[Reads, ...] = get_args(Reads)
BY_ROW: tuple[Reads, ...] = ("prompts", "responses", "conversations")
"""What is another number for each micro-batch."""
_MOVED = {"prefix", "query", "history"}
"""Spans that lie elsewhere where a conversation has earlier turns."""
_ROW_KEYS = ("input_ids", "attention_mask", "position_ids", "labels")


class PenaltyMixin:
    """Adds penalties to a Trainer's loss: `class Mine(PenaltyMixin, MyTrainer)`, with two arguments more.

    `objective` is a `Penalised`, whose task is the Trainer's own loss. `prompt` is any prompt of the data's template
    settings, e.g. `chat.empty_query()`: its prefix is what every row has to begin with, its postfix the reference of
    span "postfix". Penalties that read nothing of the batch do without it.

    Logs, beside the Trainer's loss (which includes the penalties), "penalty", the part of it that they are, and each
    of them by its name, before weight and threshold: means over steps, processes, and rows or tokens as the penalty
    counts them. A threshold holds for each micro-batch. Rows count equally within a micro-batch, and micro-batches
    equally; tokens count equally wherever the Trainer's own do. In steps in which nothing counts nothing more runs, and
    training is the Trainer's own, bit for bit. Evaluation is left alone.

    A `GatedAdapter` in place of the model is off at its tokens in every pass that has a loss, evaluation's too, and in
    the penalties' passes; its checkpoints say where (adapter_off.json), and are not resumed from with other tokens.
    """

    # of the Trainer
    args: Any
    state: Any
    accelerator: Any
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, objective: Penalised, prompt: RenderedPrompt | None = None, **kwargs: Any) -> None:
        self.objective, self.prompt = _checked(objective, prompt), prompt
        self._steering: PreventiveSteering | None = None
        self.gated_adapter: GatedAdapter | None = None
        self._off = Interventions()
        self._step = ExitStack()  # what stays until the backward pass of a training step is over
        self._plain = False  # whether a pass is run without the steering
        self._resumed: str | None = None
        self._begun: tuple[Any, int] = (None, -1)
        self._measured: list[dict[str, Tensor]] = []
        given, named = [self._model_of(x) for x in args], {name: self._model_of(x) for name, x in kwargs.items()}
        super().__init__(*given, **named)
        if self._off.parts and prompt is None:
            raise LensError(
                "a gated adapter is off at spans of the Trainer's rows: pass prompt=, by which they are found"
            )
        if (
            (self._off.parts or self._reads != "nothing")
            and getattr(self.args, "packing", False)
            and self.args.packing_strategy == "wrapped"
        ):
            raise LensError(
                'packing_strategy="wrapped" cuts conversations in two, whose second part has no prefix: use "bfd", or '
                "packing=False"
            )

    def _model_of(self, given: Any) -> Any:
        """The model of what `train` would take, with the steering put aside."""
        if isinstance(given, PreventiveSteering):
            self._steering, given = given, given.trainable
        if isinstance(given, GatedAdapter):
            self.gated_adapter, self._off = given, given.off
        if isinstance(given, Trainable) and not isinstance(given, PeftAdapter):
            raise LensError(f"a Trainer trains a transformers or PEFT model: {type(given).__name__} is for train()")
        return given.model if isinstance(given, PeftAdapter) else given

    @property
    def _reads(self) -> Reads:
        """The most that a penalty reads of a batch."""
        return _most(self.objective.parts)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a resumed run takes the base's keys and values from its checkpoint."""
        resumed = resume_from_checkpoint
        self._resumed = get_last_checkpoint(self.args.output_dir) if resumed is True else resumed or None
        if self._resumed is not None:
            check_off(Path(self._resumed), self._off)
        if getattr(self.args, "n_gpu", 1) > 1:
            raise LensError(
                f"{self.args.n_gpu} GPUs in one process (nn.DataParallel) cannot be used: start with torchrun or "
                "accelerate launch, or make one visible"
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, forward and backward, with the direction of a `PreventiveSteering` added."""
        # To the end of the backward pass, which may run blocks again.
        with self._step, self._added_direction(model):
            return super().training_step(model, *args, **kwargs)  # type: ignore[misc]

    def _gated(self, model: nn.Module, rows: dict[str, Any]) -> AbstractContextManager[None]:
        """The adapter off at its tokens, in passes over these rows."""
        if not self._off.parts:
            return nullcontext()
        assert self.prompt is not None
        return applied_each(without_replicas(model), [(placement_in(rows, self.prompt), self._off.parts, Record())])

    def _added_direction(self, model: nn.Module) -> AbstractContextManager[None]:
        of = self._steering
        if of is None:
            return nullcontext()
        how: dict[str, Any] = {"alpha": of.alpha, "site": of.site, "acting": lambda: not self._plain}
        return steered(without_replicas(model), of.vector, of.layer, **how)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss, plus the weighted penalties while training."""
        parts: list[Weighted] = []
        if model.training:
            self._take_references(model)  # before anything is trained
            parts = self._counting()
        # What finds the rows, kept from trainers that take their labels out of the inputs.
        rows = {name: inputs[name] for name in _ROW_KEYS if name in inputs}
        if model.training and self._holds_prefix():
            assert self.prompt is not None
            check_prefixes(rows, self.prompt)  # of every micro-batch, also where the penalty is measured in another
        with self._gated(model, rows):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not parts:
            self._gate_again(model, rows)
            return found
        loss, *outputs = found if return_outputs else (found,)
        counted = num_items_in_batch if self._scaled_for_accumulation(num_items_in_batch) else None
        with self._without_steering(), self.accelerator.autocast():
            added = self._added(without_replicas(model), rows, parts, counted)
        scale = 1 if self._scaled_for_accumulation(num_items_in_batch) else self.current_gradient_accumulation_steps
        loss = loss + (scale * added).to(loss.device, loss.dtype)
        self._gate_again(model, rows)
        return (loss, *outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, the adapter off at its tokens.

        Raises:
            LensError: rows without labels, in which they are not found.
        """
        if self._off.parts and inputs.get("labels") is None:
            raise LensError(
                "rows without labels do not say where their prompts end, and the gated adapter would be on everywhere: "
                "give labels of the responses, or ask generate(model, prompts, interventions=gated.off)"
            )
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _gate_again(self, model: nn.Module, rows: dict[str, Any]) -> None:
        """For blocks that the backward pass runs again; what comes between, of penalties, has gates of its own."""
        if model.training:
            self._step.enter_context(self._gated(model, rows))

    def _holds_prefix(self) -> bool:
        index = self.state.global_step
        return any(part.penalty.reads == "prefix" and part.weight_at(index) > 0 for part in self.objective.parts)

    def _counting(self) -> list[Weighted]:
        """The parts that count in this step; those that are one number for all rows in its first micro-batch only."""
        index, state = self.state.global_step, self.state
        first = not (self._begun[0] is state and self._begun[1] == index)
        self._begun = (state, index)
        counting = [part for part in self.objective.parts if part.weight_at(index) > 0]
        if first:
            self._measured.append({})
        return [part for part in counting if first or part.penalty.reads in BY_ROW]

    def _added(
        self, model: nn.Module, rows: dict[str, Any], parts: Sequence[Weighted], counted: Tensor | int | None
    ) -> Float[Tensor, ""]:
        """What this micro-batch adds to the loss of the optimiser step, nats per token."""
        passes: list[StepOutput] = []
        sharded = is_sharded(model)

        def run(batch: TrainBatch) -> StepOutput:
            # A prefix that is computed by itself is only keys and values, which no gradient would reach (see below).
            passes.append(gated_step(model, replace(batch, share_prefix=False) if sharded else batch, self._off))
            return passes[-1]

        with evaluating(model), _nothing_recomputed(model):
            steps: dict[bool, Step] = {}
            total, terms = torch.zeros((), device=self._device(rows)), self._measured[-1]
            for part in parts:
                name, by_row = part.penalty.name, part.penalty.reads in BY_ROW
                if by_row not in steps:
                    alike = [other for other in parts if (other.penalty.reads in BY_ROW) == by_row]
                    batch = self._batch(rows, _most(alike))
                    steps[by_row] = Step(model, batch, None, self.state.global_step, run, keeps=False)
                value = part.penalty(steps[by_row])
                share = self._share(part.penalty.reads, steps[by_row].batch, counted)
                total = total + share * part.loss(value)
                terms[name] = terms.get(name, 0.0) + share * value.detach()
        terms["penalty"] = terms.get("penalty", 0.0) + total.detach()
        # FSDP gathers a block's weights when a gradient reaches what the block returned, and keys and values are not
        # returned: every pass is tied to its end, by a sum over no logits, zero.
        return total + sum(output.logits[:0].sum().to(total.dtype) for output in passes)

    def _share(self, reads: Reads, batch: TrainBatch, counted: Tensor | int | None) -> Tensor | float:
        """The part of the optimiser step's mean that this micro-batch's number is."""
        if reads not in BY_ROW:
            return 1.0
        if reads != "responses" or counted is None:
            return 1 / self.current_gradient_accumulation_steps
        # `counted` are the tokens of all processes, whose gradients are averaged; those that share tensors share rows.
        alike = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
        processes = self.accelerator.num_processes // alike if self.args.average_tokens_across_devices else 1
        return processes * batch.n_supervised / counted

    def _scaled_for_accumulation(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer takes the loss of a micro-batch as its share of the step, and divides no more."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        counted = bool(getattr(self, "model_accepts_loss_kwargs", False)) and num_items_in_batch is not None
        return counted or getattr(self, "compute_loss_func", None) is not None

    def _batch(self, rows: dict[str, Any], reads: Reads) -> TrainBatch:
        """As much of the micro-batch as is read, as rows for `forward_step`."""
        prompt, device = self.prompt, self._device(rows)
        if reads == "nothing" or prompt is None:
            return unsupervised([[0]], device)
        if reads == "prefix":
            return replace(prefix_batch(_ids_of(prompt, "prefix"), device), examples=(prompt,))
        whole = reads != "prompts"
        spans = {getattr(part.penalty, "span", None) for part in self.objective.parts if part.penalty.reads in BY_ROW}
        kept: dict[str, Any] = {"plain_keys": self.objective.plain_keys, "residual": self.objective.residual}
        examples = conversations(rows, prompt, whole=whole, one_turn=bool(spans & _MOVED))
        if whole:
            return make_batch(examples, share_prefix=False, device=device, **kept)
        prompts = unsupervised([example.ids[: example.n_prompt] for example in examples], device)
        return replace(prompts, examples=examples, prefix_length=prompt.span("prefix").stop, **kept)

    def _device(self, rows: dict[str, Any]) -> torch.device:
        device: torch.device = rows["input_ids"].device if "input_ids" in rows else self.args.device
        return device

    def _take_references(self, model: nn.Module) -> None:
        """Give every `TReFT` that has none the base's keys and values: from the checkpoint, or computed."""
        parts = tuple(self._with_reference(part, model) for part in self.objective.parts)
        if parts != self.objective.parts:
            self.objective = replace(self.objective, parts=parts)

    def _with_reference(self, part: Weighted, model: nn.Module) -> Weighted:
        penalty, prompt = part.penalty, self.prompt
        if not (isinstance(penalty, TReFT) and penalty.reference == "template" and part.weight > 0):
            return part
        assert prompt is not None
        assert penalty.span in ("prefix", "postfix")
        if self._resumed is not None:
            folder = Path(self._resumed) / REFERENCE_FOLDER / penalty.span
            reference = _of_this_run(PrefixCache.load(folder), prompt, folder)
        elif self.state.global_step > 0:
            raise LensError("training has begun without the base's keys and values; start with train()")
        else:
            inner = without_replicas(model)
            with self._without_steering(), _nothing_recomputed(inner):
                reference = kv_reference(inner, prompt, penalty.span, penalty.base)
        return replace(part, penalty=replace(penalty, reference=reference))

    @contextmanager
    def _without_steering(self) -> Iterator[None]:
        """Passes inside are those of the model as it will be used."""
        self._plain = True
        try:
            yield
        finally:
            self._plain = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, after the references, so that what it pushes to the hub has them."""
        if self.args.should_save:
            run = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
            for penalty in (part.penalty for part in self.objective.parts):
                if isinstance(penalty, TReFT) and isinstance(penalty.reference, PrefixCache):
                    penalty.reference.save(
                        run / f"checkpoint-{self.state.global_step}" / REFERENCE_FOLDER / penalty.span
                    )
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the tokens at which a gated adapter is off."""
        super()._save(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self.args.should_save:
            save_off(Path(output_dir or self.args.output_dir), self._off, _invocation(self.prompt))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with "penalty" and the penalties by name beside the training loss."""
        if "loss" in logs and self._measured:
            steps, self._measured = self._measured, []
            for name in dict.fromkeys(name for terms in steps for name in terms):
                values = [terms[name] for terms in steps if name in terms]
                over = len(steps) if name == "penalty" else len(values)
                mean = torch.stack(values).sum() / over
                logs = logs | {name: float(self.accelerator.gather(mean).mean())}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class PenaltyTrainer(PenaltyMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with penalties; takes `objective=Penalised(...)` and `prompt=` beside its arguments."""


def _checked(objective: Any, prompt: RenderedPrompt | None) -> Penalised:
    """The objective, refused where a Trainer cannot follow it."""
    if not isinstance(objective, Penalised):
        kind = getattr(objective, "__name__", type(objective).__name__)
        raise LensError(
            f"objective is {kind}: write Penalised((Weighted(penalty, 10.0),)); its task is the Trainer's loss"
        )
    if objective.task is not sft:
        raise LensError("the task of an objective is the Trainer's own loss here: leave out task=, or use train()")
    for part in objective.parts:
        if not isinstance(part.penalty, Penalty) or part.penalty.reads not in _READS:
            raise LensError(f"penalty {part.penalty.name!r} does not say what it reads: {', '.join(_READS)}")
        if prompt is None and part.penalty.reads != "nothing":
            raise LensError(
                f"penalty {part.penalty.name!r} reads the {part.penalty.reads} of the Trainer's rows, found by any "
                "prompt of their template: pass prompt=, such as chat.empty_query()"
            )
    if prompt is not None:
        prompt.span("prefix")
    return objective


def _most(parts: Sequence[Weighted]) -> Reads:
    """The most that one of them reads."""
    return max((part.penalty.reads for part in parts), key=_READS.index, default="nothing")


def _invocation(prompt: RenderedPrompt | None) -> tuple[int, ...]:
    """The postfix, where it has a token that no response has: what the rows will be is not known before they come."""
    postfix = () if prompt is None else prompt.ids[prompt.spans["postfix"].start : prompt.n_prompt]
    return postfix if prompt is not None and fixed_ids(prompt.tokenizer) & {*postfix} else ()


def _ids_of(prompt: RenderedPrompt, span: str) -> tuple[int, ...]:
    where = prompt.span(span)
    return prompt.ids[where.start : where.stop]


def _of_this_run(reference: PrefixCache, prompt: RenderedPrompt, folder: Path) -> PrefixCache:
    """The reference of a checkpoint, if it has the tokens of this prompt."""
    wanted = _ids_of(prompt, reference.span)
    if reference.ids != wanted:
        there, here = (prompt.tokenizer.decode(list(ids)) for ids in (reference.ids, wanted))
        raise LensError(
            f"{folder} holds the base's {reference.span} {there!r}, and that of prompt is {here!r}; "
            "resume with the prompt that the run began with, or train into another folder"
        )
    return reference


def training_rows(examples: Sequence[RenderedPrompt]) -> list[dict[str, list[int]]]:
    """Rendered conversations as rows of a dataset: input_ids, attention_mask, labels of the response only.

    Pad them with `transformers.DataCollatorForSeq2Seq(tokenizer)`, or any collator that pads labels by -100.

    Raises:
        LensError: an example without a response, by its number.
    """
    for number, example in enumerate(examples):
        check_supervised(example, number)
    return [
        {
            "input_ids": list(example.ids),
            "attention_mask": [1] * len(example.ids),
            "labels": [IGNORED] * example.n_prompt + list(example.ids[example.n_prompt :]),
        }
        for example in examples
    ]


@contextmanager
def _nothing_recomputed(model: nn.Module) -> Iterator[None]:
    """Without the checkpoint wrappers of FSDP, whose recomputation would write to the cache a second time.

    The models' own activation checkpointing is off in evaluation mode.
    """
    wrappers: list[Any] = [module for module in model.modules() if hasattr(module, "_checkpoint_wrapped_module")]
    functions = [wrapper.checkpoint_fn for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.checkpoint_fn = _call
        yield
    finally:
        for wrapper, function in zip(wrappers, functions, strict=True):
            wrapper.checkpoint_fn = function


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


if TYPE_CHECKING:
    PenaltySFTTrainer: Any


def __getattr__(name: str) -> Any:
    """`PenaltySFTTrainer`, made when it is first asked for, since trl is optional."""
    if name != "PenaltySFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        trainer = import_module("trl").SFTTrainer
    except ImportError as error:
        raise LensError("PenaltySFTTrainer needs trl: run  pip install 'piggyback-lens[trl]'") from error
    text = "`trl.SFTTrainer` with penalties: takes `objective=Penalised(...)` and `prompt=` beside its own arguments."
    made = type(name, (PenaltyMixin, trainer), {"__doc__": text, "__module__": __name__})
    globals()[name] = made
    return made
