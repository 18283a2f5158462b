"""No silent hang: when a rank stalls or dies, all ranks end within a set time, and the culprit is named.

    with Watchdog(comm, host=master_addr, limits=limits, folder=output / "watchdog") as watchdog:
        watchdog.crumbs.mark("forward and backward", step=12)
        with watchdog.crumbs.operation("all-reduce of gradients"):
            ...

A thread of each rank sends heartbeats (heartbeat.py); rank 0 judges (diagnosis.py). A rank that must end
writes the stacks of all its threads into `folder`, a short text to standard error, and leaves by `os._exit`,
since its main thread may be stuck in a C++ collective. What even that thread cannot see (a main thread that
never releases the interpreter, a process that was stopped and goes on) is ended by an alarm of the kernel.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_b2.parallel.breadcrumbs import Breadcrumbs
from megatron_b2.parallel.comm import Comm
from megatron_b2.parallel.diagnosis import Collective, Limits, RankState, summary, table
from megatron_b2.parallel.heartbeat import Beater, Member, Monitor, Verdict, Witness

EXIT_WATCHDOG = 69
"""Exit status of a rank that the watchdog ended (EX_UNAVAILABLE): some rank stalled or died."""
REPORT_FILE = "report.txt"
LONGEST_INTERVAL = 5.0
"""Seconds between heartbeats, at most; a tenth of the limit otherwise."""
MAX_FRAMES = 4


class Watchdog:
    """Context manager that watches the ranks of `comm`; entering it is collective.

    `host` is the address of rank 0 that all ranks can reach, `folder` takes stacks and the report. One rank
    alone, or a limit of 0 seconds, is not watched: breadcrumbs go nowhere then.
    """

    def __init__(self, comm: Comm, *, host: str, limits: Limits, folder: Path) -> None:
        self.crumbs = Breadcrumbs()
        self.limits = limits
        self.is_on = comm.size > 1 and limits.seconds > 0
        self._comm = comm
        self._host = host
        self._folder = folder
        self._stacks_path = folder / f"rank-{comm.rank:05}.txt"
        self._stacks: BinaryIO | None = None
        self._beater: Beater | None = None
        self._main_thread = threading.get_ident()
        self._not_counted: frozenset[str] = frozenset()
        self._error: str | None = None
        self._catches_crashes = not faulthandler.is_enabled()

    def __enter__(self) -> Watchdog:
        if self.is_on:
            self._main_thread = threading.get_ident()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stacks = self._stacks_path.open("wb", buffering=0)
            self._connect().start()
            self._comm.barrier()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._beater is None or self._stacks is None:
            return
        if error is not None:
            self._error = f"{type(error).__name__}: {error}".splitlines()[0]
        self._beater.leave(self._error)
        _set_alarm(0)
        faulthandler.unregister(signal.SIGALRM)
        if self._catches_crashes:
            faulthandler.disable()
        self._stacks.close()
        with suppress(OSError):  # stacks and reports stay, empty files and folders go
            if not self._stacks_path.stat().st_size:
                self._stacks_path.unlink()
            self._folder.rmdir()

    def ignore_group(self, group: dist.ProcessGroup) -> None:
        """Do not compare the counts of `group`: its ranks exchange point-to-point messages.

        gloo counts those as well, and a stage in the middle of a pipeline sends more than one at its end.
        """
        self._not_counted |= {group.group_name}

    def set_timeouts(self, seconds: float) -> None:
        """Let every operation of every process group of this rank fail after `seconds`."""
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def _connect(self) -> Beater:
        """Meet: rank 0 opens a port, everybody hears where; returns the thread, not yet started."""
        rank = self._comm.rank
        common: dict[str, Any] = {
            "rank": rank,
            "crumbs": self.crumbs,
            "witness": Witness(self._collectives, self._frames),
            "limits": self.limits,
            "interval": min(LONGEST_INTERVAL, self.limits.seconds / 10),
            "alarm": _set_alarm,
            "on_verdict": self._end,
        }
        bind = self._host if _is_loopback(self._host) else ""
        monitor = Monitor(bind=bind, world_size=self._comm.size, **common) if rank == 0 else None
        me = (socket.gethostname(), os.getpid(), monitor and monitor.port, monitor and monitor.token)
        everybody = self._comm.all_gather_object(me)
        if monitor is not None:
            now = time.monotonic()
            monitor.expect(
                [
                    RankState(rank=number, host=host, pid=pid, heard=now, moved=now)
                    for number, (host, pid, *_) in enumerate(everybody)
                ]
            )
            self._beater = monitor
        else:
            server, _, port, token = everybody[0]
            self._beater = Member(server=server, host=self._host, port=port, token=token, **common)
        assert self._stacks is not None
        faulthandler.register(signal.SIGALRM, file=self._stacks, all_threads=True, chain=True)
        if self._catches_crashes:
            faulthandler.enable(self._stacks)
        return self._beater

    def _end(self, verdict: Verdict) -> None:
        """The last thing this rank does, unless it is to blame for an error of its own and leaves by that."""
        if self._error is not None and self._comm.rank in verdict.failed:
            return
        assert self._stacks is not None
        is_judge = isinstance(self._beater, Monitor)
        text = verdict.text if is_judge else verdict.text.splitlines()[0]
        place = "" if is_judge else f"; this rank was in {self.crumbs.current.text()}"
        lines = [f"watchdog of rank {self._comm.rank}: {line}" for line in (text + place).splitlines()]
        stacks = self._report() if is_judge else self._stacks_path
        lines.append(f"watchdog of rank {self._comm.rank}: ends with status {EXIT_WATCHDOG}; see {stacks}\n")
        with suppress(OSError):  # not through sys.stderr: the main thread may hold its lock
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, "\n".join(lines).encode())
        with suppress(OSError):
            self._stacks.write(f"{verdict.text}\n\nThis rank was in {self.crumbs.current.text()}.\n".encode())
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        os._exit(EXIT_WATCHDOG)

    def _report(self) -> Path:
        """Write the table of all ranks; rank 0 only."""
        assert isinstance(self._beater, Monitor)
        assert self._beater.diagnosis is not None
        path = self._folder / REPORT_FILE
        states, diagnosis = self._beater.states, self._beater.diagnosis
        with suppress(OSError):
            path.write_text(
                f"{summary(diagnosis, states)}\n\n{table(diagnosis, states, now=time.monotonic())}\n"
            )
        return self._folder

    def _collectives(self) -> list[Collective]:
        """Of every group of this rank, how many collectives it has issued."""
        world = distributed_c10d._world
        found = []
        for group, name in list(world.pg_names.items()):
            if name not in self._not_counted:
                count = group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # not in the stubs
                found.append(Collective(name, tuple(world.pg_group_ranks[group]), count))
        return found

    def _frames(self) -> str:
        """The innermost frames of the main thread, innermost first."""
        frame: FrameType | None = sys._current_frames().get(self._main_thread)
        parts: list[str] = []
        while frame is not None and len(parts) < MAX_FRAMES:
            code = frame.f_code
            file = "/".join(Path(code.co_filename).parts[-2:])
            parts.append(f"{file}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        return " < ".join(parts)


def _set_alarm(seconds: float) -> None:
    """SIGALRM writes the stacks and ends this process in `seconds`; 0 calls it off."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
