"""The sections of a configuration, as typed dataclasses: data, threat, training, evaluation.

Nothing here imports torch, so `gacd --help` is quick. Impossible values are refused when an object
is made. Budgets may be written as fractions: `8/255`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Budget = float | str
"""A number, or a fraction such as `8/255`."""
SMALLEST = 8
"""Side of an image, in pixels."""


def fraction(value: Budget) -> float:
    """The number that `0.03`, `"0.03"` or `"8/255"` means."""
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            return float(numerator) / float(denominator)
        return float(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{value}' is no number: write it like 0.03 or 8/255") from None


def _each(fits: Callable[[float], bool], wanted: str) -> Callable[..., None]:
    """A check that refuses, by name, numbers that are not as wanted."""

    def check(**values: int | float) -> None:
        for name, value in values.items():
            if not fits(value):
                raise ValueError(f"{name} is {value}, but must be {wanted}")

    return check


positive = _each(lambda x: 0 < x < math.inf, "above 0")
not_negative = _each(lambda x: 0 <= x < math.inf, "0 or more")
from_0_to_1 = _each(lambda x: 0 <= x <= 1, "from 0 to 1")
_share = _each(lambda x: 0 <= x < 1, "at least 0 and below 1")


def check_seeds(*seeds: int) -> None:
    """Refuse numbers that no generator takes: scikit-learn's is the narrowest."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"a seed is {seed}, but must be from 0 to {2**32 - 1}")


@dataclass(kw_only=True)
class Data:
    """The images, and how training sees them."""

    name: str = "digits"
    """digits, cifar10, cifar100, stl10, svhn, folder (train/CLASS/*.jpg, test/CLASS/*.jpg),
    webdataset (train/*.tar, test/*.tar) or huggingface (save_to_disk, or Parquet)."""
    root: Path | None = None
    """Where the files are; the digits need none."""
    title: str | None = None
    """What records and reports call the data, where its name would mislead."""
    size: int | None = None
    """Scale and crop to size x size; by default as the data (STL-10: 32) or the first image is."""
    classes: list[str | int] | None = None
    """Keep only the images of these classes, by name, relabelled in this order."""
    val_fraction: float = 0.1
    """Share of train held out, stratified, to choose checkpoints and hyper-parameters."""
    train_limit: int | None = None
    """Train on only so many images (stratified, seeded); validation is carved out before that."""
    test_limit: int | None = None
    """Use only so many test images (stratified, the same ones for every seed and model)."""
    stream: bool = False
    """Leave the training images on disk and decode them as they are needed: for sets larger than
    memory (folder, webdataset, huggingface; with gacd.estimator: sampled)."""
    workers: int = 2
    """Processes that decode streamed images ahead of training; 0: none."""
    pad: int = 4
    """Random crops after padding by so many pixels."""
    flip: bool = True
    """Random horizontal flips."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}, but must be between 0 and 1")
        if self.size is not None and self.size < SMALLEST:
            raise ValueError(
                f"size is {self.size}, but networks need at least {SMALLEST} pixels a side"
            )
        not_negative(pad=self.pad, workers=self.workers)
        if self.name == "digits" and self.root is not None:
            raise ValueError(
                f"data.root is {self.root}, but data.name is digits, which are built in: say what "
                "lies there, such as --data.name folder or cifar10"
            )


@dataclass(kw_only=True)
class Threat:
    """What the attacker may do to an image in [0, 1]."""

    norm: Literal["linf", "l2"] = "linf"
    """linf: every pixel value by up to eps; l2: the whole image by a Euclidean distance of that."""
    eps: Budget = "8/255"
    """Radius of the ball, in units of images in [0, 1]: 8/255, not 8."""

    def __post_init__(self) -> None:
        eps = fraction(self.eps)
        if not 0 <= eps <= (1 if self.norm == "linf" else 100):
            raise ValueError(
                f"eps is {self.eps}, but images are in [0, 1]: write 8/255 for eight grey levels"
            )


@dataclass(kw_only=True)
class Attack:
    """The attack inside the training loop."""

    steps: int = 10
    """Gradient steps on each batch."""
    step_size: Budget = "2/255"
    """Length of one, in the units of eps; steps times this should exceed eps."""
    objective: Literal[
        "default", "ce", "margin", "kl", "teacher-kl", "adaptive-kl", "cosine", "transport"
    ] = "default"
    """What it maximises; default: the method's own, in a combination the first one's that has any.
    kl: divergence from the student's clean output; teacher-kl: from the teacher's; adaptive-kl:
    from the teacher's on the attacked image. cosine and transport look at features."""

    def __post_init__(self) -> None:
        positive(steps=self.steps, step_size=fraction(self.step_size))


