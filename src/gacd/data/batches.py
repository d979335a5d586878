"""Batches as pure functions of (seed, epoch, step, rank): nothing to save, all to resume.

The permutation of an epoch depends on (seed, epoch) alone and the augmentation of a batch on
(seed, epoch, step, rank), so a run that starts at step s sees the bits of one that came there.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import pad as pad_edges

from gacd.data.dataset import ImageDataset
from gacd.data.images import to_float
from gacd.errors import UserError
from gacd.randomness import keyed_generator
from gacd.shapes import Batch


def augment(
    images: Shaped[Tensor, "B C H W"], generator: torch.Generator, *, pad: int, flip: bool
) -> Shaped[Tensor, "B C H W"]:
    """Crop each image from its own place in a zero border of `pad` pixels; mirror each at random.

    Images [B, C, H, W] of any type, shifted by -pad to pad pixels in both directions and, with
    `flip`, mirrored left to right with probability 1/2. One indexed read for the whole batch, on
    its device, where `generator` lives too; channels-last in memory.
    """
    if pad == 0 and not flip:
        return images
    count, _, height, width = images.shape
    device = images.device
    shift = torch.randint(2 * pad + 1, (2, count, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device) + shift[0]
    columns = torch.arange(width, device=device) + shift[1]
    if flip:
        mirrored = torch.randint(2, (count, 1), generator=generator, device=device).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = pad_edges(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    image = torch.arange(count, device=device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def steps_per_epoch(n: int, batch_size: int, drop_last: bool, world_size: int = 1) -> int:
    """Steps each rank takes through `n` images, `batch_size` on each rank at every step.

    n / (batch_size world_size), rounded down with `drop_last` and up without. Raises UserError
    where that is none at all.
    """
    together = batch_size * world_size
    steps = n // together if drop_last else -(-n // together)
    if steps == 0:
        raise UserError(
            f"a batch of {together} images is more than the {n} there are: "
            f"set the batch size to {max(n // world_size, 1) * world_size} or less"
        )
    return steps


def iterate(
    dataset: ImageDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    drop_last: bool = False,
    pad: int = 0,
    flip: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The batches of one epoch, from step `start` on, on the data set's device.

    By default every image once, in order, as it is.

    A step takes batch_size x world_size images; rank r has every world_size-th of them from the
    r-th on, so the ranks together see each image once. Without `drop_last` the last step is short,
    and where it holds fewer images than there are ranks the last ranks do without: train several
    ranks with `drop_last`. `pad` and `flip` are `augment`'s.
    """
    device = dataset.labels.device
    steps = steps_per_epoch(len(dataset), batch_size, drop_last, world_size)
    order = torch.arange(len(dataset))
    if shuffle:  # drawn on the CPU: the same order on every device
        order = torch.randperm(len(dataset), generator=keyed_generator("cpu", seed, epoch))
    order = order.to(device)
    together = batch_size * world_size
    indices = [
        order[step * together : (step + 1) * together][rank::world_size].contiguous()
        for step in range(start, steps)
    ]
    indices = [index for index in indices if len(index)]  # only a last step may lack images
    fetched = zip(indices, dataset.fetch(indices), strict=True)
    for step, (index, pixels) in enumerate(fetched, start):
        generator = keyed_generator(device, seed, epoch, step, rank)
        pixels = augment(pixels, generator, pad=pad, flip=flip)
        yield Batch(to_float(pixels), dataset.labels[index], index)
