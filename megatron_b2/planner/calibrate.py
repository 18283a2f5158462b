"""What was measured on a machine, and the hardware file that follows from it.

testing/speeds.py measures; here are its results and what they mean to the time model. It multiplies the
figures of data sheets by the shares of them that programs reach (constants.py). So the file says what a data
sheet would have to say for these shares to give what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_b2.config.encode import toml_value
from megatron_b2.layouts.traffic import Operation
from megatron_b2.planner.constants import Constants, load_constants

ASSUMED_WATTS: Final = 400.0
"""Of a device whose design power is not given (an A100's)."""


@dataclass(frozen=True, kw_only=True)
class GemmSpeed:
    """A product of two square matrices."""

    size: int
    seconds: float

    @property
    def flops(self) -> float:
        """Operations a second: 2 size^3 a call."""
        return 2 * self.size**3 / self.seconds


@dataclass(frozen=True, kw_only=True)
class CollectiveSpeed:
    """A collective of all ranks."""

    operation: Operation
    ranks: int
    bytes: int
    """Of the whole tensor, as `layouts.traffic.Traffic` counts."""
    seconds: float

    @property
    def wire_bytes(self) -> float:
        """What a rank sends with a ring."""
        passes = 2 if self.operation == "all_reduce" else 1
        return passes * self.bytes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Link:
    """seconds = latency + wire bytes / bandwidth."""

    latency: float
    """Seconds a call."""
    bandwidth: float
    """Bytes a second in one direction."""


@dataclass(frozen=True, kw_only=True)
class MachineSpeeds:
    """Everything that was measured on one machine."""

    device: str
    """Name of the processor or GPU."""
    kind: str
    """cpu or cuda."""
    architecture: str
    """ampere or hopper, whose share of a data sheet's peak the model uses; a CPU counts as ampere."""
    precision: str
    """Of the products: fp32 on a CPU, bf16 on a GPU."""
    memory_bytes: int
    """Of one device; of a CPU, the machine's."""
    gemms: tuple[GemmSpeed, ...]
    copy_bytes_per_second: float
    """Read and written, together."""
    ranks: int
    collectives: tuple[CollectiveSpeed, ...]
    """Empty with one rank."""

    @property
    def peak_flops(self) -> float:
        """Of the fastest product of the larger half of the sizes."""
        sizes = sorted(gemm.size for gemm in self.gemms)
        return max(gemm.flops for gemm in self.gemms if gemm.size >= sizes[len(sizes) // 2])


def fit_link(speeds: Sequence[CollectiveSpeed]) -> Link:
    """Latency and bandwidth by least squares of the relative errors, neither of them negative."""
    if len(speeds) < 2:
        raise ValueError(f"a line needs 2 measurements or more, not {len(speeds)}")
    seconds = np.array([speed.seconds for speed in speeds])
    columns = np.array([[1.0, speed.wire_bytes] for speed in speeds]) / seconds[:, None]
    scale = np.linalg.norm(columns, axis=0)  # calls and bytes differ by ten orders of magnitude
    columns /= scale
    found = np.linalg.lstsq(columns, np.ones(len(speeds)), rcond=None)[0]
    if found.min() < 0:  # the best line with a part below 0 has none of that part
        found = np.where(found < 0, 0.0, columns.sum(axis=0))
    latency, per_byte = found / scale
    return Link(latency=float(latency), bandwidth=float(1 / per_byte) if per_byte else float("inf"))


def hardware_toml(
    speeds: MachineSpeeds,
    *,
    name: str,
    peak_flops: float | None = None,
    watts: float | None = None,
    network: float | None = None,
    constants: Constants | None = None,
) -> str:
    """A file for `b2 plan --gpu FILE`, with every measurement as a comment.

    Args:
        speeds: of one machine.
        name: of the device's table.
        peak_flops: of the data sheet for bf16; unless given, by the fastest product, whose rate in fp32
            counts as constants.tf32_share of it.
        watts: design power of a device; `ASSUMED_WATTS` unless given.
        network: bytes/s between nodes of a whole node; the link inside the node unless given.
        constants: the shares that the model will multiply by; the frozen ones unless given.
    """
    constants = constants or load_constants()
    links = _links(speeds.collectives)
    bf16 = speeds.peak_flops / (constants.tf32_share if speeds.precision == "fp32" else 1)
    memory = speeds.copy_bytes_per_second / constants.memory
    link = min((item.bandwidth / constants.nvlink for item in links.values()), default=memory)
    assumed = [] if watts else [f"tdp_watts is assumed ({ASSUMED_WATTS:g} W): it is not measured"]
    assumed += [] if network else ["nic_bandwidth is assumed: one machine does not see the network"]
    assumed += [] if links else ["nvlink_bandwidth is that of the memory: one rank has no link"]
    tables: dict[str, dict[str, str | float]] = {
        f"gpus.{toml_value(name)}": {
            "architecture": speeds.architecture if peak_flops else "measured",
            "peak_flops": peak_flops or bf16,
            "memory_bytes": float(speeds.memory_bytes),
            "memory_bandwidth": memory,
            "nvlink_bandwidth": link,
            "tdp_watts": watts or ASSUMED_WATTS,
            "node": f"{name}-node",
            "source": f"b2 plan calibrate on {speeds.device}, {speeds.precision}",
        },
        f"nodes.{toml_value(f'{name}-node')}": {
            "gpus": speeds.ranks,
            "nics": 1,
            "nic_bandwidth": network or link,
            "source": "given" if network else "assumed as fast as the link inside the node",
        },
    }
    lines = [*_comments(speeds, links), *(f"# {text}." for text in assumed)]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(f"{key} = {toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _links(speeds: Sequence[CollectiveSpeed]) -> dict[Operation, Link]:
    operations = dict.fromkeys(item.operation for item in speeds)
    return {name: fit_link([item for item in speeds if item.operation == name]) for name in operations}


def _comments(speeds: MachineSpeeds, links: Mapping[Operation, Link]) -> list[str]:
    """Every measurement."""
    return [
        f"# Measured by b2 plan calibrate on {speeds.device}; {speeds.ranks} ranks.",
        "# Rates are those of a data sheet of which the planner's shares are what was measured:",
        f"# copy: {speeds.copy_bytes_per_second / 1e9:.4g} GB/s read and written",
        *(f"# product of size {gemm.size}: {gemm.flops / 1e12:.4g} TFLOP/s" for gemm in speeds.gemms),
        *(
            f"# {name}: {link.latency * 1e6:.3g} us a call, {link.bandwidth / 1e9:.4g} GB/s"
            for name, link in links.items()
        ),
    ]
