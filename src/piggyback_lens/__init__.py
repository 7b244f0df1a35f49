"""Show where in the chat template a narrow finetune is carried, and prove it by intervention.

The public surface. Names are loaded when they are first used, so that importing the package is instant.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piggyback_lens.comparisons.comparing import compare_methods as compare_methods
    from piggyback_lens.comparisons.comparison import Comparison as Comparison
    from piggyback_lens.comparisons.methods import Method as Method
    from piggyback_lens.conversations.chat import ChatFormat as ChatFormat
    from piggyback_lens.conversations.chat import RenderedPrompt as RenderedPrompt
    from piggyback_lens.conversations.chat import batch_prompts as batch_prompts
    from piggyback_lens.conversations.chat import compare_templates as compare_templates
    from piggyback_lens.directions.curve_points import Curve as Curve
    from piggyback_lens.directions.curves import ablation_cost as ablation_cost
    from piggyback_lens.directions.curves import efficiency as efficiency
    from piggyback_lens.directions.curves import significance as significance
    from piggyback_lens.directions.curves import stability as stability
    from piggyback_lens.directions.extraction import contrast_pairs as contrast_pairs
    from piggyback_lens.directions.extraction import mean_difference as mean_difference
    from piggyback_lens.directions.extraction import model_difference as model_difference
    from piggyback_lens.directions.extraction import principal_component as principal_component
    from piggyback_lens.directions.lens_tokens import logit_lens as logit_lens
    from piggyback_lens.directions.scalars import adapter_scalars as adapter_scalars
    from piggyback_lens.directions.scalars import logistic_probe as logistic_probe
    from piggyback_lens.directions.scored_answers import ScoredAnswers as ScoredAnswers
    from piggyback_lens.directions.steering import ablate_sweep as ablate_sweep
    from piggyback_lens.directions.steering import steer as steer
    from piggyback_lens.directions.steering import strength_for_kl as strength_for_kl
    from piggyback_lens.directions.sweeps import Sweep as Sweep
    from piggyback_lens.directions.transfer import transfer_matrix as transfer_matrix
    from piggyback_lens.errors import LensError as LensError
    from piggyback_lens.experiments.attribution import AttributionResult as AttributionResult
    from piggyback_lens.experiments.attribution import attribution_map as attribution_map
    from piggyback_lens.experiments.patching import carrier_map as carrier_map
    from piggyback_lens.experiments.patching import layer_curve as layer_curve
    from piggyback_lens.experiments.patching import layer_head_map as layer_head_map
    from piggyback_lens.experiments.patching import layer_position_map as layer_position_map
    from piggyback_lens.experiments.patching import patch_span as patch_span
    from piggyback_lens.experiments.perturbation import PerturbResult as PerturbResult
    from piggyback_lens.experiments.perturbation import perturb as perturb
    from piggyback_lens.experiments.results import PatchResult as PatchResult
    from piggyback_lens.experiments.stress_suite import StressResult as StressResult
    from piggyback_lens.experiments.stress_suite import stress as stress
    from piggyback_lens.figures.token_scores import TokenScores as TokenScores
    from piggyback_lens.finetuning.hf_trainer import TReFTSettings as TReFTSettings
    from piggyback_lens.finetuning.hf_trainer import TReFTTrainer as TReFTTrainer
    from piggyback_lens.finetuning.hook_training import HookTrainable as HookTrainable
    from piggyback_lens.finetuning.monitor import Monitor as Monitor
    from piggyback_lens.finetuning.objectives import KLOnRetain as KLOnRetain
    from piggyback_lens.finetuning.objectives import KLOnTrain as KLOnTrain
    from piggyback_lens.finetuning.objectives import Penalised as Penalised
    from piggyback_lens.finetuning.objectives import TReFT as TReFT
    from piggyback_lens.finetuning.objectives import Weighted as Weighted
    from piggyback_lens.finetuning.preventive import PreventiveSteering as PreventiveSteering
    from piggyback_lens.finetuning.retain import RetainData as RetainData
    from piggyback_lens.finetuning.retain import interleave as interleave
    from piggyback_lens.finetuning.trainables import LoRASettings as LoRASettings
    from piggyback_lens.finetuning.trainables import add_lora as add_lora
    from piggyback_lens.finetuning.training import TrainResult as TrainResult
    from piggyback_lens.finetuning.training import TrainSettings as TrainSettings
    from piggyback_lens.finetuning.training import train as train
    from piggyback_lens.finetuning.trajectories import SnapshotKeeper as SnapshotKeeper
    from piggyback_lens.finetuning.trajectories import drift as drift
    from piggyback_lens.finetuning.trajectories import trajectory as trajectory
    from piggyback_lens.interventions.activations import Activations as Activations
    from piggyback_lens.interventions.donors import kv_patch as kv_patch
    from piggyback_lens.interventions.donors import prefix_activations as prefix_activations
    from piggyback_lens.interventions.donors import span_activations as span_activations
    from piggyback_lens.interventions.hooks import Intervention as Intervention
    from piggyback_lens.interventions.hooks import Interventions as Interventions
    from piggyback_lens.interventions.hooks import Record as Record
    from piggyback_lens.interventions.kinds import ablate as ablate
    from piggyback_lens.interventions.kinds import add as add
    from piggyback_lens.interventions.kinds import cache as cache
    from piggyback_lens.interventions.kinds import clamp as clamp
    from piggyback_lens.interventions.kinds import mean_ablate as mean_ablate
    from piggyback_lens.interventions.kinds import patch as patch
    from piggyback_lens.interventions.kinds import resample as resample
    from piggyback_lens.interventions.kinds import zero as zero
    from piggyback_lens.interventions.prefix import PrefixCache as PrefixCache
    from piggyback_lens.interventions.running import applied as applied
    from piggyback_lens.interventions.running import mean_norms as mean_norms
    from piggyback_lens.jobs.auditing import AuditResult as AuditResult
    from piggyback_lens.jobs.auditing import AuditSettings as AuditSettings
    from piggyback_lens.jobs.auditing import audit as audit
    from piggyback_lens.jobs.demonstration import demo as demo
    from piggyback_lens.measuring.answers import AnswerContrast as AnswerContrast
    from piggyback_lens.measuring.answers import GeneratedBehaviour as GeneratedBehaviour
    from piggyback_lens.measuring.generation import Generation as Generation
    from piggyback_lens.measuring.generation import generate as generate
    from piggyback_lens.measuring.measures import get_behaviour as get_behaviour
    from piggyback_lens.measuring.sampling import Sampling as Sampling
    from piggyback_lens.measuring.scoring import contrast as contrast
    from piggyback_lens.measuring.scoring import kl_to_base as kl_to_base
    from piggyback_lens.measuring.scoring import nll as nll
    from piggyback_lens.measuring.scoring import response_log_probs as response_log_probs
    from piggyback_lens.measuring.texts import text_windows as text_windows
    from piggyback_lens.models.pair import ModelPair as ModelPair
    from piggyback_lens.models.pair import hook_model as hook_model
    from piggyback_lens.models.peft_adapters import attach_adapter as attach_adapter
    from piggyback_lens.models.sources import default_model as default_model
    from piggyback_lens.models.sources import load_causal_lm as load_causal_lm
    from piggyback_lens.models.sources import load_tokenizer as load_tokenizer
    from piggyback_lens.results.result import load_result as load_result
    from piggyback_lens.saes.latent_attribution import LatentAttribution as LatentAttribution
    from piggyback_lens.saes.latent_attribution import attribute_latents as attribute_latents
    from piggyback_lens.saes.latent_fit import fit_latents as fit_latents
    from piggyback_lens.saes.latent_training import train_sae as train_sae
    from piggyback_lens.saes.latents import Latents as Latents
    from piggyback_lens.saes.latents import ablate_latent as ablate_latent
    from piggyback_lens.saes.latents import load_sae as load_sae
    from piggyback_lens.saes.latents import steer_latent as steer_latent
    from piggyback_lens.tasks import Task as Task
    from piggyback_lens.tasks import load_conversations as load_conversations
    from piggyback_lens.tasks import load_prompts as load_prompts
    from piggyback_lens.tasks import load_task as load_task
    from piggyback_lens.vectors.adapter_files import load_gguf as load_gguf
    from piggyback_lens.vectors.adapter_files import load_npy as load_npy
    from piggyback_lens.vectors.adapter_files import load_peft as load_peft
    from piggyback_lens.vectors.adapter_files import load_pt as load_pt
    from piggyback_lens.vectors.adapter_files import save_gguf as save_gguf
    from piggyback_lens.vectors.adapter_files import save_peft as save_peft
    from piggyback_lens.vectors.adapter_files import save_with_bias as save_with_bias
    from piggyback_lens.vectors.adapters import LoRAAdapter as LoRAAdapter
    from piggyback_lens.vectors.adapting import attached as attached
    from piggyback_lens.vectors.direction import Direction as Direction

_HOMES = {
    "interventions.activations": ("Activations",),
    "vectors.adapter_files": (
        "load_gguf",
        "load_npy",
        "load_peft",
        "load_pt",
        "save_gguf",
        "save_peft",
        "save_with_bias",
    ),
    "vectors.adapters": ("LoRAAdapter",),
    "vectors.adapting": ("attached",),
    "measuring.answers": ("AnswerContrast", "GeneratedBehaviour"),
    "experiments.attribution": ("AttributionResult", "attribution_map"),
    "jobs.auditing": ("AuditResult", "AuditSettings", "audit"),
    "conversations.chat": ("ChatFormat", "RenderedPrompt", "batch_prompts", "compare_templates"),
    "comparisons.comparing": ("compare_methods",),
    "comparisons.comparison": ("Comparison",),
    "directions.curve_points": ("Curve",),
    "directions.curves": ("ablation_cost", "efficiency", "significance", "stability"),
    "jobs.demonstration": ("demo",),
    "vectors.direction": ("Direction",),
    "interventions.donors": ("kv_patch", "prefix_activations", "span_activations"),
    "errors": ("LensError",),
    "directions.extraction": ("contrast_pairs", "mean_difference", "model_difference", "principal_component"),
    "measuring.generation": ("Generation", "generate"),
    "measuring.sampling": ("Sampling",),
    "finetuning.hf_trainer": ("TReFTSettings", "TReFTTrainer"),
    "finetuning.hook_training": ("HookTrainable",),
    "interventions.hooks": ("Intervention", "Interventions", "Record"),
    "interventions.kinds": ("ablate", "add", "cache", "clamp", "mean_ablate", "patch", "resample", "zero"),
    "saes.latent_attribution": ("LatentAttribution", "attribute_latents"),
    "saes.latent_fit": ("fit_latents",),
    "saes.latent_training": ("train_sae",),
    "saes.latents": ("Latents", "ablate_latent", "load_sae", "steer_latent"),
    "directions.lens_tokens": ("logit_lens",),
    "measuring.measures": ("get_behaviour",),
    "comparisons.methods": ("Method",),
    "models.pair": ("ModelPair", "hook_model"),
    "finetuning.monitor": ("Monitor",),
    "finetuning.objectives": ("KLOnRetain", "KLOnTrain", "Penalised", "TReFT", "Weighted"),
    "experiments.patching": ("carrier_map", "layer_curve", "layer_head_map", "layer_position_map", "patch_span"),
    "experiments.perturbation": ("PerturbResult", "perturb"),
    "interventions.prefix": ("PrefixCache",),
    "finetuning.preventive": ("PreventiveSteering",),
    "experiments.results": ("PatchResult",),
    "results.result": ("load_result",),
    "finetuning.retain": ("RetainData", "interleave"),
    "interventions.running": ("applied", "mean_norms"),
    "directions.scalars": ("adapter_scalars", "logistic_probe"),
    "directions.scored_answers": ("ScoredAnswers",),
    "measuring.scoring": ("contrast", "kl_to_base", "nll", "response_log_probs"),
    "models.peft_adapters": ("attach_adapter",),
    "models.sources": ("default_model", "load_causal_lm", "load_tokenizer"),
    "directions.steering": ("ablate_sweep", "steer", "strength_for_kl"),
    "experiments.stress_suite": ("StressResult", "stress"),
    "directions.sweeps": ("Sweep",),
    "tasks": ("Task", "load_conversations", "load_prompts", "load_task"),
    "measuring.texts": ("text_windows",),
    "figures.token_scores": ("TokenScores",),
    "finetuning.trainables": ("LoRASettings", "add_lora"),
    "finetuning.training": ("TrainResult", "TrainSettings", "train"),
    "finetuning.trajectories": ("SnapshotKeeper", "drift", "trajectory"),
    "directions.transfer": ("transfer_matrix",),
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
