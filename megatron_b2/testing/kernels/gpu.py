"""The part of the verification kit that needs a GPU: sanitizer, bandwidth and FLOP/s, other projects.

The commands are `b2 ops bench` and, for parity, `b2 ops verify --device cuda`. Without a GPU they say so and
measure nothing; the tests run this code with the clock replaced.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

import torch

from megatron_b2.testing.kernels.workloads import (
    MODELS,
    PEERS,
    Direction,
    Problem,
    Sizes,
    problems,
    workloads,
)

NO_GPU: Final = "not measured: torch finds no CUDA GPU on this machine, and no speed is stated without one"
SANITIZER: Final = "compute-sanitizer"
TOOLS: Final = ("memcheck", "racecheck", "synccheck")
"""Accesses out of bounds, races in shared memory, barriers not reached by all threads."""
WARMUP: Final = 5
SAMPLES: Final = 30
CACHE_BYTES: Final = 256 * 2**20
"""Written before every sample, so that nothing is left in the L2 cache (40 and 50 MB)."""

Clock = Callable[[Callable[[], object], torch.device], float]
"""Median seconds of a call on a device."""


@dataclass(frozen=True)
class Peak:
    """Data sheet of a device: dense bf16 with fp32 sums."""

    bytes_per_second: float
    flops_per_second: float


PEAKS: Final[Mapping[str, Peak]] = MappingProxyType(
    {
        "A100": Peak(2.039e12, 312e12),
        "A800": Peak(2.039e12, 312e12),
        "H100": Peak(3.35e12, 989e12),
        "H800": Peak(3.35e12, 989e12),
        "H200": Peak(4.8e12, 989e12),
    }
)
"""By a word of the device's name: the SXM boards."""


@dataclass(frozen=True)
class Measurement:
    """One pass of one implementation."""

    device: str
    shape: str
    op: str
    implementation: str
    direction: Direction
    seconds: float
    """Median."""
    bytes_per_second: float
    """Least bytes that the operation moves, by the time."""
    flops_per_second: float
    roofline: float | None
    """Share of the speed that the data sheet allows; none for a device that is not in `PEAKS`."""


def peak_of(device_name: str) -> Peak | None:
    """Data sheet of a device by its name."""
    return next((peak for word, peak in PEAKS.items() if word in device_name), None)


def cuda_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call by CUDA events, with a cold L2 cache."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    samples = []
    for sample in range(WARMUP + SAMPLES):
        cache.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        if sample >= WARMUP:
            samples.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(samples)


def measure(
    device: torch.device,
    *,
    device_name: str,
    models: Sequence[Sizes] = MODELS,
    clock: Clock = cuda_seconds,
) -> Iterator[Measurement]:
    """Time every operation, implementation and direction."""
    peak = peak_of(device_name)
    for sizes in models:
        torch.manual_seed(0)
        for problem in problems(sizes, device):
            for work in workloads(problem):
                passes: tuple[tuple[Direction, Callable[[], object]], ...]
                passes = (("forward", work.call), ("backward", work.backward()))
                for direction, call in passes:
                    seconds = clock(call, device)
                    moved, computed = _least(problem, direction)
                    yield Measurement(
                        device=device_name,
                        shape=sizes.name,
                        op=work.op,
                        implementation=work.implementation,
                        direction=direction,
                        seconds=seconds,
                        bytes_per_second=moved / seconds,
                        flops_per_second=computed / seconds,
                        roofline=None if peak is None else bound(moved, computed, peak) / seconds,
                    )


def _least(problem: Problem, direction: Direction) -> tuple[float, float]:
    if direction == "forward":
        return problem.forward_bytes, problem.forward_flops
    return problem.backward_bytes, problem.backward_flops


def bound(moved: float, computed: float, peak: Peak) -> float:
    """Least seconds for bytes and floating-point operations."""
    return max(moved / peak.bytes_per_second, computed / peak.flops_per_second)


def markdown(measurements: Sequence[Measurement]) -> str:
    """A table with the device's name and what was compared."""
    device = measurements[0].device
    peers = [f"{name} {version(name.replace('_', '-'))}" for name in PEERS if find_spec(name) is not None]
    missing = [name for name in PEERS if find_spec(name) is None]
    lines = [
        f"Measured on {device}; torch {torch.__version__}; medians of {SAMPLES}, cold L2 cache.",
        f"Beside: {', '.join(peers) or 'none'}. Not installed: {', '.join(missing) or 'none'}.",
        "",
        "| op | shape | pass | by | us | GB/s | TFLOP/s | of the roofline |",
        "|---" * 8 + "|",
    ]
    for row in measurements:
        share = "device not in the table" if row.roofline is None else f"{row.roofline:.0%}"
        cells = (
            row.op, row.shape, row.direction, row.implementation, f"{row.seconds * 1e6:,.1f}",
            f"{row.bytes_per_second / 1e9:,.0f}",
            f"{row.flops_per_second / 1e12:,.1f}" if row.flops_per_second else "-", share,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sanitizer_commands() -> list[list[str]]:
    """compute-sanitizer over the quick checks on the GPU, one command a tool."""
    checks = [sys.executable, "-m", "megatron_b2", "ops", "verify", "--quick", "--device", "cuda"]
    return [[SANITIZER, "--tool", tool, "--error-exitcode", "1", *checks] for tool in TOOLS]


def sanitize(run: Callable[[list[str]], int] = subprocess.call) -> list[str]:
    """Run compute-sanitizer; what it found, by tool."""
    if shutil.which(SANITIZER) is None:
        return [f"{SANITIZER} is not on PATH: it is part of the CUDA toolkit"]
    commands = sanitizer_commands()
    return [f"{' '.join(command)}: exit status {status}" for command in commands if (status := run(command))]
