"""The pipeline stages of one rank as one module, and how a micro-batch goes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops.bundle import Ops
from megatron_b2.ops.head_loss import HeadLoss
from megatron_b2.parallel.breadcrumbs import Breadcrumbs
from megatron_b2.parallel.groups import ParallelGroups
from megatron_b2.pipeline.partition import stage_layers
from megatron_b2.pipeline.runner import PipelineRunner


class PipelinedModel(nn.Module):
    """Chunks of layers of one pipeline rank; chunk c is virtual stage c * pipeline + rank.

    Args:
        config: the run.
        split: tensor and context parallelism of every stage.
        ops: backends of the operations.
        groups: process groups of this rank.
        dtype: of parameters and activations.
        device: where this rank computes.
        crumbs: take where this rank is, for a watchdog.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        split: ModelSplit,
        ops: Ops,
        groups: ParallelGroups,
        dtype: torch.dtype,
        device: torch.device,
        crumbs: Breadcrumbs,
    ) -> None:
        super().__init__()
        num_ranks, num_chunks = groups.layout.pipeline, config.parallel.virtual_stages
        rank, num_stages = groups.coordinates.pp, num_ranks * num_chunks
        stages = stage_layers(config.model, num_stages)
        self.chunks = nn.ModuleList(
            BaichuanModel(
                config.model,
                split=split,
                ops=ops,
                stage=stages[stage],
                recompute=config.train.recompute,
                recompute_layers=config.train.recompute_layers,
                dtype=dtype,
                device=device,
            )
            for stage in range(rank, num_stages, num_ranks)
        )
        self._runner = PipelineRunner(
            schedule=config.parallel.schedule,
            rank=rank,
            num_ranks=num_ranks,
            num_chunks=num_chunks,
            group=groups.pp,
            gradient_group=groups.pp_gradients,
            dtype=dtype,
            device=device,
            split_backward=config.train.recompute != "full",
            crumbs=crumbs,
        )
        self._hidden_size = config.model.hidden_size
        self._tensor = split.tensor

    def train_batch(
        self,
        micro: Sequence[Batch],
        ce_scale: Tensor,
        z_scale: Tensor,
        *,
        after_backward: Callable[[], None],
    ) -> Tensor:
        """Forward and backward of this rank's chunks; sums [ce, max_z], fp64, zero but on the last rank."""
        sums = torch.zeros(2, dtype=torch.float64, device=ce_scale.device)

        def forward(chunk: int, index: int, x: Tensor | None) -> Tensor:
            return self._stage(chunk, micro[index], x, ce_scale, z_scale, sums)

        self._runner.run(
            forward,
            num_micro=len(micro),
            shape=self._activation_shape(micro[0]),
            after_backward=lambda _chunk, _index: after_backward(),
        )
        return sums

    def evaluate_batch(self, micro: Sequence[Batch]) -> Tensor:
        """Forward only; sums as in `train_batch`."""
        device = micro[0].input_ids.device
        one, sums = torch.ones((), device=device), torch.zeros(2, dtype=torch.float64, device=device)
        self._runner.run_forward(
            lambda chunk, index, x: self._stage(chunk, micro[index], x, one, one, sums),
            num_micro=len(micro),
            shape=self._activation_shape(micro[0]),
        )
        return sums

    def _stage(
        self, chunk: int, batch: Batch, x: Tensor | None, ce_scale: Tensor, z_scale: Tensor, sums: Tensor
    ) -> Tensor:
        out = self.chunks[chunk](
            batch.input_ids if x is None else x,
            batch.labels,
            segment_ids=batch.segment_ids,
            position_ids=batch.position_ids,
            ce_scale=ce_scale,
            z_scale=z_scale,
        )
        if isinstance(out, HeadLoss):
            sums += torch.stack([out.ce, out.max_z]).detach()
            return out.total
        activation: Tensor = out
        return activation

    def _activation_shape(self, batch: Batch) -> tuple[int, int, int]:
        rows, length = batch.input_ids.shape
        shard = self._tensor.size if self._tensor.sequence_parallel else 1
        return rows, length // shard, self._hidden_size
