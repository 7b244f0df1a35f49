"""What a patching result says: recovery by hand, noise floor, the largest cells, files."""

import dataclasses
import json
import re

import jaxtyping
import numpy as np
import pytest
from tiny_hooked import prompts
from tiny_pairs import THREE, contrast, pair

from piggyback_lens.errors import LensError
from piggyback_lens.experiments.patching import layer_head_map, layer_position_map
from piggyback_lens.experiments.results import PatchResult
from piggyback_lens.intervals import recovery

BASE = [-2.0, -1.8, -2.2, -2.1, -1.9, -2.0]
FINETUNED = [2.0, 2.2, 1.9, 2.1, 1.8, 2.0]
NAN = float("nan")


def cell(series="patched", flow="repair", **more):
    return {"series": series, "flow": flow, "span": "prefix", "sites": "k+v", "layers": [0], **more}


def moved(recipient, donor, share):
    return [r + share * (d - r) for r, d in zip(recipient, donor, strict=True)]


def small(**changes):
    """Recoveries of 0.25, 1 and -0.5 (repair), 0.75 (infect), with controls."""
    rows = [
        (cell(layer=0), moved(FINETUNED, BASE, 0.25)),
        (cell(layer=1), moved(FINETUNED, BASE, 1.0)),
        (cell(layer=2), moved(FINETUNED, BASE, -0.5)),
        (cell(flow="infect", layer=0), moved(BASE, FINETUNED, 0.75)),
        (cell("identity control", layer=0), [x + 0.004 for x in FINETUNED]),
        (cell("identity control", "infect", layer=0), [x - 0.008 for x in BASE]),
        (cell("random control", layer=0), moved(FINETUNED, BASE, 0.9)),
    ]
    facts = {"names": {"base": "tiny", "finetuned": "tuned"}, "n": 6, "seed": 0}
    result = PatchResult(
        "layer_curve",
        tuple(labels for labels, _ in rows),
        [values for _, values in rows],
        BASE,
        FINETUNED,
        {"name": "answer contrast", "unit": "nats per token"},
        facts,
    )
    return dataclasses.replace(result, **changes)


def test_recovery_runs_from_the_recipient_to_the_donor():
    result = small()
    values = [result.recovery(i).value for i in range(len(result.cells))]
    gap = np.mean(BASE) - np.mean(FINETUNED)
    assert values == pytest.approx([0.25, 1.0, -0.5, 0.75, 0.004 / gap, -0.008 / -gap, 0.9], abs=1e-9)
    found = result.recovery(0)
    expected = recovery(result.values[0], FINETUNED, BASE)
    assert (found.value, found.low, found.high, found.n) == (expected.value, expected.low, expected.high, 6)


def test_recovery_is_of_the_means_and_not_a_mean_of_recoveries():
    patched = [0.0, 0.0, 1.9, 2.1, 1.8, 2.0]
    result = small(cells=(cell(),), values=[patched])
    expected = (np.mean(patched) - np.mean(FINETUNED)) / (np.mean(BASE) - np.mean(FINETUNED))
    assert result.recovery(0).value == pytest.approx(expected)


def test_the_frame_has_one_row_per_cell_with_labels_and_numbers():
    result = small()
    frame = result.to_frame()
    labels = {"series", "flow", "span", "sites", "layers", "layer"}
    assert set(frame.columns) == labels | {"value", "low", "high", "n", "reason", "raw"}
    assert len(frame) == len(result.cells)
    row = frame.iloc[3]
    assert (row["flow"], row["value"], row["n"]) == ("infect", pytest.approx(0.75), 6)
    assert row["low"] <= row["value"] <= row["high"]
    assert row["raw"] == pytest.approx(np.mean(result.values[3]))
    frame["value"] = 0.0
    assert result.to_frame()["value"].iloc[1] == pytest.approx(1.0)


