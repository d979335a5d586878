"""Sums over many anchors, and their gradients, without the [B, M] matrix of scores.

Scores s_ij = t_j.s_i / T are formed for one chunk of anchors at a time, reduced, and forgotten; a
later pass forms them again. What a pass has formed, projected anchors above all, is kept for the
leading chunks up to a fixed number of bytes, so memory does not grow with M.

For a sum over anchors of slope c_ij in s_ij, with t_j = z_j / |z_j|, z_j = W f_j + b, and an
incoming gradient g_i:

    dL/ds_i = g_i sum_j c_ij t_j / T    dL/dz_j = (sum_i c_ij g_i s_i / T - r_j t_j) / |z_j|
    dL/dW   = sum_j dL/dz_j f_j'        r_j     =  sum_i c_ij g_i s_ij
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gacd.errors import UserError

KEPT_BYTES = 32 * 2**20
# Elements of a chunk's scores and of its projected anchors: on a CPU they should stay in the cache,
# elsewhere they should fill the device.
CPU_ELEMENTS, DEVICE_ELEMENTS = 2**18, 2**22


class Chunk(NamedTuple):
    """Some anchors beside the batch: z [c, E], 1 / |z| [c] or None for 1, and products s.z / T."""

    rows: slice
    z_cE: Tensor
    inverse_c: Tensor | None
    products_Bc: Tensor

    def scores(self) -> Tensor:
        """t.s / T [B, c], a copy in float32 at least."""
        wide = torch.promote_types(self.products_Bc.dtype, torch.float32)
        scores_Bc = self.products_Bc.to(wide, copy=True)
        return scores_Bc if self.inverse_c is None else scores_Bc.mul_(self.inverse_c)


class Scores:
    """A batch against anchors [M, E], or against raw features [M, D] and a projection.

    Iterating gives chunks. The tensors given are those that `over_anchors` differentiates. Raises a
    UserError on shapes that do not fit, a temperature that is not positive, or live anchors.
    """

    def __init__(
        self,
        student_BE: Tensor,
        anchors_MD: Tensor,
        weight_ED: Tensor | None,
        bias_E: Tensor | None,
        *,
        temperature: float,
    ) -> None:
        if not temperature > 0:
            raise UserError(f"temperature must be above 0, not {temperature}")
        if anchors_MD.requires_grad:
            raise UserError(
                "anchors are constants: detach them, or pass raw features and a projection"
            )
        width = anchors_MD.shape[1] if weight_ED is None else weight_ED.shape[0]
        if width != student_BE.shape[1]:
            raise UserError(
                f"student embeddings are {student_BE.shape[1]} wide and the anchors' {width}: "
                "raw teacher features need projection_weight_ED"
            )
        # float16's range is too small for gradients over many anchors; bfloat16's is not.
        narrow = anchors_MD.dtype == torch.float16
        self.dtype = torch.float32 if narrow else anchors_MD.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.student_BE, self.weight_ED, self.bias_E = student_BE, weight_ED, bias_E
        self.anchors_MD, self.temperature = anchors_MD, temperature
        elements = CPU_ELEMENTS if anchors_MD.device.type == "cpu" else DEVICE_ELEMENTS
        self.size = max(1, elements // max(student_BE.shape))
        self._kept: list[Chunk] = []
        self._kept_bytes = 0

    def scaled(self, row_factors_B: Tensor | float = 1.0) -> Tensor:
        """The batch's embeddings over T, times a factor each, in the dtype of the products."""
        factors = torch.as_tensor(row_factors_B, dtype=self.wide) / self.temperature
        scaled_BE = self.student_BE.detach().to(self.wide) * factors.reshape(-1, 1)
        return scaled_BE.to(self.dtype)

    def anchors(self, rows: slice) -> Tensor:
        """Anchors as they were given, in the dtype of the products."""
        return self.anchors_MD[rows].to(self.dtype)

    def __iter__(self) -> Iterator[Chunk]:
        yield from self._kept
        s_BE = self.scaled()
        weight_ED = None if self.weight_ED is None else self.weight_ED.to(self.dtype)
        bias_E = None if self.bias_E is None else self.bias_E.to(self.dtype)
        for start in range(len(self._kept) * self.size, len(self.anchors_MD), self.size):
            rows = slice(start, min(start + self.size, len(self.anchors_MD)))
            z_cE, inverse_c = self.anchors(rows), None
            if weight_ED is not None:
                z_cE = F.linear(z_cE, weight_ED, bias_E)
                norm_c = torch.linalg.vector_norm(z_cE, dim=1, dtype=self.wide)
                # An anchor that projects to nothing scores 0 and has no direction to move in.
                inverse_c = torch.where(norm_c > 1e-12, norm_c, torch.inf).reciprocal()
            chunk = Chunk(rows, z_cE, inverse_c, s_BE @ z_cE.T)
            self._keep(chunk)
            yield chunk

    def _keep(self, chunk: Chunk) -> None:
        copied = self.weight_ED is not None or self.dtype != self.anchors_MD.dtype
        size = chunk.products_Bc.nbytes + (chunk.z_cE.nbytes if copied else 0)
        in_order = chunk.rows.start == len(self._kept) * self.size
        if in_order and self._kept_bytes + size <= KEPT_BYTES:
            self._kept.append(chunk)
            self._kept_bytes += size


