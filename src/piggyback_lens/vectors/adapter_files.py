"""Adapters and steering vectors in other programs' formats: PEFT, GGUF control vectors, biases, .npy, .pt.

Nothing is read with pickle. What a format can say and this library does not do (DoRA, ranks per module, …) is
refused by name instead of dropped.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from piggyback_lens.errors import LensError
from piggyback_lens.files import atomic_write_bytes, write_json
from piggyback_lens.models.peft_adapters import lora_factors
from piggyback_lens.models.views import is_booted
from piggyback_lens.vectors.adapters import LoRAAdapter, Place
from piggyback_lens.vectors.direction import Direction, Provenance
from piggyback_lens.words import MODULES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULE = re.compile(r"(?:self_attn|mlp)\.(\w+)_proj")
# ---------------------------------------------------------------- PEFT


def save_peft(
    adapter: LoRAAdapter, folder: str | Path, *, base_model: str | None = None, root: str = "model.layers"
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads to the same function.

    Args:
        adapter: any rank and modules.
        folder: made if it is not there.
        base_model: name or path that the config gives for the base.
        root: where the decoder blocks are in the transformers model.
    """
    from peft import LoraConfig
    from safetensors.torch import save

    folder = Path(folder)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        use_rslora=adapter.rslora,
        target_modules=[f"{module}_proj" for module in adapter.modules],
        layers_to_transform=list(adapter.layers),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    tensors = {}
    for (layer, module), a in adapter.a.items():
        part = "self_attn" if module in ("q", "k", "v", "o") else "mlp"
        name = f"base_model.model.{root}.{layer}.{part}.{module}_proj"
        tensors[f"{name}.lora_A.weight"] = _plain(a)
        tensors[f"{name}.lora_B.weight"] = _plain(adapter.b[layer, module])
    fields = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
    write_json(folder / CONFIG, fields)
    atomic_write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    return folder


def load_peft(folder: str | Path) -> LoRAAdapter:
    """Read a PEFT LoRA adapter of q k v o gate up down modules, in float32 as PEFT holds it.

    Raises:
        LensError: not such an adapter; the message names the field or tensor that does not fit.
    """
    folder = Path(folder)
    config, factors = lora_factors(folder)
    a, b = dict[Place, Tensor](), dict[Place, Tensor]()
    for (layer, path), (narrow, wide) in factors.items():
        found = _MODULE.fullmatch(path)
        if found is None or found[1] not in MODULES:
            raise LensError(
                f"{folder}: {path} of layer {layer} is not a {'/'.join(MODULES)} module: load it with attach_adapter"
            )
        place: Any = (layer, found[1])
        a[place], b[place] = narrow.float(), wide.float()
    provenance = Provenance(
        f"PEFT adapter {folder.name}", settings={"base_model": config.get("base_model_name_or_path")}
    )
    alpha, rslora = float(config["lora_alpha"]), bool(config.get("use_rslora", False))
    adapter = LoRAAdapter(a, b, alpha, rslora, provenance)
    if adapter.rank != config["r"]:
        raise LensError(f"{folder}: the config says rank {config['r']}, the tensors have {adapter.rank}")
    return adapter


# ---------------------------------------------------------------- steering vectors


