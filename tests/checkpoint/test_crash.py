"""kill -9 during a save: at every system-visible point, and at random moments. The last good one survives."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_b2.checkpoint import CheckpointReader, latest_checkpoint, prune_checkpoints, save_checkpoint
from megatron_b2.parallel.comm import SingleComm
from tests.checkpoint.support import numbered, save_small, whole_state

EVENTS = ("open", "os.", "shutil.", "_thread.")
"""Audit events that end a life: everything that touches the file system, and the hashing thread's start."""


def fork(body: Callable[[], None], *, seconds: int = 60) -> int:
    """Run `body` in a child that ends with it, at the latest after `seconds`; its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(seconds)
            body()
            status = 0
        finally:
            os._exit(status)
    return child


def save_and_die_at(root: Path, step: int, scale: float, moment: int) -> bool:
    """Save in a child that is killed at its `moment`-th event; whether it lived to the end."""
    left = moment

    def tick(event: str = "open", _: Any = None) -> None:
        nonlocal left
        if event.startswith(EVENTS) and event != "os.kill":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def save() -> None:
        sys.addaudithook(tick)
        sync = os.fsync
        os.fsync = lambda descriptor: (tick(), sync(descriptor))[1]  # no audit event of its own
        save_checkpoint(
            root,
            step=step,
            tokens=0,
            state=whole_state({"model/a": numbered((64, 3), step) * scale}),
            rank_state={},
            meta={},
            files={"config.toml": b"", "tokenizer/tokenizer.model": b"x"},
            comm=SingleComm(),
            on_bytes=lambda _: tick(),
        )

    _, status = os.waitpid(fork(save), 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0
    return not killed


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_killed_at_every_point_of_a_save(tmp_path: Path, step: int) -> None:
    moments = 0
    while True:
        root = tmp_path / f"{moments}"
        root.mkdir()
        save_small(root, 1)
        before = numbered((64, 3), 1)
        (root / "step_00000009.tmp").mkdir()  # left by an earlier crash
        finished = save_and_die_at(root, step, 2.0, moments)
        latest = latest_checkpoint(root)
        assert latest is not None
        value = CheckpointReader(latest).read("model/a")
        assert torch.equal(value, numbered((64, 3), step) * 2) or torch.equal(value, before)
        if finished:
            assert latest.name == f"step_{step:08d}"
        after = save_small(root, 3)
        assert latest_checkpoint(root) == after
        assert not [path for path in root.iterdir() if path.suffix]  # no .tmp, no .old
        shutil.rmtree(root)
        if finished:
            break
        moments += 1
    assert moments > 25


def save_for_ever(root: Path, first: int, report: int) -> None:
    for step in count(first):
        save_small(root, step, size=40_000)
        prune_checkpoints(root, keep_last=1)
        os.write(report, step.to_bytes(4, "little"))


def test_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    last = 0
    for _ in range(20):
        reading, writing = os.pipe()
        child = fork(partial(save_for_ever, tmp_path, last + 1, writing))
        os.close(writing)
        first = os.read(reading, 4)
        assert first, "the child could not save at all"
        last = int.from_bytes(first, "little")
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while data := os.read(reading, 4):
            last = int.from_bytes(data, "little")
        os.close(reading)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        reader = CheckpointReader(latest)
        assert reader.step >= last
        assert torch.equal(reader.read("model/a"), numbered((40_000, 3), reader.step))
        last = reader.step