class LogSumExp:
    """log sum_j e^{s_ij} over the anchors that are not image i's own.

    Without `index_B` no anchor is anybody's own; without `anchor_index_M` row j is image j's.
    """

    start = -math.inf

    def __init__(self, index_B: Tensor | None, anchor_index_M: Tensor | None) -> None:
        self.index_B, self.anchor_index_M = index_B, anchor_index_M

    def add(self, value_B: Tensor, scores_Bc: Tensor, rows: slice) -> tuple[Tensor, Tensor | int]:
        """The value with a chunk added, and how many terms the chunk had."""
        own_B = self._fill_own_(scores_Bc, rows, -math.inf)
        peak_B = scores_Bc.amax(1).clamp_(min=torch.finfo(scores_Bc.dtype).min)
        # exp2 is twice as fast as exp where it matters, on CPUs.
        terms_Bc = scores_Bc.sub_(peak_B[:, None]).mul_(1 / math.log(2)).exp2_()
        chunk_B = terms_Bc.sum(1).log_().add_(peak_B)
        return torch.logaddexp(value_B, chunk_B), scores_Bc.shape[1] - own_B

    def slope_(self, scores_Bc: Tensor, value_B: Tensor, rows: slice) -> Tensor:
        """d value / d score, written over the scores."""
        finite_B = value_B.clamp(min=torch.finfo(value_B.dtype).min)  # where nothing was added
        slope_Bc = scores_Bc.sub_(finite_B[:, None]).exp_()
        self._fill_own_(slope_Bc, rows, 0.0)
        return slope_Bc

    def _fill_own_(self, x_Bc: Tensor, rows: slice, fill: float) -> Tensor | int:
        if self.index_B is None:
            return 0
        if self.anchor_index_M is not None:
            own_Bc = self.index_B[:, None] == self.anchor_index_M[rows]
            x_Bc.masked_fill_(own_Bc, fill)
            return own_Bc.sum(1)
        place_B: Tensor = self.index_B - rows.start
        own_B = (place_B >= 0) & (place_B < x_Bc.shape[1])
        place_B1 = place_B.clamp(0, x_Bc.shape[1] - 1)[:, None]
        x_Bc.scatter_(1, place_B1, x_Bc.gather(1, place_B1).masked_fill_(own_B[:, None], fill))
        return own_B.long()  # a mask cannot be subtracted


class SoftplusSum:
    """sum_j w_j softplus(s_ij) over the anchors of another class than image i's."""

    start = 0.0

    def __init__(self, labels_B: Tensor, anchor_labels_M: Tensor, weights_M: Tensor | None) -> None:
        self.anchor_labels_M, self.weights_M = anchor_labels_M, weights_M
        self.labels_U, self.class_B = labels_B, None
        if labels_B.device.type == "cpu":  # fewer rows to compare; elsewhere it would synchronise
            self.labels_U, self.class_B = torch.unique(labels_B, return_inverse=True)

    def add(self, value_B: Tensor, scores_Bc: Tensor, rows: slice) -> tuple[Tensor, Tensor | int]:
        """The value with a chunk added, and how many terms the chunk had."""
        losses_Bc = F.softplus(scores_Bc)
        terms_U = self._others(rows).sum(1)
        terms_B = terms_U if self.class_B is None else terms_U[self.class_B]
        return value_B + torch.linalg.vecdot(losses_Bc, self._weights(rows, losses_Bc)), terms_B

    def slope_(self, scores_Bc: Tensor, value_B: Tensor, rows: slice) -> Tensor:
        """d value / d score, written over the scores."""
        return scores_Bc.sigmoid_().mul_(self._weights(rows, scores_Bc))

    def _others(self, rows: slice) -> Tensor:
        return self.labels_U[:, None] != self.anchor_labels_M[rows]

    def _weights(self, rows: slice, like: Tensor) -> Tensor:
        weights_Uc = self._others(rows).to(like.dtype)
        if self.weights_M is not None:
            weights_Uc *= self.weights_M[rows]
        return weights_Uc if self.class_B is None else weights_Uc.index_select(0, self.class_B)


