"""kill -9 of one of two ranks in the middle of a save: the checkpoint before it stays, the next save works."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch

from megatron_b2.checkpoint.catalog import latest_checkpoint
from megatron_b2.checkpoint.store import CheckpointReader, save_checkpoint
from megatron_b2.parallel.comm import Comm, ProcessGroupComm, SingleComm
from megatron_b2.testing.fork import run_ranks
from tests.checkpoint.support import flat_state, numbered

KILLS = 20
SHAPE = (60_000, 3)


def save(root: Path, step: int, comm: Comm) -> Path:
    """Values that tell the step, cut over the ranks as ZeRO does."""
    return save_checkpoint(
        root,
        step=step,
        tokens=0,
        state=flat_state({"model/a": numbered(SHAPE, step)}, rank=comm.rank, ranks=comm.size),
        rank_state={"rng": torch.zeros(5)},
        meta={},
        files={"config.toml": b""},
        comm=comm,
    )


def save_for_ever(root: Path, pids: Path, first: int) -> None:
    comm = ProcessGroupComm()
    (pids / str(comm.rank)).write_text(f"{os.getpid()}\n")
    for step in count(first):
        save(root, step, comm)
        if comm.rank == 0:
            for old in sorted(root.glob("step_*[0-9]"))[:-2]:
                old.rename(pids / old.name)  # out of the way: the test is about saving


def wait_for(condition: Callable[[], object], run: Future[object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert not run.done(), run.exception()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def kill_during_a_save(root: Path, pids: Path, victim: int, rng: random.Random, run: Future[object]) -> Path:
    """Kill one rank while a save is under way, and only then: all ranks are stopped to look. The open folder."""
    wait_for(lambda: all((pids / str(rank)).is_file() for rank in range(2)), run)
    wait_for(lambda: all((pids / str(rank)).read_text().endswith("\n") for rank in range(2)), run)
    ranks = [int((pids / str(rank)).read_text()) for rank in range(2)]
    while True:
        wait_for(lambda: list(root.glob("step_*.tmp")), run)
        time.sleep(rng.uniform(0, 0.015))
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: all(is_stopped(pid) for pid in ranks), run)
        under_way = list(root.glob("step_*.tmp"))
        if under_way:
            os.kill(ranks[victim], signal.SIGKILL)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        if under_way:
            return under_way[0]


def test_a_rank_killed_during_a_save_costs_only_that_save(tmp_path: Path) -> None:
    rng = random.Random(0)
    victims = [0, 1] * (KILLS // 2)
    rng.shuffle(victims)
    root = tmp_path / "checkpoints"
    last = 1
    save(root, last, SingleComm())
    for number, victim in enumerate(victims):
        pids = tmp_path / f"kill{number}"
        pids.mkdir()
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(run_ranks, 2, save_for_ever, root, pids, last + 1, timeout=30)
            under_way = kill_during_a_save(root, pids, victim, rng, run)
            assert "exit code -9" in str(run.exception())
        killed = int(under_way.name[5:13])
        latest = latest_checkpoint(root)
        assert latest is not None
        reader = CheckpointReader(latest)
        assert reader.verify() == []
        # Rank 0 may have been past the last thing that it needs from rank 1; the save is then complete.
        assert reader.step in ((killed - 1, killed) if victim == 1 else (killed - 1,))
        assert torch.equal(reader.read("model/a"), numbered(SHAPE, reader.step))
        last = reader.step + 1
        after = save(root, last, SingleComm())
        assert latest_checkpoint(root) == after
        assert not list(root.glob("*.tmp"))
