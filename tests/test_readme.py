"""What README and the package's docstring tell a Python user to write, run as it stands there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gacd
from gacd.anchors import AnchorBank, Fingerprint
from gacd.data.batches import iterate
from gacd.data.load import load_splits
from gacd.models import create_model
from gacd.models.checkpoints import save_model
from gacd.models.projection import Projection

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
STEP, MEASURE, EXPORT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_step_of_ones_own_loop(labelled: bool, generator: torch.Generator) -> None:
    names: dict[str, Any] = {}
    exec(STEP, names)
    train = load_splits("digits", train_limit=60, seed=0).train
    student, teacher = (
        create_model(f"digits-cnn-{width}", num_classes=10, channels=1, seed=0) for width in (2, 4)
    )
    batches = list(iterate(train, 20, shuffle=False, seed=0, epoch=0, drop_last=False))
    bank = AnchorBank.build(
        teacher, batches, size=len(train), fingerprint=Fingerprint("t", "d", "none"),
        labelled=labelled, show_progress=False,
    )  # fmt: skip
    ours, theirs = (Projection(m.num_features, 8, seed=0) for m in (student, teacher))
    images, _, index = batches[1]
    loss = names["step"](student, ours, theirs, images, index, bank, generator)
    loss.backward()
    assert loss > 0 and all(p.grad is not None and p.grad.any() for p in theirs.parameters())


class Mine(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(144, 2)


def test_a_network_of_ones_own_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    images, mine = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), Mine()
    names: dict[str, Any] = {"mine": mine, "images": images, "labels": torch.arange(6) % 2}
    exec(MEASURE, names)
    accuracy, low, high = map(float, re.findall(r"[\d.]+", capsys.readouterr().out))
    assert 0 <= low <= accuracy <= high <= 100


# PyTorch 2.11 says so of the bytes that its own loader reads.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_a_finished_network_is_exported(tmp_path: Path) -> None:
    (path,) = re.findall(r'load_model\("(.*?)"\)', EXPORT)
    model = create_model("digits-cnn-2", num_classes=10, channels=1, seed=0)
    save_model(tmp_path / path, model, {"architecture": "digits-cnn-2"})
    command = [sys.executable, "-c", EXPORT]  # not here, where shapes are checked at run time
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = torch.export.load(tmp_path / "student.pt2").module()
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(again(x), model.eval()(x))


def test_the_docstring_says_where_things_are() -> None:
    rows = re.findall(r"^\| [^|]+ \| (gacd[\w.]*) \| ([^|]+) \|$", gacd.__doc__ or "", re.MULTILINE)
    assert len(rows) > 20
    for module, names in rows:
        found = importlib.import_module(module)
        for name in names.split(", "):
            assert getattr(found, name).__doc__, name
