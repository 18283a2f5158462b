"""What a GPU is timed on: every operation by every implementation, with the least it must move and compute.

Bytes and operations are lower bounds of the operation, not of an implementation: inputs read once, outputs
written once, products of the unmasked half in causal attention, 2.5 times the forward pass in its backward
pass (Dao 2023) and 6 T H V in head and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.registry import BACKENDS, unavailable

Direction = Literal["forward", "backward"]
EPS: Final = 1e-6
PEERS: Final = ("liger_kernel", "flash_attn")
"""Packages that are timed beside ours where they are installed."""


@dataclass(frozen=True)
class Sizes:
    """One rank's share of one layer and of the head."""

    name: str
    tokens: int
    hidden: int
    ffn: int
    """Of this rank."""
    heads: int
    """Of this rank."""
    head_dim: int
    vocab: int
    """Rows of this rank."""
    alibi: bool
    dtype: torch.dtype = torch.bfloat16


MODELS: Final = (
    Sizes("7B TP 1", 4_096, 4_096, 11_008, 32, 128, 125_696, alibi=False),
    Sizes("7B TP 8", 4_096, 4_096, 1_376, 4, 128, 15_712, alibi=False),
    Sizes("13B TP 1", 4_096, 5_120, 13_696, 40, 128, 125_696, alibi=True),
    Sizes("13B TP 8", 4_096, 5_120, 1_712, 5, 128, 15_712, alibi=True),
)


_REGISTERED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "add_rms_norm": "rms_norm",
        "swiglu": "swiglu",
        "rope_split": "rope",
        "causal_attention": "attention",
        "norm_head_loss": "head_loss",
    }
)
"""Function to its name in the registry, which is also its module."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one operation on a device, and what it must do at least."""

    op: str
    inputs: tuple[Tensor, ...]
    """Those with gradients are differentiated."""
    forward_bytes: float
    backward_bytes: float
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    alibi: Tensor | None = None


@dataclass(frozen=True)
class Workload:
    """One implementation of one operation."""

    op: str
    implementation: str
    """triton, cuda, torch or the name of a package."""
    call: Callable[[], Tensor | Sequence[Tensor]]
    """The forward pass."""
    problem: Problem

    def backward(self) -> Callable[[], object]:
        """The backward pass of one forward pass, as often as wanted."""
        outputs = self.call()
        outputs = [outputs] if isinstance(outputs, Tensor) else [out for out in outputs if out.requires_grad]
        gradients = [torch.ones_like(out) for out in outputs]
        wanted = [x for x in self.problem.inputs if x.requires_grad]
        return partial(torch.autograd.grad, outputs, wanted, gradients, retain_graph=True, allow_unused=True)


