"""Experiments that are written as they come: resumed after a kill, refused in a folder with another plan."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_hooked import BACKENDS, chat, needs_hooked, prompts
from tiny_pairs import THREE, contrast, pair

import piggyback_lens.experiments.experiment as experiment_module
import piggyback_lens.results.run as run_module
from piggyback_lens.errors import LensError
from piggyback_lens.experiments.experiment import run_plan
from piggyback_lens.experiments.laboratory import Laboratory, Planned
from piggyback_lens.experiments.patching import carrier_map, layer_curve, layer_head_map, layer_position_map, patch_span
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.interventions.donors import prefix_activations
from piggyback_lens.interventions.kinds import patch, zero
from piggyback_lens.measuring.answers import AnswerContrast, GeneratedBehaviour
from piggyback_lens.measuring.measures import get_behaviour
from piggyback_lens.settings import PatchSettings

CELLS = 9 + 2  # of the curve below, and both models as they are


def curve(out=None, tiny=None, some=THREE, measure=None, settings=PatchSettings(), **changes):
    """3 layers, the controls at each; one cell at a time goes through the model."""
    settings = replace(settings, budget_gb=1e-9)
    run = {"sites": "v", "span": "query", "settings": settings, "control_layers": 3, **changes}
    return layer_curve(tiny or pair(), prompts(some), out=out, measure=measure or contrast(prompts(some)), **run)


def numbers(folder):
    data = json.loads((folder / "result.json").read_text())
    return {name: data[name] for name in ("kind", "cells", "values", "base", "finetuned", "measure", "settings")}


def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def evaluated(monkeypatch):
    """How many cells went through a model."""
    counts = []
    original = experiment_module.run_pass

    def counting(model, some, measure, cells, **kwargs):
        counts.append(len(cells))
        return original(model, some, measure, cells, **kwargs)

    monkeypatch.setattr(experiment_module, "run_pass", counting)
    return counts


def die_after(monkeypatch, chunks, error, half_a_line=False):
    """Let the process die when the next chunk is to be written."""
    original, written = run_module.append_jsonl, []

    def dying(path, lines):
        if len(written) == chunks:
            if half_a_line:
                with path.open("a") as file:
                    file.write('{"cell": 7, "val')
            raise error
        written.append(lines)
        return original(path, lines)

    monkeypatch.setattr(run_module, "append_jsonl", dying)


def test_the_folder_holds_the_plan_every_cell_and_the_result(tmp_path):
    folder = tmp_path / "new" / "curve"
    result = curve(folder)
    shown = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    assert shown == ["result.json", "rows.jsonl", "run.json"]
    written = rows(folder)
    assert sorted(row["cell"] for row in written) == list(range(CELLS))
    by_cell = {row["cell"]: row for row in written}
    assert [by_cell[i]["values"] for i in range(9)] == result.values
    assert [by_cell[9]["values"], by_cell[10]["values"]] == [result.finetuned, result.base]
    assert set(written[0]) == {"cell", "values", "touched", "change_norm"}
    plan = json.loads((folder / "run.json").read_text())
    assert plan["kind"] == "layer_curve"
    assert [cell["layer"] for cell in plan["identity"]["cells"][:3]] == [0, 1, 2]
    assert set(plan["models"]) == {"base", "finetuned"}
    back = PatchResult.load(folder / "result.json")
    assert (back.values, back.base, back.cells) == (result.values, result.base, result.cells)
    plain = curve()
    assert plain.values == result.values
    assert plain.settings == result.settings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("chunks", [0, 1, 6])
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch, evaluated, backend, error, chunks):
    tiny = pair("llama-gqa", backend)
    curve(tmp_path / "whole", tiny)
    with monkeypatch.context() as context:
        die_after(context, chunks, error, half_a_line=chunks == 1)
        with pytest.raises(type(error)):
            curve(tmp_path / "killed", tiny)
    assert not (tmp_path / "killed" / "result.json").exists()
    kept = rows(tmp_path / "killed") if chunks == 6 else []
    evaluated.clear()
    result = curve(tmp_path / "killed", tiny)
    assert sum(evaluated) == CELLS - chunks
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert (tmp_path / "killed" / "result.json").read_bytes() == (tmp_path / "whole" / "result.json").read_bytes()
    assert rows(tmp_path / "killed")[: len(kept)] == kept
    assert len({row["cell"] for row in rows(tmp_path / "killed")}) == len(rows(tmp_path / "killed")) == CELLS
    assert result.values == numbers(tmp_path / "whole")["values"]


def test_a_finished_run_is_not_computed_again(tmp_path, evaluated):
    first = curve(tmp_path)
    evaluated.clear()
    again = curve(tmp_path)
    assert evaluated == []
    assert (again.values, again.cells, again.settings) == (first.values, first.cells, first.settings)


def test_a_run_whose_answers_are_generated_is_resumed_too(tmp_path, evaluated):
    first = patch_span(pair(), prompts(THREE), layers=[0], out=tmp_path)
    evaluated.clear()
    assert patch_span(pair(), prompts(THREE), layers=[0], out=tmp_path).values == first.values
    assert evaluated == []


@pytest.mark.parametrize("torn", ['{"cell": 3, "values": [0.1', "{", '{"cell": 10, "values": [1.0,\n'])
def test_a_last_line_that_a_kill_cut_off_is_survived(tmp_path, evaluated, torn):
    whole = curve(tmp_path)
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + torn.rstrip("\n"))
    evaluated.clear()
    assert curve(tmp_path).values == whole.values
    assert sum(evaluated) == CELLS - 5
    assert len(rows(tmp_path)) == CELLS


def test_another_broken_line_is_named(tmp_path):
    curve(tmp_path)
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "not json\n", *lines[2:]]))
    with pytest.raises(LensError, match=r"line 2 of .*rows.jsonl is not a JSON object"):
        curve(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(LensError, match=r"run.json is not valid JSON"):
        curve(tmp_path)


@needs_hooked
def test_a_folder_with_another_experiment_is_refused(tmp_path):
    curve(tmp_path)

    def there():
        return {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name[0] != "."}

    before = there()
    other_answers = AnswerContrast(contrast().against, contrast().towards)
    behaviour = GeneratedBehaviour(get_behaviour("words"), max_new_tokens=1)
    empty = PatchSettings(postfix_donor="empty_query", chat=chat())
    tries = [
        (r"settings\.seed is 0 there, 1 here", {"settings": PatchSettings(seed=1)}),
        (r"measure\.ids is", {"some": THREE[:2], "measure": contrast(prompts(THREE[:2]))}),
        (r"settings\.postfix_donor is 'own_prompt' there", {"settings": empty}),
        (r"settings\.backend is 'bridge' there, 'hooked' here", {"tiny": pair("llama-gqa", "hooked")}),
        (r"settings\.names\.finetuned is", {"tiny": pair(step=0.02)}),
        (r"measure\.ids is", {"measure": other_answers}),
        (r"measure\.name is 'answer contrast' there, 'words' here", {"measure": behaviour}),
        ("cells is", {"flow": "infect"}),
        ("cells is", {"layers": [0, 1]}),
        ("cells is", {"sites": "k"}),
        ("cells is", {"control_layers": 2}),
    ]
    for pattern, changes in tries:
        with pytest.raises(LensError, match=rf"belongs to another run: .*{pattern}.*; choose another folder") as error:
            curve(tmp_path, **changes)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 900
    with pytest.raises(LensError, match="holds a run of layer_curve, asked is layer_head: choose another folder"):
        layer_head_map(pair(), prompts(THREE), measure=contrast(), out=tmp_path)
    kept = there()
    assert {n: x for n, x in kept.items() if n != "run.json"} == {n: x for n, x in before.items() if n != "run.json"}


def test_a_folder_of_other_models_is_refused(tmp_path):
    """The same names and settings, but other weights."""
    curve(tmp_path)
    other = pair(step=0.02)
    other.names = dict(pair().names)
    with pytest.raises(LensError, match="belongs to a run with another finetuned model: choose another folder"):
        curve(tmp_path, other)
    assert len(rows(tmp_path)) == CELLS


def test_every_kind_of_experiment_is_resumed_by_the_same_call(tmp_path, evaluated):
    run = {"measure": contrast()}
    calls = {
        "span": lambda out: patch_span(pair(), prompts(THREE), ("prefix", "query"), tokens=[1], out=out, **run),
        "position": lambda out: layer_position_map(pair(), prompts(THREE), tokens=[0, 5], out=out, **run),
        "head": lambda out: layer_head_map(pair(), prompts(THREE), heads=(1,), out=str(out), **run),
        "carrier": lambda out: carrier_map(pair(), prompts(THREE), spans=("postfix",), bands=1, out=out, **run),
    }
    for name, call in calls.items():
        first = call(tmp_path / name)
        evaluated.clear()
        assert call(tmp_path / name).values == first.values, name
        assert evaluated == []


def test_numbers_are_written_with_nine_decimals_whether_resumed_or_not(tmp_path):
    values = np.array(curve(tmp_path).values)
    assert (np.round(values, 9) == values).all()


def planned(*parts):
    return [Planned({"series": "patched", "flow": "repair", "span": "prefix"}, tuple(parts))]


def test_a_plan_without_cells_and_a_model_that_breaks_are_refused(tmp_path):
    lab = Laboratory(pair(), prompts(THREE), PatchSettings())
    run = {"kind": "span", "measure": contrast()}
    with pytest.raises(LensError, match="no cell is left to run"):
        run_plan(lab, [], **run)
    with pytest.raises(LensError, match="no prompts"):
        Laboratory(pair(), [], PatchSettings())
    broken = prefix_activations(pair(), "base", prompts(THREE)[0], "v")
    broken["v", 1].fill_(float("nan"))
    with pytest.raises(LensError, match=r"cell 0 gave .*nan.*: the model does not stay finite under this patch"):
        run_plan(lab, planned(*patch(broken).parts), out=tmp_path, **run)
    assert not (tmp_path / "result.json").exists()


def test_any_intervention_can_be_a_cell():
    """The engine takes more than patches: here an ablation and nothing at all."""
    plan = [*planned(*zero("v", span="prefix").parts), *planned()]
    lab = Laboratory(pair(), prompts(THREE), PatchSettings())
    result = run_plan(lab, plan, "span", contrast())
    assert result.values[1] == pytest.approx(result.finetuned, abs=1e-6)
    assert result.values[0] != pytest.approx(result.finetuned, abs=1e-2)
    assert (result.cells[1]["touched"], result.cells[1]["change_norm"]) == (0, 0)


def test_progress_counts_the_cells_that_are_left(tmp_path, monkeypatch):
    shown = []
    original = experiment_module.counting

    def counting(total):
        shown.append(total)
        return original(total)

    monkeypatch.setattr(experiment_module, "counting", counting)
    curve(tmp_path)
    curve(tmp_path)
    assert shown == [CELLS, 0]
