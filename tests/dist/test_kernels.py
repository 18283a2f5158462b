"""Training with our kernels equals training with the references, in each layout.

Triton kernels run under the interpreter, CUDA C++ through the fibre header. A micro model takes three steps; loss,
gradient norm, every gradient and every parameter are compared with one process that uses the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_b2.config.schema import OpsConfig, ParallelConfig, RunConfig
from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.ops import registry
from megatron_b2.ops.cuda import extension
from megatron_b2.testing import layouts
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.kernels import cpu_shim
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


def run_of(style: layouts.Style, name: str, ops: OpsConfig) -> RunConfig:
    _, parallel, train = LAYOUTS[name]
    config = micro_run(style)
    return replace(
        config,
        ops=ops,
        parallel=ParallelConfig(engine="deepspeed", **{"zero_stage": 1, **parallel}),
        train=replace(config.train, **train),
    )


def assert_equals_the_references(style: layouts.Style, traces: Sequence[layouts.Trace]) -> None:
    reference = layouts.trace_run(micro_run(style))
    for trace in traces:
        torch.testing.assert_close(trace.steps, reference.steps, rtol=1e-5, atol=0)
    for kind, limit in (("gradients", 1e-5), ("parameters", 2e-5)):
        pieces = [getattr(trace, kind) for trace in traces]
        differences = layouts._differences(pieces, getattr(reference, kind))
        assert max(differences.values()) <= limit, differences


EVERYDAY = {("13b", "tensor 2"), ("7b", "tensor 2, sequence parallel, recompute")}
CASES = [(style, name) for style in ("7b", "13b") for name in LAYOUTS]


@pytest.mark.parametrize(
    ("style", "name"),
    [pytest.param(*case, marks=[] if case in EVERYDAY else pytest.mark.slow) for case in CASES],
)
def test_training_with_triton_kernels_equals_the_references(style: layouts.Style, name: str) -> None:
    """The everyday case of 13B makes the gradients of the head in the forward pass."""
    gradient: Any = "forward" if (style, name) == ("13b", "tensor 2") else "backward"
    config = run_of(style, name, OpsConfig(backend="triton", head_gradient=gradient))
    ranks = LAYOUTS[name][0]
    assert_equals_the_references(style, run_interpreted(layouts.trace_run, config, ranks=ranks))


CUDA = OpsConfig(backend="cuda", attention="cuda", rope="reference")
CUDA_EVERYDAY = {("13b", "context 2, ulysses, ZeRO-3"), ("7b", "tensor 2, sequence parallel, recompute")}


def through_shim(config: RunConfig) -> tuple[layouts.Trace, set[str]]:
    """On this process or rank, as if a CPU could run CUDA C++; also the names of what was launched."""
    launched: set[str] = set()

    def launch(name: str, *args: Any) -> None:
        launched.add(name)
        shim.launch(name, *args)

    with (
        cpu_shim.kernels_on_cpu() as shim,
        patch.object(extension, "launch", launch),
        patch.object(registry, "unavailable", lambda op, backend, **_: ""),
    ):
        return layouts.trace_run(config), launched


def assert_trained(style: layouts.Style, results: Sequence[tuple[layouts.Trace, set[str]]]) -> None:
    """By every kernel, to the results of the references."""
    traces, launched = zip(*results, strict=True)
    header = (cpu_shim.SOURCES / "kernels.h").read_text(encoding="utf-8")
    assert set().union(*launched) == set(cpu_shim.prototypes(header))
    assert_equals_the_references(style, traces)


@pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())
@pytest.mark.parametrize(
    ("style", "name"),
    [
        pytest.param(*case, marks=[] if case in CUDA_EVERYDAY else pytest.mark.slow)
        for case in CASES
        if "ring" not in case[1]
    ],
)
def test_training_with_cuda_kernels_equals_the_references(style: layouts.Style, name: str) -> None:
    cpu_shim.load_shim()  # compiled once, before the forks
    assert_trained(style, run_ranks(LAYOUTS[name][0], through_shim, run_of(style, name, CUDA)))


@pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())
@pytest.mark.parametrize("style", ["7b", "13b"])
def test_one_process_with_cuda_kernels_equals_the_references(style: layouts.Style) -> None:
    assert_trained(style, [through_shim(replace(micro_run(style), ops=CUDA))])
