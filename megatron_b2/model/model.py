"""The Baichuan 2 language model: embedding, blocks, final norm, NormHead (report sections 2.4, 2.5).

Shapes: B batch, S sequence, V vocabulary, h hidden.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.attention import Positions
from megatron_b2.model.block import Block, RMSNorm
from megatron_b2.model.cache import KVCache
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.head_loss import HeadLoss, norm_head_loss
from megatron_b2.ops.norm_head import norm_head_logits
from megatron_b2.ops.rope import rope_table

PADDING_ID = 0
"""Embedding row that is zero and never learns, as in the published model."""

Recompute = Literal["none", "selective", "full"]


class Embedding(nn.Module):
    """Token embedding [V, h]."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] to [B, S, h]."""
        return F.embedding(input_ids, self.weight, padding_idx=PADDING_ID)


class NormHead(nn.Module):
    """Output layer with normalised rows; keeps the raw rows [V, h]."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )

    def forward(
        self, hidden: Tensor, labels: Tensor, ce_scale: Tensor | float, z_scale: Tensor | float
    ) -> HeadLoss:
        """Sums over the tokens of hidden [B, S, h] with labels int64 [B, S]; see `norm_head_loss`."""
        return norm_head_loss(
            hidden.flatten(0, 1), self.weight, labels.flatten(), ce_scale=ce_scale, z_scale=z_scale
        )


class BaichuanModel(nn.Module):
    """Parameters are uninitialised; fill them with `initialize` or from a checkpoint.

    Args:
        config: shape of the model.
        recompute: what the backward pass recomputes instead of keeping.
        dtype: of parameters and activations.
        device: "meta" builds the 13B shape in a moment.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        recompute: Recompute = "none",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.embedding = Embedding(config, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            Block(config, recompute_core=recompute == "selective", dtype=dtype, device=device)
            for _ in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, device=device)
        self.head = NormHead(config, dtype=dtype, device=device)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final normalised hidden states.

        Args:
            input_ids: int64 [B, S].
            segment_ids: integer [B, S], non-decreasing document ids, or none for one document a row.
            position_ids: integer [B, S]; none counts from the start of each document.
            cache: continue after the positions it holds; excludes segment_ids.

        Returns:
            [B, S, h].
        """
        if cache is not None and segment_ids is not None:
            raise ValueError(
                "segment_ids and a key-value cache cannot be combined: generate one document a row"
            )
        positions = self._positions(input_ids, segment_ids, position_ids, cache)
        x = self.embedding(input_ids)
        for index, block in enumerate(self.layers):
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block, x, positions, use_reentrant=False)
            else:
                x = block(x, positions, cache, index)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        normed: Tensor = self.final_norm(x)
        return normed

    def _positions(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> Positions:
        documents = None if segment_ids is None else Documents.of(segment_ids)
        if self.config.position == "alibi":
            return Positions(None, alibi_slopes(self.config.num_heads).to(input_ids.device), documents)
        if position_ids is None:
            start = 0 if cache is None else cache.length
            count = torch.arange(start, start + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
            position_ids = count if documents is None else documents.positions()
        rope = rope_table(position_ids, head_dim=self.config.head_dim, base=self.config.rope_base)
        return Positions(rope, None, documents)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        ce_scale: Tensor | float = 1.0,
        z_scale: Tensor | float = 0.0,
    ) -> HeadLoss:
        """Loss sums over a micro-batch.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S], the target of each position (already shifted); -100 is ignored.
            segment_ids: integer [B, S] or none.
            position_ids: integer [B, S] or none.
            ce_scale: factor of the cross-entropy sum in `total`.
            z_scale: factor of the max-z sum in `total`.

        Returns:
            `HeadLoss` sums.
        """
        hidden = self.hidden_states(input_ids, segment_ids=segment_ids, position_ids=position_ids)
        loss: HeadLoss = self.head(hidden, labels, ce_scale, z_scale)
        return loss

    def logits(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """fp32 logits [B, S, V] of int64 input_ids [B, S]."""
        hidden = self.hidden_states(input_ids, segment_ids=segment_ids, cache=cache)
        return norm_head_logits(hidden, self.head.weight)
