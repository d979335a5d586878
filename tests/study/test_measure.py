"""Means over seeds and images, on made-up outcomes, against sums written out."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from gacd.evaluation.outcomes import Evaluation
from gacd.evaluation.statistics import binomial_interval
from gacd.study.evidence import Part, weigh
from gacd.study.measure import Arm, Measured, contrast, select, trend
from gacd.study.results import Result
from gacd.study.rows import row_table
from gacd.study.rule import HELD, NOT_DECIDED, NOT_HELD, Variance, over_images
from made_up import Maker


def met(result: Result, rows: list[int], right: list[int], images: str | None = "0123") -> Result:
    """The same cell, whose AutoAttack met these images and left those right."""
    index, settings = torch.tensor(rows), {"test_images": images}
    robust = torch.isin(index, torch.tensor(right))
    found = Evaluation(500, {"autoattack": robust}, {"autoattack": index}, settings)
    found.save(result.folder / "outcomes.safetensors")
    record = {**(result.record or {}), "autoattack": found.accuracy("autoattack"), "n": 500}
    return dataclasses.replace(result, record={**record, "autoattack_n": len(rows)})


def two(maker: Maker, images: str = "0123") -> list[tuple[float, Arm]]:
    """One model minus another of two seeds, each on images of its own but for 2, 3, 4 and 6."""
    cells = [maker("t", seed, {"natural": 50.0}, method=m) for m in "ab" for seed in (0, 1)]
    a0, a1 = met(cells[0], [0, 2, 3, 4, 6], [0, 2, 3]), met(cells[1], [1, 2, 3, 4, 6], [2, 3, 4])
    b0 = met(cells[2], [2, 3, 4, 5, 6], [3, 5], images)
    b1 = met(cells[3], [2, 3, 4, 6, 7], [4, 7], images)
    return [(1.0, Arm("a", (a0, a1))), (-1.0, Arm("b", (b0, b1)))]


def test_models_are_compared_on_the_images_that_all_of_them_met(maker: Maker) -> None:
    found = contrast(two(maker), "autoattack")
    assert found is not None and found.n == 4 and found.basis == "seeds and images"
    a, b = np.array([[1, 1, 0, 0], [1, 1, 1, 0]]), np.array([[0, 1, 0, 0], [0, 0, 1, 0]])
    by_seed = 100 * (a - b).mean(1)
    assert found.mean == pytest.approx(by_seed.mean())
    images, seeds = found.variances
    six = np.array([*(a - b).mean(0), -1, 1])  # Bonett and Price
    assert images == pytest.approx((1e4 * six.var(ddof=1) / 6, 5))
    assert seeds == pytest.approx((by_seed.var(ddof=1) / 2, 1))


def test_other_test_sets_are_not_paired_and_the_fewest_images_count(maker: Maker) -> None:
    found = contrast(two(maker, images="4567"), "autoattack")
    assert found is not None and found.basis == "seeds and images, the images unpaired"
    shares = [(p * 5 + 2) / 9 for p in (0.6, 0.4)]  # Agresti and Coull
    expected = 1e4 * sum(p * (1 - p) / 9 for p in shares)
    assert found.n == 5
    assert found.variances[0] == pytest.approx((expected, 4))


def test_a_slopes_images_count_by_their_squared_weights(maker: Maker) -> None:
    """Of runs at 1 and 5 without outcomes, on 100 and 400 images: slope (y5 - y1) / 4."""
    arms = {
        x: Arm(str(x), (maker("f", 0, {"natural": y}, n=n, outcomes=False, x=x),))
        for x, y, n in ((1.0, 50.0, 100), (5.0, 70.0, 400))
    }
    found = trend(arms | {9.0: Arm("not run", ())}, "natural")
    assert found is not None and found.mean == pytest.approx(5.0) and found.n == 100
    shares = [(p * 100 + 2) / 104 for p in (0.5, 0.7)]
    expected = 1e4 / 16 * sum(p * (1 - p) / 104 for p in shares)
    assert found.variances == (pytest.approx((expected, 99)),)


def test_the_study_that_is_named_first_goes_first(maker: Maker) -> None:
    cells = [maker(s, seed, {"natural": 50.0}, role="x") for s in "ab" for seed in (1, 0)]
    found = select(cells, ("b", "a"), "x", role="x").results
    assert [(r.study, r.seed) for r in found] == [("b", 0), ("b", 1)]


def test_an_accuracy_ends_at_0_and_100_percent() -> None:
    rest: Any = {"seeds": (0, 1), "n": 9, "basis": "", "alone": False}
    wide = (Variance(400.0, 30),)
    for mean in (1.0, 99.0):
        low, high = Measured(mean=mean, variances=wide, **rest).interval()
        assert low < 0 or high > 100
        found = Measured(mean=mean, variances=wide, within=(0.0, 100.0), **rest)
        assert found.interval() == (max(low, 0.0), min(high, 100.0))


@pytest.mark.parametrize("n", [30, 100, 250])
def test_accuracies_near_0_are_covered(n: int) -> None:
    """By Wilson's ends: the symmetric interval alone ends too soon there."""
    rest: Any = {"n": n, "basis": "", "within": (0.0, 100.0)}
    for share in (0.01, 0.02, 0.04, 0.08):
        covered, symmetric = 0.0, 0.0
        for right in range(n + 1):
            chance = float(binom.pmf(right, n, share))
            outcomes = np.repeat([1.0, 0.0], [right, n - right])
            image = over_images(outcomes, (0.0, 1.0))
            known = (Variance(1e4 * image.value, image.df),)
            mean, ends = 100 * right / n, binomial_interval(right, n)
            one = Measured(
                mean=mean, variances=known, seeds=(0,), alone=True, binomial=ends, **rest
            )
            assert one.interval() == ends
            several = dataclasses.replace(one, alone=False)  # whose seeds agree on every image
            low, high = several.interval()
            covered += chance * (low <= 100 * share <= high)
            low, high = dataclasses.replace(several, binomial=None).interval()
            symmetric += chance * (low <= 100 * share <= high)
        assert covered >= symmetric
        assert covered > 0.9, share


