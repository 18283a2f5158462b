"""Faults of real training runs: each ends on every rank within the limit, and the culprit is named."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # these two are slow to import: once, before the ranks are forked
from torch import Tensor

import megatron_b2.engine.deepspeed  # noqa: F401
from megatron_b2 import __version__
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError
from megatron_b2.model.mlp import MLP
from megatron_b2.parallel.comm import ProcessGroupComm
from megatron_b2.parallel.watchdog import EXIT_WATCHDOG, REPORT_FILE
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training import watch
from megatron_b2.training.events import Callback, Outcome, StepEvent
from megatron_b2.training.watch import require_same_config
from tests.dist.program import train
from tests.dist.support import Ranks
from tests.training.runs import run_config, write_data

SECONDS = 5.0
ENOUGH = SECONDS + 15
"""Limit, settling and a busy machine."""
WATCHED = {"watchdog_seconds": SECONDS, "first_step_seconds": 60.0}
PARALLEL = {"engine": "deepspeed", "zero_stage": 1, **WATCHED}


class At(Callback):
    """Calls a function in the middle of a step of a rank."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._step = step
        self._action = action

    def step_begin(self, event: StepEvent) -> None:
        if event.step + 1 == self._step:
            self._action()


def endless(folder: Path, *, num_layers: int = 1, **parallel: Any) -> RunConfig:
    return run_config(
        folder,
        write_data(folder),
        model={"num_layers": num_layers},
        data={"document_masking": False},  # else it depends on the data between whom a ring has messages
        train={"steps": 1_000_000, "global_batch_size": 6, "micro_batch_size": 1},
        parallel=PARALLEL | parallel,
        checkpoint={"interval": 0},
    )


def running(folder: Path, config: RunConfig) -> Callable[[int], None]:
    """The body of a rank; rank 0 makes the file `running` at step 5."""

    def body(rank: int) -> None:
        callbacks = [At(5, (folder / "running").touch)] if rank == 0 else []
        train(config, comm=ProcessGroupComm(), callbacks=callbacks)

    return body


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_in_a_step(tmp_path: Path, victim: int) -> None:
    with Ranks(3, running(tmp_path, endless(tmp_path)), tmp_path / "ranks") as ranks:
        ranks.when(tmp_path / "running")
        ranks.send(victim, signal.SIGKILL)
        codes = ranks.wait(ENOUGH)
        assert codes[victim] == -signal.SIGKILL
        for rank in {0, 1, 2} - {victim}:
            assert codes[rank] == EXIT_WATCHDOG, ranks.log(rank)
            assert f"rank {victim} (" in ranks.log(rank)
            assert "died" in ranks.log(rank)
            assert re.search(r"in '(training step|forward|backward|clipping|stop signals)", ranks.log(rank))


@pytest.mark.parametrize("victim", [0, 2])
def test_freeze(tmp_path: Path, victim: int) -> None:
    config = endless(tmp_path)
    with Ranks(3, running(tmp_path, config), tmp_path / "ranks") as ranks:
        ranks.when(tmp_path / "running")
        ranks.send(victim, signal.SIGSTOP)
        start = time.monotonic()
        codes = ranks.wait(ENOUGH, besides=(victim,))
        assert time.monotonic() - start > SECONDS / 2
        for rank in {0, 1, 2} - {victim}:
            assert codes[rank] == EXIT_WATCHDOG, ranks.log(rank)
            assert f"rank {victim} (" in ranks.log(rank)
            assert "silent for" in ranks.log(rank)
        ranks.send(victim, signal.SIGCONT)
        assert ranks.wait(ENOUGH)[victim] not in (None, 0)
    stacks = [file.read_text() for file in (Path(config.output_dir) / "watchdog").glob("rank-*.txt")]
    assert sum("train_step" in text for text in stacks) >= 1


