"""DeepSpeed ZeRO, stages 0 to 3, combined with tensor, sequence, context and pipeline parallelism.

DeepSpeed shards, reduces, clips and steps over the ranks that hold the same weights. The model's parallelism,
the pipeline schedule, the loss scale, the learning rate, the finite check and the checkpoints are ours. This
is the only module that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

# deepspeed.initialize imports it in any case, with torch.compile: seconds that forked ranks now inherit.
from deepspeed.runtime.zero.muon import muon_optimizer as _muon_optimizer  # noqa: F401
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine
from megatron_b2.engine.deepspeed_config import deepspeed_json
from megatron_b2.engine.pipelined import PipelinedModel
from megatron_b2.engine.sharded_state import logical_name
from megatron_b2.engine.single import DTYPES, run_model
from megatron_b2.engine.zero_state import ZeroState
from megatron_b2.errors import ConfigError
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.sharding import shard_spec
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops.bundle import load_ops
from megatron_b2.optim.adamw import build_adamw
from megatron_b2.parallel.breadcrumbs import Breadcrumbs
from megatron_b2.parallel.comm import Comm
from megatron_b2.parallel.context_parallel import ContextParallel, resolve_method
from megatron_b2.parallel.groups import ParallelGroups
from megatron_b2.parallel.layout import Layout
from megatron_b2.parallel.tensor_parallel import TensorParallel

_CPU_SHARED_MEMORY_OP = "deepspeed_shm_comm"


def _prepare() -> None:
    """Quiet logs, and keep DeepSpeed from compiling its inference-only CPU op (decision D11)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 still calls the collectives by the names of torch 2.12.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    deepspeed.ops.__compatible_ops__[_CPU_SHARED_MEMORY_OP] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


def require_quantization_kernels(config: RunConfig, device: torch.device) -> None:
    """DeepSpeed would fail at its first use of them, in a compiler or in the middle of a step."""
    names = ("quantized_weights", "quantized_gradients")
    problems = [
        f"parallel.{name} = true needs CUDA kernels of DeepSpeed, but this rank computes on "
        f"{device.type}: turn it off, or start on GPUs"
        for name in names
        if getattr(config.parallel, name) and device.type != "cuda"
    ]
    if problems:
        raise ConfigError(problems)


class DeepSpeedEngine(Engine):
    """One rank of a run in any layout; torch.distributed must be initialised."""

    def __init__(
        self, config: RunConfig, *, comm: Comm, device: torch.device, crumbs: Breadcrumbs | None = None
    ) -> None:
        require_quantization_kernels(config, device)
        layout = Layout.of(config.parallel, world_size=comm.size)
        super().__init__(config, comm=comm, device=device, layout=layout, crumbs=crumbs)
        _prepare()
        timeout = timedelta(minutes=config.parallel.timeout_minutes)
        self._groups = ParallelGroups.create(layout, timeout=timeout)
        self._stage = config.parallel.zero_stage
        settings = deepspeed_json(config, world_size=comm.size)
        units = _ModelParallelUnit(self._groups)
        split = model_split(config, self._groups, crumbs=self.crumbs)
        self._is_ring = split.context.method == "ring"
        born = contextlib.nullcontext()
        if self._stage == 3:
            group = self._groups.data_context
            born = deepspeed.zero.Init(config_dict_or_path=settings, data_parallel_group=group, mpu=units)
        with born:
            module = self._build(split)
        _stamp(module, tensor_rank=self.coordinates.tp)
        parameters, backend = dict(module.named_parameters()), self.backend_of("adamw")
        optimizer = build_adamw(parameters, config.optim, backend=backend)
        self._engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, mpu=units, dist_init_required=False
        )
        if split.tensor.sequence_parallel:
            reduce_sequence_gradients(module, split.tensor)
        self._start(self._engine.module)
        self._count = torch.zeros(1, device=device)
        self._zero_state = ZeroState(
            self._engine, stage=self._stage, model=config.model, layout=layout, coordinates=self.coordinates
        )

    def _build(self, split: ModelSplit) -> nn.Module:
        train = self.config.train
        ops = load_ops(self.op_choices, self.config.ops)
        if self.layout.pipeline > 1:
            return PipelinedModel(
                self.config,
                split=split,
                ops=ops,
                groups=self._groups,
                dtype=DTYPES[train.precision],
                device=self.device,
                crumbs=self.crumbs,
            )
        return BaichuanModel(
            self.config.model,
            split=split,
            ops=ops,
            recompute=train.recompute,
            recompute_layers=train.recompute_layers,
            dtype=DTYPES[train.precision],
            device=self.device,
        )

    def _accumulate(self, micro: Sequence[Batch], ce_scale: Tensor, z_scale: Tensor) -> Tensor:
        if isinstance(self.module, PipelinedModel):
            self._engine.set_gradient_accumulation_boundary(False)
            sums = self.module.train_batch(micro, ce_scale, z_scale, after_backward=self._after_backward)
            self._engine.set_gradient_accumulation_boundary(True)
            with self.crumbs.operation("reduction of gradients"):
                self._engine.allreduce_gradients()
            return sums
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro):
            with self.crumbs.operation("forward", micro=index):
                out = run_model(self._engine, batch, ce_scale, z_scale)
            # A fresh tensor: at stage 0 DeepSpeed 0.19.8 divides the gradient of a forward output by the
            # number of micro-batches in spite of scale_wrt_gas=False.
            with self.crumbs.operation("backward and reduction of gradients", micro=index):
                self._engine.backward(out.total * 1.0, scale_wrt_gas=False)
            if index < len(micro) - 1:
                self._engine.step()
            sums += torch.stack([out.ce, out.max_z])
        return sums

    def _after_backward(self) -> None:
        """bf16 with fp32 accumulation: add this micro-batch's gradients to the fp32 ones."""
        if hasattr(self._engine.optimizer, "update_hp_grads"):
            self._engine.optimizer.update_hp_grads(clear_lp_grads=True)

    def _evaluate(self, micro: Sequence[Batch]) -> Tensor:
        if isinstance(self.module, PipelinedModel):
            return self.module.evaluate_batch(micro)
        outs = [run_model(self._engine, batch, 1.0, 0.0) for batch in micro]
        return torch.stack([torch.stack([out.ce, out.max_z]) for out in outs]).double().sum(dim=0)

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
        grads = [p.grad for p in self.module.parameters() if p.grad is not None and is_counted(p)]
        norm = nn.utils.get_total_norm(grads).square()
        if self._groups.layout.tensor * self._groups.layout.pipeline > 1:
            dist.all_reduce(norm, group=self._groups.model)
        return norm.sqrt()

    @property
    def point_to_point_groups(self) -> Sequence[ProcessGroup]:
        """The pipeline's and the ring's."""
        ring = self._groups.cp if self._is_ring else None
        groups = (self._groups.pp, self._groups.pp_gradients, ring)
        return [group for group in groups if group is not None]

    def _discard_gradients(self) -> None:
        self._zero_state.discard_gradients()
        self._engine.micro_steps += 1

    def _sum_over_batch(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._groups.data_context)
        return tensor

    def _sum_over_stages(self, tensor: Tensor) -> Tensor:
        if self._groups.pp is not None:
            others = [r for r in dist.get_process_group_ranks(self._groups.pp) if r != self.comm.rank]
            with self.crumbs.operation("sum over the pipeline", peers=others):
                dist.all_reduce(tensor, group=self._groups.pp)
        return tensor

    def logical_state(self) -> LogicalState:
        """Views of this rank's partitions; see `Engine.logical_state`."""
        return self._zero_state.logical_state(self._count)

    def state_loaded(self) -> None:
        """See `Engine.state_loaded`."""
        self._zero_state.refresh(self._count)


