"""Attention in Triton against float64, its parts against the whole, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from megatron_b2.ops import attention
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import Documents, Pattern, Rows
from megatron_b2.ops.context_attention import context_attention
from megatron_b2.parallel.context_parallel import ContextParallel
from megatron_b2.testing.kernels.attention import (
    DTYPES,
    HEAD_DIMS,
    QUANTITIES,
    QUICK,
    Problem,
    Shape,
    checks,
    compare,
    exact_results,
    results,
)
from megatron_b2.testing.kernels.interpreter import run_interpreted
from megatron_b2.testing.kernels.parity import Check
from tests.ops.triton.test_elementwise import sparse

CPU = torch.device("cpu")


def failures(cases: list[Check]) -> list[str]:
    return [f"{check.name}: {result}" for check in cases for result in check.run(CPU) if not result.passed]


@pytest.mark.parametrize("shape", QUICK, ids=str)
def test_errors_are_those_of_torch(shape: Shape) -> None:
    mine = [check for check in checks() if check.quick and check.name.startswith(f"{shape}, ")]
    assert len(mine) == 3
    assert run_interpreted(failures, mine) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [check for check in checks() if not check.quick], ids=lambda check: check.name
)
def test_errors_are_those_of_torch_in_the_full_sweep(check: Check) -> None:
    assert run_interpreted(failures, [check]) == []


def deviating(shape: Shape, dtype: torch.dtype, arch: str) -> list[str]:
    """What is too far off on the tiles of an architecture."""
    from megatron_b2.ops.triton import target
    from megatron_b2.ops.triton.attention import TritonAttention

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(target, "arch_of", lambda device: arch)
        deviations = compare(shape, dtype, CPU, TritonAttention())
    return [f"{arch} {dtype} {shape}: {result}" for result in deviations if not result.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "head_dim", [64, 88, *(pytest.param(x, marks=pytest.mark.slow) for x in HEAD_DIMS if x > 88)]
)
def test_tiles_of_a_gpu_in_every_width(head_dim: int, dtype: torch.dtype) -> None:
    """In fp32 the scores are summed over parts of the columns (`products`)."""
    shape = Shape(head_dim, 70, keys=90, heads=4, group=2, packed=True)
    assert run_interpreted(deviating, shape, dtype, "sm_80") == []


def wrong_shapes(examples: int) -> list[str]:
    """Random shapes on tiles of every architecture's table; the last that failed."""
    wrong: list[str] = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        head_dim=st.sampled_from([8, 16, 24, 40, 64, 72, 96, 112, 136]), queries=st.integers(1, 70),
        extra=st.integers(0, 40), batch=st.integers(1, 2), group=st.integers(1, 2), key_heads=st.integers(1, 2),
        alibi=st.booleans(), packed=st.booleans(), parts=st.integers(1, 3), arch=st.sampled_from(["cpu", "sm_80", "sm_90"]),
        dtype=st.sampled_from(DTYPES),
    )  # fmt: skip
    def search(
        arch: str, dtype: torch.dtype, queries: int, extra: int, group: int, key_heads: int, **rest: Any
    ) -> None:
        heads = group * key_heads
        shape = Shape(queries=queries, keys=queries + extra, heads=heads, group=group, **rest)
        wrong[:] = deviating(shape, dtype, arch)
        assert wrong == []

    try:
        search()
    except AssertionError:
        return wrong
    return []


def test_any_shape_on_any_tile() -> None:
    assert run_interpreted(wrong_shapes, 6) == []


@pytest.mark.slow
def test_many_shapes_on_any_tile() -> None:
    assert run_interpreted(wrong_shapes, 100) == []


