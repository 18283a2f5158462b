"""Norm gradients of sequence shards are summed in fp32, whatever the parameters are in."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_b2.engine.deepspeed import reduce_sequence_gradients
from megatron_b2.parallel.tensor_parallel import TensorParallel
from megatron_b2.testing.fork import run_ranks

RANKS, SIZE = 4, 64


class Norm(nn.Module):
    """A parameter that no rank splits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.final_norm = nn.Module()
        self.final_norm.weight = nn.Parameter(torch.zeros(SIZE, dtype=dtype))


def share(rank: int) -> Tensor:
    """One rank has 256, the others 1: bf16 keeps 256 and loses each 1 that is added to it."""
    return torch.where(torch.arange(SIZE) % RANKS == rank, 256.0, 1.0)


def gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    module, given = Norm(dtype), share(rank).to(dtype)
    group = dist.group.WORLD
    reduce_sequence_gradients(module, TensorParallel(RANKS, rank, group, sequence_parallel=True))
    weight = module.final_norm.weight
    weight.backward(given)
    assert weight.grad is not None
    return weight.grad, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_fp32(dtype: torch.dtype) -> None:
    expected = torch.full((SIZE,), 256.0 + RANKS - 1).to(dtype)
    for rank, (found, given) in enumerate(run_ranks(RANKS, gradients, dtype)):
        assert found.dtype == dtype
        assert torch.equal(found, expected), found
        assert torch.equal(given, share(rank).to(dtype)), "the hook changed what autograd gave it"