@dataclass(kw_only=True)
class Training:
    """One training stage: SGD with Nesterov momentum."""

    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 128
    """Images of a step, on all processes together."""
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "one-cycle", "constant"] = "cosine"
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises from 0 (one-cycle: at least 0.3)."""
    ema: float = 0.0
    """Decay of the weight average that is validated and kept; 0: none."""
    awp: float = 0.0
    """Adversarial weight perturbation: its size gamma, 0.005 as published with TRADES (0.01 in the
    authors' code for pgd-at); 0: none."""
    awp_warmup: float = 0.0
    """Share of the steps without it; 0.05 as published with TRADES."""
    clip_norm: float = 5.0
    """Largest gradient norm."""
    attack: Attack = field(default_factory=Attack)
    select: Literal["robust", "natural", "last"] = "robust"
    """Which checkpoint is kept: the best on validation under PGD, on clean validation images, or
    the last."""

    def __post_init__(self) -> None:
        positive(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, clip_norm=self.clip_norm
        )
        _share(momentum=self.momentum, warmup=self.warmup, ema=self.ema)
        not_negative(awp=self.awp, weight_decay=self.weight_decay)
        from_0_to_1(awp_warmup=self.awp_warmup)


@dataclass(kw_only=True)
class Fabric:
    """Where it runs (Lightning Fabric's terms)."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    devices: int = 1
    """GPUs, or processes on a CPU, of each node."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """How several processes train one model, such as ddp."""
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"
    """What training computes in; auto: bf16 on GPUs and the few CPUs that are faster so. Evaluation
    is always in 32 bit (on a GPU its convolutions are TF32's)."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """Statistics of each process's own images, or of all processes' (GPUs only)."""
    compile: bool = False
    """torch.compile the student, where it trains and is attacked."""
    threads: int | None = None
    """CPU threads; small networks are fastest with 1."""

    def __post_init__(self) -> None:
        threads = 1 if self.threads is None else self.threads
        positive(devices=self.devices, num_nodes=self.num_nodes, threads=threads)


@dataclass(kw_only=True)
class Evaluation:
    """How a finished model is attacked."""

    attacks: list[str] = field(default_factory=lambda: ["natural", "fgsm", "pgd20", "autoattack"])
    """natural, noise, fgsm, pgd<steps>, pgd<steps>x<restarts>, cw (Carlini and Wagner's margin; 40
    steps), cw<steps>, cw<steps>x<restarts>, transfer (pgd20 images made on another model),
    autoattack. In short: --attacks natural autoattack."""
    step_size: Budget | None = None
    """Length of a step of pgd, cw and transfer; by default eps/4 (2/255 at 8/255)."""
    autoattack_limit: int | None = None
    """AutoAttack on so many test images (a fixed stratified subset, stated in the record); by
    default on all."""
    batch_size: int = 256
    cascade: bool = False
    """Spare an image that an earlier attack broke: figures are then the worst case so far."""
    eps_curve: list[Budget] = field(default_factory=list)
    """Also PGD-20 accuracy at these budgets, in steps of eps/4; what breaks at one counts as broken
    at all above."""
    workers: int = 0
    """Evaluate in so many processes of their own, on the CPU, while the next model trains."""

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size)
        not_negative(workers=self.workers)
        if self.step_size is not None:
            positive(step_size=fraction(self.step_size))
        if self.autoattack_limit is not None:
            positive(autoattack_limit=self.autoattack_limit)
        for eps in self.eps_curve:
            not_negative(eps_curve=fraction(eps))
        if not self.attacks:
            raise ValueError("attacks is empty, but at least one is needed, such as natural")
