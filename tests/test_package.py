"""What an importer meets: an instant import, and a public surface that does not change by accident."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version

import piggyback_lens

ROOT = Path(__file__).parents[1]
LEGS = SimpleNamespace(**runpy.run_path(str(ROOT / ".ci" / "legs")))

HEAVY = ("torch", "transformers", "transformer_lens", "peft", "plotly", "pandas", "scipy", "datasets", "sae_lens")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_nothing_heavy():
    done = python(f"import sys, piggyback_lens; print([m for m in {HEAVY} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_everything_works_without_sae_lens():
    code = "import sys; sys.modules['sae_lens'] = None\nimport piggyback_lens as p\n[getattr(p, n) for n in p.__all__]"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_what_its_module_defines_and_never_a_module():
    code = (
        "import piggyback_lens as p, types\n"
        "from piggyback_lens import generate, audit, demo\n"
        "assert not [n for n in p.__all__ if isinstance(getattr(p, n), types.ModuleType)]"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_public_surface_is_this_list():
    assert set(piggyback_lens.__all__) == {
        "Activations", "AnswerContrast", "AttributionResult", "AuditResult", "AuditSettings", "ChatFormat",
        "Comparison", "Curve", "Direction", "GeneratedBehaviour", "Generation", "HookTrainable", "Intervention",
        "Interventions", "KLOnRetain", "KLOnTrain", "LatentAttribution", "Latents", "LensError", "LoRAAdapter",
        "LoRASettings", "Method", "ModelPair", "Monitor", "PatchResult", "Penalised", "PerturbResult", "PrefixCache",
        "PreventiveSteering", "Record", "RenderedPrompt", "RetainData", "Sampling", "ScoredAnswers", "SnapshotKeeper",
        "StressResult", "Sweep", "TReFT", "TReFTSettings", "TReFTTrainer", "Task", "TokenScores",
        "TrainResult", "TrainSettings", "Weighted", "ablate", "ablate_latent", "ablate_sweep", "ablation_cost",
        "adapter_scalars", "add", "add_lora", "applied", "attach_adapter", "attached", "attribute_latents",
        "attribution_map", "audit", "batch_prompts", "cache", "carrier_map", "clamp", "compare_methods",
        "compare_templates", "contrast", "contrast_pairs", "default_model", "demo", "drift", "efficiency",
        "fit_latents", "generate", "get_behaviour", "hook_model", "interleave", "kl_to_base", "kv_patch",
        "layer_curve", "layer_head_map", "layer_position_map", "load_causal_lm", "load_conversations", "load_gguf",
        "load_npy", "load_peft", "load_prompts", "load_pt", "load_result", "load_sae", "load_task", "load_tokenizer",
        "logistic_probe", "logit_lens", "mean_ablate", "mean_difference", "mean_norms", "model_difference", "nll",
        "patch", "patch_span", "perturb", "prefix_activations", "principal_component", "resample",
        "response_log_probs", "save_gguf", "save_peft", "save_with_bias", "significance", "span_activations",
        "stability", "steer", "steer_latent", "strength_for_kl", "stress", "text_windows", "train", "train_sae",
        "trajectory", "transfer_matrix", "zero",
    }  # fmt: skip


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = piggyback_lens.nonsense


# ---------------------------------------------------------------- versions


@pytest.fixture
def rows():
    return LEGS.read_table(LEGS.TABLE.read_text(encoding="utf-8"))


def differing(row, versions):
    """What the legs show of these versions, and ran otherwise. Torch is what there is a CPU build of."""
    names = [name for name in LEGS.SHOWN if name in versions and name != "torch"]
    return {name: row[name] for name in names if Version(row[name]) != Version(versions[name])}


def test_the_pages_on_versions_say_what_the_legs_ran(rows):
    assert LEGS.TABLE.read_text(encoding="utf-8") == LEGS.written(rows)
    block = LEGS.README.read_text(encoding="utf-8").partition("<!-- versions:start -->\n")[2]
    assert block.partition("\n<!-- versions:end -->")[0] == LEGS.sentence(rows)


def test_the_pinned_versions_are_those_that_the_pinned_leg_ran(rows):
    assert not differing(rows["pinned"], LEGS.pins())
    assert rows["pinned"]["torch"] == LEGS.pins()["torch"]


def test_every_lower_bound_is_run_by_the_lowest_leg_and_passes_there(rows):
    extras = LEGS.LEGS["lowest"].extras
    every = tuple(set(LEGS.project()["optional-dependencies"]) - {"dev", "all"})
    assert LEGS.bounds(every) == LEGS.bounds(extras)
    assert not differing(rows["lowest"], LEGS.bounds(extras))
    assert (rows["lowest"]["failed"], rows["lowest"]["demo"][:2]) == ("0", "ok")
