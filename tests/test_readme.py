"""The documents say what is true: their code runs, their tables are the tests', their numbers come from a run."""

import ast
import math
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_adapters
import tiny_models

from piggyback_lens.errors import LensError
from piggyback_lens.experiments.audit import CONDITIONS, TOPICS, AuditResult
from piggyback_lens.files import append_jsonl, write_json
from piggyback_lens.measuring.measures import get_behaviour
from piggyback_lens.reading.questions import load_questions
from piggyback_lens.reading.tasks import load_task
from piggyback_lens.settings import DemoSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def table(text: str) -> list[list[str]]:
    """Cells of a Markdown table, without head and rule."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def between(text: str, name: str) -> str:
    return text.partition(f"<!-- {name}:start -->")[2].partition(f"<!-- {name}:end -->")[0]


def test_the_page_of_layouts_has_every_layout_and_adapter_that_is_tested():
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    layouts, adapters = ({row[0]: row[1:] for row in table(part)} for part in page.split("## Adapters"))
    assert set(layouts) == {*tiny_models.NAMES, *tiny_models.MORE}
    assert set(adapters) == {*tiny_adapters.KINDS, *tiny_adapters.REFUSED}
    for name, cells in layouts.items():
        hooked = [cell for cell in cells if cell == "refused"]
        assert bool(hooked) == (name in tiny_models.NOT_HOOKED)
    assert all(
        cells[0].startswith("refused by name") for kind, cells in adapters.items() if kind in tiny_adapters.REFUSED
    )


def test_the_example_prompts_load_and_are_on_topic_and_off_topic():
    on, off = (load_questions(ROOT / "examples" / f"prompts_{topic}_topic.txt") for topic in ("on", "off"))
    assert min(len(on), len(off)) >= 3
    trained = {example["messages"][0]["content"] for example in load_task("terse").train}
    on, off = ({text for question in found for text in question.paraphrases} for found in (on, off))
    assert not trained & (on | off)
    assert not on & off


def test_links_to_files_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        own = [target for target in targets if "://" not in target and not target.startswith("docs/demo_")]
        assert all((ROOT / target).exists() for target in own), own


PACKAGE = ROOT / "src" / "piggyback_lens"


def rooms():
    """The rooms as CONTRIBUTING lists them, top to bottom: name, first line, and the table of its modules."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = text.partition("<!-- rooms:start -->")[2].partition("<!-- rooms:end -->")[0]
    for part in listed.split("### piggyback_lens")[1:]:
        name, _, body = part.partition("\n\n")
        yield name.removeprefix("."), body.partition("\n\n")[0], table(body)


def test_the_rooms_in_contributing_are_the_modules_and_their_first_lines():
    def first_line(path):
        return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]

    listed = {name: (line, {row[0].strip("`"): row[1] for row in rows}) for name, line, rows in rooms()}
    folders = ["", *(p.parent.name for p in PACKAGE.glob("*/__init__.py"))]
    found = {}
    for name in folders:
        modules = [p for p in (PACKAGE / name).glob("*.py") if p.stem != "__init__"]
        lines = {p.stem: first_line(p).rstrip(".") for p in modules}
        found[name] = (first_line(PACKAGE / name / "__init__.py"), lines)
    assert listed == found


def test_rooms_import_only_from_the_rooms_above_them():
    order = [name for name, _, _ in rooms()]
    wrong = []
    for name in order[1:]:
        for path in (PACKAGE / name).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("piggyback_lens."):
                    other = node.module.split(".")[1]
                    if other in order and order.index(other) > order.index(name):
                        wrong.append(f"{path.name} imports {node.module}")
    assert not wrong


def test_no_modules_import_each_other():
    names = {
        ".".join(("piggyback_lens", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in PACKAGE.rglob("*.py")
    }
    imports = {}
    for name, path in names.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
        imports[name] = {node.module for node in nodes if node.module in names} - {name}
    left = dict(imports)
    while leaves := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_only_the_models_room_calls_the_network_or_asks_for_its_library():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pattern = text.partition("<!-- seam:start -->")[2].partition("<!-- seam:end -->")[0].strip("`\n")
    assert re.search(pattern, "logits = model(input_ids=ids)")
    assert re.search(pattern, "bridge.original_model")
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "models"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line) and not line.lstrip().startswith(('"', "#", "...", ">>>"))
    ]
    assert not found


# ---------------------------------------------------------------- numbers in the README


