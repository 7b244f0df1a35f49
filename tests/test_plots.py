"""Figures hold the numbers they were given, with their labels shown literally."""

import html
import math
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piggyback_lens.errors import LensError
from piggyback_lens.figures import plots
from piggyback_lens.figures.plot_style import whole_steps
from piggyback_lens.figures.plots import Axis

fixed = settings(deadline=None, derandomize=True, max_examples=100, database=None)
TOKENS = ["<|im_start|>", "\n", " ", "<b>", "<br>", "$x$", "&amp;", "%{x}", "<a href='x'>", " the", "\n", ""]


def numbers(value: object) -> list[float]:
    return [float(x) for x in value]


def all_font_sizes(node: object) -> list[float]:
    """Sizes of every font anywhere in a figure's layout and traces."""
    if isinstance(node, dict):
        own = [v["size"] for k, v in node.items() if k.endswith("font") and isinstance(v, dict) and "size" in v]
        return own + [size for value in node.values() for size in all_font_sizes(value)]
    if isinstance(node, list | tuple):
        return [size for value in node for size in all_font_sizes(value)]
    return []


def summary(unit_scale: float = 1.0) -> pd.DataFrame:
    rows = []
    for topic, factor in (("off-topic", 1.0), ("on-topic", 0.1)):
        for key, name, mean, recovery in (
            ("base", "base", 40.0, 1.0),
            ("finetuned", "finetuned", 18.0, 0.0),
            ("prefix_kv", "base's <b>prefix</b> K/V", 38.0, 0.91),
            ("identity", "identity control", 18.0, 0.0),
            ("random", "random directions", 18.5, 0.02),
        ):
            value = mean * factor * unit_scale
            defined = topic == "off-topic"
            rows.append(
                {
                    "topic": topic,
                    "condition": key,
                    "condition_label": name,
                    "n": 40 if defined else 20,
                    "value": value,
                    "low": value - 2 * factor * unit_scale,
                    "high": value + 3 * factor * unit_scale,
                    "recovery": recovery if defined else math.nan,
                    "recovery_low": recovery - 0.05 if defined else math.nan,
                    "recovery_high": recovery + 0.05 if defined else math.nan,
                    "reason": "" if defined else "base and finetuned do not differ beyond noise",
                    "is_control": key == "random",
                }
            )
    return pd.DataFrame(rows)


def curve() -> pd.DataFrame:
    layer = np.arange(6)
    value = np.array([1.0, 0.9, 0.7, np.nan, 0.2, 0.0])
    patched = pd.DataFrame({"layer": layer, "value": value, "low": value - 0.1, "high": value + 0.2, "n": 40})
    control = pd.DataFrame({"layer": layer, "value": 0.0, "low": 0.0, "high": 0.0, "n": 40})
    return pd.concat([patched.assign(series="patch <b>prefix</b>"), control.assign(series="identity control")])


@pytest.fixture(scope="module")
def figures() -> dict[str, go.Figure]:
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [2.0, 1.5, 1.2], "kv_drift": [0.0, 0.1, 0.1]})
    history = history.assign(lr=1e-4, grad_norm=1.0, tokens=900, seconds=1.0)
    return {
        "conditions": plots.conditions_figure(summary(), label="words per answer", unit="words", title="T"),
        "curve": plots.layer_curve_figure(curve(), title="T", y_label="recovery (fraction)", noise_floor=0.05),
        "map": plots.heatmap_figure(
            np.eye(2),
            Axis("head", [0, 1]),
            Axis("layer", ["a", "b"]),
            heading=("T", ""),
            quantity="KL (nats)",
        ),
        "history": plots.history_figure(history),
    }


def test_every_figure_is_a_figure_on_white_with_a_title_and_legible_type(figures):
    for figure in figures.values():
        assert isinstance(figure, go.Figure)
        assert figure.layout.title.text
        assert figure.layout.template == pio.templates["plotly_white"]
        assert figure.layout.height > 300
        assert "sendChartToCloud" in figure.layout.modebar.remove
        written = {k: v for k, v in figure.to_plotly_json()["layout"].items() if k != "template"}
        assert min(all_font_sizes([written, figure.to_plotly_json()["data"]])) >= 13


