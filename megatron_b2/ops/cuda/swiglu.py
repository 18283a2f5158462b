"""SwiGLU in CUDA C++ (csrc/cuda/swiglu.cu): as ops/swiglu.py, with one rounding of each result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_b2.ops.cuda import extension
from megatron_b2.ops.swiglu import check_width


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        rows = out.numel() // max(width, 1)
        code = extension.dtype_code(gate_up)
        extension.launch("swiglu_forward", gate_up.device, gate_up, out, rows, width, code)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, grad_gate_up = grad.contiguous(), torch.empty_like(gate_up)
        width = gate_up.shape[-1] // 2
        rows = grad.numel() // max(width, 1)
        code = extension.dtype_code(gate_up, grad)
        extension.launch("swiglu_backward", gate_up.device, gate_up, grad, grad_gate_up, rows, width, code)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; see ops/swiglu.py."""
    check_width(gate_up)
    result: Tensor = _SwiGLU.apply(gate_up.contiguous())
    return result
