"""Finding NaN and infinity: which gradient, or which layer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FiniteGuard:
    """Watches every gradient as it is made, without a host sync until asked.

    A hook adds each gradient's sum to one fp32 cell a parameter; a sum is non-finite if any element is.
    """

    def __init__(self, model: nn.Module, *, device: torch.device) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = tuple(name for name, _ in named)
        self._sums = torch.zeros(len(named), dtype=torch.float32, device=device)
        for index, (_, parameter) in enumerate(named):
            parameter.register_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def add(grad: Tensor) -> None:
            self._sums[index] += grad.sum(dtype=torch.float32)

        return add

    def reset(self) -> None:
        """Forget the last step."""
        self._sums.zero_()

    def culprit(self) -> str | None:
        """Name of the parameter nearest to the loss whose gradient was not finite; none if all were."""
        bad = torch.nonzero(~torch.isfinite(self._sums)).flatten().tolist()
        return self._names[bad[-1]] if bad else None


@torch.no_grad()
def first_nonfinite_layer(module: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run the forward pass again and name the first module whose output is not finite, if any.

    Every rank must call it (a sharded model gathers weights on the way).
    """
    found: list[str] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and not all(bool(torch.isfinite(t).all()) for t in tensors if isinstance(t, Tensor)):
                found.append(name)

        return hook

    for name, part in module.named_modules():
        if name:
            handles.append(part.register_forward_hook(watch(name)))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
