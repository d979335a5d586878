"""A run that trains: its data whole, and the stages that its models are made in."""

from pathlib import Path

import torch

from gacd import build
from gacd import config as c
from gacd.anchors import AnchorBank
from gacd.attacks.validation import one_answer
from gacd.commands.rows import MODEL, Spent
from gacd.commands.run import Run
from gacd.data.batches import steps_per_epoch
from gacd.data.dataset import ArrayDataset, Splits
from gacd.errors import UserError
from gacd.methods import Teacher, create_method
from gacd.methods.awp import AWP
from gacd.methods.base import check_objective
from gacd.methods.cost import measure
from gacd.methods.registry import Named, parse_method
from gacd.models.base import Backbone
from gacd.models.checkpoints import load_weights, said_of
from gacd.storage import fingerprint
from gacd.training.loop import BEST, DONE, fit
from gacd.training.ranks import per_rank


class TrainingRun(Run):
    """A run folder with training data, and the stages that train on them."""

    splits: Splits

    def read(self) -> tuple[ArrayDataset, dict[str, str]]:
        """The test images, and the fingerprints of these with the training images, and of others.

        Those for validation have one of their own, as they came later.
        """
        self.splits = build.splits(self.cfg.data, self.cfg.seed)
        parts = self.splits.train, self.splits.test
        images = fingerprint(part.fingerprint() for part in parts)
        return self.splits.test, {"images": images, "val_images": self.splits.val.fingerprint()}

    def note_seed(self, network: Path) -> None:
        """The seed decides which images are held out: a network of another one has seen them."""
        seed = said_of(network).get("seed")
        if seed not in (None, self.cfg.seed):
            self.note(
                f"{network} is of seed {seed}: if it trained on these images, it has seen most of "
                f"those that seed {self.cfg.seed} holds out for validation"
            )

    def check_stage(self, stage: c.Training, name: str, method: Named, more: int = 0) -> None:
        """Refuse, before anything trains, what would fail in the stage's first step.

        It has so many images `more` than the data's.
        """
        if method.attacks:
            step_size, eps = c.fraction(stage.attack.step_size), self.threat.eps
            self.threat.check_step(step_size)
            reach = stage.attack.steps * step_size
            if reach < eps:
                self.note(
                    f"{stage.attack.steps} steps of {step_size:.3g} in training reach {reach:.3g} "
                    f"from where they start, and eps is {eps:.3g}: say {name}.attack.step_size"
                )
        ranks = self.fabric.world_size
        try:
            share = per_rank(stage.batch_size, ranks)
            if share == 1:
                raise UserError("batch normalisation needs two images or more on each process")
            steps_per_epoch(len(self.splits.train) + more, share, drop_last=True, world_size=ranks)
        except UserError as error:
            raise UserError(f"{name}.batch_size: {error}") from None

    def train(
        self,
        name: str,
        method: str,
        model: Backbone,
        architecture: str,
        training: c.Training,
        *,
        splits: Splits | None = None,
        teacher: Teacher | None = None,
        bank: AnchorBank | None = None,
        weights: dict[str, float] | None = None,
        before: Spent | None = None,
        label: str | None = None,
    ) -> Spent:
        """Train `model` in the stage folder `name` and keep it there, called by its `label`.

        It trains on the run's own data, or on other `splits`. Returns what that took, with what
        earlier stages took `before`.
        """
        out, named = self.cfg.out / name, parse_method(method, weights)
        splits, kept = splits or self.splits, out / MODEL
        ended = kept.is_file() and (out / DONE).is_file()
        if ended and not (out / BEST).is_file():
            # A folder may travel with its networks alone.
            load_weights(model.to(self.fabric.device).to(memory_format=torch.channels_last), kept)
            return Spent.read(kept)
        built = create_method(
            method,
            model,
            build.attack(training.attack, self.threat),
            teacher=teacher,
            bank=bank,
            seed=self.cfg.seed,
            options=self.options,
            weights=weights,
            awp=AWP(gamma=training.awp, warmup=training.awp_warmup),
        ).to(self.fabric.device)
        cost = measure(built, splits.train, batch_size=training.batch_size)
        plan = build.plan(training, self.cfg.data, self.cfg.fabric, self.cfg.seed)
        summary = fit(self.fabric, built, splits, plan, out=out, name=name)
        trivial = one_answer(splits.val.labels)
        if summary.val_natural <= trivial:
            self.note(
                f"{name}: right on {summary.val_natural:.1f} % of the validation images, and "
                f"one answer to all on {trivial:.1f} %: try another rate, or more epochs"
            )
        here = Spent(summary.seconds, summary.images, cost * summary.images)
        spent = here if before is None else before + here
        features = not named.trains_head
        self.keep(out, model, architecture, label or method, spent, features=features)
        return spent


def refuse_teacher(method: str, training: c.Training) -> None:
    """Refuse a method that `train`, `finetune` or a teacher cannot use."""
    named = parse_method(method)
    if named.needs_teacher:
        raise UserError(f"{method} needs a teacher: use gacd distill --methods {method}")
    check_attack(named, training)


def check_attack(named: Named, training: c.Training) -> None:
    """Refuse, before anything trains, an attack on what the method does not have."""
    if named.attacks:
        check_objective(
            training.attack.objective,
            name=named.name,
            trains_head=named.trains_head,
            has_teacher=named.needs_teacher,
        )
