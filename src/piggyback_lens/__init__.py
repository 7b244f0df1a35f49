"""Show where in the chat template a narrow finetune is carried, and prove it by intervention.

The public names are those of `__init__.pyi`, in six groups, and two namespaces: `piggyback_lens.saes` (it needs
sae-lens) and `piggyback_lens.engines` (where cells run). They are loaded when they are first used, so that importing
the package is instant.
"""

import re
from importlib import import_module
from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

_GONE = {
    "SteeringVector": "Direction",
    "KVReference": "PrefixCache",
    "TaskVector": "LoRAAdapter",
    "drift": "snapshot_cosines",
    "load_gguf": "load_solution",
    "load_npy": "load_solution",
    "load_peft": "load_solution",
    "load_pt": "load_solution",
    "save_gguf": "save_solution",
    "save_peft": "save_solution",
    "load_prompts": "load_questions",
    "ScoredAnswers": "EMTable",
    "RunSettings": "PatchSettings",
    "LoadOptions": "LoadSettings",
    "TReFTTrainer": "PenaltyTrainer",
    "TReFTMixin": "PenaltyMixin",
    "TReFTSettings": 'Penalised((Weighted(TReFT(reference="template"), 10.0),))',
    **{
        name: f"saes.{name}"
        for name in (
            "Latents",
            "SAESettings",
            "ablate_latent",
            "attribute_latents",
            "fit_latents",
            "load_sae",
            "steer_latent",
            "train_sae",
        )
    },
    **dict.fromkeys(
        (
            "AttributionResult",
            "AuditResult",
            "Comparison",
            "Curve",
            "LatentAttribution",
            "PatchResult",
            "PerturbResult",
            "StressResult",
            "Sweep",
            "TrainResult",
        ),
        "load_result(path), which reads every kind of Result",
    ),
}
"""Names that went, and what there is instead."""
_NAMESPACES = ("engines", "saes")
_HOMES = {
    name: home
    for home, name in re.findall(
        r"^from (piggyback_lens\.\S+) import (\w+) as", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.M
    )
}

__version__ = _version("piggyback-lens")
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _GONE:
        raise AttributeError(f"{__name__} has no {name} any more: use {_GONE[name]}")
    if name in _NAMESPACES:
        return import_module(f"piggyback_lens.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__", *_NAMESPACES]
