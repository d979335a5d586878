"""Networks from elsewhere: timm's, torchvision's, one's own."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gacd.errors import UserError, first_line
from gacd.models import check_statistics
from gacd.models.base import Backbone
from gacd.models.frozen import folds_exactly
from gacd.models.modes import evaluating
from gacd.randomness import global_randomness_kept
from gacd.shapes import Features, Images

_BODY, _HEAD = "body.", "head."


class _Taken(nn.Identity):
    """Stands where the last layer was."""

    def _get_name(self) -> str:  # of which a fingerprint is made: banks keep fitting their teacher
        return "Identity"


class Adapted(Backbone):
    """A classifier whose forward pass ends in a linear layer, cut before it.

    `classifier` is that layer's name in `network`, "fc" or "classifier.3": what reaches it are the
    features, and what leaves it the logits, so nothing may follow it (a softmax, say). The state
    dict has the names that `network` gives, so that checkpoints of it fit as they are. The network
    is changed, not copied. `mean` and `std` (a number a channel, of images in [0, 1]) are what it
    was trained with, unless it normalises by itself. Raises UserError where `classifier` is no
    linear layer of the network, or `mean` and `std` do not fit; `check`, which training and
    evaluation call, where the network is not what this class takes it for.
    """

    def __init__(
        self,
        network: nn.Module,
        classifier: str,
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mean, std)
        check_statistics(mean, std, channels)
        if isinstance(network, Adapted):
            raise UserError("this network is Adapted already: use it as it is")
        found = dict(network.named_modules()).get(classifier)
        if isinstance(found, _Taken):
            raise UserError(
                f"an Adapted has taken '{classifier}' of this {type(network).__name__} already: "
                "use that one, or build the network anew"
            )
        if not isinstance(found, nn.Linear):
            linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
            raise UserError(
                f"'{classifier}' is no linear layer of this {type(network).__name__}: "
                f"it has {', '.join(linear) or 'none'}"
            )
        if "weight" not in found._parameters:
            raise UserError(
                f"'{classifier}' computes its weight, but the last layer's is fitted: leave its "
                "parametrisation out"
            )
        self.num_classes, self.num_features = found.out_features, found.in_features
        self.channels, self.folds = channels, True
        network.set_submodule(classifier, _Taken())
        self.body, self.head = network, found
        self.classifier = classifier
        self.register_state_dict_post_hook(_as_the_network_says)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_as_we_say)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def check(self, size: int, *, trains: bool = True) -> None:
        """Refuse a network that fails on images [2, channels, size, size], or that the cut changes.

        Raises UserError where its forward pass raises, gives anything but logits [2, K], or gives
        others than the classifier does (something follows that layer, or reads its weights); where
        it `trains`, also if it cannot. Notes whether batch normalisation may be folded.
        """
        x = torch.rand(2, self.channels, size, size, generator=torch.Generator().manual_seed(0))
        x = x.to(next(self.parameters()).device, memory_format=torch.channels_last)
        network = type(self.body).__name__
        if trains and not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(f"{network} has no parameter that takes a gradient")
        with evaluating(self):
            whole = self._tried(self._uncut, x)
            self._check_logits(whole)
            cut = self._tried(self, x)
        if not torch.allclose(whole, cut, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
            raise UserError(
                f"what leaves '{self.classifier}' is not what {network} gives: "
                "nothing may follow that layer"
            )
        for key, value in self.state_dict().items():
            if not isinstance(value, Tensor):
                raise UserError(f"'{key}' in the state dict of {network} is no tensor")
        if trains:
            with global_randomness_kept(x.device):  # dropout's
                self._check_logits(self._tried(self._training, x, " when it trains"))
        self.folds = folds_exactly(self, x)

    def _check_logits(self, found: Any) -> None:
        if not isinstance(found, Tensor) or found.shape != (2, self.num_classes):
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"{type(self.body).__name__} must give logits of shape {(2, self.num_classes)} for "
                f"two images, not {what}"
            )

    def _uncut(self, x: Images) -> Any:
        self.body.set_submodule(self.classifier, self.head)
        try:
            return self.body(self.normalise(x))
        finally:
            self.body.set_submodule(self.classifier, _Taken())

    def _training(self, x: Images) -> Any:
        return copy.deepcopy(self).train()(x)

    def _tried(self, run: Callable[[Images], Any], x: Images, when: str = "") -> Any:
        try:
            return run(x)
        except Exception as error:
            shape = "x".join(map(str, x.shape[1:]))
            raise UserError(
                f"{type(self.body).__name__} fails{when} on channels-last images of {shape}: "
                f"{first_line(error)}"
            ) from error

    def forward_features(self, x: Images) -> Features:
        """What reaches the classifier, for images in [0, 1]."""
        features: Tensor = self.body(self.normalise(x))
        return features


def _as_the_network_says(
    model: Adapted, state: dict[str, Any], prefix: str, _: dict[str, Any]
) -> None:
    for name, value in _taken(state, prefix).items():
        if name.startswith(_BODY):
            state[prefix + name.removeprefix(_BODY)] = value
        else:
            state[f"{prefix}{model.classifier}.{name.removeprefix(_HEAD)}"] = value


def _as_we_say(model: Adapted, state: dict[str, Any], prefix: str, *_: Any) -> None:
    head = f"{model.classifier}."
    for name, value in _taken(state, prefix).items():
        if name.startswith(head):
            state[prefix + _HEAD + name.removeprefix(head)] = value
        else:
            state[prefix + _BODY + name] = value


def _taken(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a prefix, out of the state dict; all at once, as new names may be old."""
    keys = [key for key in state if key.startswith(prefix)]
    return {key.removeprefix(prefix): state.pop(key) for key in keys}
