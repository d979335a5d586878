"""Networks by name. Importing this package does not import torch; the functions do."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from gacd.errors import UserError, defined_again, first_line, unknown

if TYPE_CHECKING:
    from torch import nn

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
_SIZED = r"(wrn-(?P<depth>\d+)|digits-cnn)-(?P<width>\d+)"
_REGISTERED: "dict[str, tuple[Callable[..., nn.Module], str]]" = {}


def model_names() -> tuple[str, ...]:
    """Names that `create_model` takes, for help texts.

    Any wrn-<depth>-<width> with depth 6n + 4 and any digits-cnn-<width> work besides those listed.
    """
    return (*_KNOWN, *_REGISTERED)


def register_model(name: str, build: "Callable[..., nn.Module]", *, classifier: str) -> None:
    """Make a network from elsewhere one of that name, on the command line as well.

    `build(num_classes=K, channels=C)` makes it; its forward pass ends in the linear layer that
    `classifier` names, and it takes images as its mean and std make them of [0, 1]. See
    docs/methods.md. Raises UserError for a name that is another network's or cannot be one.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UserError(
            f"'{name}' cannot name a model: use lower-case letters, digits, -, _ and . alone"
        )
    again = name in _REGISTERED and defined_again(_REGISTERED[name][0], build)
    if not again and (name in model_names() or re.fullmatch(_SIZED, name)):
        raise UserError(f"the model '{name}' exists already: register yours under another name")
    _REGISTERED[name] = build, classifier


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

    if num_classes < 1 or channels < 1:
        raise UserError(
            f"a model of {num_classes} classes and {channels} channels: both must be at least 1"
        )
    check_statistics(mean, std, channels)
    build = _builder(name)
    # Seeds the CPU's generator alone: torch.manual_seed would reseed every GPU as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(num_classes=num_classes, channels=channels, mean=mean, std=std)


def check_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int | None = None
) -> None:
    """Refuse mean and std that do not normalise, or not images of so many channels."""
    if (mean is None) != (std is None):
        raise UserError("give a model both mean and std, or neither")
    if mean is None or std is None:
        return
    for name, values in (("mean", mean), ("std", std)):
        if isinstance(values, int | float) or len(values) != (channels or len(mean)):
            wanted = channels or "as many as the images have"
            raise UserError(f"{name} is {values}: give a number for each channel: {wanted}")
    if not min(std) > 0:
        raise UserError(f"std is {list(std)}: each number must be above 0")
    if not all(0 <= m <= 1 and s <= 1 for m, s in zip(mean, std, strict=True)):
        said = f"mean {list(mean)} and std {list(std)} must be of images in [0, 1]"
        raise UserError(f"{said}: divide those of 0 to 255 by 255")


def check_model(name: str) -> None:
    """Refuse the name of no network, or of one that cannot be, without making it."""
    import torch

    build = _builder(name)
    if name.lower() not in _REGISTERED:
        with torch.device("meta"):
            build(num_classes=2, channels=3, mean=None, std=None)


def _builder(name: str) -> "Callable[..., gacd.models.base.Backbone]":
    from gacd.models.mobilenet import MobileNetV2
    from gacd.models.resnet import RESNETS, ResNet
    from gacd.models.small import DigitsCNN
    from gacd.models.wide_resnet import WideResNet

    key = str(name).lower()
    if match := re.fullmatch(_SIZED, key):
        width = int(match["width"])
        if match["depth"] is None:
            return partial(DigitsCNN, width)
        return partial(WideResNet, int(match["depth"]), width)
    if key in RESNETS:
        return partial(ResNet, *RESNETS[key])
    if key == "mobilenetv2":
        return MobileNetV2
    if key in _REGISTERED:
        return partial(_registered, key)
    raise unknown("model", name, model_names())


def _registered(
    name: str,
    *,
    num_classes: int,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> "gacd.models.base.Backbone":
    import torch
    from torch import nn

    from gacd.models.adapted import Adapted

    build, classifier = _REGISTERED[name]

    def made() -> Adapted:
        try:
            network = build(num_classes=num_classes, channels=channels)
        except Exception as error:
            raise UserError(
                f"the registered '{name}' cannot be built by keyword with num_classes="
                f"{num_classes}, channels={channels}: {first_line(error)}"
            ) from error
        if not isinstance(network, nn.Module):
            raise UserError(
                f"the registered '{name}' must build a network, not {type(network).__name__}"
            )
        return Adapted(network, classifier, channels=channels, mean=mean, std=std)

    model = made()
    if model.num_classes != num_classes:
        raise UserError(
            f"the registered '{name}' was built with {model.num_classes} classes, not {num_classes}"
        )
    if torch.initial_seed() != 0:
        # What is drawn but in no state dict is drawn from 0, as it is for a file's weights.
        weights = model.state_dict()
        torch.default_generator.manual_seed(0)
        model = made()
        model.load_state_dict(weights)
    return model
