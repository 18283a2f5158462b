"""What a pipeline is: one TOML file, every stage a table of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import psutil

from megatron_b2.config.decode import Decoder
from megatron_b2.config.layers import merge, read_layer
from megatron_b2.config.overrides import read_overrides
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.stage import Stage
from megatron_b2.corpus.pipeline.tasks import Limits
from megatron_b2.corpus.stages.cluster import Cluster
from megatron_b2.corpus.stages.decontaminate import Decontaminate
from megatron_b2.corpus.stages.embed import Embed
from megatron_b2.corpus.stages.heuristics import Heuristics
from megatron_b2.corpus.stages.language import Language
from megatron_b2.corpus.stages.minhash import MinHash
from megatron_b2.corpus.stages.normalize import Normalize
from megatron_b2.corpus.stages.pii import Pii
from megatron_b2.corpus.stages.quality import Quality
from megatron_b2.corpus.stages.repeats import Exact, Paragraph, Sentence
from megatron_b2.corpus.stages.safety import Safety
from megatron_b2.corpus.stages.weights import Weights
from megatron_b2.errors import ConfigError

StageName = Literal[
    "normalize",
    "language",
    "exact",
    "heuristics",
    "quality",
    "sentence",
    "paragraph",
    "minhash",
    "embed",
    "cluster",
    "safety",
    "decontaminate",
    "pii",
    "weights",
]
ALL_STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where the work is done; it never changes a result."""

    workers: int = 0
    """Processes of this machine; 0 takes one for each core."""
    memory_gb: float = 0.0
    """Memory of all workers together for the grouping of repeats, which goes on in files beyond it; 0 takes
    80 % of what is free. Beside it a worker holds a unit a few times over."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A whole pipeline."""

    work: str
    """Folder for documents, attributes and the state."""
    input: Input
    stages: tuple[StageName, ...] = ALL_STAGES
    """Which stages run, in this order."""
    execution: Execution = field(default_factory=Execution)
    normalize: Normalize = field(default_factory=Normalize)
    language: Language = field(default_factory=Language)
    exact: Exact = field(default_factory=Exact)
    heuristics: Heuristics = field(default_factory=Heuristics)
    quality: Quality = field(default_factory=Quality)
    sentence: Sentence = field(default_factory=Sentence)
    paragraph: Paragraph = field(default_factory=Paragraph)
    minhash: MinHash = field(default_factory=MinHash)
    embed: Embed = field(default_factory=Embed)
    cluster: Cluster = field(default_factory=Cluster)
    safety: Safety = field(default_factory=Safety)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)
    pii: Pii = field(default_factory=Pii)
    weights: Weights = field(default_factory=Weights)

    def chosen(self) -> dict[str, Stage]:
        """The stages that run, by name."""
        return {name: getattr(self, name) for name in self.stages}


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a TOML file and settings of the command line over it.

    Raises:
        ConfigError: with every problem at once.
    """
    problems: list[str] = []
    files = read_layer(path, problems)
    layer = merge(files, read_overrides(overrides, problems, PipelineConfig))
    decoder = Decoder(layer.origins, PipelineConfig)
    config = decoder.table(PipelineConfig, layer.data, ())
    problems += decoder.problems + decoder.missing
    if isinstance(config, PipelineConfig):
        problems += _broken_rules(config)
    if problems:
        raise ConfigError(problems)
    assert isinstance(config, PipelineConfig)
    return config


def executor_of(execution: Execution, work: Path) -> LocalExecutor:
    """Processes as the settings ask for, to be used in a `with` block."""
    workers = execution.workers or len(os.sched_getaffinity(0))
    memory = int(execution.memory_gb * 1e9) or int(0.8 * psutil.virtual_memory().available)
    return LocalExecutor(workers, Limits(memory, work / "scratch"))


def _broken_rules(config: PipelineConfig) -> list[str]:
    problems = []
    for name in {name for name in config.stages if config.stages.count(name) > 1}:
        problems.append(f"stages has {name!r} twice; each stage runs once")
    if config.input.unit_mb < 1:
        problems.append(f"input.unit_mb is {config.input.unit_mb}; give 1 or more")
    if config.execution.workers < 0:
        problems.append(f"execution.workers is {config.execution.workers}; give 0 (all cores) or more")
    return problems
