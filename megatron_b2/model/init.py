"""Initial weights: N(0, 0.02) for matrices, one for norms, zero for the padding row.

Every parameter draws from its own generator, keyed by the seed and the parameter's name, so the weights of
a seed do not depend on the order in which parameters are made, nor on the device or the engine.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_b2.model.model import PADDING_ID


def initial_value(name: str, shape: torch.Size | tuple[int, ...], *, std: float, seed: int) -> Tensor:
    """fp32 initial value of the parameter `name` on the CPU (report and published config; init std 0.02)."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    value = torch.empty(shape).normal_(0.0, std, generator=generator)
    if name == "embedding.weight":
        value[PADDING_ID].zero_()
    return value
