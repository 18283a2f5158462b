"""Everything that `b2 layout check` says about a configuration on a number of ranks, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_b2.config.checks import check
from megatron_b2.config.schema import RunConfig
from megatron_b2.engine.deepspeed_config import deepspeed_json
from megatron_b2.layouts.auto import AutoChoice, resolve_auto
from megatron_b2.layouts.backends import describe_backends
from megatron_b2.layouts.memory import RankMemory, rank_memory, usable_bytes
from megatron_b2.layouts.ranks import GroupSummary, RankRow, group_summaries, rank_rows, span
from megatron_b2.layouts.stages import part_flops, rank_parts, run_schedule, stage_durations
from megatron_b2.layouts.traffic import (
    Traffic,
    engine_traffic,
    micro_batch_traffic,
    pipeline_traffic,
    total_traffic,
)
from megatron_b2.layouts.zero_traffic import zero_traffic
from megatron_b2.model.split import StageLayers
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.check import ScheduleReport, check_schedule
from megatron_b2.training.flops import flops_per_token


@dataclass(frozen=True, kw_only=True)
class Position:
    """One pipeline rank; all ranks with the same pp are alike."""

    pp: int
    parts: tuple[StageLayers, ...]
    memory: RankMemory
    traffic: tuple[Traffic, ...]
    """A step."""

    @property
    def holds(self) -> str:
        """For people: its layers."""
        pieces = []
        for part in self.parts:
            pieces += ["embedding"] if part.has_embedding else []
            pieces += [f"blocks {span(part.layers)}"]
            pieces += ["head"] if part.has_head else []
        return ", ".join(pieces)


@dataclass(frozen=True, kw_only=True)
class LayoutReport:
    """A legal layout."""

    config: RunConfig
    """As it will run: with what parallel.auto has chosen."""
    layout: Layout
    auto: AutoChoice | None
    ranks_per_node: int
    num_micro: int
    rows: tuple[RankRow, ...]
    groups: tuple[GroupSummary, ...]
    positions: tuple[Position, ...]
    usable: int
    """Bytes of a device that may be filled."""
    flops_per_token: Mapping[str, float]
    """By convention."""
    schedule: ScheduleReport | None
    """None without pipeline stages."""
    deepspeed: Mapping[str, Any] | None
    """The generated JSON; none with the single engine."""

    @property
    def fits(self) -> bool:
        """Whether every position fits the memory model."""
        return all(position.memory.total <= self.usable for position in self.positions)


def layout_report(config: RunConfig, *, world_size: int, ranks_per_node: int = 8) -> LayoutReport:
    """Check a configuration for `world_size` ranks and say what it means.

    Raises:
        ConfigError: every broken rule; or nothing fits the budget of parallel.auto.
    """
    check(config, world_size=world_size)
    layout = Layout.of(config.parallel, world_size=world_size)
    auto = resolve_auto(config, world_size=world_size) if config.parallel.auto else None
    config = auto.config if auto is not None else config
    num_micro = config.train.accumulation_steps(layout.data)
    parts, schedule = rank_parts(config), run_schedule(config, layout)
    chunks = config.parallel.virtual_stages
    proof = None
    if layout.pipeline > 1:
        durations = stage_durations(config)
        proof = check_schedule(schedule, num_micro=num_micro, num_chunks=chunks, durations=durations)
    return LayoutReport(
        config=config,
        layout=layout,
        auto=auto,
        ranks_per_node=ranks_per_node,
        num_micro=num_micro,
        rows=tuple(rank_rows(layout, ranks_per_node=ranks_per_node)),
        groups=tuple(group_summaries(layout, ranks_per_node=ranks_per_node)),
        positions=tuple(
            Position(
                pp=rank,
                parts=parts[rank],
                memory=rank_memory(config, layout, parts[rank], schedule[rank]),
                traffic=tuple(step_traffic(config, layout, parts[rank], rank=rank)),
            )
            for rank in range(layout.pipeline)
        ),
        usable=usable_bytes(config),
        flops_per_token=_flops(config),
        schedule=proof,
        deepspeed=(
            deepspeed_json(config, world_size=world_size) if config.parallel.engine == "deepspeed" else None
        ),
    )


def step_traffic(
    config: RunConfig, layout: Layout, parts: tuple[StageLayers, ...], *, rank: int
) -> list[Traffic]:
    """All collectives of one step on a rank of pipeline position `rank`."""
    num_micro = config.train.accumulation_steps(layout.data)
    model = [item.times(num_micro) for part in parts for item in micro_batch_traffic(config, layout, part)]
    sends = pipeline_traffic(config, layout, rank=rank, num_micro=num_micro)
    zero = zero_traffic(config, layout, parts, num_micro=num_micro)
    return total_traffic([*model, *sends, *zero, *engine_traffic(config, layout)])


def _flops(config: RunConfig) -> dict[str, float]:
    """FLOPs to train a token, by convention, and with what is recomputed."""
    model, seq_len = config.model, config.data.seq_len
    causal = flops_per_token(model, seq_len=seq_len, convention="causal")
    layers = config.train.recompute_layers or range(model.num_layers)
    again = part_flops(
        model, StageLayers(tuple(layers), has_embedding=False, has_head=False), seq_len=seq_len
    )
    scores = 2.0 * seq_len * model.hidden_size * len(layers)
    extra = {"none": 0.0, "selective": scores, "full": float(again)}[config.train.recompute]
    return {
        "6N": flops_per_token(model, seq_len=seq_len, convention="6N"),
        "causal": causal,
        "full": flops_per_token(model, seq_len=seq_len, convention="full"),
        "causal with recomputation": causal + extra,
    }


def report_json(report: LayoutReport) -> dict[str, Any]:
    """The report as plain values, with every rank."""
    return {
        "name": report.config.name,
        "layout": asdict(report.layout),
        "world_size": report.layout.world_size,
        "ranks_per_node": report.ranks_per_node,
        "micro_batches": report.num_micro,
        "ranks": [asdict(row) for row in report.rows],
        "groups": [asdict(group) for group in report.groups],
        "positions": [
            {
                "pp": item.pp,
                "holds": item.holds,
                "memory": {**asdict(item.memory), "total": item.memory.total},
                "traffic": [{**asdict(t), "wire_bytes": t.wire_bytes} for t in item.traffic],
            }
            for item in report.positions
        ],
        "usable_bytes": report.usable,
        "fits": report.fits,
        "flops_per_token": dict(report.flops_per_token),
        "operations": describe_backends(report.config.ops),
        "pipeline": _schedule_json(report.schedule),
        "auto": None if report.auto is None else _auto_json(report.auto),
        "deepspeed": report.deepspeed,
    }


def _schedule_json(schedule: ScheduleReport | None) -> dict[str, Any] | None:
    if schedule is None:
        return None
    return {
        "bubble_fraction": float(schedule.bubble_fraction),
        "peak_in_flight": list(schedule.peak_in_flight),
        "messages": schedule.num_messages,
    }


def _auto_json(auto: AutoChoice) -> dict[str, Any]:
    return {
        "zero_stage": auto.chosen.zero_stage,
        "whole_parameters": auto.chosen.whole_parameters,
        "recompute": auto.chosen.recompute,
        "recompute_layers": list(auto.chosen.recompute_layers),
        "reasons": auto.reasons(),
    }
