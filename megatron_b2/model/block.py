"""One pre-norm transformer block (report section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.attention import Attention, Positions
from megatron_b2.model.cache import KVCache
from megatron_b2.model.mlp import MLP
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops.bundle import Ops


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain."""

    def __init__(
        self, size: int, *, eps: float, ops: Ops, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.eps = eps
        self.ops = ops
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] to [..., h]."""
        out: Tensor = self.ops.rms_norm(x, self.weight, eps=self.eps)
        return out

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual; all [..., h]."""
        out, total = self.ops.add_rms_norm(x, residual, self.weight, eps=self.eps)
        return out, total


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is a sequence shard under sequence parallelism."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        split: ModelSplit,
        ops: Ops,
        recompute_core: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.norm_eps
        self.input_norm = RMSNorm(h, eps=eps, ops=ops, dtype=dtype, device=device)
        self.attention = Attention(
            config, split=split, ops=ops, recompute_core=recompute_core, dtype=dtype, device=device
        )
        self.post_attention_norm = RMSNorm(h, eps=eps, ops=ops, dtype=dtype, device=device)
        self.mlp = MLP(
            config, split=split, ops=ops, recompute_core=recompute_core, dtype=dtype, device=device
        )

    def forward(
        self, x: Tensor, positions: Positions, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """[B, S, h] to [B, S, h]."""
        attended = self.attention(self.input_norm(x), positions, cache, layer)
        normed, x = self.post_attention_norm.add(attended, x)
        out: Tensor = x + self.mlp(normed)
        return out
