"""What runs tasks: the protocol of all executors, and what their workers do with a task."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_b2.corpus.pipeline.shared import Site
from megatron_b2.corpus.pipeline.tasks import Limits, Task, run_task
from megatron_b2.errors import B2Error, InputError


@dataclass(frozen=True)
class Finished:
    """How a task ended."""

    task: Task
    error: B2Error | None = None
    """An input or setting is wrong, or an input file is damaged."""


class TaskCrashError(B2Error, RuntimeError):
    """A task failed in a way that is not the user's, or its worker died again and again."""


class Executor(Protocol):
    """Runs tasks somewhere: on processes of this machine, a Ray cluster, a SLURM cluster.

    A task's output and manifest are files, so an executor moves names only, and a worker that dies costs the
    task that it had.
    """

    def run(self, tasks: Sequence[Task]) -> Iterator[Finished]:
        """Run all tasks in any order; yields each as it ends.

        Raises:
            TaskCrashError: with the traceback of the first task that failed unexpectedly, or what is known of
                a task whose workers died again and again.
        """


def attempt(task: Task, limits: Limits, site: Site | None = None) -> B2Error | str | None:
    """Run a task; None, an error made for users, or the traceback of any other.

    Args:
        site: on another machine than the driver's.
    """
    try:
        if site is not None:
            site.enter(task.inputs)
        run_task(task, limits)
    except (InputError, FileNotFoundError) as error:
        if site is None:
            return error if isinstance(error, InputError) else traceback.format_exc()
        return InputError(
            f"{error} (on node {socket.gethostname()}; every node must have the inputs and models under the "
            "path that they have where the run was started)"
        )
    except B2Error as error:
        return error
    except BaseException:
        where = "" if site is None else f"on node {socket.gethostname()}:\n"
        return where + traceback.format_exc()
    return None


def finished(task: Task, answer: B2Error | str | None) -> Finished:
    """What `attempt` answered.

    Raises:
        TaskCrashError: if it was a traceback.
    """
    if isinstance(answer, str):
        raise TaskCrashError(f"{task.name} failed:\n{answer}")
    return Finished(task, answer)
