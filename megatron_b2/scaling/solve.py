"""Robust least squares of a law: one fit with many starts by SciPy, many fits from one start in a batch.

Both minimise the sum of Huber losses of the differences of log L, with bounds on theta. The batch serves
bootstrap and profiles, which are hundreds of fits that end near a known one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import least_squares

from megatron_b2.scaling.laws import Floats, log_sum

TRIED: Final = 6
"""Starts that are followed to their end: those of the smallest loss of the grid (our choice)."""
ITERATIONS: Final = 200
TOLERANCE: Final = 1e-10
"""Of the largest change of theta."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is minimised over theta."""

    design: Floats
    """X [P, K, M] of the law."""
    low: Floats
    """[M]"""
    high: Floats
    """[M]"""
    delta: float
    """Where the Huber loss turns from quadratic to linear, in log L."""

    def cost(self, residuals: Floats) -> Floats:
        """Sum over the points [..., P] of the Huber losses."""
        size = np.abs(residuals)
        quadratic = 0.5 * residuals**2
        losses = np.where(size <= self.delta, quadratic, self.delta * (size - 0.5 * self.delta))
        return np.asarray(losses.sum(axis=-1))


def solve(problem: Problem, targets: Floats, starts: Floats) -> tuple[Floats, float]:
    """The best theta [M] for log losses [P] over `starts` [S, M], and its cost."""
    starts = np.clip(starts, problem.low + 1e-6, problem.high - 1e-6)
    costs = problem.cost(log_sum(problem.design, starts)[0] - targets)
    found = [
        least_squares(
            lambda theta: log_sum(problem.design, theta)[0] - targets,
            start,
            jac=lambda theta: log_sum(problem.design, theta)[1],
            bounds=(problem.low, problem.high),
            loss="huber",
            f_scale=problem.delta,
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
            max_nfev=400,
        )
        for start in starts[np.argsort(costs, kind="stable")[:TRIED]]
    ]
    thetas = np.stack([result.x for result in found])
    costs = problem.cost(log_sum(problem.design, thetas)[0] - targets)
    best = int(np.argmin(costs))
    return thetas[best], float(costs[best])


def solve_batch(
    problem: Problem, targets: Floats, start: Floats, *, fixed: Floats | None = None
) -> tuple[Floats, Floats]:
    """The theta [B, M] of B problems with log losses [B, P], and their costs [B].

    All begin at `start`, [M] or [B, M]; parameters that `fixed` [M] marks with True stay there.
    Iteratively reweighted Levenberg-Marquardt steps; a parameter at a bound that wants to leave it is held.
    """
    count, size = len(targets), problem.low.size
    theta = np.clip(np.broadcast_to(start, (count, size)), problem.low, problem.high)
    still = np.zeros(size, dtype=bool) if fixed is None else fixed.astype(bool)
    damping = np.full(count, 1e-3)
    predicted, jacobian = log_sum(problem.design, theta)
    cost = problem.cost(predicted - targets)
    moving = np.ones(count, dtype=bool)
    for _ in range(ITERATIONS):
        at = np.flatnonzero(moving)
        if at.size == 0:
            break
        step = _step(problem, theta[at], targets[at] - predicted[at], jacobian[at], damping[at], still)
        tried = np.clip(theta[at] + step, problem.low, problem.high)
        new_predicted, new_jacobian = log_sum(problem.design, tried)
        new_cost = problem.cost(new_predicted - targets[at])
        better = new_cost < cost[at]
        change = np.abs(tried - theta[at]).max(axis=1)
        taken = at[better]
        theta[taken], cost[taken] = tried[better], new_cost[better]
        predicted[taken], jacobian[taken] = new_predicted[better], new_jacobian[better]
        damping[at] = np.where(better, damping[at] / 5, damping[at] * 4)
        moving[at] = (change > TOLERANCE) & (damping[at] < 1e12)
    return theta, cost


def _step(
    problem: Problem, theta: Floats, errors: Floats, jacobian: Floats, damping: Floats, still: Floats
) -> Floats:
    """Damped Gauss-Newton steps [B, M] with Huber's weights min(1, delta / |error|)."""
    weights = problem.delta / np.maximum(np.abs(errors), problem.delta)
    weighted = jacobian * weights[..., None]
    gradient = np.einsum("bpm,bp->bm", weighted, errors)
    normal = np.einsum("bpm,bpk->bmk", weighted, jacobian)
    held = ((theta <= problem.low) & (gradient < 0)) | ((theta >= problem.high) & (gradient > 0)) | still
    diagonal = np.einsum("bmm->bm", normal)
    scale = np.maximum(diagonal, 1e-12 * diagonal.max(axis=1, keepdims=True)) + 1e-300
    normal = np.where(held[:, :, None] | held[:, None, :], 0.0, normal)
    np.einsum("bmm->bm", normal)[...] += np.where(held, 1.0, damping[:, None] * scale)
    return np.linalg.solve(normal, np.where(held, 0.0, gradient)[..., None])[..., 0]
