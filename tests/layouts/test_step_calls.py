"""Every call of a whole optimizer step, as the trainer makes it on real ranks, is one that the report counts.

Counted is at torch's dispatcher: DeepSpeed's calls, the engine's, the pipeline's and the trainer's alike. The
fourth step, since DeepSpeed learns in the first ones in which order ZeRO-3 needs the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_b2.config import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.engine.base import Engine
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.engine.deepspeed import DeepSpeedEngine
from megatron_b2.layouts.report import step_traffic
from megatron_b2.layouts.stages import rank_parts
from megatron_b2.parallel.comm import ProcessGroupComm
from megatron_b2.parallel.layout import Layout
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training.events import Callback, RunState, StepEvent
from megatron_b2.training.signals import StopSignals
from megatron_b2.training.trainer import Trainer
from tests.layouts.support import Calls, small_config

COUNTED = 4
Counts = dict[tuple[str, str], tuple[int, int]]
"""(group, operation) -> calls, bytes."""
GROUPS = ("tp", "cp", "pp", "pp_gradients", "data_context", "model")


class CountStep(Callback):
    """From the beginning of one step to the beginning of the next."""

    def __init__(self) -> None:
        self.calls = Calls()

    def step_begin(self, event: StepEvent) -> None:
        if event.step == COUNTED - 1:
            self.calls.__enter__()
        elif event.step == COUNTED:
            self.calls.__exit__(None, None, None)


class NoCheckpoints:
    saved_step = None

    def due(self, state: RunState) -> bool:
        return False

    def save(self, state: RunState) -> Path:
        return Path()


def batches(config: RunConfig, engine: Engine) -> Iterator[list[Batch]]:
    shape = (config.train.micro_batch_size, config.data.seq_len)
    positions = torch.arange(shape[1], dtype=torch.int32).expand(shape)
    while True:
        micro = [torch.randint(1, config.model.vocab_size, shape) for _ in range(micro_batches(config))]
        yield [Batch(ids, ids, torch.zeros_like(positions), positions) for ids in micro]


def micro_batches(config: RunConfig) -> int:
    return config.train.accumulation_steps(config.parallel.data_size(dist.get_world_size()))


def group_kinds(engine: DeepSpeedEngine) -> dict[str, str]:
    """Name of every group of several ranks -> what the report calls it; what DeepSpeed adds is hpZ's."""
    groups = engine._groups
    kinds = {group.group_name: "hpz" for group in distributed_c10d._world.pg_map if group.size() > 1}
    known = {"world": dist.group.WORLD, **{kind: getattr(groups, kind) for kind in GROUPS}}
    return kinds | {
        group.group_name: kind.removesuffix("_gradients")
        for kind, group in known.items()
        if group is not None and group.size() > 1
    }


def summed(items: Iterable[tuple[str, str, int, int]]) -> Counts:
    """Of (group, operation, calls, bytes)."""
    total: Counts = {}
    for group, operation, count, size in items:
        calls, before = total.get((group, operation), (0, 0))
        total[group, operation] = (calls + count, before + size)
    return total


def counted_training_step(config: RunConfig) -> Counts:
    """On groups of several ranks."""
    engine = build_engine(config, comm=ProcessGroupComm(), device=torch.device("cpu"))
    assert isinstance(engine, DeepSpeedEngine)
    initialize_engine(engine, seed=0)
    counter = CountStep()
    Trainer(
        replace(config, train=replace(config.train, steps=COUNTED + 1)),
        engine=engine,
        batches=batches(config, engine),
        state=RunState(),
        checkpoints=cast(Any, NoCheckpoints()),
        signals=StopSignals(),
        callbacks=[counter],
    ).fit()
    kinds = group_kinds(engine)
    found = counter.calls.found
    return summed(
        (kinds[name], operation, count, found[name, operation, "bytes"])
        for (name, operation, kind), count in found.items()
        if kind == "count" and name in kinds
    )


def expected(config: RunConfig, ranks: int, rank: int) -> Counts:
    layout = Layout.of(config.parallel, world_size=ranks)
    place = layout.coordinates(rank).pp
    items = step_traffic(config, layout, rank_parts(config)[place], rank=place)
    assert all(item.exact for item in items)
    return summed((item.group, item.operation, item.count, item.bytes) for item in items)


SMALL: dict[str, Any] = {
    "reduce_bucket_size": 6_000,
    "stage3_prefetch_bucket_size": 3_000,
    "stage3_max_live_parameters": 9_000,
    "stage3_max_reuse_distance": 6_000,
    "sub_group_size": 2_560,
}
"""The embedding has 5,120 elements, a block 3,072 + 1,024 + 3,072 + 1,536 and its two norms 64."""


