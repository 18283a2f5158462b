"""CUDA operations beyond parity: exact bits, determinism, layouts of inputs, extremes, 64-bit offsets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.cuda.alibi_softmax import alibi_softmax
from megatron_b2.ops.cuda.head_softmax import epilogue, update_statistics
from megatron_b2.ops.cuda.rms_norm import add_rms_norm, rms_norm
from megatron_b2.ops.cuda.swiglu import swiglu
from megatron_b2.ops.head_common import Statistics
from megatron_b2.testing.kernels.cpu_shim import Shim, kernels_on_cpu
from megatron_b2.testing.kernels.cuda import DTYPES, add_norm_case, softmax_case, swiglu_case
from megatron_b2.testing.kernels.elementwise import results_of

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)


def largest_rounding(result: Tensor, exact: Tensor) -> float:
    """Largest error in distances between neighbours of the dtype around the exact value; 0.5 is correct rounding."""
    wide = exact.double().abs().clamp_min(torch.finfo(result.dtype).smallest_normal)
    spacing = torch.finfo(result.dtype).eps * torch.exp2(wide.log2().floor())
    return float(((result.double() - exact) / spacing).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4_096, 5_120, 1_000, 97])
def test_stored_total_is_bit_exact_with_torch(shim: Shim, dtype: torch.dtype, width: int) -> None:
    case = add_norm_case(6, width, dtype=dtype, device=CPU)
    x, residual, weight = case.inputs
    _, total = add_rms_norm(x, residual, weight, eps=1e-6)
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "build",
    [
        lambda **k: add_norm_case(3, 5_120, **k),
        lambda **k: add_norm_case(3, 4_096, **k),
        lambda **k: swiglu_case(3, 1_712, **k),
        lambda **k: softmax_case(1, 5, 33, 33, False, **k),
    ],
)
def test_results_are_within_one_rounding_of_float64(shim: Shim, build: object, dtype: torch.dtype) -> None:
    """Outputs; a gradient is a difference, which may cancel, and is compared with its largest value (parity)."""
    case = build(dtype=dtype, device=CPU)  # type: ignore[operator]
    ours = results_of(case.ours, case.inputs, rounded=dtype)[0]
    exact = results_of(case.exact, [x.double() for x in case.inputs], rounded=dtype)[0]
    assert largest_rounding(ours, exact) <= 0.51
    correct = exact.to(dtype) == ours
    assert float(correct.double().mean()) > 0.999


def test_results_do_not_depend_on_the_order_of_threads_and_blocks(shim: Shim) -> None:
    """No missing barrier, no block that needs another, no sum in the order of arrival."""
    cases = [
        *(add_norm_case(9, width, dtype=torch.bfloat16, device=CPU) for width in (4_096, 97, 6_144)),
        swiglu_case(5, 1_376, dtype=torch.bfloat16, device=CPU),
        softmax_case(1, 5, 9, 300, True, dtype=torch.bfloat16, device=CPU),
    ]
    for case in cases:
        forwards = results_of(case.ours, case.inputs, rounded=torch.bfloat16)
        with shim.order(backwards=True):
            backwards = results_of(case.ours, case.inputs, rounded=torch.bfloat16)
        assert [torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True)] == [True] * len(forwards)


@pytest.mark.parametrize("width", [512, 97])
def test_inputs_and_gradients_may_have_any_layout(shim: Shim, width: int) -> None:
    case = add_norm_case(6, width, dtype=torch.float32, device=CPU)
    x, residual, weight = case.inputs
    expected = results_of(case.ours, case.inputs, rounded=torch.float32)
    strided = [x.t().contiguous().t(), residual.repeat(1, 2)[:, :width], weight.repeat_interleave(2)[::2]]
    transposed = results_of(
        case.ours, strided, rounded=torch.float32, layout=lambda grad: grad.t().contiguous().t()
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, transposed, strict=True))
    # Memory that no 128-bit access may touch: other kernels, the same results but for the order of sums.
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, residual, weight)]
    assert all(t.data_ptr() % 16 for t in shifted)
    for a, b in zip(expected, results_of(case.ours, shifted, rounded=torch.float32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_either_output_of_add_rms_norm_may_be_unused(shim: Shim) -> None:
    x, residual = (torch.randn(4, 64, requires_grad=True) for _ in range(2))
    weight = torch.randn(64, requires_grad=True)
    y, total = add_rms_norm(x, residual, weight, eps=1e-6)
    (grad_x,) = torch.autograd.grad(total.sum(), [x], retain_graph=True)
    assert torch.equal(grad_x, torch.ones_like(x))
    grad_y = torch.randn_like(y)
    only_y = torch.autograd.grad(y, [x, residual, weight], grad_y)
    expected = torch.autograd.grad(
        F.rms_norm(x + residual, (64,), weight, 1e-6), [x, residual, weight], grad_y
    )
    for ours, reference in zip(only_y, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_empty_inputs(shim: Shim) -> None:
    x = torch.randn(0, 64, requires_grad=True)
    weight = torch.randn(64, requires_grad=True)
    y = rms_norm(x, weight, eps=1e-6)
    y.sum().backward()
    assert y.shape == (0, 64)
    assert weight.grad is not None
    assert not weight.grad.any()
    assert swiglu(torch.randn(2, 0, 8)).shape == (2, 0, 4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 700), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99)
)
def test_norm_of_any_width(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    """Equal to float64 and, for any scale c, norm(c x) = norm(x) up to eps."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, width), (width,)))
    with kernels_on_cpu():
        ours, scaled = rms_norm(x, weight, eps=1e-12), rms_norm(4 * x, weight, eps=1e-12)
    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-12)
    assert largest_rounding(ours, exact) <= (0.51 if dtype != torch.float32 else 4)
    torch.testing.assert_close(ours, scaled, rtol=2 * torch.finfo(dtype).eps, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 7), queries=st.integers(1, 9), extra=st.integers(0, 260),
    seed=st.integers(0, 99), magnitude=st.sampled_from([0.0, 1.0, 1e4]),
)  # fmt: skip
def test_softmax_of_any_shape(
    batch: int, heads: int, queries: int, extra: int, seed: int, magnitude: float
) -> None:
    """Rows sum to 1, no key after the query has weight, gradients of a row sum to 0; no limit on heads or keys."""
    keys = queries + extra
    generator = torch.Generator().manual_seed(seed)
    scores = magnitude * torch.randn(batch, heads, queries, keys, generator=generator)
    scores.requires_grad_()
    with kernels_on_cpu():
        probs = alibi_softmax(scores, scale=0.1, alibi_slopes=alibi_slopes(heads))
        (grad,) = torch.autograd.grad(probs, scores, torch.randn(probs.shape, generator=generator))
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(batch, heads, queries))
    torch.testing.assert_close(grad.sum(dim=-1), torch.zeros(batch, heads, queries), atol=1e-6, rtol=0)
    rows = torch.arange(keys - queries, keys)[:, None]
    hidden = torch.arange(keys) > rows
    assert not probs.masked_select(hidden).any()
    assert not grad.masked_select(hidden).any()


