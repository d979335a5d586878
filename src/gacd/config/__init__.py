"""What every command can be told: one dataclass a command, made of `sections`.

Recipes and flags fill them in. Nothing here imports torch, so `gacd --help` is quick.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from gacd.config.methods import (
    ARD,
    CRD,
    GACD,
    IAD,
    IGDM,
    KD,
    MART,
    RSLAD,
    TRADES,
    AdaAD,
    Regression,
    Reweighted,
    Setting,
)
from gacd.config.reading import Compare, Report, Seeds
from gacd.config.sections import (
    SMALLEST,
    Attack,
    Budget,
    Data,
    Evaluation,
    Fabric,
    Threat,
    Training,
    check_seeds,
    fraction,
    not_negative,
    positive,
)
from gacd.models import check_statistics
from gacd.storage import from_home

Precision = Literal["bf16-mixed", "32-true"]
"""What training computes in."""
LinearSelect = Literal["both", "natural"]
__all__ = [  # what others read from here
    "ARD", "GACD", "SMALLEST", "TRADES", "Attack", "Compare", "Data", "Evaluation", "Fabric",
    "Report", "Seeds", "Threat", "Training", "fraction",
]  # fmt: skip


@dataclass(kw_only=True)
class Run:
    """What every command that trains or attacks has."""

    out: Path = Path("runs/run")
    """Where everything is written; running the same command again resumes."""
    seed: int = 0
    """Seeds everything random; a run with another seed needs another --out."""
    data: Data = field(default_factory=Data)
    threat: Threat = field(default_factory=Threat)
    evaluation: Evaluation = field(default_factory=Evaluation)
    fabric: Fabric = field(default_factory=Fabric)

    def __post_init__(self) -> None:
        check_seeds(self.seed)


@dataclass(kw_only=True)
class Normalised:
    """The input that weights from elsewhere were trained on."""

    mean: list[float] | None = None
    """Mean of each channel of images in [0, 1], if a public .pt was trained on normalised ones."""
    std: list[float] | None = None
    """Standard deviation of each channel, too."""


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
    """digits-cnn-WIDTH, resnet18, resnet20, resnet32, resnet56, wrn-DEPTH-WIDTH (such as
    wrn-34-10), mobilenetv2, or a registered one."""
    method: str = "pgd-at"
    """natural, pgd-at, trades or mart."""
    training: Training = field(default_factory=Training)
    trades: TRADES = field(default_factory=TRADES)
    mart: MART = field(default_factory=MART)
    extra: dict[str, dict[str, Setting]] = field(default_factory=dict)
    """Settings of methods registered from outside, by name: --extra.mine '{beta: 2}'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _without_source(self.evaluation)


