"""Resume on several ranks: bit for bit in the same layout, equal in another, and after a rank was killed."""

from __future__ import annotations

import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_b2.checkpoint.catalog import latest_checkpoint
from megatron_b2.checkpoint.store import CheckpointReader
from megatron_b2.config.schema import RunConfig
from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.parallel.comm import ProcessGroupComm
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training.events import Callback, Outcome, StepEvent
from megatron_b2.training.metrics import read_metrics
from tests.training.runs import run, run_config, write_data

STEPS, HALF = 40, 20


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_data(tmp_path, documents=200)


class StopAfter(Callback):
    """Sends this process SIGTERM during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def step_begin(self, event: StepEvent) -> None:
        if event.step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class KillDuringSave(Callback):
    """Lets a timer kill this process somewhere in the save that follows a step."""

    def __init__(self, step: int, delay: float) -> None:
        self.step, self.delay = step, delay

    def step_end(self, event: StepEvent) -> None:
        if event.step == self.step:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def zero_config(folder: Path, prefix: Path, stage: int, *, steps: int = STEPS) -> RunConfig:
    return run_config(
        folder,
        prefix,
        train={"steps": steps, "micro_batch_size": 1},
        parallel={"engine": "deepspeed", "zero_stage": stage},
        checkpoint={"interval": HALF},
    )


def rank_run(config: RunConfig, *callbacks: Callback) -> Outcome:
    return run(config, *callbacks, comm=ProcessGroupComm())


def trace(config: RunConfig) -> list[tuple[float, ...]]:
    lines = [r for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if r["kind"] == "train"]
    return [
        tuple(line[key] for key in ("step", "tokens", "loss", "ce", "max_z", "grad_norm")) for line in lines
    ]


def final_state(config: RunConfig) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(Path(config.output_dir) / "checkpoints" / f"step_{config.train.steps:08d}")
    return {name: reader.read(name) for name in reader.names()}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW), 3])
def test_40_steps_equal_20_then_20_bit_for_bit(tmp_path: Path, prefix: Path, stage: int) -> None:
    straight = zero_config(tmp_path / "a", prefix, stage)
    run_ranks(2, rank_run, straight)
    halves = zero_config(tmp_path / "b", prefix, stage)
    assert run_ranks(2, rank_run, halves, StopAfter(HALF)) == [Outcome.PREEMPTED] * 2
    assert run_ranks(2, rank_run, halves) == [Outcome.COMPLETED] * 2
    assert trace(halves) == trace(straight)
    expected, found = final_state(straight), final_state(halves)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("stage", "then_stage", "then_ranks"),
    [(1, 3, 4), (3, None, 1), pytest.param(3, 2, 1, marks=SLOW), pytest.param(2, 0, 2, marks=SLOW)],
)
def test_another_layout_continues_the_same_run(
    tmp_path: Path, prefix: Path, stage: int, then_stage: int | None, then_ranks: int
) -> None:
    straight = zero_config(tmp_path / "a", prefix, stage)
    run_ranks(2, rank_run, straight)
    first = zero_config(tmp_path / "b", prefix, stage)
    run_ranks(2, rank_run, first, StopAfter(HALF))
    parallel = (
        replace(first.parallel, engine="single")
        if then_stage is None
        else replace(first.parallel, zero_stage=then_stage)
    )
    run_ranks(then_ranks, rank_run, replace(first, parallel=parallel))
    torch.testing.assert_close(
        torch.tensor(trace(first)), torch.tensor(trace(straight)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_killed_during_a_save_loses_at_most_that_save(
    tmp_path: Path, prefix: Path, stage: int
) -> None:
    """Through the whole trainer, until three kills left a half-written save; see test_kill.py for the save alone."""
    rng = random.Random(stage)
    straight = zero_config(tmp_path / "a", prefix, stage)
    straight = replace(straight, checkpoint=replace(straight.checkpoint, interval=4))
    run_ranks(2, rank_run, straight)
    config = replace(straight, output_dir=str(tmp_path / "b"))
    root = Path(config.output_dir) / "checkpoints"
    last, landed = 0, 0
    while landed < 3:
        assert last < STEPS - 4, f"the run ended after {landed} kills in the middle of a save"
        killer = KillDuringSave(last + 4, rng.uniform(0, 0.02))
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(2, one_is_killed, config, killer, rng.randrange(2))
        landed += any(root.glob("*.tmp"))
        latest = latest_checkpoint(root)
        step = 0 if latest is None else CheckpointReader(latest).step
        assert step >= last
        last = step
    run_ranks(2, rank_run, config)
    expected, found = final_state(straight), final_state(config)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def one_is_killed(config: RunConfig, killer: KillDuringSave, victim: int) -> Outcome:
    comm = ProcessGroupComm()
    return run(config, *([killer] if comm.rank == victim else []), comm=comm)
