"""The C of a scaling law: training FLOPs of a run, by named conventions."""

from __future__ import annotations

from typing import Final, Literal

from megatron_b2.config.schema import ModelConfig
from megatron_b2.training.flops import flops_per_token

ComputeConvention = Literal["training", "6ND"]
"""`training`: the report's C, "training flops" (section 2.6). It gives no formula; we count every matrix
product of blocks and head and all attention scores, forward and backward (`full` of training/flops.py).
`6ND`: six times N times tokens, with the N of the report's Table 10, which leaves out embedding and head."""

CONVENTIONS: Final[tuple[ComputeConvention, ...]] = ("training", "6ND")


def run_flops(
    model: ModelConfig, *, seq_len: int, tokens: float, convention: ComputeConvention = "training"
) -> float:
    """FLOPs to train `model` on `tokens` tokens in sequences of `seq_len`; recomputation is not counted."""
    if convention == "6ND":
        return 6.0 * model.num_block_parameters * tokens
    return flops_per_token(model, seq_len=seq_len, convention="full") * tokens
