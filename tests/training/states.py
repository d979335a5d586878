"""The state of a method, and what a stage leaves, kept and compared."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gacd.methods import Method
from gacd.storage import load_tensors, read_json_lines


def weights(method: Method) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in method.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def left(out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Everything a stage leaves, without the seconds it took."""
    rows = [{**row, "seconds": 0} for row in read_json_lines(out / "log.jsonl")]
    return *load_tensors(out / "best.safetensors"), rows  # type: ignore[return-value]


def assert_same(a: Path, b: Path) -> None:
    (weights, *rest), (others, *other_rest) = left(a), left(b)
    assert rest == other_rest
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name
