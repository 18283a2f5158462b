"""How one model is split over ranks: tensor and context parallelism, and pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_b2.parallel.context_parallel import ContextParallel
from megatron_b2.parallel.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class ModelSplit:
    """The ranks that share one copy of the weights' work; the default is one rank."""

    tensor: TensorParallel = field(default_factory=TensorParallel)
    context: ContextParallel = field(default_factory=ContextParallel)


@dataclass(frozen=True)
class StageLayers:
    """What a pipeline stage holds."""

    layers: tuple[int, ...]
    """Global indices of its blocks."""
    has_embedding: bool
    has_head: bool
    """Final norm and NormHead."""

    @classmethod
    def whole(cls, num_layers: int) -> StageLayers:
        """The model that is not split."""
        return cls(tuple(range(num_layers)), has_embedding=True, has_head=True)
