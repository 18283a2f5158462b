"""Measuring candidates that span several ranks: in turns, inside the same processes.

`megatron_b2.testing.measure.compare` gives each candidate a process of its own; candidates that need a
process group share one here instead, so there is no memory column.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Timed:
    """One candidate, as rank 0 saw it."""

    name: str
    seconds: tuple[float, ...]
    """Wall time of each round, from a barrier to the next."""
    cpu_seconds: tuple[float, ...]
    """User and system time of each round, of all ranks together; other work disturbs it less."""

    @property
    def median(self) -> float:
        """Median wall time of a round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def in_turns(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> tuple[Timed, ...]:
    """Call every candidate on every rank; every second round goes through them backwards."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for number in range(-warmup, rounds):
        order = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
        for name in order:
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            candidates[name]()
            dist.barrier()
            if number >= 0:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return tuple(_timed(name, rows) for name, rows in times.items())


def _timed(name: str, rows: Sequence[tuple[float, float]]) -> Timed:
    wall, cpu = torch.tensor(rows, dtype=torch.float64).unbind(1)
    dist.all_reduce(cpu)
    return Timed(name, tuple(wall.tolist()), tuple(cpu.tolist()))


def markdown_table(rows: Sequence[Timed], *, baseline: str, tokens: int) -> str:
    """Speeds relative to `baseline` by medians, fastest rounds, round by round (median), and CPU time."""
    base = next(row for row in rows if row.name == baseline)
    lines = [
        f"| | median s | spread | tokens/s | speed / {baseline} | fastest rounds | round by round "
        "| CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        by_round = statistics.median(b / s for b, s in zip(base.seconds, row.seconds, strict=True))
        cpu = statistics.median(base.cpu_seconds) / statistics.median(row.cpu_seconds)
        lines.append(
            f"| {row.name} | {row.median:.3f} | {row.spread:.0%} | {tokens / row.median:,.0f} "
            f"| {base.median / row.median:.3f} | {min(base.seconds) / min(row.seconds):.3f} "
            f"| {by_round:.3f} | {cpu:.3f} |"
        )
    return "\n".join(lines)


def write_json(path: Path, *, facts: Mapping[str, str], tables: Mapping[str, Sequence[Timed]]) -> None:
    """All rounds beside the printed tables: title to candidates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        title: [asdict(row) | {"median": row.median, "spread": row.spread} for row in rows]
        for title, rows in tables.items()
    }
    path.write_text(json.dumps({"machine": dict(facts), "results": results}, indent=2) + "\n")
