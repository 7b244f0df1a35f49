"""How figures are seen and kept: in notebooks with or without plotly's renderer, light or dark, and in files."""

import base64
import colorsys
import re
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piggyback_lens.errors import LensError
from piggyback_lens.files import atomic_write_bytes, atomic_write_text
from piggyback_lens.progress import in_notebook
from piggyback_lens.words import Theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

PICTURES = (".svg", ".png", ".pdf")
NO_CHROME = (
    "pictures are drawn by kaleido with a Chrome or Chromium, and there is none that works: pip install "
    "'piggyback-lens[notebooks]', install Chromium (or run plotly_get_chrome), or save the figure as .html"
)
WIDTH, SCALE = 900, 2
"""Of pictures: the width that figures are laid out for, in px, and how many dots a px has in a .png file."""
DARKEST = 0.07
"""Lightness of what is white in the light theme."""


def save_figure(figure: "go.Figure", path: str | Path, *, theme: Theme = "light", width: int = WIDTH) -> Path:
    """Write a figure as .html, .svg, .png or .pdf.

    Args:
        figure: any plotly figure.
        path: its ending says the format. A .html file works offline and needs nothing but a browser.
        theme: light, or dark: the same hues on a dark ground.
        width: of the picture, in px.

    Raises:
        LensError: another ending, or a picture where no Chrome is found.
    """
    path, kind = Path(path), Path(path).suffix.lower()
    shown = dark(figure) if theme == "dark" else figure
    if kind == ".html":
        return atomic_write_text(path, shown.to_html(include_plotlyjs=True))
    if kind not in PICTURES:
        raise LensError(f"{path} ends with {kind or 'nothing'}: give .html, {', '.join(PICTURES)}")
    drawn = picture(shown, kind.removeprefix("."), width, SCALE if kind == ".png" else 1)
    if drawn is None:
        raise LensError(f"{path} is not written: {NO_CHROME}")
    return atomic_write_bytes(path, drawn)


def picture(figure: Any, kind: str, width: int = WIDTH, scale: int = 1) -> bytes | None:
    """A figure as svg, png or pdf, its dots `scale` times as dense; None where nothing can draw it."""
    import plotly.io as pio

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The kopts argument is ignored")  # of a Chrome that runs already
            return bytes(pio.to_image(figure, format=kind, width=width, scale=scale))
    except (ImportError, OSError, RuntimeError, ValueError):  # no kaleido, no Chrome, or one that does not start
        return None


# ---------------------------------------------------------------- dark


def dark(figure: "go.Figure") -> "go.Figure":
    """The figure on a dark ground: every colour keeps its hue and takes the opposite lightness."""
    import plotly.graph_objects as go

    return go.Figure(_turned(figure.to_plotly_json()), skip_invalid=True)


_HEX = re.compile(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})")
_RGB = re.compile(r"(rgba?)\(\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*(,[^)]*)?\)")
_NAMED = {"white": "#ffffff", "black": "#000000"}


def _turned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _turned(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_turned(part) for part in value]
    if not isinstance(value, str):
        return value
    value = _NAMED.get(value, value)
    if _HEX.fullmatch(value):
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        return "#{:02x}{:02x}{:02x}".format(*_opposite(*(float(int(digits[i : i + 2], 16)) for i in (0, 2, 4))))
    if found := _RGB.fullmatch(value):
        kind, *parts, alpha = found.groups()
        return f"{kind}({', '.join(map(str, _opposite(*map(float, parts))))}{alpha or ''})"
    return value


def _opposite(red: float, green: float, blue: float) -> tuple[int, int, int]:
    hue, light, saturation = colorsys.rgb_to_hls(red / 255, green / 255, blue / 255)
    turned = colorsys.hls_to_rgb(hue, DARKEST + (1 - DARKEST) * (1 - light), saturation)
    return tuple(round(255 * part) for part in turned)  # type: ignore[return-value]


# ---------------------------------------------------------------- in notebooks


def shown_in_notebooks() -> None:
    """From now on figures that a notebook shows have a picture beside them, for readers without plotly's renderer.

    That is Lab with a kernel of another environment, and GitHub. Where nothing draws pictures the figure's own page
    stands in, which loads plotly.js from the network. With `plotly.io.templates.default = "plotly_dark"` all are dark.
    A renderer that was chosen (`plotly.io.renderers.default`, PLOTLY_RENDERER) is left alone.
    """
    if in_notebook():
        _register()


@cache
def _register() -> None:
    import plotly.io as pio
    from plotly.io.base_renderers import MimetypeRenderer

    if pio.renderers.default != "plotly_mimetype":
        return

    class WithPicture(MimetypeRenderer):  # type: ignore[misc]
        def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
            own = _turned(fig_dict) if "dark" in str(pio.templates.default) else fig_dict
            bundle: dict[str, Any] = dict(pio.renderers["plotly_mimetype"].to_mimebundle(own))
            if self.pictures:
                _keep_chrome()
            drawn = picture(own, "png") if self.pictures else None
            self.pictures = drawn is not None  # looked for once: it takes a while to find that there is none
            if drawn is not None:
                return bundle | {"image/png": base64.b64encode(drawn).decode("ascii")}
            return bundle | dict(pio.renderers["notebook_connected"].to_mimebundle(own))

        pictures = True

    pio.renderers["piggyback_lens"] = WithPicture()
    pio.renderers.default = "piggyback_lens"


@cache
def _keep_chrome() -> None:
    """One Chrome for all pictures of this kernel: starting it takes longer than drawing."""
    with suppress(ImportError, AttributeError, OSError, RuntimeError):  # releases of kaleido that have none
        import kaleido

        kaleido.start_sync_server(silence_warnings=True)
