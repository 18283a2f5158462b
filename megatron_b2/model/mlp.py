"""SwiGLU feed-forward layer of one block: down(silu(gate(x)) * up(x)) (report section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops.bundle import Ops


class MLP(nn.Module):
    """Gate and up projections in one matrix, then down."""

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
        h, f = config.hidden_size, split.tensor.share(config.ffn_hidden_size)
        self.split = split
        self.ops = ops
        self.recompute_core = recompute_core
        self.gate_up = nn.Linear(h, 2 * f, bias=False, dtype=dtype, device=device)
        """Rows gate | up; of each this rank's."""
        self.down = nn.Linear(f, h, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] to [..., h]."""
        gate_up = self.gate_up(self.split.tensor.enter(x))
        if self.recompute_core and torch.is_grad_enabled():
            out = checkpoint(self._core, gate_up, use_reentrant=False)
        else:
            out = self._core(gate_up)
        return self.split.tensor.leave(out)

    def _core(self, gate_up: Tensor) -> Tensor:
        out: Tensor = self.down(self.ops.swiglu(gate_up))
        return out
