"""The files of a Hugging Face folder: which ones hold tensors, and how an export is cut into shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from megatron_b2.errors import CheckpointError, InputError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
_UNITS: Mapping[str, int] = MappingProxyType(
    {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
)

Item = TypeVar("Item")


def tensor_files(folder: Path) -> list[str]:
    """Names of the files that hold the tensors of a Hugging Face folder, safetensors before .bin.

    CheckpointError when there are none, when an index is damaged, or when a file it names is missing.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH, TORCH_INDEX)):
        if (folder / index).is_file():
            names = _indexed(folder / index)
        elif (folder / single).is_file():
            names = [single]
        else:
            continue
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {', '.join(missing)} named by the index is missing")
        return names
    raise CheckpointError(f"{folder}: holds neither {SAFETENSORS}, nor {TORCH}, nor an index of shards")


def _indexed(path: Path) -> list[str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged index ({type(error).__name__}: {error})") from error


def parse_size(text: str) -> int:
    """Bytes of "5GB", "800MB", "2GiB" or a plain number; InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise InputError(f"size {text!r}: write a number and one of KB, MB, GB, KiB, MiB, GiB, such as 5GB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise InputError(f"size {text!r} must be positive")
    return size


def shard(items: Sequence[tuple[Item, int]], *, limit: int) -> list[list[Item]]:
    """Cut (item, bytes) pairs into runs of at most `limit` bytes, in order; a larger item has its own run."""
    runs: list[list[Item]] = []
    size = 0
    for item, nbytes in items:
        if not runs or size + nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(item)
        size += nbytes
    return runs


def shard_names(count: int) -> list[str]:
    """File names of `count` shards."""
    if count == 1:
        return [SAFETENSORS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
