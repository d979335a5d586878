"""Residual networks for small images: ResNet-18, and the thin ResNet-20, 32 and 56."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from gacd.models.base import Backbone
from gacd.models.layers import conv1x1, conv3x3, he_init, pool
from gacd.shapes import Features, Images

# name -> blocks and widths of the four stages. The thin ones are He et al. 2016, section 4.2:
# depth 6n + 2, three stages of n blocks.
RESNETS = {
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet20": ((3, 3, 3, 0), (16, 32, 64, 64)),
    "resnet32": ((5, 5, 5, 0), (16, 32, 64, 64)),
    "resnet56": ((9, 9, 9, 0), (16, 32, 64, 64)),
}


class ResNet(Backbone):
    """A ResNet whose first convolution keeps the resolution; each later stage halves it.

    `blocks` and `widths` are those of the four stages; a stage of 0 blocks is left out. Projection
    shortcuts (He et al. 2016, option B) wherever the shape changes. The parameter names are those
    of the public robust CIFAR checkpoints.
    """

    last = "linear"

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mean, std)
        self.num_classes, self.channels, self.num_features = num_classes, channels, widths[-1]
        self.conv1 = conv3x3(channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(blocks[0], widths[0], widths[0], stride=1)
        self.layer2 = _stage(blocks[1], widths[0], widths[1], stride=2)
        self.layer3 = _stage(blocks[2], widths[1], widths[2], stride=2)
        self.layer4 = _stage(blocks[3], widths[2], widths[3], stride=2)
        self.linear = nn.Linear(self.num_features, num_classes)
        he_init(self)

    def forward_features(self, x: Images) -> Features:
        """Pooled features of the last stage, [B, num_features]."""
        out = relu(self.bn1(self.conv1(self.normalise(x))), inplace=True)
        return pool(self.layer4(self.layer3(self.layer2(self.layer1(out)))))


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()  # empty: the identity, with no entries in a state dict
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out = relu(self.bn1(self.conv1(x)), inplace=True)
        return relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *(
            BasicBlock(inputs, outputs, stride) if i == 0 else BasicBlock(outputs, outputs, 1)
            for i in range(blocks)
        )
    )
