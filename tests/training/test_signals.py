"""Stopped by a signal in a real process, and run again: the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_line import folders
from gacd import cli
from gacd.commands import run as command
from gacd.storage import load_meta, load_tensors
from training.states import assert_same

COMMAND = (
    "train --model digits-cnn-4 --data.train_limit 200 --data.test_limit 50 --attacks natural "
    "--threat.eps 0.2 --training.attack.step_size 0.06 --training.attack.steps 2 "
    "--training.epochs 4 --training.ema 0.9 --training.batch_size 32 "
    "--fabric.precision 32-true --fabric.accelerator cpu"
)


# The command line, in a process that sends itself a signal in a given step of a given epoch.
PROGRAM = """
import os, sys
from gacd import cli
from gacd.training import loop

number, epoch, step, *arguments = sys.argv[1:]
generator = loop.keyed_generator

def signalled(device, *key):
    if key[2:4] == (int(epoch), int(step)):
        os.kill(os.getpid(), int(number))
    return generator(device, *key)

loop.keyed_generator = signalled
sys.exit(cli.main(arguments))
"""


def test_processes_stopped_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and SIGTERM (exit code 130), then kill -9, in real processes; then the same bits."""
    stopped = tmp_path / "stopped"
    arguments = COMMAND.split()
    stage = stopped / "pgd-at"

    def run(number: int, epoch: int, step: int) -> tuple[int, list[str], tuple[int, int]]:
        when = [str(number), str(epoch), str(step)]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *when, *arguments, "--out", str(stopped)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert not (stage / "done.json").exists()
        meta = load_meta(stage / "checkpoint.safetensors")
        return done.returncode, done.stderr.splitlines(), (meta["epoch"], meta["step"])

    code, lines, where = run(signal.SIGINT, epoch=1, step=3)
    assert (code, where) == (130, (1, 4))
    assert lines[-1] == "gacd: stopped; run the same command again to resume"
    code, lines, where = run(signal.SIGTERM, epoch=1, step=5)
    assert (code, where) == (130, (1, 6))
    assert lines[-1] == "gacd: stopped; run the same command again to resume"
    code, _, where = run(signal.SIGKILL, epoch=2, step=1)
    assert (code, where) == (-signal.SIGKILL, (2, 0))

    monkeypatch.setattr(command, "write_run_report", lambda *_, **__: None)
    assert cli.main([*arguments, "--out", str(stopped)]) == 0
    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    for name in ("model.safetensors", "best.safetensors"):
        assert_equal_files(stage / name, tmp_path / "whole" / "pgd-at" / name)
    assert_same(stage, tmp_path / "whole" / "pgd-at")


def assert_equal_files(a: Path, b: Path) -> None:
    (tensors, meta), (others, other_meta) = load_tensors(a), load_tensors(b)
    for spent in (m["spent"] for m in (meta, other_meta) if "spent" in m):
        assert spent.pop("seconds") > 0  # a clock's
    assert meta == other_meta and tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.equal(value, others[name]), name


def test_a_sigterm_that_is_ignored_stays_so() -> None:
    """As `trap '' TERM` in a script decides it."""
    program = (
        "import os, signal; from gacd import cli; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "cli.parse = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
        "print(cli.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


JOB = PROGRAM.replace(  # from outside, as a scheduler does it
    "os.kill(os.getpid(), int(number))",
    """import subprocess; subprocess.call(f"trap '' {number}; kill -{number} 0", shell=True)""",
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_whole_job_with_its_loading_processes(tmp_path: Path, number: int) -> None:
    folders(tmp_path / "data", each=40)
    flags = f"--data.root {tmp_path / 'data'} --data.stream true --data.workers 2 --data.size 8"
    done = subprocess.run(
        [
            *(sys.executable, "-c", JOB, str(int(number)), "1", "1", *COMMAND.split()),
            *("--data.name", "folder", *flags.split(), "--training.batch_size", "16"),
            *("--data.train_limit", "null", "--data.test_limit", "null"),
            *("--data.val_fraction", "0.2", "--out", str(tmp_path / "run")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert done.returncode == 130
    assert done.stderr.endswith("gacd: stopped; run the same command again to resume\n")
    assert "Traceback" not in done.stderr
    meta = load_meta(tmp_path / "run" / "pgd-at" / "checkpoint.safetensors")
    assert (meta["epoch"], meta["step"]) == (1, 2)
