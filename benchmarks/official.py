"""Rivals against their authors' own code: losses, gradients and attacks on the same images.

    python benchmarks/official.py --peers DIR [--out FILE]

DIR holds checkouts named TRADES, MART, AWP, RSLAD, AdaAD and RepDistiller; what is absent is left
out. Small networks in float64 (CRD in float32), attacks in float32 from one start. A loss is
compared on the attacked images that the official code made: `loss` and `gradient` are relative
differences of the value and (largest over largest) of the student's gradient; of attacks, the share
of pixels that differ by more than 1e-6. Only functions are called here: of ARD, IAD, IGDM, and of
RSLAD's and AdaAD's outer losses, the code is lines of a training script.
"""

import argparse
import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.threat import ThreatModel
from gacd.evaluation.record import environment
from gacd.methods import Method, Teacher, TrainingAttack, create_method
from gacd.methods.awp import AWP
from gacd.methods.base import Step
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.shapes import Batch
from gacd.storage import write_json

EPS, STEPS, SIZE = 8 / 255, 10, 2 / 255
Found = dict[str, float]


class World:
    """Images with labels, a student in training mode, and a teacher that is often right."""

    def __init__(self, dtype: torch.dtype, images: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        wide = torch.rand(images, 3, 16, 16, generator=generator, dtype=torch.float64)
        wide[:2] = wide[:2].round()  # some pixels at the edge of the box
        self.x = wide.to(dtype)
        self.student, self.teacher = (
            self._network(f"digits-cnn-{width}", seed, dtype) for seed, width in enumerate((4, 6))
        )
        self.teacher.eval().requires_grad_(False)
        self.y = torch.randint(10, (images,), generator=generator)
        self.y[::2] = self.teacher(self.x).argmax(1)[::2]
        self.batch = Batch(self.x, self.y, torch.arange(images))

    def _network(self, name: str, seed: int, dtype: torch.dtype) -> Backbone:
        network = create_model(name, num_classes=10, channels=3, seed=seed).to(dtype).train()
        network(self.x)  # statistics that are not those of the start
        with torch.no_grad():
            network.get_classifier().weight.mul_(6)
        return network

    def method(self, name: str, **more: Any) -> Method:
        """Ours, around a copy of the student."""
        attack = TrainingAttack(threat=ThreatModel(eps=EPS), steps=STEPS, step_size=SIZE)
        student = copy.deepcopy(self.student)
        return create_method(name, student, attack, teacher=_Exact(self.teacher), **more).train()


class _Exact(Teacher):
    """The teacher in the images' own precision."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.module.forward_features(images)

    @torch.no_grad()
    def head(self, features: Tensor) -> Tensor:
        return self.module.forward_head(features)


def loss_of(method: Method, world: World, x_adv: Tensor | None) -> Tensor:
    """Our loss of the batch, where the attack has found `x_adv`; its gradient is in the student."""
    method.adversarial = lambda step: x_adv
    total = method(world.batch, torch.Generator().manual_seed(0), 1.0).total
    total.backward()
    return total.detach()


def compared(ours: Tensor, theirs: Tensor, student: nn.Module, other: nn.Module) -> Found:
    """Relative differences of two losses, and of the gradients they left."""
    pairs = list(zip(student.parameters(), other.parameters(), strict=True))
    largest = max(float(q.grad.abs().max()) for _, q in pairs if q.grad is not None)
    apart = max(
        float((p.grad - q.grad).abs().max())
        for p, q in pairs
        if p.grad is not None and q.grad is not None
    )
    return {"loss": abs(float(ours / theirs.detach()) - 1), "gradient": apart / largest}


@contextmanager
def watched(network: nn.Module, clean: Tensor) -> Iterator[list[Tensor]]:
    """The last batch other than the clean one that the network has seen."""
    seen: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if not torch.equal(given[0], clean):
            seen[:] = [given[0].detach()]

    handle = network.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def started(noise: Tensor) -> Iterator[None]:
    """Attacks of both sides start at the images plus `noise`."""
    normal, uniform = torch.randn, ThreatModel.random_start
    torch.randn = lambda *_, **__: noise / 0.001
    ThreatModel.random_start = lambda self, x, generator: x + noise
    try:
        yield
    finally:
        torch.randn, ThreatModel.random_start = normal, uniform


def load(path: Path) -> ModuleType:
    """A module of a checkout."""
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole_loss(name: str, function: Callable[..., Tensor], beta: float) -> Found:
    """TRADES and MART: one function that attacks and gives the loss."""
    world = World(torch.float64)
    other = copy.deepcopy(world.student)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    torch.manual_seed(0)
    with watched(other, world.x) as seen:
        theirs = function(
            other, world.x, world.y, optimizer, step_size=SIZE, epsilon=EPS, perturb_steps=STEPS,
            beta=beta,
        )  # fmt: skip
    optimizer.zero_grad()
    theirs.backward()
    method = world.method(name, options={name: {"beta": beta}})
    ours = loss_of(method, world, seen[0])
    return compared(ours, theirs, method.student, other)


def attack(name: str, function: Callable[..., Any]) -> Found:
    """The attack alone; `function` is given a student, the world, and what it shall watch."""
    world = World(torch.float32, images=64)
    noise = 0.001 * torch.randn(world.x.shape, generator=torch.Generator().manual_seed(7))
    method, other = world.method(name), copy.deepcopy(world.student)
    with started(noise):
        with watched(other, world.x) as seen:
            function(other, world)
        step = Step(world.batch, method.student, method.teacher, torch.Generator(), 1.0)
        ours = method.adversarial(step)
    return {"pixels": float(((ours - seen[0]).abs() > 1e-6).double().mean())}


def awp(peers: Path, gamma: float = 0.01) -> Found:
    """Adversarial training at the perturbed weights."""
    official = load(peers / "AWP" / "AT_AWP" / "utils_awp.py")
    world = World(torch.float64)
    noise = torch.randn(world.x.shape, dtype=torch.float64)
    x_adv = (world.x + EPS * noise.sign()).clamp(0, 1)
    other, proxy = copy.deepcopy(world.student), copy.deepcopy(world.student)
    adversary = official.AdvWeightPerturb(
        model=other, proxy=proxy, proxy_optim=torch.optim.SGD(proxy.parameters(), lr=0.1),
        gamma=gamma,
    )  # fmt: skip
    adversary.perturb(adversary.calc_awp(inputs_adv=x_adv, targets=world.y))
    theirs = F.cross_entropy(other(x_adv), world.y)
    theirs.backward()
    method = world.method("pgd-at", awp=AWP(gamma=gamma))
    ours = loss_of(method, world, x_adv)
    return compared(ours, theirs, method.student, other)


def kd(peers: Path) -> Found:
    """Soft labels at temperature 4."""
    official = load(peers / "RepDistiller" / "distiller_zoo" / "KD.py")
    world = World(torch.float64)
    other = copy.deepcopy(world.student)
    logits = other(world.x)
    soft = official.DistillKL(4.0)(logits, world.teacher(world.x))
    theirs = 0.1 * F.cross_entropy(logits, world.y) + 0.9 * soft
    theirs.backward()
    method = world.method("kd")
    return compared(loss_of(method, world, None), theirs, method.student, other)


def crd(peers: Path, size: int = 2000, negatives: int = 1024) -> Found:
    """Cross-entropy and CRD, from the same memories and the same draws."""
    sys.path.insert(0, str(peers / "RepDistiller"))
    from crd.criterion import CRDLoss

    world, generator = World(torch.float32), torch.Generator().manual_seed(5)
    batch = len(world.y)
    labels = torch.randint(10, (size,), generator=generator)
    labels[:batch] = world.y
    features = torch.randn(size, world.teacher.num_features, generator=generator)
    bank = AnchorBank(features, labels, torch.ones(size), Fingerprint("a", "b", "c"))
    method = world.method("crd", options={"crd": {"negatives": negatives}}, bank=bank)
    term: Any = method.terms["crd"]
    widths = {"s_dim": world.student.num_features, "t_dim": world.teacher.num_features}
    criterion = CRDLoss(
        SimpleNamespace(**widths, feat_dim=128, nce_k=negatives, nce_t=0.07, nce_m=0.5, n_data=size)
    )
    criterion.embed_s.load_state_dict(term.student_projection.state_dict())
    criterion.embed_t.load_state_dict(term.teacher_projection.state_dict())
    criterion.contrast.memory_v1.copy_(term.contrast.memory.student_ME)
    criterion.contrast.memory_v2.copy_(term.contrast.memory.teacher_ME)
    other = copy.deepcopy(world.student)
    drawn = term.contrast.others.draw(world.y, negatives, torch.Generator().manual_seed(0))
    rows = torch.arange(batch)
    features = other.forward_features(world.x)
    contrast = criterion(
        features,
        world.teacher.forward_features(world.x),
        rows,
        torch.cat([rows[:, None], drawn], 1),
    )
    theirs = F.cross_entropy(other.forward_head(features), world.y) + 0.8 * contrast.sum()
    theirs.backward()
    ours = loss_of(method, world, None)
    return compared(ours, theirs, method.student, other)


def rslad(peers: Path) -> Found:
    """RSLAD's attack."""
    inner = load(peers / "RSLAD" / "rslad_loss.py").rslad_inner_loss

    def run(student: nn.Module, world: World) -> None:
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        settings = {"step_size": SIZE, "epsilon": EPS, "perturb_steps": STEPS}
        inner(student, world.teacher(world.x), world.x, world.y, optimizer, **settings)

    return attack("rslad", run)


def adaad(peers: Path) -> Found:
    """AdaAD's attack, through the teacher as well."""
    inner = load(peers / "AdaAD" / "AT_helper.py").adaad_inner_loss

    def run(student: nn.Module, world: World) -> None:
        found = inner(student, world.teacher, world.x, step_size=SIZE, steps=STEPS, epsilon=EPS)
        student(found)

    return attack("adaad", run)


def trades(peers: Path) -> Found:
    """TRADES, attack excluded."""
    return whole_loss("trades", load(peers / "TRADES" / "trades.py").trades_loss, 6.0)


def mart(peers: Path) -> Found:
    """MART, attack excluded."""
    return whole_loss("mart", load(peers / "MART" / "mart.py").mart_loss, 5.0)


CHECKS: dict[str, tuple[str, Callable[[Path], Found]]] = {
    "trades": ("TRADES", trades),
    "mart": ("MART", mart),
    "pgd-at, awp": ("AWP", awp),
    "kd": ("RepDistiller", kd),
    "crd": ("RepDistiller", crd),
    "rslad, attack": ("RSLAD", rslad),
    "adaad, attack": ("AdaAD", adaad),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", type=Path, required=True, help="the folder of the checkouts")
    parser.add_argument("--out", type=Path, help="write the record to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="size_average")
    torch.Tensor.cuda = lambda self, *_, **__: self  # the official codes take a GPU for granted
    rows = {}
    for name, (folder, check) in CHECKS.items():
        if (options.peers / folder).is_dir():
            rows[name] = check(options.peers)
            print(name, *(f"{key} {value:.1e}" for key, value in rows[name].items()), flush=True)
    if options.out is not None:
        write_json(options.out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
