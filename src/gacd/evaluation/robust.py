"""Robust accuracy: every attack on every image, remembered batch by batch.

An image that is wrong without an attack counts as broken by all and is not attacked. The model is
in evaluation mode and float32. Each batch draws its noise from a generator of its own, seeded by
(seed, attack, batch), so an interrupted run gives the same outcomes as an uninterrupted one, and
several processes that share the batches out among them the same as one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

import gacd
from gacd.attacks.objectives import cross_entropy, margin
from gacd.attacks.pgd import fgsm, pgd
from gacd.attacks.threat import ThreatModel
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset
from gacd.data.split import stratified
from gacd.errors import UserError
from gacd.evaluation.autoattack import autoattack, check_autoattack, standard_attacks
from gacd.evaluation.batches import (
    assert_within,
    batch_seed,
    chunks,
    from_bits,
    is_right,
    shared_out,
    to_bits,
)
from gacd.evaluation.names import Attack, parse_attack
from gacd.evaluation.outcomes import Evaluation
from gacd.evaluation.statistics import binomial_interval
from gacd.models.base import Backbone, check_backbone, check_fits, model_fingerprint
from gacd.models.modes import evaluating
from gacd.progress import progress
from gacd.ranks import ALONE, Ranks
from gacd.shapes import Images, Labels
from gacd.storage import fingerprint

_SUBSET_SEED = 0  # constant, so that AutoAttack meets every model on the same images


def evaluate(
    model: Backbone,
    dataset: ArrayDataset,
    *,
    attacks: Sequence[str],
    threat: ThreatModel,
    step_size: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    autoattack_limit: int | None = None,
    cascade: bool = False,
    source: Backbone | None = None,
    cache: Path | str | None = None,
    show_progress: bool = True,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Attack a model with everything in `attacks` (see `parse_attack`), on the model's device.

    `step_size` is in the units of eps, a quarter of it by default (2/255 at 8/255). AutoAttack runs
    on `autoattack_limit` images, a fixed subset stratified by class, or on all. Each attack starts
    from every image that is right without attack; with `cascade` from those still right after all
    attacks before it, and its accuracy is then the worst case so far. `source` is the model that
    `transfer` attacks in place of this one. With `cache`, a folder, finished batches survive a
    kill; it knows a model by its structure, parameters and buffers, so models that differ only in
    code or plain attributes need a folder each. Several `ranks` share the batches out, need one
    cache that all of them see, and return the same.
    Raises UserError for an unknown attack, `transfer` without a source, several ranks without a
    cache, or a model that does not fit the data.
    """
    wanted = [parse_attack(name) for name in dict.fromkeys(["natural", *attacks])]
    _check(model, source, dataset, wanted, batch_size, autoattack_limit)
    if any(attack.kind == "autoattack" for attack in wanted):
        check_autoattack(dataset.images, threat)
    if ranks.size > 1 and cache is None:
        raise UserError("several ranks evaluate together through a cache: name its folder")
    step_size = threat.step(step_size)
    settings: dict[str, Any] = {
        "dataset": dataset.name,
        "test_images": dataset.fingerprint(),
        "norm": threat.norm,
        "eps": threat.eps,
        "step_size": step_size,
        "batch_size": batch_size,
        "seed": seed,
        "cascade": cascade,
    }
    if source is not None:
        settings["source"] = model_fingerprint(source)
    run = _Run(model, dataset, source, threat, step_size, batch_size, seed, show_progress, ranks)
    cache = None if cache is None else Path(cache)
    key = cache and run.fingerprint()

    robust: dict[str, Tensor] = {}
    index: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    right = alive = torch.ones(len(dataset), dtype=torch.bool)
    for attack in wanted:
        rows = torch.arange(len(dataset))
        if attack.kind == "autoattack" and autoattack_limit is not None:
            chosen = stratified(dataset.labels.cpu(), autoattack_limit, seed=_SUBSET_SEED)
            rows = chosen.nonzero().flatten()
        candidates = torch.zeros_like(right)
        candidates[rows] = (alive if cascade else right)[rows]
        # Whom an attack is given decides its noise, so that belongs to what its outcomes are for.
        folder = cache and cache / f"{attack.name}-{fingerprint([str(key), to_bits(candidates)])}"
        if attack.kind == "autoattack":
            survived, spent, settings["autoattack"] = run.autoattack(candidates, folder)
        else:
            survived, spent = run.survivors(attack, candidates, folder)
        if attack.kind == "natural":
            right = survived
        alive = alive & (survived | ~candidates)
        robust[attack.name], index[attack.name] = survived[rows], rows
        seconds[attack.name] = spent
    return Evaluation(len(dataset), robust, index, settings, seconds)


