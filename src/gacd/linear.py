"""Linear evaluation: a classifier on frozen features, its strength chosen on validation."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

import gacd
from gacd.attacks.threat import ThreatModel
from gacd.attacks.validation import count_right, one_answer
from gacd.data.batches import iterate
from gacd.data.dataset import ImageDataset, Splits
from gacd.errors import UserError
from gacd.models.base import Backbone, check_backbone, model_fingerprint
from gacd.models.modes import evaluating
from gacd.progress import progress
from gacd.storage import (
    check_json,
    fingerprint,
    is_number,
    is_percent,
    load_tensors,
    save_tensors,
)

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)  # sklearn's C: the inverse of the L2 penalty
_FIGURES = {"natural": is_percent, "robust": is_percent, "seconds": is_number}


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """The strength chosen, validation accuracy (in %) of every one that was tried, and the time.

    `val_robust` is empty where attacks had no say.
    """

    strength: float
    val_natural: dict[str, float]
    val_robust: dict[str, float]
    seconds: float


@torch.no_grad()
def extract(
    model: Backbone, dataset: ImageDataset, *, batch_size: int = 512
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Penultimate features of every image, in evaluation mode and float32, and the labels."""
    with evaluating(model):
        batches = iterate(dataset, batch_size)
        features = [model.forward_features(batch.images).float() for batch in batches]
    return torch.cat(features), dataset.labels


def fit_head(
    model: Backbone,
    splits: Splits,
    threat: ThreatModel | None,
    strengths: Sequence[float] = STRENGTHS,
    *,
    cache: Path | str | None = None,
) -> LinearFit:
    """Fit the model's last layer by multinomial logistic regression on its frozen features.

    Minimises sum_i CE(W z_i + b, y_i) + |W|^2 / (2 C) by L-BFGS on standardised clean features of
    train (no augmentation), for every C in `strengths`; with two classes the penalty is |W|^2 / C,
    as sklearn fits one row. Kept is the layer with the best mean of clean accuracy and accuracy
    under PGD-10 within `threat`, through the whole network, on validation images; without a threat,
    the best on clean ones. Ties go to the stronger penalty, and a layer no better on clean images
    than the most frequent class is kept only if all are so. With `cache`, a folder, the strengths
    that were tried survive a kill; as in `evaluate` it knows a model by its structure, parameters
    and buffers. Raises UserError without strengths, or for data of other classes than the model's.
    """
    check_backbone(model)
    if not strengths:
        raise UserError("fit_head needs at least one strength")
    if model.num_classes != splits.train.num_classes:
        raise UserError(
            f"the last layer has {model.num_classes} classes, but {splits.train.name} has "
            f"{splits.train.num_classes}: use gacd.evaluation.transfer"
        )
    layer, device = model.get_classifier(), next(model.parameters()).device
    files = {} if cache is None else _files(Path(cache), model, splits, threat, strengths)
    tried = {c: _read(path) for c, path in files.items() if path.is_file()}
    started = time.monotonic() - sum(figures["seconds"] for _, figures in tried.values())
    fit = _fitting(model, splits.train.to(device))
    val = splits.val.to(device)
    total, done = len(val) * len(strengths), len(val) * len(tried)
    shown = threat is not None
    with progress(total, "strengths of the linear layer", done=done, enabled=shown) as bar:
        for strength in strengths:
            if strength in tried:
                continue
            before = time.monotonic()
            fit(strength)
            figures = _accuracies(model, val, threat) | {"seconds": time.monotonic() - before}
            tried[strength] = {k: v.clone() for k, v in layer.state_dict().items()}, figures
            if files:
                save_tensors(files[strength], *tried[strength])
            bar.advance(len(val))
    natural, robust = ({c: tried[c][1][k] for c in strengths} for k in ("natural", "robust"))
    # A layer that always gives one answer is as right under any attack: no choice but the last.
    able = [c for c in strengths if natural[c] > one_answer(val.labels)] or strengths
    best = max(able, key=lambda c: (natural[c] + robust[c], -c))
    layer.load_state_dict(tried[best][0])
    return LinearFit(
        strength=best,
        val_natural={str(c): accuracy for c, accuracy in natural.items()},
        val_robust={} if threat is None else {str(c): a for c, a in robust.items()},
        seconds=time.monotonic() - started,
    )


@torch.no_grad()
def _files(
    cache: Path,
    model: Backbone,
    splits: Splits,
    threat: ThreatModel | None,
    strengths: Sequence[float],
) -> dict[float, Path]:
    """Where each strength's layer and figures are kept: by name, of all that they depend on."""
    for parameter in model.get_classifier().parameters():
        parameter.zero_()  # it is fitted anew, so what an interrupted fit left there has no say
    parts = (model_fingerprint(model), splits.train.fingerprint(), splits.val.fingerprint())
    key = fingerprint([*parts, str(threat), gacd.__version__])
    return {c: cache / f"{c}-{key}.safetensors" for c in strengths}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    layer, figures = load_tensors(path, kept=False)
    check_json(path, figures, _FIGURES)
    return layer, figures


def _fitting(model: Backbone, train: ImageDataset) -> Callable[[float], None]:
    """What fits the model's last layer with a strength."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    z_ND, labels = extract(model, train)
    mean_D, scale_D = z_ND.mean(0), z_ND.std(0).clamp_min(1e-6)
    biased = model.get_classifier().bias is not None
    if not biased:
        mean_D = torch.zeros_like(mean_D)
    x, y = ((z_ND - mean_D) / scale_D).cpu().numpy(), labels.cpu().numpy()

    def fit(strength: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = LogisticRegression(C=strength, max_iter=500, fit_intercept=biased).fit(x, y)
        _set(model, found, mean_D, scale_D)

    return fit


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


def _accuracies(model: Backbone, val: ImageDataset, threat: ThreatModel | None) -> dict[str, float]:
    """In %: clean, and under PGD-10 from the same random starts for every layer."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    batches = iterate(val, 256)
    steps = 0 if threat is None else 10
    with evaluating(model):
        counts = count_right(
            model, batches, threat or ThreatModel(eps=0.0), steps=steps, generator=generator
        )
    natural, robust, n = counts.tolist()
    return {"natural": 100 * natural / n, "robust": 100 * robust / n}
