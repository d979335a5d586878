"""Training methods, one file each: which attack, which loss, which parts train."""

from gacd.methods.ard import ARD
from gacd.methods.base import Loss, Method, Teacher, TrainingAttack
from gacd.methods.gacd import GACD
from gacd.methods.kd import KD
from gacd.methods.natural import Natural
from gacd.methods.pgd_at import PGDAT
from gacd.methods.trades import TRADES

METHODS: dict[str, type[Method]] = {
    "natural": Natural,
    "pgd-at": PGDAT,
    "trades": TRADES,
    "kd": KD,
    "ard": ARD,
    "gacd": GACD,
}
"""Every method by its name on the command line."""

__all__ = ["METHODS", "Loss", "Method", "Teacher", "TrainingAttack"]
