"""The paper's nine claims, each held, not held or not decided by the rule of `rule.py`."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from gacd.study.arms import pairs, student, sweep, teacher, transferred
from gacd.study.evidence import Evidence, Part, minus, missing, side, sides, weigh
from gacd.study.measure import Arm, contrast, scalar, select, trend
from gacd.study.paper import accuracies, written
from gacd.study.results import Results, StandIns
from gacd.study.rule import Verdict, together

NO_ROBUSTNESS = 10.0
"""Percent. C9's "almost no robustness", fixed beforehand: less than guessing among ten classes."""

_JUDGED = ("natural", "pgd20")
_BESIDE = "autoattack"
_STRONG = "wrn-34-10"
_QUOTED = {("resnet18", "resnet18"), ("resnet18", "wrn-34-10")}  # the pairs that C2 quotes
_TABLE = ("table1",)
_SOURCES = ("pgd-at (teacher)", "kd", "ard")  # that GACD is compared with in Table 4


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and what a study says to it."""

    claim: str
    text: str
    paper: str
    verdict: Verdict
    evidence: tuple[Evidence, ...]


def judge_claims(results: Results, stand_ins: StandIns | None = None) -> list[Claim]:
    """C1 to C9. `stand_ins` maps our architectures to the paper's, where smaller ones stand in."""
    return [_judge(stated, results, stand_ins or {}) for stated in _CLAIMS]


