"""The command as a process: memory, signals, outputs, and what it leaves as it ends."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import distributed

from command_line import TRAIN, refusal
from gacd import cli
from gacd.commands import train
from gacd.data.streamed import StreamedDataset
from gacd.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_other_errors_of_the_system_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(cfg: object) -> None:
        raise OSError(errno.EIO, "unplugged")

    monkeypatch.setattr(train, "train", unplugged)
    with pytest.raises(OSError, match="unplugged"):
        cli.main(TRAIN)


class Dies:
    """A reader whose process is killed, as the system does it where memory is short."""

    def __len__(self) -> int:
        return 1

    def image(self, row: int) -> Image.Image:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def fingerprint(self) -> str:
        return ""


def killed_loader(cfg: object) -> None:
    label = torch.zeros(1, dtype=torch.int64)
    images = StreamedDataset(Dies(), label, label, ("a", "b"), "dies", 8, 3, workers=1)
    list(images.fetch([label]))


def short_of_memory_on_a_gpu(cfg: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (lambda cfg: torch.empty(2**50), "out of memory: run the same command again with"),
        (lambda cfg: bytearray(2**60), "out of memory: run the same command again with"),
        (short_of_memory_on_a_gpu, "out of memory: run the same command again with"),
        (killed_loader, "a process that decodes images was killed"),
    ],
)
def test_short_memory(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[object], object],
    said: str,
) -> None:
    monkeypatch.setattr(train, "train", fails)
    assert said in refusal(capsys, *TRAIN)


def test_other_errors_while_running_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train", lambda cfg: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.main(TRAIN)


@pytest.mark.parametrize("closed", ["1", "2"])
def test_an_output_that_is_closed(closed: str) -> None:
    program = f"{sys.executable} -m gacd.cli train --threat.eps 8 {closed}>&-"
    done = subprocess.run(["sh", "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    version = f"{sys.executable} -m gacd.cli --version {closed}>&-"
    assert subprocess.run(["sh", "-c", version], capture_output=True).returncode == 0


def test_letters_that_the_output_does_not_have() -> None:
    program = [sys.executable, "-m", "gacd.cli", "train", "--config", "größe.yaml"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(program, capture_output=True, env=ascii_only)
    assert (done.returncode, done.stderr) == (2, rb"gacd: gr\xf6\xdfe.yaml: no such file" + b"\n")
    shown = "import sys; from gacd import cli; cli.parse = print; cli.main(['train', 'größe'])"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, env=ascii_only)
    assert done.stdout.startswith(b"train ['gr??e']")


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


@pytest.mark.parametrize(
    ("end", "code"), [(UserError("no"), 2), (KeyboardInterrupt(), 130), (None, 0)]
)
def test_a_run_leaves_its_other_processes_however_it_ends(
    monkeypatch: pytest.MonkeyPatch, end: BaseException | None, code: int
) -> None:
    """Or else gloo's threads abort the interpreter as it ends, in one of three refusals."""

    def joined(cfg: object) -> None:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        if end is not None:
            raise end

    monkeypatch.setattr(train, "train", joined)
    assert cli.main(TRAIN) == code
    assert not distributed.is_initialized()
