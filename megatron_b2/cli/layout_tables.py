"""The report of `b2 layout check` for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from megatron_b2.cli.tables import plain_table, titled_table
from megatron_b2.layouts.backends import describe_backends
from megatron_b2.layouts.memory import GIB
from megatron_b2.layouts.ranks import node_rows
from megatron_b2.layouts.report import LayoutReport

MAX_NODES: Final = 8
"""Nodes that are listed one by one; of more, the first and the last few."""
TEXT_COLUMNS: Final = ("holds", "operation", "what for", "group", "kind", "the first")
MEMORY_COLUMNS: Final = ("weights", "gradients", "optimizer", "activations", "working")


def print_report(report: LayoutReport, *, console: Console, picture: str | None) -> None:
    """Print everything but the single ranks of large layouts (--json has them)."""
    _print_head(report, console)
    _print_ranks(report, console)
    _print_memory(report, console)
    if report.auto is not None:
        console.print(Text("parallel.auto", style="bold"))
        console.print(Text("\n".join(report.auto.reasons()) + "\n"), soft_wrap=True)
    _print_pipeline(report, console, picture)
    _print_traffic(report, console)
    if report.deepspeed is None:
        console.print('parallel.engine = "single": no DeepSpeed JSON')
    else:
        console.print(
            Text(f"DeepSpeed JSON, the same on all {report.layout.world_size:,} ranks", style="bold")
        )
        print(json.dumps(report.deepspeed, indent=2))


def _print_head(report: LayoutReport, console: Console) -> None:
    config, layout = report.config, report.layout
    parallel, model, train = config.parallel, config.model, config.train
    sequence = " (sequence parallel)" if parallel.sequence_parallel else ""
    console.print(
        Text(
            f"{config.name}: legal on {layout.world_size:,} ranks = tensor {layout.tensor}{sequence} "
            f"x context {layout.context} x data {layout.data} x pipeline {layout.pipeline}, "
            f"ZeRO-{parallel.zero_stage}",
            style="bold",
        )
    )
    table = plain_table()
    table.add_row("parameters", f"{model.num_parameters:,}")
    table.add_row(
        "a step",
        f"{train.global_batch_size:,} sequences of {config.data.seq_len:,} = "
        f"{config.tokens_per_step:,} tokens: on each rank {report.num_micro} micro-batches of "
        f"{train.micro_batch_size}",
    )
    flops = ", ".join(f"{value / 1e9:.2f} ({name})" for name, value in report.flops_per_token.items())
    table.add_row("GFLOP a token", flops)
    layers = f" of {len(train.recompute_layers)} blocks" if train.recompute_layers else ""
    table.add_row("recomputation", f"{train.recompute}{layers}")
    table.add_row("planned with", describe_backends(config.ops))
    console.print(table, "")


def _print_ranks(report: LayoutReport, console: Console) -> None:
    nodes = node_rows(report.rows)
    table = titled_table(f"ranks, {report.ranks_per_node} a node", ("node", "rank", "tp", "cp", "dp", "pp"))
    shown = nodes if len(nodes) <= MAX_NODES else [*nodes[: MAX_NODES - 2], None, nodes[-1]]
    for row in shown:
        table.add_row(*(row.values() if row is not None else ("...",) * 6))
    console.print(table, "")
    columns = ("kind", "groups", "ranks each", "the first", "nodes a group")
    groups = titled_table("groups", columns, left=TEXT_COLUMNS)
    for group in report.groups:
        groups.add_row(
            group.kind, f"{group.count:,}", f"{group.size:,}", _first(group.first), f"{group.max_nodes:,}"
        )
    if report.groups:
        console.print(groups)
    if report.layout.tensor > report.ranks_per_node or report.ranks_per_node % report.layout.tensor:
        console.print("warning: tensor-parallel groups cross nodes; keep parallel.tensor a divisor of a node")
    console.print()


def _first(ranks: Sequence[int]) -> str:
    texts = [str(rank) for rank in ranks]
    return " ".join(texts if len(texts) <= 8 else [*texts[:3], "...", texts[-1]])


def _print_memory(report: LayoutReport, console: Console) -> None:
    title = "GiB on a rank, by pipeline position (a model: see docs/layouts.md)"
    columns = ("pp", "holds", "parameters", *MEMORY_COLUMNS, "total", "host")
    table = titled_table(title, columns, left=TEXT_COLUMNS)
    for item in report.positions:
        memory = item.memory
        parts = (f"{getattr(memory, name) / GIB:.2f}" for name in MEMORY_COLUMNS)
        total, host = f"{memory.total / GIB:.2f}", f"{memory.host / GIB:.2f}"
        table.add_row(str(item.pp), item.holds, f"{memory.parameters:,}", *parts, total, host)
    console.print(table)
    verdict = "fits" if report.fits else "does NOT fit"
    budget = report.config.parallel.memory_gb
    console.print(
        f"{verdict} parallel.memory_gb = {budget:g} ({report.usable / GIB:.1f} GiB may be filled)\n"
    )


def _print_pipeline(report: LayoutReport, console: Console, picture: str | None) -> None:
    if report.schedule is None:
        return
    schedule, parallel = report.schedule, report.config.parallel
    table = plain_table("pipeline")
    table.add_row(
        "schedule", f"{parallel.schedule}, {parallel.virtual_stages} chunks a rank; proven free of deadlock"
    )
    table.add_row(
        "bubble", f"{100 * float(schedule.bubble_fraction):.1f} % of the time (stages by their FLOPs)"
    )
    table.add_row("in flight", f"{' '.join(map(str, schedule.peak_in_flight))} chunk forwards, by rank")
    table.add_row("timetable", picture or "")
    console.print(table, "")


def _print_traffic(report: LayoutReport, console: Console) -> None:
    columns = ("pp", "group", "ranks", "operation", "what for", "calls", "GB", "GB sent (ring)")
    table = titled_table("collectives a step on one rank (~: not exact)", columns, left=TEXT_COLUMNS)
    for item in report.positions:
        for traffic in item.traffic:
            table.add_row(
                str(item.pp),
                traffic.group,
                f"{traffic.size:,}",
                traffic.operation,
                traffic.purpose,
                f"{'' if traffic.exact else '~'}{traffic.count:,}",
                f"{traffic.bytes / 1e9:,.3f}",
                f"{traffic.wire_bytes / 1e9:,.3f}",
            )
        table.add_section()
    console.print(table, "")
