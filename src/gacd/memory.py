"""State that a contrastive loss reads and a training step writes: nothing here moves in a forward.

Every buffer that moves is persistent, so a state dict resumes exactly.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gacd.errors import UserError, unknown
from gacd.shapes import Labels, PerSample, Scalar

NORMALISERS = ("none", "first-batch", "running", "exact")


class Normaliser(nn.Module):
    """The constant Z of the estimate: what to pass as a loss's `log_z`, kept as log Z.

    | kind | log Z |
    |---|---|
    | `none` | 0: the formula as printed |
    | `first-batch` | the log of the mean Z of the first batch written, then fixed (CRD's code) |
    | `running` | the exponential average of each batch's |
    | `exact` | None: each image its own, over the anchors at hand |

    `write` what `losses.contrastive.log_partition` gives, then `read`. `wants_write` says whether a
    write would change anything, so that the figure need not be computed for nothing. `running`:
    log Z <- m log Z + (1 - m) log mean_i Z_i, m the `momentum`. Raises UserError for an unknown
    kind, or m outside [0, 1).
    """

    def __init__(self, kind: str = "exact", *, momentum: float = 0.99) -> None:
        super().__init__()
        if kind not in NORMALISERS:
            raise unknown("normaliser", kind, NORMALISERS)
        if not 0 <= momentum < 1:
            raise UserError(f"momentum must be in [0, 1), not {momentum}")
        self.kind, self.momentum = kind, momentum
        self._known: Tensor | None = None
        self.log_z: Tensor
        self.written: Tensor
        self.register_buffer("log_z", torch.zeros(()))
        self.register_buffer("written", torch.zeros((), dtype=torch.bool))

    @property
    def wants_write(self) -> bool:
        """Whether the next `write` would change what `read` gives."""
        return self.kind == "running" or (self.kind == "first-batch" and not self._is_written())

    def read(self) -> Scalar | None:
        """log Z, or None where each image has its own; a UserError before the first write."""
        if self.kind == "exact":
            return None
        if self.kind != "none" and not self._is_written():
            raise UserError(f"the normaliser '{self.kind}' has to be written before it is read")
        return self.log_z.clone()

    @torch.no_grad()
    def write(self, log_z_B: PerSample) -> None:
        """Take in one batch's partition functions, log Z_i."""
        if not self.wants_write:
            return
        batch = log_z_B.float().logsumexp(0) - math.log(len(log_z_B))
        batch = batch.to(self.log_z.dtype)
        self.log_z.copy_(self.log_z.lerp(batch, 1 - self.momentum) if self._is_written() else batch)
        self.written.fill_(True)

    def _load_from_state_dict(self, *args: Any, **settings: Any) -> None:
        super()._load_from_state_dict(*args, **settings)
        self._known = None  # what was loaded may not have been written

    def _is_written(self) -> bool:
        # A buffer that was once seen to be True stays so: no need to ask the device again.
        if self._known is not self.written and bool(self.written):
            self._known = self.written
        return self._known is self.written


class MomentumMemory(nn.Module):
    """CRD's memory: one embedding of student and one of teacher for every image, moving averages.

    `read` gives the rows, the step scores them, `write` puts the new embeddings in:
    v <- normalize(m v + (1 - m) new). Rows start at random on the unit sphere.

    Source: Tian et al. 2020 (arXiv:1910.10699), implementation of Eq. 18.
    """

    def __init__(
        self, size: int, width: int, *, momentum: float = 0.5, generator: torch.Generator
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise UserError(f"momentum must be in [0, 1), not {momentum}")
        self.momentum = momentum
        self.student_ME: Tensor
        self.teacher_ME: Tensor
        for name in ("student_ME", "teacher_ME"):
            start = torch.randn(size, width, generator=generator, device=generator.device)
            self.register_buffer(name, F.normalize(start, dim=1))

    def read(
        self, index_BJ: Int[Tensor, "B J"]
    ) -> tuple[Float[Tensor, "B J E"], Float[Tensor, "B J E"]]:
        """Copies of the student's and the teacher's rows."""
        return self.student_ME[index_BJ], self.teacher_ME[index_BJ]

    @torch.no_grad()
    def write(
        self,
        index_B: Int[Tensor, " B"],
        student_BE: Float[Tensor, "B E"],
        teacher_BE: Float[Tensor, "B E"],
    ) -> None:
        """Move the rows of these images towards their new embeddings."""
        for memory_ME, new_BE in ((self.student_ME, student_BE), (self.teacher_ME, teacher_BE)):
            moved_BE = memory_ME[index_B].lerp(new_BE.to(memory_ME.dtype), 1 - self.momentum)
            memory_ME[index_B] = F.normalize(moved_BE, dim=1)


class OtherClasses(nn.Module):
    """Draws, for each image, rows of other classes: uniform, with replacement, no loop over images.

    Rows sorted by class make each class an interval; a draw among the rest jumps over it. A
    UserError where all rows are of one class.
    """

    def __init__(self, labels_M: Int[Tensor, " M"]) -> None:
        super().__init__()
        count_K = labels_M.bincount(minlength=int(labels_M.max()) + 1)
        if int(count_K.max()) == len(labels_M):
            raise UserError("all images are of one class: there are no negatives to draw")
        self.order_M: Tensor
        self.count_K: Tensor
        self.start_K: Tensor
        self.register_buffer("order_M", labels_M.argsort(stable=True), persistent=False)
        self.register_buffer("count_K", count_K, persistent=False)
        self.register_buffer("start_K", count_K.cumsum(0) - count_K, persistent=False)

    def __deepcopy__(self, memo: dict[int, object]) -> "OtherClasses":
        return self  # constant, like the bank: an average of the weights shares it

    def draw(self, labels_B: Labels, k: int, generator: torch.Generator) -> Int[Tensor, "B {k}"]:
        """[B, k] rows."""
        labels_B = labels_B.long()
        count_B, start_B = self.count_K[labels_B], self.start_K[labels_B]
        others_B = len(self.order_M) - count_B
        uniform_Bk = torch.rand(
            len(labels_B), k, generator=generator, device=labels_B.device, dtype=torch.float64
        )
        place_Bk = (uniform_Bk * others_B[:, None]).long()
        place_Bk += torch.where(place_Bk >= start_B[:, None], count_B[:, None], 0)
        return self.order_M[place_Bk]
