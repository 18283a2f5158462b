"""Causal attention that stores its probabilities: products by torch, ALiBi softmax in CUDA C++.

The unfused path, for comparison and where a fused kernel cannot be used: probabilities [B, H, Q, K] in the
dtype of the inputs live from forward to backward, and scores of the same size beside them for a moment. Any
head width and any length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_b2.ops.attention import Documents
from megatron_b2.ops.cuda.alibi_softmax import alibi_softmax


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alibi_slopes: Tensor | None = None, documents: Documents | None = None
) -> Tensor:
    """`megatron_b2.ops.attention.causal_attention`, unfused; see there for shapes and meaning.

    Scores are rounded to the dtype of the inputs. They are of queries times the power of two next to
    1 / sqrt(D), which is exact and keeps those of long heads inside the range of fp16.
    """
    (_, num_queries, heads, head_dim), (num_keys, key_heads) = q.shape, k.shape[1:3]
    assert heads % key_heads == 0, f"{heads} query heads do not divide by {key_heads} key heads"
    exact = 2.0 ** -round(0.5 * math.log2(head_dim))
    q, k, v = (x.transpose(1, 2) for x in (q * exact, k, v))
    # The query heads of a key head are rows of one product: [B, H/G, G Q, D] times [B, H/G, D, K].
    rows = q.unflatten(1, (key_heads, -1)).flatten(2, 3)
    scores = torch.matmul(rows, k.transpose(2, 3)).view(-1, heads, num_queries, num_keys)
    scale = 1.0 / (exact * math.sqrt(head_dim))
    probs = alibi_softmax(scores, scale=scale, alibi_slopes=alibi_slopes, documents=documents)
    out = torch.matmul(probs.view(-1, key_heads, rows.shape[2], num_keys), v)
    return out.view(-1, heads, num_queries, head_dim).transpose(1, 2)
