"""RMSNorm in CUDA C++ (csrc/cuda/rms_norm.cu): as ops/rms_norm.py, with one rounding of the result.

Shapes: x [..., H], weight [H]. Keeps what is normalised and nothing else: the reciprocal root is made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_b2.ops.cuda import extension
from megatron_b2.ops.rms_norm import check_shapes


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Result and what was normalised: x, or the stored sum."""
    code = extension.dtype_code(x, weight, *([] if residual is None else [residual]))
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    rows = x.numel() // max(x.shape[-1], 1)
    extension.launch(
        "rms_norm_forward", x.device, x, residual, weight, y, total, rows, x.shape[-1], eps, code
    )
    return y, total


def _backward(
    grad: Tensor, total: Tensor, grad_total: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normalised and of the weight; parts of the latter are added in a fixed order."""
    width = total.shape[-1]
    rows = total.numel() // max(width, 1)
    if rows == 0:
        return torch.empty_like(total), torch.zeros_like(weight)
    grad_x, grad_weight = torch.empty_like(total), torch.empty_like(weight)
    programs = extension.programs(total.device, rows)
    partial = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    code = extension.dtype_code(grad, total, weight, *([] if grad_total is None else [grad_total]))
    pointers = (grad, total, grad_total, weight, grad_x, grad_weight, partial)
    extension.launch("rms_norm_backward", total.device, *pointers, programs, rows, width, eps, code)
    return grad_x, grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, total = _forward(x, None, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        total, weight = ctx.saved_tensors
        grad_x, grad_weight = _backward(grad.contiguous(), total, None, weight, ctx.eps)
        return grad_x, grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total = _forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return grad_total, grad_total, None, None
        total, weight = ctx.saved_tensors
        grad_total = None if grad_total is None else grad_total.contiguous()
        grad_x, grad_weight = _backward(grad.contiguous(), total, grad_total, weight, ctx.eps)
        return grad_x, grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise the last dimension; see ops/rms_norm.py."""
    check_shapes(x, weight)
    result: Tensor = _RMSNorm.apply(x.contiguous(), weight.contiguous(), eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Norm of x + residual, and the sum as it is stored; see ops/rms_norm.py."""
    check_shapes(x, weight, residual)
    result: tuple[Tensor, Tensor] = _AddRMSNorm.apply(
        x.contiguous(), residual.contiguous(), weight.contiguous(), eps
    )
    return result
