"""NormHead + linear + cross-entropy + max-z as Triton kernels: no logits and no W / ||W|| in memory.

The formulas are those of the reference, ops/head_loss.py. T tokens, V rows of this rank, H hidden.

Forward: statistics of the logits over vocabulary segments (head_kernels.py), merged by a balanced tree, first
over the rank's segments, then over the ranks after one all-gather of 16 bytes a token. The segments are cut
at the same ids and the tree is the same at 1, 2, 4 and 8 ranks, so the loss is the same bits.

Backward, over chunks of 2 to 4 thousand vocabulary rows with all tokens (our choice: every row of dW is made
once, in fp32, and rounded once):
    D    = n_v delta, recomputed, in the dtype of the inputs [T, chunk]
    dX  += D W_c                                 fp32 [T, H]
    dW_c = D^T h - n_v^2 <w_v, D^T h> w_v        rows at the norm floor keep D^T h, as the clamp is flat
Both scales are taken out of D and put back in fp32, so that 1 / tokens of the global batch does not underflow
in fp16. 8 T H V multiplications and additions in all. Everything is deterministic; nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from megatron_b2.ops.head_common import PARTS, check_shapes, parts_of_rank, scalar, unit_scales
from megatron_b2.ops.head_loss import IGNORE_INDEX, HeadLoss
from megatron_b2.ops.norm_head import EPS
from megatron_b2.ops.triton import head_kernels, matmul, target
from megatron_b2.ops.triton.matmul import Projection
from megatron_b2.ops.triton.tiles import HeadTiles, head_tiles
from megatron_b2.parallel.tensor_parallel import TensorParallel

SPLIT_COLUMNS = 1024
"""A part is split, by a power of two, until no more than about this many columns are left: enough programs
for 132 multiprocessors on each of 8 ranks at V = 125,696 and T = 4,096."""
MAX_CHUNK = 4096
MIN_CHUNK = 2048
"""Vocabulary rows of a backward step: fewer would make it wait for the running sum of dX,"""
CHUNK_BYTES = 32 * 2**20
"""and between the two, so many that D stays in the L2 cache of an A100 or H100."""
CHUNK_MULTIPLE = 128
KEPT_BYTES = 64 * 2**20
"""Products in memory at once where they are kept (`norm_head_loss_kept`)."""


@dataclass(frozen=True)
class Head:
    """The inputs, checked and made fit for the kernels."""

    hidden: Tensor
    weight: Tensor
    inverse_norms: Tensor
    """fp32 [V]."""
    labels: Tensor
    tensor: TensorParallel
    tiles: HeadTiles

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, labels: Tensor, tensor: TensorParallel) -> Head:
        target.check_dtype(hidden, weight)
        hidden, weight, labels = _rows_contiguous(hidden), _rows_contiguous(weight), labels.contiguous()
        tiles = head_tiles(target.arch_of(hidden.device), hidden.element_size())
        return cls(hidden, weight, inverse_norms(weight, tiles), labels, tensor, tiles)

    def tokens(self, part: slice) -> Head:
        return Head(
            self.hidden[part], self.weight, self.inverse_norms, self.labels[part], self.tensor, self.tiles
        )

    @property
    def first_id(self) -> int:
        """Vocabulary id of the first row."""
        return self.tensor.rank * len(self.weight)


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def inverse_norms(weight: Tensor, tiles: HeadTiles) -> Tensor:
    """1 / max(||w_v||, 1e-12), fp32 [V]."""
    out, tile = _new(weight, len(weight)), tiles.norms
    head_kernels.inverse_norms_kernel[(triton.cdiv(len(weight), tile.rows),)](
        weight,
        out,
        *weight.shape,
        weight.stride(0),
        EPS,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return out


def segments(vocab_rows: int, ranks: int) -> tuple[int, int]:
    """(parts, splits of each) of a rank's rows: powers of two.

    With a power of two of ranks, up to `PARTS`, the segments of all ranks depend on the whole vocabulary
    only.
    """
    columns = triton.cdiv(vocab_rows * ranks, PARTS)
    return parts_of_rank(ranks), triton.next_power_of_2(triton.cdiv(columns, SPLIT_COLUMNS))


def local_statistics(head: Head, products: Tensor | None = None) -> Tensor:
    """fp32 [segments, 4, T]; with `products` fp32 [T, V] also the products, for the backward."""
    tokens, width = head.hidden.shape
    vocab = len(head.weight)
    tile = head.tiles.statistics if products is None else head.tiles.kept_statistics
    parts, splits = segments(vocab, head.tensor.size)
    out = _new(head.hidden, parts * splits, 4, tokens)
    head_kernels.statistics_kernel[(triton.cdiv(tokens, tile.rows), parts * splits)](
        head.hidden,
        head.weight,
        head.inverse_norms,
        head.labels,
        out,
        out if products is None else products,
        tokens,
        vocab,
        width,
        head.hidden.stride(0),
        head.weight.stride(0),
        0 if products is None else products.stride(0),
        head.first_id,
        parts,
        splits,
        KEEPS=products is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def merge(statistics: Tensor, tiles: HeadTiles) -> Tensor:
    """[count, 4, T] of neighbouring sets to [4, T]."""
    count, _, tokens = statistics.shape
    out, tile = _new(statistics, 4, tokens), tiles.merge
    head_kernels.merge_kernel[(triton.cdiv(tokens, tile.rows),)](
        statistics,
        out,
        tokens,
        count,
        LEVELS=(count - 1).bit_length(),
        ROWS=tile.rows,
        num_warps=tile.warps,
    )
    return out


def whole_statistics(head: Head, products: Tensor | None = None) -> Tensor:
    """Statistics fp32 [4, T] over the vocabulary of all ranks: largest, sum, id of the largest, label's."""
    local, group = local_statistics(head, products), head.tensor.group
    if group is None:
        return merge(local, head.tiles)
    packed = merge(local, head.tiles)
    gathered = _new(packed, head.tensor.size * 4, packed.shape[1])
    dist.all_gather_single(gathered, packed, group=group)
    return merge(gathered.view(head.tensor.size, *packed.shape), head.tiles)


