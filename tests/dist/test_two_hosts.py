"""Two "hosts": network namespaces joined by a cable. Real launchers train across them, and the cable is cut.

Needs root, `ip` (iproute2), and for the DeepSpeed launcher `sshd` and `pdsh`; skipped with the reason otherwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_b2.config import to_toml
from megatron_b2.config.schema import RunConfig
from megatron_b2.parallel.watchdog import EXIT_WATCHDOG
from megatron_b2.training.metrics import read_metrics
from tests.training.runs import run_config, write_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "b2net"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = "29411"
SECONDS = 8.0
"""Limit of the watchdog."""
START_SECONDS = 240.0
"""Importing torch and DeepSpeed twice on a busy machine."""


class Hosts:
    """Two network namespaces with one veth cable; processes run in them by `start`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"b2-{os.getpid()}-{index}" for index in range(2)]
        self.processes: list[subprocess.Popen[bytes]] = []
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            INTERFACE,
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            INTERFACE,
            "netns",
            second,
        )
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def start(self, host: int, command: Sequence[str], *, log: str, **env: str) -> subprocess.Popen[bytes]:
        """Run a command on a host, output to `folder/log`, in a process group of its own."""
        with (self.folder / log).open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment() | {"GLOO_SOCKET_IFNAME": INTERFACE} | env,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cut(self) -> None:
        """Unplug the cable at the second host."""
        ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def close(self) -> None:
        """End what still runs in the namespaces (an sshd leaves its sessions behind), and remove them."""
        for name in self.names:
            for pid in ip("netns", "pids", name, check=False).split():
                subprocess.run(["kill", "-9", pid], check=False, capture_output=True)
        for process in self.processes:
            process.wait()
        for name in self.names:
            ip("netns", "del", name, check=False)


def ip(*arguments: str, check: bool = True) -> str:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("`ip` is missing: apt-get install iproute2")
    try:
        pair = Hosts(tmp_path)
    except OSError as error:
        pytest.skip(f"network namespaces with a veth cable are not permitted here: {error}")
    yield pair
    pair.close()


def tiny(folder: Path, *, steps: int, data: Path, prefix: Path | None = None, tensor: int = 1) -> RunConfig:
    return run_config(
        folder,
        prefix or write_data(data),
        train={"steps": steps, "global_batch_size": 4, "micro_batch_size": 1, "log_interval": 1},
        parallel={
            "engine": "deepspeed",
            "zero_stage": 1,
            "tensor": tensor,
            "watchdog_seconds": SECONDS,
            "first_step_seconds": 120.0,
        },
        checkpoint={"interval": 0},
    )


def saved(config: RunConfig, name: str, folder: Path) -> str:
    path = folder / name
    path.write_text(to_toml(config))
    return str(path)


def torchrun(node: int, config: str, *, nodes: int = 2, per_node: int) -> list[str]:
    where = [
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        f"--master-addr={ADDRESSES[0]}",
        f"--master-port={PORT}",
    ]
    program = [f"--nproc-per-node={per_node}", "-m", "tests.dist.program", config]
    return [sys.executable, "-m", "torch.distributed.run", *where, *program]


def numbers(config: RunConfig) -> list[tuple[float, ...]]:
    records = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    names = ("step", "loss", "ce", "max_z", "grad_norm")
    return [tuple(record[name] for name in names) for record in records if record["kind"] == "train"]


def one_host(hosts: Hosts, folder: Path, *, steps: int) -> list[tuple[float, ...]]:
    """The same TP2 x DP2 on one of them."""
    config = tiny(folder / "one", steps=steps, data=folder, prefix=folder / "data0", tensor=2)
    command = torchrun(0, saved(config, "one.toml", folder), nodes=1, per_node=4)
    process = hosts.start(0, command, log="one.log")
    assert process.wait(START_SECONDS) == 0, (folder / "one.log").read_text()
    return numbers(config)


