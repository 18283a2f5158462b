"""Measuring candidates that span several ranks, in turns, each visit in freshly forked ranks.

`megatron_b2.testing.measure.compare` measures single processes; here a candidate is a group of ranks. Fresh
processes at each visit keep one candidate's heap and caches from slowing another.
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

from megatron_b2.testing.fork import run_ranks


@dataclass(frozen=True)
class Timed:
    """One candidate, as rank 0 saw it."""

    name: str
    seconds: tuple[float, ...]
    """Wall time of each call, from a barrier to the next."""
    cpu_seconds: tuple[float, ...]
    """User and system time of each call, of all ranks together; other work disturbs it less."""

    @property
    def median(self) -> float:
        """Median wall time of a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def in_turns(
    world_size: int,
    candidates: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    rounds: int,
    calls: int = 3,
    warmup: int = 2,
) -> tuple[Timed, ...]:
    """Measure `prepare` functions, which make the call to be measured on every rank.

    Every round visits all candidates, every second one backwards; a visit forks the ranks, prepares, calls
    `warmup` times unmeasured and `calls` times measured.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for number in range(rounds):
        order = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
        for name in order:
            times[name] += run_ranks(world_size, _visit, candidates[name], calls, warmup, timeout=300)[0]
    return tuple(_timed(name, rows) for name, rows in times.items())


def _visit(prepare: Callable[[], Callable[[], object]], calls: int, warmup: int) -> list[tuple[float, float]]:
    """On one rank: wall and CPU seconds of each call, the CPU's of all ranks together."""
    call = prepare()
    rows = []
    for number in range(-warmup, calls):
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        call()
        dist.barrier()
        spent = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        wall = time.perf_counter() - start
        dist.all_reduce(spent)
        if number >= 0:
            rows.append((wall, spent.item()))
    return rows


def _timed(name: str, rows: Sequence[tuple[float, float]]) -> Timed:
    wall, cpu = zip(*rows, strict=True)
    return Timed(name, wall, cpu)


def markdown_table(rows: Sequence[Timed], *, baseline: str, tokens: int) -> str:
    """Speeds relative to `baseline` by medians, fastest calls, call by call (median), and CPU time."""
    base = next(row for row in rows if row.name == baseline)
    lines = [
        f"| | median s | spread | tokens/s | speed / {baseline} | fastest calls | call by call "
        "| CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        by_call = statistics.median(b / s for b, s in zip(base.seconds, row.seconds, strict=True))
        cpu = statistics.median(base.cpu_seconds) / statistics.median(row.cpu_seconds)
        lines.append(
            f"| {row.name} | {row.median:.3f} | {row.spread:.0%} | {tokens / row.median:,.0f} "
            f"| {base.median / row.median:.3f} | {min(base.seconds) / min(row.seconds):.3f} "
            f"| {by_call:.3f} | {cpu:.3f} |"
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
