"""A small language model that is cut into stages: residual MLPs between our embedding-like and head-like ends.

It has what makes a split backward hard: custom autograd Functions (rms_norm, norm_head_loss), biases, a
parameter used twice, and a checkpointed part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_b2.ops.head_loss import norm_head_loss
from megatron_b2.ops.rms_norm import rms_norm

VOCAB, HIDDEN, BATCH, LENGTH, LAYERS = 24, 8, 2, 6, 8
SHAPE = (BATCH, LENGTH, HIDDEN)


class Layer(nn.Module):
    def __init__(self, index: int, *, shared: bool) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(HIDDEN))
        self.up = nn.Linear(HIDDEN, 3 * HIDDEN, bias=index % 2 == 0)
        self.down = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.shared = shared

    def core(self, x: Tensor) -> Tensor:
        return F.silu(x) * x.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.norm, eps=1e-6)
        inner = checkpoint(self.core, self.up(normed), use_reentrant=False)
        x = x + self.down(inner)
        return x + F.linear(x, self.down.weight @ self.up.weight) if self.shared else x


class Stage(nn.Module):
    """Layers [start, stop) of the model of LAYERS layers, with the embedding and the head where they belong."""

    def __init__(self, start: int, stop: int, *, shared: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.first, self.last = start == 0, stop == LAYERS
        if self.first:
            self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleDict({str(i): Layer(i, shared=shared) for i in range(start, stop)})
        if self.last:
            self.norm = nn.Parameter(torch.ones(HIDDEN))
            self.head = nn.Parameter(torch.empty(VOCAB, HIDDEN))
        for index, (name, parameter) in enumerate(sorted(self.named_parameters())):
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)) + 0 * index)
            with torch.no_grad():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1)
                )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.first:
            x = self.embedding(x)
        for layer in self.layers.values():
            x = layer(x)
        if not self.last:
            return x
        hidden = rms_norm(x, self.norm, eps=1e-6).flatten(0, 1)
        scale = 1 / labels.numel()
        return norm_head_loss(hidden, self.head, labels.flatten(), ce_scale=scale, z_scale=0.01 * scale).total


def micro_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        tuple(torch.randint(VOCAB, (2, BATCH, LENGTH), generator=generator).unbind()) for _ in range(count)
    ]


def bounds(num_stages: int) -> list[tuple[int, int]]:
    size = LAYERS // num_stages
    return [(s * size, (s + 1) * size) for s in range(num_stages)]


def gradients(stages: Sequence[nn.Module]) -> dict[str, Tensor]:
    found = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            found[name] = parameter.grad
    return found


def one_process(num_micro: int, *, shared: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients of plain torch."""
    model = Stage(0, LAYERS, shared=shared)
    losses = []
    for ids, labels in micro_batches(num_micro):
        loss = model(ids, labels)
        loss.backward()
        losses.append(loss.detach())
    return losses, gradients([model])