def config_of(settings: dict[str, Any]) -> RunConfig:
    """Settings of [parallel], [train], [optim] and [deepspeed.zero_optimization] together."""
    given = {"num_layers": 3, **settings}
    train = {name: given.pop(name) for name in ("precision", "global_batch_size") if name in given}
    optim = {name: given.pop(name) for name in ("grad_clip",) if name in given}
    zero = {name: given.pop(name) for name in (*SMALL, "overlap_comm") if name in given}
    config = small_config(**given)
    return replace(
        config,
        train=replace(config.train, **train),
        optim=replace(config.optim, **optim),
        data=replace(config.data, document_masking=False),
        deepspeed={"zero_optimization": zero} if zero else {},
    )


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO-0": (2, {"zero_stage": 0}),
    "ZeRO-1": (2, {"zero_stage": 1, "reduce_bucket_size": 6_000}),
    "ZeRO-2": (2, {"zero_stage": 2, "reduce_bucket_size": 3_104}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "ZeRO-3 in small pieces": (2, {"zero_stage": 3, **SMALL}),
    "ZeRO-3 with hpZ": (4, {"zero_stage": 3, "hpz": 2, "global_batch_size": 16, **SMALL}),
    "tensor and sequence parallel": (4, {"tensor": 2, "sequence_parallel": True, "zero_stage": 1}),
    "pipeline": (4, {"pipeline": 2, "zero_stage": 1, "reduce_bucket_size": 6_000}),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO-0 clipped by nobody": (2, {"zero_stage": 0, "grad_clip": 0.0, "tensor": 2}),
    "ZeRO-0 pipeline": (4, {"zero_stage": 0, "pipeline": 2}),
    "ZeRO-1 without overlap": (2, {"zero_stage": 1, "overlap_comm": False, "reduce_bucket_size": 4_000}),
    "ZeRO-1 bf16": (2, {"zero_stage": 1, "precision": "bf16"}),
    "ZeRO-1 bf16 pipeline": (4, {"zero_stage": 1, "precision": "bf16", "pipeline": 2}),
    "ZeRO-1 bf16 offload": (2, {"zero_stage": 1, "precision": "bf16", "offload_optimizer": True}),
    "ZeRO-2 of three ranks": (3, {"zero_stage": 2, "reduce_bucket_size": 4_000, "global_batch_size": 6}),
    "ZeRO-2 bf16 tensor": (4, {"zero_stage": 2, "precision": "bf16", "tensor": 2}),
    "ZeRO-2 offload tensor": (4, {"zero_stage": 2, "offload_optimizer": True, "tensor": 2}),
    "ZeRO-3 selective": (
        2,
        {
            "zero_stage": 3,
            "recompute": "selective",
            **SMALL,
            "stage3_prefetch_bucket_size": 1,
            "stage3_max_reuse_distance": 20_000,
        },
    ),
    "ZeRO-3 full": (2, {"zero_stage": 3, "recompute": "full", **SMALL}),
    "ZeRO-3 full, nothing reused": (
        2,
        {"zero_stage": 3, "recompute": "full", **SMALL, "stage3_max_reuse_distance": 0},
    ),
    "ZeRO-3 without prefetch": (2, {"zero_stage": 3, **SMALL, "stage3_prefetch_bucket_size": 0}),
    "ZeRO-3 of three ranks": (3, {"zero_stage": 3, "global_batch_size": 6, **SMALL}),
    "ZeRO-3 bf16 offload": (
        2,
        {"zero_stage": 3, "precision": "bf16", "offload_optimizer": True, **SMALL},
    ),
    "ZeRO-3 embedding whole": (2, {"zero_stage": 3, "whole_parameters": 6_000, **SMALL}),
    "ZeRO-3 only the embedding whole": (2, {"zero_stage": 3, "whole_parameters": 5_120, **SMALL}),
    "ZeRO-3 tensor": (4, {"zero_stage": 3, "tensor": 2, **SMALL}),
    "ZeRO-3 context": (2, {"zero_stage": 3, "context": 2, **SMALL}),
    "hpZ, everything fits": (4, {"zero_stage": 3, "hpz": 2, "global_batch_size": 16}),
    "hpZ full": (
        4,
        {"zero_stage": 3, "hpz": 2, "global_batch_size": 16, "recompute": "full", **SMALL},
    ),
    "tensor and context parallel": (
        4,
        {"tensor": 2, "sequence_parallel": True, "context": 2, "zero_stage": 1},
    ),
    "interleaved": (
        2,
        {
            "pipeline": 2,
            "zero_stage": 1,
            "schedule": "interleaved",
            "virtual_stages": 2,
            "num_layers": 4,
        },
    ),
}
EVERY = [
    *((name, case, ()) for name, case in CASES.items()),
    *((name, case, pytest.mark.slow) for name, case in SLOW.items()),
]


@pytest.mark.parametrize(
    ("ranks", "settings"), [pytest.param(*case, id=name, marks=marks) for name, case, marks in EVERY]
)
def test_a_step_calls_what_the_report_counts(ranks: int, settings: dict[str, Any]) -> None:
    config = config_of(settings)
    found = run_ranks(ranks, counted_training_step, config)
    for rank in range(ranks):
        assert found[rank] == expected(config, ranks, rank), rank


@pytest.mark.slow
def test_a_ring_sends_most_from_the_rank_before_the_last() -> None:
    config = config_of({"context": 4, "context_method": "ring", "zero_stage": 1, "global_batch_size": 2})
    found = run_ranks(4, counted_training_step, config)
    assert found[2] == expected(config, 4, 2)
    assert max(counts["cp", "send"] for counts in found) == found[2]["cp", "send"]
