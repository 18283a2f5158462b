"""Real clusters on one machine: Ray nodes on loopback, and SLURM without root from unpacked Debian packages."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

LOOPBACK = "127.0.0.1"
SLURM_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")
SLURM_LIBRARIES = ("munge", "libmunge2", "libhwloc15", "liblua5.1-0")
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}({loopback})
SlurmctldPort=26817
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
PluginDir={libraries}/slurm-wlm
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=2
MinJobAge=60
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobRequeue=1
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr={loopback} Port=[27001-{last_port}] CPUs=2 RealMemory=4000
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def ray_cluster(nodes: int) -> Iterator[Any]:
    """A ray.cluster_utils.Cluster: nodes of one core each, the head among them."""
    from ray.cluster_utils import Cluster

    # Unix sockets need a short path.
    folder = tempfile.mkdtemp(prefix="b2-ray-test-", dir="/tmp")
    node = {"num_cpus": 1, "memory": 2 << 30, "temp_dir": f"{folder}/ray", "include_dashboard": False}
    os.mkdir(f"{folder}/ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # where it notes its address for others
        cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_node(cluster: Any, *, without: Path | None = None) -> Iterator[None]:
    """One more node of one core by `ray start`; it sees an empty folder at `without`."""
    wanted = _alive(cluster) + 1
    start = f"{Path(sys.executable).parent}/ray start --address={cluster.address} --num-cpus=1 --block"
    script = f"mount -t tmpfs tmpfs {without} && exec {start}" if without else f"exec {start}"
    shell = ["sh", "-c", f"{script} --memory={2 << 30}"]
    node = subprocess.Popen(
        ["unshare", "--mount", *shell] if without else shell,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while _alive(cluster) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait()


def _alive(cluster: Any) -> int:
    return sum(node["Alive"] for node in cluster.global_state.node_table())


def slurm_root(folder: Path) -> Path:
    """Debian's SLURM, unpacked; skips the test where it cannot be had."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("SLURM comes from Debian packages, and this is not Debian")
    (folder / "debs").mkdir(parents=True)
    got = subprocess.run(
        ["apt-get", "-q", "download", *SLURM_PACKAGES, *SLURM_LIBRARIES],
        cwd=folder / "debs", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if got.returncode != 0:
        pytest.skip(f"apt-get cannot download SLURM: {got.stderr.strip()[-200:]}")
    for package in (folder / "debs").glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    programs = folder / "root" / "usr" / "sbin"
    for name in ("slurmctld", "slurmd", "slurmstepd"):
        (programs / name).symlink_to(f"{name}-wlm")
    return folder / "root"


@contextmanager
def slurm_cluster(folder: Path, nodes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SLURM daemons on loopback; its commands are on the PATH within the block."""
    root = slurm_root(folder)
    (libraries,) = (root / "usr" / "lib").glob("*-linux-gnu")
    for name in ("etc", "run", "state", "log", *(f"spool-n{i + 1}" for i in range(nodes))):
        (folder / name).mkdir()
    host = os.uname().nodename.split(".")[0]
    text = SLURM_CONF.format(
        host=host, loopback=LOOPBACK, user=psutil.Process().username(), folder=folder, libraries=libraries,
        nodes=nodes, last_port=27000 + nodes,
    )  # fmt: skip
    (folder / "etc" / "slurm.conf").write_text(text)
    (folder / "etc" / "munge.key").write_bytes(os.urandom(1024))
    (folder / "etc" / "munge.key").chmod(0o600)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{libraries}/slurm-wlm:{libraries}")
    monkeypatch.setenv("PATH", f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
    run = folder / "run"
    munged = [f"--key-file={folder}/etc/munge.key", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
              f"--log-file={folder}/log/munged.log", f"--seed-file={run}/munged.seed", "--num-threads=2", "--force"]  # fmt: skip
    try:
        subprocess.run(["munged", *munged], check=True)
        subprocess.run(["slurmctld", "-c", "-i", "-f", str(folder / "etc" / "slurm.conf")], check=True)
        for node in range(1, nodes + 1):
            step = f"{root}/usr/sbin/slurmstepd"
            subprocess.run(
                ["slurmd", "-f", str(folder / "etc" / "slurm.conf"), "-N", f"n{node}", "-d", step], check=True
            )
        _wait_for_nodes(nodes)
        yield
    finally:
        subprocess.run(["scancel", "--user", psutil.Process().username()], check=False)
        for path in [*run.glob("slurmd-*.pid"), run / "slurmctld.pid", run / "munged.pid"]:
            with suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)


def _wait_for_nodes(nodes: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        idle = subprocess.run(
            ["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True
        ).stdout
        if idle.strip() == str(nodes):
            return
        time.sleep(0.2)
    pytest.fail(
        f"SLURM's nodes are not up: {subprocess.run(['sinfo'], capture_output=True, text=True).stdout}"
    )


def hashes(work: Path) -> dict[str, str]:
    """The SHA-256 of every file of a finished run."""
    files: dict[str, str] = json.loads((work / "pipeline.json").read_text())["files"]
    return files


def states() -> dict[str, str]:
    """SLURM's jobs and their states."""
    rows = subprocess.run(
        ["squeue", "--array", "-h", "-t", "all", "-o", "%i %T"], capture_output=True, text=True, check=True
    ).stdout
    return dict(re.findall(r"(\S+) (\S+)", rows))
