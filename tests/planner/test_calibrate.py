"""The hardware file of a machine, from exact speeds and from this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from megatron_b2.planner.calibrate import (
    CollectiveSpeed,
    GemmSpeed,
    MachineSpeeds,
    fit_link,
    hardware_toml,
)
from megatron_b2.planner.constants import load_constants
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.testing.speeds import measure_machine


def collective(
    operation: str, size: int, *, latency: float = 2e-5, bandwidth: float = 1e11
) -> CollectiveSpeed:
    """Of 8 ranks, exactly as the formula."""
    wire = (2 if operation == "all_reduce" else 1) * size * 7 / 8
    return CollectiveSpeed(operation=operation, ranks=8, bytes=size, seconds=latency + wire / bandwidth)  # type: ignore[arg-type]


SIZES = (2**16, 2**20, 2**24, 2**28)


def speeds(**changes: object) -> MachineSpeeds:
    exact = {
        "device": "Test GPU",
        "kind": "cuda",
        "architecture": "ampere",
        "precision": "bf16",
        "memory_bytes": 80 * 2**30,
        "gemms": tuple(GemmSpeed(size=n, seconds=2 * n**3 / 200e12) for n in (2_048, 4_096)),
        "copy_bytes_per_second": 1.5e12,
        "ranks": 8,
        "collectives": tuple(collective(op, n) for op in ("all_reduce", "all_gather") for n in SIZES),
    }
    return MachineSpeeds(**{**exact, **changes})  # type: ignore[arg-type]


def test_a_link_is_fitted_exactly() -> None:
    link = fit_link([collective("all_reduce", size) for size in SIZES])
    assert link.latency == pytest.approx(2e-5)
    assert link.bandwidth == pytest.approx(1e11)


def test_a_link_whose_latency_would_be_negative_has_none() -> None:
    link = fit_link([collective("all_gather", size, latency=-1e-7) for size in SIZES[1:]])
    assert link.latency == 0
    assert link.bandwidth > 1e11


@given(
    latency=st.floats(-1e-4, 1e-3),
    bandwidth=st.floats(1e8, 1e12),
    noise=st.lists(st.floats(-0.3, 0.3), min_size=4, max_size=4),
)
def test_a_link_is_the_best_line_without_negative_parts(
    latency: float, bandwidth: float, noise: list[float]
) -> None:
    """Against SciPy's non-negative least squares."""
    exact = [collective("all_gather", size, latency=latency, bandwidth=bandwidth) for size in SIZES]
    found = [
        replace(item, seconds=max(item.seconds, 1e-6) * (1 + n)) for item, n in zip(exact, noise, strict=True)
    ]
    link = fit_link(found)
    rows = np.array([[1e-5, item.wire_bytes / 1e10] for item in found]) / [[item.seconds] for item in found]
    (best, per_byte), _ = nnls(rows, np.ones(len(found)))
    assert link.latency == pytest.approx(best * 1e-5, rel=1e-5, abs=1e-12)
    assert 1 / link.bandwidth == pytest.approx(per_byte / 1e10, rel=1e-5, abs=1e-18)


def test_one_point_is_no_line() -> None:
    with pytest.raises(ValueError, match="2 measurements"):
        fit_link([collective("all_reduce", 8)])


def test_the_file_gives_back_what_was_measured(tmp_path: Path) -> None:
    """The planner's shares of the file's rates are the measured rates."""
    path = tmp_path / "mine.toml"
    path.write_text(hardware_toml(speeds(), name="mine", watts=350, network=5e10))
    cluster, constants = load_hardware(str(path)), load_constants()
    gpu, node = cluster.gpu, cluster.node
    assert gpu.name == "mine"
    assert constants.matmul(gpu.architecture) * gpu.peak_flops == pytest.approx(200e12)
    assert constants.memory * gpu.memory_bandwidth == pytest.approx(1.5e12)
    assert constants.nvlink * gpu.nvlink_bandwidth == pytest.approx(1e11)
    assert (gpu.tdp_watts, gpu.memory_bytes) == (350, 80 * 2**30)
    assert (node.gpus, node.nics * node.nic_bandwidth) == (8, 5e10)
    assert "assumed" not in path.read_text()


def test_a_rate_in_fp32_is_that_of_fp32_work() -> None:
    text = hardware_toml(speeds(precision="fp32"), name="mine")
    line = next(line for line in text.splitlines() if line.startswith("peak_flops"))
    assert load_constants().tf32_share * float(line.partition("=")[2]) == pytest.approx(200e12)


def test_the_slowest_operation_is_the_link() -> None:
    slow = tuple(collective("all_gather", size, bandwidth=3e10) for size in SIZES)
    text = hardware_toml(speeds(collectives=(*speeds().collectives[: len(SIZES)], *slow)), name="mine")
    line = next(line for line in text.splitlines() if line.startswith("nvlink_bandwidth"))
    assert load_constants().nvlink * float(line.partition("=")[2]) == pytest.approx(3e10)


def test_what_is_assumed_is_said() -> None:
    text = hardware_toml(speeds(collectives=(), ranks=1), name="mine", peak_flops=312e12)
    assert "peak_flops = 312000000000000.0" in text
    assert 'architecture = "ampere"' in text
    for name in ("tdp_watts", "nic_bandwidth", "nvlink_bandwidth"):
        assert any(line.startswith(f"# {name}") for line in text.splitlines())


def test_this_machine(tmp_path: Path) -> None:
    """Real products, copies and gloo collectives of two ranks."""
    found = measure_machine(ranks=2, device="cpu", quick=True)
    assert {item.operation for item in found.collectives} == {"all_reduce", "all_gather", "reduce_scatter"}
    assert all(item.seconds > 0 and item.wire_bytes > 0 for item in found.collectives)
    assert all(gemm.flops > 0 for gemm in found.gemms)
    path = tmp_path / "cpu.toml"
    path.write_text(hardware_toml(found, name="cpu"))
    assert load_hardware(str(path)).node.gpus == 2
