"""Which cells of a study belong together: pairs of teacher and student, sweeps, transfers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gacd.study.measure import Arm, select
from gacd.study.paper import architecture_key, method_name
from gacd.study.results import Result

WEIGHTINGS = {
    "teacher": "reweighted",
    "none": "not reweighted",
    "normalised": "reweighted, of mean 1",
}
"""The arms of the ablation, and what its rows call them."""


NO_TEACHER, UNDEFENDED = "no teacher", "undefended"
"""What the student by itself is called, trained adversarially and not."""


class Pair(NamedTuple):
    """A teacher and a student, by their architectures, on a data set."""

    teacher: str
    student: str
    dataset: str | None
    standing: tuple[str, str]
    """The paper's architectures that the two are, or stand for."""

    def __str__(self) -> str:
        return f"{self.teacher} → {self.student}"


def pairs(
    results: Sequence[Result],
    studies: Sequence[str],
    method: str | None,
    stand_ins: Mapping[str, str],
) -> list[Pair]:
    """The pairs that these studies distil, by this method or by any, in their order."""

    def standing(name: str) -> str:
        return architecture_key(stand_ins.get(name, name))

    keys = dict.fromkeys(
        (str(label["teacher"]), str(label["student"]), label.get("dataset"))
        for label in (r.labels for r in results if r.study in studies)
        if label["role"] == "student" and method in (None, label["method"])
    )
    return [Pair(t, s, dataset, (standing(t), standing(s))) for t, s, dataset in keys]


def student(
    results: Sequence[Result],
    studies: Sequence[str],
    method: str,
    pair: Pair,
    reweight: str | None = None,
) -> Arm:
    """Its cells. One that does not say how it is weighted has the default: GACD by the teacher."""
    default = default_weighting(method)
    return select(
        results,
        studies,
        method_name(method) if reweight is None else WEIGHTINGS[reweight],
        role="student",
        method=method,
        teacher=pair.teacher,
        student=pair.student,
        dataset=pair.dataset,
        reweight=(default, None) if reweight in (None, default) else reweight,
    )


def alone(results: Sequence[Result], pair: Pair, method: str = "pgd-at") -> Arm:
    """The same student trained without a teacher, in whichever of these studies comes first."""
    studies = list(dict.fromkeys(result.study for result in results))
    return select(
        results,
        studies,
        student_name(method),
        role=("baseline", "undefended"),
        method=method,
        student=pair.student,
        dataset=pair.dataset,
    )


def student_name(method: str) -> str:
    """What the student of a method is called in a table."""
    alone = {"natural": UNDEFENDED, "pgd-at": NO_TEACHER}
    return alone.get(method, method_name(method))


def default_weighting(method: str) -> str:
    """How a method weights its samples if nothing is said."""
    return "teacher" if method.startswith("gacd") else "none"


def teacher(results: Sequence[Result], pair: Pair) -> Arm:
    """The teacher of a pair."""
    return select(
        results,
        ("table1", "table3", "table2", "rivals"),
        "teacher",
        role="teacher",
        teacher=pair.teacher,
        dataset=pair.dataset,
    )


def transferred(results: Sequence[Result]) -> dict[str, dict[str, Arm]]:
    """Table 4's arms by data set and source."""
    cells = [r.labels for r in results if r.study == "table4" and r.labels["role"] == "transfer"]
    arms: dict[str, dict[str, Arm]] = {}
    for label in cells:
        source, dataset = label["source"], label.get("dataset")
        arms.setdefault(str(dataset), {})[source] = select(
            results,
            ("table4",),
            "teacher" if "teacher" in source else student_name(source),
            role="transfer",
            source=source,
            dataset=dataset,
        )
    return arms


SWEPT = {"negatives": ("k", "temperature"), "temperature": ("T", "negatives")}
"""What Figure 2 varies: its letter, and which label stays."""


def sweep(results: Sequence[Result], label: str) -> dict[float, Arm]:
    """Figure 2's cells by the value of one label (negatives, temperature), ascending.

    The other label is held at its commonest value. The seeds are those that every value has which
    has any, so that no value differs by its seeds.
    """
    sign, other = SWEPT[label]
    cells = [r for r in results if r.study == "figure2" and r.labels.get(label) is not None]
    held: Any = Counter(r.labels.get(other) for r in cells).most_common(1)
    kept = [r for r in cells if held[0][0] in (None, r.labels.get(other))]
    arms = {
        float(value): select(kept, ("figure2",), f"{sign} = {value:g}", **{label: value})
        for value in sorted({r.labels[label] for r in kept})
    }
    done = [{r.seed for r in arm.results if r.record} for arm in arms.values()]
    common = set.intersection(*(seeds for seeds in done if seeds)) if any(done) else set()
    kept_of = {
        value: tuple(r for r in arm.results if r.seed in common or not r.record)
        for value, arm in arms.items()
    }
    return {value: replace(arm, results=kept_of[value]) for value, arm in arms.items()}
