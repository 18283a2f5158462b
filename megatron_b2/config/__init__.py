"""What a run is: frozen dataclasses, strict TOML, command-line settings, rules, presets. Imports no torch."""

from megatron_b2.config.checks import check, check_for_training, find_problems
from megatron_b2.config.decode import from_dict
from megatron_b2.config.encode import to_dict, to_toml
from megatron_b2.config.loader import ResolvedConfig, load_config
from megatron_b2.config.presets import preset_names
from megatron_b2.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ResolvedConfig",
    "RunConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check",
    "check_for_training",
    "find_problems",
    "from_dict",
    "load_config",
    "preset_names",
    "to_dict",
    "to_toml",
]
