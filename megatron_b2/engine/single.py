"""The oracle: one process, plain torch. Every other engine is tested against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine
from megatron_b2.engine.sharded_state import whole_state
from megatron_b2.model.model import BaichuanModel
from megatron_b2.ops.bundle import load_ops
from megatron_b2.ops.head_loss import HeadLoss
from megatron_b2.optim.adamw import build_adamw, create_state
from megatron_b2.parallel.comm import Comm
from megatron_b2.parallel.layout import Layout

DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_model(model: nn.Module, batch: Batch, ce_scale: Tensor | float, z_scale: Tensor | float) -> HeadLoss:
    """Loss sums of one micro-batch through a whole model (or what wraps it)."""
    loss: HeadLoss = model(
        batch.input_ids,
        batch.labels,
        segment_ids=batch.segment_ids,
        position_ids=batch.position_ids,
        ce_scale=ce_scale,
        z_scale=z_scale,
    )
    return loss


class SingleEngine(Engine):
    """Plain torch on one process.

    In fp32 the model's parameters are the master weights. In bf16 the model works in bf16 while fp32 master
    weights, moments and accumulated gradients are kept beside it.
    """

    def __init__(self, config: RunConfig, *, comm: Comm, device: torch.device) -> None:
        super().__init__(config, comm=comm, device=device, layout=Layout())
        model = BaichuanModel(
            config.model,
            ops=load_ops(self.op_choices, config.ops),
            recompute=config.train.recompute,
            recompute_layers=config.train.recompute_layers,
            dtype=DTYPES[config.train.precision],
            device=device,
        )
        self._start(model)
        self._working = dict(model.named_parameters())
        self._masters: dict[str, nn.Parameter] = (
            self._working
            if config.train.precision == "fp32"
            else {name: nn.Parameter(p.detach().float()) for name, p in self._working.items()}
        )
        self._optimizer = build_adamw(self._masters, config.optim, backend=self.backend_of("adamw"))
        create_state(self._optimizer, self._masters.values())
        self._count = torch.zeros(1, device=device)

    def _accumulate(self, micro: Sequence[Batch], ce_scale: Tensor, z_scale: Tensor) -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro:
            out = run_model(self.module, batch, ce_scale, z_scale)
            out.total.backward()
            sums += torch.stack([out.ce, out.max_z])
            self._gradients_to_masters()
        return sums

    def _evaluate(self, micro: Sequence[Batch]) -> Tensor:
        outs = [run_model(self.module, batch, 1.0, 0.0) for batch in micro]
        return torch.stack([torch.stack([out.ce, out.max_z]) for out in outs]).double().sum(dim=0)

    def _gradients_to_masters(self) -> None:
        if self._masters is self._working:
            return
        for name, parameter in self._working.items():
            master = self._masters[name]
            if parameter.grad is not None:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    def _update(self, lr: float) -> Tensor:
        clip = self.config.optim.grad_clip
        norm = nn.utils.clip_grad_norm_(self._masters.values(), clip if clip > 0 else float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._count += 1
        self._optimizer.zero_grad(set_to_none=True)
        self._copy_to_working()
        return norm

    @torch.no_grad()
    def _copy_to_working(self) -> None:
        if self._masters is not self._working:
            for name, parameter in self._working.items():
                parameter.copy_(self._masters[name])

    def _discard_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _sum_over_batch(self, tensor: Tensor) -> Tensor:
        return tensor

    def _sum_over_stages(self, tensor: Tensor) -> Tensor:
        return tensor

    def logical_state(self) -> LogicalState:
        """Whole tensors; see `Engine.logical_state`."""
        return whole_state(self._masters, self._optimizer, self._count, write=True)

    def state_loaded(self) -> None:
        """See `Engine.state_loaded`."""
        for master in self._masters.values():
            self._optimizer.state[master]["step"].copy_(self._count[0])
        self._copy_to_working()
