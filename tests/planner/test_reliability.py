"""Failure arithmetic against published figures, against a numerical optimum and against a simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from megatron_b2.config import load_config
from megatron_b2.engine.build import build_engine
from megatron_b2.parallel.comm import SingleComm
from megatron_b2.planner.reliability import (
    BLOOM_STORAGE,
    HOUR,
    LLAMA_3,
    StorageRate,
    checkpoint_bytes,
    daly_interval,
    expected_waste,
    first_order_waste,
    plan_reliability,
    young_interval,
)


def test_mtbf_of_1024_gpus_from_the_failures_of_llama_3() -> None:
    assert LLAMA_3.mtbf(16_384) / HOUR == pytest.approx(54 * 24 / 419)
    assert round(LLAMA_3.mtbf(1_024) / HOUR, 1) == 49.5


@pytest.mark.parametrize(("stall", "hours", "percent"), [(10, 0.52, 1.1), (60, 1.28, 2.6), (300, 2.9, 5.8)])
def test_published_figures(stall: float, hours: float, percent: float) -> None:
    """Young's optimum at 1,024 GPUs, to the digits that are printed."""
    mtbf = LLAMA_3.mtbf(1_024)
    interval = young_interval(stall, mtbf)
    digits = 2 if hours < 2 else 1
    assert round(interval / HOUR, digits) == hours
    assert round(100 * first_order_waste(interval, stall=stall, mtbf=mtbf), 1) == percent


@given(stall=st.floats(1, 2_000), mtbf=st.floats(20_000, 1e6))
def test_daly_is_next_to_the_numerical_optimum(stall: float, mtbf: float) -> None:
    def waste(interval: float) -> float:
        return expected_waste(interval, stall=stall, mtbf=mtbf)

    best = minimize_scalar(waste, bounds=(stall / 10, 3 * mtbf), method="bounded", options={"xatol": 1e-3})
    daly, young = daly_interval(stall, mtbf), young_interval(stall, mtbf)
    assert daly == pytest.approx(best.x, rel=2e-3)
    assert waste(best.x) <= waste(daly) + 1e-9 <= waste(young) + 2e-9


def test_saving_that_takes_longer_than_the_mtbf() -> None:
    assert daly_interval(10.0, 4.0) == 4.0


@pytest.mark.parametrize(("stall", "interval", "restart"), [(60, 4_000, 900), (300, 10_000, 0)])
def test_expected_waste_is_that_of_simulated_failures(stall: float, interval: float, restart: float) -> None:
    """Many intervals played with exponential failures, which also strike while saving and restarting."""
    random, mtbf, count = np.random.default_rng(0), 40_000.0, 1_000_000
    wall = 0.0
    working, restarting = count, 0
    while working or restarting:
        failures = random.exponential(mtbf, working)
        lost = failures[failures < interval + stall]
        wall += lost.sum() + (working - len(lost)) * (interval + stall)
        again = random.exponential(mtbf, restarting + len(lost))
        failed = again[again < restart]
        wall += failed.sum() + (len(again) - len(failed)) * restart
        working, restarting = len(again) - len(failed), len(failed)
    found = 1 - count * interval / wall
    assert found == pytest.approx(expected_waste(interval, stall=stall, mtbf=mtbf, restart=restart), abs=1e-3)


def test_checkpoint_bytes_are_those_of_the_state_that_is_saved() -> None:
    config = load_config("preset:toy").config
    small = replace(config, model=replace(config.model, vocab_size=512, hidden_size=64, ffn_hidden_size=96))
    state = build_engine(small, comm=SingleComm(), device=torch.device("cpu")).logical_state()
    held = sum(piece.tensor.nbytes for tensor in state.values() for piece in tensor.pieces)
    assert checkpoint_bytes(small.model) == pytest.approx(held, rel=1e-4)


def test_a_plan_adds_up() -> None:
    model = load_config("preset:baichuan2-13b").config.model
    storage = StorageRate(source="a test", node_bytes_per_second=1e9)
    plan = plan_reliability(model, gpus=1_024, nodes=128, step_seconds=2.0, steps=600_000, storage=storage)
    assert plan.checkpoint_bytes == 12 * 13_896_668_160
    assert plan.stall_seconds == pytest.approx(12 * 13.896668160 / 128)
    assert plan.interval_steps == pytest.approx(plan.daly_hours * HOUR / 2, abs=0.5)
    days = 600_000 * 2 / 86_400
    assert plan.lost_days == pytest.approx(days * plan.waste / (1 - plan.waste))
    assert plan.failures == pytest.approx((days + plan.lost_days) * 24 / plan.mtbf_hours)
    assert plan.waste > plan.waste_first_order  # restarts come to it


def test_sources_are_those_of_the_rates() -> None:
    model = load_config("preset:toy").config.model
    size = {"gpus": 8, "nodes": 1, "step_seconds": 1.0, "steps": 10}
    plan = plan_reliability(model, **size)  # type: ignore[arg-type]
    assert (plan.failure_source, plan.storage_source) == (LLAMA_3.source, BLOOM_STORAGE.source)
    assert BLOOM_STORAGE.node_bytes_per_second == pytest.approx(2.3e12 / (40 * 48))
    own = StorageRate(source="one disk", node_bytes_per_second=5e8)
    assert plan_reliability(model, storage=own, **size).storage_source == "one disk"  # type: ignore[arg-type]


@pytest.mark.parametrize(("stall", "mtbf"), [(0.0, 1.0), (1.0, -1.0)])
def test_times_are_above_zero(stall: float, mtbf: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        young_interval(stall, mtbf)


def test_no_gpus() -> None:
    with pytest.raises(ValueError, match="1 GPU or more"):
        LLAMA_3.mtbf(0)