@dataclass(kw_only=True)
class Finetune(Normalised, Run):
    """Fine-tune a model that this package saved, or a public checkpoint, adversarially."""

    out: Path = Path("runs/finetune")
    checkpoint: Path | None = None
    """A .safetensors of this package, or a public .pt (then say --model)."""
    model: str | None = None
    """Which network a public .pt holds, such as resnet18; a .safetensors says it itself."""
    source: Path | None = None
    """Another .safetensors of the same data: 'transfer', and the diagnosis, make images on it."""
    method: str = "pgd-at"
    """pgd-at, trades, mart or natural."""
    training: Training = field(default_factory=lambda: Training(epochs=5, lr=0.01))
    trades: TRADES = field(default_factory=TRADES)
    mart: MART = field(default_factory=MART)
    extra: dict[str, dict[str, Setting]] = field(default_factory=dict)
    """Settings of methods registered from outside, by name: --extra.mine '{beta: 2}'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_statistics(self.mean, self.std)
        if self.source is None:
            _without_source(self.evaluation)


@dataclass(kw_only=True)
class Teacher(Normalised):
    """The robust teacher: a checkpoint, or a network to train first."""

    model: str = "digits-cnn-32"
    """The network, by a name as --student takes; a .safetensors says it itself."""
    checkpoint: Path | None = None
    """A .safetensors of this package, or a public .pt (then say --teacher.model); by default the
    teacher is trained first."""
    method: str = "pgd-at"
    """pgd-at, trades, mart or natural."""
    training: Training = field(default_factory=Training)
    """Of the teacher, where no checkpoint is given."""
    evaluate: bool = True
    """Attack it too, as a row of the table."""

    def __post_init__(self) -> None:
        check_statistics(self.mean, self.std)
        if self.mean is not None and self.checkpoint is None:
            raise ValueError("mean and std are a checkpoint's: give teacher.checkpoint, too")


@dataclass(kw_only=True)
class Distill(Run):
    """From a teacher to evaluated students, one row of the table a method."""

    out: Path = Path("runs/distill")
    teacher: Teacher = field(default_factory=Teacher)
    student: str = "digits-cnn-8"
    """digits-cnn-WIDTH, resnet18, resnet20, resnet32, resnet56, wrn-DEPTH-WIDTH (such as
    wrn-34-10), mobilenetv2, or a registered one."""
    methods: list[str] = field(default_factory=lambda: ["gacd", "gacd+aft"])
    """natural, pgd-at, trades, mart (no teacher); kd, ard, rslad, iad, adaad, crd, regression, gacd
    (of the teacher), rst (pgd-at with unlabelled images); any joined by +, such as gacd+rslad or
    crd+kd, also with igdm, such as adaad+igdm; after any with a teacher adversarial fine-tuning, as
    in gacd+aft, gacd+rslad+aft."""
    unlabelled: Path | None = None
    """Images without labels, anywhere in a folder or `image` of an .npz: methods with a teacher
    train on them, labelled by the teacher. Images already in the data are left out."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each method in a combination, by name; 1 where not given."""
    bank: Path | None = None
    """The folder of the anchor bank, to share it between runs; by default the run's own."""
    training: Training = field(default_factory=Training)
    """Of methods in one stage: those that train the student's head, without +aft."""
    distillation: Training = field(default_factory=Training)
    """Of the first of two stages: before +aft, and where the head is fitted afterwards (gacd and
    regression, by themselves)."""
    finetune: Training = field(default_factory=lambda: Training(epochs=5, lr=0.01))
    """Of +aft: adversarial training of the whole distilled student."""
    finetune_method: str = "pgd-at"
    """How +aft fine-tunes: pgd-at, trades, mart, or a distilled target, such as rslad or ard."""
    linear_select: LinearSelect = "both"
    """What chooses the strength of a linear layer on frozen features, on validation images: the
    mean of clean and PGD-10 accuracy (both), or clean accuracy, as linear evaluation usually is."""
    trades: TRADES = field(default_factory=TRADES)
    mart: MART = field(default_factory=MART)
    rst: Reweighted = field(default_factory=Reweighted)
    kd: KD = field(default_factory=KD)
    ard: ARD = field(default_factory=ARD)
    rslad: RSLAD = field(default_factory=RSLAD)
    iad: IAD = field(default_factory=IAD)
    adaad: AdaAD = field(default_factory=AdaAD)
    igdm: IGDM = field(default_factory=IGDM)
    regression: Regression = field(default_factory=Regression)
    crd: CRD = field(default_factory=CRD)
    gacd: GACD = field(default_factory=GACD)
    extra: dict[str, dict[str, Setting]] = field(default_factory=dict)
    """Settings of methods registered from outside, by name: --extra.mine '{beta: 2}'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise ValueError("methods is empty, but at least one is needed, such as gacd")
        self.methods = list(dict.fromkeys(self.methods))
        not_negative(**{f"weights.{name}": weight for name, weight in self.weights.items()})


@dataclass(kw_only=True)
class Evaluate(Normalised, Run):
    """Attack a saved model, or a public checkpoint."""

    out: Path = Path("runs/evaluate")
    checkpoint: Path | None = None
    """A .safetensors of this package, or a public .pt (then say --model)."""
    model: str | None = None
    """Which network a public .pt holds, such as resnet18; a .safetensors says it itself."""
    source: Path | None = None
    """Another model of the same data, on which 'transfer' makes its images."""
    source_model: str | None = None
    """Its network, where the file is a public .pt."""
    source_mean: list[float] | None = None
    """Mean of each channel, if that was trained on normalised images."""
    source_std: list[float] | None = None
    """Standard deviation of each channel, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_statistics(self.mean, self.std)
        check_statistics(self.source_mean, self.source_std)
        if self.source is None:
            _without_source(self.evaluation)


