"""Attention over context-parallel ranks with the fused kernels."""

from __future__ import annotations

from torch import Tensor

from megatron_b2.ops import context_attention as over_ranks
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.triton.attention import TritonAttention
from megatron_b2.parallel.context_parallel import ContextParallel


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context: ContextParallel,
    alibi_slopes: Tensor | None,
    documents: Documents | None,
    skip_negligible: bool = False,
) -> Tensor:
    """See ops/context_attention.py; skip_negligible: see TritonAttention."""
    return over_ranks.context_attention(
        q,
        k,
        v,
        context=context,
        alibi_slopes=alibi_slopes,
        documents=documents,
        kernel=TritonAttention(skip_negligible=skip_negligible),
    )
