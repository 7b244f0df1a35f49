"""Solutions (directions and LoRA adapters) in the files of every program: one function reads them, one writes them."""

import re
from pathlib import Path

from piggyback_lens.errors import LensError
from piggyback_lens.models.places import is_adapter_folder
from piggyback_lens.vectors.adapter_files import load_gguf, load_npy, load_peft, load_pt, save_gguf, save_peft
from piggyback_lens.vectors.adapters import Adapter, LoRAAdapter
from piggyback_lens.vectors.direction import Direction

DIRECTION_FILE = "direction.safetensors"
ADAPTER_FOLDER = "adapter"
_EXPECTED = "expected a direction (.safetensors), a PEFT adapter folder, or a vector in a .gguf, .npy or .pt file"


def load_solution(source: str | Path) -> Adapter:
    """A direction or LoRA adapter from a file or folder.

    Args:
        source: a direction file, the folder of `train_direction`, a PEFT adapter folder, a GGUF control
            vector, or a vector in a .npy or .pt file; `PATH@15` takes its layer 15, or says at which layer a
            .npy vector acts.

    Raises:
        LensError: nothing there, or nothing of these; the message names the file.

    Example:
        >>> _ = save_solution(Direction.of({1: torch.ones(32)}), "direction.safetensors")
        >>> load_solution("direction.safetensors").layers
        (1,)
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


def save_solution(
    solution: Adapter,
    path: str | Path,
    *,
    base_model: str | None = None,
    model_hint: str | None = None,
    n_layers: int | None = None,
) -> Path:
    """Write a direction or an adapter; the name says in which format.

    Args:
        solution: a direction or an adapter.
        path: .safetensors for a direction of this library, .gguf for a control vector of llama.cpp, a folder for an
            adapter as PEFT reads it.
        base_model: hub id of the base, for the config of an adapter.
        model_hint: architecture of the base's GGUF file, such as "llama"; of a control vector.
        n_layers: layers of the base; of a control vector.

    Raises:
        LensError: a format that cannot hold the solution, or something that the format needs and that is not given.
    """
    path = Path(path)
    if isinstance(solution, LoRAAdapter):
        if path.suffix in (".safetensors", ".gguf", ".npy", ".pt"):
            raise LensError(f"{path} is a file, and an adapter is a PEFT folder: give a folder's name")
        return save_peft(solution, path, base_model=base_model)
    if path.suffix == ".gguf":
        if model_hint is None or n_layers is None:
            raise LensError(f'{path}: a control vector says its model: give model_hint="llama" (say) and n_layers=')
        return save_gguf(solution, path, model_hint=model_hint, n_layers=n_layers)
    if path.suffix != ".safetensors":
        raise LensError(f"{path}: the file of a direction ends in .safetensors or .gguf")
    return solution.save(path)
