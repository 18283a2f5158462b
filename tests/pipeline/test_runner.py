"""Every schedule on forked ranks against one process: the same bits."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_b2.errors import ConfigError
from megatron_b2.pipeline.runner import PipelineRunner
from megatron_b2.testing.fork import run_ranks
from tests.parallel.trail import Trail
from tests.pipeline.toy import LAYERS, SHAPE, Stage, bounds, gradients, micro_batches, one_process

CASES = [
    ("gpipe", 1, 1),
    ("zero_bubble", 1, 1),
    ("gpipe", 2, 1),
    ("1f1b", 2, 1),
    ("zero_bubble", 2, 1),
    ("interleaved", 2, 2),
    ("interleaved", 2, 4),
    ("gpipe", 4, 1),
    ("1f1b", 4, 1),
    ("zero_bubble", 4, 1),
    ("interleaved", 4, 2),
]


def make_runner(schedule: str, num_ranks: int, num_chunks: int, **options: bool) -> PipelineRunner:
    return PipelineRunner(
        schedule=schedule,
        rank=dist.get_rank() if num_ranks > 1 else 0,
        num_ranks=num_ranks,
        num_chunks=num_chunks,
        group=dist.group.WORLD if num_ranks > 1 else None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        **options,
    )


class Rank:
    """This rank's stages of the toy model as the runner's callable."""

    def __init__(
        self,
        num_ranks: int,
        num_chunks: int,
        num_micro: int,
        *,
        shared: bool = False,
        pipeline_rank: int | None = None,
    ) -> None:
        rank = (dist.get_rank() if num_ranks > 1 else 0) if pipeline_rank is None else pipeline_rank
        everything = bounds(num_ranks * num_chunks)
        self.stages = [Stage(*everything[c * num_ranks + rank], shared=shared) for c in range(num_chunks)]
        self.micro = micro_batches(num_micro)

    def __call__(self, chunk: int, micro: int, x: Tensor | None) -> Tensor:
        ids, labels = self.micro[micro]
        assert (x is None) == self.stages[chunk].first
        return self.stages[chunk](ids if x is None else x, labels)


def train(schedule: str, num_ranks: int, num_chunks: int, num_micro: int, shared: bool, split: bool):
    runner = make_runner(schedule, num_ranks, num_chunks, split_backward=split)
    rank = Rank(num_ranks, num_chunks, num_micro, shared=shared)
    evaluated = runner.run_forward(rank, num_micro=3, shape=SHAPE)
    calls: list[tuple[int, int]] = []
    losses = runner.run(
        rank, num_micro=num_micro, shape=SHAPE, after_backward=lambda *place: calls.append(place)
    )
    assert sorted(calls) == [(c, m) for c in range(num_chunks) for m in range(num_micro)]
    return evaluated, losses, gradients(rank.stages)


def check(results, num_micro: int, shared: bool = False) -> None:
    losses, expected = one_process(num_micro, shared=shared)
    merged: dict[str, Tensor] = {}
    for _, _, found in results:
        assert not merged.keys() & found.keys()
        merged |= found
    assert merged.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(merged[name], gradient), name
    *others, (evaluated, last_losses, _) = results
    assert all(torch.equal(a, b) for a, b in zip(last_losses, losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(evaluated, losses[:3], strict=True))
    assert all(not evaluated and not last for evaluated, last, _ in others)


@pytest.mark.parametrize("num_micro", [4, 8])
@pytest.mark.parametrize(("schedule", "num_ranks", "num_chunks"), CASES)
def test_loss_and_every_gradient_are_the_bits_of_one_process(
    schedule: str, num_ranks: int, num_chunks: int, num_micro: int
) -> None:
    arguments = (schedule, num_ranks, num_chunks, num_micro, False, True)
    results = [train(*arguments)] if num_ranks == 1 else run_ranks(num_ranks, train, *arguments)
    check(results, num_micro)


@pytest.mark.parametrize("split", [True, False])
def test_zero_bubble_with_a_parameter_used_twice_and_without_split(split: bool) -> None:
    check(run_ranks(2, train, "zero_bubble", 2, 1, 5, split, split), 5, shared=split)


@pytest.mark.parametrize(("schedule", "num_chunks"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
@pytest.mark.parametrize("channels", [1, 2])
def test_pipelines_in_groups_and_with_one_or_two_ordered_channels(
    schedule: str, num_chunks: int, channels: int
) -> None:
    """Two pipelines of ranks (0, 2) and (1, 3), as with data parallelism; channels as NCCL has them."""

    def run():
        groups = [[dist.new_group([first, first + 2]) for first in (0, 1)] for _ in range(2)]
        first, second = (pair[dist.get_rank() % 2] for pair in groups)
        pipeline_rank = dist.get_rank() // 2
        runner = PipelineRunner(
            schedule=schedule,
            rank=pipeline_rank,
            num_ranks=2,
            num_chunks=num_chunks,
            group=first,
            gradient_group=second if channels == 2 else None,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        runner._channels = channels
        rank = Rank(2, num_chunks, 8, pipeline_rank=pipeline_rank)
        evaluated = runner.run_forward(rank, num_micro=3, shape=SHAPE)
        return evaluated, runner.run(rank, num_micro=8, shape=SHAPE), gradients(rank.stages)

    results = run_ranks(4, run)
    check(results[0::2], 8)
    check(results[1::2], 8)


def test_a_step_after_another_and_number_of_micro_batches_may_differ() -> None:
    def steps():
        runner, rank = make_runner("1f1b", 2, 1), Rank(2, 1, 7)
        return [float(sum(runner.run(rank, num_micro=n, shape=SHAPE))) for n in (2, 7, 3)]

    _, last = run_ranks(2, steps)
    losses, _ = one_process(7)
    assert last == [float(sum(losses[:n])) for n in (2, 7, 3)]


def test_sends_do_not_wait_for_a_slow_rank() -> None:
    """Rank 0 does its warm-up of GPipe, 4 MB an activation, while rank 1 still sleeps in its first forward."""
    shape = (1, 1024, 1024)

    def run():
        seen = []

        def forward(chunk: int, micro: int, x: Tensor | None) -> Tensor:
            seen.append(time.monotonic())
            if x is None:
                return torch.ones(shape, requires_grad=True) * micro
            if micro == 0:
                time.sleep(1.0)
                seen.append(time.monotonic())
            assert bool((x == micro).all())
            return x.sum()

        make_runner("gpipe", 2, 1).run(forward, num_micro=6, shape=shape)
        return seen

    first, second = run_ranks(2, run)
    assert first[-1] < second[1]


def test_receives_are_there_before_they_are_needed() -> None:
    """While rank 1 sleeps in forward 0, activations 1 and 2 arrive: it gets them without waiting."""
    shape = (1, 1024, 1024)

    def run():
        runner = make_runner("gpipe", 2, 1)
        waited = []

        def forward(chunk: int, micro: int, x: Tensor | None) -> Tensor:
            waited.append(time.monotonic())
            if x is None:
                return torch.ones(shape, requires_grad=True) * micro
            if micro == 0:
                time.sleep(1.0)
            waited.append(time.monotonic())
            return x.sum()

        runner.run(forward, num_micro=4, shape=shape)
        return waited

    _, times = run_ranks(2, run)
    assert times[2] - times[1] < 0.5


def test_breadcrumbs_name_what_a_rank_computes_and_whom_it_waits_for() -> None:
    """In the second of two pipelines, so that pipeline ranks 0 and 1 are global ranks 1 and 3."""

    def run():
        groups = [dist.new_group([first, first + 2]) for first in (0, 1)]
        trail = Trail()
        runner = PipelineRunner(
            schedule="1f1b",
            rank=dist.get_rank() // 2,
            num_ranks=2,
            group=groups[dist.get_rank() % 2],
            dtype=torch.float32,
            device=torch.device("cpu"),
            crumbs=trail,
        )
        rank = Rank(2, 1, 2, pipeline_rank=dist.get_rank() // 2)
        runner.run(rank, num_micro=2, shape=SHAPE)
        assert trail.current.operation == "starting"
        return trail.seen

    _, first, _, second = run_ranks(4, run)
    assert first == [
        ("forward of stage 0", 0, ()),
        ("forward of stage 0", 1, ()),
        ("receive gradient for stage 0", 0, (3,)),
        ("send activation for stage 1", 0, (3,)),
        ("backward of stage 0", 0, ()),
        ("receive gradient for stage 0", 1, (3,)),
        ("send activation for stage 1", 1, (3,)),
        ("backward of stage 0", 1, ()),
    ]
    assert second == [
        ("receive activation for stage 1", 0, (1,)),
        ("forward of stage 1", 0, ()),
        ("backward of stage 1", 0, ()),
        ("receive activation for stage 1", 1, (1,)),
        ("forward of stage 1", 1, ()),
        ("backward of stage 1", 1, ()),
        ("send gradient for stage 0", 0, (1,)),
        ("send gradient for stage 0", 1, (1,)),
    ]


def test_ranks_with_different_settings_refuse_to_start() -> None:
    def run():
        with pytest.raises(ConfigError, match=r"pipeline rank 1 has .*'gpipe'.* rank 0 has .*'1f1b'"):
            make_runner("gpipe" if dist.get_rank() else "1f1b", 2, 1)

    run_ranks(2, run)


def test_an_activation_of_another_shape_is_refused() -> None:
    def run():
        rank = Rank(2, 1, 2)
        if dist.get_rank() == 0:
            with pytest.raises(
                ValueError, match=r"activation of micro-batch 0 .* \[2, 6, 8\].* told .* \[2, 6, 9\]"
            ):
                make_runner("1f1b", 2, 1).run(rank, num_micro=2, shape=(2, 6, 9))
        else:
            make_runner("1f1b", 2, 1)

    run_ranks(2, run)


def test_layers_divide_into_the_stages_used_here() -> None:
    assert all(LAYERS % (ranks * chunks) == 0 for _, ranks, chunks in CASES)