class _ModelParallelUnit:
    """What DeepSpeed calls an mpu: data-parallel ranks are those of equal weights, model ranks TP x PP."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return self._groups.coordinates.pp * self._groups.layout.tensor + self._groups.coordinates.tp

    def get_model_parallel_world_size(self) -> int:
        return self._groups.layout.tensor * self._groups.layout.pipeline

    def get_model_parallel_group(self) -> Any:
        return self._groups.model

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.coordinates.tp

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.layout.tensor

    def get_tensor_model_parallel_group(self) -> Any:
        return self._groups.model

    def get_data_parallel_rank(self) -> int:
        return self._groups.coordinates.dp * self._groups.layout.context + self._groups.coordinates.cp

    def get_data_parallel_world_size(self) -> int:
        return self._groups.layout.data_context

    def get_data_parallel_group(self) -> Any:
        return self._groups.data_context


def model_split(config: RunConfig, groups: ParallelGroups, *, crumbs: Breadcrumbs) -> ModelSplit:
    """How the model of this rank is split; `crumbs` take whom a ring waits for."""
    layout, place = groups.layout, groups.coordinates
    tensor = TensorParallel(
        size=layout.tensor,
        rank=place.tp,
        group=groups.tp,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    method = resolve_method(
        config.parallel.context_method,
        heads_local=config.model.num_heads // layout.tensor,
        context=layout.context,
    )
    context = ContextParallel(
        size=layout.context, rank=place.cp, group=groups.cp, method=method, crumbs=crumbs
    )
    return ModelSplit(tensor=tensor, context=context)


def _stamp(module: nn.Module, *, tensor_rank: int) -> None:
    """Mark the parameters that this rank counts in the gradient norm: each is counted once over TP x PP."""
    for name, parameter in module.named_parameters():
        is_split = shard_spec(logical_name(name)).dim is not None
        parameter.tensor_model_parallel = is_split or tensor_rank == 0  # type: ignore[attr-defined]


def is_counted(parameter: nn.Parameter) -> bool:
    """Whether this rank counts a stamped parameter in the gradient norm."""
    counted: bool = parameter.tensor_model_parallel  # type: ignore[attr-defined]
    return counted


def reduce_sequence_gradients(module: nn.Module, tensor: TensorParallel) -> None:
    """Sum gradients of unsplit parameters over the sequence shards in fp32, driven by the shard table."""

    def total(grad: Tensor) -> Tensor:
        # A copy: autograd may still need what it gave to the hook.
        whole = grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=tensor.group)
        return whole.to(grad.dtype)

    for name, parameter in module.named_parameters():
        if shard_spec(logical_name(name)).dim is None:
            parameter.register_hook(total)
