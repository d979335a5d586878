"""Words of the command line: help, recipes, flags, and what cannot be a setting."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import gacd
from command_line import refusal
from gacd import cli
from gacd import config as c
from gacd.errors import UserError
from gacd.methods.registry import METHODS, parse_method
from gacd.models import create_model, model_names

pytestmark = pytest.mark.usefixtures("elsewhere")


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


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "gacd COMMAND" in out
    assert max(map(len, out.splitlines())) <= 80


def test_version_and_help_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gacd {gacd.__version__}\n"
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        first = {"compare": "--a A", "seeds": "--runs"}.get(command, "--out")
        assert f"gacd {command}" in out and first in out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["quickstart"], ["default: runs/quickstart)", "default: digits-cnn-8)"]),
        (["distill", "--config", "cifar10-small"], ["default: wrn-10-1)", "default: wrn-10-2)"]),
        (["distill"], ["default: runs/distill)"]),
        (["study", "--scale", "small"], ["default: runs/study-small)", "default: [0, 1, 2])"]),
        (["train", "--config", "mine.yaml"], ["default: runs/mine)", "(type: int, default: 3)"]),
    ],
)
def test_help_shows_the_defaults_of_the_recipe(
    capsys: pytest.CaptureFixture[str], words: list[str], shown: list[str]
) -> None:
    mine = "out: runs/mine\ntraining: {epochs: 3, nothing: 4}\nnothing: 5\n"
    Path("mine.yaml").write_text(mine)
    assert cli.main([*words, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in shown:
        assert text in out


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
        ("evaluate --source_mean 0.5", "both mean and std, or neither"),
        ("transfer --attacks transfer", "'transfer' needs a model to make its images on"),
        ("study list --workers 0", "workers is 0, but must be above 0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(line: str, message: str) -> None:
    command, *flags = line.split()
    with pytest.raises(UserError, match=message):
        cli.parse(command, flags)


@pytest.mark.parametrize(("name", "networks"), [("train", "--model"), ("distill", "--student")])
def test_help_names_every_network(
    capsys: pytest.CaptureFixture[str], name: str, networks: str
) -> None:
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out.partition(f"  {networks} ")[2].partition("(type")[0]
    for network in model_names():
        assert re.sub(r"(-\d+)+$", "", network) in said


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_explains_what_a_new_user_cannot_guess(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert cli.main([command, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for setting in ("--out OUT", "--seed SEED", "--model MODEL", "--b B", "--student STUDENT"):
        assert f" {setting} (type" not in out
    assert "CHECKPOINT (type" not in out


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
        ("seed: 1\nout: x\nseed: 2", "mine.yaml, line 3: seed stands there a second time"),
        ("training: {lr: 1,\n lr: 2}", "mine.yaml, line 2: lr stands there a second time"),
        ("x: &a {b: 1}\ny: {<<: *a, <<: *a}", "unknown setting 'x.b'"),
        ("seeds: [{a: 1, a: 2}]", "mine.yaml, line 1: a stands there a second time"),
        ("data: {classes: [yes, 1]}", "but must be of type .* or null; quote yes, no"),
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
    cfg = cli.parse("evaluate", ["--mean", "0.5", "0.4", "--std", "0.1", "0.2"])
    assert (cfg.mean, cfg.std) == ([0.5, 0.4], [0.1, 0.2])
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
    twice = cli.parse("study", ["list", "--scale", "small", "--scale=tiny"])
    assert twice == cli.parse("study", ["list", "--scale", "tiny"])  # the last, and all of it


@pytest.mark.parametrize(
    "line",
    [
        "a b,c --json --minus ard",
        "--json --minus ard a b,c",
        "a --minus=ard b,c --json=true",
        "--json --runs a b,c --minus ard",
        "a --json true b,c --minus ard --markdown false",
        "--runs=a b,c --minus ard --json",
        "--runs=[a] b,c --minus ard --json",
        '--runs=[a,"b,c"] --minus ard --json',
    ],
)
def test_runs_stand_where_people_write_them(line: str) -> None:
    cfg = cli.parse("seeds", line.split())
    assert (cfg.runs, cfg.minus, cfg.json) == ([Path("a"), Path("b,c")], "ard", True)
    assert not cfg.markdown


@pytest.mark.parametrize("line", ["a b --json", "--json true a b", "a --json=true b"])
def test_two_models_stand_where_people_write_them(line: str) -> None:
    cfg = cli.parse("compare", line.split())
    assert (cfg.a, cfg.b, cfg.json) == (Path("a"), Path("b"), True)
    assert not cli.parse("compare", ["a", "b", "--json", "false"]).json


def test_names_of_classes_may_have_commas_and_spaces() -> None:
    for words in (["a, b", "c d"], ['["a, b", "c d"]']):
        assert cli.parse("train", ["--data.classes", *words]).data.classes == ["a, b", "c d"]
    for words in (["a,b"], ["a", "b"], ["a,", "b"], ["a", ",", "b"], ["a", ",b"]):
        assert cli.parse("train", ["--data.classes", *words]).data.classes == ["a", "b"]
    assert cli.parse("train", ["--data.classes", "1,2", "3"]).data.classes == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("distill --method gacd", "unknown setting 'method': did you mean 'methods'?"),
        ("distill --conf quickstart", "unknown setting 'conf': did you mean 'config'?"),
        ("train --data.root photos", "data.name is digits, which are built in: say what lies"),
        (
            "distill --teacher teacher.pt",
            "settings of its own: say --teacher.checkpoint teacher.pt",
        ),
        (
            "distill --teacher=teacher.pt",
            "settings of its own: say --teacher.checkpoint teacher.pt",
        ),
        ("study run table1 --scale small", "read from files: say in which folder (--data.root)"),
        ("study run table1 --scale small --data.root x", "(--data.root); x is none"),
        ("analyze --teacher runs --students a=runs/a.pt", "runs is a folder: name a file"),
    ],
)
def test_what_is_nearly_right_is_refused(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    Path("teacher.pt").write_bytes(b"PK\x80")
    Path("runs").mkdir()
    Path("runs/a.pt").touch()
    assert message in refusal(capsys, *line.split())


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
        (
            "train",
            ["--threat.eps", "4/255", "--data.name", "folder", "--data.root", "somewhere/here"],
        ),
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


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {name: folder, root: ~/pets}")
    cfg = cli.parse("distill", ["--config=~/mine.yaml", "--out=~/runs", "--bank=~nobody-here/b"])
    assert (cfg.out, cfg.data.root) == (tmp_path / "runs", tmp_path / "pets")
    assert cfg.bank == Path("~nobody-here/b")
    study = cli.parse("study", ["list", "--second_data={name: cifar100, root: ~/pets}"])
    assert c.other_data(study.data, study.second_data).root == tmp_path / "pets"
    assert cli.parse("seeds", ["--runs=~/a", "~/b"]).runs == [tmp_path / "a", tmp_path / "b"]


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