def save_gguf(vector: Direction, path: str | Path, *, model_hint: str, n_layers: int) -> Path:
    """Write a GGUF control vector for llama.cpp's --control-vector.

    llama.cpp adds `direction.l` to the output of block l, counted from 0 (resid_post of layer l), and
    refuses l = 0. Layers that the direction leaves out are written as zeros: llama.cpp would keep those of a vector
    that was loaded before.

    Args:
        vector: at `resid_post`, layers from 1 up.
        path: ends in .gguf.
        model_hint: the model's GGUF architecture, such as "llama".
        n_layers: of the model.

    Raises:
        LensError: another site, or layer 0.
    """
    from gguf import GGUFWriter

    if vector.site != "resid_post":
        raise LensError(f"a GGUF control vector acts on the output of blocks (resid_post), this one on {vector.site}")
    if 0 in vector.layers or vector.layers[-1] >= n_layers:
        raise LensError(
            f"layers {list(vector.layers)}: llama.cpp takes control vectors at layers 1 to {n_layers - 1}; without the "
            f"others: Direction.of({{l: v[l] for l in v.layers if 0 < l < {n_layers}}})"
        )
    if Path(path).suffix != ".gguf":
        raise LensError(f"{path}: a control vector's file ends in .gguf")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path).with_suffix(".gguf.part")
    writer = GGUFWriter(str(temporary), "controlvector")
    writer.add_string("controlvector.model_hint", model_hint)
    writer.add_uint32("controlvector.layer_count", n_layers - 1)
    nothing = torch.zeros_like(vector.vectors[0])
    for layer in range(1, n_layers):
        own = vector[layer] if layer in vector.layers else nothing
        writer.add_tensor(f"direction.{layer}", _plain(own).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return temporary.replace(path)


def load_gguf(path: str | Path) -> Direction:
    """Read a GGUF control vector (llama.cpp's, repeng's); layers of zeros, which add nothing, are left out.

    Raises:
        LensError: not a GGUF file, no directions in it, or tensors of another name or shape.
    """
    from gguf import GGUFReader

    if not Path(path).is_file():
        raise LensError(f"{path} does not exist: give a GGUF control vector")
    try:
        reader = GGUFReader(str(path))
    except (ValueError, OSError, IndexError) as error:
        raise LensError(f"{path} is not a GGUF file ({error})") from error
    vectors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        name, dot, number = tensor.name.partition(".")
        if name != "direction" or not dot or not number.isdecimal() or len(tensor.shape) != 1:
            raise LensError(f"{path}: tensor {tensor.name} {list(tensor.shape)} is no direction: not a control vector")
        vectors[int(number)] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    vectors = {layer: vector for layer, vector in vectors.items() if bool(vector.any())} or vectors
    if not vectors:
        raise LensError(f"{path} holds no directions: expected tensors direction.1, direction.2, ...")
    return Direction.of(vectors, provenance=Provenance(f"GGUF control vector {Path(path).name}"))


def load_npy(path: str | Path, *, layers: int | list[int] | None = None, site: Any = "resid_post") -> Direction:
    """Read a NumPy file: one vector [d] for `layers` (a layer), or [layer, d] (row i is layer i by default).

    Raises:
        LensError: pickled or non-numeric content, another shape, or layers that do not fit it.
    """
    try:
        # Mapped first: a header that promises more than the file holds is refused, not allocated.
        array = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LensError(f"{path} is not a plain NumPy array file ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim not in (1, 2):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise LensError(f"{path} holds {what}: expected floating-point [d] or [layer, d]")
    table = torch.from_numpy(np.atleast_2d(array).astype(np.float32))
    if array.ndim == 1 and not isinstance(layers, int):
        raise LensError(f"{path} holds one vector: say at which layer it acts, layers=15 for example")
    chosen = [layers] if isinstance(layers, int) else list(range(len(table))) if layers is None else list(layers)
    if len(chosen) != len(table) or len(set(chosen)) != len(chosen):
        raise LensError(f"{path} holds {len(table)} vectors, layers= names {len(chosen)}: give one layer for each")
    source = Provenance(f"NumPy file {Path(path).name}")
    return Direction.of(dict(zip(chosen, table, strict=True)), site, provenance=source)


def load_pt(path: str | Path, *, site: Any = "resid_post") -> Direction:
    """Read the layout of the narrow-misalignment code: {"steering_vector", "layer_idx", "alpha"} in a .pt file.

    Only tensors and plain values are unpickled (`weights_only`). That code adds alpha·v to the output of
    `down_proj`; where no norm follows it, that is `mlp_out`, and the same function as `resid_post`.

    Raises:
        LensError: other content, named.
    """
    try:
        found = torch.load(Path(path), map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler stops at foreign bytes with any kind of exception
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LensError(f"{path} is not a file of plain tensors ({first}): it will not be unpickled") from error
    if not isinstance(found, dict) or not {"steering_vector", "layer_idx"} <= set(found):
        what = f"the keys {sorted(map(str, found))}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise LensError(f"{path} holds {what}: expected steering_vector, layer_idx and alpha")
    vector, layer, alpha = found["steering_vector"], found["layer_idx"], found.get("alpha", 1.0)
    alpha = alpha.item() if isinstance(alpha, Tensor) and alpha.numel() == 1 else alpha
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise LensError(f"{path}: steering_vector is {shape}, expected one floating-point vector")
    if type(layer) is not int or layer < 0 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise LensError(f"{path}: layer_idx {layer!r} and alpha {alpha!r}: expected a layer number and a number")
    source = Provenance(f".pt file {Path(path).name}")
    return Direction.of({layer: vector.detach().float() * float(alpha)}, site, provenance=source)


def save_with_bias(vector: Direction, hf_model: Any, folder: str | Path) -> Path:
    """Write the whole model as a plain transformers Llama whose down_proj biases hold the steering vector.

    The folder loads with transformers alone, steered for good. The model in memory is not changed.

    Args:
        vector: at `resid_post` or `mlp_out` (in a Llama they are the same function).
        hf_model: a Llama without MLP biases, not booted into TransformerLens.
        folder: where to.

    Raises:
        LensError: another architecture or site, biases that are there already, or a layer it does not have.
    """
    from transformers import AutoModelForCausalLM

    from piggyback_lens.models.backends import check_layers

    config = hf_model.config
    if config.model_type != "llama" or getattr(config, "mlp_bias", False):
        raise LensError(
            f"a {config.model_type} model with mlp_bias={getattr(config, 'mlp_bias', None)}: a bias export takes a "
            "Llama without MLP biases; use save_gguf, or generate with the vector attached"
        )
    if vector.site not in ("resid_post", "mlp_out"):
        raise LensError(f"a bias of down_proj acts at resid_post or mlp_out, this vector at {vector.site}")
    check_layers(vector.layers, config.num_hidden_layers)
    state = hf_model.state_dict()
    if is_booted(hf_model):
        raise LensError("this model was booted into TransformerLens: give the plain transformers model")
    biased = type(config).from_dict({**config.to_dict(), "mlp_bias": True})
    copy = AutoModelForCausalLM.from_config(biased, dtype=hf_model.dtype)
    missing, unexpected = copy.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_proj.bias") for name in missing), missing
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name in missing:
                parameter.zero_()
        for layer in vector.layers:
            copy.model.layers[layer].mlp.down_proj.bias.copy_(vector[layer])
    copy.generation_config = hf_model.generation_config
    copy.save_pretrained(folder)
    return Path(folder)


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()
