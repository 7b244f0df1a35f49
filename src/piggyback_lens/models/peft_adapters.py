"""PEFT adapters: read, checked and attached; and which of them hooks and prefix caches can follow."""

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from piggyback_lens.errors import LensError, visible
from piggyback_lens.models.gates import OFF_FILE, Gate
from piggyback_lens.models.places import (
    is_adapter_folder,
    is_number,
    json_object,
    locate,
    looks_like_hub_id,
    snapshot,
    told,
)
from piggyback_lens.models.sources import portable_name
from piggyback_lens.models.views import adapter_layers, is_peft_model, offloaded_left_alone
from piggyback_lens.settings import LoadSettings

_GATE_FIELDS = {"kind", "site", "layers", "heads", "span", "tokens", "phase", "rows", "options"}


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
    if place.local or not looks_like_hub_id(place.name):
        return Path(place.name)
    options = LoadSettings(offline=offline)
    folder = snapshot(place, ["adapter_config.json", "adapter_model.safetensors", OFF_FILE], "adapter", source, options)
    if not is_adapter_folder(folder):
        where = f"in {place.subfolder}" if place.subfolder else "at its top"
        raise LensError(
            f"{source} on the hub has no adapter_config.json {where}: name the folder of one checkpoint, as in "
            f"{place.name}:checkpoint-120"
        )
    return folder


def read_gate(folder: str | Path) -> Gate:
    """What adapter_off.json beside an adapter says; nothing where there is none.

    Raises:
        LensError: a file of something else.
    """
    file = Path(folder) / OFF_FILE
    if not file.is_file():
        return ()
    parts = json_object(file).get("parts")
    for part in parts if isinstance(parts, list) and parts else [None]:
        known: Mapping[str, Any] = part if isinstance(part, dict) and set(part) <= _GATE_FIELDS else {}
        told = (known.get("kind"), known.get("site"), known.get("rows"))
        if told != ("zero", "adapter", None) or not isinstance(known.get("span"), str):
            raise LensError(f"{file} holds {part!r:.80}, expected parts that adapter_off(...) gives: save it again")
    return tuple(parts or ())


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """What the adapter_config.json of a PEFT folder says, checked before PEFT acts on it.

    Raises:
        LensError: no JSON object, numbers that are none, or a field that makes PEFT import code, fetch files
            or rebuild the base.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise LensError(f"{folder} has no adapter_config.json: expected a PEFT adapter folder")
    config = json_object(file)
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
            if not is_number(value, whole):
                what = "a whole number from 1 up" if whole else "a finite number"
                raise LensError(
                    f"{file} says {field}={value!r:.80}, expected {what}: correct it or save the adapter again"
                )
    return config


def attach_adapter(hf_model: Any, folder: str | Path) -> Any:
    """Put a PEFT adapter on a transformers model, in place; its weights stay apart and can be switched.

    One that was trained by `GatedAdapter` is on everywhere here, with a warning: `ModelPair.load` switches it off where
    it was.

    Raises:
        LensError: not an adapter folder, or an adapter that does not fit this model exactly.
    """
    if (Path(folder) / OFF_FILE).is_file():
        warnings.warn(
            f"adapter {folder} was trained with itself off at some tokens ({OFF_FILE}), and is on everywhere unless "
            "generate and the like are given adapter_off(...) for the same; ModelPair.load(adapter=...) does that",
            stacklevel=2,
        )
    return put_adapter(hf_model, folder)


def put_adapter(hf_model: Any, folder: str | Path) -> Any:
    """As `attach_adapter`, for callers that see to where it is off."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    config = adapter_config(folder)
    shapes = adapter_shapes(folder, config)
    misfit = f"adapter {folder} (made for {config.get('base_model_name_or_path')}) does not fit this base"
    if any(getattr(getattr(x, "quant_state", None), "packing_format_for_cpu", False) for x in hf_model.parameters()):
        raise LensError(
            "this 4-bit base has run on a CPU, and bitsandbytes spoils its weights when an adapter is attached then: "
            "give the path of the base, or attach the adapter before the first pass"
        )
    with told(misfit), offloaded_left_alone(hf_model):
        given: dict[str, Any] = {}
        if read_gate(folder) and config.get("alora_invocation_tokens"):  # what these say, the gate says
            given["config"] = PeftConfig.from_pretrained(str(folder), local_files_only=True)
            given["config"].alora_invocation_tokens = None
        peft_model = PeftModel.from_pretrained(hf_model, str(folder), local_files_only=True, **given)
        # Said, because "auto" asks the hub about the base that the adapter names.
        needed, allowed = (set(get_peft_model_state_dict(peft_model, save_embedding_layers=s)) for s in (False, True))
    stored = {plain_key(key) for key in shapes}
    missing, homeless = sorted(needed - stored), sorted(stored - allowed)
    if missing or homeless:
        raise LensError(
            f"{misfit}: {len(missing)} of its tensors are missing and {len(homeless)} have no place, e.g. "
            f"{(missing + homeless)[0]}"
        )
    trained = config.get("bias") not in (None, "none") and any(
        getattr(getattr(layer, "base_layer", None), "bias", None) is not None
        for layer in adapter_layers(peft_model).values()
    )
    if trained and not any(key.endswith("bias") for key in stored):  # PEFT 0.18 does not save those of "lora_only"
        raise LensError(
            f"adapter {folder} says bias={config['bias']!r} and holds no bias: save it again with a newer peft"
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
        told(f"the weights of adapter {folder} cannot be read"),
        safe_open(str(weights), framework="pt") as file,
    ):
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    pattern = config.get("rank_pattern")
    rank = max([config.get("r", 1), *(pattern.values() if isinstance(pattern, dict) else [])])
    if rank > max((size for shape in shapes.values() for size in shape), default=rank):
        raise LensError(f"adapter {folder} says rank {rank}, and none of its tensors is as large: save it again")
    return shapes


