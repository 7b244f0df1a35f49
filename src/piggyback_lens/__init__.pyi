"""The public names, in six groups, each written once: `__init__` loads them from here when they are first used."""
# ruff: isort: skip_file

# Models, prompts and data
from piggyback_lens.models.pair import ModelPair as ModelPair
from piggyback_lens.settings import LoadSettings as LoadSettings
from piggyback_lens.models.pair import hook_model as hook_model
from piggyback_lens.models.sources import load_causal_lm as load_causal_lm
from piggyback_lens.models.sources import load_tokenizer as load_tokenizer
from piggyback_lens.models.sources import default_model as default_model
from piggyback_lens.models.peft_adapters import attach_adapter as attach_adapter
from piggyback_lens.conversations.chat import ChatFormat as ChatFormat
from piggyback_lens.settings import ChatSettings as ChatSettings
from piggyback_lens.conversations.chat import RenderedPrompt as RenderedPrompt
from piggyback_lens.conversations.chat import batch_prompts as batch_prompts
from piggyback_lens.conversations.chat import compare_templates as compare_templates
from piggyback_lens.reading.tasks import Task as Task
from piggyback_lens.reading.tasks import load_task as load_task
from piggyback_lens.reading.conversations import load_conversations as load_conversations
from piggyback_lens.reading.questions import Question as Question
from piggyback_lens.reading.questions import load_questions as load_questions
from piggyback_lens.reading.organisms import load_organisms as load_organisms
from piggyback_lens.reading.dresses import Dress as Dress
from piggyback_lens.reading.dresses import dressed as dressed
from piggyback_lens.reading.dresses import found_dress as found_dress
from piggyback_lens.measuring.texts import text_windows as text_windows
from piggyback_lens.errors import LensError as LensError

# Interventions, directions and adapters as values
from piggyback_lens.interventions.hooks import Intervention as Intervention
from piggyback_lens.interventions.hooks import Interventions as Interventions
from piggyback_lens.interventions.running import applied as applied
from piggyback_lens.interventions.kinds import cache as cache
from piggyback_lens.interventions.kinds import patch as patch
from piggyback_lens.interventions.donors import kv_patch as kv_patch
from piggyback_lens.interventions.kinds import add as add
from piggyback_lens.interventions.kinds import ablate as ablate
from piggyback_lens.interventions.kinds import clamp as clamp
from piggyback_lens.interventions.kinds import zero as zero
from piggyback_lens.interventions.kinds import adapter_off as adapter_off
from piggyback_lens.interventions.kinds import cut_attention as cut_attention
from piggyback_lens.interventions.kinds import mean_ablate as mean_ablate
from piggyback_lens.interventions.kinds import resample as resample
from piggyback_lens.interventions.hooks import Record as Record
from piggyback_lens.interventions.activations import Activations as Activations
from piggyback_lens.interventions.donors import span_activations as span_activations
from piggyback_lens.interventions.donors import prefix_activations as prefix_activations
from piggyback_lens.interventions.prefix import PrefixCache as PrefixCache
from piggyback_lens.interventions.running import mean_norms as mean_norms
from piggyback_lens.vectors.direction import Direction as Direction
from piggyback_lens.vectors.adapters import LoRAAdapter as LoRAAdapter
from piggyback_lens.vectors.adapting import attached as attached
from piggyback_lens.vectors.solution_files import load_solution as load_solution
from piggyback_lens.vectors.solution_files import save_solution as save_solution

# What is measured
from piggyback_lens.measuring.measures import Behaviour as Behaviour
from piggyback_lens.measuring.measures import get_behaviour as get_behaviour
from piggyback_lens.measuring.generation import generate as generate
from piggyback_lens.measuring.generation import Generation as Generation
from piggyback_lens.measuring.sampling import Sampling as Sampling
from piggyback_lens.measuring.answers import AnswerContrast as AnswerContrast
from piggyback_lens.measuring.answers import GeneratedBehaviour as GeneratedBehaviour
from piggyback_lens.experiments.em_table import EMTable as EMTable
from piggyback_lens.experiments.em_table import join_scores as join_scores
from piggyback_lens.experiments.judge_sheet import JudgeSheet as JudgeSheet
from piggyback_lens.measuring.endpoint import Endpoint as Endpoint
from piggyback_lens.measuring.endpoint_answers import sample_endpoint as sample_endpoint
from piggyback_lens.measuring.judge import Judge as Judge
from piggyback_lens.measuring.local_judge import LocalJudge as LocalJudge
from piggyback_lens.experiments.rescoring import judge_run as judge_run
from piggyback_lens.experiments.rescoring import rescore as rescore
from piggyback_lens.figures.token_scores import TokenScores as TokenScores
from piggyback_lens.measuring.scoring import contrast as contrast
from piggyback_lens.measuring.scoring import nll as nll
from piggyback_lens.measuring.scoring import kl_to_base as kl_to_base
from piggyback_lens.measuring.scoring import response_log_probs as response_log_probs

