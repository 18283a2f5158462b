"""Rotary position embedding in the half-split basis, angles and rotation in fp32 (Su et al. 2021).

bf16 positions collide from 257 on, so nothing here is ever computed below fp32.
Shapes: B batch, S sequence, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out_first, out_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return rotated.to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: [B, S, H, D].
        cos: fp32 [B, S, D/2] or [S, D/2], from `rope_table`.
        sin: the same shape.

    Returns:
        [B, S, H, D] in the dtype of x.
    """
    result: Tensor = _Rope.apply(x, cos.unsqueeze(-2), sin.unsqueeze(-2))
    return result
