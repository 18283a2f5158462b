"""Save and open checkpoints: one folder `step_00000020` a checkpoint, complete or absent.

Each rank writes its pieces to `rank_00000.safetensors` in `step_00000020.tmp`; when every rank has succeeded,
rank 0 adds the manifest and renames the folder. Every file and directory is fsynced before the rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from megatron_b2.checkpoint.files import TMP, describe, remove_folder, write_file
from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.checkpoint.manifest import CHECKSUMS, MANIFEST, Manifest, read_checksums, read_manifest
from megatron_b2.checkpoint.reading import Chunk, StoredTensor, TensorReader
from megatron_b2.checkpoint.tensor_file import Entry, tensor_entry, write_tensors
from megatron_b2.errors import CheckpointError
from megatron_b2.files.atomic import sync_folder
from megatron_b2.files.hashing import FileRecord, OnBytes, hash_file
from megatron_b2.parallel.comm import Comm, SingleComm

OLD = ".old"
"""Suffix of a checkpoint that is being replaced by a new one of the same step; still readable."""
RANK_STATE = "rank_state@"
"""Prefix of the per-rank extras in a rank's file."""


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, as its writer describes it to the others."""

    error: str | None = None
    """Why it could not be written."""
    file: str = ""
    record: FileRecord | None = None
    tensors: tuple[tuple[str, StoredTensor], ...] = ()
    """Logical tensors by name, with the chunks of them that lie in this file."""


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """File name of a rank's pieces."""
    return f"rank_{rank:05d}.safetensors"


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tokens: int,
    state: LogicalState,
    rank_state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    comm: Comm,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Save `state` as `root/step_XXXXXXXX`; every rank of `comm` calls it and gets the path.

    `rank_state`: extras of this rank (RNG, counters). `meta`: plain JSON for the manifest. `files`: small
    files by relative name, such as config.toml and tokenizer.model. `meta` and `files` of rank 0 count.
    `root` must be on a file system that all ranks share. `on_bytes` is told the bytes this rank has written.

    A crash at any moment leaves the earlier checkpoints untouched and readable. When any rank fails (a
    full disk, say), every rank raises CheckpointError naming each failed rank, file and cause, and the
    half-written folder is removed. An older checkpoint of the same step is replaced.
    """
    final = root / step_name(step)
    tmp = final.with_name(final.name + TMP)
    _agree(comm, final, tmp, _prepare(root, tmp, meta, files) if comm.rank == 0 else Part())
    ranks = _agree(comm, final, tmp, _write_rank(tmp, state, rank_state, comm.rank, on_bytes))
    done = Part()
    if comm.rank == 0:
        done = _commit(final, tmp, ranks, files, step=step, tokens=tokens, meta=meta)
    _agree(comm, final, tmp, done)
    return final


def _agree(comm: Comm, final: Path, tmp: Path, mine: Part) -> list[Part]:
    """Gather every rank's result on rank 0, the others get none.

    If one failed, remove `tmp` and raise the same error on all ranks.
    """
    parts: list[Part] = comm.gather_object(mine) or []
    failures: list[str] = comm.broadcast_object(
        [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error is not None]
    )
    if not failures:
        return parts
    if comm.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    comm.barrier()
    shown = "\n  ".join(failures[:8])
    if len(failures) > 8:
        shown += f"\n  ... and {len(failures) - 8} more ranks"
    raise CheckpointError(f"checkpoint {final} was not saved; earlier checkpoints are untouched:\n  {shown}")


def _prepare(root: Path, tmp: Path, meta: Mapping[str, Any], files: Mapping[str, bytes]) -> Part:
    try:
        json.dumps(dict(meta))
        for name in files:
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or name in (MANIFEST, CHECKSUMS):
                raise CheckpointError(f"extra file {name!r} must be a relative name inside the checkpoint")
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        tmp.mkdir()
    except Exception as error:  # told to every rank, which all raise: one rank alone would hang the others
        return Part(error=describe(error))
    return Part()


def _clean(root: Path) -> None:
    """Remove what crashed saves left, and finish or undo a replacement that was cut short."""
    for old in root.glob(f"step_*{OLD}"):
        current = old.with_name(old.name.removesuffix(OLD))
        if current.exists():
            remove_folder(old)
        else:
            old.rename(current)
    for stale in root.glob(f"step_*{TMP}"):
        shutil.rmtree(stale)


def _write_rank(
    tmp: Path, state: LogicalState, rank_state: Mapping[str, Tensor], rank: int, on_bytes: OnBytes | None
) -> Part:
    try:
        entries, tensors = state_entries(state, rank_state)
        if rank > 0:  # rank 0 names every tensor, so that one which nobody wrote is missed
            tensors = [(name, tensor) for name, tensor in tensors if tensor.chunks]
        return write_part(tmp, rank_file(rank), entries, tensors, on_bytes=on_bytes)
    except Exception as error:  # told to every rank, which all raise: one rank alone would hang the others
        path, text = str(tmp / rank_file(rank)), describe(error)
        return Part(error=text if path in text else f"{path}: {text}")


def state_entries(
    state: LogicalState, rank_state: Mapping[str, Tensor]
) -> tuple[list[Entry], list[tuple[str, StoredTensor]]]:
    """File entries of a rank's pieces and extras, and the tensors whose chunks have no file yet."""
    entries = [tensor_entry(RANK_STATE + name, tensor) for name, tensor in rank_state.items()]
    tensors: list[tuple[str, StoredTensor]] = []
    for name, logical in state.items():
        chunks: list[Chunk] = []
        for i, piece in enumerate(p for p in logical.pieces if p.write and p.tensor.numel()):
            if piece.tensor.dtype != logical.dtype:
                raise CheckpointError(f"{name}: a piece is {piece.tensor.dtype}, the tensor {logical.dtype}")
            key = f"{name}@{i}"
            entries.append(tensor_entry(key, piece.tensor))
            extent = tuple(piece.tensor.shape)
            chunks.append(Chunk(file="", key=key, offsets=tuple(piece.offsets), shape=extent))
        shape = tuple(logical.shape)
        tensors.append((name, StoredTensor(dtype=logical.dtype, shape=shape, chunks=tuple(chunks))))
    return entries, tensors


