"""Which error stands beside a prediction: that of published runs like it, or the widest where there are none."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from megatron_b2.planner.constants import load_constants
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.planner.step import predict_step, regime_of
from megatron_b2.planner.workload import ModelShape, Workload

CONSTANTS = load_constants()
A100 = load_hardware("a100-80g")
H100 = load_hardware("h100-80g")
TENSOR = Workload(
    shape=ModelShape(
        hidden_size=1_024, ffn_hidden_size=4_096, num_layers=8, num_heads=8, vocab_size=50_304, gated=False
    ),
    seq_len=2_048,
    micro_batch_size=1,
    global_batch=64,
    tensor=2,
    pipeline=2,
    data=4,
    zero_stage=0,
)
DEEPSPEED_3 = replace(TENSOR, tensor=1, pipeline=1, data=16, zero_stage=3)
FSDP = replace(DEEPSPEED_3, zero_engine="fsdp")
UNLIKE: dict[str, dict[str, Any]] = {
    "context": {"context": 2, "data": 2},
    "ZeRO-2": {"zero_stage": 2, "pipeline": 1, "data": 8},
    "fp32": {"precision": "fp32"},
    "FSDP's ZeRO-1": {"zero_stage": 1, "zero_engine": "fsdp"},
    "zero bubble": {"schedule": "zero_bubble"},
}


def widest() -> float:
    return max(band for name, band in CONSTANTS.bands.items() if name != "memory")


def test_the_error_is_that_of_the_runs_that_are_alike() -> None:
    omnipath = load_hardware("a100-80g", node="opa100x4")
    for work, cluster, regime in (
        (TENSOR, A100, "model parallel"),
        (TENSOR, omnipath, "omnipath"),
        (replace(TENSOR, zero_stage=1, zero_engine="megatron"), A100, "model parallel"),
        (replace(TENSOR, zero_stage=1), A100, "zero-1 deepspeed"),
        (DEEPSPEED_3, A100, "zero-3 deepspeed"),
        (FSDP, A100, "zero-3 fsdp"),
        (FSDP, H100, "hopper"),
    ):
        assert regime_of(work, cluster) == regime
        assert predict_step(work, cluster, CONSTANTS).band == CONSTANTS.bands[regime]


@pytest.mark.parametrize("changes", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("gpu", ["a100-80g", "h100-80g"])
def test_what_no_published_run_did_has_the_widest_error(gpu: str, changes: dict[str, Any]) -> None:
    work, cluster = replace(TENSOR, **changes), load_hardware(gpu)
    assert regime_of(work, cluster) not in CONSTANTS.bands
    assert predict_step(work, cluster, CONSTANTS).band == widest()


def test_machines_that_no_published_run_used_have_the_widest_error() -> None:
    """One's own, and Hopper with anything but FSDP."""
    own = replace(A100, gpu=replace(A100.gpu, architecture="measured"))
    for work, cluster in ((FSDP, own), (TENSOR, own), (DEEPSPEED_3, H100), (TENSOR, H100)):
        assert regime_of(work, cluster) not in CONSTANTS.bands
        assert predict_step(work, cluster, CONSTANTS).band == widest()


def test_the_error_of_the_memory_is_not_one_of_the_time() -> None:
    constants = replace(CONSTANTS, bands=MappingProxyType({"model parallel": 0.08, "memory": 0.5}))
    assert constants.band("nothing like it") == 0.08
    assert constants.memory_band == 0.5
    assert replace(constants, bands=MappingProxyType({})).band("nothing like it") == 1.0