def problems(sizes: Sizes, device: torch.device) -> Iterator[Problem]:
    """Every operation that a model of these sizes runs; inputs are made when asked for, one at a time."""
    tokens, hidden, heads, width = sizes.tokens, sizes.hidden, sizes.heads, sizes.head_dim
    item = sizes.dtype.itemsize

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, dtype=sizes.dtype, device=device)
        return x.mul_(scale).requires_grad_()

    row = tokens * hidden * item
    yield Problem(
        "add_rms_norm",
        (normal(1, tokens, hidden), normal(1, tokens, hidden), normal(hidden)),
        4 * row,
        4 * row,
    )
    part = tokens * sizes.ffn * item
    yield Problem("swiglu", (normal(1, tokens, 2 * sizes.ffn),), 3 * part, 5 * part)
    part = tokens * heads * width * item
    slopes = None
    if sizes.alibi:
        slopes = alibi_slopes(hidden // width)[:heads].to(device)  # of the whole model: see alibi.py
    else:
        angles = torch.rand(1, tokens, width // 2, device=device)
        qkv = normal(1, tokens, 3, heads, width)
        yield Problem("rope_split", (qkv, angles.cos(), angles.sin()), 4 * part, 6 * part)
    flops = 2.0 * tokens * tokens * heads * width
    inputs = tuple(normal(1, tokens, heads, width) for _ in range(3))
    yield Problem("causal_attention", inputs, 4 * part, 8 * part, flops, 2.5 * flops, slopes)
    weight = normal(sizes.vocab, hidden, scale=0.02)
    labels = torch.randint(0, sizes.vocab, (tokens,), device=device)
    flops = 2.0 * tokens * hidden * sizes.vocab
    read = (tokens + sizes.vocab) * hidden * item
    yield Problem(
        "norm_head_loss", (normal(tokens, hidden), weight, labels), read, 2 * read, flops, 2 * flops
    )


def workloads(problem: Problem) -> Iterator[Workload]:
    """Every implementation of an operation that can run here; torch's is the reference operation."""
    device = problem.inputs[0].device
    name = _REGISTERED[problem.op]
    for backend in BACKENDS[name]:
        if not unavailable(name, backend, device=device):
            folder, implementation = (".", "torch") if backend == "reference" else (f".{backend}.", backend)
            function = getattr(import_module(f"megatron_b2.ops{folder}{name}"), problem.op)
            yield Workload(problem.op, implementation, _ours(function, problem), problem)
    if problem.op == "causal_attention":
        yield Workload(problem.op, "torch sdpa", partial(_torch_attention, problem), problem)
    for peer in PEERS:
        call = _PEER_CALLS.get((peer, problem.op)) if find_spec(peer) is not None else None
        if call is not None:
            yield Workload(problem.op, peer, partial(call, problem), problem)


def _ours(function: Callable[..., Any], problem: Problem) -> Callable[[], Any]:
    if problem.op == "add_rms_norm":
        return partial(function, *problem.inputs, eps=EPS)
    if problem.op == "causal_attention":
        return partial(function, *problem.inputs, alibi_slopes=problem.alibi)
    if problem.op == "norm_head_loss":
        scale = 1.0 / len(problem.inputs[0])
        return lambda: function(*problem.inputs, ce_scale=scale, z_scale=2e-4 * scale).total
    return partial(function, *problem.inputs)


def _liger_add_rms_norm(problem: Problem) -> Any:
    function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return function.apply(*problem.inputs, EPS, 0.0, "llama", False)


def _liger_swiglu(problem: Problem) -> Any:
    function = import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction
    # Its backward pass returns two dimensions for any input.
    return function.apply(problem.inputs[0].flatten(0, 1))


def _liger_rope(problem: Problem) -> Any:
    function = import_module("liger_kernel.ops.rope").LigerRopeFunction
    qkv, cos, sin = problem.inputs
    q, k, _ = (x.transpose(1, 2) for x in qkv.unbind(2))
    return function.apply(q, k, torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))


def _liger_head(problem: Problem) -> Any:
    """Plain head and cross-entropy: Liger has neither NormHead nor max-z."""
    module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    hidden, weight, labels = problem.inputs
    return module.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]


def _flash_attention(problem: Problem) -> Any:
    return import_module("flash_attn").flash_attn_func(
        *problem.inputs, causal=True, alibi_slopes=problem.alibi
    )


def _torch_attention(problem: Problem) -> Tensor:
    """torch's fused attention; under ALiBi with a bias in memory, as it has no other way."""
    q, k, v = (x.transpose(1, 2) for x in problem.inputs)
    if problem.alibi is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    positions = torch.arange(q.shape[2], device=q.device)
    distance = positions.unsqueeze(0) - positions.unsqueeze(1)
    bias = (problem.alibi.view(-1, 1, 1) * distance).masked_fill(distance > 0, -torch.inf).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


_PEER_CALLS: Final[Mapping[tuple[str, str], Callable[[Problem], Any]]] = MappingProxyType(
    {
        ("liger_kernel", "add_rms_norm"): _liger_add_rms_norm,
        ("liger_kernel", "swiglu"): _liger_swiglu,
        ("liger_kernel", "rope_split"): _liger_rope,
        ("liger_kernel", "norm_head_loss"): _liger_head,
        ("flash_attn", "causal_attention"): _flash_attention,
    }
)
