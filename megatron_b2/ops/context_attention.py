"""Causal self-attention over a sequence whose contiguous shards lie on the context-parallel ranks.

Ulysses: each rank gets the whole sequence for its share of the heads, attends as one process would, and gives
the result back. The ring: each rank keeps its queries and all heads, and the keys and values of earlier ranks
come to it one shard at a time; what an `AttentionKernel` makes of each is merged in fp32 by the log-sum-exps
(Milakov and Gimelshein 2018).

Communication of one call, N = B S/n H D elements, n ranks:

| method  | forward                            | backward                                                  |
|---------|------------------------------------|-----------------------------------------------------------|
| ulysses | 2 all-to-all: 3N (q, k, v), N (out) | 2 all-to-all: N, 3N                                       |
| ring    | each shard's k, v (2N) goes to the | the same, its fp32 gradient (2N) one step behind, and one |
|         | n - 1 - r ranks after its owner r  | message home to the owner                                 |

The ring does no collective. It skips shards that causality or document starts hide, messages included, and
posts a step's messages before its work. Rank n - 1 has n shards to work on and rank 0 one: contiguous shards
keep the sequence in order for every other part of the model and cost up to twice the time of balanced ones.

Shapes: B batch, S whole sequence, n ranks, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_b2.ops.attention import (
    AttentionKernel,
    Documents,
    Pattern,
    Rows,
    TorchTiles,
    attend,
    causal_attention,
)
from megatron_b2.parallel.context_parallel import ContextParallel, Messages, Ring, exchange


class _Merged:
    """Attention over keys that come in parts; fp32, in the order of the calls.

    The first part must let every query see a key.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out = out
        """[B, H, Q, D]."""
        self.lse = lse
        """[B, H, Q, 1]."""

    def add(self, out: Tensor, lse: Tensor) -> None:
        """One more part (`out` is overwritten); it counts nothing for queries whose log-sum-exp is -inf."""
        total = torch.logaddexp(self.lse, lse)
        self.out.mul_((self.lse - total).exp_()).add_(out.mul_((lse - total).exp_()))
        self.lse = total


