"""NormHead, cross-entropy and max-z loss in one operation over chunks of tokens.

Per token t with logits z_v = x_t . w_v / ||w_v||:  ce_t = logsumexp(z) - z_label,  maxz_t = (max_v z_v)^2
(report section 2.5). Neither the [T, V] logits nor W / ||W|| ever exist: each chunk of tokens makes its
logits, its loss and - when a gradient is wanted - its gradients at once, in one reused buffer. With
n_v = 1 / ||w_v|| and delta = d total / d z:
    dx = (delta n) W,   G = (delta n)^T x,   dw_v = G_v - n_v^2 <w_v, G_v> w_v,
so every row's gradient is orthogonal to the row. Accumulation over chunks is fp32. The max passes its
gradient to one index only, the lowest among ties.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_b2.ops.head_common import Statistics, check_shapes, over_ranks, scalar
from megatron_b2.ops.norm_head import EPS, inverse_row_norms
from megatron_b2.parallel.tensor_parallel import TensorParallel

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 12 * 2**20
_MAX_CHUNK_TOKENS = 1024
_CACHED_ELEMENTS = 2**20


class HeadLoss(NamedTuple):
    """Sums over tokens, 0-dim fp32; only `total` carries a gradient."""

    total: Tensor
    """ce_scale * ce + z_scale * max_z."""
    ce: Tensor
    """Sum of the cross-entropy over tokens whose label is not -100."""
    max_z: Tensor
    """Sum of the squared largest logit over all tokens."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are in memory at once: 48 MiB of fp32, at most 1,024 tokens (our choice)."""
    return max(1, min(_CHUNK_ELEMENTS // vocab_size, _MAX_CHUNK_TOKENS))


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
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        inverse_norms, first_id = inverse_row_norms(weight), tensor.rank * len(weight)
        ce = hidden.new_zeros((), dtype=torch.float32)
        max_z = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad else None
        size = max(1, min(chunk_tokens(len(weight)), len(hidden)))
        buffer = torch.empty(size, len(weight), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            x, label = hidden[start : start + size], labels[start : start + size]
            counted = label != IGNORE_INDEX
            target = _Column.of(label - first_id, len(weight))
            probs = _logits(x, weight, buffer)
            local = _softmax_(probs, inverse_norms, target, first_id)
            whole = over_ranks(local, tensor)
            ce_part, max_z_part = whole.sums(counted)
            ce += ce_part
            max_z += max_z_part
            if grad_hidden is None or grad_weight is None:
                continue
            # delta = ce_grad (p - 1_label) + z_grad 1_top: the two single columns are added as rows.
            ce_grad = counted * ce_scale
            top = _Column.of(whole.top_index - first_id, len(weight))
            prob_grad = (ce_grad * (local.lse - whole.lse).exp()).unsqueeze(1)
            columns = (
                (target.row, target.column_grad(-ce_grad, inverse_norms)),
                (top.row, top.column_grad(2 * z_scale * whole.top, inverse_norms)),
            )
            probs = probs.to(weight.dtype)
            grad_x = torch.matmul(probs, weight).float().mul_(prob_grad)
            x_fp32 = x.float()
            _accumulate(grad_weight, probs, (x_fp32 * prob_grad).to(x.dtype))
            for index, grad in columns:
                grad_x.addcmul_(weight[index].float(), grad)
                grad_weight.index_add_(0, index, x_fp32 * grad)
            grad_hidden[start : start + size] = grad_x
        if grad_weight is not None:
            _project(grad_weight, weight, inverse_norms)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(ce, max_z)
        return ce_scale * ce + z_scale * max_z, ce, max_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if bool(grad != 1):
            grad_hidden, grad_weight = grad_hidden * grad, grad_weight * grad
        return grad_hidden, grad_weight, None, None, None, None


class _Column(NamedTuple):
    """One vocabulary column a token, as this rank sees it."""

    row: Tensor
    """int64 [T], row of the local weight; 0 where another rank holds it."""
    is_here: Tensor
    """bool [T]."""

    @classmethod
    def of(cls, index: Tensor, num_rows: int) -> _Column:
        is_here = (index >= 0) & (index < num_rows)
        return cls(index.where(is_here, 0), is_here)

    def column_grad(self, grad: Tensor, inverse_norms: Tensor) -> Tensor:
        """Gradient [T, 1] of the raw product in this column, zero where another rank holds it."""
        return (grad * inverse_norms[self.row] * self.is_here).unsqueeze(1)


def _logits(x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """x W^T in the first rows of the fp32 buffer."""
    rows = buffer[: len(x)]
    if weight.dtype == torch.float32:
        return torch.matmul(x, weight.t(), out=rows)
    return rows.copy_(torch.matmul(x, weight.t()))


def _softmax_(logits: Tensor, inverse_norms: Tensor, target: _Column, first_id: int) -> Statistics:
    """Turn raw products [T, V] into n_v p_v in place, a few cache-sized rows at a time; `first_id` is the
    vocabulary id of the first column."""
    parts = []
    rows = max(1, _CACHED_ELEMENTS // logits.shape[1])
    for block, wanted in zip(logits.split(rows), target.row.split(rows), strict=True):
        block.mul_(inverse_norms)
        top, top_index = block.max(dim=1)
        target_logit = block.gather(1, wanted.unsqueeze(1)).squeeze(1)
        torch.softmax(block, dim=1, out=block)
        total = block.gather(1, top_index.unsqueeze(1)).squeeze(1).reciprocal()  # of exp(z - top)
        block.mul_(inverse_norms)
        parts.append(torch.stack([top, total, top_index + first_id, target_logit], dim=1))
    table = torch.cat(parts)
    table[:, 3] *= target.is_here
    return Statistics(table)


def _accumulate(grad_weight: Tensor, scaled: Tensor, x: Tensor) -> None:
    if scaled.dtype == torch.float32:
        grad_weight.addmm_(scaled.t(), x)
    else:
        grad_weight += torch.matmul(scaled.t(), x)


def _project(grad_weight: Tensor, weight: Tensor, inverse_norms: Tensor) -> None:
    """G_v -= n_v^2 <w_v, G_v> w_v in place; rows at or below the norm floor keep G_v (the clamp is flat)."""
    for start in range(0, len(weight), 8192):
        rows = slice(start, start + 8192)
        w = weight[rows].float()
        inner = torch.linalg.vecdot(w, grad_weight[rows])
        factor = (inner * inverse_norms[rows].square()).where(inverse_norms[rows] < 1 / EPS, 0)
        grad_weight[rows].addcmul_(w, factor.unsqueeze(1), value=-1)


def norm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ce_scale: Tensor | float,
    z_scale: Tensor | float,
    tensor: TensorParallel | None = None,
) -> HeadLoss:
    """Weighted sum of cross-entropy and max-z over tokens, and both sums.

    Args:
        hidden: [T, H] final hidden states.
        weight: [V, H] raw NormHead rows, same dtype; with tensor parallelism the rows from rank * V on.
        labels: int64 [T], the same on every rank of the group; -100 takes no part in the cross-entropy but
            does in max-z, as published. Ids are not compared with the vocabulary, which a GPU would wait for
            (data sets and `LoadedModel` do it): another one below 2^31 counts as one whose logit is 0.
        ce_scale: factor of the cross-entropy sum, normally 1 / (targets of the global batch).
        z_scale: factor of the max-z sum, normally max_z_weight / (positions of the global batch).
        tensor: the ranks that hold the other rows. Losses are the same bits on all; the gradient of `hidden`
            is this rank's part of the sum.

    Returns:
        `HeadLoss`; the gradient of `total` was computed together with it.

    Raises:
        InputError: if the shapes do not fit each other.
    """
    check_shapes(hidden, weight, labels)
    scales = (scalar(scale, hidden.device) for scale in (ce_scale, z_scale))
    return HeadLoss(*_NormHeadLoss.apply(hidden, weight, labels, *scales, tensor or TensorParallel()))
