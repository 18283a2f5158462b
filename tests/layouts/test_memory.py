"""The memory model against live tensors and against the model's own parameters."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest

from megatron_b2.config import RunConfig, load_config
from megatron_b2.layouts.memory import (
    GIB,
    block_activations,
    part_activations,
    peak_activations,
    rank_memory,
    usable_bytes,
)
from megatron_b2.layouts.parameters import kept_whole, part_parameters
from megatron_b2.layouts.stages import rank_parts, run_schedule
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.split import StageLayers
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.schedule import build_schedule
from megatron_b2.testing.fork import run_ranks
from tests.layouts.support import live_bytes, small_config

SIZE_13B = 13_896_668_160


def config_13b(*overrides: str) -> RunConfig:
    return load_config("preset:baichuan2-13b", overrides).config


def memories(config: RunConfig, world_size: int) -> list[Any]:
    layout = Layout.of(config.parallel, world_size=world_size)
    parts, schedule = rank_parts(config), run_schedule(config, layout)
    return [rank_memory(config, layout, *pair) for pair in zip(parts, schedule, strict=True)]


def compare_with_live(settings: dict[str, Any]) -> None:
    """One more block keeps exactly its bytes; the head what is left of a model of one block, within 5 %."""
    configs = [small_config(num_layers=count, **settings) for count in (1, 2, 3)]
    one, two, three = (live_bytes(config) for config in configs)
    layout = Layout(tensor=configs[0].parallel.tensor, context=configs[0].parallel.context)
    assert three - two == two - one == block_activations(configs[0], layout, settings["recompute"])
    whole = part_activations(configs[0], layout, StageLayers.whole(1))
    assert one == pytest.approx(whole, rel=0.08)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_activations_of_one_process(position: str, recompute: str) -> None:
    compare_with_live({"position": position, "recompute": recompute})


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"context": 2, "context_method": "ulysses"},
        {"context": 2, "context_method": "ring"},
    ],
    ids=str,
)
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_activations_of_two_ranks(position: str, layout: dict[str, Any], recompute: str) -> None:
    run_ranks(2, compare_with_live, {"position": position, "recompute": recompute, **layout})


@pytest.mark.parametrize("stages", [1, 3])
def test_parameters_are_those_of_the_model(stages: int) -> None:
    config = small_config(num_layers=4, pipeline=stages)
    for (part,) in rank_parts(config):
        model = BaichuanModel(config.model, stage=part, device="meta")
        expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        found = part_parameters(config.model, part, tensor=1)
        assert [(parameter.name, parameter.shape) for parameter in found] == expected


def test_parameters_of_a_tensor_parallel_rank() -> None:
    config = config_13b()
    part = StageLayers.whole(config.model.num_layers)
    sizes = [sum(p.size for p in part_parameters(config.model, part, tensor=t)) for t in (1, 2, 8)]
    norms = 81 * 5_120
    assert sizes == [SIZE_13B, *((SIZE_13B - norms) // t + norms for t in (2, 8))]
    assert [p.layer for p in part_parameters(config.model, part, tensor=1)][:8] == [None, *[0] * 6, 1]


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2, 6, 12 / 64), (2, 2, 4 / 64, 12 / 64), (3, 2 / 64, 4 / 64, 12 / 64)],
)
def test_bytes_of_a_parameter(stage: int, weights: float, gradients: float, optimizer: float) -> None:
    (memory,) = memories(config_13b(f"--parallel.zero-stage={stage}"), 64)
    gathered = 2 * (1_000_000_000 + 81 * 5_120) if stage == 3 else 0
    assert memory.parameters == SIZE_13B
    assert memory.weights == pytest.approx(weights * SIZE_13B + gathered, rel=1e-6)
    assert memory.gradients == pytest.approx(gradients * SIZE_13B, rel=1e-6)
    assert memory.optimizer == pytest.approx(optimizer * SIZE_13B, rel=1e-6)


def test_offload_moves_the_optimizer() -> None:
    (here,), (away,) = (memories(config_13b(*extra), 64) for extra in ((), ("--parallel.offload-optimizer",)))
    assert (away.host, away.optimizer) == (here.optimizer, 0)


def test_hpz_keeps_a_second_copy() -> None:
    plain, second = (
        memories(config_13b("--parallel.zero-stage", "3", f"--parallel.hpz={hpz}"), 64)[0] for hpz in (1, 8)
    )
    assert second.weights - plain.weights == pytest.approx(2 * SIZE_13B / 8, rel=1e-3)


def test_whole_parameters_are_taken_in_model_order_as_deepspeed_does() -> None:
    model = config_13b().model
    parameters = part_parameters(model, StageLayers.whole(40), tensor=1)
    sizes = list(accumulate(parameter.size for parameter in parameters))
    limit = sizes[12]  # the embedding and two blocks
    assert kept_whole(parameters, each=limit, together=limit) == parameters[:13]
    norms = kept_whole(parameters, each=51_200, together=2**63)
    assert len(norms) == 81
    assert {parameter.shape for parameter in norms} == {(5_120,)}


@pytest.mark.parametrize(
    ("name", "chunks", "expected"),
    [
        ("gpipe", 1, [8, 8, 8, 8]),
        ("1f1b", 1, [4, 3, 2, 1]),
        ("zero_bubble", 1, [4, 4, 4, 4]),
        ("interleaved", 2, [11, 9, 7, 5]),
    ],
)
def test_micro_batches_in_flight(name: Any, chunks: int, expected: list[int]) -> None:
    schedule = build_schedule(name, num_ranks=4, num_micro=8, num_chunks=chunks)
    assert [peak_activations(order, [1] * chunks) for order in schedule] == expected


def test_pipeline_positions_differ() -> None:
    config = config_13b("--parallel.pipeline", "4", "--parallel.zero-stage", "1", "--train.recompute", "none")
    found = memories(config, 64)
    assert sum(memory.parameters for memory in found) == SIZE_13B
    per_block = block_activations(config, Layout(data=16, pipeline=4), "none")
    blocks = [len(part.layers) for (part,) in rank_parts(config)]
    assert [memory.activations for memory in found][:3] == [
        flight * count * per_block for flight, count in zip((4, 3, 2), blocks, strict=False)
    ]


def test_recomputing_some_blocks_needs_something_in_between() -> None:
    every, some, none = (
        memories(replace(base, train=replace(base.train, recompute_layers=layers)), 64)[0].activations
        for base, layers in (
            (config_13b(), ()),
            (config_13b(), tuple(range(20))),
            (config_13b("--train.recompute", "none"), ()),
        )
    )
    assert every < some < none


def test_a_tenth_of_the_device_is_left() -> None:
    assert usable_bytes(config_13b()) == int(72 * GIB)
