"""The command line: what it refuses, in one line and with exit code 2, before anything is lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_line import STAGE, TINY, TRAIN, folders, refusal
from gacd import cli
from gacd.models import create_model
from gacd.models.checkpoints import save_model
from gacd.storage import read_json

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_refusal_in_a_real_process_and_before_torch(tmp_path: Path) -> None:
    program = (
        "import sys; import gacd.cli; code = gacd.cli.main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    arguments = ["train", "--threat.eps", "8"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == (
        "gacd: eps is 8.0, but images are in [0, 1]: write 8/255 for eight grey levels\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("distill --config quickstrat", "unknown recipe 'quickstrat': did you mean 'quickstart'?"),
        ("distill --config=quickstrat", "did you mean 'quickstart'?"),
        ("distill --config a/b.yaml", "a/b.yaml: no such file"),
        ("train --method pdg-at", "unknown method 'pdg-at': did you mean 'pgd-at'?"),
        ("distill --methods gacd kdd", "unknown method 'kdd': did you mean 'kd'?"),
        ("distill --methods gacd+rsld", "unknown method 'rsld': did you mean 'rslad'?"),
        ("distill --methods gacd+kd+gacd", "'gacd\\+kd\\+gacd' names gacd twice"),
        ("distill --methods igdm", "'igdm' is an addition to other methods: say rslad\\+igdm"),
        ("distill --methods pgd-at+aft", "aft follows methods with a teacher, such as gacd"),
        ("distill --methods aft", "unknown method 'aft'"),
        ("distill --weights.kdd 2", "unknown method in weights 'kdd': did you mean 'kd'?"),
        ("distill --weights.kd=-1", "weights.kd is -1.0, but must be 0 or more"),
        (
            "distill --methods kd+ard --weights.kd 0 --weights.ard 0",
            "method 'kd\\+ard': every weight is 0",
        ),
        ("train --method ard", "ard needs a teacher: use gacd distill --methods ard"),
        ("distill --teacher.method kd", "kd needs a teacher"),
        ("train --training.attack.objective teacher-kl", "needs a teacher, and pgd-at has none"),
        ("train --training.awp -1", "awp is -1.0, but must be 0 or more"),
        ("distill --extra.mine.beta 1", "unknown method 'mine'"),
        ("train --model resnet19", "unknown model 'resnet19': did you mean 'resnet18'?"),
        ("train --data.name cifar11", "unknown data set 'cifar11': did you mean 'cifar10'?"),
        ("train --attacks pgd", "unknown attack 'pgd': did you mean 'pgd20'?"),
        ("train --tarining.lr 1", "unknown setting 'tarining.lr': did you mean 'training.lr'?"),
        ("train --tarining.lr=1", "unknown setting 'tarining.lr': did you mean 'training.lr'?"),
        ("train --training.schedule cosin", "schedule 'cosin': did you mean 'cosine'?"),
        ("train stray", "'stray' stands where a setting was expected: --NAME VALUE"),
        ("train --threat.eps 8", r"eps is 8\.0, .* write 8/255"),
        ("train --threat.eps 8/0", "'8/0' is no number: write it like 0.03 or 8/255"),
        ("train --threat.eps eight", "'eight' is no number"),
        ("train --threat.eps -0.1", r"eps is -0\.1"),
        ("train --threat.norm l3", "threat.norm 'l3'"),
        ("train --training.epochs 0", "epochs is 0, but must be above 0"),
        ("train --training.epochs 1.5", r"training\.epochs is '1\.5', but must be of type int"),
        ("train --training.lr inf", "lr"),
        ("train --training.lr nan", "lr"),
        ("train --training.momentum 1", "momentum is 1.0, but must be at least 0 and below 1"),
        ("train --training.weight_decay -1", "weight_decay is -1.0"),
        ("train --training.attack.steps 0", "steps is 0"),
        ("train --training.attack.step_size=-1/255", "step_size is -0.003"),
        ("train --trades.beta -1", "beta is -1.0"),
        ("train --data.val_fraction 1", "val_fraction is 1.0, but must be between 0 and 1"),
        ("train --data.pad -1", "pad is -1"),
        ("train --data.train_limit 5", "train_limit=5 is fewer than the 10 classes"),
        ("train --evaluation.eps_curve [1/255,x]", "'x' is no number"),
        ("train --evaluation.eps_curve [-1]", "eps_curve is -1"),
        ("train --evaluation.autoattack_limit 0", "autoattack_limit is 0"),
        ("train --attacks", "attacks is empty"),
        ("train --fabric.accelerator quantum", "quantum"),
        ("train --fabric.accelerator mps", "known: auto, cpu, cuda, gpu"),  # float64 is needed
        ("train --fabric.strategy quantum", "quantum"),
        ("train --fabric.threads -1", "threads is -1"),
        ("train --fabric.threads 100000", "threads is 100000, but this machine has"),
        ("train --seed", "--seed: expected one argument"),
        ("train --seed x", "seed is 'x', but must be of type int"),
        *(
            (f"{line} -1", "a seed is -1, but must be from 0 to 4294967295")
            for line in (
                *("train --seed", "distill --seed", "finetune --seed", "evaluate --seed"),
                *("transfer --seed", "analyze --seed", "study run --seeds 0"),
            )
        ),
        (f"train --seed {10**22}", f"a seed is {10**22}, but must be from 0"),
        ("distill --methods", "methods is empty"),
        ("distill --kd.alpha 1.5", "alpha is 1.5, but must be from 0 to 1"),
        ("distill --gacd.temperature 0", "temperature is 0.0, but must be above 0"),
        ("distill --gacd.refresh 1", "refresh is 1, but must be at least 2"),
        ("distill --gacd.balanced true", "balanced draws anchors, but estimator exact draws none"),
        ("distill --gacd.estimator exat", "estimator 'exat': did you mean 'exact'?"),
        ("distill --distillation.attack.objective ce", "needs the student's head"),
        ("distill --student digits-cnn-0", "no digits-cnn has width 0"),
        ("distill --student wrn-17-2", "wrn-17-2|depth"),
        ("distill --teacher.model nosuch", "unknown model 'nosuch'"),
        ("evaluate", "which model"),
        ("evaluate --checkpoint no.pt --model resnet18", "no.pt: no such file"),
        ("evaluate --checkpoint no.safetensors", "no.safetensors: no such file"),
        ("evaluate --checkpoint no.pt", "no.pt: no such file"),
        ("finetune", "which model"),
        ("report --out nowhere", "nowhere: no evaluated model"),
        ("train --data.name folder", "say in which folder"),
        ("train --data.name folder --data.root nowhere", "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert re.search(message, refusal(capsys, *line.split()))


@pytest.mark.parametrize("empty", ["train/dog", "test/cat"])
def test_empty_class_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, empty: str
) -> None:
    folders(tmp_path / "pets", empty=empty)
    said = refusal(capsys, "train", "--data.name", "folder", "--data.root", "pets")
    assert empty.split("/")[1] in said


def test_a_teacher_of_other_classes_or_channels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, shape in (("classes", (7, 1)), ("channels", (10, 3))):
        model = create_model("digits-cnn-2", num_classes=shape[0], channels=shape[1], seed=0)
        save_model(tmp_path / f"{name}.safetensors", model, {"architecture": "digits-cnn-2"})
    kd = ["distill", "--methods", "kd", *STAGE, *TINY]
    said = refusal(capsys, *kd, "--teacher.checkpoint", "classes.safetensors")
    assert re.search("7 classes and 1 channels, but the data has 10 and 1", said)
    said = refusal(capsys, *kd, "--teacher.checkpoint", "channels.safetensors")
    assert re.search("10 classes and 3 channels, but the data has 10 and 1", said)
    torch.save(model.state_dict(), tmp_path / "channels.pt")
    teacher = ["--teacher.checkpoint", "channels.pt", "--teacher.model", "digits-cnn-2"]
    assert "3 channels, not 1" in refusal(capsys, *kd, *teacher)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--methods", "kd", "--training.batch_size", "500"],
            "training.batch_size: a batch of 500",
        ),
        (["--methods", "kd", "--training.batch_size", "1"], "training.batch_size: batch norm"),
        (["--methods", "gacd", "--distillation.batch_size", "500"], "distillation.batch_size: a"),
        (["--methods", "kd+aft", "--finetune.batch_size", "500"], "finetune.batch_size: a batch"),
        (
            ["--methods", "kd", "--teacher.training.batch_size", "500"],
            "teacher.training.batch_size",
        ),
        (["--methods", "ard", "--training.attack.step_size", "2"], "step_size is 2: "),
        (
            ["--methods", "gacd", "--gacd.teacher_projection", "pca", "--gacd.dim", "9"],
            "a projection to 9 principal components needs features at least as wide, not 8",
        ),
    ],
)
def test_what_would_fail_after_the_teacher_is_refused_before_it(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    names = "teacher.training", "training", "distillation", "finetune"
    stages = [f"--{stage}.batch_size=32" for stage in names]
    distil = ["distill", "--teacher.model", "digits-cnn-2", "--out", "mine", *stages, *TINY]
    assert said in refusal(capsys, *distil, *flags)
    assert [path.name for path in Path("mine").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--evaluation.eps_curve", "0.1", "8"], "eps is 8"),
        (["--threat.eps", "0", "--attacks", "autoattack"], "AutoAttack needs an eps above 0"),
    ],
)
def test_what_the_evaluation_would_refuse_is_refused_before_training(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert said in refusal(capsys, *TRAIN, "--out", "mine", *flags)
    assert not Path("mine").exists()


def test_without_an_attack_clean_accuracy_chooses() -> None:
    assert cli.main([*TRAIN, "--method", "natural", "--out", "natural"]) == 0
    start = ["--checkpoint", "natural/natural/model.safetensors", *STAGE, *TINY]
    assert cli.main(["finetune", *start, "--method", "natural", "--out", "finetuned"]) == 0
    teacher = [f"--teacher.training.{flag}" for flag in ("epochs=1", "batch_size=32")]
    nets = ["--teacher.model", "digits-cnn-2", "--student", "digits-cnn-2"]
    taught = ["distill", "--methods", "kd", "--teacher.method", "natural", *nets, *teacher]
    assert cli.main([*taught, *STAGE, *TINY, "--out", "distilled"]) == 0
    last = ["--method", "natural", "--training.select", "last", "--out", "last"]
    assert cli.main([*TRAIN, *last]) == 0
    assert cli.main([*TRAIN, "--out", "robust"]) == 0
    chose = {
        "natural/natural": "natural", "finetuned/finetuned": "natural",
        "distilled/teacher": "natural", "distilled/kd": "natural",
        "last/natural": "last", "robust/pgd-at": "robust",
    }  # fmt: skip
    for folder, select in chose.items():
        assert read_json(Path(folder) / "done.json")["stage"]["select"] == select


def test_a_teacher_is_kept_when_its_student_must_be_made_otherwise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = ["--teacher.model", "digits-cnn-2", "--teacher.evaluate", "false", *STAGE, *TINY]
    teacher += ["--teacher.training.epochs", "1", "--teacher.training.attack.steps", "1"]
    teacher += ["--teacher.training.batch_size", "32", "--student", "digits-cnn-2"]
    kd = ["distill", "--methods", "kd", *teacher]
    assert "lower" in refusal(capsys, *kd, "--training.lr", "1e38", "--out", "mine")
    said = refusal(capsys, *kd, "--training.lr", "0.1", "--out", "mine")
    assert "choose another --out (--teacher.checkpoint mine/teacher/model.safetensors)" in said
    again = ["--teacher.checkpoint", "mine/teacher/model.safetensors", "--out", "other"]
    assert cli.main([*kd, "--training.lr", "0.1", *again]) == 0
    assert "--teacher.checkpoint" not in refusal(capsys, *kd, "--seed", "1", "--out", "mine")


def test_a_loss_that_explodes(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, *TRAIN, "--training.lr", "1e38", "--training.epochs", "3")
    assert re.match(r"pgd-at: the loss or .* infinite or NaN in epoch \d: lower", said)


def test_a_study_leaves_the_folder_of_a_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("mine").rglob("*")}
    for action in ("run", "status", "report"):
        said = refusal(capsys, "study", action, "table3", "--out", "mine")
        assert said == "mine holds a run, no study: choose another --out"
    assert before == {path: path.stat().st_mtime_ns for path in Path("mine").rglob("*")}


def test_a_bank_is_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("anchors.safetensors").touch()
    kd = ["distill", "--methods", "gacd", "--student", "digits-cnn-2", *TINY]
    said = refusal(capsys, *kd, "--bank", "anchors.safetensors", "--out", "mine")
    assert said.startswith("anchors.safetensors: bank is a folder")
    assert not Path("mine/teacher").exists()


def test_what_killed_processes_left_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    left, new = (Path(f"mine/pgd-at/.checkpoint.safetensors.{n}.tmp") for n in (123, 456))
    others = Path("mine/.notes.tmp")
    for path in (left, new, others):
        path.touch()
    for path in (left, others):
        os.utime(path, (1, 1))
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    assert not left.exists()
    assert new.exists() and others.exists()  # somebody may be at it; it is no file of ours


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--fabric.threads", "0"], "threads is 0, but must be above 0"),
        (["train", "--training.weight_decay", ".nan"], "weight_decay is nan"),
        (["study", "list", "tabel1"], "did you mean 'table1'"),
        (["study", "report", "--out", "nothing"], "nothing holds no study"),
        (["evaluate", "--checkpoint", "."], "is a folder: name a file"),
        (["evaluate", "--mean", "0.5"], "both mean and std, or neither"),
        (["evaluate", "--mean", "0.5", "--std", "0"], "std is [0.0]: each number must be above 0"),
        (["evaluate", "--mean", "125", "--std", "60"], "divide those of 0 to 255 by 255"),
        (["evaluate", "--mean", ".nan", "--std", "1"], "[nan] and std [1.0] must be of images"),
        (["distill", "--teacher.std", "0.5"], "both mean and std, or neither"),
        (["distill", "--teacher.mean", "0", "--teacher.std", "1"], "give teacher.checkpoint, too"),
        (["train", "--config", "quickstart"], "'quickstart' is one of 'gacd distill': give a YAML"),
        (["train", "--config", "mine"], "mine: no such file"),
        (["distill", "--config", "mine.yaml"], "mine.yaml: no such file"),
        (["train", "--config", "."], "Is a directory"),
        (["train", "--training", "3"], "training is '3', but holds settings of its own"),
        (["train", "--data.size", "two"], "data.size is 'two', but must be of type int or null"),
        (["train", "--data.size", "7"], "size is 7, but networks need at least 8 pixels a side"),
        (["train", "--extra.ard.alpha", "x"], "ard.alpha is 'x', but must be of type float"),
        (["distill", "--extra.ard.alpha", "1"], "of methods from outside: say --ard.SETTING"),
        (["distill", "--gacd.estimator", "memory"], "a constant normaliser, such as first-batch"),
        (["study", "list", "--main_pair", "resnet18"], "a pair is a teacher and a student"),
        (["study", "list", "--epochs.ard", "0"], "epochs.ard is 0, but must be above 0"),
        (["study", "list", "--transfer_to", "[{size: 4}]"], "size is 4, but networks need"),
        (["train", "--out", __file__], "cannot be a folder (File exists): choose another --out"),
        (["train", "--out", "x" * 300], "File name too long"),
        (["transfer"], "whose features? give --checkpoint FILE"),
        (["analyze"], "which teacher? give --teacher FILE"),
        (["analyze", "--teacher", "t", "--students", "a=b", "a=c"], "need different names"),
        (["analyze", "--teacher", "t", "--students", "teacher=b"], "none may be 'teacher'"),
    ],
)
def test_more_refusals(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *arguments)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("evaluate --model digits-cnn-2 --checkpoint", "--mean 0.25 --std 0.5"),
        (
            "distill --methods natural --training.batch_size 32 --teacher.model digits-cnn-2"
            " --teacher.checkpoint",
            "--teacher.mean 0.25 --teacher.std 0.5",
        ),
        (
            "evaluate --checkpoint own.safetensors --attacks transfer --source_model digits-cnn-2"
            " --source",
            "--source_mean 0.25 --source_std 0.5",
        ),
    ],
)
def test_what_a_file_normalises_by_is_to_be_said_with_the_flags_of_the_command(
    line: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("digits-cnn-2", num_classes=10, channels=1, seed=0)
    save_model("own.safetensors", model, {"architecture": "digits-cnn-2"})
    normaliser = {"mean": torch.tensor([0.25]), "std": torch.tensor([0.5])}
    torch.save({**normaliser, **model.state_dict()}, "theirs.pt")
    said = refusal(capsys, *line.split(), "theirs.pt", *TINY[:4], *TINY[6:])
    assert said.endswith(f"(mean and std): save the state_dict() without these and say {flags}")


def test_a_training_attack_that_falls_short_of_the_budget_is_told_once_a_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = r"note: 1 steps of 0.00784 in training reach 0.00784 .* eps is 0.0314: say (\S+)"
    assert cli.main(TRAIN) == 0
    assert re.findall(short, capsys.readouterr().out) == ["training.attack.step_size"]
    for number, enough in enumerate(
        (["--method", "natural"], ["--training.attack.step_size=8/255"])
    ):
        assert cli.main([*TRAIN, *enough, "--out", str(number)]) == 0
        assert "training reach" not in capsys.readouterr().out
    stages = ("teacher.training", "training", "distillation")
    steps = [f"--{stage}.{s}" for stage in stages for s in ("attack.steps=1", "batch_size=32")]
    wide = ["--methods", "pgd-at", "ard", "gacd", "--gacd.teacher_projection=pca"]
    assert cli.main(["distill", *steps, *TINY, *wide, "--gacd.dim", "9999"]) == 2
    told = re.findall(short, capsys.readouterr().out)
    assert told == [f"{stage}.attack.step_size" for stage in stages]