# --- literal text ------------------------------------------------------------------------------------


@fixed
@given(st.text())
def test_literal_text_has_nothing_that_plotly_reads_as_markup_and_reads_as_it_was(text):
    shown = plots.plot_text(text)
    assert not re.search(r"[<>$\n]|%\{|&(?!lt;|gt;|amp;|#36;|#123;)", shown)
    if text.strip(" "):
        back = html.unescape(shown).replace("⏎", "\n").replace("␍", "\r").replace("⇥", "\t")
        assert back == text.replace("⏎", "\n").replace("␍", "\r").replace("⇥", "\t")


def test_white_space_shows_and_long_text_is_cut_before_it_is_escaped():
    assert plots.plot_text("\n") == "⏎"
    assert plots.plot_text("  ") == "··"
    assert plots.plot_text("<<<<<", limit=3) == "&lt;&lt;…"
    assert plots.plot_text(12) == "12"


def test_map_labels_show_tokens_literally_and_may_repeat():
    figure = plots.heatmap_figure(
        np.arange(12.0).reshape(1, 12),
        Axis("<br>", TOKENS),
        Axis("$y$", ["<i>layer</i>"]),
        heading=("<b>bold</b>", ""),
        quantity="%{z}",
    )
    labels = figure.layout.xaxis.ticktext
    assert len(labels) == 12
    assert labels[0] == "&lt;|im_start|&gt;"
    assert labels[1] == labels[10] == "⏎"
    assert labels[3:8] == ("&lt;b&gt;", "&lt;br&gt;", "&#36;x&#36;", "&amp;amp;", "%&#123;x}")
    assert list(figure.layout.xaxis.tickvals) == list(range(12))
    assert numbers(figure.to_plotly_json()["data"][0]["z"]["bdata"] and figure.data[0].z[0]) == list(range(12))
    assert figure.layout.title.text == "&lt;b&gt;bold&lt;/b&gt;"
    assert figure.layout.xaxis.title.text == "&lt;br&gt;"
    assert figure.layout.yaxis.title.text == "&#36;y&#36;"
    assert "%{z}" not in figure.data[0].colorbar.title.text
    assert figure.data[0].text[0][3] == "&#36;y&#36; &lt;i&gt;layer&lt;/i&gt;<br>&lt;br&gt; &lt;b&gt;"


def test_labels_of_conditions_and_series_are_literal_everywhere(figures):
    for name in ("conditions", "curve"):
        text = str(figures[name].to_plotly_json())
        assert "<b>prefix</b>" not in text
        assert "&lt;b&gt;prefix&lt;/b&gt;" in text


# --- conditions --------------------------------------------------------------------------------------


def dots(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.mode == "markers"]


def test_conditions_stand_in_their_order_with_mean_and_interval(figures):
    figure = figures["conditions"]
    assert figure.layout.yaxis.ticktext[0] == "base"
    assert figure.layout.yaxis.ticktext[3] == "identity control"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first condition is on top
    dot = dots(figure)[2]
    assert (dot.x[0], dot.y[0]) == (38.0, 2)
    assert dot.error_x.array[0] == pytest.approx(3.0)
    assert dot.error_x.arrayminus[0] == pytest.approx(2.0)
    assert len(dots(figure)) == 10
    assert {trace.xaxis for trace in dots(figure)} == {"x", "x2"}


def test_numbers_n_and_recovery_are_written_beside_the_dots(figures):
    notes = [note.text for note in figures["conditions"].layout.annotations]
    assert "off-topic (n = 40)" in notes
    assert "on-topic (n = 20)" in notes
    assert "38.0 [36.0, 41.0]" in notes
    assert "recovery 91 % [86, 96]" in notes
    # undefined on-topic, and of the two models it says nothing
    assert sum("recovery" in note for note in notes) == 3
    hover = dots(figures["conditions"])[7].hovertemplate
    assert "do not differ beyond noise" in hover
    assert "n = 20" in hover


