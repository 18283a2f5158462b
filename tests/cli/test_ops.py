"""`b2 ops`: the list, the verification and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_b2.cli.main import main
from megatron_b2.ops.registry import BACKENDS
from megatron_b2.testing.kernels import verify
from megatron_b2.testing.kernels.parity import Check, Deviation, deviation


def test_list_names_every_backend_and_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ops.json"
    assert main(["ops", "list", "--device", "cpu", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["operations"]
    assert [(r["op"], r["backend"]) for r in rows] == [(op, b) for op, bs in BACKENDS.items() for b in bs]
    for row in rows:
        assert row["automatic"] == (row["backend"] == "reference")
        assert bool(row["why_not"]) == (row["backend"] != "reference")
    assert "needs a CUDA device" in capsys.readouterr().out


def test_a_missing_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(torch.cuda, "is_available", lambda: False):
        assert main(["ops", "list", "--device", "cuda"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_verify_runs_what_is_named_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "verify.json"
    arguments = ["ops", "verify", "--quick", "--device", "cpu", "--only", "swiglu triton 5 x 1"]
    assert main([*arguments, "--json", str(file)]) == 0
    records = json.loads(file.read_text())
    assert {record["op"] for record in records} == {"swiglu"}
    assert all(record["passed"] and record["deviations"] for record in records)
    assert (
        f"{len(records)} of {len(records)} within twice the error of torch, or a few fp32 units"
        in capsys.readouterr().out
    )


def test_verify_fails_if_one_check_does(capsys: pytest.CaptureFixture[str]) -> None:
    def far_off(_device: torch.device) -> list[Deviation]:
        return [Deviation("out", ours=3e-3, torch=1e-3, floor=1e-7)]

    def broken(_device: torch.device) -> list[Deviation]:
        raise RuntimeError("no kernel")

    checks = [Check("swiglu", "cuda", name, run, quick=True) for name, run in (("a", far_off), ("b", broken))]
    with patch.object(verify, "all_checks", lambda **_: checks):
        assert main(["ops", "verify", "--quick", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "out 3.0e-03, torch 1.0e-03  TOO FAR OFF" in output
    assert "FAILED: RuntimeError: no kernel" in output
    assert "0 of 2" in output


@pytest.mark.parametrize("only", ["swiglu triton 5 x 1", "swiglu cuda 5 x 1"])
def test_verify_says_first_what_is_missing(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        patch.object(verify, "find_spec", lambda name: None),
        patch.object(verify.cpu_shim, "missing", lambda: "g++ was not found"),
    ):
        assert main(["ops", "verify", "--quick", "--device", "cpu", "--only", only]) == 2
    printed = capsys.readouterr()
    reason = "g++ was not found" if "cuda" in only else "the triton package is not installed"
    assert f"{only.split()[1]} needs what is not here: {reason}; mend that, or use --only" in printed.err
    assert "checks on" not in printed.out


def test_verify_needs_a_mode_and_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops", "verify"]) == 2
    assert main(["ops", "verify", "--quick", "--only", "nothing like it"]) == 2
    assert "no check's text contains it" in capsys.readouterr().err


def test_the_criterion() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    close, far = (exact.float() + error for error in (1e-3, 2.5e-3))
    assert deviation("x", close, close, exact).passed
    assert not deviation("x", far, close, exact).passed
    assert not deviation("x", torch.tensor([1.0, torch.nan]), close, exact).passed
    assert deviation("x", exact.float(), exact.float(), exact).passed  # both exact
    # Where torch is exact, a few fp32 units are allowed and no more, also in 16 bits.
    one = torch.tensor([1.0])
    for ours, passed in (
        (one + 2e-7, True),
        (one + 8e-7, False),
        (one.half() + torch.finfo(torch.float16).eps, False),
        (one.bfloat16() + torch.finfo(torch.bfloat16).eps, False),
    ):
        assert deviation("x", ours, one.to(ours.dtype), one.double()).passed == passed
