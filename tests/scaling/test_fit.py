"""Fits of laws: known constants come back, bands hold, and data that say too little are told so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import t as student

from megatron_b2.errors import InputError
from megatron_b2.scaling.fit import Sample, fit_law, identify, leave_largest_out
from megatron_b2.scaling.laws import ComputeLaw, SizeLaw, as_array, centre
from megatron_b2.scaling.options import FitOptions
from megatron_b2.scaling.solve import Problem, solve, solve_batch
from tests.scaling.laws import CHINCHILLA, TABLE_10, TRUTH, compute_samples, size_samples

OPTIONS = FitOptions(draws=500)


def test_exact_losses_give_the_exact_law() -> None:
    fit = fit_law("compute", compute_samples(), OPTIONS)
    assert fit.law.named(fit.theta) == pytest.approx(TRUTH, rel=1e-6)
    assert np.abs(fit.residuals()).max() < 1e-9


def test_chinchilla_constants_come_back() -> None:
    fit = fit_law("size_and_tokens", size_samples(), OPTIONS)
    assert fit.law.named(fit.theta) == pytest.approx(CHINCHILLA, rel=1e-5)


def test_chinchilla_constants_lie_in_the_intervals_of_noisy_data() -> None:
    fit = fit_law("size_and_tokens", size_samples(noise=2e-3, seed=3), OPTIONS)
    for name, (low, high) in fit.intervals().items():
        assert low <= CHINCHILLA[name] <= high, name
    low, high = fit.intervals()["E"]
    assert high - low < 0.3, "and they say something"


def inside(seed: int, noise: float) -> bool:
    fit = fit_law("compute", compute_samples(noise=noise, seed=seed), FitOptions(draws=500, seed=seed))
    return all(low <= TRUTH[name] <= high for name, (low, high) in fit.intervals().items())


def test_intervals_hold_the_truth_in_19_of_20_seeds() -> None:
    assert sum(inside(seed, 3e-3) for seed in range(20)) >= 19


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1e-3, 3e-3, 1e-2])
def test_intervals_hold_the_truth_in_95_of_100_seeds(noise: float) -> None:
    assert sum(inside(1_000 + seed, noise) for seed in range(100)) >= 95


def test_the_spread_of_the_bootstrap_is_that_of_linear_theory() -> None:
    """With little noise and squares: half the 95 % range of b is Student's t times its standard error."""
    options = FitOptions(draws=4_000, huber=10.0)
    flops = np.array([sample.flops for sample in compute_samples()])
    term = TRUTH["a"] * flops ** TRUTH["b"]
    loss = term + TRUTH["L_inf"]
    jacobian = np.stack([term / loss, term * np.log(flops / flops[0]) / loss, 1 / loss], axis=1)
    unit = np.sqrt(np.linalg.inv(jacobian.T @ jacobian)[1, 1])
    ratios = []
    for seed in range(4):
        samples = compute_samples(noise=1e-5, seed=seed)
        fit = fit_law("compute", samples, options)
        spread = np.sqrt((np.log1p(fit.residuals()) ** 2).sum() / 4)
        low, high = np.percentile(fit.draws[:, 1], [2.5, 97.5])
        ratios.append((high - low) / 2 / (student.ppf(0.975, 4) * spread * unit))
    assert np.mean(ratios) == pytest.approx(1, abs=0.15)


def test_intervals_are_not_wide_for_nothing() -> None:
    """Ten times the noise makes them several times as wide; little noise makes them tight."""
    widths = []
    for noise in (1e-4, 1e-3):
        low, high = fit_law("compute", compute_samples(noise=noise, seed=1), OPTIONS).intervals()["L_inf"]
        widths.append(high - low)
    assert widths[0] < 0.05
    assert widths[1] > 3 * widths[0]


def test_band_holds_a_new_run() -> None:
    """A run at ten times the compute falls into its 95 % band in at least 18 of 20 seeds."""
    flops, hits = 60 * TABLE_10[-1] * 1e12, 0
    for seed in range(20):
        fit = fit_law("compute", compute_samples(noise=2e-3, seed=seed), FitOptions(draws=300, seed=seed))
        _, low, high = fit.predict(np.array([[flops]]))
        deviation = 2e-3 * np.random.default_rng(10_000 + seed).standard_normal()
        hits += low[0] <= (TRUTH["a"] * flops ** TRUTH["b"] + TRUTH["L_inf"]) * np.exp(deviation) <= high[0]
    assert hits >= 18


def test_one_run_that_went_wrong_moves_the_law_little() -> None:
    samples = compute_samples(sizes=np.geomspace(1e7, 3e9, 9).tolist())
    bad = samples[4]
    samples[4] = Sample(run=bad.run, inputs=bad.inputs, flops=bad.flops, loss=1.03 * bad.loss)
    robust = fit_law("compute", samples, OPTIONS)
    squares = fit_law("compute", samples, FitOptions(draws=100, huber=1.0))
    off, far_off = (abs(fit.law.named(fit.theta)["L_inf"] - TRUTH["L_inf"]) for fit in (robust, squares))
    assert far_off > 0.05
    assert off < far_off / 4


