"""A study's figures: Figure 2's sweeps, differences of correlations, the rivals, differences."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gacd.report.canvas import INK, NARROW, WIDE, Figure, FileFormat, canvas, draw, line_style
from gacd.report.pictures import heatmaps
from gacd.report.tables import HEADLINES, Record, heading, signed
from gacd.study.arms import NO_TEACHER, SWEPT, UNDEFENDED
from gacd.study.evidence import METRICS
from gacd.study.measure import Arm, Measured, contrast, differences
from gacd.study.paper import method_name
from gacd.study.rows import relative_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_CORRELATED = ("ard", "gacd", "gacd+aft")  # drawn; every student stands in the table
_SWEPT = {
    "negatives": "negatives k (log scale)",
    "temperature": "temperature T (log scale)",
}


def sweeps(arms: Mapping[str, Mapping[float, Arm]]) -> Figure | None:
    """Figure 2: accuracies against the number of negatives and the temperature, with intervals."""
    found: dict[str, dict[str, dict[float, Measured]]] = {}
    for label, by_value in arms.items():
        for metric in METRICS:
            points = {
                value: measured
                for value, arm in by_value.items()
                if (measured := contrast([(1.0, arm)], metric))
            }
            if points:
                found.setdefault(label, {})[metric] = points
    if not found:
        return None
    every = [
        p for metrics in found.values() for points in metrics.values() for p in points.values()
    ]
    top = max(point.interval()[1] for point in every)

    def drawing(narrow: bool) -> "Canvas":
        size = (NARROW, 2.6 * len(found) + 0.7) if narrow else (WIDE, 3.7)
        whole = canvas(*size)
        shape = (len(found), 1) if narrow else (1, len(found))
        axes = whole.subplots(*shape, squeeze=False).ravel()
        for ax, (label, metrics) in zip(axes, found.items(), strict=True):
            _sweep(ax, label, metrics)
            ax.set_ylim(0, 1.05 * top)
        handles, labels = axes[0].get_legend_handles_labels()
        whole.legend(handles, labels, loc="outside lower left", ncols=1 if narrow else 3)
        return whole

    said = []
    for label, metrics in found.items():
        for metric, points in metrics.items():
            values = ", ".join(f"{p.mean:.1f} % at {value:g}" for value, p in points.items())
            said.append(f"{heading(metric)} by {label}: {values}.")
    return draw(
        drawing,
        alt="Accuracy against the number of negatives and the temperature. " + " ".join(said),
        caption=f"Figure 2. {_swept(arms)}. Bars are 95 % intervals over seeds and test images "
        "(one seed: over the images alone).",
    )


def _swept(arms: Mapping[str, Mapping[float, Arm]]) -> str:
    """Which method and networks, and what the other setting is while one varies."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, by_value in arms.items():
        for result in (result for arm in by_value.values() for result in arm.results):
            found.setdefault(name, result.labels)
    one = next(iter(found.values()))
    text = f"{method_name(str(one['method']))}, {one['teacher']} → {one['student']}"
    for name, (sign, held) in SWEPT.items():
        if name in found and held in found[name]:
            text += f"; {sign} at {held} {found[name][held]:g}"
    return text


def correlations(records: Sequence[Record], view: str, title: str) -> Figure | None:
    """Figures 3 and 4: |corr(teacher) - corr(student)| between classes, the mean over seeds."""
    matrices: dict[str, list[np.ndarray]] = {}
    for record in records:
        for name, views in record["correlations"].items():
            if name in _CORRELATED:
                matrix = np.array(views[view]["matrix"], float)
                matrices.setdefault(method_name(name), []).append(matrix)
    if not matrices:
        return None
    means = {name: np.stack(each).mean(axis=0) for name, each in matrices.items()}
    return heatmaps(means, records[-1]["classes"], title)