def over_anchors(
    scores: Scores, term: LogSumExp | SoftplusSum, offset_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A term of the scores less `offset_B`, [B], and the number of anchors it ran over, [B].

    Differentiable in the student's embeddings, the projection, and the offset.
    """
    if offset_B is None:
        offset_B = scores.student_BE.new_zeros(len(scores.student_BE), dtype=scores.wide)
    value_B, terms_B = _OverAnchors.apply(
        scores.student_BE, scores.weight_ED, scores.bias_E, offset_B, scores, term
    )
    return value_B, terms_B


class _OverAnchors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_BE: Tensor,
        weight_ED: Tensor | None,
        bias_E: Tensor | None,
        offset_B: Tensor,
        scores: Scores,
        term: LogSumExp | SoftplusSum,
    ) -> tuple[Tensor, Tensor]:
        value_B, terms_B = torch.full_like(offset_B, term.start), torch.zeros_like(offset_B)
        with torch.autocast(student_BE.device.type, enabled=False):
            for chunk in scores:
                logits_Bc = chunk.scores().sub_(offset_B[:, None])
                value_B, more_B = term.add(value_B, logits_Bc, chunk.rows)
                terms_B += more_B
        # The parameters are saved so that autograd notices if they change before the backward pass.
        ctx.save_for_backward(student_BE, weight_ED, bias_E, offset_B, value_B)
        ctx.scores, ctx.term = scores, term
        ctx.mark_non_differentiable(terms_B)
        return value_B, terms_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student_BE, weight_ED, bias_E, offset_B, value_B = ctx.saved_tensors
        scores: Scores = ctx.scores
        to_student, to_weight, to_bias, to_offset = ctx.needs_input_grad[:4]
        d_student = torch.zeros_like(student_BE, dtype=scores.wide)
        d_weight = torch.zeros_like(weight_ED, dtype=scores.wide) if to_weight else None
        d_bias = torch.zeros_like(bias_E, dtype=scores.wide) if to_bias else None
        d_offset = torch.zeros_like(offset_B) if to_offset else None
        gs_BE = scores.scaled(grad_B)
        with torch.autocast(student_BE.device.type, enabled=False):
            for chunk in scores:
                scores_Bc = chunk.scores()
                slope_Bc = ctx.term.slope_(scores_Bc - offset_B[:, None], value_B, chunk.rows)
                if d_offset is not None:
                    d_offset -= slope_Bc.sum(1)
                if chunk.inverse_c is not None:
                    slope_Bc *= chunk.inverse_c
                narrow_Bc = slope_Bc.to(scores.dtype)
                d_student += narrow_Bc @ chunk.z_cE
                if chunk.inverse_c is not None and (to_weight or to_bias):
                    radial_c = (grad_B @ scores_Bc.mul_(slope_Bc)) * chunk.inverse_c
                    d_z_cE = narrow_Bc.T @ gs_BE
                    d_z_cE.addcmul_(chunk.z_cE, radial_c.to(scores.dtype)[:, None], value=-1)
                    if d_weight is not None:
                        d_weight += d_z_cE.T @ scores.anchors(chunk.rows)
                    if d_bias is not None:
                        d_bias += d_z_cE.sum(0)
        d_student *= grad_B[:, None] / scores.temperature
        return (
            d_student.to(student_BE.dtype) if to_student else None,
            None if d_weight is None else d_weight.to(weight_ED.dtype),
            None if d_bias is None else d_bias.to(bias_E.dtype),
            None if d_offset is None else d_offset * grad_B,
            None,
            None,
        )


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def positive_scores(student_BE: Tensor, positive_BE: Tensor, temperature: float) -> Tensor:
    """t_i.s_i / T [B], in float32 at least."""
    return (at_least_float32(student_BE) * at_least_float32(positive_BE)).sum(1) / temperature
