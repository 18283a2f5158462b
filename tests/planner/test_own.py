"""The plan of our own runs says what `b2 layout check` says: no byte kept or sent can drift from the code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_b2.config import RunConfig, load_config
from megatron_b2.layouts.report import LayoutReport, layout_report
from megatron_b2.layouts.traffic import Traffic
from megatron_b2.planner.constants import Constants, load_constants
from megatron_b2.planner.hardware import Cluster, load_hardware
from megatron_b2.planner.network import Links
from megatron_b2.planner.own import estimated_seconds, own_memory, own_positions, own_step
from megatron_b2.planner.workload import Workload

WORLD = 1_024
LAYOUTS: dict[str, tuple[str, ...]] = {
    "data, ZeRO-2": ("--parallel.zero-stage=2",),
    "data, ZeRO-3, full": ("--parallel.zero-stage=3", "--train.recompute=full"),
    "tensor": ("--parallel.tensor=8", "--train.recompute=full", "--train.global-batch-size=4096"),
    "sequence": ("--parallel.tensor=8", "--parallel.sequence-parallel", "--train.recompute=selective"),
    "context": ("--parallel.tensor=2", "--parallel.context=4", "--train.recompute=full"),
    "1F1B": ("--parallel.pipeline=8", "--parallel.tensor=2", "--train.recompute=full"),
    "interleaved": (
        *("--parallel.pipeline=4", "--parallel.schedule=interleaved", "--parallel.virtual-stages=5"),
        *("--parallel.tensor=4", "--parallel.sequence-parallel"),
    ),
    "zero bubble": ("--parallel.pipeline=8", "--parallel.schedule=zero_bubble", "--parallel.tensor=4"),
    "gpipe": ("--parallel.pipeline=8", "--parallel.schedule=gpipe", "--parallel.tensor=4"),
}


def config_13b(*settings: str) -> RunConfig:
    base = ("--train.recompute=none", "--parallel.zero-stage=1")
    return load_config("preset:baichuan2-13b", (*base, *settings)).config


def cluster() -> Cluster:
    return load_hardware("a800-80g")


def without_latency() -> Constants:
    return replace(load_constants(), node_latency=1e-15, network_latency=1e-15)


def wire(report: LayoutReport, chosen: Callable[[Traffic], bool]) -> int:
    """Most bytes that a rank sends."""
    return max(
        sum(item.wire_bytes for item in position.traffic if chosen(item)) for position in report.positions
    )


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_positions_are_those_of_the_layout_check(settings: tuple[str, ...]) -> None:
    """Also memory, though the plan looks only at the beginning of the schedule."""
    config = config_13b(*settings)
    report = layout_report(config, world_size=WORLD)
    assert own_positions(config, gpus=WORLD) == report.positions


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_kinds_of_memory_add_up_to_the_layout_check(settings: tuple[str, ...]) -> None:
    config, constants = config_13b(*settings), load_constants()
    report = layout_report(config, world_size=WORLD)
    plan = own_memory(config, cluster(), gpus=WORLD)
    for rank, position in zip(plan.ranks, report.positions, strict=True):
        assert rank.total == pytest.approx(position.memory.total + constants.allocator_bytes, rel=1e-12)
        assert min(vars(rank).values()) >= 0
    assert all(rank.head == 0 for rank in plan.ranks[:-1])  # only the last one has logits


def test_a_smaller_device_holds_back_less() -> None:
    config = config_13b("--parallel.tensor=8")
    large, half = (own_memory(config, load_hardware(gpu), gpus=8) for gpu in ("a100-80g", "a100-40g"))
    assert half.total < large.total
    assert half.total - half.ranks[0].allocator == large.total - large.ranks[0].allocator


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_tensor_parallel_seconds_are_the_bytes_of_the_layout_check(settings: tuple[str, ...]) -> None:
    config, constants = config_13b(*settings), without_latency()
    sent = wire(layout_report(config, world_size=WORLD), lambda item: item.group == "tp")
    time = own_step(config, cluster(), gpus=WORLD, constants=constants)
    assert time.tensor * Links(cluster(), constants).node == pytest.approx(sent, rel=1e-6)
    assert (sent > 0) == (config.parallel.tensor > 1)


@pytest.mark.parametrize("name", ["sequence", "1F1B", "interleaved", "zero bubble"])
def test_seconds_of_gradients_and_weights_are_the_bytes_of_the_layout_check(name: str) -> None:
    """bf16 at ZeRO-1: DeepSpeed overlaps nothing, so that all bytes are waited for."""
    config, constants = config_13b(*LAYOUTS[name]), without_latency()
    sent = wire(layout_report(config, world_size=WORLD), lambda item: item.group == "data_context")
    time = own_step(config, cluster(), gpus=WORLD, constants=constants)
    ring = Links(cluster(), constants).data(Workload.of(config, gpus=WORLD))
    assert time.data * ring.bandwidth == pytest.approx(sent, rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_overlapped_costs_between_its_interference_and_all_of_it(stage: int) -> None:
    config, constants = config_13b(f"--parallel.zero-stage={stage}"), without_latency()
    sent = wire(layout_report(config, world_size=WORLD), lambda item: item.group == "data_context")
    ring = Links(cluster(), constants).data(Workload.of(config, gpus=WORLD))
    time = own_step(config, cluster(), gpus=WORLD, constants=constants)
    assert constants.interference * sent <= time.data * ring.bandwidth <= sent
    waiting = replace(config, deepspeed={"zero_optimization": {"overlap_comm": False}})
    if stage == 2:
        exposed = own_step(waiting, cluster(), gpus=WORLD, constants=constants)
        assert exposed.data * ring.bandwidth == pytest.approx(sent, rel=1e-5)


def test_context_parallel_seconds_are_the_bytes_of_the_layout_check() -> None:
    config, constants = config_13b(*LAYOUTS["context"]), without_latency()
    sent = wire(layout_report(config, world_size=WORLD), lambda item: item.group == "cp")
    time = own_step(config, cluster(), gpus=WORLD, constants=constants)
    assert time.context * Links(cluster(), constants).node == pytest.approx(sent, rel=1e-6)


def test_one_gpu_sends_nothing() -> None:
    config = load_config("preset:toy").config
    time = own_step(config, cluster(), gpus=1)
    assert (time.tensor, time.context, time.pipeline, time.data, time.bubble) == (0, 0, 0, 0, 0)
    assert time.compute > 0


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_the_quick_estimate_is_near_to_the_prediction(settings: tuple[str, ...]) -> None:
    config: Any = config_13b(*settings)
    time = own_step(config, cluster(), gpus=WORLD).total
    assert estimated_seconds(config, cluster(), gpus=WORLD) == pytest.approx(time, rel=0.10)
