"""What the jobs on directions read: solutions in any format, conversations, retain data, lists of numbers."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from piggyback_lens.errors import LensError
from piggyback_lens.models.places import is_adapter_folder
from piggyback_lens.tasks import TASKS, load_conversations, load_prompts, load_task
from piggyback_lens.vectors.adapter_files import load_gguf, load_npy, load_peft, load_pt
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.direction import Direction

DIRECTION_FILE = "direction.safetensors"
ADAPTER_FOLDER = "adapter"
_EXPECTED = "expected a direction (.safetensors), a PEFT adapter folder, or a vector in a .gguf, .npy or .pt file"


# ---------------------------------------------------------------- solutions


def read_solution(source: str | Path) -> Adapter:
    """A direction or LoRA adapter from a file or folder.

    Args:
        source: a direction file, the folder of `train_direction_job`, a PEFT adapter folder, a GGUF control
            vector, or a vector in a .npy or .pt file; `PATH@15` takes its layer 15, or says at which layer a
            .npy vector acts.

    Raises:
        LensError: nothing there, or nothing of these; the message names the file.
    """
    path, layer = _path_and_layer(str(source))
    if not path.exists():
        raise LensError(f"{path} does not exist: {_EXPECTED}")
    try:
        found = _read(path, layer)
        if layer is None or path.suffix == ".npy":
            return found
        if isinstance(found, LoRAAdapter):
            raise LensError(f"{path} is an adapter of layers {list(found.layers)}: leave out @{layer}")
        return found.at(layer)
    except LensError as error:
        raise error if str(path) in str(error) else LensError(f"{path}: {error}") from error


def _path_and_layer(source: str) -> tuple[Path, int | None]:
    found = re.fullmatch(r"(.+)@(\d+)", source)
    if found is None or Path(source).exists():
        return Path(source), None
    return Path(found[1]), int(found[2])


def _read(path: Path, layer: int | None) -> Adapter:
    if path.is_dir():
        if (path / DIRECTION_FILE).is_file():
            return Direction.load(path / DIRECTION_FILE)
        folder = path / ADAPTER_FOLDER if is_adapter_folder(path / ADAPTER_FOLDER) else path
        if not is_adapter_folder(folder):
            raise LensError(f"{path} holds neither {DIRECTION_FILE} nor adapter_config.json: {_EXPECTED}")
        return load_peft(folder)
    if path.suffix == ".safetensors":
        return Direction.load(path)
    if path.suffix == ".gguf":
        return load_gguf(path)
    if path.suffix == ".npy":
        try:
            return load_npy(path, layers=layer)
        except LensError as error:
            raise error if layer is not None else LensError(f"{error} (on the command line PATH@15)") from error
    if path.suffix == ".pt":
        return load_pt(path)
    raise LensError(f"{path} is no format of a solution: {_EXPECTED}")


def as_direction(solution: Adapter) -> Direction:
    """What a solution adds, as a direction: a vector itself, the B vectors of a rank-1 adapter on down or o.

    Raises:
        LensError: an adapter of another rank or module.
    """
    if isinstance(solution, Direction):
        return solution
    return solution.direction("down" if "down" in solution.modules else "o")


def moved_to(direction: Direction, layer: int) -> Direction:
    """A direction of one layer at another one; of several layers, that at `layer`.

    Raises:
        LensError: a direction of several layers that has none there.
    """
    return replace(direction, layers=(layer,)) if len(direction.layers) == 1 else direction.at(layer)


def named_solutions(words: Sequence[str]) -> dict[str, Adapter]:
    """Solutions from NAME=PATH words.

    Raises:
        LensError: a word without a name, a name that figures cannot tell apart, or what `read_solution` raises.
    """
    found: dict[str, Adapter] = {}
    for word in words:
        name, equals, path = (part.strip() for part in word.partition("="))
        if not (name and equals and path):
            raise LensError(f"solution {word!r}: expected NAME=PATH, for example narrow=out/narrow")
        if "," in name or "control" in name or name in found:
            raise LensError(f"solution name {name!r}: expected different names without commas and without 'control'")
        found[name] = read_solution(path)
    return found


# ---------------------------------------------------------------- texts


def read_data(source: str, *, split: str = "train", offline: bool = False) -> list[list[dict[str, str]]]:
    """Conversations of a task by name, of a JSONL file, or of a hub dataset, as lists of messages.

    Args:
        source: a name of `tasks.TASKS`, else a file or "owner/name" as of `load_conversations`.
        split: train or validation; only tasks and hub datasets have several.
        offline: make no connection.

    Raises:
        LensError: what `load_conversations` raises, or an unknown split of a task.
    """
    if source not in TASKS:
        return [_messages(example) for example in load_conversations(source, split=split, offline=offline)]
    task = load_task(source)
    splits = {"train": task.train, "validation": task.validation}
    if split not in splits:
        raise LensError(f"task {source} has no split {split!r}: choose one of {', '.join(splits)}")
    return [_messages(example) for example in splits[split]]


def read_retain(path: str | Path) -> list[str | list[dict[str, str]]]:
    """Retain data: conversations with their answers, or prompts to which the base's answers belong.

    Args:
        path: JSONL of {"messages": [..., an assistant turn]}, or prompts as of `load_prompts`.

    Raises:
        LensError: what the two loaders raise.
    """
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file() and _holds_answers(path):
        return [_messages(example) for example in load_conversations(path)]
    return list(load_prompts(path))


def _holds_answers(path: Path) -> bool:
    """Whether the first line is a conversation with an answer; what is broken there is told by the loader."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            messages = json.loads(next((line for line in file if line.strip()), "{}"))["messages"]
            return any(message["role"] == "assistant" for message in messages)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _messages(example: Any) -> list[dict[str, str]]:
    return [dict(message) for message in example["messages"]]


# ---------------------------------------------------------------- numbers


def layer_numbers(text: str) -> tuple[int, ...]:
    """Layers from text: "15", "3,5,7", "10-20" (both ends), or a mixture.

    Raises:
        LensError: anything else.
    """
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise LensError(f"layers {text!r}: expected numbers and ranges such as 15 or 3,5,10-20")
        found.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(found))


def numbers(text: str, what: str) -> tuple[float, ...]:
    """Numbers from text: "0,1,2,4".

    Raises:
        LensError: anything else, or a number that is not finite.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise LensError(f"{what} {text!r}: expected numbers joined by commas, such as 0,1,2.5")
    return found
