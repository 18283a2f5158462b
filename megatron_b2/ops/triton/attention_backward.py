"""Causal flash attention, backward, without atomics: the same inputs give the same bits.

Two kernels recompute the probabilities from the saved log-sum-exp (Dao 2023). One owns BLOCK_N keys of one
query head and visits the queries that see them: its part of the gradients of k and v, which the caller sums
over the heads of a group. The other owns BLOCK_M queries and visits their keys: gradient of q. That is 7
matrix products instead of 5, and no sum is made by more than one program. ALiBi and blocks without a mask
are as in attention_forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_b2.ops.triton.attention_common import (
    NORM_KEYS,
    SIZES,
    add_product,
    bias,
    first_needed,
    key_range,
    load_pair,
    masked_block,
    operand,
    phases,
    power,
    products,
    store_pair,
    within,
)

SCAN = tl.constexpr(1024)
"""Queries whose first needed key is looked at together."""


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out_ptr, grad_out_ptr, delta_ptr, num_heads, num_queries,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sum of out * grad_out [B, Q, H, D] over D: fp32 [B, H, Q]. Grid (tiles of queries, H, B)."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    base = (batch * num_queries * num_heads + head) * D
    out, out_tail = load_pair(
        out_ptr + base, row, num_heads * D, num_queries, BLOCK_M, HEAD, TAIL, D, 1, True
    )
    grad, grad_tail = load_pair(
        grad_out_ptr + base, row, num_heads * D, num_queries, BLOCK_M, HEAD, TAIL, D, 1, True
    )
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if TAIL > 0:
        delta += tl.sum(out_tail.to(tl.float32) * grad_tail.to(tl.float32), 1)
    tl.store(delta_ptr + (batch * num_heads + head) * num_queries + rows, delta, mask=rows < num_queries)


@triton.jit(do_not_specialize=SIZES)
def needed_kernel(
    slopes_ptr, lengths_ptr, longest_keys_ptr, lse_ptr, needed_ptr, num_heads, num_queries, num_keys, shift,
    SCALE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """First key that each query needs under ALiBi, int32 [B, H, Q]. Grid (tiles of queries, H, B)."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    statistics = (batch * num_heads + head) * num_queries + rows
    longest = tl.max(tl.load(lengths_ptr + statistics, mask=rows < num_queries, other=0.0), 0) * SCALE
    lowest = tl.min(tl.load(lse_ptr + statistics, mask=rows < num_queries, other=float("inf")), 0) * UNIT
    slope = tl.load(slopes_ptr + head) * UNIT
    longest_keys_ptr += (batch * num_heads + head) // GROUP * tl.cdiv(num_keys, NORM_KEYS)
    seen = tl.maximum(tl.minimum(row + shift + 1, num_keys), 0)
    needed = first_needed(longest_keys_ptr, longest, lowest, row + shift, slope, seen, UNIT)
    tl.store(needed_ptr + statistics, tl.zeros_like(rows) + needed, mask=rows < num_queries)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, starts_ptr, needed_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    num_heads, num_queries, num_keys, query_start, key_start, length,
    SCALE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr,
    ALIBI: tl.constexpr, PACKED: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient of q, [B, Q, H, D], as grad_out is. Grid and the rest as in forward_kernel."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = row + tl.arange(0, BLOCK_M)
    shift = query_start - key_start
    diagonal = rows + shift
    q_ptr += (batch * q_batch + head * q_head) * STEP
    k_ptr += (batch * k_batch + head // GROUP * k_head) * STEP
    v_ptr += (batch * v_batch + head // GROUP * v_head) * STEP
    base = (batch * num_queries * num_heads + head) * D
    q, q_tail = operand(q_ptr, row, q_row, num_queries, BLOCK_M, HEAD, TAIL, D, STEP, DEPTH, True)
    grad_out, grad_out_tail = operand(
        grad_out_ptr + base, row, num_heads * D, num_queries, BLOCK_M, HEAD, TAIL, D, 1, DEPTH, True
    )
    statistics = (batch * num_heads + head) * num_queries + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < num_queries, other=0.0) * UNIT
    delta = tl.load(delta_ptr + statistics, mask=rows < num_queries, other=0.0)
    slope, earliest = 0.0, diagonal
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * UNIT
    if PACKED:
        starts_ptr += batch * length
        earliest = tl.load(starts_ptr + query_start + rows, mask=rows < num_queries, other=0) - key_start
    begin, full_begin, full_end, end = key_range(
        starts_ptr, row, num_queries, num_keys, shift, query_start, key_start, PACKED, BLOCK_M, BLOCK_N
    )
    num_before, num_masked, full_begin, full_end = phases(begin, full_begin, full_end, end, BLOCK_N)
    if SKIP:
        needed = tl.min(tl.load(needed_ptr + statistics, mask=rows < num_queries, other=num_keys), 0)
        full_begin = tl.minimum(tl.maximum(full_begin, needed // BLOCK_N * BLOCK_N), full_end)
    grad_q = tl.zeros((BLOCK_M, HEAD), tl.float32)
    grad_q_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 1), tl.float32)
    for t in range(num_masked):
        key = masked_block(t, begin, num_before, full_end, BLOCK_N)
        grad_q, grad_q_tail = _visit_keys(
            grad_q, grad_q_tail, q, q_tail, grad_out, grad_out_tail, lse, delta, k_ptr, k_row, v_ptr, v_row,
            key, num_keys, diagonal, earliest, slope,
            SCALE, UNIT, D, HEAD, TAIL, STEP, ALIBI, PACKED, BLOCK_N, DEPTH, True,
        )  # fmt: skip
    for key in range(full_begin, full_end, BLOCK_N):
        grad_q, grad_q_tail = _visit_keys(
            grad_q, grad_q_tail, q, q_tail, grad_out, grad_out_tail, lse, delta, k_ptr, k_row, v_ptr, v_row,
            key, num_keys, diagonal, earliest, slope,
            SCALE, UNIT, D, HEAD, TAIL, STEP, ALIBI, PACKED, BLOCK_N, DEPTH, False,
        )  # fmt: skip
    grad_q, grad_q_tail = grad_q * (SCALE / UNIT), grad_q_tail * (SCALE / UNIT)
    store_pair(grad_q_ptr + base, row, num_heads * D, num_queries, grad_q, grad_q_tail, TAIL, D)


@triton.jit
def _visit_keys(
    grad_q, grad_q_tail, q, q_tail, grad_out, grad_out_tail, lse, delta, k_ptr, k_row, v_ptr, v_row, key,
    num_keys, diagonal, earliest, slope,
    SCALE: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    STEP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """grad_q * sqrt(D) with the part of BLOCK_N more keys."""
    keys = key + tl.arange(0, BLOCK_N)
    k, k_tail = operand(k_ptr, key, k_row, num_keys, BLOCK_N, HEAD, TAIL, D, STEP, DEPTH, MASKED)
    scores = products(q, q_tail, k, k_tail, D, TAIL, DEPTH) * SCALE
    level = lse
    if MASKED:
        if ALIBI:
            scores += bias(keys[None, :], diagonal[:, None], slope)
        seen = within(keys[None, :], diagonal[:, None], earliest[:, None], num_keys, PACKED)
        scores = tl.where(seen, scores, float("-inf"))
    elif ALIBI:
        last = key + BLOCK_N - 1
        scores += bias(keys, last, slope)[None, :]
        level = lse - bias(last, diagonal, slope)
    probs = power(scores - level[:, None], UNIT)
    v, v_tail = operand(v_ptr, key, v_row, num_keys, BLOCK_N, HEAD, TAIL, D, STEP, DEPTH, MASKED)
    grad_probs = products(grad_out, grad_out_tail, v, v_tail, D, TAIL, DEPTH)
    if DEPTH > 0:
        k, k_tail = load_pair(k_ptr, key, k_row, num_keys, BLOCK_N, HEAD, TAIL, D, STEP, MASKED)
    grad_scores = (probs * (grad_probs - delta[:, None])).to(k.dtype)
    return add_product(grad_q, grad_q_tail, grad_scores, k, k_tail, TAIL)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, ends_ptr, needed_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr,
    grad_v_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    num_heads, num_queries, num_keys, query_start, key_start, length,
    SCALE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr,
    ALIBI: tl.constexpr, PACKED: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A query head's part of the gradients of k and v, [B, K, H, D]; ends int32 [B, length]; grid (key tiles,
    H, B)."""
    key = tl.program_id(0) * BLOCK_N  # those with most queries begin first
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    keys = key + tl.arange(0, BLOCK_N)
    q_ptr += (batch * q_batch + head * q_head) * STEP
    k_ptr += (batch * k_batch + head // GROUP * k_head) * STEP
    v_ptr += (batch * v_batch + head // GROUP * v_head) * STEP
    grad_out_ptr += (batch * num_queries * num_heads + head) * D
    statistics = (batch * num_heads + head) * num_queries
    k, k_tail = operand(k_ptr, key, k_row, num_keys, BLOCK_N, HEAD, TAIL, D, STEP, DEPTH, True)
    v, v_tail = operand(v_ptr, key, v_row, num_keys, BLOCK_N, HEAD, TAIL, D, STEP, DEPTH, True)
    shift = query_start - key_start
    slope, latest = 0.0, keys
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * UNIT
    if PACKED:  # the last query that sees each key
        ends_ptr += batch * length + key_start
        latest = tl.load(ends_ptr + keys, mask=keys < num_keys, other=0) - query_start
    begin, full_begin, full_end, end = _query_range(
        ends_ptr, key, num_queries, num_keys, shift, query_start, PACKED, BLOCK_M, BLOCK_N
    )
    if SKIP:
        end = tl.minimum(end, _end_needed(needed_ptr + statistics, key + BLOCK_N, num_queries))
        full_end = tl.minimum(full_end, end // BLOCK_M * BLOCK_M)
    num_before, num_masked, full_begin, full_end = phases(begin, full_begin, full_end, end, BLOCK_M)
    grad_k, grad_v = tl.zeros((BLOCK_N, HEAD), tl.float32), tl.zeros((BLOCK_N, HEAD), tl.float32)
    grad_k_tail = tl.zeros((BLOCK_N, TAIL if TAIL > 0 else 1), tl.float32)
    grad_v_tail = tl.zeros((BLOCK_N, TAIL if TAIL > 0 else 1), tl.float32)
    for t in range(num_masked):
        row = masked_block(t, begin, num_before, full_end, BLOCK_M)
        grad_k, grad_k_tail, grad_v, grad_v_tail = _visit_queries(
            grad_k, grad_k_tail, grad_v, grad_v_tail, k, k_tail, v, v_tail, q_ptr, q_row, grad_out_ptr,
            num_heads * D, lse_ptr + statistics, delta_ptr + statistics, row, num_queries,
            key, shift, latest, slope,
            SCALE, UNIT, D, HEAD, TAIL, STEP, ALIBI, PACKED, BLOCK_M, BLOCK_N, DEPTH, True,
        )  # fmt: skip
    for row in range(full_begin, full_end, BLOCK_M):
        grad_k, grad_k_tail, grad_v, grad_v_tail = _visit_queries(
            grad_k, grad_k_tail, grad_v, grad_v_tail, k, k_tail, v, v_tail, q_ptr, q_row, grad_out_ptr,
            num_heads * D, lse_ptr + statistics, delta_ptr + statistics, row, num_queries,
            key, shift, latest, slope,
            SCALE, UNIT, D, HEAD, TAIL, STEP, ALIBI, PACKED, BLOCK_M, BLOCK_N, DEPTH, False,
        )  # fmt: skip
    base = (batch * num_keys * num_heads + head) * D
    grad_k, grad_k_tail = grad_k * (SCALE / UNIT), grad_k_tail * (SCALE / UNIT)
    store_pair(grad_k_ptr + base, key, num_heads * D, num_keys, grad_k, grad_k_tail, TAIL, D)
    store_pair(grad_v_ptr + base, key, num_heads * D, num_keys, grad_v, grad_v_tail, TAIL, D)


@triton.jit
def _query_range(
    ends_ptr, key, num_queries, num_keys, shift, query_start,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """begin, full_begin, full_end and end (see `phases`) of the queries that see keys key..key + BLOCK_N.

    Document ends never decrease along a sequence: the first key has the earliest, the last key the latest.
    """
    begin = tl.maximum(key - shift, 0) // BLOCK_M * BLOCK_M
    full_begin = tl.cdiv(tl.maximum(key + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    end = num_queries
    full_end = num_queries
    if PACKED:
        last = tl.minimum(key + BLOCK_N, num_keys) - 1
        end = tl.minimum(num_queries, tl.load(ends_ptr + last) + 1 - query_start)
        full_end = tl.minimum(num_queries, tl.load(ends_ptr + key) + 1 - query_start)
    return begin, full_begin, tl.maximum(full_end, 0) // BLOCK_M * BLOCK_M, end


@triton.jit
def _end_needed(needed_ptr, key_end, num_queries):
    """One after the last query whose first needed key lies before `key_end`."""
    end = 0
    for first in range(0, num_queries, SCAN):
        rows = first + tl.arange(0, SCAN)
        needed = tl.load(needed_ptr + rows, mask=rows < num_queries, other=2**31 - 1)
        end = tl.maximum(end, tl.max(tl.where(needed < key_end, rows + 1, 0), 0))
    return end


@triton.jit
def _visit_queries(
    grad_k, grad_k_tail, grad_v, grad_v_tail, k, k_tail, v, v_tail, q_ptr, q_row, grad_out_ptr, grad_out_row,
    lse_ptr, delta_ptr, row, num_queries, key, shift, latest, slope,
    SCALE: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    STEP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """grad_k * sqrt(D) and grad_v with the part of BLOCK_M more queries; scores are [keys, queries].

    Rows beyond the last query are zeros in q and grad_out, so they add nothing.
    """
    rows = row + tl.arange(0, BLOCK_M)
    keys = key + tl.arange(0, BLOCK_N)
    diagonal = rows + shift
    lse = tl.load(lse_ptr + rows, mask=rows < num_queries, other=0.0) * UNIT
    delta = tl.load(delta_ptr + rows, mask=rows < num_queries, other=0.0)
    q, q_tail = operand(q_ptr, row, q_row, num_queries, BLOCK_M, HEAD, TAIL, D, STEP, DEPTH, MASKED)
    scores = products(k, k_tail, q, q_tail, D, TAIL, DEPTH) * SCALE
    level = lse
    if MASKED:
        if ALIBI:
            scores += bias(keys[:, None], diagonal[None, :], slope)
        seen = keys[:, None] <= diagonal[None, :]
        if PACKED:
            seen = seen & (rows[None, :] <= latest[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    elif ALIBI:
        last = key + BLOCK_N - 1
        scores += bias(keys, last, slope)[:, None]
        level = lse - bias(last, diagonal, slope)
    probs = power(scores - level[None, :], UNIT)
    grad_out, grad_out_tail = load_pair(
        grad_out_ptr, row, grad_out_row, num_queries, BLOCK_M, HEAD, TAIL, D, 1, MASKED
    )
    grad_v, grad_v_tail = add_product(
        grad_v, grad_v_tail, probs.to(grad_out.dtype), grad_out, grad_out_tail, TAIL
    )
    if DEPTH > 0:
        grad_out, grad_out_tail = operand(
            grad_out_ptr, row, grad_out_row, num_queries, BLOCK_M, HEAD, TAIL, D, 1, DEPTH, MASKED
        )
    grad_probs = products(v, v_tail, grad_out, grad_out_tail, D, TAIL, DEPTH)
    if DEPTH > 0:
        q, q_tail = load_pair(q_ptr, row, q_row, num_queries, BLOCK_M, HEAD, TAIL, D, STEP, MASKED)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(q.dtype)
    grad_k, grad_k_tail = add_product(grad_k, grad_k_tail, grad_scores, q, q_tail, TAIL)
    return grad_k, grad_k_tail, grad_v, grad_v_tail
