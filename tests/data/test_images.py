import numpy as np
import pytest
import torch
from PIL import Image

from gacd.data.images import resize, to_float


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_bytes_become_floats_in_the_unit_box_channels_last() -> None:
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    y = to_float(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([0.0, 0.2, 1.0]))


def test_resizing_agrees_with_pillow_to_one_level() -> None:
    x = pixels(2, 3, 96, 96)
    ours = resize(x, 32)
    for image, small in zip(x, ours, strict=True):
        whole = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = np.asarray(whole.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        apart = small.permute(1, 2, 0).numpy() - theirs
        assert np.abs(apart).max() <= 1
        assert abs(apart.mean()) < 0.1  # rounded, not cut off


def test_resizing_to_the_same_size_changes_nothing() -> None:
    x = pixels(2, 1, 8, 8)
    assert resize(x, 8) is x


def test_resizing_in_chunks_equals_resizing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels(7, 1, 8, 8)
    whole = resize(x, 5)
    monkeypatch.setattr("gacd.data.images._CHUNK", 3)
    assert whole.equal(resize(x, 5))
