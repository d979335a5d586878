"""Do features serve other classes? A frozen network, a new linear layer (Bai et al., Table 4)."""

import copy
from pathlib import Path

from torch import nn

from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import Splits
from gacd.errors import UserError
from gacd.linear import LinearFit, fit_head
from gacd.models.base import Backbone, check_backbone


def transfer(
    model: Backbone,
    splits: Splits,
    threat: ThreatModel | None,
    *,
    cache: Path | str | None = None,
) -> tuple[Backbone, LinearFit]:
    """A copy of `model`, all but its last layer as it was, that answers the classes of `splits`.

    The new layer is a logistic regression on clean features, its strength chosen on validation,
    clean and attacked within `threat`, if any; `cache` keeps what a kill should not cost
    (`fit_head`). The result is an ordinary network: attacks go through the frozen features too.
    Raises UserError where images and model differ in their channels.
    """
    check_backbone(model)
    data = splits.train
    if model.channels != data.channels:
        raise UserError(
            f"{data.name} has {data.channels} channels, but the model takes {model.channels}: "
            "choose a data set with as many"
        )
    transferred = with_new_head(model, data.num_classes)
    return transferred, fit_head(transferred, splits, threat, cache=cache)


def with_new_head(model: Backbone, num_classes: int) -> Backbone:
    """A copy of `model` with another last layer, of zeros, for `num_classes` classes."""
    copied = copy.deepcopy(model)
    old = copied.get_classifier()
    # Made without numbers first: an ordinary one would draw them from the global generator.
    new = nn.Linear(
        old.in_features,
        num_classes,
        bias=old.bias is not None,
        device="meta",
        dtype=old.weight.dtype,
    ).to_empty(device=old.weight.device)
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    setattr(copied, copied.last, new)
    copied.num_classes = num_classes
    return copied
