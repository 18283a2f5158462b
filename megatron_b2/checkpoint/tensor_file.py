"""Tensor files: a streaming safetensors writer that hashes as it writes, and lazy readers.

The layout is the public safetensors one: eight bytes little-endian header length, a JSON header padded with
spaces to a multiple of eight, then the data without holes. Written by hand because the library needs
every tensor of a file in memory at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_b2.checkpoint.logical import Shape
from megatron_b2.errors import CheckpointError
from megatron_b2.files.hashing import BLOCK_BYTES, FileRecord, OnBytes

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""The safetensors names of the data types that checkpoints may hold."""


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors name of a torch data type; CheckpointError when checkpoints cannot hold it."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise CheckpointError(f"tensors of {dtype} cannot be saved; use one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: known shape, values made when their turn comes."""

    key: str
    dtype: torch.dtype
    shape: Shape
    blocks: Callable[[], Iterable[Tensor]]
    """Gives the values as consecutive row-major parts of any shape."""

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


def tensor_entry(key: str, tensor: Tensor) -> Entry:
    """Entry of a tensor that is in memory already, on any device, with any strides."""
    return Entry(key=key, dtype=tensor.dtype, shape=tuple(tensor.shape), blocks=lambda: (tensor,))


def write_tensors(
    path: Path,
    entries: Sequence[Entry],
    *,
    metadata: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> FileRecord:
    """Create a safetensors file durably; at most one tensor's copy is in memory.

    `path` must not exist. Entries are laid out by falling item size, so that every tensor is aligned.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(ordered, metadata or {})
    size = len(header)
    digest = hashlib.sha256(header)
    with path.open("xb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        for entry in ordered:
            written = 0
            for buffer in _buffers(entry):
                _write_hashed(file, buffer, hasher, digest)
                written += len(buffer)
                if on_bytes is not None:
                    on_bytes(len(buffer))
            if written != entry.nbytes:
                raise CheckpointError(f"{path}: {entry.key} gave {written} bytes instead of {entry.nbytes}")
            size += written
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def _write_hashed(file: BinaryIO, buffer: memoryview, hasher: ThreadPoolExecutor, digest: Any) -> None:
    """Hash and write the same bytes at the same time: both release the interpreter lock."""
    hashing = hasher.submit(digest.update, buffer)
    file.write(buffer)
    hashing.result()


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        if entry.key in table:
            raise CheckpointError(f"two tensors of one file have the name {entry.key!r}")
        table[entry.key] = {
            "dtype": dtype_name(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _buffers(entry: Entry) -> Iterator[memoryview]:
    for block in entry.blocks():
        if block.dtype != entry.dtype:
            raise CheckpointError(f"{entry.key} is {block.dtype}, declared {entry.dtype}")
        flat = block.detach().reshape(-1)
        for part in torch.split(flat, BLOCK_BYTES // entry.dtype.itemsize):
            if part.numel():
                yield part.cpu().contiguous().view(torch.uint8).numpy().data


class TensorFile(Protocol):
    """An open file of named tensors, read lazily."""

    def describe(self) -> dict[str, tuple[torch.dtype, Shape]]:
        """Data type and shape of every tensor, without reading values."""
        ...

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """One rectangle of one tensor."""
        ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = safe_open(str(path), framework="pt")

    def describe(self) -> dict[str, tuple[torch.dtype, Shape]]:
        table: dict[str, tuple[torch.dtype, Shape]] = {}
        for key in self._file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            view = self._file.get_slice(key)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{self._path}: {key}: data type {view.get_dtype()} is none of {', '.join(DTYPES)}"
                )
            table[key] = (DTYPES[view.get_dtype()], tuple(view.get_shape()))
        return table

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        try:
            part: Tensor = self._file.get_slice(key)[index] if index else self._file.get_tensor(key)
        except (SafetensorError, IndexError) as error:
            raise CheckpointError(f"{self._path}: tensor {key!r} cannot be read ({error})") from error
        return part


class _TorchFile:
    """A pytorch_model*.bin state dictionary, memory-mapped; only tensors are unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(self._tensors, dict):
            raise ValueError(f"it holds a {type(self._tensors).__name__}, not tensors by name")
        for key, tensor in self._tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{key!r} is a {type(tensor).__name__}, not a tensor")

    def describe(self) -> dict[str, tuple[torch.dtype, Shape]]:
        return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in self._tensors.items()}

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"{self._path}: holds no tensor {key!r}")
        return self._tensors[key][index]


def open_tensor_file(path: Path) -> TensorFile:
    """Open a .safetensors or .bin file; CheckpointError naming the file when it is missing or damaged."""
    try:
        return _TorchFile(path) if path.suffix == ".bin" else _SafetensorsFile(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file is missing") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or not a tensor file ({error})") from error
