"""Attacked examples: which images, what the attack did to them, and what was left alone."""

import base64
import json

import numpy as np
import pytest
import torch

from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.evaluation.examples import attacked_examples


def pixels(record: dict, which: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(record[which]), np.uint8)
    return data.reshape(record["shape"])


@pytest.fixture(scope="module")
def examples(honest, digits, threat) -> dict:
    return attacked_examples(honest, digits, threat=threat)


def test_they_are_the_first_image_of_each_class(examples, digits):
    assert examples["truth"] == ["0", "1", "2", "3", "4", "5"]
    assert examples["shape"] == [6, 8, 8, 1]
    for k, image in enumerate(pixels(examples, "clean")):
        first = next(i for i, label in enumerate(digits.labels.tolist()) if label == k)
        assert (image[:, :, 0] == digits.images[first, 0].numpy()).all()


def test_a_class_without_images_is_left_out(honest, digits, threat):
    some = digits.subset((digits.labels != 1) & (digits.labels != 4))
    found = attacked_examples(honest, some, threat=threat, count=4)
    assert found["truth"] == ["0", "2", "3", "5"]


def test_the_record_is_json(examples):
    assert json.loads(json.dumps(examples)) == examples


def test_on_a_linear_model_every_pixel_goes_as_far_as_it_may(linear_net):
    """Two classes, logits (w.x + b, 0): the best attack is x ∓ eps sign(w), clipped to [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 4, 5), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0])
    data = ArrayDataset(images, labels, ("plus", "minus"), "made up")
    weight = torch.randn(3, 4, 5, generator=generator)
    net = linear_net(weight, -float((weight * images.float().mean(0) / 255).sum()))
    eps = 0.25
    found = attacked_examples(net, data, threat=ThreatModel(eps=eps))

    assert (found["truth"], found["shape"]) == (["plus", "minus"], [2, 4, 5, 3])
    names = []
    for k, row in enumerate((2, 0)):  # the first image of each class
        x = images[row].double().numpy() / 255
        best = np.clip(x - (1 - 2 * k) * eps * np.sign(weight.numpy()), 0, 1)
        np.testing.assert_array_equal(
            pixels(found, "attacked")[k], np.round(255 * best).transpose(1, 2, 0)
        )
        score = float((weight.numpy() * best).sum()) + net.bias
        names.append("plus" if score > 0 else "minus")
    assert found["answers"]["attacked"] == names


def test_answers_are_the_models(examples, honest, digits):
    with torch.no_grad():
        for which in ("clean", "attacked"):
            x = torch.from_numpy(pixels(examples, which).copy()).permute(0, 3, 1, 2) / 255
            answers = [str(k) for k in honest(x).argmax(1).tolist()]
            assert examples["answers"][which] == answers
    assert examples["answers"]["clean"] != examples["answers"]["attacked"]


def test_without_a_budget_nothing_changes(honest, digits):
    found = attacked_examples(honest, digits, threat=ThreatModel(eps=0.0))
    assert found["clean"] == found["attacked"]
    assert found["answers"]["clean"] == found["answers"]["attacked"]


def test_the_step_size_is_in_units_of_eps(examples, honest, digits, threat):
    quarter = attacked_examples(honest, digits, threat=threat, step_size=threat.eps / 4)
    still = attacked_examples(honest, digits, threat=threat, step_size=0.0, steps=1)
    half = attacked_examples(honest, digits, threat=threat, step_size=threat.eps / 2, steps=1)
    assert half != attacked_examples(honest, digits, threat=threat, steps=1)
    assert quarter == examples
    assert still["answers"]["attacked"] == examples["answers"]["clean"]  # noise breaks nothing


def test_nothing_else_is_touched(honest, digits, threat, examples):
    honest.train()
    honest.body[2].eval()
    modes = [part.training for part in honest.modules()]
    weights = {name: tensor.clone() for name, tensor in honest.state_dict().items()}
    for parameter in honest.parameters():
        parameter.grad = None
    before = torch.get_rng_state()
    again = attacked_examples(honest, digits, threat=threat)
    assert again == examples
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in honest.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in honest.parameters())
    assert all(torch.equal(weights[k], v) for k, v in honest.state_dict().items())
    honest.train()  # as the fixture made it
