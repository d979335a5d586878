"""A step does not wait for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gacd.data.batches import iterate
from gacd.losses import fused
from gacd.methods import METHODS
from gacd.randomness import keyed_generator
from gacd.training import loop

COMPLETE = [n for n, term in METHODS.items() if not term.is_addition] + ["gacd+rslad", "rslad+igdm"]


class Waits(TorchDispatchMode):
    """Counts operations that need a tensor's value on the host: .item(), bool(), boolean masks."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(func._schema.name == f"aten::{name}" for name in self.NAMES)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", COMPLETE)
def test_no_step_waits_for_the_device(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Four times the steps in an epoch, and not one look more at a tensor's value."""
    # Not the CPU's ways, which look at what does not have to be waited for.
    monkeypatch.setattr(fused, "_softplus", lambda x: (F.softplus(x), x.sigmoid()))
    monkeypatch.setattr("gacd.attacks.pgd.check_range", lambda x: None)
    monkeypatch.setattr("gacd.attacks.objectives.check_probabilities", lambda target_probs: None)
    monkeypatch.setattr(loop, "validate", lambda *_, **__: {"val_natural": 1.0, "val_robust": 1.0})
    reads = []
    for method in ("tolist", "numpy", "cpu", "__array__"):
        original = getattr(Tensor, method)

        def noted(self: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            reads.append(1)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, method, noted)

    def looks(batch_size: int) -> int:
        reads.clear()
        with Waits() as waits:
            stage.fit(tmp_path / str(batch_size), name, epochs=1, batch_size=batch_size)
        return waits.count + len(reads)

    assert looks(batch_size=16) == looks(batch_size=4) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", COMPLETE)
def test_on_a_gpu_no_step_waits(stage: Any, name: str) -> None:
    """torch itself raises where a step synchronises; the first ones choose algorithms."""
    device = torch.device("cuda")
    teacher, bank = stage.teacher.module, stage.bank
    try:
        stage.teacher.module, stage.bank = teacher.to(device), bank.to(device)
        method = stage.method(name).to(device).train()
        train = stage.splits.train.to(device)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01)
        batches = iterate(train, 16, shuffle=True, seed=0, epoch=0, drop_last=True, pad=1)
        for step, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
            with torch.autocast("cuda", torch.bfloat16):
                loss = method(batch, keyed_generator(device, step)).total
            loss.backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
        assert step > 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stage.teacher.module, stage.bank = teacher.cpu(), bank


def test_the_guard_looks_now_and_then(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    guard = loop._guard
    monkeypatch.setattr(loop, "_guard", lambda *a: looked.append(1) or guard(*a))
    monkeypatch.setattr(loop, "_GUARD_EVERY", 5)
    stage.fit(tmp_path, "natural", epochs=1, batch_size=4)  # 17 steps
    assert len(looked) == 4
