"""The [execution] table: every problem at once, and no setting that nobody reads."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from megatron_b2.corpus.pipeline.config import PipelineConfig, load_pipeline
from megatron_b2.corpus.pipeline.execution import Execution, RaySettings, SlurmSettings, executor_of
from megatron_b2.corpus.pipeline.executor import attempt
from megatron_b2.corpus.pipeline.extract import Input, scan_tasks
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.shared import IDENTITY, Site
from megatron_b2.corpus.pipeline.tasks import Limits
from megatron_b2.errors import ConfigError, InputError, LaunchError, OutputError


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "input.jsonl").write_text('{"text": "one"}\n')
    path = tmp_path / "pipeline.toml"
    path.write_text(
        f'work = "{tmp_path}/work"\nstages = ["exact"]\n[input]\npaths = ["{tmp_path}/input.jsonl"]\n'
    )
    return path


def load(pipeline: Path, *flags: str) -> PipelineConfig:
    return load_pipeline(pipeline, flags)


def test_local_is_the_default(pipeline: Path) -> None:
    config = load(pipeline, "--execution.workers", "3")
    assert isinstance(executor_of(config.execution, Path(config.work)), LocalExecutor)


def test_tables_of_the_executors(pipeline: Path) -> None:
    with pipeline.open("a") as file:
        file.write(
            '[execution]\nexecutor = "slurm"\nscratch = "/local"\n[execution.slurm]\npartition = "cpu"\n'
            'account = "a"\nminutes = 90\ncpus = 8\njobs_at_a_time = 20\ntasks_per_job = 16\n'
            'setup = ["module load gcc", "ulimit -n 4096"]\noptions = { qos = "low" }\n'
        )
    execution = load(pipeline).execution
    assert execution.scratch == "/local"
    assert execution.slurm == SlurmSettings(
        partition="cpu", account="a", minutes=90, cpus=8, jobs_at_a_time=20, tasks_per_job=16,
        setup=("module load gcc", "ulimit -n 4096"), options={"qos": "low"},
    )  # fmt: skip


def test_settings_that_nobody_reads_are_refused(pipeline: Path) -> None:
    with pipeline.open("a") as file:
        file.write("[execution.ray]\nmax_retries = 5\n[execution.slurm]\ncpus = 2\n")
    with pytest.raises(ConfigError) as error:
        load(
            pipeline, "--execution.executor", "ray", "--execution.workers", "2", "--execution.memory-gb", "1"
        )
    assert error.value.problems == tuple(
        f"execution.{key} is for the executor {owner!r}, but execution.executor is 'ray'; remove one of them"
        for key, owner in {"workers": "local", "memory_gb": "local", "slurm.cpus": "slurm"}.items()
    )


def test_values_out_of_range_are_reported_at_once(pipeline: Path) -> None:
    flags = {"cpus": "0", "memory-gb": "0", "minutes": "0", "tasks-per-job": "0", "jobs-at-a-time": "-1"}
    arguments = [part for key, value in flags.items() for part in (f"--execution.slurm.{key}", value)]
    with pytest.raises(ConfigError) as error:
        load(pipeline, "--execution.executor", "slurm", *arguments)
    assert {problem.split(" is ")[0] for problem in error.value.problems} == {
        f"execution.slurm.{key.replace('-', '_')}" for key in flags
    }


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", ""])
def test_addresses_that_ray_cannot_use(pipeline: Path, address: str) -> None:
    with pytest.raises(
        ConfigError, match=r"execution\.ray\.address is .*; give HOST:PORT of the cluster's head"
    ):
        load(pipeline, "--execution.executor=ray", f"--execution.ray.address={address}")


def test_an_address_where_nobody_answers(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["corpus", "run", str(pipeline), "--executor", "ray", "--address", "127.0.0.1:1"])
    assert status == 2
    message = capsys.readouterr().err
    assert "execution.ray.address is '127.0.0.1:1', but no Ray cluster can be used there" in message
    assert "ray start --head" in message


@pytest.mark.parametrize(("name", "module"), [("ray", "ray_cluster"), ("submitit", "slurm")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    class Blocker:
        def find_spec(self, wanted: str, *_: object) -> None:
            if wanted.split(".")[0] == name:
                raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)

    for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(sys.modules, f"megatron_b2.corpus.pipeline.{module}", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    execution = Execution(executor="ray" if name == "ray" else "slurm", ray=RaySettings())
    with pytest.raises(OutputError, match=rf"{name} is not installed; install {name}"):
        executor_of(execution, Path("work"))


def test_slurm_needs_its_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    executor = executor_of(Execution(executor="slurm"), tmp_path)
    with pytest.raises(LaunchError, match="sbatch, srun, squeue, scancel is not on the PATH"), executor:
        pass


def test_a_node_that_sees_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site.of(tmp_path / "work")
    assert Site.of(tmp_path / "work") == site
    monkeypatch.chdir("/")
    site.enter()
    assert Path.cwd() == site.directory
    (tmp_path / "gone").mkdir()
    wrong = {
        "cannot go to .*gone.*start the run in a folder that every node mounts": replace(
            site, directory=tmp_path / "gone" / "x"
        ),
        r"has megatron_b2 .*, the driver on .* 0\.0\.0; install one version": replace(site, version="0.0.0"),
        "does not see the work folder .*/work of the driver on .*; put `work` on a file system": replace(
            site, identity="another"
        ),
    }
    for message, other in wrong.items():
        with pytest.raises(LaunchError, match=message):
            other.enter()
    (tmp_path / "work" / IDENTITY).unlink()
    with pytest.raises(LaunchError, match="does not see the work folder"):
        site.enter()


def test_a_node_that_has_not_the_inputs(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text('{"text": "one"}\n')
    (task,) = scan_tasks(Input(paths=(str(path),)), tmp_path / "work")
    path.unlink()
    answer = attempt(task, Limits(1 << 20, tmp_path), Site.of(tmp_path / "work"))
    assert isinstance(answer, InputError)
    node = (
        "every node must have the inputs and models under the path that they have where the run was started"
    )
    assert re.search(rf"{path}: .*No such file.* \(on node \S+; {node}\)", str(answer))


def test_verify_by_command(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["corpus", "run", str(pipeline), "--execution.workers", "1"]
    assert main(command) == 0
    (path,) = (pipeline.parent / "work" / "attributes" / "exact").glob("*.parquet")
    sound = path.read_bytes()
    path.write_bytes(bytes(len(sound)))
    assert main(command) == 0
    assert path.read_bytes() != sound
    capsys.readouterr()
    assert main([*command, "--verify"]) == 0
    said = f"damaged, made again: {path}: does not have the SHA-256"
    assert said in capsys.readouterr().out
    assert path.read_bytes() == sound
