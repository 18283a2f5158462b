"""Tiny real runs for the training tests: random tokens on disk and a model of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from megatron_b2.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_b2.data.indexed import IndexedDatasetBuilder
from megatron_b2.parallel.comm import Comm, SingleComm
from megatron_b2.training.events import Callback, Outcome
from megatron_b2.training.pretrain import pretrain
from megatron_b2.training.signals import StopSignals

VOCAB = 64


def write_data(folder: Path, *, seed: int = 0, documents: int = 60) -> Path:
    """Documents of a simple repetitive language, so that the loss can fall."""
    rng = np.random.default_rng(seed)
    prefix = folder / f"data{seed}"
    with IndexedDatasetBuilder(prefix, dtype=np.uint16) as builder:
        for _ in range(documents):
            start, length = int(rng.integers(3, VOCAB)), int(rng.integers(20, 60))
            tokens = 3 + (start + 5 * np.arange(length)) % (VOCAB - 3)
            builder.add_document([*tokens.tolist(), 2])
    return prefix


def run_config(folder: Path, prefix: Path, **changes: dict[str, Any]) -> RunConfig:
    """`changes`: table name -> settings over the tiny defaults."""

    def settings(table: str, **defaults: Any) -> dict[str, Any]:
        return defaults | changes.get(table, {})

    return RunConfig(
        name="tiny",
        output_dir=str(folder / "run"),
        model=ModelConfig(
            **settings(
                "model", hidden_size=16, ffn_hidden_size=24, num_layers=1, num_heads=2, vocab_size=VOCAB
            )
        ),
        data=DataConfig(
            **settings("data", sources=(SourceConfig(prefix=str(prefix)),), seq_len=16, split=(0.8, 0.2, 0.0))
        ),
        optim=OptimConfig(**settings("optim", max_lr=1e-2, warmup_steps=2)),
        train=TrainConfig(
            **settings(
                "train", steps=8, global_batch_size=4, micro_batch_size=2, log_interval=3, eval_batches=2
            )
        ),
        parallel=ParallelConfig(**settings("parallel")),
        checkpoint=CheckpointConfig(**settings("checkpoint", interval=4)),
    )


def run(config: RunConfig, *callbacks: Callback, comm: Comm | None = None) -> Outcome:
    """`pretrain` in this process, quietly, with the real signal handlers."""
    with StopSignals() as signals:
        return pretrain(
            config,
            comm=comm or SingleComm(),
            device=torch.device("cpu"),
            signals=signals,
            callbacks=callbacks,
            console=Console(quiet=True),
        )
