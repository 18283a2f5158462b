"""Who this process is: rank, world size, node and rendezvous, whatever started it.

The only module that reads environment variables. `deepspeed`, `torchrun`, `srun` and a plain call all end
in the same `LaunchEnvironment`, so nothing else in the package knows which launcher was used.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megatron_b2.errors import LaunchError
from megatron_b2.parallel.comm import Comm, ProcessGroupComm

Launcher = Literal["single", "torchrun", "deepspeed", "slurm"]

RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """The place of this process in the run."""

    launcher: Launcher
    """What started the process."""
    rank: int
    """Number of this process, 0-based, consecutive inside a node."""
    world_size: int
    """Processes of the run."""
    local_rank: int
    """Number of this process inside its node: its GPU."""
    local_world_size: int
    """Processes on this node."""
    node: int
    """Number of the node."""
    master_addr: str
    """Host of rank 0."""
    master_port: int
    """Port of the rendezvous on that host."""
    cpu_only: bool = False
    """Compute on the CPU even where there are GPUs (DS_ACCELERATOR=cpu, DeepSpeed's own switch)."""

    @classmethod
    def detect(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        resolves: Callable[[str], bool] | None = None,
    ) -> LaunchEnvironment:
        """Read the environment (`os.environ` unless given).

        `resolves` tells whether a host name has an address (DNS unless given). A launcher's own variables
        win over SLURM's, so torchrun inside an allocation works. Raises LaunchError when variables are
        missing, contradict each other, or the SLURM distribution is not by blocks.
        """
        env = os.environ if environ is None else environ
        place = cls._place(env, resolves=resolves or _has_address)
        return replace(place, cpu_only=env.get("DS_ACCELERATOR") == "cpu")

    @classmethod
    def _place(cls, env: Mapping[str, str], *, resolves: Callable[[str], bool]) -> LaunchEnvironment:
        if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            return _from_launcher(env)
        if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
            return _from_slurm(env, resolves=resolves)
        if _integer(env, "SLURM_NTASKS", default=1) > 1:
            raise LaunchError(
                f"this process runs inside a SLURM job of SLURM_NTASKS={env['SLURM_NTASKS']} tasks but srun "
                "did not start it; use `srun python -m megatron_b2.cli.pretrain ...`, or unset SLURM_NTASKS "
                "to run one process"
            )
        return cls(
            launcher="single",
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            node=0,
            master_addr=LOOPBACK,
            master_port=0,
        )

    def export(self, environ: MutableMapping[str, str] | None = None) -> None:
        """Write the variables that torch.distributed and DeepSpeed read (into `os.environ` unless given)."""
        env = os.environ if environ is None else environ
        env.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            LOCAL_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )
        if self.device.type == "cpu":
            env["DS_ACCELERATOR"] = "cpu"

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU where there is none."""
        on_gpu = torch.cuda.is_available() and not self.cpu_only
        return torch.device("cuda", self.local_rank) if on_gpu else torch.device("cpu")


def initialize_distributed(env: LaunchEnvironment, *, timeout: timedelta) -> Comm:
    """Join the run: bind the device, open the default process group, return the host-side Comm.

    The default group is gloo on CPU and nccl on CUDA; the returned Comm is always gloo, so agreeing on a
    flag at every step never waits for the GPU. `timeout` limits one collective operation. A group that is
    already open (an embedding program, our test harness) is used as it is. Raises LaunchError when the
    ranks cannot meet or a node has fewer GPUs than processes.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (env.rank, env.world_size):
            raise LaunchError(
                f"torch.distributed is already initialised as rank {dist.get_rank()} of "
                f"{dist.get_world_size()}, the environment says rank {env.rank} of {env.world_size}"
            )
        return ProcessGroupComm()
    env.export()
    on_gpu = env.device.type == "cuda"
    if on_gpu and env.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"rank {env.rank}: LOCAL_RANK={env.local_rank} but this node shows {torch.cuda.device_count()} "
            "GPUs; start as many processes a node as it has GPUs, and check CUDA_VISIBLE_DEVICES"
        )
    if on_gpu:
        torch.cuda.set_device(env.device)
    backend = "nccl" if on_gpu else "gloo"
    try:
        if env.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(
                backend,
                rank=env.rank,
                world_size=env.world_size,
                timeout=timeout,
                device_id=env.device if on_gpu else None,
            )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {env.rank} of {env.world_size} ({env.launcher}, node {env.node}) could not join the run "
            f"at {env.master_addr}:{env.master_port}: {error}"
        ) from error
    return ProcessGroupComm(dist.new_group(backend="gloo", timeout=timeout)) if on_gpu else ProcessGroupComm()


