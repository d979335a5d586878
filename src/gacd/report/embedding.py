"""Scatter plots of embedded features, a panel a model (Figure 5)."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gacd.errors import UserError
from gacd.report.canvas import INK, NARROW, WIDE, Figure, canvas, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Points = Sequence[Sequence[float]]
"""Places (x, y)."""

# A shape each, so that the groups differ in grey too; the last, drawn on top, is the attacked one.
_STYLES = (
    {"marker": "o", "s": 20, "facecolors": "none", "edgecolors": "#0072b2", "linewidths": 1.1},
    {"marker": "^", "s": 24, "facecolors": "#009e73", "edgecolors": "none", "alpha": 0.75},
    {"marker": "x", "s": 20, "color": "#d55e00", "linewidths": 1.3},
)


def embedding_scatter(
    models: Mapping[str, Mapping[str, Points]],
    title: str,
    *,
    notes: Mapping[str, str] | None = None,
    one_scale: bool = False,
) -> Figure:
    """The places of every group of images, `models[model][group]`, side by side.

    At most three groups, the same for every model. `notes[model]` is written under its name.
    With `one_scale` all panels show the same section of one embedding.

    Raises:
        UserError: no model, models with different groups, or more than three of them.
    """
    groups = [list(each) for each in models.values()]
    if not groups or any(each != groups[0] for each in groups):
        raise UserError(f"{title}: every model needs the same groups of images")
    if not 1 <= len(groups[0]) <= len(_STYLES):
        raise UserError(f"{title}: {len(groups[0])} groups, but 1 to {len(_STYLES)} can be drawn")

    places = [place for each in models.values() for points in each.values() for place in points]
    everywhere = [_with_margin(min(axis), max(axis)) for axis in zip(*places, strict=True)]
    spans = [high - low for low, high in everywhere]
    shape = min(max(spans[1] / spans[0], 0.4), 1.6) if one_scale else 0.85  # height by width

    def drawing(narrow: bool) -> "Canvas":
        columns = min(len(models), 1 if narrow else 3 if len(models) in (3, 5, 6) else 2)
        if len(models) == 1:
            columns = 1
        rows = math.ceil(len(models) / columns)
        width = NARROW if narrow else min(WIDE, 4.2 * columns)
        below = 0.2 * (1 + len(groups[0]) * narrow)
        whole = canvas(width, rows * (shape * width / columns + 0.45) + below)
        axes = whole.subplots(rows, columns, squeeze=False)
        for ax, (model, found) in zip(axes.ravel(), models.items(), strict=False):
            for style, (group, points) in zip(_STYLES, found.items(), strict=False):
                x, y = zip(*points, strict=True)
                ax.scatter(x, y, label=group, **style)
            note = (notes or {}).get(model, "")
            ax.set_title(f"{model}\n{note}".rstrip(), color=INK)
            ax.set(xticks=[], yticks=[])
            if one_scale:
                ax.set(xlim=everywhere[0], ylim=everywhere[1])
            ax.spines[["top", "right"]].set_visible(True)
            ax.set_aspect("equal", adjustable="box" if one_scale else "datalim")
        for ax in axes.ravel()[len(models) :]:
            ax.set_axis_off()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        whole.legend(
            handles, labels, loc="outside lower left", ncols=1 if narrow else 3, markerscale=1.3
        )
        return whole

    counts = ", ".join(
        f"{len(points)} {group}" for group, points in next(iter(models.values())).items()
    )
    return draw(
        drawing,
        alt=f"{title}. In every panel: {counts}. "
        + " ".join(f"{model}: {note}." for model, note in (notes or {}).items()),
        caption=f"{title}. Axes have no unit and no direction.",
    )


def _with_margin(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