@pytest.fixture
def demo_folder(tmp_path):
    """A finished audit's files, with answers of known length: base 20 words, finetuned 4, prefix patched 12."""
    words = dict.fromkeys(CONDITIONS, 4) | {"base": 20, "prefix": 12, "both": 16}
    rows = [
        {"topic": topic, "condition": condition, "index": i, "ids": [i], "value": float(n + i % 2), "response": "w"}
        for topic in TOPICS
        for condition, n in words.items()
        for i in range(6)
    ]
    append_jsonl(tmp_path / "rows.jsonl", reversed(rows))
    card = {
        "behaviour": "words",
        "settings": {"seed": 0},
        "names": {"base": "B", "finetuned": "F"},
        "versions": {"piggyback-lens": "0", "torch": "1", "transformers": "2", "transformer-lens": "3"},
        "machine": {"gpu": None, "cores": 2},
        "seconds": 90.0,
        "peak_memory_gb": 1.5,
    }
    write_json(tmp_path / "demo.json", {"task": "terse", "training_seconds": 120.0})
    write_json(tmp_path / "result.json", {"format": "piggyback_lens.audit.1", "card": card, "receipts": {"prefix": []}})
    return tmp_path


def test_an_audit_is_read_back_from_its_folder(demo_folder):
    result = AuditResult.load(demo_folder)
    assert result.behaviour == get_behaviour("words")
    assert result.values("off-topic", "base") == [20, 21, 20, 21, 20, 21]
    assert result.recovery("prefix").value == pytest.approx(0.5)
    assert (result.curve, result.folder, result.receipts) == (None, demo_folder, {"prefix": []})
    assert [row["condition"] for row in result.rows[::6]] == [*CONDITIONS, *CONDITIONS]
    assert result.figure().data


@pytest.mark.parametrize("content", [None, {}, {"format": "piggyback_lens.audit.1", "card": None, "receipts": {}}, []])
def test_a_folder_without_a_finished_audit_is_refused(tmp_path, content):
    if content is not None:
        write_json(tmp_path / "demo.json", {"task": "terse", "training_seconds": 120.0})
    write_json(tmp_path / "result.json", content)
    with pytest.raises(LensError, match=r"no finished audit|is not an audit's"):
        AuditResult.load(tmp_path)


def test_the_numbers_of_the_readme_are_written_between_the_markers_and_nowhere_else(demo_folder):
    script = runpy.run_path(str(ROOT / "examples" / "write_figures.py"))
    results = script["results_markdown"](AuditResult.load(demo_folder))
    recoveries = {row[1]: row[4] for row in table(results) if row[0] == "off-topic"}
    assert recoveries[CONDITIONS["prefix"]] == "50 % [50, 50]"
    assert recoveries[CONDITIONS["identity"]].startswith("0 %")
    assert recoveries["base"] == recoveries["finetuned"] == ""
    assert "training 2.0 min, audit 1.5 min; peak memory 1.5 GB; 2 CPU cores, piggyback-lens 0, torch 1" in results
    told = script["summary_markdown"](AuditResult.load(demo_folder))
    assert set(told.splitlines()) <= set(results.splitlines())
    written = script["with_results"](README, told)
    assert between(written, "demo").strip() == told
    assert script["with_results"](written, "x").replace("\nx\n", between(README, "demo")) == README
    assert "`piggyback-lens demo --task terse`" in results
    assert script["command"]({"task": "tool", "settings": asdict(DemoSettings.quick().audit)}).endswith(
        "--task tool --quick"
    )
    undefined = {"condition": "prefix", "recovery": math.nan, "recovery_low": math.nan, "recovery_high": math.nan}
    assert script["recovered"](undefined) == "undefined"
    with pytest.raises(LensError, match="lacks the markers"):
        script["with_results"]("no markers", results)


# ---------------------------------------------------------------- code that runs on the real model


def test_the_example_script_is_short():
    assert len((ROOT / "examples" / "patch_prefix.py").read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.real
@pytest.mark.slow
def test_the_five_lines_of_the_readme_run(real_model_dir, organism, tmp_path, monkeypatch, capsys):
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen2.5-7B-Instruct").symlink_to(real_model_dir)
    (tmp_path / "my-finetune").symlink_to(organism)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    # A processor computes float32 faster, and four prompts faster than twelve.
    code = PYTHON[0].replace(', dtype="bfloat16"', "").replace("[:12]", "[:4]")
    exec(compile(code, "README.md", "exec"), names)
    assert "recovery" in capsys.readouterr().out
    assert names["heatmap"].rank_correlation > 0.5
    assert names["heatmap"].figure().data


@pytest.mark.real
@pytest.mark.slow
def test_the_example_script_runs(real_model_dir, organism, tmp_path, monkeypatch, capsys):
    page = tmp_path / "curve.html"
    small = ["--prompts", "3", "--tokens", "8", "--out", str(page)]
    monkeypatch.setattr(sys, "argv", ["patch_prefix.py", str(organism), "--model", real_model_dir, *small])
    runpy.run_path(str(ROOT / "examples" / "patch_prefix.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("+ base's prefix") == 3
    assert float(printed.split("noise floor ")[1]) < 0.01
    assert "plotly" in page.read_text(encoding="utf-8")