def shutdown_distributed() -> None:
    """Close the process group, if one is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def require_deterministic_cublas() -> None:
    """Fix the cuBLAS workspace, as deterministic matrix products need; call before the first CUDA kernel."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def expand_hostlist(hostlist: str) -> list[str]:
    """Names in a SLURM node list: `n[1-3,08],gpu` is n1, n2, n3, n08, gpu (zero padding is kept)."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hostlist):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            choices = [literal] if literal else [n for span in ranges.split(",") for n in _expand_span(span)]
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        names.extend(expanded)
    return names


def _expand_span(span: str) -> list[str]:
    first, _, last = span.partition("-")
    return [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]


def _from_launcher(env: Mapping[str, str]) -> LaunchEnvironment:
    """torchrun, deepspeed, or variables set by hand in the same form."""
    missing = [name for name in RENDEZVOUS_VARIABLES if not env.get(name)]
    if missing:
        found = ", ".join(f"{name}={env[name]}" for name in RENDEZVOUS_VARIABLES if env.get(name))
        raise LaunchError(
            f"incomplete launch environment: {found or 'only empty variables'} set, but "
            f"{', '.join(missing)} missing; start with torchrun, deepspeed or srun, or unset all of them "
            "to run one process"
        )
    rank, world = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
    local = _integer(env, "LOCAL_RANK")
    local_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
    local_world = _integer(env, local_name, default=world)
    _require_range("RANK", rank, limit_name="WORLD_SIZE", limit=world)
    _require_range("LOCAL_RANK", local, limit_name=local_name, limit=local_world)
    node_name = next((name for name in ("GROUP_RANK", "CROSS_RANK") if name in env), "")
    return LaunchEnvironment(
        launcher="deepspeed" if "CROSS_RANK" in env and "TORCHELASTIC_RUN_ID" not in env else "torchrun",
        rank=rank,
        world_size=world,
        local_rank=local,
        local_world_size=local_world,
        node=_integer(env, node_name) if node_name else rank // local_world,
        master_addr=env["MASTER_ADDR"],
        master_port=_integer(env, "MASTER_PORT"),
    )


def _from_slurm(env: Mapping[str, str], *, resolves: Callable[[str], bool]) -> LaunchEnvironment:
    """One task of an srun step. Ranks must be consecutive inside a node, as the node-local groups need it."""
    missing = [name for name in SLURM_VARIABLES if not env.get(name)]
    if missing:
        raise LaunchError(f"incomplete SLURM environment: {', '.join(missing)} missing; start with srun")
    rank, local, node = (_integer(env, name) for name in SLURM_VARIABLES[:3])
    world = _integer(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
    per_node = _tasks_per_node(env)
    _require_range("SLURM_PROCID", rank, limit_name="the number of tasks", limit=world)
    if world % per_node:
        raise LaunchError(
            f"SLURM runs {world} tasks, {per_node} a node, which does not fill whole nodes; "
            "use --ntasks = nodes x --ntasks-per-node"
        )
    _require_blocks(env, rank=rank, node=node, per_node=per_node, local=local)
    return LaunchEnvironment(
        launcher="slurm",
        rank=rank,
        world_size=world,
        local_rank=local,
        local_world_size=per_node,
        node=node,
        master_addr=_slurm_master(env, nodes=world // per_node, resolves=resolves),
        master_port=_slurm_port(env),
    )


def _require_blocks(env: Mapping[str, str], *, rank: int, node: int, per_node: int, local: int) -> None:
    """Refuse other placements on every rank: SLURM_GTIDS lists the tasks of this node, so that also a rank
    that happens to sit in its place knows, and nobody waits for the ranks that refused."""
    fix = (
        "the tasks are not placed by blocks, so neighbouring ranks would sit on different machines; "
        "start with srun --distribution=block:block"
    )
    if rank != node * per_node + local:
        raise LaunchError(
            f"SLURM_PROCID={rank} is not SLURM_NODEID x tasks-per-node + SLURM_LOCALID = {node} x {per_node} "
            f"+ {local} = {node * per_node + local}: {fix}"
        )
    expected = ",".join(str(task) for task in range(node * per_node, (node + 1) * per_node))
    if env.get("SLURM_GTIDS", expected) != expected:
        raise LaunchError(f"SLURM_GTIDS={env['SLURM_GTIDS']} on node {node}, not {expected}: {fix}")


def _tasks_per_node(env: Mapping[str, str]) -> int:
    """SLURM writes `8(x128)` for 128 nodes of 8 tasks, `8(x127),4` when they differ."""
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in env else "SLURM_TASKS_PER_NODE"
    value = env.get(name, "")
    counts = {int(count) for count in re.findall(r"(?:^|,)(\d+)(?:\(x\d+\))?", value)}
    if len(counts) != 1:
        raise LaunchError(
            f"{name}={value!r}: every node must run the same number of tasks; use --ntasks-per-node"
        )
    return counts.pop()


def _slurm_master(env: Mapping[str, str], *, nodes: int, resolves: Callable[[str], bool]) -> str:
    """MASTER_ADDR of the batch script, else the first host of the step, else where srun was called.

    The last is right only because a batch script runs on the first node; some sites give node names that
    do not resolve, so it is kept as the last resort.
    """
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    if nodes == 1:
        return LOOPBACK
    hostlist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    hosts = expand_hostlist(hostlist)
    if hosts and resolves(hosts[0]):
        return hosts[0]
    if env.get("SLURM_LAUNCH_NODE_IPADDR"):
        return env["SLURM_LAUNCH_NODE_IPADDR"]
    raise LaunchError(
        f"no address for rank 0: MASTER_ADDR and SLURM_LAUNCH_NODE_IPADDR are not set and the first host of "
        f"{hostlist!r} does not resolve; export MASTER_ADDR in the batch script"
    )


def _slurm_port(env: Mapping[str, str]) -> int:
    """The same port on every rank, another for another job; below the ephemeral range of Linux."""
    if env.get("MASTER_PORT"):
        return _integer(env, "MASTER_PORT")
    return 20_000 + (_integer(env, "SLURM_JOB_ID") + _integer(env, "SLURM_STEP_ID", default=0)) % 10_000


def _integer(env: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\d+", text):
        raise LaunchError(f"environment variable {name}={text!r} is not a whole number")
    return int(text)


def _require_range(name: str, value: int, *, limit_name: str, limit: int) -> None:
    if not 0 <= value < limit:
        raise LaunchError(f"{name}={value} is not below {limit_name}={limit}")


def _has_address(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False