# Experiments on a pair, and their results
from piggyback_lens.experiments.audit import audit as audit
from piggyback_lens.settings import AnswerSettings as AnswerSettings
from piggyback_lens.settings import AuditSettings as AuditSettings
from piggyback_lens.experiments.patching import patch_span as patch_span
from piggyback_lens.experiments.patching import layer_curve as layer_curve
from piggyback_lens.experiments.patching import layer_position_map as layer_position_map
from piggyback_lens.experiments.patching import layer_head_map as layer_head_map
from piggyback_lens.experiments.patching import carrier_map as carrier_map
from piggyback_lens.settings import PatchSettings as PatchSettings
from piggyback_lens.settings import MapSettings as MapSettings
from piggyback_lens.experiments.attribution import attribution_map as attribution_map
from piggyback_lens.experiments.edges import edge_map as edge_map
from piggyback_lens.experiments.soft_patch import soft_patch as soft_patch
from piggyback_lens.settings import SoftPatchSettings as SoftPatchSettings
from piggyback_lens.experiments.perturbation import perturb as perturb
from piggyback_lens.settings import PerturbSettings as PerturbSettings
from piggyback_lens.experiments.stress_suite import stress as stress
from piggyback_lens.settings import StressSettings as StressSettings
from piggyback_lens.experiments.onset import onset as onset
from piggyback_lens.settings import OnsetSettings as OnsetSettings
from piggyback_lens.app.demonstration import demo as demo
from piggyback_lens.settings import DemoSettings as DemoSettings
from piggyback_lens.results.result import Result as Result
from piggyback_lens.results.result import load_result as load_result
from piggyback_lens.results.run import report_run as report_run

# Directions: found, steered with, measured
from piggyback_lens.directions.extraction import mean_difference as mean_difference
from piggyback_lens.directions.extraction import contrast_pairs as contrast_pairs
from piggyback_lens.directions.extraction import model_difference as model_difference
from piggyback_lens.directions.extraction import principal_component as principal_component
from piggyback_lens.settings import ReadSettings as ReadSettings
from piggyback_lens.directions.scalars import adapter_scalars as adapter_scalars
from piggyback_lens.directions.scalars import logistic_probe as logistic_probe
from piggyback_lens.directions.lens_tokens import logit_lens as logit_lens
from piggyback_lens.directions.steering import steer as steer
from piggyback_lens.directions.steering import ablate_sweep as ablate_sweep
from piggyback_lens.settings import SteerSettings as SteerSettings
from piggyback_lens.directions.steering import strength_for_kl as strength_for_kl
from piggyback_lens.directions.curves import efficiency as efficiency
from piggyback_lens.directions.curves import stability as stability
from piggyback_lens.directions.curves import significance as significance
from piggyback_lens.directions.curves import ablation_cost as ablation_cost
from piggyback_lens.settings import CurveSettings as CurveSettings
from piggyback_lens.directions.transfer import transfer_matrix as transfer_matrix

# Training
from piggyback_lens.finetuning.training import train as train
from piggyback_lens.settings import TrainSettings as TrainSettings
from piggyback_lens.finetuning.trainables import add_lora as add_lora
from piggyback_lens.settings import LoRASettings as LoRASettings
from piggyback_lens.finetuning.trainables import Trainable as Trainable
from piggyback_lens.finetuning.hook_training import HookTrainable as HookTrainable
from piggyback_lens.finetuning.gated import GatedAdapter as GatedAdapter
from piggyback_lens.finetuning.steps import Objective as Objective
from piggyback_lens.finetuning.objectives import Weighted as Weighted
from piggyback_lens.finetuning.objectives import Penalised as Penalised
from piggyback_lens.finetuning.objectives import Penalty as Penalty
from piggyback_lens.finetuning.objectives import TReFT as TReFT
from piggyback_lens.finetuning.objectives import KLOnTrain as KLOnTrain
from piggyback_lens.finetuning.objectives import KLOnRetain as KLOnRetain
from piggyback_lens.finetuning.residuals import ResidualDrift as ResidualDrift
from piggyback_lens.finetuning.retain import RetainData as RetainData
from piggyback_lens.finetuning.retain import interleave as interleave
from piggyback_lens.finetuning.preventive import PreventiveSteering as PreventiveSteering
from piggyback_lens.finetuning.hf_trainer import PenaltyMixin as PenaltyMixin
from piggyback_lens.finetuning.hf_trainer import PenaltyTrainer as PenaltyTrainer
from piggyback_lens.app.direction_training import train_direction as train_direction
from piggyback_lens.settings import TrainDirectionSettings as TrainDirectionSettings
from piggyback_lens.finetuning.monitor import Monitor as Monitor
from piggyback_lens.finetuning.trajectories import SnapshotKeeper as SnapshotKeeper
from piggyback_lens.finetuning.trajectories import trajectory as trajectory
from piggyback_lens.finetuning.trajectories import snapshot_cosines as snapshot_cosines
from piggyback_lens.comparisons.comparing import compare_methods as compare_methods
from piggyback_lens.settings import CompareSettings as CompareSettings
from piggyback_lens.comparisons.methods import Method as Method

from piggyback_lens import engines as engines
from piggyback_lens import saes as saes

__version__: str