class _RingAttention(torch.autograd.Function):
    """q, k, v are this rank's [B, H, S/n, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        context: ContextParallel,
        kernel: AttentionKernel,
    ) -> Tensor:
        assert context.group is not None
        length, rank = q.shape[2], context.rank
        ring = _ring(context, pattern.documents, length)
        merged: _Merged | None = None
        own = kv = torch.stack([k, v])
        for step in range(ring.num_steps(rank)):
            messages = Messages(context, "attention ring, forward")
            messages.send(kv, ring.keys_to(rank, step))
            incoming = messages.receive(kv, ring.keys_from(rank, step))
            messages.post()
            part = kernel.forward(
                q,
                kv[0],
                kv[1],
                pattern,
                query_start=rank * length,
                key_start=(rank - step) * length,
                dtype=torch.float32,
            )
            if merged is None:
                merged = _Merged(*part)
            else:
                merged.add(*part)
            messages.wait()
            kv = own if incoming is None else incoming
        assert merged is not None
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, own, out, merged.lse)
        ctx.pattern, ctx.context, ctx.ring, ctx.kernel = pattern, context, ring, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, own, out, lse = ctx.saved_tensors
        pattern, ring, rank, length = ctx.pattern, ctx.ring, ctx.context.rank, q.shape[2]
        rows = Rows(q, grad_out, lse, ctx.kernel.delta(out, grad_out))
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        kv, grad_kv, grad_own = own, None, None
        for step in range(ring.num_backward_steps(rank)):
            messages = Messages(ctx.context, "attention ring, backward")
            messages.send(kv, ring.keys_to(rank, step))
            incoming = messages.receive(own, ring.keys_from(rank, step))
            messages.send(grad_kv, ring.gradient_to(rank, step))
            earlier = messages.receive(own, ring.gradient_from(rank, step), dtype=torch.float32)
            home = messages.receive(own, ring.home_from(rank, step), dtype=torch.float32)
            messages.post()
            part = None
            if ring.sees(rank, rank - step):
                grad_q_part, *grad_kv_part = ctx.kernel.backward(
                    rows,
                    *kv,
                    pattern,
                    query_start=rank * length,
                    key_start=(rank - step) * length,
                    dtype=torch.float32,
                )
                grad_q.add_(grad_q_part)
                part = torch.stack(grad_kv_part)
            messages.wait()
            grad_kv = part if part is None or earlier is None else earlier.add_(part)
            if home is not None or (step == 0 and ring.last(rank) == rank):
                grad_own = home if home is not None else grad_kv
            kv = own if incoming is None else incoming
        assert grad_own is not None
        grad_k, grad_v = grad_own.to(own.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None


def _ring(context: ContextParallel, documents: Documents | None, length: int) -> Ring:
    """Timetable for shards of `length` positions."""
    if documents is None:
        return Ring((0,) * context.size)
    return Ring(tuple(documents.earliest[rank * length] // length for rank in range(context.size)))


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context: ContextParallel,
    alibi_slopes: Tensor | None,
    documents: Documents | None,
    attention: Callable[..., Tensor],
) -> Tensor:
    """`context_attention` by Ulysses; `attention`, over a whole sequence, is called as `causal_attention`."""
    if context.group is None:
        return attention(q, k, v, alibi_slopes=alibi_slopes, documents=documents)
    size, (_, length, num_heads, _) = context.size, q.shape
    assert num_heads % size == 0, f"{num_heads} heads do not divide by context {size}"
    heads = num_heads // size
    # [n, 3, B, H/n, S/n, D]: the piece of a rank is its heads; comes back as the piece of a rank's positions.
    by_heads = torch.stack([x.unflatten(2, (size, heads)).permute(2, 0, 3, 1, 4) for x in (q, k, v)], dim=1)
    by_positions = exchange(by_heads, context.group)
    whole = by_positions.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).transpose(2, 3)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes[context.rank * heads : (context.rank + 1) * heads]
    out = attention(whole[0], whole[1], whole[2], alibi_slopes=alibi_slopes, documents=documents)
    pieces = exchange(out.unflatten(1, (size, length)).movedim(1, 0), context.group)
    return pieces.permute(1, 2, 0, 3, 4).flatten(2, 3)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context: ContextParallel,
    alibi_slopes: Tensor | None,
    documents: Documents | None,
    kernel: AttentionKernel | None = None,
) -> Tensor:
    """`causal_attention` over a sequence of which this rank holds the positions rank S/n.. of n equal shards.

    Every rank of the group must call it, in the forward and in the backward pass.

    Args:
        q: [B, S/n, H, D]; the heads are those of this tensor-parallel rank.
        k: [B, S/n, H, D].
        v: [B, S/n, H, D].
        context: the ranks and the method; ulysses needs H to divide by n.
        alibi_slopes: fp32 [H], the slopes of exactly these heads, or none.
        documents: packing of the whole sequence S, the same on every rank, or none for one document a row.
        kernel: the implementation, or none for the torch reference.

    Returns:
        [B, S/n, H, D] in the dtype of q.
    """
    assert documents is None or documents.starts.shape[1] == q.shape[1] * context.size, (
        f"documents describe {documents.starts.shape[1]} positions, "
        f"{context.size} shards of {q.shape[1]} make {q.shape[1] * context.size}"
    )
    if context.group is None or context.method == "ulysses":
        attention = causal_attention if kernel is None else partial(attend, kernel=kernel)
        return ulysses(
            q,
            k,
            v,
            context=context,
            alibi_slopes=alibi_slopes,
            documents=documents,
            attention=attention,
        )
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    pattern = Pattern(alibi_slopes, documents)
    out: Tensor = _RingAttention.apply(*heads_first, pattern, context, kernel or TorchTiles())
    return out.transpose(1, 2)
