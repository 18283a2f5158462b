"""The Baichuan 2 language model: embedding, blocks, final norm, NormHead (report sections 2.4, 2.5).

Shapes: B batch, S sequence, V vocabulary, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.attention import Positions
from megatron_b2.model.block import Block, RMSNorm
from megatron_b2.model.cache import KVCache
from megatron_b2.model.split import ModelSplit, StageLayers
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.bundle import Ops
from megatron_b2.ops.head_loss import HeadLoss
from megatron_b2.ops.norm_head import norm_head_logits
from megatron_b2.ops.rope import rope_table

PADDING_ID = 0
"""Embedding row that is zero and never learns, as in the published model."""

Recompute = Literal["none", "selective", "full"]


class Embedding(nn.Module):
    """Token embedding; of its V rows this rank's."""

    def __init__(
        self, config: ModelConfig, *, split: ModelSplit, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.tensor = split.tensor
        rows = self.tensor.share(config.vocab_size)
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=dtype, device=device))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] to [B, S, h] in the form between layers."""
        if self.tensor.group is None:
            return F.embedding(input_ids, self.weight, padding_idx=PADDING_ID)
        rows = len(self.weight)
        local = input_ids - self.tensor.rank * rows
        is_elsewhere = (local < 0) | (local >= rows)
        padding = PADDING_ID if self.tensor.rank == 0 else None
        x = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight, padding_idx=padding)
        return self.tensor.leave(x.masked_fill(is_elsewhere.unsqueeze(-1), 0))


class NormHead(nn.Module):
    """Output layer with normalised rows; keeps the raw rows, of V this rank's."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        split: ModelSplit,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.tensor = split.tensor
        rows = self.tensor.share(config.vocab_size)
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=dtype, device=device))

    def forward(
        self, hidden: Tensor, labels: Tensor, ce_scale: Tensor | float, z_scale: Tensor | float
    ) -> HeadLoss:
        """Sums over the tokens of hidden [B, S, h] with labels int64 [B, S]; see `norm_head_loss`."""
        loss: HeadLoss = self.ops.norm_head_loss(
            self.tensor.enter(hidden).flatten(0, 1),
            self.weight,
            labels.flatten(),
            ce_scale=ce_scale,
            z_scale=z_scale,
            tensor=self.tensor,
        )
        return loss


class BaichuanModel(nn.Module):
    """The model, or the stage of it that a pipeline rank holds. Parameters are uninitialised.

    Args:
        config: shape of the whole model.
        split: tensor- and context-parallel ranks; every rank of them gets the same input ids.
        stage: the layers to make; none makes all.
        ops: backends of the operations; none means the references.
        recompute: what the backward pass recomputes instead of keeping.
        recompute_layers: blocks (global indices) that do; empty means all.
        dtype: of parameters and activations.
        device: "meta" builds the 13B shape in a moment.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        split: ModelSplit | None = None,
        stage: StageLayers | None = None,
        ops: Ops | None = None,
        recompute: Recompute = "none",
        recompute_layers: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.split = split = split or ModelSplit()
        ops = ops or Ops()
        self.stage = stage = stage or StageLayers.whole(config.num_layers)
        chosen = stage.layers if recompute == "none" or not recompute_layers else recompute_layers
        self._recomputed_whole = frozenset(map(str, chosen)) if recompute == "full" else frozenset()
        if stage.has_embedding:
            self.embedding = Embedding(config, split=split, dtype=dtype, device=device)
        # Keys are global layer indices, so that a parameter has one name in every layout.
        self.layers = nn.ModuleDict(
            {
                str(index): Block(
                    config,
                    split=split,
                    ops=ops,
                    recompute_core=recompute == "selective" and index in chosen,
                    dtype=dtype,
                    device=device,
                )
                for index in stage.layers
            }
        )
        if stage.has_head:
            self.final_norm = RMSNorm(
                config.hidden_size, eps=config.norm_eps, ops=ops, dtype=dtype, device=device
            )
            self.head = NormHead(config, split=split, ops=ops, dtype=dtype, device=device)

    def hidden_states(
        self,
        x: Tensor,
        *,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run the layers of this stage; the last stage also normalises.

        Args:
            x: int64 input ids [B, S] for the first stage, else the activation of the stage before.
            segment_ids: integer [B, S of the whole sequence], non-decreasing document ids, or none for one
                document a row.
            position_ids: integer [B, S]; none counts from the start of each document.
            cache: continue after the positions it holds; excludes segment_ids.

        Returns:
            [B, S, h]; under sequence parallelism the shard [B, S / tensor, h].
        """
        if cache is not None and segment_ids is not None:
            raise ValueError(
                "segment_ids and a key-value cache cannot be combined: generate one document a row"
            )
        length = x.shape[1] if self.stage.has_embedding else self._sequence_length(x)
        positions = self._positions(x, length, segment_ids, position_ids, cache)
        if self.stage.has_embedding:
            x = self.embedding(x)
        for index, (name, block) in enumerate(self.layers.items()):
            if name in self._recomputed_whole and torch.is_grad_enabled():
                x = checkpoint(block, x, positions, use_reentrant=False)
            else:
                x = block(x, positions, cache, index)
        if cache is not None:
            cache.advance(length)
        return self.final_norm(x) if self.stage.has_head else x

    def _sequence_length(self, x: Tensor) -> int:
        tensor = self.split.tensor
        return x.shape[1] * (tensor.size if tensor.sequence_parallel else 1)

    def _positions(
        self,
        x: Tensor,
        length: int,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> Positions:
        documents = None if segment_ids is None else Documents.of(segment_ids)
        if self.config.position == "alibi":
            tensor = self.split.tensor
            # A rank slices the global list: the slopes are not monotone and not those of fewer heads.
            slopes = alibi_slopes(self.config.num_heads).chunk(tensor.size)[tensor.rank]
            return Positions(None, slopes.to(x.device), documents)
        if position_ids is None:
            context = self.split.context
            start = context.rank * length if cache is None else cache.length
            here = slice(start, start + length)
            count = torch.arange(start, start + length, device=x.device).unsqueeze(0)
            position_ids = count if documents is None else documents.positions()[:, here]
        rope = rope_table(position_ids, head_dim=self.config.head_dim, base=self.config.rope_base)
        return Positions(rope, None, documents)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        ce_scale: Tensor | float = 1.0,
        z_scale: Tensor | float = 0.0,
    ) -> HeadLoss | Tensor:
        """Loss sums over a micro-batch; of a stage without the head its activation.

        Args:
            x: as in `hidden_states`.
            labels: int64 [B, S], the target of each position (already shifted); -100 is ignored.
            segment_ids: as in `hidden_states`.
            position_ids: integer [B, S] or none.
            ce_scale: factor of the cross-entropy sum in `total`.
            z_scale: factor of the max-z sum in `total`.

        Returns:
            `HeadLoss` sums over this rank's tokens.
        """
        hidden = self.hidden_states(x, segment_ids=segment_ids, position_ids=position_ids)
        if not self.stage.has_head:
            return hidden
        if labels is None:
            raise ValueError("the stage with the head needs labels")
        loss: HeadLoss = self.head(hidden, labels, ce_scale, z_scale)
        return loss

    def logits(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """fp32 logits [B, S, V] of int64 input_ids [B, S]; of V this rank's under tensor parallelism."""
        hidden = self.hidden_states(input_ids, segment_ids=segment_ids, cache=cache)
        return norm_head_logits(self.split.tensor.enter(hidden), self.head.weight)
