"""Causal self-attention with optional ALiBi and packed documents, never holding a [heads, S, S] tensor.

An `AttentionKernel` attends from some consecutive queries to some consecutive keys of one sequence, forward
and backward. `TorchTiles` specifies what every other one does; `ops/triton/attention.py` has its fused twin.
A kernel knows the positions of its queries and keys, so that the same one serves a key-value cache (queries
are the last positions) and the ring of `context_attention` (keys come shard by shard, parts are merged).

TorchTiles processes queries in tiles. A tile sees the keys from the first document start among its rows up to
its own diagonal, so memory is [B, H, BLOCK, keys] and work in other documents is skipped. The backward pass
recomputes each tile from the saved log-sum-exp (Dao 2023). The ALiBi bias slope * (key - query) is relative
and fp32, made inside the tile. Plain causal attention over one document uses torch's fused kernel.

Shapes: B batch, H heads, D head width, Q queries, K keys; Q <= K and the last query stands at the last key.
Keys and values may have fewer heads than queries, H/G: each serves G consecutive ones (Ainslie et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_b2.errors import InputError

BLOCK = 128
SMALLEST_PROBABILITY = 1e-26
"""Smaller ones count as 0: next to the largest of a row they change no bit, also in float64 (our choice)."""


@dataclass(frozen=True)
class Documents:
    """Where the packed documents of a batch lie; made once a forward pass and shared by all layers."""

    starts: Tensor
    """int32 [B, S]: first position of each position's document."""
    ends: Tensor
    """int32 [B, S]: last position of each position's document."""
    earliest: tuple[int, ...]
    """Smallest start over the batch, for each of the S positions."""

    @classmethod
    def of(cls, segment_ids: Tensor) -> Documents | None:
        """From non-decreasing segment ids [B, S]; none if every row is a single document."""
        if torch.equal(segment_ids, segment_ids[:, :1].expand_as(segment_ids)):
            return None
        length, device = segment_ids.shape[1], segment_ids.device
        positions = torch.arange(length, dtype=torch.int32, device=device).expand_as(segment_ids)
        is_start = torch.ones_like(segment_ids, dtype=torch.bool)
        is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = torch.where(is_start, positions, 0).cummax(dim=1).values
        is_end = is_start.roll(-1, dims=1)  # the first position is a start, so the last is an end
        ends = torch.where(is_end, positions, length).flip(1).cummin(dim=1).values.flip(1)
        return cls(starts, ends, tuple(starts.amin(dim=0).tolist()))

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
        q_rows = _precise(q[:, :, tile.rows]) / math.sqrt(q.shape[3])
        k_rows = _precise(k[:, :, tile.keys])
        scores = torch.matmul(q_rows, k_rows.transpose(2, 3))
        last_row, last_key = tile.first_row + q_rows.shape[2], tile.first_key + k_rows.shape[2]
        rows = torch.arange(tile.first_row, last_row, device=q.device).unsqueeze(1)
        keys = torch.arange(tile.first_key, last_key, device=q.device).unsqueeze(0)
        if self.slopes is not None:
            scores.addcmul_(self.slopes.to(scores).view(1, -1, 1, 1), (keys - rows).to(scores))
        if self.documents is not None:
            row_starts = self.documents.starts[:, tile.first_row : last_row].unsqueeze(-1)
            scores.masked_fill_((keys < row_starts).unsqueeze(1), -torch.inf)
        later = slice(max(0, tile.first_row + 1 - tile.first_key), None)  # some row does not see these keys
        scores[..., later].masked_fill_(keys[:, later] > rows, -torch.inf)
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

    def backward(
        self, pattern: Pattern, tile: Tile, k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> Tensor:
        """Add one tile's part to grad_k and grad_v, fp32 [B, H, K, D]; return that of q[:, :, tile.rows]."""
        rows, keys = tile.rows, tile.keys
        probs = _exp_(pattern.scores(self.q, k, tile).sub_(self.lse[:, :, rows]))
        grad_rows = self.grad_out[:, :, rows]
        grad_v[:, :, keys].add_(torch.matmul(probs.to(v.dtype).transpose(2, 3), grad_rows))
        grad_probs = _precise(torch.matmul(grad_rows, v[:, :, keys].transpose(2, 3)))
        grad_scores = grad_probs.sub_(self.delta[:, :, rows]).mul_(probs).mul_(1.0 / math.sqrt(k.shape[3]))
        grad_scores = grad_scores.to(k.dtype)
        grad_k[:, :, keys].add_(torch.matmul(grad_scores.transpose(2, 3), self.q[:, :, rows]))
        return torch.matmul(grad_scores, k[:, :, keys])


class AttentionKernel(Protocol):
    """An implementation of attention. Queries are positions query_start.., keys are positions key_start..

    Tensors are [B, H, Q or K, D] with any strides whose last is 1; the pattern is that of the whole sequence.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        *,
        query_start: int,
        key_start: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Mean of the values weighted by the softmax over these keys, and log-sum-exp of their scores.

        Returns:
            [B, H, Q, D] in `dtype` and fp32 [B, H, Q, 1]; 0 and -inf for a query that sees none of the keys.
        """

    def delta(self, out: Tensor, grad_out: Tensor) -> Tensor:
        """Sum of out * grad_out over D, fp32 [B, H, Q, 1]: what `backward` needs of the output."""

    def backward(
        self,
        rows: Rows,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        *,
        query_start: int,
        key_start: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v through these keys alone, in `dtype`."""


class TorchTiles:
    """The reference `AttentionKernel`, in torch operations."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        *,
        query_start: int,
        key_start: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """See AttentionKernel."""
        k, v = (_for_heads(x, q.shape[1]) for x in (k, v))
        out = torch.zeros_like(q, dtype=dtype)
        lse = q.new_full((*q.shape[:3], 1), -torch.inf, dtype=_precision(q))
        for tile in pattern.tiles(q.shape[2], k.shape[2], query_start=query_start, key_start=key_start):
            scores = pattern.scores(q, k, tile)
            # A row that sees no key gets a finite top and probabilities 0; any other has a total >= 1.
            top = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            probs = _exp_(scores.sub_(top))
            total = probs.sum(dim=-1, keepdim=True)
            lse[:, :, tile.rows] = top + total.log()
            weighted = torch.matmul(probs.to(v.dtype), v[:, :, tile.keys])
            out[:, :, tile.rows] = _precise(weighted).div_(total.clamp_(min=1.0))
        return out, lse

    def delta(self, out: Tensor, grad_out: Tensor) -> Tensor:
        """See AttentionKernel."""
        return (_precise(grad_out) * _precise(out)).sum(dim=-1, keepdim=True)

    def backward(
        self,
        rows: Rows,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        *,
        query_start: int,
        key_start: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See AttentionKernel."""
        num_queries, heads, key_heads = rows.q.shape[2], rows.q.shape[1], k.shape[1]
        k, v = (_for_heads(x, heads) for x in (k, v))
        grad_q = torch.zeros_like(rows.q, dtype=dtype)
        grad_k = torch.zeros_like(k, dtype=_precision(k))
        grad_v = torch.zeros_like(v, dtype=_precision(v))
        for tile in pattern.tiles(num_queries, k.shape[2], query_start=query_start, key_start=key_start):
            grad_q[:, :, tile.rows] = rows.backward(pattern, tile, k, v, grad_k, grad_v)
        return grad_q, _of_heads(grad_k, key_heads).to(dtype), _of_heads(grad_v, key_heads).to(dtype)


def _precision(x: Tensor) -> torch.dtype:
    """fp32, or the dtype of x where that has more bits."""
    return torch.promote_types(x.dtype, torch.float32)


def _precise(x: Tensor) -> Tensor:
    return x.to(_precision(x))


def _exp_(x: Tensor) -> Tensor:
    """exp in place, with 0 for what is below the smallest probability, such as exp(-inf).

    ALiBi makes many scores very negative. Their exponentials would be subnormal, on which a CPU's exp and
    matrix products are ten times slower.
    """
    x.clamp_(min=math.log(SMALLEST_PROBABILITY)).exp_()
    return F.threshold(x, 1.01 * SMALLEST_PROBABILITY, 0.0, inplace=True)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, H/G, K, D] repeated for each of H query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _of_heads(grad: Tensor, key_heads: int) -> Tensor:
    """Gradient [B, H, K, D] summed over the query heads that share a key head."""
    return grad if grad.shape[1] == key_heads else grad.unflatten(1, (key_heads, -1)).sum(dim=2)


class _TiledAttention(torch.autograd.Function):
    """Queries are the last positions of the keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, kernel: AttentionKernel
    ) -> Tensor:
        query_start = k.shape[2] - q.shape[2]
        out, lse = kernel.forward(q, k, v, pattern, query_start=query_start, key_start=0, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pattern, ctx.kernel = pattern, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        rows = Rows(q, grad_out, lse, ctx.kernel.delta(out, grad_out))
        query_start = k.shape[2] - q.shape[2]
        grad_q, grad_k, grad_v = ctx.kernel.backward(
            rows, k, v, ctx.pattern, query_start=query_start, key_start=0, dtype=q.dtype
        )
        return grad_q, grad_k, grad_v, None, None


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> None:
    """Refuse what a kernel, which trusts the sizes of q and k, would read beyond the end of."""
    (batch, heads, queries, width), (key_heads, keys) = q.shape, k.shape[1:3]
    if k.shape != (batch, key_heads, keys, width) or v.shape != k.shape or heads % max(key_heads, 1):
        shapes = " and ".join(str([x.shape[i] for i in (0, 2, 1, 3)]) for x in (q, k, v))
        raise InputError(f"q must be [B, Q, H, D], k and v [B, K, H/G, D]; got {shapes}")
    if queries > keys:
        raise InputError(f"{queries} queries, but only {keys} keys")
    if pattern.slopes is not None and pattern.slopes.shape != (heads,):
        raise InputError(f"alibi_slopes must be [{heads}], one a head, got {list(pattern.slopes.shape)}")
    starts = None if pattern.documents is None else pattern.documents.starts
    if starts is not None and starts.shape != (batch, keys):
        raise InputError(f"documents must be of [{batch}, {keys}] positions, got {list(starts.shape)}")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alibi_slopes: Tensor | None,
    documents: Documents | None,
    kernel: AttentionKernel,
) -> Tensor:
    """`causal_attention` by a kernel of choice.

    Raises:
        InputError: if the shapes do not fit each other.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    pattern = Pattern(alibi_slopes, documents)
    _check_shapes(q, k, v, pattern)
    out: Tensor = _TiledAttention.apply(q, k, v, pattern, kernel)
    return out.transpose(1, 2)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alibi_slopes: Tensor | None = None, documents: Documents | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the keys at or before each query, inside its document.

    Args:
        q: [B, Q, H, D].
        k: [B, K, H/G, D], K >= Q; with a key-value cache K > Q and the queries are the last Q positions.
        v: [B, K, H/G, D].
        alibi_slopes: fp32 [H] or none.
        documents: packing of the K positions, or none for one document a row.

    Returns:
        [B, Q, H, D] in the dtype of q.
    """
    if alibi_slopes is not None or documents is not None or q.shape[1] not in (k.shape[1], 1):
        return attend(q, k, v, alibi_slopes=alibi_slopes, documents=documents, kernel=TorchTiles())
    grouped, is_causal = q.shape[2] != k.shape[2], q.shape[1] > 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)
    return out.transpose(1, 2)
