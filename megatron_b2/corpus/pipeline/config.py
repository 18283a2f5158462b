"""What a pipeline is: one TOML file, every stage a table of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from megatron_b2.config.decode import Decoder
from megatron_b2.config.layers import merge, read_layer
from megatron_b2.config.overrides import read_overrides
from megatron_b2.corpus.pipeline.execution import Execution, broken_rules, unused_settings
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.stage import Stage
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
    if problems:
        raise ConfigError(problems)
    layer = merge(files, read_overrides(overrides, problems, PipelineConfig))
    decoder = Decoder(layer.origins, PipelineConfig)
    config = decoder.table(PipelineConfig, layer.data, ())
    problems += decoder.problems + decoder.missing
    problems += unused_settings(layer.data.get("execution"))
    if isinstance(config, PipelineConfig):
        problems += _broken_rules(config)
    if problems:
        raise ConfigError(problems)
    assert isinstance(config, PipelineConfig)
    return config


def _broken_rules(config: PipelineConfig) -> list[str]:
    problems = []
    for name in {name for name in config.stages if config.stages.count(name) > 1}:
        problems.append(f"stages has {name!r} twice; each stage runs once")
    for key in ("unit_mb", "max_record_mb", "max_expansion", "max_window_mb"):
        if (value := getattr(config.input, key)) < 1:
            problems.append(f"input.{key} is {value}; give 1 or more")
    return [*problems, *broken_rules(config.execution)]
