from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.data.batches import augment, iterate, steps_per_epoch
from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError
from gacd.randomness import keyed_generator
from gacd.shapes import Batch


def numbered(n: int, channels: int = 1, size: int = 6) -> ArrayDataset:
    generator = torch.Generator().manual_seed(n)
    shape = (n, channels, size, size)
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)
    return ArrayDataset(images, torch.arange(n) % 2, ("even", "odd"), "numbered")


def naive_augment(image: np.ndarray, down: int, right: int, mirror: bool, pad: int) -> np.ndarray:
    """One image [C, H, W], pixel by pixel: shift the window over the zero border, then mirror."""
    channels, height, width = image.shape
    out = np.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                row = i + down - pad
                column = (width - 1 - j if mirror else j) + right - pad
                if 0 <= row < height and 0 <= column < width:
                    out[c, i, j] = image[c, row, column]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("pad", "flip"), [(2, True), (3, False), (0, True)])
def test_augmentation_equals_a_naive_loop(dtype: torch.dtype, pad: int, flip: bool) -> None:
    """Each output is the naive crop for one (shift, mirror), and shifts differ within the batch.

    The images' pixels are random, so exactly one choice can explain an output.
    """
    images = numbered(16, channels=3).images.to(dtype)
    out = augment(images, keyed_generator("cpu", 5), pad=pad, flip=flip)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    found = []
    for image, result in zip(images.numpy(), out.numpy(), strict=True):
        explained = [
            (down, right, mirror)
            for down in range(2 * pad + 1)
            for right in range(2 * pad + 1)
            for mirror in (False, True)
            if np.array_equal(naive_augment(image, down, right, mirror, pad), result)
        ]
        assert len(explained) == 1
        found += explained
    assert len(set(found)) > 1
    assert {mirror for *_, mirror in found} == ({False, True} if flip else {False})


def test_shifts_and_mirrors_are_uniform() -> None:
    """A lone bright pixel shows where each crop was taken from."""
    images = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 255
    out = augment(images, keyed_generator("cpu", 0), pad=1, flip=True)
    share = out.float().div(255).mean((0, 1))[1:4, 1:4]
    assert (share - 1 / 9).abs().max() < 0.025  # 5 standard deviations


def test_no_augmentation_is_the_identity() -> None:
    images = numbered(4).images
    assert augment(images, keyed_generator("cpu", 0), pad=0, flip=False) is images


def test_keys_give_unrelated_streams() -> None:
    def draw(*key: int) -> float:
        return float(torch.rand((), generator=keyed_generator("cpu", *key)))

    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(3, 4) == draw(3, 4)


sizes = st.integers(1, 60)
seeds = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(n=sizes, batch=st.integers(1, 9), world=st.integers(1, 4), seed=seeds, shuffle=st.booleans())
def test_ranks_together_see_each_image_once(
    n: int, batch: int, world: int, seed: int, shuffle: bool
) -> None:
    data = numbered(n)
    seen: list[int] = []
    for rank in range(world):
        steps = list(
            iterate(
                data, batch, shuffle=shuffle, seed=seed, epoch=1,
                drop_last=False, rank=rank, world_size=world,
            )
        )  # fmt: skip
        assert len(steps) <= steps_per_epoch(n, batch, False, world)
        for images, labels, index in steps:
            assert 0 < len(index) <= batch
            assert labels.equal(data.labels[index])
            assert images.equal(data.float_images(index))
            seen += index.tolist()
    assert sorted(seen) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(12, 60), batch=st.integers(1, 4), world=st.integers(1, 3), seed=seeds)
def test_with_drop_last_every_rank_takes_the_same_number_of_full_steps(
    n: int, batch: int, world: int, seed: int
) -> None:
    together: list[set[int]] = [set() for _ in range(n // (batch * world))]
    for rank in range(world):
        steps = list(
            iterate(
                numbered(n), batch, shuffle=True, seed=seed, epoch=0,
                drop_last=True, rank=rank, world_size=world,
            )
        )  # fmt: skip
        assert len(steps) == steps_per_epoch(n, batch, True, world) == len(together)
        for step, whole in zip(steps, together, strict=True):
            assert len(step.index) == batch
            whole |= set(step.index.tolist())
    # disjoint, and step for step the global batches of a single rank
    alone = iterate(numbered(n), batch * world, shuffle=True, seed=seed, epoch=0, drop_last=True)
    assert together == [set(one.index.tolist()) for one in alone]


@settings(max_examples=15, deadline=None)
@given(n=sizes, start=st.integers(0, 12), seed=seeds, epoch=st.integers(0, 3))
def test_starting_at_a_step_equals_having_come_there(
    n: int, start: int, seed: int, epoch: int
) -> None:
    def batches(first: int) -> Iterator[Batch]:
        return iterate(
            numbered(n), 5, shuffle=True, seed=seed, epoch=epoch, start=first,
            drop_last=False, pad=1, flip=True,
        )  # fmt: skip

    whole, rest = list(batches(0))[start:], list(batches(start))
    assert len(whole) == len(rest)
    for came, resumed in zip(whole, rest, strict=True):
        assert all(one.equal(other) for one, other in zip(came, resumed, strict=True))


def test_epochs_seeds_steps_and_ranks_differ() -> None:
    data = numbered(16)
    data = data.subset(torch.zeros(16, dtype=torch.int64))  # one image: only augmentation differs

    def first(seed: int, epoch: int, step: int, rank: int) -> torch.Tensor:
        batches = iterate(
            data, 4, shuffle=False, seed=seed, epoch=epoch, start=step, drop_last=True,
            pad=3, flip=True, rank=rank, world_size=2,
        )  # fmt: skip
        return next(batches).images

    base = first(0, 0, 0, 0)
    assert base.equal(first(0, 0, 0, 0))
    for other in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        assert not base.equal(first(*other))


def test_order_is_the_data_sets_own_without_shuffling_and_new_each_epoch_with_it() -> None:
    def order(shuffle: bool, epoch: int) -> list[int]:
        batches = iterate(numbered(30), 7, shuffle=shuffle, seed=0, epoch=epoch, drop_last=False)
        return torch.cat([batch.index for batch in batches]).tolist()

    assert order(False, 0) == order(False, 1) == list(range(30))
    assert len({tuple(order(True, epoch)) for epoch in range(4)}) == 4


def test_iterating_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(iterate(numbered(9), 4, shuffle=True, seed=0, epoch=0, drop_last=True, pad=1, flip=True))
    assert before.equal(torch.get_rng_state())


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match="set the batch size to 10 or less"):
        steps_per_epoch(10, 6, True, 2)
    assert steps_per_epoch(10, 6, False, 2) == 1
    assert steps_per_epoch(10, 3, True) == 3
    assert steps_per_epoch(10, 3, False) == 4
