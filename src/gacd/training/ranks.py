"""What several processes of one training stage must agree on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gacd.errors import UserError
from gacd.memory import MomentumMemory


def per_rank(batch_size: int, world_size: int) -> int:
    """Each rank's part of a batch. Raises UserError where the batch cannot be shared out evenly."""
    if batch_size % world_size:
        raise UserError(
            f"a batch of {batch_size} images cannot be shared out evenly over {world_size} "
            f"processes: set the batch size to a multiple of {world_size}"
        )
    return batch_size // world_size


def check_states(module: nn.Module) -> None:
    """Refuse, for several ranks, state that each of them would write for itself."""
    refuse_memory(any(isinstance(part, MomentumMemory) for part in module.modules()))


def refuse_memory(there: bool) -> None:
    """Refuse a momentum memory that is `there`, on several ranks."""
    if there:
        raise UserError(
            "a momentum memory is written by one process: train on one device, or choose the "
            "estimator exact or sampled"
        )


def any_rank(fabric: Fabric, *flags: Tensor | bool) -> list[bool]:
    """Which of the flags are set on at least one rank; waits for the device, and for all ranks."""
    told = torch.stack([torch.as_tensor(flag, device=fabric.device) for flag in flags]).int()
    return [bool(flag) for flag in summed(fabric, told).tolist()]


def mean_over_ranks(fabric: Fabric, values: dict[str, float]) -> dict[str, float]:
    """Each number's mean over the ranks, on all of them."""
    if fabric.world_size == 1 or not values:
        return values
    told = torch.tensor(list(values.values()), dtype=torch.float64)
    total = summed(fabric, told.to(fabric.device))
    return dict(zip(values, (total / fabric.world_size).tolist(), strict=True))


def same_buffers(fabric: Fabric, module: nn.Module) -> None:
    """The first rank's buffers (BatchNorm's running statistics) on every rank."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


@contextmanager
def synchronised(network: nn.Module, *, enabled: bool, device: torch.device) -> Iterator[None]:
    """BatchNorm over all ranks' images inside; the network's own layers again outside.

    Only training-mode passes communicate. Raises UserError on a CPU: PyTorch's SyncBatchNorm needs
    a GPU.
    """
    if not enabled:
        yield
        return
    if device.type != "cuda":
        raise UserError(
            f"fabric.batch_norm synchronised needs GPUs, and this is a {device.type}: use local"
        )
    own = {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    }
    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for name, part in own.items():
            part.train(network.get_submodule(name).training)
            network.set_submodule(name, part)


def summed(fabric: Fabric, values: Tensor) -> Tensor:
    """The sum over the ranks, on all of them."""
    return cast("Tensor", fabric.all_reduce(values, reduce_op="sum"))
