"""The report of a run folder: what it reads, what it leaves out, what it says."""

import base64
import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gacd.errors import UserError
from gacd.report.run import write_run_report

ORDER = ("teacher", "natural", "pgd-at", "gacd", "gacd+aft")
ENVIRONMENT = {
    "gacd": "0.1.0",
    "commit": "a" * 40,
    "dirty": False,
    "python": "3.11.7",
    "versions": {"torch": "2.15.0", "scipy": None},
    "platform": "Linux x86_64",
    "cpu": "a processor",
    "cores": 2,
    "threads": 1,
    "gpus": [],
    "cuda": None,
}


COST = {
    "student_forward": 11.0,
    "student_backward": 10.667,
    "student_input_backward": 10.0,
    "teacher_forward": 2.0,
    "teacher_backward": 0.0,
    "flops": 1.25e9,
}


def record(method: str, role: str, model: str, parameters: int, **more: Any) -> dict[str, Any]:
    accuracies = {"natural": 97.0, "fgsm": 70.5, "pgd20": 60.0, "autoattack": 50.0}
    return {
        "model": model,
        "method": method,
        "dataset": "digits",
        "seed": 0,
        "n": 540,
        **accuracies,
        "role": role,
        "parameters": parameters,
        "intervals": {name: [value - 2, value + 2] for name, value in accuracies.items()},
        "autoattack_n": 250,
        "eps_curve": [[0.1, 80.0, 77.0, 83.0], [0.2, 60.0, 57.0, 63.0]],
        "evaluation": {
            name: {"accuracy": value, "low": value - 2, "high": value + 2, "n": 540}
            for name, value in accuracies.items()
        },
        "settings": {"norm": "linf", "eps": 0.2},
        "seconds": {"natural": 0.1},
        "config": {"seed": 0, "threat": {"norm": "linf", "eps": "1/5"}},
        "environment": ENVIRONMENT,
        "timestamp": "2026-01-02T10:00:00+00:00",
        **more,
    }


def example(wrong: int) -> dict[str, Any]:
    def pixels(value: int) -> str:
        return base64.b64encode(np.full((3, 8, 8, 1), value, np.uint8).tobytes()).decode()

    truth = ["zero", "one", "two"]
    attacked = ["seven"] * wrong + truth[wrong:]
    answers = {"clean": truth, "attacked": attacked}
    return {
        "shape": [3, 8, 8, 1],
        "clean": pixels(200),
        "attacked": pixels(90),
        "truth": truth,
        "answers": answers,
    }


