"""Maps, carrier figures, dot plots and the attribution check hold the numbers of the frames they were given."""

import html
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from test_plots import all_font_sizes, numbers

from piggyback_lens.errors import LensError
from piggyback_lens.figures.attribution_plot import attribution_check_figure
from piggyback_lens.figures.carrier_plots import carrier_map_figure, carrier_plane_figure
from piggyback_lens.figures.map_plots import head_map_figure, recovery_map_figure
from piggyback_lens.figures.perturbation_plot import perturbation_figure, stress_figure

TOKENS = ["<|im_start|>", "\n", "<script>", "$x$", "\n", "%{z}"]
REASON = "base and finetuned do not differ beyond noise <script>"


def row(value: float, **labels: object) -> dict[str, object]:
    ends = {"low": value - 0.05, "high": value + 0.1, "n": 40, "reason": REASON if math.isnan(value) else ""}
    return {"series": "patched", "value": value, **ends, **labels}


def layer_token(layers: int = 4, tokens: int = 6) -> pd.DataFrame:
    """Recovery 0.1·layer + 0.01·position; one cell missing; rows not in the order of their layers."""
    rows = [
        row(0.1 * layer + 0.01 * position, layer=layer, position=position, token=TOKENS[position % len(TOKENS)])
        for layer in reversed(range(layers))
        for position in range(tokens)
    ]
    rows[0] |= {"value": math.nan, "low": math.nan, "high": math.nan, "reason": REASON}
    rows.append({**row(0.77, layer=0, position=0, token="no"), "series": "identity control"})
    return pd.DataFrame(rows)


def layer_head(groups: bool = True) -> pd.DataFrame:
    rows = [
        row(0.1 * head, layer=layer, head=head, group=f"kv {head // 3} (q {head // 3 * 3}-{head // 3 * 3 + 2})")
        for layer in range(3)
        for head in range(6)
    ]
    return pd.DataFrame(rows) if groups else pd.DataFrame(rows).drop(columns="group")


def carriers(controls: bool = True) -> pd.DataFrame:
    rows = []
    for flow, factor in (("repair", 1.0), ("infect", 0.5)):
        for sites, scale in (("k+v", 1.0), ("resid_pre", 0.8)):
            for i, span in enumerate(("prefix", "<script>")):
                for j, band in enumerate(("layers 0-9", "layers 10-19", "$all$")):
                    place = {"flow": flow, "span": span, "sites": sites, "band": band}
                    rows.append(row(factor * scale * (0.9 - 0.4 * i - 0.2 * j), **place))
                    if controls and span == "prefix":
                        rows.append(row(0.004, **place) | {"series": "identity control"})
                        rows.append(row(-0.03, **place) | {"series": "random control"})
    return pd.DataFrame(rows)


def perturbed() -> pd.DataFrame:
    kinds = (("base", 40.0), ("unperturbed", 18.0), ("best", 36.0), ("average", 30.0), ("random tokens", 20.0))
    rows = [
        {"topic": topic, "span": span, "kind": kind, "value": m * f, "low": m * f - 2, "high": m * f + 3, "n": 40}
        for topic, f in (("off-topic", 1.0), ("on-topic", 0.5))
        for span in ("prefix", "<script>")
        for kind, m in kinds
    ]
    return pd.DataFrame(rows)


def stressed() -> pd.DataFrame:
    rows = []
    for family, variant in (("system", "none"), ("system", "<script>"), ("spelling", "upper $case$")):
        for model, mean in (("base", 40.0), ("finetuned", 15.0)):
            rows.append({"family": family, "variant": variant, "model": model, "value": mean, "n": 20})
    return pd.DataFrame(rows).assign(low=lambda f: f["value"] - 1, high=lambda f: f["value"] + 2)


def checked() -> pd.DataFrame:
    estimate, exact = [0.1, 0.2, 0.3, 0.4, math.nan], [0.0, 0.3, 0.2, 0.5, 0.1]
    frame = pd.DataFrame({"attribution": estimate, "exact": exact, "layer": range(5), "token": TOKENS[:5], "n": 40})
    return frame.assign(low=frame["exact"] - 0.1, high=frame["exact"] + 0.2)


def layer_map(frame: pd.DataFrame, **settings: object) -> go.Figure:
    return recovery_map_figure(frame, x="position", y="layer", x_text="token", title="<i>T</i>", **settings)


