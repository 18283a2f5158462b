"""The search: it misses nothing that is legal, and finds what is known of ZeRO-3 at scale."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_b2.config import RunConfig, find_problems, load_config, to_toml
from megatron_b2.errors import ConfigError
from megatron_b2.layouts.report import layout_report
from megatron_b2.planner.flops import tflops_per_gpu
from megatron_b2.planner.hardware import Cluster, load_hardware
from megatron_b2.planner.own import own_memory, own_step
from megatron_b2.planner.plots import draw_search
from megatron_b2.planner.report import nearly_best, search_json
from megatron_b2.planner.search import SearchResult, family_of, legal_layouts, search
from megatron_b2.planner.step import predict_step
from megatron_b2.planner.workload import ModelShape, Workload

GPUS = 16


def cluster(gpu: str = "a800-80g") -> Cluster:
    return load_hardware(gpu)


def small(**train: Any) -> RunConfig:
    """A 1.4B model of 12 layers."""
    config = load_config("preset:baichuan2-7b").config
    model = replace(config.model, num_layers=12, hidden_size=2_048, ffn_hidden_size=5_504, num_heads=16)
    return replace(config, model=model, train=replace(config.train, **{"global_batch_size": 32, **train}))


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return search(small(), cluster(), gpus=GPUS)


def signature(config: RunConfig) -> tuple[Any, ...]:
    parallel, train = config.parallel, config.train
    names = ("tensor", "context", "pipeline", "zero_stage", "sequence_parallel", "schedule", "virtual_stages")
    return *(getattr(parallel, name) for name in names), train.micro_batch_size, train.recompute


def layouts(config: RunConfig) -> list[RunConfig]:
    return list(legal_layouts(config, gpus=GPUS, gpus_per_node=8, memory_bytes=8e10))


def test_every_layout_is_legal() -> None:
    every = layouts(small())
    assert [problem for config in every for problem in find_problems(config, world_size=GPUS)] == []
    assert len({signature(config) for config in every}) == len(every) > 500


def test_no_legal_layout_is_missed() -> None:
    """Against all combinations of all settings, of which the rules of the configuration strike out most."""
    base = small()
    expected = set()
    for tensor, context, pipeline, size in product(
        (1, 2, 4, 8), (1, 2, 4, 8), range(1, 13), (1, 2, 4, 8, 16, 32)
    ):
        if tensor * context > 8 or GPUS % (tensor * context * pipeline):
            continue
        for stage, is_sequence, order, recompute in product(
            (1, 2, 3),
            (False, True),
            (("1f1b", 1), ("zero_bubble", 1), *(("interleaved", chunks) for chunks in (2, 4, 8))),
            ("none", "selective", "full"),
        ):
            config = replace(
                base,
                train=replace(base.train, micro_batch_size=size, recompute=recompute),
                parallel=replace(
                    base.parallel,
                    tensor=tensor,
                    context=context,
                    pipeline=pipeline,
                    zero_stage=stage,
                    sequence_parallel=is_sequence,
                    schedule=order[0],
                    virtual_stages=order[1],
                ),
            )
            if not find_problems(config, world_size=GPUS):
                expected.add(signature(config))
    assert {signature(config) for config in layouts(base)} == expected


def test_the_front_is_that_of_all_layouts(found: SearchResult) -> None:
    """The search simulates only what the quick estimate lets through; here all are."""
    budget = cluster().gpu.memory_bytes
    points = []
    for config in layouts(small()):
        config = replace(
            config, parallel=replace(config.parallel, memory_gb=found.best.config.parallel.memory_gb)
        )
        memory = own_memory(config, cluster(), gpus=GPUS)
        if memory.fits(budget):
            points.append((own_step(config, cluster(), gpus=GPUS).total, budget - memory.total))
    front = [
        point
        for point in points
        if not any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)
    ]
    assert [(item.time.total, item.headroom) for item in found.front] == sorted(set(front))
    assert found.fit == len(points)
    assert found.best.time.total == min(point[0] for point in points)


def test_families_have_their_fastest(found: SearchResult) -> None:
    assert next(iter(found.families.values())) is found.best
    for name, best in found.families.items():
        members = [item for item in found.candidates if family_of(item.config.parallel) == name]
        assert best.time.total == min(item.time.total for item in members)
    assert {"ZeRO-1 alone", "ZeRO with tensor", "ZeRO-1 with pipeline"} <= set(found.families)


def test_the_winner_is_a_run(found: SearchResult, tmp_path: Path) -> None:
    path = tmp_path / "best.toml"
    path.write_text(to_toml(found.best.config))
    config = load_config(path, world_size=GPUS).config
    assert config == found.best.config
    report = layout_report(config, world_size=GPUS)
    assert report.fits
    assert report.positions[0].memory.total < found.best.memory.ranks[0].total  # that has the allocator's


def test_the_band_of_near_ones_reaches_the_best(found: SearchResult) -> None:
    near = nearly_best(found)
    assert near[0] is found.best
    assert all(item.time.low <= found.best.time.total for item in near)


def test_results_as_json_and_picture(found: SearchResult, tmp_path: Path) -> None:
    values = search_json(found)
    assert values["fit"] == found.fit <= values["legal"]
    assert [row["seconds"] for row in values["front"]] == sorted(row["seconds"] for row in values["front"])
    path = draw_search(found, tmp_path / "front.png", title="test", device_bytes=8e10)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_fits() -> None:
    config = load_config("preset:baichuan2-13b").config
    with pytest.raises(
        ConfigError, match=r"fits no layout on 8 x a800-40g: the smallest.* GiB; use more GPUs"
    ):
        search(replace(config, train=replace(config.train, global_batch_size=8)), cluster("a800-40g"), gpus=8)


def test_nothing_is_legal() -> None:
    with pytest.raises(ConfigError, match=r"has no legal layout on 512 GPUs; .*global_batch_size = 33"):
        search(small(global_batch_size=33), cluster(), gpus=512)


# What is published of ZeRO-3 at a fixed batch: Narayanan et al. 2021 (SC21), table 2, 175B, 1,536 sequences.
SC21_175B = ModelShape(
    hidden_size=12_288,
    ffn_hidden_size=49_152,
    num_layers=96,
    num_heads=96,
    vocab_size=51_200,
    gated=False,
    tied=True,
)


def sc21(gpus: int, **layout: Any) -> float:
    """TFLOP/s a GPU by SC21's convention."""
    workload = Workload(
        shape=SC21_175B,
        seq_len=2_048,
        global_batch=1_536,
        recompute="full",
        attention="unfused",
        balanced_stages=False,
        chunked_head=False,
        gradient_bytes=2,
        **layout,
    )
    time = predict_step(workload, load_hardware("a100-80g"))
    return tflops_per_gpu(workload, time.total, "sc21")


