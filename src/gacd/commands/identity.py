"""Whose a folder is: what makes a run this one, and what may differ when it goes on."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from gacd import config as c
from gacd.commands.rows import EARLIER, MODEL, TEACHER
from gacd.errors import UserError
from gacd.evaluation.record import without_paths
from gacd.methods import METHODS
from gacd.methods.registry import AFT
from gacd.report.records import RECORD, read_record
from gacd.storage import fingerprint, is_whole, read_json, write_json

Goal = Literal["model", "record", "report"]
"""How far a command goes: trained, also measured, also shown."""
FREE = (  # a run may be moved, go on elsewhere, and get further rows later
    "out", "bank", "methods", "data.root", "data.workers", "evaluation.workers",
    "fabric.accelerator", "fabric.devices", "fabric.num_nodes", "fabric.strategy", "fabric.threads",
    "fabric.compile", "teacher.evaluate",
)  # fmt: skip
_RUN = {
    "seed": is_whole,
    "data": dict,
    "methods?": [str],
    "extra?": {str: dict},
    "checkpoint?": str | None,
    "teacher?": {"checkpoint?": str | None},
    "fabric?": {"precision?": str},
}
STARTS = ("checkpoint", "source", "teacher.checkpoint")  # of a study's cell, its address knows


def claim(
    out: Path, cfg: c.Run, *, images: Mapping[str, str] | None = None, goal: Goal = "report"
) -> list[str]:
    """Make `out` this run's folder, or refuse the folder of another run.

    A run that has not begun its first stage may be replaced: its command may have been mistyped.
    So may the settings of methods and stages that have not begun; `run.json` grows by what is new.
    The data may lie elsewhere than before, but the fingerprints of their `images` must be the same.
    What a study's cell starts from may have been made anew, on a machine that rounds otherwise.
    Another evaluation is no other run, as no network depends on it (but another cell of a study):
    returned are the rows that it is to measure again.

    Raises:
        UserError: `out` holds a run with another configuration (the first difference is named), or
            files that are of no run.
    """
    path = out / "run.json"
    known = dict(images or {})
    ours = _identity(cfg) | known
    if not refuse_foreign(out, path.name):
        write_json(path, ours)
        return []
    theirs = read_run(path)
    # A setting that is newer than the run had its default there.
    defaults = _identity(type(cfg)())
    here, there = flat(ours), flat(defaults) | flat(theirs)
    there = known | there  # older runs did not note all of these
    rows = [folder.name for folder in out.iterdir() if folder.is_dir()]
    begun = used(rows, there)
    evaluation = *_evaluation(here), *_evaluation(there)
    idle = _idle(out, rows, there)
    free = FREE + (evaluation if goal == "report" else STARTS)
    free += tuple(key for key in {**here, **there} if key.partition(".")[0] in idle)
    key = differing(here, there, free, begun)
    if key is not None:
        raise UserError(
            f"{out} holds another run ({key} is {there.get(key)} there and {here.get(key)} here): "
            f"choose another --out{_reusable(out, cfg, key)}, or delete that folder"
        )
    grown = _grown(known | theirs, ours, begun) | {k: ours[k] for k in idle if k in ours}
    if goal == "report":
        grown["evaluation"] = ours["evaluation"]
    if grown != theirs:
        write_json(path, grown)
    return _set_aside(out, ours, defaults) if goal == "report" else []


def _idle(out: Path, rows: Sequence[str], there: Mapping[str, Any]) -> set[str]:
    """The settings of `distill` that none of the rows in this folder has used."""
    combined = any("+" in row.removesuffix(f"+{AFT}") for row in rows)
    idle = set()
    if any(row.endswith(f"+{AFT}") for row in rows):
        combined |= "+" in str(there.get("finetune_method"))
    else:
        idle |= {"finetune", "finetune_method"}
    stages = ("features", "distillation")
    if not any((out / row / stage).is_dir() for row in rows for stage in stages):
        idle.add("distillation")
    if not combined:
        idle.add("weights")
    return idle


def _set_aside(out: Path, ours: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Take rows that were measured by another evaluation out of the table; their names."""
    here, names = _evaluation(flat(ours)), []
    for path in sorted(out.glob(f"*/{RECORD}")):
        there = _evaluation(flat(defaults) | flat(read_record(path)["config"]))
        if differing(here, there, FREE, ()) is not None:
            path.replace(path.with_name(EARLIER))
            names.append(path.parent.name)
    return names


