"""The command line. Help and refusals come before torch is imported."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from gacd import __version__
from gacd.arguments import (
    DISTILLING,
    defaults,
    explained,
    one_line,
    paths_from_home,
    prepared,
    recipes,
)
from gacd.errors import UserError, unknown
from gacd.ranks import GOAL, REFUSAL
from gacd.signals import terminated_as_interrupted

COMMANDS = {
    "quickstart": "digits: a robust teacher, small students, a report (3 minutes)",
    "speedrun": "CIFAR-10 on one GPU: ResNet-18, teacher and student, briefly",
    "train": "train one network: naturally, by PGD training, TRADES or MART",
    "distill": "from a robust teacher to small students: ard, rslad, gacd, ...",
    "finetune": "fine-tune a saved network adversarially",
    "evaluate": "attack a saved network, or a public checkpoint: AutoAttack, ...",
    "compare": "A B: is one model more robust than another? paired, per image",
    "seeds": "RUN RUN ...: one recipe by several seeds: what is decided",
    "transfer": "a linear classifier for other data on frozen features, attacked",
    "analyze": "students and their teacher: correlations, CKA, t-SNE",
    "study": "list | run | status | report: the paper's tables and figures",
    "report": "draw report.html of a run folder anew",
}

_OF_PATHS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip
_WORDS = {
    "compare": "A B ",
    "seeds": "RUN RUN ... ",
    "report": "[FOLDER] ",
    "study": "[list | run | status | report] [STUDY ...] ",
}

HELP = f"""usage: gacd COMMAND [--config RECIPE] [--KEY VALUE ...]

gacd {__version__}: small models that stay right under attack, distilled from
robust teachers (Guided Adversarial Contrastive Distillation, and its rivals).

commands:
{chr(10).join(f"  {name:<11} {text}" for name, text in COMMANDS.items())}

  gacd COMMAND --help          every setting with its default (or, after
                               --config NAME, that recipe's)
  gacd COMMAND --print_config  the configuration as YAML, to save and change
  gacd --version

examples:
  gacd quickstart
  gacd distill --config cifar10-small --data.root ~/cifar10-jpeg --out runs/mine
  gacd distill --methods gacd gacd+aft --threat.eps 4/255 --gacd.dim 64
  gacd distill --config cifar10-small --data.root ~/cifar10-jpeg \\
    --unlabelled ~/photos --methods pgd-at rst gacd+aft
  gacd evaluate --checkpoint runs/quickstart/gacd+aft/model.safetensors \\
    --threat.eps 0.2
  gacd evaluate --checkpoint theirs.pt --model resnet18 --attacks pgd100x5 \\
    --data.name cifar10 --data.root ~/cifar10
  gacd compare runs/quickstart/gacd+aft runs/quickstart/pgd-at
  gacd seeds runs/seed-0 runs/seed-1 runs/seed-2 --minus pgd-at
  gacd transfer --checkpoint s.safetensors --data.name stl10 --data.root ~/data
  gacd analyze --teacher t.safetensors --students ard=a.safetensors
  gacd study run table1 ablation --scale small --data.root ~/cifar10 --workers 2

recipes of gacd distill: {{recipes}}
--config takes their names, or a YAML file of your own; flags override it.
Running a command again resumes it. Exit codes: 0 done, 2 bad input, 130 stopped
(Ctrl-C, SIGTERM) with a checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _make_printable()
    try:
        with terminated_as_interrupted():
            code = _main(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"gacd: {error}", file=sys.stderr)
        if REFUSAL in os.environ:
            Path(os.environ[REFUSAL]).write_text(str(error), encoding="utf-8")
        return 2
    except KeyboardInterrupt:
        print("gacd: stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read our output has seen enough of it, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except OSError as error:
        if error.errno in _OF_PATHS:
            print(f"gacd: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        if error.errno != errno.ENOSPC:
            raise
        print(
            "gacd: no space left on the disk; free some and run the same command again",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        remedy = _short_of_memory(error)
        if remedy is None:
            raise
        print(f"gacd: {remedy}", file=sys.stderr)
        return 2
    finally:
        _leave()


def _make_printable() -> None:
    """No run ends because what it says cannot be written: a letter that is not there is a `?`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):  # of stderr Python itself takes care
        sys.stdout.reconfigure(errors="replace")


def _short_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """What to do, where that is the error: PyTorch has no class of its own for most of them."""
    text = str(error)
    if "DataLoader worker" in text:
        return (
            "a process that decodes images was killed (is memory short?): run the same command "
            "again, with fewer data.workers if need be"
        )
    words = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(word in text for word in words):
        return (
            "out of memory: run the same command again with a smaller batch_size (of training or "
            "of evaluation) or smaller images (data.size), or where there is more"
        )
    return None


def _leave() -> None:
    """Leave the other processes of a run: gloo's threads abort one that ends among them."""
    distributed = sys.modules.get("torch.distributed")
    if not (distributed and distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


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
    from gacd.study import seeds as together

    run: Callable[..., None] = {
        "quickstart": lambda cfg: distill.distill(cfg, "Quickstart: robust handwritten digits"),
        "speedrun": lambda cfg: distill.distill(cfg, "Speedrun: ResNet-18 on CIFAR-10"),
        "train": train.train,
        "distill": distill.distill,
        "finetune": train.finetune,
        "evaluate": evaluate.evaluate,
        "compare": compare.compare,
        "seeds": together.seeds,
        "transfer": transfer.transfer,
        "analyze": analyze.analyze,
        "study": study.study,
        "report": evaluate.report,
    }[command]
    if GOAL in os.environ:  # a study's cell, a command of its own because of its several ranks
        run(cfg, goal=os.environ[GOAL])
    else:
        run(cfg)
    return 0


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

    config: type = getattr(c, "Distill" if command in DISTILLING else command.capitalize())
    parser = ArgumentParser(
        prog=f"gacd {command}",
        usage=f"gacd {command} {_WORDS.get(command, '')}[--config FILE] [--KEY VALUE ...]",
        description=COMMANDS[command],
        exit_on_error=False,
        allow_abbrev=False,
    )
    ours = f", or one of: {', '.join(recipes())}" if command in DISTILLING else ""
    parser.add_argument("--config", action=ActionConfigFile, help=f"a YAML file{ours}")
    parser.add_class_arguments(config, as_group=False)
    words = prepared(command, config, arguments)
    try:
        parser.set_defaults(defaults(config, words))
        namespace = parser.parse_args(words)
        made = parser.instantiate(namespace)
    except SystemExit as stop:  # --help, --print_config
        if stop.code:
            raise UserError("unreadable arguments") from None
        return None
    except BrokenPipeError:
        raise
    except Exception as error:
        settings = parser.get_defaults().keys()
        raise UserError(explained(one_line(str(error)), settings)) from None
    values = {k: v for k, v in vars(made).items() if k != "config"}
    try:
        return paths_from_home(config(**values))
    except ValueError as error:
        raise UserError(one_line(str(error))) from None


if __name__ == "__main__":
    sys.exit(main())
