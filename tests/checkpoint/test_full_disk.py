"""A full disk while saving: one clear error on every rank, nothing half-written, the last save intact."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_b2.checkpoint import latest_checkpoint, open_weights, save_checkpoint
from megatron_b2.checkpoint.hf import export_hf
from megatron_b2.errors import CheckpointError
from megatron_b2.parallel.comm import ProcessGroupComm
from megatron_b2.testing.fork import run_ranks
from tests import disk
from tests.checkpoint.support import flat_state, make_hf_folder, numbered, save_small


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk.small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_no_space_left(small_disk: Path) -> None:
    first = save_small(small_disk, 1)
    with pytest.raises(CheckpointError, match="step_00000002 was not saved") as caught:
        save_small(small_disk, 2, size=100_000)
    assert "rank 0: " in str(caught.value)
    assert "step_00000002.tmp/rank_00000.safetensors: No space left on device" in str(caught.value)
    assert [p.name for p in small_disk.iterdir()] == [first.name]
    assert latest_checkpoint(small_disk) == first
    assert latest_checkpoint(small_disk) == save_small(small_disk, 1, scale=3.0)


def test_no_space_left_for_an_export(small_disk: Path, tmp_path: Path) -> None:
    source = open_weights(make_hf_folder(tmp_path / "hf", "7b"))
    with pytest.raises(CheckpointError, match=r"cannot write .*exported, nothing is left: No space left"):
        export_hf(source, small_disk / "exported", style="llama")
    assert list(small_disk.iterdir()) == []


def limited(body: Callable[[], object]) -> str:
    """The CheckpointError of `body`, run in a child whose files may not grow beyond 64 KiB: needs no root."""

    def child() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
        with pytest.raises(CheckpointError) as caught:
            body()
        return str(caught.value)

    [message] = run_ranks(1, child)
    return str(message)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    first = save_small(tmp_path, 1)
    message = limited(lambda: save_small(tmp_path, 2, size=100_000))
    assert "step_00000002.tmp/rank_00000.safetensors: File too large" in message
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    assert latest_checkpoint(tmp_path) == first


def test_an_export_that_may_not_grow(tmp_path: Path) -> None:
    source = open_weights(make_hf_folder(tmp_path / "hf", "7b"))
    message = limited(lambda: export_hf(source, tmp_path / "exported", style="llama"))
    assert "exported, nothing is left: File too large" in message
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_limit_on_one_rank_stops_all_ranks(tmp_path: Path) -> None:
    first = save_small(tmp_path, 1)
    tensors = {"model/w": numbered((200, 500))}

    def save() -> str:
        comm = ProcessGroupComm()
        if comm.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
        state = flat_state(tensors, rank=comm.rank, ranks=comm.size)
        try:
            save_checkpoint(
                tmp_path,
                step=2,
                tokens=0,
                state=state,
                rank_state={"rng": torch.zeros(3)},
                meta={},
                files={},
                comm=comm,
            )
        except CheckpointError as error:
            return str(error)
        return "saved"

    messages = run_ranks(2, save)
    assert messages[0] == messages[1]
    assert "rank 1: " in messages[0]
    assert "rank 0: " not in messages[0]
    assert "rank_00001.safetensors: File too large" in messages[0]
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    assert latest_checkpoint(tmp_path) == first
