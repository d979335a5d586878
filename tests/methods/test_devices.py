"""A training step on another device than the CPU's, by torch's fake tensors: no GPU is needed.

Fake tensors have a device, a shape and no values. The method and its batch lie on one device; what
mixes it with the CPU's tensors raises, and so does what would wait: a look at a value, or a number
of the host's written into a tensor.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gacd.anchors import AnchorBank
from gacd.memory import Normaliser
from gacd.methods import Method
from gacd.methods.anchoring import Anchoring
from gacd.methods.awp import AWP
from gacd.shapes import Batch
from methods.world import SETTINGS, World

DEVICE = "meta"  # a device that autograd takes without a driver
COPIES = ("aten::copy_", "aten::index_put_", "aten::fill_")


class Elsewhere(torch.Generator):
    """A generator of the device: fake tensors are content with any."""

    device = torch.device(DEVICE)

    def clone_state(self) -> "Elsewhere":
        return Elsewhere()


class NoAutocast(torch.autocast):
    """Off, on any device: fake tensors know none on this one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__("cpu", enabled=False)


class OneDevice(TorchDispatchMode):
    """Refuses operations whose tensors lie on two devices; a number on the CPU may be a factor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        name = func._schema.name
        moved = {"cpu", DEVICE} <= devices | {getattr(kwargs.get("device"), "type", DEVICE)}
        if moved and name == "aten::_to_copy":
            raise AssertionError("a tensor is copied from one device to the other")
        wide = any(t.device.type == "cpu" and t.dim() for t in tensors)
        if len(devices) > 1 and (wide or name in COPIES):
            raise AssertionError(f"{name} of tensors on {' and '.join(sorted(devices))}")
        return func(*args, **kwargs)


class NoNumberWritten(TorchFunctionMode):
    """Refuses x[i] = number: it is copied from the host, which waits. A slice is filled instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
            assert isinstance(args[1], slice), "a number is written into places of a tensor"
        return func(*args, **(kwargs or {}))


def move(method: Method, bank: AnchorBank, there: Callable[[Tensor], Tensor]) -> None:
    """What `method.to(device)` would move, and the teacher and the bank."""
    assert bank.labels_M is not None
    bank.features_MD, bank.labels_M = there(bank.features_MD), there(bank.labels_M)
    bank.weights_M = there(bank.weights_M)
    parts = list(method.modules())
    if method.teacher is not None:
        parts += method.teacher.module.modules()
    for part in parts:
        known = isinstance(part, Normaliser) and part._known is part.written
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = nn.Parameter(there(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else there(buffer)
        if known:
            part._known = part.written  # the first step is over
        if isinstance(part, Anchoring):
            part._projected_ME = None


CASES = [(name, {}, AWP()) for name in SETTINGS]
CASES += [(name, {}, AWP(gamma=0.01)) for name in ("pgd-at", "gacd")]
CASES += [
    (
        "gacd",
        {"estimator": estimator, "teacher_projection": projection, "positive": positive}
        | {"refresh": 2, "normaliser": normaliser, "dim": 5},
        AWP(),
    )
    for estimator, projection, positive, normaliser in itertools.product(
        ("exact", "sampled", "memory"),
        ("live", "refreshed", "pca", "identity"),
        ("bank", "view"),
        ("exact", "first-batch"),
    )
    if (estimator, normaliser) != ("memory", "exact")
]


@pytest.mark.parametrize(("name", "changes", "awp"), CASES)
def test_a_step_stays_on_its_device(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    awp: AWP,
) -> None:
    method, batch = world.method(name, awp=awp, **changes), world.batch()
    method(
        batch, torch.Generator()
    ).total.backward()  # the first step may look, and finds the pairs
    method.zero_grad()
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    with FakeTensorMode() as fake:

        def there(tensor: Tensor) -> Tensor:
            return fake.from_tensor(tensor).detach().to(DEVICE)

        move(method, world.bank, there)
        batch = Batch(*map(there, batch))
        with NoNumberWritten(), OneDevice():
            total = method(batch, Elsewhere()).total
            total.backward()
    assert total.device.type == DEVICE
    trained = [p for p in method.student.parameters() if p.grad is not None]
    assert trained and all(p.grad.device.type == DEVICE for p in trained)
