"""kill -9 during a save: at every system-visible point, and at random moments. The last good one survives."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_b2.checkpoint import CheckpointReader, latest_checkpoint, prune_checkpoints, save_checkpoint
from megatron_b2.parallel.comm import SingleComm
from tests.checkpoint.support import numbered, save_small, whole_state

EVENTS = ("open", "os.", "shutil.", "_thread.")
"""Audit events that end a life: everything that touches the file system, and the hashing thread's start."""


def save_and_die_at(root: Path, step: int, scale: float, moment: int) -> bool:
    """Fork a child that saves and is killed at its `moment`-th event; whether it lived to the end."""
    child = os.fork()
    if child == 0:
        left = moment

        def tick(event: str = "open", _: Any = None) -> None:
            nonlocal left
            if event.startswith(EVENTS):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(tick)
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
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


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
        assert {p.name for p in root.iterdir()} in ({"step_00000001", "step_00000003"}, {
            "step_00000001", "step_00000002", "step_00000003"
        })  # fmt: skip
        shutil.rmtree(root)
        if finished:
            break
        moments += 1
    assert moments > 30


def test_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    last = 0
    for _ in range(20):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(last + 1, last + 10_000):
                save_small(tmp_path, step, size=40_000)
                prune_checkpoints(tmp_path, keep_last=1)
                os.write(writing, step.to_bytes(4, "little"))
        os.close(writing)
        last = int.from_bytes(os.read(reading, 4), "little")
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
