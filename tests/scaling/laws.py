"""Points of known laws, written from the formulas alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_b2.scaling.fit import Sample
from megatron_b2.scaling.points import FORMAT

TABLE_10 = (11.51e6, 51.56e6, 108.01e6, 307.60e6, 835.00e6, 1565.60e6, 3019.33e6)
"""N of the report's ladder."""
TRUTH = {"a": 4.0e2, "b": -0.13, "L_inf": 1.62}
CHINCHILLA = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
"""Hoffmann et al. 2022, equation 10."""


def compute_samples(
    *, noise: float = 0.0, seed: int = 0, sizes: Sequence[float] = TABLE_10, truth: dict[str, float] = TRUTH
) -> list[Sample]:
    """One run of each size on 1e12 tokens, C = 6ND, with a relative deviation of its loss."""
    random = np.random.default_rng(seed)
    samples = []
    for size in sizes:
        flops = 6 * size * 1e12
        loss = (truth["a"] * flops ** truth["b"] + truth["L_inf"]) * np.exp(noise * random.standard_normal())
        samples.append(Sample(run=f"n{size:.3g}", inputs=(flops,), flops=flops, loss=float(loss)))
    return samples


def size_loss(n: float, d: float, truth: dict[str, float] = CHINCHILLA) -> float:
    return truth["E"] + truth["A"] / n ** truth["alpha"] + truth["B"] / d ** truth["beta"]


def size_samples(*, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    """Sizes from 44M to 16B on 5B to 400B tokens, the range of Hoffmann et al."""
    random = np.random.default_rng(seed)
    return [
        Sample(
            run=f"n{n:.3g}-d{d:.3g}",
            inputs=(n, d),
            flops=6 * n * d,
            loss=size_loss(n, d) * float(np.exp(noise * random.standard_normal())),
        )
        for n in np.geomspace(44e6, 16e9, 8).tolist()
        for d in np.geomspace(5e9, 400e9, 5).tolist()
    ]


def write_points(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A point table of `rows`, each over defaults."""
    default = {"step": 10, "train_ce": None, "final": True}
    path.write_text(
        json.dumps({"format": FORMAT, "smoothing": "none", "points": [default | row for row in rows]})
    )
    return path


def point_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Rows of runs on 1e12 tokens; the training FLOPs are twice 6ND."""
    return [
        {
            "run": sample.run,
            "num_parameters": round(sample.flops / 6e12),
            "total_parameters": round(sample.flops / 3e12),
            "tokens": 10**12,
            "flops_6nd": sample.flops,
            "flops_training": 2 * sample.flops,
            "valid_ce": sample.loss,
        }
        for sample in samples
    ]
