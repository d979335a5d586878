"""Networks from outside the package."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.models import VisionTransformer, densenet121, mobilenet_v3_small, resnet18

import gacd.models as models
from gacd import cli
from gacd.attacks.threat import ThreatModel
from gacd.commands import run
from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError
from gacd.evaluation.robust import evaluate
from gacd.models import create_model, model_names, register_model
from gacd.models.adapted import Adapted
from gacd.models.checkpoints import load_model, load_weights, save_model
from gacd.models.frozen import find_pairs, frozen
from gacd.models.modes import evaluating

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def vit(num_classes: int) -> nn.Module:
    network = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=num_classes)
    nn.init.normal_(network.heads.head.weight)  # torchvision's begins with zeros
    return network


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "resnet": (lambda k: resnet18(num_classes=k), "fc"),
    "mobilenet": (lambda k: mobilenet_v3_small(num_classes=k), "classifier.3"),
    "densenet": (lambda k: densenet121(num_classes=k), "classifier"),
    "vit": (vit, "heads.head"),
}


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves a network behind, or draws a page."""
    monkeypatch.setattr(run, "write_run_report", lambda *_, **__: None)
    monkeypatch.setattr(models, "_REGISTERED", {})
    return


class Confusing(nn.Module):
    """Parts that are called as an adapted network calls its own, and a weight at the top."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.body, self.head = nn.Linear(12, 6), nn.Linear(6, 5)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(5, classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.head(self.body(self.scale * x.flatten(1))))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_network_does(name: str) -> None:
    build, classifier = NETWORKS[name]
    register_model(name, lambda num_classes, channels: build(num_classes), classifier=classifier)
    model = create_model(name, num_classes=7, mean=MEAN, std=STD, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = build(7)
    assert name in model_names()
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    x = torch.rand(2, 3, 32, 32)
    with evaluating(model, network):
        assert torch.equal(model(x), network((x - mean) / std))
        assert model.forward_features(x).shape == (2, model.num_features)
    with frozen(model, x):
        torch.testing.assert_close(model(x), network.eval()((x - mean) / std))
    layer = model.get_classifier()
    assert (layer.in_features, layer.out_features) == (model.num_features, 7)


@pytest.mark.parametrize(
    ("build", "classifier"),
    [(lambda: resnet18(num_classes=4), "fc"), (lambda: vit(4), "heads.head"), (Confusing, "out.1")],
)
def test_its_weights_have_the_names_of_the_network(
    build: Callable[[], nn.Module], classifier: str
) -> None:
    network = build()
    model = Adapted(copy.deepcopy(network), classifier)
    expected = network.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    within = nn.ModuleDict({"student": model, "bystander": nn.Linear(1, 1)})
    prefixed = {f"student.{name}" for name in expected}
    assert within.state_dict().keys() == prefixed | {"bystander.weight", "bystander.bias"}
    other = nn.ModuleDict({"student": Adapted(build(), classifier), "bystander": nn.Linear(1, 1)})
    other.load_state_dict(within.state_dict())
    found = copy.deepcopy(other)["student"].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoints_of_theirs_and_of_ours(tmp_path: Path) -> None:
    register_model("odd", lambda num_classes, channels: Confusing(num_classes), classifier="out.1")
    theirs = Confusing()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pt")
    model = create_model("odd", num_classes=4, mean=MEAN, std=STD, seed=1)
    load_weights(model, tmp_path / "theirs.pt")
    x = torch.rand(3, 3, 2, 2)
    assert torch.equal(model(x), theirs(model.normalise(x)))
    save_model(tmp_path / "ours.safetensors", model, {"architecture": "odd"})
    again, _ = load_model(tmp_path / "ours.safetensors")
    assert torch.equal(again(x), model(x))
    with pytest.raises(UserError, match=r"'out\.1\.weight' is \(4, 5\) in the file and \(9, 5\)"):
        load_weights(create_model("odd", num_classes=9, seed=1), tmp_path / "theirs.pt")


@pytest.mark.parametrize("norm", [spectral_norm, weight_norm, nn.utils.spectral_norm])
def test_a_layer_whose_weight_is_computed_is_left_to_compute_it(
    norm: Callable[[nn.Module], nn.Module],
) -> None:
    network = nn.Sequential(
        *(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
        norm(nn.Linear(64, 8)),
        nn.Linear(8, 5),
    )
    model, x = Adapted(network, "7").eval(), torch.rand(2, 3, 8, 8)
    expected, before = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    assert find_pairs(model, x) == [("body.3", "body.4")]
    with frozen(model, x):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std(dim=(1, 2, 3), keepdim=True), self.bias)


def test_a_convolution_of_another_kind_keeps_its_batch_normalisation() -> None:
    network = nn.Sequential(
        *(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)),
    )
    for _ in range(3):
        network(torch.rand(8, 3, 8, 8))  # statistics that are not 0 and 1
    model, x = Adapted(network, "6").eval(), torch.rand(2, 3, 8, 8)
    assert find_pairs(model, x) == [("body.3", "body.4")]
    expected = model(x)
    with frozen(model, x):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Hidden(nn.Module):
    """Something that its state dict does not hold."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.mixed = torch.randn(12, 12)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1) @ self.mixed)


