"""The report's figures. Accuracies are percent everywhere, as in the records."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gacd.errors import UserError
from gacd.report.canvas import NARROW, QUIET, WIDE, Figure, canvas, draw, line_style
from gacd.report.tables import Record, image_count, method_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


class _Band(NamedTuple):
    """A row of small multiples: what it shows, and its lines by the key of the epoch's record."""

    title: str
    lines: Mapping[str, str]
    top: float | None = None


_BANDS = (
    _Band("Validation accuracy, %", {"val_natural": "clean", "val_robust": "attacked"}, 100),
    _Band("Training loss", {"loss": "loss"}),
    _Band("Mutual information, nats", {"mi": "estimate", "mi_ceiling": "ceiling"}),
)


def training_curves(curves: Mapping[str, Sequence[Record]]) -> Figure:
    """Small multiples of every stage: accuracy, loss and, where recorded, mutual information.

    `curves[stage]` are rows with `epoch` and any of `loss, val_natural, val_robust` (percent),
    `mi, mi_ceiling` (nats); a value that is missing or None leaves a gap.

    Raises:
        UserError: no stage has an epoch to draw.
    """
    bands = [
        (band, stages)
        for band in _BANDS
        if (stages := [stage for stage, rows in curves.items() if _has(rows, band)])
    ]
    if not bands:
        raise UserError("training curves: no stage has a recorded epoch")

    def drawing(narrow: bool) -> "Canvas":
        columns = 2 if narrow else max(3, min(4, max(len(stages) for _, stages in bands)))
        heights = [math.ceil(len(stages) / columns) + 0.25 for _, stages in bands]
        whole = canvas(NARROW if narrow else WIDE, 1.65 * sum(heights))
        parts = whole.subfigures(len(bands), 1, height_ratios=heights, squeeze=False)
        for part, (band, stages) in zip(parts[:, 0], bands, strict=True):
            part.suptitle(
                band.title, x=0.01, ha="left", weight="bold", fontsize=8.5 if narrow else 10
            )
            rows = math.ceil(len(stages) / columns)
            axes = part.subplots(rows, columns, squeeze=False, sharey=band.top is not None).ravel()
            for ax, stage in zip(axes, stages, strict=False):
                _small_multiple(ax, stage, curves[stage], band)
                ax.set_title(_broken(stage, 18 if narrow else 27))
            for ax in axes[len(stages) :]:
                ax.set_axis_off()
            part.supxlabel("epoch", fontsize=8)
            if len(band.lines) > 1:
                part.legend(
                    *axes[0].get_legend_handles_labels(),
                    loc="upper right",
                    ncols=2,
                    fontsize=7.5 if narrow else 8,
                    handlelength=1.8,
                    columnspacing=0.8,
                    borderaxespad=0.2,
                )
        return whole

    return draw(
        drawing,
        alt="Training curves. " + " ".join(_last_words(*item) for item in curves.items()),
        caption="Every stage by epoch. Accuracies are those on held-out training images, "
        "the only ones that choose a checkpoint; where a stage trains features alone "
        "(…/features), of the nearest class mean. Losses of different methods are not comparable.",
    )


def accuracy_against_eps(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    eps_marked: float,
    in_255ths: bool,
) -> Figure:
    """Accuracy (%) of every model against the attack's budget, with its interval as a band.

    `curves[model]` are `(eps, accuracy, low, high)`; `eps_marked` is the budget of the table.
    Budgets for photographs are shown in 255ths, budgets for other data as they are.

    Raises:
        UserError: a model without a point.
    """
    for name, points in curves.items():
        if not points:
            raise UserError(f"accuracy against eps: no point for {name}")
    if not curves:
        raise UserError("accuracy against eps: no model")
    unit = 255.0 if in_255ths else 1.0

    def drawing(narrow: bool) -> "Canvas":
        whole = canvas(NARROW, 3.1 + 0.2 * len(curves)) if narrow else canvas(WIDE, 4.2)
        ax = whole.subplots()
        for index, (name, points) in enumerate(curves.items()):
            eps, accuracy, low, high = zip(*sorted(points), strict=True)
            scaled = [unit * e for e in eps]
            style = line_style(index)
            ax.plot(scaled, accuracy, label=name, **style._asdict())
            ax.fill_between(scaled, low, high, color=style.color, alpha=0.13, linewidth=0)
        ax.axvline(unit * eps_marked, color=QUIET, linewidth=1, zorder=0)
        ax.annotate(
            "budget of the table",
            (unit * eps_marked, 100),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            color=QUIET,
            fontsize=8,
        )
        ax.set_ylim(0, 100)
        ax.set_xlim(left=0)
        ax.set_xlabel("attack budget ε" + (" (255ths)" if in_255ths else ""))
        ax.set_ylabel("accuracy, %")
        whole.legend(loc="outside lower left" if narrow else "outside right upper")
        return whole

    ends = {name: (min(points), max(points)) for name, points in curves.items()}
    return draw(
        drawing,
        alt="Accuracy against the attack's budget. "
        + " ".join(
            f"{name}: {first[1]:.1f} % at ε = {first[0]:.3g}, {last[1]:.1f} % at {last[0]:.3g}."
            for name, (first, last) in ends.items()
        ),
        caption="Accuracy against the attack's budget; an image broken at one counts as broken at "
        "all above, and attacks start from other noise than the table's, so the two may differ a "
        "little. Bands: 95 % intervals over the test images.",
    )


