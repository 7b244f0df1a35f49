"""Show where in the chat template a narrow finetune is carried, and prove it by intervention.

The public surface. Names are loaded when they are first used, so that importing the package is instant.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piggyback_lens.activations import Activations as Activations
    from piggyback_lens.adapter_files import load_gguf as load_gguf
    from piggyback_lens.adapter_files import load_npy as load_npy
    from piggyback_lens.adapter_files import load_peft as load_peft
    from piggyback_lens.adapter_files import load_pt as load_pt
    from piggyback_lens.adapter_files import save_gguf as save_gguf
    from piggyback_lens.adapter_files import save_peft as save_peft
    from piggyback_lens.adapter_files import save_with_bias as save_with_bias
    from piggyback_lens.adapters import LoRAAdapter as LoRAAdapter
    from piggyback_lens.adapters import SteeringVector as SteeringVector
    from piggyback_lens.adapting import attached as attached
    from piggyback_lens.answers import AnswerContrast as AnswerContrast
    from piggyback_lens.answers import GeneratedBehaviour as GeneratedBehaviour
    from piggyback_lens.attribution import AttributionResult as AttributionResult
    from piggyback_lens.attribution import attribution_map as attribution_map
    from piggyback_lens.auditing import AuditResult as AuditResult
    from piggyback_lens.auditing import AuditSettings as AuditSettings
    from piggyback_lens.auditing import audit as audit
    from piggyback_lens.chat import ChatFormat as ChatFormat
    from piggyback_lens.chat import RenderedPrompt as RenderedPrompt
    from piggyback_lens.chat import batch_prompts as batch_prompts
    from piggyback_lens.chat import compare_templates as compare_templates
    from piggyback_lens.comparing import compare_methods as compare_methods
    from piggyback_lens.comparison import Comparison as Comparison
    from piggyback_lens.curve_points import Curve as Curve
    from piggyback_lens.curves import ablation_cost as ablation_cost
    from piggyback_lens.curves import efficiency as efficiency
    from piggyback_lens.curves import significance as significance
    from piggyback_lens.curves import stability as stability
    from piggyback_lens.demonstration import demo as demo
    from piggyback_lens.directions import Direction as Direction
    from piggyback_lens.donors import kv_patch as kv_patch
    from piggyback_lens.donors import prefix_activations as prefix_activations
    from piggyback_lens.donors import span_activations as span_activations
    from piggyback_lens.errors import LensError as LensError
    from piggyback_lens.extraction import contrast_pairs as contrast_pairs
    from piggyback_lens.extraction import mean_difference as mean_difference
    from piggyback_lens.extraction import model_difference as model_difference
    from piggyback_lens.extraction import principal_component as principal_component
    from piggyback_lens.generation import Generation as Generation
    from piggyback_lens.generation import Sampling as Sampling
    from piggyback_lens.generation import generate as generate
    from piggyback_lens.hf_trainer import TReFTSettings as TReFTSettings
    from piggyback_lens.hf_trainer import TReFTTrainer as TReFTTrainer
    from piggyback_lens.hook_training import HookTrainable as HookTrainable
    from piggyback_lens.hooks import Intervention as Intervention
    from piggyback_lens.hooks import Interventions as Interventions
    from piggyback_lens.hooks import ablate as ablate
    from piggyback_lens.hooks import add as add
    from piggyback_lens.hooks import cache as cache
    from piggyback_lens.hooks import clamp as clamp
    from piggyback_lens.hooks import mean_ablate as mean_ablate
    from piggyback_lens.hooks import patch as patch
    from piggyback_lens.hooks import resample as resample
    from piggyback_lens.hooks import zero as zero
    from piggyback_lens.latent_attribution import LatentAttribution as LatentAttribution
    from piggyback_lens.latent_attribution import attribute_latents as attribute_latents
    from piggyback_lens.latent_fit import fit_latents as fit_latents
    from piggyback_lens.latent_training import train_sae as train_sae
    from piggyback_lens.latents import Latents as Latents
    from piggyback_lens.latents import ablate_latent as ablate_latent
    from piggyback_lens.latents import load_sae as load_sae
    from piggyback_lens.latents import steer_latent as steer_latent
    from piggyback_lens.lens_tokens import logit_lens as logit_lens
    from piggyback_lens.measures import get_behaviour as get_behaviour
    from piggyback_lens.methods import Method as Method
    from piggyback_lens.models import ModelPair as ModelPair
    from piggyback_lens.models import hook_model as hook_model
    from piggyback_lens.monitor import Monitor as Monitor
    from piggyback_lens.objectives import KLOnRetain as KLOnRetain
    from piggyback_lens.objectives import KLOnTrain as KLOnTrain
    from piggyback_lens.objectives import Penalised as Penalised
    from piggyback_lens.objectives import TReFT as TReFT
    from piggyback_lens.objectives import Weighted as Weighted
    from piggyback_lens.patching import carrier_map as carrier_map
    from piggyback_lens.patching import layer_curve as layer_curve
    from piggyback_lens.patching import layer_head_map as layer_head_map
    from piggyback_lens.patching import layer_position_map as layer_position_map
    from piggyback_lens.patching import patch_span as patch_span
    from piggyback_lens.perturbation import PerturbResult as PerturbResult
    from piggyback_lens.perturbation import perturb as perturb
    from piggyback_lens.prefix import PrefixCache as PrefixCache
    from piggyback_lens.preventive import PreventiveSteering as PreventiveSteering
    from piggyback_lens.results import PatchResult as PatchResult
    from piggyback_lens.retain import RetainData as RetainData
    from piggyback_lens.retain import interleave as interleave
    from piggyback_lens.running import Record as Record
    from piggyback_lens.running import applied as applied
    from piggyback_lens.running import mean_norms as mean_norms
    from piggyback_lens.scalars import adapter_scalars as adapter_scalars
    from piggyback_lens.scalars import logistic_probe as logistic_probe
    from piggyback_lens.scored_answers import ScoredAnswers as ScoredAnswers
    from piggyback_lens.scoring import contrast as contrast
    from piggyback_lens.scoring import kl_to_base as kl_to_base
    from piggyback_lens.scoring import nll as nll
    from piggyback_lens.scoring import response_log_probs as response_log_probs
    from piggyback_lens.sources import attach_adapter as attach_adapter
    from piggyback_lens.sources import default_model as default_model
    from piggyback_lens.sources import load_causal_lm as load_causal_lm
    from piggyback_lens.sources import load_tokenizer as load_tokenizer
    from piggyback_lens.steering import ablate_sweep as ablate_sweep
    from piggyback_lens.steering import steer as steer
    from piggyback_lens.steering import strength_for_kl as strength_for_kl
    from piggyback_lens.stress_suite import StressResult as StressResult
    from piggyback_lens.stress_suite import stress as stress
    from piggyback_lens.sweeps import Sweep as Sweep
    from piggyback_lens.tasks import Task as Task
    from piggyback_lens.tasks import load_conversations as load_conversations
    from piggyback_lens.tasks import load_prompts as load_prompts
    from piggyback_lens.tasks import load_task as load_task
    from piggyback_lens.texts import text_windows as text_windows
    from piggyback_lens.token_scores import TokenScores as TokenScores
    from piggyback_lens.trainables import LoRASettings as LoRASettings
    from piggyback_lens.trainables import add_lora as add_lora
    from piggyback_lens.training import TrainResult as TrainResult
    from piggyback_lens.training import TrainSettings as TrainSettings
    from piggyback_lens.training import train as train
    from piggyback_lens.trajectories import SnapshotKeeper as SnapshotKeeper
    from piggyback_lens.trajectories import drift as drift
    from piggyback_lens.trajectories import trajectory as trajectory
    from piggyback_lens.transfer import transfer_matrix as transfer_matrix

_HOMES = {
    "activations": ("Activations",),
    "adapter_files": ("load_gguf", "load_npy", "load_peft", "load_pt", "save_gguf", "save_peft", "save_with_bias"),
    "adapters": ("LoRAAdapter", "SteeringVector"),
    "adapting": ("attached",),
    "answers": ("AnswerContrast", "GeneratedBehaviour"),
    "attribution": ("AttributionResult", "attribution_map"),
    "auditing": ("AuditResult", "AuditSettings", "audit"),
    "chat": ("ChatFormat", "RenderedPrompt", "batch_prompts", "compare_templates"),
    "comparing": ("compare_methods",),
    "comparison": ("Comparison",),
    "curve_points": ("Curve",),
    "curves": ("ablation_cost", "efficiency", "significance", "stability"),
    "demonstration": ("demo",),
    "directions": ("Direction",),
    "donors": ("kv_patch", "prefix_activations", "span_activations"),
    "errors": ("LensError",),
    "extraction": ("contrast_pairs", "mean_difference", "model_difference", "principal_component"),
    "generation": ("Generation", "Sampling", "generate"),
    "hf_trainer": ("TReFTSettings", "TReFTTrainer"),
    "hook_training": ("HookTrainable",),
    "hooks": (
        "Intervention",
        "Interventions",
        "ablate",
        "add",
        "cache",
        "clamp",
        "mean_ablate",
        "patch",
        "resample",
        "zero",
    ),
    "latent_attribution": ("LatentAttribution", "attribute_latents"),
    "latent_fit": ("fit_latents",),
    "latent_training": ("train_sae",),
    "latents": ("Latents", "ablate_latent", "load_sae", "steer_latent"),
    "lens_tokens": ("logit_lens",),
    "measures": ("get_behaviour",),
    "methods": ("Method",),
    "models": ("ModelPair", "hook_model"),
    "monitor": ("Monitor",),
    "objectives": ("KLOnRetain", "KLOnTrain", "Penalised", "TReFT", "Weighted"),
    "patching": ("carrier_map", "layer_curve", "layer_head_map", "layer_position_map", "patch_span"),
    "perturbation": ("PerturbResult", "perturb"),
    "prefix": ("PrefixCache",),
    "preventive": ("PreventiveSteering",),
    "results": ("PatchResult",),
    "retain": ("RetainData", "interleave"),
    "running": ("Record", "applied", "mean_norms"),
    "scalars": ("adapter_scalars", "logistic_probe"),
    "scored_answers": ("ScoredAnswers",),
    "scoring": ("contrast", "kl_to_base", "nll", "response_log_probs"),
    "sources": ("attach_adapter", "default_model", "load_causal_lm", "load_tokenizer"),
    "steering": ("ablate_sweep", "steer", "strength_for_kl"),
    "stress_suite": ("StressResult", "stress"),
    "sweeps": ("Sweep",),
    "tasks": ("Task", "load_conversations", "load_prompts", "load_task"),
    "texts": ("text_windows",),
    "token_scores": ("TokenScores",),
    "trainables": ("LoRASettings", "add_lora"),
    "training": ("TrainResult", "TrainSettings", "train"),
    "trajectories": ("SnapshotKeeper", "drift", "trajectory"),
    "transfer": ("transfer_matrix",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = _version("piggyback-lens")
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
