"""Parity of causal attention with float64 autograd of its formula.

Head widths and heads are those of models, whole and one of eight tensor-parallel parts (5 of 40 heads with
the slopes of the global list); lengths leave the last tile part full. Cases run through the `AttentionKernel`
interface, so that the log-sum-exp is compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import AttentionKernel, Documents, Pattern, Rows, TorchTiles
from megatron_b2.testing.kernels.parity import FLOOR_ULPS, Check, Deviation, deviation

DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS: Final = (64, 88, 104, 128, 144, 152, 160)
LENGTHS: Final = (1, 97, 512, 1_025)
ALL_HEADS: Final = 40
LOCAL: Final = slice(30, 35)
"""Heads of one of eight tensor-parallel ranks; the slopes of the global list turn at head 32."""
QUANTITIES: Final = ("out", "lse", "grad_q", "grad_k", "grad_v")


@dataclass(frozen=True)
class Shape:
    """A problem."""

    head_dim: int
    queries: int
    keys: int = 0
    """0: as many as queries."""
    batch: int = 1
    heads: int = 2
    group: int = 1
    """Query heads of one key head."""
    alibi: bool = True
    packed: bool = False
    parts: int = 1
    """Calls over consecutive parts of the keys whose results are merged."""

    def __str__(self) -> str:
        words = (
            f"{self.batch} x {self.queries}",
            self.keys and f"of {self.keys} keys",
            f"{self.heads} heads of {self.head_dim}",
            self.group > 1 and f"in groups of {self.group}",
            "alibi" if self.alibi else "plain",
            self.packed and "packed",
            self.parts > 1 and f"in {self.parts} parts",
        )
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Problem:
    """Inputs of a shape, [B, S, H, D] seen as [B, H, S, D], as the model has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    pattern: Pattern

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
        """Standard normal values, the same on every device."""
        generator = torch.Generator().manual_seed(17)
        keys = shape.keys or shape.queries

        def normal(length: int, heads: int) -> Tensor:
            values = torch.randn(shape.batch, length, heads, shape.head_dim, generator=generator)
            return values.to(device, dtype).transpose(1, 2)

        q, grad_out = normal(shape.queries, shape.heads), normal(shape.queries, shape.heads)
        k, v = (normal(keys, shape.heads // shape.group) for _ in range(2))
        starts = torch.rand(shape.batch, keys, generator=generator) < 2.5 / keys
        documents = Documents.of(starts.int().cumsum(1).to(device)) if shape.packed else None
        is_local = shape.heads == LOCAL.stop - LOCAL.start
        slopes = alibi_slopes(ALL_HEADS)[LOCAL if is_local else slice(shape.heads)]
        alibi = slopes.to(device) if shape.alibi else None
        return cls(q, k, v, grad_out, Pattern(alibi, documents))


def checks() -> tuple[Check, ...]:
    """Every check of the Triton kernels, quick ones first."""
    quick = [_check(shape, dtype, quick=True) for shape in QUICK for dtype in DTYPES]
    return *quick, *(_check(shape, dtype, quick=False) for shape in _slow() for dtype in DTYPES)


QUICK: Final = (
    Shape(128, 300, heads=5),
    Shape(88, 300, alibi=False),
    Shape(152, 150, batch=2, heads=4, group=2, packed=True),
    Shape(104, 20, keys=97, alibi=False, packed=True),
    Shape(160, 1),
    Shape(144, 40, keys=100, parts=3, packed=True),
)


def _slow() -> Iterator[Shape]:
    """Every width with every length; all 40 heads with the short ones, at width 128 with every one."""
    for width in HEAD_DIMS:
        for length in LENGTHS:
            yield Shape(width, length, heads=LOCAL.stop - LOCAL.start)
            if length < 100 or width == 128:
                yield Shape(width, length, heads=ALL_HEADS)
        yield Shape(width, 512, heads=2, alibi=False)
        yield Shape(width, 333, batch=2, heads=4, group=4, alibi=False, packed=True)
        yield Shape(width, 333, batch=2, heads=6, group=3, packed=True)
        yield Shape(width, 100, keys=300, heads=6, parts=4, packed=True)
        yield Shape(width, 1, keys=300, heads=LOCAL.stop - LOCAL.start)


def _check(shape: Shape, dtype: torch.dtype, *, quick: bool) -> Check:
    def run(device: torch.device) -> list[Deviation]:
        from megatron_b2.ops.triton.attention import TritonAttention

        return compare(shape, dtype, device, TritonAttention())

    name = f"{shape}, {str(dtype).removeprefix('torch.')}"
    return Check("causal_attention", "triton", name, run, quick)


def compare(
    shape: Shape, dtype: torch.dtype, device: torch.device, kernel: AttentionKernel
) -> list[Deviation]:
    """Deviations of the output, the log-sum-exp and the gradients."""
    problem = Problem.of(shape, dtype, device)
    ours = results(problem, kernel, parts=shape.parts)
    reference = results(problem, TorchTiles())
    exact = exact_results(problem)
    found = [
        deviation(name, *values) for name, *values in zip(QUANTITIES, ours, reference, exact, strict=True)
    ]
    floors = _floors(problem, exact)
    return [replace(x, floor=max(x.floor, floors.get(x.quantity, 0.0))) for x in found]


def _floors(problem: Problem, exact: tuple[Tensor, ...]) -> dict[str, float]:
    """What fp32 inside must be allowed where torch happens to have less, because it recomputes a score by the
    very same product: the probability of a query that sees one key is then exactly 1, its gradient exactly 0.

    A few units of the largest score are an error of probabilities, so of all gradients; a few units of delta
    one of the difference of which the gradients of q and k are sums. The log-sum-exp of few scores has the
    error of a score, whose sum may be larger on its way than in the end (as large as that of any two vectors
    of these lengths); in 16 bits twice the units: scores are powers of 2 there, converted there and back.
    """
    unit = FLOOR_ULPS * torch.finfo(torch.float32).eps
    q, k, out = problem.q.float(), problem.k.float(), exact[0]
    group, scale = q.shape[1] // k.shape[1], 1.0 / math.sqrt(q.shape[3])
    score = max(float((q[:, h] @ k[:, h // group].mT).abs().max()) for h in range(q.shape[1])) * scale
    on_the_way = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / q.shape[3]
    delta = float((problem.grad_out.double() * out).sum(-1).abs().max()) * scale
    factors = {"grad_q": k, "grad_k": q, "grad_v": torch.zeros(1)}
    conversions = 1 if problem.q.dtype == torch.float32 else 2
    return {"lse": conversions * unit * max(score, on_the_way)} | {
        name: unit * (score * float(gradient.abs().max()) + delta * float(factors[name].abs().max()))
        for name, gradient in zip(QUANTITIES[2:], exact[2:], strict=True)
    }


def results(problem: Problem, kernel: AttentionKernel, *, parts: int = 1) -> tuple[Tensor, ...]:
    """`QUANTITIES` by a kernel. Several parts are merged and summed in float64 and rounded once."""
    q, k, v, pattern = problem.q, problem.k, problem.v, problem.pattern
    query_start, dtype = k.shape[2] - q.shape[2], q.dtype if parts == 1 else torch.float32
    size = -(-k.shape[2] // parts)
    starts = range(0, k.shape[2], size)
    pieces = [(k[:, :, start : start + size], v[:, :, start : start + size], start) for start in starts]
    found = [
        kernel.forward(q, k, v, pattern, query_start=query_start, key_start=start, dtype=dtype)
        for k, v, start in pieces
    ]
    out, lse = merged(found) if parts > 1 else found[0]
    out, lse = out.to(q.dtype), lse.float()
    rows = Rows(q, problem.grad_out, lse, kernel.delta(out, problem.grad_out))
    gradients = [
        kernel.backward(rows, k, v, pattern, query_start=query_start, key_start=start, dtype=dtype)
        for k, v, start in pieces
    ]
    grad_q, grad_k, grad_v = zip(*gradients, strict=True)
    total = torch.stack(grad_q).double().sum(0) if parts > 1 else grad_q[0]
    return out, lse, *(x.to(q.dtype) for x in (total, torch.cat(grad_k, 2), torch.cat(grad_v, 2)))


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over all keys from those over parts of them, float64."""
    outs, lses = (torch.stack(x).double() for x in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    return ((lses - lse).exp() * outs).sum(0), lse


def exact_results(problem: Problem) -> tuple[Tensor, ...]:
    """`QUANTITIES` in float64, one key head at a time, gradients by autograd."""
    q, k, v, grad_out = (x.double() for x in (problem.q, problem.k, problem.v, problem.grad_out))
    group, slopes = q.shape[1] // k.shape[1], problem.pattern.slopes
    found = []
    for head in range(k.shape[1]):
        members = slice(head * group, (head + 1) * group)
        pattern = replace(problem.pattern, slopes=None if slopes is None else slopes[members].double())
        leaves = [x.clone().requires_grad_() for x in (q[:, members], k[:, [head]], v[:, [head]])]
        out, lse = _exact(leaves[0], leaves[1], leaves[2], pattern)
        found.append((out, lse, *torch.autograd.grad(out, leaves, grad_out[:, members])))
    return tuple(torch.cat([x.detach() for x in parts], dim=1) for parts in zip(*found, strict=True))


def _exact(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The formula for G query heads of one key head: [B, G, Q, D] and [B, G, Q, 1]."""
    keys = torch.arange(k.shape[2], device=q.device)
    rows = keys[len(keys) - q.shape[2] :].unsqueeze(1)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if pattern.slopes is not None:
        scores = scores + pattern.slopes.view(-1, 1, 1) * (keys - rows)
    hidden = (keys > rows).expand(1, 1, -1, -1)
    if pattern.documents is not None:
        starts = pattern.documents.starts[:, len(keys) - q.shape[2] :]
        hidden = hidden | (keys < starts.unsqueeze(-1)).unsqueeze(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)
