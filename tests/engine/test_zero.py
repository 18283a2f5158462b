"""ZeRO stages against the single process: loss, gradient norm and every parameter and moment."""

from __future__ import annotations

import pytest
import torch

from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.testing.fork import run_ranks
from tests.engine.runs import Trace, assemble, run, run_config

FP32_TOLERANCE = 1e-6


@pytest.fixture(scope="module", params=["rope", "alibi"])
def reference(request: pytest.FixtureRequest) -> tuple[str, Trace]:
    return request.param, run(run_config(position=request.param))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_one_process(reference: tuple[str, Trace], stage: int, ranks: int) -> None:
    position, expected = reference
    traces = run_ranks(ranks, run, run_config(position=position, zero=stage))
    for trace in traces:
        torch.testing.assert_close(
            torch.tensor(trace.steps), torch.tensor(expected.steps), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
        )
    whole = assemble([expected])
    for name, value in assemble(traces).items():
        torch.testing.assert_close(
            value, whole[name], atol=FP32_TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


BF16_TOLERANCES = (2e-3, 2e-3, 2e-2, 2e-2)
"""Relative, for loss, ce, max_z (a square of a single logit) and gradient norm: bf16 has 8 bits."""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_near_one_process_in_bf16_and_fp32(stage: int) -> None:
    expected = run(run_config(precision="bf16"))
    exact = run(run_config())
    traces = run_ranks(2, run, run_config(precision="bf16", zero=stage))
    for reference in (expected, exact):
        mine, theirs = torch.tensor(traces[0].steps), torch.tensor(reference.steps)
        difference = ((mine - theirs) / theirs).abs().max(dim=0).values
        assert (difference <= torch.tensor(BF16_TOLERANCES)).all(), difference
    masters = assemble(traces)
    assert masters["model/head.weight"].dtype == torch.float32
    # fp32 masters keep what bf16 cannot hold.
    assert not torch.equal(masters["model/head.weight"].bfloat16().float(), masters["model/head.weight"])


@pytest.mark.parametrize("stage", [1, 3])
def test_micro_batch_size_does_not_change_the_run(stage: int) -> None:
    traces = [run_ranks(2, run, run_config(zero=stage, micro_batch_size=size, steps=4)) for size in (1, 4)]
    torch.testing.assert_close(
        torch.tensor(traces[0][0].steps), torch.tensor(traces[1][0].steps), atol=1e-6, rtol=1e-6
    )
