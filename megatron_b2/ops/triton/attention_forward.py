"""Causal flash attention, forward: one program makes the output of BLOCK_M queries of one head.

The softmax runs over blocks of BLOCK_N keys (Milakov and Gimelshein 2018, Dao 2023). Blocks that every query
of the tile sees whole need no mask; they come last, after those on the diagonal and at document starts.

ALiBi in a block without a mask (our choice): a score is fma(q k, scale, slope * (key - last key of block)),
one operation as without ALiBi; the rest of the bias, slope * (last key - query), is one number a row, added
to the row's maximum alone. Both parts are small where the probability is not, so nothing grows with the
position. The log-sum-exp that is saved is the true one, so parts over different keys can be merged.

Skipping (SKIP): after the masked blocks a row's sum is at least exp(its maximum so far): see `first_needed`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_b2.ops.triton.attention_common import (
    NO_SCORE,
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


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, starts_ptr, lengths_ptr, longest_keys_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    num_heads, num_queries, num_keys, query_start, key_start, length,
    SCALE: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, STEP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, H, B); q, k, v any strides, in STEPs, but 1 for the last; starts int32
    [B, length]; for SKIP lengths fp32 [B, H, Q] and longest_keys [B, H / GROUP, blocks of NORM_KEYS keys];
    out [B, Q, H, D]; lse fp32 [B, H, Q]. SCALE is UNIT / sqrt(D)."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # those with most keys begin first
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, shift = row + tl.arange(0, BLOCK_M), query_start - key_start
    diagonal = rows + shift
    k_ptr += (batch * k_batch + head // GROUP * k_head) * STEP
    v_ptr += (batch * v_batch + head // GROUP * v_head) * STEP
    q_ptr += (batch * q_batch + head * q_head) * STEP
    q, q_tail = operand(q_ptr, row, q_row, num_queries, BLOCK_M, HEAD, TAIL, D, STEP, DEPTH, True)
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
    top = tl.full((BLOCK_M,), NO_SCORE, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 1), tl.float32)
    for t in tl.range(num_masked, num_stages=1):
        key = masked_block(t, begin, num_before, full_end, BLOCK_N)
        top, total, acc, acc_tail = _visit(
            top, total, acc, acc_tail, q, q_tail, k_ptr, k_row, v_ptr, v_row, key, num_keys, diagonal,
            earliest, slope, SCALE, UNIT, D, HEAD, TAIL, STEP, ALIBI, PACKED, BLOCK_N, DEPTH, True,
        )  # fmt: skip
    if SKIP:
        longest_keys_ptr += (batch * num_heads + head) // GROUP * tl.cdiv(num_keys, NORM_KEYS)
        lowest = tl.min(tl.where(rows < num_queries, top, float("inf")), 0)
        lengths_ptr += (batch * num_heads + head) * num_queries
        longest = tl.max(tl.load(lengths_ptr + rows, mask=rows < num_queries, other=0.0), 0) * SCALE
        needed = first_needed(longest_keys_ptr, longest, lowest, row + shift, slope, full_end, UNIT)
        full_begin = tl.minimum(tl.maximum(full_begin, needed // BLOCK_N * BLOCK_N), full_end)
    for key in range(full_begin, full_end, BLOCK_N):
        top, total, acc, acc_tail = _visit(
            top, total, acc, acc_tail, q, q_tail, k_ptr, k_row, v_ptr, v_row, key, num_keys, diagonal,
            earliest, slope, SCALE, UNIT, D, HEAD, TAIL, STEP, ALIBI, PACKED, BLOCK_N, DEPTH, False,
        )  # fmt: skip
    # A query that sees none of the keys has total 0; any other has about 1 or more, by its largest score.
    is_seen = total > 0.0
    total = tl.where(is_seen, total, 1.0)
    lse = tl.where(is_seen, top / UNIT + tl.log(total), float("-inf"))
    tl.store(lse_ptr + (batch * num_heads + head) * num_queries + rows, lse, mask=rows < num_queries)
    out_ptr += (batch * num_queries * num_heads + head) * D
    acc, acc_tail = acc / total[:, None], acc_tail / total[:, None]
    store_pair(out_ptr, row, num_heads * D, num_queries, acc, acc_tail, TAIL, D)


@triton.jit
def _visit(
    top, total, acc, acc_tail, q, q_tail, k_ptr, k_row, v_ptr, v_row, key, num_keys, diagonal, earliest,
    slope,
    SCALE: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    STEP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running softmax (maximum, sum, weighted values) after BLOCK_N more keys."""
    keys = key + tl.arange(0, BLOCK_N)
    k, k_tail = operand(k_ptr, key, k_row, num_keys, BLOCK_N, HEAD, TAIL, D, STEP, DEPTH, MASKED)
    scores = products(q, q_tail, k, k_tail, D, TAIL, DEPTH)
    offset = tl.zeros_like(top)
    if ALIBI:
        scores = scores * SCALE
        if MASKED:
            scores += bias(keys[None, :], diagonal[:, None], slope)
        else:
            last = key + BLOCK_N - 1
            scores += bias(keys, last, slope)[None, :]
            offset = bias(last, diagonal, slope)
    if MASKED:
        seen = within(keys[None, :], diagonal[:, None], earliest[:, None], num_keys, PACKED)
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.max(scores, 1)
    if not ALIBI:
        highest = highest * SCALE
    new_top = tl.maximum(top, highest + offset)
    shrink = power(top - new_top, UNIT)
    level = (new_top - offset)[:, None]
    if ALIBI:
        probs = power(scores - level, UNIT)
    if not ALIBI:  # one operation
        probs = power(scores * SCALE - level, UNIT)
    total = total * shrink + tl.sum(probs, 1)
    acc = acc * shrink[:, None]
    acc_tail = acc_tail * shrink[:, None]
    v, v_tail = load_pair(v_ptr, key, v_row, num_keys, BLOCK_N, HEAD, TAIL, D, STEP, MASKED)
    acc, acc_tail = add_product(acc, acc_tail, probs.to(v.dtype), v, v_tail, TAIL)
    return new_top, total, acc, acc_tail
