"""How figures are seen and kept: files, dark grounds, and notebooks with or without plotly's renderer and a Chrome."""

import base64
import sys
from types import SimpleNamespace

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from piggyback_lens import showing
from piggyback_lens.errors import LensError
from piggyback_lens.figures.plot_style import GREY, INK, apply_style

PNG = b"\x89PNG\r\n\x1a\n"


def figure() -> go.Figure:
    made = go.Figure(go.Scatter(x=[1, 2], y=[3, 1], line={"color": "#0072B2"}, fillcolor="rgba(0, 114, 178, 0.2)"))
    made.add_heatmap(z=[[0, 1]], colorscale=[[0, "#FFFFFF"], [1, "#053061"]])
    apply_style(made, "A title", "a subtitle", height=300)
    return made


@pytest.fixture
def drawn(monkeypatch):
    """Pictures are drawn without a Chrome: what was asked for is kept."""
    asked = []

    def to_image(own, **how):
        asked.append(go.Figure(own).to_plotly_json() | how)
        return PNG + how["format"].encode()

    monkeypatch.setattr(pio, "to_image", to_image)
    return asked


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_a_picture_is_written_by_its_ending(kind, tmp_path, drawn):
    path = showing.save_figure(figure(), tmp_path / f"f.{kind}")
    assert path.read_bytes() == PNG + kind.encode()
    assert (drawn[0]["width"], drawn[0]["scale"]) == (900, 2 if kind == "png" else 1)


def test_a_page_needs_no_chrome_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(pio, "to_image", None)
    page = showing.save_figure(figure(), tmp_path / "f.html").read_text(encoding="utf-8")
    assert "A title" in page
    assert "cdn.plot.ly" not in page.split("<body>")[1].replace("plotly.js v", "")[:300]
    assert len(page) > 1_000_000  # plotly.js is in it


@pytest.mark.parametrize("error", [ImportError, ValueError, RuntimeError, OSError])
def test_without_a_chrome_one_sentence_says_what_to_do(error, tmp_path, monkeypatch):
    def to_image(*_, **__):
        raise error("Kaleido requires Google Chrome to be installed.\n\nmany lines")

    monkeypatch.setattr(pio, "to_image", to_image)
    with pytest.raises(LensError) as told:
        showing.save_figure(figure(), tmp_path / "f.png")
    said = str(told.value)
    assert "\n" not in said
    assert all(part in said for part in ("f.png is not written", "Chromium", "plotly_get_chrome", ".html"))
    assert not (tmp_path / "f.png").exists()


@pytest.mark.parametrize("name", ["figure.jpg", "figure"])
def test_another_ending_is_refused(name, tmp_path):
    with pytest.raises(LensError, match=r"ends with \S+: give \.html, \.svg, \.png, \.pdf"):
        showing.save_figure(figure(), tmp_path / name)


# ---------------------------------------------------------------- dark


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def test_a_dark_figure_has_light_text_on_a_dark_ground_and_keeps_hues():
    light, dark = figure(), showing.dark(figure())
    layout = dark.layout
    assert luminance(layout.template.layout.paper_bgcolor) < 0.1
    assert luminance(layout.font.color) > 0.8
    assert luminance(layout.title.subtitle.font.color) > 0.5
    red, green, blue = (int(dark.data[0].line.color[i : i + 2], 16) for i in (1, 3, 5))
    assert blue > green > red  # #0072B2 is still blue
    assert dark.data[0].fillcolor.endswith(", 0.2)")
    assert [luminance(colour) < 0.1 for _, colour in dark.data[1].colorscale] == [True, False]
    assert light.layout.font.color == INK  # the figure that was given is left alone
    assert list(dark.data[0].y) == [3, 1]


def test_turning_twice_gives_nearly_the_same_colour_and_text_is_never_a_colour():
    assert showing._turned("#ffffff") == "#121212"
    assert luminance(showing._turned(showing._turned(GREY))) == pytest.approx(luminance(GREY), abs=0.1)
    assert showing._turned("the colour white") == "the colour white"
    assert showing._turned("#abc") == showing._turned("#aabbcc")
    assert showing._turned({"a": ("black", 3, None, True)}) == {"a": ["#ffffff", 3, None, True]}


def test_a_file_can_be_dark(tmp_path, drawn):
    showing.save_figure(figure(), tmp_path / "f.svg", theme="dark")
    assert luminance(drawn[0]["layout"]["font"]["color"]) > 0.8


# ---------------------------------------------------------------- notebooks


@pytest.fixture
def notebook(monkeypatch):
    """A kernel in which nothing was drawn yet, with plotly's own choice of renderer."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    monkeypatch.setattr(showing, "_keep_chrome", lambda: None)
    before, template = pio.renderers.default, pio.templates.default
    pio.renderers.default = "plotly_mimetype"
    showing._register.cache_clear()
    yield
    pio.renderers.default, pio.templates.default = before, template
    showing._register.cache_clear()


def bundle():
    return pio.renderers[pio.renderers.default].to_mimebundle(figure().to_dict())


@pytest.mark.usefixtures("notebook")
def test_a_figure_in_a_notebook_brings_a_picture_for_readers_without_plotlys_renderer(drawn):
    apply_style(go.Figure(), "a figure", "", height=300)
    shown = bundle()
    assert base64.b64decode(shown["image/png"]) == PNG + b"png"
    assert shown["application/vnd.plotly.v1+json"]["layout"]["title"]["text"] == "A title"
    assert "text/html" not in shown  # GitHub would show it in place of the picture, and it is empty there
    assert luminance(drawn[0]["layout"]["font"]["color"]) < 0.3


@pytest.mark.usefixtures("notebook")
def test_without_a_chrome_the_page_stands_in_and_is_looked_for_once(monkeypatch):
    asked = []

    def to_image(*_, **__):
        asked.append(1)
        raise RuntimeError("no Chrome")

    monkeypatch.setattr(pio, "to_image", to_image)
    apply_style(go.Figure(), "a figure", "", height=300)
    for _ in range(2):
        shown = bundle()
        assert "image/png" not in shown
        assert "plotly" in shown["text/html"]
    assert len(asked) == 1


@pytest.mark.usefixtures("notebook")
def test_a_dark_template_makes_what_is_shown_dark(drawn):
    apply_style(go.Figure(), "a figure", "", height=300)
    pio.templates.default = "plotly_dark"
    shown = bundle()
    assert luminance(shown["application/vnd.plotly.v1+json"]["layout"]["font"]["color"]) > 0.8
    assert luminance(drawn[0]["layout"]["font"]["color"]) > 0.8


@pytest.mark.usefixtures("notebook")
def test_a_renderer_that_was_chosen_is_left_alone():
    pio.renderers.default = "svg"
    apply_style(go.Figure(), "a figure", "", height=300)
    assert pio.renderers.default == "svg"


def test_outside_of_notebooks_no_renderer_is_touched():
    before = pio.renderers.default
    showing._register.cache_clear()
    apply_style(go.Figure(), "a figure", "", height=300)
    assert pio.renderers.default == before
