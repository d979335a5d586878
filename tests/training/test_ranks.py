"""Two processes (gloo, on the CPU) do what one does: gradients, runs, verdicts, Ctrl-C."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from gacd import cli
from gacd.commands import run
from gacd.errors import UserError
from gacd.evaluation.outcomes import Evaluation
from gacd.memory import MomentumMemory
from gacd.shapes import Batch
from gacd.storage import load_meta, load_tensors, read_json, read_json_lines
from gacd.training import validation
from gacd.training.ranks import check_states, per_rank, synchronised

sys.path.insert(0, str(Path(__file__).parent))
import two_ranks

METHODS = ("natural", "pgd-at", "ard", "gacd")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    program = Path(two_ranks.__file__)
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        capture_output=True, text=True, timeout=600, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def said(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"said-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    two_ranks.deterministic(monkeypatch.setattr)


@pytest.fixture
def one() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_whole_batch(stage: Any, out: Path, name: str) -> None:
    parts = [two_ranks.first_batch(stage, rank, 2) for rank in (0, 1)]
    whole = two_ranks.first_batch(stage, 0, 1)
    index = torch.cat([part.index for part in parts])
    assert index.sort().values.equal(whole.index.sort().values)
    assert not set(parts[0].index.tolist()) & set(parts[1].index.tolist())
    method = two_ranks.method_of(stage, name)
    batch = Batch(*(torch.cat(both) for both in zip(*parts, strict=True)))
    method(batch, torch.Generator().manual_seed(0)).total.backward()
    found = [load_tensors(out / f"{name}-{rank}.safetensors")[0] for rank in (0, 1)]
    assert found[0]
    for key, p in method.named_parameters():
        if p.grad is None:
            assert key not in found[0]
            continue
        assert found[0][key].equal(found[1][key])
        torch.testing.assert_close(found[0][key], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_an_attack_reduces_no_gradients(said: list[dict[str, Any]], name: str) -> None:
    """Each parameter's gradient crosses the wire once a step, the anchor bank's not at all."""
    for found in said:
        assert found[f"{name} reduced by the attack"] == 0
        assert found[f"{name} reduced"] == found[f"{name} parameters"] > 0


@pytest.mark.usefixtures("deterministic")
def test_two_halves_of_a_batch_train_as_the_whole(
    stage: Any, out: Path, tmp_path: Path, one: Fabric
) -> None:
    two_ranks.trained(stage, tmp_path, one)
    assert_close(tmp_path, out / "whole")


@pytest.mark.usefixtures("deterministic")
def test_stopped_at_the_same_step_and_resumed_by_one_process(
    stage: Any, out: Path, said: list[dict[str, Any]], one: Fabric
) -> None:
    """Ctrl-C met the first rank alone, twice, in its second step; the guard looks every third."""
    assert said[0]["steps"] == said[1]["steps"] == [[0, 0], [0, 1], [0, 2]]
    meta = load_meta(out / "stopped" / "checkpoint.safetensors")
    assert (meta["epoch"], meta["step"]) == (0, 3)
    assert not (out / "stopped" / "done.json").exists()
    two_ranks.trained(stage, out / "stopped", one)
    assert_close(out / "stopped", out / "whole")


def assert_close(a: Path, b: Path) -> None:
    (ours, _), (theirs, _) = (load_tensors(folder / "best.safetensors") for folder in (a, b))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    rows, others = (read_json_lines(folder / "log.jsonl") for folder in (a, b))
    assert len(rows) == len(others) == 2
    for row, other in zip(rows, others, strict=True):
        for key in ("loss", "grad_norm", "val_natural", "val_robust"):
            assert row[key] == pytest.approx(other[key], rel=1e-3)


def test_verdicts_are_those_of_one_process(
    out: Path, said: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = two_ranks.load(Path(__file__).parents[1] / "evaluation" / "conftest.py", "quick")
    monkeypatch.setattr(pyautoattack, "AutoAttack", quick.QuickAutoAttack)
    alone = two_ranks.evaluated(*two_ranks.networks())
    for rank in (0, 1):
        found = Evaluation.load(out / f"outcomes-{rank}.safetensors")
        assert found.settings == alone.settings
        for name in ("natural", *two_ranks.ATTACKS):
            assert found.robust[name].equal(alone.robust[name]), name
    assert 0 < alone.accuracy("autoattack") < alone.accuracy("natural")
    for name in ("natural", "fgsm", "pgd3x2", "cw2", "transfer", "noise"):  # 8 batches, halved
        assert [found["attacked"][name] for found in said] == [4, 4]


def test_ranks_validate_one_network(out: Path) -> None:
    """BatchNorm's statistics are each rank's own in training; validated are the first one's."""
    first, second = (load_tensors(out / f"buffers-{rank}.safetensors")[0] for rank in (0, 1))
    means = [name for name in first if name.endswith("running_mean")]
    assert means and all(first[name].any() for name in means)
    assert all(first[name].equal(second[name]) for name in first)