def of_autograd(qkv: Tensor, slopes: Tensor | None, documents: Documents | None) -> list[Tensor]:
    """Output and gradient of fused [B, S, 3, H, D] by the Triton operation and by the reference."""
    from megatron_b2.ops.triton.attention import causal_attention

    found = []
    for function in (causal_attention, attention.causal_attention):
        leaf = qkv.clone().requires_grad_()
        out = function(*leaf.unbind(2), alibi_slopes=slopes, documents=documents)
        (out * out.detach().cos()).sum().backward()
        found += [out.detach(), leaf.grad]
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_the_operation_equals_the_reference(alibi: bool, packed: bool) -> None:
    qkv = torch.randn(2, 70, 3, 2, 24)
    documents = Documents.of((torch.rand(2, 70) < 0.05).int().cumsum(1)) if packed else None
    out, grad, expected, expected_grad = run_interpreted(
        of_autograd, qkv, alibi_slopes(2) if alibi else None, documents
    )
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def ring(
    qkv: Tensor, slopes: Tensor | None, documents: Documents | None, method: Any, skips: bool = False
) -> tuple[Tensor, Tensor]:
    from megatron_b2.ops.triton.attention import TritonAttention

    context = ContextParallel(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, method)
    leaf = context.shard(qkv).clone().requires_grad_()
    kernel = TritonAttention(skip_negligible=skips)
    out = context_attention(
        *leaf.unbind(2), context=context, alibi_slopes=slopes, documents=documents, kernel=kernel
    )
    out.square().sum().backward()
    return out.detach(), leaf.grad


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(("method", "ranks"), [("ring", 3), ("ulysses", 2)])
def test_context_parallel_ranks_equal_one_process(method: str, ranks: int, packed: bool) -> None:
    qkv, slopes = torch.randn(2, 48, 3, 2, 16), alibi_slopes(2)
    documents = Documents.of((torch.rand(2, 48) < 0.05).int().cumsum(1)) if packed else None
    leaf = qkv.clone().requires_grad_()
    expected = attention.causal_attention(*leaf.unbind(2), alibi_slopes=slopes, documents=documents)
    expected.square().sum().backward()
    outs, grads = zip(*run_interpreted(ring, qkv, slopes, documents, method, ranks=ranks), strict=True)
    torch.testing.assert_close(torch.cat(outs, 1), expected.detach(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat(grads, 1), leaf.grad, atol=2e-5, rtol=1e-5)


def test_a_ring_that_skips_negligible_keys_equals_one_process() -> None:
    """The first of three shards is beyond the reach of the last."""
    qkv, slopes = 0.3 * torch.randn(1, 384, 3, 2, 16), torch.tensor([0.8, 0.4])
    leaf = qkv.clone().requires_grad_()
    expected = attention.causal_attention(*leaf.unbind(2), alibi_slopes=slopes)
    expected.square().sum().backward()
    outs, grads = zip(*run_interpreted(ring, qkv, slopes, None, "ring", True, ranks=3), strict=True)
    torch.testing.assert_close(torch.cat(outs, 1), expected.detach(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat(grads, 1), leaf.grad, atol=2e-5, rtol=1e-5)


def repeated() -> None:
    from megatron_b2.ops.triton.attention import TritonAttention

    problem = Problem.of(Shape(40, 150, batch=2, heads=4, group=2, packed=True), torch.bfloat16, CPU)
    for kernel in (TritonAttention(), TritonAttention(skip_negligible=True)):
        first, second = (results(problem, kernel) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_results_are_the_same_bits_at_each_run() -> None:
    run_interpreted(repeated)


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same values [B, H, S, D] in other places of memory."""
    yield x.contiguous()
    yield x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    gaps = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    gaps[..., 1:-2] = x
    yield gaps[..., 1:-2]
    yield torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def strided() -> None:
    from megatron_b2.ops.triton.attention import TritonAttention

    problem = Problem.of(Shape(24, 70, batch=2, heads=2), torch.float16, CPU)
    expected = results(problem, TritonAttention())
    for q, k, v, grad_out in zip(
        *map(layouts, (problem.q, problem.k, problem.v, problem.grad_out)), strict=True
    ):
        found = results(replace(problem, q=q, k=k, v=v, grad_out=grad_out), TritonAttention())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_any_strides_give_the_same_bits() -> None:
    run_interpreted(strided)


@pytest.mark.parametrize(
    ("heads", "extra", "step"), [(5, 0, 8), (5, 3, 1)], ids=["rows of 16 bytes", "rows anywhere"]
)
def test_strides_are_counted_in_16_bytes_where_all_are_multiples(heads: int, extra: int, step: int) -> None:
    """Those of heads of 88 are no multiples of 16 elements, which alone Triton looks for."""

    def call() -> tuple[int, ...]:
        from megatron_b2.ops.triton.attention import _Call

        qkv = torch.empty(2, 7, 3, heads, 88 + extra, dtype=torch.bfloat16)[..., :88]
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        made = _Call.of(q, k, v, Pattern(None, None), 0, 0, skip=False)
        assert made.options["STEP"] == made.step
        return made.step, *made.strides

    width = 88 + extra
    of_one = (7 * 3 * heads * width // step, width // step, 3 * heads * width // step)
    assert run_interpreted(call) == (step, *of_one * 3)


def far_apart(dim: int) -> None:
    """Elements of q, k and v beyond 2^31 of their storage, which the system gives memory only where written."""
    from megatron_b2.ops.triton.attention import TritonAttention

    problem = Problem.of(Shape(16, 3, batch=3, heads=3), torch.float16, CPU)
    expected = results(problem, TritonAttention())
    strides = [16, 16 * 3, 16 * 9, 1]  # batch, head, row
    strides[dim] = 2**30 + 16
    spread = []
    for x in (problem.q, problem.k, problem.v):
        wide = torch.empty(2 * (2**30 + 16) + 1024, dtype=x.dtype).as_strided(x.shape, strides)
        assert (wide[-1, -1, -1].storage_offset() + 15) > 2**31
        spread.append(wide.copy_(x))
    found = results(replace(problem, q=spread[0], k=spread[1], v=spread[2]), TritonAttention())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_offsets_have_64_bits(dim: int) -> None:
    run_interpreted(far_apart, dim)


def only_last_programs(backwards: Collection[str]) -> None:
    """From now on a launch runs the program of the last tile of the last head of the last batch. Kernels named
    in `backwards` begin with the last tile."""
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    execute = GridExecutor.__call__

    def handle(value: int) -> TensorHandle:
        return TensorHandle(np.array([value], dtype=np.int32), tl.int32)

    def last(self: Any, *args: Any, **kwargs: Any) -> None:
        grid, self.grid = self.grid, (1,)
        first = 0 if self.fn.__name__ in backwards else grid[0] - 1
        numbers = (first, grid[1] - 1, grid[2] - 1)
        InterpreterBuilder.create_get_program_id = lambda _, axis: handle(numbers[axis])
        InterpreterBuilder.create_get_num_programs = lambda _, axis: handle(grid[axis])
        execute(self, *args, **kwargs)

    GridExecutor.__call__ = last


def of_last_programs(folder: Path, batch: int, heads: int, length: int) -> list[Tensor]:
    """Results and gradients of the last 3 positions of the last head. All else is holes of files: inputs,
    outputs, statistics. The last document, and every last tile, begins with those positions."""
    from megatron_b2.ops.triton.attention import TritonAttention, _Call

    names, corner, empty = map(str, count()), (-1, -1, slice(-3, None)), Tensor.new_empty

    def held(like: Tensor, shape: Any, *, dtype: torch.dtype = torch.float16, **of_triton: Any) -> Tensor:
        if of_triton:
            return empty(like, shape, **of_triton)
        return sparse(folder, next(names), *shape, dtype=dtype)

    def same(*values: float) -> Tensor:
        """[B, H, S, 1], one memory for every batch and head."""
        one = torch.zeros(1, 1, length, 1, dtype=torch.float16)
        one[0, 0, -3:, 0] = torch.tensor(values)
        return one.expand(batch, heads, length, 1)

    only_last_programs(backwards=("forward_kernel", "query_kernel"))
    q, k, v = same(1, -2, 3), same(2, 1, 0.5), same(1, 2, 4)
    grad_out = held(q, (batch, length, heads, 1)).transpose(1, 2)
    grad_out[(*corner, 0)] = torch.tensor([0.5, -1.0, 2.0]).half()
    starts, ends = (held(q, (batch, length), dtype=torch.int32) for _ in range(2))
    starts[-1, -3:], ends[-1, -3:] = length - 3, length - 1
    slopes = held(q, (heads,), dtype=torch.float32)
    slopes[-1] = 0.5
    lengths = held(q, (batch, heads, length), dtype=torch.float32)
    lengths[corner] = torch.tensor([1.0, 2.0, 3.0])
    longest_keys = held(q, (batch, heads, -(-length // 64)), dtype=torch.float32)
    longest_keys[-1, -1, -1] = 2.0
    pattern, kernel = Pattern(slopes, Documents(starts, ends, ())), TritonAttention(skip_negligible=True)
    positions = {"query_start": 0, "key_start": 0, "dtype": torch.float16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", held)
        patch.setattr(_Call, "lengths", (lengths, longest_keys))
        out, lse = kernel.forward(q, k, v, pattern, **positions)
        rows = Rows(q, grad_out, lse, kernel.delta(out, grad_out))
        found = [out, lse, rows.delta, *kernel.backward(rows, k, v, pattern, **positions)]
    return [x[corner].clone() for x in found]


@pytest.mark.parametrize(
    ("batch", "heads", "length"),
    [(2**30, 1, 3), (2, 2**30, 3), (1, 2**16, 2**15 + 3)],
    ids=["batch", "head", "row"],
)
def test_statistics_outputs_and_gradients_beyond_int32(
    batch: int, heads: int, length: int, tmp_path: Path
) -> None:
    far = run_interpreted(of_last_programs, tmp_path, batch, heads, length, check_overflow=True)
    near = run_interpreted(of_last_programs, tmp_path, 1, 1, 3, check_overflow=True)
    assert all(x.abs().sum() > 0 for x in near)
    assert all(map(torch.equal, far, near))


def with_poison(starts: list[int], poisoned: slice, clean: slice, *, skip: bool, slope: float | None) -> None:
    """Keys that need no visit are NaN: results of the `clean` queries would show a visit."""
    from megatron_b2.ops.triton.attention import TritonAttention

    q, k, v, grad_out = (0.1 * torch.randn(1, 1, 1_024, 16) for _ in range(4))
    segments = torch.zeros(1, 1_024, dtype=torch.int32)
    segments[0, starts] = 1
    slopes = None if slope is None else torch.tensor([slope])
    pattern = Pattern(slopes, Documents.of(segments.cumsum(1)))
    kernel = TritonAttention(skip_negligible=skip)
    expected = exact_results(Problem(q, k, v, grad_out, pattern))
    v[:, :, poisoned] = torch.nan
    q, grad_out = q[:, :, clean], grad_out[:, :, clean]
    positions = {"query_start": clean.start, "key_start": 0, "dtype": torch.float32}
    out, lse = kernel.forward(q, k, v, pattern, **positions)
    rows = Rows(q, grad_out, lse, kernel.delta(out, grad_out))
    grad_q, grad_k, grad_v = kernel.backward(rows, k, v, pattern, **positions)
    for found, exact in ((out, expected[0]), (lse, expected[1]), (grad_q, expected[2])):
        torch.testing.assert_close(found.double(), exact[:, :, clean], atol=1e-6, rtol=1e-5)
    assert not grad_k[:, :, clean].isnan().any()
    assert not grad_v.isnan().any()
    assert (grad_k[:, :, poisoned] == 0).all()
    assert (grad_v[:, :, poisoned] == 0).all()


def over_documents(starts: list[int]) -> None:
    """Documents that begin and end inside of blocks and are longer than several, on small tiles."""
    from megatron_b2.ops.triton import target
    from megatron_b2.ops.triton.attention import TritonAttention

    plain, segments = Problem.of(Shape(16, 400), torch.float32, CPU), torch.zeros(1, 400, dtype=torch.int32)
    segments[0, starts] = 1
    problem = replace(plain, pattern=Pattern(plain.pattern.slopes, Documents.of(segments.cumsum(1))))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(target, "arch_of", lambda device: "sm_80")
        found = results(problem, TritonAttention())
    for ours, exact in zip(found, exact_results(problem), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("starts", [[70], [30, 333], [129, 190, 191]], ids=str)
def test_no_document_sees_another(starts: list[int]) -> None:
    run_interpreted(over_documents, starts)


def test_blocks_of_earlier_documents_are_not_visited() -> None:
    run_interpreted(lambda: with_poison([512], slice(0, 512), slice(512, 1_024), skip=False, slope=None))


def test_blocks_of_negligible_keys_are_not_visited() -> None:
    run_interpreted(lambda: with_poison([], slice(0, 256), slice(512, 1_024), skip=True, slope=0.8))


def omitted_mass(slopes: Tensor, length: int, scale: float) -> tuple[float, float]:
    """Largest share of a row's sum that keys before its first needed one have, and the share of such keys.

    Keys and queries are as long as is likely for `scale`, some keys are much longer, and the longest agree
    with the last query."""
    from megatron_b2.ops.triton.attention import _Call

    heads = len(slopes)
    q, k = (scale * torch.randn(1, heads, length, 32) for _ in range(2))
    k[:, :, 5] *= 4
    k[:, :, length // 2] = 3 * q[:, :, -1]
    call = _Call.of(q, k, k, Pattern(slopes, None), 0, 0, skip=True)
    positions = torch.arange(length)
    scores = q.double() @ k.double().transpose(2, 3) / 32**0.5
    scores += slopes.double().view(-1, 1, 1) * (positions - positions.unsqueeze(1))
    scores = scores.masked_fill(positions > positions.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    omitted = positions < call.needed(lse.float()).unsqueeze(-1)
    shares = (scores - lse).exp().masked_fill(~omitted, 0.0).sum(-1)
    visible = length * (length + 1) / 2
    return float(shares.max()), float(omitted.sum()) / visible / heads


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_omitted_mass_is_below_the_resolution_of_fp32(scale: float) -> None:
    mass, omitted = run_interpreted(omitted_mass, alibi_slopes(40)[::5], 1_024, scale)
    assert mass < 2.0**-24
    assert omitted > 0.1


def skipped() -> list[str]:
    from megatron_b2.ops.triton.attention import TritonAttention

    shape, kernel = Shape(32, 400, heads=5), TritonAttention(skip_negligible=True)
    return [str(found) for found in compare(shape, torch.float32, CPU, kernel) if not found.passed]


def test_leaving_out_negligible_keys_is_as_exact_as_torch() -> None:
    assert run_interpreted(skipped) == []


def test_gradients_of_the_reference_are_those_of_finite_differences() -> None:
    q, k, v = (torch.randn(2, 7, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]]))

    def function(*inputs: Tensor) -> Tensor:
        return attention.causal_attention(*inputs, alibi_slopes=alibi_slopes(4), documents=documents)

    assert gradcheck(function, (q, k, v))


def test_a_query_that_sees_no_key_of_a_part_counts_nothing() -> None:
    def unseen() -> list[Tensor]:
        from megatron_b2.ops.triton.attention import TritonAttention

        q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 6, 16)
        part = {"query_start": 2, "key_start": 4, "dtype": torch.float32}
        kernels = (TritonAttention(), attention.TorchTiles())
        return [x for kernel in kernels for x in kernel.forward(q, k, k, Pattern(None, None), **part)]

    for out, lse in zip(*[iter(run_interpreted(unseen))] * 2, strict=True):
        assert (out[:, :, :2] == 0).all()
        assert (lse[:, :, :2] == -torch.inf).all()
        assert lse[:, :, 2:].isfinite().all()


def test_quantities_are_all_compared() -> None:
    problem = Problem.of(Shape(16, 9), torch.float32, CPU)
    assert len(results(problem, attention.TorchTiles())) == len(exact_results(problem)) == len(QUANTITIES)
