"""Records: what was measured, on what, with which code. Plain JSON, free of private paths."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import torch

import gacd
from gacd.evaluation.outcomes import Evaluation
from gacd.processor import processor

_PACKAGES = (
    "torchvision",
    "lightning-fabric",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyautoattack",
)


def environment() -> dict[str, Any]:
    """Commit, versions, hardware and platform of this run; no host name and no path."""
    return {
        "gacd": gacd.__version__,
        **revision(),
        "python": platform.python_version(),
        "versions": {"torch": str(torch.__version__)} | {n: _version(n) for n in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def make_record(
    *,
    model: str,
    method: str,
    dataset: str,
    seed: int,
    config: Mapping[str, Any],
    evaluation: Evaluation,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One JSON-able record of one evaluated model.

    On its top level stand `model, method, dataset, seed, n`, each attack's accuracy in percent
    under the attack's name, and whatever `extra` adds; below, under `evaluation`, every accuracy
    with its interval and number of images. Paths are cut to their last component throughout.
    """
    table = evaluation.to_record()
    record = {
        "model": model,
        "method": method,
        "dataset": dataset,
        "seed": seed,
        "n": evaluation.n,
        **{name: row["accuracy"] for name, row in table.items()},
        **(extra or {}),
        "evaluation": table,
        "settings": dict(evaluation.settings),
        "seconds": dict(evaluation.seconds),
        "config": dict(config),
        "environment": environment(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {key: without_paths(value) for key, value in record.items()}


def without_paths(value: Any) -> Any:
    """`value` with every absolute, home or upward path cut to its last component, JSON-able."""
    if isinstance(value, Mapping):
        return {str(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [without_paths(item) for item in value]
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, str):
        return _last_component(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return _last_component(str(value))


def _last_component(text: str) -> str:
    if re.match(r"[A-Za-z]:[\\/]", text):
        return PureWindowsPath(text).name
    if text.startswith("file:"):
        return PurePosixPath(text).name
    if re.match(r"[/~\\]|\.\.", text):
        return PurePosixPath(text.replace("\\", "/")).name
    return re.sub(r"(?<=[\s=:'\"(\[])[~/](?!/)(?:[^\s/]*/)+", "", text)


@cache
def revision(folder: Path = Path(gacd.__file__).parent) -> dict[str, Any]:
    """Commit of the tree that holds this package, and whether it was changed since.

    As they are when a process asks first, which a run does as it begins: the tree may be another
    when its record is written. Both are None for an installed package, also where it is installed
    inside somebody's repository.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
