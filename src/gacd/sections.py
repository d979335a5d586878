"""The sections of a configuration, as typed dataclasses: data, threat, training, methods.

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
Reweight = Literal["none", "teacher", "normalised"]
SMALLEST = 8
"""Side of an image, in pixels."""
LinearSelect = Literal["both", "natural"]
Setting = bool | int | float | str  # of a method that this package does not know


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
_from_0_to_1 = _each(lambda x: 0 <= x <= 1, "from 0 to 1")
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


@dataclass(kw_only=True)
class Threat:
    """What the attacker may do to an image in [0, 1]."""

    norm: Literal["linf", "l2"] = "linf"
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
    step_size: Budget = "2/255"
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
        _from_0_to_1(awp_warmup=self.awp_warmup)


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
    """Of training; auto: bf16 on GPUs and the few CPUs that are faster so. Evaluation is always in
    32 bit (on a GPU its convolutions are TF32's)."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """Statistics of each process's own images, or of all processes' (GPUs only)."""
    compile: bool = False
    """torch.compile the student, where it trains and is attacked."""
    threads: int | None = None
    """Of the CPU; small networks are fastest with 1."""

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
    """Of pgd, cw and transfer; by default eps/4 (2/255 at 8/255)."""
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


@dataclass(kw_only=True)
class Reweighted:
    """What every method of distillation can do."""

    reweight: Reweight = "none"
    """Weigh each image by the teacher's probability of its true class, as it is or divided by its
    mean."""


@dataclass(kw_only=True)
class KD(Reweighted):
    """Hinton's distillation on clean images."""

    temperature: float = 4.0
    alpha: float = 0.9
    """Weight of the teacher's soft labels; the rest goes to the true labels."""

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        _from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class ARD(Reweighted):
    """Adversarially robust distillation (Goldblum et al. 2020)."""

    temperature: float = 30.0
    alpha: float = 1.0
    """Weight of the teacher's soft labels; the rest goes to the true labels of clean images."""

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        _from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class RSLAD(Reweighted):
    """Robust soft labels (Zi et al. 2021)."""

    alpha: float = 5 / 6
    """Weight of attacked images; the rest goes to clean ones."""

    def __post_init__(self) -> None:
        _from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class IAD(Reweighted):
    """Introspective distillation (Zhu et al. 2022)."""

    temperature: float = 1.0
    beta: float = 0.1
    """How fast trust in the teacher falls as its probability of the true class does; 0: never."""
    warmup: float = 0.3
    """Share of the training in which the teacher is trusted everywhere."""

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        not_negative(beta=self.beta)
        _from_0_to_1(warmup=self.warmup)


@dataclass(kw_only=True)
class AdaAD(Reweighted):
    """Adaptive distillation (Huang et al. 2023)."""

    alpha: float = 1.0
    """Weight of attacked images; the rest goes to clean ones."""

    def __post_init__(self) -> None:
        _from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class IGDM(Reweighted):
    """Indirect gradient matching (Lee et al. 2025), an addition: rslad+igdm."""

    alpha: float = 1.0
    """Its weight at the end of the training, from 0 at the start; published: 1 on CIFAR-10, 20 on
    CIFAR-100."""

    def __post_init__(self) -> None:
        not_negative(alpha=self.alpha)


@dataclass(kw_only=True)
class Regression(Reweighted):
    """Plain regression onto the teacher's features."""

    beta: float = 100.0
    """Weight of the squared error, a mean over the width."""

    def __post_init__(self) -> None:
        positive(beta=self.beta)


@dataclass(kw_only=True)
class CRD(Reweighted):
    """Contrastive representation distillation (Tian et al. 2020)."""

    beta: float = 0.8
    """Weight of the contrast; that of the cross-entropy is 1."""
    temperature: float = 0.07
    negatives: int = 16384
    """Of each image, drawn from other classes."""
    dim: int = 128
    """Width of the shared embedding."""

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, negatives=self.negatives, dim=self.dim)
        not_negative(beta=self.beta)


@dataclass(kw_only=True)
class TRADES:
    """TRADES (Zhang et al. 2019)."""

    beta: float = 6.0

    def __post_init__(self) -> None:
        not_negative(beta=self.beta)


@dataclass(kw_only=True)
class MART:
    """MART (Wang et al. 2020)."""

    beta: float = 5.0

    def __post_init__(self) -> None:
        not_negative(beta=self.beta)


@dataclass(kw_only=True)
class GACD(Reweighted):
    """Guided adversarial contrastive distillation (Bai et al. 2020, Eq. 7 to 10)."""

    temperature: float = 0.1
    negatives: int = 16384
    """k: the weight of the negative term, and, unless `exact`, the number of anchors drawn."""
    dim: int = 128
    """Width of the shared embedding."""
    estimator: Literal["exact", "sampled", "memory"] = "exact"
    """All anchors, some of them, or CRD's momentum memory (with a constant normaliser)."""
    balanced: bool = False
    """With `sampled`: draw every class equally often, whatever its size."""
    normaliser: Literal["none", "first-batch", "running", "exact"] = "exact"
    """Z of the estimate: 1, as printed; the first batch's, as in CRD's code; a running mean; or
    each image's own, over the anchors."""
    positive: Literal["bank", "view"] = "view"
    """The teacher's feature of the stored image, or of the augmented view (one forward more)."""
    teacher_projection: Literal["live", "refreshed", "pca", "identity"] = "live"
    """Of the teacher's features: trained, trained at every `refresh`-th step, their principal
    directions, or none (the embedding is then as wide as they are, whatever `dim` says)."""
    refresh: int = 10
    """Steps from one to the next at which a `refreshed` projection trains."""
    anchors: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the stored features."""
    reweight: Reweight = "teacher"

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, negatives=self.negatives, dim=self.dim)
        if self.balanced and self.estimator != "sampled":
            raise ValueError(f"balanced draws anchors, but estimator {self.estimator} draws none")
        if self.estimator == "memory" and self.normaliser == "exact":
            raise ValueError("estimator memory needs a constant normaliser, such as first-batch")
        if self.refresh < 2:
            raise ValueError(f"refresh is {self.refresh}, but must be at least 2 (1 is live)")
