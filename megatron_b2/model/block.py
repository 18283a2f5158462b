"""One pre-norm transformer block (report section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.attention import Attention, Positions
from megatron_b2.model.cache import KVCache
from megatron_b2.model.mlp import MLP
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] to [..., h]."""
        return rms_norm(x, self.weight, eps=self.eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is a sequence shard under sequence parallelism."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        split: ModelSplit,
        recompute_core: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.norm_eps
        self.input_norm = RMSNorm(h, eps=eps, dtype=dtype, device=device)
        self.attention = Attention(
            config, split=split, recompute_core=recompute_core, dtype=dtype, device=device
        )
        self.post_attention_norm = RMSNorm(h, eps=eps, dtype=dtype, device=device)
        self.mlp = MLP(config, split=split, recompute_core=recompute_core, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, positions: Positions, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """[B, S, h] to [B, S, h]."""
        x = x + self.attention(self.input_norm(x), positions, cache, layer)
        out: Tensor = x + self.mlp(self.post_attention_norm(x))
        return out
