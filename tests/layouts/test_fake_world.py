"""1,024 ranks in one process: a rank of a fake process group calls exactly what the formulas count.

Nothing is sent, so values mean nothing here; tests/layouts/test_traffic.py counts on real ranks, few of them.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_b2.config import RunConfig
from megatron_b2.config.checks import check
from megatron_b2.engine.deepspeed import model_split, reduce_sequence_gradients
from megatron_b2.layouts.report import layout_report
from megatron_b2.layouts.traffic import Traffic, micro_batch_traffic
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.split import StageLayers
from megatron_b2.ops.head_loss import HeadLoss
from megatron_b2.parallel.breadcrumbs import Breadcrumbs
from megatron_b2.parallel.groups import ParallelGroups
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.partition import stage_layers
from tests.layouts.support import Calls, small_config

WORLD = 1_024
Counts = dict[tuple[str, str], int]


def in_fake_world(rank: int, fn: Callable[..., Any], *args: Any) -> Any:
    """Call `fn(*args)` as `rank` of WORLD in a forked child, so that this process stays without groups."""

    def child(pipe: Connection) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
        pipe.send(fn(*args))

    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise AssertionError("the fake rank failed: its traceback is above") from None
    finally:
        process.join()


def world_config(*, num_layers: int = 4, recompute: str = "none", **parallel: Any) -> RunConfig:
    """`small_config` with heads for 8 tensor-parallel ranks and a batch for 1,024 ranks."""
    config = small_config(num_layers=num_layers, recompute=recompute, **parallel)
    config = replace(
        config,
        model=replace(config.model, num_heads=16),
        train=replace(config.train, global_batch_size=WORLD),
    )
    check(config, world_size=WORLD)
    return config


def parts_of(config: RunConfig) -> tuple[StageLayers, ...]:
    if config.parallel.pipeline == 1:
        return (StageLayers.whole(config.model.num_layers),)
    return tuple(stage_layers(config.model, config.parallel.pipeline))


def calls(configs: Sequence[RunConfig]) -> list[list[tuple[Counts, Counts]]]:
    """What this rank calls in the forward and in the backward of a micro-batch, as the engine builds it.

    For every configuration (all of one layout) and for every pipeline stage that the rank might hold.
    """
    layout = Layout.of(configs[0].parallel, world_size=WORLD)
    groups = ParallelGroups.create(layout, timeout=timedelta(seconds=60))
    return [[stage_calls(config, groups, part) for part in parts_of(config)] for config in configs]


def stage_calls(config: RunConfig, groups: ParallelGroups, part: StageLayers) -> tuple[Counts, Counts]:
    split = model_split(config, groups, crumbs=Breadcrumbs())
    model = BaichuanModel(config.model, split=split, stage=part, recompute=config.train.recompute)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    if split.tensor.sequence_parallel:
        reduce_sequence_gradients(model, split.tensor)
    batch, length = config.train.micro_batch_size, config.data.seq_len // split.context.size
    ids = torch.ones(batch, length, dtype=torch.int64)
    shard = length // (split.tensor.size if split.tensor.sequence_parallel else 1)
    hidden = torch.ones(batch, shard, config.model.hidden_size, requires_grad=True)
    with Calls() as forward:
        out = model(ids if part.has_embedding else hidden, ids)
    with Calls() as backward:
        (out.total if isinstance(out, HeadLoss) else out.sum()).backward()
    return forward.by_operation(), backward.by_operation()


def busiest(config: RunConfig) -> int:
    """A rank in the middle of everything: of a ring the one before the last, which sends most."""
    layout = Layout.of(config.parallel, world_size=WORLD)
    return layout.rank_of(
        tp=layout.tensor // 2, cp=max(0, layout.context - 2), dp=layout.data // 2 - 1, pp=layout.pipeline - 1
    )


def summed(items: list[Traffic]) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for item in items:
        total[item.operation, "count"] += item.count
        total[item.operation, "bytes"] += item.bytes
    return total


LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 8},
    {"tensor": 8, "sequence_parallel": True},
    {"tensor": 8, "context": 2, "sequence_parallel": True, "context_method": "ulysses"},
    {"tensor": 8, "context": 4, "sequence_parallel": True, "context_method": "ring"},
    {"tensor": 2, "context": 8, "context_method": "ulysses"},
    {"context": 16, "context_method": "ring"},
    {"tensor": 8, "context": 2, "pipeline": 4, "sequence_parallel": True},
    {"tensor": 8, "pipeline": 2, "sequence_parallel": True},
]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_a_rank_of_1024_calls_what_is_counted(sizes: dict[str, Any]) -> None:
    configs = [world_config(recompute=recompute, **sizes) for recompute in ("none", "selective", "full")]
    layout = Layout.of(configs[0].parallel, world_size=WORLD)
    found = in_fake_world(busiest(configs[0]), calls, configs)
    for config, stages in zip(configs, found, strict=True):
        for part, (forward, backward) in zip(parts_of(config), stages, strict=True):
            expected = summed(micro_batch_traffic(config, layout, part))
            assert Counter(forward) + Counter(backward) == expected, (config.train.recompute, part)


def test_the_report_counts_a_step_of_all_micro_batches() -> None:
    config = world_config(tensor=8, context=2, sequence_parallel=True, context_method="ulysses")
    report = layout_report(config, world_size=WORLD)
    [[(forward, backward)]] = in_fake_world(busiest(config), calls, [config])
    micro_batch = Counter(forward) + Counter(backward)
    of_model = summed([item for item in report.positions[0].traffic if item.group in ("tp", "cp")])
    assert of_model == {key: report.num_micro * value for key, value in micro_batch.items()}


EACH_WAY: list[tuple[dict[str, Any], dict[str, int], dict[str, int]]] = [
    ({"tensor": 8}, {"all_reduce": 2}, {"all_reduce": 2}),
    (
        {"tensor": 8, "sequence_parallel": True},
        {"all_gather": 2, "reduce_scatter": 2},
        # The two all-reduces are those of the norms' gradients, h elements each.
        {"all_gather": 2, "reduce_scatter": 2, "all_reduce": 2},
    ),
    ({"context": 8, "context_method": "ulysses"}, {"all_to_all": 2}, {"all_to_all": 2}),
    ({"context": 8, "context_method": "ring"}, {"send": 7}, {"send": 14}),
]


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"), EACH_WAY, ids=[str(sizes) for sizes, _, _ in EACH_WAY]
)
def test_one_more_block_calls_the_closed_form(
    sizes: dict[str, Any], forward: dict[str, int], backward: dict[str, int]
) -> None:
    configs = [world_config(num_layers=num_layers, **sizes) for num_layers in (1, 2)]
    [[one], [two]] = in_fake_world(busiest(configs[0]), calls, configs)
    for less, more, expected in zip(one, two, (forward, backward), strict=True):
        grown = Counter(more) - Counter(less)
        assert {name: count for (name, kind), count in grown.items() if kind == "count"} == expected
