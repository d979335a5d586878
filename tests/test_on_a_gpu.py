"""A GPU's answers are the CPU's: the fused objective's branch for it, folding, compilation.

It imports little, so that a bare machine can run it: see benchmarks/gpu.sh.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.evaluation.robust import evaluate
from gacd.losses.contrastive import gacd_loss
from gacd.models import create_model
from gacd.models.frozen import find_pairs, frozen

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NAMES = ("natural", "fgsm", "pgd20", "autoattack")
COMPILED = """
import torch
from gacd.models import create_model
from gacd.models.frozen import frozen

model = create_model("resnet18", num_classes=10, seed=0).cuda()
x = torch.rand(8, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
compiled = torch.compile(model.forward_features, dynamic=False)
for _ in range(2):
    with torch.autocast("cuda", torch.bfloat16), frozen(model, x):
        found, expected = [], []
        for features, into in ((compiled, found), (model.forward_features, expected)):
            leaf = x.clone().requires_grad_()
            out = features(leaf)
            into += [out.float(), torch.autograd.grad(out.float().square().sum(), leaf)[0]]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.05 * b.norm(), ((a - b).norm(), b.norm())
"""


def loss_and_slopes(device: str, bank: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, anchors, width, embedding, classes = 32, 20_000, 64, 16, 10

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, features = F.normalize(draw(batch, embedding), dim=1), draw(anchors, width).relu()
    weight, bias, weights = draw(embedding, width) / 8, draw(embedding), draw(anchors).sigmoid()
    labels = torch.randint(classes, (anchors,), generator=generator).to(device)
    bank_MD = features.to(bank).to(device)  # rounded alike on both devices
    leaves = [x.to(device, torch.float32).requires_grad_() for x in (student, weight, bias)]
    own = F.normalize(F.linear(bank_MD[:batch].float(), leaves[1], leaves[2]), dim=1)
    loss_B = gacd_loss(
        leaves[0],
        own,
        bank_MD,
        labels_B=labels[:batch],
        anchor_labels_M=labels,
        weights_B=weights[:batch].to(device, torch.float32),
        anchor_weights_M=weights.to(device, torch.float32),
        index_B=torch.arange(batch, device=device),
        projection_weight_ED=leaves[1],
        projection_bias_E=leaves[2],
        temperature=0.1,
        negatives=4096,
    )
    loss_B.sum().backward()
    return [loss_B.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    ("bank", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 1e-3)]
)
def test_on_a_gpu_the_objective_is_that_of_the_cpu(bank: torch.dtype, tolerance: float) -> None:
    expected = loss_and_slopes("cpu", bank)
    found = loss_and_slopes("cuda", bank)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu() - b).norm() < tolerance * b.norm()


def test_on_a_gpu_batch_normalisation_is_folded() -> None:
    model = create_model("resnet18", num_classes=10, seed=0).cuda()
    x = torch.rand(4, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert len(find_pairs(model, x)) == 20
    with torch.no_grad(), frozen(model, x):
        folded = model(x)
    with torch.no_grad():
        torch.testing.assert_close(folded, model.eval()(x), rtol=2e-2, atol=2e-2)  # TF32


def test_on_a_gpu_a_compiled_network_is_the_eager_one() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_on_a_gpu_attacks_judge_as_on_the_cpu() -> None:
    model = create_model("digits-cnn-8", num_classes=10, channels=1, seed=0).eval()
    pixels = torch.randint(256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images = pixels.to(torch.uint8)
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    data = ArrayDataset(images, labels, tuple("0123456789"), "noise")
    found = []
    for device in ("cpu", "cuda"):
        found.append(
            evaluate(
                model.to(device),
                data,
                attacks=["fgsm", "pgd20", "autoattack"],
                threat=ThreatModel(eps=4 / 255),
                show_progress=False,
            )
        )
    cpu, gpu = ([result.accuracy(name) for name in NAMES] for result in found)
    assert gpu[0] == 100 and gpu[3] <= gpu[2] <= gpu[0]
    assert 0 < cpu[3] < cpu[1] < 100  # or nothing has been compared
    for a, b in zip(cpu, gpu, strict=True):  # TF32, and noise of another generator
        assert abs(a - b) < 10