def test_a_rank_stuck_in_a_step_is_named_with_its_place(tmp_path: Path) -> None:
    config = endless(tmp_path)

    def body(rank: int) -> None:
        stuck = [At(4, lambda: time.sleep(1_000))] if rank == 1 else []
        train(config, comm=ProcessGroupComm(), callbacks=stuck)

    with Ranks(3, body, tmp_path / "ranks") as ranks:
        assert ranks.wait(60) == [EXIT_WATCHDOG] * 3
        told = ranks.log(0)
        assert "rank 1 (" in told.splitlines()[0]
        assert "made no progress for" in told
        assert "step 4, in 'training step' at" in told
        assert "step_begin" in told
        assert "ranks 0, 2: step 4, in 'training step', waiting for rank 1" in told
    assert "waits for rank 1" in (Path(config.output_dir) / "watchdog" / REPORT_FILE).read_text()


def fall_asleep_in_an_mlp(*, call: int) -> None:
    """From now on in this process: the MLP's forward number `call`, 0-based, does not return."""
    calls, forward = count(), MLP.forward

    def sleeper(self: MLP, x: Tensor) -> Tensor:
        if next(calls) == call:
            time.sleep(1_000)
        return forward(self, x)

    MLP.forward = sleeper  # type: ignore[method-assign]  # of this forked rank only


PIPELINE = {"pipeline": 2}
RING = {"context": 4, "context_method": "ring"}
TENSOR_PIPELINE = {"tensor": 2, "pipeline": 2}


