"""Predictions and the best size, against closed forms, numerical minimisation and published numbers."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from megatron_b2.config import load_config
from megatron_b2.errors import InputError
from megatron_b2.scaling.fit_file import fit_table
from megatron_b2.scaling.options import FitOptions
from megatron_b2.scaling.points import read_points
from megatron_b2.scaling.predict import best_size, optimum, predict_run
from tests.scaling.laws import (
    CHINCHILLA,
    TRUTH,
    compute_samples,
    point_rows,
    size_loss,
    size_samples,
    write_points,
)

OPTIONS = FitOptions(draws=300)
SEED_OPTIONS = FitOptions(draws=300, compute="6ND")


@pytest.fixture(scope="module")
def ladder_fit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report's ladder with a known law in C = 6ND."""
    path = write_points(
        tmp_path_factory.mktemp("fit") / "points.json", point_rows(compute_samples(noise=1e-4))
    )
    return fit_table(read_points(path), SEED_OPTIONS)


@pytest.fixture(scope="module")
def size_fit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The law of Hoffmann et al., little noise."""
    rows = [
        {
            "run": sample.run,
            "num_parameters": sample.inputs[0],
            "total_parameters": sample.inputs[0],
            "tokens": sample.inputs[1],
            "flops_6nd": sample.flops,
            "flops_training": sample.flops,
            "valid_ce": sample.loss,
        }
        for sample in size_samples(noise=1e-4)
    ]
    return fit_table(read_points(write_points(tmp_path_factory.mktemp("fit") / "points.json", rows)), OPTIONS)


@given(
    a=st.floats(1.0, 1e4),
    b=st.floats(1.0, 1e4),
    alpha=st.floats(0.1, 1.0),
    beta=st.floats(0.1, 1.0),
    flops=st.floats(1e18, 1e26),
)
@settings(max_examples=60)
def test_closed_form_is_the_minimum(a: float, b: float, alpha: float, beta: float, flops: float) -> None:
    truth = {"E": 1.7, "A": a, "alpha": alpha, "B": b, "beta": beta}
    best = optimum(np.array([1.7, a, alpha, b, beta]), flops)
    n, d = float(best.num_parameters), float(best.tokens)
    assert 6 * n * d == pytest.approx(flops)

    def reducible(log_n: float) -> float:
        return a / np.exp(alpha * log_n) + b / (flops / 6 / np.exp(log_n)) ** beta

    found = minimize_scalar(reducible, bracket=(np.log(n) - 2, np.log(n) + 2), tol=1e-10)
    assert np.exp(found.x) == pytest.approx(n, rel=1e-3)
    assert size_loss(n, d, truth) <= size_loss(1.1 * n, d / 1.1, truth)
    assert size_loss(n, d, truth) <= size_loss(n / 1.1, 1.1 * d, truth)


def test_exponents_of_hoffmann() -> None:
    """Table 2, approach 3: N grows as C^0.46 and D as C^0.54 (from rounded constants: 0.45 and 0.55)."""
    constants = np.array(list(CHINCHILLA.values()))
    one, ten = optimum(constants, 1e22), optimum(constants, 1e23)
    assert np.log10(ten.num_parameters / one.num_parameters) == pytest.approx(0.46, abs=0.01)
    assert np.log10(ten.tokens / one.tokens) == pytest.approx(0.54, abs=0.01)


def test_best_size_of_a_fit(size_fit: dict[str, Any]) -> None:
    result = best_size(size_fit, flops=5.76e23)
    exact = optimum(np.array(list(CHINCHILLA.values())), 5.76e23)
    for key, value in (("num_parameters", exact.num_parameters), ("tokens", exact.tokens)):
        assert result[key] == pytest.approx(float(value), rel=0.02)
        low, high = result[f"{key}_band"]
        assert low <= value <= high
    assert result["loss"] == pytest.approx(
        size_loss(float(exact.num_parameters), float(exact.tokens)), rel=1e-3
    )
    assert result["extrapolation"] == pytest.approx(5.76e23 / (6 * 16e9 * 400e9))


def test_the_report_is_predicted_from_its_ladder(ladder_fit: dict[str, Any]) -> None:
    config = load_config("preset:baichuan2-13b").config
    result = predict_run(ladder_fit, config, tokens=2.6e12)
    assert result["num_parameters"] == 13_896_668_160 - 2 * 125_696 * 5_120
    flops = 6 * result["num_parameters"] * 2.6e12
    (law,) = result["predictions"]
    truth = TRUTH["a"] * flops ** TRUTH["b"] + TRUTH["L_inf"]
    assert law["loss"] == pytest.approx(truth, rel=1e-3)
    assert law["low"] <= truth <= law["high"]
    assert result["extrapolation"] == pytest.approx(flops / (6 * 3019.33e6 * 1e12))
    assert datetime.fromisoformat(result["made_at"]).tzinfo is not None
    warnings = "\n".join(result["warnings"])
    assert "11 times the compute of the largest run" in warnings
    assert "2.6e+12 tokens, 206 for each parameter, are neither" in warnings


def test_the_report_went_about_10_times_beyond_its_ladder() -> None:
    from megatron_b2.scaling.compute import run_flops

    large, small = (load_config(f"preset:{name}").config.model for name in ("baichuan2-13b", "ladder-3b"))
    factor = run_flops(large, seq_len=4_096, tokens=2.6e12) / run_flops(small, seq_len=4_096, tokens=1e12)
    assert factor == pytest.approx(10, abs=0.5)


def test_near_runs_are_not_warned_of(ladder_fit: dict[str, Any]) -> None:
    result = predict_run(ladder_fit, load_config("preset:ladder-3b").config, tokens=1e12)
    assert result["extrapolation"] == pytest.approx(1, rel=1e-3)
    assert result["warnings"] == []


def test_the_size_law_predicts_too(size_fit: dict[str, Any]) -> None:
    config = load_config("preset:baichuan2-7b").config
    result = predict_run(size_fit, config, tokens=2.6e12)
    item = next(item for item in result["predictions"] if item["law"] == "size_and_tokens")
    assert item["loss"] == pytest.approx(size_loss(config.model.num_block_parameters, 2.6e12), rel=1e-3)


def test_wrong_questions_are_one_message(ladder_fit: dict[str, Any], size_fit: dict[str, Any]) -> None:
    config = load_config("preset:toy").config
    with pytest.raises(InputError, match="--tokens -1: must be positive"):
        predict_run(ladder_fit, config, tokens=-1)
    with pytest.raises(InputError, match="--flops nan: must be positive"):
        best_size(size_fit, flops=float("nan"))
    with pytest.raises(
        InputError, match=r"no law of size and tokens: .* at least 3 token budgets, the runs have 1"
    ):
        best_size(ladder_fit, flops=1e21)


def test_the_budgets_of_short_runs_do_not_count(tmp_path: Path) -> None:
    """The compute law is of the longest runs: 2e11 tokens lie between short and long ones and are warned of."""
    rows = point_rows(compute_samples(noise=1e-4))
    short = [row | {"run": f"{row['run']}-short", "tokens": 10**11} for row in rows]
    fit = fit_table(read_points(write_points(tmp_path / "points.json", rows + short)), OPTIONS)
    warnings = predict_run(fit, load_config("preset:ladder-3b").config, tokens=2e11)["warnings"]
    assert "2e+11 tokens, 66.2 for each parameter, are neither as many" in "\n".join(warnings)


def test_the_longest_run_of_each_size_is_fitted(tmp_path: Path) -> None:
    """Shorter runs of the same sizes change nothing of the compute law."""
    rows = point_rows(compute_samples(noise=1e-3, seed=3))
    short = [
        row | {"run": f"{row['run']}-short", "tokens": 10**11, "valid_ce": row["valid_ce"] + 1}
        for row in rows
    ]
    alone, both = (
        fit_table(read_points(write_points(tmp_path / "points.json", chosen)), OPTIONS)["laws"]["compute"]
        for chosen in (rows, short + rows)
    )
    assert alone == both


def test_runs_of_unlike_budgets_and_without_progress_are_noted(tmp_path: Path) -> None:
    rows = point_rows(compute_samples())
    rows[2]["tokens"] *= 3
    rows[3]["valid_ce"] = rows[2]["valid_ce"] + 0.001
    first, second = fit_table(read_points(write_points(tmp_path / "points.json", rows)), OPTIONS)["notes"]
    assert first.startswith("n3.08e+08 has more compute than n1.08e+08 and no lower loss")
    assert "neither the same tokens (1e+12 to 3e+12) nor the same tokens for each parameter" in second
