"""From a TOML file and a command line to one checked RunConfig that knows where each value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_b2.config.checks import find_problems
from megatron_b2.config.decode import Decoder
from megatron_b2.config.encode import to_dict
from megatron_b2.config.keys import dotted, leaves
from megatron_b2.config.layers import merge, read_layer
from megatron_b2.config.overrides import read_overrides
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and the origin of each of its values."""

    config: RunConfig
    provenance: Mapping[str, str]
    """Dotted key -> "file:line", "preset:name:line", "command line" or "default"."""


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> ResolvedConfig:
    """Read a TOML file (or "preset:<name>"), what it extends, and command-line settings over both.

    Raises ConfigError that lists every problem at once: unknown keys, wrong types, missing settings, and
    rules between settings (see checks.py; those that need the number of ranks are checked at launch, or here
    when `world_size` is given).
    """
    problems: list[str] = []
    files = read_layer(path, problems)
    # What an unreadable file would have given is not missing as well.
    incomplete = bool(problems)
    layer = merge(files, read_overrides(overrides, problems))
    decoder = Decoder(layer.origins)
    config = decoder.table(RunConfig, layer.data, ())
    problems += decoder.problems if incomplete else decoder.problems + decoder.missing
    if not isinstance(config, RunConfig):
        raise ConfigError(problems)
    provenance = {dotted(key): layer.origins.get(key, "default") for key, _ in leaves(to_dict(config))}
    problems += find_problems(config, world_size=world_size, provenance=provenance)
    if problems:
        raise ConfigError(problems)
    return ResolvedConfig(config, MappingProxyType(provenance))
