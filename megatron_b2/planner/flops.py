"""FLOPs of a step by named conventions: of SC21, BLOOM, Megatron-LM and llm-foundry (docs/planner.md).

Published utilisations differ by a third only through the convention, so no number is without its name.
training/flops.py counts our own models; this module counts any `Workload`, and what papers counted.
"""

from __future__ import annotations

from typing import Literal

from megatron_b2.errors import ConfigError
from megatron_b2.planner.hardware import Cluster
from megatron_b2.planner.workload import Workload

Convention = Literal["sc21", "sc21-model", "megatron", "6N", "bloom", "llm-foundry", "llm-foundry-hfu"]
"""`sc21`: hardware FLOPs with every block recomputed, all attention scores: Narayanan et al. 2021, eq. 3.
`sc21-model`: the same without recomputation (three quarters, but the head).
`megatron`: model FLOPs with half of the scores (causal), as Megatron-LM counts since 2025; ours as well.
`6N`: six times all parameters.
`bloom`: eight times all parameters (recomputation counted, scores not): BLOOM's early log.
`llm-foundry`: model FLOPs 6 N + 12 L h s, all scores, N with embeddings.
`llm-foundry-hfu`: four thirds of it where blocks are recomputed."""


def flops_per_token(workload: Workload, convention: Convention) -> float:
    """FLOPs to train one token.

    Raises:
        ConfigError: the convention is unknown.
    """
    shape, s = workload.shape, workload.seq_len
    matrices = shape.num_layers * shape.layer_matrix_parameters
    head = shape.table_parameters
    scores = 2.0 * shape.num_layers * shape.hidden_size * s  # multiply-adds of both products, all pairs
    recomputes = workload.recompute == "full"
    counted = {
        "sc21": 8.0 * (matrices + scores) + 6.0 * head,
        "sc21-model": 6.0 * (matrices + scores + head),
        "megatron": 6.0 * (matrices + scores / 2 + head),
        "6N": 6.0 * shape.parameters,
        "bloom": 8.0 * shape.parameters,
        "llm-foundry": 6.0 * (shape.parameters + scores),
        "llm-foundry-hfu": (8.0 if recomputes else 6.0) * (shape.parameters + scores),
    }
    if convention not in counted:
        raise ConfigError(f'FLOP convention "{convention}" is unknown; use one of {", ".join(counted)}')
    return counted[convention]


def step_flops(workload: Workload, convention: Convention) -> float:
    """FLOPs of one optimizer step over all ranks."""
    return workload.tokens_per_step * flops_per_token(workload, convention)


def tflops_per_gpu(workload: Workload, seconds: float, convention: Convention) -> float:
    """TFLOP/s of one device for a step of so many seconds."""
    return step_flops(workload, convention) / workload.gpus / seconds / 1e12


def seconds_from_tflops(workload: Workload, tflops: float, convention: Convention) -> float:
    """Seconds a step for a published TFLOP/s per device."""
    return step_flops(workload, convention) / workload.gpus / (tflops * 1e12)


def utilization(workload: Workload, cluster: Cluster, seconds: float, convention: Convention) -> float:
    """Share (0 to 1) of the peak of all devices: MFU, or HFU where the convention counts recomputation."""
    return tflops_per_gpu(workload, seconds, convention) * 1e12 / cluster.gpu.peak_flops
