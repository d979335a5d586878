"""Outcomes per image: worst case, subsets, files, paired comparison."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from gacd.errors import UserError
from gacd.evaluation.outcomes import Evaluation, compare
from gacd.storage import save_tensors

SETTINGS = {"dataset": "digits", "test_images": "1f", "norm": "linf", "eps": 0.1, "cascade": False}


def bits(text: str) -> torch.Tensor:
    return torch.tensor([c == "1" for c in text])


@pytest.fixture
def evaluation() -> Evaluation:
    everything = torch.arange(6)
    return Evaluation(
        n=6,
        robust={"natural": bits("111110"), "pgd20": bits("110110"), "autoattack": bits("011")},
        index={"natural": everything, "pgd20": everything, "autoattack": torch.tensor([0, 3, 4])},
        settings=SETTINGS,
        seconds={"natural": 0.5},
    )


def test_worst_case_counts_images_that_met_and_survived_every_attack(
    evaluation: Evaluation,
) -> None:
    robust, index = evaluation.outcomes("worst")
    assert index.tolist() == [0, 3, 4]
    assert robust.tolist() == [False, True, True]
    assert evaluation.accuracy("worst") == pytest.approx(200 / 3)


def test_record_has_percentages_with_their_own_n(evaluation: Evaluation) -> None:
    record = evaluation.to_record()
    assert list(record) == ["natural", "pgd20", "autoattack", "worst"]
    assert record["pgd20"]["accuracy"] == pytest.approx(400 / 6)
    assert (record["pgd20"]["n"], record["autoattack"]["n"], record["worst"]["n"]) == (6, 3, 3)
    assert record["pgd20"]["low"] < record["pgd20"]["accuracy"] < record["pgd20"]["high"] < 100


def test_an_interval_is_wilsons(evaluation: Evaluation) -> None:
    wilson = binomtest(5, 6).proportion_ci(0.95, method="wilson")
    expected = 100 * wilson.low, 100 * wilson.high
    assert evaluation.interval("natural") == pytest.approx(expected)


def test_unknown_attack_suggests_one(evaluation: Evaluation) -> None:
    with pytest.raises(UserError, match="did you mean 'pgd20'"):
        evaluation.accuracy("pgd2")


def test_file_holds_everything(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "outcomes.safetensors"
    evaluation.save(path)
    again = Evaluation.load(path)
    assert again.to_record() == evaluation.to_record()
    assert (again.settings, again.seconds) == (evaluation.settings, evaluation.seconds)
    assert torch.equal(again.index["autoattack"], evaluation.index["autoattack"])


def test_other_tensor_files_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "weights.safetensors", {"w": torch.zeros(2)}, {"epoch": 3})
    with pytest.raises(UserError, match="no outcomes"):
        Evaluation.load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("meta", "left_out"),
    [
        ({"attacks": ["natural"]}, ""),
        ({"attacks": 3, "n": 2, "settings": {}, "seconds": {}}, ""),
        ({"attacks": ["natural"], "n": 2, "settings": {}, "seconds": {}}, "robust/natural"),
    ],
)
def test_damaged_outcomes_are_named(tmp_path: Path, meta: dict[str, Any], left_out: str) -> None:
    path = tmp_path / "outcomes.safetensors"
    tensors = {"robust/natural": torch.ones(2).bool(), "index/natural": torch.arange(2)}
    tensors.pop(left_out, None)
    save_tensors(path, tensors, meta)
    with pytest.raises(UserError, match="damaged; delete it and the record"):
        Evaluation.load(path)


def test_compare_pairs_by_image_not_by_position(evaluation: Evaluation) -> None:
    other = Evaluation(
        n=6,
        robust={"autoattack": bits("0110")},
        index={"autoattack": torch.tensor([0, 2, 3, 4])},
        settings=SETTINGS,
    )
    found = compare(evaluation, other, "autoattack")
    # On images 0, 3, 4 the first is right on 3 and 4, the second on 3; by position they'd be alike.
    assert (found["n"], found["only_a"], found["only_b"], found["p"]) == (3, 1, 0, 1.0)
    assert (found["a"]["accuracy"], found["b"]["accuracy"]) == pytest.approx((200 / 3, 100 / 3))
    swapped = compare(other, evaluation, "autoattack")
    assert (swapped["only_a"], swapped["only_b"]) == (0, 1)
    assert found["a"]["low"] < 200 / 3 < found["a"]["high"]


def test_compare_needs_shared_images(evaluation: Evaluation) -> None:
    robust, index = {"autoattack": bits("1")}, {"autoattack": torch.tensor([5])}
    with pytest.raises(UserError, match="no test image met autoattack"):
        compare(evaluation, Evaluation(6, robust, index, SETTINGS), "autoattack")


@pytest.mark.parametrize(
    ("attack", "changes", "message"),
    [
        ("natural", {"test_images": "2e"}, r"fingerprint 1f\) and 6 of digits \(fingerprint 2e"),
        ("natural", {"test_images": None}, "not evaluated on the same test images"),
        ("pgd20", {"eps": 0.2}, "the same pgd20 .eps was 0.1 for one and 0.2 for the other"),
        ("pgd20", {"norm": "l2"}, "norm"),
        ("pgd20", {"step_size": 0.01}, "step_size"),
        ("pgd20", {"cascade": True}, "cascade"),
        ("worst", {"source": "ab"}, "source"),
        ("worst", {"step_size": 0.01}, "step_size"),
    ],
)
def test_compare_needs_the_same_images_and_the_same_attack(
    evaluation: Evaluation, attack: str, changes: dict, message: str
) -> None:
    other = replace(evaluation, settings=SETTINGS | changes)
    for pair in ((evaluation, other), (other, evaluation))[: 1 if "and" in message else 2]:
        with pytest.raises(UserError, match=message):
            compare(*pair, attack)
    if "eps" in changes:  # no attack, no budget
        assert compare(evaluation, other, "natural")["p"] == 1.0


def test_the_source_of_transferred_images_and_the_set_of_attacks_must_be_the_same(
    evaluation: Evaluation,
) -> None:
    pair = [
        Evaluation(4, {"transfer": bits("1101")}, {"transfer": torch.arange(4)}, SETTINGS | source)
        for source in ({"source": "ab"}, {"source": "cd"})
    ]
    with pytest.raises(UserError, match="source was ab for one and cd for the other"):
        compare(*pair, "transfer")
    fewer = {name: evaluation.robust[name] for name in ("natural", "pgd20")}
    with pytest.raises(UserError, match="the set of attacks"):
        compare(evaluation, replace(evaluation, robust=fewer), "worst")


@pytest.mark.parametrize("name", ["fgsm", "noise", "autoattack"])
def test_attacks_without_a_step_size_are_compared_whatever_it_is(name: str) -> None:
    pair = [
        Evaluation(4, {name: bits(text)}, {name: torch.arange(4)}, SETTINGS | {"step_size": size})
        for text, size in (("1101", 0.01), ("1100", 0.02))
    ]
    assert compare(*pair, name)["only_a"] == 1


def test_a_cascade_is_compared_with_the_same_cascade(evaluation: Evaluation) -> None:
    a = replace(evaluation, settings=SETTINGS | {"cascade": True})
    names = ["natural", "autoattack", "pgd20"]
    b = replace(a, robust={name: a.robust[name] for name in names})
    with pytest.raises(UserError, match="what came before it"):
        compare(a, b, "pgd20")
    assert compare(a, a, "pgd20")["p"] == 1.0
