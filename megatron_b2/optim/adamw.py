"""AdamW as the report trains with it: decoupled decay on matrices, none on norms (section 2.5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_b2.config.schema import OptimConfig
from megatron_b2.ops.registry import Backend
from megatron_b2.optim.fused_adamw import FusedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer state tensors that have the shape of their parameter."""


def has_weight_decay(name: str) -> bool:
    """Whether a parameter decays: every matrix, no norm gain."""
    return not name.endswith("norm.weight")


def build_adamw(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, *, backend: Backend
) -> torch.optim.Optimizer:
    """AdamW over named parameters in two groups, with decay and without.

    `backend` "cuda" updates all tensors of a group in one launch of our kernel, "reference" is torch's own
    fused AdamW; both have the same state.
    """
    decay = [p for name, p in parameters.items() if has_weight_decay(name)]
    plain = [p for name, p in parameters.items() if not has_weight_decay(name)]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    if backend == "cuda":
        return FusedAdamW(groups, lr=config.max_lr, betas=betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=betas, eps=config.eps, fused=True)


def create_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Make each parameter's state now, all zero, so that checkpoints work at any step."""
    for parameter in parameters:
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        optimizer.state[parameter] = state
