"""Rotary embedding on the fused projection: one kernel each way, rotation in float32, one rounding.

Half-split basis: element i of a head pairs with i + D/2. The pairs of all heads of a token form one row of
H D/2, cut into tiles, so neither D nor the number of heads is padded to a power of two. The backward writes
one gradient of the projection: queries and keys rotated back, values copied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.triton.rows import TILE_WARPS, tile_of
from megatron_b2.ops.triton.target import check_dtype


@triton.jit
def _place(tokens, length, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program: tokens, and their batches and positions [ROWS, 1], all int64 since times a stride they
    pass 2^31; pairs [1, COLUMNS]; and which of them are there."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    pair = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (token < tokens) & (pair < PAIRS)
    return token.to(tl.int64), (token // length).to(tl.int64), (token % length).to(tl.int64), pair, inside


@triton.jit
def _rotated(first, second, cos, sin, offset, inside, BACK: tl.constexpr):
    """Pairs rotated by the angles at `offset` of the tables, or back, in the dtype they have."""
    c = tl.load(cos + offset, mask=inside, other=0.0)
    s = tl.load(sin + offset, mask=inside, other=0.0)
    if BACK:
        s = -s
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * c - y * s).to(first.dtype), (y * c + x * s).to(second.dtype)


@triton.jit
def rope_forward(
    qkv, cos, sin, q, k, tokens, length, batch_stride, token_stride, table_batch_stride, table_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """q and k [B, S, HEADS, 2 HALF] from qkv [B, S, 3, HEADS, 2 HALF]; tokens = B S, length = S.

    Strides are of qkv over batch and token, and of the tables [B or 1, S, HALF]; the rest is contiguous.
    Grid [tiles of tokens, tiles of pairs, 2].
    """
    token, batch, position, pair, inside = _place(tokens, length, HEADS * HALF, ROWS, COLUMNS)
    part = tl.program_id(2)
    place = pair // HALF * (2 * HALF) + pair % HALF
    source = qkv + batch * batch_stride + position * token_stride + part * (HEADS * 2 * HALF) + place
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    angle = batch * table_batch_stride + position * table_stride + pair % HALF
    first, second = _rotated(first, second, cos, sin, angle, inside, BACK=False)
    target = token * (HEADS * 2 * HALF) + place
    if part == 0:
        tl.store(q + target, first, mask=inside)
        tl.store(q + target + HALF, second, mask=inside)
    else:
        tl.store(k + target, first, mask=inside)
        tl.store(k + target + HALF, second, mask=inside)


@triton.jit
def _read(
    grad, batch, position, batch_stride, token_stride, head_stride, pair, inside,
    HALF: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Both elements of pairs. Where heads follow each other (PACKED), the compiler knows how far apart they
    are, and can use vectors for any D."""
    source = grad + batch * batch_stride + position * token_stride + pair % HALF
    if PACKED:
        source += pair // HALF * (2 * HALF)
    else:
        source += (pair // HALF).to(tl.int64) * head_stride
    return tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)


@triton.jit
def rope_backward(
    grad_q, grad_k, grad_v, cos, sin, grad_qkv, tokens, length,
    q_batch_stride, q_token_stride, q_head_stride,
    k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    table_batch_stride, table_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_qkv [B, S, 3, HEADS, 2 HALF] from the gradients of q, k and v [B, S, HEADS, 2 HALF].

    q and k are rotated back, v is copied. Grid [tiles of tokens, tiles of pairs, 3].
    """
    token, batch, position, pair, inside = _place(tokens, length, HEADS * HALF, ROWS, COLUMNS)
    part = tl.program_id(2)
    if part == 0:
        first, second = _read(
            grad_q, batch, position, q_batch_stride, q_token_stride, q_head_stride, pair, inside, HALF, PACKED
        )
    elif part == 1:
        first, second = _read(
            grad_k, batch, position, k_batch_stride, k_token_stride, k_head_stride, pair, inside, HALF, PACKED
        )
    else:
        first, second = _read(
            grad_v, batch, position, v_batch_stride, v_token_stride, v_head_stride, pair, inside, HALF, PACKED
        )
    if part < 2:
        angle = batch * table_batch_stride + position * table_stride + pair % HALF
        first, second = _rotated(first, second, cos, sin, angle, inside, BACK=True)
    target = grad_qkv + (token * 3 + part) * (HEADS * 2 * HALF) + pair // HALF * (2 * HALF) + pair % HALF
    tl.store(target, first, mask=inside)
    tl.store(target + HALF, second, mask=inside)


def _grid(tokens: int, heads: int, width: int, parts: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Programs, and the constants of a launch."""
    half = width // 2
    rows, columns = tile_of(heads * half)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(heads * half, columns), parts)
    return grid, {"HEADS": heads, "HALF": half, "ROWS": rows, "COLUMNS": columns, "num_warps": TILE_WARPS}


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Of a contiguous table [B or 1, S, D/2]: from one batch to the next, from one token to the next."""
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1)


def _check_shapes(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse what the kernel would read beyond the end of."""
    batch, length, parts, _, width = qkv.shape
    fitting = [(batches, length, width // 2) for batches in (1, batch)]
    if parts != 3 or width % 2 or cos.shape not in fitting or sin.shape != cos.shape:
        raise InputError(
            f"qkv must be [B, S, 3, H, D], D even, and both tables [B or 1, S, D/2]; got {list(qkv.shape)}, "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )


class _RopeSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        batch, length, _, heads, width = qkv.shape
        q, k = (qkv.new_empty(batch, length, heads, width) for _ in range(2))
        if qkv.numel():
            packed = qkv.stride()[2:] == (heads * width, width, 1)
            source = qkv if packed else qkv.contiguous()
            cos, sin = cos.contiguous(), sin.contiguous()
            grid, constants = _grid(batch * length, heads, width, 2)
            rope_forward[grid](
                source, cos, sin, q, k, batch * length, length,
                *source.stride()[:2], *_table_strides(cos), **constants,
            )  # fmt: skip
        return q, k, qkv.select(2, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = (table.contiguous() for table in ctx.saved_tensors)
        batch, length, heads, width = grads[0].shape
        grad_qkv = grads[0].new_empty(batch, length, 3, heads, width)
        if grad_qkv.numel():
            grads = tuple(grad if grad.stride(3) == 1 else grad.contiguous() for grad in grads)
            strides = [stride for grad in grads for stride in grad.stride()[:3]]
            grid, constants = _grid(batch * length, heads, width, 3)
            rope_backward[grid](
                *grads, cos, sin, grad_qkv, batch * length, length, *strides, *_table_strides(cos),
                PACKED=all(grad.stride(2) == width for grad in grads), **constants,
            )  # fmt: skip
        return grad_qkv, None, None


def rope_split(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused projection and rotate queries and keys.

    Args:
        qkv: [B, S, 3, H, D].
        cos: fp32 [B or 1, S, D/2], from `rope_table`.
        sin: the same shape.

    Returns:
        q, k, v, each [B, S, H, D] in the dtype of qkv; v is a view of it.
    """
    check_dtype(qkv)
    _check_shapes(qkv, cos, sin)
    q, k, v = _RopeSplit.apply(qkv, cos, sin)
    return q, k, v