@torch.no_grad()
def answers(model: Backbone, dataset: ArrayDataset, *, batch_size: int = 256) -> Int[Tensor, " N"]:
    """The class that the model gives each image, in evaluation mode and float32."""
    device = next(model.parameters()).device
    batches = iterate(dataset.to(device), batch_size)
    with evaluating(model), torch.autocast(device.type, enabled=False):
        return torch.cat([model(batch.images).argmax(1) for batch in batches])


def answered_alike(model: Backbone, dataset: ArrayDataset, *, batch_size: int = 256) -> float:
    """Share of the images, in percent, that get the model's most frequent answer."""
    counts = answers(model, dataset, batch_size=batch_size).bincount()
    return 100.0 * int(counts.max()) / len(dataset)


class CurvePoint(NamedTuple):
    """Accuracy at one eps with its 95 % interval, in percent."""

    eps: float
    accuracy: float
    low: float
    high: float


def epsilon_curve(
    model: Backbone,
    dataset: ArrayDataset,
    *,
    eps_values: Sequence[float],
    threat: ThreatModel,
    steps: int = 20,
    batch_size: int = 256,
    seed: int = 0,
    cache: Path | None = None,
    show_progress: bool = True,
    ranks: Ranks = ALONE,
) -> list[CurvePoint]:
    """Accuracy under PGD (steps of eps / 4) against eps, ascending; of `threat` only the norm.

    An image broken at one eps is broken at every larger one, whose ball contains the smaller, and
    is not attacked again: the curve never rises.
    """
    points = []
    alive = torch.arange(len(dataset))
    shown = show_progress and len(eps_values) > 0
    with progress(len(eps_values), "curve over eps", unit="eps", enabled=shown) as bar:
        for eps in sorted(eps_values):
            if len(alive):
                found = evaluate(
                    model,
                    dataset.subset(alive.to(dataset.images.device)),
                    attacks=[f"pgd{steps}"] if eps else [],
                    threat=replace(threat, eps=eps),
                    batch_size=batch_size,
                    seed=seed,
                    cache=cache,
                    show_progress=False,
                    ranks=ranks,
                )
                alive = alive[found.outcomes("worst")[0]]
            accuracy = 100.0 * len(alive) / len(dataset)
            points.append(CurvePoint(eps, accuracy, *binomial_interval(len(alive), len(dataset))))
            bar.advance(robust=accuracy)
    return points


