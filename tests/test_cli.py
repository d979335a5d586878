"""The command line: what it refuses, in one line and with exit code 2, and what it understands."""

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError

import gacd
from gacd import cli
from gacd import config as c
from gacd.commands import run, train
from gacd.errors import UserError
from gacd.methods.registry import METHODS, parse_method
from gacd.models import create_model
from gacd.models.checkpoints import save_model
from gacd.training.loop import fit

TINY = [
    "--data.train_limit",
    "120",
    "--data.test_limit",
    "20",
    "--attacks",
    "natural",
    "--fabric.accelerator",
    "cpu",
    "--fabric.precision",
    "32-true",
]
STAGE = ["--training.epochs", "1", "--training.batch_size", "32", "--training.attack.steps", "1"]
TRAIN = ["train", "--model", "digits-cnn-2", *STAGE, *TINY]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of outputs end here."""
    monkeypatch.chdir(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The single line with which a command is refused, with exit code 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gacd: ")]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0].removeprefix("gacd: ")


def test_importing_and_help_are_quick_and_without_torch() -> None:
    program = (
        "import sys, time; start = time.process_time(); import gacd.cli; "
        "code = gacd.cli.main(['--help']); spent = time.process_time() - start; "
        "heavy = {'torch', 'numpy', 'jsonargparse', 'yaml'} & sys.modules.keys(); "
        "print('REPORT', code, sorted(heavy), spent < 0.3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "REPORT 0 [] True"
    for command in cli.COMMANDS:
        assert command in done.stdout
    for recipe in cli.recipes():
        assert recipe in done.stdout


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


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    assert "gacd COMMAND" in capsys.readouterr().out


def test_version_and_help_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gacd {gacd.__version__}\n"
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"gacd {command}" in out and ("--a A" if command == "compare" else "--out") in out


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
        ("train --fabric.strategy quantum", "quantum"),
        ("train --fabric.threads -1", "threads is -1"),
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
        ("evaluate --checkpoint no.pt", "say which network it is"),
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --training.clip_norm 0", "clip_norm is 0.0, but must be above 0"),
        ("train --training.ema 1", "ema is 1.0, but must be at least 0 and below 1"),
        ("train --training.warmup 1", "warmup is 1.0, but must be at least 0 and below 1"),
        ("train --training.awp_warmup 2", "awp_warmup is 2.0, but must be from 0 to 1"),
        ("train --data.workers -1", "workers is -1, but must be 0 or more"),
        ("train --evaluation.batch_size 0", "batch_size is 0, but must be above 0"),
        ("train --evaluation.workers -1", "workers is -1, but must be 0 or more"),
        ("train --evaluation.step_size 0", "step_size is 0.0, but must be above 0"),
        ("train --fabric.devices 0", "devices is 0, but must be above 0"),
        ("train --fabric.num_nodes 0", "num_nodes is 0, but must be above 0"),
        ("train --threat.norm l2 --threat.eps 101", "eps is 101.0, but images are in"),
        ("distill --gacd.negatives 0", "negatives is 0, but must be above 0"),
        ("distill --gacd.dim 0", "dim is 0, but must be above 0"),
        ("distill --crd.negatives 0", "negatives is 0, but must be above 0"),
        ("distill --crd.beta -1", "beta is -1.0, but must be 0 or more"),
        ("distill --iad.temperature 0", "temperature is 0.0, but must be above 0"),
        ("distill --iad.warmup 2", "warmup is 2.0, but must be from 0 to 1"),
        ("analyze --steps 0", "steps is 0, but must be above 0"),
        ("analyze --perplexity 0", "perplexity is 0.0, but must be above 0"),
        ("analyze --images 1", "images is 1, but must be at least 2"),
        ("analyze --step_size 0", "step_size is 0.0, but must be above 0"),
        ("evaluate --source_mean 0.5", "mean and std go together"),
        ("transfer --attacks transfer", "'transfer' needs a model to make its images on"),
        ("study list --workers 0", "workers is 0, but must be above 0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(line: str, message: str) -> None:
    command, *flags = line.split()
    with pytest.raises(UserError, match=message):
        cli.parse(command, flags)


def test_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", "--help"]) == 0
    text = capsys.readouterr().out
    listed = text[text.index("  --methods") :]
    listed = listed[: listed.index("  --weights")]
    assert METHODS.keys() <= set(re.findall(r"[a-z][a-z-]+", listed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lrr: 3}", "unknown setting 'training.lrr': did you mean 'training.lr'?"),
        ("tarining: {lr: 3}", "unknown setting 'tarining.lr': did you mean 'training.lr'?"),
        ("training: {lr: [", r"mine.yaml, line 1: not YAML"),
        ("", "mine.yaml: holds no settings; write them as lines of KEY: VALUE"),
        ("- 3", "mine.yaml: holds no settings"),
        ("training: 3", "mine.yaml: training is '3', but must hold settings, one a line"),
        ("training: {attack: 3}", "training.attack is '3', but must hold settings"),
        ("training:", "training is empty; give it a value, or leave it out"),
        ("seed:", "seed is empty"),
        ("training: {epochs: }", "training.epochs is empty"),
        ("training: {epochs: 0}", "epochs is 0, but must be above 0"),
        ("threat: {eps: 8}", "write 8/255"),
        ("training: {schedule: cosin}", "did you mean 'cosine'?"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert re.search(message, refusal(capsys, "train", "--config", "mine.yaml"))


@pytest.mark.parametrize(
    ("eps", "value"),
    [("8/255", 8 / 255), ("0.03", 0.03), ("1", 1.0), ("0", 0.0), ("16 / 255", 16 / 255)],
)
def test_budgets(eps: str, value: float) -> None:
    cfg = cli.parse("train", ["--threat.eps", eps])
    assert c.fraction(cfg.threat.eps) == pytest.approx(value)


def test_a_euclidean_budget_may_be_above_1() -> None:
    assert cli.parse("train", ["--threat.norm", "l2", "--threat.eps", "2"]).threat.eps == 2


@pytest.mark.parametrize("recipe", cli.recipes())
def test_recipes_parse(recipe: str) -> None:
    cfg = cli.parse("distill", ["--config", recipe])
    assert isinstance(cfg, c.Distill)
    assert all(parse_method(method) for method in cfg.methods)
    create_model(cfg.student, num_classes=10, seed=0)
    if recipe == "quickstart":
        assert cli.parse("quickstart", []) == cfg


def test_flags_override_files_and_files_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("training: {lr: 0.3, epochs: 7}\nseed: 5\n")
    cfg = cli.parse("train", ["--config", "mine.yaml", "--training.lr", "0.2"])
    assert (cfg.training.lr, cfg.training.epochs, cfg.seed) == (0.2, 7, 5)
    assert cfg.training.momentum == c.Training().momentum


@pytest.mark.parametrize(
    "flags",
    [
        ["--methods", "gacd", "kd"],
        ["--methods", "[gacd, kd]"],
        ["--methods=[gacd,kd]"],
        ["--methods", "gacd", "kd", "--seed", "3"],
        ["--methods", "gacd,", "kd"],
        ["--methods", "gacd,kd"],
    ],
)
def test_lists_are_written_either_way(flags: list[str]) -> None:
    assert cli.parse("distill", flags).methods == ["gacd", "kd"]


def test_every_list_may_be_written_with_spaces() -> None:
    cfg = cli.parse("train", ["--evaluation.eps_curve", "0.1", "2/255", "--data.classes", "1", "2"])
    assert (cfg.evaluation.eps_curve, cfg.data.classes) == ([0.1, "2/255"], ["1", "2"])
    cfg = cli.parse("evaluate", ["--mean", "0.5", "0.4", "--std", "1", "2"])
    assert (cfg.mean, cfg.std) == ([0.5, 0.4], [1.0, 2.0])
    pairs = [["a", "b"], ["c", "d"]]
    assert cli.parse("study", ["run", "--table1_pairs", "[[a, b], [c, d]]"]).table1_pairs == pairs
    assert cli.parse("train", ["--data.classes", "null"]).data.classes is None
    for names in (["01", "010"], ["yes", "no"], ["1e3", "2.50"]):  # YAML would read others
        assert cli.parse("train", ["--data.classes", *names]).data.classes == names


def test_words_and_flags_in_the_order_that_people_write_them() -> None:
    assert str(cli.parse("report", ["runs/mine"]).out) == "runs/mine"
    for scale in (["--scale", "small"], ["--scale=small"]):
        for words in ([*scale, "run", "table1"], ["run", "table1", *scale]):
            cfg = cli.parse("study", words)
            assert (cfg.action, cfg.studies, cfg.scale) == ("run", ["table1"], "small")


def test_attacks_have_a_short_name() -> None:
    cfg = cli.parse("evaluate", ["--attacks", "natural", "pgd20", "--seed", "3"])
    assert (cfg.evaluation.attacks, cfg.seed) == (["natural", "pgd20"], 3)
    assert cli.parse("distill", ["--attacks=fgsm"]).evaluation.attacks == ["fgsm"]
    assert cli.parse("quickstart", ["--evaluation.attacks", "fgsm"]).evaluation.attacks == ["fgsm"]


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("distill", ["--config", "cifar10-small", "--gacd.temperature", "0.07"]),
        ("quickstart", ["--teacher.training.lr", "0.3"]),
        ("train", ["--threat.eps", "4/255", "--data.root", "somewhere/here"]),
        ("evaluate", ["--checkpoint", "a.pt", "--model", "resnet18"]),
        ("report", ["--out", "there"]),
    ],
)
def test_the_printed_configuration_gives_the_same_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, flags: list[str]
) -> None:
    wanted = cli.parse(command, flags)
    assert cli.main([command, *flags, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text).keys() == asdict(wanted).keys()
    (tmp_path / "printed.yaml").write_text(text)
    assert cli.parse(command, ["--config", "printed.yaml"]) == wanted


def folders(root: Path, *, empty: str = "") -> None:
    """A class-folder tree of two classes."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(0 if f"{part}/{name}" == empty else 8):
                Image.new("RGB", (8, 8), (i, 9, 9)).save(folder / f"{i}.png")


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


