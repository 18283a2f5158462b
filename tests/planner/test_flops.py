"""FLOP conventions against the papers' own equations and against training/flops.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_b2.config import load_config
from megatron_b2.errors import ConfigError
from megatron_b2.planner.flops import (
    Convention,
    flops_per_token,
    seconds_from_tflops,
    step_flops,
    tflops_per_gpu,
    utilization,
)
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.planner.workload import ModelShape, Workload
from megatron_b2.training import flops as training_flops

B, S, LAYERS, H, V = 1536, 2048, 96, 12_288, 51_200
GPT_175B = Workload(
    shape=ModelShape(
        hidden_size=H,
        ffn_hidden_size=4 * H,
        num_layers=LAYERS,
        num_heads=96,
        vocab_size=V,
        gated=False,
        tied=True,
    ),
    seq_len=S,
    micro_batch_size=1,
    global_batch=B,
    tensor=8,
    pipeline=12,
    data=4,
    recompute="full",
)


def baichuan(name: str) -> Workload:
    model = load_config(f"preset:{name}").config.model
    return Workload(
        shape=ModelShape.of(model), seq_len=4096, micro_batch_size=1, global_batch=1024, data=1024
    )


def test_sc21_is_equation_3() -> None:
    equation = 96 * B * S * LAYERS * H**2 * (1 + S / (6 * H) + V / (16 * LAYERS * H))
    assert step_flops(GPT_175B, "sc21") == pytest.approx(equation, rel=1e-12)
    model = 72 * B * S * LAYERS * H**2 * (1 + S / (6 * H) + V / (12 * LAYERS * H))
    assert step_flops(GPT_175B, "sc21-model") == pytest.approx(model, rel=1e-12)


def test_llm_foundry_and_bloom() -> None:
    n = GPT_175B.parameters
    tokens = B * S
    assert step_flops(GPT_175B, "llm-foundry") == pytest.approx(
        3 * (2 * n * tokens + LAYERS * 4 * H * S * tokens)
    )
    assert step_flops(GPT_175B, "llm-foundry-hfu") == pytest.approx(
        4 / 3 * step_flops(GPT_175B, "llm-foundry")
    )
    plain = replace(GPT_175B, recompute="none")
    assert step_flops(plain, "llm-foundry-hfu") == step_flops(plain, "llm-foundry")
    assert step_flops(GPT_175B, "bloom") == pytest.approx(n * 4 * 2 * tokens)


@pytest.mark.parametrize(
    ("name", "convention", "gflops"),
    [
        ("baichuan2-13b", "sc21-model", 89.58),
        ("baichuan2-13b", "megatron", 84.55),
        ("baichuan2-13b", "6N", 83.38),
        ("baichuan2-7b", "sc21-model", 48.39),
        ("baichuan2-7b", "6N", 45.04),
    ],
)
def test_our_models(name: str, convention: Convention, gflops: float) -> None:
    """Computed by hand at sequence length 4,096 (6N counts the embedding, the others do not)."""
    assert flops_per_token(baichuan(name), convention) / 1e9 == pytest.approx(gflops, abs=0.005)


@pytest.mark.parametrize(("ours", "theirs"), [("6N", "6N"), ("megatron", "causal"), ("sc21-model", "full")])
def test_same_as_the_training_loop(ours: Convention, theirs: training_flops.FlopsConvention) -> None:
    model = load_config("preset:baichuan2-7b").config.model
    expected = training_flops.flops_per_token(model, seq_len=4096, convention=theirs)
    assert flops_per_token(baichuan("baichuan2-7b"), ours) == pytest.approx(expected, rel=1e-12)


def test_rate_and_seconds_are_inverse() -> None:
    """SC21 table 2: 153 TFLOP/s on 384 GPUs are 49.0 % of 312."""
    seconds = seconds_from_tflops(GPT_175B, 153, "sc21")
    assert tflops_per_gpu(GPT_175B, seconds, "sc21") == pytest.approx(153)
    assert utilization(GPT_175B, load_hardware("a100-80g"), seconds, "sc21") == pytest.approx(153 / 312)
    # 180 TFLOP/s of 6N are 2,159 tokens/s a GPU, and of the causal count 2,129.
    work = baichuan("baichuan2-13b")
    rate = work.tokens_per_step / work.gpus / seconds_from_tflops(work, 180, "megatron")
    assert rate == pytest.approx(180e12 / 84.55e9, rel=1e-4)


def test_unknown_convention() -> None:
    with pytest.raises(ConfigError, match='"mfu" is unknown; use one of sc21, sc21-model, megatron, 6N'):
        flops_per_token(GPT_175B, "mfu")  # type: ignore[arg-type]
