"""Several processes of one run: which of them this is, and how they wait for each other."""

from collections.abc import Callable
from dataclasses import dataclass

GOAL, REFUSAL = "GACD_GOAL", "GACD_REFUSAL"
"""Of the environment, where a study runs a cell as a command of its own to have several processes:
how far the command goes, and the file that will say why it was refused."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`; `wait` returns once all of them have called it."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], object] = _nothing


ALONE = Ranks()
