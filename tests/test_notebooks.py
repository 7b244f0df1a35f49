"""Notebooks: each .ipynb and its .py say the same, it runs from first cell to last, and GitHub shows its figures."""

import base64
import os
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    "01_spans_and_prefix_patching",
    "02_heatmaps_and_carriers",
    "03_directions_and_curves",
    "04_treft_in_your_trainer",
    "05_evaluate_an_organism",
)
FIGURES = (1, 4, 3, 0, 1)
PLOTLY = "application/vnd.plotly.v1+json"
NETWORK = {"network", "gpu"}
"""Tags of cells that need the hub or a GPU, and are skipped here."""
LARGEST = 3_000_000
"""Bytes of a stored notebook, which are cloned by everybody."""


def test_the_notebooks_are_these():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.fixture(params=NAMES)
def path(request) -> Path:
    return FOLDER / f"{request.param}.ipynb"


@pytest.fixture
def stored(path):
    nbformat = pytest.importorskip("nbformat", reason="the extra notebooks is not installed")
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def texts(notebook) -> str:
    """What was printed and shown as plain text."""
    found = [o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs(notebook)]
    return "\n".join(found)


def figures(notebook):
    return [output.data for output in outputs(notebook) if PLOTLY in output.get("data", {})]


# ---------------------------------------------------------------- as they are stored


def test_a_notebook_and_its_script_hold_the_same_cells(path):
    jupytext = pytest.importorskip("jupytext", reason="the extra notebooks is not installed")
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    cells = [[(cell.cell_type, cell.source) for cell in found.cells] for found in (notebook, script)]
    assert cells[0] == cells[1]


def test_a_notebook_says_first_what_is_seen_and_last_what_to_try(stored):
    first, last = stored.cells[0], stored.cells[-1]
    assert re.match(r"# 0\d \w", first.source)
    assert "**You will see**" in first.source
    assert last.source.startswith("## What to try\n\n- ")


def test_a_stored_notebook_is_whole_and_was_run_from_top_to_bottom(stored, path):
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    run = [cell for cell in code if not NETWORK & set(cell.metadata.get("tags", ()))]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    assert not any(cell.outputs for cell in code if cell not in run)
    assert not any(output.output_type == "error" for output in outputs(stored))
    assert path.stat().st_size < LARGEST


def test_a_stored_notebook_shows_its_figures_without_plotly(stored, path):
    """GitHub, and Lab with a kernel of another environment, show the picture."""
    found = figures(stored)
    assert len(found) == FIGURES[NAMES.index(path.stem)]
    for data in found:
        assert base64.b64decode(data["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_stored_notebook_has_no_warnings_of_libraries_and_no_paths_of_a_machine(stored):
    said = texts(stored)
    assert "Warning" not in said
    assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|usr)/", said)


# ---------------------------------------------------------------- as they run


def run(name: str, folder: Path):
    """Run a notebook in an empty folder, without the cells that need the hub or a GPU."""
    nbformat = pytest.importorskip("nbformat", reason="the extra notebooks is not installed")
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    client = NotebookClient(
        notebook, timeout=3600, skip_cells_with_tag="network", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    assert "IProgress" not in texts(notebook)
    return notebook


@pytest.fixture
def settings(monkeypatch, real_model_dir):
    """The real demo model, and no adapter of somebody's demo."""
    for name in [name for name in os.environ if name.startswith("PIGGYBACK_LENS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIGGYBACK_LENS_MODEL", real_model_dir)
    return monkeypatch


@pytest.fixture
def adapted(settings, organism):
    settings.setenv("PIGGYBACK_LENS_ADAPTER", str(organism))
    return settings


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_the_first_notebook_trains_its_own_organism_patches_the_prefix_and_draws_the_layer_curve(tmp_path):
    notebook = run(NAMES[0], tmp_path)
    said = texts(notebook)
    assert "training: done in" in said
    assert float(said.split("noise floor: ")[1].split()[0]) < 0.01
    (figure,) = figures(notebook)
    names = [trace.get("name") or "" for trace in figure[PLOTLY]["data"]]
    assert any("patched" in name for name in names)
    assert any("random control" in name for name in names)
    pages = [output.data["text/html"] for output in outputs(notebook) if "text/html" in output.get("data", {})]
    assert any("<table" in page and "finetuned + base" in page for page in pages)
    assert any("query" in page and "background" in page for page in pages)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("adapted")
def test_the_second_notebook_draws_carriers_and_maps(tmp_path):
    notebook = run(NAMES[1], tmp_path)
    drawn = [{trace["type"] for trace in figure[PLOTLY]["data"]} for figure in figures(notebook)]
    assert len(drawn) == FIGURES[1]
    assert sum("heatmap" in kinds for kinds in drawn) >= 3
    assert -1 <= float(texts(notebook).split("rank correlation of gradient and exact patch: ")[1].split()[0]) <= 1


@pytest.mark.real
@pytest.mark.slow
def test_the_third_notebook_trains_two_vectors_and_draws_three_curves(settings, tmp_path):
    settings.setenv("PIGGYBACK_LENS_STEPS", "8")
    settings.setenv("PIGGYBACK_LENS_TEXTS", "4")
    notebook = run(NAMES[2], tmp_path)
    found = re.findall(r"(?:general|narrow): loss ([\d.]+) -> ([\d.]+)", texts(notebook))
    assert len(found) == 2
    assert all(float(after) < float(before) for before, after in found)
    titles = [figure[PLOTLY]["layout"]["title"]["text"].split(":")[0].split(">")[-1] for figure in figures(notebook)]
    assert titles == ["Efficiency", "Stability", "Significance"]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_the_fourth_notebook_holds_the_prefix_where_plain_finetuning_moves_it(tmp_path):
    said = texts(run(NAMES[3], tmp_path))
    plain, treft = map(float, re.search(r"prefix moved by ([\d.e-]+), with TReFT by ([\d.e-]+)", said).groups())
    assert 0 < treft < plain / 2


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("adapted")
def test_the_fifth_notebook_audits_offline_and_reads_judged_answers(tmp_path):
    notebook = run(NAMES[4], tmp_path)
    said = texts(notebook)
    assert re.search(r"(No spread|Spread|spread)", said)
    assert "report.html" in said
    skipped = [cell for cell in notebook.cells if NETWORK & set(cell.metadata.get("tags", ()))]
    assert [cell.execution_count for cell in skipped] == [None]
