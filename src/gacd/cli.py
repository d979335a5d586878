"""The command line. Help and refusals come before torch is imported."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from gacd import __version__
from gacd.errors import UserError, unknown

COMMANDS = {
    "quickstart": "digits: a robust teacher, small students by every method, a report (3 minutes)",
    "speedrun": "CIFAR-10 on one GPU: ResNet-18 teacher and GACD student in minutes, AutoAttack",
    "train": "train one network: naturally, by PGD adversarial training, TRADES or MART",
    "distill": "from a robust teacher to small evaluated students: ard, rslad, gacd, gacd+aft, ...",
    "finetune": "fine-tune a saved network adversarially",
    "evaluate": "attack a saved network, or a public checkpoint: PGD, AutoAttack, ...",
    "compare": "A B: is one evaluated model more robust than another? paired test, per image",
    "transfer": "a linear classifier for other data on a saved network's frozen features, attacked",
    "analyze": "students and their teacher: class correlations, CKA, t-SNE of two classes",
    "study": "list | run | status | report: the paper's tables and figures, claim by claim",
    "report": "draw report.html of a run folder anew",
}

HELP = f"""usage: gacd COMMAND [--config RECIPE] [--KEY VALUE ...]

gacd {__version__}: small models that stay right under attack, distilled from robust teachers
(Guided Adversarial Contrastive Distillation, and its rivals).

commands:
{chr(10).join(f"  {name:<11} {text}" for name, text in COMMANDS.items())}

  gacd COMMAND --help            every setting of a command, with its default
  gacd COMMAND --print_config    the whole configuration as YAML, to save, change and pass back
  gacd --version

examples:
  gacd quickstart
  gacd distill --config cifar10-small --data.root ~/cifar10 --out runs/mine
  gacd distill --methods '[gacd, gacd+aft]' --threat.eps 4/255 --gacd.temperature 0.07
  gacd evaluate --checkpoint runs/quickstart/gacd+aft/model.safetensors --attacks pgd100x5
  gacd evaluate --checkpoint resnet18.pt --model resnet18 --data.name cifar10 --data.root ~/data
  gacd compare runs/quickstart/gacd+aft runs/quickstart/pgd-at --attack autoattack
  gacd transfer --checkpoint student.safetensors --data.name stl10 --data.root ~/data
  gacd analyze --teacher t.safetensors --students ard=a.safetensors gacd=g.safetensors
  gacd study run table1 ablation --scale small --data.root ~/cifar10 --workers 2

recipes that ship with the package (--config NAME, or a YAML file of your own): {{recipes}}
Flags override the recipe. Running a command again resumes it. Exit codes: 0 done, 2 bad input,
130 stopped by Ctrl-C (after writing a checkpoint)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except UserError as error:
        print(f"gacd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gacd: stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            "gacd: no space left on the disk; free some and run the same command again",
            file=sys.stderr,
        )
        return 2


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.replace("{recipes}", ", ".join(recipes())))
        return 0
    command, *rest = arguments
    if command == "--version":
        print(f"gacd {__version__}")
        return 0
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    cfg = parse(command, rest)
    if cfg is None:
        return 0
    from gacd.commands import analyze, compare, distill, evaluate, train, transfer
    from gacd.study import commands as study

    run = {
        "quickstart": lambda cfg: distill.distill(cfg, "Quickstart: robust handwritten digits"),
        "speedrun": lambda cfg: distill.distill(cfg, "Speedrun: ResNet-18 on CIFAR-10"),
        "train": train.train,
        "distill": distill.distill,
        "finetune": train.finetune,
        "evaluate": evaluate.evaluate,
        "compare": compare.compare,
        "transfer": transfer.transfer,
        "analyze": analyze.analyze,
        "study": study.study,
        "report": evaluate.report,
    }[command]
    run(cfg)
    return 0


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = files("gacd") / "recipes"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def parse(command: str, arguments: list[str]) -> Any:
    """The command's configuration; None where help or the configuration was printed.

    Raises:
        UserError: an unknown key, a value of the wrong type, or an impossible one.
    """
    from jsonargparse import (  # type: ignore[attr-defined]
        ActionConfigFile,
        ArgumentParser,
        set_parsing_settings,
    )

    from gacd import config as c

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows them

    configs: dict[str, type] = {
        "quickstart": c.Distill,
        "speedrun": c.Distill,
        "train": c.Train,
        "distill": c.Distill,
        "finetune": c.Finetune,
        "evaluate": c.Evaluate,
        "compare": c.Compare,
        "transfer": c.Transfer,
        "analyze": c.Analyze,
        "study": c.Study,
        "report": c.Report,
    }
    parser = ArgumentParser(
        prog=f"gacd {command}", description=COMMANDS[command], exit_on_error=False
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help=f"a YAML file, or one of: {', '.join(recipes())}"
    )
    parser.add_class_arguments(configs[command], as_group=False)
    if command in ("quickstart", "speedrun"):
        arguments = ["--config", command, *arguments]
    if command == "compare":
        arguments = _named(arguments)
    if command == "study":
        arguments = _scaled(arguments)
    arguments = _shortened(_recipe_paths(arguments), command)
    try:
        namespace = parser.parse_args(arguments)
        made = parser.instantiate(namespace)
    except SystemExit as stop:  # --help, --print_config
        if stop.code:
            raise UserError("unreadable arguments") from None
        return None
    except Exception as error:
        settings = parser.get_defaults().keys()
        raise UserError(_explained(_one_line(str(error)), settings)) from None
    values = {k: v for k, v in vars(made).items() if k != "config"}
    try:
        return configs[command](**values)
    except ValueError as error:
        raise UserError(_one_line(str(error))) from None