def check(name: str, value: float) -> dict[str, Any]:
    text = f"{value} was found"
    return {"name": name, "passed": value <= 1.0, "value": value, "limit": 1.0, "text": text}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def said(out: Path) -> str:
    """The page's text and its figures' alternative texts, on one line."""
    page = (out / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    page = re.sub(r'<img [^>]*alt="([^"]*)"[^>]*>', r"\1", page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def headings(out: Path) -> list[str]:
    page = (out / "report.html").read_text(encoding="utf-8")
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student, with all that a run leaves behind."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    write(out / "gacd" / "record.json", record("gacd", "student", "small", 8610))
    late = {**ENVIRONMENT, "commit": "b" * 40, "dirty": True}
    write(
        out / "teacher" / "record.json",
        record(
            "pgd-at", "teacher", "big", 131178,
            natural=91.5, timestamp="2026-01-02T12:30:45+00:00", environment=late, cost=COST,
            train_flops=3.5e12,
        ),
    )  # fmt: skip
    write(out / "teacher" / "examples.json", example(1))
    write(out / "gacd" / "examples.json", example(3))
    write(out / "teacher" / "diagnosis.json", [check("more steps", -3.0)])
    write(out / "gacd" / "diagnosis.json", [check("more steps", 0.5), check("transfer", 7.25)])
    write_log(
        out / "teacher" / "log.jsonl",
        [{"epoch": e, "loss": 2.0 / e, "val_natural": 50.0, "val_robust": 30.0} for e in (1, 2)],
    )
    rows = [
        {
            "epoch": e,
            "loss": 1.0,
            "val_natural": v,
            "val_robust": 20.0,
            "mi": 3.0,
            "mi_ceiling": 6.5,
        }
        for e, v in ((1, 40.0), (2, 41.0), (2, 42.5))
    ]
    write_log(out / "gacd" / "features" / "log.jsonl", rows)
    write_run_report(out, "A <title>", order=ORDER)
    return out


def test_every_section_is_there(run):
    assert headings(run) == [
        "Accuracy under attack",
        "Attacked images",
        "Accuracy against the budget",
        "Natural against robust accuracy",
        "Training",
        "Cost of training",
        "Are the gradients masked?",
        "How this was made",
    ]


def test_the_figures_are_files_too(run):
    kept = {path.name: path.read_bytes() for path in (run / "figures").iterdir()}
    assert sorted(kept) == [
        "accuracy-against-eps.svg",
        "attacked-images.png",
        "natural-against-autoattack.svg",
        "training-curves.svg",
    ]
    page = (run / "report.html").read_text(encoding="utf-8")
    for name, image in kept.items():
        assert image.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
        assert base64.b64encode(image).decode() in page


def test_the_intro_says_what_was_run(run):
    text = said(run)
    assert (
        "A teacher, big (131,178 parameters), and a network, small (8,610 parameters), "
        "on digits; seed 0. The attacker knows the whole model and may change every pixel value "
        "by up to ε = 1/5, where black is 0 and white is 1. The 540 test images were used neither"
    ) in text


def test_rows_follow_the_order_given(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    heads = re.findall(r'<th scope="row">(.*?)</th>', page)
    names = [re.sub(r"<.*?>", "", head) for head in heads]
    assert names[:2] == names[-2:] == ["pgd-at (teacher)", "gacd (student)"]
    assert names[2:-2] == ["pgd-at (teacher)"]  # the cost, known of one


def test_all_attacks_are_shown_with_their_intervals(run):
    text = said(run)
    assert "Accuracy in % on digits method natural FGSM PGD-20 AutoAttack model" in text
    assert "70.5 [68.5, 72.5]" in text
    assert "AutoAttack is the strongest, and the figure to compare." in text


def test_curves_begin_at_the_natural_accuracy(run):
    assert "pgd-at (teacher): 91.5 % at ε = 0, 60.0 % at 0.2." in said(run)


def test_answers_under_attack_are_counted(run):
    assert "Wrong answers under attack: pgd-at (teacher) 1 of 3, gacd (student) 3 of 3." in said(
        run
    )


def test_of_an_epoch_logged_twice_the_later_row_counts(run):
    text = said(run)
    assert "teacher, epoch 2: loss 1, 50.0 % clean" in text
    assert "gacd/features, epoch 2: loss 1, 42.5 % clean, 20.0 % attacked." in text
    assert "InfoNCE" in text


def test_the_cost_is_shown_where_it_is_known(run):
    assert "pgd-at (teacher) 11 10.7 2 0 1,250.00 3.5 " in said(run)


def test_failed_checks_are_named_with_their_figures(run):
    text = said(run)
    assert "pass pgd-at (teacher) 1 of 1 checks passed." in text
    assert "fail gacd (student) 1 of 2 checks passed. Failed: transfer (7.25 was found)." in text
    assert "pgd-at (teacher) pass −3.0 ≤ 1.0 – gacd (student) pass 0.5 ≤ 1.0 FAIL 7.2 > 1.0" in text


def test_every_commit_and_the_time_are_told(run):
    text = said(run)
    assert f"commit {'a' * 40}, {'b' * 40} with changes" in text
    assert "measured (UTC) 2026-01-02 10:00 to 2026-01-02 12:30" in text
    assert "versions torch 2.15.0 platform" in text
    assert "gpus" not in text


def test_the_title_is_kept_and_the_same_files_give_the_same_page(run):
    before = (run / "report.html").read_bytes()
    assert b"<h1>A &lt;title&gt;</h1>" in before
    write_run_report(run, order=ORDER)
    assert (run / "report.html").read_bytes() == before


def test_what_has_no_data_is_left_out(tmp_path):
    alone = record("mine", "student", "small", 8610, eps_curve=[], seed=3)
    for key in ("autoattack", "autoattack_n"):
        del alone[key]
    alone["settings"]["norm"] = "l2"
    write(tmp_path / "alone" / "model" / "record.json", alone)
    write_run_report(tmp_path / "alone")
    assert headings(tmp_path / "alone") == ["Accuracy under attack", "How this was made"]
    assert not (tmp_path / "alone" / "figures").exists()
    text = said(tmp_path / "alone")
    assert "Run alone A network, small (8,610 parameters), on digits; seed 3." in text
    assert "move an image by a Euclidean distance of up to ε = 1/5" in text
    assert "The 540 test images are the data's own test part." in text  # more is not known
    assert "AutoAttack was not run: a weaker attack alone can flatter a model." in text


def test_an_installed_package_has_no_commit(tmp_path):
    environment = {**ENVIRONMENT, "commit": None, "dirty": None, "gpus": ["H200"]}
    for method in ("kd", "ard"):
        row = record(method, "student", "small", 8610, environment=environment, eps_curve=[])
        del row["autoattack"]
        write(tmp_path / method / "record.json", row)
    write_run_report(tmp_path)
    text = said(tmp_path)
    assert "2 networks, small (8,610 parameters), on digits" in text
    assert "commit none (installed package)" in text
    assert "gpus H200" in text


def test_a_folder_without_models_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no evaluated model in this folder"):
        write_run_report(tmp_path / "nowhere", "title")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["record.json", "examples.json", "diagnosis.json"])
def test_a_damaged_file_is_named(tmp_path, file):
    write(tmp_path / "gacd" / "record.json", record("gacd", "student", "small", 8610))
    (tmp_path / "gacd" / file).write_text('{"model": ', encoding="utf-8")
    with pytest.raises(UserError, match=rf"gacd.{file}: not a whole JSON file"):
        write_run_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "misfit"),
    [
        ("record.json", {"parameters": None}, "parameters is null"),
        ("record.json", {"intervals": {}}, "it has no intervals.natural"),
        ("record.json", {"n": math.nan}, "n is NaN"),
        ("record.json", {"seed": "0"}, 'seed is "0"'),
        ("record.json", {"environment": None}, "environment is null"),
        ("record.json", {"natural": "abc"}, 'natural is "abc"'),
        ("record.json", {"eps_curve": "abc"}, 'eps_curve is "abc"'),
        ("record.json", {"cost": {}}, "it has no cost.student_forward"),
        ("examples.json", {"shape": [9, 9, 9, 1]}, "truth is"),
        ("examples.json", {"clean": "AAAA"}, 'clean is "AAAA"'),
        ("diagnosis.json", {"passed": None}, "0.passed is null"),
    ],
)
def test_what_was_changed_by_hand_is_named(tmp_path, file, change, misfit):
    row = tmp_path / "gacd"
    write(row / "record.json", record("gacd", "student", "small", 8610))
    whole = {"examples.json": example(1), "diagnosis.json": check("transfer", 0.5)}
    damaged = {**whole.get(file, json.loads((row / "record.json").read_text())), **change}
    write(row / file, [damaged] if file == "diagnosis.json" else damaged)
    beside = r"delete it( and the record.json beside it,)? and run again"
    message = rf"gacd.{file}: not written by this package; {beside} \({re.escape(misfit)}"
    with pytest.raises(UserError, match=message):
        write_run_report(tmp_path)


