"""Frozen features with a new layer: the same features, the layer of scikit-learn, nothing else."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from gacd.attacks.threat import ThreatModel
from gacd.data.load import load_splits
from gacd.errors import UserError
from gacd.evaluation.robust import evaluate
from gacd.evaluation.transfer import transfer, with_new_head
from gacd.models import create_model


def test_only_the_last_layer_is_new() -> None:
    model = create_model("digits-cnn-2", num_classes=3, channels=1, mean=(0.3,), std=(0.2,), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    copied = with_new_head(model, 5)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(model.eval().forward_features(x), copied.eval().forward_features(x))
    assert torch.equal(copied(x), torch.zeros(4, 5))
    assert (copied.num_classes, model.num_classes) == (5, 3)
    with torch.no_grad():
        copied.get_classifier().weight.fill_(1)
        next(copied.parameters()).zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_classes_are_learned_and_attacked_through_the_features(
    honest, threat: ThreatModel
) -> None:
    splits = load_splits("digits", seed=0, classes=["8", "3", "5"], test_limit=60)
    network, fit = transfer(honest, splits, threat)
    mean, scale = (
        honest.eval().forward_features(splits.train.float_images()).detach().double().mean(0),
        honest.forward_features(splits.train.float_images()).detach().double().std(0),
    )

    def standardised(part) -> np.ndarray:
        features = honest.forward_features(part.float_images()).detach().double()
        return ((features - mean) / scale.clamp_min(1e-6)).numpy()

    reference = LogisticRegression(C=fit.strength, max_iter=2000, tol=1e-6)
    reference.fit(standardised(splits.train), splits.train.labels)
    answers = network(splits.test.float_images()).softmax(1).detach().numpy()
    expected = reference.predict_proba(standardised(splits.test))
    np.testing.assert_allclose(answers, expected, atol=0.02)

    found = evaluate(
        network, splits.test, attacks=["pgd7"], threat=threat, show_progress=False, seed=0
    )
    assert found.accuracy("natural") > 80
    assert found.accuracy("pgd7") < found.accuracy("natural") - 5


def test_images_with_other_channels_are_refused() -> None:
    model = create_model("digits-cnn-2", num_classes=3, channels=3, seed=0)
    with pytest.raises(UserError, match="1 channels, but the model takes 3"):
        transfer(model, load_splits("digits", seed=0), None)
