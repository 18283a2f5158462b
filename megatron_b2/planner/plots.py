"""Pictures of a search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megatron_b2.files.atomic import atomic_file
from megatron_b2.layouts.memory import GIB
from megatron_b2.planner.search import SearchResult

MARKERS: Final[Mapping[int, str]] = MappingProxyType({1: "o", 2: "s", 3: "^"})
"""By ZeRO stage."""


def draw_search(result: SearchResult, path: Path, *, title: str, device_bytes: float) -> Path:
    """Draw every layout that fits, the front and the fastest into the PNG `path`, replaced as a whole.

    Time against memory: colour is the tensor-parallel size, shape the ZeRO stage.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    tensors = sorted({item.workload.tensor for item in result.candidates})
    for index, tensor in enumerate(tensors):
        for stage, marker in MARKERS.items():
            points = [
                (item.time.total, item.memory.total / GIB)
                for item in result.candidates
                if item.workload.tensor == tensor and item.workload.zero_stage == stage
            ]
            if points:
                x, y = zip(*points, strict=True)
                label = f"tensor {tensor}, ZeRO-{stage}"
                axes.scatter(x, y, s=14, marker=marker, color=f"C{index}", alpha=0.5, label=label)
    front = [(item.time.total, item.memory.total / GIB) for item in result.front]
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1, label="Pareto front")
    best = result.best
    axes.errorbar(
        best.time.total,
        best.memory.total / GIB,
        xerr=best.time.total * best.time.band,
        fmt="k*",
        markersize=14,
        capsize=3,
        label=f"fastest: {best.workload.describe()}",
    )
    axes.axhline(device_bytes / GIB, color="grey", linestyle=":", label="device memory")
    axes.set_xscale("log")
    for plain in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        plain(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.set_xlabel("seconds a step")
    axes.set_ylabel("GiB on the fullest rank")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
    return path
