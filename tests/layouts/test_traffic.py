"""Counts of collectives against what the model calls on real ranks, and against closed forms."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megatron_b2.config import load_config
from megatron_b2.layouts.report import step_traffic
from megatron_b2.layouts.stages import rank_parts
from megatron_b2.layouts.traffic import Traffic, micro_batch_traffic, pipeline_traffic, total_traffic
from megatron_b2.layouts.zero_traffic import zero_traffic
from megatron_b2.model.split import StageLayers
from megatron_b2.parallel.layout import Layout
from megatron_b2.testing.fork import run_ranks
from tests.layouts.support import counted_step, small_config


def summed(items: list[Traffic]) -> dict[tuple[str, str], int]:
    total: Counter[tuple[str, str]] = Counter()
    for item in items:
        total[item.operation, "count"] += item.count
        total[item.operation, "bytes"] += item.bytes
    return dict(total)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"tensor": 2}),
        (4, {"tensor": 4, "sequence_parallel": True}),
        (2, {"context": 2, "context_method": "ulysses"}),
        (2, {"context": 2, "context_method": "ring"}),
        (4, {"context": 4, "context_method": "ring"}),
        (4, {"tensor": 2, "context": 2, "sequence_parallel": True}),
    ],
    ids=str,
)
def test_a_micro_batch_calls_what_is_counted(ranks: int, layout: dict[str, Any], recompute: str) -> None:
    config = small_config(num_layers=3, recompute=recompute, **layout)
    sizes = Layout.of(config.parallel, world_size=ranks)
    items = micro_batch_traffic(config, sizes, StageLayers.whole(3))
    # Norm gradients are summed by the engine, not by the model.
    expected = summed([item for item in items if item.purpose != "norm gradients"])
    found = run_ranks(ranks, counted_step, config)
    busiest = max(0, sizes.context - 2) * sizes.tensor
    assert found[busiest] == expected


def test_a_sequence_parallel_block_gathers_and_scatters_twice_each_way() -> None:
    config = load_config(
        "preset:baichuan2-13b",
        ["--parallel.tensor", "8", "--parallel.sequence-parallel", "--train.recompute=none"],
    ).config
    layout = Layout.of(config.parallel, world_size=1024)
    one, two = (
        summed(micro_batch_traffic(config, layout, StageLayers(tuple(range(count)), False, False)))
        for count in (1, 2)
    )
    block = {key: two[key] - one[key] for key in two}
    activation = 4_096 * 5_120 * 2
    assert block == {
        ("all_gather", "count"): 4,
        ("all_gather", "bytes"): 4 * activation,
        ("reduce_scatter", "count"): 4,
        ("reduce_scatter", "bytes"): 4 * activation,
        ("all_reduce", "count"): 2,
        ("all_reduce", "bytes"): 2 * 5_120 * 4,  # fp32
    }
    whole = summed(micro_batch_traffic(config, layout, StageLayers.whole(40)))
    assert whole["reduce_scatter", "count"] == 162, "four a layer, embedding and head"


def test_pipeline_sends() -> None:
    config = load_config(
        "preset:baichuan2-13b",
        [
            *(
                "--parallel.pipeline",
                "4",
                "--parallel.schedule",
                "interleaved",
                "--parallel.virtual-stages",
                "2",
            ),
            *("--parallel.zero-stage", "1"),
        ],
    ).config
    layout = Layout.of(config.parallel, world_size=64)
    found = [pipeline_traffic(config, layout, rank=rank, num_micro=64) for rank in range(4)]
    counts = [{item.purpose: item.count // 64 for item in items} for items in found]
    assert counts[0] == {"activations": 2, "activation gradients": 1}
    assert counts[1] == counts[2] == {"activations": 2, "activation gradients": 2}
    assert counts[3] == {"activations": 1, "activation gradients": 2}
    assert found[1][0].bytes == 128 * 4_096 * 5_120 * 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("--parallel.zero-stage=1",), {"all_reduce": 4.0, "all_gather": 2.0}),
        (("--parallel.zero-stage=2",), {"all_reduce": 4.0 * 16, "all_gather": 2.0}),
        (("--parallel.zero-stage=3",), {"reduce_scatter": 4.0 * 16}),
        (("--parallel.zero-stage=3", "--parallel.quantized-gradients"), {"all_to_all": 0.5 * 16}),
    ],
)
def test_bytes_a_parameter_and_step(overrides: tuple[str, ...], expected: dict[str, float]) -> None:
    config = load_config("preset:baichuan2-13b", overrides).config
    layout = Layout.of(config.parallel, world_size=64)
    found = summed(zero_traffic(config, layout, rank_parts(config)[0], num_micro=16))
    for operation, factor in expected.items():
        assert found[operation, "bytes"] == pytest.approx(factor * config.model.num_parameters, rel=1e-4)


def gathered(*overrides: str, num_micro: int) -> dict[str, int]:
    """Elements of parameters (two bytes each) that a step of 13B on 64 ranks gathers, by group."""
    config = load_config("preset:baichuan2-13b", ["--parallel.zero-stage=3", *overrides]).config
    layout = Layout.of(config.parallel, world_size=64)
    total: Counter[str] = Counter()
    for item in zero_traffic(config, layout, rank_parts(config)[0], num_micro=num_micro):
        if item.purpose.startswith("parameters"):
            total[item.group] += item.bytes // 2
    return dict(total)


def test_zero_3_gathers_every_parameter_at_most_twice_a_micro_batch() -> None:
    """Once, but for what is still there from the end of the forward pass."""
    partitioned = 13_896_668_160 - 81 * 5_120  # without the norms
    (found,) = gathered(num_micro=16).values()
    assert 2 * partitioned - 1_000_000_000 <= found // 16 < 2 * partitioned
    everything = ("--deepspeed.zero-optimization.stage3-max-live-parameters", "20_000_000_000")
    everything += ("--deepspeed.zero-optimization.stage3-max-reuse-distance", "40_000_000_000")
    assert gathered(*everything, num_micro=16) == {"data_context": 16 * partitioned}
    half = sum(gathered("--parallel.quantized-weights", num_micro=16).values())
    assert half == found // 2


def test_hpz_gathers_from_all_ranks_once_a_step() -> None:
    """The copies in the node are of the weights since the last update: all later gathers take them."""
    partitioned = 13_896_668_160 - 81 * 5_120
    plain = gathered(num_micro=4)["data_context"]
    found = gathered("--parallel.hpz=8", num_micro=4)
    assert found == {"data_context": partitioned, "hpz": plain - partitioned}


def test_ring_algorithms_send_less_than_twice_the_tensor() -> None:
    base = Traffic(purpose="", group="tp", size=4, operation="all_reduce", count=1, bytes=100)
    assert base.wire_bytes == 150
    assert (
        Traffic(purpose="", group="tp", size=4, operation="all_gather", count=1, bytes=100).wire_bytes == 75
    )
    assert Traffic(purpose="", group="pp", size=4, operation="send", count=1, bytes=100).wire_bytes == 100
    assert total_traffic([base, base.times(2)]) == [base.times(3)]


def test_one_rank_sends_nothing() -> None:
    config = load_config("preset:toy").config
    assert step_traffic(config, Layout(), rank_parts(config)[0], rank=0) == []
