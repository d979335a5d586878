"""The studies as grids: for every table and figure, its cells and what tells them apart."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gacd import config as c
from gacd.errors import UserError
from gacd.methods.registry import parse_method
from gacd.study.arms import WEIGHTINGS
from gacd.study.cells import Cell

Labels = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell's place in a study."""

    study: str
    labels: Labels
    seed: int
    cell: Cell


_AFT, AWP = "+aft", "+awp"
_AWP_SIZE = 0.005  # as published with TRADES
_TABLE_METHODS = ("natural", "pgd-at", "kd", "ard", "gacd", "gacd+aft")


class Nets:
    """The cells of one data set and seed: a teacher, and its students by every method."""

    def __init__(self, cfg: c.Study, data: c.Data, seed: int) -> None:
        self.cfg, self.data, self.seed = cfg, data, seed

    def teacher(self, architecture: str) -> Cell:
        """The adversarially trained teacher."""
        return self._alone(architecture, "pgd-at", self.cfg.teacher)

    def student(self, teacher: str, student: str, method: str, **options: Any) -> Cell:
        """The student of a method; `options` change settings of that method's first section."""
        named = parse_method(method.removesuffix(AWP))
        if not named.needs_teacher:
            return self._alone(student, method, self._training(method, self.cfg.training))
        if named.aft:
            # A head fitted afterwards makes the first stage a row of its own, which is shared.
            start = named.name if named.trains_head else method.removesuffix(_AFT)
            begun = self._distilled(teacher, student, start, method, options)
            tuned = c.Finetune(**self._shared(), method="pgd-at", training=self.cfg.finetune)
            return Cell(config=tuned, parents={"student": begun, "source": self.teacher(teacher)})
        return self._distilled(teacher, student, method, method, options)

    def _distilled(
        self, teacher: str, student: str, method: str, row: str, options: Mapping[str, Any]
    ) -> Cell:
        """The student as distillation leaves it, trained for as long as the row allows."""
        named = parse_method(method)
        whole = named.trains_head and row == method
        stage = "training" if whole else "distillation"
        training = self._training(row, getattr(self.cfg, stage))
        if not whole and named.trains_head:
            stage = "training"  # of the start, which by itself is a method in one stage
        given = {"gacd": self.cfg.gacd, "crd": self.cfg.crd}
        sections: dict[str, Any] = {k: v for k, v in given.items() if k in method.split("+")}
        if not named.trains_head:
            sections["linear_select"] = self.cfg.linear_select
        if options:
            first = method.partition("+")[0]
            sections[first] = replace(sections.get(first) or getattr(c.Distill(), first), **options)
        config = c.Distill(
            **self._shared(),
            teacher=c.Teacher(evaluate=False),
            student=student,
            methods=[method],
            **{stage: training, **sections},
        )
        return Cell(config=config, parents={"teacher": self.teacher(teacher)})

    def transferred(self, source: Cell, data: c.Data) -> Cell:
        """A finished network's features on other data."""
        beside = [name for name in self.cfg.evaluation.attacks if name == "autoattack"]
        evaluation = replace(self.cfg.evaluation, attacks=["natural", "pgd7", *beside])
        shared = {**self._shared(), "data": data, "evaluation": evaluation}
        config = c.Transfer(**shared, linear_select=self.cfg.linear_select)
        return Cell(config=config, parents={"student": source})

    def analyzed(self, teacher: Cell, students: Mapping[str, Cell]) -> Cell:
        """Networks compared with their teacher: correlations, features of two classes."""
        config = c.Analyze(
            seed=self.seed, data=self.data, threat=self.cfg.threat, fabric=self.cfg.fabric,
            classes=list(self.cfg.analyzed_classes), images=self.cfg.analyzed_images,
        )  # fmt: skip
        return Cell(config=config, parents={"teacher": teacher, **students})

    def _alone(self, net: str, row: str, training: c.Training) -> Cell:
        method = row.removesuffix(AWP)
        if row.endswith(AWP):
            training = replace(training, awp=_AWP_SIZE)
        if not parse_method(method).attacks:  # as every command does; recorded addresses say it
            training = replace(training, select="natural")
        return Cell(config=c.Train(**self._shared(), model=net, method=method, training=training))

    def _training(self, row: str, stage: c.Training) -> c.Training:
        """The stage, for the number of epochs that the row's budget of compute allows."""
        return replace(stage, epochs=self.cfg.epochs.get(row, stage.epochs))

    def _shared(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "data": self.data, "threat": self.cfg.threat,
            "evaluation": self.cfg.evaluation, "fabric": self.cfg.fabric,
        }  # fmt: skip


def entries(cfg: c.Study, study: str, seed: int) -> Iterator[Entry]:
    """The cells of a study for one seed, those that others start from first."""
    for labels, cell in STUDIES[study](cfg, seed):
        yield Entry(study=study, labels=labels, seed=seed, cell=cell)


Cells = Iterator[tuple[dict[str, Any], Cell]]


def _table(cfg: c.Study, data: c.Data, pairs: list[list[str]], seed: int, dataset: str) -> Cells:
    nets = Nets(cfg, data, seed)
    for teacher, student in pairs:
        yield _teacher(nets, teacher, dataset)
        for method in _TABLE_METHODS:
            yield (
                _labels(teacher, student, method, dataset),
                nets.student(teacher, student, method),
            )


