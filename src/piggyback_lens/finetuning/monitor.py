"""Watch a finetune while it trains: when does it begin to spread, and when does the prefix carry that?

    monitor = Monitor(model, towards, against, every=10, out="run/monitor.jsonl")   # before training
    train(model, examples, on_step=monitor)                                         # our loop
    trainer.add_callback(monitor.callback(trainer))                                 # a transformers Trainer

Every measure is teacher-forced: two answers are given to each off-topic prompt, one that shows the trained
behaviour and one that the base would give, and their probabilities are compared. Nothing is generated.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.files import append_jsonl, atomic_write_bytes, atomic_write_text, read_json, read_jsonl, write_json
from piggyback_lens.finetuning.batches import check_supervised, make_batch
from piggyback_lens.finetuning.gated import GatedAdapter, gated_step
from piggyback_lens.finetuning.preventive import PreventiveSteering
from piggyback_lens.finetuning.references import prefix_batch, prefix_drift
from piggyback_lens.finetuning.steps import LayerTensors, StepOutput
from piggyback_lens.finetuning.trainables import PeftAdapter, Trainable
from piggyback_lens.intervals import Estimate, recovery, spread
from piggyback_lens.interventions.hooks import Interventions
from piggyback_lens.interventions.prefix import PrefixCache
from piggyback_lens.maths import token_log_probs
from piggyback_lens.models.views import adapter_off, evaluating, has_adapter, is_sharded, without_replicas

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Row = dict[str, Any]


class Monitor:
    """Measures a model every n steps; keeps the rows, and writes them to a JSON lines file as they come.

    A row has: step; "spread", the mean over off-topic prompts of the contrast now minus that of the base,
    nats per token (contrast: log p(towards) − log p(against), each a mean over its tokens; 0 before
    training, higher = more of the behaviour); "recovery", the part of it that goes away when the base's
    prefix keys and values are put in place (1 = the prefix carries all of it; NaN with "recovery_reason"
    while there is nothing to recover); "drift", the mean over layers of the prefix's relative squared
    deviation from the base, and "drift_layers", layer by layer (see `TReFT`). Spread and recovery come with
    the ends of their 95 % interval over prompts, "_low" and "_high", and "n".

    Cost of a row: four passes over the prompts with their answers.
    The model's modes, gradients and the random state are left as they were. A `GatedAdapter` is measured as it trains
    and is used, its adapter off at its tokens.

    With `stop_above` it ends training when the spread is larger, and puts the weights of the last measurement below it
    back: those of before training, if there is none. The last step is measured too, so that the bound holds for the
    weights that training leaves. The result of `train` says so. For a run that may be resumed give `out`, beside which
    those weights are kept (monitor.kept.safetensors). A Trainer writes no checkpoint of the step that ended training,
    from which a resumed run would train on: save the model afterwards.

    A Trainer's run measures the base once more when it begins, in the precision in which it runs the model, and
    writes that beside `out` (monitor.base.json, monitor.base.safetensors): a resumed run goes on with it.
    """

    def __init__(
        self,
        model: nn.Module | Trainable,
        towards: Sequence[RenderedPrompt],
        against: Sequence[RenderedPrompt],
        *,
        every: int = 10,
        batch_size: int = 16,
        out: str | Path | None = None,
        stop_above: float | None = None,
    ) -> None:
        """Measure the base, and read what an interrupted run of the same probes has written to `out`.

        Args:
            model: the model to be trained, before training: its PEFT adapter is switched off to measure the
                base, or its own weights are the base's still. Of a gated adapter, the `GatedAdapter` that is trained.
            towards: off-topic prompts with an answer that shows the behaviour.
            against: the same prompts with an ordinary answer, e.g. the base's own.
            every: steps between two rows.
            batch_size: rows per pass.
            out: the JSON lines file, or None to write nothing.
            stop_above: the spread that ends training, nats per token; None to watch only.

        Raises:
            LensError: lists that do not match, prompts with different prefixes, the file of other probes, nothing
                that is trained in a model whose training is to be ended, or a vector that is trained.
        """
        self.model, self.off = _watched(model)
        self.every, self.batch_size, self.stop_above = every, batch_size, stop_above
        self.stopped: Row | None = None
        self.out = None if out is None else Path(out)
        self._towards, self._against = list(towards), list(against)
        self._check()
        prefix = self._towards[0].span("prefix")
        self._probes = _fingerprint([*self._towards, *self._against])
        self.rows = self._written()
        self._prefix_ids = self._towards[0].ids[: prefix.stop]
        self._begun = False  # a Trainer's run has begun, so that the weights need not be the base's any more
        self.measure_base(self.model)
        self._started = False  # `train` has told of a step
        self._kept_step, self._kept_weights = 0, self._copies(self.model)

    @torch.no_grad()
    def measure_base(self, model: nn.Module) -> None:
        """Measure the base again, in `model` as it is before training (an adapter is switched off)."""
        with adapter_off(model), evaluating(model):
            output = self._prefix_pass(model, next(model.parameters()).device)
            self._hold(list(output.prefix_keys), list(output.prefix_values), self._contrast(model))

    def _prefix_pass(self, model: nn.Module, device: torch.device) -> StepOutput:
        batch = replace(prefix_batch(self._prefix_ids, device), examples=(self._towards[0],))
        return gated_step(model, batch, self.off)

    def _hold(self, keys: Sequence[Tensor], values: Sequence[Tensor], contrast: Sequence[float]) -> None:
        """Keep the base's prefix, [kv_head, prefix, head_dim] per layer, and its contrast of every prompt."""
        self._reference = PrefixCache(self._prefix_ids, torch.stack(list(keys)), torch.stack(list(values)))
        self._base_prefix: LayerTensors = (keys, values)
        self._base = list(contrast)

    def _begin(self, model: nn.Module, step: int, *, write: bool) -> None:
        """A Trainer begins a run at `step`: the base as that run has it, once."""
        if self.stop_above is not None and is_sharded(model):
            raise LensError("stop_above keeps whole weights, and those of this model are sharded: leave it out")
        self._start(step, write=write)
        if step == 0:
            self._kept_step, self._kept_weights = 0, self._copies(model)
        begun, self._begun = self._begun, True
        if begun:
            return
        if step > 0 and self._read_base(next(model.parameters()).device):
            return
        if step == 0 or has_adapter(model):
            self.measure_base(model)
            if write:
                self._write_base()

    def _write_base(self) -> None:
        from safetensors.torch import save

        if self.out is not None:
            parts = zip(("keys", "values"), self._base_prefix, strict=True)
            blob = save({f"{name}.{i}": x.cpu().contiguous() for name, part in parts for i, x in enumerate(part)})
            atomic_write_bytes(self.out.with_suffix(".base.safetensors"), blob)
            facts = {"probes": self._probes, "layers": len(self._base_prefix[0]), "contrast": self._base}
            write_json(self.out.with_suffix(".base.json"), facts | {"sha256": hashlib.sha256(blob).hexdigest()})

    def _read_base(self, device: torch.device) -> bool:
        """Take what `_write_base` wrote; False where there is nothing.

        Raises:
            LensError: files of other probes, or damaged ones.
        """
        from safetensors.torch import load

        if self.out is None or not self.out.with_suffix(".base.json").exists():
            return False
        path = self.out.with_suffix(".base.json")
        facts, blob = read_json(path), self.out.with_suffix(".base.safetensors").read_bytes()
        if facts["probes"] != self._probes or facts["sha256"] != hashlib.sha256(blob).hexdigest():
            raise LensError(f"{path} is of other probes than these, or damaged; choose another out= for this run")
        found = {name: x.to(device) for name, x in load(blob).items()}
        keys, values = ([found[f"{name}.{i}"] for i in range(facts["layers"])] for name in ("keys", "values"))
        self._hold(keys, values, facts["contrast"])
        return True

    def _check(self) -> None:
        if not self._towards or len(self._towards) != len(self._against):
            raise LensError(
                f"{len(self._towards)} answers towards the behaviour and {len(self._against)} against it; give one "
                "of each for every prompt, and at least one prompt"
            )
        if self.every < 1 or self.batch_size < 1:
            raise LensError(f"every is {self.every} and batch_size {self.batch_size}; both are at least 1")
        if self.stop_above is not None and not (0 < self.stop_above < math.inf and self._trained(self.model)):
            raise LensError(
                f"stop_above is {self.stop_above}: expected a positive number, and a model of which something is "
                "trained (a PEFT adapter, or its own weights)"
            )
        first = self._towards[0]
        prefix = first.ids[: first.span("prefix").stop]
        for number, (one, other) in enumerate(zip(self._towards, self._against, strict=True)):
            for example in (one, other):
                check_supervised(example, number)
                if example.ids[: example.span("prefix").stop] != prefix:
                    raise LensError(f"probe {number} has another prefix than probe 0; use one chat format for all")
            if one.ids[: one.n_prompt] != other.ids[: other.n_prompt]:
                raise LensError(f"probe {number} has two different prompts: give the same prompt both answers")

    def check_trained(self, trainable: object) -> None:
        """Refuse to watch the training of an adapter that is off at other tokens than in the measurements.

        Args:
            trainable: what is trained.

        Raises:
            LensError: it names both.
        """
        _, off = _watched(trainable)
        if off != self.off:
            raise LensError(
                f"the adapter that trains is off at {off}, and the one that is measured at {self.off}: give Monitor "
                "the GatedAdapter that is trained"
            )

    def __call__(self, row: Mapping[str, int | float]) -> Row | None:
        """As `train(..., on_step=monitor)`: measure after every n-th step; what it gives ends training.

        Raises:
            LensError: the weights to go back to are missing, in a resumed run, or were kept by another run.
        """
        step = int(row["step"])
        if not self._started:
            self._started = True
            self._start(step - 1)
        if not self._is_due(step, row.get("steps")):
            return None
        return self._judge(self.measure(step), self.model)

    def _is_due(self, step: int, steps: int | float | None) -> bool:
        """Every n-th step; the last one too where a bound is to hold for what training leaves."""
        return step % self.every == 0 or (self.stop_above is not None and step == steps)

    def _judge(self, row: Row, model: nn.Module, *, write: bool = True) -> Row | None:
        """Keep the weights, or put those that were kept back and say so."""
        if self.stop_above is None:
            return None
        step, spread_now = row["step"], row["spread"]
        if spread_now <= self.stop_above:
            self._keep(step, model, write=write)
            return None
        if not 0 < step - self._kept_step <= self.every:
            raise LensError(
                f"the spread has risen above {self.stop_above:g} by step {step}, and the last weights that were kept "
                f"are those of step {self._kept_step}: the run was resumed without them, or they are another run's; "
                "give Monitor out= of its own, and start again"
            )
        with torch.no_grad():
            for value, kept in zip(self._trained(model), self._kept_weights, strict=True):
                value.copy_(kept)
        self.stopped = {"step": step, "spread": spread_now, "stop_above": self.stop_above, "kept_step": self._kept_step}
        return self.stopped

    @staticmethod
    def _trained(model: nn.Module) -> list[nn.Parameter]:
        return [value for value in model.parameters() if value.requires_grad]

    def _copies(self, model: nn.Module) -> list[Tensor]:
        if self.stop_above is None:
            return []
        return [value.detach().clone() for value in self._trained(model)]

    @property
    def _kept_file(self) -> Path | None:
        return None if self.out is None or self.stop_above is None else self.out.with_suffix(".kept.safetensors")

    def _start(self, step: int, *, write: bool = True) -> None:
        """A run goes on after `step`, with the weights that it has kept; at 0 it begins, and others' are dropped."""
        from safetensors.torch import load

        self.stopped, file = None, self._kept_file
        if file is None or not file.exists():
            return
        if step > 0 and self.rows:
            found = load(file.read_bytes())
            self._kept_step = int(found.pop("step"))
            own = self._trained(self.model)
            self._kept_weights = [found[str(i)].to(value.device) for i, value in enumerate(own)]
        elif step == 0 and write:
            file.unlink()

    def _keep(self, step: int, model: nn.Module, *, write: bool) -> None:
        from safetensors.torch import save

        self._kept_step, self._kept_weights = step, self._copies(model)
        if write and self._kept_file is not None:
            tensors = {str(i): value.cpu().contiguous() for i, value in enumerate(self._kept_weights)}
            blob = save(tensors | {"step": torch.tensor(step)})
            atomic_write_bytes(self._kept_file, blob)

    @torch.no_grad()
    def measure(self, step: int, *, model: nn.Module | None = None, write: bool = True) -> Row:
        """Measure now and keep the row; rows of this step and later ones (of a run since resumed) are dropped.

        Args:
            step: optimiser steps done.
            model: what to run where the trained model was wrapped since.
            write: False on all but one of several processes.
        """
        model = self.model if model is None else model
        with evaluating(model):
            now, patched = self._contrast(model), self._contrast(model, self._base_prefix)
            output = self._prefix_pass(model, self._reference.keys.device)
            layers = prefix_drift(output, self._reference).tolist()
        part = recovery(patched, now, self._base)
        row: Row = {"step": step, "n": len(self._towards), **_named("spread", spread(now, self._base))}
        row |= _named("recovery", part) | {"recovery_reason": part.reason}
        row |= {"drift": sum(layers) / len(layers), "drift_layers": layers, "probes": self._probes}
        self.rows = [*(kept for kept in self.rows if kept["step"] < step), row]
        if write and self.out is not None:
            self._write(row)
        return dict(row)

    def _contrast(self, model: nn.Module, prefix: LayerTensors | None = None) -> list[float]:
        """log p(towards) − log p(against) of every prompt, nats per token."""
        towards, against = (self._log_probs(model, probes, prefix) for probes in (self._towards, self._against))
        return [one - other for one, other in zip(towards, against, strict=True)]

    def _log_probs(
        self, model: nn.Module, probes: Sequence[RenderedPrompt], prefix: LayerTensors | None
    ) -> list[float]:
        found = [math.nan] * len(probes)
        order = sorted(range(len(probes)), key=lambda number: len(probes[number].ids))
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            batch = make_batch([probes[number] for number in chosen], device=next(model.parameters()).device)
            if batch.prefix_length != len(self._prefix_ids):
                raise LensError("the whole prompt of a probe is prefix, so the prefix cannot be patched; add a query")
            output = gated_step(model, batch, self.off, prefix)
            scores: Tensor = token_log_probs(output.logits[None], output.targets[None])[0]
            for row, number in enumerate(chosen):
                found[number] = float(scores[output.rows == row].mean())
        return found

    def _written(self) -> list[Row]:
        if self.out is None or not self.out.exists():
            return []
        rows = read_jsonl(self.out)
        if any(row.get("probes") != self._probes for row in rows):
            raise LensError(f"{self.out} was written with other probes; choose another file")
        return [_with_nan(row) for row in rows]

    def _write(self, row: Row) -> None:
        assert self.out is not None
        if self.out.exists() and any(kept["step"] >= row["step"] for kept in read_jsonl(self.out)):
            atomic_write_text(self.out, "")
            append_jsonl(self.out, self.rows)
        else:
            append_jsonl(self.out, [row])

    def callback(self, trainer: Any) -> Any:
        """A `transformers.TrainerCallback` that measures, and logs through the trainer to whatever it reports to.

        With several processes every one of them measures (sharded weights need all), and process 0 writes.
        The base is that of before the trainer's first run, also in later ones.
        Logged names: monitor/spread, monitor/recovery (once it is defined), monitor/drift.
        """
        from transformers import Trainer, TrainerCallback

        monitor = self
        monitor.check_trained(getattr(trainer, "gated_adapter", None) or trainer.model)
        # A model whose own weights this trainer has trained already cannot be measured as the base.
        monitor._begun |= trainer.state.global_step > 0 and not has_adapter(trainer.model)

        class MonitorCallback(TrainerCallback):  # type: ignore[misc]
            """Calls the monitor at the end of every n-th optimiser step."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                model = without_replicas(trainer.model_wrapped)
                monitor._begin(model, state.global_step, write=state.is_world_process_zero)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if monitor._is_due(state.global_step, state.max_steps):
                    model = without_replicas(trainer.model_wrapped)
                    writes = state.is_world_process_zero
                    row = monitor.measure(state.global_step, model=model, write=writes)
                    control.should_training_stop |= monitor._judge(row, model, write=writes) is not None
                    names = [name for name in ("spread", "recovery", "drift") if math.isfinite(row[name])]
                    due = control.should_log  # a log of ours would count as the Trainer's own
                    # Not `trainer.log`: trl's adds what it has gathered since the last log, and forgets it.
                    Trainer.log(trainer, {f"monitor/{name}": row[name] for name in names})
                    control.should_log = trainer.control.should_log = due
                control.should_save &= monitor.stopped is None

            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_save &= monitor.stopped is None  # a run resumed from there would train on

        return MonitorCallback()

    def to_frame(self) -> "pd.DataFrame":
        """One row per measurement, with a column drift_layer_<i> for each layer."""
        return _frame(self.rows)

    def figure(self) -> "go.Figure":
        """Spread and prefix recovery with their intervals, and the drift of every layer, over the steps."""
        from piggyback_lens.figures.monitor_plot import monitor_figure

        figure: go.Figure = monitor_figure(self.to_frame())
        return figure


def _watched(model: Any) -> tuple[nn.Module, Interventions]:
    """The model that is run, and where its adapter is off."""
    if isinstance(model, PreventiveSteering):
        model = model.trainable  # measured without the steering, as it will be used
    if isinstance(model, GatedAdapter):
        return model.model, model.off
    if isinstance(model, PeftAdapter):
        model = model.model
    if isinstance(model, Trainable):
        raise LensError(f"a Monitor measures a model whose weights are trained, and this is a {type(model).__name__}")
    return model, Interventions()


def load_monitor(path: str | Path) -> "pd.DataFrame":
    """What a `Monitor` wrote to its file, as its `to_frame` gives it; `figures.monitor_plot.monitor_figure` draws it.

    Raises:
        LensError: no such file, or nothing in it.
    """
    path = Path(path)
    rows = [_with_nan(row) for row in read_jsonl(path)] if path.exists() else []
    if not rows:
        raise LensError(f"{path} holds no measurements of a monitor: pass out= to Monitor, and train a few steps")
    return _frame(rows)


def _with_nan(row: Row) -> Row:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _frame(rows: Sequence[Row]) -> "pd.DataFrame":
    import pandas as pd

    flat = []
    for row in rows:
        layers = {f"drift_layer_{i}": value for i, value in enumerate(row["drift_layers"])}
        flat.append({name: value for name, value in row.items() if name not in ("drift_layers", "probes")} | layers)
    return pd.DataFrame(flat)


def _named(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _fingerprint(probes: Sequence[RenderedPrompt]) -> str:
    data = hashlib.sha256()
    for probe in probes:
        data.update(f"{probe.n_prompt} {probe.ids}\n".encode())
    return data.hexdigest()[:16]
