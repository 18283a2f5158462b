"""Bit flips, truncation, missing and swapped files: found, named, and an older checkpoint is used."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from megatron_b2.checkpoint import CheckpointReader, latest_checkpoint, list_checkpoints, resolve_checkpoint
from megatron_b2.cli.checkpoint import main
from megatron_b2.errors import CheckpointError
from megatron_b2.parallel.comm import Comm
from tests.checkpoint.support import flip, on_threads, save_small

FILES = ("rank_00000.safetensors", "config.toml", "manifest.json", "SHA256SUMS")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    save_small(tmp_path, 10)
    save_small(tmp_path, 20)
    return tmp_path


def test_undamaged(two: Path) -> None:
    assert latest_checkpoint(two) == two / "step_00000020"
    assert resolve_checkpoint(two) == two / "step_00000020"
    assert main(["verify", str(two)]) == 0
    assert latest_checkpoint(two / "absent") is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("position", [0, 3, 40, 41, 200, -1, -30])
def test_a_flipped_bit_is_found_and_named(
    two: Path, file: str, position: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flip(two / "step_00000020" / file, position)
    assert main(["verify", str(two / "step_00000020")]) == 1
    assert file in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(two) == two / "step_00000010"
    assert file in caplog.text
    assert main(["verify", str(two)]) == 1
    assert "step_00000010: whole" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
def test_a_short_or_missing_file_is_found_and_named(two: Path, file: str, damage: str) -> None:
    path = two / "step_00000020" / file
    data = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"")
    listed = list_checkpoints(two)[1]
    assert listed.problem is not None
    assert file in listed.problem
    assert latest_checkpoint(two, verify=False) == two / "step_00000010"


def test_a_file_of_another_step_is_found(two: Path) -> None:
    name = "rank_00000.safetensors"
    shutil.copy(two / "step_00000010" / name, two / "step_00000020" / name)
    assert list_checkpoints(two)[1].problem is None  # same size: only the hash tells
    assert [name in problem for problem in CheckpointReader(two / "step_00000020").verify()] == [True]
    assert latest_checkpoint(two) == two / "step_00000010"


def test_all_damaged_is_an_error_not_a_fresh_start(two: Path) -> None:
    for step in (10, 20):
        flip(two / f"step_{step:08d}" / "config.toml", 1)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        latest_checkpoint(two)


def test_ranks_agree_on_the_newest_good_one(two: Path) -> None:
    flip(two / "step_00000020" / "rank_00000.safetensors", 300)

    def find(comm: Comm) -> Path | None:
        return latest_checkpoint(two, comm=comm)

    assert on_threads(3, find) == [two / "step_00000010"] * 3


def test_foreign_and_newer_manifests_are_refused(two: Path) -> None:
    path = two / "step_00000020" / "manifest.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99; this release reads 1"):
        CheckpointReader(path.parent)
    path.write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="not a manifest of"):
        CheckpointReader(path.parent)


def test_a_chunk_the_manifest_forgot_is_an_error_when_read(two: Path) -> None:
    path = two / "step_00000020" / "manifest.json"
    body = json.loads(path.read_text())
    body["tensors"]["model/a"]["chunks"] = []
    path.write_text(json.dumps(body))
    reader = CheckpointReader(path.parent)
    assert any("model/a: only 0 of 192" in problem for problem in reader.verify(hashes=False))
    with pytest.raises(CheckpointError, match="0 of the 3 elements"):
        reader.read("model/a", (0, 0), (1, 3))
    assert torch.equal(reader.read("model/a", (0, 0), (0, 3)), torch.empty(0, 3))


def test_list_and_inspect(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(two), "--json", "-"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["tokens"], row["problem"]) for row in listed] == [
        (10, 1000, None),
        (20, 2000, None),
    ]
    assert main(["inspect", str(two), "--tensors", "--json", str(two / "report.json")]) == 0
    shown = capsys.readouterr().out
    assert "model/a" in shown
    assert "[64, 3]" in shown
    report = json.loads((two / "report.json").read_text())
    assert (report["step"], report["parameters"], report["ranks"]) == (20, 192, 1)
    assert main(["list", str(two)]) == 0
    assert "step_00000020" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        main(["list", str(two / "step_00000010")])
