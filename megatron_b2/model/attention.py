"""Self-attention of one block: fused QKV, rotary or ALiBi positions, output projection.

Shapes: B batch, S sequence (this rank's part under context parallelism), H heads of this rank, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.cache import KVCache
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.bundle import Ops


@dataclass(frozen=True)
class Positions:
    """Position information of one forward pass, shared by all blocks."""

    rope: tuple[Tensor, Tensor] | None
    """cos and sin, fp32 [B or 1, S, D/2]; none for ALiBi."""
    alibi_slopes: Tensor | None
    """fp32 [H] of this rank's heads; none for RoPE."""
    documents: Documents | None
    """Packed documents of the whole sequence; none for one document a row."""


class Attention(nn.Module):
    """Multi-head attention without bias (report section 2.4)."""

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
        h, width = config.hidden_size, split.tensor.share(config.hidden_size)
        self.num_heads, self.head_dim = split.tensor.share(config.num_heads), config.head_dim
        self.split = split
        self.ops = ops
        self.recompute_core = recompute_core
        self.qkv = nn.Linear(h, 3 * width, bias=False, dtype=dtype, device=device)
        """Rows Q | K | V as three blocks, as the published W_pack; of each block this rank's heads."""
        self.output = nn.Linear(width, h, bias=False, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, positions: Positions, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """[B, S, h] to [B, S, h]; with a cache, x are the positions after those it holds."""
        qkv = self.qkv(self.split.tensor.enter(x))
        if self.recompute_core and torch.is_grad_enabled():
            core = checkpoint(self._core, qkv, positions, None, layer, use_reentrant=False)
        else:
            core = self._core(qkv, positions, cache, layer)
        return self.split.tensor.leave(self.output(core))

    def _core(self, qkv: Tensor, positions: Positions, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, _ = qkv.shape
        qkv = qkv.view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2) if positions.rope is None else self.ops.rope_split(qkv, *positions.rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        slopes, documents, context = positions.alibi_slopes, positions.documents, self.split.context
        if context.size > 1:
            out = self.ops.context_attention(
                q, k, v, context=context, alibi_slopes=slopes, documents=documents
            )
        else:
            out = self.ops.causal_attention(q, k, v, alibi_slopes=slopes, documents=documents)
        merged: Tensor = out.reshape(batch, length, self.num_heads * self.head_dim)
        return merged
