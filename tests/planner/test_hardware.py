"""Hardware tables: the presets against data sheets, files of one's own, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megatron_b2.errors import ConfigError
from megatron_b2.planner.hardware import gpu_names, load_hardware, node_names, with_nics

OWN = """
[gpus.mine]
peak_flops = 2e14
memory_bytes = 32e9
memory_bandwidth = 9e11
nvlink_bandwidth = 6e10
tdp_watts = 300
node = "box"

[nodes.box]
gpus = 4
nics = 1
nic_bandwidth = 12.5e9
"""


def test_presets_are_those_of_the_data_sheets() -> None:
    """NVLink both ways: A100 600 GB/s, A800 and H800 400, H100 and H200 900."""
    both_ways = {name: load_hardware(name).gpu.nvlink_bandwidth * 2e-9 for name in gpu_names()}
    assert both_ways == {
        "a100-40g": 600,
        "a100-80g": 600,
        "a800-40g": 400,
        "a800-80g": 400,
        "h100-80g": 900,
        "h800-80g": 400,
        "h200-141g": 900,
    }
    for name in gpu_names():
        gpu = load_hardware(name).gpu
        is_ampere = gpu.architecture == "ampere"
        assert gpu.peak_flops == (312e12 if is_ampere else 989.4e12)
        assert gpu.tdp_watts == (400 if is_ampere else 700)
        size = float(name.split("-")[1].removesuffix("g"))
        assert 0.98 * size <= gpu.memory_bytes / 2**30 <= size
        assert len(gpu.source) > 20


def test_every_node_fits_every_gpu() -> None:
    for gpu, node in itertools.product(gpu_names(), node_names()):
        cluster = load_hardware(gpu, node=node)
        assert 0 < cluster.gpu_network_bandwidth < cluster.gpu.nvlink_bandwidth
        assert cluster.node.source != "not given"


def test_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    cluster = load_hardware(str(path))
    assert (cluster.name, cluster.gpu.peak_flops, cluster.node.gpus) == ("mine (box)", 2e14, 4)
    assert cluster.gpu_network_bandwidth == 12.5e9 / 4
    assert load_hardware(str(path), node="hdr200x8").node.nics == 8
    path.write_text(OWN.replace('"box"', '"opa100x4"').split("[nodes")[0])
    assert load_hardware(str(path)).node.fabric == "omnipath"


def test_network_by_its_rate() -> None:
    cluster = with_nics(load_hardware("a100-80g"), node_bandwidth=200e9)
    assert cluster.gpu_network_bandwidth == 25e9


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("peak_flops = 2e14", "", r"\[gpus.mine\] peak_flops is missing"),
        ("2e14", '"fast"', "peak_flops = 'fast' must be a number above 0"),
        ("2e14", "-1", "peak_flops = -1 must be a number above 0"),
        ("tdp_watts", "watts", r"watts is unknown; use .*tdp_watts"),
        ('"box"', '"shed"', 'node "shed" of GPU "mine" is unknown; use one of hdr200x8'),
        ("[gpus.mine]", "[gpu.mine]", r"\[gpu\] is unknown; use \[gpus.NAME\]"),
        ("[nodes.box]", "[gpus.two]", r"must have one \[gpus.NAME\] table, not 2 \(mine, two\)"),
        ("= 2e14", "= = 2e14", "is no TOML"),
        (
            "[gpus.mine]",
            '[gpus.mine]\narchitecture = "volta"',
            "architecture = 'volta' must be one of ampere",
        ),
    ],
)
def test_bad_files(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(old, new, 1))
    with pytest.raises(ConfigError, match=says):
        load_hardware(str(path))


def test_unknown_gpu_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r'GPU "v100" is unknown; use one of a100-40g, .*h200-141g, or'):
        load_hardware("v100")
    with pytest.raises(ConfigError, match=r"none.toml cannot be read"):
        load_hardware("none.toml")
