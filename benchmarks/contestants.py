"""Who takes part in benchmarks/training.py: this package, a plain loop, ARD's own script."""

import argparse
import ast
import importlib
import itertools
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.threat import ThreatModel
from gacd.attacks.transport import cosine_cost, sinkhorn
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset, ImageDataset
from gacd.losses.contrastive import gacd_loss
from gacd.methods import Method, Teacher, TrainingAttack, create_method
from gacd.models import create_model
from gacd.models.projection import Projection
from gacd.processor import fast_bf16
from gacd.randomness import keyed_generator
from gacd.shapes import Batch
from gacd.training.precision import Bf16Autocast

NAMES = ("pgd-at", "ard", "rslad", "gacd")
EPS, STEP_SIZE, CLASSES, NEGATIVES = 8 / 255, 2 / 255, 10, 16_384
PARTS = ("attack", "student", "teacher", "objective", "data")
Step = Callable[[], object]


class World:
    """What the contestants share: data, a teacher's features, sizes."""

    def __init__(self, device: torch.device, options: argparse.Namespace) -> None:
        self.device, self.model = device, options.model
        self.batch, self.steps, self.threads = options.batch, options.steps, options.threads
        self.clock = time.process_time if self.threads == 1 else time.perf_counter
        generator = torch.Generator().manual_seed(0)
        n = max(2048, 2 * self.batch)
        pixels = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (n,), generator=generator)
        self.data = ArrayDataset(pixels, labels, tuple("0123456789"), "noise")
        self.width = self.network(0).num_features
        self.bank = AnchorBank(
            torch.randn(options.anchors, self.width, generator=generator).relu().bfloat16(),
            torch.randint(CLASSES, (options.anchors,), generator=generator),
            torch.rand(options.anchors, generator=generator),
            Fingerprint("teacher", "data", "none"),
        ).to(device)

    def network(self, seed: int) -> Any:
        """A student or a teacher, fp32 and NCHW, in training mode."""
        return create_model(self.model, num_classes=CLASSES, seed=seed)


class Watch:
    """Seconds by part: what runs is charged to the part that was entered last."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stack = device, ["student"]
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def turn(self) -> None:
        """Charge the time since the last turn."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def set(self, part: str) -> None:
        """From here on it is `part`."""
        self.turn()
        self.stack[-1] = part

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, charged to `part`; inside an attack everything is the attack's."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.stack.append("attack" if "attack" in self.stack else part)
            result = function(*args, **kwargs)
            self.turn()
            self.stack.pop()
            return result

        return watched


def method_of(name: str, world: World, **changes: Any) -> Method:
    attack = TrainingAttack(threat=ThreatModel(eps=EPS), steps=world.steps, step_size=STEP_SIZE)
    teacher = world.network(0).to(world.device, memory_format=torch.channels_last)
    settings = {"gacd": {"negatives": NEGATIVES} | changes}
    return create_method(
        name, world.network(1), attack, teacher=Teacher(teacher), bank=world.bank, options=settings
    )


def ours(
    name: str,
    world: World,
    watch: Watch | None = None,
    options: dict[str, Any] | None = None,
    *,
    compiled: bool = False,
) -> Step:
    """A step of `gacd.training.loop.fit`."""
    device = world.device
    plugins = [Bf16Autocast(device.type)] if fast_bf16(device.type) else None
    fabric = Fabric(accelerator=device.type, devices=1, plugins=plugins)
    method = (
        method_of(name, world, **(options or {}))
        .to(device)
        .to(memory_format=torch.channels_last)
        .train()
    )
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad],
        0.01, 0.9, weight_decay=5e-4, nesterov=True,
    )  # fmt: skip
    if compiled:
        forward = torch.compile(method.student.forward_features, dynamic=False)
        method.student.forward_features = forward  # type: ignore[method-assign]
    if watch is not None:
        _watch(method, watch)
    module, wrapped = fabric.setup(method, optimizer)
    source, count = forever(world.data.to(device), world.batch), itertools.count()

    def step() -> None:
        if watch is not None:
            watch.set("data")
        batch = next(source)
        if watch is not None:
            watch.set("objective")
        loss = module(batch, keyed_generator(device, 1, 0, next(count)))
        fabric.backward(loss.total)
        if watch is not None:
            watch.set("student")  # where there were no features to hook, and for the optimizer
        fabric.clip_gradients(module, wrapped, max_norm=5.0, error_if_nonfinite=False)
        wrapped.step()
        optimizer.zero_grad()
        if watch is not None:
            watch.turn()

    return step


def forever(data: ImageDataset, batch: int) -> Iterator[Batch]:
    """Batches as training sees them, epoch after epoch."""
    for epoch in itertools.count():
        yield from iterate(
            data, batch, shuffle=True, seed=0, epoch=epoch, drop_last=True, pad=4, flip=True
        )


def _watch(method: Method, watch: Watch) -> None:
    method.adversarial = watch.around("attack", method.adversarial)  # type: ignore[method-assign]
    teacher = getattr(method, "teacher", None)
    if teacher is not None:
        forward = teacher.module.forward_features
        teacher.module.forward_features = watch.around("teacher", forward)
    forward_features = method.student.forward_features

    def features(x: Tensor) -> Tensor:
        made: Tensor = watch.around("student", forward_features)(x)
        if made.requires_grad and "attack" not in watch.stack:
            made.register_hook(lambda _: watch.set("student"))  # the way back has reached it
        return made

    method.student.forward_features = features  # type: ignore[method-assign]