def test_softmax_of_one_more_key_than_others_allow(shim: Shim) -> None:
    """8,193 keys and 5 heads of one sequence, where fused softmaxes of other projects fall back or fail."""
    scores = torch.randn(1, 5, 1, 8_193, generator=torch.Generator().manual_seed(0))
    slopes = alibi_slopes(40)[5:10]
    bias = slopes.double()[:, None, None] * torch.arange(-8_192, 1)
    expected = (0.1 * scores.double() + bias).softmax(dim=-1)
    probs = alibi_softmax(scores, scale=0.1, alibi_slopes=slopes)
    torch.testing.assert_close(probs.double(), expected, atol=1e-6, rtol=1e-5)


def statistics_of(products: Tensor, norms: Tensor, labels: Tensor, chunk: int, first: int = 0) -> Statistics:
    found = Statistics.empty(len(products), CPU)
    for start in range(0, products.shape[1], chunk):
        span = slice(start, start + chunk)
        update_statistics(found, products[:, span], norms[span], labels, first_column=first + start)
    return found


def test_head_statistics_take_the_lowest_of_equal_maxima_in_any_chunking(shim: Shim) -> None:
    products = torch.randn(4, 600, generator=torch.Generator().manual_seed(0)).clamp_(max=2)
    for column in (599, 512, 130, 131):
        products[:, column] = 3.0
    products[2] = -torch.inf
    products[2, 17] = -5.0
    labels = torch.tensor([130, -100, 17, 601])
    for chunk in (600, 128, 131, 7):
        found = statistics_of(products, torch.ones(600), labels, chunk, first=0)
        assert found.top_index.tolist() == [130, 130, 17, 130]
        assert found.top.tolist() == [3.0, 3.0, -5.0, 3.0]
        assert found.target_logit.tolist() == [3.0, 0.0, -5.0, 0.0]
        torch.testing.assert_close(found.lse, products.logsumexp(dim=1))


