"""A small convolutional network for digits: trains on a laptop's CPU in seconds."""

from collections.abc import Sequence

from torch import nn

from gacd.errors import UserError
from gacd.models.base import Backbone
from gacd.models.layers import conv3x3, he_init, pool
from gacd.shapes import Features, Images


class DigitsCNN(Backbone):
    """Four 3x3 convolutions, w, 2w, 2w and 4w wide, two of stride 2, each with norm and ReLU.

    For images of about 8x8 to 32x32 pixels. Its size grows as width², so a teacher and a student a
    fraction of its size differ by `width` alone. Raises UserError where width < 1.
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if width < 1:
            raise UserError(f"no digits-cnn has width {width}: the width must be at least 1")
        super().__init__(mean, std)
        self.num_classes, self.channels, self.num_features = num_classes, channels, 4 * width
        self.body = nn.Sequential(
            *_layer(channels, width, stride=1),
            *_layer(width, 2 * width, stride=2),
            *_layer(2 * width, 2 * width, stride=1),
            *_layer(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(self.num_features, num_classes)
        he_init(self)

    def forward_features(self, x: Images) -> Features:
        """Pooled features [B, 4 width]."""
        return pool(self.body(self.normalise(x)))


def _layer(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