def write_part(
    folder: Path,
    file: str,
    entries: Sequence[Entry],
    tensors: Sequence[tuple[str, StoredTensor]],
    *,
    on_bytes: OnBytes | None = None,
) -> Part:
    """Write one tensor file of a checkpoint; `tensors` are the logical tensors whose chunks lie in it."""
    record = write_tensors(folder / file, entries, on_bytes=on_bytes)
    placed = tuple(
        (
            name,
            StoredTensor(
                dtype=t.dtype,
                shape=t.shape,
                chunks=tuple(Chunk(file=file, key=c.key, offsets=c.offsets, shape=c.shape) for c in t.chunks),
            ),
        )
        for name, t in tensors
    )
    return Part(file=file, record=record, tensors=placed)


def _commit(
    final: Path,
    tmp: Path,
    parts: Sequence[Part],
    files: Mapping[str, bytes],
    *,
    step: int,
    tokens: int,
    meta: Mapping[str, Any],
) -> Part:
    try:
        write_manifest(tmp, parts, files, step=step, tokens=tokens, meta=meta, world_size=len(parts))
        publish(tmp, final)
    except Exception as error:  # told to every rank, which all raise: one rank alone would hang the others
        return Part(error=describe(error))
    return Part()


def write_manifest(
    tmp: Path,
    parts: Sequence[Part],
    files: Mapping[str, bytes],
    *,
    step: int,
    tokens: int,
    meta: Mapping[str, Any],
    world_size: int,
) -> None:
    """Merge the parts of all ranks, check that they cover every tensor once, write extras and manifest."""
    records = {part.file: part.record for part in parts if part.record is not None}
    for name, data in files.items():
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        records[name] = write_file(tmp / name, data)
        sync_folder((tmp / name).parent)
    manifest = Manifest(
        step=step, tokens=tokens, meta=dict(meta), tensors=_merge(parts), files=records, world_size=world_size
    )
    if problems := manifest.coverage_problems():
        raise CheckpointError("the pieces of the ranks do not make whole tensors: " + "; ".join(problems[:8]))
    manifest.write(tmp)
    sync_folder(tmp)


