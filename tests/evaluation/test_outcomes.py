"""Outcomes per image: worst case, subsets, files, paired comparison."""

from pathlib import Path

import pytest
import torch

from gacd.errors import UserError
from gacd.evaluation.outcomes import Evaluation, compare
from gacd.storage import save_tensors


def bits(text: str) -> torch.Tensor:
    return torch.tensor([c == "1" for c in text])


@pytest.fixture
def evaluation() -> Evaluation:
    everything = torch.arange(6)
    return Evaluation(
        n=6,
        robust={"natural": bits("111110"), "pgd20": bits("110110"), "autoattack": bits("011")},
        index={"natural": everything, "pgd20": everything, "autoattack": torch.tensor([0, 3, 4])},
        settings={"eps": 0.1},
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


def test_compare_pairs_by_image_not_by_position(evaluation: Evaluation) -> None:
    other = Evaluation(
        n=6,
        robust={"autoattack": bits("1101")},
        index={"autoattack": torch.tensor([0, 2, 3, 4])},
    )
    found = compare(evaluation, other, "autoattack")
    # On images 0, 3, 4 the first is right on 3 and 4, the second on 0 and 4.
    assert (found["n"], found["only_a"], found["only_b"], found["p"]) == (3, 1, 1, 1.0)


def test_compare_needs_shared_images(evaluation: Evaluation) -> None:
    other = Evaluation(
        n=6, robust={"autoattack": bits("1")}, index={"autoattack": torch.tensor([5])}
    )
    with pytest.raises(UserError, match="share"):
        compare(evaluation, other, "autoattack")
