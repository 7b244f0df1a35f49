"""What can be trained: the LoRA adapter of a PEFT model, or whatever is a `Trainable`."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from piggyback_lens.conversations.chat import RenderedPrompt
from piggyback_lens.errors import LensError
from piggyback_lens.files import read_json, write_json
from piggyback_lens.finetuning.batches import TrainBatch
from piggyback_lens.finetuning.references import base_forward
from piggyback_lens.finetuning.steps import StepOutput, forward_step
from piggyback_lens.models.backends import blocks_of, is_hooked_model
from piggyback_lens.models.gates import OFF_FILE, gate_of
from piggyback_lens.models.plain_views import plain_view
from piggyback_lens.models.sources import portable_name
from piggyback_lens.models.views import is_booted, is_peft_model, structural_copy
from piggyback_lens.settings import LoRASettings


class Trainable(ABC):
    """What `train` trains, and all that it uses: a PEFT adapter is one, a steering vector (`HookTrainable`) another.

    A subclass has a `model`, and the methods without a default.

    Attributes:
        model: what the passes go through: a transformers or PEFT model, or a HookedTransformer.
        steered: whether `forward` adds something that the finished model does not have; then `plain_forward` is
            the pass without it.
        recomputes: whether a block may be run again when the gradient arrives, as activation checkpointing does: not
            where hooks act that are gone by then.
    """

    model: Any
    steered: bool = False
    recomputes: bool = False

    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The tensors to descend on, by a stable name."""

    @abstractmethod
    def forward(self, batch: TrainBatch) -> StepOutput:
        """One forward pass with gradient to `parameters()`."""

    @abstractmethod
    def settings(self) -> Mapping[str, object]:
        """What was chosen about it, JSON-able; a checkpoint with other values is refused."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the finished result into an existing empty folder."""

    def begin(self, examples: Sequence[RenderedPrompt]) -> None:  # noqa: B027
        """Called before the first step, and where a run goes on, with all that it is trained on."""

    def plain_forward(self, batch: TrainBatch) -> StepOutput:
        """A pass of the model as it will be used, with gradient."""
        return self.forward(batch)

    def base_forward(self, batch: TrainBatch) -> StepOutput:
        """The base's pass, without gradient: the model without its adapter.

        Raises:
            LensError: the model's own weights are trained, so that it cannot give it.
        """
        return base_forward(self.model, batch)

    def logged(self) -> Mapping[str, float]:
        """Further columns of the training history, such as a norm."""
        return {}


