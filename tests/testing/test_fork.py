"""The fork harness itself: results, failures, hangs and deaths of ranks."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_b2.testing.fork import run_ranks


def test_results_come_in_rank_order_and_collectives_work() -> None:
    def body(offset: int) -> tuple[int, float, str]:
        total = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(total)
        return dist.get_rank(), total.item(), os.environ["WORLD_SIZE"]

    assert run_ranks(4, body, 10) == [(rank, 46.0, "4") for rank in range(4)]


def test_backward_works_after_the_parent_ran_backward() -> None:
    """Autograd threads of the parent must not break the children."""
    torch.ones(64, 64, requires_grad=True).square().sum().backward()

    def body() -> torch.Tensor:
        x = torch.full((3,), 2.0, requires_grad=True)
        x.square().sum().backward()
        assert x.grad is not None
        return x.grad

    for grad in run_ranks(2, body):
        assert grad.tolist() == [4.0, 4.0, 4.0]


def test_traceback_of_the_failing_rank_is_shown_and_nobody_hangs() -> None:
    def body() -> None:
        if dist.get_rank() == 1:
            raise ValueError("the cause")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed first.*the cause"):
        run_ranks(2, body)
    assert time.monotonic() - start < 5


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 of 1 .*\ndied without a report .exit code 7"):
        run_ranks(1, lambda: os._exit(7))


def test_a_hang_is_killed_and_named() -> None:
    with pytest.raises(AssertionError, match=r"ranks 1 of 2 did not finish in 0\.5 s"):
        run_ranks(2, lambda: time.sleep(60) if dist.get_rank() == 1 else None, timeout=0.5)
