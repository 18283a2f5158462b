"""RMSNorm: y = w * x / sqrt(mean(x^2) + eps), variance in fp32 (Zhang and Sennrich 2019; report section 2.4).

Shapes: x [..., H], weight [H]. The backward keeps only x and one reciprocal root a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        norm: Tensor = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x_fp32 * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        grad_fp32 = grad.float()
        grad_weight = (grad_fp32 * normed).flatten(0, -2).sum(dim=0)
        grad_normed = grad_fp32 * weight.float()
        inner = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = torch.addcmul(grad_normed, normed, inner, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


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
