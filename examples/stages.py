"""Every stage of gacd+aft from Python: a teacher of one's own, its student, and both under attack.

    python examples/stages.py [EPOCHS] [FOLDER]

scikit-learn's digits. FOLDER keeps each stage: run the same command again, and it goes on from
there. What `gacd distill` adds are records, a report, and refusing another run's folder.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import torch
from lightning_fabric import Fabric
from torch import nn

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.threat import ThreatModel
from gacd.data.batches import iterate
from gacd.data.load import load_splits
from gacd.evaluation.robust import evaluate
from gacd.linear import fit_head
from gacd.methods import Teacher, TrainingAttack, create_method
from gacd.models import create_model
from gacd.models.adapted import Adapted
from gacd.models.base import Backbone
from gacd.models.checkpoints import save_model
from gacd.training.loop import Plan, fit

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else mkdtemp())
THREAT = ThreatModel(eps=0.2)
ATTACK = TrainingAttack(threat=THREAT, steps=7, step_size=0.06)

torch.set_num_threads(1)  # so small networks are fastest
fabric = Fabric(accelerator="auto", devices=1)
splits = load_splits("digits", val_fraction=0.15, seed=0)
mean, std = splits.train.mean_std()


def train(name: str, method: str, student: Backbone, epochs: int, lr: float, **given) -> None:
    """A stage in a folder of its own; the checkpoint that validation chose is left in `student`."""
    plan = Plan(epochs=epochs, batch_size=64, lr=lr, pad=1)
    fit(
        fabric,
        create_method(method, student, ATTACK, **given),
        splits,
        plan,
        out=OUT / name,
        name=name,
    )


# 1. A teacher: any classifier that ends in a linear layer, here trained adversarially.
mine = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
)
teacher = Adapted(mine, "8", channels=1, mean=mean, std=std)
train("teacher", "pgd-at", teacher, EPOCHS, 0.1)
frozen = Teacher(teacher)

# 2. Its features of every training image: what the student learns to tell apart.
in_order = iterate(splits.train, 256)
known_by = Fingerprint(teacher="mine", data=splits.train.fingerprint(), preprocessing="none")
bank = AnchorBank.build(teacher, in_order, size=len(splits.train), fingerprint=known_by)

# 3. The student: features, then a linear layer on them, then both together under attack.
student = create_model("digits-cnn-8", num_classes=10, channels=1, mean=mean, std=std, seed=1)
settings = {"gacd": {"negatives": 1024}}
train("gacd", "gacd", student, EPOCHS, 0.3, teacher=frozen, bank=bank, options=settings)
fit_head(student, splits, THREAT)
train("gacd+aft", "pgd-at", student, max(1, EPOCHS // 2), 0.1)
save_model(OUT / "student.safetensors", student, {"architecture": "digits-cnn-8"})

# 4. Both attacked; AutoAttack on fifty images, as it takes its time.
for name, network in (("teacher", teacher), ("student", student)):
    found = evaluate(
        network, splits.test, attacks=["pgd20", "autoattack"], threat=THREAT, autoattack_limit=50
    )
    figures = ", ".join(f"{attack} {found.accuracy(attack):.1f}%" for attack in found.robust)
    print(f"{name}: {figures}")
print(f"kept in {OUT}")
