"""Devices, nodes and the links between them: presets in hardware.toml, or a file of the same form.

`load_hardware("a800-80g")` gives a `Cluster` of as many such nodes as a layout needs; how many is the
workload's business. A file of one's own has one [gpus.NAME] table and, if the node is no preset, a
[nodes.NAME] table; `b2 plan calibrate` writes such a file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

from megatron_b2.errors import ConfigError

PRESETS_FILE: Final = "hardware.toml"
CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"architecture": ("ampere", "hopper", "measured"), "fabric": ("infiniband", "omnipath")}
)
"""Keys that hold a name."""
OPTIONAL: Final = ("source", "multiprocessors", *CHOICES)
"""Keys that a table may lack."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP/s by the data sheet."""
    memory_bytes: float
    """Device memory that a program can use."""
    memory_bandwidth: float
    """Bytes/s of the device memory."""
    nvlink_bandwidth: float
    """Bytes/s to the other devices of the node, in one direction."""
    tdp_watts: float
    """Thermal design power of the data sheet; energy from it is an upper estimate of the GPU's alone."""
    multiprocessors: float = 0
    """Streaming multiprocessors, over which tiles of a product go in waves; 0 where they are not known."""
    architecture: str = "ampere"
    """"ampere" or "hopper": what share of the peak large products reach (constants.py); "measured" where
    peak_flops is what a product has reached."""
    source: str = "not given"
    """Where the numbers are from."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine and its links to others."""

    name: str
    gpus: int
    """Devices of a node."""
    nics: int
    """Network ports of a node that serve its devices."""
    nic_bandwidth: float
    """Bytes/s of one port, in one direction."""
    fabric: str = "infiniband"
    """"infiniband" (also RoCE) or "omnipath": what share of the ports' rate collectives reach."""
    source: str = "not given"
    """Where the numbers are from."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices."""

    gpu: Gpu
    node: Node

    @property
    def gpu_network_bandwidth(self) -> float:
        """Bytes/s between nodes that one device gets when all of its node send, in one direction."""
        return self.node.nics * self.node.nic_bandwidth / self.node.gpus

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.gpu.name} ({self.node.name})"


def load_hardware(name_or_path: str, *, node: str | None = None) -> Cluster:
    """The cluster that a preset's name or a TOML file describes.

    Args:
        name_or_path: a GPU of hardware.toml (`gpu_names`), or a path that ends with .toml.
        node: another node table than the one that the GPU names (`node_names`, or one of the file).

    Raises:
        ConfigError: the GPU or node is unknown (lists what there is), or the file is wrong.
    """
    presets = _presets()
    tables, where, gpu, nodes = presets, PRESETS_FILE, name_or_path, dict(presets["nodes"])
    if name_or_path.endswith(".toml"):
        tables = _read(Path(name_or_path))
        where = name_or_path
        if len(tables["gpus"]) != 1:
            names = ", ".join(tables["gpus"]) or "none"
            raise ConfigError(f"{where} must have one [gpus.NAME] table, not {len(tables['gpus'])} ({names})")
        gpu = next(iter(tables["gpus"]))
        nodes |= tables["nodes"]
    elif gpu not in tables["gpus"]:
        raise ConfigError(
            f'GPU "{gpu}" is unknown; use one of {", ".join(gpu_names())}, or the path of a TOML file '
            "that describes it"
        )
    entry = dict(tables["gpus"][gpu])
    default = entry.pop("node", None)
    chosen = node or default or (next(iter(tables["nodes"])) if len(tables["nodes"]) == 1 else None)
    if chosen not in nodes:
        raise ConfigError(
            f'{where}: node "{chosen}" of GPU "{gpu}" is unknown; use one of {", ".join(nodes)}, or add a '
            "[nodes.NAME] table"
        )
    return Cluster(
        gpu=_made(Gpu, entry, f"{where}: [gpus.{gpu}]", gpu),
        node=_made(Node, nodes[chosen], f"{where}: [nodes.{chosen}]", str(chosen)),
    )


def gpu_names() -> tuple[str, ...]:
    """GPUs of hardware.toml."""
    return tuple(_presets()["gpus"])


def node_names() -> tuple[str, ...]:
    """Nodes of hardware.toml."""
    return tuple(_presets()["nodes"])


def with_nics(cluster: Cluster, *, node_bandwidth: float) -> Cluster:
    """The cluster with another network: bytes/s of a whole node, in one direction, over as many ports."""
    node = cluster.node
    rate = node_bandwidth / node.nics
    return replace(cluster, node=replace(node, name=f"{node.nics}x{rate * 8e-9:g}Gb/s", nic_bandwidth=rate))


@cache
def _presets() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files(__package__).joinpath(PRESETS_FILE).read_text(encoding="utf-8")
    return _tables(text, PRESETS_FILE)


def _read(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        return _tables(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _tables(text: str, where: str) -> Mapping[str, Mapping[str, Any]]:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is no TOML: {error}") from error
    unknown = sorted(set(found) - {"gpus", "nodes"})
    if unknown:
        raise ConfigError(f"{where}: [{unknown[0]}] is unknown; use [gpus.NAME] and [nodes.NAME]")
    for kind, tables in found.items():
        if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
            raise ConfigError(f"{where}: {kind} must hold tables, as [{kind}.NAME]")
    return {"gpus": found.get("gpus", {}), "nodes": found.get("nodes", {})}


Table = TypeVar("Table", Gpu, Node)


def _made(kind: type[Table], entry: Mapping[str, Any], where: str, name: str) -> Table:
    known = {field.name for field in fields(kind)} - {"name"}
    problems = [
        f"{where} {key} is unknown; use {', '.join(sorted(known))}" for key in entry if key not in known
    ]
    problems += [f"{where} {key} is missing" for key in sorted(known - set(OPTIONAL)) if key not in entry]
    for key, value in entry.items():
        if key in CHOICES and value not in CHOICES[key]:
            problems.append(f"{where} {key} = {value!r} must be one of {', '.join(CHOICES[key])}")
        elif key in known and key not in ("source", *CHOICES):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < float("inf"):
                problems.append(f"{where} {key} = {value!r} must be a number above 0")
    if problems:
        raise ConfigError(problems)
    return kind(name=name, **entry)
