"""RMSNorm, RoPE and SwiGLU in Triton against float64, their own invariants, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from megatron_b2.ops import rms_norm, rope, swiglu
from megatron_b2.ops.rope import rope_table
from megatron_b2.testing.kernels.elementwise import (
    EPS,
    checks,
    compare,
    norm_case,
    results_of,
    rope_case,
    swiglu_case,
)
from megatron_b2.testing.kernels.interpreter import run_interpreted
from megatron_b2.testing.kernels.parity import Check

CPU = torch.device("cpu")
QUICK = {
    op: [check for check in checks() if check.quick and check.op == op]
    for op in ("rms_norm", "add_rms_norm", "rope_split", "swiglu")
}


def failures(cases: Sequence[Check]) -> list[str]:
    return [
        f"{check.op} {check.name}: {result}"
        for check in cases
        for result in check.run(CPU)
        if not result.passed
    ]


@pytest.mark.parametrize("op", QUICK)
def test_errors_are_those_of_torch(op: str) -> None:
    assert run_interpreted(failures, QUICK[op]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [check for check in checks() if not check.quick], ids=lambda check: f"{check.op}: {check.name}"
)
def test_errors_are_those_of_torch_in_the_full_sweep(check: Check) -> None:
    assert run_interpreted(failures, [check]) == []


def of_programs(programs: int) -> list[str]:
    """A backward whose rows so many programs share."""
    from megatron_b2.ops.triton import rms_norm as kernels

    kernels.programs_for = lambda rows, arch: programs
    cases = [norm_case(op, 41, 200, dtype=torch.float32, device=CPU) for op in ("rms_norm", "add_rms_norm")]
    return [str(result) for case in cases for result in compare(case) if not result.passed]


@pytest.mark.parametrize("programs", [3, 41])
def test_partial_sums_of_programs_add_up(programs: int) -> None:
    assert run_interpreted(of_programs, programs) == []


def test_rows_are_shared_as_on_a_gpu() -> None:
    """Order and error of the sums are then those of a GPU, also under the interpreter."""
    from megatron_b2.ops.triton.rows import programs_for

    for arch, most in (("sm_80", 216), ("sm_90", 264), ("cpu", 216)):
        assert [programs_for(rows, arch) for rows in (0, 1, 41, 4_096)] == [1, 1, 11, most]


def reference_cases() -> list[tuple[Callable[..., Any], list[Tensor]]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    cos, sin = rope_table(torch.arange(3)[None], head_dim=6, base=100.0)
    return [
        (lambda x, w: rms_norm.rms_norm(x, w, eps=EPS), [normal(3, 4, 7), normal(7)]),
        (lambda x, r, w: rms_norm.add_rms_norm(x, r, w, eps=EPS), [normal(2, 5), normal(2, 5), normal(5)]),
        (swiglu.swiglu, [normal(2, 3, 8)]),
        (lambda qkv: rope.rope_split(qkv, cos, sin), [normal(2, 3, 3, 2, 6)]),
    ]


@pytest.mark.parametrize("number", range(4))
def test_gradients_of_the_references_are_those_of_finite_differences(number: int) -> None:
    function, inputs = reference_cases()[number]
    assert gradcheck(function, inputs)


def bits_of_add_norm(dtype: torch.dtype) -> None:
    from megatron_b2.ops.triton.rms_norm import add_rms_norm
    from megatron_b2.ops.triton.rms_norm import rms_norm as norm

    x, residual, weight = (
        torch.randn(5, 300).to(dtype),
        torch.randn(5, 300).to(dtype),
        torch.randn(300).to(dtype),
    )
    out, total = add_rms_norm(x, residual, weight, eps=EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, norm(total, weight, eps=EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stored_total_is_the_one_that_is_normalised(dtype: torch.dtype) -> None:
    run_interpreted(bits_of_add_norm, dtype)


def cases_in_bf16() -> list[Any]:
    kind = {"dtype": torch.bfloat16, "device": CPU}
    norms = [norm_case(op, 9, 300, **kind) for op in ("rms_norm", "add_rms_norm")]
    return [*norms, swiglu_case(9, 300, **kind), rope_case(2, 5, 3, 24, **kind)]


def repeated() -> None:
    for case in cases_in_bf16():
        first, second = (results_of(case.ours, case.inputs, rounded=torch.bfloat16) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_results_are_the_same_bits_at_each_run() -> None:
    run_interpreted(repeated)


def with_gaps(x: Tensor) -> Tensor:
    """The same values, rows further apart and columns starting off a 16-byte boundary."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def interleaved(x: Tensor) -> Tensor:
    """The same values with columns two elements apart."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def turned(x: Tensor) -> Tensor:
    """The same values, the first two dimensions exchanged in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def strided() -> None:
    for case in cases_in_bf16():
        expected = results_of(case.ours, case.inputs, rounded=torch.bfloat16)
        for layout in (with_gaps, interleaved, turned):
            inputs = [layout(x) if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in case.inputs]
            results = results_of(case.ours, inputs, rounded=torch.bfloat16, layout=layout)
            for ours, wanted in zip(results, expected, strict=True):
                assert torch.equal(ours, wanted), (case.names, layout.__name__, ours.shape)


