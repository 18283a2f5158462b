"""Differentiable collectives of tensor and sequence parallelism: whole (Megatron-LM's f, g) and by sequence.

Each pairs a forward with the backward that makes the gradient of the whole computation right when every rank
of the group holds the same loss. Shapes: B batch, S sequence, h hidden; the sequence is dimension 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, S, ...] of every rank to [B, n S, ...] in rank order."""
    size = dist.get_world_size(group)
    sequence_first = x.transpose(0, 1).contiguous()
    out = x.new_empty(size * sequence_first.shape[0], *sequence_first.shape[1:])
    dist.all_gather_single(out, sequence_first, group=group)
    return out.transpose(0, 1)


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of [B, n S, ...] over the ranks; this rank's [B, S, ...]."""
    size = dist.get_world_size(group)
    sequence_first = x.transpose(0, 1).contiguous()
    out = x.new_empty(sequence_first.shape[0] // size, *sequence_first.shape[1:])
    dist.reduce_scatter_single(out, sequence_first, group=group)
    return out.transpose(0, 1)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """x as it is; its gradient is summed over the group."""
    result: Tensor = _Copy.apply(x, group)
    return result


def reduce_from_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of x over the group; its gradient is passed on as it is."""
    result: Tensor = _Reduce.apply(x, group)
    return result


def all_gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, S, h] of each rank to the whole [B, n S, h]; its gradient is reduce-scattered."""
    result: Tensor = _AllGatherSequence.apply(x, group)
    return result


def reduce_scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of [B, n S, h] over the ranks, this rank's [B, S, h]; its gradient is all-gathered."""
    result: Tensor = _ReduceScatterSequence.apply(x, group)
    return result
