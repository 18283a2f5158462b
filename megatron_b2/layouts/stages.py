"""The pipeline of a run: what each rank holds, in which order it works, and how long its stages take."""

from __future__ import annotations

from fractions import Fraction

from megatron_b2.config.schema import ModelConfig, RunConfig
from megatron_b2.model.split import StageLayers
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.partition import stage_layers
from megatron_b2.pipeline.schedule import Schedule, build_schedule
from megatron_b2.pipeline.simulate import Durations


def rank_parts(config: RunConfig) -> tuple[tuple[StageLayers, ...], ...]:
    """Virtual stages of each pipeline rank, by chunk."""
    ranks, chunks = config.parallel.pipeline, config.parallel.virtual_stages
    stages = stage_layers(config.model, ranks * chunks)
    return tuple(stages[rank::ranks] for rank in range(ranks))


def run_schedule(config: RunConfig, layout: Layout) -> Schedule:
    """Instructions of each pipeline rank in one step; without stages one micro-batch after the other."""
    parallel = config.parallel
    return build_schedule(
        parallel.schedule if parallel.pipeline > 1 else "1f1b",
        num_ranks=parallel.pipeline,
        num_micro=config.train.accumulation_steps(layout.data),
        num_chunks=parallel.virtual_stages,
    )


def part_flops(model: ModelConfig, part: StageLayers, *, seq_len: int) -> int:
    """Forward FLOPs of a token: products, half of the attention scores, and the head (flops.py, causal)."""
    h, f = model.hidden_size, model.ffn_hidden_size
    layer = 2 * (4 * h * h + 3 * h * f) + 2 * seq_len * h
    return len(part.layers) * layer + (2 * model.vocab_size * h if part.has_head else 0)


def stage_durations(config: RunConfig) -> Durations:
    """Times of the virtual stages by their FLOPs; the mean forward is 1. Recomputation is not counted."""
    parts = rank_parts(config)
    stages = [part for chunk in zip(*parts, strict=True) for part in chunk]
    flops = [part_flops(config.model, part, seq_len=config.data.seq_len) for part in stages]
    return Durations(stage_factors=tuple(float(Fraction(value * len(flops), sum(flops))) for value in flops))
