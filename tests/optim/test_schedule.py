"""Warm-up and cosine against their closed form and torch's own cosine scheduler."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2.config.schema import OptimConfig
from megatron_b2.optim.schedule import learning_rate


def test_closed_form_of_the_7b_schedule() -> None:
    config = OptimConfig(max_lr=2e-4, warmup_steps=2000, min_lr_ratio=0.1)

    def at(step: int) -> float:
        return learning_rate(config, train_steps=10_000, step=step)

    assert at(0) == 2e-4 / 2000
    assert at(999) == 1e-4
    assert at(1999) == 2e-4
    assert at(5999) == pytest.approx(2e-4 * (0.1 + 0.9 * 0.5), rel=1e-12)
    assert at(3999) == pytest.approx(2e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), rel=1e-12)
    assert at(9999) == pytest.approx(2e-5, rel=1e-12)
    assert at(50_000) == pytest.approx(2e-5, rel=1e-12)


def test_same_as_torch_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=3e-5)
    config = OptimConfig(max_lr=3e-4, warmup_steps=10, min_lr_ratio=0.1, decay_steps=110)
    for step in range(9, 110):
        assert learning_rate(config, train_steps=999, step=step) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-9
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.step()


@given(
    warmup=st.integers(0, 50),
    decay=st.one_of(st.none(), st.integers(1, 100)),
    ratio=st.floats(0, 1),
    step=st.integers(0, 200),
)
def test_never_above_the_peak_nor_below_zero(
    warmup: int, decay: int | None, ratio: float, step: int
) -> None:
    config = OptimConfig(max_lr=1.0, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=ratio)
    assert 0.0 <= learning_rate(config, train_steps=80, step=step) <= 1.0 + 1e-12
