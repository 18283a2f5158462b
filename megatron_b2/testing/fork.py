"""Run a function on several ranks of one machine, in well under a second: fork, gloo, no launcher.

Every parallel layout of the project is compared with a single process by tests written on this; users can
test their own modules with it:

    def test_all_reduce():
        assert run_ranks(2, lambda: all_reduce_of_my_rank()) == [1, 1]

The children are forked, so `fn` may be a closure and everything imported is already there. Nothing goes
through shared memory and no port is reserved: the ranks meet in a file.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_b2.parallel.launch import LOOPBACK, LaunchEnvironment

GRACE_SECONDS = 1.0
"""How long the other ranks may still report after one failed: their tracebacks are kept too."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` forked ranks of a gloo group; return the results in rank order.

    Inside, torch.distributed is initialised, the launch variables are set and torch uses one thread. `fn`
    must return something picklable (tensors are copied). Raises AssertionError with the traceback of the
    first rank that failed, or naming the ranks that had not finished after `timeout` seconds; every child
    is dead when this returns.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="b2-ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(rank, world_size, port, f"{folder}/store", sender, timeout, fn, args)
                )
                process.start()
                sender.close()
                ranks.append(_Rank(rank, process, receiver))
            _collect(ranks, deadline=time.monotonic() + timeout)
        finally:
            patience = 0.0 if any(child.failure for child in ranks) else GRACE_SECONDS
            for child in ranks:
                child.end(patience)
            _remove_shared_memory(port)
    failures = sorted((child for child in ranks if child.failure), key=lambda child: child.finished)
    if failures:
        raise AssertionError(_report(failures, world_size=world_size, timeout=timeout))
    return [child.result for child in ranks]


class _Rank:
    """The parent's view of one child."""

    def __init__(self, rank: int, process: BaseProcess, receiver: connection.Connection) -> None:
        self.rank = rank
        self.process = process
        self.receiver = receiver
        self.finished = float("inf")
        self.result: Any = None
        self.failure = "did not finish"

    def read(self) -> None:
        """Take the report of the child, or its exit code when it died without one."""
        self.finished = time.monotonic()
        try:
            succeeded, payload = pickle.loads(self.receiver.recv_bytes())
        except EOFError:
            self.process.join(GRACE_SECONDS)
            self.failure = f"died without a report (exit code {self.process.exitcode})"
            return
        self.result, self.failure = (payload, "") if succeeded else (None, payload)

    def end(self, patience: float) -> None:
        """Leave no process behind: SIGKILL, since a stopped child ignores everything else."""
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.receiver.close()


def _collect(ranks: list[_Rank], *, deadline: float) -> None:
    """Read the reports as they come; after a failure, wait only a moment for the others."""
    waiting = {child.receiver: child for child in ranks}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in connection.wait(list(waiting), timeout=left):
            child = waiting.pop(ready)  # type: ignore[call-overload]
            child.read()
            if child.failure:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _report(failures: list[_Rank], *, world_size: int, timeout: float) -> str:
    first, others = failures[0], failures[1:]
    if first.finished == float("inf"):
        stuck = ", ".join(str(child.rank) for child in failures)
        return f"ranks {stuck} of {world_size} did not finish in {timeout:g} s (killed)"
    lines = [f"rank {first.rank} of {world_size} failed first:", first.failure]
    lines += [f"rank {child.rank}: {child.failure.strip().splitlines()[-1]}" for child in others]
    return "\n".join(lines)


def _child(
    rank: int,
    world_size: int,
    port: int,
    store: str,
    sender: connection.Connection,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Body of one rank. Leaves by os._exit: no atexit handler of the parent runs twice."""
    gc.freeze()  # what the parent has made is not searched for garbage, and its pages stay shared
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
            master_port=port,
        ).export()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        report = pickle.dumps((True, fn(*args)))
    except BaseException:
        report = pickle.dumps((False, traceback.format_exc()))
    with contextlib.suppress(OSError):
        sender.send_bytes(report)
    sender.close()
    with contextlib.suppress(Exception):  # a rank that leaves early would break the last collective of others
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _free_port() -> int:
    """A port nobody listens on now; only for code under test that opens a second group by MASTER_PORT."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _remove_shared_memory(port: int) -> None:
    """DeepSpeed's CPU all-reduce buffers of this run (69 MB a rank), which a killed rank leaves behind."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        path.unlink(missing_ok=True)
