"""What every attack's run over a test set shares: remembered batches, seeds, the budget's check."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gacd.attacks.threat import ThreatModel
from gacd.progress import progress
from gacd.ranks import Ranks
from gacd.shapes import Images, Labels
from gacd.storage import fingerprint, is_number, read_json, write_json

_SLACK = 1e-6


def shared_out(
    batches: Sequence[tuple[int, Tensor]],
    compute: Callable[[int, Tensor], dict[str, Any]],
    *,
    folder: Path | None,
    ranks: Ranks,
    name: str,
    show_progress: bool,
) -> list[dict[str, Any]]:
    """`compute(number, rows)` of every batch, remembered in `folder`.

    Each rank computes and shows every ranks.size-th batch, then reads those of the others. One
    whose file is not there yet (a network's file system may lag) is computed again, to the same.
    """

    def value(number: int, rows: Tensor) -> dict[str, Any]:
        if folder is None:
            return compute(number, rows)
        path = folder / f"{number:05d}.json"
        if not path.exists():
            write_json(path, compute(number, rows))

        def bits(value: object) -> bool:
            return isinstance(value, str) and len(value) == len(rows) and set(value) <= {"0", "1"}

        shape = {"robust": bits, "seconds": is_number, "notes?": [str]}
        found: dict[str, Any] = read_json(path, shape)
        return found

    own, standing = {}, 0
    mine = batches[ranks.rank :: ranks.size]
    with progress(sum(len(rows) for _, rows in mine), name, enabled=show_progress) as bar:
        for number, rows in mine:
            own[number] = value(number, rows)
            standing += own[number]["robust"].count("1")
            bar.advance(len(rows), standing=standing)
    ranks.wait()
    return [own[number] if number in own else value(number, rows) for number, rows in batches]


def to_bits(outcomes: Bool[Tensor, " n"]) -> str:
    """Outcomes as a string of 0 and 1."""
    return "".join("01"[int(right)] for right in outcomes.tolist())


def from_bits(bits: str) -> Bool[Tensor, " n"]:
    """What `to_bits` wrote."""
    return torch.tensor([bit == "1" for bit in bits], dtype=torch.bool)


def chunks(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Numbered runs of at most `size` rows; none where there are no rows."""
    return enumerate(torch.split(rows, size) if len(rows) else ())


def batch_seed(*parts: object) -> int:
    """A seed below 2^63 that depends on every part and on nothing else."""
    return int(fingerprint(str(part) for part in parts), 16) >> 1


def is_right(model: nn.Module, x: Images, labels: Labels) -> Bool[Tensor, " B"]:
    """Whether the largest logit is the label's; never where a logit is not finite."""
    with torch.no_grad():
        logits = model(x)
    # argmax takes NaN for the largest, which would call a broken network right about its class.
    right: Tensor = (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
    return right


def assert_within(threat: ThreatModel, x_adv: Images, x: Images) -> None:
    """Raise RuntimeError where an attack left the eps ball or the [0, 1] box by more than 1e-6.

    A ball of radius above 1, as l_2 has them, is left by more than 1e-6 of its radius: float32
    holds no more digits.
    """
    order = torch.inf if threat.norm == "linf" else 2.0
    distance = torch.linalg.vector_norm((x_adv.double() - x).flatten(1), ord=order, dim=1)
    inside = bool((distance <= threat.eps + _SLACK * max(1.0, threat.eps)).all())
    if not (inside and bool(((x_adv >= -_SLACK) & (x_adv <= 1 + _SLACK)).all())):
        raise RuntimeError(
            f"an attack left its budget: {threat.norm} distance {distance.max():.3g} of "
            f"{threat.eps:.3g}, pixels {x_adv.min():.3g} to {x_adv.max():.3g}"
        )
