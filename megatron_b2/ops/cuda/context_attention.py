"""Attention over context-parallel ranks with stored probabilities, by Ulysses alone.

The ring needs the log-sum-exp of each part, which the softmax does not give (config/layout_checks.py).
"""

from __future__ import annotations

from torch import Tensor

from megatron_b2.ops.attention import Documents
from megatron_b2.ops.context_attention import ulysses
from megatron_b2.ops.cuda.attention import causal_attention
from megatron_b2.parallel.context_parallel import ContextParallel


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    context: ContextParallel,
    alibi_slopes: Tensor | None,
    documents: Documents | None,
) -> Tensor:
    """See ops/context_attention.py."""
    assert context.method == "ulysses", context.method
    return ulysses(
        q,
        k,
        v,
        context=context,
        alibi_slopes=alibi_slopes,
        documents=documents,
        attention=causal_attention,
    )
