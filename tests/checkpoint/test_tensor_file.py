"""Our streaming writer, read by the safetensors library."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_b2.checkpoint import tensor_file
from megatron_b2.checkpoint.tensor_file import DTYPES, Entry, open_tensor_file, tensor_entry, write_tensors
from megatron_b2.errors import CheckpointError


def test_the_library_reads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)  # many blocks a tensor
    torch.manual_seed(0)
    tensors = {
        name: (torch.randn(7, 5) * 50).to(dtype) if dtype != torch.bool else torch.randn(7, 5) > 0
        for name, dtype in DTYPES.items()
    }
    tensors |= {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(6, 9).t(),
        "strided": torch.randn(40)[::3],
        "odd bytes": torch.arange(5, dtype=torch.uint8),
        "ünï/码": torch.ones(2),
    }
    path = tmp_path / "x.safetensors"
    seen: list[int] = []
    record = write_tensors(
        path,
        [tensor_entry(k, t) for k, t in tensors.items()],
        metadata={"format": "pt"},
        on_bytes=seen.append,
    )
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor), key
    data = path.read_bytes()
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sum(seen) == sum(t.numel() * t.itemsize for t in tensors.values())
    described = open_tensor_file(path).describe()
    assert described == {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}


def test_blocks_must_be_what_was_declared(tmp_path: Path) -> None:
    wrong_size = Entry(key="a", dtype=torch.float32, shape=(3,), blocks=lambda: [torch.zeros(2)])
    with pytest.raises(CheckpointError, match="a gave 8 bytes instead of 12"):
        write_tensors(tmp_path / "1", [wrong_size])
    wrong_type = Entry(key="a", dtype=torch.float32, shape=(3,), blocks=lambda: [torch.zeros(3).half()])
    with pytest.raises(CheckpointError, match=r"a is torch\.float16, declared torch\.float32"):
        write_tensors(tmp_path / "2", [wrong_type])
    with pytest.raises(CheckpointError, match="complex64 cannot be saved"):
        write_tensors(tmp_path / "3", [tensor_entry("a", torch.zeros(1, dtype=torch.complex64))])
    with pytest.raises(CheckpointError, match="two tensors of one file have the name 'a'"):
        write_tensors(tmp_path / "4", [tensor_entry("a", torch.zeros(1))] * 2)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="file is missing") as missing:
        open_tensor_file(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="damaged or not a tensor file") as damaged:
        open_tensor_file(path)
    assert name in str(missing.value)
    assert name in str(damaged.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_a_tensor_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".bin":
        torch.save({"a": torch.zeros(3)}, path)
    else:
        write_tensors(path, [tensor_entry("a", torch.zeros(3))])
    file = open_tensor_file(path)
    for index in ((), (slice(0, 1),)):
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: .*'b'"):
            file.read("b", index)


def test_a_torch_file_of_something_else_is_named(tmp_path: Path) -> None:
    for wrong in ([torch.zeros(1)], {"a": 3}):
        torch.save(wrong, tmp_path / "x.bin")
        with pytest.raises(CheckpointError, match=r"x\.bin: damaged or not a tensor file"):
            open_tensor_file(tmp_path / "x.bin")
