"""Where the work is done: the [execution] table, and the executor that it asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_b2.corpus.models.classifier import missing_library
from megatron_b2.corpus.pipeline.executor import Executor
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.tasks import Limits

KEYS: Mapping[str, Sequence[str]] = {
    "local": ("workers", "memory_gb"),
    "ray": ("ray",),
    "slurm": ("slurm",),
}
"""Settings of [execution] that one executor reads and the others do not."""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Tasks on a Ray cluster."""

    address: str = "local"
    """HOST:PORT of the head of a cluster that this machine is part of; `auto` finds it; `local` starts one of
    this machine alone, for this run."""
    cpus_per_task: float = 1.0
    """Cores that Ray reserves for a task."""
    memory_gb: float = 2.0
    """Memory that Ray reserves for a task; the grouping of repeats goes on in files beyond half of it."""
    max_retries: int = 3
    """How often a task starts again after its worker or node died."""


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """Tasks in SLURM job arrays, an array for each phase of a stage."""

    partition: str = ""
    """None takes the cluster's default."""
    account: str = ""
    """None takes the user's default."""
    minutes: int = 60
    """Time limit of a job. A job that runs into it goes on in another one, without the task it was at."""
    cpus: int = 1
    """Cores of a job, which runs as many tasks at a time."""
    memory_gb: float = 4.0
    """Memory of a job; the grouping of repeats goes on in files beyond half of it."""
    tasks_per_job: int = 8
    """Tasks of a job; more where an array would become larger than max_array_size."""
    jobs_at_a_time: int = 100
    """Jobs of an array that may run at the same time."""
    max_array_size: int = 1000
    """Jobs of an array: MaxArraySize - 1 of slurm.conf."""
    max_retries: int = 3
    """How often in a row a job may die without having finished a task."""
    setup: tuple[str, ...] = ()
    """Shell lines before Python starts, such as "module load gcc"."""
    options: Mapping[str, str] = field(default_factory=dict)
    """More options of sbatch by their long names, such as qos = "low"."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where the work is done; it never changes a result."""

    executor: Literal["local", "ray", "slurm"] = "local"
    """Processes of this machine, tasks on a Ray cluster, or SLURM job arrays."""
    workers: int = 0
    """Processes of the local executor; 0 takes one for each core."""
    memory_gb: float = 0.0
    """Memory of all local workers together for the grouping of repeats, which goes on in files beyond it; 0
    takes 80 % of what is free. Beside it a worker holds a unit a few times over."""
    scratch: str = ""
    """Folder for temporary files of tasks on whatever machine they run, best a local disk; none takes
    WORK/scratch."""
    ray: RaySettings = field(default_factory=RaySettings)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


def unused_settings(written: Any) -> Iterator[str]:
    """Problems: settings of the table [execution], as it was written, that its executor does not read."""
    if not isinstance(written, Mapping):
        return
    chosen = written.get("executor", "local")
    for executor, keys in KEYS.items():
        if executor == chosen or chosen not in KEYS:
            continue
        for name in (key for key in keys if key in written):
            inner = written[name]
            names = [f"{name}.{key}" for key in inner] if isinstance(inner, Mapping) else [name]
            for setting in names:
                yield (
                    f"execution.{setting} is for the executor {executor!r}, but execution.executor is "
                    f"{chosen!r}; remove one of them"
                )


def broken_rules(execution: Execution) -> Iterator[str]:
    """Problems: values out of range."""
    ray, slurm = execution.ray, execution.slurm
    if execution.workers < 0:
        yield f"execution.workers is {execution.workers}; give 0 (all cores) or more"
    if execution.memory_gb < 0:
        yield f"execution.memory_gb is {execution.memory_gb}; give 0 (80 % of what is free) or more"
    positive = {
        "ray.cpus_per_task": ray.cpus_per_task,
        "ray.memory_gb": ray.memory_gb,
        "slurm.minutes": slurm.minutes,
        "slurm.cpus": slurm.cpus,
        "slurm.memory_gb": slurm.memory_gb,
        "slurm.tasks_per_job": slurm.tasks_per_job,
        "slurm.jobs_at_a_time": slurm.jobs_at_a_time,
        "slurm.max_array_size": slurm.max_array_size,
    }
    for key, value in positive.items():
        if value <= 0:
            yield f"execution.{key} is {value}; give more than 0"
    for key, count in {"ray.max_retries": ray.max_retries, "slurm.max_retries": slurm.max_retries}.items():
        if count < 0:
            yield f"execution.{key} is {count}; give 0 or more"
    if ray.address not in ("local", "auto") and not re.fullmatch(r"[^:/]+:\d+", ray.address):
        yield (
            f"execution.ray.address is {ray.address!r}; give HOST:PORT of the cluster's head, auto or local, "
            "and start the run on a machine of the cluster"
        )


def executor_of(execution: Execution, work: Path) -> AbstractContextManager[Executor]:
    """The executor that the settings ask for, to be used in a `with` block.

    Raises:
        OutputError: its library is not installed.
        LaunchError: its cluster is not there.
    """
    scratch = Path(execution.scratch) if execution.scratch else work / "scratch"
    if execution.executor == "ray":
        with missing_library("ray", "ray"):
            from megatron_b2.corpus.pipeline.ray_cluster import RayExecutor
        return RayExecutor(execution.ray, work, scratch)
    if execution.executor == "slurm":
        with missing_library("submitit", "submitit"):
            from megatron_b2.corpus.pipeline.slurm import SlurmExecutor
        return SlurmExecutor(execution.slurm, work, scratch)
    workers = execution.workers or len(os.sched_getaffinity(0))
    memory = int(execution.memory_gb * 1e9) or int(0.8 * psutil.virtual_memory().available)
    return LocalExecutor(workers, Limits(memory, scratch))
