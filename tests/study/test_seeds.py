"""`gacd seeds`: means and differences of made-up runs, of our own records, and what it refuses."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student_t

from command_line import refusal
from gacd import cli
from gacd.commands.identity import named_by_content
from gacd.methods import METHODS
from gacd.storage import read_json, write_json
from made_up import evaluation, record_of

RESULTS = Path(__file__).parents[2] / "results"
RUN: dict[str, Any] = {"seed": 0, "data": {}}
ACCURACIES = {
    "teacher": {"natural": 60.0, "pgd20": 40.0},
    "pgd-at": {"natural": 50.0, "pgd20": 30.0, "autoattack": 28.0},
    "gacd": {"natural": 52.0, "pgd20": 36.0, "autoattack": 27.0},
}

pytestmark = pytest.mark.usefixtures("elsewhere")


def make_run(
    out: Path, seed: int, rows: dict[str, dict[str, float]] = ACCURACIES, **config: Any
) -> dict[str, dict[str, np.ndarray]]:
    """A run folder, and what each of its models was right on, by attack."""
    right = {}
    for number, (name, accuracies) in enumerate(rows.items()):
        found = evaluation({m: a + seed for m, a in accuracies.items()}, 200, 10 * seed + number)
        found.save(out / name / "outcomes.safetensors")
        settings = {"seed": seed, "student": "small", "out": out.name, **config}
        settings["threat"] = {"norm": "linf", "eps": 0.1}
        record = record_of(found, {"method": name, "student": "small"}, seed)
        write_json(out / name / "record.json", record | {"config": settings})
        right[name] = {metric: r.numpy().astype(float) for metric, r in found.robust.items()}
    return right


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["seeds", *words]) == 0
    return capsys.readouterr().out


def test_means_and_differences_are_over_seeds_and_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rule written out: d +- sqrt(t^2 v + t'^2 v'), on images that both models met."""
    every = [make_run(Path(f"run-{seed}"), seed) for seed in (0, 1, 2)]
    figures = json.loads(said(capsys, "run-0", "run-1", "run-2", "--json"))
    found = {(f["row"], f["minus"], f["attack"]): f for f in figures}
    metrics = ("natural", "pgd20", "autoattack")
    rows = [(name, None) for name in ACCURACIES] + [("teacher", "pgd-at"), ("gacd", "pgd-at")]
    assert list(found) == [(*row, metric) for row in rows for metric in metrics]
    for metric in metrics:
        ours = np.stack([run["gacd"][metric] for run in every])
        apart = ours - np.stack([run["pgd-at"][metric] for run in every])
        for minus, values, low in ((None, ours, 0), ("pgd-at", apart, -1)):
            seeds, images = values.mean(axis=1), np.append(values.mean(axis=0), (low, 1))
            half = math.hypot(
                student_t.ppf(0.975, 2) * seeds.std(ddof=1) / math.sqrt(3),
                student_t.ppf(0.975, 201) * images.std(ddof=1) / math.sqrt(202),
            )
            row = found["gacd", minus, metric]
            wanted = [100 * (values.mean() + side) for side in (0, -half, half)]
            assert [row["mean"], row["low"], row["high"]] == pytest.approx(wanted)
            assert (row["seeds"], row["n"], row["interval"]) == (3, 200, "seeds and images")
    assert found["teacher", None, "autoattack"]["mean"] is None


def test_the_tables_mark_what_is_decided(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1, 2):
        make_run(Path(f"run-{seed}"), seed)
    runs = "run-0", "run-1", "run-2"
    text = said(capsys, *runs)
    assert text.index("teacher") < text.index("pgd-at") < text.index("gacd")
    assert "3 runs of one recipe, CIFAR-10 (JPEG)" in text and "Minus pgd-at" in text
    text = said(capsys, *runs, "--markdown", "--minus", "gacd")
    assert re.search(r"^\| pgd-at \| .*−6\.0 ▼ \[−.*\| \+1\.0 \[−", text, re.M)
    alone = said(capsys, "run-1", "--markdown")
    assert "One run, CIFAR" in alone and "| pgd-at | 51.0 [" in alone
    assert "▼ [" not in alone and "▲ [" not in alone  # one seed decides nothing


