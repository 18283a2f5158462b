"""RMSNorm: y = w * x / sqrt(mean(x^2) + eps), variance in fp32 (Zhang and Sennrich 2019; report section 2.4).

Also with the addition of a residual before it. Shapes: x [..., H], weight [H]. The backward keeps only what
is normalised and one reciprocal root a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.precision import at_least_fp32


def check_shapes(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """Refuse what a kernel, which trusts the sizes of x, would read beyond the end of.

    Raises:
        InputError: if the weight is not [H], or the residual not as x.
    """
    if weight.shape != x.shape[-1:]:
        raise InputError(
            f"weight must be [{x.shape[-1]}], the width of x {list(x.shape)}, got {list(weight.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Result in the dtype of x, and the reciprocal root [..., 1] in at least fp32."""
    x_fp32 = at_least_fp32(x)
    norm: Tensor = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x_fp32 * rstd).to(x.dtype) * weight, rstd


def _gradients(x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of x, in at least fp32, and of the weight, in its dtype."""
    normed = at_least_fp32(x) * rstd
    grad_fp32 = at_least_fp32(grad)
    grad_weight = (grad_fp32 * normed).flatten(0, -2).sum(dim=0)
    grad_normed = grad_fp32 * at_least_fp32(weight)
    inner = (grad_normed * normed).mean(-1, keepdim=True)
    grad_x = torch.addcmul(grad_normed, normed, inner, value=-1).mul_(rstd)
    return grad_x, grad_weight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = _gradients(x, weight, rstd, grad)
        return grad_x.to(x.dtype), grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        out, rstd = _normalize(total, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = _gradients(total, weight, rstd, grad)
        grad_x = grad_x.add_(grad_total).to(total.dtype)
        return grad_x, grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: [..., H], any float dtype.
        weight: [H], same dtype as x.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of x.
    """
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise the last dimension of the sum.

    Args:
        x: [..., H], any float dtype.
        residual: the same shape and dtype.
        weight: [H], same dtype as x.
        eps: added to the mean square.

    Returns:
        The norm of the total, and the total x + residual, rounded to the dtype of x before it is normalised.
    """
    out, total = _AddRMSNorm.apply(x, residual, weight, eps)
    return out, total