def natural_against_autoattack(results: Sequence[Record]) -> Figure:
    """One point a record: natural accuracy across, AutoAttack accuracy up, intervals as bars.

    `results` as for `gacd.report.tables.comparison_table`; records without both are left out.

    Raises:
        UserError: no record has both accuracies.
    """
    known = [r for r in results if r.get("natural") is not None and r.get("autoattack") is not None]
    if not known:
        raise UserError("natural against AutoAttack: no record has both accuracies")

    pairs = sorted({(int(r["n"]), image_count(r, "autoattack")) for r in known})
    sizes = "; ".join(f"natural {n:,}, AutoAttack {part:,}" for n, part in pairs)

    def drawing(narrow: bool) -> "Canvas":
        whole = canvas(NARROW, 3.1 + 0.2 * len(known)) if narrow else canvas(WIDE, 4.2)
        ax = whole.subplots()
        for index, record in enumerate(known):
            style = line_style(index)
            ax.errorbar(
                [record["natural"]],
                [record["autoattack"]],
                xerr=_bar(record, "natural"),
                yerr=_bar(record, "autoattack"),
                linestyle="none",
                color=style.color,
                marker=style.marker,
                markersize=7,
                elinewidth=1,
                label=str(method_cell(record)),
            )
        ax.set_xlabel("natural accuracy, %")
        ax.set_ylabel("accuracy under AutoAttack, %")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        whole.legend(loc="outside lower left" if narrow else "outside right upper")
        return whole

    return draw(
        drawing,
        alt="Natural accuracy against accuracy under AutoAttack. "
        + " ".join(
            f"{method_cell(r)}: {r['natural']:.1f} % and {r['autoattack']:.1f} %." for r in known
        ),
        caption=f"Up and to the right is better. Bars: 95 % intervals over test images ({sizes}).",
    )


def _has(rows: Sequence[Record], band: _Band) -> bool:
    return any(row.get(key) is not None for row in rows for key in band.lines)


def _small_multiple(ax: "Axes", stage: str, rows: Sequence[Record], band: _Band) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    for index, (key, label) in enumerate(band.lines.items()):
        style = line_style(index)
        marker = style.marker if len(rows) <= 15 else ""
        values = [math.nan if row.get(key) is None else row[key] for row in rows]
        ax.plot(
            epochs, values, label=label, markersize=3.5, **style._replace(marker=marker)._asdict()
        )
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if band.top is not None:
        ax.set_ylim(0, band.top)


def _broken(stage: str, width: int) -> str:
    """A stage's name in lines of at most `width` characters, as far as / and + let it break."""
    lines = [""]
    for piece in re.findall(r"[/+]?[^/+]*", stage):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _last_words(stage: str, rows: Sequence[Record]) -> str:
    if not rows:
        return f"{stage}: not recorded."
    words = {
        "loss": "loss {:.3g}",
        "val_natural": "{:.1f} % clean",
        "val_robust": "{:.1f} % attacked",
    }
    last = rows[-1]
    said = [text.format(last[key]) for key, text in words.items() if last.get(key) is not None]
    return f"{stage}, epoch {last['epoch']}: {', '.join(said)}."


def _bar(record: Record, key: str) -> "list[list[float]] | None":
    """Lengths of the error bar below and above, as matplotlib wants them."""
    interval = (record.get("intervals") or {}).get(key)
    if not interval:
        return None
    low, high = interval
    return [[max(0.0, record[key] - low)], [max(0.0, high - record[key])]]