@dataclass(frozen=True, eq=False)
class _Run:
    """What all attacks of one evaluation have in common."""

    model: Backbone
    dataset: ArrayDataset
    source: Backbone | None
    threat: ThreatModel
    step_size: float
    batch_size: int
    seed: int
    show_progress: bool
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        """A hash of all that the outcomes depend on, but for the attack itself."""
        models = [model_fingerprint(m) for m in (self.model, self.source) if m is not None]
        numbers = (self.threat, self.step_size, self.batch_size, self.seed, gacd.__version__)
        return fingerprint([self.dataset.fingerprint(), *models, *map(str, numbers)])

    def batch(self, rows: Tensor) -> tuple[Images, Labels]:
        rows = rows.to(self.dataset.images.device)
        x, labels = self.dataset.float_images(rows), self.dataset.labels[rows]
        return x.to(self.device), labels.to(self.device)

    def survivors(
        self, attack: Attack, candidates: Bool[Tensor, " N"], folder: Path | None
    ) -> tuple[Bool[Tensor, " N"], float]:
        """Which of the candidates the model is still right on, and the seconds it took."""
        survived = torch.zeros_like(candidates)
        models = [model for model in (self.model, self.source) if model is not None]
        every = chunks(torch.arange(len(candidates)), self.batch_size)
        live = [(n, rows[candidates[rows]]) for n, rows in every if candidates[rows].any()]

        def compute(number: int, rows: Tensor) -> dict[str, Any]:
            start = time.perf_counter()
            bits = to_bits(self.attack(attack, number, *self.batch(rows)))
            return {"robust": bits, "seconds": time.perf_counter() - start}

        with evaluating(*models), torch.autocast(self.device.type, enabled=False):
            found = shared_out(
                live,
                compute,
                folder=folder,
                ranks=self.ranks,
                name=attack.name,
                show_progress=self.show_progress,
            )
        for (_, rows), value in zip(live, found, strict=True):
            survived[rows] = from_bits(value["robust"])
        return survived, sum((value["seconds"] for value in found), 0.0)

    def attack(self, attack: Attack, number: int, x: Images, labels: Labels) -> Bool[Tensor, " B"]:
        """Which images of one batch survive all restarts; only survivors meet the next one."""
        # Not by restarts: pgd20 and pgd20x5 share their first start, so more never help the model.
        seed = batch_seed(self.seed, attack.kind, number)
        generator = torch.Generator(self.device).manual_seed(seed)
        rows = torch.arange(len(x), device=x.device)
        for _ in range(attack.restarts):
            if len(rows):
                x_adv = self.perturb(attack, x[rows], labels[rows], generator)
                assert_within(self.threat, x_adv, x[rows])
                rows = rows[is_right(self.model, x_adv, labels[rows])]
        survived = torch.zeros(len(x), dtype=torch.bool)
        survived[rows.cpu()] = True
        return survived

    def perturb(
        self, attack: Attack, x: Images, labels: Labels, generator: torch.Generator
    ) -> Images:
        if attack.kind == "natural" or self.threat.eps == 0:
            return x
        if attack.kind == "noise":
            return self.threat.random_start(x, generator)
        target = self.source if attack.kind == "transfer" else self.model
        assert target is not None  # _check saw to it
        objective = (margin if attack.kind == "cw" else cross_entropy)(target, labels)
        if attack.kind == "fgsm":
            return fgsm(objective, x, self.threat)
        return pgd(
            objective,
            x,
            self.threat,
            steps=attack.steps,
            step_size=self.step_size,
            generator=generator,
        )

    def autoattack(
        self, candidates: Bool[Tensor, " N"], folder: Path | None
    ) -> tuple[Bool[Tensor, " N"], float, dict[str, Any]]:
        """AutoAttack's survivors among the candidates, its seconds, and what was run."""
        rows = candidates.nonzero().flatten()
        survived = torch.zeros_like(candidates)
        ran: dict[str, Any] = {
            "version": "standard",
            "attacks": list(standard_attacks(self.model.num_classes)),
        }
        if not len(rows):
            return survived, 0.0, ran
        at = rows.to(self.dataset.images.device)
        result = autoattack(
            self.model,
            self.dataset.float_images(at),
            self.dataset.labels[at],
            num_classes=self.model.num_classes,
            threat=self.threat,
            batch_size=self.batch_size,
            seed=self.seed,
            cache=folder,
            show_progress=self.show_progress,
            ranks=self.ranks,
        )
        survived[rows] = result.robust
        ran |= {"target_classes": result.targets, "notes": list(result.notes)}
        return survived, result.seconds, ran


def _check(
    model: Backbone,
    source: Backbone | None,
    dataset: ArrayDataset,
    wanted: Sequence[Attack],
    batch_size: int,
    limit: int | None,
) -> None:
    if not isinstance(dataset, ArrayDataset):
        raise UserError("what to evaluate on is an ArrayDataset, such as splits.test")
    for network in (model, source):
        if network is None:
            continue
        check_backbone(network)
        check_fits(network, dataset.name, dataset.num_classes, dataset.channels)
        if len(dataset):
            network.check(dataset.size, trains=False)
    if not len(dataset):
        raise UserError(f"{dataset.name} has no images to evaluate on")
    if source is None and any(attack.kind == "transfer" for attack in wanted):
        raise UserError("the attack 'transfer' needs a source model to make its images on")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(
            f"batch_size and autoattack_limit must be at least 1, not {batch_size} and {limit}"
        )
