"""The part of the kit that needs a GPU, run here with the clock replaced: nothing in these tests is a measurement."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_b2.cli.main import main
from megatron_b2.config import load_config
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.testing.kernels import gpu
from megatron_b2.testing.kernels.gpu import PEAKS, Measurement, bound, markdown, measure, peak_of, sanitize
from megatron_b2.testing.kernels.interpreter import run_interpreted
from megatron_b2.testing.kernels.workloads import MODELS, Sizes, problems

SMALL = Sizes(
    "small", tokens=16, hidden=16, ffn=16, heads=1, head_dim=16, vocab=40, alibi=False, dtype=torch.float32
)
CPU = torch.device("cpu")
OPS = {"add_rms_norm", "swiglu", "rope_split", "causal_attention", "norm_head_loss"}


def one_millisecond(call: Callable[[], object], device: torch.device) -> float:
    """A clock that calls twice, as the real one calls often, and does not look."""
    assert device == CPU
    call()
    call()
    return 1e-3


def dry_run(models: tuple[Sizes, ...], device_name: str) -> list[Measurement]:
    return list(measure(CPU, device_name=device_name, models=models, clock=one_millisecond))


def test_every_operation_of_torch_is_timed_in_both_directions() -> None:
    models = (SMALL, replace(SMALL, name="alibi", alibi=True))
    rows = dry_run(models, "NVIDIA H800")
    torch_rows = {(row.shape, row.op, row.direction) for row in rows if row.implementation == "torch"}
    directions = ("forward", "backward")
    expected = {("small", op, direction) for op in OPS for direction in directions}
    expected |= {("alibi", op, direction) for op in OPS - {"rope_split"} for direction in directions}
    assert torch_rows == expected
    assert {row.implementation for row in rows if row.op == "causal_attention"} >= {"torch", "torch sdpa"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_ours_are_timed_beside_torch() -> None:
    rows = run_interpreted(partial(dry_run, (SMALL, replace(SMALL, name="alibi", alibi=True)), "NVIDIA A800"))
    ours = {(row.op, row.direction) for row in rows if row.implementation == "triton"}
    assert ours == {(op, direction) for op in OPS for direction in ("forward", "backward")}


def test_speed_follows_from_the_least_bytes_and_operations() -> None:
    rows = {
        (row.op, row.implementation, row.direction): row for row in dry_run((SMALL,), "NVIDIA A100-SXM4-80GB")
    }
    swiglu = rows["swiglu", "torch", "forward"]
    assert swiglu.bytes_per_second == 16 * 3 * 16 * 4 / 1e-3
    assert swiglu.flops_per_second == 0
    assert swiglu.roofline == pytest.approx(16 * 3 * 16 * 4 / 2.039e12 / 1e-3)
    attention = rows["causal_attention", "torch", "backward"]
    assert attention.flops_per_second == pytest.approx(2.5 * 2 * 16 * 16 * 16 / 1e-3)


@pytest.mark.parametrize(
    ("op", "direction", "megabytes", "tflop"),
    [
        ("swiglu", "forward", 270.5, 0),
        ("swiglu", "backward", 450.9, 0),
        ("add_rms_norm", "forward", 134.2, 0),
        ("causal_attention", "forward", None, 0.137),
        ("causal_attention", "backward", None, 0.344),
        ("norm_head_loss", "forward", None, 4.22),
        ("norm_head_loss", "backward", None, 8.43),
    ],
)
def test_the_least_work_is_that_of_the_roofline_study(
    op: str, direction: str, megabytes: float | None, tflop: float
) -> None:
    """KERNELS.md section 4, 7B at TP 1; on meta tensors, since only sizes count."""
    (problem,) = (p for p in problems(MODELS[0], torch.device("meta")) if p.op == op)
    if megabytes is not None:
        assert getattr(problem, f"{direction}_bytes") / 1e6 == pytest.approx(megabytes, abs=0.1)
    assert getattr(problem, f"{direction}_flops") / 1e12 == pytest.approx(tflop, rel=5e-3)


def test_models_are_those_of_the_presets() -> None:
    for sizes in MODELS:
        name, size = sizes.name.split(" TP ")
        model = load_config(f"preset:baichuan2-{name.lower()}").config.model
        assert sizes.hidden == model.hidden_size
        assert sizes.ffn * int(size) == model.ffn_hidden_size
        assert sizes.heads * int(size) == model.num_heads
        assert sizes.vocab * int(size) == model.vocab_size
        assert sizes.alibi == (model.position == "alibi")


def test_a_rank_has_its_share_of_the_slopes_of_the_whole_model() -> None:
    sizes = replace(SMALL, hidden=80, heads=2, alibi=True)
    (problem,) = (one for one in problems(sizes, CPU) if one.op == "causal_attention")
    assert torch.equal(problem.alibi, alibi_slopes(5)[:2])
    assert not torch.equal(problem.alibi, alibi_slopes(2))


def test_the_slower_of_memory_and_computing_bounds() -> None:
    peak = PEAKS["H100"]
    assert bound(3.35e12, 0.0, peak) == 1.0
    assert bound(0.0, 989e12, peak) == 1.0
    assert bound(3.35e12, 2 * 989e12, peak) == 2.0
    assert peak_of("NVIDIA H800") == peak
    assert peak_of("NVIDIA GeForce RTX 4090") is None


def test_the_table_names_the_device_and_what_is_missing() -> None:
    rows = [row for row in dry_run((SMALL,), "Some GPU") if row.op == "swiglu"]
    text = markdown(rows)
    assert text.startswith("Measured on Some GPU; torch")
    for peer in ("liger_kernel", "flash_attn"):
        assert re.search(rf"(Beside|Not installed): .*{peer.split('_')[0]}", text)
    assert "| swiglu | small | forward | torch | 1,000.0 |" in text
    assert "device not in the table" in text


def test_without_a_gpu_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["ops", "bench", "--json", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out.strip() == gpu.NO_GPU
    assert "not measured" in gpu.NO_GPU
    assert not (tmp_path / "gpu.json").exists()


def test_with_a_gpu_everything_is_measured_and_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H800 ({device})")
    monkeypatch.setattr(gpu, "sanitize", lambda: ["memcheck: exit status 1"])
    monkeypatch.setattr(gpu, "measure", lambda device, device_name: iter(dry_run((SMALL,), device_name)))
    assert main(["ops", "bench", "--json", str(tmp_path / "gpu.json"), "--sanitize"]) == 1
    out = capsys.readouterr().out
    assert "memcheck: exit status 1" in out
    assert "Measured on NVIDIA H800 (cuda)" in out
    rows = [Measurement(**row) for row in json.loads((tmp_path / "gpu.json").read_text())]
    assert {row.op for row in rows} == OPS


def test_the_sanitizer_runs_the_checks_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    calls: list[list[str]] = []

    def run(command: list[str]) -> int:
        calls.append(command)
        return int("racecheck" in command)

    (failure,) = sanitize(run)
    assert "racecheck" in failure
    assert failure.endswith("exit status 1")
    assert [call[2] for call in calls] == list(gpu.TOOLS)
    # What follows the sanitizer's own arguments is a command of this package.
    command = calls[0][calls[0].index(sys.executable) :]
    help_text = subprocess.run([*command[:5], "--help"], capture_output=True, text=True, check=True).stdout
    assert "--quick" in help_text
    assert "--device" in help_text


def test_a_missing_sanitizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sanitize() == ["compute-sanitizer is not on PATH: it is part of the CUDA toolkit"]
