"""A cell of a study: a command with its settings, addressed by their content."""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gacd import config as c
from gacd.commands.rows import MODEL
from gacd.evaluation.record import without_paths
from gacd.report.records import RECORD
from gacd.storage import fingerprint

Config = c.Train | c.Distill | c.Finetune | c.Transfer | c.Analyze


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One command of `gacd`, and the cells whose models it starts from.

    `config` is complete but for its folder and for the checkpoints of its `parents`, which are
    named by what they are to it: teacher, source (of images for `transfer`), student (to fine-tune,
    or to freeze), or a row's name.
    """

    config: Config
    parents: Mapping[str, "Cell"] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """train, distill, finetune, transfer or analyze."""
        return type(self.config).__name__.lower()

    @property
    def method(self) -> str:
        """The method, in a word."""
        match self.config:
            case c.Distill(methods=[method]):
                return method
            case c.Train(method=method):
                return method
            case _:
                return self.command

    @property
    def row(self) -> Path:
        """The folder of its results, within the cell's own."""
        match self.config:
            case c.Finetune():
                return Path("finetuned")
            case c.Analyze():
                return Path()
            case _:
                return Path(self.method)

    @property
    def record(self) -> Path:
        """The file that says it is done, within the cell's folder."""
        return self.row / ("analysis.json" if self.command == "analyze" else RECORD)

    @property
    def model(self) -> Path:
        """The file of its model, within the cell's folder."""
        return self.row / MODEL

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides its result, but where it lies and on what it is computed."""
        settings = _plain(self.config)
        del settings["out"], settings["data"]["root"], settings["data"]["workers"]
        settings.get("evaluation", {}).pop("workers", None)
        fabric = settings["fabric"]
        settings["fabric"] = {key: fabric[key] for key in ("precision", "batch_norm")}
        parents = {name: parent.key for name, parent in self.parents.items()}
        return {"command": self.command, "settings": settings, "parents": parents}

    @functools.cached_property
    def key(self) -> str:
        """Its address: the hash of its identity.

        A setting at its default is left out, so that a setting that is new to the package does not
        change the address of what was run before. (Of precision it is what was the default then.)
        """
        defaults = _plain(type(self.config)())
        defaults["fabric"]["precision"] = "bf16-mixed"
        said = _differing(self.identity["settings"], defaults)
        return fingerprint([json.dumps({**self.identity, "settings": said}, sort_keys=True)])

    def resolved(self, folder: Path, parents: Mapping[str, Path], fabric: c.Fabric) -> Config:
        """The command's configuration, its files named: `parents` are the cells' folders."""
        files = {name: parents[name] / self.parents[name].model for name in self.parents}
        config = replace(self.config, out=folder, fabric=fabric)
        match config:
            case c.Distill():
                teacher = replace(config.teacher, checkpoint=files["teacher"])
                return replace(config, teacher=teacher, bank=parents["teacher"])
            case c.Finetune():
                return replace(config, checkpoint=files["student"], source=files["source"])
            case c.Transfer():
                return replace(config, checkpoint=files["student"])
            case c.Analyze():
                students = [f"{k}={v}" for k, v in files.items() if k != "teacher"]
                return replace(config, teacher=files["teacher"], students=students)
            case _:
                return config


def _plain(config: Config) -> dict[str, Any]:
    """The settings of a configuration as plain JSON."""
    plain: dict[str, Any] = without_paths(asdict(config))
    return plain


def _differing(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not at their default, nested as they were."""
    said: dict[str, Any] = {}
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _differing(value, default)
            if value:
                said[key] = value
        elif value != default:
            said[key] = value
    return said