def test_a_control_of_other_tokens_says_what_it_holds_in_the_frame():
    held = {"other_tokens": {"query": [0, 3], "postfix": [0, 1, 2]}, "whole_spans": ["postfix"]}
    labels = (cell(band="all layers"), cell("other tokens control", band="all layers", **held))
    frame = small(kind="carrier", cells=labels, values=[moved(FINETUNED, BASE, 0.2), BASE]).to_frame()
    assert frame["contains"].tolist()[1] == "2 query + all 3 postfix tokens"
    assert frame["contains"].isna().tolist() == [True, False]
    ticks = " ".join(small(kind="carrier", cells=labels, values=[BASE, BASE]).figure().layout.yaxis.ticktext)
    assert "instead of prefix: 2 query + all 3 postfix tokens" in ticks


def test_a_figure_of_nothing_defined_says_why_and_its_report_has_no_empty_table():
    labels = (cell(band="all layers"),)
    same = small(kind="carrier", cells=labels, values=[BASE], base=FINETUNED, finetuned=FINETUNED)
    notes = [note.text for note in same.figure().layout.annotations]
    assert any("no recovery is defined here" in text and "do not differ" in text for text in notes)
    assert same.report().summary.empty
    assert len(same.report().figures) == 1  # no plane of nothing


def test_where_the_models_do_not_differ_there_is_a_reason_and_no_number():
    frame = small(base=FINETUNED).to_frame()
    assert frame["value"].isna().all()
    assert frame["reason"].str.contains("base and finetuned do not differ").all()
    two = small(cells=(cell(),), values=[FINETUNED[:2]], base=BASE[:2], finetuned=FINETUNED[:2]).to_frame()
    assert "only 2 complete prompts" in two["reason"].iloc[0]


def test_a_missing_value_leaves_its_prompt_out():
    values = [NAN, *moved(FINETUNED, BASE, 0.5)[1:]]
    result = small(cells=(cell(),), values=[values])
    row = result.to_frame().iloc[0]
    assert (row["n"], row["value"]) == (5, pytest.approx(0.5))


def test_the_noise_floor_is_the_largest_identity_control_of_either_direction():
    assert small().noise_floor == pytest.approx(0.008 / (np.mean(FINETUNED) - np.mean(BASE)))
    assert np.isnan(small(cells=(cell(),), values=[BASE]).noise_floor)
    assert np.isnan(small(base=FINETUNED).noise_floor)


def test_the_top_cells_are_patched_ones_by_size():
    top = small().top(3)
    assert top["value"].tolist() == pytest.approx([1.0, 0.75, -0.5])
    assert set(top["series"]) == {"patched"}
    assert len(small().top()) == 4
    assert small(base=FINETUNED).top(2)["value"].isna().all()


# ---------------------------------------------------------------- files


def test_a_result_survives_being_saved(tmp_path):
    real = layer_position_map(pair(), prompts(THREE), tokens=[0, 12], measure=contrast())
    missing = small(values=[[NAN] * 6, *small().values[1:]], base=[NAN, *BASE[1:]])
    for i, result in enumerate((small(), real, missing)):
        path = result.save(tmp_path / "deep" / f"{i}.json")
        back = PatchResult.load(path)
        for name in ("values", "base", "finetuned"):
            np.testing.assert_array_equal(np.array(getattr(back, name)), np.array(getattr(result, name)))
        for name in ("kind", "cells", "measure", "settings"):
            assert getattr(back, name) == getattr(result, name), name
        assert "NaN" not in path.read_text()
        json.loads(path.read_text())
        assert back.to_frame().equals(result.to_frame())
    assert PatchResult.load(tmp_path / "deep" / "1.json").cells[0]["token"] == "<bos>"


