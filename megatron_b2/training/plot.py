"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_b2.files.atomic import atomic_file

PANELS = (
    ("loss", "loss = CE + w · max-z", True),
    ("ce", "cross-entropy (nats/token)", True),
    ("max_z", "max-z (squared largest logit)", True),
    ("lr", "learning rate", False),
    ("grad_norm", "gradient norm before clipping", False),
    ("tokens_per_second", "tokens/s", False),
)
"""Field, title, whether a validation has it too."""


def plot_metrics(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> Path:
    """Draw the records of a metrics.jsonl as six panels into the PNG `path`, replaced as a whole."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(title)
    for axes, (field, label, validated) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for kind, style in (("train", "-"), ("valid", "o-")):
            if kind == "valid" and not validated:
                continue
            points = [(r["step"], r[field]) for r in records if r["kind"] == kind and r[field] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=kind, markersize=4, linewidth=1)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if validated and axes.get_legend_handles_labels()[0]:
            axes.legend()
    FigureCanvasAgg(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path
