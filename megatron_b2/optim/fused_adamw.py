"""AdamW in one kernel launch for many tensors (csrc/cuda/adamw.cu); fp32 moments, decoupled decay.

Its state is that of torch.optim.AdamW(fused=True): "step" (fp32, 0-dim, on the parameter's device), "exp_avg"
and "exp_avg_sq" of the parameter's shape. Moments are fp32 also for 16-bit parameters; but `load_state_dict`
of torch.optim.Optimizer casts them to the parameter's dtype, so keep fp32 masters where runs are resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, overload

import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.cuda import extension


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) as torch.optim.AdamW computes it, for CUDA tensors.

    Args:
        params: as for torch.optim.AdamW; parameters fp32, bf16 or fp16.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        copies: parameter -> bf16 tensor of its shape that gets the new value, rounded, in the same pass.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)  # type: ignore[arg-type,unused-ignore]
        self._copies = dict(copies or {})
        for parameter, copy in self._copies.items():
            if copy.dtype != torch.bfloat16 or copy.shape != parameter.shape or not copy.is_contiguous():
                raise InputError(f"a copy must be bf16, contiguous, of shape {list(parameter.shape)}")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient: one launch for up to 56 of a group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            active = [parameter for parameter in group["params"] if parameter.grad is not None]
            if active:
                states = [self._state_of(parameter) for parameter in active]
                torch._foreach_add_([state["step"] for state in states], 1)
                for _, rows in groupby(
                    sorted(zip(map(_kind, active), range(len(active)), strict=True)), key=_first
                ):
                    chosen = [index for _, index in rows]
                    self._launch(group, [active[i] for i in chosen], [states[i] for i in chosen])
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        step = state.get("step", torch.zeros((), dtype=torch.float32))
        state["step"] = step.to(parameter.device, torch.float32)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = state.get(key)
            if moment is None:
                state[key] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            elif moment.dtype != torch.float32 or not moment.is_contiguous():
                state[key] = moment.float().contiguous()
        return state

    def _launch(
        self, group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Tensor]]
    ) -> None:
        """One call for parameters of one device, dtype and gradient dtype."""
        rows, kept = [], []
        for parameter, state in zip(parameters, states, strict=True):
            if not parameter.is_contiguous():
                raise InputError(
                    f"FusedAdamW needs contiguous parameters; one of {list(parameter.shape)} is not"
                )
            assert parameter.grad is not None
            kept.append(parameter.grad.contiguous())
            copy = self._copies.get(parameter)
            pointers = (parameter, kept[-1], state["exp_avg"], state["exp_avg_sq"], copy, state["step"])
            rows.append([*extension.plain(pointers), parameter.numel()])
        table = torch.tensor(rows, dtype=torch.int64)  # read while the kernel is launched, not later
        codes = extension.dtype_code(parameters[0]), extension.dtype_code(kept[0])
        beta1, beta2 = group["betas"]
        numbers = (float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
        extension.launch("adamw", parameters[0].device, table, len(rows), *numbers, *codes)


def _kind(parameter: Tensor) -> tuple[str, str, str]:
    """What parameters of one launch share."""
    assert parameter.grad is not None
    return str(parameter.device), str(parameter.dtype), str(parameter.grad.dtype)


def _first(row: tuple[tuple[str, str, str], int]) -> tuple[str, str, str]:
    return row[0]
