"""What an attack maximises: each factory returns a function of images, one number per image.

The larger the number, the better for the attacker. What follows the network is computed in float32
under any autocast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gacd.attacks.transport import cosine_cost, sinkhorn
from gacd.errors import UserError
from gacd.shapes import Features, Images, Labels, Logits, PerSample

Objective = Callable[[Images], PerSample]
Classifier = Callable[[Images], Logits]
Encoder = Callable[[Images], Features]


@dataclass(frozen=True)
class PerImage:
    """An objective in which no image depends on another: `score(images, given)`, row by row.

    `given` is what is known of each image (its label, its clean features), so that a part of the
    batch can be scored alone. Also used for yes-or-no answers, such as `misclassified`.
    """

    score: Callable[[Images, Tensor], Tensor]
    given: Tensor

    def __call__(self, x: Images) -> Tensor:
        """The score of each image of the batch."""
        return self.score(x, self.given)

    def rows(self, index: Int[Tensor, " R"]) -> "PerImage":
        """The same objective for these rows of the batch."""
        return PerImage(self.score, self.given[index])


def cross_entropy(model: Classifier, labels: Labels) -> PerImage:
    """-log softmax(z)_y."""
    return PerImage(
        lambda x, y: F.cross_entropy(model(x).float(), y, reduction="none"), labels.long()
    )


def margin(model: Classifier, labels: Labels) -> PerImage:
    """max_{j != y} z_j - z_y: above 0 where the image is misclassified (Carlini & Wagner 2017)."""
    return PerImage(lambda x, y: _margin(model(x).float(), y), labels)


def dlr(model: Classifier, labels: Labels) -> PerImage:
    """Difference of logits ratio: (max_{j != y} z_j - z_y) / (z_(1) - z_(3)).

    z_(i) is the i-th largest logit; blind to the logits' scale (Croce & Hein 2020, Eq. 6).
    Raises UserError when called on a model of fewer than 3 classes.
    """

    def score(x: Images, y: Labels) -> PerSample:
        logits = model(x).float()
        if logits.shape[1] < 3:
            raise UserError(f"dlr needs at least 3 classes, not {logits.shape[1]}: use margin")
        top = logits.topk(3, dim=1).values
        return _margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)

    return PerImage(score, labels)


def kl(model: Classifier, target_probs: Float[Tensor, "B K"], temperature: float = 1.0) -> PerImage:
    """KL(p || softmax(z / T)), summed over the classes; `target_probs` p is used as it is given.

    Raises UserError, on the CPU (a look at a GPU waits for it), for what are no probabilities.
    """
    if target_probs.device.type == "cpu":
        check_probabilities(target_probs)

    def score(x: Images, p: Float[Tensor, "B K"]) -> PerSample:
        log_q = F.log_softmax(model(x).float() / temperature, dim=1)
        return F.kl_div(log_q, p, reduction="none").sum(1)

    return PerImage(score, target_probs.detach().float())


def adaptive_kl(model: Classifier, teacher: Classifier) -> Objective:
    """KL(T(x') || f(x')), summed over the classes: the teacher answers for the attacked image too.

    The gradient of the image comes through both (Huang et al. 2023, the inner maximisation of
    AdaAD).
    """

    def score(x: Images) -> PerSample:
        log_q = F.log_softmax(model(x).float(), dim=1)
        log_p = F.log_softmax(teacher(x).float(), dim=1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    return score


def feature_cosine(encode: Encoder, clean_features: Features) -> PerImage:
    """1 - cos(z_i, f(x_i)): each image against itself, in [0, 2].

    Its gradient is exactly 0 at the clean image: begin with a random start.
    """

    def score(x: Images, clean: Tensor) -> PerSample:
        features = encode(x).float()
        _check_alike(features, clean)
        return 1 - F.cosine_similarity(features, clean, dim=1)

    return PerImage(score, clean_features.detach().float())


def feature_transport(
    encode: Encoder, clean_features: Features, reg: float = 0.01, iterations: int = 20
) -> Objective:
    """Wasserstein distance between the batch's features and its clean ones: D = sum_ij P_ij C_ij.

    C_ij = 1 - cos(f(x_i), z_j), P from `sinkhorn`. Returned are the rows' shares B sum_j P_ij C_ij,
    whose mean is D. The plan is held constant: by the envelope theorem this is the gradient of the
    regularised distance itself. Every image depends on the whole batch, and D is not 0 for two
    identical batches but at most reg log B (Zhang & Wang 2019, Sec. 4).
    """
    clean = clean_features.detach()

    def score(x: Images) -> PerSample:
        features = encode(x)
        _check_alike(features, clean)
        cost_BB = cosine_cost(features, clean)
        with torch.autocast(x.device.type, enabled=False):
            plan_BB = sinkhorn(cost_BB.detach(), reg=reg, iterations=iterations)
            return len(clean) * (plan_BB * cost_BB).sum(1)

    return score


def misclassified(model: Classifier, labels: Labels) -> PerImage:
    """True where the model's answer is not the label: for `pgd(is_broken=...)`."""
    return PerImage(lambda x, y: model(x).argmax(1) != y, labels)


def check_probabilities(target_probs: Float[Tensor, "B K"]) -> None:
    """Refuse rows that are no probabilities, such as logits."""
    sums = target_probs.detach().double().sum(1)
    if bool((target_probs < 0).any()) or not bool(((sums - 1).abs() < 0.02).all()):
        raise UserError("target_probs must be probabilities, a row of sum 1 an image: softmax(1)")


def _check_alike(features: Tensor, clean: Tensor) -> None:
    if features.shape != clean.shape:
        raise UserError(
            f"clean features are {list(clean.shape)}, those of the images {list(features.shape)}"
        )


def _margin(logits: Logits, labels: Labels) -> PerSample:
    true = labels[:, None].long()
    others = logits.scatter(1, true, -torch.inf).amax(1)
    return others - logits.gather(1, true)[:, 0]
