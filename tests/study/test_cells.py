"""The address of a cell: what finished cells are found by, today as when they were run."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gacd import config as c
from gacd.commands.identity import FREE, flat
from gacd.study import cells
from gacd.study.cells import Cell, Config
from gacd.study.work import chosen
from made_up import parsed

RESULTS = Path(__file__).parents[2] / "results"
SMALL = ["--scale", "small", "--data.name", "folder", "--data.title", "CIFAR-10 (JPEG), 16x16"]
DIGITS = ["rivals", "--scale", "tiny", "--seeds", *"01234", "--data.test_limit", "null"]


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ("small", SMALL),
        ("rivals-digits", [*DIGITS, "--evaluation.autoattack_limit", "100"]),
    ],
)
def test_our_records_are_found_by_the_command_that_made_them(study: str, words: list[str]) -> None:
    cfg = parsed("list", *words)
    recorded = {path.stem for path in (RESULTS / study / "cells").glob("*.json")}
    assert {entry.cell.key for entry in chosen(cfg)} <= recorded


@pytest.mark.parametrize("made", [c.Train, c.Distill, c.Finetune, c.Transfer, c.Analyze])
def test_only_what_may_differ_is_left_out_of_an_address(made: Callable[[], Config]) -> None:
    cell = Cell(config=made())
    left_out = flat(asdict(cell.config)).keys() - flat(cell.identity["settings"]).keys()
    places = {key for key in left_out if not key.startswith("fabric.")}
    assert places == flat(asdict(cell.config)).keys() & {
        "out", "data.root", "data.workers", "evaluation.workers",
    }  # fmt: skip
    assert left_out <= set(FREE)


def test_whom_a_cell_starts_from_counts_by_role_and_not_by_order() -> None:
    a, b = (Cell(config=c.Train(seed=seed)) for seed in (0, 1))

    def key(**parents: Cell) -> str:
        return Cell(config=c.Finetune(), parents=parents).key

    assert key(student=a, source=b) == key(source=b, student=a)
    assert len({key(student=a, source=b), key(student=b, source=a), key(student=a), key()}) == 4


def with_a_setting(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "new": "its default"}


def with_one_in_a_section(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "data": {**plain["data"], "new": 1}}


def with_a_section(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "new": {"deep": {"deeper": None}}}


def in_another_order(plain: dict[str, Any]) -> dict[str, Any]:
    return {
        key: in_another_order(value) if isinstance(value, dict) else value
        for key, value in reversed(plain.items())
    }


@pytest.mark.parametrize(
    "newer", [with_a_setting, with_one_in_a_section, with_a_section, in_another_order]
)
def test_a_newer_package_leaves_old_addresses_alone(
    newer: Callable[[dict[str, Any]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**changes: Any) -> str:
        return Cell(config=c.Train(data=c.Data(name="cifar10", size=16), **changes)).key

    before, plain = key(model="resnet18"), cells._plain
    monkeypatch.setattr(cells, "_plain", lambda config: newer(plain(config)))
    assert key(model="resnet18") == before != key(model="resnet34")
