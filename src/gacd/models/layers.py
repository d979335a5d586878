"""The few pieces that every convolutional network here shares."""

from torch import Tensor, nn

from gacd.shapes import Features


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A padded 3x3 convolution without bias: a batch normalisation follows or precedes each."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def pool(maps: Tensor) -> Features:
    """The mean over height and width, whatever their size: [B, D, H, W] -> [B, D]."""
    return maps.mean(dim=(2, 3))


def he_init(model: nn.Module) -> None:
    """Convolutions ~ N(0, 2 / (k² outputs)), linear biases 0 (He et al. 2015, Eq. 14)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
