"""NormHead, cross-entropy and max-z: products by cuBLAS, the softmax between them in CUDA C++.

The formulas are those of the reference, ops/head_loss.py. T tokens, V rows of this rank, H hidden. The rows
are cut into parts and each part into chunks of a few thousand rows; the products of all tokens with one chunk
are in memory at once, fp32 [T, chunk].

Forward: the statistics of each part, chunk after chunk (head_softmax.py), merged by a balanced tree over the
parts and, after one all-gather of 16 bytes a token, over the ranks. Parts, chunks and tree are the same at 1,
2, 4 and 8 ranks, so the loss is the same bits as far as a product of the same rows is.

Backward, chunk by chunk, from products made again:
    D    = n_v delta in the dtype of the inputs, and its column sums c_v = <w_v, D^T h>
    dX  += D W_c                                 fp32 [T, H]
    dW_c = D^T h - n_v^2 c_v w_v                 rows at the norm floor keep D^T h, as the clamp is flat
Both scales are taken out of D and put back in fp32 (`unit_scales`). 8 T H V multiplications and additions in
all; deterministic, and nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from megatron_b2.ops.cuda import extension, matmul
from megatron_b2.ops.cuda.head_softmax import epilogue, update_statistics
from megatron_b2.ops.head_common import (
    Statistics,
    check_shapes,
    merge,
    over_ranks,
    parts_of_rank,
    scalar,
    unit_scales,
)
from megatron_b2.ops.head_loss import IGNORE_INDEX, HeadLoss
from megatron_b2.ops.norm_head import EPS, inverse_row_norms
from megatron_b2.parallel.tensor_parallel import TensorParallel

PRODUCT_BYTES: Final = 64 * 2**20
"""Products in memory at once (our choice),"""
MIN_CHUNK: Final = 1024
"""but no fewer vocabulary rows, for which the running sum of dX is read and written,"""
MAX_CHUNK: Final = 4096
"""and no more, whose fp32 gradient is in memory at once."""
CHUNK_MULTIPLE: Final = 128


@dataclass(frozen=True)
class _Head:
    """The inputs, checked."""

    hidden: Tensor
    weight: Tensor
    inverse_norms: Tensor
    """fp32 [V]."""
    labels: Tensor
    tensor: TensorParallel

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, labels: Tensor, tensor: TensorParallel) -> _Head:
        extension.dtype_code(hidden, weight)
        return cls(hidden, weight, inverse_row_norms(weight), labels.contiguous(), tensor)

    @property
    def first_id(self) -> int:
        """Vocabulary id of the first row."""
        return self.tensor.rank * len(self.weight)

    def parts(self) -> Iterator[list[slice]]:
        """Chunks of rows of each part; a part of fewer rows than parts may have none."""
        rows, count = len(self.weight), parts_of_rank(self.tensor.size)
        for part in range(count):
            start, stop = part * rows // count, (part + 1) * rows // count
            size = chunk_rows(len(self.hidden), stop - start)
            yield [slice(first, min(first + size, stop)) for first in range(start, stop, size)]

    def product_buffer(self, dtype: torch.dtype) -> Tensor:
        """For the products of any chunk, [T, columns]."""
        columns = max(rows.stop - rows.start for part in self.parts() for rows in part)
        return self.hidden.new_empty(len(self.hidden), columns, dtype=dtype)

    def products(self, rows: slice, buffer: Tensor) -> Tensor:
        """h . w_v of all tokens with a chunk, fp32 [T, C], in the first columns of the buffer."""
        weight = self.weight[rows]
        return matmul.product(self.hidden, weight.t(), out=buffer[:, : len(weight)])


def chunk_rows(num_tokens: int, part_rows: int) -> int:
    """Rows of a chunk: equal chunks but for the last, a multiple of 128."""
    most = max(MIN_CHUNK, min(MAX_CHUNK, PRODUCT_BYTES // (4 * max(num_tokens, 1))))
    steps = max(1, -(-part_rows // most))
    return max(1, -(-part_rows // (steps * CHUNK_MULTIPLE))) * CHUNK_MULTIPLE


def _whole_statistics(head: _Head) -> Statistics:
    """Over the vocabulary of all ranks."""
    buffer, tables = head.product_buffer(torch.float32), []
    for part in head.parts():
        found = Statistics.empty(len(head.hidden), head.hidden.device)
        for rows in part:
            products = head.products(rows, buffer)
            first = head.first_id + rows.start
            update_statistics(found, products, head.inverse_norms[rows], head.labels, first_column=first)
        tables.append(found.table)
    return over_ranks(merge(torch.stack(tables)), head.tensor)


@dataclass(frozen=True)
class _Tokens:
    """What the gradient of a token's logits needs, fp32 [T] each but `top_index`."""

    lse: Tensor
    ce_grad: Tensor
    z_grad: Tensor
    top_index: Tensor
    """int64."""


