"""What tests of the command line share: a miniature run, refusals, a folder of pictures."""

from pathlib import Path

import pytest
from PIL import Image

from gacd import cli

TINY = [
    "--data.train_limit",
    "120",
    "--data.test_limit",
    "20",
    "--attacks",
    "natural",
    "--fabric.accelerator",
    "cpu",
    "--fabric.precision",
    "32-true",
]
STAGE = ["--training.epochs", "1", "--training.batch_size", "32", "--training.attack.steps", "1"]
TRAIN = ["train", "--model", "digits-cnn-2", *STAGE, *TINY]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The single line with which a command is refused, with exit code 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gacd: ")]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0].removeprefix("gacd: ")


def folders(root: Path, *, empty: str = "", each: int = 8) -> None:
    """A class-folder tree of two classes, with `each` images in a folder."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(0 if f"{part}/{name}" == empty else each):
                Image.new("RGB", (8, 8), (i, 9, 9)).save(folder / f"{i}.png")
