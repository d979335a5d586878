"""Wide residual networks, with the parameter names of the public robust checkpoints."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from gacd.errors import UserError
from gacd.models.base import Backbone
from gacd.models.layers import conv1x1, conv3x3, he_init, pool
from gacd.shapes import Features, Images


class WideResNet(Backbone):
    """WRN-depth-width (Zagoruyko & Komodakis 2016, Table 1), without dropout.

    Three stages of (depth - 4) / 6 pre-activation blocks, 16, 32 and 64 times `width` wide. Raises
    UserError where the number of blocks is not a positive integer, or width < 1.
    """

    last = "fc"

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or width < 1:
            raise UserError(
                f"no WideResNet has depth {depth} and width {width}: the depth must be 6n + 4 "
                "(10, 16, 22, 28, 34, 40, ...) and the width at least 1"
            )
        super().__init__(mean, std)
        self.num_classes, self.channels, self.num_features = num_classes, channels, 64 * width
        self.conv1 = conv3x3(channels, 16)
        self.block1 = _Stage(blocks, 16, 16 * width, stride=1)
        self.block2 = _Stage(blocks, 16 * width, 32 * width, stride=2)
        self.block3 = _Stage(blocks, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(self.num_features)
        self.fc = nn.Linear(self.num_features, num_classes)
        he_init(self)

    def forward_features(self, x: Images) -> Features:
        """Pooled, normalised and rectified features of the last stage, [B, 64 width]."""
        out = self.block3(self.block2(self.block1(self.conv1(self.normalise(x)))))
        return pool(relu(self.bn1(out), inplace=True))


class PreActBlock(nn.Module):
    """conv(relu(bn(conv(a)))) + shortcut, a = relu(bn(x)); shortcut: x, or a projection of a."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        # The checkpoints' spelling.
        self.convShortcut = conv1x1(inputs, outputs, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        active = relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(relu(self.bn2(self.conv1(active)), inplace=True))
        return out + shortcut


class _Stage(nn.Module):
    """A sequence of blocks one level down, because the checkpoints name them `block1.layer.0`."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                PreActBlock(inputs, outputs, stride) if i == 0 else PreActBlock(outputs, outputs, 1)
                for i in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out
