"""Linear evaluation: a classifier on frozen features, its strength chosen on validation."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gacd.attacks.threat import ThreatModel
from gacd.attacks.validation import count_right, one_answer
from gacd.data.batches import iterate
from gacd.data.dataset import ImageDataset, Splits
from gacd.errors import UserError
from gacd.models.base import Backbone, check_backbone
from gacd.models.modes import evaluating
from gacd.progress import progress

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)  # sklearn's C: the inverse of the L2 penalty


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """The strength chosen, and validation accuracy (in %) of every one that was tried.

    `val_robust` is empty where attacks had no say.
    """

    strength: float
    val_natural: dict[str, float]
    val_robust: dict[str, float]


@torch.no_grad()
def extract(
    model: Backbone, dataset: ImageDataset, *, batch_size: int = 512
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Penultimate features of every image, in evaluation mode and float32, and the labels."""
    with evaluating(model):
        batches = iterate(dataset, batch_size, shuffle=False, seed=0, epoch=0, drop_last=False)
        features = [model.forward_features(batch.images).float() for batch in batches]
    return torch.cat(features), dataset.labels


def fit_head(
    model: Backbone,
    splits: Splits,
    threat: ThreatModel | None,
    strengths: Sequence[float] = STRENGTHS,
) -> LinearFit:
    """Fit the model's last layer by multinomial logistic regression on its frozen features.

    Minimises sum_i CE(W z_i + b, y_i) + |W|^2 / (2 C) by L-BFGS on standardised clean features of
    train (no augmentation), for every C in `strengths`. The layer with the best mean of clean
    accuracy and accuracy under PGD-10 within `threat`, through the whole network, on validation
    images is kept; without a threat, the best on clean ones. Ties go to the stronger penalty, and
    a layer no better on clean images than the most frequent class is kept only if all are so.
    """
    check_backbone(model)
    if not strengths:
        raise UserError("fit_head needs at least one strength")
    if model.num_classes != splits.train.num_classes:
        raise UserError(
            f"the last layer has {model.num_classes} classes, but {splits.train.name} has "
            f"{splits.train.num_classes}: use gacd.evaluation.transfer"
        )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    device = next(model.parameters()).device
    z_ND, labels = extract(model, splits.train.to(device))
    mean_D, scale_D = z_ND.mean(0), z_ND.std(0).clamp_min(1e-6)
    biased = model.get_classifier().bias is not None
    if not biased:
        mean_D = torch.zeros_like(mean_D)
    x, y = ((z_ND - mean_D) / scale_D).cpu().numpy(), labels.cpu().numpy()
    val = splits.val.to(device)
    natural, robust, fits = {}, {}, {}
    attacked = 0 if threat is None else len(val) * len(strengths)
    with progress(attacked, "strengths of the linear layer", enabled=attacked > 0) as bar:
        for strength in strengths:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                fit = LogisticRegression(C=strength, max_iter=500, fit_intercept=biased).fit(x, y)
            fits[strength] = fit
            _set(model, fit, mean_D, scale_D)
            natural[strength], robust[strength] = _accuracies(model, val, threat)
            bar.advance(len(val))
    # A layer that always gives one answer is as right under any attack: no choice but the last.
    able = [c for c in strengths if natural[c] > one_answer(val.labels)] or strengths
    best = max(able, key=lambda c: (natural[c] + robust[c], -c))
    _set(model, fits[best], mean_D, scale_D)
    return LinearFit(
        strength=best,
        val_natural={str(c): accuracy for c, accuracy in natural.items()},
        val_robust={} if threat is None else {str(c): a for c, a in robust.items()},
    )


@torch.no_grad()
def _set(
    model: Backbone, fit: "LogisticRegression", mean_D: Float[Tensor, " D"], scale_D: Tensor
) -> None:
    """Fold a classifier of standardised features into the model's last layer."""
    coef = torch.from_numpy(fit.coef_).float()
    intercept = torch.zeros(len(coef)) + torch.as_tensor(fit.intercept_).float()
    if len(coef) == 1:  # sklearn folds two classes into one row
        coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
    present = torch.from_numpy(fit.classes_)
    weight_KD = torch.zeros(model.num_classes, len(mean_D))
    bias_K = torch.full((model.num_classes,), -1e4)  # a class that train lacks is never answered
    weight_KD[present] = coef / scale_D.cpu()
    bias_K[present] = intercept - weight_KD[present] @ mean_D.cpu()
    layer = model.get_classifier()
    layer.weight.copy_(weight_KD)
    if layer.bias is not None:
        layer.bias.copy_(bias_K)


def _accuracies(
    model: Backbone, val: ImageDataset, threat: ThreatModel | None
) -> tuple[float, float]:
    """In %: clean, and under PGD-10 from the same random starts for every layer."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    batches = iterate(val, 256, shuffle=False, seed=0, epoch=0, drop_last=False)
    steps = 0 if threat is None else 10
    with evaluating(model):
        counts = count_right(
            model, batches, threat or ThreatModel(eps=0.0), steps=steps, generator=generator
        )
    natural, robust, n = counts.tolist()
    return 100 * natural / n, 100 * robust / n