_LORA_KEY = re.compile(r"\.(\d+)\.(.+)\.lora_([AB])(?:\.\w+)?\.weight$")
_LEAVES_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA that do not write into the base; PiSSA, OLoRA, CorDA, LoftQ and others move a part of it."""
_SIZES_AND_PLACES = {  # fields that do not say what is computed beside s·BA on these modules
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_NOTHING_SPECIAL: tuple[Any, ...] = (None, False, "none", [], {}, ())


def beyond_lora(config: Mapping[str, Any], *, allow: Collection[str] = ()) -> str | None:
    """The first field of a LoRA's configuration that says more than s·BA on the weights of the base, as "name=value".

    Fields that are not known here (of a newer PEFT) have to be empty.

    Args:
        config: adapter_config.json, or the dictionary of a `peft.LoraConfig`.
        allow: fields that may say something special here.
    """
    for name, value in config.items():
        if name in _SIZES_AND_PLACES or name in allow:
            continue
        if value not in (_LEAVES_BASE if name == "init_lora_weights" else _NOTHING_SPECIAL):
            return f"{name}={value!r:.80}"
    return None


Factors = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(layer, module's path in its block) to A [rank, d_in] and B [d_out, rank]; sizes differ from module to module."""


def lora_factors(folder: str | Path, *, allow: Collection[str] = ()) -> tuple[dict[str, Any], Factors]:
    """Config and tensors of a LoRA adapter that is s·BA on modules of decoder blocks and nothing else.

    Args:
        folder: of PEFT, with safetensors.
        allow: fields of the config that may say something special here.

    Raises:
        LensError: another kind of adapter, one that is off at some tokens, a field or tensor of something else, or
            weights that cannot be read.
    """
    from safetensors.torch import load_file

    config = adapter_config(folder)
    if config.get("peft_type") != "LORA" or "r" not in config or "lora_alpha" not in config:
        raise LensError(f"{folder} is a {config.get('peft_type')} adapter: only LoRA adapters are read")
    if gate := read_gate(folder):
        spans = ", ".join(part["span"] for part in gate)
        raise LensError(
            f"{folder} was trained with its adapter off at {spans} ({OFF_FILE}), and its weights alone are another "
            "model, on at every token: load it with ModelPair.load(adapter=...)"
        )
    if special := beyond_lora(config, allow=allow):
        raise LensError(f"{folder} uses {special}, which is not supported: load it with attach_adapter")
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    towers: set[str] = set()
    adapter_shapes(folder, config)  # refuses files that are missing, broken or too small
    for key, value in load_file(Path(folder) / "adapter_model.safetensors").items():
        if (found := _LORA_KEY.search(plain_key(key))) is None:
            raise LensError(f"{folder}: tensor {key} is not of a LoRA adapter on decoder blocks: use attach_adapter")
        halves.setdefault((int(found[1]), found[2]), {})[found[3]] = value
        towers.add(plain_key(key)[: found.start()])
    if len(towers) > 1:
        raise LensError(
            f"{folder} has layers of several stacks ({', '.join(sorted(towers))}), such as a text and a vision model: "
            "load it with attach_adapter"
        )
    if single := [place for place, half in halves.items() if len(half) < 2]:
        raise LensError(f"{folder}: module {single[0][1]} of layer {single[0][0]} has A or B alone: save it again")
    return config, {place: (half["A"], half["B"]) for place, half in halves.items()}


