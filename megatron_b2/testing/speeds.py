"""How fast this machine multiplies, copies and communicates: what `b2 plan calibrate` measures.

Every figure is a median of repeated calls. Ranks are forked processes of this machine: one a GPU over NCCL
where there are GPUs, else over gloo on the CPU. What they measure between each other is the link inside a
node; the network between nodes is only seen from a job that spans nodes.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from megatron_b2.errors import ConfigError
from megatron_b2.layouts.traffic import Operation
from megatron_b2.planner.calibrate import CollectiveSpeed, GemmSpeed, MachineSpeeds
from megatron_b2.testing.fork import run_ranks

GEMM_SIZES: Final[Mapping[str, Sequence[int]]] = {
    "cpu": (128, 256, 512, 1_024, 2_048),
    "cuda": (512, 1_024, 2_048, 4_096, 8_192, 16_384),
}
COPY_BYTES: Final[Mapping[str, int]] = {"cpu": 2**28, "cuda": 2**32}
MESSAGE_BYTES: Final[Mapping[str, Sequence[int]]] = {
    "cpu": (2**12, 2**16, 2**20, 2**22, 2**24),
    "cuda": (2**16, 2**20, 2**24, 2**26, 2**28, 2**30),
}
COLLECTIVES: Final[tuple[Operation, ...]] = ("all_reduce", "all_gather", "reduce_scatter")
CPU_RANKS: Final = 2
HOPPER: Final = 9
"""Major compute capability of H100 and H200."""
REPEATS: Final = 7
MIN_SECONDS: Final = 0.02
"""A timed call is repeated until it takes at least this long: clocks and launches then do not matter."""


def measure_machine(
    *, ranks: int | None = None, device: str | None = None, quick: bool = False
) -> MachineSpeeds:
    """Measure this machine.

    Args:
        ranks: processes that communicate; 1 measures no collectives. All GPUs unless given, 2 on a CPU.
        device: cpu or cuda; the GPUs if there are any unless given.
        quick: only the smaller half of the sizes, for tests.

    Raises:
        ConfigError: there are fewer GPUs.
    """
    count = torch.cuda.device_count()  # asks NVML: the forked ranks may still start CUDA
    kind = device or ("cuda" if count else "cpu")
    ranks = ranks or (max(1, count) if kind == "cuda" else CPU_RANKS)
    if kind == "cuda" and count < ranks:
        raise ConfigError(f"--ranks {ranks} on cuda needs as many GPUs, this machine has {count}")
    name, architecture, memory, gemms, copied = run_ranks(1, _one_device, kind, quick, timeout=300)[0]
    collectives = run_ranks(ranks, _between_ranks, kind, quick, timeout=300)[0] if ranks > 1 else ()
    return MachineSpeeds(
        device=name,
        kind=kind,
        architecture=architecture,
        precision="bf16" if kind == "cuda" else "fp32",
        memory_bytes=memory,
        gemms=gemms,
        copy_bytes_per_second=copied,
        ranks=ranks,
        collectives=collectives,
    )


def _one_device(kind: str, quick: bool) -> tuple[str, str, int, tuple[GemmSpeed, ...], float]:
    device = _device(kind, 0)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    gemms = []
    for size in _some(GEMM_SIZES[kind], quick):
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)
        gemms.append(GemmSpeed(size=size, seconds=_seconds(partial(torch.mm, a, b, out=out), kind)))
    source = torch.zeros(COPY_BYTES[kind] // (16 if quick else 4), device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), kind)
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        architecture = "hopper" if properties.major >= HOPPER else "ampere"
        return properties.name, architecture, properties.total_memory, tuple(gemms), copied
    return _processor(), "ampere", _system_memory(), tuple(gemms), copied


def _between_ranks(kind: str, quick: bool) -> tuple[CollectiveSpeed, ...]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = _device(kind, rank)
    group = dist.new_group(backend="nccl" if kind == "cuda" else "gloo")
    found = []
    for operation in COLLECTIVES:
        for size in _some(MESSAGE_BYTES[kind], quick):
            call = _collective(operation, size, ranks, device, group)
            seconds = _seconds(call, kind, agree=True)
            whole = size // (4 * ranks) * 4 * ranks
            found.append(CollectiveSpeed(operation=operation, ranks=ranks, bytes=whole, seconds=seconds))
    return tuple(found)


def _some(sizes: Sequence[int], quick: bool) -> Sequence[int]:
    return sizes[: len(sizes) // 2] if quick else sizes


def _collective(
    operation: Operation, size: int, ranks: int, device: torch.device, group: dist.ProcessGroup | None
) -> Callable[[], object]:
    part = torch.zeros(size // (4 * ranks), device=device)
    whole = torch.zeros(part.numel() * ranks, device=device)
    calls: dict[Operation, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_single(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_single(part, whole, group=group),
    }
    return calls[operation]


def _seconds(call: Callable[[], object], kind: str, *, agree: bool = False) -> float:
    """Median seconds of a call; with `agree` all ranks repeat it equally often."""

    def run(count: int) -> float:
        _synchronize(kind)
        start = time.perf_counter()
        for _ in range(count):
            call()
        _synchronize(kind)
        return time.perf_counter() - start

    run(2)
    count = max(1, round(MIN_SECONDS / max(run(1), 1e-7)))
    if agree:
        together = torch.tensor(count)
        dist.broadcast(together, src=0)
        count = int(together)
    return statistics.median(run(count) for _ in range(REPEATS)) / count


def _synchronize(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def _device(kind: str, index: int) -> torch.device:
    if kind == "cuda":
        torch.cuda.set_device(index)
    return torch.device(kind, index) if kind == "cuda" else torch.device("cpu")


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else "CPU"


def _system_memory() -> int:
    match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
