"""Seeds, deterministic kernels, and garbage collection at step boundaries."""

from __future__ import annotations

import gc

import torch

from megatron_b2.parallel.launch import require_deterministic_cublas
from megatron_b2.training.events import Callback, StepEvent

COLLECT_EVERY = 100
"""Steps between garbage collections (our choice)."""


def set_determinism(*, seed: int, deterministic: bool) -> None:
    """Seed torch and choose deterministic kernels; call before the engine is built.

    With `deterministic`, an operation that has no deterministic implementation raises.
    """
    torch.manual_seed(seed)
    if deterministic:
        require_deterministic_cublas()
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode would also fill every new tensor: costly, and it only hides reads of empty memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


class GarbageCollection(Callback):
    """Collect on all ranks after the same steps: at different moments, each would wait for the others."""

    def run_begin(self, event: StepEvent) -> None:
        """Forget the start-up objects and stop automatic collection."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def step_end(self, event: StepEvent) -> None:
        """Collect what recent steps have left."""
        if event.step % COLLECT_EVERY == 0:
            gc.collect()

    def run_end(self, event: StepEvent) -> None:
        """Automatic collection again."""
        gc.unfreeze()
        gc.enable()
