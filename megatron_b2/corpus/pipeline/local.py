"""The executor of one machine: a few processes, each with one task at a time.

A worker that dies costs its task only: another process takes its place, and the task is tried again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Self

from megatron_b2.corpus.pipeline.executor import Finished, TaskCrashError, attempt, finished
from megatron_b2.corpus.pipeline.shared import Site
from megatron_b2.corpus.pipeline.tasks import Limits, Task

MAX_TRIES = 3


class LocalExecutor:
    """Runs tasks on `workers` processes of this machine, which live until the end of the `with` block.

    Args:
        workers: number of processes, at least 1.
        limits: of the whole machine; each worker gets its share of the memory.
        site: of the driver, if that is on another machine.
    """

    def __init__(self, workers: int, limits: Limits, site: Site | None = None) -> None:
        self._limits = Limits(limits.memory // workers, limits.scratch)
        self._site = site
        self._size = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(self._workers)

    def run(self, tasks: Sequence[Task]) -> Iterator[Finished]:
        """As `Executor.run`; a task may kill two workers."""
        waiting = deque((task, 1) for task in tasks)
        while len(self._workers) < min(self._size, len(tasks)):
            self._workers.append(_Worker(self._limits, self._site))
        idle = list(self._workers)
        busy: dict[Connection, tuple[_Worker, Task, int]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    worker = idle.pop()
                    task, tries = waiting.popleft()
                    busy[worker.connection] = (worker, task, tries)
                    worker.send(task)
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    worker, task, tries = busy.pop(connection)
                    try:
                        answer = connection.recv()
                    except (EOFError, OSError):
                        self._stop([worker])
                        _may_try_again(task, tries, worker)
                        waiting.append((task, tries + 1))
                        self._workers.append(_Worker(self._limits, self._site))
                        idle.append(self._workers[-1])
                        continue
                    idle.append(worker)
                    yield finished(task, answer)
        finally:  # after an error, or if the caller stops listening
            self._stop([worker for worker, _, _ in busy.values()])

    def _stop(self, workers: Sequence[_Worker]) -> None:
        for worker in list(workers):
            worker.stop()
            self._workers.remove(worker)


def _may_try_again(task: Task, tries: int, worker: _Worker) -> None:
    if tries == MAX_TRIES:
        raise TaskCrashError(
            f"{task.name}: its worker died {tries} times, last with exit code {worker.process.exitcode} "
            "(-9 is often the kernel's answer to too much memory: give fewer workers)"
        )


class _Worker:
    def __init__(self, limits: Limits, site: Site | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, limits, site), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, task: Task) -> None:
        # A worker that has died shows it when its answer is read.
        with suppress(OSError):
            self.connection.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, limits: Limits, site: Site | None) -> None:
    """Answer each task as `attempt` does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver stops its workers itself
    threading.Thread(target=_end_with_driver, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):  # the driver is gone
            return
        with suppress(ConnectionError):
            connection.send(attempt(task, limits, site))


def _end_with_driver() -> None:
    """A worker that outlives its driver would work beside the next one, whose settings may be others."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os.kill(os.getpid(), signal.SIGKILL)