@pytest.mark.parametrize(
    ("gpus", "micro", "zero_3", "ptd"), [(384, 4, 144, 153), (768, 2, 88, 149), (1_536, 1, 44, 141)]
)
def test_zero_3_alone_collapses_at_a_fixed_batch(gpus: int, micro: int, zero_3: float, ptd: float) -> None:
    alone = sc21(gpus, data=gpus, micro_batch_size=micro, zero_stage=3)
    model_parallel = sc21(
        gpus, tensor=8, pipeline=12, data=gpus // 96, micro_batch_size=1, zero_stage=0, overlap_data=False
    )
    assert alone == pytest.approx(zero_3, rel=0.15)
    assert model_parallel == pytest.approx(ptd, rel=0.15)


def fastest(gpus: int, stages: tuple[int, ...], tensors: tuple[int, ...]) -> float:
    """Seconds of the fastest 13B layout without pipeline stages, of some ZeRO stages and tensor sizes."""
    base = load_config("preset:baichuan2-13b").config
    here = cluster()
    times = [
        own_step(option, here, gpus=gpus).total
        for option in legal_layouts(base, gpus=gpus, gpus_per_node=8, memory_bytes=here.gpu.memory_bytes)
        if option.parallel.pipeline * option.parallel.context == 1
        and option.parallel.zero_stage in stages
        and option.parallel.tensor in tensors
        and own_memory(option, here, gpus=gpus).fits(here.gpu.memory_bytes)
    ]
    return min(times)


def test_the_crossover_of_13b_at_4m_tokens() -> None:
    """ZeRO-3 alone keeps up while a GPU has many sequences, and falls behind tensor parallelism in the node with
    ZeRO across as the same batch is spread over more of them."""
    gpus = (8, 64, 256, 1_024)  # 128 sequences a GPU, 16, 4, 1
    behind = [fastest(n, (3,), (1,)) / fastest(n, (1, 2, 3), (2, 4, 8)) for n in gpus]
    assert behind == sorted(behind)
    assert behind[0] < 1.1
    assert behind[-1] > 2
