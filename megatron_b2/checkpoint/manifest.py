"""The manifest of a checkpoint: what is in it, where, and the checksum of every file.

`manifest.json` names steps, tensors, chunks and files. `SHA256SUMS` repeats the checksums, with that of
the manifest itself, in the format of coreutils: `sha256sum -c SHA256SUMS` checks a checkpoint without
this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_b2.checkpoint.files import write_file
from megatron_b2.checkpoint.logical import coverage_problem
from megatron_b2.checkpoint.reading import Chunk, StoredTensor
from megatron_b2.checkpoint.tensor_file import DTYPES, dtype_name
from megatron_b2.errors import CheckpointError
from megatron_b2.files.hashing import FileRecord

FORMAT = "megatron_b2.checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint except the values."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Input tokens seen."""
    meta: Mapping[str, Any]
    """What the trainer keeps: "run" (resolved configuration), fingerprints, metrics. Plain JSON."""
    tensors: Mapping[str, StoredTensor]
    """Logical tensors by name."""
    files: Mapping[str, FileRecord]
    """Every file except the manifest and the checksum list."""
    world_size: int = field(default=1)
    """Ranks that wrote it."""

    def to_json(self) -> str:
        """Text of manifest.json."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "tokens": self.tokens,
            "world_size": self.world_size,
            "meta": self.meta,
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
            "files": {name: {"sha256": r.sha256, "bytes": r.bytes} for name, r in self.files.items()},
        }
        return json.dumps(body, indent=1, ensure_ascii=False)

    def coverage_problems(self) -> list[str]:
        """Tensors whose chunks do not tile them exactly once."""
        found = (
            (name, coverage_problem(tensor.shape, [(c.offsets, c.shape) for c in tensor.chunks]))
            for name, tensor in self.tensors.items()
        )
        return [f"{name}: {problem}" for name, problem in found if problem]

    def write(self, folder: Path) -> None:
        """Write manifest.json and SHA256SUMS durably into `folder`."""
        own = write_file(folder / MANIFEST, self.to_json().encode())
        lines = [
            f"{record.sha256}  {name}\n" for name, record in sorted({**self.files, MANIFEST: own}.items())
        ]
        write_file(folder / CHECKSUMS, "".join(lines).encode())


def read_manifest(folder: Path) -> Manifest:
    """Parse the manifest of a checkpoint folder; CheckpointError names the file and what is wrong with it."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: not a checkpoint, it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a manifest of {FORMAT}")
    if body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {body.get('format_version')!r}; this release reads {FORMAT_VERSION}"
        )
    try:
        return Manifest(
            step=int(body["step"]),
            tokens=int(body["tokens"]),
            world_size=int(body["world_size"]),
            meta=dict(body["meta"]),
            tensors={name: _tensor_from_json(value) for name, value in body["tensors"].items()},
            files={
                n: FileRecord(bytes=int(v["bytes"]), sha256=v["sha256"]) for n, v in body["files"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def read_checksums(folder: Path) -> dict[str, str]:
    """File name to SHA-256 as SHA256SUMS says; CheckpointError when the file is missing or malformed."""
    path = folder / CHECKSUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from error
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise CheckpointError(f"{path}:{number}: damaged line {line!r}")
        sums[name] = digest
    return sums


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "chunks": [
            {"file": c.file, "key": c.key, "offsets": list(c.offsets), "shape": list(c.shape)}
            for c in tensor.chunks
        ],
    }


def _tensor_from_json(value: Mapping[str, Any]) -> StoredTensor:
    chunks = tuple(
        Chunk(file=c["file"], key=c["key"], offsets=tuple(c["offsets"]), shape=tuple(c["shape"]))
        for c in value["chunks"]
    )
    return StoredTensor(dtype=DTYPES[value["dtype"]], shape=tuple(value["shape"]), chunks=chunks)