def test_torchrun_over_two_hosts_equals_one(hosts: Hosts, tmp_path: Path) -> None:
    """TP2 on each, DP2 across them."""
    config = tiny(tmp_path / "two", steps=6, data=tmp_path, tensor=2)
    file = saved(config, "two.toml", tmp_path)
    commands = [torchrun(node, file, per_node=2) for node in range(2)]
    processes = [hosts.start(node, command, log=f"two{node}.log") for node, command in enumerate(commands)]
    for node, process in enumerate(processes):
        assert process.wait(START_SECONDS) == 0, (tmp_path / f"two{node}.log").read_text()
    assert len(numbers(config)) == 6
    assert numbers(config) == one_host(hosts, tmp_path, steps=6)


def test_a_cut_cable_ends_both_hosts(hosts: Hosts, tmp_path: Path) -> None:
    config = tiny(tmp_path / "cut", steps=1_000_000, data=tmp_path)
    file = saved(config, "cut.toml", tmp_path)
    processes = [hosts.start(node, torchrun(node, file, per_node=1), log=f"cut{node}.log") for node in range(2)]
    metrics = Path(config.output_dir) / "metrics.jsonl"
    deadline = time.monotonic() + START_SECONDS
    while not (metrics.is_file() and metrics.stat().st_size):
        assert time.monotonic() < deadline, (tmp_path / "cut0.log").read_text()
        time.sleep(0.1)
    hosts.cut()
    start = time.monotonic()
    logs = [tmp_path / f"cut{node}.log" for node in range(2)]
    named = [f"watchdog of rank {node}: rank {1 - node} (" for node in range(2)]
    while not all(name in log.read_text() for name, log in zip(named, logs, strict=True)):
        assert time.monotonic() - start < SECONDS + 15, "\n".join(log.read_text() for log in logs)
        time.sleep(0.1)
    for log in logs:
        assert "silent for" in log.read_text()
        assert "the network to it is broken" in log.read_text()
    for process in processes:
        assert process.wait(60) != 0  # torchrun reports exit code 69 of its worker and ends with 1
    assert f"exitcode  : {EXIT_WATCHDOG}" in logs[0].read_text()


@pytest.fixture
def ssh(hosts: Hosts, tmp_path: Path) -> Path:
    """An sshd on both hosts, and a folder for PATH whose `ssh` may enter them without a password."""
    missing = [name for name in ("sshd", "pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install openssh-server pdsh")
    for key in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for host, address in enumerate(ADDRESSES):
        settings = tmp_path / f"sshd{host}.conf"
        settings.write_text(
            f"ListenAddress {address}\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/client.pub\n"
            "PidFile none\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            f"UsePAM {'yes' if Path('/etc/pam.d/sshd').is_file() else 'no'}\n"
        )
        sshd = shutil.which("sshd")
        assert sshd is not None  # it must be called by its absolute path
        hosts.start(host, [sshd, "-D", "-e", "-f", str(settings)], log=f"sshd{host}.log")
    folder = tmp_path / "bin"
    folder.mkdir()
    client = folder / "ssh"
    client.write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -F none -i {tmp_path}/client -o IdentitiesOnly=yes "
        '-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    client.chmod(0o755)
    return folder


def test_deepspeed_launcher_with_a_hostfile_equals_one_host(hosts: Hosts, ssh: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "ds", steps=6, data=tmp_path, tensor=2)
    hostfile, variables = tmp_path / "hostfile", tmp_path / "variables"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    variables.write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}"]
    where = [f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}", "--module", "tests.dist.program"]
    path = f"{ssh}:{os.environ['PATH']}"
    process = hosts.start(
        0,
        [*launcher, *where, saved(config, "ds.toml", tmp_path)],
        log="ds.log",
        DS_ENV_FILE=str(variables),
        PATH=path,
    )
    assert process.wait(START_SECONDS) == 0, (tmp_path / "ds.log").read_text()
    assert "10.213.77.2: " in (tmp_path / "ds.log").read_text()  # pdsh marks lines with their host
    assert len(numbers(config)) == 6
    assert numbers(config) == one_host(hosts, tmp_path, steps=6)
