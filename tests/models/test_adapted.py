"""Networks from outside the package, and the example of docs/methods.md run as its reader would."""

import copy
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.models import VisionTransformer, densenet121, mobilenet_v3_small, resnet18

import gacd.models as models
from gacd import cli
from gacd.commands import run
from gacd.errors import UserError
from gacd.models import create_model, model_names, register_model
from gacd.models.adapted import Adapted
from gacd.models.checkpoints import load_model, load_weights, save_model
from gacd.models.frozen import find_pairs, frozen
from gacd.models.modes import evaluating
from gacd.storage import read_json

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
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
        torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


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


def test_a_network_of_other_classes_is_refused() -> None:
    register_model("mine", lambda num_classes, channels: Confusing(), classifier="out.1")
    with pytest.raises(UserError, match="the registered 'mine' was built with 4 classes, not 7"):
        create_model("mine", num_classes=7, seed=0)


def test_the_example_in_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(# networks\.py\n.*?)```", DOCS.read_text(), re.DOTALL)
    script, out = tmp_path / "networks.py", tmp_path / "run"
    script.write_text(code)
    stages = ("teacher.training", "training", "distillation", "finetune")
    arguments = [
        *("distill", "--teacher.model", "small-stem", "--student", "digits-cnn-2"),
        *("--methods", "gacd+aft", "--gacd.negatives", "8", "--threat.eps", "0.1"),
        *("--data.train_limit", "40", "--data.test_limit", "10", "--attacks", "natural"),
        *("--fabric.accelerator", "cpu", "--fabric.precision", "bf16-mixed"),
        *(f"--{s}.{f}" for s in stages for f in ("epochs=1", "batch_size=20", "attack.steps=1")),
    ]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().err
    assert [row["method"] for row in read_json(out / "results.json")] == ["pgd-at", "gacd+aft"]
    teacher, _ = load_model(out / "teacher" / "model.safetensors")
    assert isinstance(teacher, Adapted) and teacher.num_features == 512
    evaluate = ["evaluate", "--checkpoint", str(out / "teacher" / "model.safetensors")]
    shape = ["--data.test_limit", "10", "--attacks", "natural", "--out", str(tmp_path / "again")]
    assert cli.main([*evaluate, *shape]) == 0, capsys.readouterr().err
    models._REGISTERED.clear()
    assert cli.main([*evaluate, *shape[:-1], str(tmp_path / "third")]) == 2
    assert "unknown model 'small-stem'" in capsys.readouterr().err
