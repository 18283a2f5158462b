"""Training with the Triton kernels (under the interpreter) equals training with the references, in each layout.

A micro model takes three steps; loss, gradient norm, every gradient and every parameter are compared with one
process that uses the references.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_b2.config.schema import OpsConfig, ParallelConfig, RunConfig
from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.testing import layouts
from megatron_b2.testing.kernels.interpreter import run_interpreted

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tensor 2": (2, {"tensor": 2}, {}),
    "tensor 2, sequence parallel, recompute": (
        2,
        {"tensor": 2, "sequence_parallel": True},
        {"recompute": "full"},
    ),
    "pipeline 2, zero bubble": (2, {"pipeline": 2, "schedule": "zero_bubble"}, {}),
    "context 2, ring, recompute": (
        2,
        {"context": 2, "context_method": "ring"},
        {"recompute": "selective"},
    ),
    "context 2, ulysses, ZeRO-3": (2, {"context": 2, "context_method": "ulysses", "zero_stage": 3}, {}),
}


def micro_run(style: layouts.Style) -> RunConfig:
    config = layouts.reference_config(style, seed=0)
    return replace(
        config,
        model=replace(
            config.model, hidden_size=16, num_heads=2, num_layers=2, ffn_hidden_size=24, vocab_size=32
        ),
        data=replace(config.data, seq_len=8),
        train=replace(config.train, steps=3, global_batch_size=2),
    )


EVERYDAY = {("13b", "tensor 2"), ("7b", "tensor 2, sequence parallel, recompute")}
CASES = [(style, name) for style in ("7b", "13b") for name in LAYOUTS]


@pytest.mark.parametrize(
    ("style", "name"),
    [pytest.param(*case, marks=[] if case in EVERYDAY else pytest.mark.slow) for case in CASES],
)
def test_training_with_triton_kernels_equals_the_references(style: layouts.Style, name: str) -> None:
    ranks, parallel, train = LAYOUTS[name]
    config = micro_run(style)
    reference = layouts.trace_run(config)
    fused = replace(
        config,
        ops=OpsConfig(backend="triton"),
        parallel=ParallelConfig(engine="deepspeed", **{"zero_stage": 1, **parallel}),
        train=replace(config.train, **train),
    )
    traces = run_interpreted(layouts.trace_run, fused, ranks=ranks)
    for trace in traces:
        torch.testing.assert_close(trace.steps, reference.steps, rtol=1e-5, atol=0)
    for kind, limit in (("gradients", 1e-5), ("parameters", 2e-5)):
        pieces = [getattr(trace, kind) for trace in traces]
        differences = layouts._differences(pieces, getattr(reference, kind))
        assert max(differences.values()) <= limit, differences