def test_base_and_finetuned_are_reference_lines_in_each_panel(figures):
    lines = [(shape.x0, shape.xref, shape.line.color) for shape in figures["conditions"].layout.shapes]
    assert lines == [
        (40.0, "x", "#0072B2"),
        (18.0, "x", "#D55E00"),
        (4.0, "x2", "#0072B2"),
        (pytest.approx(1.8), "x2", "#D55E00"),
    ]


def test_controls_are_hollow_by_key_or_by_column(figures):
    hollow = [trace.marker.color == "white" for trace in dots(figures["conditions"])]
    assert hollow == [False, False, False, True, True] * 2
    assert "hollow: control" in figures["conditions"].layout.title.subtitle.text
    plain = summary().query("condition in ['base', 'finetuned', 'prefix_kv']").drop(columns="is_control")
    figure = plots.conditions_figure(plain, label="words per answer", unit="words", title="T")
    assert "control" not in figure.layout.title.subtitle.text


def test_a_missing_measure_is_named_and_not_drawn():
    frame = summary()
    frame.loc[2, ["value", "low", "high", "recovery"]] = math.nan
    frame.loc[2, "reason"] = "the judge <failed>"
    figure = plots.conditions_figure(frame, label="words per answer", unit="words", title="T")
    assert len(dots(figure)) == 9
    assert any(note.text == "missing: the judge &lt;failed&gt;" for note in figure.layout.annotations)


def test_a_mean_without_interval_has_no_bar():
    frame = summary()
    frame.loc[2, ["low", "high"]] = math.nan
    figure = plots.conditions_figure(frame, label="words per answer", unit="words", title="T")
    assert dots(figure)[2].error_x.array is None
    assert any(note.text == "38.0 (no interval)" for note in figure.layout.annotations)


def test_a_rate_is_drawn_on_its_whole_scale_and_units_are_on_the_axis():
    figure = plots.conditions_figure(summary(0.02), label="refusal rate", unit="rate 0..1", title="T")
    assert figure.layout.xaxis.range[0] < 0 < 1 < figure.layout.xaxis.range[1]
    assert figure.layout.xaxis.title.text == "refusal rate (0..1)"
    other = plots.conditions_figure(summary(), label="answer length", unit="words", title="T")
    assert other.layout.xaxis.title.text == "answer length (words)"


def test_small_numbers_keep_their_digits():
    frame = summary(0.0001)
    figure = plots.conditions_figure(frame, label="KL", unit="nats per token", title="T")
    assert any(note.text == "0.0038 [0.0036, 0.0041]" for note in figure.layout.annotations)


def test_one_topic_fills_the_width():
    figure = plots.conditions_figure(summary().query("topic == 'off-topic'"), label="w", unit="words", title="T")
    assert tuple(figure.layout.xaxis.domain) == (0.0, 1.0)


# --- curves ------------------------------------------------------------------------------------------


def test_the_curve_has_the_values_with_gaps_and_a_band_on_each_side_of_a_gap(figures):
    line = next(trace for trace in figures["curve"].data if trace.name == "patch &lt;b&gt;prefix&lt;/b&gt;")
    np.testing.assert_array_equal(numbers(line.y), [1.0, 0.9, 0.7, math.nan, 0.2, 0.0])
    assert line.text[0] == "1.00 [0.90, 1.20], n = 40"
    assert line.text[3].startswith("missing")
    bands = [trace for trace in figures["curve"].data if trace.fill == "toself"]
    assert [len(band.x) for band in bands] == [6, 4, 12]  # three layers, two layers, the control's six
    np.testing.assert_allclose(numbers(bands[1].y), [0.4, 0.2, -0.1, 0.1])


