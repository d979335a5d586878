"""Robust training without a teacher: TRADES and MART, one loss per image [B].

`p`, `p'` are the probabilities of the clean and of the adversarial image, `y` is the label. Types
and normalisation as in `soft_labels`: float32 or wider, KL summed over the classes.
"""

import torch

from gacd.losses.soft_labels import check_beta, cross_entropy, log_probs, soft_kl
from gacd.shapes import Labels, Logits, PerSample


def trades(
    natural_logits: Logits, adv_logits: Logits, labels: Labels, *, beta: float = 6.0
) -> PerSample:
    """Accuracy on x plus agreement of x' with x.

    `CE(p, y) + beta KL(p || p')`

    Source: Zhang et al. 2019 (arXiv:1901.08573), equation 5, where beta is 1/lambda.
    UserError if beta < 0.
    """
    check_beta(beta)
    return cross_entropy(natural_logits, labels) + beta * soft_kl(adv_logits, natural_logits)


def mart(
    natural_logits: Logits, adv_logits: Logits, labels: Labels, *, beta: float = 5.0
) -> PerSample:
    """Adversarial training that asks for agreement most where the clean image is misclassified.

    `-log p'_y - log(1 - max_{k != y} p'_k) + beta (1 - p_y) KL(p || p')`

    Source: Wang et al. 2020 (ICLR, "Improving adversarial robustness requires revisiting
    misclassified examples"), the MART objective, where beta is lambda. In the log domain it needs
    neither the 1.0001 nor the 1e-12 of the published code. UserError if beta < 0.
    """
    check_beta(beta)
    log_adv = log_probs(adv_logits)
    margin = -_log_one_minus(log_adv, _strongest_other(log_adv, labels))
    unsure = -torch.expm1(-cross_entropy(natural_logits, labels))
    boosted = cross_entropy(adv_logits, labels) + margin
    return boosted + beta * unsure * soft_kl(adv_logits, natural_logits)


def _strongest_other(log_p: Logits, labels: Labels) -> Labels:
    """The likeliest class that is not the label."""
    return log_p.scatter(1, labels[:, None].long(), -torch.inf).argmax(1)


def _log_one_minus(log_p: Logits, classes: Labels) -> PerSample:
    """`log(1 - p_c)`, as the sum of the other probabilities: exact where p_c rounds to 1."""
    return log_p.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
