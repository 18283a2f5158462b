"""The executor in SLURM job arrays, through submitit: an array for each phase, some tasks for each job.

A job is Python on a compute node that runs its tasks with the executor of one machine. Whatever ends a job
(time limit, preemption, a dead node), the tasks that it finished are files, and another job does the rest.
"""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher

from megatron_b2.corpus.pipeline.execution import SlurmSettings
from megatron_b2.corpus.pipeline.executor import Finished, TaskCrashError
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.shared import Site, look_again
from megatron_b2.corpus.pipeline.tasks import Contents, Limits, Task, is_done
from megatron_b2.errors import B2Error, LaunchError

FIRST_PAUSE, LONGEST_PAUSE, SLOWER = 0.1, 10.0, 1.2
"""Seconds between looks at the jobs, and the factor by which they grow while nothing happens."""
NOTICE = 30
"""Seconds before the time limit at which SLURM tells a job."""
LOG_LINES = 20
"""Of a job that died, in the error message."""
GONE = "GONE"
"""State of a job that SLURM no longer knows."""
FAILED = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
ENDED = (*FAILED, "COMPLETED", GONE)
"""States of a job that will not run again."""


@dataclass(frozen=True)
class _Job:
    tasks: Sequence[Task]
    deaths: int
    """How often in a row a job with these tasks died without having finished any."""
    job: submitit.Job[B2Error | None]


class SlurmExecutor:
    """Runs tasks in SLURM jobs; those that are left are cancelled at the end of `run`.

    Args:
        settings: of the jobs.
        work: folder on a file system that the compute nodes share; jobs and their logs are in WORK/slurm.
        scratch: folder for temporary files on the compute nodes.
        cluster: submitit's name; "local" makes a process of this machine of every job.

    Raises:
        LaunchError: at the start of the `with` block; SLURM's commands are not here.
    """

    def __init__(
        self,
        settings: SlurmSettings,
        work: Path,
        scratch: Path,
        *,
        cluster: Literal["slurm", "local"] = "slurm",
    ) -> None:
        self._settings = settings
        self._work = work
        self._cluster = cluster
        self._limits = Limits(int(settings.memory_gb * 1e9) // 2, scratch)
        self._name = f"b2-corpus-{hashlib.sha256(str(work.absolute()).encode()).hexdigest()[:12]}"
        self._queue = _Queue()

    def __enter__(self) -> Self:
        if self._cluster == "slurm":
            missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]
            if missing:
                raise LaunchError(
                    f"execution.executor is 'slurm', but {', '.join(missing)} is not on the PATH; start the "
                    "run on a machine that can submit SLURM jobs"
                )
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do: `run` has cancelled its jobs."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Finished]:
        """As `Executor.run`."""
        self._cancel(())  # jobs of a driver that was killed would do the same work beside ours
        shutil.rmtree(self._folder, ignore_errors=True)
        site = Site.of(self._work)
        jobs = self._submit([(part, 0) for part in shares(tasks, self._settings)], site)
        pause = FIRST_PAUSE
        try:
            while jobs:
                ended = [job for job in jobs if job.job.done()]
                if not ended:
                    time.sleep(pause)
                    pause = min(SLOWER * pause, LONGEST_PAUSE)
                    continue
                pause = FIRST_PAUSE
                again: list[tuple[Sequence[Task], int]] = []
                for job in ended:
                    jobs.remove(job)
                    left = self._left(job)
                    lost = {task.output for task in left}
                    yield from (Finished(task) for task in job.tasks if task.output not in lost)
                    if left:
                        again.append((left, job.deaths + 1 if len(left) == len(job.tasks) else 0))
                jobs += self._submit(again, site)
        finally:  # after an error, or if the caller stops listening
            if jobs:
                self._cancel(jobs)
        look_again(task.output for task in tasks)
        shutil.rmtree(self._folder, ignore_errors=True)  # logs stay if anything failed

    @property
    def _folder(self) -> Path:
        return self._work / "slurm"

    def _submit(self, parts: Sequence[tuple[Sequence[Task], int]], site: Site) -> list[_Job]:
        """A job for each part, tasks and deaths so far, in one array."""
        if not parts:
            return []
        settings = self._settings
        executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
        executor.update_parameters(
            name=self._name,
            timeout_min=settings.minutes,
            cpus_per_task=settings.cpus,
            mem_gb=settings.memory_gb,
            slurm_partition=settings.partition or None,
            slurm_account=settings.account or None,
            slurm_array_parallelism=settings.jobs_at_a_time,
            slurm_signal_delay_s=NOTICE,
            slurm_setup=list(settings.setup),
            slurm_additional_parameters=dict(settings.options),
            local_setup=list(settings.setup),
        )
        calls = [functools.partial(run_job, part, self._limits, site, settings.cpus) for part, _ in parts]
        try:
            jobs = executor.submit_array(calls)
        except FailedJobError as error:
            raise LaunchError(f"SLURM does not take the jobs: {error}") from error
        for job in jobs:
            if isinstance(job, submitit.SlurmJob):
                job.watcher = self._queue
                self._queue.register_job(job.job_id)
        return [_Job(part, deaths, job) for (part, deaths), job in zip(parts, jobs, strict=True)]

    def _left(self, job: _Job) -> Sequence[Task]:
        """The tasks that a job which has ended did not finish.

        Raises the error of the task that stopped it, if one did.
        """
        reason = f"SLURM says {job.job.state}"
        if job.job.paths.result_pickle.exists():
            try:
                error = job.job.result()
            except UncompletedJobError as failure:  # stopped from outside our function
                reason = str(failure)
            else:
                if error is not None:
                    raise error
                return ()
        look_again(task.output for task in job.tasks)
        contents = Contents()
        left = [task for task in job.tasks if not is_done(task, contents)]
        if len(left) == len(job.tasks) and job.deaths == self._settings.max_retries:
            raise TaskCrashError(self._obituary(job, reason))
        return left

    def _obituary(self, job: _Job, reason: str) -> str:
        log = job.job.paths.stderr
        if log.exists():
            lines = log.read_text(errors="replace").splitlines()
            told = "\n".join([f"End of {log}:", *lines[-LOG_LINES:]])
        else:
            node = self._queue.node(job.job.job_id)
            told = (
                f"It left no log at {log}: if node {node} does not see that folder, put `work` on a file "
                "system that every node mounts under the same path (NFS, Lustre, ...)"
            )
        return (
            f"{job.tasks[0].name}: SLURM jobs with it died {job.deaths + 1} times without having finished a "
            f"task (execution.slurm.max_retries is {self._settings.max_retries}), last {job.job.job_id}: "
            f"{reason}\n{told}"
        )

    def _cancel(self, jobs: Sequence[_Job]) -> None:
        """In SLURM all jobs for the work folder, by their name."""
        if self._cluster == "slurm":
            subprocess.run(["scancel", f"--name={self._name}"], check=False)
            return
        for job in jobs:
            job.job.cancel(check=False)


