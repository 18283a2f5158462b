"""No operation has second derivatives: whoever asks for one gets an error, never a number without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_b2.config.schema import OpsConfig
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.bundle import Ops, load_ops
from megatron_b2.ops.registry import BACKENDS, Choice
from megatron_b2.parallel.context_parallel import ContextParallel
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.kernels.interpreter import run_interpreted


def answered(function: Callable[..., Any], *inputs: Tensor) -> str:
    """How a request for a second derivative by the inputs ends; empty if it is refused."""
    leaves = [x.requires_grad_() for x in inputs]
    out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else [x for x in out if x.requires_grad]
    total = torch.stack([x.square().sum() for x in outputs]).sum()
    gradients = torch.autograd.grad(total, leaves, create_graph=True)
    try:
        torch.stack([x.square().sum() for x in gradients]).sum().backward()
    except RuntimeError as error:
        return "" if "once_differentiable" in str(error) else str(error)
    return "with numbers"


def of_every_operation(ops: Ops) -> dict[str, str]:
    rows, labels = torch.randn(1, 6, 16), torch.tensor([3, -100, 1, 0])
    cos, sin = torch.rand(2, 1, 6, 4).unbind(0)
    qkv = [torch.randn(1, 6, 2, 8) for _ in range(3)]
    return {
        "rms_norm": answered(lambda x, w: ops.rms_norm(x, w, eps=1e-6), rows, torch.randn(16)),
        "add_rms_norm": answered(
            lambda x, y, w: ops.add_rms_norm(x, y, w, eps=1e-6), rows.clone(), rows.flip(1), torch.randn(16)
        ),
        "swiglu": answered(ops.swiglu, rows.clone()),
        "rope_split": answered(lambda x: ops.rope_split(x, cos, sin), torch.randn(1, 6, 3, 2, 8)),
        "causal_attention": answered(
            lambda q, k, v: ops.causal_attention(q, k, v, alibi_slopes=alibi_slopes(2)), *qkv
        ),
        "norm_head_loss": answered(
            lambda x, w: ops.norm_head_loss(x, w, labels, ce_scale=0.3, z_scale=0.1),
            torch.randn(4, 16),
            torch.randn(9, 16),
        ),
    }


def test_triton_has_none() -> None:
    choices = [Choice(op, "triton", "") for op, backends in BACKENDS.items() if "triton" in backends]

    def found() -> list[dict[str, str]]:
        configs = OpsConfig(head_gradient="backward"), OpsConfig(head_gradient="forward")
        return [of_every_operation(load_ops(choices, config)) for config in configs]

    for each in run_interpreted(found):
        assert set(each.values()) == {""}


def test_the_references_have_none() -> None:
    assert set(of_every_operation(Ops()).values()) == {""}


def over_the_ring() -> str:
    context = ContextParallel(2, dist.get_rank(), dist.group.WORLD, "ring")
    qkv = [torch.randn(1, 6, 2, 8) for _ in range(3)]
    return answered(
        lambda q, k, v: Ops().context_attention(
            q, k, v, context=context, alibi_slopes=alibi_slopes(2), documents=None
        ),
        *qkv,
    )


def test_the_ring_has_none() -> None:
    assert run_ranks(2, over_the_ring) == ["", ""]
