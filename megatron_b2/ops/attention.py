"""Causal self-attention with optional ALiBi and packed documents, never holding a [heads, S, S] tensor.

Queries are processed in tiles. A tile sees the keys from the first document start among its rows up to its
own diagonal, so memory is [B, H, BLOCK, keys] and work in other documents is skipped. The backward pass
recomputes each tile from the saved log-sum-exp (Dao 2023). The ALiBi bias slope * (key - query) is relative
and fp32, made inside the tile. Plain causal attention over one document uses torch's fused kernel.
A tile knows its positions in the whole sequence, so that `context_attention` can work on parts of it.

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


@dataclass(frozen=True)
class Tile:
    """Some query rows and the consecutive keys that any of them may see."""

    rows: slice
    keys: slice
    first_row: int
    """Position of the first row in the whole sequence."""
    first_key: int
    """Position of the first key in the whole sequence."""


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, and with what bias, by their positions in the whole sequence."""

    slopes: Tensor | None
    """ALiBi slopes, fp32 [H]."""
    documents: Documents | None

    def tiles(self, num_queries: int, num_keys: int, *, query_start: int, key_start: int) -> Iterator[Tile]:
        """Tiles, none empty, of queries from position `query_start` on and keys from `key_start` on."""
        for start in range(0, num_queries, BLOCK):
            stop = min(start + BLOCK, num_queries)
            earliest = 0 if self.documents is None else self.documents.earliest[query_start + start]
            first, last = max(0, earliest - key_start), min(num_keys, query_start + stop - key_start)
            if first < last:
                yield Tile(slice(start, stop), slice(first, last), query_start + start, key_start + first)

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        """Scaled, biased and masked scores of one tile, fp32 [B, H, rows, keys]."""
        q_rows, k_rows = q[:, :, tile.rows].float(), k[:, :, tile.keys].float()
        scores = torch.matmul(q_rows, k_rows.transpose(2, 3)).mul_(1.0 / math.sqrt(q.shape[3]))
        last_row, last_key = tile.first_row + q_rows.shape[2], tile.first_key + k_rows.shape[2]
        rows = torch.arange(tile.first_row, last_row, device=q.device).unsqueeze(1)
        keys = torch.arange(tile.first_key, last_key, device=q.device).unsqueeze(0)
        if self.slopes is not None:
            scores.addcmul_(self.slopes.view(1, -1, 1, 1), (keys - rows).float())
        if self.documents is not None:
            row_starts = self.documents.starts[:, tile.first_row : last_row].unsqueeze(-1)
            scores.masked_fill_(((keys > rows) | (keys < row_starts)).unsqueeze(1), -torch.inf)
        elif last_key - 1 > tile.first_row:
            scores.masked_fill_(keys > rows, -torch.inf)
        return scores


@dataclass(frozen=True)
class Rows:
    """What the backward pass knows of the queries."""

    q: Tensor
    """[B, H, Q, D]."""
    grad_out: Tensor
    """[B, H, Q, D]."""
    lse: Tensor
    """Log-sum-exp of each query's scores, fp32 [B, H, Q, 1]."""
    delta: Tensor
    """Sum of grad_out * out over D, fp32 [B, H, Q, 1]."""

    @classmethod
    def of(cls, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor) -> Rows:
        """From the result of the forward pass."""
        return cls(q, grad_out, lse, (grad_out.float() * out.float()).sum(dim=-1, keepdim=True))

    def backward(
        self, pattern: Pattern, tile: Tile, k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> Tensor:
        """Add one tile's part to grad_k and grad_v, fp32 [B, H, K, D]; return that of q[:, :, tile.rows]."""
        rows, keys = tile.rows, tile.keys
        probs = pattern.scores(self.q, k, tile).sub_(self.lse[:, :, rows]).exp_()
        grad_rows = self.grad_out[:, :, rows]
        grad_v[:, :, keys].add_(torch.matmul(probs.to(v.dtype).transpose(2, 3), grad_rows))
        grad_probs = torch.matmul(grad_rows, v[:, :, keys].transpose(2, 3)).float()
        grad_scores = grad_probs.sub_(self.delta[:, :, rows]).mul_(probs).mul_(1.0 / math.sqrt(k.shape[3]))
        grad_scores = grad_scores.to(k.dtype)
        grad_k[:, :, keys].add_(torch.matmul(grad_scores.transpose(2, 3), self.q[:, :, rows]))
        return torch.matmul(grad_scores, k[:, :, keys])


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
        for tile in _whole(q, k, pattern):
            scores = pattern.scores(q, k, tile)
            top = scores.amax(dim=-1, keepdim=True)
            probs = scores.sub_(top).exp_()
            total = probs.sum(dim=-1, keepdim=True)
            lse[:, :, tile.rows] = top + total.log()
            weighted = torch.matmul(probs.to(v.dtype), v[:, :, tile.keys])
            out[:, :, tile.rows] = weighted.float().div_(total).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pattern = pattern
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        rows = Rows.of(q, out, lse, grad_out)
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k, dtype=torch.float32)
        grad_v = torch.zeros_like(v, dtype=torch.float32)
        for tile in _whole(q, k, ctx.pattern):
            grad_q[:, :, tile.rows] = rows.backward(ctx.pattern, tile, k, v, grad_k, grad_v)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _whole(q: Tensor, k: Tensor, pattern: Pattern) -> Iterator[Tile]:
    """All tiles of queries that are the last positions of the keys."""
    return pattern.tiles(q.shape[2], k.shape[2], query_start=k.shape[2] - q.shape[2], key_start=0)


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
        out = _TiledAttention.apply(q, k, v, Pattern(alibi_slopes, documents))
    return out.transpose(1, 2)
