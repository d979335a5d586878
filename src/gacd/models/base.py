"""What every network here can do: give logits, or the features that lead to them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from gacd.errors import UserError
from gacd.models import check_statistics
from gacd.shapes import Features, Images, Logits
from gacd.storage import fingerprint


class Backbone(nn.Module, ABC):
    """A classifier cut before its last layer, with timm's names.

    `forward(x) = forward_head(forward_features(x))`; `forward_features` gives the pooled
    penultimate features [B, num_features]. Images arrive in [0, 1] and the network normalises them
    itself, so that an attack's eps means the same for every model.
    """

    num_features: int
    num_classes: int
    channels: int
    last: ClassVar[str] = "head"
    """The attribute that holds its last layer, a linear one."""

    def __init__(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        check_statistics(mean, std)
        self.mean: Tensor | None
        self.std: Tensor | None
        # Not persistent: public checkpoints have no such entries, ours keep them in their JSON.
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)

    def normalise(self, x: Images) -> Images:
        """(x - mean) / std per channel; the identity where the model was given neither.

        Raises UserError for bytes, or images of other channels, where they would be taken as they
        are.
        """
        if self.mean is None or self.std is None:
            return x
        channels = self.mean.shape[1]
        if not x.is_floating_point() or x.dim() != 4 or channels not in (1, x.shape[1]):
            raise UserError(
                f"images must be floating-point [B, {channels}, H, W] in [0, 1], not "
                f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            )
        return (x - self.mean) / self.std

    @abstractmethod
    def forward_features(self, x: Images) -> Features:
        """Pooled penultimate features of images in [0, 1]."""

    def forward_head(self, features: Features) -> Logits:
        """Logits of penultimate features."""
        logits: Tensor = self.get_classifier()(features)
        return logits

    def get_classifier(self) -> nn.Linear:
        """The linear layer [num_features -> num_classes] that `forward_head` applies."""
        layer: nn.Linear = getattr(self, self.last)
        return layer

    def forward(self, x: Images) -> Logits:
        """Logits of images in [0, 1]."""
        return self.forward_head(self.forward_features(x))

    def check(self, size: int, *, trains: bool = True) -> None:
        """Refuse, by UserError, to take images of this side, or to train on them if it `trains`.

        For networks that are not known to: this one refuses nothing.
        """


def check_backbone(model: object) -> None:
    """Refuse a network that does not give features apart from logits. Raises UserError."""
    if isinstance(getattr(model, "_orig_mod", model), Backbone):  # torch.compile's wrapper, too
        return
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UserError(f"give the network inside this {type(model).__name__}: its .module")
    raise UserError(
        f"this {type(model).__name__} does not give its features: wrap it in "
        "gacd.models.adapted.Adapted(network, NAME_OF_ITS_LAST_LAYER)"
    )


def check_fits(
    model: Backbone, data: str, num_classes: int, channels: int, *, called: str = "model"
) -> None:
    """Refuse `data` of other classes or channels than the model's, as it is `called`."""
    if (model.num_classes, model.channels) != (num_classes, channels):
        raise UserError(
            f"the {called} has {model.num_classes} classes and {model.channels} channels, but "
            f"{data} has {num_classes} and {channels}"
        )


def model_fingerprint(model: nn.Module) -> str:
    """A hash of a network's structure, parameters and buffers."""

    def parts() -> Iterator[str | bytes]:
        yield repr(model)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            flat = tensor.detach().cpu().contiguous().flatten()
            yield flat.view(torch.uint8).numpy().tobytes()

    return fingerprint(parts())


def _per_channel(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(list(values)).view(1, -1, 1, 1)
