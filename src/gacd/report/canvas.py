"""How every figure is drawn: one style, a wide and a narrow drawing, bytes at the end.

matplotlib is imported when something is drawn, not before, and pyplot never: its global figures
would leak between callers.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from gacd.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FileFormat = Literal["svg", "png"]
WIDE, NARROW = 9.0, 3.3
"""Widths in inches, such that 9 pt text is legible on a desk screen and on a phone of 360 px."""
INK, QUIET, WRONG = "#1c1b19", "#6b6862", "#b3261e"

_PIXELS = 96  # CSS pixels in an inch
_OTHER_SCRIPTS = (  # for names of classes, where they are installed
    "Noto Sans CJK JP", "Noto Sans CJK SC", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari",
)  # fmt: skip
_STYLE = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $5
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e3dc",
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "figure.facecolor": "white",
    "svg.fonttype": "path",  # the page needs no font
    "svg.hashsalt": "gacd",  # the same records give the same bytes
}
# Okabe and Ito's colours without the yellow, which is too light for a line on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (8, 2, 2, 2, 2, 2)))


@dataclass(frozen=True)
class Figure:
    """A finished picture (SVG or PNG), what it shows in words, and a second drawing for phones."""

    image: bytes
    alt: str
    caption: str
    narrow: bytes
    width: int
    """The width in CSS pixels at which the text of `image` has its intended size."""
    name: str = ""
    """Of the file that `image` is kept in beside the page, if it is kept in one."""

    @property
    def file(self) -> str:
        """That file, seen from the page."""
        return f"figures/{self.name}.{'png' if self.media_type == 'image/png' else 'svg'}"

    @property
    def media_type(self) -> str:
        """The MIME type of both drawings."""
        return "image/png" if self.image.startswith(b"\x89PNG") else "image/svg+xml"

    def named(self, name: str) -> "Figure":
        """The same figure, kept under this name."""
        return replace(self, name=name)


class LineStyle(NamedTuple):
    """Three ways to tell a line from the others, of which colour is only one."""

    color: str
    marker: str
    linestyle: tuple[float, tuple[float, ...]]


def line_style(index: int) -> LineStyle:
    """The style of the `index`-th line of a figure."""
    return LineStyle(
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_DASHES[index % len(_DASHES)],
    )


def draw(
    drawing: Callable[[bool], "Canvas"],
    *,
    alt: str,
    caption: str,
    file_format: FileFormat = "svg",
) -> Figure:
    """Call `drawing(narrow)` for the desk and for the phone, in the style of this module."""
    import matplotlib
    from matplotlib.font_manager import get_font_names

    fonts = ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in get_font_names())]
    with matplotlib.rc_context({**_STYLE, "font.family": fonts}):
        wide, narrow = drawing(False), drawing(True)
        return Figure(
            image=_render(wide, file_format),
            alt=alt,
            caption=caption,
            narrow=_render(narrow, file_format),
            width=round(wide.get_figwidth() * _PIXELS),
        )


def file_format(path: Path) -> FileFormat:
    """What a figure's file is to hold, by its name. Raises UserError for any but .svg and .png."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in get_args(FileFormat):
        raise UserError(f"{path}: a figure is drawn as .svg or .png")
    return cast("FileFormat", kind)


def canvas(width: float, height: float) -> "Canvas":
    """An empty drawing; sizes in inches."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")


def _render(drawn: "Canvas", file_format: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else None
    with warnings.catch_warnings():  # a script that no font here has: boxes, and no more words
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawn.savefig(buffer, format=file_format, dpi=2 * _PIXELS, metadata=metadata)
    return buffer.getvalue()
