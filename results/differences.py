"""Draws what a teacher adds to the same student, trained adversarially without one.

    python results/differences.py [FILE]        # docs/images/differences.png

From the committed records, by the rule of `gacd seeds` and of the study's report.
"""

import sys
from pathlib import Path

from gacd.cli import parse
from gacd.report.canvas import file_format
from gacd.study.arms import NO_TEACHER
from gacd.study.figures import differences_figure
from gacd.study.measure import Arm, Measured, differences
from gacd.study.repeats import read_arms
from gacd.study.tables import rival_arms
from gacd.study.work import results

HERE = Path(__file__).parent
NAMES = {"ard": "ARD", "rslad": "RSLAD", "rslad+aft": "RSLAD+AFT", "gacd+aft": "GACD+AFT"}
NAMES |= {"rst": "adversarial training on the teacher's answers"}
METRICS = ("pgd20", "autoattack")
SMALL = "report rivals --scale small --seeds 0 1 2 3 4 5 --data.name folder --data.root none"


def panels() -> dict[str, dict[str, dict[str, Measured]]]:
    """Title, row, attack."""
    title = ["--data.title", "CIFAR-10 (JPEG), 16x16"]
    study = parse("study", [*SMALL.split(), *title, "--out", str(HERE / "small")])
    ((_, small),) = rival_arms(results(study))
    teacher = "a teacher of four times the size"
    return {
        f"10,000 images, with labels; {teacher}": _of(small, NO_TEACHER),
        "all of CIFAR-10 (JPEG), with labels; a teacher of fifteen times the size; 2.0 to 2.8 "
        "times the FLOPs": _runs("strong-teacher-cifar10"),
        f"1,000 images, with labels; {teacher} that has seen 10,000": _runs("few-images"),
        "the same 1,000 images and 8,700 without labels; the same teacher": _runs("unlabelled"),
    }


def _runs(folder: str) -> dict[str, dict[str, Measured]]:
    arms = read_arms(sorted((HERE / folder).glob("seed-*")))
    return _of({NAMES.get(name, name): arm for name, arm in arms.items()}, "pgd-at")


def _of(arms: dict[str, Arm], minus: str) -> dict[str, dict[str, Measured]]:
    shown = {name: arms[name] for name in NAMES.values() if name in arms}
    return differences(shown, arms[minus], METRICS)


if __name__ == "__main__":
    path = Path(sys.argv[1] if sys.argv[1:] else HERE.parent / "docs/images/differences.png")
    drawn = differences_figure(panels(), "the same student without a teacher", file_format(path))
    path.write_bytes(drawn.image)
    print(drawn.alt)