def huber_objective(theta: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> float:
    """Hoffmann et al., equation 21, written out."""
    e, a, alpha, b, beta = theta
    difference = np.log(np.exp(e) + np.exp(a - alpha * np.log(n)) + np.exp(b - beta * np.log(d))) - np.log(
        loss
    )
    size = np.abs(difference)
    return float(np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum())


def test_size_law_minimises_the_objective_of_hoffmann() -> None:
    samples = size_samples(noise=4e-3, seed=5)
    n, d = as_array([sample.inputs for sample in samples]).T
    loss = np.array([sample.loss for sample in samples])
    fit = fit_law("size_and_tokens", samples, OPTIONS)
    e, a, alpha, b, beta = fit.law.constants(fit.theta)
    ours = np.array([np.log(e), np.log(a), alpha, np.log(b), beta])
    theirs = min(
        (
            minimize(
                huber_objective,
                start,
                args=(n, d, loss),
                method="Nelder-Mead",
                options={"maxiter": 4000, "maxfev": 4000},
            )
            for start in (ours, ours + np.array([0.05, 0.3, 0.02, -0.3, -0.02]))
        ),
        key=lambda result: result.fun,
    )
    assert huber_objective(ours, n, d, loss) <= theirs.fun * (1 + 1e-5)


@pytest.mark.parametrize("kind", [ComputeLaw, SizeLaw])
def test_the_batch_finds_what_scipy_finds(kind: type[ComputeLaw] | type[SizeLaw]) -> None:
    samples = compute_samples() if kind is ComputeLaw else size_samples()
    inputs, losses = as_array([s.inputs for s in samples]), np.array([s.loss for s in samples])
    law = kind(origin=centre(inputs))
    low, high = law.bounds(losses)
    problem = Problem(design=law.design(inputs), low=low, high=high, delta=1e-3)
    random = np.random.default_rng(7)
    targets = np.log(losses) + 1e-3 * random.standard_normal((6, losses.size))
    start, _ = solve(problem, np.log(losses), law.starts(losses))
    _, costs = solve_batch(problem, targets, start)
    for target, cost in zip(targets, costs, strict=True):
        assert cost <= solve(problem, target, law.starts(np.exp(target)))[1] * (1 + 1e-4)


def test_gradient_of_the_log_sum() -> None:
    from megatron_b2.scaling.laws import log_sum

    law = SizeLaw(origin=(1e9, 1e11))
    design = law.design(as_array([[3e8, 2e10], [5e9, 4e11]]))
    theta = np.array([0.5, 0.1, 0.34, 0.2, 0.28])
    _, gradient = log_sum(design, theta)
    for index in range(5):
        step = np.zeros(5)
        step[index] = 1e-6
        numeric = (log_sum(design, theta + step)[0] - log_sum(design, theta - step)[0]) / 2e-6
        assert gradient[:, index] == pytest.approx(numeric, abs=1e-9)


def test_the_largest_is_predicted_without_being_seen() -> None:
    samples = compute_samples(noise=1e-3, seed=2)
    left = leave_largest_out("compute", samples, OPTIONS)
    assert left is not None
    assert left.run == samples[-1].run
    assert left.inside
    alone = fit_law("compute", samples[:-1], OPTIONS).predict(as_array([samples[-1].inputs]))[0]
    assert left.predicted == pytest.approx(float(alone[0]))
    assert left.error == pytest.approx(left.predicted / samples[-1].loss - 1)
    assert leave_largest_out("compute", samples[:4], OPTIONS) is None, "three are too few"


def reasons(samples: list[Sample]) -> str:
    return "; ".join(identify(fit_law("compute", samples, OPTIONS), "compute", OPTIONS).reasons)


def test_clean_data_identify_the_irreducible_loss() -> None:
    samples = compute_samples(noise=2e-4, seed=1)
    found = identify(fit_law("compute", samples, OPTIONS), "compute", OPTIONS)
    assert found.reasons == ()
    assert found.low <= TRUTH["L_inf"] <= found.high
    assert found.high - found.low < 0.2


def test_noisy_data_do_not_identify_the_irreducible_loss() -> None:
    assert "fits nearly as well" in reasons(compute_samples(noise=2e-2, seed=1))


def test_a_pure_power_has_no_irreducible_loss() -> None:
    samples = compute_samples(noise=1e-3, seed=4, truth={"a": 60.0, "b": -0.06, "L_inf": 0.0})
    assert "flat down to L_inf = 0" in reasons(samples)


def test_few_runs_and_a_small_range_are_said() -> None:
    said = reasons(compute_samples(noise=1e-4, sizes=[1e8, 2e8, 3e8, 4e8]))
    assert "4 runs for 3 constants leave 1" in said
    assert "compute spans a factor of 4 only" in said


def changed(index: int, loss: float) -> list[Sample]:
    samples = compute_samples()
    old = samples[index]
    samples[index] = Sample(run=old.run, inputs=old.inputs, flops=old.flops, loss=loss)
    return samples


@pytest.mark.parametrize(
    ("kind", "samples", "message"),
    [
        ("compute", compute_samples()[:3], r"3 constants and there are 3 runs: at least 4 are needed, 5 to predict"),
        ("compute", changed(2, float("nan")), r"n1.08e\+08: loss and compute must be positive, finite numbers"),
        ("compute", changed(2, -1.0), r"n1.08e\+08: loss and compute must be positive"),
        ("compute", compute_samples(truth={"a": 1e-3, "b": 0.1, "L_inf": 1.0}), r"does not fall with compute .*n1.15e\+07"),
        ("compute", compute_samples(truth={"a": 0.0, "b": 0.1, "L_inf": 1.0}), r"does not fall with compute"),
        ("size_and_tokens", [s for s in size_samples() if s.inputs[1] < 2e10], r"at least 3 token budgets, the runs have 2"),
        ("size_and_tokens", size_samples()[:10], r"at least 3 sizes, the runs have 2"),
        (
            "size_and_tokens",
            [Sample(run=f"r{n:.1g}", inputs=(n, 20 * n), flops=120 * n * n, loss=n**-0.1) for n in np.geomspace(1e6, 1e9, 9)],
            r"tokens grow with parameters in all runs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_one_message(kind: str, samples: list[Sample], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_law(kind, samples, OPTIONS)