def test_controls_are_grey_and_hollow_and_series_differ_in_more_than_colour(figures):
    lines = [trace for trace in figures["curve"].data if trace.mode == "lines+markers"]
    assert [line.marker.color for line in lines] == ["#0072B2", "white"]
    assert len({(line.line.dash, line.marker.symbol) for line in lines}) == 2


def test_reference_lines_and_noise_floor_are_drawn_and_named(figures):
    figure = figures["curve"]
    heights = sorted(shape.y0 for shape in figure.layout.shapes)
    assert heights == [-0.05, 0.0, 0.05, 1.0]
    assert {note.text for note in figure.layout.annotations} == {"0 = finetuned", "1 = base restored"}
    assert any("noise floor, ±0.05" in (trace.name or "") for trace in figure.data)
    bare = plots.layer_curve_figure(curve(), title="T", y_label="KL (nats per token)", references={})
    assert len(bare.layout.shapes) == 0


def test_one_wild_interval_does_not_flatten_the_curve():
    frame = curve()
    frame.loc[frame["layer"] == 1, "high"] = 1000.0
    figure = plots.layer_curve_figure(frame, title="T", y_label="recovery (fraction)")
    assert figure.layout.yaxis.range[1] < 2.5
    assert "cut at the edges" in figure.layout.title.subtitle.text


def test_a_control_at_some_layers_is_points_with_bars_and_one_at_all_layers_a_line(figures):
    frame = curve()
    few = frame[(frame["series"] != "identity control") | frame["layer"].isin([0, 5])]
    points = plots.layer_curve_figure(few, title="T", y_label="y").data[-1]
    assert (points.mode, list(points.x)) == ("markers", [0, 5])
    assert numbers(points.error_y.array) == [0.0, 0.0]
    assert figures["curve"].data[-2].mode == "lines+markers"


def test_a_reference_far_beyond_the_values_is_named_at_the_edge_and_names_never_overlap():
    layer = np.arange(4)
    frame = pd.DataFrame({"layer": layer, "value": 0.005 * layer, "series": "patched"})
    frame = frame.assign(low=frame["value"], high=frame["value"])
    lines = {0.0: "0 = finetuned", 1.0: "1 = base", 0.001: "0.00 = all layers' K/V"}
    figure = plots.layer_curve_figure(frame, title="T", y_label="y", references=lines, noise_floor=3e-7)
    assert figure.layout.yaxis.range[1] < 0.02
    assert sorted(shape.y0 for shape in figure.layout.shapes) == [0.0, 0.001]
    notes = figure.layout.annotations
    assert {note.text for note in notes} == {"0 = finetuned", "1 = base ↑", "0.00 = all layers' K/V"}
    apart = np.diff(sorted(note.y for note in notes)) / np.ptp(figure.layout.yaxis.range) * 400
    assert apart.min() > 18
    assert figure.layout.margin.r > 7 * len("0.00 = all layers' K/V")  # no name is clipped
    assert "numerical noise ±3e-07" in figure.layout.title.subtitle.text


def test_thirty_layers_label_at_most_twenty_of_them():
    layer = np.arange(30)
    frame = pd.DataFrame({"layer": layer, "value": 0.5, "low": math.nan, "high": math.nan, "series": "s"})
    figure = plots.layer_curve_figure(frame, title="T", y_label="y")
    assert figure.layout.xaxis.dtick == 2
    assert figure.layout.xaxis.range[0] > -1
    assert figure.layout.xaxis.range[1] < 30
    assert "interval" not in figure.layout.title.subtitle.text


# --- maps and history --------------------------------------------------------------------------------


def heatmap(z: np.ndarray) -> go.Figure:
    rows, columns = z.shape
    return plots.heatmap_figure(z, Axis("x", range(columns)), Axis("y", range(rows)), heading=("T", ""), quantity="c")


