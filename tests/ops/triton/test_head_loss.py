"""NormHead + cross-entropy + max-z in Triton: parity, invariants, ranks, ties, scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo  # TorchDispatchMode imports it: once here, not in each forked rank (2 s)
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_b2.errors import InputError
from megatron_b2.parallel.tensor_parallel import TensorParallel
from megatron_b2.testing.kernels import head_loss as kit
from megatron_b2.testing.kernels.interpreter import run_interpreted
from megatron_b2.testing.kernels.parity import Check, Deviation

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.name, marks=[] if check.quick else [pytest.mark.slow])
        for check in kit.checks()
    ],
)
def test_parity(check: Check) -> None:
    assert [one for one in run_interpreted(check.run, CPU) if not one.passed] == []


def on_tiles_of(arch: str, case: kit.Case) -> list[Deviation]:
    """What is too far off on the tiles of a GPU, with several chunks of the vocabulary and of tokens."""
    from unittest.mock import patch

    from megatron_b2.ops.triton import head_loss, target

    function = head_loss.norm_head_loss_kept if case.keeps else head_loss.norm_head_loss
    chunks = {"MAX_CHUNK": 128, "MIN_CHUNK": 128, "KEPT_BYTES": 4 * case.vocab * 128}
    with patch.object(target, "arch_of", lambda device: arch), patch.multiple(head_loss, **chunks):
        return [one for one in kit.compare(case, function, device=CPU) if not one.passed]


@pytest.mark.parametrize("keeps", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    ("arch", "case"),
    [("sm_80", kit.Case(140, 300, 40, torch.float32)), ("sm_90", kit.Case(150, 300, 72, torch.bfloat16))],
    ids=["fp32", "bf16"],
)
def test_tiles_of_a_gpu(arch: str, case: kit.Case, keeps: bool) -> None:
    assert run_interpreted(on_tiles_of, arch, replace(case, keeps=keeps)) == []


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_tiles_of_the_gpus_are_the_same_and_keep_the_bits_of_the_loss(itemsize: int) -> None:
    """So `test_tiles_of_a_gpu` runs all; the order of sums of both ways to the gradient is one."""
    from megatron_b2.ops.triton.tiles import head_tiles

    tiles = head_tiles("sm_80", itemsize)
    assert tiles == head_tiles("sm_90", itemsize)
    for plain, kept in (
        (tiles.statistics, tiles.kept_statistics),
        (tiles.weight_gradient, tiles.weight_gradient_sum),
    ):
        assert plain.depth == kept.depth
    assert tiles.statistics.columns == tiles.kept_statistics.columns


def inputs(tokens: int, vocab: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


def run(
    function: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: float = 1.0,
    **scales: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, gradient of hidden, gradient of weight)."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    total = function(hidden, weight, labels, **scales).total
    return (total.detach(), *torch.autograd.grad(total * upstream, (hidden, weight)))


# Invariants (KERNELS 3.3)


def check_invariants() -> None:
    from megatron_b2.ops.triton import head_loss

    @settings(max_examples=4, deadline=None, database=None)
    @given(
        tokens=st.integers(1, 40),
        vocab=st.integers(1, 150),
        width=st.integers(1, 40),
        seed=st.integers(0, 99),
        alpha=st.sampled_from((0.125, 7.0)),
        z_scale=st.sampled_from((0.0, 0.05)),
    )
    def holds(tokens: int, vocab: int, width: int, seed: int, alpha: float, z_scale: float) -> None:
        hidden, weight, labels = inputs(tokens, vocab, width, seed)
        scales = {"ce_scale": 0.3, "z_scale": z_scale}
        total, grad_hidden, grad_weight = run(head_loss.norm_head_loss, hidden, weight, labels, **scales)
        size = grad_weight.norm(dim=1) * weight.norm(dim=1)
        inner = (grad_weight * weight).sum(dim=1).abs()
        # Where a row's gradient is nearly parallel to the row, what is left after projection is rounding.
        assert (inner <= 1e-5 * size + 1e-5 / weight.norm(dim=1)).all()
        other = run(head_loss.norm_head_loss, hidden, alpha * weight, labels, **scales)
        torch.testing.assert_close(other[0], total, atol=1e-6, rtol=2e-6)
        torch.testing.assert_close(other[1], grad_hidden, atol=3e-6, rtol=1e-5)
        scale = float((1 / weight.norm(dim=1)).max())
        torch.testing.assert_close(alpha * other[2], grad_weight, atol=2e-5 * max(1.0, scale), rtol=1e-4)
        if z_scale == 0:
            logits = hidden @ F.normalize(weight).t()
            plain = 0.3 * F.cross_entropy(logits, labels, reduction="sum")
            torch.testing.assert_close(total, plain, atol=1e-5, rtol=1e-5)
        check_columns(head_loss, hidden, weight, labels)

    holds()


def check_columns(head_loss: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """delta sums to 2 z_scale M over the vocabulary; no logit is longer than its hidden state."""
    head = head_loss.Head.of(hidden, weight, labels, TensorParallel())
    statistics = head_loss.whole_statistics(head)
    top = statistics[0]
    assert (top.abs() <= hidden.norm(dim=1) * (1 + 1e-5) + 1e-6).all()
    buffer = torch.empty(len(hidden), len(weight))
    scales = torch.tensor([1.0, 0.25])
    delta = head_loss.logit_gradient(head, statistics, scales, slice(0, len(weight)), buffer)
    sums = (delta.values / head.inverse_norms).sum(dim=1)
    torch.testing.assert_close(sums, 0.25 * top, atol=1e-5, rtol=1e-5)


def test_invariants_hold() -> None:
    run_interpreted(check_invariants)


def check_rounded_sums(dtype: torch.dtype) -> None:
    """The projection takes away <w, D^T h> of D as rounded, or rows would drift along themselves."""
    from megatron_b2.ops.triton import head_loss

    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in inputs(40, 70, 24))
    head = head_loss.Head.of(hidden, weight, labels, TensorParallel())
    buffer = torch.empty(40, 70, dtype=dtype)
    statistics, scales = head_loss.whole_statistics(head), torch.tensor([1.0, 0.25])
    delta = head_loss.logit_gradient(head, statistics, scales, slice(0, 70), buffer)
    exact = (delta.values.double() * (hidden.double() @ weight.double().t())).sum(dim=0)
    torch.testing.assert_close(delta.sums.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_gradients_are_orthogonal_to_their_rows_before_the_last_rounding(dtype: torch.dtype) -> None:
    run_interpreted(check_rounded_sums, dtype)


# Ties, labels, rows without length, scales


def check_ties(keeps: bool) -> None:
    from megatron_b2.ops.triton import head_loss

    function = head_loss.norm_head_loss_kept if keeps else head_loss.norm_head_loss
    rank, size = dist.get_rank(), dist.get_world_size()
    tensor = TensorParallel(size=size, rank=rank, group=dist.group.WORLD if size > 1 else None)
    hidden = torch.tensor([[1.0, 0.0]])
    # Of eight rows 1, 2, 5 and 6 tie; each would turn towards hidden.
    rows = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 2.0], [-1.0, 0.0]]).repeat(2, 1)
    shard = rows.chunk(size)[rank]
    total, _, grad = run(
        function, hidden, shard, torch.tensor([-100]), ce_scale=1.0, z_scale=1.0, tensor=tensor
    )
    torch.testing.assert_close(total, torch.tensor(0.5))
    touched = [rank * len(shard) + i for i in range(len(shard)) if grad[i].abs().sum() > 0]
    assert touched == ([1] if rank == 0 else [])
    # In one segment of 200 rows, in one tile and in others.
    rows = torch.tensor([[0.0, 1.0]]).repeat(1600, 1)
    rows[[205, 220, 270, 390]] = 1.0
    head = head_loss.Head.of(hidden, rows.chunk(size)[rank], torch.tensor([3]), tensor)
    assert head_loss.whole_statistics(head)[2].tolist() == [205]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_tie_goes_to_the_lowest_id_over_all_ranks(ranks: int) -> None:
    run_interpreted(check_ties, ranks == 2, ranks=ranks)


def check_floor_and_scales() -> None:
    from megatron_b2.ops.triton import head_loss

    hidden, weight, labels = inputs(19, 70, 24)
    # At the floor n_v = 1e12, and a gradient times 1e12 says little in fp32: of these rows only G_v is asked.
    weight[3] = 0
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    kit.formula(*exact, labels, ce_scale=0.3, z_scale=0.1).total.backward()
    total, grad_hidden, grad_weight = run(
        head_loss.norm_head_loss, hidden, weight, labels, ce_scale=0.3, z_scale=0.1
    )
    torch.testing.assert_close(grad_hidden.double(), exact[0].grad, atol=1e-6, rtol=1e-5)
    assert exact[1].grad[3].abs().max() > 1e9
    torch.testing.assert_close(grad_weight[3].double(), exact[1].grad[3], atol=0, rtol=1e-4)
    # Scales as tensors, another upstream gradient, gradients from kept products: the same up to rounding.
    scales = {"ce_scale": torch.tensor(0.3), "z_scale": torch.tensor(0.1, dtype=torch.float64)}
    for function in (head_loss.norm_head_loss, head_loss.norm_head_loss_kept):
        other = run(function, hidden, weight, labels, upstream=4.0, **scales)
        assert torch.equal(other[0], total)
        torch.testing.assert_close(other[1], 4 * grad_hidden, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other[2], 4 * grad_weight, atol=1e-5, rtol=1e-4)


def test_rows_at_the_norm_floor_and_every_kind_of_scale() -> None:
    run_interpreted(check_floor_and_scales)


def check_tiny_scales() -> None:
    """1 / tokens of a global batch times a probability is zero in fp16; the gradient must not be."""
    from megatron_b2.ops.triton import head_loss

    hidden, weight, labels = (x.half() if x.is_floating_point() else x for x in inputs(19, 70, 24))
    plain = run(head_loss.norm_head_loss, hidden, weight, labels, ce_scale=0.5, z_scale=0.125)
    for function in (head_loss.norm_head_loss, head_loss.norm_head_loss_kept):
        scales = {"ce_scale": 0.5 * 2.0**-30, "z_scale": 0.125 * 2.0**-30}
        scaled = run(function, hidden, weight, labels, upstream=2.0**30, **scales)
        for ours, expected in zip(scaled[1:], plain[1:], strict=True):
            assert torch.equal(ours, expected)
    nothing = run(head_loss.norm_head_loss, hidden, weight, labels, ce_scale=0.0, z_scale=0.0)
    assert [float(x.abs().sum()) for x in nothing] == [0, 0, 0]


def test_scales_of_a_large_batch_do_not_underflow_in_half_precision() -> None:
    run_interpreted(check_tiny_scales)


def check_graph() -> None:
    from megatron_b2.ops.triton import head_loss

    hidden, weight, labels = inputs(19, 70, 24)
    labels = torch.stack([labels, labels], dim=1)[:, 0]  # not contiguous
    both = run(head_loss.norm_head_loss, hidden, weight, labels, ce_scale=0.3, z_scale=0.1)
    for function in (head_loss.norm_head_loss, head_loss.norm_head_loss_kept):
        for wanted in (0, 1):
            leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((hidden, weight))]
            # Columns first in memory: made contiguous inside.
            arguments = [leaves[0].t().contiguous().t(), leaves[1].t().contiguous().t()]
            loss = function(*arguments, labels, ce_scale=0.3, z_scale=0.1)
            assert not loss.ce.requires_grad
            assert not loss.max_z.requires_grad
            first = torch.autograd.grad(loss.total, leaves[wanted], retain_graph=True)[0]
            again = torch.autograd.grad(loss.total, leaves[wanted])[0]
            assert torch.equal(first, again)
            torch.testing.assert_close(first, both[1 + wanted], atol=1e-6, rtol=1e-5)
    assert torch.equal(
        both[1], run(head_loss.norm_head_loss, hidden, weight, labels, ce_scale=0.3, z_scale=0.1)[1]
    )
    with torch.no_grad():
        before = weight.clone()
        assert torch.equal(
            head_loss.norm_head_loss_kept(hidden, weight, labels, ce_scale=0.3, z_scale=0.1).total, both[0]
        )
        assert torch.equal(weight, before)
    with pytest.raises(
        InputError, match=r"one dtype, fp32, fp16 or bf16; got torch\.float16 and torch\.float32"
    ):
        head_loss.norm_head_loss(hidden.half(), weight, labels, ce_scale=1.0, z_scale=0.0)


def test_graph_is_kept_runs_repeat_and_only_wanted_gradients_are_made() -> None:
    run_interpreted(check_graph)


def check_no_tokens() -> None:
    from megatron_b2.ops.triton import head_loss

    hidden, weight, labels = inputs(0, 70, 24)
    for function in (head_loss.norm_head_loss, head_loss.norm_head_loss_kept):
        total, grad_hidden, grad_weight = run(function, hidden, weight, labels, ce_scale=0.3, z_scale=0.1)
        assert total == 0
        assert grad_hidden.shape == (0, 24)
        assert torch.equal(grad_weight, torch.zeros(70, 24))


def test_no_tokens_have_no_loss_and_no_gradient() -> None:
    run_interpreted(check_no_tokens)


def check_chunks() -> None:
    """Several vocabulary chunks, several token chunks: sums go on in fp32."""
    from unittest.mock import patch

    from megatron_b2.ops.triton import head_loss

    hidden, weight, labels = inputs(70, 300, 24)
    whole = run(head_loss.norm_head_loss, hidden, weight, labels, ce_scale=0.3, z_scale=0.1)
    constants = {"MAX_CHUNK": 128, "MIN_CHUNK": 128, "KEPT_BYTES": 1200 * 32, "CHUNK_MULTIPLE": 32}
    with patch.multiple(head_loss, **constants):
        assert head_loss.chunk_rows(70, 300, 4) == 128
        for function in (head_loss.norm_head_loss, head_loss.norm_head_loss_kept):
            parts = run(function, hidden, weight, labels, ce_scale=0.3, z_scale=0.1)
            assert torch.equal(parts[0], whole[0])
            torch.testing.assert_close(parts[1], whole[1], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(parts[2], whole[2], atol=1e-6, rtol=1e-5)


def test_chunks_of_the_vocabulary_and_of_tokens_change_nothing() -> None:
    run_interpreted(check_chunks)


# Ranks


class Collectives(TorchDispatchMode):
    """Names and elements of the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            output = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.calls.append((func.name().split("::")[1], output.numel()))
        return func(*args, **(kwargs or {}))


