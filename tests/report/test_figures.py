"""The figures: what they refuse, what they say in words, and pixels where pixels can be known."""

import base64
import io
import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gacd.errors import UserError
from gacd.report import figures, pictures
from gacd.report.canvas import Figure, canvas, draw, line_style

RED = (179, 38, 30)
SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"


def is_svg(image: bytes) -> bool:
    return ET.fromstring(image).tag == f"{SVG}svg"


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def middle_colour(image: ET.Element) -> tuple[int, ...]:
    """Of a picture embedded in an SVG."""
    drawn = pixels(base64.b64decode(image.attrib[HREF].partition(",")[2]))
    return tuple(drawn[len(drawn) // 2, drawn.shape[1] // 2].tolist())


def reds(image: bytes) -> int:
    return int((pixels(image) == RED).all(axis=2).sum())


def test_the_report_is_imported_without_matplotlib_and_torch():
    code = (
        "import sys, gacd.report.page, gacd.report.figures; "
        "assert not {'matplotlib', 'torch', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_line_styles_differ_without_their_colour():
    styles = [line_style(i)[1:] for i in range(40)]
    assert len(set(styles)) == 40


def test_training_curves_say_how_every_stage_ended(curves):
    figure = figures.training_curves(curves)
    assert is_svg(figure.image)
    assert is_svg(figure.narrow)
    assert "teacher, epoch 3: loss 0.667, 93.0 % clean, 53.0 % attacked." in figure.alt
    assert "gacd: features, epoch 3: loss 1." in figure.alt


def test_missing_epochs_leave_gaps():
    rows = [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": 1.0, "val_natural": None}]
    assert "epoch 2: loss 1." in figures.training_curves({"a": rows, "b": []}).alt


def test_the_same_records_give_the_same_bytes():
    rows = {"a": [{"epoch": 1, "loss": 1.0}]}
    assert figures.training_curves(rows).image == figures.training_curves(rows).image


def test_accuracy_against_eps_gives_both_ends_in_words():
    points = [(8 / 255, 30.0, 25.0, 35.0), (0.0, 90.0, 85.0, 95.0)]
    figure = figures.accuracy_against_eps({"gacd": points}, 8 / 255, False)
    assert is_svg(figure.image)
    assert "gacd: 90.0 % at ε = 0, 30.0 % at 0.0314." in figure.alt


def test_scatter_leaves_out_what_was_not_measured(results):
    more = {**results[0], "method": "unmeasured", "autoattack": None}
    figure = figures.natural_against_autoattack([*results, more])
    assert is_svg(figure.image)
    assert "gacd (student): 95.3 % and 53.5 %." in figure.alt
    assert "unmeasured" not in figure.alt


@pytest.fixture
def drawn(monkeypatch):
    """What figures are drawn on: the wide drawing of each."""
    kept, draw = [], figures.draw
    monkeypatch.setattr(
        figures,
        "draw",
        lambda drawing, **more: kept.append(drawing(False)) or draw(drawing, **more),
    )
    return kept


def test_lines_are_called_by_what_they_show(curves, drawn):
    figures.training_curves(curves)
    (whole,) = drawn
    axes = [ax for part in whole.subfigs for ax in part.axes if ax.lines]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes[0].lines}
    assert lines == {"clean": [91.0, 92.0, 93.0], "attacked": [51.0, 52.0, 53.0]}
    lines = {line.get_label(): list(line.get_ydata()) for line in axes[-1].lines}
    assert lines == {"estimate": [1.0, 2.0, 3.0], "ceiling": [7.2] * 3}


def test_a_curve_runs_through_its_points_inside_its_band(drawn):
    points = [(8 / 255, 30.0, 25.0, 36.0), (0.0, 90.0, 85.0, 95.0), (4 / 255, 60.0, 54.0, 65.0)]
    figures.accuracy_against_eps({"gacd": points}, 4 / 255, True)
    (ax,) = drawn[0].axes
    line, mark = ax.lines
    assert list(line.get_xdata()) == pytest.approx([0, 4, 8])
    assert list(line.get_ydata()) == [90, 60, 30]
    assert list(mark.get_xdata()) == pytest.approx([4, 4])
    (band,) = ax.collections
    corners = {(round(x), y) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0, 85), (0, 95), (4, 54), (4, 65), (8, 25), (8, 36)}


def test_points_are_natural_across_and_autoattack_up_with_their_bars(results, drawn):
    intervals = {"natural": [93.1, 96.0], "autoattack": [46.6, 58.0]}
    figures.natural_against_autoattack([{**results[2], "intervals": intervals}])
    ((points,),) = (ax.containers for ax in drawn[0].axes)
    line, _, (across, up) = points.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([95.3], [53.5])
    np.testing.assert_allclose(across.get_segments(), [[[93.1, 53.5], [96.0, 53.5]]])
    np.testing.assert_allclose(up.get_segments(), [[[95.3, 46.6], [95.3, 58.0]]])


def test_wrong_answers_are_counted_and_framed():
    clean = np.full((2, 8, 8, 3), 128, np.uint8)
    truth = ["cat", "$5 dog$"]

    def drawn(attacked: list[str]) -> Figure:
        answers = {"net": {"clean": truth, "attacked": attacked}}
        return pictures.attacked_pictures(clean, {"net": clean}, answers, truth)

    right, wrong = drawn(truth), drawn(["cat", "frog"])
    assert "net 0 of 2" in right.alt
    assert "net 1 of 2" in wrong.alt
    assert reds(right.image) == reds(right.narrow) == 0
    assert reds(wrong.image) > 500
    assert reds(wrong.narrow) > 500


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_enlarged_without_new_colours(channels):
    """Nearest neighbour: a picture's own bytes, and each in a block of the same size."""
    levels = np.array([[10, 60], [110, 160]], np.uint8)
    clean = np.repeat(levels[None, :, :, None], channels, axis=3)
    answers = {"net": {"clean": ["a"], "attacked": ["a"]}}
    figure = pictures.attacked_pictures(clean, {"net": clean}, answers, ["a"])
    drawn = pixels(figure.image)
    areas = [int((drawn == (level, level, level)).all(axis=2).sum()) for level in levels.ravel()]
    assert min(areas) > 2000
    assert max(areas) < 1.1 * min(areas)


def test_heatmaps_share_one_scale():
    """Were the scales their own, a constant matrix and its tenfold would look the same."""
    small = np.full((3, 3), 0.1)
    labels = ["a", "b", "c"]
    same, other = (
        [middle_colour(image) for image in ET.fromstring(figure.image).iter(f"{SVG}image")]
        for figure in (
            pictures.heatmaps({"a": small, "b": small}, labels, "t"),
            pictures.heatmaps({"a": small, "b": 10 * small}, labels, "t"),
        )
    )
    assert same[0] == same[1]
    assert other[0] != other[1]


def test_heatmaps_of_many_classes_say_their_range():
    matrix = np.linspace(0, 1, 400).reshape(20, 20)
    figure = pictures.heatmaps({"gacd": matrix}, [str(i) for i in range(20)], "Differences")
    assert "gacd: mean 0.500, from 0.000 to 1.000." in figure.alt


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figures.training_curves({"a": []}), "no stage has a recorded epoch"),
        (lambda: figures.accuracy_against_eps({}, 0.1, False), "no model"),
        (lambda: figures.accuracy_against_eps({"a": []}, 0.1, False), "no point for a"),
        (lambda: figures.natural_against_autoattack([]), "no record"),
        (lambda: pictures.heatmaps({}, ["a"], "t"), "no matrix"),
        (lambda: pictures.heatmaps({"m": np.eye(2)}, ["a"], "t"), r"m is \(2, 2\)"),
        (
            lambda: pictures.attacked_pictures(np.zeros((2, 8, 8, 1), np.uint8), {}, {}, ["a"]),
            "2 images with 1 true classes",
        ),
        (
            lambda: pictures.attacked_pictures(
                np.zeros((1, 8, 8, 1), np.uint8), {"m": np.zeros((1, 8, 8, 1), np.uint8)}, {}, ["a"]
            ),
            "m needs 1 images and 1 answers",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(UserError, match=message):
        draw()


def test_a_class_name_in_another_script_is_drawn_without_a_word():
    def drawing(narrow):
        drawn = canvas(2.0, 1.0)
        drawn.add_subplot().set_title("猫")
        return drawn

    assert draw(drawing, alt="a cat", caption="", file_format="png").image.startswith(b"\x89PNG")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["+gacd", "+rslad", "+aft", "/finetuned", "/"]), min_size=1))
def test_long_names_of_stages_break_where_they_are_joined(parts):
    stage = "".join(parts)
    lines = figures._broken(stage, 18).split("\n")
    assert "".join(lines) == stage
    assert all(len(line) <= 18 for line in lines)
    for above, below in itertools.pairwise(lines):  # none breaks without need
        assert len(above) + len(re.match(r".[^/+]*", below)[0]) > 18