def test_the_scale_is_symmetric_and_white_at_zero():
    signed = heatmap(np.array([[-0.2, 0.1], [0.0, 0.05]])).data[0]
    assert (signed.zmin, signed.zmax) == (pytest.approx(-0.2), pytest.approx(0.2))
    assert dict(signed.colorscale)[0.5] == "#FFFFFF"
    assert heatmap(np.zeros((2, 2))).data[0].zmax == 1.0


def test_missing_cells_are_announced():
    figure = heatmap(np.array([[1.0, math.nan]]))
    assert figure.layout.title.subtitle.text == "grey: missing"
    assert all(math.isfinite(x) for x in (figure.data[0].zmin, figure.data[0].zmax))
    assert heatmap(np.full((2, 2), math.nan)).data[0].zmax == 1.0


def test_a_map_of_thirty_layers_by_twenty_four_tokens_is_small():
    tokens = (TOKENS * 2)[:24]
    z = np.random.default_rng(0).normal(size=(30, 24))
    figure = plots.heatmap_figure(
        z,
        Axis("token", tokens),
        Axis("layer", range(30)),
        heading=("T", ""),
        quantity="KL (nats per token)",
    )
    assert len(figure.to_json()) < 300_000


def test_many_labels_are_thinned_and_labels_that_do_not_fit_the_map_refused():
    figure = heatmap(np.zeros((3, 200)))
    assert len(figure.layout.xaxis.ticktext) <= 44
    assert figure.layout.xaxis.ticktext[1] == str(figure.layout.xaxis.tickvals[1])
    with pytest.raises(LensError, match=r"shape \(2, 3\), its labels say \(2, 2\)"):
        plots.heatmap_figure(np.zeros((2, 3)), Axis("x", [0, 1]), Axis("y", [0, 1]), heading=("T", ""), quantity="c")


def test_history_draws_losses_then_gradient_norm_and_rate_and_no_bookkeeping(figures):
    titles = [note.text for note in figures["history"].layout.annotations]
    assert titles == [
        "loss (nats per token)",
        "kv_drift (nats per token)",
        "gradient norm before clipping",
        "learning rate",
    ]
    assert numbers(figures["history"].data[0].y) == [2.0, 1.5, 1.2]
    assert figures["history"].layout.xaxis4.title.text == "step"


def test_a_history_ends_where_the_run_ended_and_draws_no_panel_twice():
    history = pd.DataFrame({"step": [1, 2, 3, 4], "loss": [2.0, 1.5, 1.2, 1.1]})
    plain = plots.history_figure(history.assign(sft=history["loss"], norm=[0.0, 1.0, 1.5, 1.7]))
    titles = [note.text for note in plain.layout.annotations]
    assert titles == ["loss (nats per token)", "norm of the solution"]
    assert "sft is the whole loss" in plain.layout.title.subtitle.text
    axis = plain.layout.xaxis
    assert (axis.dtick, axis.tickformat) == (1, "d")
    assert 0.9 < axis.range[0] < 1
    assert 4 < axis.range[1] < 4.1
    two = plots.history_figure(history.assign(sft=[1.0, 1.0, 1.0, 1.0], kl_retain=[1.0, 0.5, 0.2, 0.1]))
    assert len(two.layout.annotations) == 3


def test_steps_of_an_axis_are_whole_and_few():
    assert whole_steps([0.0, 3.0])["dtick"] == 1
    assert whole_steps([0.0, 29.0], most=20)["dtick"] == 2
    assert whole_steps([1.0, 480.0])["dtick"] == 50
    assert whole_steps([8.0])["range"] == [7.5, 8.5]


def test_frames_without_what_a_figure_needs_are_refused():
    with pytest.raises(LensError, match="lacks recovery"):
        plots.conditions_figure(summary().drop(columns="recovery"), label="w", unit="words", title="T")
    with pytest.raises(LensError, match="no rows"):
        plots.layer_curve_figure(curve().head(0), title="T", y_label="y")
    with pytest.raises(LensError, match="such as loss"):
        plots.history_figure(pd.DataFrame({"step": [1]}))
