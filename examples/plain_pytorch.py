"""GACD in a training loop of one's own: plain tensors, hand-made networks, one import of ours.

    python examples/plain_pytorch.py [EPOCHS]

scikit-learn's digits; a teacher trained adversarially, a student a quarter of its width distilled
from its features, then a linear layer on the frozen student. Half a minute on a laptop. Accuracies
are on held-out images, the robust ones under PGD-20 within eps = 0.1.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gacd.losses.contrastive import gacd_loss

EPS, STEP, EMBEDDING = 0.1, 0.025, 64
EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False),
        *(nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * width, 4 * width), nn.ReLU()),
    )


def attack(
    model: nn.Module, objective: Callable[[Tensor], Tensor], x: Tensor, steps: int
) -> Tensor:
    """PGD on objective(model(x)), in the l_inf ball of EPS inside [0, 1], from a random start."""
    model.eval()
    noise = torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(steps):
        x_adv = (x + noise).clamp(0, 1).requires_grad_()
        gradient = torch.autograd.grad(objective(model(x_adv)), x_adv)[0]
        noise = (x_adv.detach() + STEP * gradient.sign() - x).clamp(-EPS, EPS)
    model.train()
    return (x + noise).clamp(0, 1)


def cosine_distance(clean: Tensor, features: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(features, clean)).sum()


def batches(n: int) -> Iterator[Tensor]:
    for _ in range(EPOCHS):
        yield from torch.randperm(n).split(128)


def train_teacher(x: Tensor, y: Tensor) -> tuple[nn.Module, nn.Module]:
    body, head = network(32), nn.Linear(128, 10)
    model = nn.Sequential(body, head)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for i in batches(len(x)):
        x_adv = attack(model, partial(F.cross_entropy, target=y[i]), x[i], steps=5)
        optimiser.zero_grad()
        F.cross_entropy(model(x_adv), y[i]).backward()
        optimiser.step()
    return body.eval(), head.eval()


def distill(x: Tensor, y: Tensor, teacher: nn.Module, head: nn.Module) -> nn.Module:
    with torch.no_grad():  # the anchor bank: raw features of the whole training set, and weights
        bank_MD = teacher(x)
        weights_M = head(bank_MD).softmax(1).gather(1, y[:, None])[:, 0]
    student = network(8)
    to_s, to_t = nn.Linear(32, EMBEDDING), nn.Linear(128, EMBEDDING)
    parameters = [*student.parameters(), *to_s.parameters(), *to_t.parameters()]
    optimiser = torch.optim.Adam(parameters, 2e-3)
    for i in batches(len(x)):
        with torch.no_grad():
            clean = student.eval()(x[i])
        x_adv = attack(student, partial(cosine_distance, clean), x[i], steps=5)  # no label used
        loss_B = gacd_loss(
            F.normalize(to_s(student(x_adv)), dim=1),
            F.normalize(to_t(bank_MD[i]), dim=1),
            bank_MD,
            labels_B=y[i],
            anchor_labels_M=y,
            weights_B=weights_M[i],
            anchor_weights_M=weights_M,
            index_B=i,
            projection_weight_ED=to_t.weight,
            projection_bias_E=to_t.bias,
            temperature=0.1,
            negatives=512,
        )
        optimiser.zero_grad()
        loss_B.mean().backward()
        optimiser.step()
    return student.eval()


def linear_layer(features: Tensor, y: Tensor) -> nn.Module:
    layer = nn.Linear(features.shape[1], 10)
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(500):
        optimiser.zero_grad()
        F.cross_entropy(layer(features), y).backward()
        optimiser.step()
    return layer


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    x_adv = attack(model, partial(F.cross_entropy, target=y), x, steps=20)
    model.eval()
    natural, robust = ((model(z).argmax(1) == y).float().mean() for z in (x, x_adv))
    return f"{natural:.1%} natural, {robust:.1%} robust"


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target, dtype=torch.int64)
    train, test = torch.randperm(len(x)).split([1300, len(x) - 1300])
    teacher, head = train_teacher(x[train], y[train])
    print("teacher", accuracy(nn.Sequential(teacher, head), x[test], y[test]))
    student = distill(x[train], y[train], teacher, head)
    model = nn.Sequential(student, linear_layer(student(x[train]).detach(), y[train]))
    print("student", accuracy(model, x[test], y[test]))


if __name__ == "__main__":
    main()
