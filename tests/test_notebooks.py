"""Notebooks: the pair of .ipynb and .py says the same, and the notebook runs from its first cell to its last."""

import os
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_the_notebooks_are_these():
    assert [path.stem for path in NOTEBOOKS] == ["01_prefix_patching", "02_narrow_and_general"]


def test_a_notebook_and_its_script_hold_the_same_cells(path):
    jupytext = pytest.importorskip("jupytext", reason="the extra notebooks is not installed")

    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    cells = [[(cell.cell_type, cell.source) for cell in found.cells] for found in (notebook, script)]
    assert cells[0] == cells[1]


def test_a_notebook_is_stored_without_outputs(path):
    nbformat = pytest.importorskip("nbformat", reason="the extra notebooks is not installed")
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.real
@pytest.mark.slow
def test_the_prefix_patching_notebook_runs_alone_and_draws_the_layer_curve(real_model_dir, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the extra notebooks is not installed")
    from nbclient import NotebookClient

    for name in [name for name in os.environ if name.startswith("PIGGYBACK_LENS_ADAPTER")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIGGYBACK_LENS_MODEL", real_model_dir)
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    # An empty working folder: no demo's adapter is near, so the notebook trains its own.
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "trained here: loss" in text
    assert float(text.split("noise floor: ")[1].split()[0]) < 0.01
    (figure,) = [o.data["application/vnd.plotly.v1+json"] for o in outputs if _holds(o, "plotly")]
    names = [trace.get("name") or "" for trace in figure["data"]]
    assert any("patched" in name for name in names)
    assert any("random control" in name for name in names)
    pages = [output.data["text/html"] for output in outputs if _holds(output, "text/html")]
    assert any("<table" in page and "finetuned + base" in page for page in pages)
    assert any("query" in page and "background" in page for page in pages)


@pytest.mark.real
@pytest.mark.slow
def test_the_directions_notebook_runs_alone_and_draws_three_curves(real_model_dir, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the extra notebooks is not installed")
    from nbclient import NotebookClient

    monkeypatch.setenv("PIGGYBACK_LENS_MODEL", real_model_dir)
    monkeypatch.setenv("PIGGYBACK_LENS_STEPS", "8")
    monkeypatch.setenv("PIGGYBACK_LENS_TEXTS", "4")
    notebook = nbformat.read(NOTEBOOKS[1], as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    found = re.findall(r"(?:general|narrow): loss ([\d.]+) -> ([\d.]+)", text)
    assert len(found) == 2
    assert all(float(after) < float(before) for before, after in found)
    figures = [o.data["application/vnd.plotly.v1+json"] for o in outputs if _holds(o, "plotly")]
    assert [figure["layout"]["title"]["text"].split(":")[0].split(">")[-1] for figure in figures] == [
        "Efficiency",
        "Stability",
        "Significance",
    ]


def _holds(output, kind: str) -> bool:
    return any(kind in mime for mime in output.get("data", {}))
