"""The arithmetic of a dry run."""

from __future__ import annotations

import pytest

from megatron_b2.config import load_config
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError
from megatron_b2.training.plan import plan_run

SIZE_13B = 13_896_668_160


def _config(*overrides: str) -> RunConfig:
    return load_config("preset:baichuan2-13b", ["--parallel.engine", "deepspeed", *overrides]).config


def test_plan_of_the_13b_on_1024_ranks() -> None:
    config = _config("--parallel.zero-stage", "1", "--train.precision", "bf16")
    plan = plan_run(config, world_size=1024)
    assert plan.parameters == SIZE_13B
    assert plan.tokens_per_step == config.train.global_batch_size * 4096
    assert plan.micro_batches * config.train.micro_batch_size * 1024 == config.train.global_batch_size
    assert plan.schedule[config.optim.warmup_steps] == config.optim.max_lr
    assert plan.gigaflop_per_token == pytest.approx(84.55, abs=0.005)
    # bf16 weights and fp32 gradients whole; two moments and master weights over 1,024 ranks.
    assert plan.memory.weights == 2 * SIZE_13B
    assert plan.memory.gradients == 4 * SIZE_13B
    assert plan.memory.optimizer == pytest.approx(12 * SIZE_13B / 1024, rel=1e-6)
    assert plan.checkpoint_bytes == 12 * SIZE_13B


def test_each_zero_stage_needs_less() -> None:
    totals = [
        plan_run(_config("--parallel.zero-stage", str(stage), "--train.precision", "fp32"), world_size=64).memory
        for stage in (0, 1, 2, 3)
    ]
    assert sorted(totals, key=lambda memory: -memory.total) == totals
    assert totals[0].total - totals[0].activations == 16 * SIZE_13B


def test_recomputation_needs_less() -> None:
    sizes = [
        plan_run(_config("--train.recompute", kind), world_size=64).memory.activations
        for kind in ("none", "selective", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_a_layout_that_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        plan_run(_config(), world_size=1000)
