"""The linear layer: optimal for its objective, the same as scikit-learn's on the same features."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset, Splits
from gacd.errors import UserError
from gacd.evaluation.robust import evaluate
from gacd.linear import STRENGTHS, extract, fit_head
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.storage import load_tensors, save_tensors


def network(classes: int) -> Backbone:
    return create_model("digits-cnn-2", num_classes=classes, channels=1, seed=3)


def noise(n: int, seed: int) -> ArrayDataset:
    """Random images, brighter the higher their class, so that there is something to learn."""
    labels = torch.arange(n) % 3
    pixels = torch.randint(150, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    pixels += 50 * labels.view(-1, 1, 1, 1)
    return ArrayDataset(pixels.to(torch.uint8), labels, ("a", "b", "c"), "noise")


def splits(keep: tuple[int, ...], classes: int = 3) -> Splits:
    """Noise of these classes alone, of a data set that has `classes` of them."""
    parts = []
    for n, seed in ((90, 0), (60, 1), (30, 2)):
        part = noise(n, seed)
        part = part.subset(torch.isin(part.labels, torch.tensor(keep)))
        parts.append(ArrayDataset(part.images, part.labels, tuple("abcd")[:classes], "noise"))
    return Splits(*parts)


@pytest.mark.parametrize(("keep", "classes"), [((0, 1, 2), 3), ((0, 1), 2)])
def test_the_layer_is_the_optimum_and_sklearns(keep: tuple[int, ...], classes: int) -> None:
    data, model = splits(keep, classes), network(classes).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head")}
    found = fit_head(model, data, None)
    assert model.training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

    z, labels = extract(model, data.train)
    assert not model.body[1].num_batches_tracked  # features in evaluation mode
    mean, scale = z.mean(0).double(), z.std(0).double()
    x = (z.double() - mean) / scale
    with torch.no_grad():
        answers = model.eval()(data.train.float_images()).double().softmax(1)
    fitted = LogisticRegression(C=found.strength, max_iter=2000, tol=1e-8).fit(x, labels)
    np.testing.assert_allclose(answers, fitted.predict_proba(x), atol=2e-3)

    # The gradient of sum CE + |W|^2 / (2 C) in the standardised features vanishes; two classes
    # share one row w = w_1 - w_0 of norm |w|, so there the penalty is |w_1 - w_0|^2 / (2 C).
    head = model.get_classifier()
    weight = (head.weight.detach().double() * scale).requires_grad_()
    bias = (head.bias + head.weight @ z.mean(0)).detach().double().requires_grad_()
    norm = weight if classes > 2 else (weight[1] - weight[0])
    loss = F.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
    gradients = torch.autograd.grad(
        loss + norm.square().sum() / (2 * found.strength), (weight, bias)
    )
    assert max(g.abs().max() for g in gradients) < 0.02 * len(labels) ** 0.5


def accuracies(model: Backbone, data: ArrayDataset, threat: ThreatModel) -> tuple[float, float]:
    """In %, without attack and under PGD-10, as `gacd.evaluation` has them."""
    found = evaluate(model, data, attacks=["pgd10"], threat=threat, show_progress=False)
    return found.accuracy("natural"), found.accuracy("pgd10")


def test_clean_validation_images_choose_the_strength() -> None:
    data, model = splits((0, 1, 2)), network(3)
    found = fit_head(model, data, None)
    assert set(found.val_natural) == {str(c) for c in STRENGTHS}
    assert not found.val_robust
    best = max(found.val_natural.values())
    assert found.strength == min(c for c in STRENGTHS if found.val_natural[str(c)] == best)
    assert accuracies(model, data.val, ThreatModel(eps=0.1))[0] == pytest.approx(best)
    assert best > 50


def test_attacked_validation_images_have_half_the_say() -> None:
    data, model, threat = splits((0, 1, 2)), network(3), ThreatModel(eps=0.06)
    alone = {}
    for c in STRENGTHS:  # one strength: no choice
        fit_head(model, data, None, (c,))
        alone[c] = accuracies(model, data.val, threat)
    found = fit_head(model, data, threat)
    for c, (natural, robust) in alone.items():
        assert found.val_natural[str(c)] == pytest.approx(natural)
        assert found.val_robust[str(c)] == pytest.approx(robust, abs=5)  # another random start
    means = {c: found.val_natural[str(c)] + found.val_robust[str(c)] for c in STRENGTHS}
    assert found.strength == min(c for c in STRENGTHS if means[c] == max(means.values()))
    assert accuracies(model, data.val, threat)[0] == found.val_natural[str(found.strength)]
    assert len(set(found.val_robust.values())) > 1
    assert all(found.val_robust[c] <= natural for c, natural in found.val_natural.items())


def test_a_class_that_train_lacks_is_never_answered() -> None:
    data, model = splits((0, 2), classes=4), network(4)
    fit_head(model, data, None)
    with torch.no_grad():
        said = model.eval()(torch.rand(200, 1, 8, 8)).softmax(1)
    assert set(said.argmax(1).tolist()) <= {0, 2}
    assert not said[:, [1, 3]].any()  # what a loss or an attack sees


def test_a_layer_of_one_answer_is_not_chosen_for_being_hard_to_attack() -> None:
    """With two classes it is half right under any attack, and everything else may be broken."""
    data, model = splits((0, 1), 2), network(2)
    few = torch.arange(len(data.train)) < 10  # of both classes, then of the first alone
    data = replace(data, train=data.train.subset(few | (data.train.labels == 0)))
    found = fit_head(model, data, ThreatModel(eps=0.5), (1e-5, 1.0))
    assert found.val_natural["1e-05"] == found.val_robust["1e-05"] == 50
    assert 50 < found.val_natural["1.0"] < 100 - found.val_robust["1.0"]
    assert found.strength == 1.0
    assert fit_head(model, data, ThreatModel(eps=0.5), (1e-5,)).strength == 1e-5


def test_a_layer_without_a_bias_is_fitted_without_one() -> None:
    model, parts = network(3), splits((0, 1, 2))
    old = model.get_classifier()
    name = next(name for name, part in model.named_modules() if part is old)
    model.set_submodule(name, torch.nn.Linear(old.in_features, 3, bias=False))
    fit_head(model, parts, None, (1.0,))
    z, labels = extract(model, parts.train)
    scaled = (z / z.std(0).clamp_min(1e-6)).numpy()
    fit = LogisticRegression(C=1.0, max_iter=500, fit_intercept=False).fit(scaled, labels.numpy())
    with torch.no_grad():
        found = model.get_classifier()(z).softmax(1).numpy()
    np.testing.assert_allclose(found, fit.predict_proba(scaled), atol=1e-4)


THREAT = ThreatModel(eps=0.06)


@pytest.mark.parametrize("threat", [THREAT, None])
@pytest.mark.usefixtures("elsewhere")
def test_an_interrupted_fit_goes_on_and_gives_the_same(
    tmp_path: Path, attacked: Callable[..., int], capsys: pytest.CaptureFixture[str], threat: Any
) -> None:
    data, model, whole = splits((0, 1, 2)), network(3), network(3)
    expected = fit_head(whole, data, threat)
    assert not list(tmp_path.iterdir())
    assert attacked(3) == 6
    with pytest.raises(KeyboardInterrupt):
        fit_head(model, data, threat, cache="kept")
    assert attacked() == 3
    first, _ = files = sorted(Path("kept").iterdir())
    layer, figures = load_tensors(first)
    save_tensors(first, layer, figures | {"seconds": 5000.0})
    capsys.readouterr()
    found = fit_head(model, data, threat, cache="kept")
    assert attacked() == 4
    assert (": 360/360 images" in capsys.readouterr().err) == (threat is not None)
    assert 5000 < found.seconds < 5600
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert set(files) < set(Path("kept").iterdir())


def test_nothing_is_taken_from_a_fit_of_anything_else(
    tmp_path: Path, attacked: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = splits((0, 1, 2)), network(3)

    def tried(model: Backbone = model, data: Splits = data, threat: Any = THREAT) -> int:
        attacked()
        fit_head(deepcopy(model), data, threat, (0.01, 1.0), cache=tmp_path)
        return attacked()

    assert [tried(), tried()] == [2, 0]
    other = network(3)
    with torch.no_grad():
        next(other.parameters())[0] += 0.1
    assert tried(model=other) == 2
    assert tried(data=replace(data, val=data.test)) == 2
    assert tried(data=replace(data, train=data.test)) == 2
    assert tried(threat=ThreatModel(eps=0.05)) == tried(threat=None) == 2
    assert tried() == 0
    monkeypatch.setattr("gacd.__version__", "another")
    assert tried() == 2


def test_a_damaged_file_of_a_fit_is_named(tmp_path: Path) -> None:
    data, model = splits((0, 1, 2)), network(3)
    fit_head(model, data, None, (1.0,), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    layer, figures = load_tensors(path)
    save_tensors(path, layer, figures | {"natural": 101})
    remedy = "delete it and run"
    with pytest.raises(UserError, match=rf"{path}: not written by .*; {remedy}.*natural is 101"):
        fit_head(model, data, None, (1.0,), cache=tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{path}: truncated .*; {remedy}"):
        fit_head(model, data, None, (1.0,), cache=tmp_path)
    path.unlink()
    fit_head(model, data, None, (1.0,), cache=tmp_path)