def rivals_figure(arms: Mapping[str, Arm]) -> Figure | None:
    """Natural against AutoAttack accuracy, a numbered point a method, its area the cost."""
    baseline, points = arms.get(NO_TEACHER), {}
    for name, arm in arms.items():
        pair = [contrast([(1.0, arm)], metric) for metric in ("natural", "autoattack")]
        if pair[0] and pair[1]:
            points[name] = (pair[0], pair[1])
    least = points[NO_TEACHER][1].mean / 3 if NO_TEACHER in points else 0.0
    far = [
        f"{name} ({x.mean:.1f} and {y.mean:.1f} %)"
        for name, (x, y) in points.items()
        if y.mean < least
    ]
    points = {name: pair for name, pair in points.items() if pair[1].mean >= least}
    if not points:
        return None
    costs = {name: relative_cost(arms[name], baseline) for name in points}

    def drawing(narrow: bool) -> "Canvas":
        whole = canvas(NARROW, 3.1 + 0.2 * len(points)) if narrow else canvas(WIDE, 4.4)
        ax = whole.subplots()
        for index, (name, (x, y)) in enumerate(points.items()):
            style, cost = line_style(index), costs[name]
            ax.errorbar(
                x.mean,
                y.mean,
                xerr=_bars(x),
                yerr=_bars(y),
                color=style.color,
                elinewidth=0.8,
                alpha=0.5,
            )
            ax.scatter(
                x.mean,
                y.mean,
                s=60 * (cost or 1.0),
                marker=style.marker,
                facecolor=style.color if cost else "none",
                edgecolor=style.color,
                zorder=3,
            )
            label = f"{index + 1}  {name}"
            ax.plot([], [], style.marker, color=style.color, markersize=7, label=label)
        whole.legend(loc="outside lower left" if narrow else "outside right upper")
        ax.set_xlabel("natural accuracy, %")
        ax.set_ylabel("accuracy under AutoAttack, %")
        whole.draw_without_rendering()  # now the axes have their size
        _numbers(ax, [(x.mean, y.mean) for x, y in points.values()])
        return whole

    said = []
    for name, (x, y) in points.items():
        cost = costs[name]
        times = f", cost {cost:.2f}" if cost else ""
        said.append(f"{name}: {x.mean:.1f} % and {y.mean:.1f} %{times}.")
    absent = f" Not drawn, far below: {', '.join(far)}."
    area = " Area: FLOPs of training relative to adversarial training without a teacher."
    return draw(
        drawing,
        alt="Natural accuracy against accuracy under AutoAttack. " + " ".join(said),
        caption="Up and to the right is better. Bars are 95 % intervals over seeds and test "
        f"images{_unequal(points.values())}.{area * any(costs.values())}{absent * bool(far)}",
    )


def _numbers(ax: "Axes", points: Sequence[tuple[float, float]]) -> None:
    """Number the points, each at the place around it that is farthest from everything else."""
    at = ax.transData.transform(points) * 72 / ax.figure.dpi  # in points of print
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = np.concatenate([r * np.c_[np.cos(angles), np.sin(angles)] for r in (11, 20)])
    taken = list(at)
    for index, here in enumerate(at):
        room = [min(np.hypot(*(np.array(taken) - here - offset).T)) for offset in around]
        best = around[int(np.argmax(np.minimum(room, 10)))]  # the nearest with room enough
        taken.append(here + best)
        ax.annotate(
            f"{index + 1}",
            points[index],
            xytext=tuple(best),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=INK,
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.5},
        )


def _unequal(points: Iterable[tuple[Measured, Measured]]) -> str:
    counts = {len(x.seeds) for x, _ in points}
    return f" ({min(counts)} to {max(counts)} seeds)" if len(counts) > 1 else ""


def rivals_differences(arms: Mapping[str, Arm]) -> Figure | None:
    """What every method adds to the student without a teacher."""
    baseline = arms.get(NO_TEACHER)
    near = {name: arm for name, arm in arms.items() if name != UNDEFENDED}
    found = {} if baseline is None else differences(near, baseline, HEADLINES)
    rows = {name: row for name, row in found.items() if row}
    return differences_figure({"": rows}, NO_TEACHER) if rows else None


