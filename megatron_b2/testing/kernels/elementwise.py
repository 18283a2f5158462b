"""Parity of RMSNorm, add + RMSNorm, RoPE and SwiGLU with float64 autograd of their formulas.

Shapes are those of the models (H, F and heads of Baichuan 2, whole and one of eight parts), head widths of
other models, and odd ones that leave the last tile part full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_b2.ops import rms_norm, rope, swiglu
from megatron_b2.testing.kernels.parity import Check, Deviation, deviation

EPS: Final = 1e-6
DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)

NORM_SHAPES: Final[Sequence[tuple[int, int]]] = (
    (1, 5_120),
    (7, 4_096),
    (7, 5_120),
    (17, 96),
    (13, 97),
    (5, 1),
)
"""Rows and columns."""
MANY_ROWS: Final[Sequence[tuple[int, int]]] = ((97, 96), (97, 4_096), (512, 5_120), (1_025, 97))
SWIGLU_SHAPES: Final[Sequence[tuple[int, int]]] = (
    (1, 11_008),
    (5, 13_696),
    (9, 1_376),
    (9, 1_712),
    (97, 33),
    (5, 1),
)
"""Rows and columns of one half."""
MANY_TOKENS: Final[Sequence[tuple[int, int]]] = ((97, 11_008), (512, 1_712), (1_025, 1_376))
ROPE_SHAPES: Final = ((2, 5, 5, 128), (1, 97, 1, 64), (1, 3, 40, 128), (3, 1, 5, 88), (2, 3, 5, 2))
"""Batch, sequence, heads and head width."""
HEAD_DIMS: Final = (64, 88, 104, 128, 144, 152, 160)
LENGTHS: Final = (1, 97, 512, 1_025)
LOCAL_HEADS, ALL_HEADS = 5, 40


@dataclass(frozen=True)
class Case:
    """An operation on inputs."""

    ours: Callable[..., Any]
    """The kernel."""
    reference: Callable[..., Any]
    """The torch operation; both are called with the inputs in one dtype."""
    exact: Callable[..., Any]
    """The formula, called with the inputs in float64."""
    inputs: Sequence[Tensor]
    """In the dtype of the case; all require gradients."""
    outputs: Sequence[str]
    names: Sequence[str]
    """Of the inputs."""


def checks() -> tuple[Check, ...]:
    """Every check of the Triton kernels, quick ones first."""
    return tuple(sorted(_checks(), key=lambda check: not check.quick))


def _checks() -> Iterator[Check]:
    for dtype in DTYPES:
        for shapes, quick in ((NORM_SHAPES, True), (MANY_ROWS, False)):
            for shape in shapes:
                for op in ("rms_norm", "add_rms_norm"):
                    yield _check(op, f"{shape[0]} x {shape[1]}", partial(norm_case, op, *shape), dtype, quick)
        for shapes, quick in ((SWIGLU_SHAPES, True), (MANY_TOKENS, False)):
            for shape in shapes:
                yield _check("swiglu", f"{shape[0]} x {shape[1]}", partial(swiglu_case, *shape), dtype, quick)
        slow = [(1, length, LOCAL_HEADS, width) for length in LENGTHS for width in HEAD_DIMS]
        slow += [(1, 97, ALL_HEADS, width) for width in HEAD_DIMS]
        for dimensions, quick in ((ROPE_SHAPES, True), (slow, False)):
            for batch, length, heads, width in dimensions:
                name = f"batch {batch}, sequence {length}, {heads} heads of {width}"
                build = partial(rope_case, batch, length, heads, width)
                yield _check("rope_split", name, build, dtype, quick)


def _check(op: str, shape: str, build: Callable[..., Case], dtype: torch.dtype, quick: bool) -> Check:
    def run(device: torch.device) -> list[Deviation]:
        return compare(build(dtype=dtype, device=device))

    return Check(op, "triton", f"{shape}, {str(dtype).removeprefix('torch.')}", run, quick)


def norm_case(op: str, rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    """rms_norm or add_rms_norm of `rows` rows of `width` columns."""
    from megatron_b2.ops.triton import rms_norm as kernels

    weight = 1 + 0.5 * random(width, dtype=dtype, device=device, seed=1)
    x, residual = (random(rows, width, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    if op == "rms_norm":
        return Case(
            partial(kernels.rms_norm, eps=EPS), partial(rms_norm.rms_norm, eps=EPS), _exact_norm,
            [x, weight], ["out"], ["x", "weight"],
        )  # fmt: skip
    return Case(
        partial(kernels.add_rms_norm, eps=EPS), partial(rms_norm.add_rms_norm, eps=EPS),
        partial(_exact_add_norm, dtype), [x, residual, weight], ["out", "total"], ["x", "residual", "weight"],
    )  # fmt: skip


def swiglu_case(rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    """SwiGLU of `rows` rows of twice `width` columns; some gates far from 0, where the sigmoid is flat."""
    from megatron_b2.ops.triton import swiglu as kernels

    gate_up = random(rows, 2 * width, dtype=dtype, device=device, seed=4)
    gate_up[:, ::7] *= 8
    return Case(kernels.swiglu, swiglu.swiglu, _exact_swiglu, [gate_up], ["out"], ["gate_up"])


def rope_case(
    batch: int, length: int, heads: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> Case:
    """Positions near 4,096, another start for each sequence; one table for all where the batch is odd."""
    from megatron_b2.ops.triton import rope as kernels

    starts = torch.arange(1 if batch % 2 else batch, device=device)[:, None]
    positions = 4_000 + 17 * starts + torch.arange(length, device=device)
    cos, sin = rope.rope_table(positions, head_dim=width, base=10_000.0)
    qkv = random(batch, length, 3, heads, width, dtype=dtype, device=device, seed=5)

    def bound(function: Callable[..., Any]) -> Callable[[Tensor], Any]:
        return lambda qkv: function(qkv, cos, sin)

    return Case(
        bound(kernels.rope_split), bound(rope.rope_split), bound(_exact_rope), [qkv], ["q", "k", "v"], ["qkv"]
    )


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Standard normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def _exact_add_norm(dtype: torch.dtype, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What is normalised is the rounded total; the rounding has the gradient of the identity."""
    total = x + residual
    stored = total + (total.to(dtype).double() - total).detach()
    return _exact_norm(stored, weight), total


def _exact_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _exact_rope(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    q, k, v = qkv.unbind(2)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    return rotated(q), rotated(k), v


def compare(case: Case) -> list[Deviation]:
    """Outputs and gradients of the kernel and of torch, each against float64."""
    dtype = case.inputs[0].dtype
    results = [
        results_of(function, [x.to(wanted) for x in case.inputs], rounded=dtype)
        for function, wanted in ((case.ours, dtype), (case.reference, dtype), (case.exact, torch.float64))
    ]
    names = [*case.outputs, *(f"grad_{name}" for name in case.names)]
    return [deviation(name, *values) for name, *values in zip(names, *results, strict=True)]


def results_of(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    rounded: torch.dtype,
    layout: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
) -> list[Tensor]:
    """Outputs and gradients of the inputs.

    Upstream gradients have values of `rounded`, the same in every call, and lie in memory as `layout` says.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    upstream = [
        layout(random(*out.shape, dtype=rounded, device=out.device, seed=100 + index).to(out.dtype))
        for index, out in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [*(out.detach() for out in outputs), *gradients]
