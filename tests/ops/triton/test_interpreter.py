"""The interpreter computes bf16 as torch does, and works on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_b2.testing.kernels.interpreter import decode_bf16, encode_bf16, run_interpreted


def cast_kernel(x, out, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(out + index, tl.load(x + index).to(out.dtype.element_ty))


def arithmetic_kernel(a, b, out, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    x, y = tl.load(a + index), tl.load(b + index)
    value = -x * y + x * 0.625 - 0.375
    value = tl.where(x > y, value, -tl.abs(value))
    tl.store(out + index, tl.maximum(value, -3.0))


def dot_kernel(a, b, out, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, depth, column = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    x = tl.load(a + row[:, None] * DEPTH + depth[None, :])
    y = tl.load(b + depth[:, None] * COLUMNS + column[None, :])
    tl.store(out + row[:, None] * COLUMNS + column[None, :], tl.dot(x, y))


def sum_kernel(x, total, largest, COUNT: tl.constexpr, CAST: tl.constexpr):
    value = tl.load(x + tl.arange(0, COUNT))
    if CAST:
        value = value.to(tl.float32)
    tl.store(total, tl.sum(value, axis=0))
    tl.store(largest, value.max(axis=0))


def offset_kernel(out, row, stride, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out, row * stride)


def launch(kernel: Callable[..., Any], *args: Any, **constants: Any) -> None:
    triton.jit(kernel)[(1,)](*args, **constants)


def interesting_floats() -> Tensor:
    """float32 values of every exponent, ties, values beside ties, largest, infinite, zero and subnormal."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4080,), generator=generator, dtype=torch.int64).to(torch.int32)
    bits[1000:2000] &= -65536
    bits[1000:2000] += 0x8000  # exactly between two bf16 values
    bits[2000:2200] = (bits[2000:2200] & -65536) + 0x8001
    bits[2200:2400] = (bits[2200:2400] & -65536) + 0x7FFF
    values = bits.view(torch.float32)
    limits = [0.0, -0.0, torch.inf, -torch.inf, 3.4028235e38, -3.4028235e38, 1e-45, 1e-40]
    special = torch.tensor([*limits, *(1 + n / 256 for n in range(8))])
    return torch.cat([values[~values.isnan()], special, torch.zeros(int(values.isnan().sum()))])


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int16).tolist()


def test_rounding_to_bf16_is_the_one_of_torch_bit_for_bit() -> None:
    values = interesting_floats()
    expected = values.bfloat16()
    assert encode_bf16(values.numpy()).view("int16").tolist() == bits(expected)
    assert (
        decode_bf16(expected.view(torch.int16).numpy().view("uint16")).tolist() == expected.float().tolist()
    )
    assert torch.from_numpy(encode_bf16([torch.nan]).view("int16")).view(torch.bfloat16).isnan().all()


def casts(source: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(source), dtype=dtype)
    launch(cast_kernel, source, out, COUNT=len(source))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_casts_in_kernels_are_those_of_torch(dtype: torch.dtype) -> None:
    values = interesting_floats() if dtype.is_floating_point else torch.arange(-2048, 2048) * 77
    source = values.to(dtype)
    down = run_interpreted(casts, source, torch.bfloat16)
    assert bits(down) == bits(source.bfloat16())
    if dtype.is_floating_point:
        assert torch.equal(run_interpreted(casts, down, dtype), down.to(dtype))


def arithmetic(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(a)
    launch(arithmetic_kernel, a, b, out, COUNT=len(a))
    return out


def test_arithmetic_on_bf16_rounds_once_an_operation() -> None:
    a, b = torch.randn(2, 4096).bfloat16()
    ours = run_interpreted(arithmetic, a, b)
    value = -a * b + a * 0.625 - 0.375
    expected = torch.where(a > b, value, -value.abs()).maximum(torch.tensor(-3.0).bfloat16())
    assert torch.equal(ours, expected)


def product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(len(a), b.shape[1])
    launch(dot_kernel, a, b, out, ROWS=len(a), DEPTH=len(b), COLUMNS=b.shape[1])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_values_and_adds_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    error = (run_interpreted(product, a, b).double() - a.double() @ b.double()).abs().max()
    assert error < 1e-5


def sums(x: Tensor, cast: bool) -> tuple[float, float]:
    total, largest = torch.empty(2, 1)
    launch(sum_kernel, x, total, largest, COUNT=len(x), CAST=cast)
    return total.item(), largest.item()


def test_sums_after_a_cast_are_those_of_the_values() -> None:
    x = torch.randn(1024).bfloat16()
    total, largest = run_interpreted(sums, x, True)
    assert total == pytest.approx(x.double().sum().item(), abs=1e-4)
    assert largest == x.max().item()


def test_a_sum_of_bf16_without_a_cast_is_refused() -> None:
    with pytest.raises(AssertionError, match="cast it to float32 first"):
        run_interpreted(sums, torch.randn(16).bfloat16(), False)


def summed_over_ranks() -> tuple[float, float]:
    x = torch.full((16,), dist.get_rank() + 1.0).bfloat16()
    total = torch.tensor(sums(x, True)[0])
    dist.all_reduce(total)
    return total.item(), float(dist.get_world_size())


def test_kernels_and_collectives_on_two_ranks() -> None:
    assert run_interpreted(summed_over_ranks, ranks=2) == [(48.0, 2.0), (48.0, 2.0)]


def offset(wide: bool) -> int:
    out = torch.zeros(1, dtype=torch.int64)
    launch(offset_kernel, out, 70_000, 125_696, WIDE=wide)
    return int(out.item())


def test_int32_products_overflow_as_on_a_gpu_and_are_found() -> None:
    assert run_interpreted(offset, True, check_overflow=True) == 70_000 * 125_696
    assert run_interpreted(offset, False) == 70_000 * 125_696 - 2 * 2**32
    with pytest.raises(AssertionError, match="int32 overflow detected"):
        run_interpreted(offset, False, check_overflow=True)


def test_the_calling_process_stays_as_it_was() -> None:
    run_interpreted(sums, torch.ones(4), True)
    assert not triton.knobs.runtime.interpret
    assert type(tl.sum).__name__ == "JITFunction"