class PeftAdapter(Trainable):
    """The trainable parameters of a PEFT model."""

    recomputes = True

    def __init__(self, model: nn.Module) -> None:
        """Take a PEFT model, or the hooked view of one (what a pair holds), whose weights it then trains.

        Raises:
            LensError: no adapter, one that is off at some tokens, a HookedTransformer, or a model that was booted into
                TransformerLens.
        """
        if gate := gate_of(model):
            spans = ", ".join(part["span"] for part in gate)
            raise LensError(
                f"this finetune's adapter is off at {spans}, and a PeftAdapter trains it on everywhere: give "
                f"GatedAdapter(model, adapter_off(...)) for {spans}"
            )
        if is_hooked_model(model):
            plain = plain_view(model)
            if plain is None:
                raise LensError(
                    f"{type(model).__name__} has weights of its own: train the PEFT model that it was made of, or a "
                    "HookTrainable"
                )
            model = structural_copy(plain)  # dropout is on in what is trained, and passes of the view have none
        if not is_peft_model(model):
            raise LensError(
                f"{type(model).__name__} has no adapter to train; call add_lora(model, LoRASettings(...)) first; a "
                "vector is trained by train(HookTrainable(model, direction), ...)"
            )
        if is_booted(model):
            raise LensError(
                "this model was booted into TransformerLens; train the plain Hugging Face model, boot it later"
            )
        self.model = model

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that require gradient, by their name in the model."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def forward(self, batch: TrainBatch) -> StepOutput:
        """`forward_step` of the model."""
        return forward_step(self.model, batch)

    def settings(self) -> dict[str, object]:
        """Rank, alpha, modules, layers, rsLoRA and dropout as PEFT holds them, and the seed of `add_lora`."""
        from peft import LoraConfig

        config = cast(Any, self.model).active_peft_config
        if not isinstance(config, LoraConfig):
            raise LensError(f"the active adapter is {type(config).__name__}; only LoRA adapters can be trained")
        layers, modules = config.layers_to_transform, config.target_modules
        return {
            "rank": config.r,
            "alpha": config.lora_alpha,
            "modules": modules if isinstance(modules, str) else sorted(modules or ()),
            "layers": None if layers is None else list(layers),
            "rslora": config.use_rslora,
            "dropout": config.lora_dropout,
            "init_seed": getattr(self.model, "init_seed", None),
        }

    def save(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors."""
        # save_embedding_layers would otherwise ask the hub for the base model's vocabulary.
        cast(Any, self.model).save_pretrained(str(folder), save_embedding_layers=False)
        (folder / OFF_FILE).unlink(missing_ok=True)  # of an adapter that was saved here before
        config = read_json(folder / "adapter_config.json")
        named = str(config.get("base_model_name_or_path") or "")
        if portable_name(named) != named:
            write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": portable_name(named)})


def add_lora(model: nn.Module, settings: LoRASettings | None = None, seed: int = 0) -> nn.Module:
    """Put a fresh LoRA adapter on a plain Hugging Face causal LM and freeze everything else.

    B starts at zero, so the outputs are those of the base. The initialisation of A depends on `seed` alone,
    and the global random state is left as it was. The model's linear modules are wrapped in place; its
    weights are shared, not copied.

    Returns:
        The `peft.PeftModel`.

    Raises:
        LensError: the model already has an adapter, or has no such module or layer.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    settings = settings if settings is not None else LoRASettings()
    if is_peft_model(model):
        raise LensError("this model already has an adapter; unload it or load the base again, then add_lora")
    blocks = blocks_of(model)
    linear = _linear_names(blocks[0])
    asked = linear if settings.modules == "all-linear" else settings.modules
    names = sorted({f"{name}_proj" if name not in linear and f"{name}_proj" in linear else name for name in asked})
    layers = list(range(len(blocks))) if settings.layers is None else list(settings.layers)
    if unknown := sorted(set(names) - set(linear)):
        known = ", ".join(sorted(set(linear)))
        raise LensError(f"no linear module {unknown[0]!r} in the decoder blocks; there are: {known}")
    if not set(layers) <= set(range(len(blocks))):
        raise LensError(f"layers {layers} reach outside this model, which has layers 0 to {len(blocks) - 1}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        target_modules=names,
        layers_to_transform=None if settings.layers is None else layers,
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in blocks.modules()),
        task_type="CAUSAL_LM",
    )
    with seeded(seed, next(model.parameters()).device), warnings.catch_warnings():
        # PEFT reads an attribute that newer versions of transformers have renamed.
        warnings.simplefilter("ignore", FutureWarning)
        peft_model: Any = get_peft_model(cast(Any, model), config)
    peft_model.init_seed = seed
    adapted = sum(hasattr(module, "lora_A") for module in peft_model.modules())
    expected = len(layers) * sum(name in names for name in linear)
    assert adapted == expected, f"{adapted} modules were adapted, {expected} were asked for"
    return cast(nn.Module, peft_model)


def _linear_names(block: nn.Module) -> list[str]:
    """Own names of the linear modules in a block, one for each module (gpt2 has two called c_proj)."""
    from transformers.pytorch_utils import Conv1D

    modules = block.named_modules()
    return [name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, nn.Linear | Conv1D)]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn inside depends on the seed alone; the global random state is left as it was."""
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches every other card as well
        for card in cards:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        if device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
