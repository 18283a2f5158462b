"""A law from points: the fit, what is uncertain about it, and how well it predicts what it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import theilslopes

from megatron_b2.errors import InputError
from megatron_b2.scaling.laws import LAWS, ComputeLaw, Floats, Law, SizeLaw, as_array, centre
from megatron_b2.scaling.options import FitOptions
from megatron_b2.scaling.solve import Problem, solve, solve_batch

CONSTANTS_CONFIDENCE: Final = 0.99
"""Of the intervals of all constants of a law together (our choice)."""
PROFILE_POINTS: Final = 80
EXACT: Final = 0.5e-12
"""Cost of a run at which a fit counts as exact: a deviation of 1e-6."""
WIDE: Final = 0.25
"""An interval of the irreducible loss wider than this share of the smallest loss says little (our choice)."""
FEW_SPARE: Final = 2
"""Points more than constants below which the law is hardly tested by its own data (our choice)."""
SMALL_RANGE: Final = 10.0
"""Largest over smallest compute below which a power hardly shows (our choice)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run as a law sees it."""

    run: str
    inputs: tuple[float, ...]
    """C in FLOPs for a compute law; N and D for a size law."""
    flops: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class LawFit:
    """A fitted law and its uncertainty."""

    law: Law
    theta: Floats
    """[M]"""
    draws: Floats
    """Bootstrap: theta of each replicate, [B, M]."""
    noise: Floats
    """Bootstrap: the deviation of one more run from its law, in log L, [B]."""
    samples: tuple[Sample, ...]
    confidence: float

    def predict(self, inputs: Floats) -> tuple[Floats, Floats, Floats]:
        """Loss, and the band that one run at `inputs` [P, I] falls into with `confidence`: [P] each."""
        spread = self.law.log_loss(self.draws, inputs) + self.noise[:, None]
        tail = 100 * (1 - self.confidence) / 2
        low, high = np.exp(np.percentile(spread, [tail, 100 - tail], axis=0))
        return np.exp(self.law.log_loss(self.theta, inputs)), low, high

    def intervals(self) -> dict[str, tuple[float, float]]:
        """An interval for each constant; all of them hold together with CONSTANTS_CONFIDENCE (Bonferroni)."""
        tail = 100 * (1 - CONSTANTS_CONFIDENCE) / 2 / self.theta.size
        low, high = np.percentile(self.law.constants(self.draws), [tail, 100 - tail], axis=0)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(self.law.constants_of)}

    def residuals(self) -> Floats:
        """Relative deviation of each run from the law, loss/law - 1: [P]."""
        inputs = as_array([sample.inputs for sample in self.samples])
        losses = np.array([sample.loss for sample in self.samples])
        return losses / np.exp(self.law.log_loss(self.theta, inputs)) - 1


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The prediction of the largest run by a law that has not seen it."""

    run: str
    loss: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Relative: predicted/loss - 1."""
        return self.predicted / self.loss - 1

    @property
    def inside(self) -> bool:
        """Whether the loss lies in the band."""
        return self.low <= self.loss <= self.high


@dataclass(frozen=True, kw_only=True)
class Identification:
    """Whether the data tell the irreducible loss."""

    low: float
    high: float
    """Profile interval of L_inf or E in nats."""
    reasons: tuple[str, ...]
    """Why they do not; empty when they do."""


def fit_law(kind: str, samples: Sequence[Sample], options: FitOptions) -> LawFit:
    """Fit the law `kind` (compute, size_and_tokens) to `samples`, one for each run.

    The bootstrap is by run. A replicate gives every run the law's loss times exp(deviation), with the
    deviation of a run drawn at random, with a random sign, scaled by sqrt(n/(n-M)) for the M constants that
    the fit took and by sqrt(v/chi2_v), v = n - M, for a spread known from few runs; then it is fitted anew.

    Raises InputError for too few runs, for losses that do not fall, and for inputs that cannot tell the
    constants apart.
    """
    require_usable(kind, samples)
    inputs, targets, problem, law = _problem(kind, samples, options)
    theta, _ = solve(problem, targets, law.starts(np.exp(targets)))
    random = np.random.default_rng(options.seed)
    predicted = law.log_loss(theta, inputs)
    count, spare = targets.size, targets.size - theta.size
    scaled = (targets - predicted) * np.sqrt(count / spare)
    picked = scaled[random.integers(count, size=(options.draws, count + 1))]
    picked *= random.choice([-1.0, 1.0], size=picked.shape)
    picked *= np.sqrt(spare / random.chisquare(spare, size=(options.draws, 1)))
    replicates, _ = solve_batch(problem, predicted + picked[:, :count], theta)
    return LawFit(
        law=law,
        theta=theta,
        draws=replicates,
        noise=picked[:, count],
        samples=tuple(samples),
        confidence=options.confidence,
    )


def require_usable(kind: str, samples: Sequence[Sample]) -> None:
    """Raise InputError when no law of this kind can be fitted to `samples`."""
    law = LAWS[kind]
    needed = len(law.constants_of) + 1
    wrong = [s.run for s in samples if not (np.isfinite(s.loss) and s.loss > 0)]
    wrong += [s.run for s in samples if not all(np.isfinite(x) and x > 0 for x in (*s.inputs, s.flops))]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: loss and compute must be positive, finite numbers")
    if len(samples) < needed:
        raise InputError(
            f"{law.form} has {len(law.constants_of)} constants and there are {len(samples)} runs: at least "
            f"{needed} are needed, {needed + 1} to predict the largest from the others"
        )
    ranked = sorted(samples, key=lambda sample: sample.flops)
    slope = theilslopes([np.log(s.loss) for s in ranked], [np.log(s.flops) for s in ranked]).slope
    if not slope < 0:
        listed = ", ".join(f"{s.run} {s.loss:.4f} at {s.flops:.3g}" for s in ranked)
        raise InputError(
            f"the loss does not fall with compute (median slope {slope:+.3g} in log-log): {listed} FLOPs; "
            "look for runs that diverged, or for a learning rate that suits only some sizes"
        )
    if kind == SizeLaw.name:
        _require_spread(samples)


def _require_spread(samples: Sequence[Sample]) -> None:
    """N and D both vary, and not together."""
    inputs = np.log(as_array([sample.inputs for sample in samples]))
    for column, name, fix in ((0, "sizes", "--table"), (1, "token budgets", "--budget")):
        if (distinct := len(set(inputs[:, column].round(9)))) < 3:
            raise InputError(
                f"{SizeLaw.form} needs at least 3 {name}, the runs have {distinct}: run a ladder with more "
                f"of them (b2 scaling ladder {fix})"
            )
    if abs(np.corrcoef(inputs.T)[0, 1]) > 0.999:
        raise InputError(
            f"{SizeLaw.form}: tokens grow with parameters in all runs, so that A and B cannot be told apart: "
            "give every size the same token budgets"
        )


def leave_largest_out(kind: str, samples: Sequence[Sample], options: FitOptions) -> LeftOut | None:
    """Predict the run of the largest compute from the others; none when a law cannot be fitted to those."""
    largest = max(samples, key=lambda sample: sample.flops)
    others = [sample for sample in samples if sample is not largest]
    try:
        without = fit_law(kind, others, options)
    except InputError:
        return None
    predicted, low, high = without.predict(as_array([largest.inputs]))
    return LeftOut(
        run=largest.run,
        loss=largest.loss,
        predicted=float(predicted[0]),
        low=float(low[0]),
        high=float(high[0]),
    )


def identify(fit: LawFit, kind: str, options: FitOptions) -> Identification:
    """Profile of the irreducible loss: the values at which the best other constants fit nearly as well.

    A value belongs to the interval when its cost is below the smallest times 1 + F/v, F the quantile of the
    F distribution with 1 and v degrees of freedom (exact where the cost is a sum of squares).
    """
    _, targets, problem, law = _problem(kind, fit.samples, options)
    spare = targets.size - fit.theta.size
    lowest = float(np.exp(problem.low[law.floor]))
    smallest = float(np.exp(targets.min()))
    low, high = _profile(fit, problem, targets, lowest, float(np.exp(problem.high[law.floor])))
    step = (smallest - lowest) / (PROFILE_POINTS - 1)
    low, high = _profile(fit, problem, targets, max(lowest, low - step), min(smallest, high + step))
    reasons = []
    what = law.constants_of[law.floor]
    if low <= 1.5 * lowest:
        reasons.append(f"the profile is flat down to {what} = 0: a pure power fits as well")
    if high - low > WIDE * smallest:
        reasons.append(
            f"any {what} from {low:.3g} to {high:.3g} fits nearly as well, a range of "
            f"{100 * (high - low) / smallest:.0f} % of the smallest loss"
        )
    if spare < FEW_SPARE:
        reasons.append(f"{targets.size} runs for {fit.theta.size} constants leave {spare} to test the law")
    flops = [sample.flops for sample in fit.samples]
    if max(flops) < SMALL_RANGE * min(flops):
        reasons.append(
            f"compute spans a factor of {max(flops) / min(flops):.3g} only, less than {SMALL_RANGE:g}"
        )
    return Identification(low=low, high=high, reasons=tuple(reasons))


def _profile(fit: LawFit, problem: Problem, targets: Floats, low: float, high: float) -> tuple[float, float]:
    """Smallest and largest irreducible loss between `low` and `high` that fits nearly as well as the best."""
    floor, spare = fit.law.floor, targets.size - fit.theta.size
    grid = np.log([*np.linspace(low, high, PROFILE_POINTS), np.exp(fit.theta[floor])])
    start = np.tile(fit.theta, (grid.size, 1))
    start[:, floor] = grid
    fixed = np.arange(fit.theta.size) == floor
    _, costs = solve_batch(problem, np.tile(targets, (grid.size, 1)), start, fixed=fixed)
    least = max(float(costs.min()), targets.size * EXACT)
    limit = least * (1 + f_distribution.ppf(fit.confidence, 1, spare) / spare)
    kept = np.exp(grid[costs <= limit])
    return float(kept.min()), float(kept.max())


def _problem(
    kind: str, samples: Sequence[Sample], options: FitOptions
) -> tuple[Floats, Floats, Problem, ComputeLaw | SizeLaw]:
    """Inputs [P, I], log losses [P], and what is minimised."""
    inputs = as_array([sample.inputs for sample in samples])
    losses = np.array([sample.loss for sample in samples])
    law = LAWS[kind](origin=centre(inputs))
    low, high = law.bounds(losses)
    return (
        inputs,
        np.log(losses),
        Problem(design=law.design(inputs), low=low, high=high, delta=options.huber),
        law,
    )


def report_of(fit: LawFit, *, left_out: LeftOut | None, identification: Identification) -> dict[str, Any]:
    """What fit.json says of a law."""
    return {
        "form": fit.law.form,
        "source": fit.law.source,
        "constants": fit.law.named(fit.theta),
        "intervals": {name: list(pair) for name, pair in fit.intervals().items()},
        "intervals_confidence": CONSTANTS_CONFIDENCE,
        "confidence": fit.confidence,
        "runs": [
            {**vars(sample), "inputs": list(sample.inputs), "deviation": float(deviation)}
            for sample, deviation in zip(fit.samples, fit.residuals(), strict=True)
        ],
        "largest_left_out": None
        if left_out is None
        else {**vars(left_out), "error": left_out.error, "inside_band": left_out.inside},
        "irreducible_loss": {
            "identified": not identification.reasons,
            "interval": [identification.low, identification.high],
            "reasons": list(identification.reasons),
        },
        "origin": list(fit.law.origin),
        "theta": fit.theta.tolist(),
        "draws": np.round(fit.draws, 9).tolist(),
        "noise": np.round(fit.noise, 9).tolist(),
    }
