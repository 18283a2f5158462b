"""Causal attention in fused Triton kernels: plain, ALiBi, packed documents, head widths up to 160.

Nothing of [Q, K] is ever stored: 4 bytes a query (its log-sum-exp) beside the inputs and the output. Grouped
heads get gradients of k and v in fp32 for each query head first, as in FlashAttention-2, and then their sum.
Forward and backward are deterministic. The kernels are in attention_forward.py and attention_backward.py.

Shapes: B batch, H heads, G query heads of one key head, D head width, Q queries, K keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from megatron_b2.ops.attention import Documents, Pattern, Rows, attend
from megatron_b2.ops.triton import target
from megatron_b2.ops.triton.attention_backward import delta_kernel, key_kernel, needed_kernel, query_kernel
from megatron_b2.ops.triton.attention_common import LOG2_E, NORM_KEYS, pieces
from megatron_b2.ops.triton.attention_forward import forward_kernel
from megatron_b2.ops.triton.tiles import MAX_HEAD_DIM, AttentionTiles, Tile, attention_tiles

WIDE_BYTES = 16
"""The widest access to global memory of a thread."""


@dataclass(frozen=True)
class TritonAttention:
    """An `AttentionKernel` for fp32, fp16 and bf16; on the CPU only under Triton's interpreter."""

    skip_negligible: bool = False
    """Under ALiBi, leave out keys so far away that, by a bound on the lengths of queries and keys, they add
    less than 2^-24 of a row's sum: below the resolution of fp32, but not the same bits."""

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
        call = _Call.of(q, k, v, pattern, query_start, key_start, skip=self.skip_negligible)
        batch, heads, num_queries, head_dim = q.shape
        out = q.new_empty((batch, num_queries, heads, head_dim), dtype=dtype)
        lse = q.new_empty((batch, heads, num_queries, 1), dtype=torch.float32)
        tile = call.tiles.forward
        forward_kernel[(triton.cdiv(num_queries, tile.rows), heads, batch)](
            *call.inputs, call.starts, *call.lengths, out, lse, *call.strides, *call.sizes(heads),
            **call.options, **_blocks(tile),
        )  # fmt: skip
        return out.transpose(1, 2), lse

    def delta(self, out: Tensor, grad_out: Tensor) -> Tensor:
        """See AttentionKernel."""
        out, grad_out = _rows_first(out), _rows_first(grad_out)
        batch, num_queries, heads, head_dim = out.shape
        delta = out.new_empty((batch, heads, num_queries, 1), dtype=torch.float32)
        head, tail = pieces(head_dim)
        tile = _tiles(out).delta
        delta_kernel[(triton.cdiv(num_queries, tile.rows), heads, batch)](
            out, grad_out, delta, heads, num_queries,
            D=head_dim, HEAD=head, TAIL=tail, BLOCK_M=tile.rows, num_warps=tile.warps,
        )  # fmt: skip
        return delta

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
        call = _Call.of(rows.q, k, v, pattern, query_start, key_start, skip=self.skip_negligible)
        batch, heads, num_queries, head_dim = rows.q.shape
        group, num_keys = heads // k.shape[1], k.shape[2]
        grad_out, lse, delta = _rows_first(rows.grad_out), rows.lse.contiguous(), rows.delta.contiguous()
        needed = call.needed(lse)
        grad_q = k.new_empty((batch, num_queries, heads, head_dim), dtype=dtype)
        partial = dtype if group == 1 else torch.float32
        grad_k, grad_v = (k.new_empty((batch, num_keys, heads, head_dim), dtype=partial) for _ in range(2))
        tile = call.tiles.query_gradient
        query_kernel[(triton.cdiv(num_queries, tile.rows), heads, batch)](
            *call.inputs, call.starts, needed, grad_out, lse, delta, grad_q, *call.strides,
            *call.sizes(heads), **call.options, **_blocks(tile),
        )  # fmt: skip
        tile = call.tiles.key_gradient
        key_kernel[(triton.cdiv(num_keys, tile.columns), heads, batch)](
            *call.inputs, call.ends, needed, grad_out, lse, delta, grad_k, grad_v, *call.strides,
            *call.sizes(heads), **call.options, **_blocks(tile),
        )  # fmt: skip
        if group > 1:
            grad_k, grad_v = (x.unflatten(2, (-1, group)).sum(3).to(dtype) for x in (grad_k, grad_v))
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


