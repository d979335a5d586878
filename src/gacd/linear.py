"""Linear evaluation: a classifier on frozen features, its strength chosen on validation."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gacd.data.batches import iterate
from gacd.data.dataset import ImageDataset, Splits
from gacd.models.base import Backbone
from gacd.models.modes import evaluating

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # sklearn's C: the inverse of the L2 penalty


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """The strength chosen, and validation accuracy (in %) of every one that was tried."""

    strength: float
    val_natural: dict[str, float]


@torch.no_grad()
def extract(
    model: Backbone, dataset: ImageDataset, *, batch_size: int = 512
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Penultimate features of every image, in evaluation mode and float32, and the labels."""
    with evaluating(model):
        batches = iterate(dataset, batch_size, shuffle=False, seed=0, epoch=0, drop_last=False)
        features = [model.forward_features(batch.images).float() for batch in batches]
    return torch.cat(features), dataset.labels


def fit_head(model: Backbone, splits: Splits, strengths: Sequence[float] = STRENGTHS) -> LinearFit:
    """Fit the model's last layer by multinomial logistic regression on its frozen features.

    Minimises sum_i CE(W z_i + b, y_i) + |W|^2 / (2 C) by L-BFGS on standardised clean features of
    train (no augmentation), for every C in `strengths`; the best on clean validation images is
    folded back into the layer. Ties go to the stronger penalty.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    device = next(model.parameters()).device
    train, train_labels = extract(model, splits.train.to(device))
    val, val_labels = extract(model, splits.val.to(device))
    mean, scale = train.mean(0), train.std(0).clamp_min(1e-6)
    x, y = ((train - mean) / scale).cpu().numpy(), train_labels.cpu().numpy()
    x_val, y_val = ((val - mean) / scale).cpu().numpy(), val_labels.cpu().numpy()

    fits = {}
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits[strength] = LogisticRegression(C=strength, max_iter=500).fit(x, y)
    accuracy = {c: 100 * float(np.mean(fit.predict(x_val) == y_val)) for c, fit in fits.items()}
    best = max(strengths, key=lambda c: (accuracy[c], -c))

    weight = torch.zeros(model.num_classes, train.shape[1])
    bias = torch.full((model.num_classes,), -1e4)  # a class that train lacks is never answered
    coef = torch.from_numpy(fits[best].coef_).float()
    intercept = torch.from_numpy(fits[best].intercept_).float()
    if len(coef) == 1:  # sklearn folds two classes into one row
        coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
    present = torch.from_numpy(fits[best].classes_)
    weight[present] = coef / scale.cpu()
    bias[present] = intercept - weight[present] @ mean.cpu()
    layer = model.get_classifier()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return LinearFit(strength=best, val_natural={str(c): a for c, a in accuracy.items()})
