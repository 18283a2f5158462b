"""What DeepSpeed is told, generated from RunConfig (the one source of truth), and what [deepspeed] may add.

Every key whose DeepSpeed default would change the numbers is written out (DeepSpeed 0.19.8: gradient clipping
left out means 1.0, gradients left to themselves are accumulated in the model's precision), and every key that
decides what is sent when. Optimizer and schedule are ours and passed as objects, so the JSON has no such
sections.
"""

from __future__ import annotations

import copy
import difflib
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from megatron_b2.config.keys import Key, dotted, leaves
from megatron_b2.config.layout_checks import micro_batches
from megatron_b2.config.problem import Problem, Problems
from megatron_b2.config.schema import RunConfig

BUCKET_ELEMENTS: Final = 200_000_000
"""Elements of one reduce or gather (our choice: 0.8 GB of fp32 in flight)."""

LIVE_ELEMENTS: Final = 1_000_000_000
"""Parameters of ZeRO-3 that stay gathered or are gathered ahead, in elements (DeepSpeed's own default)."""
SUB_GROUP_ELEMENTS: Final = 1_000_000_000
"""Elements of a partition that the optimizer steps at once under ZeRO-3 (DeepSpeed's own default)."""

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

AUTOMATIC: Final = frozenset({"parallel.zero_stage", "parallel.whole_parameters"})
"""Settings that parallel.auto chooses."""

TUNABLE: Final = frozenset(
    {
        "dump_state",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.round_robin_gradients",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.sub_group_size",
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


def generated(config: RunConfig, *, accumulation: int) -> dict[str, Any]:
    """The JSON without what [deepspeed] adds; `accumulation` is the number of micro-batches a rank and step.

    DeepSpeed shards and averages over data x context ranks and counts one sample for each of them, so its
    train_batch_size is context times ours; with pipeline stages we run the micro-batches of a step ourselves.
    """
    train, parallel = config.train, config.parallel
    return {
        "train_batch_size": train.global_batch_size * parallel.context,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "zero_optimization": _generated_zero(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }


def _generated_zero(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    whole = parallel.whole_parameters
    return {
        "stage": parallel.zero_stage,
        "contiguous_gradients": True,
        # A pipeline rank accumulates all micro-batches first: there is nothing to overlap with.
        "overlap_comm": parallel.pipeline == 1,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "round_robin_gradients": False,
        "sub_group_size": SUB_GROUP_ELEMENTS,
        "stage3_max_live_parameters": LIVE_ELEMENTS,
        "stage3_max_reuse_distance": LIVE_ELEMENTS,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": whole or 10 * config.model.hidden_size,
        "stage3_model_persistence_threshold": whole or sys.maxsize,
        "zero_hpz_partition_size": parallel.hpz,
        "zero_quantized_weights": parallel.quantized_weights,
        "zero_quantized_gradients": parallel.quantized_gradients,
        "offload_optimizer": dict(OFFLOAD) if parallel.offload_optimizer else None,
    }


def merged(ours: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`ours` with the keys of [deepspeed] put in, table by table; nothing of `extra` is shared."""
    result = dict(ours)
    for name, value in extra.items():
        both_tables = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both_tables else copy.deepcopy(value)
    return result


def zero_settings(config: RunConfig) -> dict[str, Any]:
    """The section zero_optimization as DeepSpeed gets it, of a checked configuration."""
    return merged(_generated_zero(config), config.deepspeed.get("zero_optimization", {}))


def deepspeed_problems(config: RunConfig, world_size: int | None) -> Problems:
    """[deepspeed] has only keys of DeepSpeed, and none that contradicts a setting (both values are named).

    Also of a configuration that other rules refuse, and with any engine, so that nothing is left to be found
    later; the accumulation is judged when `world_size` is given and fits.
    """
    accumulation = 0 if world_size is None else micro_batches(config, world_size)
    ours = generated(config, accumulation=accumulation)
    yield from _unknown(config.deepspeed, ours)
    if not accumulation:
        del ours["gradient_accumulation_steps"]
    yield from _conflicts(config, ours, config.deepspeed, ("deepspeed",))


def _problem(key: Key, value: Any, message: str) -> Problem:
    first, _ = next(iter(leaves(value, key)), (key, None))
    return Problem((dotted(first),), message)


def _unknown(extra: Mapping[str, Any], ours: Mapping[str, Any]) -> Problems:
    known = {*ours, *EXTRA_KEYS}
    for name, value in extra.items():
        key: Key = ("deepspeed", name)
        if name in OURS:
            yield _problem(key, value, f"{dotted(key)} must not be given: {OURS[name]}")
        elif name not in known:
            close = difflib.get_close_matches(name, {*known, *OURS}, n=1)
            hint = f"did you mean {close[0]}?" if close else f"keys are {', '.join(sorted(known))}"
            hint += f" But {OURS[close[0]]}" if close and close[0] in OURS else ""
            message = f"{dotted(key)} is not a key of DeepSpeed that can be set here; {hint}"
            yield _problem(key, value, message)


def _conflicts(
    config: RunConfig, ours: Mapping[str, Any], extra: Mapping[str, Any], path: Key
) -> Iterator[Problem]:
    for name, value in extra.items():
        if name not in ours:
            continue
        key: Key = (*path, name)
        if isinstance(ours[name], Mapping) and isinstance(value, Mapping):
            yield from _conflicts(config, ours[name], value, key)
        elif message := _conflict(config, dotted(key[1:]), ours[name], value):
            yield _problem(key, value, f"{dotted(key)} = {value!r} {message}")


def _conflict(config: RunConfig, key: str, ours: Any, value: Any) -> str:
    """What is wrong with a value for a generated key; empty if nothing is."""
    source = SOURCES.get(key)
    if key in TUNABLE:
        return _wrong_type(ours, value)
    if config.parallel.auto and source in AUTOMATIC:
        return "is chosen by parallel.auto = true: remove it or turn auto off"
    if ours == value and isinstance(ours, bool) == isinstance(value, bool):
        return ""
    fix = f"change {source} instead" if source else "remove it; the generated value is what we test"
    return f"contradicts the generated {ours!r}: {fix}"


def _wrong_type(ours: Any, value: Any) -> str:
    """Why `value` cannot replace the generated `ours`, which is a switch or a count."""
    if isinstance(ours, bool):
        return "" if isinstance(value, bool) else f"must be true or false, as the generated {ours!r}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value >= 0 and value == int(value):
        return ""
    return f"must be a whole number, 0 or more, as the generated {ours!r}"
