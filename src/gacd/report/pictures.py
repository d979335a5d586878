"""Figures made of cells: attacked images with the models' answers, and heat maps."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from gacd.errors import UserError
from gacd.report.canvas import INK, NARROW, QUIET, WIDE, WRONG, Figure, canvas, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# The underscores leave agreement between arrays to the checks below, which say what is wrong.
Picture = UInt8[np.ndarray, "_H _W _C"]
Pictures = UInt8[np.ndarray, "_n _H _W _C"]
Matrix = Float[np.ndarray, "_K _K"]

_GAP = 0.12  # inches between pictures
_LINE = 0.16  # inches of a line of text
_NAMED, _WRITTEN = 24, 12  # most classes whose names, and whose values, a heat map has room for


def attacked_pictures(
    clean: Pictures,
    attacked: Mapping[str, Pictures],
    answers: Mapping[str, Mapping[str, Sequence[str]]],
    truth: Sequence[str],
) -> Figure:
    """Clean images, and below them each model's attacked images with the model's answers.

    `answers[model]` holds the lists `clean` and `attacked`, a class name an image. A wrong answer
    under attack has a thick red frame and a cross.

    Raises:
        UserError: no images, or a model whose images or answers do not match them.
    """
    n = len(clean)
    if n == 0 or len(truth) != n:
        raise UserError(f"attacked pictures: {n} images with {len(truth)} true classes")
    for name, images in attacked.items():
        given = answers.get(name, {})
        if images.shape != clean.shape or any(len(given.get(k, ())) != n for k in _ANSWERS):
            raise UserError(f"attacked pictures: {name} needs {n} images and {n} answers to each")

    def drawing(narrow: bool) -> "Canvas":
        shown = min(n, 3) if narrow else n
        left = 0.0 if narrow else 1.25
        width = NARROW if narrow else WIDE
        tile = min(1.0, (width - left - _GAP) / shown - _GAP)
        if not narrow:
            width = left + _GAP + shown * (tile + _GAP)
        heading = 0.26 if narrow else 0.0
        row = heading + tile + 2 * _LINE + 1.6 * _GAP
        whole = canvas(width, row * (1 + len(attacked)) - _LINE)
        ax = _bare(whole)
        words = [f"clean: {name} ✗" for each in (truth, *_spoken(answers)) for name in each]
        size = max(6.0, min(8.5, tile * 72 / (0.56 * max(map(len, words)))))
        room = int(tile * 72 / (0.56 * size))  # letters

        def label(text: str, top: float) -> None:
            middle = top + (0.15 if narrow else tile / 2)
            lines = textwrap.fill(text, 40 if narrow else 15)
            ax.text(_GAP, middle, lines, va="center", weight="bold", fontsize=8.5)

        def place(image: Picture, column: int, top: float, *, wrong: bool) -> tuple[float, float]:
            x, y = left + _GAP + column * (tile + _GAP), top + heading
            _picture(ax, image, x, y, tile, wrong=wrong)
            return x + tile / 2, y + tile + 0.05

        def say(text: str, x: float, y: float, color: str, weight: str = "normal") -> None:
            mark = text[-2:] if text.endswith(("✓", "✗")) else ""
            short = text if len(text) <= room else f"{text[: room - 1 - len(mark)]}…{mark}"
            ax.text(x, y, short, ha="center", va="top", color=color, weight=weight, fontsize=size)

        label("clean image", _GAP)
        for column in range(shown):
            x, y = place(clean[column], column, _GAP, wrong=False)
            say(truth[column], x, y, INK, "bold")
        for index, (name, images) in enumerate(attacked.items()):
            top = _GAP + (index + 1) * row - _LINE  # the clean row has one line of text, not two
            label(name, top)
            for column in range(shown):
                before, after = (answers[name][k][column] for k in _ANSWERS)
                wrong = after != truth[column]
                x, y = place(images[column], column, top, wrong=wrong)
                say(_marked(after, truth[column]), x, y, WRONG if wrong else INK, "bold")
                say(f"clean: {_marked(before, truth[column])}", x, y + _LINE, QUIET)
        return whole

    broken = {
        name: sum(a != b for a, b in zip(answers[name]["attacked"], truth, strict=True))
        for name in attacked
    }
    return draw(
        drawing,
        alt=f"{n} images, clean and attacked. Wrong answers under attack: "
        + ", ".join(f"{name} {wrong} of {n}" for name, wrong in broken.items())
        + ".",
        caption="Top: the clean images with their true classes. Below: what each model answers "
        "when the image is attacked against it (in bold; a red frame and ✗ where it is wrong), and "
        "what it answers on the clean image; one that is wrong there counts as broken in the table."
        + (" A narrow screen shows the first three." * (n > 3)),
        file_format="png",
    )


def heatmaps(matrices: Mapping[str, Matrix], labels: Sequence[str], title: str) -> Figure:
    """Matrices over the same classes, nowhere negative, in pairs on one colour scale from 0.

    Values are written where a cell has room for them (up to 12 classes), names up to 24; beyond,
    classes are numbered in their order. Every title ends with the matrix's mean.

    Raises:
        UserError: no matrix, or one that is not as wide and as high as `labels` is long.
    """
    size = len(labels)
    if not matrices:
        raise UserError(f"{title}: no matrix to draw")
    for name, matrix in matrices.items():
        if matrix.shape != (size, size):
            raise UserError(f"{title}: {name} is {matrix.shape}, its labels {size} x {size}")
    high = max(float(matrix.max()) for matrix in matrices.values()) or 1.0
    upright = 0 if max(map(len, labels)) < 3 else 90

    def drawing(narrow: bool) -> "Canvas":
        columns = 1 if narrow else min(2, len(matrices))
        rows = math.ceil(len(matrices) / columns)
        width = NARROW if narrow else WIDE * columns / 2
        side = width / columns
        whole = canvas(width, rows * (side + 0.25) + 0.75)
        axes = whole.subplots(rows, columns, squeeze=False).ravel()
        for ax, (name, matrix) in zip(axes, matrices.items(), strict=False):
            shown = ax.imshow(matrix, vmin=0.0, vmax=high, cmap="viridis")
            ax.set_title(f"{name}\nmean {matrix.mean():.3f}")
            ax.grid(visible=False)
            if size <= _NAMED:
                points = min(7.0, 72 * (side - 0.9) / size)
                ax.set_xticks(range(size), labels, rotation=upright, fontsize=points)
                ax.set_yticks(range(size), labels, fontsize=points)
            else:
                ax.set(xlabel="class number, from 0", ylabel="class number, from 0")
            if size <= _WRITTEN:
                _write_values(ax, matrix, shown, (side - 0.9) / size)
        for ax in axes[len(matrices) :]:
            ax.set_axis_off()
        whole.colorbar(
            shown,
            ax=list(axes),
            location="bottom",
            shrink=0.6,
            aspect=40,
            label="absolute difference of correlations",
        )
        return whole

    return draw(
        drawing,
        alt=f"{title}. "
        + " ".join(
            f"{name}: mean {m.mean():.3f}, from {m.min():.3f} to {m.max():.3f}."
            for name, m in matrices.items()
        ),
        caption=f"{title}; one colour scale for all.",
    )


_ANSWERS = ("clean", "attacked")


def _spoken(answers: Mapping[str, Mapping[str, Sequence[str]]]) -> list[Sequence[str]]:
    return [given[key] for given in answers.values() for key in _ANSWERS]


def _marked(answer: str, truth: str) -> str:
    return f"{answer} {'✓' if answer == truth else '✗'}"


def _bare(whole: "Canvas") -> "Axes":
    """Axes over the whole canvas, in inches from its upper left corner."""
    width, height = whole.get_size_inches()
    whole.set_layout_engine("none")
    ax = whole.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return ax


def _picture(ax: "Axes", image: Picture, x: float, y: float, tile: float, *, wrong: bool) -> None:
    from matplotlib.patches import Rectangle

    pixels = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    ax.imshow(pixels, extent=(x, x + tile, y + tile, y), interpolation="nearest", aspect="auto")
    ax.add_patch(
        Rectangle(
            (x, y),
            tile,
            tile,
            fill=False,
            edgecolor=WRONG if wrong else QUIET,
            linewidth=3 if wrong else 0.6,
        )
    )


def _write_values(ax: "Axes", matrix: Matrix, shown: "object", cell: float) -> None:
    """Write the values into the cells, dark on light and light on dark."""
    texts = [[f"{value:.2f}" for value in row] for row in matrix]
    longest = max(len(text) for row in texts for text in row)
    fontsize = min(8.0, cell * 72 / (0.66 * longest))
    colours = shown.cmap(shown.norm(matrix))[..., :3]  # type: ignore[attr-defined]
    light = colours @ np.array([0.2126, 0.7152, 0.0722]) > 0.5
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            color = "black" if light[i, j] else "white"
            ax.text(j, i, text, ha="center", va="center", color=color, fontsize=fontsize)
