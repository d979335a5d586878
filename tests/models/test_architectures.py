"""Each network against a second one, written as plain functions of its state dict in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gacd.models import create_model

State = dict[str, Tensor]


def bn(s: State, name: str, x: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    scale = s[f"{name}.weight"] / (s[f"{name}.running_var"] + 1e-5).sqrt()
    shifted = x - s[f"{name}.running_mean"].view(shape)
    return shifted * scale.view(shape) + s[f"{name}.bias"].view(shape)


def conv(s: State, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)


def wide_resnet(s: State, x: Tensor, n: int) -> Tensor:
    x = conv(s, "conv1", x)
    for block in (1, 2, 3):
        for i in range(n):
            at = f"block{block}.layer.{i}"
            stride = 2 if block > 1 and i == 0 else 1
            a = bn(s, f"{at}.bn1", x).clamp(min=0)
            h = bn(s, f"{at}.bn2", conv(s, f"{at}.conv1", a, stride)).clamp(min=0)
            projects = f"{at}.convShortcut.weight" in s
            x = conv(s, f"{at}.conv2", h) + (
                conv(s, f"{at}.convShortcut", a, stride) if projects else x
            )
    x = F.avg_pool2d(bn(s, "bn1", x).clamp(min=0), x.shape[-1]).flatten(1)
    return x @ s["fc.weight"].T + s["fc.bias"]


def resnet(s: State, x: Tensor, stages: int, n: int) -> Tensor:
    x = bn(s, "bn1", conv(s, "conv1", x)).clamp(min=0)
    for layer in range(1, stages + 1):
        for i in range(n):
            at = f"layer{layer}.{i}"
            stride = 2 if layer > 1 and i == 0 else 1
            h = bn(s, f"{at}.bn1", conv(s, f"{at}.conv1", x, stride)).clamp(min=0)
            h = bn(s, f"{at}.bn2", conv(s, f"{at}.conv2", h))
            if f"{at}.shortcut.0.weight" in s:
                x = bn(s, f"{at}.shortcut.1", conv(s, f"{at}.shortcut.0", x, stride))
            x = (h + x).clamp(min=0)
    x = F.avg_pool2d(x, x.shape[-1]).flatten(1)
    return x @ s["linear.weight"].T + s["linear.bias"]


def mobilenet(s: State, x: Tensor) -> Tensor:
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
    x = bn(s, "bn1", conv(s, "conv1", x)).clamp(min=0)
    for i, stride in enumerate(strides):
        at = f"layers.{i}"
        h = bn(s, f"{at}.bn1", conv(s, f"{at}.conv1", x)).clamp(min=0)
        h = bn(s, f"{at}.bn2", conv(s, f"{at}.conv2", h, stride, h.shape[1])).clamp(min=0)
        h = bn(s, f"{at}.bn3", conv(s, f"{at}.conv3", h))
        if f"{at}.shortcut.0.weight" in s:
            x = bn(s, f"{at}.shortcut.1", conv(s, f"{at}.shortcut.0", x))
        x = h + x if stride == 1 else h
    x = bn(s, "bn2", conv(s, "conv2", x)).clamp(min=0)
    return F.avg_pool2d(x, x.shape[-1]).flatten(1) @ s["linear.weight"].T + s["linear.bias"]


def digits_cnn(s: State, x: Tensor) -> Tensor:
    for i, stride in enumerate((1, 2, 1, 2)):
        x = bn(s, f"body.{3 * i + 1}", conv(s, f"body.{3 * i}", x, stride)).clamp(min=0)
    return F.avg_pool2d(x, x.shape[-1]).flatten(1) @ s["head.weight"].T + s["head.bias"]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("wrn-10-1", lambda s, x: wide_resnet(s, x, 1)),
        ("wrn-16-2", lambda s, x: wide_resnet(s, x, 2)),
        ("resnet18", lambda s, x: resnet(s, x, 4, 2)),
        ("resnet20", lambda s, x: resnet(s, x, 3, 3)),
        ("resnet56", lambda s, x: resnet(s, x, 3, 9)),
        ("mobilenetv2", mobilenet),
        ("digits-cnn-3", digits_cnn),
    ],
)
def test_agrees_with_a_functional_forward(name, reference, generator) -> None:  # type: ignore[no-untyped-def]
    model = create_model(name, num_classes=6, seed=3).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # away from the identity that it starts as
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                tensor.data.normal_(0, 0.3, generator=generator)
    x = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(model.state_dict(), x))


def test_parameter_names_of_the_public_checkpoints() -> None:
    resnet = create_model("resnet18", num_classes=10, seed=0).state_dict()
    wrn = create_model("wrn-28-2", num_classes=10, seed=0).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in (resnet | wrn).items()}
    assert list(resnet)[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean"]
    assert list(resnet)[-2:] == ["linear.weight", "linear.bias"]
    assert list(wrn)[:2] == ["conv1.weight", "block1.layer.0.bn1.weight"]
    assert list(wrn)[-2:] == ["fc.weight", "fc.bias"]
    assert len(resnet) == 122
    assert shapes["layer2.0.shortcut.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer4.1.bn2.running_var"] == (512,)
    assert shapes["block3.layer.0.convShortcut.weight"] == (128, 64, 1, 1)
    assert shapes["block3.layer.3.conv2.weight"] == (128, 128, 3, 3)
    assert "layer1.0.shortcut.0.weight" not in resnet
    assert "block1.layer.1.convShortcut.weight" not in wrn
