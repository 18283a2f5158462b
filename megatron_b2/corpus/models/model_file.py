"""One file per trained model: named arrays, facts and a checksum, mapped into memory when it is read.

The format is safetensors (8 bytes with the length of a JSON header, the header, the arrays), so that any
reader of safetensors shows what is inside. Its `__metadata__` names kind and version of the model, the
SHA-256 of the array bytes, and the facts as JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_file
from megatron_b2.files.hashing import BLOCK_BYTES

_NAMES: Mapping[str, str] = MappingProxyType(
    {"U8": "uint8", "I32": "int32", "I64": "int64", "U64": "uint64", "F16": "float16", "F32": "float32"}
)
_CODES: Mapping[str, str] = MappingProxyType({name: code for code, name in _NAMES.items()})
_HEADER_STEP = 64
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class ModelFile:
    """A model as it is on disk."""

    arrays: Mapping[str, np.ndarray]
    """Read-only views of the mapped file."""
    facts: Mapping[str, Any]
    """What the trainer wrote beside the arrays: options, counts, language."""
    sha256: str
    """Of the bytes of all arrays: names the model, whatever its facts are."""


def write_model(
    path: Path, *, kind: str, version: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
    """Write a model atomically. The same arrays and facts give the same bytes.

    `arrays` are contiguous and of uint8, int32, int64, uint64, float16 or float32. Raises OutputError when
    the disk refuses.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # keeps every array aligned
    digest, entries, end = hashlib.sha256(), {}, 0
    for name in names:
        array = arrays[name]
        digest.update(_bytes(array))
        entries[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    metadata = {
        "format": kind,
        "version": str(version),
        "sha256": digest.hexdigest(),
        "facts": json.dumps(facts, ensure_ascii=False, sort_keys=True),
    }
    header = json.dumps({"__metadata__": metadata, **entries}, ensure_ascii=False).encode()
    header += b" " * (-(8 + len(header)) % _HEADER_STEP)
    with atomic_file(path) as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name in names:
            stream.write(_bytes(arrays[name]))


def read_model(path: Path, *, kind: str, version: int, verify: bool = True) -> ModelFile:
    """Map a model that `write_model` wrote; `verify` compares its checksum, which reads the whole file once.

    Raises InputError when the file is missing, damaged, of another kind or of another version.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            raw = stream.read(length) if length <= _MAX_HEADER else b""
        header = json.loads(raw)
        metadata = header.pop("__metadata__")
        found = (metadata["format"], int(metadata["version"]))
        facts = json.loads(metadata["facts"])
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a model file, or damaged; expected a {kind} model") from None
    if found[0] != kind:
        raise InputError(f"{path}: holds a {found[0]} model where a {kind} model is expected")
    if found[1] != version:
        raise InputError(
            f"{path}: version {found[1]} of {kind}; this program reads {version}: train it again"
        )
    arrays = _map_arrays(path, header, start=8 + length, size=size)
    if verify and _digest(path, 8 + length) != metadata["sha256"]:
        raise InputError(f"{path}: damaged (its checksum differs); copy or train it again")
    return ModelFile(arrays, facts, metadata["sha256"])


def _map_arrays(path: Path, header: Mapping[str, Any], *, start: int, size: int) -> dict[str, np.ndarray]:
    whole = np.memmap(path, np.uint8, "r") if size > start else np.empty(start, np.uint8)
    arrays = {}
    try:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = np.dtype(_NAMES[entry["dtype"]]), tuple(entry["shape"])
            if not 0 <= begin <= end <= size - start or math.prod(shape) * dtype.itemsize != end - begin:
                raise InputError(f"{path}: damaged: array {name!r} does not fit the file of {size:,} bytes")
            arrays[name] = np.asarray(whole[start + begin : start + end]).view(dtype).reshape(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged header: {error}") from None
    return arrays


def _digest(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
