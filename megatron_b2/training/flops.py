"""Training FLOPs of a token, by named conventions, and what fraction of a peak they are.

Published utilisations differ by more than 7 % only through the convention, so every number carries its
name. All count a forward and twice as much for the backward pass; recomputation is not counted.
"""

from __future__ import annotations

from typing import Literal

from megatron_b2.config.schema import ModelConfig

FlopsConvention = Literal["6N", "causal", "full"]
"""`6N`: six times all parameters, attention scores not counted.
`causal`: matrix products plus half of the attention scores, as Megatron-LM counts since 2025.
`full`: matrix products plus all attention scores, as the SC21 paper and llm-foundry count."""

DEFAULT_CONVENTION: FlopsConvention = "causal"
"""What the progress display and metrics report: the work a causal kernel really does (our choice)."""


def flops_per_token(model: ModelConfig, *, seq_len: int, convention: FlopsConvention) -> float:
    """FLOPs to train one token at sequence length `seq_len`.

    The embedding look-up is no product and is left out of `causal` and `full`.
    """
    if convention == "6N":
        return 6.0 * model.num_parameters
    h, f = model.hidden_size, model.ffn_hidden_size
    matrices = model.num_layers * (4 * h * h + 3 * h * f) + model.vocab_size * h
    scores = 12.0 * model.num_layers * h * seq_len
    return 6.0 * matrices + (scores if convention == "full" else scores / 2)


def model_flops_utilization(
    model: ModelConfig,
    *,
    seq_len: int,
    tokens_per_second: float,
    num_devices: int,
    peak_tflops: float | None,
    convention: FlopsConvention = DEFAULT_CONVENTION,
) -> float | None:
    """Achieved share (0 to 1) of the peak of all devices, or None when no peak is configured.

    `tokens_per_second` is of the whole run, `peak_tflops` of one device in TFLOP/s at the training precision.
    """
    if peak_tflops is None:
        return None
    achieved = tokens_per_second * flops_per_token(model, seq_len=seq_len, convention=convention)
    return achieved / (num_devices * peak_tflops * 1e12)