def test_one_seed_has_the_interval_of_its_own_record(maker: Maker) -> None:
    result = maker("rivals", 0, {"pgd20": 1.0}, method="kd")
    assert result.record is not None
    found = contrast([(1.0, Arm("KD", (result,)))], "pgd20")
    row = result.record["evaluation"]["pgd20"]
    assert found is not None
    assert found.interval() == pytest.approx((row["low"], row["high"]))


def test_the_parts_of_a_claim_share_the_chance_to_refute_it() -> None:
    measured = Measured(
        mean=-0.22, variances=(Variance(0.01, 30),), seeds=(0, 1), n=9, basis="", alone=False
    )
    part = Part(what="a - b", metric="natural", measured=measured, arms=())
    assert weigh(part, 1).verdict == NOT_HELD
    assert weigh(part, 4).verdict == NOT_DECIDED


def test_without_outcomes_the_smaller_set_of_images_counts(maker: Maker) -> None:
    cells = [
        maker("r", 0, {"natural": 60.0, "autoattack": 50.0}, outcomes=False, method=m) for m in "ab"
    ]
    ours, theirs = (Arm(m, (cell,)) for m, cell in zip("ab", cells, strict=True))
    ours.results[0].record["autoattack_n"] = 100
    found = {m: contrast([(1.0, ours), (-1.0, theirs)], m) for m in ("natural", "autoattack")}
    assert (found["natural"].n, found["autoattack"].n) == (500, 100)
    table = row_table("", [("KD", ours, {})], metrics=("natural", "autoattack"))
    assert table.notes == ("Test images: natural 500, AutoAttack 100.",)


@pytest.mark.parametrize("what", ["no common image", "no fingerprints", "outcomes of one alone"])
def test_images_that_cannot_be_told_to_be_the_same_are_not_paired(maker: Maker, what: str) -> None:
    cells = [maker("p", 0, {"natural": 50.0}, method=m) for m in "ab"]
    images = None if what == "no fingerprints" else "0123"
    ours = met(cells[0], [0, 1, 2, 3], [0, 1, 2], images)
    theirs = met(cells[1], [4, 5, 6, 7] if what == "no common image" else [0, 1, 2, 3], [], images)
    if what == "outcomes of one alone":
        (theirs.folder / "outcomes.safetensors").unlink()
    found = contrast([(1.0, Arm("a", (ours,))), (-1.0, Arm("b", (theirs,)))], "autoattack")
    assert found is not None and (found.mean, found.n) == (75.0, 4)
    assert found.basis == "images alone, one seed, the images unpaired"


def test_one_point_has_no_trend(maker: Maker) -> None:
    assert trend({1.0: Arm("1", (maker("f", 0, {"natural": 50.0}),))}, "natural") is None


def test_held_is_no_more_than_the_interval_shown() -> None:
    """Three models that are right on next to none of 20 images: alike, and little is known."""
    found = Measured(
        mean=0.0, variances=(Variance(0.01, 2.0),), seeds=(0, 1, 2), n=20, basis="", alone=False,
        within=(0.0, 100.0), binomial=binomial_interval(0, 20),
    )  # fmt: skip
    parts = (
        Part(what="KD", metric="pgd20", measured=each, arms=(), above=False, bound=10.0)
        for each in (found, dataclasses.replace(found, binomial=binomial_interval(0, 2000)))
    )
    few, many = (weigh(part, 1) for part in parts)
    assert few.high is not None and few.high > 10 and few.verdict == NOT_DECIDED
    assert many.high is not None and many.high < 10 and many.verdict == HELD
