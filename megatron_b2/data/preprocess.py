"""Text to `.bin`/`.idx`: shards encoded by several processes, reused after an interruption, joined in order.

While a run is going, `<prefix>.parts/` holds one small pair per finished shard. The shards depend on the
inputs only, and they are joined in the order (file, offset), so the result is the same for any number of
workers and any number of interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

from megatron_b2.data.encode import (
    EncodeJob,
    Shard,
    encode_shard,
    finished_shard,
    fresh_tokenizer,
    part_prefix,
)
from megatron_b2.data.indexed import bin_path, idx_path, merge, token_dtype
from megatron_b2.data.manifest import InputFile, Manifest, Tally, manifest_path, read_manifest, write_manifest
from megatron_b2.documents import expand_inputs
from megatron_b2.documents.shards import ScannedFile, plan_shards, scan_file, shard_bytes
from megatron_b2.errors import DataError, InputError
from megatron_b2.files.atomic import sync_folder, write_json
from megatron_b2.tokenizer import Tokenizer

JOB_VERSION = 1
_PUBLISHING = "publishing"

Progress = Callable[[str, int, int], None]
"""Called with (phase, bytes done, bytes in all); phases are "scan", "encode", "join"."""


@dataclass(frozen=True)
class PreprocessResult:
    """What a run did."""

    manifest: Manifest
    num_shards: int
    reused_shards: int
    """Shards that an interrupted run had finished."""
    already_done: bool
    """The output existed, made from the same inputs, tokenizer and options."""
    slow_because: str
    """Why SentencePiece itself did the encoding; empty where the native encoder could."""


def preprocess(
    inputs: Sequence[Path | str],
    *,
    tokenizer: Path,
    output: Path,
    workers: int = 1,
    text_key: str = "text",
    on_error: Literal["skip", "stop"] = "stop",
    end_of_document: bool = True,
    overwrite: bool = False,
    target_bytes: int | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> PreprocessResult:
    """Tokenize `inputs` into `<output>.bin`, `.idx` and the manifest `.json`.

    `target_bytes` is the least size of a shard; None chooses it by the size of the inputs.

    Raises InputError for missing inputs or (with on_error="stop") a malformed record, TokenizerError for a
    bad tokenizer, DataError when `output` exists and was made from something else.
    """
    if workers < 1:
        raise InputError(f"--workers {workers} must be at least 1")
    model = fresh_tokenizer(tokenizer)
    paths = expand_inputs(inputs)
    if target_bytes is None:
        target_bytes = shard_bytes(sum(path.stat().st_size for path in paths))
    job = EncodeJob(
        tokenizer=tokenizer,
        parts=output.with_name(f"{output.name}.parts"),
        dtype=token_dtype(model.vocab_size).name,
        text_key=text_key,
        on_error=on_error,
        end_of_document=end_of_document,
    )
    with _pool(workers) as pool:
        files = _scan(paths, target_bytes, pool, progress)
        fingerprint = _fingerprint(files, model, job, target_bytes)
        done = _existing_output(output, fingerprint, job, overwrite=overwrite)
        if done is not None:
            return PreprocessResult(done, 0, 0, already_done=True, slow_because=model.slow_because)
        with _parts_folder(job.parts, fingerprint):
            shards = [
                Shard(i, pieces) for i, pieces in enumerate(plan_shards(files, target_bytes=target_bytes))
            ]
            tally, reused = _encode_all(job, shards, pool, progress)
            if not tally.total.documents:
                shutil.rmtree(job.parts)
                raise InputError(f"no document with text in {len(files)} input files (key {text_key!r})")
            progress("join", 0, 1)
            joined = job.parts / "joined"
            merge([part_prefix(job, shard.number) for shard in shards], joined)
            manifest = _manifest(joined, fingerprint, job, model, files, tally)
            _publish(joined, output, manifest)
            progress("join", 1, 1)
    shutil.rmtree(job.parts)
    return PreprocessResult(
        manifest, len(shards), reused, already_done=False, slow_because=model.slow_because
    )


def _scan(
    paths: Sequence[Path], target_bytes: int, pool: _Workers | None, progress: Progress
) -> list[ScannedFile]:
    total = sum(path.stat().st_size for path in paths)
    scan = partial(scan_file, target_bytes=target_bytes)
    files, done = [], 0
    for file in pool.map(scan, paths, chunksize=1 + len(paths) // 256) if pool else map(scan, paths):
        files.append(file)
        done += file.size
        progress("scan", done, total)
    return files


def _fingerprint(files: Sequence[ScannedFile], model: Tokenizer, job: EncodeJob, target_bytes: int) -> str:
    """SHA-256 of the content of the inputs (not their folders), the tokenizer and what shapes the shards."""
    identity = {
        "version": JOB_VERSION,
        "inputs": [[file.path.name, file.size, file.sha256] for file in files],
        "tokenizer": model.fingerprint,
        "dtype": job.dtype,
        "text_key": job.text_key,
        "end_of_document": job.end_of_document,
        "target_bytes": target_bytes,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _manifest(
    joined: Path,
    fingerprint: str,
    job: EncodeJob,
    model: Tokenizer,
    files: Sequence[ScannedFile],
    tally: Tally,
) -> Manifest:
    return Manifest(
        job=fingerprint,
        tokenizer=model.fingerprint,
        vocab_size=model.vocab_size,
        dtype=job.dtype,
        end_of_document=job.end_of_document,
        text_key=job.text_key,
        bin_bytes=bin_path(joined).stat().st_size,
        idx_bytes=idx_path(joined).stat().st_size,
        inputs=tuple(InputFile(str(file.path), file.size, file.sha256) for file in files),
        tally=tally,
    )


def _existing_output(output: Path, fingerprint: str, job: EncodeJob, *, overwrite: bool) -> Manifest | None:
    """Manifest of a finished output of the very same job; None if there is nothing in the way."""
    existing = [path for path in (bin_path(output), idx_path(output), manifest_path(output)) if path.exists()]
    if not existing or overwrite or _publishing_job(job.parts) == fingerprint:
        return None  # the last: this job died between moving the .bin and writing the manifest
    manifest = read_manifest(output)
    same = len(existing) == 3 and manifest is not None and manifest.job == fingerprint
    if manifest is not None and same and not (job.on_error == "stop" and manifest.tally.malformed):
        return manifest
    raise DataError(
        f"{existing[0]} exists and was made from other inputs, another tokenizer or other options; "
        "choose another --output or pass --overwrite"
    )


def _publishing_job(parts: Path) -> str | None:
    """Fingerprint of the job that had begun to publish when it died."""
    marker = parts / _PUBLISHING
    return json.loads(marker.read_bytes()).get("job") if marker.exists() else None


def _publish(joined: Path, output: Path, manifest: Manifest) -> None:
    """Move the finished pair to `output`; an old manifest goes first, the new one comes last."""
    write_json(joined.with_name(_PUBLISHING), {"job": manifest.job})
    manifest_path(output).unlink(missing_ok=True)
    os.replace(bin_path(joined), bin_path(output))
    os.replace(idx_path(joined), idx_path(output))
    sync_folder(output.parent)
    write_manifest(output, manifest)


@contextmanager
def _parts_folder(parts: Path, fingerprint: str) -> Iterator[None]:
    """Folder of the finished shards of this job, locked; shards of another job are deleted.

    After an error it stays for the next run, unless no shard was finished.
    """
    marker = parts / "job.json"
    if parts.exists() and not marker.exists() and any(path.name != "lock" for path in parts.iterdir()):
        raise DataError(f"{parts} exists and is not a work folder of `b2 preprocess`; move it away")
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another `b2 preprocess` is writing {parts}; wait for it or stop it") from None
        if not marker.exists() or json.loads(marker.read_bytes())["job"] != fingerprint:
            for path in parts.iterdir():
                if path.name != "lock":
                    path.unlink()
            write_json(marker, {"job": fingerprint})
        try:
            yield
        except BaseException:
            if not any(parts.glob("*.tally")):
                shutil.rmtree(parts, ignore_errors=True)
            raise


def _encode_all(
    job: EncodeJob, shards: Sequence[Shard], pool: _Workers | None, progress: Progress
) -> tuple[Tally, int]:
    """Sum of the tallies of all shards, and how many shards were finished before."""
    tallies = {shard.number: tally for shard in shards if (tally := finished_shard(job, shard)) is not None}
    reused = len(tallies)
    total = sum(shard.size for shard in shards)
    done = sum(shard.size for shard in shards if shard.number in tallies)
    progress("encode", done, total)
    missing = [shard for shard in shards if shard.number not in tallies]
    for shard, tally in _run_shards(job, missing, pool):
        tallies[shard.number] = tally
        done += shard.size
        progress("encode", done, total)
    whole = Tally()
    for shard in shards:
        whole.add(tallies[shard.number])
    return whole, reused


def _run_shards(
    job: EncodeJob, shards: Sequence[Shard], pool: _Workers | None
) -> Iterator[tuple[Shard, Tally]]:
    if pool is None:
        for shard in shards:
            yield shard, encode_shard(job, shard)
        return
    futures: dict[Future[Tally], Shard] = {pool.submit(encode_shard, job, shard): shard for shard in shards}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        pool.kill()
        raise


class _Workers(ProcessPoolExecutor):
    """Spawned processes that end when this one does, however it ends."""

    def __init__(self, count: int) -> None:
        self._others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        super().__init__(count, mp_context=context, initializer=_start_worker)

    def kill(self) -> None:
        """End the workers in the middle of their shards."""
        self.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - self._others:
            worker.terminate()
            worker.join()


@contextmanager
def _pool(workers: int) -> Iterator[_Workers | None]:
    """The worker processes; None for one worker, which works in this process."""
    if workers == 1:
        yield None
        return
    with _Workers(workers) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed (out of memory?); run the same command again, with fewer "
                "--workers: finished shards are kept"
            ) from error


def _start_worker() -> None:
    """A worker ends at once on Ctrl-C and when the main process dies, however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="b2-parent-watch", daemon=True).start()
