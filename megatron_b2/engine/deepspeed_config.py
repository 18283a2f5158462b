"""The DeepSpeed JSON, generated from RunConfig: the one source of truth. Imports neither torch nor DeepSpeed.

Every key whose DeepSpeed default would change the numbers is written out (DeepSpeed 0.19.8: gradient clipping
left out means 1.0, gradients left to themselves are accumulated in the model's precision). Optimizer and
schedule are ours and passed as objects, so the JSON has no such sections.
"""

from __future__ import annotations

import copy
import difflib
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from megatron_b2.config.checks import find_problems
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError

BUCKET_ELEMENTS: Final = 200_000_000
"""Elements of one reduce or gather (our choice: 0.8 GB of fp32 in flight)."""

OFFLOAD: Final[Mapping[str, Any]] = MappingProxyType({"device": "cpu", "pin_memory": True})
"""Where parallel.offload_optimizer puts the optimizer."""

NEVER: Final = 2**31 - 1
"""steps_per_print: our own metrics are the log."""

OURS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "optimizer": "AdamW comes from [optim]",
        "scheduler": "the learning rate comes from [optim]",
        "fp16": "the precision comes from train.precision",
        "torch_autocast": "the precision comes from train.precision",
        "activation_checkpointing": "recomputation comes from train.recompute",
        "tensorboard": "metrics are written by [train]",
        "pipeline": "stages and their schedule come from [parallel]",
        "tensor_parallel": "it comes from parallel.tensor",
        "sequence_parallel_size": "the sequence is split by parallel.context and parallel.sequence_parallel",
        "hybrid_engine": "it trains and generates with another model code",
    }
)
"""Sections that [deepspeed] may not have, and why."""

SOURCES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "train_batch_size": "train.global_batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.global_batch_size",
        "gradient_clipping": "optim.grad_clip",
        "zero_optimization.stage": "parallel.zero_stage",
        "zero_optimization.stage3_model_persistence_threshold": "parallel.whole_parameters",
        "zero_optimization.zero_hpz_partition_size": "parallel.hpz",
        "zero_optimization.zero_quantized_weights": "parallel.quantized_weights",
        "zero_optimization.zero_quantized_gradients": "parallel.quantized_gradients",
        "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
        "bf16.enabled": "train.precision",
    }
)
"""JSON key -> the setting that decides it."""

TUNABLE: Final = frozenset(
    {
        "dump_state",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.round_robin_gradients",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
    }
)
"""Generated keys that [deepspeed] may replace: they change speed and memory, never the numbers."""

EXTRA_KEYS: Final = frozenset(
    {
        "aio",
        "checkpoint",
        "comms_logger",
        "compile",
        "csv_monitor",
        "disable_allgather",
        "flops_profiler",
        "log_level",
        "memory_breakdown",
        "timers",
        "use_data_before_expert_parallelism",
        "wandb",
    }
)
"""Top-level keys of DeepSpeed that [deepspeed] may add and that this file does not write itself."""


def deepspeed_json(config: RunConfig, *, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` gets for a run on `world_size` ranks, the same on each.

    DeepSpeed shards and averages over data x context ranks and counts one sample for each of them, so its
    train_batch_size is context times ours; with pipeline stages we run the micro-batches of a step ourselves.
    `[deepspeed]` keys are merged in; those in TUNABLE replace ours. Raises ConfigError that lists every rule
    the configuration breaks, or every key that contradicts a setting (both values are named) and every
    top-level key that DeepSpeed does not know.
    """
    if problems := find_problems(config, world_size=world_size):
        raise ConfigError(problems)
    ours = _generated(config, world_size)
    problems = [*_unknown(config.deepspeed, ours), *_conflicts(ours, config.deepspeed, "")]
    if problems:
        raise ConfigError(problems)
    return _merged(ours, copy.deepcopy(dict(config.deepspeed)))


def _generated(config: RunConfig, world_size: int) -> dict[str, Any]:
    train, parallel = config.train, config.parallel
    keep_each, keep_together = kept_whole_limits(config)
    return {
        "train_batch_size": train.global_batch_size * parallel.context,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation_steps(parallel.data_size(world_size)),
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "contiguous_gradients": True,
            # A pipeline rank accumulates all micro-batches first: there is nothing to overlap with.
            "overlap_comm": parallel.pipeline == 1,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "round_robin_gradients": False,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": keep_each,
            "stage3_model_persistence_threshold": keep_together,
            "zero_hpz_partition_size": parallel.hpz,
            "zero_quantized_weights": parallel.quantized_weights,
            "zero_quantized_gradients": parallel.quantized_gradients,
            "offload_optimizer": dict(OFFLOAD) if parallel.offload_optimizer else None,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }


def kept_whole_limits(config: RunConfig) -> tuple[int, int]:
    """Elements of one parameter, and of all, up to which ZeRO-3 keeps parameters whole in model order."""
    whole = config.parallel.whole_parameters
    return (whole, whole) if whole else (10 * config.model.hidden_size, sys.maxsize)


def _unknown(extra: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    known = {*ours, *EXTRA_KEYS}
    for name in extra:
        if name in OURS:
            yield f"deepspeed.{name} must not be given: {OURS[name]}"
        elif name not in known:
            close = difflib.get_close_matches(name, {*known, *OURS}, n=1)
            hint = f"did you mean {close[0]}?" if close else f"keys are {', '.join(sorted(known))}"
            hint += f" But {OURS[close[0]]}" if close and close[0] in OURS else ""
            yield f"deepspeed.{name} is not a key of DeepSpeed that can be set here; {hint}"


def _conflicts(ours: Mapping[str, Any], extra: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, value in extra.items():
        key = f"{path}{name}"
        if name not in ours:
            continue
        if isinstance(ours[name], Mapping) and isinstance(value, Mapping):
            yield from _conflicts(ours[name], value, f"{key}.")
        elif key not in TUNABLE and not _same(ours[name], value):
            source = SOURCES.get(key)
            fix = f"change {source} instead" if source else "remove it; the generated value is what we test"
            yield f"deepspeed.{key} = {value!r} contradicts the generated {ours[name]!r}: {fix}"


def _same(ours: Any, value: Any) -> bool:
    return bool(ours == value) and isinstance(ours, bool) == isinstance(value, bool)


def _merged(ours: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in extra.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both_tables else value
    return merged