def differences_figure(
    panels: Mapping[str, Mapping[str, Mapping[str, Measured]]],
    minus: str,
    file_format: FileFormat = "svg",
) -> Figure:
    """Points more than another model, with their intervals: `panels[title][row][metric]`.

    A difference that is decided (the whole interval on one side of 0, more than one seed) is a
    filled mark, any other a hollow one.
    """
    metrics = list(
        dict.fromkeys(m for rows in panels.values() for row in rows.values() for m in row)
    )
    heights = [len(metrics) * len(rows) + 2 for rows in panels.values()]

    def drawing(narrow: bool) -> "Canvas":
        whole = canvas(NARROW if narrow else WIDE, 0.16 * sum(heights) + 0.8)
        axes = whole.subplots(
            len(panels), 1, sharex=True, squeeze=False, height_ratios=heights
        ).ravel()
        for ax, (title, rows) in zip(axes, panels.items(), strict=True):
            _forest(ax, rows, metrics)
            names = [textwrap.fill(name, 16 if narrow else 32) for name in rows]
            ax.set_yticks(range(len(rows)), names)
            ax.set_title(textwrap.fill(title, 48 if narrow else 120))
        axes[-1].set_xlabel(
            f"points more than {minus}, with 95 % intervals" + "\n" * narrow + " (filled: decided)"
        )
        whole.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
        return whole

    said = [
        f"{f'{title}, ' if title else ''}{row}: "
        + ", ".join(f"{signed(m.mean)} {heading(metric)}" for metric, m in row_of.items())
        + "."
        for title, rows in panels.items()
        for row, row_of in rows.items()
    ]
    return draw(
        drawing,
        alt=f"Percentage points more than {minus}. " + " ".join(said),
        caption="Bars are 95 % intervals over seeds and test images. Filled: the interval is on "
        "one side of 0, with more than one seed.",
        file_format=file_format,
    )


def _forest(ax: "Axes", rows: Mapping[str, Mapping[str, Measured]], metrics: Sequence[str]) -> None:
    step = 0.8 / len(metrics)
    for index, metric in enumerate(metrics):
        style = line_style(index)
        ax.plot([], [], style.marker, color=style.color, label=heading(metric))
        for place, row in enumerate(rows.values()):
            if (found := row.get(metric)) is None:
                continue
            ax.errorbar(
                found.mean,
                place + (index - (len(metrics) - 1) / 2) * step,
                xerr=np.array([[found.mean - found.interval()[0]]] * 2),
                color=style.color,
                marker=style.marker,
                markerfacecolor=style.color if found.decided else "white",
                elinewidth=1.2,
            )
    ax.axvline(0, color=INK, linewidth=1, zorder=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params("y", length=0, labelcolor=INK)
    ax.grid(visible=False, axis="y")


def _sweep(ax: "Axes", label: str, metrics: Mapping[str, Mapping[float, Measured]]) -> None:
    values = sorted({value for points in metrics.values() for value in points})
    for index, (metric, points) in enumerate(metrics.items()):
        style = line_style(index)
        ax.errorbar(
            # side by side, so that no bar hides another
            [value * 1.04 ** (index - (len(metrics) - 1) / 2) for value in points],
            [p.mean for p in points.values()],
            yerr=np.array([_bars(p) for p in points.values()]).reshape(-1, 2).T,
            elinewidth=1,
            capsize=2.5,
            label=heading(metric),
            **style._asdict(),
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    margin = (values[-1] / values[0]) ** 0.05 if len(values) > 1 else 1.2
    ax.set_xlim(values[0] / margin, values[-1] * margin)
    ax.set_xlabel(_SWEPT[label])
    ax.set_ylabel("accuracy, %")


def _bars(found: Measured) -> "np.ndarray":
    """Lengths of the error bars below and above, [2, 1]."""
    low, high = found.interval()
    return np.array([[found.mean - low], [high - found.mean]])