def test_rows_of_a_log_that_are_no_epochs_are_left_out(tmp_path):
    write(tmp_path / "gacd" / "record.json", record("gacd", "student", "small", 8610))
    log = tmp_path / "gacd" / "log.jsonl"
    row = json.dumps({"epoch": 1, "loss": 1.5}).encode()
    log.write_bytes(b'\xff\xfe\n3\n{}\n{"epoch": "x"}\n{"epoch": 2, "loss": "a"}\n' + row)
    write_run_report(tmp_path)
    assert "gacd, epoch 1: loss 1.5." in said(tmp_path)


def test_no_torch_is_needed():
    program = "import sys, gacd.report.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_the_pictures_under_attack_the_seeds_and_every_machine_are_shown(tmp_path):
    pictures = []
    late = {**ENVIRONMENT, "python": "3.12.1", "cpu": "another", "gpus": ["a GPU", "a GPU"]}
    for attacked in ("attacked", "clean"):
        out = tmp_path / attacked
        for seed, environment in enumerate((ENVIRONMENT, late)):
            more = {"seed": seed, "environment": environment}
            more["timestamp"] = f"2026-01-0{1 + seed}T10:00:00+00:00"
            row = record("pgd-at", "student", f"net-{seed}", 8610, eps_curve=[], **more)
            write(out / f"net-{seed}" / "record.json", row)
        shown = example(1)
        write(out / "net-0" / "examples.json", {**shown, "attacked": shown[attacked]})
        write_run_report(out)
        pictures.append((out / "figures" / "attacked-images.png").read_bytes())
        text = said(out)
        assert "seed 0, 1." in text and "python 3.11.7; 3.12.1" in text
        assert "processor a processor, 2 cores, 1 used; another, 2 cores, 1 used" in text
        assert "gpus a GPU, a GPU figures" in text
    assert pictures[0] != pictures[1]
