"""The DeepSpeed JSON of a run; its keys are in config/deepspeed_keys.py. Imports no torch."""

from __future__ import annotations

from typing import Any

from megatron_b2.config.checks import check
from megatron_b2.config.deepspeed_keys import generated, merged
from megatron_b2.config.schema import RunConfig


def deepspeed_json(config: RunConfig, *, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` gets for a run on `world_size` ranks, the same on each.

    Raises ConfigError with every rule that the configuration breaks; those of [deepspeed] are among them.
    """
    check(config, world_size=world_size)
    accumulation = config.train.accumulation_steps(config.parallel.data_size(world_size))
    return merged(generated(config, accumulation=accumulation), config.deepspeed)
