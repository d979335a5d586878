import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.errors import UserError
from gacd.models import create_model, model_names
from gacd.models.base import Backbone

SMALL = ("digits-cnn-4", "resnet20", "wrn-10-1", "mobilenetv2")


def parameters(name: str, *, num_classes: int, channels: int = 3) -> int:
    model = create_model(name, num_classes=num_classes, channels=channels, seed=0)
    return sum(p.numel() for p in model.parameters())


# The published sizes: the CIFAR networks of the robust model zoos at 10 classes, CRD's at 100.
@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("resnet18", 10, 11_173_962),
        ("mobilenetv2", 10, 2_296_922),
        ("wrn-28-10", 10, 36_479_194),
        ("WRN-34-10", 10, 46_160_474),
        ("wrn-16-2", 100, 703_284),
        ("wrn-40-1", 100, 569_780),
        ("wrn-40-2", 100, 2_255_156),
        ("resnet20", 100, 278_324),
        ("resnet32", 100, 472_756),
        ("resnet56", 100, 861_620),
    ],
)
def test_parameter_counts_of_the_literature(name: str, classes: int, count: int) -> None:
    assert parameters(name, num_classes=classes) == count


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 4), width=st.integers(1, 4), k=st.integers(1, 200), c=st.integers(1, 4))
def test_wide_resnet_count_in_closed_form(n: int, width: int, k: int, c: int) -> None:
    stages = [(16, 16 * width), (16 * width, 32 * width), (32 * width, 64 * width)]
    count = 9 * c * 16 + 2 * 64 * width + 64 * width * k + k
    for a, b in stages:
        count += 2 * a + 9 * a * b + 2 * b + 9 * b * b + (a * b if a != b else 0)
        count += (n - 1) * (4 * b + 18 * b * b)
    assert parameters(f"wrn-{6 * n + 4}-{width}", num_classes=k, channels=c) == count


@pytest.mark.parametrize("name", model_names())
def test_every_listed_name_is_built(name: str) -> None:
    model = create_model(name, num_classes=7, channels=2, seed=0).eval()
    with torch.no_grad():
        x = torch.rand(2, 2, 8, 8)
        assert model.forward_features(x).shape == (2, model.num_features)
        assert model(x).shape == (2, model.num_classes) == (2, 7)
    assert model.channels == 2


@pytest.mark.parametrize("name", ["resnet18", *SMALL])
def test_forward_is_head_of_features_in_either_memory_format(
    name: str, generator: torch.Generator
) -> None:
    model = create_model(name, num_classes=5, seed=1).eval()
    x = torch.rand(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(model.forward_head(model.forward_features(x)), logits)
        model = model.to(memory_format=torch.channels_last)
        lasting = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(lasting, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("digits-cnn-4", (8, 9, 28, 32)), *((name, (16, 32, 96)) for name in SMALL[1:])],
)
def test_other_image_sizes(name: str, sizes: tuple[int, ...]) -> None:
    model = create_model(name, num_classes=3, channels=1, seed=0).eval()
    with torch.no_grad():
        for size in sizes:
            assert torch.isfinite(model(torch.rand(1, 1, size, size))).all()


@pytest.mark.parametrize("name", ["resnet18", *SMALL])
def test_every_parameter_gets_a_gradient(name: str, generator: torch.Generator) -> None:
    model = create_model(name, num_classes=3, seed=0)
    labels = torch.tensor([0, 1, 2, 0])
    x = torch.rand(4, 3, 16, 16, generator=generator)
    torch.nn.functional.cross_entropy(model(x), labels).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", SMALL)
def test_images_do_not_see_each_other_in_eval_mode(name: str, generator: torch.Generator) -> None:
    model = create_model(name, num_classes=3, seed=0).eval()
    x = torch.rand(3, 3, 16, 16, generator=generator)
    with torch.no_grad():
        alone = torch.cat([model(image) for image in x.split(1)])
        torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_normalises_its_own_input(name: str, generator: torch.Generator) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    plain = create_model(name, num_classes=3, seed=0).eval()
    own = create_model(name, num_classes=3, mean=mean, std=std, seed=0).eval()
    x = torch.rand(2, 3, 16, 16, generator=generator)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(own(x), plain(by_hand))
        assert not torch.allclose(own(x), plain(x))
    assert own.state_dict().keys() == plain.state_dict().keys()


def weights(model: Backbone) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", SMALL)
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    first = weights(create_model(name, num_classes=3, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(weights(create_model(name, num_classes=3, seed=5)), first)
    assert not torch.equal(weights(create_model(name, num_classes=3, seed=6)), first)


@pytest.mark.parametrize("name", ["resnet18", "wrn-16-2", "mobilenetv2", "digits-cnn-32"])
def test_convolutions_start_with_he_variance(name: str) -> None:
    model = create_model(name, num_classes=10, seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not model.get_classifier().bias.any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet-18", "did you mean 'resnet18'"),
        ("wrn16-2", "did you mean 'wrn-16-2'"),
        ("mobilenet", "did you mean 'mobilenetv2'"),
        ("wrn-16", "unknown model 'wrn-16'"),
        ("wrn-35-10", r"6n \+ 4 \(10, 16, 22, 28, 34, 40"),
        ("wrn-4-2", "depth must be"),
        ("wrn-16-0", "width at least 1"),
        ("digits-cnn-0", "width must be at least 1"),
    ],
)
def test_names_that_no_model_has(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=10, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "0 classes"),
        ({"num_classes": 3, "channels": 0}, "0 channels"),
        ({"num_classes": 3, "mean": (0.5, 0.5, 0.5)}, "both mean and std, or neither"),
        (
            {"num_classes": 3, "channels": 1, "mean": (0.5,) * 3, "std": (1.0,) * 3},
            "channel: 1",
        ),
        ({"num_classes": 3, "mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}, "above 0"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("digits-cnn-2", seed=0, **arguments)


def test_names_do_not_need_torch() -> None:
    code = "import sys, gacd.models; gacd.models.model_names(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