def shares(tasks: Sequence[Task], settings: SlurmSettings) -> list[Sequence[Task]]:
    """The tasks of each job of an array that SLURM takes."""
    size = max(settings.tasks_per_job, math.ceil(len(tasks) / settings.max_array_size))
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def run_job(tasks: Sequence[Task], limits: Limits, site: Site, workers: int) -> B2Error | None:
    """What a job does: its tasks, those that an earlier start of it has not done; the first error ends it."""
    try:
        site.enter(path for task in tasks for path in task.inputs)
        contents = Contents()
        open_tasks = [task for task in tasks if not is_done(task, contents)]
        with LocalExecutor(workers, limits, site) as executor:
            for done in executor.run(open_tasks):
                if done.error is not None:
                    return done.error
    except B2Error as error:
        return error
    return None


class _Queue(SlurmInfoWatcher):
    """States of jobs from squeue, one call for all; submitit's own asks sacct, which needs a data base that
    not every cluster has."""

    def __init__(self) -> None:
        super().__init__(delay_s=30)

    def _make_command(self) -> list[str]:
        return ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%N"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        rows = (line.strip().split("|") for line in text.splitlines() if line.strip())
        known: Mapping[str, dict[str, str]] = {
            name: {"State": state, "NodeList": nodes} for name, state, nodes in rows
        }
        return {name: known.get(name, {"State": GONE}) for name in self._registered}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        return self.get_state(job_id, mode) in ENDED

    def node(self, job_id: str) -> str:
        """Where a job ran, or is said to have run."""
        return self.get_info(job_id, "cache").get("NodeList") or "unknown"
