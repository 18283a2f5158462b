"""Key-value cache for generation: keys and values of all earlier positions, preallocated."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_b2.config.schema import ModelConfig


class KVCache:
    """Keys (already rotated) and values of one batch, [L, B, max_length, heads, D] each."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers, batch_size, max_length, config.num_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        """Positions filled in every layer."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, S, heads, D] to one layer and return everything it holds, [B, length + S, heads, D]."""
        stop = self.length + keys.shape[1]
        if stop > self.keys.shape[2]:
            raise ValueError(
                f"the key-value cache holds {self.keys.shape[2]} positions, {stop} are needed: make it longer"
            )
        self.keys[layer, :, self.length : stop] = keys
        self.values[layer, :, self.length : stop] = values
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def advance(self, count: int) -> None:
        """All layers have appended `count` positions."""
        self.length += count
