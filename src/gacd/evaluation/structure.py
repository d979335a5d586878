"""What a network's outputs look like, and how alike two are (Bai et al. 2020, Figures 3 to 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from gacd.attacks.objectives import PerImage, cross_entropy
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError
from gacd.evaluation.batches import assert_within, batch_seed, chunks
from gacd.evaluation.statistics import binomial_interval
from gacd.models.base import Backbone
from gacd.models.modes import evaluating
from gacd.progress import progress
from gacd.shapes import Images, Labels

Rows = Float[np.ndarray, "_n _D"]
"""One row an image; the underscores leave agreement between arrays to each function."""
Matrix = Float[np.ndarray, "_K _K"]


class Outputs(NamedTuple):
    """Logits and penultimate features of the same images, in float64."""

    logits: Rows
    features: Rows


@torch.no_grad()
def outputs(model: Backbone, images: Images, *, batch_size: int = 256) -> Outputs:
    """What the model, in evaluation mode and float32, makes of images in [0, 1]."""
    device = next(model.parameters()).device
    logits, features = [], []
    with evaluating(model), torch.autocast(device.type, enabled=False):
        for part in torch.split(images, batch_size):
            features.append(model.forward_features(part.to(device)))
            logits.append(model.forward_head(features[-1]))
    return Outputs(*(torch.cat(part).double().cpu().numpy() for part in (logits, features)))


def perturbed(
    model: Backbone,
    images: Images,
    labels: Labels,
    *,
    threat: ThreatModel,
    steps: int = 20,
    step_size: float | None = None,
    targeted: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    show_progress: bool = True,
) -> Images:
    """PGD images (on the device of `images`): away from `labels`, or with `targeted` towards them.

    `step_size` is in the units of eps, a quarter of it by default. Each batch has its own seed.
    """
    if threat.eps == 0:
        return images
    device = next(model.parameters()).device
    result = torch.empty_like(images)
    objective = _towards if targeted else cross_entropy
    with (
        evaluating(model),
        torch.autocast(device.type, enabled=False),
        progress(len(images), f"pgd{steps} images", enabled=show_progress) as bar,
    ):
        for number, rows in chunks(torch.arange(len(images)), batch_size):
            at = rows.to(images.device)
            x, y = images[at].to(device), labels[at].to(device)
            generator = torch.Generator(device).manual_seed(batch_seed(seed, "structure", number))
            x_adv = pgd(
                objective(model, y), x, threat, steps=steps, step_size=threat.step(step_size),
                generator=generator,
            )  # fmt: skip
            assert_within(threat, x_adv, x)
            result[at] = x_adv.to(images.device)
            bar.advance(len(rows))
    return result


def _towards(model: Backbone, labels: Labels) -> PerImage:
    """log softmax(z)_y: large where the model answers y."""
    return PerImage(lambda x, y: -F.cross_entropy(model(x).float(), y, reduction="none"), labels)


def class_correlations(logits: Rows) -> Matrix:
    """Pearson's correlation of every two classes' logits over the images, [K, K].

    Raises UserError with fewer than 2 images, or a class whose logit never changes.
    """
    if len(logits) < 2:
        raise UserError(f"class correlations need at least 2 images, not {len(logits)}")
    constant = np.flatnonzero(np.ptp(logits, axis=0) == 0)
    if len(constant):
        raise UserError(f"the logit of class {constant[0]} never changes: it correlates with none")
    matrix: Matrix = np.atleast_2d(np.corrcoef(logits, rowvar=False))
    return matrix


def correlation_difference(teacher: Rows, student: Rows) -> Matrix:
    """|corr(teacher's logits) - corr(student's logits)|, [K, K]: Figures 3 and 4.

    Raises UserError where the two have not the same number of classes.
    """
    if teacher.shape[1] != student.shape[1]:
        raise UserError(f"{teacher.shape[1]} classes cannot be compared with {student.shape[1]}")
    difference: Matrix = np.abs(class_correlations(teacher) - class_correlations(student))
    return difference


def linear_cka(x: Rows, y: Rows) -> float:
    """Linear centred kernel alignment of two networks' features of the same images, in [0, 1].

    |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), columns centred (Kornblith et al. 2019, Sec. 3). The widths
    may differ; rotations, one scale and one shift of either change nothing.
    Raises UserError for different numbers of images, or features that never change.
    """
    if len(x) != len(y):
        raise UserError(f"CKA needs the same images on both sides, not {len(x)} and {len(y)}")
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    if scale == 0:
        raise UserError("CKA needs features that differ between images")
    return float(np.linalg.norm(y.T @ x) ** 2 / scale)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Two classes and the attacked images of one of them, in feature space (Figure 5)."""

    silhouette: float
    """Mean over the clean images of (b - a) / max(a, b), in [-1, 1] (Rousseeuw 1987)."""
    inter_intra: float
    """Distance of the two centroids over the mean distance of clean images to their own."""
    nearer_true: float
    """Percent of attacked images nearer to their true class's centroid, with Wilson's interval."""
    nearer_true_low: float
    nearer_true_high: float