def _recipe_paths(arguments: list[str]) -> list[str]:
    """Every `--config NAME` as the path of the recipe of that name, before the flags.

    Flags override recipes wherever they stand; the parser lets the last one win.
    """
    configs, flags = [], []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != "--config":
            flags.append(argument)
        elif equals or (value := next(given, "")):
            configs.append("--config=" + _recipe(value))
        else:
            flags.append(argument)  # the parser says what it lacks
    return [*configs, *flags]


def _recipe(name: str) -> str:
    if os.sep in name or Path(name).exists():
        return name
    if name.removesuffix(".yaml") in recipes():
        return str(files("gacd") / "recipes" / f"{name.removesuffix('.yaml')}.yaml")
    raise unknown("recipe", name, recipes())


def _shortened(arguments: list[str], command: str) -> list[str]:
    """`--attacks a b c`, `--methods a b` and the like as the YAML lists that the parser reads."""
    lists = {"--attacks": "--evaluation.attacks", "--evaluation.attacks": "--evaluation.attacks"}
    if command in ("distill", "quickstart", "speedrun"):
        lists["--methods"] = "--methods"
    if command == "study":
        lists |= {"--seeds": "--seeds", "--studies": "--studies", "--rivals": "--rivals"}
    if command == "analyze":
        lists = {"--students": "--students", "--classes": "--classes"}
    lists["--data.classes"] = "--data.classes"
    result: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in lists:
            result.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        text = " ".join(values)
        result += [lists[name], text if text.startswith("[") else f"[{', '.join(values)}]"]
    return result


def _named(arguments: list[str]) -> list[str]:
    """`A B --json` as `--a=A --b=B --json=true`."""
    names = iter(("--a=", "--b="))
    result: list[str] = []
    for before, argument in pairwise(["", *arguments]):
        flagged = before.startswith("--") and "=" not in before and before != "--json"
        if argument == "--json":
            result.append("--json=true")
        elif flagged or argument.startswith("-"):
            result.append(argument)
        else:
            result.append(next(names, "") + argument)
    return result


def _scaled(arguments: list[str]) -> list[str]:
    """`run table1 figure2 --scale small` as the scale's recipe, then `--action`, `--studies`."""
    words = []
    rest = list(arguments)
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    named = [f"--action={words[0]}"] if words else []
    named += [f"--studies=[{', '.join(words[1:])}]"] if words[1:] else []
    scales = [a.partition("=")[2] for a in rest if a.startswith("--scale=")]
    scales += [after for before, after in pairwise(rest) if before == "--scale"]
    scale = scales[-1] if scales else "tiny"
    recipe = files("gacd") / "study" / "scales" / f"{scale}.yaml"
    known = recipe.is_file()  # the parser refuses another
    return [*(["--config", str(recipe)] if known else []), *named, *rest]


_UNKNOWN_SETTING = re.compile(
    r"unrecognized arguments: (?P<flag>\S+)"
    r"|Group '(?P<group>.+?)' does not accept option '(?P<option>.+?)'"
    r"|Option '(?P<key>.+?)' is not accepted"
)
_UNKNOWN_CHOICE = re.compile(
    r'Parser key "(.+?)": Expected a typing\.Literal\[(.+)\]\. Got value: (.*)'
)
_WRONG_TYPE = re.compile(r"""Parser key "(.+?)": Expected a <class '(\w+)'>\. Got value: (.*)""")


def _explained(text: str, settings: Iterable[str]) -> str:
    """The parser's message in our words, with the nearest name where one is not known."""
    if found := _UNKNOWN_SETTING.match(text):
        parts = [part for part in found.groups() if part]
        name = ".".join(parts).removeprefix("--").partition("=")[0]
        near = difflib.get_close_matches(name, settings, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"unknown setting '{name}': {hint}--help lists them all"
    if found := _UNKNOWN_CHOICE.match(text):
        key, known, value = found.groups()
        return str(unknown(key, value, [name.strip(" '") for name in known.split(",")]))
    if found := _WRONG_TYPE.match(text):
        key, kind, value = found.groups()
        return f"{key} is '{value}', but must be of type {kind}"
    return text


def _one_line(text: str) -> str:
    """What a parser's error says, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
