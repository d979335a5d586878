"""Every claim on made-up studies in which it is true, false, or neither; and what is left out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student_t

from gacd.report.tables import heading, signed
from gacd.storage import read_json
from gacd.study import work
from gacd.study.claim_tables import evidence_tables, likeness_table
from gacd.study.claims import NO_ROBUSTNESS, Claim, claims_json, judge_claims
from made_up import STAND_INS, Maker, likeness, parsed, whole_study

RESULTS = Path(__file__).parents[2] / "results"
SMALL = ["--scale", "small", "--data.name", "folder", "--data.title", "CIFAR-10 (JPEG), 16x16"]

EVERY = [f"C{i}" for i in range(1, 10)]


def judged(results, stand_ins=STAND_INS) -> dict[str, Claim]:
    return {claim.claim: claim for claim in judge_claims(results, stand_ins)}


def verdicts(results, stand_ins=STAND_INS) -> dict[str, str]:
    return {name: claim.verdict for name, claim in judged(results, stand_ins).items()}


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    """A study in which every claim is true."""
    return whole_study(Maker(tmp_path_factory.mktemp("true")))


@pytest.mark.parametrize(("gain", "verdict"), [(-12.0, "not held"), (0.0, "not decided")])
def test_what_is_false_or_neither(tmp_path, gain, verdict):
    assert verdicts(whole_study(Maker(tmp_path), gain=gain)) == dict.fromkeys(EVERY, verdict)


def test_what_is_true_with_its_evidence(true):
    claims = judged(true)
    assert {name: claim.verdict for name, claim in claims.items()} == dict.fromkeys(EVERY, "held")
    keys = {result.key for result in true}
    for claim in claims.values():
        for part in claim.evidence:
            assert part.seeds == (0, 1, 2)
            assert part.n == 500
            assert part.low < part.estimate < part.high
            for side in part.arms:
                assert side.low < side.mean < side.high
                assert len(side.cells) == 3
                assert set(side.cells) <= keys


def test_the_json_is_a_list_of_claims(true):
    found = json.loads(json.dumps(claims_json(judge_claims(true, STAND_INS))))
    assert [claim["claim"] for claim in found] == EVERY
    assert all({"claim", "verdict", "evidence"} <= claim.keys() for claim in found)


def test_one_seed_decides_nothing(true):
    claims = judged([result for result in true if result.seed == 0])
    assert {claim.verdict for claim in claims.values()} == {"not decided"}
    assert all("one seed" in p.basis for c in claims.values() for p in c.evidence)


def test_estimates_are_the_differences_of_the_records(true):
    part = judged(true)["C2"].evidence[1]
    ours, theirs = (side.mean for side in part.arms)
    assert part.metric == "pgd20"
    assert part.estimate == pytest.approx(ours - theirs)
    assert part.estimate == pytest.approx(12.0, abs=0.3)
    slope = judged(true)["C7"].evidence[1]
    assert slope.estimate == pytest.approx(3.0 / 2, abs=0.05)  # 3 points for each fourfold k


def test_pairing_by_image_makes_intervals_narrower(true, tmp_path):
    """Without the outcomes' files the images cannot be paired, and that is said."""
    blind = [dataclasses.replace(result, folder=tmp_path) for result in true]
    paired, unpaired = (judged(results)["C2"].evidence[0] for results in (true, blind))
    assert paired.estimate == pytest.approx(unpaired.estimate)
    assert unpaired.high - unpaired.low > 1.2 * (paired.high - paired.low)
    assert paired.basis == "seeds and images"
    assert unpaired.basis == "seeds and images, the images unpaired"


def test_autoattack_is_reported_beside_and_does_not_judge(true):
    beside = [
        dataclasses.replace(result, record={**result.record, "autoattack": None})
        if result.study == "table1"
        else result
        for result in true
    ]
    part = judged(beside)["C2"].evidence[2]
    assert part.metric == "autoattack"
    assert not part.judged
    assert part.estimate is None
    assert part.basis == "; ".join(
        f"{name} not measured under AutoAttack" for name in ("GACD+AFT", "ARD")
    )
    assert verdicts(beside)["C2"] == "held"
    claims = judged(true)
    assert claims["C2"].evidence[2].verdict == "held"
    parts = [part for claim in claims.values() for part in claim.evidence]
    assert not any(part.judged for part in parts if part.metric == "autoattack")


def test_c1_is_judged_where_the_architectures_are_the_same(true):
    assert {part.where for part in judged(true)["C1"].evidence} == {
        "wrn-10-1 → wrn-10-1",
        "wrn-10-2 → wrn-10-2",
    }
    same = {"wrn-10-1": "ResNet-18", "wrn-10-2": "ResNet-18"}
    assert len(judged(true, same)["C1"].evidence) == 4 * 3


def test_c2_is_judged_on_the_pairs_whose_figures_the_paper_quotes(true):
    where = {part.where for part in judged(true)["C2"].evidence}
    assert where == {"wrn-10-1 → wrn-10-1", "wrn-10-1 → wrn-10-2"}
    assert len(judged(true, {})["C2"].evidence) == 4 * 3  # none of the paper's: every pair


