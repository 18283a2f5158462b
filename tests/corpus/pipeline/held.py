"""A stage whose tasks wait for the test; a module of its own, so that workers anywhere can import it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view

PATIENCE = 60.0


@dataclass(frozen=True)
class Held:
    """Keeps every document; a task says in a file of `flags` which process has it and waits for a file "go"."""

    flags: str

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        yield context.for_each_unit(_held, self)


def _held(task: Task, _: Limits) -> Result:
    flags = Path(task.settings.flags)
    (flags / f"{task.output.stem}.{os.getpid()}").touch()
    deadline = time.monotonic() + PATIENCE
    while not (flags / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    view = read_view(task.inputs)
    return Result([view.write("held", keep=np.ones(len(view), bool), reason=[""] * len(view))])


def starts(flags: Path) -> list[tuple[str, int]]:
    """Task and process of every start."""
    names = (path.name.rsplit(".", 1) for path in flags.iterdir() if path.name != "go")
    return [(task, int(process)) for task, process in names]


def held(flags: Path, *, at_least: int = 1) -> list[int]:
    """Waits for processes that hold a task, and returns them."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        processes = [process for _, process in starts(flags) if psutil.pid_exists(process)]
        if len(processes) >= at_least:
            return processes
        time.sleep(0.05)
    raise TimeoutError("no task has started")