def _evaluation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of flat settings, those of how models are measured."""
    return {k: v for k, v in settings.items() if k.partition(".")[0] == "evaluation"}


def read_run(
    path: Path, remedy: str = "choose another --out, or delete that folder"
) -> dict[str, Any]:
    """The settings of a run, of which `path` is its `run.json`.

    Raises UserError where it is damaged. Deleted, it would leave a folder that no run may go on in.
    """
    try:
        settings: dict[str, Any] = read_json(path, _RUN)
    except UserError:
        raise UserError(
            f"{path} is damaged, so whose run this is cannot be told: {remedy}"
        ) from None
    return settings


def begun_in(out: Path) -> c.Precision | None:
    """The precision of the run in a folder, if there is one."""
    path = out / "run.json"
    said = read_run(path).get("fabric", {}).get("precision") if path.is_file() else None
    return next((known for known in get_args(c.Precision) if known == said), None)


def _grown(theirs: dict[str, Any], ours: dict[str, Any], begun: Container[str]) -> dict[str, Any]:
    """A run's settings with ours of the methods that have not begun, and ours added to its rows."""
    grown = theirs | {name: ours[name] for name in METHODS if name in ours and name not in begun}
    if "methods" in theirs:
        grown["methods"] = list(dict.fromkeys([*theirs["methods"], *ours["methods"]]))
        kept = {k: v for k, v in theirs.get("extra", {}).items() if k in begun}
        grown["extra"] = ours["extra"] | kept
    return grown


def refuse_missing(paths: Iterable[Path | None]) -> None:
    """Refuse a file that is not there, before anything is read or compared."""
    for path in paths:
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file")


def differing(
    here: Mapping[str, Any],
    there: Mapping[str, Any],
    free: Container[str],
    terms: Container[str],
) -> str | None:
    """The first setting that is not the same in both.

    Not compared are those that are free to differ, and those of methods that are not among `terms`.
    """
    for key in {**here, **there}:
        method = key.removeprefix("extra.").partition(".")[0]
        if key in free or (method in METHODS and method not in terms):
            continue
        ours, theirs = here.get(key), there.get(key)
        if key in STARTS:
            ours, theirs = content(ours), content(theirs)
        if ours != theirs and _number(ours) != _number(theirs):
            return key
    return None


def used(rows: Iterable[str], settings: Mapping[str, Any]) -> set[str]:
    """The terms of methods that rows of these names went through, by a run's flat settings."""
    others = (str(settings.get(key, "")) for key in ("teacher.method", "finetune_method"))
    return {term for name in (*rows, *others) for term in name.split("+")}


def _number(value: object) -> object:
    """`8/255` and its decimals are one budget."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    with suppress(ValueError):
        return c.fraction(value) if isinstance(value, str) else value
    return value


def _reusable(out: Path, cfg: c.Run, differs: str) -> str:
    """How to start from the teacher of a run that differs in nothing that made it."""
    teacher = out / TEACHER / MODEL
    if not isinstance(cfg, c.Distill) or cfg.teacher.checkpoint or not teacher.is_file():
        return ""
    made_of = ("teacher", "data", "images", "val_images", "threat", "seed", "fabric")
    return "" if differs.partition(".")[0] in made_of else f" (--teacher.checkpoint {teacher})"


def refuse_foreign(out: Path, own: str) -> bool:
    """Refuse a folder with files but without the file `own`; whether there are more than that."""
    # Hidden files are the system's, or what a killed process left of one that it was writing.
    names = {file.name for file in out.iterdir()} if out.is_dir() else set()
    names = {name for name in names if not name.startswith(".")}
    if names and own not in names:
        raise UserError(f"{out} holds files of something else (no {own}): choose another --out")
    return len(names) > 1


def _identity(cfg: c.Run) -> dict[str, Any]:
    """What makes a run this one: its settings, and of a checkpoint the content."""
    values: dict[str, Any] = asdict(cfg)
    parts = (values, "checkpoint"), (values, "source"), (values.get("teacher", {}), "checkpoint")
    for part, key in parts:
        path = part.get(key)
        if path is not None and path.is_file():
            part[key] = named_by_content(path)
    return {k: without_paths(v) for k, v in values.items()}


def named_by_content(path: Path) -> str:
    """A checkpoint as a run's identity knows it."""
    return f"{path.name} {fingerprint([path.read_bytes()])}"


def content(named: str | None) -> str | None:
    """Of a name by content what a file is, whatever it is called; of another name itself."""
    found = re.search(r" ([0-9a-f]+)$", str(named))
    return found[1] if found else named


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary, with dots in its keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
