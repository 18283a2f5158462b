"""SLURM arrays: the same files as one process, whatever ends a job. Jobs are processes of this machine, by
submitit, or those of a real SLURM."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from megatron_b2.cli.main import main
from megatron_b2.corpus.pipeline.execution import SlurmSettings
from megatron_b2.corpus.pipeline.executor import TaskCrashError
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.run import Run, run_pipeline
from megatron_b2.corpus.pipeline.slurm import SlurmExecutor, shares
from megatron_b2.corpus.pipeline.stage import Stage
from megatron_b2.corpus.pipeline.tasks import Limits, Task, run_task
from megatron_b2.errors import LaunchError
from tests.corpus.pipeline.clusters import hashes, slurm_cluster, states
from tests.corpus.pipeline.examples import Odd, Total, write_documents
from tests.corpus.pipeline.held import Held, held, starts

STAGES: Mapping[str, Stage] = {"odd": Odd(), "total": Total()}
Cluster = Literal["local", "slurm"]


def go(
    folder: Path,
    work: str = "work",
    stages: Mapping[str, Stage] = STAGES,
    *,
    cluster: Cluster = "local",
    **settings: Any,
) -> Run:
    slurm = SlurmSettings(**{"memory_gb": 0.5, "minutes": 5, "cpus": 2, "tasks_per_job": 4, **settings})
    path = folder / work
    with SlurmExecutor(slurm, path, path / "scratch", cluster=cluster) as executor:
        return run_pipeline(inputs(folder), stages, work=path, executor=executor)


def inputs(folder: Path) -> Input:
    return Input(paths=(str(folder / "input"),), unit_mb=1)


def calm(folder: Path, stages: Mapping[str, Stage] = STAGES) -> dict[str, str]:
    """The files of one process."""
    with LocalExecutor(1, Limits(1 << 30, folder)) as executor:
        run_pipeline(inputs(folder), stages, work=folder / "calm", executor=executor)
    return hashes(folder / "calm")


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=action)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_documents(tmp_path / "input")
    (tmp_path / "flags").mkdir()
    return tmp_path


def test_jobs_give_the_files_of_one_process_and_a_killed_one_goes_on(folder: Path) -> None:
    flags = folder / "flags"
    stages = {"held": Held(str(flags))}

    def kill_a_job() -> None:
        worker = psutil.Process(held(flags)[0])
        job = worker.parent()
        assert job is not None
        assert "submitit" in " ".join(job.cmdline())
        job.kill()
        worker.kill()
        (flags / "go").touch()

    with meanwhile(kill_a_job):
        run = go(folder, stages=stages, tasks_per_job=2)
    assert len(starts(flags)) > len(run.units)
    assert hashes(folder / "work") == calm(folder, stages)
    assert not (folder / "work" / "slurm").exists()


def test_jobs_that_die_again_and_again(folder: Path) -> None:
    with pytest.raises(TaskCrashError) as error:
        go(folder, setup=("exit 3",), max_retries=1)
    assert "SLURM jobs with it died 2 times without having finished a task" in str(error.value)
    assert "does not see that folder, put `work` on a file system that every node mounts" in str(error.value)


@pytest.mark.slow
def test_every_phase_in_jobs(folder: Path) -> None:
    go(folder)
    assert hashes(folder / "work") == calm(folder)
    with pytest.raises(TaskCrashError, match=r"total .* failed:\non node .*:\n(.*\n)*.*a mistake in a stage"):
        go(folder, stages={"odd": Odd(), "total": Total(crash=True)})
    path = next((folder / "work" / "documents").glob("*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    for later in (folder / "work" / "attributes" / "odd").glob("*.json"):
        later.unlink()
    (line,) = go(folder).repaired
    assert str(path) in line
    assert hashes(folder / "work") == calm(folder)


@pytest.mark.parametrize(("count", "sizes"), [(5, [3, 2]), (4, [2, 2]), (1, [1]), (2, [1, 1])])
def test_arrays_do_not_become_larger_than_slurm_allows(tmp_path: Path, count: int, sizes: list[int]) -> None:
    tasks = [Task(str(n), run_task, 1, None, (), tmp_path) for n in range(count)]  # type: ignore[arg-type]
    parts = shares(tasks, SlurmSettings(tasks_per_job=1, max_array_size=2))
    assert [len(part) for part in parts] == sizes
    assert [task for part in parts for task in part] == tasks


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, slurm_cluster(tmp_path_factory.mktemp("slurm"), 2, patch):
        yield


@pytest.mark.slow
def test_slurm_gives_the_files_of_one_process(slurm: None, folder: Path) -> None:
    run = go(folder, cluster="slurm", tasks_per_job=1)
    assert run.times["odd"].tasks == len(run.units) >= 3
    assert hashes(folder / "work") == calm(folder)
    with pytest.raises(LaunchError, match=r"SLURM does not take the jobs: (.*\n)*.*invalid partition"):
        go(folder, "other", cluster="slurm", partition="none")
    with pytest.raises(TaskCrashError, match=r"total .* failed:\non node .*:\n(.*\n)*.*a mistake in a stage"):
        go(folder, "other", {"odd": Odd(), "total": Total(crash=True)}, cluster="slurm", tasks_per_job=1)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "cancel", "requeue", "time limit"])
def test_slurm_jobs_that_end_early(slurm: None, folder: Path, end: str) -> None:
    flags = folder / "flags"
    stages = {"held": Held(str(flags))}
    minutes = 1 if end == "time limit" else 5

    def end_a_job() -> None:
        first = held(flags, at_least=2)
        if end == "time limit":
            while all(psutil.pid_exists(process) for process in first):
                time.sleep(0.1)
            (flags / "go").touch()
            return
        job = next(job for job, state in states().items() if state == "RUNNING")
        command = {
            "kill": ["scancel", "--full", "--signal=KILL", job],
            "cancel": ["scancel", job],
            "requeue": ["scontrol", "requeue", job],
        }[end]
        subprocess.run(command, check=True)
        time.sleep(3)
        (flags / "go").touch()
        if end == "requeue":  # SLURM would let it wait for two minutes
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)

    with meanwhile(end_a_job):
        run = go(folder, stages=stages, cluster="slurm", tasks_per_job=1, minutes=minutes)
    assert len(starts(flags)) > len(run.units)
    assert hashes(folder / "work") == calm(folder, stages)


def drive(folder: Path) -> None:
    go(folder, stages={"held": Held(str(folder / "flags"))}, cluster="slurm", tasks_per_job=1)


@pytest.mark.slow
def test_the_next_driver_cancels_the_jobs_of_one_that_was_killed(slurm: None, folder: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=drive, args=(folder,))
    process.start()
    held(folder / "flags", at_least=2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = {job for job, state in states().items() if state == "RUNNING"}
    assert left

    def release() -> None:
        while any(states()[job] == "RUNNING" for job in left):
            time.sleep(0.2)
        (folder / "flags" / "go").touch()

    with meanwhile(release):
        drive(folder)
    assert {states()[job] for job in left} == {"CANCELLED"}
    assert hashes(folder / "work") == calm(folder, {"held": Held(str(folder / "flags"))})


@pytest.mark.slow
def test_the_command_runs_in_slurm(slurm: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pipeline.toml").write_text(
        f'work = "{folder}/local"\nstages = ["normalize", "exact"]\n[input]\npaths = ["{folder}/input"]\nunit_mb = 1\n'
    )
    command = ["corpus", "run", str(folder / "pipeline.toml")]
    assert main(command) == 0
    flags = ["--execution.slurm.memory-gb", "0.5", "--execution.slurm.options", "x"]
    assert main([*command, "--work", str(folder / "slurm"), "--executor", "slurm", *flags[:2]]) == 0
    assert hashes(folder / "slurm") == hashes(folder / "local")
    capsys.readouterr()
    assert main([*command, "--work", str(folder / "slurm"), "--executor", "slurm", *flags]) == 2
    assert "execution.slurm.options must be" in capsys.readouterr().err
