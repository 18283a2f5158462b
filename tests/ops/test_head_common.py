"""Statistics of logits merged over parts and ranks, against torch on the whole; scales of the gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_b2.ops.head_common import PARTS, Statistics, merge, parts_of_rank, unit_scales
from megatron_b2.ops.head_loss import norm_head_loss
from megatron_b2.parallel.tensor_parallel import TensorParallel
from megatron_b2.testing.fork import run_ranks

CPU = torch.device("cpu")


def statistics(logits: Tensor, labels: Tensor, first_id: int) -> Tensor:
    """Table of one set of columns, by torch."""
    top, index = logits.max(dim=1)
    total = (logits - top.unsqueeze(1)).exp().sum(dim=1)
    local = labels - first_id
    is_here = (local >= 0) & (local < logits.shape[1])
    target = logits.gather(1, local.where(is_here, 0).unsqueeze(1)).squeeze(1) * is_here
    return torch.stack([top, total, index + first_id, target], dim=1).float()


@settings(max_examples=60, deadline=None)
@given(
    sets=st.integers(1, 9),
    width=st.integers(1, 6),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
)
def test_merged_sets_are_the_statistics_of_all_columns(
    sets: int, width: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(7, sets * width, generator=generator)).round(decimals=1).double()
    labels = torch.randint(0, sets * width, (7,), generator=generator)
    tables = [statistics(part, labels, i * width) for i, part in enumerate(logits.split(width, dim=1))]
    merged = merge(torch.stack(tables))
    assert torch.equal(merged.top, logits.amax(dim=1).float())
    assert torch.equal(merged.top_index, logits.argmax(dim=1))  # scale 0: every column ties
    assert torch.equal(merged.target_logit, logits.gather(1, labels.unsqueeze(1)).squeeze(1).float())
    torch.testing.assert_close(merged.lse, logits.logsumexp(dim=1).float(), rtol=1e-6, atol=1e-6)
    counted = labels % 2 == 0
    ce, max_z = merged.sums(counted)
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ce, exact[counted].sum().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(max_z, logits.amax(dim=1).square().sum().float())


def test_sets_without_columns_add_nothing_and_nan_stays() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    empty, whole = Statistics.empty(5, CPU).table, statistics(logits, labels, 0)
    for tables in ([empty, empty, whole], [whole, empty], [empty, whole, empty, empty]):
        assert torch.equal(merge(torch.stack(tables)).table, whole)
    assert torch.equal(merge(torch.stack([empty, empty])).table, empty)
    broken = whole.clone()
    broken[2, 1] = torch.nan
    assert merge(torch.stack([broken, whole])).lse.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_that_merge_their_own_parts_first_have_the_same_bits(ranks: int) -> None:
    logits = 5 * torch.randn(200, 8 * 11, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % 88
    tables = torch.stack([statistics(part, labels, 11 * i) for i, part in enumerate(logits.split(11, dim=1))])
    assert parts_of_rank(ranks) * ranks == PARTS
    local = [merge(part).table for part in tables.split(parts_of_rank(ranks))]
    assert torch.equal(merge(torch.stack(local)).table, merge(tables).table)


def test_other_numbers_of_ranks_have_no_more_than_all_parts() -> None:
    assert [parts_of_rank(ranks) for ranks in (1, 3, 5, 6, 8, 16)] == [8, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("ce", "z"), [(0.3, 0.02), (2.0**-30, 2.0**-40), (0.0, 0.7), (1.0, 0.0), (0.0, 0.0)])
def test_unit_is_a_power_of_two_and_gives_the_scales_back(ce: float, z: float) -> None:
    unit, scales = unit_scales(torch.tensor(ce), torch.tensor(z))
    assert torch.frexp(unit).mantissa == 0.5
    assert torch.equal(unit * scales, torch.tensor([ce, 2 * z]))
    assert scales.abs().max() <= 1
    assert scales.abs().max() >= 0.5 or ce == z == 0


def reference_shard(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Sums, part of the gradient of hidden and gradient of this rank's rows, by the torch reference."""
    rank, size = dist.get_rank(), dist.get_world_size()
    leaves = [hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()]
    tensor = TensorParallel(size=size, rank=rank, group=dist.group.WORLD if size > 1 else None)
    loss = norm_head_loss(*leaves, labels, ce_scale=0.3, z_scale=0.1, tensor=tensor)
    loss.total.backward()
    return [torch.stack(loss).detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_reference_over_ranks_equals_one_process() -> None:
    """Three ranks: a tree with a set that has no neighbour."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*size, generator=generator) for size in ((31, 16), (120, 16)))
    labels = torch.arange(31) * 4 % 120
    labels[::7] = -100
    (alone,) = run_ranks(1, reference_shard, hidden, weight, labels)
    for ranks in (2, 3, 4):
        parts = run_ranks(ranks, reference_shard, hidden, weight, labels)
        assert all(torch.equal(part[0], parts[0][0]) for part in parts)
        torch.testing.assert_close(parts[0][0], alone[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(sum(part[1] for part in parts), alone[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), alone[2], rtol=1e-5, atol=1e-6)
