"""Parity of a kernel with float64, by the criterion of flash-attention's tests.

A kernel passes where its largest error is at most twice that of torch in the same dtype, both against
float64. Where torch happens to be exact, a few fp32 units of the quantity's scale are allowed, whatever the
dtype: that is what sums inside may differ by. In 16 bits they are far below one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "cuda"]
FACTOR = 2.0
"""Largest allowed error, in errors of torch in the same dtype."""
FLOOR_ULPS = 2.0
"""Error that is always allowed, in units in the last place of the largest value as fp32 would store it."""


@dataclass(frozen=True)
class Deviation:
    """Largest absolute error of one output or gradient."""

    quantity: str
    """Such as "out" or "grad_q"."""
    ours: float
    torch: float
    """Of the torch reference in the same dtype."""
    floor: float
    """Error that is allowed in any case."""

    @property
    def limit(self) -> float:
        """Largest error that passes."""
        return max(FACTOR * self.torch, self.floor)

    @property
    def passed(self) -> bool:
        """Whether ours is within the limit; NaN never is, and where torch overflowed nothing was compared."""
        return math.isfinite(self.limit) and self.ours <= self.limit


@dataclass(frozen=True)
class Check:
    """One case of one kernel."""

    op: str
    backend: Backend
    name: str
    """Shape, dtype and variant, for people."""
    run: Callable[[torch.device], list[Deviation]]
    """Compute on a device; on the CPU inside `run_interpreted` for Triton."""
    quick: bool
    """Part of `b2 ops verify --quick` and of make test."""


def deviation(quantity: str, ours: Tensor, torch_result: Tensor, exact: Tensor) -> Deviation:
    """Compare two results of the same dtype with the float64 result, all of one shape."""
    assert ours.shape == torch_result.shape == exact.shape, (quantity, ours.shape, exact.shape)
    exact = exact.double().cpu()
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    floor = FLOOR_ULPS * torch.finfo(torch.float32).eps * scale

    def error(result: Tensor) -> float:
        difference = (result.double().cpu() - exact).abs()
        return float(difference.max()) if difference.numel() else 0.0

    return Deviation(quantity, error(ours), error(torch_result), floor)