def test_strides_change_no_bit() -> None:
    run_interpreted(strided)


def expanded() -> None:
    """The upstream gradients of a sum are one number, expanded."""
    for case in cases_in_bf16():
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        outputs = case.ours(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        ones = [torch.ones_like(out, memory_format=torch.contiguous_format) for out in outputs]
        expected = torch.autograd.grad(outputs, leaves, ones, retain_graph=True)
        assert all(map(torch.equal, torch.autograd.grad(sum(out.sum() for out in outputs), leaves), expected))


def test_gradients_of_a_sum() -> None:
    run_interpreted(expanded)


def one_output_unused() -> None:
    case = norm_case("add_rms_norm", 4, 96, dtype=torch.float32, device=CPU)
    for used in (0, 1):
        gradients = []
        for function in (case.ours, case.reference):
            leaves = [x.detach().requires_grad_() for x in case.inputs]
            out = function(*leaves)[used]
            gradients.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
        for ours, wanted in zip(*gradients, strict=True):
            if ours is None:
                assert not wanted.any()
            else:
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_a_total_or_a_norm_that_nobody_uses_has_no_gradient() -> None:
    run_interpreted(one_output_unused)


def empty() -> None:
    kind = {"dtype": torch.bfloat16, "device": CPU}
    for case in (
        *(norm_case(op, 0, 96, **kind) for op in ("rms_norm", "add_rms_norm")),
        swiglu_case(0, 96, **kind),
        rope_case(2, 0, 3, 8, **kind),
    ):
        ours, wanted = (
            results_of(f, case.inputs, rounded=torch.bfloat16) for f in (case.ours, case.reference)
        )
        assert [x.shape for x in ours] == [x.shape for x in wanted]
        assert not any(x.any() for x in ours)


def test_no_rows() -> None:
    run_interpreted(empty)


def kept(case: Any) -> int:
    """Bytes that the forward keeps for the backward and that were not its inputs."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    known, count = {x.untyped_storage().data_ptr() for x in inputs}, 0

    def pack(x: Tensor) -> Tensor:
        nonlocal count
        if x.untyped_storage().data_ptr() not in known:
            known.add(x.untyped_storage().data_ptr())
            count += x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = case.ours(*inputs)
    del out
    return count


def kept_bytes() -> list[int]:
    return [kept(case) for case in cases_in_bf16()]


def test_no_more_is_kept_than_the_backward_needs() -> None:
    root, total, table = 9 * 4, 9 * 300 * 2, 2 * 2 * 5 * 12 * 4
    assert run_interpreted(kept_bytes) == [root, root + total, 0, table]


# Invariants -----------------------------------------------------------------------------------------------

numbers = st.integers(min_value=0, max_value=2**31)


def searched(check: Callable[..., None], **arguments: Any) -> None:
    """Hypothesis inside one forked process: the interpreter takes milliseconds, a process a second."""
    searching = settings(max_examples=15, deadline=None, database=None)(given(**arguments)(check))
    run_interpreted(searching)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rotating_back_undoes_a_rotation_and_lengths_stay() -> None:
    def check(seed: int, length: int, heads: int, half: int, start: int) -> None:
        from megatron_b2.ops.triton.rope import rope_split

        qkv = normal(seed, 1, length, 3, heads, 2 * half).requires_grad_()
        cos, sin = rope_table(start + torch.arange(length)[None], head_dim=2 * half, base=10_000.0)
        out = rope_split(qkv, cos, sin)
        torch.testing.assert_close(torch.stack(out, 2).norm(dim=-1), qkv.norm(dim=-1), atol=1e-5, rtol=1e-5)
        # The gradient is the rotation by the negative angle.
        (back,) = torch.autograd.grad(out, qkv, [part.detach() for part in out])
        torch.testing.assert_close(back, qkv, atol=1e-5, rtol=1e-5)

    sizes = {"length": st.integers(1, 9), "heads": st.integers(1, 7), "half": st.integers(1, 80)}
    searched(check, seed=numbers, start=st.integers(0, 100_000), **sizes)


def test_scores_depend_on_the_difference_of_positions_only() -> None:
    def check(seed: int, shift: int) -> None:
        from megatron_b2.ops.triton.rope import rope_split

        qkv = normal(seed, 1, 6, 3, 2, 32)

        def scores(start: int) -> Tensor:
            table = rope_table(start + torch.arange(6)[None], head_dim=32, base=10_000.0)
            q, k, _ = rope_split(qkv, *table)
            return torch.einsum("bihd,bjhd->bhij", q, k)

        # The angle of a position near 4,096 is right to about 2e-4.
        torch.testing.assert_close(scores(shift), scores(0), atol=2e-2, rtol=0)

    searched(check, seed=numbers, shift=st.integers(0, 4_000))


def test_a_norm_does_not_see_the_scale_of_its_input() -> None:
    def check(seed: int, rows: int, width: int, power: int) -> None:
        from megatron_b2.ops.triton.rms_norm import rms_norm as norm

        x, weight = normal(seed, rows, width).requires_grad_(), normal(seed + 1, width)
        out = norm(x, weight, eps=0.0)
        assert torch.equal(norm(x * 2.0**power, weight, eps=0.0), out)
        (grad,) = torch.autograd.grad(out, x, normal(seed + 2, rows, width))
        largest = (grad.norm(dim=-1) * x.norm(dim=-1)).max().item()
        assert (grad * x).sum(-1).abs().max().item() <= 1e-5 * (largest + width)

    sizes = {"rows": st.integers(1, 9), "width": st.integers(1, 700)}
    searched(check, seed=numbers, power=st.integers(-20, 20), **sizes)


def test_swiglu_is_linear_in_up_and_off_where_the_gate_is_far_below_zero() -> None:
    def check(seed: int, rows: int, width: int) -> None:
        from megatron_b2.ops.triton.swiglu import swiglu as kernel

        gate, up = normal(seed, 2, rows, width)
        assert torch.equal(kernel(torch.cat([gate, 2 * up], -1)), 2 * kernel(torch.cat([gate, up], -1)))
        assert not kernel(torch.cat([torch.full_like(gate, -200.0), up], -1)).any()
        assert torch.equal(kernel(torch.cat([torch.full_like(gate, 200.0), up], -1)), 200 * up)

    searched(check, seed=numbers, rows=st.integers(1, 9), width=st.integers(1, 1_500))


def test_a_row_in_registers_is_hardly_padded() -> None:
    from megatron_b2.ops.triton.rows import TILE_ELEMENTS, row_tile, tile_of

    for width in range(1, 9_000, 7):
        tile = row_tile(width)
        assert width <= tile.main + tile.tail < 2 * width
        assert tile.main <= width
    assert [(row_tile(h).main, row_tile(h).tail, row_tile(h).warps) for h in (4_096, 5_120)] == [
        (4_096, 0, 4),
        (4_096, 1_024, 4),
    ]
    for width in (1_376, 1_712, 11_008, 13_696, 4 * 64, 32 * 64):
        rows, columns = tile_of(width)
        assert rows * columns == TILE_ELEMENTS
        assert -(-width // columns) * columns <= 8 / 7 * width


# More than 2^31 elements ----------------------------------------------------------------------------------


def sparse(folder: Path, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros in a file that takes disk only for the pages that are written, and is gone with the tensor."""
    path, count = folder / name, torch.Size(shape).numel()
    held = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
    path.unlink()
    return held


def far_rows(folder: Path) -> None:
    """Rows 2^30 + 8 elements apart: the third starts behind 2^31."""
    kind = {"dtype": torch.bfloat16, "device": CPU}
    stride, names = 2**30 + 8, iter("abcdefghijkl")

    def apart(x: Tensor) -> Tensor:
        if x.ndim < 2:
            return x
        plain, inner = x.flatten(2) if x.ndim > 2 else x[None], x.shape[2:] if x.ndim > 2 else x.shape[1:]
        held = sparse(folder, next(names), plain.shape[1] * stride)
        view = held.as_strided(plain.shape, (plain.shape[2], stride, 1))
        view.copy_(plain)
        return view.view(x.shape) if x.ndim == 2 else view.unflatten(2, inner)

    cases = [norm_case("rms_norm", 4, 96, **kind), norm_case("add_rms_norm", 4, 96, **kind)]
    for case in (*cases, swiglu_case(4, 96, **kind), rope_case(1, 4, 3, 8, **kind)):
        expected = results_of(case.ours, case.inputs, rounded=torch.bfloat16)
        results = results_of(case.ours, [apart(x) for x in case.inputs], rounded=torch.bfloat16, layout=apart)
        assert all(map(torch.equal, results, expected)), case.names


def test_inputs_with_strides_beyond_int32(tmp_path: Path) -> None:
    run_interpreted(far_rows, tmp_path, check_overflow=True)


def start_at(program: int) -> None:
    """Let the programs of a launch have numbers from `program` on in the first dimension."""
    from triton.runtime.interpreter import InterpreterBuilder

    number = InterpreterBuilder.create_get_program_id

    def shifted(self: Any, axis: int) -> Any:
        handle = number(self, axis)
        if axis == 0:
            handle.data = handle.data + handle.data.dtype.type(program)
        return handle

    InterpreterBuilder.create_get_program_id = shifted


def last_rows_of_a_norm(folder: Path) -> None:
    from megatron_b2.ops.triton import rms_norm as kernels

    rows, width = 530_000, 4_100
    first, rstd = rows - 2, torch.zeros(rows)
    x, residual, out, total = (
        sparse(folder, name, rows, width) for name in ("x", "residual", "out", "total")
    )
    x[first:], residual[first:] = normal(0, 2, width), normal(1, 2, width)
    weight = normal(2, width).bfloat16()
    shape = {"MAIN": 4_096, "TAIL": 4, "ADD": True}
    start_at(first)
    kernels.norm_forward[(2,)](x, residual, weight, out, total, rstd, width, EPS, width, width, **shape)
    near = [
        x[first:].clone().requires_grad_(),
        residual[first:].clone().requires_grad_(),
        weight.requires_grad_(),
    ]
    expected = rms_norm.add_rms_norm(*near, eps=EPS)
    torch.testing.assert_close(out[first:], expected[0], atol=0.02, rtol=0.02)
    assert torch.equal(total[first:], expected[1])
    # The one program has the number of a row here, and writes that row of the partial sums.
    grad_x = x
    partials = sparse(folder, "partials", rows, width, dtype=torch.float32)
    kernels.norm_backward[(1,)](
        total, weight, rstd, out, residual, grad_x, partials, rows, width, width, width, width, **shape
    )
    wanted = torch.autograd.grad(expected, near, [out[first:], residual[first:]])
    torch.testing.assert_close(grad_x[first:], wanted[0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(partials[first].bfloat16(), wanted[2], atol=0.05, rtol=0.02)


def last_rows_of_swiglu(folder: Path) -> None:
    from megatron_b2.ops.triton import swiglu as kernels

    rows, width = 2_200, 2**20
    first, columns = rows - 1, 1_024
    gate_up, grad_gate_up = (
        sparse(folder, "gate_up", rows, 2 * width),
        sparse(folder, "grads", rows, 2 * width),
    )
    out = sparse(folder, "out", rows, width)
    gate_up[first, :columns], gate_up[first, width : width + columns] = normal(0, 2, columns)
    start_at(first)
    tile = {"ROWS": 1, "COLUMNS": columns}
    kernels.swiglu_forward[(1, 1)](gate_up, out, rows, width, 2 * width, **tile)
    near = torch.cat([gate_up[first, :columns], gate_up[first, width : width + columns]]).requires_grad_()
    expected = swiglu.swiglu(near)
    torch.testing.assert_close(out[first, :columns], expected, atol=0.02, rtol=0.02)
    kernels.swiglu_backward[(1, 1)](gate_up, out, grad_gate_up, rows, width, 2 * width, width, **tile)
    (wanted,) = torch.autograd.grad(expected, near, out[first, :columns])
    ours = torch.cat([grad_gate_up[first, :columns], grad_gate_up[first, width : width + columns]])
    torch.testing.assert_close(ours, wanted, atol=0.05, rtol=0.02)


def last_tokens_of_rope(folder: Path) -> None:
    from megatron_b2.ops.triton import rope as kernels

    heads, half = 128, 64
    tokens = 2**31 // (heads * 2 * half) + 10
    qkv, grad_qkv = (sparse(folder, name, tokens, 3, heads, 2 * half) for name in ("qkv", "grads"))
    q, k = (sparse(folder, name, tokens, heads, 2 * half) for name in "qk")
    qkv[-1] = normal(0, 3, heads, 2 * half)
    cos, sin = rope_table(torch.arange(tokens)[None], head_dim=2 * half, base=10_000.0)
    tables, shape = (0, half), {"HEADS": heads, "HALF": half, "ROWS": 1, "COLUMNS": 1_024}
    tiles = heads * half // 1_024
    start_at(tokens - 1)
    kernels.rope_forward[(1, tiles, 2)](
        qkv, cos, sin, q, k, tokens, tokens, 0, qkv.stride(0), *tables, **shape
    )  # fmt: skip
    expected = rope.rope_split(qkv[None, -1:], cos[:, -1:], sin[:, -1:])
    assert torch.equal(q[-1], expected[0][0, 0])
    assert torch.equal(k[-1], expected[1][0, 0])
    strides = (0, *q.stride()[:2]) * 2 + (0, qkv.stride(0), 2 * half)
    kernels.rope_backward[(1, tiles, 3)](
        q, k, qkv[:, 2], cos, sin, grad_qkv, tokens, tokens, *strides, *tables, PACKED=False, **shape
    )  # fmt: skip
    # Rotated back, what was rotated is what it was but for two roundings.
    torch.testing.assert_close(grad_qkv[-1], qkv[-1], atol=0.03, rtol=0.02)


@pytest.mark.parametrize("rows", [last_rows_of_a_norm, last_rows_of_swiglu, last_tokens_of_rope])
def test_rows_and_outputs_beyond_int32(rows: Callable[[Path], None], tmp_path: Path) -> None:
    run_interpreted(rows, tmp_path, check_overflow=True)