def claims_json(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """The claims as plain JSON."""
    return [asdict(claim) for claim in claims]


def _c1(results: Results, stand_ins: StandIns) -> Iterator[Part]:
    for pair in pairs(results, _TABLE, "gacd+aft", stand_ins):
        if pair.standing[0] == pair.standing[1]:
            ours = student(results, _TABLE, "gacd+aft", pair)
            yield from _both(ours, teacher(results, pair), str(pair))


def _c2(results: Results, stand_ins: StandIns) -> Iterator[Part]:
    found = pairs(results, _TABLE, "gacd+aft", stand_ins)
    for pair in [pair for pair in found if pair.standing in _QUOTED] or found:
        ours, theirs = (student(results, _TABLE, m, pair) for m in ("gacd+aft", "ard"))
        yield from _both(ours, theirs, str(pair))


def _reweighting(method: str) -> Callable[[Results, StandIns], Iterator[Part]]:
    def parts(results: Results, stand_ins: StandIns) -> Iterator[Part]:
        studies = ("ablation", "table1")
        for pair in pairs(results, studies[:1], method, stand_ins):
            ours, theirs = (
                student(results, studies, method, pair, reweight)
                for reweight in ("teacher", "none")
            )
            yield from _both(ours, theirs, str(pair))

    return parts


def _c5(results: Results, stand_ins: StandIns) -> Iterator[Part]:
    for dataset, arms in transferred(results).items():
        ours = arms.pop("gacd", Arm("GACD", ()))
        for source, theirs in arms.items():
            if source in (*_SOURCES, "pgd-at"):
                for metric in ("natural", "pgd7", _BESIDE):
                    judged = source in _SOURCES and metric != _BESIDE
                    yield minus(ours, theirs, metric, dataset, judged=judged)


def _c6(results: Results, stand_ins: StandIns) -> Iterator[Part]:
    arm = select(results, ("figure3", "figure4"), "the analysis", role="analysis")
    if not arm.results:
        return
    done = arm.done("correlations")
    n = min((int(r.record["n"]) for r in done.values() if r.record), default=0)
    for view in ("natural", "attacked"):
        metric = f"|Δ corr|, {view}"
        ard, gacd = (
            {s: r.record["correlations"][name][view]["mean"] for s, r in done.items() if r.record}
            for name in ("ard", "gacd")
        )
        yield Part(
            what="ARD − GACD",
            metric=metric,
            measured=scalar({s: ard[s] - gacd[s] for s in done}, n),
            arms=tuple(
                side(name, metric, scalar(values, n, (0.0, 2.0)), done)
                for name, values in (("ARD", ard), ("GACD", gacd))
            ),
            missing=missing([arm], "correlations"),
            unit="",
        )


def _c7(results: Results, stand_ins: StandIns) -> Iterator[Part]:
    arms = sweep(results, "negatives")
    for metric in (*_JUDGED, _BESIDE) if arms else ():
        yield Part(
            what="slope for each doubling of k",
            metric=metric,
            measured=trend({math.log2(k): arm for k, arm in arms.items()}, metric),
            arms=sides(list(arms.values()), metric, None),
            missing="fewer than two values of k were run",
            above=metric != "natural",
            judged=metric != _BESIDE,
        )


def _c8(results: Results, stand_ins: StandIns) -> Iterator[Part]:
    arms = sweep(results, "temperature")
    best = arms.pop(0.1, Arm("T = 0.1", ()))
    for arm in arms.values():
        yield from _both(best, arm)


def _c9(results: Results, stand_ins: StandIns) -> Iterator[Part]:
    for pair in pairs(results, _TABLE, "kd", stand_ins):
        if pair.standing[0] != _STRONG:
            continue
        kd = student(results, _TABLE, "kd", pair)
        yield minus(kd, teacher(results, pair), "natural", str(pair))
        for metric in ("pgd20", _BESIDE):
            found = contrast([(1.0, kd)], metric)
            yield Part(
                what="KD",
                where=str(pair),
                metric=metric,
                measured=found,
                arms=sides([kd], metric, found),
                missing=missing([kd], metric),
                above=False,
                bound=NO_ROBUSTNESS,
                unit="%",
                judged=metric != _BESIDE,
            )


def _both(a: Arm, b: Arm, where: str = "") -> Iterator[Part]:
    """Natural and PGD-20, on which the claim stands, and AutoAttack beside them."""
    for metric in (*_JUDGED, _BESIDE):
        yield minus(a, b, metric, where, judged=metric != _BESIDE)


class _Stated(NamedTuple):
    claim: str
    text: str
    paper: str
    parts: Callable[[Results, StandIns], Iterator[Part]]


_SAME = {"teacher": "resnet18", "student": "resnet18"}
_WIDE = {"teacher": "resnet18", "student": "wrn-34-10"}
_KD = {"teacher": "wrn-34-10", "student": "resnet18"}
_AFT, _ARD = (accuracies("table1", method, **_WIDE) for method in ("gacd+aft", "ard"))
_CLAIMS = (
    _Stated(
        "C1",
        "A GACD+AFT student of its teacher's architecture beats that teacher on both accuracies",
        f"{written(accuracies('table1', 'gacd+aft', **_SAME))} against "
        + written(accuracies("table3", "pgd-at", teacher="resnet18")),
        _c1,
    ),
    _Stated(
        "C2",
        "GACD+AFT beats ARD on both accuracies",
        written(
            accuracies("table1", "gacd+aft", **_SAME), minus=accuracies("table1", "ard", **_SAME)
        )
        + f" (ResNet-18), {written(_AFT, minus=_ARD)} (WRN)",
        _c2,
    ),
    _Stated(
        "C3",
        "Without reweighting GACD+AFT is worse",
        written(accuracies("ablation", "gacd+aft, none"), minus=_AFT),
        _reweighting("gacd+aft"),
    ),
    _Stated(
        "C4",
        "Reweighting helps ARD",
        written(accuracies("ablation", "ard, teacher"), minus=_ARD),
        _reweighting("ard"),
    ),
    _Stated("C5", "GACD features transfer best, natural and adversarial", "Table 4", _c5),
    _Stated(
        "C6",
        "GACD reproduces the teacher's class correlations better than ARD",
        "Figures 3 and 4",
        _c6,
    ),
    _Stated("C7", "Robustness grows with k, natural accuracy falls", "Figure 2a", _c7),
    _Stated("C8", "T = 0.1 is the best temperature of those tried", "Figure 2b", _c8),
    _Stated(
        "C9",
        "KD alone gives natural accuracy (above its teacher's) and almost no robustness (below "
        f"{NO_ROBUSTNESS:.0f} %) when the teacher is strong",
        f"{written(accuracies('table1', 'kd', **_KD))} (teacher "
        f"{written(accuracies('table3', 'pgd-at', teacher='wrn-34-10'))})",
        _c9,
    ),
)


def _judge(stated: _Stated, results: Results, stand_ins: StandIns) -> Claim:
    parts = list(stated.parts(results, stand_ins))
    judged = sum(part.judged for part in parts)
    evidence = tuple(weigh(part, judged if part.judged else 1) for part in parts)
    return Claim(
        claim=stated.claim,
        text=stated.text,
        paper=stated.paper,
        verdict=together([each.verdict for each in evidence if each.judged]),
        evidence=evidence,
    )