def test_c5_is_judged_against_the_papers_sources(true, tmp_path):
    """A student trained without a teacher is none of them: it stands beside, and may be better."""
    cell, better = Maker(tmp_path), {"natural": 90.0, "pgd7": 80.0, "autoattack": 70.0}
    labels = {"role": "transfer", "method": "transfer", "source": "pgd-at", "dataset": "animals"}
    claim = judged([*true, *(cell("table4", seed, better, **labels) for seed in range(3))])["C5"]
    beside = [part for part in claim.evidence if "no teacher" in part.what]
    assert len(beside) == 3 and not any(part.judged for part in beside)
    assert {part.verdict for part in beside} == {"not held"}
    assert claim.verdict == "held"


def test_c6_is_judged_over_seeds_alone(true):
    part = judged(true)["C6"].evidence[0]
    assert part.estimate == pytest.approx(0.12)
    assert part.basis == "seeds alone, on these test images"
    again = [
        dataclasses.replace(
            r,
            record={
                **r.record,
                "correlations": {"ard": likeness(0, 0), "gacd": likeness(0, r.seed)},
            },
        )
        if r.labels["role"] == "analysis"
        else r
        for r in true
    ]
    assert verdicts(again)["C6"] == "not decided"


def test_c8_needs_its_temperature(true):
    without = [r for r in true if r.labels.get("temperature") != 0.1]
    claim = judged(without)["C8"]
    assert claim.verdict == "not decided"
    assert {part.basis for part in claim.evidence} == {"no cell of T = 0.1"}


def test_c9_needs_a_strong_teacher(true):
    claim = judged(true, {"wrn-10-1": "ResNet-18"})["C9"]
    assert claim.verdict == "not decided"
    assert claim.evidence == ()
    assert NO_ROBUSTNESS == 10.0


def test_cells_that_wait_and_cells_that_are_not_planned_are_named(true):
    waiting = [
        dataclasses.replace(r, record=None) if r.labels.get("method") == "ard" else r for r in true
    ]
    claim = judged(waiting)["C2"]
    assert claim.verdict == "not decided"
    assert {part.basis for part in claim.evidence} == {"ARD not run yet"}
    planned = [r for r in true if r.labels.get("method") != "ard"]
    assert {part.basis for part in judged(planned)["C2"].evidence} == {"no cell of ARD"}


def test_no_result_at_all():
    assert verdicts([]) == dict.fromkeys(EVERY, "not decided")


@pytest.mark.parametrize(("name", "places"), [("C2", 1), ("C6", 3)])
def test_the_tables_of_a_claim_hold_its_figures(true, name, places):
    claim = judged(true)[name]
    parts, models = evidence_tables(claim)
    headings = [column.heading for column in models.columns]
    lines = {str(row[0]): dict(zip(headings, map(str, row), strict=True)) for row in models.rows}
    for row, each in zip(parts.rows, claim.evidence, strict=True):
        low, value, high = (signed(x, places) for x in (each.low, each.estimate, each.high))
        assert str(row[2]) == f"{value} [{low}, {high}]"
        assert row[4].text == each.verdict
        for side in each.arms:
            line = lines[f"{side.name} ({each.where})" if each.where else side.name]
            figures = [f"{x:.{places}f}" for x in (side.mean, side.low, side.high)]
            expected = "{} [{}, {}]".format(*figures)
            assert line[heading(side.metric)] == expected


def test_likeness_is_of_the_view_and_its_intervals_end_where_it_does():
    """A difference of correlations is at most 2, CKA at most 1; over two seeds, by Student's t."""
    figures = {0: (0.1, 0.7), 1: (0.3, 0.9)}
    records = [
        {
            "seed": seed,
            "correlations": {"gacd": {"natural": {"mean": 0.5}, "attacked": {"mean": differs}}},
            "cka": {"gacd": {"natural": 0.4, "attacked": cka}},
        }
        for seed, (differs, cka) in figures.items()
    ]
    (row,) = likeness_table(records, "attacked").rows
    half = student_t.ppf(0.975, 1) * 0.1  # the standard error of either mean
    assert 0.2 - half < 0 < 0.2 + half < 2 and 0.8 + half > 1
    assert [str(cell) for cell in row] == [
        "GACD", f"0.200 [0.000, {0.2 + half:.3f}]", "0.800 [0.000, 1.000]", "2",
    ]  # fmt: skip


def test_the_claims_of_our_records_are_those_published() -> None:
    cfg = parsed("report", *SMALL, "--seeds", *"012345", "--out", str(RESULTS / "small"))
    found = claims_json(judge_claims(work.results(cfg), cfg.stand_ins))
    published = leaves(read_json(RESULTS / "small" / "claims.json"))
    assert leaves(json.loads(json.dumps(found))) == pytest.approx(published)  # processors round


def leaves(tree: Any, at: str = "") -> dict[str, Any]:
    """What is no list and no mapping, by its place."""
    if not isinstance(tree, dict | list):
        return {at: tree}
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, Any] = {f"{at}/": len(tree)}
    for key, branch in inner:
        found |= leaves(branch, f"{at}/{key}")
    return found