def test_without_an_attack_clean_accuracy_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(*given: Any, **more: Any) -> Any:
        asked.append(given[3].select)
        return fit(*given, **more)

    monkeypatch.setattr(run, "fit", noted)
    assert cli.main([*TRAIN, "--method", "natural", "--out", "natural"]) == 0
    start = ["--checkpoint", "natural/natural/model.safetensors", *STAGE, *TINY]
    assert cli.main(["finetune", *start, "--method", "natural", "--out", "finetuned"]) == 0
    teacher = [f"--teacher.training.{flag}" for flag in ("epochs=1", "batch_size=32")]
    nets = ["--teacher.model", "digits-cnn-2", "--student", "digits-cnn-2"]
    taught = ["distill", "--methods", "kd", "--teacher.method", "natural", *nets, *teacher]
    assert cli.main([*taught, *STAGE, *TINY, "--out", "distilled"]) == 0
    assert asked == ["natural"] * 4
    last = ["--method", "natural", "--training.select", "last", "--out", "last"]
    assert cli.main([*TRAIN, *last]) == 0
    assert cli.main([*TRAIN, "--out", "robust"]) == 0
    assert asked[4:] == ["last", "robust"]


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


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {root: ~/pets}")
    cfg = cli.parse("distill", ["--config=~/mine.yaml", "--out=~/runs", "--bank=~nobody-here/b"])
    assert (cfg.out, cfg.data.root) == (tmp_path / "runs", tmp_path / "pets")
    assert cfg.bank == Path("~nobody-here/b")


