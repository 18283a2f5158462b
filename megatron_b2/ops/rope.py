"""Rotary position embedding in the half-split basis, angles and rotation in fp32 (Su et al. 2021).

bf16 positions collide from 257 on, so nothing here is ever computed below fp32.
Shapes: B batch, S sequence, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_b2.ops.precision import at_least_fp32


def rope_table(positions: Tensor, *, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles.

    Args:
        positions: integer [B, S] or [S]; restart per packed document.
        head_dim: D, even.
        base: frequency base (10,000 for Baichuan 2).

    Returns:
        cos and sin, fp32 [..., S, D/2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.unsqueeze(-1).float() * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x [B, S, H, D] rotated by the angles of cos and sin [B or 1, S, 1, D/2]; into `out` if given."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=first.dtype, device=x.device)
    out_first, out_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return rotated.to(x.dtype) if out is None else out.copy_(rotated)


class _RopeSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.unbind(2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_q, grad_k, grad_v = grads
        batch, length, heads, width = grad_q.shape
        grad = grad_q.new_empty(batch, length, 3, heads, width)
        rotate(grad_q, cos, -sin, out=grad[:, :, 0])
        rotate(grad_k, cos, -sin, out=grad[:, :, 1])
        grad[:, :, 2] = grad_v
        return grad, None, None


def rope_split(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused projection and rotate queries and keys.

    Args:
        qkv: [B, S, 3, H, D].
        cos: fp32 [B or 1, S, D/2], from `rope_table`.
        sin: the same shape.

    Returns:
        q, k, v, each [B, S, H, D] in the dtype of qkv; v is a view of it.
    """
    q, k, v = _RopeSplit.apply(qkv, cos.unsqueeze(-2), sin.unsqueeze(-2))
    return q, k, v
