"""Sums over many anchors, and their gradients, without the [B, M] matrix of scores.

Scores s_ij = t_j.s_i / T are formed for one chunk of anchors at a time, reduced, and forgotten; the
backward pass forms them again. That is cheap beside the projection of raw anchors, which is kept
for the leading anchors, up to a fixed number of bytes: memory does not grow with M.

For a sum over anchors whose slope is c_ij = dL / ds_ij, with t_j = z_j / |z_j|, z_j = W f_j + b:

    dL/ds_i = sum_j c_ij t_j / T        dL/dz_j = (sum_i c_ij s_i / T - r_j t_j) / |z_j|
    dL/dW   = sum_j dL/dz_j f_j'        r_j     =  sum_i c_ij s_ij
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KEPT_BYTES = 32 * 2**20
# On a CPU a chunk's scores should stay in the cache; elsewhere they should fill the device.
CPU_CHUNK, DEVICE_CHUNK = 2048, 16384


class AnchorChunks:
    """Anchors [M, E], or raw features [M, D] with a linear projection, a chunk at a time."""

    def __init__(self, anchors_MD: Tensor, weight_ED: Tensor | None, bias_E: Tensor | None) -> None:
        # float16's range is too small for gradients over many anchors; bfloat16's is not.
        narrow = anchors_MD.dtype == torch.float16
        self.dtype = torch.float32 if narrow else anchors_MD.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.anchors_MD, self.weight_ED, self.bias_E = anchors_MD.detach(), weight_ED, bias_E
        self.size = CPU_CHUNK if anchors_MD.device.type == "cpu" else DEVICE_CHUNK
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._kept_bytes = 0

    def rows(self, chunk: slice) -> Tensor:
        """The chunk's rows as they were given, in the dtype of the products."""
        return self.anchors_MD[chunk].to(self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(rows, z [c, E], 1 / |z| [c]) of each chunk; None where all are of length 1 anyway."""
        for i, start in enumerate(range(0, len(self.anchors_MD), self.size)):
            chunk = slice(start, min(start + self.size, len(self.anchors_MD)))
            if self.weight_ED is None:
                yield chunk, self.rows(chunk), None
            elif i < len(self._kept):
                yield chunk, *self._kept[i]
            else:
                projected = self._project(chunk, self.weight_ED.detach().to(self.dtype))
                if self._kept_bytes + projected[0].nbytes <= KEPT_BYTES:
                    self._kept.append(projected)
                    self._kept_bytes += projected[0].nbytes
                yield chunk, *projected

    def _project(self, chunk: slice, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
        bias_E = None if self.bias_E is None else self.bias_E.detach().to(self.dtype)
        z_cE = F.linear(self.rows(chunk), weight_ED, bias_E)
        norm_c = torch.linalg.vector_norm(z_cE, dim=1, dtype=self.wide)
        # An anchor that projects to nothing scores 0 and has no direction to move in.
        return z_cE, torch.where(norm_c > 1e-12, norm_c, torch.inf).reciprocal()


class Pairs(NamedTuple):
    """Which pairs are scored, and how: those whose keys are equal are left out."""

    temperature: float
    key_B: Tensor | None
    key_M: Tensor | None

    def left_out(self, chunk: slice) -> Tensor | None:
        """[B, c] mask of one chunk, or None where every pair counts."""
        if self.key_B is None or self.key_M is None:
            return None
        return self.key_B[:, None] == self.key_M[chunk]


def log_sum_exp(student_BE: Tensor, chunks: AnchorChunks, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """log sum_j e^{s_ij} [B], and the number of its terms [B]."""
    zero_B = student_BE.new_zeros(len(student_BE), dtype=chunks.wide)
    return _apply(student_BE, zero_B, chunks, pairs, _LogSumExp())


def softplus_sum(
    student_BE: Tensor,
    offset_B: Tensor,
    chunks: AnchorChunks,
    pairs: Pairs,
    weights_M: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """sum_j w_j softplus(s_ij - offset_i) [B], and the number of its terms [B]."""
    return _apply(student_BE, offset_B, chunks, pairs, _SoftplusSum(weights_M))


class _LogSumExp:
    start = -torch.inf

    def add(self, value_B: Tensor, logits_Bc: Tensor, chunk: slice) -> Tensor:
        return torch.logaddexp(value_B, logits_Bc.logsumexp(1))

    def slope_(self, logits_Bc: Tensor, value_B: Tensor, chunk: slice) -> Tensor:
        finite_B = value_B.clamp(min=torch.finfo(value_B.dtype).min)  # where nothing was added
        return logits_Bc.sub_(finite_B[:, None]).exp_()


class _SoftplusSum:
    start = 0.0

    def __init__(self, weights_M: Tensor | None) -> None:
        self.weights_M = weights_M

    def add(self, value_B: Tensor, logits_Bc: Tensor, chunk: slice) -> Tensor:
        losses_Bc = F.softplus(logits_Bc)
        if self.weights_M is None:
            return value_B + losses_Bc.sum(1)
        return value_B + losses_Bc @ self.weights_M[chunk].to(losses_Bc.dtype)

    def slope_(self, logits_Bc: Tensor, value_B: Tensor, chunk: slice) -> Tensor:
        slope_Bc = logits_Bc.sigmoid_()
        return slope_Bc if self.weights_M is None else slope_Bc.mul_(self.weights_M[chunk])


def _apply(
    student_BE: Tensor,
    offset_B: Tensor,
    chunks: AnchorChunks,
    pairs: Pairs,
    term: _LogSumExp | _SoftplusSum,
) -> tuple[Tensor, Tensor]:
    value_B, count_B = _OverAnchors.apply(
        student_BE, chunks.weight_ED, chunks.bias_E, offset_B, chunks, pairs, term
    )
    return value_B, count_B


class _OverAnchors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_BE: Tensor,
        weight_ED: Tensor | None,
        bias_E: Tensor | None,
        offset_B: Tensor,
        chunks: AnchorChunks,
        pairs: Pairs,
        term: _LogSumExp | _SoftplusSum,
    ) -> tuple[Tensor, Tensor]:
        s_BE = student_BE.to(chunks.dtype)
        value_B = torch.full_like(offset_B, term.start)
        count_B = torch.full_like(offset_B, len(chunks.anchors_MD))
        with torch.autocast(student_BE.device.type, enabled=False):
            for chunk, z_cE, inverse_c in chunks:
                logits_Bc = _scores(s_BE, z_cE, inverse_c, pairs).sub_(offset_B[:, None])
                if (out_Bc := pairs.left_out(chunk)) is not None:
                    logits_Bc.masked_fill_(out_Bc, -torch.inf)
                    count_B -= out_Bc.sum(1)
                value_B = term.add(value_B, logits_Bc, chunk)
        # The parameters are saved so that autograd notices when they change before the backward.
        ctx.save_for_backward(student_BE, weight_ED, bias_E, offset_B, value_B)
        ctx.chunks, ctx.pairs, ctx.term = chunks, pairs, term
        ctx.mark_non_differentiable(count_B)
        return value_B, count_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student_BE, weight_ED, bias_E, offset_B, value_B = ctx.saved_tensors
        chunks, pairs = ctx.chunks, ctx.pairs
        s_BE = student_BE.to(chunks.dtype)
        to_student, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_student = torch.zeros_like(student_BE, dtype=chunks.wide)
        d_weight = torch.zeros_like(weight_ED, dtype=chunks.wide) if to_weight else None
        d_bias = torch.zeros_like(bias_E, dtype=chunks.wide) if to_bias else None
        d_offset = torch.zeros_like(offset_B)
        with torch.autocast(student_BE.device.type, enabled=False):
            for chunk, z_cE, inverse_c in chunks:
                scores_Bc = _scores(s_BE, z_cE, inverse_c, pairs)
                slope_Bc = ctx.term.slope_(scores_Bc - offset_B[:, None], value_B, chunk)
                if (out_Bc := pairs.left_out(chunk)) is not None:
                    slope_Bc.masked_fill_(out_Bc, 0)
                slope_Bc *= grad_B[:, None]
                d_offset -= slope_Bc.sum(1)
                radial_c = (scores_Bc.mul_(slope_Bc)).sum(0) if to_weight or to_bias else None
                slope_Bc *= _scale(inverse_c, pairs)
                slope_Bc = slope_Bc.to(chunks.dtype)
                d_student += slope_Bc @ z_cE
                if radial_c is None or inverse_c is None:
                    continue
                radial_c = (radial_c * inverse_c.square()).to(chunks.dtype)
                d_z_cE = (slope_Bc.T @ s_BE).addcmul_(z_cE, radial_c[:, None], value=-1)
                if d_weight is not None:
                    d_weight += d_z_cE.T @ chunks.rows(chunk)
                if d_bias is not None:
                    d_bias += d_z_cE.sum(0, dtype=chunks.wide)
        return (
            d_student.to(student_BE.dtype) if to_student else None,
            None if d_weight is None else d_weight.to(weight_ED.dtype),
            None if d_bias is None else d_bias.to(bias_E.dtype),
            d_offset,
            None,
            None,
            None,
        )


def _scores(s_BE: Tensor, z_cE: Tensor, inverse_c: Tensor | None, pairs: Pairs) -> Tensor:
    return at_least_float32(s_BE @ z_cE.T).mul_(_scale(inverse_c, pairs))


def _scale(inverse_c: Tensor | None, pairs: Pairs) -> Tensor | float:
    """What turns s.z into a score."""
    return 1 / pairs.temperature if inverse_c is None else inverse_c / pairs.temperature


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()
