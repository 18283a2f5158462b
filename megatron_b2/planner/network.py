"""Time of collectives and sends: ring algorithms with a latency a step, inside and between nodes.

Ranks are placed as parallel/layout.py does: tensor-parallel ranks are neighbours, then context, data and
pipeline. A ring over several nodes crosses each node's ports with as many rails as the node has ranks of the
group; all groups of a kind run at once and share the ports evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_b2.planner.constants import Constants
from megatron_b2.planner.hardware import Cluster
from megatron_b2.planner.workload import Workload


@dataclass(frozen=True)
class Ring:
    """A group of ranks."""

    size: int
    nodes: int
    """Over how many nodes."""
    bandwidth: float
    """Bytes/s that a rank sends."""
    step_latency: float
    """Seconds from one end of the ring to the other, over all ranks."""

    def gather(self, num_bytes: float) -> float:
        """All-gather to, or reduce-scatter of, a tensor of so many bytes."""
        if self.size == 1:
            return 0.0
        return num_bytes * (self.size - 1) / self.size / self.bandwidth + self.step_latency

    def all_reduce(self, num_bytes: float) -> float:
        """Sum of a tensor of so many bytes: reduce-scatter, then all-gather."""
        return 2 * self.gather(num_bytes)


@dataclass(frozen=True)
class Links:
    """The links of a cluster with the constants applied."""

    cluster: Cluster
    constants: Constants

    @property
    def node(self) -> float:
        """Bytes/s of a rank inside its node."""
        return self.cluster.gpu.nvlink_bandwidth * self.constants.nvlink

    @property
    def share(self) -> float:
        """What collectives reach of the ports' rate."""
        return self.constants.fabric(self.cluster.node.fabric)

    @property
    def network(self) -> float:
        """Bytes/s of a rank between nodes, when all ranks of the node send."""
        return min(self.node, self.cluster.gpu_network_bandwidth * self.share)

    def ring(self, size: int, *, stride: int, rails: int | None = None) -> Ring:
        """A group of `size` ranks, each `stride` after the one before.

        `rails` limits through how many of a node's ports a ring leaves it; none means its share of all.
        """
        per_node = max(1, min(size, self.cluster.node.gpus // stride))
        nodes = ceil(size / per_node)
        latency = (size - nodes) * self.constants.node_latency + (nodes - 1) * self.constants.network_latency
        if nodes == 1:
            return Ring(size, 1, self.node, (size - 1) * self.constants.node_latency)
        node = self.cluster.node
        share = node.nics * node.nic_bandwidth * per_node / node.gpus  # of all ports, for one of the rings
        rate = min(share, (rails or node.gpus) * node.nic_bandwidth) * self.share
        return Ring(size, nodes, min(self.node, rate), latency)

    def tensor(self, work: Workload) -> Ring:
        """Ranks that split every matrix."""
        return self.ring(work.tensor, stride=1)

    def context(self, work: Workload) -> Ring:
        """Ranks that split the sequence."""
        return self.ring(work.context, stride=work.tensor)

    def data(self, work: Workload) -> Ring:
        """Ranks with the same parameters. DeepSpeed's ZeRO-3 (2021) gathered parameter by parameter, and the
        published runs reached what one port of a node carries: one rail. FSDP gathers whole blocks."""
        one_rail = work.zero_stage == 3 and work.zero_engine == "deepspeed"
        stride = work.tensor
        return self.ring(work.data_context, stride=stride, rails=1 if one_rail else None)

    def send(self, work: Workload, num_bytes: float) -> float:
        """An activation of a stage to the next: each tensor-parallel rank sends its part, and without
        sequence parallelism the ranks then gather it (SC21, section 4.1)."""
        stride = work.tensor * work.data_context
        inside = stride * 2 <= self.cluster.node.gpus
        rate = self.node if inside else self.network
        latency = self.constants.node_latency if inside else self.constants.network_latency
        gathered = 0.0 if work.sequence_parallel else self.tensor(work).gather(num_bytes)
        return num_bytes / work.tensor / rate + latency + gathered
