"""The settings of every method, as typed dataclasses with the papers' defaults."""

from dataclasses import dataclass
from typing import Literal

from gacd.config.sections import from_0_to_1, not_negative, positive

Reweight = Literal["none", "teacher", "normalised"]
Setting = bool | int | float | str  # of a method that this package does not know


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
    """Divides what the softmax is taken of: higher is softer."""
    alpha: float = 0.9
    """Weight of the teacher's soft labels; the rest goes to the true labels."""

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class ARD(Reweighted):
    """Adversarially robust distillation (Goldblum et al. 2020)."""

    temperature: float = 30.0
    """Divides what the softmax is taken of: higher is softer."""
    alpha: float = 1.0
    """Weight of the teacher's soft labels; the rest goes to the true labels of clean images."""

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class RSLAD(Reweighted):
    """Robust soft labels (Zi et al. 2021)."""

    alpha: float = 5 / 6
    """Weight of attacked images; the rest goes to clean ones."""

    def __post_init__(self) -> None:
        from_0_to_1(alpha=self.alpha)


@dataclass(kw_only=True)
class IAD(Reweighted):
    """Introspective distillation (Zhu et al. 2022)."""

    temperature: float = 1.0
    """Divides what the softmax is taken of: higher is softer."""
    beta: float = 0.1
    """How fast trust in the teacher falls as its probability of the true class does; 0: never."""
    warmup: float = 0.3
    """Share of the training in which the teacher is trusted everywhere."""

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        not_negative(beta=self.beta)
        from_0_to_1(warmup=self.warmup)


@dataclass(kw_only=True)
class AdaAD(Reweighted):
    """Adaptive distillation (Huang et al. 2023)."""

    alpha: float = 1.0
    """Weight of attacked images; the rest goes to clean ones."""

    def __post_init__(self) -> None:
        from_0_to_1(alpha=self.alpha)


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
    """T: divides the similarities of embeddings."""
    negatives: int = 16384
    """Negatives of each image, drawn from other classes."""
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
    """T: divides the similarities of embeddings."""
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
    """That of the teacher's features: trained, trained at every `refresh`-th step, their principal
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
