"""Attention with stored probabilities: the reference's results, fp16 range, what is kept, Ulysses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.attention import causal_attention as reference
from megatron_b2.ops.cuda.attention import causal_attention
from megatron_b2.ops.cuda.context_attention import context_attention
from megatron_b2.parallel.context_parallel import ContextParallel
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.kernels import cpu_shim
from megatron_b2.testing.kernels.cpu_shim import Shim, kernels_on_cpu

needs_shim = pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documents_of(batch: int, length: int, seed: int) -> Documents | None:
    generator = torch.Generator().manual_seed(seed)
    return Documents.of((torch.rand(batch, length, generator=generator) < 0.2).int().cumsum(1))


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


@needs_shim
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(1, 9),
    cached=st.integers(0, 30),
    head_dim=st.integers(1, 12),
    alibi=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(
    batch: int,
    key_heads: int,
    group: int,
    queries: int,
    cached: int,
    head_dim: int,
    alibi: bool,
    packed: bool,
    seed: int,
) -> None:
    """Output and gradients; inputs are views of the fused projection where the shapes allow it."""
    heads, keys = key_heads * group, queries + cached
    fused = normal(batch, keys, heads + 2 * key_heads, head_dim, seed=seed)
    q, k, v = fused.split([heads, key_heads, key_heads], dim=2)
    leaves = [q[:, cached:].requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    slopes = alibi_slopes(heads) if alibi else None
    documents = documents_of(batch, keys, seed) if packed else None
    upstream = normal(batch, queries, heads, head_dim, seed=seed + 100)
    results = []
    with kernels_on_cpu():
        for attention in (causal_attention, reference):
            out = attention(*leaves, alibi_slopes=slopes, documents=documents)
            assert out.shape == upstream.shape
            results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    assert_same(*results)


def test_long_heads_stay_inside_the_range_of_fp16(shim: Shim) -> None:
    """q k^T is 73,728, more than fp16 holds; the probabilities are still exact."""
    q = torch.full((1, 3, 1, 128), 24.0, dtype=torch.float16, requires_grad=True)
    v = normal(1, 3, 1, 128, seed=0).half()
    out = causal_attention(q, q.detach(), v)
    expected = v.float().cumsum(1) / torch.tensor([1, 2, 3]).view(1, 3, 1, 1)
    torch.testing.assert_close(out.float(), expected, atol=1e-3, rtol=1e-3)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_one_matrix_of_probabilities_is_kept(shim: Shim) -> None:
    batch, length, heads = 2, 40, 3
    q, k, v = (normal(batch, length, heads, 8, seed=seed).requires_grad_() for seed in range(3))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = causal_attention(q, k, v, alibi_slopes=alibi_slopes(heads))
    out.sum().backward()
    large = [size for size in kept.values() if size >= batch * heads * length * length]
    assert large == [batch * heads * length * length * 4]


def shard_results(qkv: Tensor, upstream: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
    """Output and gradient of this rank's part of the sequence, whose heads Ulysses exchanges."""
    context = ContextParallel(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "ulysses")
    local = context.shard(qkv).clone().requires_grad_()
    q, k, v = local.unbind(2)
    slopes = alibi_slopes(qkv.shape[3])
    with kernels_on_cpu():
        out = context_attention(q, k, v, context=context, alibi_slopes=slopes, documents=documents)
        (grad,) = torch.autograd.grad(out, local, context.shard(upstream))
    return out.detach(), grad


@pytest.mark.parametrize("packed", [False, True])
def test_ulysses_equals_one_process(shim: Shim, packed: bool) -> None:
    batch, length, heads = 2, 24, 6
    qkv, upstream = normal(batch, length, 3, heads, 8, seed=0), normal(batch, length, heads, 8, seed=1)
    documents = documents_of(batch, length, 2) if packed else None
    whole = qkv.clone().requires_grad_()
    out = reference(*whole.unbind(2), alibi_slopes=alibi_slopes(heads), documents=documents)
    expected = (out.detach(), *torch.autograd.grad(out, whole, upstream))
    parts = run_ranks(2, shard_results, qkv, upstream, documents)
    assert_same((torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)), expected)


def test_a_sequence_that_is_not_split_needs_no_group(shim: Shim) -> None:
    q, k, v = (normal(1, 9, 2, 8, seed=seed) for seed in range(3))
    alone = context_attention(q, k, v, context=ContextParallel(), alibi_slopes=None, documents=None)
    assert torch.equal(alone, causal_attention(q, k, v))


def test_heads_that_do_not_divide_and_the_ring_are_refused(shim: Shim) -> None:
    q, k = normal(1, 4, 3, 8, seed=0), normal(1, 4, 2, 8, seed=1)
    with pytest.raises(AssertionError, match="3 query heads do not divide by 2 key heads"):
        causal_attention(q, k, k)
    ring = ContextParallel(method="ring")
    with pytest.raises(AssertionError, match="ring"):
        context_attention(k, k, k, context=ring, alibi_slopes=None, documents=None)
