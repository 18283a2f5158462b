"""NormHead + cross-entropy + max-z against float64 autograd, and the invariants of the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_b2.ops import head_loss
from megatron_b2.ops.head_loss import norm_head_loss
from megatron_b2.ops.norm_head import norm_head_logits


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, ce_scale: float, z_scale: float) -> Tensor:
    logits = hidden @ F.normalize(weight, dim=1, eps=1e-12).t()
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return ce_scale * ce + z_scale * logits.max(dim=1).values.square().sum()


def inputs(tokens: int, vocab: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), vocab=st.integers(2, 60), width=st.integers(1, 16), seed=st.integers(0, 99))
def test_loss_and_gradients_equal_float64_autograd(tokens: int, vocab: int, width: int, seed: int) -> None:
    hidden, weight, labels = inputs(tokens, vocab, width, seed)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = dense(*exact, labels, 0.3, 0.07)
    expected.backward()
    ours = [x.requires_grad_() for x in (hidden, weight)]
    out = norm_head_loss(*ours, labels, ce_scale=0.3, z_scale=0.07)
    out.total.backward()
    torch.testing.assert_close(out.total.double(), expected, atol=1e-5, rtol=1e-5)
    # A short row amplifies rounding by 1 / its norm.
    scale = max(1.0, (1 / weight.detach().norm(dim=1)).max().item())
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=2e-5 * scale, rtol=1e-4)


def test_chunks_of_any_size_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(37, 50, 8, 0)
    results = []
    for elements in (50, 400, 10**6):
        monkeypatch.setattr(head_loss, "_CHUNK_ELEMENTS", elements)
        parts = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = norm_head_loss(*parts, labels, ce_scale=1.0, z_scale=0.1)
        out.total.backward()
        results.append([out.total.detach(), parts[0].grad, parts[1].grad])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-5)


def test_row_gradients_are_orthogonal_to_their_rows() -> None:
    hidden, weight, labels = inputs(64, 200, 32, 1)
    weight.requires_grad_()
    norm_head_loss(hidden, weight, labels, ce_scale=1.0, z_scale=0.01).total.backward()
    cosine = F.cosine_similarity(weight.grad, weight.detach(), dim=1)
    assert cosine.abs().max() < 1e-5


def test_scaling_the_rows_leaves_the_loss_and_divides_the_gradient() -> None:
    hidden, weight, labels = inputs(32, 100, 16, 2)
    grads, losses = [], []
    for alpha in (1.0, 7.0):
        scaled = (alpha * weight).requires_grad_()
        out = norm_head_loss(hidden, scaled, labels, ce_scale=1.0, z_scale=0.01)
        out.total.backward()
        losses.append(out.total.detach())
        grads.append(alpha * scaled.grad)
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_evaluation_leaves_the_weight_bitwise_unchanged() -> None:
    hidden, weight, labels = inputs(8, 20, 4, 3)
    before = weight.clone()
    with torch.no_grad():
        norm_head_loss(hidden, weight, labels, ce_scale=1.0, z_scale=0.01)
        norm_head_logits(hidden, weight)
    assert torch.equal(weight, before)


def test_max_z_counts_ignored_positions_and_ties_go_to_the_lowest_index() -> None:
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]], requires_grad=True)
    out = norm_head_loss(hidden, weight, torch.tensor([-100]), ce_scale=1.0, z_scale=1.0)
    assert out.ce == 0
    assert out.max_z == 1
    out.total.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0, 0.0]]))
    # Rows 1, 2 and 3 tie; moving only row 1 would change the maximum, and it is orthogonal to the row.
    assert torch.equal(weight.grad, torch.zeros(4, 2))
    probe = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    norm_head_loss(hidden.detach(), probe, torch.tensor([-100]), ce_scale=1.0, z_scale=1.0).total.backward()
    assert probe.grad[1].abs().sum() > 0
    assert probe.grad[2].abs().sum() == 0


def test_no_tokens_have_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = (x.requires_grad_(x.is_floating_point()) for x in inputs(0, 20, 4, 4))
    out = norm_head_loss(hidden, weight, labels, ce_scale=1.0, z_scale=0.01)
    assert [x.item() for x in out] == [0, 0, 0]
    out.total.backward()
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(20, 4))


def test_zero_rows_are_finite() -> None:
    hidden, weight, labels = inputs(8, 20, 4, 4)
    weight[3].zero_()
    weight.requires_grad_()
    norm_head_loss(hidden, weight, labels, ce_scale=1.0, z_scale=0.01).total.backward()
    assert torch.isfinite(weight.grad).all()


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_never_exist_whole() -> None:
    tokens, vocab, width = 4096, 20_000, 8
    hidden, weight, labels = inputs(tokens, vocab, width, 5)
    with LargestTensor() as largest:
        norm_head_loss(hidden.requires_grad_(), weight.requires_grad_(), labels, ce_scale=1.0, z_scale=0.1)
    assert largest.elements <= head_loss.chunk_tokens(vocab) * vocab < tokens * vocab / 4
