"""The oracle: one process, plain torch. Every other engine is tested against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from megatron_b2.checkpoint.logical import LogicalState, LogicalTensor, Piece
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine
from megatron_b2.model.model import BaichuanModel
from megatron_b2.ops.head_loss import HeadLoss
from megatron_b2.optim.adamw import MOMENTS, build_adamw, create_state
from megatron_b2.parallel.comm import Comm

DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole(tensor: Tensor, *, write: bool = True) -> LogicalTensor:
    """A logical tensor that this rank holds completely."""
    piece = Piece(tensor=tensor.detach(), offsets=(0,) * tensor.dim(), write=write)
    return LogicalTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, pieces=(piece,))


def whole_state(
    masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, count: Tensor, *, write: bool
) -> LogicalState:
    """Logical state of unsharded fp32 weights with AdamW moments and the step count [1]."""
    state = {f"model/{name}": whole(tensor, write=write) for name, tensor in masters.items()}
    for key in MOMENTS:
        for name, tensor in masters.items():
            state[f"optim/{key}/{name}"] = whole(optimizer.state[tensor][key], write=write)
    state["optim/step"] = whole(count, write=write)
    return state


class SingleEngine(Engine):
    """Plain torch on one process.

    In fp32 the model's parameters are the master weights. In bf16 the model works in bf16 while fp32 master
    weights, moments and accumulated gradients are kept beside it.
    """

    def __init__(self, config: RunConfig, *, comm: Comm, device: torch.device) -> None:
        super().__init__(config, comm=comm, device=device)
        model = BaichuanModel(
            config.model,
            recompute=config.train.recompute,
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
        self._optimizer = build_adamw(self._masters, config.optim)
        create_state(self._optimizer, self._masters.values())
        self._count = torch.zeros(1, device=device)

    def _forward(self, batch: Batch, ce_scale: Tensor, z_scale: Tensor) -> HeadLoss:
        loss: HeadLoss = self.model(
            batch.input_ids,
            batch.labels,
            segment_ids=batch.segment_ids,
            position_ids=batch.position_ids,
            ce_scale=ce_scale,
            z_scale=z_scale,
        )
        return loss

    def _backward(self, total: Tensor, *, last: bool) -> None:
        total.backward()
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

    def _all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def logical_state(self) -> LogicalState:
        """Whole tensors; see `Engine.logical_state`."""
        return whole_state(self._masters, self._optimizer, self._count, write=True)

    def state_loaded(self) -> None:
        """See `Engine.state_loaded`."""
        for master in self._masters.values():
            self._optimizer.state[master]["step"].copy_(self._count[0])
        self._copy_to_working()
