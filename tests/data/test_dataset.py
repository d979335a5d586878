import dataclasses

import pytest
import torch

from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError


def small(n: int = 12, channels: int = 3) -> ArrayDataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (n, channels, 5, 5), dtype=torch.uint8, generator=generator)
    return ArrayDataset(images, torch.arange(n) % 3, ("a", "b", "c"), "small")


def test_properties() -> None:
    data = small()
    assert (len(data), data.num_classes, data.channels, data.size) == (12, 3, 3, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]


def test_mean_and_deviation_are_those_of_the_floats() -> None:
    data = small()
    mean, std = data.mean_std()
    x = data.images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), x.mean((0, 2, 3)))
    torch.testing.assert_close(
        torch.tensor(std).double(), x.std((0, 2, 3), correction=0), rtol=1e-6, atol=0
    )


def test_a_constant_channel_can_be_divided_by_its_deviation() -> None:
    data = dataclasses.replace(small(), images=torch.full((12, 1, 5, 5), 51, dtype=torch.uint8))
    assert data.mean_std() == (pytest.approx((0.2,)), (1.0,))


def test_subset_by_rows_and_by_mask_keeps_images_with_their_labels() -> None:
    data = small()
    rows = torch.tensor([7, 2])
    part = data.subset(rows)
    assert part.images.equal(data.images[rows])
    assert part.labels.tolist() == [1, 2]
    assert data.subset(data.labels == 1).labels.tolist() == [1] * 4


def test_float_images_of_rows_and_slices() -> None:
    data = small()
    whole = data.float_images()
    assert whole.shape == (12, 3, 5, 5)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(whole, data.images.float() / 255)
    assert data.float_images(slice(2, 4)).equal(whole[2:4])
    assert data.float_images(torch.tensor([5, 1])).equal(whole[[5, 1]])


def test_the_fingerprint_sees_every_part_and_not_the_memory_layout() -> None:
    data = small()
    pixel = data.images.clone()
    pixel[3, 1, 2, 2] ^= 1
    label = data.labels.clone()
    label[0] = 2
    others = [
        dataclasses.replace(data, images=pixel),
        dataclasses.replace(data, labels=label),
        dataclasses.replace(data, classes=("a", "b", "d")),
        data.subset(torch.arange(11)),
    ]
    prints = {data.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(prints) == 5
    layout = data.images.contiguous(memory_format=torch.channels_last)
    same = dataclasses.replace(data, images=layout)
    assert same.to("cpu").fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"images": torch.zeros(12, 3, 5, 5)}, "uint8"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, "as many int64 labels"),
        ({"labels": torch.zeros(12, dtype=torch.int32)}, "as many int64 labels"),
        ({"labels": torch.full((12,), 3)}, "labels must be 0 to 2 for 3 classes, got 3 to 3"),
        ({"labels": torch.full((12,), -1)}, "got -1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(UserError, match=says):
        dataclasses.replace(small(), **changed)  # type: ignore[arg-type]