def _merge(parts: Sequence[Part]) -> dict[str, StoredTensor]:
    chunks: dict[str, list[Chunk]] = {}
    first: dict[str, StoredTensor] = {}
    for part in parts:
        for name, tensor in part.tensors:
            known = first.setdefault(name, tensor)
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{name} is {list(known.shape)} {known.dtype} on one rank and {list(tensor.shape)} "
                    f"{tensor.dtype} in {part.file}"
                )
            chunks.setdefault(name, []).extend(tensor.chunks)
    return {n: StoredTensor(dtype=t.dtype, shape=t.shape, chunks=tuple(chunks[n])) for n, t in first.items()}


def publish(tmp: Path, final: Path) -> None:
    """Rename a finished folder into place; at every moment a whole checkpoint is visible."""
    old = final.with_name(final.name + OLD)
    if final.exists():
        final.rename(old)
    tmp.rename(final)
    sync_folder(final.parent)
    if old.exists():
        remove_folder(old)


class CheckpointReader(TensorReader):
    """An open checkpoint folder: metadata at once, tensor values on demand."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        super().__init__(self.path, self.manifest.tensors)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.manifest.step

    @property
    def tokens(self) -> int:
        """Input tokens seen."""
        return self.manifest.tokens

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the trainer stored beside the tensors."""
        return self.manifest.meta

    def rank_state(self, rank: int) -> dict[str, Tensor]:
        """Extras that `rank` saved; empty when the checkpoint was written by fewer ranks."""
        name = rank_file(rank)
        if name not in self.manifest.files:
            return {}
        file = self.file(name)
        keys = [key for key in file.describe() if key.startswith(RANK_STATE)]
        return {key.removeprefix(RANK_STATE): file.read(key, ()) for key in keys}

    def verify(
        self,
        *,
        hashes: bool = True,
        comm: Comm | None = None,
        threads: int = 4,
        on_bytes: OnBytes | None = None,
    ) -> list[str]:
        """Problems found, one line each, naming the file; empty when the checkpoint is whole.

        Checks sizes, tensor coverage and, with `hashes`, the SHA-256 of every file including the manifest.
        With `comm`, the ranks share the files between them and all get the same list.
        """
        comm = comm or SingleComm()
        problems: list[str] = []
        if comm.rank == 0:
            problems = self._manifest_problems(on_bytes) + self.manifest.coverage_problems()
        mine = sorted(self.manifest.files)[comm.rank :: comm.size]
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda name: self._file_problem(name, hashes, on_bytes), mine)
            problems += [problem for problem in found if problem is not None]
        everyone: list[list[str]] = comm.all_gather_object(problems)
        return [problem for part in everyone for problem in part]

    def _manifest_problems(self, on_bytes: OnBytes | None) -> list[str]:
        try:
            sums = read_checksums(self.path)
            own = hash_file(self.path / MANIFEST, on_bytes=on_bytes).sha256
        except (CheckpointError, OSError) as error:
            return [str(error)]
        if sums.get(MANIFEST) != own:
            return [f"{self.path / MANIFEST}: damaged, its SHA-256 is not the one in {CHECKSUMS}"]
        if sums != {name: record.sha256 for name, record in self.manifest.files.items()} | {MANIFEST: own}:
            return [f"{self.path / CHECKSUMS}: damaged, it disagrees with {MANIFEST}"]
        return []

    def _file_problem(self, name: str, hashes: bool, on_bytes: OnBytes | None) -> str | None:
        path, wanted = self.path / name, self.manifest.files[name]
        try:
            size = path.stat().st_size
            if size != wanted.bytes:
                return f"{path}: {size} bytes instead of {wanted.bytes} (truncated or foreign file)"
            if hashes and hash_file(path, on_bytes=on_bytes).sha256 != wanted.sha256:
                return f"{path}: damaged, its SHA-256 is not the one in the manifest"
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None
