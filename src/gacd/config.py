"""What every command can be told, as typed dataclasses: recipes and flags fill them in.

Nothing here imports torch, so `gacd --help` is quick. Impossible values are refused when an object
is made. Budgets may be written as fractions: `8/255`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Budget = float | str
"""A number, or a fraction such as `8/255`."""
Reweight = Literal["none", "teacher"]


def fraction(value: Budget) -> float:
    """The number that `0.03`, `"0.03"` or `"8/255"` means."""
    try:
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            return float(numerator) / float(denominator)
        return float(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{value}' is no number: write it like 0.03 or 8/255") from None


def _positive(**values: int | float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, but must be above 0")


def _from_0_to_1(**values: int | float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, but must be from 0 to 1")


def _share(**values: int | float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 0 and below 1")


@dataclass(kw_only=True)
class Data:
    """The images, and how training sees them."""

    name: str = "digits"
    """digits, cifar10, cifar100, stl10, svhn, or folder (train/CLASS/*.jpg, test/CLASS/*.jpg)."""
    root: Path | None = None
    """Where the files are; the digits need none."""
    title: str | None = None
    """What records and reports call the data, where its name would mislead."""
    size: int | None = None
    """Resize to size x size; by default as the data set is."""
    classes: list[str | int] | None = None
    """Keep only the images of these classes, by name, relabelled in this order."""
    val_fraction: float = 0.1
    """Share of train held out, stratified, to choose checkpoints and hyper-parameters."""
    train_limit: int | None = None
    """Use only so many training images (stratified, seeded), validation included."""
    test_limit: int | None = None
    """Use only so many test images (stratified, the same ones for every seed and model)."""
    pad: int = 4
    """Random crops after padding by so many pixels."""
    flip: bool = True
    """Random horizontal flips."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}, but must be between 0 and 1")
        if self.pad < 0:
            raise ValueError(f"pad is {self.pad}, but must be 0 or more")


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
    objective: Literal["default", "ce", "margin", "kl", "cosine", "transport"] = "default"
    """What it maximises; default: what the method asks for."""

    def __post_init__(self) -> None:
        _positive(steps=self.steps, step_size=fraction(self.step_size))


@dataclass(kw_only=True)
class Training:
    """One training stage: SGD with Nesterov momentum."""

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "one-cycle", "constant"] = "cosine"
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises from 0 (one-cycle: at least 0.3)."""
    ema: float = 0.0
    """Decay of the weight average that is validated and kept; 0: none."""
    clip_norm: float = 5.0
    """Largest gradient norm."""
    attack: Attack = field(default_factory=Attack)
    select: Literal["robust", "natural", "last"] = "robust"
    """Which checkpoint is kept: the best on validation under PGD, on clean validation images, or
    the last."""

    def __post_init__(self) -> None:
        _positive(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, clip_norm=self.clip_norm
        )
        _share(momentum=self.momentum, warmup=self.warmup, ema=self.ema)
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}, but must be 0 or more")


@dataclass(kw_only=True)
class Fabric:
    """Where it runs (Lightning Fabric's terms)."""

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    """Of training; evaluation is always in 32 bit."""
    compile: bool = False
    """torch.compile the networks."""
    threads: int | None = None
    """Of the CPU; small networks are fastest with 1."""

    def __post_init__(self) -> None:
        _positive(devices=self.devices, num_nodes=self.num_nodes, threads=self.threads or 1)


@dataclass(kw_only=True)
class Evaluation:
    """How a finished model is attacked."""

    attacks: list[str] = field(default_factory=lambda: ["natural", "fgsm", "pgd20", "autoattack"])
    """natural, noise, fgsm, pgd<steps>, pgd<steps>x<restarts>, cw (Carlini and Wagner's margin; 40
    steps), cw<steps>, cw<steps>x<restarts>, transfer (pgd20 images made on another model),
    autoattack."""
    step_size: Budget | None = None
    """Of PGD; by default eps/4 (2/255 at 8/255)."""
    autoattack_limit: int | None = None
    """AutoAttack on so many test images only (a fixed stratified subset, stated in the record)."""
    batch_size: int = 256
    cascade: bool = False
    """Spare an image that an earlier attack broke: figures are then the worst case so far."""
    eps_curve: list[Budget] = field(default_factory=list)
    """Also measure PGD-20 accuracy at these budgets."""
    workers: int = 0
    """Evaluate in so many processes of their own, on the CPU, while the next model trains."""

    def __post_init__(self) -> None:
        _positive(batch_size=self.batch_size)
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, but must be 0 or more")
        if self.step_size is not None:
            _positive(step_size=fraction(self.step_size))
        if self.autoattack_limit is not None:
            _positive(autoattack_limit=self.autoattack_limit)
        for eps in self.eps_curve:
            if not 0 <= fraction(eps) < math.inf:
                raise ValueError(f"eps_curve holds {eps}, but each must be 0 or more")
        if not self.attacks:
            raise ValueError("attacks is empty, but at least one is needed, such as natural")


@dataclass(kw_only=True)
class KD:
    """Hinton's distillation on clean images."""

    temperature: float = 4.0
    alpha: float = 0.9
    """Weight of the teacher's soft labels; the rest goes to the true labels."""
    reweight: Reweight = "none"
    """Weigh each image by the teacher's probability of its true class."""

    def __post_init__(self) -> None:
        _positive(temperature=self.temperature)
        _from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class ARD:
    """Adversarially robust distillation (Goldblum et al. 2020)."""

    temperature: float = 30.0
    alpha: float = 1.0
    reweight: Reweight = "none"
    """Weigh each image by the teacher's probability of its true class."""

    def __post_init__(self) -> None:
        _positive(temperature=self.temperature)
        _from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class TRADES:
    """TRADES (Zhang et al. 2019)."""

    beta: float = 6.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}, but must be 0 or more")


@dataclass(kw_only=True)
class GACD:
    """Guided adversarial contrastive distillation (Bai et al. 2020, Eq. 7 to 10)."""

    temperature: float = 0.1
    negatives: int = 16384
    """k: the weight of the negative term, and with `sampled` the number of anchors drawn."""
    dim: int = 128
    """Width of the shared embedding."""
    estimator: Literal["exact", "sampled", "memory"] = "exact"
    """All anchors, some of them, or CRD's momentum memory (with a constant normaliser)."""
    normaliser: Literal["none", "first-batch", "running", "exact"] = "exact"
    positive: Literal["bank", "view"] = "view"
    """The teacher's feature of the stored image, or of the augmented view (one forward more)."""
    anchors: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the stored features."""
    reweight: Reweight = "teacher"
    """Weigh each image by the teacher's probability of its true class."""

    def __post_init__(self) -> None:
        _positive(temperature=self.temperature, negatives=self.negatives, dim=self.dim)


@dataclass(kw_only=True)
class Run:
    """What every command that trains or attacks has."""

    out: Path = Path("runs/run")
    """Where everything is written; running the same command again resumes."""
    seed: int = 0
    data: Data = field(default_factory=Data)
    threat: Threat = field(default_factory=Threat)
    evaluation: Evaluation = field(default_factory=Evaluation)
    fabric: Fabric = field(default_factory=Fabric)


def _without_source(evaluation: Evaluation) -> None:
    if "transfer" in evaluation.attacks:
        raise ValueError(
            "the attack 'transfer' needs a model to make its images on: use it in 'gacd evaluate "
            "--source FILE', or in 'gacd distill', where that is the teacher"
        )


@dataclass(kw_only=True)
class Train(Run):
    """Train one network from scratch: naturally, or adversarially."""

    out: Path = Path("runs/train")
    model: str = "digits-cnn-32"
    method: Literal["natural", "pgd-at", "trades"] = "pgd-at"
    training: Training = field(default_factory=Training)
    trades: TRADES = field(default_factory=TRADES)

    def __post_init__(self) -> None:
        _without_source(self.evaluation)


@dataclass(kw_only=True)
class Finetune(Run):
    """Fine-tune a model that this package saved, or a public checkpoint, adversarially."""

    out: Path = Path("runs/finetune")
    checkpoint: Path | None = None
    """A .safetensors of this package, or a public .pt (then say --model)."""
    model: str | None = None
    method: Literal["pgd-at", "trades"] = "pgd-at"
    training: Training = field(default_factory=lambda: Training(epochs=5, lr=0.01))
    trades: TRADES = field(default_factory=TRADES)

    def __post_init__(self) -> None:
        _without_source(self.evaluation)


@dataclass(kw_only=True)
class Teacher:
    """The robust teacher: a checkpoint, or a network to train first."""

    model: str = "digits-cnn-32"
    checkpoint: Path | None = None
    method: Literal["pgd-at", "trades"] = "pgd-at"
    training: Training = field(default_factory=Training)


@dataclass(kw_only=True)
class Distill(Run):
    """From a teacher to evaluated students, one row of the table a method."""

    out: Path = Path("runs/distill")
    teacher: Teacher = field(default_factory=Teacher)
    student: str = "digits-cnn-8"
    methods: list[str] = field(default_factory=lambda: ["gacd", "gacd+aft"])
    """natural, pgd-at, trades (no teacher), kd, ard, gacd, gacd+aft."""
    training: Training = field(default_factory=Training)
    """Of the one-stage methods: natural, pgd-at, trades, kd, ard."""
    distillation: Training = field(default_factory=Training)
    """Of gacd, before its linear layer is fitted."""
    finetune: Training = field(default_factory=lambda: Training(epochs=5, lr=0.01))
    """Of +aft: adversarial training of the whole distilled student."""
    kd: KD = field(default_factory=KD)
    ard: ARD = field(default_factory=ARD)
    gacd: GACD = field(default_factory=GACD)
    trades: TRADES = field(default_factory=TRADES)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty, but at least one is needed, such as gacd")
        objective = self.distillation.attack.objective
        if objective not in ("default", "cosine", "transport"):
            raise ValueError(
                f"distillation.attack.objective is {objective}, which needs the student's head, "
                "and gacd does not train it: use transport or cosine"
            )


@dataclass(kw_only=True)
class Evaluate(Run):
    """Attack a saved model, or a public checkpoint."""

    out: Path = Path("runs/evaluate")
    checkpoint: Path | None = None
    model: str | None = None
    source: Path | None = None
    """Another model of the same data, on which 'transfer' makes its images."""
    source_model: str | None = None
    """Its network, where the file is a public .pt."""

    def __post_init__(self) -> None:
        if self.source is None:
            _without_source(self.evaluation)


@dataclass(kw_only=True)
class Compare:
    """Two evaluated models on the same test images: is the difference more than chance?"""

    a: Path | None = None
    """A row's folder, a run folder of one row, or an outcomes.safetensors."""
    b: Path | None = None
    attack: str | None = None
    """One attack only; by default all that both models met."""
    json: bool = False
    """Print JSON."""


@dataclass(kw_only=True)
class Transfer(Run):
    """A frozen model with a new linear layer for other data, attacked as a whole."""

    out: Path = Path("runs/transfer")
    checkpoint: Path | None = None
    """A .safetensors of this package, or a public .pt (then say --model and --num_classes)."""
    model: str | None = None
    num_classes: int | None = None
    """How many classes a public .pt was trained on."""
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(attacks=["natural", "pgd7"]))

    def __post_init__(self) -> None:
        _without_source(self.evaluation)


@dataclass(kw_only=True)
class Analyze:
    """Compare networks with their teacher: class correlations, CKA, features of two classes."""

    out: Path = Path("runs/analyze")
    teacher: Path | None = None
    """A .safetensors of this package."""
    students: list[str] = field(default_factory=list)
    """Networks to compare with it, as NAME=FILE."""
    classes: list[str | int] = field(default_factory=list)
    """Two classes to embed; images of the second are perturbed into the first. By default the
    first two of the data."""
    seed: int = 0
    data: Data = field(default_factory=Data)
    threat: Threat = field(default_factory=Threat)
    steps: int = 20
    """Of PGD."""
    step_size: Budget | None = None
    """Of PGD; by default eps/4 (2/255 at 8/255)."""
    attacked: Literal["own", "teacher"] = "own"
    """Correlations and CKA under attack: on images made against each model itself, or on those
    made against the teacher."""
    images: int = 100
    """To embed, of each of the two classes."""
    embedding: Literal["each", "joint"] = "each"
    """One t-SNE for each model, or one for all (of the same feature width)."""
    perplexity: float = 30.0
    batch_size: int = 256
    fabric: Fabric = field(default_factory=Fabric)

    def __post_init__(self) -> None:
        _positive(steps=self.steps, perplexity=self.perplexity, batch_size=self.batch_size)
        if self.images < 2:
            raise ValueError(f"images is {self.images}, but must be at least 2")
        if self.step_size is not None:
            _positive(step_size=fraction(self.step_size))
        if self.classes and len(set(map(str, self.classes))) != 2:
            raise ValueError(f"classes are {self.classes}, but must be two different ones")


@dataclass(kw_only=True)
class Report:
    """Draw report.html of a run folder anew."""

    out: Path = Path("runs/quickstart")