@pytest.fixture
def unchecked():
    """As for a user, who does not run the library under a run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


BROKEN = {
    "nothing": "{}",
    "a list": "[]",
    "a number": "3",
    "another field": {"extra": 1},
    "no cells": {"cells": None},
    "a cell too few": {"cells": [cell()]},
    "a row too short": {"values": [[1.0], *small().values[1:]]},
    "text for a number": {"base": ["x", *BASE[1:]]},
    "settings that are a list": {"settings": [1]},
    "one side too short": {"finetuned": FINETUNED[:4]},
    "cells without labels": {"cells": [{}] * 7},
    "cells that are numbers": {"cells": [1] * 7},
    "a measure without a name": {"measure": None},
    "a flow that is none": {"cells": [cell() | {"flow": "up"}] * 7},
    "layers that are no numbers": {"cells": [cell() | {"layers": [1.5]}] * 7},
    "a list for a kind": {"kind": ["span"]},
    "a true for a number": {"base": [True, *BASE[1:]]},
    "a number that is written as text": {"base": ["1.5", *BASE[1:]]},
    "another version": {"format": "piggyback_lens.patch.2"},
    "another kind of result": {"format": "piggyback_lens.curve.1"},
    "brackets without end": "[" * 100_000,
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_result_is_refused(tmp_path, broken, unchecked):
    path = small().save(tmp_path / "bad.json")
    if isinstance(broken, str):
        path.write_text(broken)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **broken}))
    told = r"bad.json (is no (whole )?PatchResult|says no format|is of format|is not valid JSON)"
    with pytest.raises(LensError, match=told) as error:
        PatchResult.load(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_result_is_shown_in_few_letters_and_its_texts_escaped():
    evil = small(cells=tuple(c | {"span": f"<script>\x1b[31m{i}"} for i, c in enumerate(small().cells)))
    assert len(repr(evil)) <= 300
    assert "\x1b" not in repr(evil)
    shown = evil._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "\x1b" not in shown
    assert "recovery 1.00" in repr(small())
    assert "recovery 1.00" in shown


def test_a_shown_result_leaves_out_what_is_the_same_in_all_rows_and_never_its_numbers():
    frame, shown = small().to_frame(), small()._repr_html_()
    columns = re.findall(r"<th>(\w+)</th>", shown)
    alike = {name for name in frame if frame[name].astype(str).nunique() == 1}
    assert alike > {"n", "span"}
    assert {"value", "low", "high", "n"} <= set(columns)
    assert not (alike - {"value", "low", "high", "n"}) & set(columns)
    assert columns == [name for name in frame if name in columns]
    assert "-0<" not in shown


def test_the_reference_of_a_curve_and_controls_are_never_its_strongest_cell():
    cells = [cell | {"mode": "single", "layer": i} for i, cell in enumerate(small().cells)]
    cells[2] |= {"mode": "all layers", "layer": -1}
    values = [*small().values[:2], moved(FINETUNED, BASE, 1.5), *small().values[3:]]
    result = small(cells=tuple(cells), values=values)
    best = result.top(1).iloc[0]
    assert (best["layer"], best["mode"], best["series"]) != (-1, "all layers", "patched")
    assert f"layer {best['layer']}, recovery {best['value']:.2f}" in result.verdict
    assert "np." not in result.verdict
    few = small(cells=(cell(),), values=[FINETUNED[:2]], base=BASE[:2], finetuned=FINETUNED[:2])
    assert few.verdict == "Strongest cell of 1: repair at prefix k+v, layers 0, recovery 0.00 (no interval) (n = 2)."


def test_a_table_for_spreadsheets_holds_no_formula(tmp_path):
    result = small(cells=tuple(c | {"span": "=HYPERLINK(1)"} for c in small().cells))
    text = result.to_csv(tmp_path / "t.csv").read_text()
    assert "'=HYPERLINK(1)" in text
    assert ",=HYPERLINK" not in text


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(LensError, match=r"none.json cannot be read"):
        PatchResult.load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"kind": "span", ')
    with pytest.raises(LensError, match=r"torn.json is not valid JSON"):
        PatchResult.load(tmp_path / "torn.json")


def test_the_numbers_of_a_real_map_are_those_of_its_frame():
    result = layer_head_map(pair(), prompts(THREE), layers=[1], measure=contrast(), control_cells=1)
    frame = result.to_frame()
    assert {"layer", "head", "label", "group", "touched", "change_norm", "heads"} <= set(frame.columns)
    np.testing.assert_allclose(frame["raw"], np.mean(result.values, axis=1))
    assert (frame["head"][:4].tolist(), frame["series"].tolist()[4:]) == (
        [0, 1, 2, 3], ["identity control", "random control"])  # fmt: skip
