"""Progress: a bar on a terminal, plain lines in a pipe, and tensors read only when shown."""

import os
import re
import subprocess
import sys

import pytest

import gacd.progress
from gacd.progress import progress

pty = pytest.importorskip("pty", reason="needs a system with terminals")

LOOP = """
import time
from gacd.progress import progress
with progress(400, "teacher") as bar:
    for i in range(4):
        time.sleep(0.3)
        bar.advance(100, epoch=i + 1, loss=2.5 - i / 2)
"""


class Costly:
    """A number that counts how often it is read, as a tensor on a GPU would stall."""

    def __init__(self, value: float) -> None:
        self.value, self.reads = value, 0

    def __float__(self) -> float:
        self.reads += 1
        return self.value


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is set."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(gacd.progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_plain_lines_hold_loss_throughput_and_remaining_time(capsys, clock):
    with progress(1000, "gacd/features") as bar:
        clock.now += 25
        bar.advance(250, epoch=3, loss=1.23456)
        clock.now += 5
        bar.advance(50, loss=1.0)
        clock.now += 70
        bar.advance(700, loss=0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "gacd/features: 250/1000 images, 10/s, 0:25 spent, 1:15 left epoch 3 loss 1.235",
        "gacd/features: 1000/1000 images, 10/s, 1:40 spent, 0:00 left epoch 3 loss 0.5",
    ]


def test_hours_are_written_as_such(capsys, clock):
    with progress(4, "long", unit="cells") as bar:
        clock.now += 3725
        bar.advance()
    assert "long: 1/4 cells, 0.00027/s, 1:02:05 spent, 3:06:15 left" in capsys.readouterr().err


def test_a_loop_that_counted_nothing(capsys, clock):
    with progress(10, "empty"):
        pass
    assert capsys.readouterr().err == "empty: 0/10 images, 0/s, 0:00 spent, ? left\n"


def test_silence(capsys):
    with progress(10, "hushed", enabled=False) as bar:
        bar.advance(10, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_lines_read_tensors_only_when_they_are_printed(capsys, clock):
    value = Costly(1.5)
    with progress(100, "gpu") as bar:
        for _ in range(100):
            bar.advance(loss=value)
        assert value.reads == 0
    assert value.reads == 1
    assert "loss 1.5" in capsys.readouterr().err


def test_the_bar_reads_tensors_only_when_it_is_refreshed(monkeypatch, capsys, clock):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    value = Costly(1.5)
    with progress(200, "gpu") as bar:
        for _ in range(100):
            bar.advance(loss=value)
        assert value.reads == 0
        clock.now += 1
        bar.advance(100, loss=value)
        assert value.reads == 1
    assert value.reads <= 2


def test_a_pipe_gets_no_control_characters():
    done = subprocess.run(
        [sys.executable, "-c", LOOP], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    assert re.fullmatch(
        r"teacher: 400/400 images, \d+/s, 0:0\d spent, 0:00 left epoch 4 loss 1\n", done.stderr
    )


def test_a_terminal_gets_a_bar():
    text = on_a_terminal(LOOP)
    assert "\x1b[" in text  # it moves the cursor: one line, drawn anew
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    last = [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]
    assert re.search(r"teacher +━+ 400/400 images \d+/s 0:00:0\d left 0:00:00", last)
    assert "epoch 4 loss 1" in last
    assert "loss 2.5" in plain


def on_a_terminal(program: str) -> str:
    """What a program writes to stderr where that is a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not piece:
                break
            said += piece
        os.close(ours)
        assert process.wait(timeout=60) == 0
    return said.decode()


def test_what_was_done_before_tells_nothing_of_the_rate(capsys, clock):
    with progress(1000, "resumed", done=900) as bar:
        clock.now += 10
        bar.advance(20)
    assert "resumed: 920/1000 images, 2/s, 0:10 spent, 0:40 left" in capsys.readouterr().err
