"""Which adapters of PEFT are a change of weights, so that hooks and prefix caches mean what they say under them."""

from collections.abc import Callable, Mapping
from typing import Any

from piggyback_lens.errors import LensError, visible
from piggyback_lens.models.views import is_peft_model


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


_LEAVES_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA that do not write into the base; PiSSA, OLoRA, CorDA, LoftQ and others move a part of it."""


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
    own = str(getattr(base, "name_or_path", "") or "")
    notes = []
    for name, config in _active_configs(peft_model):
        named = str(config.base_model_name_or_path or "")
        if own and named and _last(named) != _last(own):
            notes.append(f"adapter {name!r} was made for {visible(named)}, and is put on {visible(own)}")
    return tuple(notes)


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _active_configs(model: Any) -> list[tuple[str, Any]]:
    if not is_peft_model(model):
        return []
    return [(name, model.peft_config[name]) for name in model.active_adapters if name in model.peft_config]