def test_what_no_state_dict_holds_comes_back_with_a_file(tmp_path: Path) -> None:
    register_model("hidden", lambda num_classes, channels: Hidden(num_classes), classifier="fc")
    model, other = (create_model("hidden", num_classes=4, seed=seed) for seed in (7, 8))
    assert not torch.equal(model.get_classifier().weight, other.get_classifier().weight)
    save_model(tmp_path / "m.safetensors", model, {"architecture": "hidden"})
    again, _ = load_model(tmp_path / "m.safetensors")
    x = torch.rand(3, 3, 2, 2)
    assert torch.equal(again(x), model(x))


class Wrapped(nn.Module):
    """Parts called as wrappers and as our own checkpoints call theirs; tied weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"student": nn.Linear(12, 12), "fc": nn.Linear(12, classes)})
        self.model["twin"] = self.model["student"]

    def forward(self, x: Tensor) -> Tensor:
        return self.model["fc"](self.model["twin"](self.model["student"](x.flatten(1))))


def test_parts_called_as_wrappers_are_kept_and_weights_may_be_tied(tmp_path: Path) -> None:
    register_model("odd", lambda num_classes, channels: Wrapped(num_classes), classifier="model.fc")
    theirs = Wrapped(4)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    model = create_model("odd", num_classes=4, seed=1)
    load_weights(model, tmp_path / "theirs.pt")
    save_model(tmp_path / "ours.safetensors", model, {"architecture": "odd"})
    x = torch.rand(3, 3, 2, 2)
    assert torch.equal(load_model(tmp_path / "ours.safetensors")[0](x), theirs(x))


class Ends(nn.Module):
    """A classifier with something about its end."""

    def __init__(self, end: Callable[["Ends", Tensor], object]) -> None:
        super().__init__()
        self.fc, self.end = nn.Linear(48, 4), end

    def forward(self, x: Tensor) -> object:
        return self.end(self, x)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (
            lambda net, x: net.fc(x.flatten(1)).log_softmax(1),
            "'fc' is not what Ends gives",
        ),
        (lambda net, x: 16 * net.fc(x.flatten(1)), "nothing may follow that layer"),
        (lambda net, x: {"logits": net.fc(x.flatten(1))}, r"logits of shape \(2, 4\).* not dict"),
        (lambda net, x: net.fc(x.flatten(1))[:, :3], r"for two images, not \(2, 3\)"),
        (lambda net, x: net.fc(x.view(2, -1)), "Ends fails on channels-last images of 3x4x4: view"),
        (lambda net, x: x.flatten(1) @ net.fc.weight.T, "Ends fails on .*'weight'"),
        (
            lambda net, x: (net.fc(x.flatten(1)),) if net.training else net.fc(x.flatten(1)),
            "Ends fails when it trains on channels-last images of 3x4x4",
        ),
    ],
)
def test_a_network_that_does_not_end_in_its_classifier_is_refused(
    end: Callable[[Ends, Tensor], object], message: str
) -> None:
    model = Adapted(Ends(end), "fc")
    with pytest.raises(UserError, match=message):
        model.check(4)
    assert isinstance(model.body.fc, nn.Identity)


def test_a_network_that_does_is_left_as_it_was() -> None:
    model = Adapted(Ends(lambda net, x: net.fc(x.flatten(1))), "fc").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.check(4)
    assert model.training and all(torch.equal(model.state_dict()[n], before[n]) for n in before)


def test_a_network_with_dropout_and_statistics_is_left_as_it_was_too() -> None:
    """It is looked at in evaluation mode, and behind its normalisation."""
    network = nn.Sequential(
        nn.Conv2d(3, 5, 4), nn.BatchNorm2d(5), nn.Flatten(), nn.Dropout(0.5), nn.Linear(5, 4)
    )
    model = Adapted(network, "4", mean=MEAN, std=STD).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.check(4)
    assert model.training and all(torch.equal(model.state_dict()[n], before[n]) for n in before)


def test_a_bad_network_is_refused_before_the_teacher_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def softmaxed(num_classes: int, channels: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.Softmax(1))

    register_model("softmaxed", softmaxed, classifier="1")
    line = ["distill", "--student", "softmaxed", "--teacher.model", "digits-cnn-2"]
    assert cli.main([*line, "--out", str(tmp_path / "run")]) == 2
    assert "nothing may follow that layer" in capsys.readouterr().err
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_network_that_was_taken_is_not_taken_again() -> None:
    network = resnet18()
    assert "_Taken" not in repr(Adapted(network, "fc"))
    message = "an Adapted has taken 'fc' of this ResNet already: use that one, or build the"
    with pytest.raises(UserError, match=message):
        Adapted(network, "fc", mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.mark.parametrize("hides", [torch.no_grad(), torch.inference_mode()])
def test_a_network_without_gradients_is_refused_by_the_attack(hides: Any) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(body, nn.Linear(4 * 6 * 6, 3))
    body.forward = hides(body.forward)  # type: ignore[method-assign]
    data = ArrayDataset(
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 3, ("a", "b", "c"), "four"
    )
    with pytest.raises(UserError, match="gradient"):
        evaluate(Adapted(network, "1"), data, attacks=["pgd2"], threat=ThreatModel(eps=0.1))


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        ("conv1", "'conv1' is no linear layer of this ResNet: it has fc"),
        ("head", "'head' is no linear layer of this ResNet: it has fc"),
    ],
)
def test_what_is_no_classifier_is_refused(classifier: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adapted(resnet18(), classifier)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "the model 'resnet18' exists already: register yours under another name"),
        ("wrn-10-7", "the model 'wrn-10-7' exists already"),
        ("digits-cnn-3", "the model 'digits-cnn-3' exists already"),
        ("mine", "the model 'mine' exists already"),
        ("My model", "'My model' cannot name a model: use lower-case letters, digits, -, _ and"),
        ("", "'' cannot name a model"),
    ],
)
def test_names_that_are_taken_or_unfit_are_refused(name: str, message: str) -> None:
    register_model("mine", lambda num_classes, channels: Confusing(num_classes), classifier="out.1")
    with pytest.raises(UserError, match=message):
        register_model(name, lambda num_classes, channels: Confusing(), classifier="out.1")


def test_a_classifier_that_computes_its_weight_is_refused() -> None:
    with pytest.raises(UserError, match="'1' computes its weight, but the last layer's is fitted"):
        Adapted(nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(3, 2))), "1")


def test_a_network_of_other_classes_is_refused() -> None:
    register_model("mine", lambda num_classes, channels: Confusing(), classifier="out.1")
    with pytest.raises(UserError, match="the registered 'mine' was built with 4 classes, not 7"):
        create_model("mine", num_classes=7, seed=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda num_classes: Hidden(num_classes),
            "cannot be built by keyword with num_classes=4",
        ),
        (lambda num_classes, channels: None, "must build a network, not NoneType"),
        (resnet18, "unexpected keyword argument 'channels'"),  # by place it would fetch weights
    ],
)
def test_what_builds_no_network_is_refused(build: Callable[..., nn.Module], message: str) -> None:
    register_model("odd", build, classifier="fc")
    with pytest.raises(UserError, match=message):
        create_model("odd", num_classes=4, seed=1)


def test_a_network_that_cannot_train_is_refused() -> None:
    model = Adapted(resnet18(num_classes=4).requires_grad_(False), "fc")
    with pytest.raises(UserError, match="no parameter that takes a gradient"):
        model.check(32)
    model.check(32, trains=False)  # it may teach, or be measured


class Uncopied(nn.Module):
    """Something that cannot be copied, and a second output when it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.fc = (n for n in range(3)), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        logits = self.fc(x.flatten(1))
        return (logits, logits) if self.training else logits


def test_what_cannot_train_may_teach() -> None:
    model = Adapted(Uncopied(), "fc")
    with pytest.raises(UserError, match="Uncopied fails when it trains on"):
        model.check(4)
    model.check(4, trains=False)
    assert not model.folds


class Gated(nn.Module):
    """A gate without gradient reads the convolution's output beside its normalisation."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.fc((self.bn(h) * h.detach().sigmoid()).mean((2, 3)))


def test_a_network_that_cannot_be_folded_is_attacked_as_it_is() -> None:
    model, x = Adapted(Gated(5), "fc"), torch.rand(4, 3, 8, 8)
    for _ in range(3):
        model.train()(x)
    for _ in range(2):
        model.check(8)
        assert not model.folds
    model = copy.deepcopy(model).eval()
    with frozen(model, x):
        found = model(x)
    assert torch.equal(found, model(x))
