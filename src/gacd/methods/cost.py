"""What a method costs: passes and FLOPs per training image, counted while it takes some steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gacd.data.dataset import ImageDataset
from gacd.data.images import to_float
from gacd.methods.base import Teacher
from gacd.methods.method import Method
from gacd.models.base import Backbone
from gacd.randomness import global_randomness_kept
from gacd.shapes import Batch

_SIZES = 2, 4  # images in the two steps: the cost of a step is a line through them


@dataclass(frozen=True)
class Cost:
    """Per training image, the attack included; sums and multiples of costs are costs.

    Passes go through a whole network, forward or backward; `student_input_backward` are those of
    the student's that stop at the image and spare its weights. `flops` counts a multiplication and
    an addition as two, in matrix products and convolutions alone.
    """

    student_forward: float = 0.0
    student_backward: float = 0.0
    student_input_backward: float = 0.0
    teacher_forward: float = 0.0
    teacher_backward: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        ours, theirs = asdict(self), asdict(other)
        return Cost(**{name: value + theirs[name] for name, value in ours.items()})

    def __mul__(self, factor: int | float) -> "Cost":
        return Cost(**{name: factor * value for name, value in asdict(self).items()})


def measure(method: Method, data: ImageDataset, *, batch_size: int) -> Cost:
    """The cost per image of `method` in batches of `batch_size`, its warm-ups over.

    A copy takes steps of 2 and of 4 images, the first of `data` (repeated where there are fewer):
    neither the method, nor its statistics and memories, nor any random state moves. The line
    through both tells what each image costs from what a step costs whatever its size (a projected
    anchor bank), which is shared out over `batch_size` images. The transport plan's B x B products,
    the only cost that is not linear in the batch, are thereby mostly left out.
    """
    data = data.to(next(method.parameters()).device)
    index = torch.arange(_SIZES[1], device=data.labels.device) % len(data)
    first = Batch(to_float(next(data.fetch([index]))), data.labels[index], index)
    with global_randomness_kept(index.device):  # dropout draws from it
        small, large = (_step(method, Batch(*(part[:size] for part in first))) for size in _SIZES)
    each = (large + small * -1) * (1 / (_SIZES[1] - _SIZES[0]))
    return each + (small + each * -_SIZES[0]) * (1 / batch_size)


def _step(method: Method, batch: Batch) -> Cost:
    """The cost of one step, of all its images together; where steps differ, their mean."""
    twin = deepcopy(method).train()
    cycle = max(int(term.cycle) for term in twin.terms.values())  # type: ignore[arg-type]
    if method.teacher is not None:
        twin.teacher = Teacher(deepcopy(method.teacher.module))
    generator = torch.Generator(batch.labels.device).manual_seed(0)
    twin(batch, generator).total.backward()  # with what training does once
    student = _Counter(twin.student)
    teacher = _Counter(twin.teacher.module) if twin.teacher is not None else None
    with _products_alone(), Flops() as flops:
        for _ in range(cycle):
            twin(batch, generator).total.backward()
    counted = Cost(
        student_forward=student.forward,
        student_backward=student.backward,
        student_input_backward=student.input_backward,
        teacher_forward=teacher.forward if teacher else 0.0,
        teacher_backward=teacher.backward if teacher else 0.0,
        flops=flops.total,
    )
    return counted * (1 / cycle)


@contextmanager
def _products_alone() -> Iterator[None]:
    """Attention by its matrix products: its fused kernels have no formula."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up PyTorch's formulas; its FlopCounterMode cannot follow an attack's autograd.grad."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            return out
        if func is torch.ops.aten.convolution_backward.default:
            # PyTorch counts the gradient of grouped weights as that of a single group.
            *given, groups, (image, weight, _) = args
            of_image = formula(*given, groups, (image, False, False), out_val=out)
            of_weight = formula(*given, groups, (False, weight, False), out_val=out)
            self.total += of_image + of_weight / groups
        else:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _Counter:
    """Counts the images that pass a network's features, and the gradients that come back."""

    def __init__(self, network: Backbone) -> None:
        self.forward = self.backward = self.input_backward = 0.0
        original: Callable[[Tensor], Tensor] = network.forward_features

        def counted(x: Tensor) -> Tensor:
            features = original(x)
            self.forward += len(x)
            if features.requires_grad:
                to_the_input = not any(p.requires_grad for p in network.parameters())
                features.register_hook(  # type: ignore[no-untyped-call]
                    lambda _: self._note(len(x), to_the_input)
                )
            return features

        network.forward_features = counted  # type: ignore[method-assign]

    def _note(self, images: int, to_the_input: bool) -> None:
        self.backward += images
        self.input_backward += images if to_the_input else 0
