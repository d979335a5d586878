"""`gacd study list | run | status | report`."""

from collections import Counter
from dataclasses import replace

from gacd import config as c
from gacd.errors import UserError
from gacd.study import work
from gacd.study.grids import STUDIES
from gacd.study.status import status, table

_WHAT = {
    "table1": "students by method, first data set",
    "table2": "students by method, second data set",
    "table3": "the adversarially trained teachers",
    "table4": "frozen features on other data",
    "ablation": "reweighting by the teacher, on and off",
    "figure2": "the number of negatives k, and the temperature T",
    "figure3": "class correlations of teacher and student, natural images",
    "figure4": "class correlations of teacher and student, attacked images",
    "figure5": "features of two classes under attack, embedded",
    "rivals": "every method at equal compute",
}


def study(cfg: c.Study) -> None:
    """Do what `action` says. Raises UserError where `out` is the folder of a run."""
    if (cfg.out / "run.json").exists():
        raise UserError(f"{cfg.out} holds a run, no study: choose another --out")
    {"list": _list, "run": _run, "status": _status, "report": _report}[cfg.action](cfg)


def _list(cfg: c.Study) -> None:
    listed = work.chosen(replace(cfg, seeds=cfg.seeds[:1]))
    cells = Counter(entry.study for entry in listed)
    for name in cfg.studies or STUDIES:
        print(f"{name:<9} {cells[name]:>3} cells a seed  {_WHAT[name]}")
    different = work.distinct(listed)
    print(f"{len(different)} different cells a seed at scale {cfg.scale}, seeds {cfg.seeds}")


def _run(cfg: c.Study) -> None:
    work.run(cfg)
    _status(cfg)


def _status(cfg: c.Study) -> None:
    from rich.console import Console

    console, found = Console(), status(cfg)
    console.print(table(found, f"{cfg.out}, scale {cfg.scale}, seeds {cfg.seeds}"))
    for key, reason in found.reasons.items():
        print(f"failed {key}: {reason}")
    if found.hours:
        print(f"about {found.hours:.1f} h of one worker left")


def _report(cfg: c.Study) -> None:
    from gacd.study.report import write_study_report

    if not (cfg.out / "cells").is_dir():
        raise UserError(f"{cfg.out} holds no study: run one there first, or choose another --out")
    title = f"The paper's tables and figures at scale {cfg.scale}"
    results = work.results(cfg)
    if not any(result.record for result in results):
        raise UserError(
            f"{cfg.out} has no finished cell of this study: say the --scale, --seeds and settings "
            "that it was run with"
        )
    write_study_report(results, cfg.out, title=title, stand_ins=cfg.stand_ins, scale=cfg.scale)
    print(f"report: {cfg.out / 'report.html'}")
