"""The head of CUDA C++: float64 autograd of its formula, invariants, ranks, ties, scales, memory."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.errors import InputError
from megatron_b2.ops import head_loss as reference
from megatron_b2.ops.cuda import extension, head_loss
from megatron_b2.ops.cuda.head_loss import chunk_rows, norm_head_loss
from megatron_b2.parallel.tensor_parallel import TensorParallel
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.kernels import cpu_shim
from megatron_b2.testing.kernels import head_loss as kit
from megatron_b2.testing.kernels.cpu_shim import Shim, kernels_on_cpu
from tests.ops.triton.test_head_loss import Collectives, inputs, run
from tests.ops.triton.test_head_sizes import LARGE, Allocations, size_of

needs_shim = pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())
SCALES = {"ce_scale": 0.3, "z_scale": 0.1}
SMALL_CHUNKS = {"MIN_CHUNK": 16, "MAX_CHUNK": 16, "CHUNK_MULTIPLE": 8}


@needs_shim
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 150),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
    z_scale=st.sampled_from([0.0, 0.07]),
)
def test_equals_float64_autograd(tokens: int, vocab: int, width: int, seed: int, z_scale: float) -> None:
    hidden, weight, labels = inputs(tokens, vocab, width, seed)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = kit.formula(*exact, labels, ce_scale=0.3, z_scale=z_scale).total
    expected.backward()
    with kernels_on_cpu(), patch.multiple(head_loss, **SMALL_CHUNKS):
        total, *grads = run(norm_head_loss, hidden, weight, labels, ce_scale=0.3, z_scale=z_scale)
    torch.testing.assert_close(total.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    # A short row amplifies rounding by 1 / its norm.
    scale = max(1.0, float((1 / weight.norm(dim=1)).max()))
    for ours, leaf in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), leaf.grad, atol=2e-5 * scale, rtol=1e-4)
    size = grads[1].norm(dim=1) * weight.norm(dim=1)
    assert ((grads[1] * weight).sum(dim=1).abs() <= 1e-5 * size + 1e-5 / weight.norm(dim=1)).all()


def test_equals_the_reference_in_its_three_sums(shim: Shim) -> None:
    hidden, weight, labels = inputs(33, 520, 48)
    for ours, expected in zip(
        norm_head_loss(hidden, weight, labels, **SCALES),
        reference.norm_head_loss(hidden, weight, labels, **SCALES),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_repeats_bit_by_bit_in_any_order_of_threads_and_layout(shim: Shim, dtype: torch.dtype) -> None:
    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in inputs(19, 300, 24))
    first = run(norm_head_loss, hidden, weight, labels, **SCALES)
    with shim.order(backwards=True):
        again = run(norm_head_loss, hidden, weight, labels, **SCALES)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    columns_first = [x.t().contiguous().t() for x in (hidden, weight)]
    strided = torch.stack([labels, labels], dim=1)[:, 0]
    unit = torch.finfo(dtype).eps
    for ours, expected in zip(run(norm_head_loss, *columns_first, strided, **SCALES), first, strict=True):
        torch.testing.assert_close(ours, expected, rtol=8 * unit, atol=float(8 * unit * expected.abs().max()))


def test_chunks_of_any_size_give_the_same_result(shim: Shim) -> None:
    hidden, weight, labels = inputs(37, 300, 24)
    whole = run(norm_head_loss, hidden, weight, labels, **SCALES)
    for most, expected_rows in ((8, 8), (16, 16), (32, 24)):
        sizes = {"MIN_CHUNK": most, "MAX_CHUNK": most, "CHUNK_MULTIPLE": 8}
        with patch.multiple(head_loss, **sizes):
            assert chunk_rows(37, 38) == expected_rows
            parts = run(norm_head_loss, hidden, weight, labels, **SCALES)
        for ours, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_chunks_of_the_published_models() -> None:
    """A part of 125,696 rows, whole words for every access; fewer rows with more tokens, to a limit."""
    assert chunk_rows(4_096, 15_712) == 3_968
    assert chunk_rows(8_192, 15_712) == 2_048
    assert chunk_rows(10**6, 15_712) == 1_024
    assert chunk_rows(1, 15_712) == 3_968
    assert chunk_rows(4_096, 5) == 128


def test_graph_is_kept_and_only_wanted_gradients_are_made(shim: Shim) -> None:
    hidden, weight, labels = inputs(19, 70, 24)
    both = run(norm_head_loss, hidden, weight, labels, **SCALES)
    for wanted in (0, 1):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((hidden, weight))]
        loss = norm_head_loss(*leaves, labels, **SCALES)
        assert (loss.total.requires_grad, loss.ce.requires_grad, loss.max_z.requires_grad) == (
            True,
            False,
            False,
        )
        first = torch.autograd.grad(loss.total, leaves[wanted], retain_graph=True)[0]
        again = torch.autograd.grad(loss.total, leaves[wanted])[0]
        assert torch.equal(first, again)
        assert torch.equal(first, both[1 + wanted])
    with torch.no_grad():
        assert torch.equal(norm_head_loss(hidden, weight, labels, **SCALES).total, both[0])


def test_row_below_the_norm_floor_and_every_kind_of_scale(shim: Shim) -> None:
    hidden, weight, labels = inputs(19, 70, 24)
    # There n_v = 1e12, and a gradient times 1e12 says little in fp32: of this row only G_v is asked, which is
    # not projected, as the clamp is flat.
    weight[3] *= 1e-13
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    kit.formula(*exact, labels, **SCALES).total.backward()
    total, grad_hidden, grad_weight = run(norm_head_loss, hidden, weight, labels, **SCALES)
    torch.testing.assert_close(grad_hidden.double(), exact[0].grad, atol=1e-6, rtol=1e-5)
    assert exact[1].grad is not None
    assert exact[1].grad[3].abs().max() > 1e9
    torch.testing.assert_close(grad_weight[3].double(), exact[1].grad[3], atol=0, rtol=1e-4)
    scales = {"ce_scale": torch.tensor(0.3), "z_scale": torch.tensor(0.1, dtype=torch.float64)}
    other = run(norm_head_loss, hidden, weight, labels, upstream=4.0, **scales)
    assert torch.equal(other[0], total)
    for ours, expected in zip(other[1:], (grad_hidden, grad_weight), strict=True):
        torch.testing.assert_close(ours, 4 * expected, atol=1e-5, rtol=1e-5)


def test_scales_of_a_large_batch_do_not_underflow_in_half_precision(shim: Shim) -> None:
    """1 / tokens of a global batch times a probability is zero in fp16; the gradient must not be."""
    hidden, weight, labels = (x.half() if x.is_floating_point() else x for x in inputs(19, 70, 24))
    plain = run(norm_head_loss, hidden, weight, labels, ce_scale=0.5, z_scale=0.125)
    tiny = {"ce_scale": 0.5 * 2.0**-30, "z_scale": 0.125 * 2.0**-30}
    scaled = run(norm_head_loss, hidden, weight, labels, upstream=2.0**30, **tiny)
    assert all(torch.equal(a, b) for a, b in zip(scaled[1:], plain[1:], strict=True))
    nothing = run(norm_head_loss, hidden, weight, labels, ce_scale=0.0, z_scale=0.0)
    assert [float(x.abs().sum()) for x in nothing] == [0, 0, 0]


def test_wrong_dtypes_are_named(shim: Shim) -> None:
    hidden, weight, labels = inputs(3, 8, 4)
    with pytest.raises(
        InputError, match=r"one dtype, fp32, fp16 or bf16; got torch.float16 and torch.float32"
    ):
        norm_head_loss(hidden.half(), weight, labels, **SCALES)
    with pytest.raises(InputError, match=r"got torch.float64"):
        norm_head_loss(hidden.double(), weight.double(), labels, **SCALES)


# Ranks


def this_rank() -> TensorParallel:
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if size > 1 else None
    return TensorParallel(size=size, rank=rank, group=group, sequence_parallel=True)


def share(tokens: int, vocab: int, width: int) -> tuple[Any, ...]:
    """One rank of all: (bits of losses and statistics, gradients, collectives of forward and backward)."""
    tensor = this_rank()
    hidden, weight, _ = inputs(tokens, vocab, width)
    labels = torch.arange(tokens) * (vocab // tokens) % vocab  # on every rank
    labels[7] = -100
    local_hidden = hidden.unsqueeze(0).chunk(tensor.size, dim=1)[tensor.rank].contiguous().requires_grad_()
    local_weight = weight.chunk(tensor.size)[tensor.rank].contiguous().requires_grad_()
    with kernels_on_cpu(), patch.multiple(head_loss, MIN_CHUNK=48, MAX_CHUNK=48, CHUNK_MULTIPLE=8):
        whole = tensor.enter(local_hidden)[0]
        with Collectives() as forward:
            loss = norm_head_loss(whole, local_weight, labels, tensor=tensor, **SCALES)
        with Collectives() as backward:
            loss.total.backward()
        head = head_loss._Head.of(whole.detach(), local_weight.detach(), labels, tensor)
        bits = [*(x.detach() for x in loss), head_loss._whole_statistics(head).table]
    return bits, local_hidden.grad, local_weight.grad, forward.calls, backward.calls


def test_one_two_and_four_ranks_have_the_same_loss_bits_and_gradients(shim: Shim) -> None:
    """800 rows: parts of 100, each of chunks of 40 and 40 and 20."""
    tokens, vocab, width = 32, 800, 16
    (alone,) = run_ranks(1, share, tokens, vocab, width)
    assert alone[3] == alone[4] == []
    for ranks in (2, 4):
        parts = run_ranks(ranks, share, tokens, vocab, width)
        for bits, _, _, forward, backward in parts:
            assert all(torch.equal(ours, one) for ours, one in zip(bits, alone[0], strict=True))
            assert forward == [("_allgather_base_", 4 * tokens * ranks)]
            assert [name for name, _ in backward] == ["_reduce_scatter_base_"]
        torch.testing.assert_close(torch.cat([p[1] for p in parts], dim=1), alone[1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(torch.cat([p[2] for p in parts]), alone[2], atol=1e-6, rtol=1e-5)


def touched_rows() -> tuple[float, list[int]]:
    """Max-z of one token whose largest logit rows 1, 2, 5 and 6 of eight share, and rows with a gradient."""
    tensor = this_rank()
    rows = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 2.0], [-1.0, 0.0]]).repeat(2, 1)
    shard = rows.chunk(tensor.size)[tensor.rank]
    with kernels_on_cpu():
        total, _, grad = run(
            norm_head_loss, torch.tensor([[1.0, 0.0]]), shard, torch.tensor([-100]),
            ce_scale=1.0, z_scale=1.0, tensor=tensor,
        )  # fmt: skip
    first = tensor.rank * len(shard)
    return float(total), [first + i for i in range(len(shard)) if grad[i].abs().sum() > 0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_tie_goes_to_the_lowest_id_over_all_ranks(shim: Shim, ranks: int) -> None:
    results = run_ranks(ranks, touched_rows)
    assert [total for total, _ in results] == pytest.approx([0.5] * ranks)
    assert [row for _, rows in results for row in rows] == [1]


# Memory


@pytest.mark.parametrize("ranks", [1, 8])
def test_no_temporary_is_larger_than_100_mb_and_nothing_waits_for_the_gpu(ranks: int) -> None:
    """On meta tensors, which have no values to wait for, and with launches that do nothing. The products are
    the real ones: torch checks their shapes and dtypes."""
    tokens, vocab, width = 4_096, 125_696 // ranks, 4_096
    hidden = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta").requires_grad_()
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device="meta").requires_grad_()
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    scale = torch.empty((), device="meta")
    tensor = TensorParallel(size=ranks, rank=ranks - 1)
    with (
        patch.object(extension, "launch", lambda *args: None),
        Allocations() as allocations,
    ):
        norm_head_loss(hidden, weight, labels, ce_scale=scale, z_scale=scale, tensor=tensor).total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    temporaries = allocations.temporaries(weight)
    assert 0 < max(map(size_of, temporaries)) <= LARGE
    assert max(shape.numel() for shape, _ in temporaries) <= tokens * width < tokens * vocab / 2