def subtitle(figure: go.Figure) -> str:
    return str(figure.layout.title.subtitle.text).replace("<br>", " ")


def words(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


@pytest.fixture(scope="module")
def figures() -> dict[str, go.Figure]:
    behaviour = {"label": "answer length", "unit": "words", "title": "<i>T</i>"}
    return {
        "map": layer_map(layer_token(), noise_floor=0.03),
        "heads": head_map_figure(layer_head(), title="<i>T</i>", noise_floor=0.03, text=True),
        "carriers": carrier_map_figure(carriers(), title="<i>T</i>", noise_floor=0.01),
        "plane": carrier_plane_figure(carriers(), title="<i>T</i>", noise_floor=0.01),
        "perturbation": perturbation_figure(perturbed(), **behaviour),
        "stress": stress_figure(stressed(), **behaviour),
        "attribution": attribution_check_figure(checked(), title="<i>T</i>", noise_floor=0.02, rank_correlation=0.8),
    }


# --- all of them -------------------------------------------------------------------------------------


def test_every_figure_has_the_house_style_its_n_and_says_what_its_interval_is(figures):
    for name, figure in figures.items():
        assert figure.layout.title.text == "&lt;i&gt;T&lt;/i&gt;", name
        written = figure.to_plotly_json()
        layout = {key: value for key, value in written["layout"].items() if key != "template"}
        assert min(all_font_sizes([layout, written["data"]])) >= 13, name
        assert f"n = {20 if name == 'stress' else 40}" in subtitle(figure), name
        assert "95 % " in subtitle(figure), name
        assert figure.layout.height >= 350, name


def test_no_text_of_the_user_becomes_markup_in_any_figure(figures):
    for name, figure in figures.items():
        text = figure.to_json()
        assert "script" in text or name == "heads"
        assert "<script" not in text, name
        assert "\\u003cscript" not in text, name  # plotly writes "<" like this
        assert "$" not in text, name
        assert "%{z}" not in text, name


def test_long_titles_and_subtitles_stay_within_the_width_and_above_the_panels():
    short = layer_map(layer_token())
    long = recovery_map_figure(
        layer_token(), x="position", y="layer", title="many words " * 12, subtitle="much to say " * 20
    )
    assert max(map(len, str(long.layout.title.text).split("<br>"))) <= 85
    assert max(map(len, str(long.layout.title.subtitle.text).split("<br>"))) <= 132
    assert long.layout.margin.t > short.layout.margin.t + 30
    assert long.layout.title.pad.t > short.layout.title.pad.t


def test_a_noise_floor_that_is_not_known_is_not_drawn():
    drawn = [
        layer_map(layer_token(), noise_floor=math.nan, text=True),
        carrier_map_figure(carriers(), title="T", noise_floor=math.nan),
        carrier_plane_figure(carriers(), title="T", noise_floor=math.nan),
        attribution_check_figure(checked(), title="T", noise_floor=math.nan),
    ]
    for figure in drawn:
        assert "noise" not in subtitle(figure)
        assert "nan" not in subtitle(figure)
        assert not [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert drawn[0].data[0].zmax == pytest.approx(0.35)


# --- layer × token -----------------------------------------------------------------------------------


def test_the_map_holds_the_patched_values_with_layer_0_at_the_bottom(figures):
    heat = figures["map"].data[0]
    expected = 0.1 * np.arange(4)[:, None] + 0.01 * np.arange(6)[None]
    expected[3, 0] = math.nan
    np.testing.assert_allclose(np.asarray(heat.z, dtype=float), expected, atol=1e-6)
    bottom, top = figures["map"].layout.yaxis.range
    assert (bottom, top) == (-0.5, 3.5)
    assert list(figures["map"].layout.yaxis.ticktext) == ["0", "1", "2", "3"]
    assert (heat.zmin, heat.zmax) == (pytest.approx(-0.35), pytest.approx(0.35))


def test_tokens_stand_along_x_literally_in_their_places_though_they_repeat(figures):
    axis = figures["map"].layout.xaxis
    assert list(axis.ticktext) == ["&lt;|im_start|&gt;", "⏎", "&lt;script&gt;", "&#36;x&#36;", "⏎", "%&#123;z}"]
    assert axis.title.text == "token"
    assert figures["map"].data[0].colorbar.title.text == "recovery<br>(fraction)"


def test_under_the_cursor_stand_both_labels_interval_n_and_position_or_why_a_value_is_missing(figures):
    heat = figures["map"].data[0]
    assert heat.text[2][4] == "layer 2<br>token ⏎"
    assert heat.customdata[2][4] == "0.24 [0.19, 0.34], n = 40<br>position 4"
    missing = heat.customdata[3][0].replace("<br>", " ")
    assert missing == f"missing: {html.escape(REASON)} position 0"
    assert heat.hoverongaps is True
    assert "%{customdata}" in heat.hovertemplate
    assert "grey: missing" in subtitle(figures["map"])


def test_a_cell_that_was_never_measured_says_so():
    heat = layer_map(layer_token().iloc[1:]).data[0]
    assert math.isnan(heat.z[3][0])
    assert heat.customdata[3][0].startswith("missing: not measured")


def test_cells_that_cannot_be_told_from_zero_are_marked_by_why_and_counted(figures):
    dot, cross = figures["map"].data[1:]
    assert dot.marker.symbol == "circle"
    # Values 0.04 and 0.05 have intervals from 0.05 below: they include zero, and are no numerical noise.
    assert sorted(zip(map(int, dot.x), map(int, dot.y), strict=True)) == [(4, 0), (5, 0)]
    assert "dot: the interval includes 0 (2 of 23 cells, each by itself)" in subtitle(figures["map"])
    assert sorted(zip(map(int, cross.x), map(int, cross.y), strict=True)) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert cross.marker.symbol == "x-thin"
    assert "×: within numerical noise ±0.03 (4 cells)" in subtitle(figures["map"])
    bare = layer_map(layer_token())
    assert len(bare.data) == 2
    assert "noise" not in subtitle(bare)


def test_the_random_control_stands_in_its_cells_on_the_scale_of_the_map():
    control = row(-0.9, layer=1, position=2, token=TOKENS[2]) | {"series": "random control"}
    figure = layer_map(pd.concat([layer_token(), pd.DataFrame([control])]))
    heat, squares = figure.data[0], figure.data[-1]
    assert (list(squares.x), list(squares.y), list(squares.marker.color)) == ([2], [1], [-0.9])
    assert (
        (squares.marker.cmin, squares.marker.cmax)
        == (heat.zmin, heat.zmax)
        == (pytest.approx(-0.9), pytest.approx(0.9))
    )
    assert squares.marker.colorscale == heat.colorscale
    assert "squares: random control, same colours, at 1 cells (largest 0.9)" in subtitle(figure)
    heads = layer_head()
    control = heads.head(1).assign(series="random control", value=0.2)
    assert head_map_figure(pd.concat([heads, control]), title="T").data[-1].name == "random control"


def test_with_text_the_values_stand_in_the_cells_in_brackets_where_they_may_be_zero():
    figure = layer_map(layer_token(), noise_floor=0.03, text=True)
    heat = figure.data[0]
    assert heat.text[0][:5] == ["≈ 0", "≈ 0", "≈ 0", "≈ 0", "(0.04)"]
    assert heat.text[3][0] == "–"
    assert heat.texttemplate == "%{text}"
    assert heat.hovertext[2][4] == "layer 2<br>token ⏎"
    assert "%{hovertext}" in heat.hovertemplate
    assert len(figure.data) == 1
    assert "in brackets: the interval includes 0 (2 of 23 cells, each by itself)" in subtitle(figure)
    assert "≈ 0: within numerical noise ±0.03 (4 cells)" in subtitle(figure)
    small = layer_map(layer_token().assign(value=lambda f: f["value"] / 10, low=0.001, high=0.1), text=True)
    assert small.data[0].text[1][:2] == ["0.010", "0.011"]


def test_a_map_of_nothing_but_noise_stays_pale():
    frame = layer_token().assign(value=0.001)
    assert layer_map(frame, noise_floor=0.01).data[0].zmax == pytest.approx(0.02)
    assert layer_map(frame).data[0].zmax == pytest.approx(0.001)


def test_layers_stay_whole_numbers_though_a_control_without_layer_makes_them_floats():
    frame = pd.concat([layer_token(), pd.DataFrame([{"series": "random control", "value": 0.0}])])
    assert frame["layer"].dtype == float
    figure = layer_map(frame)
    assert list(figure.layout.yaxis.ticktext) == ["0", "1", "2", "3"]
    assert figure.data[0].text[2][4] == "layer 2<br>token ⏎"
    assert figure.data[0].customdata[2][4].endswith("n = 40<br>position 4")
    check = attribution_check_figure(checked().assign(layer=np.arange(5.0)), title="T")
    assert check.data[1].customdata[2].startswith("layer 2<br>")


def test_rows_of_text_read_from_the_top_in_the_order_of_the_frame():
    rows = [row(0.1, layer=layer, span=span) for span in ("query", "prefix") for layer in (1, 0)]
    figure = recovery_map_figure(pd.DataFrame(rows), x="layer", y="span", title="T")
    assert list(figure.layout.yaxis.ticktext) == ["query", "prefix"]
    assert figure.layout.yaxis.range == (1.5, -0.5)
    assert list(figure.layout.xaxis.ticktext) == ["0", "1"]


def test_a_map_of_thirty_layers_by_twenty_four_tokens_is_small_even_where_nothing_was_measured():
    for frame in (layer_token(30, 24), layer_token(30, 24).assign(value=math.nan, reason="long reason " * 30)):
        assert len(layer_map(frame, noise_floor=0.03, text=True).to_json()) < 300_000


def test_maps_refuse_rows_that_do_not_make_a_map():
    frame = layer_token()
    with pytest.raises(LensError, match="lacks layer"):
        layer_map(frame.drop(columns="layer"))
    with pytest.raises(LensError, match="no row has series 'patched', only identity control"):
        layer_map(frame.query("series != 'patched'"))
    with pytest.raises(LensError, match=r"position 1, layer 3; keep one of what differs"):
        layer_map(pd.concat([frame, frame.iloc[1:2]]))
    with pytest.raises(LensError, match="'layer' is empty in 1 of 25 rows"):
        layer_map(pd.concat([frame, pd.DataFrame([row(0.1, layer=None, position=1, token="a")])]))
    other = frame.assign(token=["other", *frame["token"][1:]])
    with pytest.raises(LensError, match="position 0 has several values of 'token'"):
        layer_map(other)


# --- layer × head ------------------------------------------------------------------------------------


def test_heads_of_shared_groups_have_lines_between_the_groups_and_their_names_above():
    figure = head_map_figure(layer_head(), title="T")
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3", "4", "5"]
    assert [shape.x0 for shape in figure.layout.shapes] == [2.5]
    assert [(note.text, note.x) for note in figure.layout.annotations] == [("kv 0 (q 0-2)", 1), ("kv 1 (q 3-5)", 4)]
    assert "lines: between key-value groups" in subtitle(figure)
    np.testing.assert_allclose(numbers(figure.data[0].z[1]), 0.1 * np.arange(6), atol=1e-6)


def test_a_group_for_each_head_is_its_label_and_needs_no_lines():
    frame = layer_head().query("head % 3 == 0")
    figure = head_map_figure(frame, title="T", x_title="key-value head")
    assert list(figure.layout.xaxis.ticktext) == ["kv 0 (q 0-2)", "kv 1 (q 3-5)"]
    assert not figure.layout.shapes
    assert figure.layout.xaxis.title.text == "key-value head"
    assert list(head_map_figure(frame.assign(group=[0, 1] * 3), title="T").layout.xaxis.ticktext) == ["kv 0", "kv 1"]


def test_labels_of_heads_may_be_given_and_have_to_be_complete():
    frame = layer_head(groups=False)
    assert list(head_map_figure(frame, title="T").layout.xaxis.ticktext)[-1] == "5"
    figure = head_map_figure(frame, title="T", labels={head: f"q{head}" for head in range(6)})
    assert figure.layout.xaxis.ticktext[0] == "q0"
    with pytest.raises(LensError, match="labels lacks head 4, 5"):
        head_map_figure(frame, title="T", labels=dict.fromkeys(range(4), "q"))


# --- carriers ----------------------------------------------------------------------------------------


def cells(figure: go.Figure) -> dict[tuple[str, str], list[go.Heatmap]]:
    """The heatmaps with values of each panel, in the order of their rows."""
    panels: dict[tuple[str, str], list[go.Heatmap]] = {}
    for trace in figure.data:
        if trace.coloraxis:
            panels.setdefault((trace.xaxis, trace.yaxis), []).append(trace)
    return panels


def test_the_carrier_map_has_a_panel_for_each_direction_and_sites_with_the_values_in_the_cells(figures):
    panels = list(cells(figures["carriers"]).values())
    assert words(figures["carriers"])[:4] == [
        f"<b>{flow}</b>, {sites}" for flow in ("repair", "infect") for sites in ("k+v", "resid_pre")
    ]
    assert len(panels) == 4
    np.testing.assert_allclose(np.asarray(panels[0][0].z, float), [[0.9, 0.7, 0.5], [0.5, 0.3, 0.1]], atol=1e-6)
    np.testing.assert_allclose(np.asarray(panels[3][0].z, float)[0], [0.36, 0.28, 0.2], atol=1e-6)
    assert panels[0][0].text[1] == ("0.50", "0.30", "0.10") or panels[0][0].text[1] == ["0.50", "0.30", "0.10"]
    assert panels[0][0].customdata[0][0] == "0.90 [0.85, 1.00], n = 40"
    assert panels[0][0].hovertext[1][2] == "patched: &lt;script&gt;, &#36;all&#36;"
    assert "repair: base → finetuned; infect: finetuned → base" in subtitle(figures["carriers"])


def test_controls_are_rows_of_their_own_below_a_gap(figures):
    figure = figures["carriers"]
    patched, identity, random = next(iter(cells(figure).values()))
    assert list(patched.y) == [0, 1]
    assert list(identity.y) == [2.5]
    assert list(random.y) == [4]
    assert list(identity.text[0]) == ["≈ 0"] * 3
    assert list(random.text[0]) == ["(−0.03)"] * 3
    ticks = list(figure.layout.yaxis.ticktext)
    assert ticks[:2] == ["prefix", "&lt;script&gt;"]
    assert ticks[2] == '<span style="color:#666666">prefix, identity control</span>'
    assert figure.layout.yaxis.range[0] > 4 > figure.layout.yaxis.range[1]


def test_a_control_of_other_tokens_is_named_by_what_it_holds():
    frame = carriers()
    frame.loc[frame["series"] == "random control", "contains"] = "5 query + all 6 postfix tokens"
    ticks = list(carrier_map_figure(frame, title="T").layout.yaxis.ticktext)
    assert ticks[3] == '<span style="color:#666666">instead of prefix: 5 query + all 6 postfix tokens</span>'
    under = [text for trace in carrier_plane_figure(frame, title="T").data for text in trace.customdata or ()]
    assert sum("5 query + all 6 postfix tokens" in text for text in under) == 6


def test_wide_cells_of_a_carrier_map_hold_their_intervals():
    frame = carriers()
    frame = frame[(frame["band"] == "layers 0-9") & (frame["sites"] == "k+v")]
    figure = carrier_map_figure(frame, title="T", noise_floor=0.01)
    patched, identity, _ = next(iter(cells(figure).values()))
    assert list(patched.text[0]) == ["0.90 [0.85, 1.00]"]
    assert list(identity.text[0]) == ["≈ 0"]
    assert "in the cells: 95 % interval over prompts" in subtitle(figure)


def test_carrier_colours_are_symmetric_and_a_missing_value_is_grey_with_its_reason():
    frame = carriers()
    frame.loc[0, ["value", "low", "high"]] = math.nan
    frame.loc[0, "reason"] = REASON
    figure = carrier_map_figure(frame, title="T")
    assert figure.layout.coloraxis.cmax == pytest.approx(0.72)
    assert figure.layout.coloraxis.cmin == pytest.approx(-0.72)
    ground, heat = figure.data[:2]
    assert np.asarray(ground.z).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert dict(ground.colorscale)[1] == "#BDBDBD"
    assert "do not differ" in heat.customdata[0][0]
    assert "grey: no value" in subtitle(figure)
    assert carrier_map_figure(carriers().assign(value=math.nan), title="T").layout.coloraxis.cmax == 1.0


def points(figure: go.Figure, *, controls: bool) -> list[go.Scatter]:
    hollow = "#666666"
    return [t for t in figure.data if t.customdata is not None and (t.marker.color == hollow) is controls]


def test_the_plane_has_repair_along_x_and_infect_along_y_with_both_intervals(figures):
    drawn = points(figures["plane"], controls=False)
    assert len(drawn) == 4  # span × sites
    np.testing.assert_allclose(numbers(drawn[0].x), [0.9, 0.7, 0.5])
    np.testing.assert_allclose(numbers(drawn[0].y), [0.45, 0.35, 0.25])
    np.testing.assert_allclose(numbers(drawn[0].error_x.array), 0.1)
    np.testing.assert_allclose(numbers(drawn[0].error_y.arrayminus), 0.05)
    assert list(drawn[0].text) == ["1", "2", "3"]
    assert [trace.marker.symbol for trace in drawn] == ["circle", "circle", "square", "square"]
    assert len({trace.marker.line.color for trace in drawn}) == 2
    assert drawn[0].customdata[1] == (
        "<b>patched, prefix, k+v, layers 10-19</b><br>repair: 0.70 [0.65, 0.80], n = 40"
        "<br>infect: 0.35 [0.30, 0.45], n = 40"
    )


def test_controls_of_the_plane_are_hollow_grey_below_the_patches_and_differ_from_each_other(figures):
    controls = points(figures["plane"], controls=True)
    assert {trace.marker.symbol for trace in controls} == {
        "circle-open",
        "square-open",
        "circle-open-dot",
        "square-open-dot",
    }
    assert list(figures["plane"].data[: len(controls)]) == controls
    assert not points(carrier_plane_figure(carriers(False), title="T"), controls=True)


def test_the_plane_names_its_corners_its_markers_and_the_noise(figures):
    figure = figures["plane"]
    assert {"<i>necessary and sufficient</i>", "<i>neither</i>"} <= set(words(figure))
    named = [trace.name for trace in figure.data if trace.name]
    assert named == [
        *("prefix", "&lt;script&gt;", "k+v", "resid_pre", "identity control", "random control"),
        *("1: layers 0-9", "2: layers 10-19", "3: &#36;all&#36;"),
    ]
    assert figure.layout.legend.x > 1  # beside the data
    bands = [(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect" and s.x0 == -0.01]
    assert bands == [(-0.01, 0.01)]
    low, high = figure.layout.yaxis.range
    assert low < -0.1
    assert high > 1.1  # the words in the corners have a strip above everything


def test_a_place_without_both_directions_is_counted_and_an_endless_interval_is_no_bar():
    frame = carriers(controls=False)
    frame.loc[0, "value"] = math.nan
    frame.loc[1, "high"] = math.inf
    figure = carrier_plane_figure(frame, title="T")
    first = points(figure, controls=False)[0]
    np.testing.assert_allclose(numbers(first.x), [0.7, 0.5])
    assert math.isnan(first.error_x.array[0])
    assert "1 without a value in one flow, not drawn" in subtitle(figure)
    assert all(map(math.isfinite, figure.layout.xaxis.range))


def test_carrier_figures_refuse_frames_that_lack_a_direction_or_repeat_a_place():
    frame = carriers()
    with pytest.raises(LensError, match="both flows, the frame has repair; run carrier_map with flow='infec"):
        carrier_plane_figure(frame.query("flow == 'repair'"), title="T")
    for draw in (carrier_plane_figure, carrier_map_figure):
        with pytest.raises(LensError, match="several rows stand for"):
            draw(pd.concat([frame, frame.head(1)]), title="T")
        with pytest.raises(LensError, match="lacks band"):
            draw(frame.drop(columns="band"), title="T")
        with pytest.raises(LensError, match="'band' is empty in"):
            draw(frame.assign(band=[None, *frame["band"][1:]]), title="T")


# --- behaviour ---------------------------------------------------------------------------------------


def dots(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.mode == "markers" and trace.x[0] is not None]


def test_perturbations_stand_by_span_below_base_and_finetuned(figures):
    figure = figures["perturbation"]
    assert list(figure.layout.yaxis.ticktext) == [
        *("base", "finetuned, unperturbed"),
        *("<b>prefix</b>", "best", "average", "random tokens"),
        *("<b>&lt;script&gt;</b>", "best", "average", "random tokens"),
    ]
    assert len(dots(figure)) == 2 * (2 + 6)  # the references once in each panel
    best = next(dot for dot in dots(figure) if "prefix, best" in dot.hovertemplate)
    place = list(figure.layout.yaxis.tickvals)[3]
    assert (best.x[0], best.y[0], best.error_x.array[0], best.error_x.arrayminus[0]) == (36.0, place, 3.0, 2.0)
    assert "36.0 [34.0, 39.0], n = 40" in best.hovertemplate
    assert {"off-topic", "on-topic", "36.0 [34.0, 39.0]"} <= set(words(figure))
    assert figure.layout.xaxis.title.text == "answer length (words)"


def test_perturbation_panels_have_reference_lines_and_hollow_controls(figures):
    figure = figures["perturbation"]
    lines = {(shape.xref, shape.x0) for shape in figure.layout.shapes if shape.line.dash == "dot"}
    assert lines == {("x", 40.0), ("x", 18.0), ("x2", 20.0), ("x2", 9.0)}
    hollow = {dot.hovertemplate.split("<")[1] for dot in dots(figure) if dot.marker.color == "white"}
    assert len(hollow) > 0
    assert all("random tokens" in dot.hovertemplate for dot in dots(figure) if dot.marker.color == "white")
    assert "hollow: control" in subtitle(figure)


def test_a_missing_mean_is_written_with_its_reason():
    frame = perturbed().assign(reason="")
    frame.loc[2, ["value", "low", "high"]] = math.nan
    frame.loc[2, "reason"] = "the judge <failed>"
    figure = perturbation_figure(frame, label="w", unit="words", title="T")
    assert "missing: the judge &lt;failed&gt;" in words(figure)
    assert len(dots(figure)) == 15


def test_perturbation_and_stress_frames_with_gaps_or_repeats_are_refused():
    settings = {"label": "w", "unit": "words", "title": "T"}
    with pytest.raises(LensError, match="lacks kind"):
        perturbation_figure(perturbed().drop(columns="kind"), **settings)
    with pytest.raises(LensError, match="topic 'off-topic', span 'prefix', kind 'best'"):
        perturbation_figure(pd.concat([perturbed(), perturbed().iloc[2:3]]), **settings)
    with pytest.raises(LensError, match="column model holds tuned; expected base and finetuned"):
        stress_figure(stressed().replace("finetuned", "tuned"), **settings)
    with pytest.raises(LensError, match="several rows stand for family system, variant none, model base"):
        stress_figure(pd.concat([stressed(), stressed().head(1)]), **settings)


def test_stress_shows_base_and_finetuned_beside_each_other_in_the_row_of_a_variant(figures):
    figure = figures["stress"]
    assert list(figure.layout.yaxis.ticktext) == [
        *("<b>system</b>", "none", "&lt;script&gt;"),
        *("<b>spelling</b>", "upper &#36;case&#36;"),
    ]
    base, finetuned = dots(figure)[:2]
    place = list(figure.layout.yaxis.tickvals)[1]
    assert (base.x[0], finetuned.x[0]) == (40.0, 15.0)
    assert base.y[0] < place < finetuned.y[0]
    assert base.marker.color != finetuned.marker.color
    assert base.marker.symbol != finetuned.marker.symbol
    assert [trace.name for trace in figure.data if trace.showlegend] == ["base", "finetuned"]
    panels = stress_figure(stressed().assign(topic="off-topic"), label="w", unit="words", title="T")
    assert "off-topic" in words(panels)


# --- attribution -------------------------------------------------------------------------------------


def test_the_attribution_check_has_the_cells_the_line_of_agreement_and_the_rank_correlation(figures):
    line, cloud = figures["attribution"].data
    assert list(line.x) == list(line.y)
    assert numbers(cloud.x) == [0.1, 0.2, 0.3, 0.4]
    assert numbers(cloud.y) == [0.0, 0.3, 0.2, 0.5]
    assert "Spearman ρ = 0.80 on the even sample of cells" in subtitle(figures["attribution"])
    assert "1 cells without both numbers not drawn" in subtitle(figures["attribution"])
    assert cloud.customdata[2] == "layer 2<br>token &lt;script&gt;<br>"
    assert cloud.text[1] == "0.30 [0.20, 0.50]"
    assert figures["attribution"].layout.xaxis.range == figures["attribution"].layout.yaxis.range


def test_a_rank_correlation_that_does_not_exist_is_named_and_nothing_to_check_refused():
    few = checked().head(2)
    assert "Spearman" not in subtitle(attribution_check_figure(few, title="T"))
    assert "Spearman ρ undefined" in subtitle(attribution_check_figure(few, title="T", rank_correlation=math.nan))
    with pytest.raises(LensError, match="pass check_cells to attribution_map"):
        attribution_check_figure(checked().tail(1), title="T")
