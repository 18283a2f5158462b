"""The launch matrix: every launcher gives the same LaunchEnvironment, and nonsense gives one clear error."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist

from megatron_b2.errors import LaunchError
from megatron_b2.parallel.launch import (
    LaunchEnvironment,
    expand_hostlist,
    initialize_distributed,
    shutdown_distributed,
)
from megatron_b2.testing.fork import run_ranks

TORCHRUN = {
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "412345",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def _known(host: str) -> bool:
    return host == "gpu007"


def _unknown(host: str) -> bool:
    return False


@pytest.mark.parametrize(
    ("launcher", "environ", "master"),
    [
        ("torchrun", TORCHRUN, ("n1", 29500)),
        ("torchrun", TORCHRUN | SRUN, ("n1", 29500)),
        ("deepspeed", DEEPSPEED, ("n1", 29500)),
        ("slurm", SRUN, ("gpu007", 22345)),
        ("slurm", SRUN | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "6000"}, ("10.1.1.1", 6000)),
    ],
)
def test_every_launcher_gives_the_same_place(
    launcher: str, environ: dict[str, str], master: tuple[str, int]
) -> None:
    env = LaunchEnvironment.detect(environ, resolves=_known)
    assert (env.launcher, env.rank, env.world_size) == (launcher, 11, 16)
    assert (env.local_rank, env.local_world_size, env.node) == (3, 8, 1)
    assert (env.master_addr, env.master_port) == master


def test_plain_call_is_one_process() -> None:
    env = LaunchEnvironment.detect({"HOME": "/root", "SLURM_JOB_ID": "1"})
    assert (env.launcher, env.rank, env.world_size, env.local_world_size) == ("single", 0, 1, 1)


def test_slurm_falls_back_to_the_launch_address_when_names_do_not_resolve() -> None:
    assert LaunchEnvironment.detect(SRUN, resolves=_unknown).master_addr == "10.0.0.7"


def test_slurm_single_node_uses_loopback() -> None:
    environ = SRUN | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "0",
    }
    assert LaunchEnvironment.detect(environ, resolves=_unknown).master_addr == "127.0.0.1"


def test_all_1024_ranks_of_a_block_placement_are_accepted_and_cyclic_is_refused() -> None:
    base = SRUN | {"SLURM_STEP_NUM_TASKS": "1024", "SLURM_STEP_TASKS_PER_NODE": "8(x128)"}
    for rank in range(1024):
        block = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank // 8), "SLURM_LOCALID": str(rank % 8)}
        assert LaunchEnvironment.detect(base | block, resolves=_known).local_rank == rank % 8
        cyclic = block | {"SLURM_NODEID": str(rank % 128), "SLURM_LOCALID": str(rank // 128)}
        tasks = {"SLURM_GTIDS": ",".join(str(task) for task in range(rank % 128, 1024, 128))}
        with pytest.raises(LaunchError, match="--distribution=block"):
            LaunchEnvironment.detect(base | cyclic | tasks, resolves=_known)
        tasks = {"SLURM_GTIDS": ",".join(str(rank // 8 * 8 + local) for local in range(8))}
        assert LaunchEnvironment.detect(base | block | tasks, resolves=_known).rank == rank


def _without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK=0 set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
        (_without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR missing"),
        (TORCHRUN | {"RANK": "16"}, "RANK=16 is not below WORLD_SIZE=16"),
        (TORCHRUN | {"LOCAL_RANK": "8"}, "LOCAL_RANK=8 is not below LOCAL_WORLD_SIZE=8"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a whole number"),
        (_without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID missing"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8,4"}, "same number of tasks"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "15"}, "does not fill whole nodes"),
        (_without(SRUN, "SLURM_LAUNCH_NODE_IPADDR"), "export MASTER_ADDR in the batch script"),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "srun did not start it"),
    ],
)
def test_inconsistent_environments_name_the_variables(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message.replace("(", r"\(")):
        LaunchEnvironment.detect(environ, resolves=_unknown)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[007-009,012],login", ["gpu007", "gpu008", "gpu009", "gpu012", "login"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("a-b-1,a-b-2", ["a-b-1", "a-b-2"]),
        ("", []),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


def test_one_process_gets_a_working_group() -> None:
    def body() -> tuple[int, int, list[str]]:
        shutdown_distributed()
        env = LaunchEnvironment.detect({})
        comm = initialize_distributed(env, timeout=datetime.timedelta(seconds=20))
        return comm.rank, comm.size, comm.all_gather_object("x")

    assert run_ranks(1, body) == [(0, 1, ["x"])]


def test_ranks_meet_by_the_exported_variables() -> None:
    def body() -> int:
        env = LaunchEnvironment.detect()
        shutdown_distributed()
        comm = initialize_distributed(env, timeout=datetime.timedelta(seconds=20))
        assert initialize_distributed(env, timeout=datetime.timedelta(seconds=20)).size == comm.size
        return comm.all_reduce_max(dist.get_rank() * 10)

    assert run_ranks(2, body) == [10, 10]


def test_another_group_already_open_is_an_error() -> None:
    def body() -> str:
        with pytest.raises(LaunchError, match="already initialised as rank 0 of 1") as caught:
            initialize_distributed(LaunchEnvironment.detect(TORCHRUN), timeout=datetime.timedelta(seconds=5))
        return str(caught.value)

    assert "rank 11 of 16" in run_ranks(1, body)[0]


def test_deepspeeds_switch_keeps_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LaunchEnvironment.detect(TORCHRUN).device.type == "cuda"
    env = LaunchEnvironment.detect(TORCHRUN | {"DS_ACCELERATOR": "cpu"})
    assert env.device.type == "cpu"
    exported: dict[str, str] = {}
    env.export(exported)
    assert exported["DS_ACCELERATOR"] == "cpu"
