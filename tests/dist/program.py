"""A watched training run as a program, for launchers: `python -m tests.dist.program CONFIG`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console

from megatron_b2.config import load_config
from megatron_b2.config.schema import RunConfig
from megatron_b2.parallel.comm import Comm
from megatron_b2.parallel.launch import LaunchEnvironment, initialize_distributed, shutdown_distributed
from megatron_b2.training.events import Callback, Outcome
from megatron_b2.training.pretrain import pretrain
from megatron_b2.training.signals import StopSignals


def train(config: RunConfig, *, comm: Comm, callbacks: Sequence[Callback] = ()) -> Outcome:
    """`pretrain` under the watchdog, quietly."""
    with StopSignals() as signals:
        return pretrain(
            config,
            comm=comm,
            device=torch.device("cpu"),
            signals=signals,
            callbacks=callbacks,
            console=Console(quiet=True),
        )


def main() -> None:
    """Join, train, leave."""
    path = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    config = load_config(path).config
    comm = initialize_distributed(LaunchEnvironment.detect(), timeout=timedelta(minutes=2))
    assert train(config, comm=comm) is Outcome.COMPLETED
    shutdown_distributed()


if __name__ == "__main__":
    main()