def _logit_gradient(
    head: _Head, tokens: _Tokens, rows: slice, buffer: Tensor, narrow: Tensor | None
) -> tuple[Tensor, Tensor]:
    """D [T, C] of a chunk in the dtype of the inputs and its column sums fp32 [C].

    Made in `narrow`, or in place where that is none.
    """
    products, inverse = head.products(rows, buffer), head.inverse_norms[rows]
    sums = torch.zeros_like(inverse)
    delta = epilogue(
        products,
        inverse,
        head.labels,
        lse=tokens.lse,
        ce_grad=tokens.ce_grad,
        z_grad=tokens.z_grad,
        top_index=tokens.top_index,
        column_sums=sums,
        first_column=head.first_id + rows.start,
        out=None if narrow is None else narrow[:, : products.shape[1]],
    )
    return delta, sums


def _gradients(
    head: _Head, tokens: _Tokens, scale: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and weight, those that are wanted, times `scale`."""
    hidden, weight = head.hidden, head.weight
    buffer = head.product_buffer(torch.float32)
    narrow = None if hidden.dtype == torch.float32 else head.product_buffer(hidden.dtype)
    total = hidden.new_empty(hidden.shape, dtype=torch.float32) if wanted[0] else None
    grad_weight = weight.new_empty(weight.shape) if wanted[1] else None
    wide = weight.new_empty((buffer.shape[1], weight.shape[1]), dtype=torch.float32) if wanted[1] else None
    for rows in (rows for part in head.parts() for rows in part):
        delta, sums = _logit_gradient(head, tokens, rows, buffer, narrow)
        if total is not None:
            matmul.product(delta, weight[rows], out=total, adds=rows.start > 0)
        if grad_weight is not None and wide is not None:
            inverse = head.inverse_norms[rows]
            factor = (sums * inverse.square()).where(inverse < 1 / EPS, 0).unsqueeze(1)
            grad = matmul.product(delta.t(), hidden, out=wide[: len(inverse)])
            grad.addcmul_(weight[rows], factor, value=-1)
            torch.mul(grad, scale, out=grad_weight[rows])
    return None if total is None else total.mul_(scale).to(hidden.dtype), grad_weight


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
        head = _Head.of(hidden, weight, labels, tensor)
        statistics = _whole_statistics(head)
        ce, max_z = statistics.sums(head.labels != IGNORE_INDEX)
        ctx.save_for_backward(
            hidden, weight, head.inverse_norms, head.labels, statistics.table, ce_scale, z_scale
        )
        ctx.tensor = tensor
        ctx.mark_non_differentiable(ce, max_z)
        return ce_scale * ce + z_scale * max_z, ce, max_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, inverse_norms, labels, table, ce_scale, z_scale = ctx.saved_tensors
        head, statistics = _Head(hidden, weight, inverse_norms, labels, ctx.tensor), Statistics(table)
        unit, scales = unit_scales(ce_scale, z_scale)
        tokens = _Tokens(
            lse=statistics.lse,
            ce_grad=scales[0] * (labels != IGNORE_INDEX),
            z_grad=scales[1] * statistics.top,
            top_index=statistics.top_index,
        )
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return *_gradients(head, tokens, unit * grad, wanted), None, None, None, None


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

    The backward makes the products again from the saved inputs and 16 bytes a token, so a graph that is kept
    may be differentiated again. Largest temporaries, at T = 4,096: fp32 T x 4,096, T x H and 4,096 x H.
    """
    check_shapes(hidden, weight, labels)
    scales = (scalar(scale, hidden.device) for scale in (ce_scale, z_scale))
    return HeadLoss(*_NormHeadLoss.apply(hidden, weight, labels, *scales, tensor or TensorParallel()))