class Pictures(Dataset[tuple[Tensor, int, int]]):
    """The same images as torchvision's data sets hold them: one PIL image at a time."""

    def __init__(self, data: ArrayDataset) -> None:
        from torchvision import transforms

        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[row])), self.labels[row], row


def loader(world: World) -> Iterator[Any]:
    """Batches for ever; two workers as in the peers' scripts, none where processor time counts."""
    workers = 0 if world.threads == 1 else 2
    made = DataLoader(
        Pictures(world.data), world.batch, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from made


def plain(name: str, world: World) -> Step:
    """The method in a loop as it is usually written."""
    device, steps = world.device, world.steps
    student, teacher = world.network(1).to(device).train(), world.network(0).to(device).eval()
    parts: list[nn.Module] = [student]
    if name == "gacd":
        to_s, to_t = (Projection(world.width, 128, seed=seed).to(device) for seed in (0, 1))
        parts += [to_s, to_t]
        bank = world.bank.features_MD.float()
    optimizer = torch.optim.SGD(
        [p for part in parts for p in part.parameters()], 0.01, 0.9, weight_decay=5e-4
    )
    source = loader(world)

    def objective(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        if name == "rslad":
            with torch.no_grad():
                target = teacher(x).softmax(1)
            return lambda z: F.kl_div(student(z).log_softmax(1), target, reduction="sum")
        if name != "gacd":
            return lambda z: F.cross_entropy(student(z), y)
        with torch.no_grad():
            clean = student.forward_features(x)

        def transport(z: Tensor) -> Tensor:
            cost = cosine_cost(student.forward_features(z), clean)
            return (sinkhorn(cost.detach()) * cost).sum()

        return transport

    def attack(x: Tensor, y: Tensor) -> Tensor:
        student.eval()
        score = objective(x, y)
        z = x + torch.empty_like(x).uniform_(-EPS, EPS)
        for _ in range(steps):
            z = z.detach().requires_grad_()
            (grad,) = torch.autograd.grad(score(z), z)
            z = z.detach() + STEP_SIZE * grad.sign()
            z = torch.min(torch.max(z, x - EPS), x + EPS).clamp(0, 1)
        student.train()
        return z

    def loss_of(x: Tensor, y: Tensor, index: Tensor, z: Tensor) -> Tensor:
        if name == "pgd-at":
            return F.cross_entropy(student(z), y)
        if name == "gacd":
            with torch.no_grad():
                seen = teacher.forward_features(x)
            return gacd_loss(
                to_s(student.forward_features(z)), to_t(seen), bank,
                labels_B=y, anchor_labels_M=world.bank.labels_M,
                weights_B=world.bank.weights_M[index], anchor_weights_M=world.bank.weights_M,
                index_B=index, projection_weight_ED=to_t.linear.weight,
                projection_bias_E=to_t.linear.bias, temperature=0.1, negatives=NEGATIVES,
            ).mean()  # fmt: skip
        with torch.no_grad():
            target = teacher(x)
        if name == "ard":
            log_p, q = F.log_softmax(student(z) / 30, dim=1), F.softmax(target / 30, dim=1)
            return 900 * F.kl_div(log_p, q, reduction="batchmean")
        log_p, log_clean = student(z).log_softmax(1), student(x).log_softmax(1)
        kl = F.kl_div(log_p, target.softmax(1), reduction="batchmean") * 5 / 6
        return kl + F.kl_div(log_clean, target.softmax(1), reduction="batchmean") / 6

    def step() -> float:
        x, y, index = (part.to(device) for part in next(source))
        z = attack(x, y)
        optimizer.zero_grad()
        loss = loss_of(x, y, index, z)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def peer(directory: Path, world: World) -> Step:
    """One step of ARD's own `train`, with its own networks, fed from the plain loop's loader."""
    sys.path.insert(0, str(directory))
    models = importlib.import_module("models")
    source = loader(world)
    if world.model == "resnet18":
        build = models.ResNet18
    else:
        depth, width = (int(number) for number in world.model.removeprefix("wrn-").split("-"))

        def build() -> nn.Module:
            made: nn.Module = models.WideResNet(depth=depth, widen_factor=width)
            return made

    student, teacher = build().to(world.device), build().to(world.device).eval()
    teacher.requires_grad_(False)

    class Bar(list[Any]):
        def set_description(self, text: str) -> None:
            """Nothing is shown."""

    values: dict[str, Any] = {
        "torch": torch, "nn": nn, "F": F, "os": os, "device": world.device,
        "args": SimpleNamespace(alpha=1.0, temp=30.0, save_period=10**9, dataset="", output=""),
        "KL_loss": nn.KLDivLoss(), "XENT_loss": nn.CrossEntropyLoss(),
        "basic_net": student, "teacher_net": teacher,
        "tqdm": lambda batches, **_: Bar(batches), "print": lambda *_: None,
    }  # fmt: skip
    script = ast.parse((directory / "main.py").read_text())
    wanted = [node for node in script.body if getattr(node, "name", "") in ("AttackPGD", "train")]
    exec(compile(ast.Module(wanted, []), str(directory / "main.py"), "exec"), values)
    settings = {"epsilon": EPS, "num_steps": world.steps, "step_size": STEP_SIZE}
    values["net"] = values["AttackPGD"](student, settings)
    optimizer = torch.optim.SGD(values["net"].parameters(), 0.01, 0.9, weight_decay=2e-4)

    def step() -> None:
        values["trainloader"] = [next(source)[:2]]
        with warnings.catch_warnings():  # it uses arguments that torch has renamed
            warnings.simplefilter("ignore")
            values["train"](0, optimizer)

    return step
