"""Causal self-attention with optional ALiBi and packed documents, never holding a [heads, S, S] tensor.

Queries are processed in blocks. A block sees the keys from the first document start among its rows up to
its own diagonal, so memory is [B, H, block, keys] and work in other documents is skipped. The backward pass
recomputes each block from the saved log-sum-exp (Dao 2023). The ALiBi bias slope * (key - query) is relative
and fp32, made inside the block. Plain causal attention over one document uses torch's fused kernel.

Shapes: B batch, H heads, D head width, Q queries, K keys; Q <= K and the last query stands at the last key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128


@dataclass(frozen=True)
class _Block:
    """Query rows [start, stop) and the keys [first_key, last_key) that they may see."""

    start: int
    stop: int
    first_key: int
    last_key: int


@dataclass(frozen=True)
class Documents:
    """Where the packed documents of a batch start; made once a forward pass and shared by all layers."""

    starts: Tensor
    """int64 [B, S]: first position of each position's document."""
    earliest: tuple[int, ...]
    """Smallest start over the batch, for each of the S positions."""

    @classmethod
    def of(cls, segment_ids: Tensor) -> Documents | None:
        """From non-decreasing segment ids [B, S]; none if every row is a single document."""
        if torch.equal(segment_ids, segment_ids[:, :1].expand_as(segment_ids)):
            return None
        positions = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
        is_start = torch.ones_like(segment_ids, dtype=torch.bool)
        is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = torch.where(is_start, positions, 0).cummax(dim=1).values
        return cls(starts, tuple(starts.amin(dim=0).tolist()))

    def positions(self) -> Tensor:
        """Positions that restart in every document, int64 [B, S]."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts


def _blocks(num_queries: int, num_keys: int, documents: Documents | None) -> Iterator[_Block]:
    offset = num_keys - num_queries
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        first_key = 0 if documents is None else documents.earliest[offset + start]
        yield _Block(start, stop, first_key, offset + stop)


def _scores(
    q: Tensor, k: Tensor, block: _Block, slopes: Tensor | None, documents: Documents | None
) -> Tensor:
    """Scaled, biased and masked scores of one block, fp32 [B, H, rows, keys]."""
    offset = k.shape[2] - q.shape[2]
    q_block = q[:, :, block.start : block.stop].float()
    k_block = k[:, :, block.first_key : block.last_key].float()
    scores = torch.matmul(q_block, k_block.transpose(2, 3)).mul_(1.0 / math.sqrt(q.shape[3]))
    rows = torch.arange(offset + block.start, offset + block.stop, device=q.device).unsqueeze(1)
    keys = torch.arange(block.first_key, block.last_key, device=q.device).unsqueeze(0)
    if slopes is not None:
        scores.addcmul_(slopes.view(1, -1, 1, 1), (keys - rows).float())
    hidden = keys > rows
    if documents is not None:
        row_starts = documents.starts[:, offset + block.start : offset + block.stop]
        hidden = hidden | (keys < row_starts.unsqueeze(-1))
        hidden = hidden.unsqueeze(1)
    return scores.masked_fill_(hidden, -torch.inf)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, documents: Documents | None
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for block in _blocks(q.shape[2], k.shape[2], documents):
            rows = slice(block.start, block.stop)
            scores = _scores(q, k, block, slopes, documents)
            top = scores.amax(dim=-1, keepdim=True)
            probs = scores.sub_(top).exp_()
            total = probs.sum(dim=-1, keepdim=True)
            lse[:, :, rows] = (top + total.log()).squeeze(-1)
            v_block = v[:, :, block.first_key : block.last_key]
            out[:, :, rows] = torch.matmul(probs.to(v.dtype), v_block).float().div_(total).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, slopes)
        ctx.documents = documents
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse, slopes = ctx.saved_tensors
        documents = ctx.documents
        scale = 1.0 / math.sqrt(q.shape[3])
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k, dtype=torch.float32)
        grad_v = torch.zeros_like(v, dtype=torch.float32)
        delta = (grad_out.float() * out.float()).sum(dim=-1, keepdim=True)
        for block in _blocks(q.shape[2], k.shape[2], documents):
            rows, keys = slice(block.start, block.stop), slice(block.first_key, block.last_key)
            probs = _scores(q, k, block, slopes, documents).sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
            grad_rows = grad_out[:, :, rows]
            grad_v[:, :, keys] += torch.matmul(probs.to(v.dtype).transpose(2, 3), grad_rows)
            grad_probs = torch.matmul(grad_rows, v[:, :, keys].transpose(2, 3)).float()
            grad_scores = grad_probs.sub_(delta[:, :, rows]).mul_(probs).mul_(scale).to(q.dtype)
            grad_q[:, :, rows] = torch.matmul(grad_scores, k[:, :, keys])
            grad_k[:, :, keys] += torch.matmul(grad_scores.transpose(2, 3), q[:, :, rows])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alibi_slopes: Tensor | None = None, documents: Documents | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the keys at or before each query, inside its document.

    Args:
        q: [B, Q, H, D].
        k: [B, K, H, D], K >= Q; with a key-value cache K > Q and the queries are the last Q positions.
        v: [B, K, H, D].
        alibi_slopes: fp32 [H] or none.
        documents: packing of the K positions, or none for one document a row.

    Returns:
        [B, Q, H, D] in the dtype of q.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if alibi_slopes is None and documents is None and q.shape[2] in (k.shape[2], 1):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    else:
        out = _BlockedAttention.apply(q, k, v, alibi_slopes, documents)
    return out.transpose(1, 2)
