"""Learning rate as a pure function of the step: linear warm-up, then cosine decay (report section 2.5)."""

from __future__ import annotations

import math

from megatron_b2.config.schema import OptimConfig


def learning_rate(config: OptimConfig, *, train_steps: int, step: int) -> float:
    """Rate of optimizer step `step` (0-based: the first step of a run is 0).

    Step `warmup_steps - 1` is the first at `max_lr`; the cosine reaches `max_lr * min_lr_ratio` at step
    `decay_steps - 1` (`train_steps - 1` when none is given) and stays there.
    """
    done = step + 1
    if done <= config.warmup_steps:
        return config.max_lr * done / config.warmup_steps
    decay_steps = train_steps if config.decay_steps is None else config.decay_steps
    progress = min(1.0, (done - config.warmup_steps) / max(1, decay_steps - config.warmup_steps))
    minimum = config.max_lr * config.min_lr_ratio
    return minimum + (config.max_lr - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