def geometry(target: Rows, source: Rows, attacked: Rows) -> Geometry:
    """Clean features of two classes, and those of `source` images attacked towards `target`.

    Distances are Euclidean. Raises UserError with fewer than 2 images of a class or none attacked.
    """
    from sklearn.metrics import silhouette_score

    if min(len(target), len(source)) < 2 or len(attacked) == 0:
        raise UserError(
            "class geometry needs at least 2 clean images of each class and one attacked, not "
            f"{len(target)}, {len(source)} and {len(attacked)}"
        )
    clean = np.concatenate([target, source])
    classes = np.repeat([0, 1], [len(target), len(source)])
    centre_target, centre_source = target.mean(0), source.mean(0)
    own = np.stack([centre_target, centre_source])[classes]
    intra = float(_distance(clean, own).mean())
    if intra == 0:
        raise UserError("class geometry needs features that differ between images of a class")
    nearer = _distance(attacked, centre_source) < _distance(attacked, centre_target)
    low, high = binomial_interval(int(nearer.sum()), len(nearer))
    return Geometry(
        silhouette=float(silhouette_score(clean, classes)),
        inter_intra=float(np.linalg.norm(centre_target - centre_source)) / intra,
        nearer_true=100.0 * float(nearer.mean()),
        nearer_true_low=low,
        nearer_true_high=high,
    )


def embed(
    features: Mapping[str, Rows], *, joint: bool = False, perplexity: float = 30.0, seed: int = 0
) -> dict[str, Rows]:
    """t-SNE of each model's features in two dimensions (van der Maaten & Hinton 2008).

    One embedding a model: places in two of them cannot be compared. With `joint` one for all, of
    features brought to mean 0 and the same mean square; that takes models of the same width. The
    perplexity is lowered to a third of the images where they are few.
    Raises UserError for models of different widths with `joint`, or fewer than 4 images.
    """
    if min(map(len, features.values())) < 4:
        raise UserError("t-SNE needs at least 4 images")
    run = partial(_tsne, perplexity=perplexity, seed=seed)
    if not joint:
        return {name: run(rows) for name, rows in features.items()}
    widths = {rows.shape[1] for rows in features.values()}
    if len(widths) > 1:
        raise UserError(
            f"one joint embedding needs features of one width, not {sorted(widths)}: "
            "embed each model by itself"
        )
    together = run(np.concatenate([_scaled(rows) for rows in features.values()]))
    ends = np.cumsum([len(rows) for rows in features.values()])[:-1]
    return dict(zip(features, np.split(together, ends), strict=True))


def usable_perplexity(asked: float, images: int) -> float:
    """What t-SNE of so few images can use of it: at most a third of them."""
    return min(asked, (images - 1) / 3)


def _tsne(rows: Rows, *, perplexity: float, seed: int) -> Rows:
    from sklearn.manifold import TSNE

    used = usable_perplexity(perplexity, len(rows))
    placed: Rows = TSNE(perplexity=used, init="pca", random_state=seed).fit_transform(rows)
    return placed.astype(np.float64)


def _scaled(rows: Rows) -> Rows:
    centred = rows - rows.mean(0)
    scaled: Rows = centred / max(float(np.sqrt(np.mean(centred**2))), 1e-12)
    return scaled


def _distance(x: Rows, y: Float[np.ndarray, "..."]) -> Float[np.ndarray, " _n"]:
    distance: Float[np.ndarray, " _n"] = np.linalg.norm(x - y, axis=1)
    return distance
