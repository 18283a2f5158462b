"""What a run will be, by arithmetic alone: sizes, tokens, schedule and memory before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_b2.config.checks import check
from megatron_b2.config.schema import RunConfig
from megatron_b2.optim.schedule import learning_rate
from megatron_b2.training.flops import flops_per_token

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device. Weights, gradients and optimizer are exact up to padding; the rest is a model."""

    weights: int
    """Working weights in the training precision; the largest block gathered at a time with ZeRO-3."""
    gradients: int
    """fp32 (accumulated)."""
    optimizer: int
    """Two fp32 moments, and fp32 master weights in bf16."""
    activations: int
    """Kept for the backward pass of one micro-batch."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The numbers of a run."""

    parameters: int
    block_parameters: int
    world_size: int
    micro_batches: int
    """Micro-batches a rank and step (gradient accumulation)."""
    tokens_per_step: int
    total_tokens: int
    steps: int
    gigaflop_per_token: float
    """By the `causal` convention of flops.py."""
    schedule: dict[int, float]
    """Step (1-based) -> learning rate, at the turning points."""
    memory: MemoryEstimate
    checkpoint_bytes: int
    """Size of one checkpoint: fp32 weights and two moments."""


def plan_run(config: RunConfig, *, world_size: int) -> RunPlan:
    """Plan `config` on `world_size` ranks. Raises ConfigError when it cannot run on that many."""
    check(config, world_size=world_size)
    train, model = config.train, config.model
    decay = train.steps if config.optim.decay_steps is None else config.optim.decay_steps
    turning = (1, config.optim.warmup_steps, (config.optim.warmup_steps + decay) // 2, decay, train.steps)
    points = sorted({step for step in turning if 1 <= step <= train.steps})
    return RunPlan(
        parameters=model.num_parameters,
        block_parameters=model.num_block_parameters,
        world_size=world_size,
        micro_batches=train.accumulation_steps(config.parallel.data_size(world_size)),
        tokens_per_step=config.tokens_per_step,
        total_tokens=config.tokens_per_step * train.steps,
        steps=train.steps,
        gigaflop_per_token=flops_per_token(model, seq_len=config.data.seq_len, convention="causal") / 1e9,
        schedule={
            step: learning_rate(config.optim, train_steps=train.steps, step=step - 1) for step in points
        },
        memory=estimate_memory(config, world_size=world_size),
        checkpoint_bytes=12 * model.num_parameters,
    )


def estimate_memory(config: RunConfig, *, world_size: int) -> MemoryEstimate:
    """Bytes on the device of one rank (our model of it; allocator overhead and buffers are not counted)."""
    model, train = config.model, config.train
    low = train.precision == "bf16"
    stage = config.parallel.zero_stage if config.parallel.engine == "deepspeed" else 0
    size = model.num_parameters
    shard = ceil(size / world_size)
    block = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.ffn_hidden_size
    width = 2 if low else 4
    return MemoryEstimate(
        weights=width * (shard + max(block, model.vocab_size * model.hidden_size) if stage == 3 else size),
        gradients=4 * (shard if stage >= 2 else size),
        optimizer=(12 if low else 8) * (shard if stage >= 1 else size),
        activations=_activation_bytes(config, width=width),
    )


def _activation_bytes(config: RunConfig, *, width: int) -> int:
    """Tensors kept a token and block: none 9h + 4f, selective 8h + 2f, full h and one block at a time."""
    h, f, layers = config.model.hidden_size, config.model.ffn_hidden_size, config.model.num_layers
    tokens = config.train.micro_batch_size * config.data.seq_len
    whole_block = 9 * h + 4 * f
    kept = {
        "none": layers * whole_block,
        "selective": layers * (8 * h + 2 * f),
        "full": layers * h + whole_block,
    }[config.train.recompute]
    return width * tokens * (kept + 2 * h)
