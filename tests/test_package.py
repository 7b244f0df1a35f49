"""What an importer meets: an instant import, and a public surface that does not change by accident."""

import subprocess
import sys

import pytest

import piggyback_lens

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
        "Activations", "AuditResult", "AuditSettings", "ChatFormat", "Generation", "Intervention", "Interventions",
        "LayerCurve", "LensError", "LoRASettings", "ModelPair", "PrefixCache", "Record", "RenderedPrompt", "Sampling",
        "Task", "TrainResult", "TrainSettings", "ablate", "add", "add_lora", "applied", "attach_adapter", "audit",
        "batch_prompts", "cache", "clamp", "compare_templates", "contrast", "default_model", "demo", "generate",
        "get_behaviour", "hook_model", "kl_to_base", "kv_patch", "layer_curve", "load_causal_lm", "load_conversations",
        "load_prompts", "load_task", "load_tokenizer", "mean_ablate", "mean_norms", "nll", "patch",
        "prefix_activations", "resample", "response_log_probs", "span_activations", "train", "zero",
    }  # fmt: skip


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = piggyback_lens.nonsense
