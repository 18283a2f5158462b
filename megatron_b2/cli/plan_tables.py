"""The plan of `b2 plan` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from rich.console import Console
from rich.text import Text

from megatron_b2.cli.tables import plain_table, titled_table
from megatron_b2.layouts.memory import GIB
from megatron_b2.planner.flops import tflops_per_gpu
from megatron_b2.planner.hardware import gpu_names, load_hardware, node_names
from megatron_b2.planner.report import MEMORY_KINDS, TIME_PARTS, Plan, nearly_best
from megatron_b2.planner.search import Candidate, SearchResult

WIDTH: Final = 150
"""Columns of the tables, also where the terminal is narrower."""
MAX_POSITIONS: Final = 8
"""Pipeline positions that are listed one by one; of more, the first and the last few."""
MAX_FRONT: Final = 12
LAYOUT_COLUMNS: Final = (
    *("seconds", "TFLOPS", "GiB", "free GiB", "tensor", "context", "pipeline", "schedule", "data", "ZeRO"),
    *("SP", "micro-batch", "recompute"),
)
PARTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "compute": "forward, backward and recomputation",
        "tensor": "tensor-parallel communication that nothing hides",
        "context": "context-parallel communication that nothing hides",
        "pipeline": "sends between stages that nothing hides",
        "data": "gradients and ZeRO's gathers that nothing hides",
        "bubble": "waiting for other pipeline stages",
        "optimizer": "gradient norm and AdamW",
    }
)
CONVENTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "6N": "6 x all parameters",
        "megatron": "model FLOPs, half of the attention scores (Megatron-LM since 2025; ours)",
        "sc21-model": "model FLOPs, all scores (SC21)",
        "sc21": "hardware FLOPs: every block is recomputed (SC21 equation 3)",
        "llm-foundry": "6 x (parameters with embedding + scores) (llm-foundry)",
    }
)


def print_plan(plan: Plan, *, console: Console) -> None:
    """Print everything but the single collectives (--json has them)."""
    _print_head(plan, console)
    _print_time(plan, console)
    _print_memory(plan, console)
    _print_traffic(plan, console)
    _print_run(plan, console)
    console.print(Text("not validated by any published run", style="bold"))
    for note in plan.notes:
        console.print(f"  {note}", soft_wrap=True)


def _print_head(plan: Plan, console: Console) -> None:
    work, cluster = plan.workload, plan.cluster
    nodes = -(-plan.gpus // cluster.node.gpus)
    console.print(
        Text(f"{plan.config.name} on {nodes:,} nodes = {plan.gpus:,} x {cluster.name}", style="bold")
    )
    table = plain_table()
    table.add_row("layout", work.describe())
    table.add_row(
        "a step", f"{work.global_batch:,} sequences of {work.seq_len:,} = {work.tokens_per_step:,} tokens"
    )
    per_gpu = plan.tokens_per_second / plan.gpus
    table.add_row("step time", f"{plan.time.describe()} ({plan.time_error})")
    table.add_row("tokens/s", f"{plan.tokens_per_second:,.0f}, {per_gpu:,.0f} a GPU")
    console.print(table, "")


def _print_time(plan: Plan, console: Console) -> None:
    table = titled_table("a step", ("seconds", "share", "what"), left=("what",))
    for name in TIME_PARTS:
        seconds = getattr(plan.time, name)
        table.add_row(f"{seconds:.3f}", f"{100 * seconds / plan.time.total:.1f} %", PARTS[name])
    table.add_row(f"{plan.time.total:.3f}", "", f"± {100 * plan.time.band:.0f} %", style="bold")
    console.print(table, "")
    rates = titled_table(
        "speed by FLOP convention",
        ("convention", "GFLOP a token", "TFLOPS a GPU", "of the peak", "counts"),
        left=("convention", "counts"),
    )
    for rate in plan.rates:
        rates.add_row(
            rate.convention,
            f"{rate.flops_per_token / 1e9:.2f}",
            f"{rate.tflops_per_gpu:.0f} ± {rate.tflops_per_gpu * plan.time.band:.0f}",
            f"{100 * rate.utilization:.1f} %",
            CONVENTIONS[rate.convention],
        )
    console.print(rates, "")


def _print_memory(plan: Plan, console: Console) -> None:
    table = titled_table(
        "GiB on a rank, by pipeline position", ("pp", "holds", *MEMORY_KINDS, "total"), left=("holds",)
    )
    rows = list(zip(plan.positions, plan.memory.ranks, strict=True))
    shown = rows if len(rows) <= MAX_POSITIONS else [*rows[: MAX_POSITIONS - 2], None, rows[-1]]
    for row in shown:
        if row is None:
            table.add_row(*("...",) * (len(MEMORY_KINDS) + 3))
            continue
        position, rank = row
        kinds = (f"{getattr(rank, name) / GIB:.2f}" for name in MEMORY_KINDS)
        table.add_row(str(position.pp), position.holds, *kinds, f"{rank.total / GIB:.2f}")
    console.print(table)
    device = plan.cluster.gpu.memory_bytes / GIB
    needs = f"{plan.memory.total / GIB:.1f} GiB ± {100 * plan.memory.band:.0f} % of {device:.1f}"
    verdict = "fits" if plan.fits else "does NOT fit"
    console.print(f"{verdict}: the fullest rank needs {needs}; the upper end counts")
    if not plan.fits and plan.auto_memory_gb:
        console.print(
            "what would fit: --search, or parallel.auto with parallel.memory_gb = "
            f"{plan.auto_memory_gb:g} (it leaves less free than this plan)"
        )
    console.print()


def _print_traffic(plan: Plan, console: Console) -> None:
    """Of the pipeline position that sends most, by group."""
    busiest = max(plan.positions, key=lambda position: sum(t.wire_bytes for t in position.traffic))
    groups: dict[tuple[str, int], list[int]] = {}
    for item in busiest.traffic:
        calls = groups.setdefault((item.group, item.size), [0, 0])
        calls[0] += item.count
        calls[1] += item.wire_bytes
    title = f"collectives a step of position {busiest.pp}"
    table = titled_table(title, ("group", "ranks", "calls", "GB sent (ring)"), left=("group",))
    for (group, size), (count, wire) in groups.items():
        table.add_row(group, f"{size:,}", f"{count:,}", f"{wire / 1e9:,.2f}")
    console.print(table, "")


def _print_run(plan: Plan, console: Console) -> None:
    safe, band = plan.reliability, plan.time.band
    table = plain_table(f"the run: {plan.tokens:,.0f} tokens")
    table.add_row(
        "days", f"{plan.days:.1f} ± {100 * band:.0f} %; {plan.days_with_failures:.1f} with failures"
    )
    table.add_row(
        "energy",
        f"{plan.energy_mwh:,.0f} MWh: {plan.gpus:,} GPUs at {plan.cluster.gpu.tdp_watts:g} W, without hosts "
        "and cooling",
    )
    table.add_row(
        "failures",
        f"{safe.failures:.0f} expected: one in {safe.mtbf_hours:.1f} h ({safe.failure_source})",
    )
    table.add_row(
        "checkpoint",
        f"{safe.checkpoint_bytes / 1e9:,.1f} GB, {safe.stall_seconds:.1f} s each ({safe.storage_source})",
    )
    table.add_row(
        "save every",
        f"{safe.interval_steps:,} steps: Daly {safe.daly_hours:.2f} h, Young {safe.young_hours:.2f} h "
        f"(saving and lost work {100 * safe.waste_first_order:.2f} %)",
    )
    table.add_row("lost", f"{100 * safe.waste:.2f} % = {safe.lost_days:.2f} days with restarts of 15 minutes")
    console.print(table, "")


def print_hardware(*, console: Console) -> None:
    """Print what hardware.toml has."""
    gpus = titled_table(
        "--gpu",
        ("name", "TFLOPS bf16", "GiB", "memory GB/s", "NVLink GB/s", "W", "node"),
        left=("name", "node"),
    )
    for name in gpu_names():
        gpu, node = load_hardware(name).gpu, load_hardware(name).node
        rates = (gpu.memory_bandwidth / 1e9, gpu.nvlink_bandwidth / 1e9, gpu.tdp_watts)
        cells = (
            f"{gpu.peak_flops / 1e12:.1f}",
            f"{gpu.memory_bytes / GIB:.1f}",
            *(f"{r:,.0f}" for r in rates),
        )
        gpus.add_row(name, *cells, node.name)
    console.print(gpus, "")
    nodes = titled_table("--network", ("name", "GPUs", "GB/s a node", "source"), left=("name", "source"))
    for name in node_names():
        node = load_hardware(gpu_names()[0], node=name).node
        nodes.add_row(name, str(node.gpus), f"{node.nics * node.nic_bandwidth / 1e9:g}", node.source)
    console.print(nodes)


def print_search(result: SearchResult, *, console: Console) -> None:
    """Print the counts, the front, and the best of every family."""
    close = nearly_best(result)
    console.print(
        f"{result.legal:,} legal layouts, {result.fit:,} fit, {len(result.candidates):,} predicted; the "
        f"model cannot tell the fastest from {len(close) - 1:,} others (their error bands reach it)\n"
    )
    table = titled_table(
        "layouts that no other beats in time and memory", LAYOUT_COLUMNS, left=("schedule", "recompute")
    )
    for item in result.front[:MAX_FRONT]:
        table.add_row(*_candidate(item))
    console.print(table)
    if len(result.front) > MAX_FRONT:
        console.print(f"and {len(result.front) - MAX_FRONT} slower ones (--json has them)")
    families = titled_table(
        "\nthe fastest of each family", ("family", *LAYOUT_COLUMNS), left=("family", "schedule", "recompute")
    )
    for name, item in result.families.items():
        families.add_row(name, *_candidate(item))
    console.print(families, "")


def print_scaling(results: Mapping[int, SearchResult], *, console: Console) -> None:
    """Print the fastest of each family over numbers of GPUs, for a batch that stays as it is."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.families))
    title = "TFLOPS a GPU (model FLOPs, causal) of the fastest of each family, and sequences a GPU and step"
    columns = [f"{gpus:,} GPUs" for gpus in results]
    table = titled_table(title, ("family", *columns), left=("family",))
    for name in names:
        cells = []
        for result in results.values():
            item = result.families.get(name)
            cells.append("-" if item is None else f"{tflops(item):.0f}")
        table.add_row(name, *cells)
    shares = [result.best.workload.global_batch / gpus for gpus, result in results.items()]
    table.add_row("sequences a GPU", *(f"{share:g}" for share in shares), style="dim")
    console.print(table, "")


def _candidate(item: Candidate) -> Sequence[str]:
    work = item.workload
    chunks = f" x {work.virtual_stages}" if work.virtual_stages > 1 else ""
    return (
        item.time.describe(),
        f"{tflops(item):.0f}",
        f"{item.memory.total / GIB:.1f}",
        f"{item.headroom / GIB:.1f}",
        str(work.tensor),
        str(work.context),
        str(work.pipeline),
        f"{work.schedule}{chunks}" if work.pipeline > 1 else "",
        f"{work.data:,}",
        str(work.zero_stage),
        "yes" if work.sequence_parallel else "",
        f"{work.micro_batch_size} x {work.num_micro}",
        work.recompute,
    )


def tflops(item: Candidate) -> float:
    """Of a GPU, by our convention."""
    return tflops_per_gpu(item.workload, item.time.total, "megatron")
