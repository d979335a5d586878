"""Stratified choices: each class keeps its share, to within one image."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def stratified(labels: Int[Tensor, " N"], n: int, *, seed: int) -> Bool[Tensor, " N"]:
    """A mask that is true for `n` of the N images, each class in proportion.

    A class of N_c images gives n N_c / N, rounded down, and the images still missing come from
    the classes with the largest remainders. Drawn on the CPU: the same on every device.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    sizes = torch.bincount(shuffled)
    shares = sizes * n  # N times the exact share, in integers
    quotas = shares // len(labels)
    missing = n - int(quotas.sum())
    quotas[(shares % len(labels)).argsort(descending=True, stable=True)[:missing]] += 1

    by_class = shuffled.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(labels)) - first[shuffled[by_class]]  # 0, 1, ... within each class
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order[by_class[place < quotas[shuffled[by_class]]]]] = True
    return mask.to(labels.device)
