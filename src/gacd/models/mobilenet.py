"""MobileNetV2 for small images."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from gacd.models.base import Backbone
from gacd.models.layers import conv1x1, conv3x3, he_init, pool
from gacd.shapes import Features, Images

# (expansion, outputs, blocks, stride): Sandler et al. 2018, Table 2, with the first two strides of
# the ImageNet network set to 1, so that a 32x32 image still has 4x4 positions at the end.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(Backbone):
    """MobileNetV2 (Sandler et al. 2018) at CIFAR strides, with the common CIFAR parameter names.

    As in that common code, ReLU stands for ReLU6, and every block of stride 1 has a shortcut.
    """

    last = "linear"

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mean, std)
        self.num_classes, self.channels, self.num_features = num_classes, channels, 1280
        self.conv1 = conv3x3(channels, 32)
        self.bn1 = nn.BatchNorm2d(32)
        self.layers = nn.Sequential(*_blocks(32))
        self.conv2 = conv1x1(320, 1280)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)
        he_init(self)

    def forward_features(self, x: Images) -> Features:
        """Pooled features [B, 1280]."""
        out = relu(self.bn1(self.conv1(self.normalise(x))), inplace=True)
        return pool(relu(self.bn2(self.conv2(self.layers(out))), inplace=True))


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1, linear); a shortcut at stride 1."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.residual = stride == 1
        self.conv1 = conv1x1(inputs, hidden)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(
            hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False
        )
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if self.residual and inputs != outputs:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out = relu(self.bn1(self.conv1(x)), inplace=True)
        out = relu(self.bn2(self.conv2(out)), inplace=True)
        projected: Tensor = self.bn3(self.conv3(out))
        return projected + self.shortcut(x) if self.residual else projected


def _blocks(inputs: int) -> list[InvertedResidual]:
    blocks = []
    for expansion, outputs, count, stride in _STAGES:
        for i in range(count):
            blocks.append(InvertedResidual(inputs, outputs, expansion, stride if i == 0 else 1))
            inputs = outputs
    return blocks
