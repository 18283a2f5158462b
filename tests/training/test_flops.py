"""FLOP conventions against the numbers computed by hand for the published models."""

from __future__ import annotations

import pytest

from megatron_b2.config.schema import ModelConfig
from megatron_b2.training.flops import FlopsConvention, flops_per_token, model_flops_utilization

B7 = ModelConfig(hidden_size=4096, ffn_hidden_size=11008, num_layers=32, num_heads=32)
B13 = ModelConfig(hidden_size=5120, ffn_hidden_size=13696, num_layers=40, num_heads=40, position="alibi")


@pytest.mark.parametrize(
    ("model", "convention", "gflop"),
    [
        (B13, "full", 89.58),
        (B13, "causal", 84.55),
        (B13, "6N", 83.38),
        (B7, "full", 48.39),
        (B7, "6N", 45.04),
    ],
)
def test_published_sizes(model: ModelConfig, convention: FlopsConvention, gflop: float) -> None:
    value = flops_per_token(model, seq_len=4096, convention=convention)
    assert value / 1e9 == pytest.approx(gflop, abs=0.005)


def test_causal_halves_exactly_the_attention_scores() -> None:
    full = flops_per_token(B13, seq_len=4096, convention="full")
    causal = flops_per_token(B13, seq_len=4096, convention="causal")
    # Per layer and token: scores and values, 2 FLOPs over 4,096 keys of width 5,120; backward is twice that.
    assert full - causal == 0.5 * 40 * (2 * 2 * 4096 * 5120) * 3


def test_utilization_of_the_report() -> None:
    """180 TFLOPS of an A800's 312 is 57.7 %, which is 2,009 tokens/s a GPU at 13B with full attention."""
    mfu = model_flops_utilization(
        B13, seq_len=4096, tokens_per_second=2009 * 1024, num_devices=1024, peak_tflops=312, convention="full"
    )
    assert mfu == pytest.approx(0.577, abs=0.0005)


def test_unknown_peak_gives_no_number() -> None:
    mfu = model_flops_utilization(
        B7, seq_len=4096, tokens_per_second=1.0, num_devices=1, peak_tflops=None
    )
    assert mfu is None
