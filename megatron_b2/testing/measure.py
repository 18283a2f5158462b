"""Measuring against a peer in the same run: alternating rounds, medians, peak memory, versions.

A speed on a shared machine drifts, a ratio measured in turns does not, so `compare` alternates between the
candidates and reports medians. Linux only (reads /proc/self).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One candidate."""

    name: str
    seconds: float
    """Median wall time of a call."""
    spread: float
    """(slowest - fastest) / median."""
    peak_extra_mb: float
    """Largest resident memory during a call above that before it, in 10^6 bytes."""


def compare(
    candidates: Mapping[str, Callable[[], Callable[[], object]]], *, rounds: int = 5, warmup: int = 1
) -> list[Measured]:
    """Measure set-up-and-run candidates.

    Args:
        candidates: name to a function that prepares everything and returns the call to be measured.
        rounds: timed calls of each, taken in turns.
        warmup: calls of each before.

    Each candidate lives in its own forked process, so that its memory is its own; only one works at a time.
    """
    context = multiprocessing.get_context("fork")
    workers = []
    for name, prepare in candidates.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(prepare, theirs), daemon=True)
        process.start()
        theirs.close()
        workers.append((name, process, ours))
    for _, _, pipe in workers:
        for _ in range(warmup):
            pipe.send("run")
            pipe.recv()
    results: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in workers}
    for _ in range(rounds):
        for name, _, pipe in workers:
            pipe.send("run")
            results[name].append(pipe.recv())
    for _, process, pipe in workers:
        pipe.send("stop")
        process.join()
    return [_summary(name, rows) for name, rows in results.items()]


def _summary(name: str, rows: Sequence[tuple[float, float]]) -> Measured:
    times = [seconds for seconds, _ in rows]
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return Measured(name, median, spread, statistics.median(peak for _, peak in rows))


def _serve(prepare: Callable[[], Callable[[], object]], pipe: Any) -> None:
    call = prepare()
    while pipe.recv() == "run":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_mb("VmRSS")
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        pipe.send((seconds, _status_mb("VmHWM") - before))


def _status_mb(field: str) -> float:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024 / 1e6


def machine(*packages: str) -> dict[str, str]:
    """Processor, cores and the versions of the named packages."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = {"cpu": model[1] if model else platform.machine(), "cores": str(len(os.sched_getaffinity(0)))}
    return found | {name: version(name) for name in packages}


def write_report(path: Path, *, facts: Mapping[str, str], rows: Mapping[str, Sequence[Measured]]) -> None:
    """JSON beside the printed table: title to measured candidates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": dict(facts), "results": {k: [asdict(r) for r in v] for k, v in rows.items()}}
    path.write_text(json.dumps(report, indent=2) + "\n")


def markdown_table(rows: Sequence[Measured], *, baseline: str, tokens: int | None = None) -> str:
    """A table with ratios to the candidate `baseline`; `tokens` a call adds tokens/s."""
    base = next(row for row in rows if row.name == baseline)
    rate_head = " tokens/s |" if tokens else ""
    lines = [
        f"| | median s | spread |{rate_head} time / {baseline} | peak extra MB | memory / {baseline} |",
        "|---|---|---|" + ("---|" if tokens else "") + "---|---|---|",
    ]
    for row in rows:
        rate = f" {tokens / row.seconds:,.0f} |" if tokens else ""
        lines.append(
            f"| {row.name} | {row.seconds:.3f} | {row.spread:.0%} |{rate} {row.seconds / base.seconds:.3f} "
            f"| {row.peak_extra_mb:,.0f} | {row.peak_extra_mb / base.peak_extra_mb:.3f} |"
        )
    return "\n".join(lines)
