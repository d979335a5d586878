"""`gacd compare`: the paired test in words, in figures and as JSON, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from gacd import cli
from gacd.commands.compare import find_outcomes, paired
from gacd.errors import UserError
from gacd.evaluation.outcomes import Evaluation

N = 60
SETTINGS = {"dataset": "digits", "test_images": "1f", "norm": "linf", "eps": 0.1, "cascade": False}


def outcomes(folder: Path, *, right: dict[str, range], **settings: object) -> Path:
    """An evaluated model that is right on these images, by attack."""
    robust = {}
    for name, images in right.items():
        robust[name] = torch.zeros(N, dtype=torch.bool)
        robust[name][list(images)] = True
    index = dict.fromkeys(right, torch.arange(N))
    Evaluation(N, robust, index, {**SETTINGS, **settings}).save(folder / "outcomes.safetensors")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A is right where B is and on 20 images more under pgd20; under fgsm each has 5 of its own."""
    plain = {"natural": range(N)}
    a = outcomes(tmp_path / "a", right={**plain, "fgsm": range(40), "pgd20": range(30)})
    b = outcomes(tmp_path / "b", right={**plain, "pgd20": range(10), "fgsm": range(5, 45)})
    return a, b


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["compare", *map(str, arguments)]) == 0
    return " ".join(capsys.readouterr().out.split())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["compare", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("gacd: ")


def test_figures_by_counting(capsys: pytest.CaptureFixture[str], two: tuple[Path, Path]) -> None:
    found = json.loads(compared(capsys, *two, "--json"))
    assert (found["a"], found["b"]) == tuple(map(str, two))
    assert list(found["attacks"]) == ["natural", "fgsm", "pgd20", "worst"]
    pgd, fgsm = found["attacks"]["pgd20"], found["attacks"]["fgsm"]
    assert (pgd["n"], pgd["only_a"], pgd["only_b"]) == (60, 20, 0)
    assert (pgd["a"]["accuracy"], pgd["b"]["accuracy"]) == pytest.approx((50.0, 100 / 6))
    assert pgd["p"] == pytest.approx(2 * 0.5**20)  # all 20 on one side, either side
    assert (fgsm["only_a"], fgsm["only_b"], fgsm["p"]) == (5, 5, 1.0)
    assert pgd["decided"] and not fgsm["decided"] and not found["attacks"]["natural"]["decided"]
    worst = found["attacks"]["worst"]
    assert (worst["a"]["accuracy"], worst["only_b"]) == (50.0, 0)


@pytest.mark.parametrize(("more", "decided"), [(5, False), (6, True)])
def test_what_is_decided_at_5_percent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, more: int, decided: bool
) -> None:
    assert (2 * binom.cdf(0, more, 0.5) < 0.05) == decided
    a = outcomes(tmp_path / "a", right={"pgd20": range(20)})
    b = outcomes(tmp_path / "b", right={"pgd20": range(20 + more)})
    said = compared(capsys, a, b)
    verdict = f"decided at 5 %, B is right more often, by {100 * more / N:.1f} points"
    assert (f"PGD-20: {verdict}" if decided else "PGD-20: the difference is not decided") in said


def test_the_table(capsys: pytest.CaptureFixture[str], two: tuple[Path, Path]) -> None:
    said = compared(capsys, *two, "--attack", "pgd20")
    assert re.search(r"PGD-20 60 50.0 \[37.7, 62.3\] 16.7 \[9.3, 28.0\] 20 0 1.9e-06", said)
    assert "fgsm" not in said.lower() and "natural" not in said


def test_files_and_run_folders_of_one_row_will_do(two: tuple[Path, Path]) -> None:
    a, _ = two
    file = a / "outcomes.safetensors"
    assert find_outcomes(file) == find_outcomes(a) == file
    with pytest.raises(UserError, match=r"holds 2 models \(a, b\): name one, such as .*a$"):
        find_outcomes(a.parent)
    run = a.rename(a.parent / "run")
    run = run.rename((a.parent / "alone").mkdir() or a.parent / "alone" / "model")
    assert find_outcomes(run.parent) == run / "outcomes.safetensors"


def test_the_worst_case_is_of_the_same_attacks_or_of_none(tmp_path: Path) -> None:
    right = {"natural": range(N), "fgsm": range(40), "pgd20": range(30)}
    a = outcomes(tmp_path / "a", right=right)
    b = outcomes(tmp_path / "b", right={**right, "cw": range(9)})
    assert list(paired(a, a)) == [*right, "worst"]
    assert list(paired(a, b)) == list(right)


def test_other_images_other_attacks_and_no_model_are_refused(
    capsys: pytest.CaptureFixture[str], two: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two
    right = {"natural": range(N), "pgd20": range(9)}
    images = outcomes(tmp_path / "c", right=right, test_images="2e")
    assert re.search("not evaluated on the same test images", refusal(capsys, a, images))
    budget = outcomes(tmp_path / "d", right=right, eps=0.2)
    assert "eps was 0.1 for one and 0.2 for the other" in refusal(capsys, a, budget)
    assert "natural" in compared(capsys, a, budget, "--attack", "natural")
    assert "did you mean 'pgd20'" in refusal(capsys, a, b, "--attack", "pgd2")
    assert "which two models" in refusal(capsys, a)
    assert "stands where a setting was expected" in refusal(capsys, a, b, "c")
    assert "no such file" in refusal(capsys, a, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no evaluated model in this folder" in refusal(capsys, a, tmp_path / "empty")
