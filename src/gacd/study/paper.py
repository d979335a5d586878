"""The paper's numbers, transcribed once in `paper.json`, with what is inconsistent in them."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from gacd.errors import unknown
from gacd.report.tables import signed

_ARCHITECTURES = {
    "resnet18": "ResNet-18",
    "resnet32": "ResNet-32",
    "resnet56": "ResNet-56",
    "mobilenetv2": "MobileNetV2",
}
_DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of a published table: accuracies in percent by metric."""

    method: str
    dataset: str
    accuracies: Mapping[str, float]
    teacher: str | None = None
    student: str | None = None


@functools.cache
def paper() -> dict[str, Any]:
    """The whole file."""
    text = files("gacd.study").joinpath("paper.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def published(table: str) -> list[Published]:
    """The rows of one table: table1 to table4, ablation (its methods are `method, weighting`).

    A method's rows follow the columns' order.
    """
    tables = paper()["tables"]
    if table not in tables:
        raise unknown("table of the paper", table, tables)
    data = tables[table]
    return [
        Published(
            method=method,
            accuracies=dict(zip(data["metrics"], pair, strict=True)),
            **dict(zip(data["by"], column, strict=True)),
        )
        for method, row in data["rows"].items()
        for column, pair in zip(data["columns"], row, strict=True)
    ]


def accuracies(table: str, method: str, **where: str) -> Mapping[str, float]:
    """The accuracies of one row, empty where the paper has none.

    `where`: dataset, teacher, student, in the names of `architecture_key`.
    """
    for row in published(table):
        if row.method == method and all(getattr(row, key) == value for key, value in where.items()):
            return row.accuracies
    return {}


def written(row: Mapping[str, float], minus: Mapping[str, float] | None = None) -> str:
    """Natural/adversarial as the paper writes it, 82.73/52.75; with `minus` the differences."""
    if minus is None:
        return "/".join(f"{value:.2f}" for value in row.values())
    return "/".join(signed(value - minus[metric]) for metric, value in row.items())


def architecture_key(name: str) -> str:
    """The paper's architecture as this package calls it: wrn-34-10 for WideResNet-34-10."""
    key = re.sub(r"wideresnet|wide-resnet", "wrn", name.lower())
    return re.sub(r"^(resnet|mobilenet)[-_ ]?", r"\1", key)


def architecture_name(name: str) -> str:
    """As it is written in the paper: ResNet-18, WRN-34-10."""
    key = architecture_key(name)
    return _ARCHITECTURES.get(key, key.upper() if key.startswith("wrn") else name)


def dataset_name(name: str) -> str:
    """As it is written in the paper: CIFAR-10, STL-10."""
    return _DATASETS.get(name, name)


def method_name(name: str) -> str:
    """As it is written in papers: GACD+AFT, AdaAD, regression."""
    return name.upper().replace("ADAAD", "AdaAD").replace("REGRESSION", "regression")
