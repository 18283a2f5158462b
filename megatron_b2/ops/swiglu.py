"""SwiGLU: silu(gate) * up from the fused projection (report section 2.4; Shazeer 2020).

Only the fused input is kept for the backward pass; the product is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.precision import at_least_fp32


def check_width(gate_up: Tensor) -> None:
    """Refuse an odd width, of which a kernel would leave out a column.

    Raises:
        InputError: if gate_up is not [..., 2F].
    """
    if gate_up.shape[-1] % 2:
        raise InputError(f"gate_up has an odd width: {gate_up.shape[-1]}")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = (at_least_fp32(part) for part in gate_up.chunk(2, dim=-1))
        grad_fp32 = at_least_fp32(grad)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        grad_up.copy_(grad_fp32 * silu)
        # d silu(g) / dg = sigmoid(g) (1 + g - silu(g))
        grad_gate.copy_((gate + 1).sub_(silu).mul_(sigmoid).mul_(up).mul_(grad_fp32))
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [..., 2F], gate in the first half, up in the second.

    Returns:
        [..., F] in the same dtype.
    """
    result: Tensor = _SwiGLU.apply(gate_up)
    return result