def test_a_stage_on_a_cpu_synchronises_no_batch_norm(stage: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use local"):
        stage.fit(tmp_path, "natural", sync_batch_norm=True)


def test_each_rank_draws_noise_of_its_own(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its four steps and in validation; one process here, told that it is another rank."""
    seeds: list[set[int]] = []
    count = validation.count_right

    def counted(*given: Any, generator: torch.Generator, **more: Any) -> torch.Tensor:
        seeds[-1].add(generator.initial_seed())
        return count(*given, generator=generator, **more)

    monkeypatch.setattr(validation, "count_right", counted)
    for rank in (0, 1):
        monkeypatch.setattr(Fabric, "global_rank", property(lambda _, rank=rank: rank))
        seeds.append(set())
        method = stage.method("natural")
        forward = method.forward

        def noted(*step: Any, forward: Any = forward) -> Any:
            seeds[-1].add(step[1].initial_seed())
            return forward(*step)

        method.forward = noted
        stage.fit(tmp_path / str(rank), method, epochs=1)
    assert len(seeds[0]) == len(seeds[1]) == 4 + 1
    assert not seeds[0] & seeds[1]


def test_the_command_on_two_processes_and_again_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "distill --student digits-cnn-2 --teacher.model digits-cnn-4 --methods kd gacd+aft "
        "--attacks natural pgd2 --threat.eps 0.1 --data.train_limit 200 --data.test_limit 40 "
        "--gacd.negatives 32 --gacd.dim 8 --fabric.accelerator cpu --fabric.precision 32-true "
        f"--evaluation.batch_size 8 --out {tmp_path / 'run'}"
    ).split()
    for stage in ("teacher.training", "training", "distillation", "finetune"):
        command += f"--{stage}.epochs 1 --{stage}.attack.steps 1 --{stage}.batch_size 32".split()
    two = [*command, "--fabric.devices", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "gacd.cli", *two],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report:") == 1  # one rank speaks
    records = [tmp_path / "run" / row / "record.json" for row in ("teacher", "kd", "gacd+aft")]
    assert [read_json(record)["n"] for record in records] == [40] * 3
    before = [record.read_bytes() for record in records]
    monkeypatch.setattr(run, "write_run_report", lambda *_, **__: None)
    assert cli.main(command) == 0
    assert [record.read_bytes() for record in records] == before

    done = subprocess.run(  # both ranks are told
        [sys.executable, "-m", "gacd.cli", *two, "--seed", "1"],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2 and "holds another run" in done.stderr
    assert "Traceback" not in done.stderr

    more = [*two, "--attacks", "natural", "pgd2", "pgd3"]  # and measured again, on two
    done = subprocess.run(
        [sys.executable, "-m", "gacd.cli", *more],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("measured again") == 1
    assert all("pgd3" in read_json(record) for record in records)


def test_what_several_ranks_cannot_do_is_refused() -> None:
    assert per_rank(12, 3) == 4
    with pytest.raises(UserError, match="multiple of 3"):
        per_rank(16, 3)
    with pytest.raises(UserError, match="momentum memory"):
        check_states(nn.Sequential(MomentumMemory(4, 2, generator=torch.Generator())))


def test_synchronised_batch_norm_is_put_back_and_needs_a_gpu() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2)))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with (
        pytest.raises(UserError, match="use local"),
        synchronised(network, enabled=True, device=cpu),
    ):
        pass
    own = network[1][0]
    with synchronised(network, enabled=True, device=gpu):
        assert isinstance(network[1][0], nn.SyncBatchNorm)
        assert network[1][0].weight is own.weight
        network.eval()
        network[1][0].running_mean += 3
        network(torch.rand(1, 1, 5, 5))
    assert network[1][0] is own
    assert not own.training
    assert own.running_mean.tolist() == [3, 3]
