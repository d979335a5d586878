"""The loop: its step by hand, what it keeps, what it guards, what it may not touch or wait for."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Generator, Tensor

from gacd.data.batches import iterate
from gacd.errors import UserError
from gacd.methods import Loss, Method, Step
from gacd.methods.method import COLUMNS
from gacd.randomness import keyed_generator
from gacd.shapes import Batch
from gacd.storage import load_tensors, read_json, read_json_lines
from gacd.training.average import averaged, update
from gacd.training.contexts import fastest_convolutions
from gacd.training.loop import fit
from gacd.training.schedules import learning_rate
from training.states import same, weights


@contextmanager
def steps_of(method: Method, record: list[Any], what: Any) -> Iterator[None]:
    """Note `what(method, batch)` before every step."""
    forward = method.forward

    def noted(batch: Batch, generator: Generator, progress: float) -> Loss:
        record.append(what(method, batch))
        return forward(batch, generator, progress)

    method.forward = noted  # type: ignore[method-assign]
    yield
    method.forward = forward  # type: ignore[method-assign]


def test_two_steps_are_nesterovs_by_hand(stage: Any, tmp_path: Path) -> None:
    """v <- m v + g, w <- w - lr (g + m v); g the clipped gradient plus the weight decay's."""
    method = stage.method("natural")
    twin, batches, rates = copy.deepcopy(method).train(), [], []
    with steps_of(method, batches, lambda _, batch: batch):
        stage.fit(
            tmp_path, method, epochs=1, batch_size=35, lr=0.3, momentum=0.7, weight_decay=0.1,
            clip_norm=0.2, ema=0.0, warmup=0.5, select="last",
        )  # fmt: skip
    velocity, norms = [torch.zeros_like(p) for p in twin.parameters()], []
    for step, batch in enumerate(batches):
        rates.append(learning_rate((step + 0.5) / 2, peak=0.3, schedule="cosine", warmup=0.5))
        loss = F.cross_entropy(twin.student(batch.images), batch.labels)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > 0.2  # so that the clipping is seen
        norms.append(norm.item())
        for p, g, v in zip(twin.parameters(), gradients, velocity, strict=True):
            with torch.no_grad():
                g = g * (0.2 / norm) + 0.1 * p
                v.mul_(0.7).add_(g)
                p.sub_(rates[step] * (g + 0.7 * v))
    assert len(batches) == 2
    [row] = read_json_lines(tmp_path / "log.jsonl")
    assert row.keys() == COLUMNS  # names that no method may log by
    assert row["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)  # before it is clipped
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(method.state_dict()[name], value, msg=name)


def test_on_a_gpu_alone_cudnn_tries_its_algorithms_and_what_was_said_comes_back() -> None:
    flags = torch.backends.cudnn
    assert not flags.benchmark
    for device, expected in (("cuda", True), ("cpu", False)):
        with (
            pytest.raises(RuntimeError, match="in between"),
            fastest_convolutions(torch.device(device)),
        ):
            assert flags.benchmark is expected
            raise RuntimeError("in between")
        assert not flags.benchmark


def test_without_momentum_a_step_is_plain_descent(stage: Any, tmp_path: Path) -> None:
    method = stage.method("natural")
    twin, batches = copy.deepcopy(method).train(), []
    with steps_of(method, batches, lambda _, batch: batch):
        stage.fit(
            tmp_path, method, epochs=1, batch_size=70, lr=0.3, momentum=0.0, weight_decay=0.1,
            clip_norm=1e6, ema=0.0, warmup=0.0, select="last", schedule="one-cycle",
        )  # fmt: skip
    [batch] = batches
    F.cross_entropy(twin.student(batch.images), batch.labels).backward()
    rate = learning_rate(0.5, peak=0.3, schedule="one-cycle", warmup=0.0)
    for name, p in twin.named_parameters():
        expected = p - rate * (p.grad + 0.1 * p)
        torch.testing.assert_close(method.get_parameter(name), expected, msg=name)


def test_a_stages_batches_are_its_epochs_own(stage: Any, tmp_path: Path) -> None:
    """In the order of (seed, epoch), augmented as the plan says."""
    method, seen = stage.method("natural"), []
    with steps_of(method, seen, lambda _, batch: batch):
        stage.fit(tmp_path, method, epochs=2)
    order = {"shuffle": True, "seed": 4, "drop_last": True, "pad": 1, "flip": True}
    train = stage.splits.train
    expected = [batch for epoch in (0, 1) for batch in iterate(train, 16, epoch=epoch, **order)]
    assert len(seen) == len(expected) == 8
    for ours, theirs in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_step_has_noise_of_its_own_and_is_told_what_share_is_done(
    stage: Any, tmp_path: Path
) -> None:
    """Of (seed, epoch, step), and not the augmentation's."""

    def told(seed: int) -> list[tuple[int, float]]:
        method, seen = stage.method("natural"), []
        forward = method.forward

        def noted(batch: Batch, generator: Generator, progress: float) -> Loss:
            seen.append((generator.initial_seed(), progress))
            return forward(batch, generator, progress)

        method.forward = noted  # type: ignore[method-assign]
        stage.fit(tmp_path / str(seed), method, epochs=3, seed=seed)
        return seen

    steps = [*told(4), *told(5)]
    assert [share for _, share in steps] == pytest.approx([step / 12 for step in range(12)] * 2)
    keys = [(seed, epoch, step, 0) for seed in (4, 5) for epoch in range(3) for step in range(4)]
    others = {keyed_generator("cpu", *key).initial_seed() for key in keys}
    assert len({seed for seed, _ in steps} | others) == 48


def test_the_average_is_its_closed_form_and_is_what_is_kept(stage: Any, tmp_path: Path) -> None:
    method = stage.method("natural")
    seen: list[dict[str, Tensor]] = []
    with steps_of(method, seen, lambda method, _: weights(method)):
        stage.fit(tmp_path, method, epochs=2, ema=0.8, select="last")
    after = load_tensors(tmp_path / "best.safetensors")[0]
    assert same(after, method.state_dict())  # and what the method is left with
    # The state after step n is seen before step n + 1; the last one is what the average implies.
    trajectory = seen[1:]
    assert len(trajectory) == 7
    mean = trajectory[0]
    for state in trajectory[1:]:
        mean = {k: 0.8 * mean[k] + 0.2 * v for k, v in state.items() if v.is_floating_point()}
    # a_8 = 0.8 a_7 + 0.2 w_8, and w_8 is where a run without an average ends
    plain, _ = stage.fit(tmp_path / "plain", "natural", epochs=2, ema=0.0, select="last")
    for key, value in mean.items():
        expected = 0.8 * value + 0.2 * plain.state_dict()[key]
        torch.testing.assert_close(after[key], expected, msg=key)
    assert not same(after, plain.state_dict())
    assert after["student.body.1.num_batches_tracked"] == 8


def test_an_average_of_decay_0_is_a_copy_that_shares_no_memory(stage: Any) -> None:
    method = stage.method("gacd")
    kept = averaged(method)
    assert not any(p.requires_grad for p in kept.parameters())
    for parameter in method.parameters():
        parameter.data.add_(1)
    assert not same(kept.state_dict(), method.state_dict())
    update(kept, method, decay=0.0)
    assert same(kept.state_dict(), method.state_dict())
    assert kept.teacher is stage.teacher and kept.terms["gacd"].bank is stage.bank


def test_logs_have_a_row_an_epoch(stage: Any, tmp_path: Path) -> None:
    _, summary = stage.fit(tmp_path, "gacd", epochs=2)
    rows = read_json_lines(tmp_path / "log.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert {"lr", "loss", "grad_norm", "mi", "mi_ceiling", "val_natural"} <= row.keys()
        last = learning_rate((4 * row["epoch"] - 0.5) / 8, peak=0.05, schedule="cosine", warmup=0.2)
        assert row["lr"] == pytest.approx(last)
    assert summary.images == 2 * 4 * 16
    board = EventAccumulator(str(tmp_path)).Reload()
    shown = [point.value for point in board.Scalars("val_natural")]
    assert shown == pytest.approx([row["val_natural"] for row in rows])
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert read_json(tmp_path / "done.json")["selected_epoch"] == summary.selected_epoch


def test_the_log_has_the_means_of_each_epochs_steps(stage: Any, tmp_path: Path) -> None:
    method, seen = stage.method("gacd"), []
    forward = method.forward

    def noted(batch: Batch, generator: Generator, progress: float) -> Loss:
        loss = forward(batch, generator, progress)
        seen.append((loss.total.item(), loss.parts["mi"].item()))
        return loss

    method.forward = noted  # type: ignore[method-assign]
    stage.fit(tmp_path, method, epochs=2)
    for row, steps in zip(
        read_json_lines(tmp_path / "log.jsonl"), (seen[:4], seen[4:]), strict=True
    ):
        means = [sum(values) / 4 for values in zip(*steps, strict=True)]
        assert [row["loss"], row["mi"]] == pytest.approx(means)


def test_a_network_trains_whatever_mode_it_comes_in(stage: Any, tmp_path: Path) -> None:
    found, _ = stage.fit(tmp_path / "evaluating", stage.method("natural").eval(), epochs=1)
    expected, _ = stage.fit(tmp_path / "training", "natural", epochs=1)
    assert same(weights(found), weights(expected))


def test_a_finished_stage_is_only_loaded(stage: Any, tmp_path: Path) -> None:
    method, summary = stage.fit(tmp_path, "pgd-at", epochs=1)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = stage.method("pgd-at", seed=8)
    steps: list[Any] = []
    with steps_of(again, steps, lambda *_: None):
        assert stage.fit(tmp_path, again, epochs=1) == (again, summary)
    assert not steps
    assert same(again.state_dict(), method.state_dict())
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_and_leaves_the_last_good_checkpoint(
    stage: Any, tmp_path: Path, where: str
) -> None:
    method = stage.method("natural")
    forward, count = method.forward, 0

    def broken(batch: Batch, generator: Generator, progress: float) -> Loss:
        nonlocal count
        count += 1
        total, parts = forward(batch, generator, progress)
        if count == 6:  # the second step of the second epoch
            nan = (total - total.detach()).sqrt()  # 0, with an infinite slope
            total = total * torch.nan if where == "loss" else total + nan
        return Loss(total, parts)

    method.forward = broken
    with pytest.raises(UserError, match=r"NaN in epoch 2.*this stage's lr.*end of epoch 1") as stop:
        stage.fit(tmp_path, method)
    assert "\n" not in str(stop.value)
    tensors, meta = load_tensors(tmp_path / "checkpoint.safetensors")
    assert (meta["epoch"], meta["step"]) == (1, 0)
    assert all(v.isfinite().all() for v in tensors.values())
    assert all(v.isfinite().all() for v in load_tensors(tmp_path / "best.safetensors")[0].values())
    assert [row["epoch"] for row in read_json_lines(tmp_path / "log.jsonl")] == [1]


def test_bf16_leaves_the_images_and_weights_in_float32(stage: Any, tmp_path: Path) -> None:
    method, seen, inside = stage.method("pgd-at"), [], []
    method.student.body[0].register_forward_hook(lambda *io: inside.append(io[2].dtype))

    def look(method: Method, batch: Batch) -> tuple[Any, ...]:
        generator = Generator().manual_seed(0)
        x_adv = method.adversarial(Step(batch, method.student, None, generator, 0.0))
        return batch.images.dtype, x_adv.dtype, (x_adv - batch.images).abs().max()

    with steps_of(method, seen, look):
        stage.fit(tmp_path, method, precision="bf16-mixed", epochs=1)
    for clean, attacked, reach in seen:
        assert clean == attacked == torch.float32
        assert 0.04 < reach <= 0.05 + 1e-6
    assert set(inside) == {torch.bfloat16}  # training and validation both
    assert all(p.dtype == torch.float32 for p in method.parameters())


def test_dropout_is_keyed_as_everything_is(stage: Any, tmp_path: Path) -> None:
    """Networks from elsewhere draw from the global generator, which is left as it was."""
    weights = []
    for run in range(2):
        method = stage.method()
        whole = method.student.forward_features
        method.student.forward_features = lambda x, whole=whole, method=method: F.dropout(
            whole(x), 0.5, training=method.student.training
        )
        torch.manual_seed(run)
        before = torch.get_rng_state()
        stage.fit(tmp_path / str(run), method, epochs=1)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(method.student.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("stops", [False, True])
def test_a_compiled_student_has_its_plain_forward_afterwards(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """Also when the stage fails: what comes next may have other shapes, or be copied and saved."""
    called = []

    def compiled(forward: Any, **_: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            called.append(len(x))
            if stops:
                raise UserError("enough")
            return forward(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    method = stage.method("natural")
    try:
        stage.fit(tmp_path, method, epochs=1, compile=True)
    except UserError:
        assert stops
    assert called
    called.clear()
    method.student(torch.rand(2, 1, 8, 8))
    assert not called


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("schedule='cosin'", "unknown schedule 'cosin': did you mean 'cosine'?"),
        ("select='best'", "unknown select 'best'"),
        ("clip_norm=0.0", "momentum and warmup must be in [0, 1) and clip_norm above 0"),
        ("momentum=1.5", "momentum and warmup must be in [0, 1)"),
        ("pad=-1", "weight_decay and pad must be 0 or more, not 0.0005 and -1"),
    ],
)
def test_a_plan_that_is_none_is_refused(setting: str, said: str) -> None:
    """In a process of its own: the tests check every type themselves."""
    program = f"from gacd.training.loop import Plan; Plan(epochs=1, batch_size=1, lr=1, {setting})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"UserError: {said}" in done.stderr


def test_a_batch_larger_than_the_data_is_refused(stage: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch of 71 images is more than the 70"):
        stage.fit(tmp_path, "natural", batch_size=71)


def test_a_fabric_that_rounds_images_is_refused(stage: Any, tmp_path: Path) -> None:
    rounding = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    with pytest.raises(UserError, match=r"rounds images .*Bf16Autocast"):
        fit(rounding, stage.method(), stage.splits, stage.plan, out=tmp_path / "run", name="stage")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_a_term_holds_stays_as_it_is(stage: Any, tmp_path: Path) -> None:
    method = stage.method("kd")
    method.terms["kd"].theirs = stage.teacher.module
    before = {k: v.clone() for k, v in stage.teacher.module.state_dict().items()}
    stage.fit(tmp_path, method, epochs=1)
    assert not any(part.training for part in stage.teacher.module.modules())
    assert all(v.equal(before[k]) for k, v in stage.teacher.module.state_dict().items())


def test_every_step_has_dropout_of_its_own(stage: Any, tmp_path: Path) -> None:
    seeds: list[int] = []
    for name in "ab":
        method = stage.method("natural")
        forward = method.forward
        method.forward = lambda *a, f=forward: seeds.append(torch.initial_seed()) or f(*a)
        stage.fit(tmp_path / name, method)
    assert seeds[:12] == seeds[12:] and len(set(seeds)) == 12
