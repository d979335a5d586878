"""What a study's figures draw: points, bars and matrices, as the cells and records have them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure as Canvas

from gacd.report.canvas import Figure
from gacd.study import figures
from gacd.study.arms import sweep
from gacd.study.measure import Arm, contrast
from made_up import Maker


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Canvas]:
    """Every drawing for the desk, before it is a picture."""
    kept: list[Canvas] = []

    def draw(drawing: Callable[[bool], Canvas], *, alt: str, caption: str, **_: str) -> Figure:
        kept.append(drawing(False))
        return Figure(image=b"", alt=alt, caption=caption, narrow=b"", width=1)

    monkeypatch.setattr(figures, "draw", draw)
    return kept


def interval(arm: Arm, metric: str) -> tuple[float, float]:
    found = contrast([(1.0, arm)], metric)
    assert found is not None
    return found.interval()


def test_a_sweep_stands_at_its_values_with_its_intervals(maker: Maker, drawn: list[Canvas]) -> None:
    """Near 0 and 100 %, where the two sides of an interval differ."""
    accuracies = {4.0: {"natural": 97.0, "pgd20": 3.0}, 16.0: {"natural": 96.0, "pgd20": 4.0}}
    labels = {"method": "gacd+aft", "teacher": "a", "student": "b", "temperature": 0.1}
    arms = {
        k: Arm(str(k), tuple(
            maker("figure2", seed, {m: a + seed for m, a in each.items()}, negatives=k, **labels)
            for seed in (0, 1)
        ))
        for k, each in accuracies.items()
    }  # fmt: skip
    figure = figures.sweeps({"negatives": arms})
    assert figure and "GACD+AFT, a → b; k at temperature 0.1." in figure.caption
    (ax,) = drawn[0].axes
    assert ax.get_xscale() == "log" and "negatives" in ax.get_xlabel()
    for container, metric in zip(ax.containers, ("natural", "pgd20"), strict=True):
        line, _, (bars,) = container.lines
        for number, (k, arm) in enumerate(arms.items()):
            mean = accuracies[k][metric] + 0.5
            low, high = interval(arm, metric)
            assert abs((high - mean) - (mean - low)) > 1
            x, y = line.get_xydata()[number].tolist()
            assert y == pytest.approx(mean) and x == pytest.approx(k, rel=0.03)  # side by side
            assert bars.get_segments()[number][:, 1].tolist() == pytest.approx([low, high])


def test_rivals_stand_at_natural_and_robust_accuracy_as_large_as_their_cost(
    maker: Maker, drawn: list[Canvas]
) -> None:
    """By FLOPs where they are known: seconds depend on the machine."""
    places = {"no teacher": (70.0, 30.0, 1e9), "ARD": (80.0, 20.0, 3e9), "GACD": (60.0, 40.0, 2e9)}
    arms = {}
    for name, (natural, autoattack, flops) in places.items():
        cell = maker("rivals", 0, {"natural": natural, "autoattack": autoattack}, method=name)
        spent = {"train_flops": flops, "train_seconds": 1.0}
        cell = dataclasses.replace(cell, record={**(cell.record or {}), **spent})
        arms[name] = Arm(name, (cell,))
    figures.rivals_figure(arms)
    (ax,) = drawn[0].axes
    assert "natural" in ax.get_xlabel() and "AutoAttack" in ax.get_ylabel()
    points = [each for each in ax.collections if isinstance(each, PathCollection)]
    for (name, (x, y, flops)), point, container in zip(
        places.items(), points, ax.containers, strict=True
    ):
        assert point.get_offsets()[0].tolist() == pytest.approx([x, y])
        assert point.get_sizes()[0] == pytest.approx(60 * flops / 1e9)
        line, _, (across, upright) = container.lines
        assert line.get_xydata()[0].tolist() == pytest.approx([x, y])
        for bars, axis, metric in ((across, 0, "natural"), (upright, 1, "autoattack")):
            ends = bars.get_segments()[0][:, axis].tolist()
            assert ends == pytest.approx(interval(arms[name], metric))


def test_differences_stand_at_their_means_and_are_filled_where_they_are_decided(
    maker: Maker, drawn: list[Canvas]
) -> None:
    accuracies = {"no teacher": 50.0, "KD": 80.0, "GACD": 51.0, "undefended": 90.0}
    arms = {
        name: Arm(name, tuple(maker("rivals", s, {"pgd20": a + s}, method=name) for s in (0, 1, 2)))
        for name, a in accuracies.items()
    }
    figure = figures.rivals_differences(arms)
    assert figure is not None and "KD: +30.0 PGD-20. GACD: +1.0 PGD-20." in figure.alt
    (ax,) = drawn[0].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["KD", "GACD"]
    for place, (name, container) in enumerate(zip(("KD", "GACD"), ax.containers, strict=True)):
        found = contrast([(1.0, arms[name]), (-1.0, arms["no teacher"])], "pgd20")
        assert found is not None
        line, _, (bars,) = container.lines
        assert line.get_xydata()[0].tolist() == pytest.approx([found.mean, place])
        ends = bars.get_segments()[0][:, 0].tolist()
        assert ends == pytest.approx(found.interval())
        assert (line.get_markerfacecolor() != "white") == (name == "KD") == found.decided
    assert figures.rivals_differences({"KD": arms["KD"]}) is None  # from nothing


def test_one_seed_decides_no_difference(maker: Maker, drawn: list[Canvas]) -> None:
    arms = {
        name: Arm(name, (maker("rivals", 0, {"pgd20": accuracy}, method=name),))
        for name, accuracy in {"no teacher": 50.0, "KD": 80.0}.items()
    }
    figures.rivals_differences(arms)
    (container,) = drawn[0].axes[0].containers
    assert container.lines[0].get_markerfacecolor() == "white"


def test_differences_of_correlations_are_means_over_seeds_of_the_view_asked_for() -> None:
    def record(natural: float, attacked: float) -> dict[str, Any]:
        views = {"natural": natural, "attacked": attacked}
        found = {view: {"matrix": [[0.0, x], [x, 0.0]]} for view, x in views.items()}
        return {"classes": ["cat", "dog"], "correlations": {"gacd": found}}

    records = [record(0.1, 0.6), record(0.3, 0.8)]
    for view, mean in (("natural", 0.2), ("attacked", 0.7)):
        figure = figures.correlations(records, view, "Differences")
        assert figure is not None
        assert f"GACD: mean {mean / 2:.3f}, from 0.000 to {mean:.3f}." in figure.alt


def test_a_sweep_has_the_seeds_that_all_its_values_have(maker: Maker) -> None:
    """The default's cell is other studies', which may have more seeds."""
    seeds: dict[int, tuple[int, ...]] = {4: (0, 1), 16: (0, 1, 2, 3), 64: ()}
    cells = [
        maker(
            "figure2", seed, {"pgd20": 30.0} if seed in done else None, method="gacd", negatives=k
        )
        for k, done in seeds.items()
        for seed in range(4)
    ]
    arms = sweep(cells, "negatives")
    assert {k: list(arm.done("pgd20")) for k, arm in arms.items()} == {
        4: [0, 1],
        16: [0, 1],
        64: [],
    }
    planned = sweep([c for c in cells if not c.record], "negatives").values()
    assert all(arm.results and not arm.done("pgd20") for arm in planned)
