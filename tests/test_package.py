"""What an importer meets: an instant import, and a public surface that does not change by accident."""

import inspect
import re
import runpy
import subprocess
import sys
import zipfile
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
        "Activations", "AnswerContrast", "AnswerSettings", "AuditSettings", "Behaviour", "ChatFormat", "ChatSettings",
        "CompareSettings", "CurveSettings", "DemoSettings", "Direction", "Dress", "EMTable", "Endpoint", "GatedAdapter",
        "GeneratedBehaviour", "Generation", "HookTrainable", "Intervention", "Interventions", "Judge", "JudgeSheet",
        "KLOnRetain", "KLOnTrain", "LensError", "LoRAAdapter", "LoRASettings", "LoadSettings", "LocalJudge",
        "MapSettings", "Method", "ModelPair", "Monitor", "Objective", "OnsetSettings", "PatchSettings", "Penalised",
        "Penalty", "onset",
        "PenaltyMixin", "PenaltyTrainer", "PerturbSettings", "PrefixCache", "PreventiveSteering", "Question",
        "ReadSettings", "Record", "RenderedPrompt", "ResidualDrift", "Result", "RetainData", "Sampling",
        "SnapshotKeeper", "SoftPatchSettings", "SteerSettings", "StressSettings", "TReFT", "Task", "TokenScores",
        "TrainDirectionSettings", "TrainSettings", "Trainable", "Weighted", "ablate", "ablate_sweep", "ablation_cost",
        "adapter_off", "adapter_scalars", "add", "add_lora", "applied", "attach_adapter", "attached", "attribution_map",
        "audit", "batch_prompts", "cache", "carrier_map", "clamp", "compare_methods", "compare_templates", "contrast",
        "contrast_pairs", "cut_attention", "default_model", "demo", "dressed", "edge_map", "efficiency", "found_dress",
        "generate", "get_behaviour", "hook_model", "interleave", "join_scores", "judge_run", "kl_to_base", "kv_patch",
        "layer_curve", "layer_head_map", "layer_position_map", "load_causal_lm", "load_conversations", "load_organisms",
        "load_questions",
        "load_result", "load_solution", "load_task", "load_tokenizer", "logistic_probe", "logit_lens", "mean_ablate",
        "mean_difference", "mean_norms", "model_difference", "nll", "patch", "patch_span", "perturb",
        "prefix_activations", "principal_component", "report_run", "resample", "rescore", "response_log_probs",
        "sample_endpoint", "save_solution", "significance", "snapshot_cosines", "soft_patch", "span_activations",
        "stability", "steer", "strength_for_kl", "stress", "text_windows", "train", "train_direction", "trajectory",
        "transfer_matrix", "zero",
    }  # fmt: skip


def test_the_surface_is_in_six_groups_and_each_name_is_written_once():
    text = (ROOT / "src" / "piggyback_lens" / "__init__.pyi").read_text(encoding="utf-8")
    groups = [re.findall(r"import (\w+) as", part) for part in re.split(r"^# (?!ruff).*$", text, flags=re.M)[1:]]
    assert [(len(names) > 10, names[0]) for names in groups] == [
        (True, "ModelPair"), (True, "Intervention"), (True, "Behaviour"), (True, "audit"), (True, "mean_difference"),
        (True, "train"),
    ]  # fmt: skip
    written = re.findall(r"^from \S+\.\S+ import \w+ as (\w+)$", text, re.M)
    assert sorted(written) == piggyback_lens.__all__


def test_completion_shows_public_names_only():
    assert dir(piggyback_lens) == sorted([*piggyback_lens.__all__, "__version__", "engines", "saes"])


COMPLETED = """
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
shell.run_cell("import piggyback_lens as lens")
for line in LINES:
    with provisionalcompleter():
        print(line, *(found.text for found in shell.Completer.completions(line, len(line))))
"""


def test_the_options_of_experiments_and_settings_complete_in_jupyter():
    """Names are loaded when they are first used, which a completer that only reads code would not see."""
    pytest.importorskip("IPython", reason="the extra notebooks is not installed")
    expected = {
        "lens.layer_curve(pair, prompts, contr": "control_layers=",
        "lens.efficiency(model, solutions, prompts, prog": "progress=",
        "lens.generate(model, prompts, max_": "max_new_tokens=",
        "lens.ModelPair.load(ada": "adapter=",
        "lens.AuditSettings(curve_p": "curve_prompts=",
        "lens.saes.train_": "train_sae",
        "lens.layer_": "layer_curve",
    }
    done = python(f"LINES = {list(expected)}\n{COMPLETED}")
    assert done.returncode == 0, done.stderr
    shown = {line: set(done.stdout.split(line + " ")[1].splitlines()[0].split()) for line in expected}
    assert not [line for line, word in expected.items() if word not in shown[line]], shown


def test_every_settings_class_is_public():
    from piggyback_lens import settings

    own = {
        name for name, kind in vars(settings).items() if inspect.isclass(kind) and issubclass(kind, settings.Settings)
    }
    assert own - {"Settings"} <= {*piggyback_lens.__all__, *piggyback_lens.saes.__all__}


def test_a_removed_name_says_what_there_is_instead():
    old = runpy.run_path(str(ROOT / "src" / "piggyback_lens" / "__init__.py"), run_name="piggyback_lens")["_GONE"]
    for name, new in old.items():
        with pytest.raises(AttributeError, match=rf"has no {name} any more: use "):
            getattr(piggyback_lens, name)
        assert name not in piggyback_lens.__all__
        public = {*piggyback_lens.__all__, *(f"saes.{name}" for name in piggyback_lens.saes.__all__)}
        assert re.match(r"[\w.]+", new)[0] in public


NOTEBOOKS = [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.py"))]


@pytest.mark.parametrize("file", [*NOTEBOOKS, "examples/patch_prefix.py"])
def test_what_the_documentation_imports_is_public(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    imports = re.findall(r"^from (piggyback_lens[\w.]*) import", text, re.M)
    assert set(imports) <= {"piggyback_lens", "piggyback_lens.engines", "piggyback_lens.saes"}


@pytest.mark.slow
def test_a_wheel_holds_all_that_is_read_at_run_time(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr or "Connection" in done.stderr:
        pytest.skip("hatchling cannot be fetched here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "piggyback_lens"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(package.parent)) for path in files} <= held


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


def test_doctor_knows_every_extra():
    from piggyback_lens.app.doctor import EXTRAS

    assert set(EXTRAS) == set(LEGS.project()["optional-dependencies"]) - {"dev", "docs", "all"}


def test_every_lower_bound_is_run_by_the_lowest_leg_and_passes_there(rows):
    extras = LEGS.LEGS["lowest"].extras
    # inspect-ai asks for newer versions of what the project needs too, and has no place beside its lower bounds.
    every = tuple(set(LEGS.project()["optional-dependencies"]) - {"dev", "docs", "all", "inspect"})
    assert LEGS.bounds(every) == LEGS.bounds(extras)
    assert not differing(rows["lowest"], LEGS.bounds(extras))
    assert (rows["lowest"]["failed"], rows["lowest"]["demo"][:2]) == ("0", "ok")