def _sums(statistics: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropy and of the squared largest logit, 0-dim fp32."""
    top, total, _, label_logit = statistics.unbind()
    ce = (top - label_logit) + total.log()
    return (ce * (labels != IGNORE_INDEX)).sum(), top.square().sum()


@dataclass(frozen=True)
class _LogitGradient:
    """D of some tokens and vocabulary rows."""

    values: Tensor
    """[tokens, rows] in the dtype of the inputs, in units of the scales."""
    sums: Tensor
    """fp32 [rows]: <w_v, D^T h>."""


def logit_gradient(
    head: Head,
    statistics: Tensor,
    scales: Tensor,
    rows: slice,
    buffer: Tensor,
    products: Tensor | None = None,
) -> _LogitGradient:
    """D for some vocabulary rows, in `buffer` [T, at least as many]; from kept `products` if given."""
    tokens, width = head.hidden.shape
    weight, tile = head.weight[rows], head.tiles.logit_gradient
    blocks = triton.cdiv(tokens, tile.rows)
    values = buffer[:, : len(weight)]
    sums = _new(buffer, blocks, len(weight))
    head_kernels.logit_gradient_kernel[(blocks * triton.cdiv(len(weight), tile.columns),)](
        head.hidden,
        weight,
        head.inverse_norms[rows],
        head.labels,
        statistics,
        scales,
        sums if products is None else products,
        values,
        sums,
        tokens,
        len(weight),
        width,
        head.hidden.stride(0),
        weight.stride(0),
        0 if products is None else products.stride(0),
        values.stride(0),
        sums.stride(0),
        head.first_id + rows.start,
        IGNORE_INDEX,
        KEPT=products is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return _LogitGradient(values, sums.sum(0))


def _projection(head: Head, sums: Tensor, rows: slice) -> Projection:
    inverse = head.inverse_norms[rows]
    return Projection((sums * inverse.square()).where(inverse < 1 / EPS, 0), head.weight[rows])


def chunk_rows(tokens: int, vocab_rows: int, itemsize: int) -> int:
    """Vocabulary rows of a backward step: equal steps, a multiple of 128."""
    fits = CHUNK_BYTES // (max(tokens, 1) * itemsize)
    steps = triton.cdiv(vocab_rows, max(MIN_CHUNK, min(MAX_CHUNK, fits)))
    return int(triton.cdiv(triton.cdiv(vocab_rows, steps), CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def _slices(length: int, size: int) -> Iterator[slice]:
    """At least one, which of nothing is empty."""
    return (slice(start, min(start + size, length)) for start in range(0, max(length, 1), max(size, 1)))


def _gradients(
    head: Head, statistics: Tensor, scales: Tensor, unit: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight, those that are wanted, by vocabulary chunks."""
    hidden, weight = head.hidden, head.weight
    size = chunk_rows(len(hidden), len(weight), hidden.element_size())
    buffer = _new(hidden, len(hidden), min(size, len(weight)), dtype=hidden.dtype)
    grad_hidden = _new(hidden, *hidden.shape, dtype=hidden.dtype) if wanted[0] else None
    grad_weight = _new(weight, *weight.shape, dtype=weight.dtype) if wanted[1] else None
    total = _new(hidden, *hidden.shape) if wanted[0] and size < len(weight) else None
    for rows in _slices(len(weight), size):
        delta = logit_gradient(head, statistics, scales, rows, buffer)
        if grad_hidden is not None:
            matmul.accumulate(
                delta.values,
                weight[rows],
                total=total,
                out=grad_hidden if rows.stop == len(weight) else None,
                adds=rows.start > 0,
                scale=unit,
                tile=head.tiles.hidden_gradient,
            )
        if grad_weight is not None:
            matmul.accumulate(
                delta.values,
                hidden,
                total=None,
                out=grad_weight[rows],
                adds=False,
                scale=unit,
                tile=head.tiles.weight_gradient,
                transposed=True,
                projection=_projection(head, delta.sums, rows),
            )
    return grad_hidden, grad_weight


class _NormHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ce_scale: Tensor,
        z_scale: Tensor,
        tensor: TensorParallel,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head.of(hidden, weight, labels, tensor)
        statistics = whole_statistics(head)
        ce, max_z = _sums(statistics, head.labels)
        ctx.save_for_backward(
            head.hidden, head.weight, head.inverse_norms, head.labels, statistics, ce_scale, z_scale
        )
        ctx.tensor, ctx.tiles = tensor, head.tiles
        ctx.mark_non_differentiable(ce, max_z)
        return ce_scale * ce + z_scale * max_z, ce, max_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, inverse, labels, statistics, ce_scale, z_scale = ctx.saved_tensors
        head = Head(hidden, weight, inverse, labels, ctx.tensor, ctx.tiles)
        unit, scales = unit_scales(ce_scale, z_scale)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        grad_hidden, grad_weight = _gradients(head, statistics, scales, unit * grad, wanted)
        return grad_hidden, grad_weight, None, None, None, None


def _kept_gradients(head: Head, scales: Tensor, one: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [4, T] and gradients of hidden and weight in units of the scales, by token chunks."""
    hidden, weight = head.hidden, head.weight
    size = max(1, KEPT_BYTES // (4 * len(weight)) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    size = min(size, len(hidden))
    products = _new(hidden, size, len(weight))
    buffer = _new(hidden, size, len(weight), dtype=hidden.dtype)
    statistics = _new(hidden, 4, len(hidden))
    grad_hidden = _new(hidden, *hidden.shape, dtype=hidden.dtype)
    grad_weight = _new(weight, *weight.shape, dtype=weight.dtype)
    total = _new(weight, *weight.shape) if size < len(hidden) else None
    tile = head.tiles.weight_gradient if total is None else head.tiles.weight_gradient_sum
    sums = _new(hidden, len(weight)).zero_()
    everything = slice(0, len(weight))
    for part in _slices(len(hidden), size):
        chunk = head.tokens(part)
        kept, is_last = products[: len(chunk.hidden)], part.stop == len(hidden)
        whole = whole_statistics(chunk, kept)
        statistics[:, part] = whole
        delta = logit_gradient(chunk, whole, scales, everything, buffer[: len(chunk.hidden)], kept)
        sums += delta.sums
        matmul.accumulate(
            delta.values,
            weight,
            total=None,
            out=grad_hidden[part],
            adds=False,
            scale=one,
            tile=head.tiles.hidden_gradient,
        )
        matmul.accumulate(
            delta.values,
            chunk.hidden,
            total=total,
            out=grad_weight if is_last else None,
            adds=part.start > 0,
            scale=one,
            tile=tile,
            transposed=True,
            projection=_projection(head, sums, everything) if is_last else None,
        )
    return statistics, grad_hidden, grad_weight


class _NormHeadLossKept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ce_scale: Tensor,
        z_scale: Tensor,
        tensor: TensorParallel,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head.of(hidden, weight, labels, tensor)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            unit, scales = unit_scales(ce_scale, z_scale)
            statistics, *gradients = _kept_gradients(head, scales, torch.ones_like(unit))
            ctx.save_for_backward(unit, *gradients)
        else:
            statistics = whole_statistics(head)
        ce, max_z = _sums(statistics, head.labels)
        ctx.mark_non_differentiable(ce, max_z)
        return ce_scale * ce + z_scale * max_z, ce, max_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        unit, *gradients = ctx.saved_tensors
        scale = unit * grad
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        grad_hidden, grad_weight = (value * scale if needed else None for value, needed in wanted)
        return grad_hidden, grad_weight, None, None, None, None


def _apply(
    function: type[torch.autograd.Function],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ce_scale: Tensor | float,
    z_scale: Tensor | float,
    tensor: TensorParallel | None,
) -> HeadLoss:
    check_shapes(hidden, weight, labels)
    scales = (scalar(scale, hidden.device) for scale in (ce_scale, z_scale))
    return HeadLoss(*function.apply(hidden, weight, labels, *scales, tensor or TensorParallel()))


def norm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ce_scale: Tensor | float,
    z_scale: Tensor | float,
    tensor: TensorParallel | None = None,
) -> HeadLoss:
    """As `megatron_b2.ops.head_loss.norm_head_loss`; see there for shapes and meaning.

    The backward recomputes the logits from the saved inputs and 16 bytes a token, so a graph that is kept may
    be differentiated again. Largest temporaries: T x 4,096 in the dtype of the inputs and T x H in fp32.
    """
    return _apply(_NormHeadLoss, hidden, weight, labels, ce_scale, z_scale, tensor)


def norm_head_loss_kept(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ce_scale: Tensor | float,
    z_scale: Tensor | float,
    tensor: TensorParallel | None = None,
) -> HeadLoss:
    """As `norm_head_loss`, but the gradients are made in the forward from kept products: 6 instead of 8 T H
    V.

    Goes over chunks of tokens (`KEPT_BYTES` / 4 V of them), each with the products of all this rank's rows.
    The price of a quarter less arithmetic: dW is held from forward to backward; its fp32 sum of 4 V H bytes
    lives during the forward and is read and written for each chunk; each chunk has its all-gather. So it
    suits ranks with few rows, not one with all 125,696. The upstream gradient multiplies what was rounded
    already, which is exact for powers of two. Under `no_grad` no gradient is made.
    """
    return _apply(_NormHeadLossKept, hidden, weight, labels, ce_scale, z_scale, tensor)
