"""The picture of a law, as the report's Figure 4: loss against FLOPs, runs, fitted line, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_b2.files.atomic import atomic_file
from megatron_b2.scaling.fit import LawFit
from megatron_b2.scaling.fit_file import law_of
from megatron_b2.scaling.laws import ComputeLaw


def plot_fit(
    fit: Mapping[str, Any],
    path: Path,
    *,
    predictions: Sequence[Mapping[str, Any]] = (),
    measured: Sequence[tuple[str, float, float]] = (),
) -> Path:
    """Draw fit.json into the PNG `path`, replaced as a whole.

    `predictions` are results of `predict_run`, marked with stars; `measured` are (name, FLOPs, loss) of runs
    that came after the fit, marked with diamonds.
    """
    law = law_of(fit, ComputeLaw.name)
    assert law is not None, "the compute law is in every fit"
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    curves = sorted(fit["curves"], key=lambda curve: (curve["num_parameters"], curve["tokens"]))
    colours = colormaps["viridis"](np.linspace(0, 0.85, max(1, len(curves))))
    for curve, colour in zip(curves, colours, strict=True):
        axes.plot(curve["flops"], curve["loss"], "-", color=colour, linewidth=1, alpha=0.8)
    for sample in law.samples:
        axes.plot(sample.flops, sample.loss, "o", color="black", markersize=5)
    _draw_law(axes, law, [sample.flops for sample in law.samples] + [item["flops"] for item in predictions])
    for item in predictions:
        first = item["predictions"][0]
        axes.errorbar(
            item["flops"],
            first["loss"],
            yerr=[[first["loss"] - first["low"]], [first["high"] - first["loss"]]],
            fmt="*",
            markersize=15,
            color="tab:red",
            capsize=4,
            label=f"predicted: {item['run']}, {first['loss']:.3f}",
        )
    for name, flops, loss in measured:
        label = f"measured: {name}, {loss:.3f}"
        axes.plot(flops, loss, "D", color="tab:blue", markersize=7, label=label)
    constants = law.law.named(law.theta)
    axes.set_title("L = {a:.4g} · C^{b:.4g} + {L_inf:.4g}".format(**constants).replace("^-", "^−"))
    axes.set_xscale("log")
    axes.set_xlabel(f"training FLOPs (convention: {fit['compute']})")
    axes.set_ylabel(f"loss (nats a token, {fit['loss']})")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper right")
    FigureCanvasAgg(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path


def _draw_law(axes: Axes, law: LawFit, flops: Sequence[float]) -> None:
    """The fitted line over all FLOPs, dashed beyond the fitted runs, and its band."""
    grid = np.geomspace(min(flops) / 1.5, max(flops) * 1.5, 200)
    loss, low, high = law.predict(grid[:, None])
    known = grid <= max(sample.flops for sample in law.samples)
    share = f"{100 * law.confidence:.0f} % band"
    axes.fill_between(grid, low, high, color="tab:red", alpha=0.12, linewidth=0, label=share)
    axes.plot(grid[known], loss[known], "-", color="tab:red", linewidth=2, label="fitted")
    axes.plot(grid[~known], loss[~known], "--", color="tab:red", linewidth=2)
    seen = [sample.loss for sample in law.samples]
    spread = max(max(seen) - loss.min(), 0.05 * max(seen))
    axes.set_ylim(max(0.0, loss.min() - 0.2 * spread), max(seen) + 0.5 * spread)
