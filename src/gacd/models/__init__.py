"""Networks by name. Importing this package does not import torch; the functions do."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from gacd.errors import UserError, unknown

if TYPE_CHECKING:
    import gacd.models.base

_KNOWN = (
    "digits-cnn-8",
    "digits-cnn-32",
    "mobilenetv2",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet56",
    "wrn-16-2",
    "wrn-28-10",
    "wrn-34-10",
    "wrn-40-2",
)


def model_names() -> tuple[str, ...]:
    """Names that `create_model` takes, for help texts.

    Any wrn-<depth>-<width> with depth 6n + 4 and any digits-cnn-<width> work besides those listed.
    """
    return _KNOWN


def create_model(
    name: str,
    *,
    num_classes: int,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int,
) -> "gacd.models.base.Backbone":
    """The named network on the CPU, its weights drawn from `seed` alone.

    Upper and lower case are alike. `mean` and `std` (one number a channel, of images in [0, 1]) are
    what it normalises its input by. The global random state is left as it was. Raises UserError for
    an unknown name, an impossible size, or statistics that do not fit.
    """
    import torch

    _check(num_classes, channels, mean, std)
    build = _builder(name)
    # Seeds the CPU's generator alone: torch.manual_seed would reseed every GPU as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(num_classes=num_classes, channels=channels, mean=mean, std=std)


def _builder(name: str) -> "Callable[..., gacd.models.base.Backbone]":
    from gacd.models.mobilenet import MobileNetV2
    from gacd.models.resnet import RESNETS, ResNet
    from gacd.models.small import DigitsCNN
    from gacd.models.wide_resnet import WideResNet

    key = name.lower()
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", key):
        return partial(WideResNet, int(match[1]), int(match[2]))
    if match := re.fullmatch(r"digits-cnn-(\d+)", key):
        return partial(DigitsCNN, int(match[1]))
    if key in RESNETS:
        return partial(ResNet, *RESNETS[key])
    if key == "mobilenetv2":
        return MobileNetV2
    raise unknown("model", name, _KNOWN)


def _check(
    num_classes: int, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    if num_classes < 1 or channels < 1:
        raise UserError(
            f"a model of {num_classes} classes and {channels} channels: both must be at least 1"
        )
    if (mean is None) != (std is None):
        raise UserError("give a model both mean and std, or neither")
    if mean is not None and std is not None:
        if not len(mean) == len(std) == channels:
            raise UserError(
                f"mean has {len(mean)} and std {len(std)} numbers; "
                f"each must have {channels}, one a channel"
            )
        if min(std) <= 0:
            raise UserError(f"std is {list(std)}: each number must be above 0")
