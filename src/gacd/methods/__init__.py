"""Training methods, one file each: which attack, which loss, which parts train."""

from gacd.methods.base import Given, Loss, Step, Teacher, Term, TrainingAttack
from gacd.methods.method import Method
from gacd.methods.registry import METHODS, create_method, register_method

__all__ = [
    "METHODS",
    "Given",
    "Loss",
    "Method",
    "Step",
    "Teacher",
    "Term",
    "TrainingAttack",
    "create_method",
    "register_method",
]