@pytest.mark.parametrize(("name", "start"), [("d.svg", b"<?xml"), ("new/d.PNG", b"\x89PNG")])
def test_differences_can_be_looked_at(
    capsys: pytest.CaptureFixture[str], name: str, start: bytes
) -> None:
    for seed in (0, 1):
        make_run(Path(f"run-{seed}"), seed)
    printed = said(capsys, "run-0", "run-1", "--json")
    assert said(capsys, "run-0", "--figure", name, "run-1", "--json") == printed
    assert Path(name).read_bytes().startswith(start)


def test_the_figure_of_our_records_is_drawn_of_what_the_readme_says(tmp_path: Path) -> None:
    out = tmp_path / "figure.svg"
    command = [sys.executable, str(RESULTS / "differences.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"<?xml")
    readme = " ".join((RESULTS.parent / "README.md").read_text(encoding="utf-8").split())
    assert done.stdout.strip().replace("\N{MINUS SIGN}", "-") in readme


def test_the_tables_of_the_readme_are_those_of_our_records() -> None:
    """Every row of three accuracies with intervals, or of three differences."""
    spec = importlib.util.spec_from_file_location("drawn", RESULTS / "differences.py")
    assert spec and spec.loader
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    drawn.METRICS = metrics = ("natural", "pgd20", "autoattack")
    known = [
        [f"{of.mean:+.1f} [{of.interval()[0]:.1f}, {of.interval()[1]:.1f}]" for of in row.values()]
        for panel in drawn.panels().values()
        for row in panel.values()
    ]
    for row in read_json(RESULTS / "quickstart/results.json"):
        ends = [row["intervals"][metric] for metric in metrics]
        known.append(
            [f"{row[m]:.1f} [{a:.1f}, {b:.1f}]" for m, (a, b) in zip(metrics, ends, strict=True)]
        )
    report = (RESULTS / "small/report.md").read_text(encoding="utf-8")
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8").replace("*", "")
    cell = r"[-+]?[\d.]+ \[-?[\d.]+, -?[\d.]+\]"
    rows = re.findall(rf"\| ({cell}) \| ({cell}) \| ({cell}) \|", readme)
    assert len(rows) > 20
    for row in rows:
        assert [*row] in known or " | ".join(row) in report, row


def test_runs_without_the_usual_row_have_means_alone(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {name: ACCURACIES[name] for name in ("gacd",)}
    make_run(Path("a"), 0, rows)
    make_run(Path("b"), 1, rows)
    text = said(capsys, "a", "b", "--markdown")
    assert "| gacd | 52.5 [" in text and "Minus" not in text


def test_what_some_of_the_records_lack_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    full = dict.fromkeys(("pgd-at", "gacd"), ACCURACIES["gacd"])
    for seed in (0, 1):
        make_run(Path(f"run-{seed}"), seed, full)
    assert "fewer" not in said(capsys, "run-0", "run-1", "--markdown")
    for seed, attack in ((0, "autoattack"), (0, "pgd20"), (1, "pgd20")):
        path = Path(f"run-{seed}/gacd/record.json")
        write_json(path, {k: v for k, v in read_json(path).items() if k != attack})
    text = said(capsys, "run-0", "run-1", "--markdown")
    assert (
        "Measured with fewer seeds: PGD-20 of gacd (0 of 2), AutoAttack of gacd (1 of 2)." in text
    )


def test_a_teacher_of_all_runs_is_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    for seed, file in enumerate(("one 01ab", "one 01ab", "one 9f9f")):
        make_run(Path(f"run-{seed}"), seed)
        write_json(Path(f"run-{seed}") / "run.json", RUN | {"teacher": {"checkpoint": file}})
        make_run(Path(f"own-{seed}"), seed)
    text = said(capsys, "run-0", "run-1", "--markdown")
    assert "One teacher taught them all" in text
    assert re.search(r"^\| teacher \| 60\.0 .*\| 1 \| – \|$", text, re.M)
    for kind in ("run", "own"):  # files of one name; teachers of the runs' own
        text = said(capsys, f"{kind}-1", f"{kind}-2", "--markdown")
        assert "One teacher" not in text
        assert re.search(r"^\| teacher \| 61\.5 .*\| 2 \| – \|$", text, re.M)


def test_students_of_one_teacher_are_not_taken_for_independent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = []
    for seed, file in enumerate(("one 01ab", "one 01ab", "one 9f9f", "one 9f9f", "one 77aa")):
        gacd = ACCURACIES["gacd"] | {"pgd20": 36.0 + 4 * (seed // 2) + seed % 2}
        right.append(make_run(Path(f"run-{seed}"), seed, ACCURACIES | {"gacd": gacd}))
        write_json(Path(f"run-{seed}") / "run.json", RUN | {"teacher": {"checkpoint": file}})
    runs = [f"run-{seed}" for seed in range(5)]
    figures = json.loads(said(capsys, *runs, "--json"))
    found = {(f["row"], f["minus"]): f for f in figures if f["attack"] == "pgd20"}
    assert found["pgd-at", None]["interval"] == "seeds and images"
    for row, minus in (("gacd", None), ("gacd", "pgd-at"), ("teacher", None)):
        assert found[row, minus]["interval"] == "teachers and images"
    each = [100 * (run["gacd"]["pgd20"] - run["pgd-at"]["pgd20"]) for run in right]
    apart = [x.mean() - np.mean(each) for x in each]
    sums = np.array([apart[0] + apart[1], apart[2] + apart[3], apart[4]])
    teachers = student_t.ppf(0.975, 2) * math.sqrt(9 / 5.44 * (sums @ sums)) / 5  # of 2, 2 and 1
    images = np.append(np.mean(each, axis=0), (-100, 100))
    half = math.hypot(teachers, student_t.ppf(0.975, 201) * images.std(ddof=1) / math.sqrt(202))
    row = found["gacd", "pgd-at"]
    assert row["high"] - row["mean"] == pytest.approx(half)
    assert teachers > student_t.ppf(0.975, 4) * np.std(apart, ddof=1) / math.sqrt(5)
    text = said(capsys, *runs, "--markdown")
    assert "3 teachers taught 5 runs: of students, the intervals are over teachers" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "which runs? gacd seeds RUN RUN ..., a finished folder for each seed"),
        ("run-0 nothing", "nothing: no evaluated model in this folder"),
        ("run-0 ./run-0", "a run is given twice"),
        ("run-0 copy", "run-0/pgd-at and copy/pgd-at are both of seed 0: give one run of each"),
        ("run-0 other", "not of one recipe (student is small in the one and big in the other)"),
        ("run-0 weighted", "(weights.gacd is None in the one and 0.5 in the other)"),
        ("weighted run-0", "(weights.gacd is 0.5 in the one and None in the other)"),
        ("run-0/gacd", "run-0/gacd is one row of a run: give the folder of the whole run"),
        (".", "holds several records: give a run's own folder"),
        ("run-0 --figure d.pdf", "d.pdf: a figure is drawn as .svg or .png"),
        ("bare --figure d.svg", "no difference to draw: say --minus ROW, one of gacd"),
        ("bare --figure d.svg --minus gacd", "no difference to draw: gacd is the only row"),
        ("run-0 --minus gadc", "unknown row of these runs 'gadc': did you mean 'gacd'?"),
    ],
)
def test_what_is_no_repetition_is_refused(
    capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    rows = {name: ACCURACIES[name] for name in ("pgd-at", "gacd")}
    make_run(Path("run-0"), 0, rows)
    make_run(Path("copy"), 0, rows)
    make_run(Path("other"), 1, rows, student="big")
    make_run(Path("bare"), 0, {"gacd": ACCURACIES["gacd"]})
    make_run(Path("weighted"), 1, rows, weights={"gacd": 0.5})
    assert message in refusal(capsys, "seeds", *words.split())


def test_settings_of_methods_that_a_row_does_not_use_may_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "mine", METHODS["kd"])
    for row in ("pgd-at", "gacd+aft"):
        rows = {row: ACCURACIES["gacd"]}
        make_run(Path(row, "0"), 0, rows, gacd={"negatives": 8})
        make_run(Path(row, "1"), 1, rows, gacd={"negatives": 9}, extra={"mine": {"beta": 1.0}})
    assert "2 runs of one recipe" in said(capsys, "pgd-at/0", "pgd-at/1")
    assert "(gacd.negatives is 8 in the one" in refusal(capsys, "seeds", "gacd+aft/0", "gacd+aft/1")


def test_evaluations_of_several_students_may_have_one_seed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in (0, 1):
        rows = {"gacd": {"natural": 50.0 + 2 * number}}
        make_run(Path(f"run-{number}"), 0, rows, checkpoint="model.safetensors")
    assert "| gacd | 51.0 [" in said(capsys, "run-0", "run-1", "--markdown")


def test_one_model_is_no_repetition_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluated again, or fine-tuned again by the same seed."""
    files = {"run-0": "m 01ab", "run-1": "m 01ab", "run-2": "m 9f9f"}
    rows = {"gacd": {"natural": 50.0}}
    for number, (name, file) in enumerate(files.items()):
        settings = {"checkpoint": "m", "source_model": None}
        make_run(Path(name, "gacd"), number, {"model": rows["gacd"]}, **settings)
        make_run(Path("tuned", name), 0, rows, checkpoint="m")
        for folder in (Path(name, "gacd"), Path("tuned", name)):
            write_json(folder / "run.json", RUN | {"checkpoint": file})
    text = said(capsys, "run-0", "run-1", "--markdown")
    assert "| gacd | 50.0 [" in text and "gacd: one model in all runs" in text
    text = said(capsys, "run-0", "run-2", "--markdown")
    assert "| gacd | 51.0 [" in text and "one model" not in text
    text = refusal(capsys, "seeds", *files)
    assert text == "run-0/gacd/model and run-1/gacd/model are of one model: give it once"
    assert "both of seed 0" in refusal(capsys, "seeds", "tuned/run-0", "tuned/run-1")
    assert "| gacd | 50.0 [" in said(capsys, "tuned/run-0", "tuned/run-2", "--markdown")


def test_single_models_are_compared_wherever_they_met(capsys: pytest.CaptureFixture[str]) -> None:
    """Two public models: one of the first two runs, the other of the last two."""
    rows = {"base": {"natural": 50.0}, "other": {"natural": 60.0}}
    for number, names in enumerate((("base",), ("base", "other"), ("other",))):
        for name in names:
            out = Path(f"run-{number}", name)
            make_run(out, number, {"model": rows[name]}, checkpoint=name, source_model=None)
            write_json(out / "run.json", RUN | {"checkpoint": f"{name} 01ab"})
    text = said(capsys, "run-0", "run-1", "run-2", "--minus", "base", "--markdown")
    assert re.search(r"\| other \| \+1\d\.\d \[\+", text)


def damaged(path: Path, change: dict[str, Any] | None) -> None:
    """A JSON file with other values, or cut short."""
    if change is None:
        path.write_text("{")
    else:
        write_json(path, read_json(path) | change)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("run.json", None, "damaged, so whose run this is cannot be told: leave that run out"),
        ("run.json", {"teacher": {"checkpoint": []}}, "damaged, so whose run this is cannot be to"),
        ("gacd/record.json", None, "not a whole JSON file; delete it and run again"),
        ("gacd/record.json", {"config": None}, "delete it and run again (config is null)"),
        ("gacd/record.json", {"evaluation": None}, "delete it and run again (evaluation is null)"),
        ("gacd/record.json", {"natural": "abc"}, 'delete it and run again (natural is "abc")'),
    ],
)
def test_damaged_files_are_named_and_their_remedy_loses_nothing(
    capsys: pytest.CaptureFixture[str], file: str, change: dict[str, Any] | None, message: str
) -> None:
    make_run(Path("run"), 0)
    write_json(Path("run/run.json"), RUN)
    damaged(Path("run") / file, change)
    text = refusal(capsys, "seeds", "run")
    assert text.startswith(f"run/{file}") and message in text


@pytest.mark.parametrize(("key", "value"), [("eps", 0.3), ("test_images", "4567")])
@pytest.mark.parametrize("other", ["run-0/gacd", "run-1/pgd-at"])
def test_what_met_another_attacker_or_other_images_is_refused(
    capsys: pytest.CaptureFixture[str], key: str, value: object, other: str
) -> None:
    """Rows of `gacd evaluate` are runs of their own, and data of one name may lie elsewhere."""
    for seed in (0, 1):
        make_run(Path(f"run-{seed}"), seed)
    path = Path(other) / "record.json"
    record = read_json(path)
    write_json(path, record | {"settings": record["settings"] | {key: value}})
    text = refusal(capsys, "seeds", "run-0", "run-1")
    assert other in text and f"were not attacked alike ({key} is " in text and str(value) in text


@pytest.mark.parametrize(
    "runs",
    [
        "cifar10-small/seed-*",
        "cifar10-small/autoattack-500/seed-*",
        "strong-teacher-cifar10/seed-*",
        "strong-teacher-cifar10/wrn-10-2/seed-*",
        "strong-teacher-cifar10/twenty-epochs/seed-*",
        "few-images/seed-*",
        "unlabelled/seed-*",
    ],
)
def test_the_tables_of_our_records_are_those_in_the_readme(
    capsys: pytest.CaptureFixture[str], runs: str
) -> None:
    folders = map(str, sorted(RESULTS.glob(runs)))
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    figures = json.loads(said(capsys, *folders, "--json"))
    for found in figures:
        more = () if found["minus"] or "autoattack-500" in runs else ("natural", "pgd20")
        if found["attack"] in ("autoattack", *more) and found["row"] != "natural":
            sign = "" if found["minus"] is None else "+"
            low, high = (f"{found[end]:.1f}" for end in ("low", "high"))
            assert f"{found['mean']:{sign}.1f} [{low}, {high}]" in readme


def test_runs_that_share_no_row_with_the_other_have_nothing_to_draw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run(Path("a"), 0, {"pgd-at": ACCURACIES["pgd-at"]})
    make_run(Path("b"), 1, {"gacd": ACCURACIES["gacd"]})
    assert said(capsys, "a", "b", "--markdown").startswith("2 runs of one recipe")
    message = refusal(capsys, "seeds", "a", "b", "--figure", "d.svg")
    assert message.startswith("no difference to draw: no run has both pgd-at and another row")


def test_a_teacher_that_one_run_trained_and_others_were_given_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in (0, 1, 2):
        make_run(Path(f"run-{seed}"), seed)
    weights = Path("run-0/teacher/model.safetensors")
    weights.write_bytes(b"weights")
    name = named_by_content(weights)
    for seed, start in enumerate((None, name, name)):
        write_json(Path(f"run-{seed}") / "run.json", RUN | {"teacher": {"checkpoint": start}})
    shown = " ".join(said(capsys, "run-0", "run-1", "run-2").split())
    assert "One teacher taught them all" in shown