def test_head_gradients_sum_to_the_z_part(shim: Shim) -> None:
    """sum_v delta = z_grad where the label counts; the sums of delta z do not depend on the chunking."""
    generator = torch.Generator().manual_seed(0)
    products = 9 * torch.randn(33, 500, generator=generator)
    norms = torch.ones(500)
    labels = torch.randint(0, 500, (33,), generator=generator)
    found = statistics_of(products, norms, labels, 500)
    z_grad = torch.randn(33, generator=generator)
    sums, whole = torch.zeros(500), torch.empty_like(products)
    kwargs = {
        "lse": found.lse, "ce_grad": torch.full((33,), 0.5), "z_grad": z_grad, "top_index": found.top_index
    }  # fmt: skip
    epilogue(products, norms, labels, column_sums=sums, first_column=0, out=whole, **kwargs)
    torch.testing.assert_close(whole.sum(dim=1), z_grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, (whole.double() * products).sum(dim=0).float(), atol=1e-4, rtol=1e-4)
    parts, part_sums = products.clone(), torch.zeros(500)
    for start in range(0, 500, 128):
        span = slice(start, start + 128)
        epilogue(
            parts[:, span], norms[span], labels, column_sums=part_sums[span], first_column=start, **kwargs
        )
    assert torch.equal(parts, whole)
    assert torch.equal(part_sums, sums)
    narrow = epilogue(
        products, norms, labels, column_sums=torch.zeros(500), first_column=0,
        out=torch.empty(33, 500, dtype=torch.bfloat16), **kwargs,
    )  # fmt: skip
    assert torch.equal(narrow, whole.bfloat16())


def test_not_a_number_reaches_the_loss(shim: Shim) -> None:
    products = torch.zeros(1, 64)
    products[0, 33] = torch.nan
    assert statistics_of(products, torch.ones(64), torch.tensor([0]), 64).lse.isnan().all()
    assert rms_norm(products, torch.ones(64), eps=1e-6).isnan().all()
    assert alibi_softmax(products.view(1, 1, 1, 64), scale=1.0).isnan().all()


def test_wrong_arguments_are_named(shim: Shim) -> None:
    with pytest.raises(
        InputError, match=r"one dtype, fp32, fp16 or bf16; got torch.bfloat16 and torch.float32"
    ):
        rms_norm(torch.randn(2, 8), torch.ones(8).bfloat16(), eps=1e-6)
    with pytest.raises(InputError, match="odd width: 7"):
        swiglu(torch.randn(2, 7))
    with pytest.raises(InputError, match="5 queries, but only 4 keys"):
        alibi_softmax(torch.randn(1, 1, 5, 4), scale=1.0)
    with pytest.raises(InputError, match=r"alibi_slopes must be fp32 \[2\]"):
        alibi_softmax(torch.randn(1, 2, 4, 4), scale=1.0, alibi_slopes=torch.ones(3))
    with pytest.raises(InputError, match=r"labels must be int64 \[2\]"):
        statistics_of(torch.zeros(2, 8), torch.ones(8), torch.zeros(3, dtype=torch.int64), 8)
    with pytest.raises(InputError, match="vocabulary ids must be below 16,777,216"):
        statistics_of(torch.zeros(2, 8), torch.ones(8), torch.zeros(2, dtype=torch.int64), 8, first=2**24 - 7)


def test_cpu_tensors_are_refused() -> None:
    with pytest.raises(InputError, match="CUDA kernels work on CUDA tensors; these are on cpu"):
        swiglu(torch.randn(2, 8))