def _teacher(nets: Nets, name: str, dataset: str) -> tuple[dict[str, Any], Cell]:
    labels = {"role": "teacher", "method": "pgd-at", "teacher": name, "dataset": dataset}
    return labels, nets.teacher(name)


def _labels(teacher: str, student: str, method: str, dataset: str, **more: Any) -> dict[str, Any]:
    alone = not parse_method(method.removesuffix(AWP)).needs_teacher
    role = "undefended" if method == "natural" else "baseline" if alone else "student"
    return {
        "role": role, "method": method, "teacher": teacher,
        "student": student, "dataset": dataset, **more,
    }  # fmt: skip


def _second(cfg: c.Study) -> c.Data | None:
    return None if cfg.second_data is None else c.other_data(cfg.data, cfg.second_data)


def _table1(cfg: c.Study, seed: int) -> Cells:
    yield from _table(cfg, cfg.data, cfg.table1_pairs, seed, "cifar10")


def _table2(cfg: c.Study, seed: int) -> Cells:
    if (data := _second(cfg)) is not None:
        yield from _table(cfg, data, cfg.table2_pairs, seed, "cifar100")


def _table3(cfg: c.Study, seed: int) -> Cells:
    sets = [(cfg.data, cfg.table1_pairs, "cifar10")]
    if (second := _second(cfg)) is not None:
        sets.append((second, cfg.table2_pairs, "cifar100"))
    for data, pairs, dataset in sets:
        for teacher in dict.fromkeys(teacher for teacher, _ in pairs):
            yield _teacher(Nets(cfg, data, seed), teacher, dataset)


def _table4(cfg: c.Study, seed: int) -> Cells:
    teacher, student = cfg.main_pair
    nets = Nets(cfg, replace(cfg.data, classes=cfg.transfer_classes), seed)
    sources = {"pgd-at (teacher)": nets.teacher(teacher)} | {
        method: nets.student(teacher, student, method)
        for method in ("pgd-at", "kd", "ard", "gacd", "gacd+aft")
    }
    for target in (c.other_data(cfg.data, other) for other in cfg.transfer_to):
        for name, cell in sources.items():
            labels = {
                "role": "transfer", "source": name, "teacher": teacher, "student": student,
                "dataset": target.title or target.name,
            }  # fmt: skip
            yield labels, nets.transferred(cell, target)


def _ablation(cfg: c.Study, seed: int) -> Cells:
    nets, (teacher, student) = Nets(cfg, cfg.data, seed), cfg.main_pair
    for reweight in WEIGHTINGS:
        for method in ("gacd+aft", "ard"):
            labels = _labels(teacher, student, method, "cifar10", reweight=reweight)
            yield labels, nets.student(teacher, student, method, reweight=reweight)
    yield (
        _labels(teacher, student, "pgd-at", "cifar10"),
        nets.student(teacher, student, "pgd-at"),
    )


def _figure2(cfg: c.Study, seed: int) -> Cells:
    nets, (teacher, student) = Nets(cfg, cfg.data, seed), cfg.main_pair
    method = "gacd+aft"
    grids = (("negatives", cfg.negatives), ("temperature", cfg.temperatures))
    for what, values in grids:
        for value in values:
            both = {"negatives": cfg.gacd.negatives, "temperature": cfg.gacd.temperature}
            labels = _labels(teacher, student, method, "cifar10", **{**both, what: value})
            yield labels, nets.student(teacher, student, method, **{what: value})


def _correlations(cfg: c.Study, seed: int) -> Cells:
    if not cfg.correlations_pair:
        raise UserError("correlations_pair is empty: name a teacher and a student")
    teacher, student = cfg.correlations_pair
    second = _second(cfg) if cfg.correlations_pair in cfg.table2_pairs else None
    data, dataset = (cfg.data, "cifar10") if second is None else (second, "cifar100")
    yield from _analysis(cfg, data, teacher, student, seed, dataset)


def _figure5(cfg: c.Study, seed: int) -> Cells:
    teacher, student = cfg.main_pair
    yield from _analysis(cfg, cfg.data, teacher, student, seed, "cifar10")


def _analysis(
    cfg: c.Study, data: c.Data, teacher: str, student: str, seed: int, dataset: str
) -> Cells:
    nets = Nets(cfg, data, seed)
    methods = ("natural", "pgd-at", "ard", "gacd", "gacd+aft")
    students = {method: nets.student(teacher, student, method) for method in methods}
    labels = {"role": "analysis", "teacher": teacher, "student": student, "dataset": dataset}
    yield labels, nets.analyzed(nets.teacher(teacher), students)


def _rivals(cfg: c.Study, seed: int) -> Cells:
    nets, (teacher, student) = Nets(cfg, cfg.data, seed), cfg.main_pair
    yield _teacher(nets, teacher, "cifar10")
    for method in cfg.rivals:
        yield (
            _labels(teacher, student, method, "cifar10"),
            nets.student(teacher, student, method),
        )


STUDIES: dict[str, Callable[[c.Study, int], Cells]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "ablation": _ablation,
    "figure2": _figure2,
    "figure3": _correlations,
    "figure4": _correlations,
    "figure5": _figure5,
    "rivals": _rivals,
}
"""Every study by its name."""
