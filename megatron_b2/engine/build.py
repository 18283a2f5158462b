"""Choose and fill the engine that a configuration names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.config.checks import check
from megatron_b2.config.schema import RunConfig
from megatron_b2.engine.base import Engine
from megatron_b2.engine.single import SingleEngine
from megatron_b2.errors import ConfigError
from megatron_b2.model.init import initial_value
from megatron_b2.parallel.breadcrumbs import Breadcrumbs
from megatron_b2.parallel.comm import Comm


def build_engine(
    config: RunConfig, *, comm: Comm, device: torch.device, crumbs: Breadcrumbs | None = None
) -> Engine:
    """The engine of `config.parallel.engine`, with uninitialised weights and zero optimizer state.

    `crumbs` take where this rank is, for a watchdog; a single process has none.

    Raises:
        ConfigError: every rule that the configuration breaks on the ranks of `comm`, before anything is made.
    """
    check(config, world_size=comm.size)
    if config.parallel.auto:
        raise ConfigError(
            "parallel.auto = true is still to be resolved: `b2 pretrain` does it, or call "
            "megatron_b2.layouts.auto.resolve_auto and run its .config"
        )
    if config.parallel.engine == "single":
        return SingleEngine(config, comm=comm, device=device)
    from megatron_b2.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, comm=comm, device=device, crumbs=crumbs)


@torch.no_grad()
def fill_weights(state: LogicalState, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Write every "model/" piece from full tensors, one parameter in memory at a time.

    Args:
        state: `Engine.logical_state()`; call `Engine.state_loaded()` afterwards.
        value: (parameter name, shape) to the full fp32 tensor.
    """
    for name, tensor in state.items():
        kind, _, parameter = name.partition("/")
        if kind != "model" or not tensor.pieces:
            continue
        full = value(parameter, tensor.shape)
        for piece in tensor.pieces:
            index = tuple(
                slice(start, start + size)
                for start, size in zip(piece.offsets, piece.tensor.shape, strict=True)
            )
            piece.tensor.copy_(full[index])


def initialize_engine(engine: Engine, *, seed: int) -> None:
    """Fresh weights: the same for a seed in every engine, stage and number of ranks."""
    std = engine.config.model.init_std
    fill_weights(engine.logical_state(), lambda name, shape: initial_value(name, shape, std=std, seed=seed))
    engine.state_loaded()