def test_a_loss_that_explodes(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, *TRAIN, "--training.lr", "1e38", "--training.epochs", "3")
    assert re.match(r"the loss or its gradient became infinite or NaN in epoch \d: lower", said)


def test_a_folder_of_another_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    said = refusal(capsys, *TRAIN, "--out", "mine", "--seed", "1")
    assert said == (
        "mine holds another run (seed is 0 there and 1 here): "
        "choose another --out, or delete that folder"
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    said = refusal(capsys, *TRAIN, "--out", "thesis")
    assert said == "thesis holds files of something else (no run.json): choose another --out"
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".run.json.7.tmp").touch()
    assert cli.main([*TRAIN, "--out", "killed"]) == 0  # what a kill left of the first file
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_data_that_changed_are_another_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also where only a test image did: half of the verdicts would be of the other one."""
    folders(tmp_path / "pets")
    pets = ["--data.name", "folder", "--data.root", "pets", "--training.batch_size", "4"]
    start = [*TRAIN, *pets, "--out", "mine"]
    assert cli.main(start) == 0
    Image.new("RGB", (8, 8), (9, 200, 9)).save(tmp_path / "pets" / "test" / "cat" / "0.png")
    assert "mine holds another run (images is " in refusal(capsys, *start)


def test_a_folder_that_another_process_has_just_begun_stays_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    for path in Path("mine").iterdir():  # as it is before the first stage
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "run.json":
            path.unlink()
    begun = Path("mine/run.json").read_text()
    with FileLock("mine/.lock"):
        said = refusal(capsys, *TRAIN, "--out", "mine", "--seed", "1")
    assert "another process is at work there" in said
    assert Path("mine/run.json").read_text() == begun
    assert cli.main([*TRAIN, "--out", "mine", "--seed", "1"]) == 0  # nobody is any more


def test_one_process_at_a_time_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--training.epochs", "100000", "--out", "mine"]
    first = subprocess.Popen(
        [sys.executable, "-m", "gacd.cli", *TRAIN, *more], stderr=subprocess.DEVNULL
    )
    try:
        while not Path("mine/pgd-at/log.jsonl").is_file():
            assert first.poll() is None
            time.sleep(0.1)
        said = refusal(capsys, *TRAIN, *more)
        assert (
            said == "mine: another process is at work there; wait for it, or choose another --out"
        )
    finally:
        first.kill()
        first.wait()
    (Path("mine/run.json")).unlink()  # of a run that would never end
    shutil.rmtree("mine/pgd-at")
    assert cli.main([*TRAIN, "--out", "mine"]) == 0  # the dead process holds nothing


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "[]", "run.json is damaged, .*: choose another --out, or delete that folder"),
        ("run.json", '{"seed"', "run.json is damaged"),
        ("pgd-at/record.json", "{}", "record.json: not written by this package; delete it and run"),
        ("report.json", "[]", "report.json: not written by this package"),
        ("pgd-at/done.json", "3", "done.json: not written by this package; delete it and run"),
        ("pgd-at/best.safetensors", "x", "best.safetensors: trunc.* delete it and run the same co"),
    ],
)
def test_damaged_files_of_a_run(
    capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    (Path("mine") / file).write_text(content)
    if file == "report.json":
        assert re.search(message, refusal(capsys, "report", "mine"))
        return
    assert re.search(message, refusal(capsys, *TRAIN, "--out", "mine"))
    if "delete it" in message:
        (Path("mine") / file).unlink()
        assert cli.main([*TRAIN, "--out", "mine"]) == 0


def test_a_mistyped_command_does_not_occupy_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown model" in refusal(capsys, *TRAIN, "--model", "digit-cnn", "--out", "mine")
    assert cli.main([*TRAIN, "--out", "mine"]) == 0


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize(
    ("where", "what", "named"),
    [
        ("pathlib.Path.replace", full, "run.json: "),
        ("safetensors.torch.save_file", full_in_rust, r"\.safetensors: "),
        ("torch.utils.tensorboard.SummaryWriter", full, ""),  # of no writer of ours
    ],
)
def test_no_disk_space(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    what: object,
    named: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, what)
        said = refusal(capsys, *TRAIN, "--out", "mine")
    assert re.search(named + "no space left on the disk; free some and run the same command", said)
    assert cli.main([*TRAIN, "--out", "mine"]) == 0


def test_other_errors_of_the_system_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(cfg: object) -> None:
        raise OSError(errno.EIO, "unplugged")

    monkeypatch.setattr(train, "train", unplugged)
    with pytest.raises(OSError, match="unplugged"):
        cli.main(TRAIN)


def test_ctrl_c_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(cfg: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stopped)
    assert cli.main(TRAIN) == 130
    assert capsys.readouterr().err == "gacd: stopped; run the same command again to resume\n"


def test_a_reader_that_has_seen_enough() -> None:
    program = [sys.executable, "-m", "gacd.cli", "distill", "--print_config"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, text=True, **pipes) as ours:
        assert ours.stdout is not None and ours.stderr is not None
        ours.stdout.close()
        assert ours.stderr.read() == ""
    assert ours.returncode == 141


def test_parse_raises_what_main_prints() -> None:
    with pytest.raises(UserError, match="epochs is 0"):
        cli.parse("train", ["--training.epochs", "0"])


def test_a_folder_of_a_recipes_name_is_not_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()  # runs/quickstart, seen from runs
    assert cli.parse("quickstart", []).threat.eps == 0.2


def test_flags_override_the_recipe_wherever_they_stand() -> None:
    flags = ["--student", "digits-cnn-16", "--methods", "ard"]
    for arguments in ([*flags, "--config", "quickstart"], ["--config=quickstart", *flags]):
        cfg = cli.parse("distill", arguments)
        assert (cfg.student, cfg.methods, str(cfg.out)) == (
            "digits-cnn-16", ["ard"], "runs/quickstart",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--fabric.threads", "0"], "threads is 0, but must be above 0"),
        (["train", "--training.weight_decay", ".nan"], "weight_decay is nan"),
        (["study", "list", "tabel1"], "did you mean 'table1'"),
        (["study", "report", "--out", "nothing"], "nothing holds no study"),
        (["evaluate", "--checkpoint", "."], "is a folder: name a file"),
        (["evaluate", "--mean", "0.5"], "mean and std go together"),
        (["evaluate", "--mean", "0.5", "--std", "0"], "std is 0.0, but must be above 0"),
        (["distill", "--teacher.std", "0.5"], "mean and std go together"),
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
    ],
)
def test_more_refusals(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *arguments)
    assert not (tmp_path / "nothing").exists()
