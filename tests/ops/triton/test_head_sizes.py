"""Memory of head and loss at the size of the 13B model, and strides and counts beyond int32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # TorchDispatchMode imports it: once here, not in each forked rank (2 s)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_b2.parallel.tensor_parallel import TensorParallel
from megatron_b2.testing.kernels.interpreter import run_interpreted
from tests.ops.triton.test_head_loss import inputs, run

LARGE = 100e6
"""Bytes of the largest temporary that the head may have."""


def without_launches(function: Callable[[], Any]) -> Any:
    """In a child: `function` with kernels that do nothing."""
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda self, *args, **kwargs: None
    return function()


class Allocations(TorchDispatchMode):
    """Shape and dtype of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.Size, torch.dtype]] = []

    def temporaries(self, weight: Tensor) -> list[tuple[torch.Size, torch.dtype]]:
        """All but one of the shape and dtype of the weight: its gradient, which must be among them."""
        beside = list(self.made)
        beside.remove((weight.shape, weight.dtype))
        return beside

    def large(self) -> Counter[tuple[torch.Size, torch.dtype]]:
        """Those of more than 100 MB."""
        return Counter(one for one in self.made if size_of(one) > LARGE)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = zip(out if isinstance(out, (tuple, list)) else (out,), func._schema.returns, strict=False)
        for tensor, value in made:
            if isinstance(tensor, Tensor) and value.alias_info is None:
                self.made.append((tensor.shape, tensor.dtype))
        return out


def size_of(made: tuple[torch.Size, torch.dtype]) -> int:
    """Bytes."""
    shape, dtype = made
    return shape.numel() * dtype.itemsize


def allocations_of(name: str, tokens: int, vocab: int, width: int) -> tuple[Tensor, Allocations]:
    """The weight and what forward and backward allocate."""
    from megatron_b2.ops.triton import head_loss

    meta = {"dtype": torch.bfloat16, "device": "meta"}
    hidden = torch.empty(tokens, width, **meta).requires_grad_()
    weight = torch.empty(vocab, width, **meta).requires_grad_()
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    # A tensor on meta has no value: anything that waits for one (.item()) raises.
    scale = torch.empty((), device="meta")
    with Allocations() as allocations:
        loss = getattr(head_loss, name)(hidden, weight, labels, ce_scale=scale, z_scale=scale)
        loss.total.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.bfloat16
    return weight, allocations


def test_no_temporary_is_larger_than_100_mb_and_nothing_waits_for_the_gpu() -> None:
    from megatron_b2.testing.fork import run_ranks

    tokens, vocab, width = 4096, 125_696, 4096

    def temporaries() -> list[tuple[torch.Size, torch.dtype]]:
        weight, allocations = allocations_of("norm_head_loss", tokens, vocab, width)
        return allocations.temporaries(weight)

    (made,) = run_ranks(1, without_launches, temporaries)
    assert 0 < max(map(size_of, made)) <= LARGE
    assert max(shape.numel() for shape, _ in made) <= tokens * width < tokens * vocab / 16


@pytest.mark.parametrize("ranks", [1, 8])
def test_kept_products_cost_the_sum_and_the_gradient_of_the_weight(ranks: int) -> None:
    """Its sum in fp32, its gradient from forward to backward, and that times the upstream gradient: nothing
    else is large."""
    from megatron_b2.testing.fork import run_ranks

    vocab, width = 125_696 // ranks, 4096

    def large() -> Counter[tuple[torch.Size, torch.dtype]]:
        return allocations_of("norm_head_loss_kept", 4096, vocab, width)[1].large()

    shape = torch.Size((vocab, width))
    assert run_ranks(1, without_launches, large) == [{(shape, torch.float32): 1, (shape, torch.bfloat16): 2}]