@dataclass(frozen=True)
class _Call:
    """What the kernels of one call have in common."""

    q: Tensor
    """[B, H, Q, D]; in all three the columns are adjacent."""
    k: Tensor
    """[B, H/G, K, D]."""
    v: Tensor
    """[B, H/G, K, D]."""
    pattern: Pattern
    query_start: int
    key_start: int
    skip: bool

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        query_start: int,
        key_start: int,
        *,
        skip: bool,
    ) -> _Call:
        head_dim, heads, key_heads = q.shape[3], q.shape[1], k.shape[1]
        target.check_dtype(q, k, v)
        assert head_dim <= MAX_HEAD_DIM, f"head width {head_dim} is more than {MAX_HEAD_DIM}"
        assert heads % key_heads == 0, f"{heads} query heads do not divide by {key_heads} key heads"
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        return cls(q, k, v, pattern, query_start, key_start, skip and pattern.slopes is not None)

    @property
    def tiles(self) -> AttentionTiles:
        return _tiles(self.q)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v and the slopes; a tensor that a kernel does not read is stood for by q."""
        slopes = self.pattern.slopes
        return self.q, self.k, self.v, self.q if slopes is None else slopes.contiguous()

    @property
    def starts(self) -> Tensor:
        documents = self.pattern.documents
        return self.q if documents is None else documents.starts.contiguous()

    @property
    def ends(self) -> Tensor:
        documents = self.pattern.documents
        return self.q if documents is None else documents.ends.contiguous()

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Of each query, and of the longest key to the end of each NORM_KEYS: fp32 [B, H, Q], [B, H/G, n]."""
        if not self.skip:
            return self.q, self.q
        of_queries, of_keys = (
            torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).contiguous() for x in (self.q, self.k)
        )
        padded = F.pad(of_keys, (0, -of_keys.shape[2] % NORM_KEYS.value))
        longest: Tensor = padded.unflatten(2, (-1, NORM_KEYS.value)).amax(dim=3)
        return of_queries, longest.cummax(dim=2).values

    def needed(self, lse: Tensor) -> Tensor:
        """First key that each query needs, int32 [B, H, Q]; lse: fp32 [B, H, Q, 1]."""
        if not self.skip:
            return self.q
        batch, heads, num_queries, _ = self.q.shape
        needed = self.q.new_empty((batch, heads, num_queries), dtype=torch.int32)
        tile = self.tiles.delta
        options = {name: self.options[name] for name in ("SCALE", "UNIT", "GROUP")}
        needed_kernel[(triton.cdiv(num_queries, tile.rows), heads, batch)](
            self.inputs[3], *self.lengths, lse, needed, heads, num_queries, self.k.shape[2],
            self.query_start - self.key_start, **options, BLOCK_M=tile.rows, num_warps=tile.warps,
        )  # fmt: skip
        return needed

    @property
    def strides(self) -> tuple[int, ...]:
        """Of batch, head and row of q, k and v, in `step` elements."""
        return tuple(stride // self.step for x in (self.q, self.k, self.v) for stride in x.stride()[:3])

    @property
    def step(self) -> int:
        """16 bytes where all strides are multiples of them, else 1 element."""
        wide = WIDE_BYTES // self.q.element_size()
        is_wide = all(stride % wide == 0 for x in (self.q, self.k, self.v) for stride in x.stride()[:3])
        return wide if is_wide else 1

    def sizes(self, heads: int) -> tuple[int, ...]:
        documents = self.pattern.documents
        length = 0 if documents is None else documents.starts.shape[1]
        return heads, self.q.shape[2], self.k.shape[2], self.query_start, self.key_start, length

    @property
    def options(self) -> dict[str, Any]:
        """Compile-time arguments."""
        head_dim = self.q.shape[3]
        head, tail = pieces(head_dim)
        unit = 1.0 if self.q.dtype == torch.float32 else LOG2_E.value
        return {
            "SCALE": unit / math.sqrt(head_dim),
            "UNIT": unit,
            "GROUP": self.q.shape[1] // self.k.shape[1],
            "D": head_dim,
            "HEAD": head,
            "TAIL": tail,
            "STEP": self.step,
            "ALIBI": self.pattern.slopes is not None,
            "PACKED": self.pattern.documents is not None,
            "SKIP": self.skip,
        }


def _tiles(x: Tensor) -> AttentionTiles:
    return attention_tiles(target.arch_of(x.device), x.shape[3], x.element_size())


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "DEPTH": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _rows_first(x: Tensor) -> Tensor:
    """[B, H, Q, D] as a contiguous [B, Q, H, D]."""
    return x.transpose(1, 2).contiguous()


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    documents: Documents | None = None,
    skip_negligible: bool = False,
) -> Tensor:
    """`megatron_b2.ops.attention.causal_attention`, fused; skip_negligible: see TritonAttention."""
    kernel = TritonAttention(skip_negligible=skip_negligible)
    return attend(q, k, v, alibi_slopes=alibi_slopes, documents=documents, kernel=kernel)
