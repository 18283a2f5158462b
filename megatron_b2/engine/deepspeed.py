"""DeepSpeed ZeRO data parallelism, stages 0 to 3, behind the `Engine` interface.

DeepSpeed shards and reduces; the loss scale, the learning rate, the finite check, the data and the
checkpoints are ours. This is the only module that imports deepspeed; `_Shards` below is the only place that
knows how a stage lays out its fp32 weights and moments.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from megatron_b2.checkpoint.logical import LogicalState, LogicalTensor, flat_pieces
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine
from megatron_b2.engine.deepspeed_config import deepspeed_json
from megatron_b2.engine.single import DTYPES, whole, whole_state
from megatron_b2.model.model import BaichuanModel
from megatron_b2.ops.head_loss import HeadLoss
from megatron_b2.optim.adamw import MOMENTS, build_adamw, create_state
from megatron_b2.parallel.comm import Comm

_CPU_SHARED_MEMORY_OP = "deepspeed_shm_comm"


def _prepare() -> None:
    """Quiet logs, and keep DeepSpeed from compiling its inference-only CPU op (decision D11)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 still calls the collectives by the names of torch 2.12.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    deepspeed.ops.__compatible_ops__[_CPU_SHARED_MEMORY_OP] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


class DeepSpeedEngine(Engine):
    """One rank of a ZeRO data-parallel run; torch.distributed must be initialised."""

    def __init__(self, config: RunConfig, *, comm: Comm, device: torch.device) -> None:
        super().__init__(config, comm=comm, device=device)
        _prepare()
        self._stage = config.parallel.zero_stage
        settings = deepspeed_json(config, world_size=comm.size)
        shard_at_birth = (
            deepspeed.zero.Init(config_dict_or_path=settings)
            if self._stage == 3
            else contextlib.nullcontext()
        )
        with shard_at_birth:
            model = BaichuanModel(
                config.model,
                recompute=config.train.recompute,
                dtype=DTYPES[config.train.precision],
                device=device,
            )
        optimizer = build_adamw(dict(model.named_parameters()), config.optim)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._start(self._engine.module)
        self._count = torch.zeros(1, device=device)
        self._shards = _Shards(self._engine, self._stage)

    def _forward(self, batch: Batch, ce_scale: Tensor, z_scale: Tensor) -> HeadLoss:
        loss: HeadLoss = self._engine(
            batch.input_ids,
            batch.labels,
            segment_ids=batch.segment_ids,
            position_ids=batch.position_ids,
            ce_scale=ce_scale,
            z_scale=z_scale,
        )
        return loss

    def _backward(self, total: Tensor, *, last: bool) -> None:
        # A fresh tensor: at stage 0 DeepSpeed 0.19.8 divides the gradient of a forward output by the number
        # of micro-batches in spite of scale_wrt_gas=False.
        self._engine.backward(total * 1.0, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def _update(self, lr: float) -> Tensor:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # Stage 0 in fp32 clips without telling the norm.
        norm = self._whole_gradient_norm() if self._stage == 0 else None
        self._engine.step()
        self._count += 1
        if norm is None:
            norm = torch.as_tensor(
                self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device
            )
        return norm

    def _whole_gradient_norm(self) -> Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(grads)

    def _discard_gradients(self) -> None:
        self._shards.discard_gradients()
        self._engine.micro_steps += 1

    def _all_reduce_sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def logical_state(self) -> LogicalState:
        """Views of this rank's ZeRO partitions; see `Engine.logical_state`."""
        return self._shards.logical_state(self._count, write_whole=self.comm.rank == 0)

    def state_loaded(self) -> None:
        """See `Engine.state_loaded`."""
        self._shards.refresh(self._count)


class _Shards:
    """Where each ZeRO stage keeps fp32 weights and AdamW moments."""

    def __init__(self, engine: Any, stage: int) -> None:
        self._engine = engine
        self._stage = stage
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._zero = engine.optimizer
        self._adam = engine.basic_optimizer if stage == 0 else self._zero.optimizer
        create_state(self._adam, self._flat_masters())
        if stage in (1, 2):
            # Points every parameter at its slice of the moments just made.
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat_masters(self) -> list[Tensor]:
        if self._stage == 0:
            return list(self._names)
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        if isinstance(self._zero, BF16_Optimizer):
            return list(self._zero.fp32_groups_flat_partition)
        return list(self._zero.single_partition_of_fp32_groups)

    def logical_state(self, count: Tensor, *, write_whole: bool) -> LogicalState:
        """Logical tensors of this rank; `write_whole` says who saves what is replicated."""
        if self._stage == 0:
            masters = {name: parameter for parameter, name in self._names.items()}
            return whole_state(masters, self._adam, count, write=write_whole)
        fragments = self._stage_3_fragments if self._stage == 3 else self._stage_1_2_fragments
        state: LogicalState = {}
        for kind, key in (("model", None), *((f"optim/{m}", m) for m in MOMENTS)):
            for name, shape, start, flat in fragments(key):
                pieces = flat_pieces(flat, local_shape=shape, start=start)
                state[f"{kind}/{name}"] = LogicalTensor(shape=shape, dtype=torch.float32, pieces=pieces)
        state["optim/step"] = whole(count, write=write_whole)
        return state

    def _stage_1_2_fragments(self, key: str | None) -> Iterator[tuple[str, tuple[int, ...], int, Tensor]]:
        for parameter, name in self._names.items():
            mapping = parameter._hp_mapping
            flat = torch.empty(0) if mapping is None else mapping.get_hp_fragment(key).detach()
            start = 0 if mapping is None else mapping.lp_fragment_address.start
            yield name, tuple(parameter.shape), start, flat

    def _stage_3_fragments(self, key: str | None) -> Iterator[tuple[str, tuple[int, ...], int, Tensor]]:
        rank = dist.get_rank()
        for parameter, name in self._names.items():
            flat, _ = self._zero._get_fp32_opt_state_partition(parameter, True, optim_state_key=key)
            shape, total = tuple(parameter.ds_shape), parameter.ds_numel
            start = min(rank * flat.numel(), total)
            yield name, shape, start, flat.detach()[: total - start]

    @torch.no_grad()
    def refresh(self, count: Tensor) -> None:
        """Copy fp32 weights to the working weights and the step count to every partition."""
        for master in self._flat_masters():
            self._adam.state[master]["step"].copy_(count[0])
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        if self._stage == 3:
            self._zero._partition_all_parameters()
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def discard_gradients(self) -> None:
        """Drop the gradients of an unfinished step."""
        if self._stage == 0:
            self._engine.zero_grad()
            return
        self._zero.zero_grad()
        if self._stage in (1, 2) and not isinstance(self._zero, BF16_Optimizer):
            self._zero.micro_step_id = -1
            for group in list(self._zero.averaged_gradients):
                self._zero.averaged_gradients[group] = None
                self._zero.all_grad_tensors[group] = None
            self._zero._release_preflattened_grad_buffers()
        if self._stage == 3:
            self._zero.micro_step_id = 0
            self._zero._epilogue_ran_this_backward = False
            self._zero.averaged_gradients = {}