@dataclass(kw_only=True)
class Transfer(Normalised, Run):
    """A frozen model with a new linear layer for other data, attacked as a whole."""

    out: Path = Path("runs/transfer")
    checkpoint: Path | None = None
    """A .safetensors of this package, or a public .pt (then say --model and --num_classes)."""
    model: str | None = None
    """Which network a public .pt holds, such as resnet18; a .safetensors says it itself."""
    num_classes: int | None = None
    """How many classes a public .pt was trained on."""
    linear_select: LinearSelect = "both"
    """What chooses a linear layer, on validation: clean and PGD-10 accuracy (both), or clean."""
    evaluation: Evaluation = field(
        default_factory=lambda: Evaluation(attacks=["natural", "pgd7", "autoattack"])
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_statistics(self.mean, self.std)
        _without_source(self.evaluation)


@dataclass(kw_only=True)
class Analyze:
    """Compare networks with their teacher: class correlations, CKA, features of two classes."""

    out: Path = Path("runs/analyze")
    """Where analysis.json and report.html are written."""
    teacher: Path | None = None
    """A .safetensors of this package."""
    students: list[str] = field(default_factory=list)
    """Networks to compare with it, as NAME=FILE."""
    classes: list[str | int] = field(default_factory=list)
    """Two classes to embed; images of the second are perturbed into the first. By default the
    first two of the data."""
    seed: int = 0
    """Seeds everything random."""
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
        check_seeds(self.seed)
        positive(steps=self.steps, perplexity=self.perplexity, batch_size=self.batch_size)
        if self.images < 2:
            raise ValueError(f"images is {self.images}, but must be at least 2")
        if self.step_size is not None:
            positive(step_size=fraction(self.step_size))
        if self.classes and not len(set(map(str, self.classes))) == len(self.classes) == 2:
            raise ValueError(f"classes are {self.classes}, but must be two different ones")


def other_data(data: Data, other: dict[str, Any]) -> Data:
    """Data that differ in the settings that a study's recipe says of others."""
    root = {"root": from_home(Path(other["root"]))} if other.get("root") else {}
    built_in = {"root": None} if other.get("name") == "digits" else {}
    return replace(data, **built_in | other | root)


@dataclass(kw_only=True)
class Study:
    """The paper's tables and figures, and its modern rivals, as a grid of resumable cells."""

    action: Literal["list", "run", "status", "report"] = "list"
    """list: studies and their cells; run: all that is not done; status: what is done, waits or
    failed; report: tables, figures and claims of what is done."""
    studies: list[str] = field(default_factory=list)
    """table1, table2, table3, table4, ablation, figure2, figure3, figure4, figure5, rivals; by
    default all of them."""
    scale: Literal["tiny", "small", "full"] = "tiny"
    """Sizes and epochs, a recipe that flags override: digits in minutes, CIFAR-10 on a laptop in
    hours, the paper's networks on a GPU."""
    out: Path = Path("runs/study")
    """Where everything is written; running the same command again resumes."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every cell is trained once with each; one seed decides no claim."""
    data: Data = field(default_factory=Data)
    """The images of every study but Table 2."""
    threat: Threat = field(default_factory=Threat)
    evaluation: Evaluation = field(default_factory=Evaluation)
    fabric: Fabric = field(default_factory=Fabric)
    workers: int = 1
    """Processes on this machine. Others, here or on machines that share the folder, may join."""
    stand_ins: dict[str, str] = field(default_factory=dict)
    """What our networks stand for, where they are not the paper's own."""
    main_pair: list[str] = field(default_factory=lambda: ["digits-cnn-32", "digits-cnn-8"])
    """Teacher and student of the ablation, of Table 4, of Figures 2 and 5, and of the rivals."""
    table1_pairs: list[list[str]] = field(default_factory=list)
    """Teachers and students of Table 1."""
    table2_pairs: list[list[str]] = field(default_factory=list)
    """Teachers and students of Table 2."""
    correlations_pair: list[str] = field(default_factory=list)
    """Teacher and student of Figures 3 and 4; on the second data if Table 2 has the pair too."""
    second_data: dict[str, Any] | None = None
    """The images of Table 2: what is different from `data`."""
    transfer_classes: list[str | int] | None = None
    """The classes that Table 4's networks are trained on; by default all."""
    transfer_to: list[dict[str, Any]] = field(default_factory=list)
    """The data of Table 4: what is different from `data`."""
    analyzed_classes: list[str | int] = field(default_factory=list)
    """Figure 5's two classes; images of the second are perturbed into the first."""
    analyzed_images: int = 100
    """Of each of them."""
    negatives: list[int] = field(default_factory=list)
    """k in Figure 2."""
    temperatures: list[float] = field(default_factory=list)
    """T in Figure 2."""
    rivals: list[str] = field(default_factory=list)
    """Methods to compare on the main pair."""
    teacher: Training = field(default_factory=Training)
    """Of the teachers, trained adversarially."""
    training: Training = field(default_factory=Training)
    """Of the one-stage methods."""
    distillation: Training = field(default_factory=Training)
    """Of the first of two stages: gacd and regression, and every method before +aft."""
    finetune: Training = field(default_factory=Training)
    """Of +aft."""
    epochs: dict[str, int] = field(default_factory=dict)
    """By method, in place of its stage's: chosen so that all cost the same compute."""
    gacd: GACD = field(default_factory=GACD)
    crd: CRD = field(default_factory=CRD)
    linear_select: LinearSelect = "both"
    """What chooses a linear layer, on validation: clean and PGD-10 accuracy (both), or clean."""

    def __post_init__(self) -> None:
        check_seeds(*self.seeds)
        positive(workers=self.workers)
        known = get_type_hints(Data) | {"root": str | Path | None, "classes": list | None}
        known["val_fraction"] = int | float
        for other in (self.second_data or {}, *self.transfer_to):
            if odd := other.keys() - known.keys():
                raise ValueError(f"'{min(odd)}' is no setting of data: {', '.join(sorted(known))}")
            for key, value in other.items():
                if not isinstance(value, known[key]):
                    raise ValueError(f"{other} are no settings of data ({key} is {value!r})")
            other_data(self.data, other)  # refuses what is impossible
        pairs = [self.main_pair, *self.table1_pairs, *self.table2_pairs]
        for pair in pairs + [self.correlations_pair] * bool(self.correlations_pair):
            if len(pair) != 2:
                raise ValueError(f"a pair is a teacher and a student, not {pair}")
        positive(**{f"epochs.{name}": count for name, count in self.epochs.items()})
        for value in (*self.negatives, *self.temperatures):
            positive(**{"each of negatives and temperatures": value})
        if len(set(self.seeds)) != max(1, len(self.seeds)):
            raise ValueError(f"seeds are {self.seeds}, but must be different numbers, such as 0 1")