class Sparse:
    """Tensors of more than 2^31 elements in files that take next to no disk; only their ends are touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        self._count += 1
        size = torch.Size(shape).numel()
        assert size > 2**31
        path = str(self._folder / f"{self._count}.bin")
        return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)


@pytest.fixture
def sparse(tmp_path: Path) -> Sparse:
    return Sparse(tmp_path)


def test_norm_of_more_than_2_31_elements(shim: Shim, sparse: Sparse) -> None:
    """Blocks of the last two rows alone, each with a row of partial sums beyond 2^31 as well."""
    width, dtype = 4_096, torch.bfloat16
    rows = 2**31 // width + 2
    x, residual, y, total, grad_y, grad_x = (sparse(rows, width, dtype=dtype) for _ in range(6))
    partial = sparse(rows, width, dtype=torch.float32)
    weight, grad_weight = torch.randn(width).to(dtype), torch.zeros(width, dtype=dtype)
    for tensor in (x, residual, grad_y):
        tensor[-2:] = torch.randn(2, width).to(dtype)
    with shim.order(first_block=rows - 2):
        shim.launch("rms_norm_forward", CPU, x, residual, weight, y, total, rows, width, 1e-6, 2)
        pointers = (grad_y, total, None, weight, grad_x, grad_weight, partial)
        shim.launch("rms_norm_backward", CPU, *pointers, rows, rows, width, 1e-6, 2)
    small = [x[-2:].clone(), residual[-2:].clone(), weight]
    for tensor in small:
        tensor.requires_grad_()
    expected, expected_total = add_rms_norm(*small, eps=1e-6)  # type: ignore[misc]
    (expected_grad,) = torch.autograd.grad(expected, [small[0]], grad_y[-2:])
    assert torch.equal(total[-2:], expected_total)
    assert torch.equal(y[-2:], expected)
    assert torch.equal(grad_x[-2:], expected_grad)
    assert (partial[-2:] != 0).double().mean() > 0.99
    assert not y[:2].any()


def test_swiglu_of_more_than_2_31_elements(shim: Shim, sparse: Sparse) -> None:
    width, dtype = 1_024, torch.bfloat16
    rows = 2**31 // width + 2
    gate_up, grad_gate_up = (sparse(rows, 2 * width, dtype=dtype) for _ in range(2))
    out, grad = (sparse(rows, width, dtype=dtype) for _ in range(2))
    gate_up[-2:], grad[-2:] = torch.randn(2, 2 * width).to(dtype), torch.randn(2, width).to(dtype)
    with shim.order(first_block=rows - 2):
        shim.launch("swiglu_forward", CPU, gate_up, out, rows, width, 2)
        shim.launch("swiglu_backward", CPU, gate_up, grad, grad_gate_up, rows, width, 2)
    small = gate_up[-2:].clone().requires_grad_()
    expected = swiglu(small)
    assert torch.equal(out[-2:], expected)
    assert torch.equal(grad_gate_up[-2:], torch.autograd.grad(expected, small, grad[-2:])[0])


def test_softmax_of_more_than_2_31_elements(shim: Shim, sparse: Sparse) -> None:
    keys = 1_024
    batch = 2**31 // keys + 2
    scores, probs, grad, grad_scores = (sparse(batch, 1, 1, keys, dtype=torch.bfloat16) for _ in range(4))
    starts = sparse(batch, keys, dtype=torch.int32)
    scores[-2:], grad[-2:] = (torch.randn(2, 1, 1, keys).bfloat16() for _ in range(2))
    starts[-1, -1] = 9
    slopes = torch.tensor([0.01])
    sizes = (batch, 1, 1, keys, 0.5, 2)
    with shim.order(first_block=batch - 2):
        shim.launch("alibi_softmax_forward", CPU, scores, slopes, starts, probs, *sizes)
        shim.launch("alibi_softmax_backward", CPU, probs, grad, starts, grad_scores, *sizes)
    biased = 0.5 * scores[-2:].double() + 0.01 * torch.arange(1 - keys, 1)
    biased[1, ..., :9] = -torch.inf
    exact = biased.softmax(dim=-1)
    torch.testing.assert_close(probs[-2:], exact.bfloat16(), atol=0, rtol=2**-7)
    p, g = probs[-2:].double(), grad[-2:].double()
    exact_grad = 0.5 * p * (g - (p * g).sum(dim=-1, keepdim=True))
    torch.testing.assert_close(grad_scores[-2:], exact_grad.bfloat16(), atol=1e-6, rtol=2**-7)


def test_head_of_more_than_2_31_elements(shim: Shim, sparse: Sparse) -> None:
    """Rows far apart: 520 of stride 2^22."""
    stride, columns, tokens = 2**22, 64, 520
    memory = sparse(tokens, stride, dtype=torch.float32)
    products = memory[:, :columns]
    products.copy_(torch.randn(tokens, columns))
    small, norms = products.clone(), torch.rand(columns) + 0.5
    labels = torch.arange(tokens) % columns
    found, expected = (statistics_of(x, norms, labels, columns) for x in (products, small))
    assert torch.equal(found.table, expected.table)
    for x in (products, small):
        epilogue(
            x, norms, labels, lse=found.lse, ce_grad=torch.ones(tokens), z_grad=torch.ones(tokens),
            top_index=found.top_index, column_sums=torch.zeros(columns), first_column=0,
        )  # fmt: skip
    assert torch.equal(products, small)
