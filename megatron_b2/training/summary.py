"""The end of a run: one table for people, one summary.json for programs, one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_b2.config.schema import RunConfig
from megatron_b2.training.events import Outcome, RunState, Validation
from megatron_b2.training.plan import GIB, RunPlan

AVERAGED_STEPS = 20
"""Steps in the final training loss (our choice)."""


def summarize(
    config: RunConfig,
    *,
    outcome: Outcome,
    state: RunState,
    validation: Validation | None,
    records: Sequence[Mapping[str, Any]],
    checkpoint: Path | None,
    picture: Path,
) -> dict[str, Any]:
    """What summary.json holds. Training losses are means over the last 20 steps."""
    last = [r for r in records if r["kind"] == "train" and r["loss"] is not None][-AVERAGED_STEPS:]
    train = {key: sum(r[key] for r in last) / len(last) for key in ("loss", "ce", "max_z")} if last else None
    rates = sorted(r["tokens_per_second"] for r in records if r["kind"] == "train")
    return {
        "name": config.name,
        "outcome": outcome.value,
        "step": state.step,
        "steps": config.train.steps,
        "tokens": state.tokens,
        "parameters": config.model.num_parameters,
        "wall_seconds": round(state.seconds, 3),
        "tokens_per_second_median": rates[len(rates) // 2] if rates else None,
        "train": train,
        "validation": asdict(validation) if validation is not None else None,
        "checkpoint": str(checkpoint) if checkpoint is not None else None,
        "metrics": str(Path(config.output_dir) / "metrics.jsonl"),
        "tensorboard": str(Path(config.output_dir) / "tensorboard"),
        "picture": str(picture),
    }


def print_summary(summary: Mapping[str, Any], *, console: Console) -> None:
    """The table at the end of a run."""
    table = _table(f"{summary['name']}: {summary['outcome']}")
    table.add_row("steps", f"{summary['step']:,} of {summary['steps']:,}")
    table.add_row("tokens", f"{summary['tokens']:,}")
    table.add_row("training time", str(timedelta(seconds=round(summary["wall_seconds"]))))
    if summary["tokens_per_second_median"] is not None:
        table.add_row("tokens/s (median)", f"{summary['tokens_per_second_median']:,.0f}")
    for label, key in (("train", "train"), ("validation", "validation")):
        if (losses := summary[key]) is not None:
            table.add_row(
                f"{label} loss", f"{losses['loss']:.4f}  (ce {losses['ce']:.4f}, max-z {losses['max_z']:.1f})"
            )
    for key in ("checkpoint", "metrics", "tensorboard", "picture"):
        if summary[key] is not None:
            table.add_row(key, summary[key])
    console.print(table)


def print_plan(config: RunConfig, plan: RunPlan, *, console: Console) -> None:
    """The table of a dry run."""
    table = _table(f"{config.name}: plan on {plan.world_size} process{'es' if plan.world_size > 1 else ''}")
    table.add_row("parameters", f"{plan.parameters:,}  ({plan.block_parameters:,} in blocks)")
    table.add_row("tokens", f"{plan.total_tokens:,}  = {plan.steps:,} steps x {plan.tokens_per_step:,}")
    table.add_row(
        "a step",
        f"{config.train.global_batch_size} sequences of {config.data.seq_len}: on each rank "
        f"{plan.micro_batches} micro-batches of {config.train.micro_batch_size}",
    )
    table.add_row("work", f"{plan.gigaflop_per_token:,.4g} GFLOP/token (causal attention, no recomputation)")
    points = ", ".join(f"step {step:,}: {rate:.3g}" for step, rate in plan.schedule.items())
    table.add_row("learning rate", points)
    memory = plan.memory
    if config.parallel.model_ranks == 1:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in asdict(memory).items())
        table.add_row("memory (estimate)", f"{_gib(memory.total)} a device: {parts}")
    else:
        table.add_row("memory", "see `b2 layout check`")
    table.add_row("checkpoint", f"{_gib(plan.checkpoint_bytes)} each, in {config.output_dir}/checkpoints")
    console.print(table)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"