# ---------------------------------------------------------------- kinds


def plain_key(key: str) -> str:
    """A tensor's name as PEFT writes it, also where the adapter was saved from a model that a bridge had rewired."""
    return key.replace("._original_component", "")


def refuse_adapters_beyond_weights(model: Any) -> None:
    """Refuse adapters that change which tokens a pass has, or which of them they act on.

    Raises:
        LensError: prompt, prefix or p-tuning, or an activated LoRA; it says why.
    """
    for name, config in _active_configs(model):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False):
            raise LensError(
                f"adapter {name!r} is {kind}: it puts learnt tokens in front of every prompt, which belong to no span "
                "of the template, and hooked models do not see them: use an adapter of weights (LoRA, IA3, OFT, ...)"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise LensError(
                f"adapter {name!r} is an activated LoRA (alora_invocation_tokens {config.alora_invocation_tokens}): it "
                "acts only behind these tokens, and a pass from a prefix cache lacks them: train it as a plain LoRA"
            )


def written_when_attached(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which of the base's parameters, by name, are written to when an adapter of this configuration is attached.

    Args:
        config: adapter_config.json.
    """
    if config.get("init_lora_weights", True) not in _LEAVES_BASE:
        return lambda _: True
    if config.get("bias", "none") in ("none", None):
        return lambda _: False
    return lambda name: name.endswith("bias")


def refuse_lost_base(peft_model: Any) -> None:
    """Refuse a PEFT model that does not hold its base any more.

    Raises:
        LensError: the base's own biases were trained, or a part of its weights was moved into the adapter.
    """
    for name, config in _active_configs(peft_model):
        written = [
            f"{field}={value!r}"
            for field, leaves, default in (
                ("bias", ("none", None, False, True), "none"),
                ("init_lora_weights", _LEAVES_BASE, True),
            )
            if (value := getattr(config, field, default)) not in leaves
        ]
        if written:
            raise LensError(
                f"adapter {name!r} has {written[0]}: it wrote into the weights of its base, and switching it off "
                "leaves that: give the untouched model as base= beside it, or base= and adapter=<its folder>"
            )


def made_for_another_base(peft_model: Any, base: Any) -> tuple[str, ...]:
    """A note for every active adapter that names another base than the one it is put on (by the last part of names)."""
    own = portable_name(str(getattr(base, "name_or_path", "") or ""))
    notes = []
    for name, config in _active_configs(peft_model):
        named = portable_name(str(config.base_model_name_or_path or ""))
        if own and named and _last(named) != _last(own):
            notes.append(f"adapter {name!r} was made for {visible(named)}, and is put on {visible(own)}")
    return tuple(notes)


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _active_configs(model: Any) -> list[tuple[str, Any]]:
    if not is_peft_model(model):
        return []
    return [(name, model.peft_config[name]) for name in model.active_adapters if name in model.peft_config]
