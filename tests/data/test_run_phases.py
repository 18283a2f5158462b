"""Whole runs whose data changes, and runs in Megatron-LM's order: what pretrain makes of data/."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_b2.checkpoint.store import CheckpointReader
from megatron_b2.config.schema import MegatronOrderConfig, PhaseConfig, RunConfig, SourceConfig
from megatron_b2.errors import CheckpointError
from megatron_b2.training.events import Callback, Outcome, StepEvent
from tests.training.runs import run, run_config, write_data


class StopAt(Callback):
    """Asks the run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def step_begin(self, event: StepEvent) -> None:
        if event.step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def checkpoint(config: RunConfig, step: int) -> CheckpointReader:
    return CheckpointReader(Path(config.output_dir) / "checkpoints" / f"step_{step:08d}")


def assert_same_weights(one: RunConfig, other: RunConfig, *, step: int = 8) -> None:
    first, second = checkpoint(one, step), checkpoint(other, step)
    assert first.names() == second.names()
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())


def with_phases(config: RunConfig, *phases: PhaseConfig) -> RunConfig:
    return replace(config, data=replace(config.data, phases=phases))


def test_phases_added_while_a_run_goes_on(tmp_path: Path) -> None:
    """Weights from step 3 and documents from step 5, added at resumes, as if planned from the start."""
    one, two, more = (str(write_data(tmp_path, seed=seed)) for seed in (0, 1, 2))
    sources = (SourceConfig(prefix=one), SourceConfig(prefix=two))
    weights = PhaseConfig(from_step=3, sources=(sources[0], replace(sources[1], weight=4.0)))
    documents = PhaseConfig(from_step=5, sources=(replace(sources[0], append=(more,)), sources[1]))

    planned = run_config(tmp_path / "planned", Path(one), data={"sources": sources})
    assert run(with_phases(planned, weights, documents)) is Outcome.COMPLETED
    plain = run_config(tmp_path / "plain", Path(one), data={"sources": sources})
    assert run(plain, StopAt(2)) is Outcome.PREEMPTED
    assert "data_state" not in checkpoint(plain, 2).meta
    assert run(with_phases(plain, weights), StopAt(4)) is Outcome.PREEMPTED
    state = checkpoint(plain, 4).meta["data_state"]
    assert (sum(state["drawn"]), [phase["from_step"] for phase in state["phases"]]) == (16, [3])
    assert run(with_phases(plain, weights, documents)) is Outcome.COMPLETED
    assert_same_weights(planned, plain)

    without = run_config(tmp_path / "without", Path(one), data={"sources": sources})
    run(without)
    name = "model/layers.0.mlp.down.weight"
    assert not torch.equal(checkpoint(without, 8).read(name), checkpoint(plain, 8).read(name))


def test_a_consumed_phase_is_not_changed_under_a_run(tmp_path: Path) -> None:
    prefix = write_data(tmp_path)
    config = run_config(tmp_path, prefix, data={"sources": (SourceConfig(prefix=str(prefix)),)})
    phase = PhaseConfig(from_step=3, sources=config.data.sources)
    run(with_phases(config, phase), StopAt(4))
    added = PhaseConfig(from_step=3, sources=(SourceConfig(prefix=str(write_data(tmp_path, seed=1))),))
    for phases, message in (
        ((), r"data\.phases\[0\], which began at step 3, is gone, but .* up to step 4"),
        ((added,), r"data\.phases\[0\], which began at step 3, has changed, but"),
        ((replace(phase, from_step=2),), r"step 3, has changed and begins at step 2 now, but"),
    ):
        with pytest.raises(CheckpointError, match=rf"step_00000004: .*{message}"):
            run(with_phases(config, *phases))
    assert run(with_phases(config, phase, replace(added, from_step=4))) is Outcome.COMPLETED


def test_a_run_in_the_order_of_megatron_lm(tmp_path: Path) -> None:
    """Stops and resumes exactly; a longer run needs the count that the order was planned for."""
    prefix = write_data(tmp_path)
    data = {"order": "megatron", "split": (80.0, 20.0, 0.0)}
    straight = run_config(tmp_path / "a", prefix, data=data, train={"eval_interval": 4})
    assert run(straight) is Outcome.COMPLETED
    halves = run_config(tmp_path / "b", prefix, data=data, train={"eval_interval": 4})
    assert run(halves, StopAt(3)) is Outcome.PREEMPTED
    assert run(halves) is Outcome.COMPLETED
    assert_same_weights(straight, halves)

    shorter = replace(halves, train=replace(halves.train, steps=6), output_dir=str(tmp_path / "c"))
    run(shorter, StopAt(3))
    with pytest.raises(CheckpointError, match="was trained with other data"):
        run(replace(shorter, train=halves.train))
    pinned = replace(
        shorter,
        data=replace(shorter.data, megatron=MegatronOrderConfig(train_samples=32)),
        output_dir=str(tmp_path / "d"),
    )
    run(pinned, StopAt(3))
    assert run(replace(pinned, train=halves.train)) is Outcome.COMPLETED