@pytest.mark.parametrize(
    ("layout", "victim", "place", "waiting"),
    [
        pytest.param(
            PIPELINE,
            1,
            "micro-batch 1, in 'forward of stage 1'",
            ["rank 0: step 4, micro-batch 1, in 'receive gradient for stage 0', waiting for rank 1"],
            id="pipeline, last stage",
        ),
        pytest.param(
            PIPELINE,
            0,
            "micro-batch 1, in 'forward of stage 0'",
            ["rank 1: step 4, micro-batch 1, in 'receive activation for stage 1', waiting for rank 0"],
            id="pipeline, first stage",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            RING,
            1,
            "micro-batch 0, in 'forward'",
            [
                "rank 0: step 4, micro-batch 0, in 'attention ring, forward: send', waiting for rank 1",
                "rank 2: step 4, micro-batch 0, in 'attention ring, forward: receive', waiting for rank 1",
                "rank 3: step 4, micro-batch 0, in 'attention ring, forward: receive', waiting for rank 2",
            ],
            id="ring",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TENSOR_PIPELINE,
            3,
            "micro-batch 1, in 'forward of stage 1'",
            [
                "rank 0: step 4, micro-batch 1, in 'receive gradient for stage 0', waiting for rank 2",
                "rank 1: step 4, micro-batch 1, in 'receive gradient for stage 0', waiting for rank 3",
                "rank 2: step 4, micro-batch 1, in 'forward of stage 1', waiting for rank 3",
            ],
            id="tensor and pipeline",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_asleep_in_an_mlp_is_the_only_one_blamed(
    tmp_path: Path, layout: dict[str, Any], victim: int, place: str, waiting: list[str]
) -> None:
    size = len(waiting) + 1
    config = endless(tmp_path, num_layers=2, **layout)

    def body(rank: int) -> None:
        # Pipelines hold one of the two layers: forward 1 is of micro-batch 1.
        asleep = At(4, partial(fall_asleep_in_an_mlp, call=1 if "pipeline" in layout else 0))
        train(config, comm=ProcessGroupComm(), callbacks=[asleep] if rank == victim else [])

    with Ranks(size, body, tmp_path / "ranks") as ranks:
        assert ranks.wait(60 + ENOUGH) == [EXIT_WATCHDOG] * size, ranks.log(0)
        first, *others, last = [
            line.removeprefix("watchdog of rank 0: ")
            for line in ranks.log(0).splitlines()
            if line.startswith("watchdog of rank 0: ")
        ]
    assert re.match(rf"rank {victim} \(.*\) made no progress for .*: step 4, {place} at .* sleeper", first)
    assert sorted(others) == waiting
    assert "ends with status" in last


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_in_a_pipeline(tmp_path: Path, victim: int) -> None:
    config = endless(tmp_path, num_layers=2, **PIPELINE)
    with Ranks(2, running(tmp_path, config), tmp_path / "ranks") as ranks:
        ranks.when(tmp_path / "running")
        ranks.send(victim, signal.SIGKILL)
        codes = ranks.wait(ENOUGH)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == EXIT_WATCHDOG, ranks.log(1 - victim)
        told = ranks.log(1 - victim)
        assert re.search(rf"rank {victim} \(.*\) died", told), told
        assert f"rank {1 - victim} (" not in told


def test_a_rank_with_another_configuration(tmp_path: Path) -> None:
    config = endless(tmp_path)
    optim = replace(config.optim, max_lr=3e-4)

    def body() -> tuple[str, ...]:
        comm = ProcessGroupComm()
        mine = replace(config, optim=optim) if comm.rank == 2 else config
        with pytest.raises(ConfigError) as caught:
            train(mine, comm=comm)
        return caught.value.problems

    for problems in run_ranks(3, body, timeout=30):
        assert problems == (
            "another configuration on rank 2 than on ranks 0-1: optim.max_lr = 0.0003, not 0.01; "
            "start all ranks with the same file, arguments and software",
        )
    assert not Path(config.output_dir).exists()


def test_every_deviating_group_is_named(tmp_path: Path) -> None:
    config = endless(tmp_path)

    def body() -> tuple[str, ...]:
        comm = ProcessGroupComm()
        seeds = {1: 5, 3: 6}
        train_config = replace(config.train, seed=seeds.get(comm.rank, config.train.seed))
        name = "other" if comm.rank == 3 else config.name
        with pytest.raises(ConfigError) as caught:
            require_same_config(replace(config, train=train_config, name=name), comm=comm)
        return caught.value.problems

    first, second = run_ranks(4, body)[2]
    assert "on rank 1 than on ranks 0, 2: train.seed = 5, not 1234;" in first
    assert "on rank 3 than on ranks 0, 2: name = 'other', not 'tiny', train.seed = 6, not 1234;" in second


@pytest.mark.parametrize("name", ["torch", "deepspeed", "triton"])
def test_a_rank_with_other_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = endless(tmp_path)
    here = watch.version

    def body() -> tuple[str, ...]:
        comm = ProcessGroupComm()
        other = {0: here(name), 1: "0.18.0", 2: here(name)}[comm.rank]
        monkeypatch.setattr(watch, "version", lambda package: other if package == name else here(package))
        with pytest.raises(ConfigError) as caught:
            require_same_config(config, comm=comm)
        return caught.value.problems

    assert (
        run_ranks(3, body, timeout=30)
        == [
            (
                f"another configuration on rank 1 than on ranks 0, 2: version of {name} = '0.18.0', not "
                f"{here(name)!r}; start all ranks with the same file, arguments and software",
            )
        ]
        * 3
    )


def test_software_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(watch, "version", nothing)
    assert watch.software() == {
        "version of megatron_b2": __version__,
        **{f"version of {name}": "not installed" for name in ("torch", "deepspeed", "triton")},
    }


def test_a_watched_run_completes_and_leaves_no_trace(tmp_path: Path) -> None:
    settings = {"steps": 6, "global_batch_size": 4, "micro_batch_size": 1}
    config = run_config(tmp_path, write_data(tmp_path), train=settings, parallel=PARALLEL)
    assert run_ranks(2, lambda: train(config, comm=ProcessGroupComm())) == [Outcome.COMPLETED] * 2
    assert not (Path(config.output_dir) / "watchdog").exists()
