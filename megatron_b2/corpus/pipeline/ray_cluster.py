"""The executor on a Ray cluster of any number of nodes, which may come and go during the run.

Only names go through Ray: a task with the paths of its files, and None or an error back. Documents stay on
the file system that all nodes share.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from megatron_b2.corpus.pipeline.execution import RaySettings
from megatron_b2.corpus.pipeline.executor import Finished, TaskCrashError, attempt, finished
from megatron_b2.corpus.pipeline.shared import Site, look_again
from megatron_b2.corpus.pipeline.tasks import Limits, Task
from megatron_b2.errors import LaunchError

WAIT = 5.0
"""Seconds after which the driver looks at the size of the cluster again."""
CONNECT = 10.0
"""Seconds for the head of a cluster to answer."""
LOOPBACK = "127.0.0.1"
OBJECT_STORE = 100 << 20
"""Bytes for Ray's own store in a cluster of ours; it holds no documents."""


class RayExecutor:
    """Runs tasks on a Ray cluster, of which this machine is a node, until the end of the `with` block.

    A task whose worker or node dies starts again elsewhere. At most two tasks for each free place of the
    cluster are handed to Ray at a time.

    Raises:
        LaunchError: at the start of the block; no cluster answers, or none of its nodes is large enough.
    """

    def __init__(self, settings: RaySettings, work: Path, scratch: Path) -> None:
        self._settings = settings
        self._work = work
        self._memory = int(settings.memory_gb * 1e9)
        self._limits = Limits(self._memory // 2, scratch)
        self._folder: str | None = None

    def __enter__(self) -> Self:
        try:
            self._connect()
            self._fits()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, tasks: Sequence[Task]) -> Iterator[Finished]:
        """As `Executor.run`."""
        site = Site.of(self._work)
        there: Any = ray.remote(num_cpus=self._settings.cpus_per_task, memory=self._memory, max_retries=0)(
            attempt
        )
        waiting = deque((task, 0) for task in tasks)
        running: dict[Any, tuple[Task, int]] = {}
        try:
            while waiting or running:
                window = 2 * self._places() + 1
                while waiting and len(running) < window:
                    task, deaths = waiting.popleft()
                    running[there.remote(task, self._limits, site)] = (task, deaths)
                ray.wait(list(running), timeout=WAIT)
                ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
                for reference in ready:
                    task, deaths = running.pop(reference)
                    try:
                        answer = ray.get(reference)
                    except RayTaskError as error:  # before our function began
                        raise TaskCrashError(f"{task.name} could not start:\n{error}") from error
                    except RayError as error:
                        self._may_try_again(task, deaths + 1, error)
                        waiting.append((task, deaths + 1))
                        continue
                    yield finished(task, answer)
        finally:  # after an error, or if the caller stops listening
            for reference in running:
                ray.cancel(reference, force=True)
        look_again(task.output for task in tasks)

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = self._settings.address
        host, colon, port = address.rpartition(":")
        try:
            if colon:  # Ray itself would try for many minutes
                socket.create_connection((host, int(port)), timeout=CONNECT).close()
            if address == "local":
                self._folder = tempfile.mkdtemp(prefix="b2-ray-")
                ray.init(
                    address,
                    num_cpus=len(os.sched_getaffinity(0)),
                    object_store_memory=OBJECT_STORE,
                    include_dashboard=False,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=self._folder,
                    **quiet,
                )
            else:
                ray.init(address, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise LaunchError(
                f"execution.ray.address is {address!r}, but no Ray cluster can be used there: {error}\n"
                "Start one with `ray start --head` on one machine and `ray start --address HOST:PORT` on the "
                "others, this one included, or give `local`"
            ) from error

    def _places(self) -> int:
        """How many tasks the cluster can run at a time, as it is now."""
        places = 0
        for node in ray.nodes():
            if node["Alive"]:
                resources = node["Resources"]
                cores = resources.get("CPU", 0) // self._settings.cpus_per_task
                places += int(min(cores, resources.get("memory", 0) // self._memory))
        return places

    def _fits(self) -> None:
        if self._places() == 0:
            sizes = "; ".join(
                f"{node['NodeManagerHostname']}: {node['Resources'].get('CPU', 0):g} CPUs, "
                f"{node['Resources'].get('memory', 0) / 1e9:.1f} GB"
                for node in ray.nodes()
                if node["Alive"]
            )
            raise LaunchError(
                f"no node of the Ray cluster has {self._settings.cpus_per_task:g} CPUs and "
                f"{self._settings.memory_gb:g} GB for a task ({sizes}); give less as "
                "execution.ray.cpus_per_task or memory_gb"
            )

    def _may_try_again(self, task: Task, deaths: int, error: RayError) -> None:
        if deaths > self._settings.max_retries:
            raise TaskCrashError(
                f"{task.name}: its worker or node died {deaths} times (execution.ray.max_retries is "
                f"{self._settings.max_retries}), last: {error}"
            ) from error
