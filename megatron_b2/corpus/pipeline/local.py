"""The executor of one machine: a few processes, each with one task at a time.

A worker that dies costs its task only: another process takes its place, and the task is tried again.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Self

from megatron_b2.corpus.pipeline.tasks import Limits, Task, run_task
from megatron_b2.errors import B2Error

MAX_TRIES = 3


@dataclass(frozen=True)
class Finished:
    """How a task ended."""

    task: Task
    error: B2Error | None = None
    """An input or setting is wrong, or an input file is damaged."""


class TaskCrashError(B2Error, RuntimeError):
    """A task failed in a way that is not the user's, or its worker died again and again."""


class LocalExecutor:
    """Runs tasks on `workers` processes of this machine, which live until the end of the `with` block.

    Args:
        workers: number of processes, at least 1.
        limits: of the whole machine; each worker gets its share of the memory.
    """

    def __init__(self, workers: int, limits: Limits) -> None:
        self._limits = Limits(limits.memory // workers, limits.scratch)
        self._size = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(self._workers)

    def run(self, tasks: Sequence[Task]) -> Iterator[Finished]:
        """Run all tasks in any order; yields each as it ends.

        Raises:
            TaskCrashError: with the traceback of the first task that failed unexpectedly, or the name of the
                one that killed three workers.
        """
        waiting = deque((task, 1) for task in tasks)
        while len(self._workers) < min(self._size, len(tasks)):
            self._workers.append(_Worker(self._limits))
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
                        error = connection.recv()
                    except (EOFError, OSError):
                        self._stop([worker])
                        _may_try_again(task, tries, worker)
                        waiting.append((task, tries + 1))
                        self._workers.append(_Worker(self._limits))
                        idle.append(self._workers[-1])
                        continue
                    idle.append(worker)
                    if isinstance(error, str):
                        raise TaskCrashError(f"{task.name} failed:\n{error}")
                    yield Finished(task, error)
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
            "(-9 is often the kernel's answer to too much memory: give fewer --workers)"
        )


class _Worker:
    def __init__(self, limits: Limits) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, limits), daemon=True)
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


def _serve(connection: Connection, limits: Limits) -> None:
    """Answer each task with None, an error made for users, or the traceback of any other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver stops its workers itself
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the driver is gone
            return
        answer: B2Error | str | None = None
        try:
            run_task(task, limits)
        except B2Error as error:
            answer = error
        except BaseException:
            answer = traceback.format_exc()
        with suppress(BrokenPipeError):
            connection.send(answer)
