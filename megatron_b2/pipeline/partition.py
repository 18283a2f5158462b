"""Layers over virtual stages, balanced with the embedding and the head counted. Pure arithmetic.

Cost is counted in parameters: they set weight and optimizer memory everywhere and, for layers and head, the
matrix products too. The 13B embedding is 2.04 layers (BLOOM also counted it, arXiv 2211.05100 section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import ConfigError
from megatron_b2.model.split import StageLayers


def partition_problem(num_layers: int, num_stages: int) -> str | None:
    """Why layers cannot be split, with the fix; none if they can."""
    if num_stages > num_layers:
        return (
            f"{num_stages} virtual pipeline stages (ranks x chunks) need a layer each, but the model has "
            f"{num_layers}; use fewer pipeline ranks or parallel.virtual_stages"
        )
    return None


def stage_layers(model: ModelConfig, num_stages: int) -> tuple[StageLayers, ...]:
    """What each virtual stage holds, in order; chunk c of pipeline rank r is stage c * num_ranks + r.

    Raises:
        ConfigError: there are more stages than layers.
    """
    problem = partition_problem(model.num_layers, num_stages)
    if problem is not None:
        raise ConfigError(problem)
    table = model.vocab_size * model.hidden_size
    # Whole layers times their number, so that everything stays an integer.
    layer = model.num_block_parameters - model.hidden_size
    counts = balance(
        model.num_layers,
        num_stages,
        layer=layer,
        first=table * model.num_layers,
        last=(table + model.hidden_size) * model.num_layers,
    )
    stops = list(accumulate(counts))
    return tuple(
        StageLayers(
            tuple(range(stop - count, stop)), has_embedding=index == 0, has_head=index == num_stages - 1
        )
        for index, (count, stop) in enumerate(zip(counts, stops, strict=True))
    )


def balance(num_layers: int, num_stages: int, *, layer: int, first: int, last: int) -> tuple[int, ...]:
    """Number of layers of each stage: at least one, the costliest stage as cheap as can be, then the smallest
    sum of squares; among equals earlier stages, which hold more micro-batches in flight, get fewer layers.

    Args:
        num_layers: layers to place.
        num_stages: stages, at most num_layers.
        layer: cost of a layer.
        first: cost of what the first stage holds besides (embedding).
        last: cost of what the last stage holds besides (final norm, head).
    """
    extra = [0] * num_stages
    extra[0] += first
    extra[-1] += last
    assert 1 <= num_stages <= num_layers
    counts = [1] * num_stages
    # Equal layers: giving each to the cheapest stage is optimal for both aims; ties go to the latest stage.
    for _ in range(num_layers - num_stages):
        counts[min(range(num_stages), key=lambda s: (counts[s] * layer + extra[s], -s))] += 1
    return tuple(counts)


def stage_costs(counts: Sequence[int], *, layer: int, first: int, last: int) -> tuple[int, ...]:
    """Cost of each stage, in the unit of the arguments."""
    costs = [count * layer for count in counts]
    costs[0] += first
    costs[-1] += last
    return tuple(costs)
