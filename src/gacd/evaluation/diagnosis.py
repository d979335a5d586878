"""Is a robust accuracy real, or are the gradients merely masked?

The checks are those of Athalye et al. 2018 (Sec. 3.1) and Carlini et al. 2019: what must hold for
any attack that works, and fails where the attack is blind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from gacd.attacks.objectives import cross_entropy
from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.data.split import stratified
from gacd.evaluation.batches import chunks
from gacd.evaluation.outcomes import Evaluation
from gacd.evaluation.robust import evaluate
from gacd.evaluation.statistics import binomial_interval
from gacd.models.base import Backbone
from gacd.models.modes import evaluating
from gacd.ranks import ALONE, Ranks

_SUBSET_SEED = 0
_POINTS = 1.0  # percentage points that chance may give the weaker of two attacks; or one image
_NEAR = "pgd100x5"  # what AutoAttack is compared with; see `_autoattack_gap`
_AUTOATTACK_GAP = 10.0  # percent of the images; published robust students lose 3 to 5
_ZEROS = 10.0  # percent of the gradient's entries


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis, of n images: it passed where `value <= limit`, in percent."""

    name: str
    passed: bool
    value: float
    limit: float
    text: str
    n: int


def diagnose(
    model: Backbone,
    dataset: ArrayDataset,
    *,
    threat: ThreatModel,
    source: Backbone | None = None,
    evaluation: Evaluation | None = None,
    limit: int = 256,
    autoattack_limit: int = 64,
    batch_size: int = 256,
    seed: int = 0,
    cache: Path | None = None,
    show_progress: bool = True,
    ranks: Ranks = ALONE,
) -> list[Check]:
    """Six or seven checks for masked gradients, on a fixed stratified subset of `limit` images.

    `source` is another model of the same data, for the transfer check (left out without one).
    Where `evaluation`, which must be of this model, holds AutoAttack's verdicts for this data and
    threat, the subset is drawn from the images judged there, and the verdicts are taken over; else
    AutoAttack runs on `autoattack_limit` of the subset. Values and limits are percentage points.
    Raises what `evaluate` does.
    """
    met = _met_by_autoattack(evaluation, dataset, threat)
    among = torch.arange(len(dataset)) if met is None else met
    chosen = among[stratified(dataset.labels.cpu()[among], limit, seed=_SUBSET_SEED)]
    subset = dataset.subset(chosen.to(dataset.images.device))
    attacks = ["noise", "fgsm", "pgd20", "pgd100", _NEAR]
    attacks += ["transfer"] * (source is not None) + ["autoattack"] * (met is None)

    def attacked(attacks: Sequence[str], threat: ThreatModel) -> Evaluation:
        return evaluate(
            model,
            subset,
            attacks=attacks,
            threat=threat,
            batch_size=batch_size,
            seed=seed,
            autoattack_limit=autoattack_limit,
            source=source if "transfer" in attacks else None,
            cache=cache,
            show_progress=show_progress,
            ranks=ranks,
        )

    near = attacked(attacks, threat)
    far = attacked(["pgd100"], _everywhere(threat, subset))
    natural, noise, fgsm, pgd20, pgd100 = map(
        near.accuracy, ("natural", "noise", "fgsm", "pgd20", "pgd100")
    )
    lost = natural - pgd100
    points = _POINTS if len(subset) >= 100 else 100 / len(subset) + 1e-9
    if met is None:
        verdicts, index = near.outcomes("autoattack")
    else:
        assert evaluation is not None
        verdicts = evaluation.outcomes("autoattack")[0][torch.isin(met, chosen)]
        index = torch.arange(len(subset))
    gap, gap_text = _autoattack_gap(near.outcomes(_NEAR)[0][index], verdicts)
    zeros = zero_gradients(model, subset, batch_size=batch_size)
    broken = far.accuracy("pgd100")
    rows = [
        (
            "iterative beats single-step",
            pgd20 - fgsm,
            points,
            f"{pgd20:.1f} % under PGD-20, {fgsm:.1f} % under FGSM",
        ),
        (
            "more steps never help the defender",
            pgd100 - pgd20,
            points,
            f"{pgd100:.1f} % under PGD-100, {pgd20:.1f} % under PGD-20",
        ),
        (
            "a large eps breaks everything",
            broken,
            points,
            f"{broken:.1f} % at {threat.norm} eps {far.settings['eps']:.3g}",
        ),
        (
            "random noise is harmless next to the attack",
            natural - noise,
            max(lost / 2, points),
            f"noise costs {natural - noise:.1f} points, PGD-100 {lost:.1f}",
        ),
        ("AutoAttack is near PGD", gap, _AUTOATTACK_GAP, gap_text),
        (
            "gradients do not vanish",
            zeros,
            _ZEROS,
            f"{zeros:.1f} % of the input gradient's entries are exactly zero",
        ),
    ]
    if source is not None:
        transfer = near.accuracy("transfer")
        text = f"{pgd100:.1f} % under PGD-100, {transfer:.1f} % under another model's images"
        rows.append(("transfer is weaker than white-box", pgd100 - transfer, points, text))
    n = len(subset)
    return [Check(name, value <= limit, value, limit, text, n) for name, value, limit, text in rows]


def zero_gradients(model: Backbone, dataset: ArrayDataset, *, batch_size: int = 256) -> float:
    """Share of exact zeros in the cross-entropy's gradient at the clean images, in percent."""
    device = next(model.parameters()).device
    zeros = 0
    with evaluating(model), torch.autocast(device.type, enabled=False), torch.enable_grad():
        for _, rows in chunks(torch.arange(len(dataset), device=dataset.images.device), batch_size):
            x = dataset.float_images(rows).to(device).requires_grad_()
            loss = cross_entropy(model, dataset.labels[rows].to(device))(x).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            zeros += int((gradient == 0).sum())
    return 100.0 * zeros / dataset.images.numel()


def _everywhere(threat: ThreatModel, dataset: ArrayDataset) -> ThreatModel:
    """A ball around any image that holds plain grey, in which no image has anything left to see."""
    pixels = dataset.images[0].numel()
    return ThreatModel(norm=threat.norm, eps=0.5 * (1 if threat.norm == "linf" else pixels**0.5))


def _met_by_autoattack(
    evaluation: Evaluation | None, dataset: ArrayDataset, threat: ThreatModel
) -> Tensor | None:
    """The images on which AutoAttack's verdict is known: of a cascade it is that of several."""
    if evaluation is None or evaluation.settings.get("cascade"):
        return None
    alike = {"test_images": dataset.fingerprint(), "norm": threat.norm, "eps": threat.eps}
    if any(evaluation.settings.get(key) != value for key, value in alike.items()):
        return None
    return evaluation.index.get("autoattack")


def _autoattack_gap(pgd: Bool[Tensor, " n"], autoattack: Bool[Tensor, " n"]) -> tuple[float, str]:
    """The least share of images, in percent, that stand PGD and fall to AutoAttack, and in words.

    The lower end of Wilson's 95 % interval of that share: few images prove little. PGD has 100
    steps and five starts, since one start is often caught at a local maximum where eps is large
    (on the digits it leaves about 10 points that further starts find, and more steps do not).
    """
    lost, n = int((pgd & ~autoattack).sum()), len(pgd)
    low = binomial_interval(lost, n)[0]
    return low, (
        f"{lost} of {n} images stand {_NEAR} and fall to AutoAttack: at least {low:.1f} % of all"
    )