def share(tokens: int, vocab: int, width: int) -> tuple[Any, ...]:
    """One rank of all: (loss bits, gradients, collectives of forward and backward)."""
    from unittest.mock import patch

    from megatron_b2.ops.triton import head_loss

    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, _ = inputs(tokens, vocab, width)
    # On every rank, and in the padded columns of other ranks' last tiles.
    labels = torch.arange(tokens) * (vocab // tokens) % vocab
    labels[7] = -100
    tensor = TensorParallel(
        size=size, rank=rank, group=dist.group.WORLD if size > 1 else None, sequence_parallel=True
    )
    local_hidden = hidden.unsqueeze(0).chunk(size, dim=1)[rank].contiguous().requires_grad_()
    local_weight = weight.chunk(size)[rank].contiguous().requires_grad_()
    with patch.object(head_loss, "SPLIT_COLUMNS", 64):
        whole = tensor.enter(local_hidden)[0]
        with Collectives() as forward:
            loss = head_loss.norm_head_loss(
                whole, local_weight, labels, ce_scale=0.3, z_scale=0.01, tensor=tensor
            )
        with Collectives() as backward:
            loss.total.backward()
    return [x.detach() for x in loss], local_hidden.grad, local_weight.grad, forward.calls, backward.calls


def test_one_two_and_four_ranks_have_the_same_loss_bits_and_gradients() -> None:
    tokens, vocab, width = 32, 800, 24
    alone = run_interpreted(share, tokens, vocab, width)
    assert alone[3] == alone[4] == []
    for ranks in (2, 4):
        parts = run_interpreted(share, tokens, vocab, width, ranks=ranks)
        for losses, _, _, forward, backward in parts:
            assert all(torch.equal(ours, one) for ours, one in zip(losses, alone[0], strict=True))
            assert [(name, elements) for name, elements in forward] == [
                ("_allgather_base_", 4 * tokens * ranks)
            ]
            assert [name for name, _ in backward] == ["_reduce_scatter_base_"]
        grad_hidden = torch.cat([part[1] for part in parts], dim=1)
        grad_weight = torch.cat([part[2] for part in parts])
        torch.testing.assert_close(grad_hidden, alone[1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(grad_weight, alone[2], atol=1e-6, rtol=1e-5)


def boundaries(vocab: int, ranks: int) -> list[int]:
    """First vocabulary ids of all segments of all ranks with tiles of 128, by the rule of `segment_bounds`."""
    from megatron_b2.ops.triton.head_loss import segments

    rows = vocab // ranks
    parts, splits = segments(rows, ranks)
    found = []
    for rank in range(ranks):
        for part in range(parts):
            begin, end = part * rows // parts, (part + 1) * rows // parts
            tiles = -(-(end - begin) // 128)
            found += [rank * rows + begin + split * tiles // splits * 128 for split in range(splits)]
    return found


@pytest.mark.parametrize("vocab", [125_696, 125_696 // 8, 520, 64])
def test_segments_do_not_depend_on_the_number_of_ranks(vocab: int) -> None:
    alone = boundaries(vocab, 1)
    assert alone == sorted(alone)
    assert len(alone) & (len(alone) - 1) == 0
    for ranks in (2, 4, 8):
        assert boundaries(vocab, ranks) == alone
    assert len(boundaries(vocab, 16)) >= 16
