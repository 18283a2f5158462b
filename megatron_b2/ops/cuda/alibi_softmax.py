"""Causal softmax of stored attention scores, with ALiBi and packed documents (csrc/cuda/alibi_softmax.cu).

For attention that keeps its scores [B, H, Q, K]. Any number of heads and any K: no limit of 2,048 or 4,096
keys and no rule for batch x heads, by which other fused softmaxes fall back to torch unseen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.cuda import extension


class _AlibiSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, slopes: Tensor | None, starts: Tensor | None, scale: float
    ) -> Tensor:
        probs = torch.empty_like(scores)
        code = extension.dtype_code(scores)
        pointers = (scores, slopes, starts, probs)
        extension.launch("alibi_softmax_forward", scores.device, *pointers, *scores.shape, scale, code)
        ctx.save_for_backward(probs, starts)
        ctx.scale = scale
        return probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probs, starts = ctx.saved_tensors
        grad, grad_scores = grad.contiguous(), torch.empty_like(probs)
        code = extension.dtype_code(probs, grad)
        pointers = (probs, grad, starts, grad_scores)
        extension.launch("alibi_softmax_backward", probs.device, *pointers, *probs.shape, ctx.scale, code)
        return grad_scores, None, None, None


def alibi_softmax(
    scores: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """softmax(scale * scores + slope * (key - query)) over the keys at or before each query, in its document.

    Args:
        scores: q k^T, [B, H, Q, K]; the queries are the last Q of the K positions.
        scale: normally 1 / sqrt(head width).
        alibi_slopes: fp32 [H] or none.
        documents: packing of the K positions, or none.

    Returns:
        Probabilities, as scores; fp32 inside, rounded once.
    """
    batch, heads, queries, keys = scores.shape
    if queries > keys:
        raise InputError(f"{queries} queries, but only {keys} keys")
    if alibi_slopes is not None and (alibi_slopes.shape != (heads,) or alibi_slopes.dtype != torch.float32):
        raise InputError(
            f"alibi_slopes must be fp32 [{heads}], got {alibi_slopes.dtype} {alibi_slopes.shape}"
        )
    starts = None if documents is None else documents.starts.contiguous()
    if starts is not None and (starts.shape != (batch, keys) or starts.dtype != torch.int32):
        raise InputError(
            f"document starts must be int32 [{batch}, {keys}], got {starts.dtype} {starts.shape}"
        )
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    result: Tensor = _AlibiSoftmax.apply(scores.contiguous(), slopes, starts, scale)
    return result
