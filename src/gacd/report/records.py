"""What a run leaves to be reported on, read and checked: nothing that is damaged is drawn."""

import base64
import math
from pathlib import Path
from typing import Any

from gacd.storage import (
    are_numbers,
    check_json,
    is_count,
    is_number,
    is_percent,
    is_whole,
    read_json,
    read_json_lines,
)

RECORD = "record.json"
"""What a row's record is called."""
ENVIRONMENT = {
    **dict.fromkeys(("gacd", "python", "platform"), str),
    **dict.fromkeys(("cpu", "cores", "threads"), object),
    "commit": str | None,
    "dirty": bool | None,
    "versions": dict,
    "gpus": list,
}
_RECORD = {
    "model": str,
    "method": str,
    "dataset": str,
    "seed": is_whole,
    "n": is_count,
    "role?": str | None,
    "parameters": is_whole,
    "train_seconds?": is_number,
    "train_flops?": is_number,
    "unlabelled?": is_whole,
    "answered_alike?": is_percent,
    "natural": is_percent,
    "evaluation": {str: dict},
    "intervals": {"natural": list, str: lambda value: are_numbers(value, 2)},
    "eps_curve?": [lambda value: are_numbers(value, 4)],
    "settings": {"norm": lambda value: value in ("linf", "l2"), "eps": is_number},
    "config": {"seed": is_whole, "threat": {"eps": object}},
    "timestamp": str,
    "environment": ENVIRONMENT,
    "cost?": {
        **dict.fromkeys(("student_forward", "student_backward"), is_number),
        **dict.fromkeys(("teacher_forward", "teacher_backward", "flops"), is_number),
    },
}
_BESIDE = "delete it and the record.json beside it, and run again"
"""What an evaluation writes with its record it writes again where that is gone."""
_EXAMPLES = {
    "shape": lambda value: _pictures(value),
    "truth": [str],
    "answers": {"clean": [str], "attacked": [str]},
}
_CHECKS = [
    {
        "name": str,
        "passed": bool,
        "value": is_number,
        "limit": is_number,
        "text": str,
        "n?": is_count,
    }
]


def read_record(path: Path) -> dict[str, Any]:
    """A record of an evaluated model. Raises UserError for any other file."""
    record: dict[str, Any] = read_json(path, _RECORD)
    for attack in record["evaluation"] | record["intervals"]:
        check_json(path, record, {f"{attack}?": is_percent, f"{attack}_n?": is_count})
    return record


def read_examples(path: Path) -> dict[str, Any]:
    """Test images under attack, as `attacked_examples` made them. Raises as `read_record`."""
    found: dict[str, Any] = read_json(path, _EXAMPLES, remedy=_BESIDE)
    n, size = found["shape"][0], math.prod(found["shape"])
    shape = {
        "truth": lambda value: len(value) == n,
        "answers": {str: lambda value: len(value) == n},
        **dict.fromkeys(("clean", "attacked"), lambda value: _bytes(value) == size),
    }
    check_json(path, found, shape, _BESIDE)
    return found


def read_checks(path: Path) -> list[dict[str, Any]]:
    """A diagnosis for masked gradients. Raises as `read_record`."""
    found: list[dict[str, Any]] = read_json(path, _CHECKS, remedy=_BESIDE)
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The epochs of a stage. Of one that was logged twice, after a kill, the later row counts."""
    rows = read_json_lines(path, {"epoch": is_whole, str: int | float | None})
    by_epoch = {row["epoch"]: row for row in rows}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _pictures(value: Any) -> bool:
    """The shape of pictures: [n, H, W, C]."""
    return are_numbers(value, 4) and all(map(is_count, value)) and value[-1] in (1, 3)


def _bytes(value: Any) -> int | None:
    try:
        return len(base64.b64decode(value))
    except (TypeError, ValueError):
        return None
