"""A picture of a schedule: what each pipeline rank computes when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_b2.files.atomic import atomic_file
from megatron_b2.pipeline.schedule import Kind, Schedule
from megatron_b2.pipeline.simulate import Durations, simulate

MEANING: Final[Mapping[Kind, tuple[str, str]]] = MappingProxyType(
    {
        "F": ("forward", "#7fa8d9"),
        "B": ("backward", "#8dc48a"),
        "I": ("input gradient", "#8dc48a"),
        "W": ("weight gradient", "#e3b35c"),
    }
)
"""Legend and colour of each kind of instruction; later chunks are lighter."""

MAX_LABELS = 1_200
"""Boxes beyond which micro-batch numbers would not be legible and are left out."""


def draw_timetable(schedule: Schedule, path: Path, *, title: str, durations: Durations | None = None) -> Path:
    """Simulate a schedule and draw one row a rank into the PNG `path`, replaced as a whole.

    Each box is an instruction with its micro-batch; white is the bubble.
    """
    timeline = simulate(schedule, durations)
    num_boxes = sum(len(order) for order in schedule)
    num_chunks = 1 + max(instruction.chunk for order in schedule for instruction in order)
    figure = Figure(figsize=(16, 1.6 + 0.45 * len(schedule)), layout="constrained")
    axes = figure.subplots()
    for rank, (order, spans) in enumerate(zip(schedule, timeline.spans, strict=True)):
        axes.broken_barh(
            [(start, end - start) for start, end in spans],
            (rank - 0.45, 0.9),
            facecolors=[
                (MEANING[instruction.kind][1], 1 - 0.6 * instruction.chunk / num_chunks)
                for instruction in order
            ],
            edgecolor="white",
            linewidth=0.4,
        )
        if num_boxes <= MAX_LABELS:
            for instruction, (start, end) in zip(order, spans, strict=True):
                label = str(instruction.micro)
                axes.text((start + end) / 2, rank, label, ha="center", va="center", fontsize=6)
    idle = 1 - sum(timeline.busy(rank) for rank in range(len(schedule))) / (timeline.makespan * len(schedule))
    axes.set_title(f"{title}: {100 * idle:.1f} % of the time is bubble", fontsize=10)
    axes.set_xlabel("time (forward of one stage = 1)" if durations is None else "time")
    axes.set_ylabel("pipeline rank")
    axes.set_yticks(range(len(schedule)))
    axes.set_xlim(0, timeline.makespan)
    axes.invert_yaxis()
    kinds = [kind for kind in MEANING if any(i.kind == kind for order in schedule for i in order)]
    axes.legend(
        handles=[Patch(color=MEANING[kind][1], label=MEANING[kind][0]) for kind in kinds],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=len(kinds),
        fontsize=8,
        frameon=False,
    )
    FigureCanvasAgg(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path
