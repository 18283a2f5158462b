"""RMSNorm with and without the addition before it: one kernel each way, float32 inside, one rounding.

Forward: a program holds one row in registers. Backward: a fixed set of programs, each with every P-th row,
writes the input gradient row by row and one row of partial sums of the weight gradient, which torch adds in
a fixed order: no atomics, the same bits at each run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_b2.ops.rms_norm import check_shapes
from megatron_b2.ops.triton import target
from megatron_b2.ops.triton.rows import as_rows, programs_for, row_tile


@triton.jit
def _read(pointer, column, width):
    """Columns of one row in float32; 0 beyond its width, in every later sum too."""
    return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, value, column, width):
    tl.store(pointer + column, value.to(pointer.dtype.element_ty), mask=column < width)


@triton.jit
def _read_total(x, residual, total, column, width, ADD: tl.constexpr):
    """x, or x + residual: stored rounded and used as stored, so that the backward sees the same."""
    value = _read(x, column, width)
    if ADD:
        value = (value + _read(residual, column, width)).to(total.dtype.element_ty)
        _write(total, value, column, width)
        value = value.to(tl.float32)
    return value


@triton.jit
def norm_forward(
    x, residual, weight, out, total, rstd, width, eps, x_stride, residual_stride,
    ADD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """out = weight * total * rstd, rstd = 1 / sqrt(mean(total^2) + eps), one row a program.

    x and residual [R, width] with rows `x_stride` and `residual_stride` apart, weight [width], out and total
    [R, width], rstd fp32 [R]. Without ADD total is x, and neither residual nor total is touched.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    residual += row * residual_stride
    total += row * width
    out += row * width
    column = tl.arange(0, MAIN)
    value = _read_total(x, residual, total, column, width, ADD)
    squares = tl.sum(value * value, axis=0)
    if TAIL > 0:
        rest = MAIN + tl.arange(0, TAIL)
        tail = _read_total(x, residual, total, rest, width, ADD)
        squares += tl.sum(tail * tail, axis=0)
    root = tl.rsqrt(squares / width + eps)
    tl.store(rstd + row, root)
    _write(out, value * root * _read(weight, column, width), column, width)
    if TAIL > 0:
        _write(out, tail * root * _read(weight, rest, width), rest, width)


@triton.jit
def _finish_gradient(scaled, normed, inner, root, grad_total, grad_x, column, width, ADD: tl.constexpr):
    """Store the gradient of one piece of a row: root (scaled - normed * inner), plus that of the total."""
    gradient = root * (scaled - normed * inner)
    if ADD:
        gradient += _read(grad_total, column, width)
    _write(grad_x, gradient, column, width)


@triton.jit
def norm_backward(
    total, weight, rstd, grad, grad_total, grad_x, partials, rows, width,
    total_stride, grad_stride, grad_total_stride,
    ADD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradient of x (with ADD also of residual) [R, width] and partial sums of the weight's, fp32 [P, width].

    With n = total * rstd and m = grad * weight, a row's gradient is rstd (m - n mean(m n)), plus grad_total
    with ADD. Program p of P takes the rows p, p + P, p + 2P ...
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, TAIL if TAIL > 0 else 1)
    sums = tl.zeros([MAIN], dtype=tl.float32)
    tail_sums = tl.zeros([TAIL if TAIL > 0 else 1], dtype=tl.float32)
    for step in range(tl.cdiv(rows - program, programs)):
        row = program.to(tl.int64) + step * programs
        root = tl.load(rstd + row)
        normed = _read(total + row * total_stride, column, width) * root
        upstream = _read(grad + row * grad_stride, column, width)
        sums += upstream * normed
        scaled = upstream * _read(weight, column, width)
        products = tl.sum(scaled * normed, axis=0)
        if TAIL > 0:
            tail_normed = _read(total + row * total_stride, rest, width) * root
            upstream = _read(grad + row * grad_stride, rest, width)
            tail_sums += upstream * tail_normed
            tail_scaled = upstream * _read(weight, rest, width)
            products += tl.sum(tail_scaled * tail_normed, axis=0)
        inner = products / width
        to_total, to_x = grad_total + row * grad_total_stride, grad_x + row * width
        _finish_gradient(scaled, normed, inner, root, to_total, to_x, column, width, ADD)
        if TAIL > 0:
            _finish_gradient(tail_scaled, tail_normed, inner, root, to_total, to_x, rest, width, ADD)
    partials += program.to(tl.int64) * width
    _write(partials, sums, column, width)
    if TAIL > 0:
        _write(partials, tail_sums, rest, width)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and total, contiguous in the shape of x, and rstd fp32 [R]. Without residual, total is x."""
    rows = as_rows(x)
    added = rows if residual is None else as_rows(residual)
    out = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    rstd = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    if x.numel():
        tile = row_tile(rows.shape[1])
        norm_forward[(len(rows),)](
            rows, added, weight, out, total, rstd, rows.shape[1], eps, rows.stride(0), added.stride(0),
            ADD=residual is not None, MAIN=tile.main, TAIL=tile.tail, num_warps=tile.warps,
        )  # fmt: skip
    return out, total, rstd


def _backward(
    total: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their dtypes."""
    rows, upstream = as_rows(total), as_rows(grad)
    added = upstream if grad_total is None else as_rows(grad_total)
    grad_x = total.new_empty(total.shape)
    if not total.numel():
        return grad_x, torch.zeros_like(weight)
    count, width = rows.shape
    programs = programs_for(count, target.arch_of(total.device))
    partials = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    tile = row_tile(width)
    norm_backward[(programs,)](
        rows, weight, rstd, upstream, added, grad_x, partials, count, width,
        rows.stride(0), upstream.stride(0), added.stride(0),
        ADD=grad_total is not None, MAIN=tile.main, TAIL=tile.tail, num_warps=tile.warps,
    )  # fmt: skip
    return grad_x, partials.sum(dim=0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, _, rstd = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        return *_backward(x, weight, rstd, grad, None), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total, rstd = _forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return grad_total, grad_total, None, None
        total, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = _backward(total, weight, rstd, grad, grad_total)
        return grad_x, grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: [..., H], any float dtype up to float32.
        weight: [H], same dtype as x.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of x, contiguous.
    """
    target.check_dtype(x, weight)
    check_shapes(x, weight)
    result: Tensor = _RMSNorm.apply(x, weight.contiguous(), eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise the last dimension of the sum.

    Args:
        x: [..., H], any float dtype up to float32.
        residual: the same shape and dtype.
        weight: [H], same dtype as x.
        eps: added to the mean square.

    Returns:
        The norm of the total, and the total x + residual, rounded to the dtype of x before it is normalised.
    """
    target.check_dtype(x, residual, weight)
    check_shapes(x, weight, residual)
    out, total = _AddRMSNorm.apply(x, residual, weight.contiguous(), eps)
    return out, total
