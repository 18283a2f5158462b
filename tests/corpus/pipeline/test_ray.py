"""Ray, a real cluster of several nodes on loopback: the same files as one process, whatever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_b2.cli.main import main
from megatron_b2.corpus.pipeline.execution import RaySettings
from megatron_b2.corpus.pipeline.executor import TaskCrashError
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.ray_cluster import RayExecutor
from megatron_b2.corpus.pipeline.run import Run, run_pipeline
from megatron_b2.corpus.pipeline.stage import Stage
from megatron_b2.corpus.pipeline.tasks import Limits
from megatron_b2.errors import LaunchError
from tests.corpus.pipeline.clusters import hashes, ray_cluster, ray_node
from tests.corpus.pipeline.examples import Odd, Total, write_documents
from tests.corpus.pipeline.held import PATIENCE, Held, held, starts
from tests.corpus.stages.test_stages import folder as staged  # noqa: F401

STAGES: Mapping[str, Stage] = {"odd": Odd(), "total": Total()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Input:
    folder = tmp_path_factory.mktemp("ray") / "input"
    write_documents(folder)
    return Input(paths=(str(folder),), unit_mb=1)


def alone(inputs: Input, work: Path, stages: Mapping[str, Stage] = STAGES) -> dict[str, str]:
    """The files of one process."""
    with LocalExecutor(1, Limits(1 << 30, work)) as executor:
        run_pipeline(inputs, stages, work=work, executor=executor)
    return hashes(work)


@pytest.fixture(scope="module")
def calm(inputs: Input, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return alone(inputs, tmp_path_factory.mktemp("local"))


def go(address: str, inputs: Input, work: Path, stages: Mapping[str, Stage] = STAGES, **settings: Any) -> Run:
    ray = RaySettings(address=address, **{"memory_gb": 0.5, **settings})
    with RayExecutor(ray, work, work / "scratch") as executor:
        return run_pipeline(inputs, stages, work=work, executor=executor)


def test_ray_gives_the_files_of_one_process(
    cluster: Any, inputs: Input, calm: dict[str, str], tmp_path: Path
) -> None:
    run = go(cluster.address, inputs, tmp_path)
    assert hashes(tmp_path) == calm
    assert run.times["total"].tasks == 2 * len(run.units)
    # A damaged file is found by a worker, named and made again.
    path = run.units[1].path
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    for later in (tmp_path / "attributes" / "odd").glob("*.json"):
        later.unlink()
    (line,) = go(cluster.address, inputs, tmp_path).repaired
    assert str(path) in line
    assert hashes(tmp_path) == calm


@pytest.mark.slow
def test_killed_workers_cost_their_task_only(
    cluster: Any, inputs: Input, calm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "die").touch()
    stages = {"odd": Odd(flags=str(tmp_path)), "total": Total()}
    go(cluster.address, inputs, tmp_path / "work", stages)
    assert not (tmp_path / "die").exists()
    assert hashes(tmp_path / "work") == calm
    (tmp_path / "die").touch()
    with pytest.raises(
        TaskCrashError, match=r"odd \w+: its worker or node died 1 times \(.*max_retries is 0\)"
    ):
        go(cluster.address, inputs, tmp_path / "again", stages, max_retries=0)


def test_a_mistake_in_a_stage_is_shown_with_its_node(cluster: Any, inputs: Input, tmp_path: Path) -> None:
    with pytest.raises(TaskCrashError, match=r"total .* failed:\non node .*:\n(.*\n)*.*a mistake in a stage"):
        go(cluster.address, inputs, tmp_path, {"odd": Odd(), "total": Total(crash=True)})


def test_a_task_larger_than_every_node(cluster: Any, inputs: Input, tmp_path: Path) -> None:
    with pytest.raises(
        LaunchError, match=r"no node of the Ray cluster has 3 CPUs and 0\.5 GB for a task \(.*1 CPUs"
    ):
        go(cluster.address, inputs, tmp_path, cpus_per_task=3)


def test_a_node_dies(cluster: Any, inputs: Input, tmp_path: Path) -> None:
    flags = tmp_path / "flags"
    flags.mkdir()
    stages = {"held": Held(str(flags))}
    (node,) = cluster.worker_nodes
    killed: list[int] = []

    def kill_a_node() -> None:
        workers = held(flags, at_least=2)  # both nodes have a task
        raylet = node.all_processes["raylet"][0].process.pid
        killed.extend(worker for worker in workers if psutil.Process(worker).ppid() == raylet)
        for process in (raylet, *killed):
            os.kill(process, signal.SIGKILL)
        (flags / "go").touch()

    thread = threading.Thread(target=kill_a_node)
    thread.start()
    try:
        run = go(cluster.address, inputs, tmp_path / "work", stages)
    finally:
        thread.join()
        cluster.remove_node(node, allow_graceful=False)
    assert len(killed) == 1
    assert len(starts(flags)) == len(run.units) + 1
    assert hashes(tmp_path / "work") == alone(inputs, tmp_path / "calm", stages)


@pytest.mark.slow
def test_a_node_joins(cluster: Any, inputs: Input, tmp_path: Path) -> None:
    flags = tmp_path / "flags"
    flags.mkdir()
    places = len(cluster.list_all_nodes())

    def add_a_node() -> None:
        held(flags, at_least=places)
        with ray_node(cluster):
            held(flags, at_least=places + 1)
            (flags / "go").touch()
            done.wait(PATIENCE)

    done = threading.Event()
    thread = threading.Thread(target=add_a_node)
    thread.start()
    try:
        run = go(cluster.address, inputs, tmp_path / "work", {"held": Held(str(flags))})
    finally:
        done.set()
        thread.join()
    assert (flags / "go").exists()
    assert len(starts(flags)) == len(run.units) > places


def drive(address: str, inputs: Input, folder: Path) -> None:
    go(address, inputs, folder / "work", {"held": Held(str(folder / "flags"))})


@pytest.mark.slow
def test_the_driver_is_killed(cluster: Any, inputs: Input, tmp_path: Path) -> None:
    flags = tmp_path / "flags"
    flags.mkdir()
    process = multiprocessing.get_context("spawn").Process(
        target=drive, args=(cluster.address, inputs, tmp_path)
    )
    process.start()
    (worker, *_) = held(flags)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    psutil.wait_procs([psutil.Process(worker)], timeout=30)  # Ray ends the tasks of a dead driver
    (flags / "go").touch()
    drive(cluster.address, inputs, tmp_path)
    assert hashes(tmp_path / "work") == alone(inputs, tmp_path / "calm", {"held": Held(str(flags))})


@pytest.mark.slow
def test_a_node_without_the_shared_folder(cluster: Any, inputs: Input, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a node of its own mounts needs root")
    (tmp_path / "here").mkdir()
    message = rf"node \S+ does not see the work folder {tmp_path}/here/work of the driver"
    with ray_node(cluster, without=tmp_path), pytest.raises(LaunchError, match=message):
        go(cluster.address, inputs, tmp_path / "here" / "work")


@pytest.mark.slow
def test_the_whole_pipeline_by_command(
    staged: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a cluster of one machine that the command starts; the other run took all tasks in one process."""
    command = ["corpus", "run", str(staged / "pipeline.toml"), "--work", str(staged / "ray")]
    assert main([*command, "--executor", "ray", "--execution.ray.memory-gb", "1"]) == 0
    assert "units" in capsys.readouterr().out
    assert hashes(staged / "ray") == hashes(staged / "work")
    assert not list(Path(tempfile.gettempdir()).glob("b2-ray-*/session_*"))
