"""Checkpoints of a training run: safetensors and JSON only, written beside and renamed into place.

A folder keeps one finished checkpoint, `checkpoint-000040`, named after the number of steps done. It is
complete whenever it exists: a run killed at any moment leaves the older one, the newer one, or both.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.references import model_fingerprint
from piggyback_lens.finetuning.steps import Objective
from piggyback_lens.finetuning.trainables import Trainable
from piggyback_lens.results.run import refuse_other

PREFIX = "checkpoint-"
STOPPED = "stopped"
"""The place in a run's plan where `on_step` said why training is over."""
Row = dict[str, int | float]  # one step of the history
Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Progress:
    """How far a run has come: one history row per step done, and how its passes are planned."""

    history: tuple[Row, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)


def run_identity(
    model: nn.Module,
    examples: Sequence[RenderedPrompt],
    settings: Mapping[str, object],
    *,
    objective: Objective,
    trainable: Trainable,
) -> dict[str, object]:
    """Everything that decides the result. A checkpoint that differs in any of it belongs to another run."""
    trained = {id(value) for value in trainable.parameters().values()}
    data = hashlib.sha256()
    for example in examples:
        data.update(f"{example.fingerprint} {example.n_prompt} {example.ids}\n".encode())
    identity = {
        "settings": dict(settings),
        "adapter": dict(trainable.settings()),
        "objective": _describe(objective),
        "examples": {"number": len(examples), "sha256": data.hexdigest()[:16]},
        "template": examples[0].fingerprint,
        "base": model_fingerprint(model, trained),
    }
    plain: dict[str, object] = json.loads(json.dumps(identity))  # tuples as a file gives them back
    return plain


def _describe(objective: Objective) -> dict[str, object]:
    settings = getattr(objective, "settings", None)
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    if settings is None and named is not objective:
        raise LensError(f"objective {objective!r} is no named function; give its class a settings() method")
    return {
        "name": f"{named.__module__}.{named.__qualname__}",
        **(settings() if settings is not None else {}),
    }


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: Parameters,
    optimiser: torch.optim.Optimizer,
    identity: Mapping[str, object],
) -> Path:
    """Write the state after the steps of `progress`, then delete the older checkpoint.

    A checkpoint of this many steps that is there already is the same one, and stays, unless training was stopped there
    with other weights than its last ones.
    """
    from safetensors.torch import save_file

    final = folder / f"{PREFIX}{len(progress.history):06d}"
    if final.exists() and STOPPED not in progress.plan:
        return final

    def write(target: Path) -> None:
        save_file({name: _plain(value) for name, value in parameters.items()}, target / "weights.safetensors")
        tensors, numbers = _flat_state(parameters, optimiser)
        save_file(tensors, target / "optimiser.safetensors")
        state = {"identity": identity, "history": progress.history, "optimiser": numbers, "plan": progress.plan}
        write_json(target / "state.json", state)

    older = [path for path in _finished(folder) if path != final]
    write_folder(final, write)
    for path in older:
        shutil.rmtree(path)
    return final


def load_checkpoint(
    folder: Path,
    parameters: Parameters,
    optimiser: torch.optim.Optimizer,
    identity: Mapping[str, object],
) -> Progress | None:
    """Put the newest checkpoint of `folder` into the parameters and the optimiser; None where there is none.

    Raises:
        LensError: the checkpoint was made with other settings, data, objective or base; says which differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = _finished(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        state = read_json(newest / "state.json")
        saved, history = dict(state["identity"]), [dict(row) for row in state["history"]]
        weights, moments = (load_file(newest / f"{name}.safetensors") for name in ("weights", "optimiser"))
        numbers, plan = dict(state.get("optimiser", {})), dict(state.get("plan", {}))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise LensError(
            f"{newest} is damaged ({error}): delete it to start again, or copy it from elsewhere"
        ) from error
    refuse_other(newest, saved, identity)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())[0]
        raise LensError(f"{newest} does not hold the parameters of this model, e.g. {odd}; train into another folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    try:
        _restore_state(moments | numbers, parameters, optimiser)
    except (KeyError, ValueError) as error:
        raise LensError(f"{newest} is damaged (its optimiser's state: {error}): delete it to start again") from error
    return Progress(tuple(history), plan)


def write_folder(final: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder beside `final`, then rename it into place, over what was there."""
    temporary, replaced = (final.with_name(f".{final.name}{end}") for end in (".new", ".old"))
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        if final.exists():
            final.replace(replaced)
        temporary.replace(final)
    finally:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
    return final


def _finished(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()


def _flat_state(
    parameters: Parameters, optimiser: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """{"parameter name|state name": value}, tensors and plain numbers; empty before the first step."""
    flat = {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }
    tensors = {name: _plain(value) for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _restore_state(
    flat: Mapping[str, Tensor | int | float], parameters: Parameters, optimiser: torch.optim.Optimizer
) -> None:
    for parameter in parameters.values():
        optimiser.state.pop(parameter, None)
    for full_name, value in flat.items():
        name, key = full_name.split("|")
        parameter = parameters[name]
        moves = isinstance(value, Tensor) and (key != "step" or _counts_on_device(optimiser))
        optimiser.state[parameter][key] = value.to(parameter.device) if moves else value  # type: ignore[union-attr]


def _counts_on_device(optimiser: torch.optim.Optimizer) -> bool:
    """Whether the step counter is where the parameter is; torch's AdamW has it on the CPU unless it is fused."""
    return any(group.get("fused") or group.get("capturable") for group in optimiser.param_groups)
