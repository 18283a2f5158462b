"""Each operation against float64, closed forms or another implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from megatron_b2.ops import attention
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import Documents, causal_attention
from megatron_b2.ops.rms_norm import add_rms_norm, rms_norm
from megatron_b2.ops.rope import rope_split, rope_table
from megatron_b2.ops.swiglu import swiglu
from tests.ops.test_head_loss import LargestTensor


def test_slopes_of_40_heads_are_the_published_ones() -> None:
    slopes = alibi_slopes(40)
    expected = [2 ** (-0.25 * i) for i in range(1, 33)] + [2 ** (-0.125 * j) for j in range(1, 16, 2)]
    assert slopes.tolist() == torch.tensor(expected).tolist()
    assert slopes[0].item() == pytest.approx(0.8408964152537145, abs=1e-7)
    assert slopes[32].item() == pytest.approx(0.9170040432046712, abs=1e-7)
    assert slopes.double().sum().item() == pytest.approx(9.587242791968238, abs=1e-6)


def test_rms_norm_equals_transformers_and_float64_autograd() -> None:
    x = torch.randn(3, 5, 48, requires_grad=True)
    norm = LlamaRMSNorm(48, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    weight = norm.weight.detach().clone().requires_grad_()
    ours = rms_norm(x, weight, eps=1e-6)
    torch.testing.assert_close(ours, norm(x), atol=1e-6, rtol=1e-5)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.rms_norm(exact_x, (48,), exact_weight, eps=1e-6)
    probe = torch.randn_like(ours)
    (ours * probe).sum().backward()
    (expected * probe.double()).sum().backward()
    for mine, exact in ((x, exact_x), (weight, exact_weight)):
        torch.testing.assert_close(mine.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_swiglu_equals_float64_autograd() -> None:
    gate_up = torch.randn(4, 6, 32, requires_grad=True)
    exact = gate_up.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    ours = swiglu(gate_up)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(gate_up.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_rope_equals_transformers_and_its_backward_is_the_inverse_rotation() -> None:
    qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 300, 4095]]).expand(2, 9)
    cos, sin = rope_table(positions, head_dim=16, base=10_000.0)
    ours = rope_split(qkv, cos, sin)
    full = [torch.cat([t, t], dim=-1) for t in (cos, sin)]
    theirs = apply_rotary_pos_emb(*(x.transpose(1, 2) for x in qkv.unbind(2)[:2]), *full)
    for mine, expected in zip(ours, theirs, strict=False):
        torch.testing.assert_close(mine, expected.transpose(1, 2), atol=1e-6, rtol=1e-6)
    assert torch.equal(ours[2], qkv[:, :, 2])
    weights = torch.randn(3, *ours[0].shape)
    torch.autograd.backward(ours, weights.unbind(0))
    back = rope_split(weights.movedim(0, 2), cos, -sin)
    torch.testing.assert_close(qkv.grad, torch.stack(back, dim=2), atol=1e-6, rtol=1e-6)


def test_add_rms_norm_is_the_norm_of_the_sum() -> None:
    x, residual, weight = (
        torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 48), (3, 5, 48), (48,))
    )
    ours = add_rms_norm(x, residual, weight, eps=1e-6)
    copies = [t.detach().clone().requires_grad_() for t in (x, residual, weight)]
    total = copies[0] + copies[1]
    expected = (rms_norm(total, copies[2], eps=1e-6), total)
    grads = [torch.randn_like(t) for t in ours]
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)
    torch.autograd.backward(ours, grads)
    torch.autograd.backward(expected, grads)
    for mine, copy in zip((x, residual, weight), copies, strict=True):
        torch.testing.assert_close(mine.grad, copy.grad, atol=1e-6, rtol=1e-6)


def test_gradients_of_the_references_by_finite_differences() -> None:
    """In float64, which the references keep."""
    x, residual, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 3, 6), (6,))
    )
    assert gradcheck(lambda x, w: rms_norm(x, w, eps=1e-6), (x, weight))
    assert gradcheck(lambda x, r, w: add_rms_norm(x, r, w, eps=1e-6), (x, residual, weight))
    assert gradcheck(swiglu, (x,))
    cos, sin = (t.double() for t in rope_table(torch.arange(3).unsqueeze(0), head_dim=4, base=10_000.0))
    qkv = torch.randn(2, 3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda qkv: rope_split(qkv, cos, sin), (qkv,))


def naive(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, segments: Tensor | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    offset = k.shape[1] - q.shape[1]
    rows = torch.arange(q.shape[1]).unsqueeze(1) + offset
    keys = torch.arange(k.shape[1]).unsqueeze(0)
    if slopes is not None:
        scores = scores + slopes.to(q.dtype).view(1, -1, 1, 1) * (keys - rows)
    hidden = (keys > rows).expand(q.shape[0], -1, -1)
    if segments is not None:
        hidden = hidden | (segments[:, offset:].unsqueeze(2) != segments.unsqueeze(1))
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden.unsqueeze(1), -math.inf).softmax(-1), v)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 5),
    block=st.sampled_from([4, 16, 128]),
    alibi=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_equals_float64(
    batch: int, length: int, heads: int, block: int, alibi: bool, packed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, heads, 8, generator=generator) for _ in range(3))
    slopes = alibi_slopes(heads) if alibi else None
    starts = torch.rand(batch, length, generator=generator) < 0.2
    segments = starts.int().cumsum(1) if packed else None
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    documents = None if segments is None else Documents.of(segments)
    old, attention.BLOCK = attention.BLOCK, block
    try:
        out = causal_attention(*ours, alibi_slopes=slopes, documents=documents)
        weight = torch.randn(out.shape, generator=generator)
        (out * weight).sum().backward()
    finally:
        attention.BLOCK = old
    expected = naive(*exact, slopes, segments)
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=5e-5, rtol=1e-4)


def test_attention_in_bf16_is_as_close_as_torch() -> None:
    q, k, v = (torch.randn(1, 200, 4, 32) for _ in range(3))
    slopes = alibi_slopes(4)
    exact = naive(*(x.bfloat16().double() for x in (q, k, v)), slopes, None)
    low = [x.bfloat16() for x in (q, k, v)]
    mine = (causal_attention(*low, alibi_slopes=slopes).double() - exact).abs().max()
    torchs = (naive(*low, slopes, None).double() - exact).abs().max()
    assert mine <= 2 * torchs


@pytest.mark.parametrize("length", [1024])
def test_alibi_bias_never_exists_whole(length: int) -> None:
    q, k, v = (torch.randn(1, length, 4, 8, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        causal_attention(q, k, v, alibi_slopes=alibi_slopes(4)).sum().backward()
    assert largest.elements <= 4 * attention.BLOCK * length < 4 * length * length / 4


def test_single_documents_need_no_mask() -> None:
    assert Documents.of(torch.zeros(2, 5, dtype=torch.int32)) is None
    documents = Documents.of(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]]))
    assert documents is not None
    assert documents.starts.tolist() == [[0, 0, 2, 2], [0, 1, 1, 3]]
    assert documents.earliest == (0, 0, 1, 2)
    assert documents.positions().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