def strided(path: Path, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] whose third row begins behind 2^31 elements, in a file with holes."""
    stride = 2**30 + 64
    elements = (rows - 1) * stride + columns
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype).as_strided(
        (rows, columns), (stride, 1)
    )


def check_strides(folder: Path) -> None:
    from megatron_b2.ops.triton import head_loss, matmul

    hidden, weight, labels = (x.half() if x.is_floating_point() else x for x in inputs(3, 3, 16))
    far = [strided(folder / f"{i}", 3, 16, torch.float16).copy_(x) for i, x in enumerate((hidden, weight))]
    scales = {"ce_scale": 0.3, "z_scale": 0.1}
    near = run(head_loss.norm_head_loss, hidden, weight, labels, **scales)
    for ours, expected in zip(run(head_loss.norm_head_loss, *far, labels, **scales), near, strict=True):
        assert torch.equal(ours, expected)
    close = head_loss.Head.of(hidden, weight, labels, TensorParallel())
    distant = head_loss.Head.of(*far, labels, TensorParallel())
    products = [torch.empty(3, 3), strided(folder / "products", 3, 3, torch.float32)]
    buffers = [torch.empty(3, 3).half(), strided(folder / "buffer", 3, 3, torch.float16)]
    whole = [
        head_loss.whole_statistics(head, kept) for head, kept in zip((close, distant), products, strict=True)
    ]
    assert torch.equal(*whole)
    assert torch.equal(*products)
    factors = torch.tensor([1.0, 0.25])
    rows = slice(0, 3)
    for kept in ((None, None), products):
        deltas = [
            head_loss.logit_gradient(head, whole[0], factors, rows, buffer, product)
            for head, buffer, product in zip((close, distant), buffers, kept, strict=True)
        ]
        assert torch.equal(deltas[0].values, deltas[1].values)
        assert torch.equal(deltas[0].sums, deltas[1].sums)
    totals = [torch.ones(3, 16), strided(folder / "total", 3, 16, torch.float32).fill_(1.0)]
    outs = [torch.empty(3, 16).half(), strided(folder / "out", 3, 16, torch.float16)]
    projection = matmul.Projection(torch.ones(3), far[1])
    for transposed in (False, True):
        for one in (0, 1):
            options = {
                "scale": torch.ones(()),
                "tile": close.tiles.weight_gradient,
                "transposed": transposed,
                "adds": True,
            }
            left, right = buffers[one], (weight, far[1])[one]
            matmul.accumulate(left, right, total=totals[one], out=None, **options)
            matmul.accumulate(left, right, total=totals[one], out=outs[one], projection=projection, **options)
        assert torch.equal(*totals)
        assert torch.equal(*outs)


def test_strides_beyond_int32(tmp_path: Path) -> None:
    run_interpreted(check_strides, tmp_path)


def check_many_tokens(folder: Path) -> None:
    """The merge of two sets of 2^29 tokens, of which the first block runs: the second set begins at 2^31."""
    from megatron_b2.ops.triton import head_kernels

    tokens = 2**29
    both = torch.from_file(str(folder / "in"), shared=True, size=8 * tokens, dtype=torch.float32).view(
        2, 4, tokens
    )
    out = torch.from_file(str(folder / "out"), shared=True, size=4 * tokens, dtype=torch.float32).view(
        4, tokens
    )
    both[:, :, :4] = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 7.0, 0.5]]).unsqueeze(2)
    head_kernels.merge_kernel[(1,)](both, out, tokens, 2, LEVELS=1, ROWS=4)
    expected = torch.tensor([2.0, 1.0 + 2.0 * torch.e**-1, 7.0, 4.5])
    torch.testing.assert_close(out[:, :4], expected.unsqueeze(1).expand(4, 4))


def test_merge_beyond_int32(tmp_path: Path) -> None:
    run_interpreted(check_many_tokens, tmp_path)


def hollow(path: Path, *shape: int) -> Tensor:
    """fp32 zeros in a file that takes disk only where it is written."""
    return torch.from_file(str(path), shared=True, size=torch.Size(shape).numel()).view(shape)


def check_statistics_of_many_tokens(folder: Path) -> None:
    """The first 3 of 2^28 tokens: the third of four segments is stored from 2^31 on."""
    from megatron_b2.ops.triton import head_kernels

    hidden, weight, labels = inputs(3, 64, 16)
    norms, sizes = 1 / weight.norm(dim=1), {"ROWS": 4, "COLUMNS": 16, "DEPTH": 16, "KEEPS": False}
    found = []
    for tokens in (3, 2**28):
        out = hollow(folder / str(tokens), 4, 4, tokens)
        rows = [torch.cat([x, x[:1]]) for x in (hidden, labels)]  # a block of 4 tokens is read
        head_kernels.statistics_kernel[(1, 4)](
            rows[0], weight, norms, rows[1], out, out, tokens, 64, 16, 16, 16, 0, 0, 4, 1, **sizes
        )
        found.append(out[:, :, :3].clone())
    assert found[0][:, :2].abs().sum(dim=(1, 2)).all()
    assert torch.equal(*found)


def check_gradient_of_many_tokens(folder: Path) -> None:
    """Ids of the largest logits are 2^31 elements behind the largest logits; of three blocks the last one's sums
    are as far away."""
    from megatron_b2.ops.triton import head_kernels

    products, norms, labels = torch.randn(3, 8), torch.rand(8) + 0.5, torch.tensor([5, -100, 2])
    scales, table = torch.tensor([1.0, 0.25]), torch.rand(4, 3) + 0.5
    table[2] = torch.tensor([1.0, 6.0, 3.0])
    sizes = {"KEPT": True, "ROWS": 1, "COLUMNS": 8, "DEPTH": 16, "GROUP": 1}
    found = []
    for stride, distance in ((3, 8), (2**30, 2**30 + 64)):
        statistics, gradient = hollow(folder / f"statistics {stride}", 4, stride), torch.empty(3, 8)
        statistics[:, :3] = table
        sums = hollow(folder / f"sums {stride}", 2 * distance + 8)
        head_kernels.logit_gradient_kernel[(3,)](
            gradient, gradient, norms, labels, statistics, scales, products, gradient, sums,
            stride, 8, 16, 0, 0, 8, 8, distance, 0, -100, **sizes,
        )  # fmt: skip
        found.append((gradient, sums.as_strided((3, 8), (distance, 1)).clone()))
    assert all(x.abs().sum(1).all() for x in found[0])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("check", [check_statistics_of_many_tokens, check_gradient_of_many_tokens])
def test_statistics_and_sums_beyond_int32(check: Callable[[Path], None], tmp_path: Path) -> None:
    run_interpreted(check, tmp_path)
