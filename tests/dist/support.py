"""Forked ranks that are allowed to die: exit codes and standard error of each, signals from outside."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from megatron_b2.parallel.launch import LOOPBACK, LaunchEnvironment

ERROR = 1
"""Exit code of a rank whose function raised."""


class Ranks:
    """`fn(rank)` on forked ranks of a gloo group; every child is dead when the context ends."""

    def __init__(self, world_size: int, fn: Callable[[int], None], folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=self._child, args=(rank, world_size, fn)) for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def _child(self, rank: int, world_size: int, fn: Callable[[int], None]) -> None:
        with self._log(rank).open("wb", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        gc.freeze()  # to collect all that the parent imported holds the interpreter for seconds: silence
        try:
            torch.set_num_threads(1)
            LaunchEnvironment(
                launcher="torchrun",
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                local_world_size=world_size,
                node=0,
                master_addr=LOOPBACK,
                master_port=0,
            ).export()
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(self.folder / "store"), world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
            fn(rank)
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            code = ERROR
        os._exit(code)

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def log(self, rank: int) -> str:
        """Standard output and error of a rank."""
        return self._log(rank).read_text()

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, seconds: float, *, besides: tuple[int, ...] = ()) -> list[int | None]:
        """Exit codes once all (besides some) have ended; None for a rank that has not by then."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if rank not in besides:
                process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def when(self, path: Path, *, seconds: float = 60.0) -> None:
        """Return as soon as a rank has made the file `path`."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} did not appear; " + "\n".join(
                self.log(rank) for rank in range(len(self.processes))
            )
            time.sleep(0.01)
