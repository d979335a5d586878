"""A checkpoint's classes and the data's: the same number of them is not enough."""

from pathlib import Path

import pytest
import torch

from gacd import build
from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError
from gacd.models import create_model
from gacd.models.checkpoints import save_model


def data(*classes: str) -> ArrayDataset:
    return ArrayDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3), classes, "d")


def test_classes_in_another_order_are_refused_and_other_words_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    model = create_model("digits-cnn-2", num_classes=3, channels=1, seed=0)
    meta = {"architecture": "digits-cnn-2", "classes": ["cat", "dog", "fox"]}
    save_model(path, model, meta)
    build.from_checkpoint(path, build.Given(), data("cat", "dog", "fox"))
    assert not capsys.readouterr().out
    for other in (("dog", "cat", "fox"), ("cat", "dog", "hen")):
        with pytest.raises(UserError, match="classes are cat, dog, fox, the data's"):
            build.from_checkpoint(path, build.Given(), data(*other))
    build.from_checkpoint(path, build.Given(), data("n1", "n2", "n3"))
    assert "calls its classes cat, dog, fox, the data n1, n2, n3" in capsys.readouterr().out


def test_of_weights_alone_it_says_that_images_are_not_normalised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("digits-cnn-2", num_classes=3, channels=1, seed=0)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    build.from_checkpoint(tmp_path / "m.pt", build.Given("digits-cnn-2"), data("cat", "dog", "fox"))
    assert "m.pt is given images in [0, 1] as they are" in capsys.readouterr().out
