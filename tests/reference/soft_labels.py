"""The soft-label and robust losses once more: plain float64 loops over one image at a time.

Written from the papers, sharing nothing with the package. Every function takes lists of floats (one
image's logits) and returns one float.
"""

import math
from collections.abc import Sequence

Row = Sequence[float]


def softmax(z: Row, temperature: float = 1.0) -> list[float]:
    top = max(z)
    exps = [math.exp((v - top) / temperature) for v in z]
    return [e / math.fsum(exps) for e in exps]


def ce(z: Row, y: int) -> float:
    return -math.log(softmax(z)[y])


def kl(p: Row, q: Row) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def kd(s: Row, t: Row, y: int, *, temperature: float, alpha: float) -> float:
    soft = kl(softmax(t, temperature), softmax(s, temperature))
    return (1 - alpha) * ce(s, y) + alpha * temperature**2 * soft


def ard(s_adv: Row, t: Row, s: Row, y: int, *, temperature: float, alpha: float) -> float:
    soft = kl(softmax(t, temperature), softmax(s_adv, temperature))
    return (1 - alpha) * ce(s, y) + alpha * temperature**2 * soft


def rslad(s_adv: Row, s: Row, t: Row) -> float:
    return 5 / 6 * kl(softmax(t), softmax(s_adv)) + 1 / 6 * kl(softmax(t), softmax(s))


def iad(
    s_adv: Row, s: Row, t_adv: Row, t: Row, y: int, *, temperature: float, beta: float
) -> float:
    trust = softmax(t_adv)[y] ** beta
    guidance = temperature**2 * kl(softmax(t, temperature), softmax(s_adv, temperature))
    return trust * guidance + (1 - trust) * kl(softmax(s), softmax(s_adv))


def adaad(s_adv: Row, s: Row, t_adv: Row, t: Row, *, adv_weight: float) -> float:
    adv = kl(softmax(t_adv), softmax(s_adv))
    return adv_weight * adv + (1 - adv_weight) * kl(softmax(t), softmax(s))


def igdm(s_plus: Row, s_minus: Row, t_plus: Row, t_minus: Row) -> float:
    change_s = [a - b for a, b in zip(s_plus, s_minus, strict=True)]
    change_t = [a - b for a, b in zip(t_plus, t_minus, strict=True)]
    return kl(softmax(change_t), softmax(change_s))


def feature_regression(s: Row, t: Row) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def trades(natural: Row, adv: Row, y: int, *, beta: float) -> float:
    return ce(natural, y) + beta * kl(softmax(natural), softmax(adv))


def mart(natural: Row, adv: Row, y: int, *, beta: float) -> float:
    p, p_adv = softmax(natural), softmax(adv)
    other = max(p_adv[k] for k in range(len(p_adv)) if k != y)
    bce = -math.log(p_adv[y]) - math.log(1 - other)
    return bce + beta * kl(p, p_adv) * (1 - p[y])
