"""Sums over many anchors, and their gradients, without the [B, M] matrix of scores.

Scores s_ij = t_j.s_i / T are formed for one chunk of anchors at a time, reduced, and forgotten; a
later pass forms them again. What a pass has formed, projected anchors above all, is kept for the
leading chunks up to a fixed number of bytes, so memory does not grow with M.

For sum_j w_j f(s_ij - o_i), with t_j = z_j / |z_j|, z_j = W f_j + b, an incoming gradient g_i, and
slopes c_ij = w_j f'(s_ij - o_i):

    dL/ds_i = g_i sum_j c_ij t_j / T    dL/dz_j = (v_j - (v_j.t_j) t_j) / |z_j|
    dL/dW   = sum_j dL/dz_j f_j'        v_j     = sum_i c_ij g_i s_i / T

The forward pass has all of this but g, so it forms the slopes, and from them the student's gradient
up to g_i, as it goes; the backward pass is left with the projection's. Blocks are [c, B], anchors
first: the CPU's products are fastest that way round. They hold scores to base 2, s log2(e), as
2^x is several times faster there than e^x.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but for its import

from gacd.errors import UserError
from gacd.losses.checks import check_constant, check_temperature, check_widths
from gacd.processor import fast_bf16

KEPT_BYTES = 32 * 2**20
# Of a chunk's scores and of its projected anchors: on a CPU they should stay in the cache,
# elsewhere they should fill the device.
CPU_BYTES, DEVICE_ELEMENTS = 2**20, 2**22

WINDOW = 2**16  # Anchors whose labels are looked up together.
LOG2_E = 1 / math.log(2)


@dataclass
class Chunk:
    """Some anchors: z [c, E], 1 / |z| [c] or None for 1, and products s.z log2(e) / T if kept."""

    rows: slice
    z_cE: Tensor
    inverse_c: Tensor | None
    products_cB: Tensor | None = None


class Scores:
    """A batch against anchors [M, E], or against raw features [M, D] and a projection.

    Iterating gives chunks. The tensors given are those that the sums differentiate. Raises a
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
        check_temperature(temperature)
        check_constant(anchors=anchors_MD)
        check_widths(student_BE, anchors_MD, weight_ED, bias_E)
        self.dtype = product_dtype(anchors_MD)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.student_BE, self.weight_ED, self.bias_E = student_BE, weight_ED, bias_E
        self.anchors_MD, self.temperature = anchors_MD, temperature
        on_cpu = anchors_MD.device.type == "cpu"
        elements = CPU_BYTES // self.dtype.itemsize if on_cpu else DEVICE_ELEMENTS
        self.size = max(1, elements // max(student_BE.shape))
        self._query_EB = self.scaled(LOG2_E).T.contiguous()
        self._kept: list[Chunk] = []
        self._kept_bytes = 0

    @property
    def leaves(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What autograd differentiates: embeddings, and the projection's weight and bias."""
        return self.student_BE, self.weight_ED, self.bias_E

    def scaled(self, row_factors_B: Tensor | float) -> Tensor:
        """The batch's embeddings over T, times a factor each, in the dtype of the products."""
        factors = row_factors_B / self.temperature
        if isinstance(factors, Tensor):
            factors = factors.to(self.wide).reshape(-1, 1)
        return (self.student_BE.detach().to(self.wide) * factors).to(self.dtype)

    def anchors(self, rows: slice) -> Tensor:
        """Anchors as they were given, in the dtype of the products."""
        return self.anchors_MD[rows].to(self.dtype)

    def zeros(self) -> Tensor:
        """A number for each image [B], in float32 at least."""
        return self.student_BE.new_zeros(len(self.student_BE), dtype=self.wide)

    def no_autocast(self) -> torch.autocast:
        """Products in the dtype of the anchors, whatever the surroundings."""
        return torch.autocast(self.student_BE.device.type, enabled=False)

    def __iter__(self) -> Iterator[Chunk]:
        yield from self._kept
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
            chunk = Chunk(rows, z_cE, inverse_c)
            self._keep(chunk)
            yield chunk

    def _keep(self, chunk: Chunk) -> None:
        copied = self.weight_ED is not None or self.dtype != self.anchors_MD.dtype
        size = len(chunk.z_cE) * len(self.student_BE) * self.dtype.itemsize
        size += chunk.z_cE.nbytes if copied else 0
        in_order = chunk.rows.start == len(self._kept) * self.size
        if in_order and self._kept_bytes + size <= KEPT_BYTES:
            chunk.products_cB = chunk.z_cE @ self._query_EB
            self._kept.append(chunk)
            self._kept_bytes += size

    def of(self, chunk: Chunk) -> Tensor:
        """t.s log2(e) / T [c, B], a new tensor in float32 at least."""
        products_cB = chunk.products_cB
        if products_cB is None:
            products_cB = chunk.z_cE @ self._query_EB
        scores_cB = products_cB.to(self.wide, copy=True)
        return scores_cB if chunk.inverse_c is None else scores_cB.mul_(chunk.inverse_c[:, None])


class Others:
    """For every image the anchors whose label is not its own: classes, or rows of the data set.

    Without `anchor_labels_M` anchor j is labelled j. Anchors fall into groups: those labelled as
    some image is, and those labelled as none. Groups are found for a window of chunks at a time.
    """

    def __init__(self, labels_B: Tensor, anchor_labels_M: Tensor | None, anchors: int) -> None:
        self.anchor_labels_M, self.anchors = anchor_labels_M, anchors
        labels_B = labels_B.long()  # bytes would not hold every anchor's
        sorted_B = labels_B.sort().values
        self.sorted_B, self.label_G = sorted_B, torch.cat((sorted_B, sorted_B[-1:]))
        self.group_B = torch.searchsorted(sorted_B, labels_B)  # the first of equal ones
        self.none = len(labels_B)
        self._start, self._window = 0, self.group_B[:0]

    def offsets(self, offset_B: Tensor) -> Tensor:
        """What to subtract from a score, by the anchor's group [G, B]: infinity for one's own."""
        # Not by indexing: a number assigned to a tensor is copied to its device, which waits.
        return offset_B.repeat(self.none + 1, 1).scatter_(0, self.group_B[None], math.inf)

    def groups(self, rows: slice) -> Tensor:
        """The group of each anchor of a chunk [c]."""
        if not self._start <= rows.start < rows.stop <= self._start + len(self._window):
            stop = min(max(rows.stop, rows.start + WINDOW), self.anchors)
            self._start, self._window = rows.start, self._groups(rows.start, stop)
        return self._window[rows.start - self._start : rows.stop - self._start]

    def _groups(self, start: int, stop: int) -> Tensor:
        if self.anchor_labels_M is None:
            label_c = torch.arange(start, stop, device=self.sorted_B.device)
        else:
            label_c = self.anchor_labels_M[start:stop].to(self.sorted_B.dtype)
        group_c = torch.searchsorted(self.sorted_B, label_c)
        return torch.where(self.label_G[group_c] == label_c, group_c, self.none)

    def count(self) -> Tensor:
        """How many anchors each image has [B]."""
        own_G = torch.zeros(self.none + 1, dtype=torch.int64, device=self.group_B.device)
        for start in range(0, self.anchors, WINDOW):
            group_c = self.groups(slice(start, min(start + WINDOW, self.anchors)))
            own_G.index_add_(0, group_c, torch.ones_like(group_c))
        return self.anchors - own_G[self.group_B]


class Terms:
    """w_j f(s_ij - o_i) over the others, or over all anchors, one chunk at a time.

    f gives log2(e) times the value at y, and the slope, from y log2(e), which it may write over.
    """

    def __init__(
        self,
        scores: Scores,
        offset_B: Tensor,
        others: Others | None,
        weights_M: Tensor | None,
        f: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.scores, self.others, self.weights_M, self.f = scores, others, weights_M, f
        self.offset_B = offset_B * LOG2_E
        self.offset_GB = None if others is None else others.offsets(self.offset_B)

    def exponents(self, chunk: Chunk) -> Tensor:
        """(s_ij - o_i) log2(e) [c, B], -infinity for one's own."""
        x_cB = self.scores.of(chunk)
        if self.others is None or self.offset_GB is None:
            return x_cB.sub_(self.offset_B)
        return x_cB.sub_(self.offset_GB.index_select(0, self.others.groups(chunk.rows)))

    def count(self) -> Tensor:
        """How many terms each image has [B]."""
        if self.others is None:
            return self.scores.zeros() + len(self.scores.anchors_MD)
        return self.others.count().to(self.scores.wide)

    def weights(self, chunk: Chunk) -> Tensor:
        """w_j [c]."""
        if self.weights_M is None:
            return self.offset_B.new_ones(len(chunk.z_cE))
        return self.weights_M[chunk.rows].to(self.scores.wide)

    def narrow(self, slope_cB: Tensor, chunk: Chunk) -> Tensor:
        """w_j f' / |z_j| [c, B], in the dtype of the products; writes over the slopes."""
        factor_c = self.weights(chunk)
        if chunk.inverse_c is not None:
            factor_c = factor_c * chunk.inverse_c
        return slope_cB.mul_(factor_c[:, None]).to(self.scores.dtype)


@_disable_dynamo  # torch.compile goes around both: their chunks are loops over what it cannot see
def log_sum_exp(scores: Scores, others: Others | None = None) -> tuple[Tensor, Tensor]:
    """log sum_j e^{s_ij} over the others, or over all anchors, and their number; [B] each.

    Differentiable in the student's embeddings and the projection.
    """
    value_B, terms_B = _log_sum_exp(scores, others)
    if torch.is_grad_enabled():
        # Its slope is that of sum_j e^{s_ij - log sum e^s} with the latter held constant.
        held_B = value_B.clamp(min=torch.finfo(value_B.dtype).min / 2)  # of images without others
        sum_B, _ = _Sum.apply(*scores.leaves, held_B, Terms(scores, held_B, others, None, _exp))
        value_B = value_B + (sum_B - sum_B.detach())
    return value_B, terms_B


@_disable_dynamo
def softplus_sum(
    scores: Scores, offset_B: Tensor, others: Others, weights_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum_j w_j softplus(s_ij - o_i) over the others, and their number; [B] each.

    Differentiable in the student's embeddings, the projection, and the offsets.
    """
    terms = Terms(scores, offset_B.detach(), others, weights_M, _softplus)
    sum_B, terms_B = _Sum.apply(*scores.leaves, offset_B, terms)
    return sum_B, terms_B


@torch.no_grad()
def _log_sum_exp(scores: Scores, others: Others | None) -> tuple[Tensor, Tensor]:
    value_B = scores.zeros().fill_(-math.inf)
    terms = Terms(scores, scores.zeros(), others, None, _exp)
    with scores.no_autocast():
        for chunk in scores:
            x_cB = terms.exponents(chunk)
            peak_B = x_cB.amax(0).clamp_(min=torch.finfo(x_cB.dtype).min)
            chunk_B = x_cB.sub_(peak_B).exp2_().sum(0).log2_().add_(peak_B)
            value_B = torch.logaddexp2(value_B, chunk_B)
    return value_B / LOG2_E, terms.count()


def _exp(x_cB: Tensor) -> tuple[Tensor, Tensor]:
    slope_cB = x_cB.exp2_()
    return slope_cB * LOG2_E, slope_cB


def _softplus(x_cB: Tensor) -> tuple[Tensor, Tensor]:
    """log2(1 + e^y) and the slope of log(1 + e^y), from x = y log2(e)."""
    if x_cB.device.type != "cpu" or float(x_cB.max()) > 126:
        return F.softplus(x_cB, beta=1 / LOG2_E), (x_cB / LOG2_E).sigmoid_()
    # By hand, as torch's own takes five times as long there. Not beyond the range of 2^x.
    exp_cB = x_cB.exp2_()
    sum_cB = exp_cB + 1
    lost_cB = sum_cB - 1
    torch.sub(exp_cB, lost_cB, out=lost_cB)  # what rounding took from the sum
    return sum_cB.log2().addcdiv_(lost_cB, sum_cB, value=LOG2_E), exp_cB.div_(sum_cB)


class _Sum(torch.autograd.Function):
    """The sum of `terms`, and how many they are; [B] each."""

    @staticmethod
    def forward(
        ctx: Any,
        student_BE: Tensor,
        weight_ED: Tensor | None,
        bias_E: Tensor | None,
        offset_B: Tensor,
        terms: Terms,
    ) -> tuple[Tensor, Tensor]:
        scores = terms.scores
        to_student, to_weight, to_bias, to_offset = ctx.needs_input_grad[:4]
        value_B, slopes_B = scores.zeros(), scores.zeros()
        d_student_BE = torch.zeros_like(student_BE, dtype=scores.wide)
        ctx.slopes = []
        with scores.no_autocast():
            for chunk in scores:
                f_cB, slope_cB = terms.f(terms.exponents(chunk))
                weight_c = terms.weights(chunk)
                value_B += weight_c @ f_cB
                if to_offset:
                    slopes_B += weight_c @ slope_cB
                if to_student or to_weight or to_bias:
                    narrow_cB = terms.narrow(slope_cB, chunk)
                    d_student_BE += narrow_cB.T @ chunk.z_cE
                    if (to_weight or to_bias) and chunk.products_cB is not None:
                        # The products have been used; the slopes take their place.
                        ctx.slopes.append(chunk.products_cB.copy_(narrow_cB))
                        chunk.products_cB = None
        # The parameters are saved so that autograd notices if they change before the backward pass.
        ctx.save_for_backward(student_BE, weight_ED, bias_E, d_student_BE, slopes_B)
        ctx.terms, terms_B = terms, terms.count()
        ctx.mark_non_differentiable(terms_B)
        return value_B / LOG2_E, terms_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: there is no graph of what follows
            raise UserError("sums over anchors have a first derivative alone, no second")
        student_BE, weight_ED, bias_E, d_student_BE, slopes_B = ctx.saved_tensors
        terms: Terms = ctx.terms
        scores = terms.scores
        to_student, to_weight, to_bias, to_offset = ctx.needs_input_grad[:4]
        d_weight = torch.zeros_like(weight_ED, dtype=scores.wide) if to_weight else None
        d_bias = torch.zeros_like(bias_E, dtype=scores.wide) if to_bias else None
        if to_weight or to_bias:
            gs_BE = scores.scaled(grad_B)
            with scores.no_autocast():
                for n, chunk in enumerate(scores):
                    if n < len(ctx.slopes):
                        narrow_cB = ctx.slopes[n]
                    else:
                        narrow_cB = terms.narrow(terms.f(terms.exponents(chunk))[1], chunk)
                    d_z_cE = narrow_cB @ gs_BE
                    assert chunk.inverse_c is not None  # there is a projection
                    radial_c = torch.linalg.vecdot(d_z_cE, chunk.z_cE) * chunk.inverse_c**2
                    d_z_cE.addcmul_(chunk.z_cE, radial_c.to(scores.dtype)[:, None], value=-1)
                    if d_weight is not None:
                        d_weight += (d_z_cE.T @ scores.anchors(chunk.rows)).to(scores.wide)
                    if d_bias is not None:
                        d_bias += d_z_cE.sum(0)
        scale_B1 = grad_B[:, None] / scores.temperature
        return (
            (d_student_BE * scale_B1).to(student_BE.dtype) if to_student else None,
            None if d_weight is None else d_weight.to(weight_ED.dtype),
            None if d_bias is None else d_bias.to(bias_E.dtype),
            -slopes_B * grad_B if to_offset else None,
            None,
        )


def product_dtype(anchors_MD: Tensor) -> torch.dtype:
    """What products with anchors are computed in: their own dtype, or float32.

    float16's range is too small for gradients over many anchors; bfloat16's is not, but many
    processors take several times as long with it.
    """
    kept = anchors_MD.dtype == torch.bfloat16 and fast_bf16(anchors_MD.device.type)
    return torch.promote_types(anchors_MD.dtype, torch.bfloat16 if kept else torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()
